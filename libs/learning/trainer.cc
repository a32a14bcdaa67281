#include "libs/learning/trainer.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "libs/base/random.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

constexpr char kParameter[] = "param.";
constexpr char kGenerator[] = "random.generator";

}  // namespace

absl::StatusOr<std::unique_ptr<Trainer>> Trainer::Create(const config::v1::Model& model,
                                                         const config::v1::Learning& learning, uint64_t seed,
                                                         torch::Device device, int threads, bool bfloat16,
                                                         DataParallel* group) {
  ASSIGN_OR_RETURN(std::shared_ptr<WorldModel> world_model, WorldModel::Create(model, DeriveSeed(seed, "parameters")));
  std::shared_ptr<WorldModel> mean;
  if (learning.has_weight_average_decay()) {
    ASSIGN_OR_RETURN(mean, WorldModel::Create(model, DeriveSeed(seed, "parameters")));
  }
  return CatchExceptions(absl::StrCat("training on ", device.str()), [&]() -> absl::StatusOr<std::unique_ptr<Trainer>> {
    world_model->to(device);
    world_model->UseWorkers(std::make_shared<RowWorkers>(threads));
    if (bfloat16) world_model->UseBfloat16();
    std::unique_ptr<WeightAverage> average;
    if (mean != nullptr) {
      mean->to(device);
      average = std::make_unique<WeightAverage>(world_model, std::move(mean), learning.weight_average_decay());
    }
    // A generator of this trainer's own, for any kind of device.
    torch::Generator generator = at::globalContext().defaultGenerator(device).clone();
    generator.set_current_seed(DeriveSeed(seed, "noise"));
    return std::unique_ptr<Trainer>(
        new Trainer(std::move(world_model), std::move(average), learning, std::move(generator), device, group));
  });
}

Trainer::Trainer(std::shared_ptr<WorldModel> model, std::unique_ptr<WeightAverage> average,
                 const config::v1::Learning& learning, torch::Generator generator, torch::Device device, DataParallel* group)
    : device_(device),
      group_(group),
      model_(std::move(model)),
      average_(std::move(average)),
      generator_(std::move(generator)),
      updater_(model_, learning, group),
      step_(
          device,
          [this](const std::vector<torch::Tensor>& stored) {
            const absl::StatusOr<torch::Tensor> values = updater_.Enqueue(Prepare(stored), generator_);
            TORCH_CHECK(values.ok(), std::string(values.status().message()));
            return std::vector<torch::Tensor>{*values};
          },
          group == nullptr ? MakeDeviceGraph(device, {generator_}) : nullptr) {}

absl::StatusOr<std::vector<torch::Tensor>> Trainer::Flatten(const StoredBatch& stored) const {
  const config::v1::Model& config = model_->config();
  std::vector<torch::Tensor> tensors;
  for (const config::v1::Modality& modality : config.modalities()) {
    const auto found = stored.observations.find(modality.name());
    if (found == stored.observations.end() || !found->second.defined()) {
      return absl::InvalidArgumentError(absl::StrCat("the batch has no modality \"", modality.name(), "\""));
    }
    tensors.push_back(found->second);
  }
  std::vector<std::pair<absl::string_view, torch::Tensor>> others = {
      {"action", stored.action}, {"reward", stored.reward}, {"is_first", stored.is_first}};
  if (config.has_continue_head()) others.emplace_back("is_terminal", stored.is_terminal);
  for (const auto& [name, tensor] : others) {
    if (!tensor.defined()) return absl::InvalidArgumentError(absl::StrCat("the batch has no ", name));
    tensors.push_back(tensor);
  }
  return tensors;
}

TensorMap Trainer::Preprocess(const TensorMap& stored) {
  if (group_ == nullptr) return model_->Preprocess(stored, generator_);
  return model_->Preprocess(stored, [&](const torch::Tensor& pictures) {  // [T, B, H, W, C]
    std::vector<int64_t> whole = pictures.sizes().vec();
    whole[1] *= group_->size();
    return group_->Part(at::rand(whole, generator_, pictures.options().dtype(at::kFloat)), 1);
  });
}

Batch Trainer::Prepare(const std::vector<torch::Tensor>& stored) {
  torch::NoGradGuard no_grad;
  TensorMap observations;
  size_t i = 0;
  for (const config::v1::Modality& modality : model_->config().modalities()) observations[modality.name()] = stored[i++];
  Batch batch{Preprocess(observations), stored[i], stored[i + 1], stored[i + 2]};
  if (model_->config().has_continue_head()) batch.is_terminal = stored[i + 3];
  return batch;
}

absl::StatusOr<UpdateResult> Trainer::MakeUpdate(const StoredBatch& stored) {
  ASSIGN_OR_RETURN(std::vector<torch::Tensor> tensors, Flatten(stored));
  if (!device_.is_cuda() || group_ != nullptr) {
    for (torch::Tensor& tensor : tensors) tensor = tensor.to(device_);
    return updater_.Update(Prepare(tensors), generator_);
  }
  return updater_.Read(step_.Run(tensors)[0]);
}

absl::StatusOr<UpdateResult> Trainer::Update(const StoredBatch& stored) {
  return CatchExceptions("update", [&]() -> absl::StatusOr<UpdateResult> {
    ASSIGN_OR_RETURN(const UpdateResult result, MakeUpdate(stored));
    if (average_ != nullptr && !result.skipped) average_->Add(updater_.steps());
    return result;
  });
}

TensorMap Trainer::State() const {
  TensorMap state = updater_.State();
  for (auto& [name, tensor] : state) tensor = tensor.cpu();
  for (const auto& parameter : model_->named_parameters()) {
    state[absl::StrCat(kParameter, parameter.key())] = parameter.value().detach().cpu().clone();
  }
  if (average_ != nullptr) state.merge(average_->State());
  state[kGenerator] = generator_.get_state().clone();
  return state;
}

absl::Status Trainer::CheckParameters(const TensorMap& state) const {
  for (const auto& parameter : model_->named_parameters()) {
    const std::string name = absl::StrCat(kParameter, parameter.key());
    const auto found = state.find(name);
    if (found == state.end()) return absl::InvalidArgumentError(absl::StrCat(name, " is missing"));
    const torch::Tensor& expected = parameter.value();
    if (found->second.sizes() != expected.sizes() || found->second.scalar_type() != expected.scalar_type()) {
      return absl::InvalidArgumentError(absl::StrCat(name, " is ", toString(found->second.scalar_type()), " [",
                                                     absl::StrJoin(found->second.sizes(), ", "), "], the model has ",
                                                     toString(expected.scalar_type()), " [",
                                                     absl::StrJoin(expected.sizes(), ", "), "]"));
    }
  }
  return absl::OkStatus();
}

absl::Status Trainer::Restore(const TensorMap& state, bool with_random) {
  return CatchExceptions("restoring a checkpoint", [&]() -> absl::Status {
    RETURN_IF_ERROR(CheckParameters(state));
    if (average_ != nullptr) RETURN_IF_ERROR(average_->Check(state));
    const auto random = state.find(kGenerator);
    if (with_random) {
      if (random == state.end()) return absl::InvalidArgumentError(absl::StrCat(kGenerator, " is missing"));
      const torch::Tensor present = generator_.get_state();
      if (random->second.scalar_type() != torch::kUInt8 || random->second.sizes() != present.sizes()) {
        return absl::InvalidArgumentError(
            absl::StrCat(kGenerator, " is not a state of this device's generator (", device_.str(), ")"));
      }
    }
    RETURN_IF_ERROR(updater_.Restore(state));
    if (with_random) generator_.set_state(random->second);
    if (average_ != nullptr) average_->Restore(state);
    torch::NoGradGuard no_grad;
    for (auto& parameter : model_->named_parameters()) {
      parameter.value().copy_(state.at(absl::StrCat(kParameter, parameter.key())));
    }
    return absl::OkStatus();
  });
}

}  // namespace orrery
