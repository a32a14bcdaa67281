// Computes a batch of slots: observation and belief in, action and next belief out.
#pragma once

#include <prometheus/registry.h>
#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "libs/base/array.h"
#include "libs/serving/served_model.h"
#include "libs/telemetry/metrics.h"

namespace orrery {

// One agent's step.
struct SlotInput {
  ArrayMap observations;               // as the environment delivers them: images [H, W, C] uint8, vectors [size] float32
  std::vector<float> previous_action;  // [A], or empty: zeros
  std::string belief;                  // a token, or empty: a new belief
  float exploration_noise = 0;
  uint64_t seed = 0;                   // of everything random in this slot
  std::vector<uint8_t> valid_actions;  // [A] of 0 and 1, discrete only; empty: all are valid
};

struct SlotOutput {
  std::vector<float> action;  // [A]
  std::string belief;
  float predicted_return = 0;
};

// INVALID_ARGUMENT or FAILED_PRECONDITION naming `what`, the field, what it is and what was expected, unless the model can
// take the slot. Pure and thread-safe.
absl::Status CheckSlot(const ServedModel& served, const SlotInput& slot, absl::string_view what);

// float32 on one device. Thread-safe: holds only options and metrics.
class InferenceEngine {
 public:
  // `registry` is required; every metric gets the labels.
  InferenceEngine(torch::Device device, std::shared_ptr<prometheus::Registry> registry, const prometheus::Labels& labels = {});

  // The slots must have passed CheckSlot. Everything random in slot i comes from its own seed, so its answer does not depend on
  // its company: to the last bit on a CPU, where each slot is computed alone (planning together saves nothing there, and
  // products of other shapes round differently), several side by side on the model's workers, and within rounding on a GPU,
  // where all are computed together. A slot whose numbers overflow gets an INVALID_ARGUMENT of its own. INTERNAL: nothing
  // could be computed.
  absl::StatusOr<std::vector<absl::StatusOr<SlotOutput>>> Run(const ServedModel& served,
                                                              absl::Span<const SlotInput* const> slots) const;
  // What is computed before a snapshot is served, so that no request waits for it.
  struct WarmUps {
    std::vector<int64_t> sizes;  // of batches, in slots
    int runs = 1;                // of each
  };
  // For batches of up to `max_batch` slots (at least 1): on the CPU one slot once, on CUDA every size that plans are filled up
  // to, so often that each has been recorded.
  static WarmUps WarmUpsOn(torch::Device device, int64_t max_batch);
  // Computes batches of zeros; where the action is discrete also with valid actions, whose plans are recorded apart.
  absl::Status WarmUp(const ServedModel& served, const WarmUps& warm_ups) const;

 private:
  // Computes each alone.
  absl::StatusOr<std::vector<absl::StatusOr<SlotOutput>>> ComputeApart(const ServedModel& served,
                                                                       absl::Span<const SlotInput* const> slots) const;
  // Computes all together.
  absl::StatusOr<std::vector<absl::StatusOr<SlotOutput>>> Compute(const ServedModel& served,
                                                                  absl::Span<const SlotInput* const> slots) const;

  const torch::Device device_;
  const std::shared_ptr<prometheus::Registry> registry_;
  prometheus::Histogram& compute_seconds_;
  prometheus::Histogram& belief_lag_;
  prometheus::Counter& non_finite_plans_;
};

}  // namespace orrery
