#include "libs/planning/planner.h"

#include <ATen/CPUGeneratorImpl.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "libs/base/array.h"
#include "libs/base/status.h"
#include "libs/planning/cem.h"

namespace orrery {
namespace {

using torch::Tensor;

std::vector<torch::Generator> Generators(absl::Span<const uint64_t> seeds) {
  std::vector<torch::Generator> generators;
  for (const uint64_t seed : seeds) generators.push_back(at::make_generator<at::CPUGeneratorImpl>(seed));
  return generators;
}

absl::Status CheckShape(const Tensor& tensor, const std::vector<int64_t>& expected, absl::string_view what) {
  if (tensor.defined() && tensor.sizes() == at::IntArrayRef(expected)) return absl::OkStatus();
  const std::string actual = tensor.defined() ? ShapeString(tensor.sizes().vec()) : "missing";
  return absl::InvalidArgumentError(absl::StrCat(what, " is ", actual, "; expected ", ShapeString(expected)));
}

absl::Status CheckBelief(const WorldModel& model, const LatentState& belief, int64_t n) {
  RETURN_IF_ERROR(CheckShape(belief.deter, {n, model.deterministic_size()}, "deter"));
  return CheckShape(belief.stoch, {n, model.stochastic_size()}, "stoch");
}

class CemPlanner : public Planner {
 public:
  CemPlanner(const config::v1::Cem& cem, bool discrete) : cem_(cem), discrete_(discrete) {}

  absl::StatusOr<PlanResult> Plan(const WorldModel& model, const LatentState& belief,
                                  absl::Span<const uint64_t> seeds) const override {
    const auto n = static_cast<int64_t>(seeds.size());
    RETURN_IF_ERROR(CheckBelief(model, belief, n));
    std::vector<torch::Generator> generators = Generators(seeds);
    // At every iteration each agent draws its actions' noise, then its states'.
    const auto draw = [&](int64_t size) {
      std::vector<Tensor> noise;
      for (torch::Generator& generator : generators)
        noise.push_back(at::randn({cem_.horizon(), cem_.candidates(), size}, generator, at::kFloat));
      return at::stack(noise, 1).to(belief.deter.device());
    };
    return Run(model, belief, [&](int64_t) { return draw(model.action_size()); },
               [&](int64_t) { return draw(model.stochastic_size()); });
  }

  absl::StatusOr<PlanResult> PlanWithNoise(const WorldModel& model, const LatentState& belief,
                                           const PlanNoise& noise) const override {
    const int64_t n = belief.deter.size(0), i = cem_.iterations(), h = cem_.horizon(), j = cem_.candidates();
    RETURN_IF_ERROR(CheckBelief(model, belief, n));
    RETURN_IF_ERROR(CheckShape(noise.action, {n, i, h, j, model.action_size()}, "plan_action"));
    RETURN_IF_ERROR(CheckShape(noise.state, {n, i, h, j, model.stochastic_size()}, "plan_state"));
    const auto part = [](const Tensor& x, int64_t iteration) { return x.select(1, iteration).transpose(0, 1); };
    return Run(model, belief, [&](int64_t iteration) { return part(noise.action, iteration); },
               [&](int64_t iteration) { return part(noise.state, iteration); });
  }

 private:
  template <typename Draw, typename DrawState>
  absl::StatusOr<PlanResult> Run(const WorldModel& model, const LatentState& belief, const Draw& draw,
                                 const DrawState& draw_state) const {
    torch::NoGradGuard no_grad;
    return CatchExceptions("planning", [&]() -> absl::StatusOr<PlanResult> {
      CemProblem problem;
      problem.agents = belief.deter.size(0);
      problem.action_size = model.action_size();
      problem.discrete = discrete_;
      problem.options = belief.deter.options();
      problem.draw = draw;
      problem.objective = [&](const Tensor& plans, int64_t i) {
        return model.ImaginedReturns(belief, plans, draw_state(i));
      };
      return RunCem(cem_, problem);
    });
  }

  const config::v1::Cem cem_;
  const bool discrete_;
};

class RandomPlanner : public Planner {
 public:
  RandomPlanner(int64_t action_size, bool discrete) : action_size_(action_size), discrete_(discrete) {}

  absl::StatusOr<PlanResult> Plan(const WorldModel& model, const LatentState& belief,
                                  absl::Span<const uint64_t> seeds) const override {
    const auto n = static_cast<int64_t>(seeds.size());
    RETURN_IF_ERROR(CheckBelief(model, belief, n));
    PlanResult result;
    result.action = at::empty({n, action_size_}, at::kFloat);
    std::vector<torch::Generator> generators = Generators(seeds);
    for (int64_t i = 0; i < n; ++i) {
      Tensor action = result.action[i];
      if (discrete_) {
        action.zero_();
        action[at::randint(action_size_, {}, generators[i], at::kLong).item<int64_t>()] = 1;
      } else {
        action.uniform_(-1, 1, generators[i]);
      }
    }
    result.action = result.action.to(belief.deter.device());
    result.mean = result.action.unsqueeze(1);
    result.std = at::zeros_like(result.mean);
    result.predicted_return = at::zeros({n}, result.action.options());
    return result;
  }

  absl::StatusOr<PlanResult> PlanWithNoise(const WorldModel&, const LatentState&, const PlanNoise&) const override {
    return absl::UnimplementedError("the random planner takes no noise");
  }

 private:
  const int64_t action_size_;
  const bool discrete_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Planner>> MakePlanner(const config::v1::Planner& config,
                                                     const config::v1::Model& model) {
  RETURN_IF_ERROR(Validate(config));
  RETURN_IF_ERROR(Validate(model, /*complete=*/true));
  if (config.has_random()) return std::make_unique<RandomPlanner>(ActionSize(model), IsDiscrete(model));
  return std::make_unique<CemPlanner>(config.cem(), IsDiscrete(model));  // also where no algorithm is set
}

}  // namespace orrery
