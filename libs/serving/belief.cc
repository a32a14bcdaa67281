#include "libs/serving/belief.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "libs/base/file.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

static_assert(std::endian::native == std::endian::little, "tokens are copied as they lie in memory");

constexpr absl::string_view kMagic = "OBLF";
constexpr uint8_t kWithoutPlan = 1;  // formats
constexpr uint8_t kWithPlan = 2;
constexpr size_t kMaxNameBytes = 255;
constexpr int64_t kMaxHorizon = 256;  // of any planner
constexpr size_t kPlanHeaderBytes = 4 + 4;
// Magic, format, name length, hash, generation, counter, D, S, checksum.
constexpr size_t kFixedBytes = 4 + 1 + 1 + 8 + 8 + 8 + 4 + 4 + 4;
// A GRU's state is a mean of numbers in [-1, 1]; what rounding may add to that.
constexpr float kDeterBound = 1 + 1e-4f;

template <typename T>
void Put(std::string& out, T value) {
  static_assert(std::is_arithmetic_v<T>);
  out.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

void PutFloats(std::string& out, const std::vector<float>& values) {
  out.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
}

// Reads values off the front; `ok` turns false, for good, when the bytes end too early.
class Reader {
 public:
  explicit Reader(absl::string_view bytes) : bytes_(bytes) {}
  template <typename T>
  T Get() {
    T value{};
    if (bytes_.size() < sizeof(T)) {
      ok_ = false;
      return value;
    }
    std::memcpy(&value, bytes_.data(), sizeof(T));
    bytes_.remove_prefix(sizeof(T));
    return value;
  }
  std::string GetBytes(size_t n) {
    if (bytes_.size() < n) {
      ok_ = false;
      return "";
    }
    std::string out(bytes_.substr(0, n));
    bytes_.remove_prefix(n);
    return out;
  }
  std::vector<float> GetFloats(size_t n) {
    if (bytes_.size() / sizeof(float) < n) {
      ok_ = false;
      return {};
    }
    std::vector<float> out(n);
    if (n > 0) std::memcpy(out.data(), bytes_.data(), n * sizeof(float));  // memcpy takes no null pointer
    bytes_.remove_prefix(n * sizeof(float));
    return out;
  }
  bool ok() const { return ok_; }
  size_t left() const { return bytes_.size(); }

 private:
  absl::string_view bytes_;
  bool ok_ = true;
};

absl::Status CheckNumbers(const Belief& belief) {
  if (belief.version.generation < 0 || belief.version.counter < 0) {
    return absl::InvalidArgumentError(absl::StrCat("belief: snapshot version (", belief.version.generation, ", ",
                                                   belief.version.counter, "), expected numbers of at least 0"));
  }
  for (size_t i = 0; i < belief.deter.size(); ++i) {
    if (!(std::abs(belief.deter[i]) <= kDeterBound)) {  // also refuses NaN
      return absl::InvalidArgumentError(
          absl::StrCat("belief: deterministic state [", i, "] is ", belief.deter[i], ", expected -1 to 1"));
    }
  }
  for (size_t i = 0; i < belief.stoch.size(); ++i) {
    if (!std::isfinite(belief.stoch[i])) {
      return absl::InvalidArgumentError(
          absl::StrCat("belief: stochastic state [", i, "] is ", belief.stoch[i], ", expected a finite number"));
    }
  }
  for (size_t i = 0; i < belief.plan.size(); ++i) {
    if (!(std::abs(belief.plan[i]) <= 1)) {
      return absl::InvalidArgumentError(absl::StrCat("belief: plan [", i, "] is ", belief.plan[i], ", expected -1 to 1"));
    }
  }
  return absl::OkStatus();
}

// Numbers of an action of the plan; 0: there is none. INVALID_ARGUMENT unless the plan has H · A numbers.
absl::StatusOr<size_t> PlanActionSize(const Belief& belief) {
  const int64_t h = belief.plan_horizon;
  if (h == 0 && belief.plan.empty()) return size_t{0};
  if (h < 1 || h > kMaxHorizon || belief.plan.empty() || belief.plan.size() % static_cast<size_t>(h) != 0) {
    return absl::InvalidArgumentError(absl::StrCat("belief: a plan of ", h, " actions has ", belief.plan.size(),
                                                   " numbers, expected 1 to ", kMaxHorizon, " actions of one size"));
  }
  return belief.plan.size() / static_cast<size_t>(h);
}

// Of a token as this model and its planner make it.
size_t UsualBytes(const BeliefShape& shape) {
  size_t numbers = static_cast<size_t>(shape.deterministic_size + shape.stochastic_size);
  if (shape.plan_horizon > 0) numbers += static_cast<size_t>(shape.plan_horizon * shape.action_size);
  return kFixedBytes + (shape.plan_horizon > 0 ? kPlanHeaderBytes : 0) + shape.model.size() + sizeof(float) * numbers;
}

absl::Status CheckUndamaged(absl::string_view token, const BeliefShape& expected) {
  const size_t usual = UsualBytes(expected);
  if (token.size() < kFixedBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("belief has the wrong size: ", token.size(), " bytes, expected ", usual, " for this model"));
  }
  uint32_t checksum = 0;
  std::memcpy(&checksum, token.data() + token.size() - sizeof(checksum), sizeof(checksum));
  token.remove_suffix(sizeof(checksum));
  if (token.substr(0, kMagic.size()) != kMagic || Checksum(token) != checksum) {
    return absl::InvalidArgumentError(absl::StrCat("belief is damaged or not a belief: ", token.size() + sizeof(checksum),
                                                   " bytes (this model's have ", usual,
                                                   "), expected the bytes of an earlier response unchanged"));
  }
  return absl::OkStatus();
}

absl::Status CheckOrigin(const Belief& belief, const BeliefShape& expected) {
  if (belief.model != expected.model) {
    return absl::FailedPreconditionError(absl::StrCat("belief of model \"", belief.model, "\", but \"", expected.model,
                                                      "\" is served: begin a new belief"));
  }
  if (belief.structure_hash != expected.structure_hash) {
    return absl::FailedPreconditionError(absl::StrCat("belief of another model structure (", absl::Hex(belief.structure_hash),
                                                      ", ", absl::Hex(expected.structure_hash),
                                                      " is served): begin a new belief"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::string> SerializeBelief(const Belief& belief) {
  if (belief.model.size() > kMaxNameBytes) {
    return absl::InvalidArgumentError(absl::StrCat("belief: the model's name has ", belief.model.size(),
                                                   " bytes, expected at most ", kMaxNameBytes));
  }
  RETURN_IF_ERROR(CheckNumbers(belief));
  ASSIGN_OR_RETURN(const size_t action_size, PlanActionSize(belief));
  std::string out;
  out.reserve(kFixedBytes + kPlanHeaderBytes + belief.model.size() +
              sizeof(float) * (belief.deter.size() + belief.stoch.size() + belief.plan.size()));
  out.append(kMagic.data(), kMagic.size());
  Put(out, belief.plan.empty() ? kWithoutPlan : kWithPlan);
  Put(out, static_cast<uint8_t>(belief.model.size()));
  out.append(belief.model);
  Put(out, belief.structure_hash);
  Put(out, belief.version.generation);
  Put(out, belief.version.counter);
  Put(out, static_cast<uint32_t>(belief.deter.size()));
  Put(out, static_cast<uint32_t>(belief.stoch.size()));
  if (!belief.plan.empty()) {
    Put(out, static_cast<uint32_t>(belief.plan_horizon));
    Put(out, static_cast<uint32_t>(action_size));
  }
  PutFloats(out, belief.deter);
  PutFloats(out, belief.stoch);
  PutFloats(out, belief.plan);
  Put(out, Checksum(out));
  return out;
}

absl::StatusOr<Belief> ParseBelief(absl::string_view token, const BeliefShape& expected) {
  RETURN_IF_ERROR(CheckUndamaged(token, expected));
  Reader reader(token.substr(kMagic.size(), token.size() - kMagic.size() - sizeof(uint32_t)));
  const int format = reader.Get<uint8_t>();
  if (format != kWithoutPlan && format != kWithPlan) {
    return absl::FailedPreconditionError(absl::StrCat("belief of format ", format, ", expected ", int{kWithoutPlan}, " or ",
                                                      int{kWithPlan}, ": begin a new belief"));
  }
  Belief belief;
  belief.model = reader.GetBytes(reader.Get<uint8_t>());
  belief.structure_hash = reader.Get<uint64_t>();
  belief.version.generation = reader.Get<int64_t>();
  belief.version.counter = reader.Get<int64_t>();
  const uint32_t d = reader.Get<uint32_t>();
  const uint32_t s = reader.Get<uint32_t>();
  const uint32_t h = format == kWithPlan ? reader.Get<uint32_t>() : 0;
  const uint32_t a = format == kWithPlan ? reader.Get<uint32_t>() : 0;
  if (reader.ok()) RETURN_IF_ERROR(CheckOrigin(belief, expected));
  if (format == kWithPlan && (h < 1 || h > kMaxHorizon || a != static_cast<uint32_t>(expected.action_size))) {
    return absl::InvalidArgumentError(absl::StrCat("belief has a plan of ", h, " × ", a, " numbers, expected 1 to ",
                                                   kMaxHorizon, " × ", expected.action_size));
  }
  const size_t plan_size = static_cast<size_t>(h) * a;
  const size_t numbers = static_cast<size_t>(d) + s + plan_size;
  if (!reader.ok() || d != static_cast<uint32_t>(expected.deterministic_size) ||
      s != static_cast<uint32_t>(expected.stochastic_size) || reader.left() != numbers * sizeof(float)) {
    return absl::InvalidArgumentError(absl::StrCat("belief has the wrong size: ", token.size(), " bytes for ", d, " + ", s,
                                                   " numbers, expected ", expected.deterministic_size, " + ",
                                                   expected.stochastic_size,
                                                   plan_size > 0 ? absl::StrCat(" beside a plan of ", plan_size) : ""));
  }
  belief.deter = reader.GetFloats(d);
  belief.stoch = reader.GetFloats(s);
  belief.plan = reader.GetFloats(plan_size);
  belief.plan_horizon = h;
  RETURN_IF_ERROR(CheckNumbers(belief));
  if (belief.plan_horizon != expected.plan_horizon) {
    belief.plan_horizon = 0;
    belief.plan.clear();
  }
  return belief;
}

}  // namespace orrery
