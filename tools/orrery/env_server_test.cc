#include "tools/orrery/env_server.h"

#include <unistd.h>

#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "libs/base/status_matchers.h"
#include "orrery/common/v1/environment.pb.h"
#include "tools/orrery/program_testing.h"

namespace orrery {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// "clock" is [seed, step, the action's first number], "image" is filled with the step; the reward of step t is t + 0.25; ends
// after three steps, by the task where the seed is even. With seed 13 the second step fails.
class Clock : public Environment {
 public:
  Clock() {
    spec_.observations = {{"clock", DType::kFloat32, {3}}, {"image", DType::kUInt8, {1, 2, 3}}};
    spec_.action.size = 2;
  }
  const EnvironmentSpec& spec() const override { return spec_; }
  absl::StatusOr<TimeStep> Reset(uint64_t seed) override {
    seed_ = seed;
    step_ = 0;
    return At(0);
  }
  absl::StatusOr<TimeStep> Step(absl::Span<const float> action) override {
    ++step_;
    if (seed_ == 13 && step_ == 2) return absl::OutOfRangeError("an unlucky step");
    TimeStep step = At(action[0]);
    step.reward = step_ + 0.25;
    step.is_last = step_ == 3;
    step.is_terminal = step.is_last && seed_ % 2 == 0;
    return step;
  }
  absl::StatusOr<Array> Render(int height, int width) override {
    if (width == 99) return absl::InvalidArgumentError("nobody draws 99 columns");
    Array picture = Array::Zeros(DType::kUInt8, {height, width, 3});
    for (char& byte : picture.bytes) byte = static_cast<char>(step_);
    return picture;
  }

 private:
  TimeStep At(float action) const {
    TimeStep step;
    const std::vector<float> clock = {static_cast<float>(seed_), static_cast<float>(step_), action};
    step.observation["clock"] = Array::From<float>(clock, {3});
    step.observation["image"] = Array::From<uint8_t>(std::vector<uint8_t>(6, static_cast<uint8_t>(step_)), {1, 2, 3});
    return step;
  }

  EnvironmentSpec spec_;
  uint64_t seed_ = 0;
  int step_ = 0;
};

template <typename T>
std::string Bytes(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

template <typename T>
std::vector<T> Values(const std::string& bytes, size_t begin, size_t count) {
  std::vector<T> values(count);
  EXPECT_LE(begin + count * sizeof(T), bytes.size());
  if (begin + count * sizeof(T) <= bytes.size()) std::memcpy(values.data(), bytes.data() + begin, count * sizeof(T));
  return values;
}

struct Message {
  int kind = 0;  // 0: the stream has ended
  std::string body;
};

// A client with a server of Clocks on a thread.
class EnvServerTest : public ::testing::Test {
 protected:
  void Start(int size) {
    int there[2], back[2];
    ASSERT_EQ(pipe(there), 0);
    ASSERT_EQ(pipe(back), 0);
    to_ = there[1];
    if (from_ >= 0) close(from_);
    from_ = back[0];
    server_ = std::thread([this, size, in = there[0], out = back[1]] {
      VectorEnvironment::Options options;
      options.size = size;
      options.make = [](const EnvironmentOptions&) { return std::make_unique<Clock>(); };
      auto environments = VectorEnvironment::Create(options);
      status_ = environments.ok() ? ServeEnvironments(**environments, in, out) : environments.status();
      close(in);
      close(out);
    });
  }
  void TearDown() override {
    End();
    if (from_ >= 0) close(from_);
  }

  // What the server returned, after the end of what it is sent.
  const absl::Status& End() {
    if (to_ >= 0) close(to_);
    to_ = -1;
    if (server_.joinable()) server_.join();
    return status_;
  }

  void SendBytes(const std::string& bytes) {
    ASSERT_EQ(write(to_, bytes.data(), bytes.size()), static_cast<ssize_t>(bytes.size()));
  }
  void Send(int kind, const std::string& body) {
    SendBytes(Bytes<uint32_t>({static_cast<uint32_t>(body.size() + 1)}) + static_cast<char>(kind) + body);
  }
  void Advance(const std::vector<uint8_t>& what, const std::vector<uint64_t>& seeds, const std::vector<float>& actions) {
    Send(2, Bytes(what) + Bytes(seeds) + Bytes(actions));
  }

  std::string ReadBytes(size_t count) {
    std::string bytes(count, '\0');
    size_t done = 0;
    while (done < count) {
      const ssize_t n = read(from_, bytes.data() + done, count - done);
      if (n <= 0) return "";
      done += static_cast<size_t>(n);
    }
    return bytes;
  }
  Message Receive() {
    const std::string header = ReadBytes(5);
    if (header.empty()) return {};
    return {header[4], ReadBytes(Values<uint32_t>(header, 0, 1)[0] - 1)};
  }

 private:
  int to_ = -1;
  int from_ = -1;
  absl::Status status_;
  std::thread server_;
};

TEST_F(EnvServerTest, SaysWhatTheEnvironmentsShowAndTake) {
  Start(2);
  const Message ready = Receive();
  ASSERT_EQ(ready.kind, 1);
  common::v1::EnvironmentSpec spec;
  ASSERT_TRUE(spec.ParseFromString(ready.body));
  ASSERT_EQ(spec.observations_size(), 2);
  EXPECT_EQ(spec.observations(0).name(), "clock");
  EXPECT_EQ(spec.observations(0).data_type(), common::v1::FLOAT32);
  EXPECT_THAT(spec.observations(0).shape(), ElementsAre(3));
  EXPECT_EQ(spec.observations(1).data_type(), common::v1::UINT8);
  EXPECT_THAT(spec.observations(1).shape(), ElementsAre(1, 2, 3));
  EXPECT_EQ(spec.action().size(), 2);
  EXPECT_FALSE(spec.action().discrete());
  EXPECT_THAT(End(), IsOk());
}

// STATES of two: 16 bytes of rewards, 2 of flags, 24 of "clock", 12 of "image".
TEST_F(EnvServerTest, ResetsAndStepsEachByItself) {
  Start(2);
  Receive();
  Advance({0, 1}, {0, 7}, {0, 0, 0, 0});
  Message states = Receive();
  ASSERT_EQ(states.kind, 4);
  ASSERT_EQ(states.body.size(), 54u);
  EXPECT_THAT(Values<float>(states.body, 18, 6), ElementsAre(0, 0, 0, 7, 0, 0));
  Advance({1, 2}, {8, 0}, {0, 0, 0.5, 0});
  states = Receive();
  EXPECT_THAT(Values<double>(states.body, 0, 2), ElementsAre(0, 1.25));
  EXPECT_THAT(Values<float>(states.body, 18, 6), ElementsAre(8, 0, 0, 7, 1, 0.5));
  EXPECT_THAT(Values<uint8_t>(states.body, 42, 12), ElementsAre(0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1));
  Advance({2, 0}, {0, 0}, {-1, 0, 0, 0});
  states = Receive();
  EXPECT_THAT(Values<double>(states.body, 0, 2), ElementsAre(1.25, 0));
  EXPECT_THAT(Values<float>(states.body, 18, 6), ElementsAre(8, 1, -1, 7, 1, 0.5)) << "the second is left as it was";
}

TEST_F(EnvServerTest, TellsAnEndByTheTaskFromAnother) {
  Start(2);
  Receive();
  Advance({1, 1}, {2, 3}, {0, 0, 0, 0});
  Receive();
  for (int step = 1; step < 3; ++step) {
    Advance({2, 2}, {0, 0}, {0, 0, 0, 0});
    EXPECT_THAT(Values<uint8_t>(Receive().body, 16, 2), ElementsAre(0, 0)) << step;
  }
  Advance({2, 2}, {0, 0}, {0, 0, 0, 0});
  EXPECT_THAT(Values<uint8_t>(Receive().body, 16, 2), ElementsAre(1 | 2, 2));
}

TEST_F(EnvServerTest, GoesOnAfterAFaultOfOneEnvironment) {
  Start(2);
  Receive();
  Advance({1, 1}, {13, 4}, {0, 0, 0, 0});
  Receive();
  Advance({2, 2}, {0, 0}, {0, 0, 0, 0});
  ASSERT_EQ(Receive().kind, 4);
  Advance({2, 2}, {0, 0}, {0, 0, 0, 0});
  const Message error = Receive();
  EXPECT_EQ(error.kind, 6);
  EXPECT_THAT(error.body, HasSubstr("environment 0"));
  EXPECT_THAT(error.body, HasSubstr("an unlucky step"));
  Advance({1, 2}, {5, 0}, {0, 0, 0, 0});
  const Message states = Receive();
  ASSERT_EQ(states.kind, 4);
  EXPECT_THAT(Values<float>(states.body, 18, 6), ElementsAre(5, 0, 0, 4, 3, 0)) << "the second made its second step";
  EXPECT_THAT(End(), IsOk());
}

TEST_F(EnvServerTest, RefusesWhatCannotBeDoneAndGoesOn) {
  Start(1);
  Receive();
  Advance({1}, {1}, {0, 0});
  Receive();
  Advance({2}, {0}, {0, std::numeric_limits<float>::quiet_NaN()});
  Message error = Receive();
  EXPECT_EQ(error.kind, 6);
  EXPECT_THAT(error.body, HasSubstr("environment 0: "));
  Send(3, Bytes<uint32_t>({0, 4, 99}));
  error = Receive();
  EXPECT_EQ(error.kind, 6);
  EXPECT_THAT(error.body, HasSubstr("nobody draws 99 columns"));
  for (const std::vector<uint32_t>& request : {std::vector<uint32_t>{1, 4, 4}, {0, 0, 4}, {0, 4, 2049}}) {
    Send(3, Bytes(request));
    error = Receive();
    EXPECT_EQ(error.kind, 6);
    EXPECT_THAT(error.body, HasSubstr("expected sizes from 1 to 2048"));
  }
  Advance({2}, {0}, {0, 0});
  EXPECT_EQ(Receive().kind, 4);
}

TEST_F(EnvServerTest, Draws) {
  Start(2);
  Receive();
  Advance({1, 1}, {1, 1}, {0, 0, 0, 0});
  Receive();
  Advance({0, 2}, {0, 0}, {0, 0, 0, 0});
  Receive();
  Send(3, Bytes<uint32_t>({1, 2, 5}));
  const Message picture = Receive();
  EXPECT_EQ(picture.kind, 5);
  EXPECT_EQ(picture.body, std::string(2 * 5 * 3, '\1'));
}

TEST_F(EnvServerTest, EndsWithWordsForAStreamThatIsNone) {
  struct Case {
    std::string bytes;
    absl::StatusCode code;
    std::string message;
  };
  const std::string length_20 = Bytes<uint32_t>({20});
  const std::vector<Case> cases = {
      {Bytes<uint32_t>({0xffffffff}) + "\2", absl::StatusCode::kInvalidArgument,
       "kind 2 and length 4294967295, expected kind 2 and length 18"},
      {length_20 + "\7", absl::StatusCode::kInvalidArgument, "kind 7"},
      {length_20 + "\3", absl::StatusCode::kInvalidArgument, "or kind 3 and length 13"},
      {"GET / HTTP/1.1\r\n", absl::StatusCode::kInvalidArgument, "a message of kind 47"},
      {"\1\2", absl::StatusCode::kDataLoss, "after 2 of 5 bytes"},
      {Bytes<uint32_t>({18}) + "\2", absl::StatusCode::kDataLoss, "after a message's header"},
      {Bytes<uint32_t>({18}) + "\2\1", absl::StatusCode::kDataLoss, "after 1 of 17 bytes"},
      {Bytes<uint32_t>({18}) + "\2\3" + std::string(16, '\0'), absl::StatusCode::kInvalidArgument, "environment 0 is to do 3"},
  };
  for (const Case& one : cases) {
    Start(1);
    Receive();
    SendBytes(one.bytes);
    EXPECT_THAT(End(), StatusIs(one.code, HasSubstr(one.message)));
    EXPECT_EQ(Receive().kind, 0) << "nothing but the end of the stream";
  }
}

TEST(EnvCommandTest, EndsWithOneMessage) {
  struct Case {
    std::string before, flags;
    int code;
    std::string message;
  };
  for (const Case& one : {Case{"", "--task=nonsense </dev/null", 1, "unknown task \"nonsense\""},
                          Case{"", "--task=point_pixels --num_envs=0 </dev/null", 2, "--num_envs"},
                          Case{"", "</dev/null", 2, "--task"},
                          Case{"printf 'no message' | ", "--task=point_pixels", 1, "a message of kind 101"}}) {
    const Outcome outcome = Orrery("env " + one.flags, one.before);
    EXPECT_EQ(outcome.code, one.code) << one.flags;
    EXPECT_THAT(outcome.output, HasSubstr(one.message));
    const size_t first = outcome.output.find("orrery: error: ");
    EXPECT_NE(first, std::string::npos) << outcome.output;
    EXPECT_EQ(outcome.output.find("orrery: error: ", first + 1), std::string::npos) << outcome.output;
  }
  EXPECT_EQ(Orrery("env --task=point_pixels --num_envs=2 </dev/null").code, 0) << "an end of the stream is no error";
}

}  // namespace
}  // namespace orrery
