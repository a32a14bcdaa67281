#include "tools/orrery/inspect_model.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_replace.h"
#include "libs/base/array.h"
#include "libs/base/status.h"
#include "libs/device/parse_device.h"
#include "libs/learning/update.h"
#include "libs/planning/planner.h"
#include "libs/serving/engine.h"
#include "libs/tensors/safetensors.h"
#include "libs/world_model/imagine.h"
#include "libs/world_model/layout.h"
#include "libs/world_model/snapshot.h"
#include "tools/orrery/inspect_files.h"

namespace orrery {
namespace {

using torch::Tensor;

// Everything that the loss of `model` draws; modalities are hidden only by the batch.
absl::StatusOr<LossNoise> TakeLossNoise(InspectNoise& source, const WorldModel& model, int64_t t, int64_t b) {
  LossNoise noise;
  const int64_t s = model.stochastic_size(), distance = OvershootingDistance(model.config(), /*all=*/true);
  ASSIGN_OR_RETURN(noise.posterior, TakeNoise(source, "posterior", {t, b, s}));
  if (distance > 0) {
    ASSIGN_OR_RETURN(noise.overshooting, TakeNoise(source, "overshooting", {distance + 1, t, b, s}));
  }
  if (HasMixture(model.config())) {
    ASSIGN_OR_RETURN(noise.component, TakeNoise(source, "component", {t, b}, /*uniform=*/true));
  }
  return noise;
}

void Move(torch::Device device, Batch& batch, LossNoise& noise) {
  const auto move = [&](Tensor& x) {
    if (x.defined()) x = x.to(device);
  };
  for (TensorMap* map : {&batch.observations, &batch.available})
    for (auto& [name, x] : *map) move(x);
  for (Tensor* x : {&batch.action, &batch.reward, &batch.is_first, &batch.is_terminal, &noise.posterior, &noise.overshooting,
                    &noise.component})
    move(*x);
}

// Adds losses, returns and gradients of actor and value, where the model has them and the noise for them is given.
absl::Status AddBehavior(InspectNoise& source, const WorldModel& model, const LossOutputs& loss, bool gradients, TensorMap& out) {
  if (!model.config().has_behavior()) return absl::OkStatus();
  if (source.file.has_value() && !FindTensor(*source.file, "behavior_action").defined()) return absl::OkStatus();
  const int64_t h = model.config().behavior().horizon(), n = loss.deter.size(0) * loss.deter.size(1);
  BehaviorNoise noise;
  ASSIGN_OR_RETURN(noise.action, TakeNoise(source, "behavior_action", {h, n, ActionSize(model.config())}));
  ASSIGN_OR_RETURN(noise.state, TakeNoise(source, "behavior_state", {h, n, model.stochastic_size()}));
  noise = {noise.action.to(loss.deter.device()), noise.state.to(loss.deter.device())};
  return CatchExceptions("imagining behavior", [&] {
    const BehaviorAndGradients behavior = ComputeBehavior(model, loss, noise, gradients);
    const BehaviorOutputs& o = behavior.outputs;
    out.insert({{"loss_actor", o.loss_actor},
                {"loss_value", o.loss_value},
                {"behavior_returns", o.returns},
                {"behavior_values", o.values},
                {"behavior_entropy", o.entropy}});
    auto actor = behavior.actor.begin(), value = behavior.value.begin();
    for (const auto& parameter : model.named_parameters()) {
      const std::string name = "grad." + parameter.key();
      if (gradients && absl::StartsWith(parameter.key(), "actor.")) out[name] = *actor++;
      if (gradients && absl::StartsWith(parameter.key(), "value.")) out[name] = *value++;
    }
    return absl::OkStatus();
  });
}

void AddRecon(const TensorMap& recon, TensorMap& out) {
  for (const auto& [name, x] : recon) out.emplace(name == "image" ? "recon" : "recon." + name, x);
}

absl::Status Save(const std::string& path, const TensorMap& tensors) {
  SafeTensors file;
  for (const auto& [name, x] : tensors)
    if (x.defined()) file.tensors.emplace(name, x.detach().to(at::kCPU, at::kFloat).contiguous());
  return SaveSafeTensors(path, file);
}

}  // namespace

absl::Status InspectLoss(const InspectLossOptions& options) {
  ASSIGN_OR_RETURN(const torch::Device device, ParseDevice(options.device));
  ASSIGN_OR_RETURN(const ModelSnapshot snapshot, LoadSnapshot(options.snapshot));
  ASSIGN_OR_RETURN(InspectNoise source, OpenNoise(options.noise));
  ASSIGN_OR_RETURN(Batch batch, LoadBatch(options.batch, *snapshot.model, source));
  RETURN_IF_ERROR(CheckLeading(batch.reward, 2, "reward", options.batch));
  ASSIGN_OR_RETURN(LossNoise noise, TakeLossNoise(source, *snapshot.model, batch.reward.size(0), batch.reward.size(1)));
  Move(device, batch, noise);
  snapshot.model->to(device);
  snapshot.model->UseWorkers(std::make_shared<RowWorkers>(at::get_num_threads()));  // as the learner computes it
  auto loss = ComputeLoss(*snapshot.model, batch, noise, /*with_overshooting=*/true, options.gradients);
  if (!loss.ok()) return Annotate(loss.status(), options.batch);
  const LossOutputs& o = loss->outputs;
  TensorMap out = {{"deter", o.deter},
                   {"stoch", o.stoch},
                   {"prior_mean", o.prior_mean},
                   {"prior_std", o.prior_std},
                   {"post_mean", o.post_mean},
                   {"post_std", o.post_std},
                   {"embed", o.embed},
                   {"reward_mean", o.reward_mean},
                   {"kl", o.kl},
                   {"loss_observation", o.loss_observation},
                   {"loss_reward", o.loss_reward},
                   {"loss_kl", o.loss_kl},
                   {"loss_overshooting", o.loss_overshooting},
                   {"loss_observation_overshooting", o.loss_observation_overshooting},
                   {"loss_global_prior", o.loss_global_prior},
                   {"loss_continue", o.loss_continue},
                   {"continue_logit", o.continue_logit},
                   {"loss_total", o.loss_total}};
  AddRecon(o.recon, out);
  const auto parameters = snapshot.model->named_parameters();
  for (size_t i = 0; i < loss->gradients.size(); ++i) out.emplace("grad." + parameters[i].key(), loss->gradients[i]);
  RETURN_IF_ERROR(AddBehavior(source, *snapshot.model, o, options.gradients, out));
  return Save(options.out, out);
}

absl::Status InspectPlan(const InspectPlanOptions& options) {
  ASSIGN_OR_RETURN(const torch::Device device, ParseDevice(options.device));
  ASSIGN_OR_RETURN(const ModelSnapshot snapshot, LoadSnapshot(options.snapshot));
  ASSIGN_OR_RETURN(InspectNoise source, OpenNoise(options.noise));
  ASSIGN_OR_RETURN(const SafeTensors state, LoadSafeTensors(options.state));
  const Tensor deter = FindTensor(state.tensors, "deter"), stoch = FindTensor(state.tensors, "stoch");
  RETURN_IF_ERROR(CheckLeading(deter, 1, "deter", options.state));
  RETURN_IF_ERROR(CheckLeading(stoch, 1, "stoch", options.state));
  snapshot.model->to(device);
  const LatentState belief{deter.to(device, at::kFloat).unsqueeze(0), stoch.to(device, at::kFloat).unsqueeze(0)};
  ASSIGN_OR_RETURN(const auto planner, MakePlanner(snapshot.info.planner, snapshot.info.model));
  absl::StatusOr<PlanResult> plan = absl::InvalidArgumentError("a plan needs noise: give a seed or a file");
  if (source.generator.has_value()) {
    plan = planner->Plan(*snapshot.model, {belief, {source.generator->current_seed()}});
  } else if (source.file.has_value()) {
    const auto one = [&](const char* name) {
      const Tensor x = FindTensor(*source.file, name);
      return x.defined() ? x.to(device).unsqueeze(0) : x;
    };
    plan = planner->PlanWithNoise(*snapshot.model, belief, {one("plan_action"), one("plan_state")});
  }
  RETURN_IF_ERROR(plan.status());
  return Save(options.out, {{"plan_mean", plan->mean[0]}, {"plan_std", plan->std[0]}});
}

absl::Status InspectImagine(const InspectImagineOptions& options) {
  ASSIGN_OR_RETURN(const ModelSnapshot snapshot, LoadSnapshot(options.snapshot));
  ASSIGN_OR_RETURN(InspectNoise source, OpenNoise(options.noise));
  ASSIGN_OR_RETURN(Batch batch, LoadBatch(options.batch, *snapshot.model, source));
  RETURN_IF_ERROR(CheckLeading(batch.action, 3, "action", options.batch));
  const int64_t t = batch.action.size(0), b = batch.action.size(1);
  if (options.context < 1 || options.context > t)
    return absl::InvalidArgumentError(absl::StrCat("context is ", options.context, "; expected 1 to ", t));
  batch.reward = at::zeros({t, b});
  batch.is_terminal = at::zeros({t, b}, at::kByte);
  RETURN_IF_ERROR(Annotate(CheckBatch(snapshot.info.model, batch), options.batch));
  ASSIGN_OR_RETURN(const Tensor noise, TakeNoise(source, "posterior", {t, b, snapshot.model->stochastic_size()}));
  return CatchExceptions("imagining", [&] {
    const Imagined imagined = Imagine(*snapshot.model, batch, options.context, noise);
    TensorMap out = {{"reward_mean", imagined.reward_mean}};
    AddRecon(imagined.recon, out);
    return Save(options.out, out);
  });
}

absl::Status InspectSnapshot(const std::string& path, std::ostream& out) {
  ASSIGN_OR_RETURN(const SafeTensors file, LoadSafeTensors(path));
  int64_t numbers = 0;
  for (const auto& [name, x] : file.tensors) {
    numbers += x.numel();
    out << absl::StreamFormat("%-40s %-7s %-18s norm %.6g\n", name, at::toString(x.scalar_type()),
                              ShapeString(x.sizes().vec()), x.to(at::kDouble).norm().item<double>());
  }
  out << absl::StreamFormat("%d tensors, %d numbers\n", file.tensors.size(), numbers);
  for (const auto& [key, value] : file.metadata)
    out << key << ":\n  " << absl::StrReplaceAll(absl::StripTrailingAsciiWhitespace(value), {{"\n", "\n  "}}) << "\n";
  return absl::OkStatus();
}

}  // namespace orrery
