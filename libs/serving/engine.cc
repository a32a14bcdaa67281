#include "libs/serving/engine.h"

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "libs/base/random.h"
#include "libs/base/status.h"
#include "libs/config/config.h"
#include "libs/device/captured_step.h"
#include "libs/tensors/tensors.h"
#include "libs/world_model/parallel_rows.h"

namespace orrery {
namespace {

// Clients that compute in other precisions may round an action just over the bound.
constexpr float kActionBound = 1 + 1e-5f;
constexpr float kMaxNoise = 10;

using Outputs = std::vector<absl::StatusOr<SlotOutput>>;

// What a modality looks like on the wire.
Array ExpectedShape(const config::v1::Modality& modality) {
  if (modality.has_image()) {
    const config::v1::ImageModality& image = modality.image();
    return {DType::kUInt8, {image.height(), image.width(), image.channels()}, ""};
  }
  return {DType::kFloat32, {modality.vector().size()}, ""};
}

std::string Describe(const Array& array) { return absl::StrCat(Name(array.dtype), " ", ShapeString(array.shape)); }

std::string ModalityNames(const config::v1::Model& model) {
  return absl::StrJoin(model.modalities(), ", ", [](std::string* out, const config::v1::Modality& m) {
    absl::StrAppend(out, "\"", m.name(), "\"");
  });
}

absl::Status CheckObservations(const config::v1::Model& model, const ArrayMap& observations, absl::string_view what) {
  for (const auto& [name, array] : observations) {
    const bool known = std::any_of(model.modalities().begin(), model.modalities().end(),
                                   [&n = name](const config::v1::Modality& m) { return m.name() == n; });
    if (known) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(what, ".observations: unknown modality \"", name, "\", expected ", ModalityNames(model)));
  }
  if (observations.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(what, ".observations is empty, expected at least one modality: ",
                                                   ModalityNames(model)));
  }
  for (const config::v1::Modality& modality : model.modalities()) {
    const Array expected = ExpectedShape(modality);
    const auto it = observations.find(modality.name());
    if (it == observations.end()) continue;  // nothing of it is known at this step
    const Array& array = it->second;
    if (array.dtype != expected.dtype || array.shape != expected.shape) {
      return absl::InvalidArgumentError(absl::StrCat(what, ".observations \"", modality.name(), "\" is ", Describe(array),
                                                     ", expected ", Describe(expected)));
    }
    RETURN_IF_ERROR(CheckArray(array, absl::StrCat(what, ".observations \"", modality.name(), "\"")));
    if (array.dtype != DType::kFloat32) continue;
    for (const float value : array.as<float>()) {
      if (!std::isfinite(value)) {
        return absl::InvalidArgumentError(absl::StrCat(what, ".observations \"", modality.name(), "\" holds ", value,
                                                       ", expected finite numbers"));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status CheckAction(const config::v1::Model& model, const std::vector<float>& action, absl::string_view what) {
  if (action.empty()) return absl::OkStatus();
  const int size = ActionSize(model);
  if (action.size() != static_cast<size_t>(size)) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ".previous_action has ", action.size(), " values, expected ", size, " (or none at the start)"));
  }
  int ones = 0;
  for (const float value : action) {
    if (!(std::abs(value) <= kActionBound)) {
      return absl::InvalidArgumentError(absl::StrCat(what, ".previous_action holds ", value, ", expected -1 to 1"));
    }
    if (IsDiscrete(model) && value != 0 && value != 1) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, ".previous_action holds ", value, ", expected a one-hot vector of 0 and 1"));
    }
    ones += value == 1;
  }
  if (IsDiscrete(model) && ones > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ".previous_action holds ", ones, " ones, expected a one-hot vector (zeros at the start)"));
  }
  return absl::OkStatus();
}

absl::Status CheckValidActions(const config::v1::Model& model, const std::vector<uint8_t>& valid, absl::string_view what) {
  if (valid.empty()) return absl::OkStatus();
  if (!IsDiscrete(model)) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ".valid_actions has ", valid.size(), " values, expected none: the action is continuous"));
  }
  const int size = ActionSize(model);
  if (valid.size() != static_cast<size_t>(size)) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ".valid_actions has ", valid.size(), " values, expected ", size, " (or none: all are valid)"));
  }
  if (std::any_of(valid.begin(), valid.end(), [](uint8_t v) { return v != 0; })) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(what, ".valid_actions allows no action, expected at least one"));
}

torch::Generator MakeGenerator(uint64_t seed) { return at::make_generator<at::CPUGeneratorImpl>(seed); }

// The inputs of a batch as tensors, and what is drawn for each slot before it is computed.
struct BatchTensors {
  TensorMap observations;       // preprocessed, [N, …]; zeros where a slot has none
  TensorMap available;          // [N] bool of the modalities that some slot lacks
  LatentState belief;           // [N, D], [N, S]
  torch::Tensor action;         // [N, A]
  torch::Tensor noise;          // [N, S] standard normal
  torch::Tensor previous_plan;  // [N, H, A]; undefined: the planner takes none
  torch::Tensor has_previous;   // [N] bool, beside previous_plan
  torch::Tensor valid_actions;  // [N, A] bool; undefined: all are valid
  std::vector<uint64_t> plan_seeds;
  std::vector<torch::Generator> generators;  // one per slot, for what is drawn later
};

// Observations of one slot, [1, …], preprocessed on the CPU with the slot's own noise.
void AppendObservations(const WorldModel& model, const SlotInput& slot, torch::Generator& generator,
                        std::map<std::string, std::vector<torch::Tensor>>& out) {
  TensorMap stored;
  for (const config::v1::Modality& modality : model.config().modalities()) {
    const auto seen = slot.observations.find(modality.name());
    const Array shape = ExpectedShape(modality);
    stored[modality.name()] =
        ToTorch(seen != slot.observations.end() ? seen->second : Array::Zeros(shape.dtype, shape.shape)).unsqueeze(0);
  }
  for (auto& [name, tensor] : model.Preprocess(stored, generator)) out[name].push_back(tensor);
}

// [N] bool of each modality that some slot lacks.
TensorMap Available(const config::v1::Model& model, absl::Span<const SlotInput* const> slots) {
  TensorMap available;
  for (const config::v1::Modality& modality : model.modalities()) {
    torch::Tensor there = torch::ones({static_cast<int64_t>(slots.size())}, torch::kBool);
    for (size_t i = 0; i < slots.size(); ++i)
      there.data_ptr<bool>()[i] = slots[i]->observations.count(modality.name()) > 0;
    if (!there.all().item<bool>()) available[modality.name()] = there;
  }
  return available;
}

void CopyRow(torch::Tensor& rows, size_t row, const std::vector<float>& values) {
  std::copy(values.begin(), values.end(), rows.data_ptr<float>() + row * static_cast<size_t>(rows.size(1)));
}

// [N, A] bool; undefined where no slot restricts its action.
torch::Tensor ValidActions(absl::Span<const SlotInput* const> slots, int64_t size) {
  if (std::all_of(slots.begin(), slots.end(), [](const SlotInput* slot) { return slot->valid_actions.empty(); })) return {};
  torch::Tensor valid = torch::ones({static_cast<int64_t>(slots.size()), size}, torch::kBool);
  for (size_t i = 0; i < slots.size(); ++i) {
    const std::vector<uint8_t>& choices = slots[i]->valid_actions;
    bool* row = valid.data_ptr<bool>() + i * static_cast<size_t>(size);
    for (size_t a = 0; a < choices.size(); ++a) row[a] = choices[a] != 0;
  }
  return valid;
}

absl::StatusOr<BatchTensors> MakeTensors(const ServedModel& served, absl::Span<const SlotInput* const> slots,
                                         torch::Device device, prometheus::Histogram& belief_lag) {
  const WorldModel& model = *served.model;
  const int64_t n = static_cast<int64_t>(slots.size());
  const BeliefShape shape = served.belief_shape();
  BatchTensors batch;
  batch.belief = {torch::zeros({n, model.deterministic_size()}), torch::zeros({n, model.stochastic_size()})};
  batch.action = torch::zeros({n, model.action_size()});
  torch::Tensor plans = torch::zeros({n, shape.plan_horizon * model.action_size()});
  torch::Tensor has_plan = torch::zeros({n}, torch::kBool);
  std::map<std::string, std::vector<torch::Tensor>> observations;
  std::vector<torch::Tensor> noise;
  for (size_t i = 0; i < slots.size(); ++i) {
    const SlotInput& slot = *slots[i];
    if (!slot.belief.empty()) {
      ASSIGN_OR_RETURN(const Belief belief, ParseBelief(slot.belief, shape));
      CopyRow(batch.belief.deter, i, belief.deter);
      CopyRow(batch.belief.stoch, i, belief.stoch);
      CopyRow(plans, i, belief.plan);
      has_plan.data_ptr<bool>()[i] = !belief.plan.empty();
      belief_lag.Observe(static_cast<double>(std::max<int64_t>(0, served.version.counter - belief.version.counter)));
    }
    CopyRow(batch.action, i, slot.previous_action);
    batch.generators.push_back(MakeGenerator(DeriveSeed(slot.seed, "act")));
    batch.plan_seeds.push_back(DeriveSeed(slot.seed, "plan"));
    AppendObservations(model, slot, batch.generators.back(), observations);
    noise.push_back(torch::randn({model.stochastic_size()}, batch.generators.back()));
  }
  for (auto& [name, rows] : observations) batch.observations[name] = torch::cat(rows).to(device);
  for (auto& [name, there] : Available(model.config(), slots)) batch.available[name] = there.to(device);
  batch.belief = {batch.belief.deter.to(device), batch.belief.stoch.to(device)};
  batch.action = batch.action.to(device);
  batch.noise = torch::stack(noise).to(device);
  if (shape.plan_horizon > 0) {
    batch.previous_plan = plans.view({n, shape.plan_horizon, model.action_size()}).to(device);
    batch.has_previous = has_plan.to(device);
  }
  batch.valid_actions = ValidActions(slots, model.action_size());
  if (batch.valid_actions.defined()) batch.valid_actions = batch.valid_actions.to(device);
  return batch;
}

// A uniformly random valid choice.
int64_t RandomChoice(const SlotInput& slot, int64_t size, torch::Generator& generator) {
  std::vector<int64_t> valid;
  for (int64_t a = 0; a < size; ++a) {
    if (slot.valid_actions.empty() || slot.valid_actions[static_cast<size_t>(a)] != 0) valid.push_back(a);
  }
  const auto choices = static_cast<int64_t>(valid.size());
  return valid[static_cast<size_t>(torch::randint(choices, {1}, generator, torch::kInt64).item<int64_t>())];
}

// The action as it is executed: with exploration, inside its range.
std::vector<float> Explore(const config::v1::Model& model, torch::Tensor action, const SlotInput& slot,
                           torch::Generator& generator) {
  const float noise = slot.exploration_noise;
  if (IsDiscrete(model)) {
    if (noise > 0 && torch::rand({1}, generator).item<float>() < noise) {
      const int64_t choice = RandomChoice(slot, action.size(0), generator);
      action = torch::zeros_like(action);
      action[choice] = 1;
    }
  } else {
    if (noise > 0) action = action + noise * torch::randn({action.size(0)}, generator);
    action = action.clamp(-1, 1);
  }
  action = action.contiguous();
  return {action.data_ptr<float>(), action.data_ptr<float>() + action.numel()};
}

std::vector<float> Row(const torch::Tensor& rows, int64_t i) {
  const float* begin = rows.data_ptr<float>() + i * rows.size(1);
  return {begin, begin + rows.size(1)};
}

bool AllFinite(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); });
}

// What a batch computed, on the CPU.
struct BatchResults {
  LatentState state;               // [N, D], [N, S]
  torch::Tensor action;            // [N, A]
  torch::Tensor predicted_return;  // [N]
  torch::Tensor next_plan;         // [N, H · A], what the next call begins from; undefined: the planner wants none
};

absl::StatusOr<SlotOutput> MakeOutput(const ServedModel& served, const BatchResults& results, int64_t i,
                                      const SlotInput& slot, torch::Generator& generator) {
  Belief belief{served.name, served.structure_hash, served.version, Row(results.state.deter, i), Row(results.state.stoch, i)};
  if (results.next_plan.defined()) {
    belief.plan_horizon = served.planner->warm_start_horizon();
    belief.plan = Row(results.next_plan, i);
  }
  SlotOutput out;
  ASSIGN_OR_RETURN(out.belief, SerializeBelief(belief));
  out.action = Explore(served.model->config(), results.action[i], slot, generator);
  if (!AllFinite(out.action)) {
    return absl::InvalidArgumentError("the planned action is not finite for this observation");
  }
  out.predicted_return = results.predicted_return[i].item<float>();
  return out;
}

torch::Tensor ToHost(const torch::Tensor& tensor) { return tensor.to(torch::kCPU, torch::kFloat32).contiguous(); }

}  // namespace

absl::Status CheckSlot(const ServedModel& served, const SlotInput& slot, absl::string_view what) {
  const config::v1::Model& model = served.model->config();
  RETURN_IF_ERROR(CheckObservations(model, slot.observations, what));
  RETURN_IF_ERROR(CheckAction(model, slot.previous_action, what));
  RETURN_IF_ERROR(CheckValidActions(model, slot.valid_actions, what));
  const float most = IsDiscrete(model) ? 1 : kMaxNoise;
  if (!(slot.exploration_noise >= 0 && slot.exploration_noise <= most)) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ".exploration_noise is ", slot.exploration_noise, ", expected 0 to ", most));
  }
  if (slot.belief.empty()) return absl::OkStatus();
  if (slot.previous_action.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ".previous_action is empty beside a belief, expected the action taken since"));
  }
  return Annotate(ParseBelief(slot.belief, served.belief_shape()).status(), what);
}

InferenceEngine::InferenceEngine(torch::Device device, std::shared_ptr<prometheus::Registry> registry,
                                 const prometheus::Labels& labels)
    : device_(device),
      registry_(std::move(registry)),
      compute_seconds_(
          AddHistogram(*registry_, "planner_compute_seconds",
                       "Time to compute what is computed together: a batch, on a CPU one request.", SecondsBuckets(), labels)),
      belief_lag_(AddHistogram(*registry_, "planner_belief_lag",
                               "Updates between the snapshot that made a belief and the one that goes on from it.",
                               {0, 1, 10, 100, 1000, 10000}, labels)),
      non_finite_plans_(AddCounter(*registry_, "planner_non_finite_plans_total",
                                   "Plans whose predicted return was not finite.", labels)) {}

absl::StatusOr<Outputs> InferenceEngine::Run(const ServedModel& served, absl::Span<const SlotInput* const> slots) const {
  return CatchExceptions("inference", [&]() -> absl::StatusOr<Outputs> {
    const auto begin = std::chrono::steady_clock::now();
    absl::StatusOr<Outputs> outputs = device_.is_cpu() ? ComputeApart(served, slots) : Compute(served, slots);
    if (outputs.ok()) {
      compute_seconds_.Observe(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    return outputs;
  });
}

absl::StatusOr<Outputs> InferenceEngine::ComputeApart(const ServedModel& served,
                                                      absl::Span<const SlotInput* const> slots) const {
  std::vector<absl::StatusOr<Outputs>> apart(slots.size());
  served.workers->RunWhole(std::ssize(slots), [&](int64_t i) { apart[i] = Compute(served, slots.subspan(i, 1)); });
  Outputs outputs;
  outputs.reserve(slots.size());
  for (absl::StatusOr<Outputs>& one : apart) {
    RETURN_IF_ERROR(one.status());
    outputs.push_back(std::move((*one)[0]));
  }
  return outputs;
}

absl::StatusOr<Outputs> InferenceEngine::Compute(const ServedModel& served, absl::Span<const SlotInput* const> slots) const {
  UseTorchThreads();
  c10::InferenceMode inference;
  const WorldModel& model = *served.model;
  ASSIGN_OR_RETURN(BatchTensors batch, MakeTensors(served, slots, device_, belief_lag_));
  const Predicted predicted = model.Predict(batch.belief, batch.action);
  const LatentDistribution posterior = model.Posterior(predicted, model.Encode(batch.observations, batch.available));
  const LatentState state{predicted.deter, model.latents().Sample(posterior, batch.noise)};
  ASSIGN_OR_RETURN(const PlanResult plan, served.planner->Plan(model, {state, batch.plan_seeds, batch.previous_plan,
                                                                       batch.has_previous, batch.valid_actions}));
  non_finite_plans_.Increment(static_cast<double>(plan.non_finite_plans));
  BatchResults results{{ToHost(state.deter), ToHost(state.stoch)}, ToHost(plan.action), ToHost(plan.predicted_return), {}};
  if (batch.previous_plan.defined()) results.next_plan = ToHost(ShiftPlan(plan.mean).flatten(1));
  Outputs outputs;
  outputs.reserve(slots.size());
  for (size_t i = 0; i < slots.size(); ++i) {
    outputs.push_back(MakeOutput(served, results, static_cast<int64_t>(i), *slots[i], batch.generators[i]));
  }
  return outputs;
}

InferenceEngine::WarmUps InferenceEngine::WarmUpsOn(torch::Device device, int64_t max_batch) {
  if (!device.is_cuda()) return {.sizes = {1}, .runs = 1};
  WarmUps warm_ups{.sizes = {1}, .runs = CapturedStep::kWarmUps + 1};
  while (warm_ups.sizes.back() < max_batch) warm_ups.sizes.push_back(2 * warm_ups.sizes.back());
  return warm_ups;
}

absl::Status InferenceEngine::WarmUp(const ServedModel& served, const WarmUps& warm_ups) const {
  std::vector<SlotInput> kinds(1);
  for (const config::v1::Modality& modality : served.model->config().modalities()) {
    const Array shape = ExpectedShape(modality);
    kinds[0].observations[modality.name()] = Array::Zeros(shape.dtype, shape.shape);
  }
  if (IsDiscrete(served.model->config())) {
    kinds.push_back(kinds[0]);
    kinds[1].valid_actions.assign(static_cast<size_t>(served.model->action_size()), 1);
  }
  return CatchExceptions("inference", [&]() -> absl::Status {
    for (const SlotInput& slot : kinds) {
      for (const int64_t size : warm_ups.sizes) {
        const std::vector<const SlotInput*> slots(static_cast<size_t>(size), &slot);
        for (int run = 0; run < warm_ups.runs; ++run) {
          ASSIGN_OR_RETURN(const Outputs outputs, Compute(served, slots));
          for (const auto& output : outputs) RETURN_IF_ERROR(output.status());
        }
      }
    }
    return absl::OkStatus();
  });
}

}  // namespace orrery
