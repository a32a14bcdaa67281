#include "tools/orrery/env_server.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "libs/base/status.h"
#include "orrery/common/v1/environment.pb.h"

namespace orrery {
namespace {

static_assert(std::endian::native == std::endian::little, "numbers are copied as they lie in memory");

enum Kind : uint8_t { kReady = 1, kAdvance = 2, kRender = 3, kStates = 4, kPicture = 5, kError = 6 };
enum What : uint8_t { kNothing = 0, kReset = 1, kStep = 2 };
constexpr uint8_t kTerminalFlag = 1, kLastFlag = 2;
constexpr size_t kHeaderBytes = sizeof(uint32_t) + sizeof(uint8_t);
constexpr size_t kRenderBytes = 3 * sizeof(uint32_t);
constexpr uint32_t kMostPixels = 2048;  // of a picture's height and width
constexpr size_t kMostBytes = size_t{1} << 30;  // of STATES

template <typename T>
T Load(absl::string_view bytes, size_t index) {
  T value;
  std::memcpy(&value, bytes.data() + index * sizeof(T), sizeof(T));
  return value;
}

// What `in` has until `bytes` is full; false when the stream ends before the first byte.
absl::StatusOr<bool> Read(int in, std::string& bytes) {
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n = read(in, bytes.data() + done, bytes.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return absl::DataLossError(absl::StrCat("reading failed: ", std::strerror(errno)));
    if (n == 0 && done == 0) return false;
    if (n == 0) return absl::DataLossError(absl::StrCat("the stream ended after ", done, " of ", bytes.size(), " bytes"));
    done += static_cast<size_t>(n);
  }
  return true;
}

absl::Status Write(int out, absl::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = write(out, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return absl::UnavailableError(absl::StrCat("writing failed: ", std::strerror(errno)));
    bytes.remove_prefix(static_cast<size_t>(n));
  }
  return absl::OkStatus();
}

void SetHeader(Kind kind, std::string& message) {
  const auto length = static_cast<uint32_t>(message.size() - sizeof(uint32_t));
  std::memcpy(message.data(), &length, sizeof(length));
  message[sizeof(length)] = static_cast<char>(kind);
}

absl::Status Send(int out, Kind kind, absl::string_view body) {
  std::string message = absl::StrCat(std::string(kHeaderBytes, '\0'), body);
  SetHeader(kind, message);
  return Write(out, message);
}

size_t BytesOf(const TensorSpec& tensor) {
  size_t bytes = SizeOf(tensor.dtype);
  for (const int64_t size : tensor.shape) bytes *= static_cast<size_t>(size);
  return bytes;
}

common::v1::EnvironmentSpec ToProto(const EnvironmentSpec& spec) {
  common::v1::EnvironmentSpec proto;
  for (const TensorSpec& tensor : spec.observations) {
    common::v1::TensorSpec& observation = *proto.add_observations();
    observation.set_name(tensor.name);
    observation.set_data_type(static_cast<common::v1::DataType>(tensor.dtype));
    observation.mutable_shape()->Add(tensor.shape.begin(), tensor.shape.end());
  }
  proto.mutable_action()->set_size(spec.action.size);
  proto.mutable_action()->set_discrete(spec.action.discrete);
  return proto;
}

class Server {
 public:
  Server(VectorEnvironment& environments, int in, int out)
      : environments_(environments),
        in_(in),
        out_(out),
        count_(static_cast<size_t>(environments.size())),
        action_size_(static_cast<size_t>(environments.spec().action.size)) {
    size_t bytes = kHeaderBytes + count_ * (sizeof(double) + sizeof(uint8_t));
    for (const TensorSpec& tensor : environments.spec().observations) {
      places_.push_back(bytes);
      bytes += count_ * BytesOf(tensor);
    }
    bytes_ = bytes;
  }

  absl::Status Start() {
    if (bytes_ > kMostBytes) {
      return absl::InvalidArgumentError(absl::StrCat("the observations of ", count_, " environments take ", bytes_,
                                                     " bytes, expected at most ", kMostBytes));
    }
    states_.resize(bytes_);
    SetHeader(kStates, states_);
    return Send(out_, kReady, ToProto(environments_.spec()).SerializeAsString());
  }

  // Reads and answers one message; false at the end of the stream.
  absl::StatusOr<bool> Step() {
    std::string header(kHeaderBytes, '\0');
    ASSIGN_OR_RETURN(const bool any, Read(in_, header));
    if (!any) return false;
    const auto length = Load<uint32_t>(header, 0);
    const auto kind = static_cast<uint8_t>(header[sizeof(uint32_t)]);
    const size_t expected = kind == kAdvance ? AdvanceBytes() : kRenderBytes;
    if ((kind != kAdvance && kind != kRender) || length != expected + 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("a message of kind ", int{kind}, " and length ", length, ", expected kind ", int{kAdvance},
                       " and length ", AdvanceBytes() + 1, " or kind ", int{kRender}, " and length ", kRenderBytes + 1));
    }
    std::string body(expected, '\0');
    ASSIGN_OR_RETURN(const bool complete, Read(in_, body));
    if (!complete) return absl::DataLossError("the stream ended after a message's header");
    RETURN_IF_ERROR(kind == kAdvance ? Advance(body) : Render(body));
    return true;
  }

 private:
  size_t AdvanceBytes() const { return count_ * (sizeof(uint8_t) + sizeof(uint64_t) + action_size_ * sizeof(float)); }

  absl::Status Advance(absl::string_view body) {
    const absl::string_view what = body.substr(0, count_);
    const absl::string_view seeds = body.substr(count_, count_ * sizeof(uint64_t));
    const absl::string_view actions = body.substr(count_ + seeds.size());
    for (size_t i = 0; i < count_; ++i) {
      if (const int number = static_cast<uint8_t>(what[i]); number > kStep) {
        return absl::InvalidArgumentError(
            absl::StrCat("environment ", i, " is to do ", number, ", expected 0 (nothing), 1 (reset) or 2 (step)"));
      }
    }
    absl::Status failure;
    std::fill_n(states_.begin() + kHeaderBytes, count_ * (sizeof(double) + sizeof(uint8_t)), '\0');
    for (size_t i = 0; i < count_; ++i) {
      if (what[i] == kNothing) continue;
      Note(i, what[i] == kReset ? environments_.Reset(static_cast<int>(i), Load<uint64_t>(seeds, i)) : Begin(i, actions),
           failure);
    }
    while (environments_.busy() > 0) {
      for (const VectorResult& result : environments_.Take(absl::InfiniteDuration())) {
        const auto index = static_cast<size_t>(result.index);
        Note(index, result.step.status(), failure);
        if (result.step.ok()) Keep(index, *result.step);
      }
    }
    return failure.ok() ? Write(out_, states_) : Send(out_, kError, failure.message());
  }

  // Begins the step of environment `i`.
  absl::Status Begin(size_t i, absl::string_view actions) {
    std::vector<float> action(action_size_);
    std::memcpy(action.data(), actions.data() + i * action_size_ * sizeof(float), action_size_ * sizeof(float));
    return environments_.Step(static_cast<int>(i), action);
  }

  static void Note(size_t i, const absl::Status& status, absl::Status& failure) {
    failure.Update(Annotate(status, absl::StrCat("environment ", i)));
  }

  // The step fits the specification: VectorEnvironment has checked it.
  void Keep(size_t i, const TimeStep& step) {
    char* rewards = states_.data() + kHeaderBytes;
    std::memcpy(rewards + i * sizeof(double), &step.reward, sizeof(double));
    rewards[count_ * sizeof(double) + i] =
        static_cast<char>((step.is_terminal ? kTerminalFlag : 0) | (step.is_last ? kLastFlag : 0));
    const std::vector<TensorSpec>& observations = environments_.spec().observations;
    for (size_t k = 0; k < observations.size(); ++k) {
      const std::string& bytes = step.observation.at(observations[k].name).bytes;
      std::memcpy(states_.data() + places_[k] + i * bytes.size(), bytes.data(), bytes.size());
    }
  }

  absl::Status Render(absl::string_view body) {
    const auto index = Load<uint32_t>(body, 0), height = Load<uint32_t>(body, 1), width = Load<uint32_t>(body, 2);
    if (index >= count_ || height < 1 || width < 1 || height > kMostPixels || width > kMostPixels) {
      return Send(out_, kError,
                  absl::StrCat("a picture of environment ", index, " of ", count_, ", ", height, "x", width,
                               ": expected sizes from 1 to ", kMostPixels));
    }
    const absl::StatusOr<Array> picture =
        environments_.Render(static_cast<int>(index), static_cast<int>(height), static_cast<int>(width));
    if (!picture.ok()) return Send(out_, kError, absl::StrCat("environment ", index, ": ", picture.status().message()));
    if (picture->bytes.size() != size_t{3} * height * width) {
      return Send(out_, kError, absl::StrCat("environment ", index, ": a picture of ", picture->bytes.size(),
                                             " bytes, expected ", size_t{3} * height * width));
    }
    return Send(out_, kPicture, picture->bytes);
  }

  // Constant after construction.
  VectorEnvironment& environments_;
  const int in_;
  const int out_;
  const size_t count_;
  const size_t action_size_;
  std::vector<size_t> places_;  // in states_, of each modality
  size_t bytes_ = 0;            // of states_

  std::string states_;  // the message STATES
};

}  // namespace

absl::Status ServeEnvironments(VectorEnvironment& environments, int in, int out) {
  Server server(environments, in, out);
  RETURN_IF_ERROR(server.Start());
  while (true) {
    ASSIGN_OR_RETURN(const bool more, server.Step());
    if (!more) return absl::OkStatus();
  }
}

}  // namespace orrery
