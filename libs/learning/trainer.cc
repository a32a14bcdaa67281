#include "libs/learning/trainer.h"

#include <string>
#include <utility>

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
                                                         torch::Device device, int threads) {
  ASSIGN_OR_RETURN(std::shared_ptr<WorldModel> world_model, WorldModel::Create(model, DeriveSeed(seed, "parameters")));
  return CatchExceptions(absl::StrCat("training on ", device.str()), [&]() -> absl::StatusOr<std::unique_ptr<Trainer>> {
    world_model->to(device);
    world_model->UseWorkers(std::make_shared<RowWorkers>(threads));
    // A generator of this trainer's own, for any kind of device.
    torch::Generator generator = at::globalContext().defaultGenerator(device).clone();
    generator.set_current_seed(DeriveSeed(seed, "noise"));
    return std::unique_ptr<Trainer>(new Trainer(std::move(world_model), learning, std::move(generator), device));
  });
}

Trainer::Trainer(std::shared_ptr<WorldModel> model, const config::v1::Learning& learning, torch::Generator generator,
                 torch::Device device)
    : device_(device), model_(std::move(model)), generator_(std::move(generator)), updater_(model_, learning) {}

absl::StatusOr<UpdateResult> Trainer::Update(const StoredBatch& stored) {
  return CatchExceptions("update", [&]() -> absl::StatusOr<UpdateResult> {
    TensorMap observations;
    for (const auto& [name, tensor] : stored.observations) observations[name] = tensor.to(device_);
    Batch batch;
    {
      torch::NoGradGuard no_grad;
      batch = {model_->Preprocess(observations, generator_), stored.action.to(device_), stored.reward.to(device_),
               stored.is_first.to(device_)};
      if (model_->config().has_continue_head()) batch.is_terminal = stored.is_terminal.to(device_);
    }
    return updater_.Update(batch, generator_);
  });
}

TensorMap Trainer::State() const {
  TensorMap state = updater_.State();
  for (auto& [name, tensor] : state) tensor = tensor.cpu();
  for (const auto& parameter : model_->named_parameters()) {
    state[absl::StrCat(kParameter, parameter.key())] = parameter.value().detach().cpu().clone();
  }
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
    torch::NoGradGuard no_grad;
    for (auto& parameter : model_->named_parameters()) {
      parameter.value().copy_(state.at(absl::StrCat(kParameter, parameter.key())));
    }
    return absl::OkStatus();
  });
}

}  // namespace orrery
