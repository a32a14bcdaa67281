#include "libs/planning/captured_plans.h"

#include <bit>
#include <utility>

namespace orrery {
namespace {

using torch::Tensor;

// Rows of zeros behind those of `x`.
Tensor FillUp(const Tensor& x, int64_t rows) {
  if (x.size(0) == rows) return x;
  std::vector<int64_t> missing = x.sizes().vec();
  missing[0] = rows - x.size(0);
  return at::cat({x, at::zeros(missing, x.options())});
}

std::vector<Tensor> Inputs(const PlanRequest& request, int64_t rows) {
  std::vector<Tensor> inputs = {FillUp(request.belief.deter, rows), FillUp(request.belief.stoch, rows)};
  if (request.previous_plan.defined()) {
    inputs.push_back(FillUp(request.previous_plan, rows));
    inputs.push_back(FillUp(request.has_previous, rows));
  }
  if (request.valid_actions.defined()) inputs.push_back(FillUp(request.valid_actions, rows));
  return inputs;
}

}  // namespace

std::unique_ptr<CapturedPlans::Captured> CapturedPlans::Make(const WorldModel& model, Shape shape,
                                                             torch::Device device) const {
  AgentNormals normals(std::vector<uint64_t>(static_cast<size_t>(shape.agents)), device);
  // Its copy of the normals has the same generators.
  const auto search = [this, &model, shape, normals](const std::vector<Tensor>& inputs) mutable {
    const torch::NoGradGuard no_grad;
    PlanRequest request;
    request.belief = {inputs[0], inputs[1]};
    if (shape.has_plan) {
      request.previous_plan = inputs[2];
      request.has_previous = inputs[3];
    }
    if (shape.has_valid_actions) request.valid_actions = inputs.back();
    const PlanResult plan = search_(model, request, normals);
    return std::vector<Tensor>{plan.action, plan.mean, plan.std, plan.predicted_return, plan.non_finite};
  };
  return std::unique_ptr<Captured>(
      new Captured{normals, CapturedStep(device, search, MakeDeviceGraph(device, normals.generators()))});
}

PlanResult CapturedPlans::Plan(const WorldModel& model, const PlanRequest& request) {
  const auto n = static_cast<int64_t>(request.seeds.size());
  const Shape shape{static_cast<int64_t>(std::bit_ceil(request.seeds.size())), request.previous_plan.defined(),
                    request.valid_actions.defined()};
  std::vector<uint64_t> seeds(request.seeds.begin(), request.seeds.end());
  seeds.resize(static_cast<size_t>(shape.agents));
  PlanResult plan;
  {
    absl::MutexLock lock(&mu_);
    if (auto versions = model.ParameterVersions(); versions != versions_) {
      captured_.clear();
      versions_ = std::move(versions);
    }
    std::unique_ptr<Captured>& captured = captured_[shape];
    if (captured == nullptr) captured = Make(model, shape, request.belief.deter.device());
    captured->normals.Reseed(seeds);
    const std::vector<Tensor> outputs = captured->step.Run(Inputs(request, shape.agents));
    // The next run overwrites them.
    const auto own = [&](size_t i) { return outputs[i].narrow(0, 0, n).clone(); };
    plan = {own(0), own(1), own(2), own(3), own(4)};
  }
  plan.non_finite_plans = plan.non_finite.sum().item<int64_t>();
  return plan;
}

}  // namespace orrery
