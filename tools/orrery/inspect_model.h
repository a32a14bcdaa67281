// `orrery inspect loss|plan|imagine|snapshot`: exact views of a model, read from and written to safetensors files so that
// any other implementation can check ours. float32 on CPU.
//
// Errors: INVALID_ARGUMENT names the tensor or option that does not fit, NOT_FOUND and DATA_LOSS the file.
#pragma once

#include <ostream>
#include <string>

#include "absl/status/status.h"

namespace orrery {

// `noise` of all three: a seed (a number), "zero", or the path of a file of standard normals.

struct InspectLossOptions {
  std::string snapshot;
  // Modalities by name (images float32 [T, B, C, H, W], preprocessed, or uint8 [T, B, H, W, C] or [T, B, C, H, W],
  // preprocessed as configured, with the uniform noise only when `noise` is a seed), `action` [T, B, A], `reward` [T, B],
  // `is_first` [T, B] uint8.
  std::string batch;
  std::string out;
  // file: `posterior` [T, B, S], `overshooting` [distance + 1, T, B, S] where distance > 1, and for the losses of actor and value,
  // which are left out otherwise, `behavior_action` [horizon, T·B, A] and `behavior_state` [horizon, T·B, S]: row t·B + b.
  std::string noise = "0";
  bool gradients = false;
  std::string device = "cpu";
};
absl::Status InspectLoss(const InspectLossOptions& options);

struct InspectPlanOptions {
  std::string snapshot;
  std::string state;  // `deter` [D], `stoch` [S]
  std::string out;    // `plan_mean` [H, A], `plan_std` [H, A]
  std::string noise = "0";  // file: `plan_action` [I, H, J, A], `plan_state` [I, H, J, S]; "zero" is refused
  std::string device = "cpu";
};
absl::Status InspectPlan(const InspectPlanOptions& options);

struct InspectImagineOptions {
  std::string snapshot;
  std::string batch;  // as for the loss; `reward` is not needed
  std::string out;    // `recon`, `recon.<modality>`, `reward_mean`
  std::string noise = "zero";  // zero: means instead of samples; file: `posterior` [T, B, S]
  int context = 5;
};
absl::Status InspectImagine(const InspectImagineOptions& options);

// Prints name, type, shape and Euclidean norm of each tensor, then the metadata.
absl::Status InspectSnapshot(const std::string& path, std::ostream& out);

}  // namespace orrery
