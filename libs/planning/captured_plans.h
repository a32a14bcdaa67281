// Plans on a device, recorded once for each size as a graph (libs/device/captured_step.h) and then replayed.
#pragma once

#include <torch/torch.h>

#include <compare>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "libs/device/captured_step.h"
#include "libs/planning/plan_parts.h"
#include "libs/planning/planner.h"
#include "libs/world_model/world_model.h"

namespace orrery {

// Belongs to a planner. Thread-safe: plans one request after another.
class CapturedPlans {
 public:
  // Plans for a checked request (without its seeds) by operations that are the same whatever the numbers are; all that is
  // random comes from the normals. What it refers to must outlive this object.
  using Search = std::function<PlanResult(const WorldModel&, const PlanRequest&, AgentNormals&)>;

  explicit CapturedPlans(Search search) : search_(std::move(search)) {}

  // As Planner::Plan, for a checked request. The agents are filled up to a power of two, so that few graphs serve all
  // numbers of them; graphs of another model, or of the same with other parameters, are dropped.
  PlanResult Plan(const WorldModel& model, const PlanRequest& request);

 private:
  // What a graph is made for.
  struct Shape {
    int64_t agents = 0;
    bool has_plan = false, has_valid_actions = false;
    auto operator<=>(const Shape&) const = default;
  };
  struct Captured {
    AgentNormals normals;
    CapturedStep step;
  };

  std::unique_ptr<Captured> Make(const WorldModel& model, Shape shape, torch::Device device) const;

  const Search search_;
  absl::Mutex mu_;
  std::vector<std::pair<const void*, int64_t>> versions_ ABSL_GUARDED_BY(mu_);  // of the model that they plan with
  std::map<Shape, std::unique_ptr<Captured>> captured_ ABSL_GUARDED_BY(mu_);
};

}  // namespace orrery
