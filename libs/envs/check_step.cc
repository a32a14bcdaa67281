#include "libs/envs/check_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

absl::Status CheckFinite(const std::string& name, const Array& array) {
  if (array.dtype != DType::kFloat32) return absl::OkStatus();
  for (size_t i = 0; i < array.bytes.size() / sizeof(float); ++i) {
    float value;
    std::memcpy(&value, array.bytes.data() + i * sizeof(float), sizeof value);
    if (!std::isfinite(value)) {
      return absl::InternalError(absl::StrCat(name, "[", i, "] is ", value, ", expected a finite number"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckStep(const EnvironmentSpec& spec, const TimeStep& step) {
  if (!std::isfinite(step.reward)) {
    return absl::InternalError(absl::StrCat("the reward is ", step.reward, ", expected a finite number"));
  }
  for (const TensorSpec& expected : spec.observations) {
    const auto found = step.observation.find(expected.name);
    if (found == step.observation.end()) return absl::InternalError(absl::StrCat("there is no ", expected.name));
    const Array& array = found->second;
    if (array.dtype != expected.dtype || array.shape != expected.shape) {
      return absl::InternalError(absl::StrCat(expected.name, " is ", Name(array.dtype), " ", ShapeString(array.shape), ", expected ",
                                              Name(expected.dtype), " ", ShapeString(expected.shape)));
    }
    RETURN_IF_ERROR(CheckFinite(expected.name, array));
  }
  if (step.observation.size() == spec.observations.size()) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("there are ", step.observation.size(), " observations, expected ", spec.observations.size()));
}

}  // namespace orrery
