#include "libs/planning/planner.h"

#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "libs/base/array.h"
#include "libs/base/status.h"
#include "libs/planning/captured_plans.h"
#include "libs/planning/cem.h"
#include "libs/planning/genetic.h"
#include "libs/planning/icem.h"
#include "libs/planning/mppi.h"
#include "libs/planning/plan_parts.h"
#include "libs/planning/random_shooting.h"
#include "libs/world_model/behavior.h"

namespace orrery {
namespace {

using torch::Tensor;

// Standard normals of the states [H, N, J, S] of plans [H, N, J, A] in iteration i; zeros give the prior's mean. Empty: the
// model draws its own.
using StateNormals = std::function<Tensor(const Tensor& plans, int64_t i)>;

// How plans are made and rolled out.
struct RolloutOptions {
  bool discrete = false;
  double discount = 1;
  bool mean_latents = false;       // the prior's mean instead of samples
  bool terminal_value = false;
  int64_t proposals = 0, horizon = 0;  // of the actor: so many plans of that length
  int64_t warm_start_horizon = 0;  // 0: previous plans are not looked at
  bool fixed = true;               // the same operations whatever the numbers are: can be recorded in a graph

  ReturnOptions returns() const { return {.discount = discount, .terminal_value = terminal_value}; }
};

absl::Status CheckShape(const Tensor& tensor, const std::vector<int64_t>& expected, absl::string_view what) {
  if (tensor.defined() && tensor.sizes() == at::IntArrayRef(expected)) return absl::OkStatus();
  const std::string actual = tensor.defined() ? ShapeString(tensor.sizes().vec()) : "missing";
  return absl::InvalidArgumentError(absl::StrCat(what, " is ", actual, "; expected ", ShapeString(expected)));
}

absl::Status CheckBelief(const WorldModel& model, const LatentState& belief, int64_t n) {
  RETURN_IF_ERROR(CheckShape(belief.deter, {n, model.deterministic_size()}, "deter"));
  return CheckShape(belief.stoch, {n, model.stochastic_size()}, "stoch");
}

absl::Status CheckRequest(const WorldModel& model, const PlanRequest& request, const RolloutOptions& options) {
  const auto n = static_cast<int64_t>(request.seeds.size());
  RETURN_IF_ERROR(CheckBelief(model, request.belief, n));
  if (options.warm_start_horizon > 0 && request.previous_plan.defined()) {
    RETURN_IF_ERROR(CheckShape(request.previous_plan, {n, options.warm_start_horizon, model.action_size()}, "previous_plan"));
    RETURN_IF_ERROR(CheckShape(request.has_previous, {n}, "has_previous"));
  }
  if (!request.valid_actions.defined()) return absl::OkStatus();
  if (!options.discrete) {
    return absl::InvalidArgumentError("valid_actions is given; expected none for a continuous action");
  }
  RETURN_IF_ERROR(CheckShape(request.valid_actions, {n, model.action_size()}, "valid_actions"));
  if (request.valid_actions.any(1).all().item<bool>()) return absl::OkStatus();
  return absl::InvalidArgumentError("valid_actions has an agent without a valid action; expected at least one");
}

StateNormals NoStateNoise(int64_t stochastic_size) {
  return [stochastic_size](const Tensor& plans, int64_t) {
    return at::zeros({plans.size(0), plans.size(1), plans.size(2), stochastic_size}, plans.options());
  };
}

// The request as a problem whose `normals` are still to be set. `model` must outlive it.
PlanProblem MakeProblem(const WorldModel& model, const PlanRequest& request, const RolloutOptions& options,
                        StateNormals state_normals) {
  if (options.mean_latents) state_normals = NoStateNoise(model.stochastic_size());
  PlanProblem problem;
  problem.agents = request.belief.deter.size(0);
  problem.action_size = model.action_size();
  problem.discrete = options.discrete;
  problem.options = request.belief.deter.options();
  if (request.valid_actions.defined()) problem.valid_actions = request.valid_actions.to(problem.options.dtype(at::kBool));
  if (options.warm_start_horizon > 0 && request.previous_plan.defined()) {
    problem.previous_plan = request.previous_plan.to(problem.options);
    problem.has_previous = request.has_previous.to(problem.options.dtype(at::kBool));
  }
  problem.objective = [&model, belief = request.belief, seeds = request.seeds, options,
                       normals = std::move(state_normals)](const Tensor& plans, int64_t i) {
    if (normals == nullptr)
      return model.ImaginedReturns(belief, plans, SeededNoise{seeds, static_cast<uint32_t>(i)}, options.returns());
    return model.ImaginedReturns(belief, plans, normals(plans, i), options.returns());
  };
  return problem;
}

// Plans that the actor would play: [H, N, K, A].
Tensor ActorPlans(const WorldModel& model, const LatentState& belief, const RolloutOptions& options, AgentNormals& normals) {
  const int64_t n = belief.stoch.size(0), k = options.proposals;
  const auto rows = [&](const Tensor& x) { return x.unsqueeze(1).expand({n, k, x.size(1)}).reshape({n * k, x.size(1)}); };
  const auto draw = [&](int64_t size) { return normals.Draw({1, n, k, size}).view({n * k, size}); };
  LatentState state{rows(belief.deter), rows(belief.stoch)};
  std::vector<Tensor> plans;
  for (int64_t h = 0; h < options.horizon; ++h) {
    const Tensor action = SampleAction(model.config(), model.ActorOutputs(state), draw(model.action_size())).action;
    const Predicted predicted = model.Predict(state, action);
    state = {predicted.deter, model.latents().Sample(predicted.prior, draw(model.stochastic_size()))};
    plans.push_back(action.view({n, k, model.action_size()}));
  }
  return at::stack(plans);
}

// Waits for the device.
PlanResult Counted(PlanResult plan) {
  plan.non_finite_plans = plan.non_finite.sum().item<int64_t>();
  return plan;
}

// Plans with an algorithm by rolling the plans out in the model.
class RolloutPlanner : public Planner {
 public:
  using Algorithm = std::function<PlanResult(const PlanProblem&)>;

  RolloutPlanner(const RolloutOptions& options, Algorithm algorithm)
      : options_(options),
        algorithm_(std::move(algorithm)),
        captured_([this](const WorldModel& model, const PlanRequest& request, AgentNormals& normals) {
          return Search(model, request, normals);
        }) {}

  absl::StatusOr<PlanResult> Plan(const WorldModel& model, const PlanRequest& request) const override {
    return CatchExceptions("planning", [&]() -> absl::StatusOr<PlanResult> {
      RETURN_IF_ERROR(CheckRequest(model, request, options_));
      if (request.belief.deter.is_cuda() && options_.fixed) return captured_.Plan(model, request);
      AgentNormals normals(request.seeds, request.belief.deter.device());
      return Counted(Search(model, request, normals));
    });
  }

  int64_t warm_start_horizon() const override { return options_.warm_start_horizon; }

 protected:
  const RolloutOptions& rollout_options() const { return options_; }

 private:
  PlanResult Search(const WorldModel& model, const PlanRequest& request, AgentNormals& normals) const {
    torch::NoGradGuard no_grad;
    StateNormals state_normals;
    if (!model.DrawsNoise(options_.returns())) {
      state_normals = [&](const Tensor& plans, int64_t) {
        return normals.Draw({plans.size(0), plans.size(1), plans.size(2), model.stochastic_size()});
      };
    }
    PlanProblem problem = MakeProblem(model, request, options_, std::move(state_normals));
    problem.normals = [&](at::IntArrayRef sizes) { return normals.Draw(sizes); };
    if (options_.proposals > 0) problem.proposals = ActorPlans(model, request.belief, options_, normals);
    return algorithm_(problem);
  }

  const RolloutOptions options_;
  const Algorithm algorithm_;
  mutable CapturedPlans captured_;  // on CUDA; refers to this object
};

class CemPlanner : public RolloutPlanner {
 public:
  CemPlanner(const RolloutOptions& options, const config::v1::Cem& cem)
      : RolloutPlanner(options, [cem](const PlanProblem& problem) { return RunCem(cem, CemProblem{problem, nullptr}); }),
        cem_(cem) {}

  absl::StatusOr<PlanResult> PlanWithNoise(const WorldModel& model, const LatentState& belief,
                                           const PlanNoise& noise) const override {
    const int64_t n = belief.deter.size(0), i = cem_.iterations(), h = cem_.horizon(), j = cem_.candidates();
    RETURN_IF_ERROR(CheckBelief(model, belief, n));
    RETURN_IF_ERROR(CheckShape(noise.action, {n, i, h, j, model.action_size()}, "plan_action"));
    RETURN_IF_ERROR(CheckShape(noise.state, {n, i, h, j, model.stochastic_size()}, "plan_state"));
    return CatchExceptions("planning", [&]() -> absl::StatusOr<PlanResult> {
      torch::NoGradGuard no_grad;
      const auto part = [](const Tensor& x, int64_t iteration) { return x.select(1, iteration).transpose(0, 1); };
      PlanRequest request;
      request.belief = belief;
      CemProblem problem{MakeProblem(model, request, rollout_options(),
                                     [&](const Tensor&, int64_t iteration) { return part(noise.state, iteration); }),
                         [&](int64_t iteration) { return part(noise.action, iteration); }};
      return Counted(RunCem(cem_, problem));
    });
  }

 private:
  const config::v1::Cem cem_;
};

class RandomPlanner : public Planner {
 public:
  explicit RandomPlanner(bool discrete) { options_.discrete = discrete; }

  absl::StatusOr<PlanResult> Plan(const WorldModel& model, const PlanRequest& request) const override {
    return CatchExceptions("planning", [&]() -> absl::StatusOr<PlanResult> {
      RETURN_IF_ERROR(CheckRequest(model, request, options_));
      torch::NoGradGuard no_grad;
      AgentNormals normals(request.seeds, request.belief.deter.device());
      PlanProblem problem = MakeProblem(model, request, options_, nullptr);
      problem.normals = [&](at::IntArrayRef sizes) { return normals.Draw(sizes); };
      const Tensor plans = UniformPlans(problem, /*horizon=*/1, /*count=*/1);
      PlanResult result = MakeResult(problem, plans, at::zeros_like(plans), NoneNonFinite(problem));
      result.predicted_return = at::zeros({problem.agents}, problem.options);
      return result;
    });
  }

 private:
  RolloutOptions options_;
};

// The actor's most probable action.
class ActorPlanner : public Planner {
 public:
  explicit ActorPlanner(bool discrete) { options_.discrete = discrete; }

  absl::StatusOr<PlanResult> Plan(const WorldModel& model, const PlanRequest& request) const override {
    return CatchExceptions("planning", [&]() -> absl::StatusOr<PlanResult> {
      RETURN_IF_ERROR(CheckRequest(model, request, options_));
      torch::NoGradGuard no_grad;
      Tensor outputs = model.ActorOutputs(request.belief);
      if (request.valid_actions.defined())
        outputs = outputs.masked_fill(request.valid_actions.logical_not(), -std::numeric_limits<double>::infinity());
      PlanResult result;
      result.action = ModeAction(model.config(), outputs);
      result.mean = result.action.unsqueeze(1);
      result.std = at::zeros_like(result.mean);
      result.predicted_return = model.Value(request.belief);
      return result;
    });
  }

 private:
  RolloutOptions options_;
};

absl::Status NeedsBehavior(absl::string_view option, const config::v1::Model& model) {
  if (model.has_behavior()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(option, ": the model has no actor and value; expected model.behavior"));
}

// Of CEM and MPPI.
template <typename Algorithm>
absl::Status CheckBehavior(absl::string_view name, const Algorithm& algorithm, const config::v1::Model& model) {
  if (algorithm.proposals() > 0) RETURN_IF_ERROR(NeedsBehavior(absl::StrCat(name, ".proposals"), model));
  if (algorithm.terminal_value()) RETURN_IF_ERROR(NeedsBehavior(absl::StrCat(name, ".terminal_value"), model));
  return absl::OkStatus();
}

absl::Status NeedsContinuousAction(absl::string_view algorithm) {
  return absl::InvalidArgumentError(absl::StrCat(
      algorithm, ": plans continuous actions only, but action is discrete; expected cem, genetic, random_shooting or random"));
}

}  // namespace

absl::StatusOr<PlanResult> Planner::PlanWithNoise(const WorldModel&, const LatentState&, const PlanNoise&) const {
  return absl::UnimplementedError("this planner takes no noise");
}

Tensor ShiftPlan(const Tensor& plan) {
  const int64_t h = plan.size(1);
  return at::cat({plan.narrow(1, 1, h - 1), plan.narrow(1, h - 1, 1)}, 1).clamp_(-1, 1);
}

absl::StatusOr<std::unique_ptr<Planner>> MakePlanner(const config::v1::Planner& config,
                                                     const config::v1::Model& model) {
  RETURN_IF_ERROR(Validate(config));
  RETURN_IF_ERROR(Validate(model, /*complete=*/true));
  // Of an algorithm that has all of them.
  const auto options = [](const auto& algorithm) {
    return RolloutOptions{.discount = algorithm.discount(),
                          .mean_latents = algorithm.mean_latents(),
                          .warm_start_horizon = algorithm.warm_start() ? algorithm.horizon() : 0};
  };
  // Of those that know the actor and the value.
  const auto with_behavior = [&](const auto& algorithm) {
    RolloutOptions all = options(algorithm);
    all.terminal_value = algorithm.terminal_value();
    all.proposals = algorithm.proposals();
    all.horizon = algorithm.horizon();
    return all;
  };
  const bool discrete = IsDiscrete(model);
  switch (config.algorithm_case()) {
    case config::v1::Planner::kRandom:
      return std::make_unique<RandomPlanner>(discrete);
    case config::v1::Planner::kIcem:
      if (discrete) return NeedsContinuousAction("icem");
      return std::make_unique<RolloutPlanner>(
          options(config.icem()), [icem = config.icem()](const PlanProblem& problem) { return RunIcem(icem, problem); });
    case config::v1::Planner::kMppi:
      if (discrete) return NeedsContinuousAction("mppi");
      RETURN_IF_ERROR(CheckBehavior("mppi", config.mppi(), model));
      return std::make_unique<RolloutPlanner>(
          with_behavior(config.mppi()), [mppi = config.mppi()](const PlanProblem& problem) { return RunMppi(mppi, problem); });
    case config::v1::Planner::kGenetic:
      return std::make_unique<RolloutPlanner>(
          RolloutOptions{.discrete = discrete, .discount = config.genetic().discount()},
          [genetic = config.genetic()](const PlanProblem& problem) { return RunGenetic(genetic, problem); });
    case config::v1::Planner::kRandomShooting:
      return std::make_unique<RolloutPlanner>(
          RolloutOptions{.discrete = discrete,
                         .discount = config.random_shooting().discount(),
                         .mean_latents = config.random_shooting().mean_latents()},
          [shooting = config.random_shooting()](const PlanProblem& problem) { return RunRandomShooting(shooting, problem); });
    case config::v1::Planner::kActor:
      RETURN_IF_ERROR(NeedsBehavior("actor", model));
      return std::make_unique<ActorPlanner>(discrete);
    case config::v1::Planner::kCem:
    case config::v1::Planner::ALGORITHM_NOT_SET:
      break;
  }
  RETURN_IF_ERROR(CheckBehavior("cem", config.cem(), model));
  RolloutOptions cem = with_behavior(config.cem());
  cem.discrete = discrete;
  cem.fixed = config.cem().early_stop_std() == 0;
  return std::make_unique<CemPlanner>(cem, config.cem());
}

}  // namespace orrery
