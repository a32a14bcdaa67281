#include "libs/envs/rollout.h"

#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"
#include "libs/envs/simulator.h"

namespace orrery {
namespace {

constexpr int kImageSize = 64;

absl::StatusOr<std::vector<double>> ToDoubles(const Array& array, absl::string_view what) {
  RETURN_IF_ERROR(CheckArray(array, what));
  if (array.dtype == DType::kFloat64) {
    const auto values = array.as<double>();
    return std::vector<double>(values.begin(), values.end());
  }
  if (array.dtype == DType::kFloat32) {
    const auto values = array.as<float>();
    return std::vector<double>(values.begin(), values.end());
  }
  return absl::InvalidArgumentError(absl::StrCat(what, " is ", Name(array.dtype), ", expected float32 or float64"));
}

absl::Status Start(Simulator& simulator, const RolloutInput& input) {
  if (!input.qpos.has_value() && !input.qvel.has_value() && !input.target.has_value()) return simulator.Reset(input.seed);
  std::vector<double> qpos, qvel, target;
  SimulatorStart start;
  if (input.qpos.has_value()) {
    ASSIGN_OR_RETURN(qpos, ToDoubles(*input.qpos, "qpos"));
    start.qpos = qpos;
  }
  if (input.qvel.has_value()) {
    ASSIGN_OR_RETURN(qvel, ToDoubles(*input.qvel, "qvel"));
    start.qvel = qvel;
  }
  if (input.target.has_value()) {
    ASSIGN_OR_RETURN(target, ToDoubles(*input.target, "target"));
    start.target = target;
  }
  return simulator.ResetTo(start);
}

// Appends the present state and picture to `rows`, the first dimension of each counting them.
absl::Status AppendRow(Simulator& simulator, ArrayMap& rows) {
  ArrayMap row = simulator.State();
  ASSIGN_OR_RETURN(row["image"], simulator.Image());
  for (auto& [name, array] : row) {
    Array& all = rows[name];
    if (all.shape.empty()) {
      all = {array.dtype, array.shape, ""};
      all.shape.insert(all.shape.begin(), 0);
    }
    ++all.shape[0];
    all.bytes += array.bytes;
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ArrayMap> Rollout(const std::string& task, const RolloutInput& input,
                                 EnvironmentOptions::Quality quality) {
  ASSIGN_OR_RETURN(std::unique_ptr<Simulator> simulator, MakeSimulator(task, kImageSize, quality));
  ASSIGN_OR_RETURN(const std::vector<double> actions, ToDoubles(input.action, "action"));
  const size_t size = simulator->action_range().size();
  if (input.action.shape.size() != 2 || input.action.shape[1] != static_cast<int64_t>(size)) {
    return absl::InvalidArgumentError(
        absl::StrCat("action has shape ", ShapeString(input.action.shape), ", expected [T, ", size, "]"));
  }
  RETURN_IF_ERROR(CheckNumbers(actions, actions.size(), "action"));
  RETURN_IF_ERROR(Start(*simulator, input));
  ArrayMap rows;
  RETURN_IF_ERROR(AppendRow(*simulator, rows));
  std::vector<double> rewards;
  for (int64_t t = 0; t < input.action.shape[0]; ++t) {
    auto reward = simulator->Step(absl::MakeSpan(actions).subspan(t * size, size));
    if (!reward.ok()) return Annotate(reward.status(), absl::StrCat("step ", t));
    rewards.push_back(*reward);
    RETURN_IF_ERROR(AppendRow(*simulator, rows));
  }
  rows["reward"] = Array::From<double>(rewards, {input.action.shape[0]});
  return rows;
}

}  // namespace orrery
