#include "tools/orrery/episode_film.h"

#include <ATen/CPUGeneratorImpl.h>

#include <memory>
#include <utility>
#include <vector>

#include "libs/base/random.h"
#include "libs/base/status.h"
#include "libs/tensors/tensors.h"
#include "tools/orrery/film.h"

namespace orrery {
namespace {

constexpr int kBarRows = 2;

torch::Tensor Normal(const torch::Tensor& like, torch::Generator& generator) {
  return torch::randn(like.sizes(), generator, like.options());
}

// The agent's belief and, beside it, the imagination that is now and then cut off from the pictures.
class Dreamer {
 public:
  Dreamer(const WorldModel& model, uint64_t seed)
      : model_(model),
        generator_(torch::make_generator<at::CPUGeneratorImpl>(DeriveSeed(seed, "film"))),
        belief_(model.InitialState(1)),
        imagined_(belief_),
        action_(torch::zeros({1, model.action_size()})) {}

  // Row with this observation; the imagination sees it too when `see` is true.
  void Observe(const ArrayMap& observation, bool see) {
    TensorMap stored;
    for (const auto& [name, array] : observation) stored[name] = ToTorch(array).unsqueeze(0);
    const Predicted predicted = model_.Predict(belief_, action_);
    const LatentDistribution posterior = model_.Posterior(predicted, model_.Encode(model_.Preprocess(stored, generator_)));
    belief_ = {predicted.deter, model_.latents().Sample(posterior, Normal(posterior.mean, generator_))};
    if (see) {
      imagined_ = belief_;
    } else {
      const Predicted next = model_.Predict(imagined_, action_);
      imagined_ = {next.deter, model_.latents().Mode(next.prior)};
    }
  }
  // Picture [h, w, 3] uint8 that the imagination shows.
  absl::StatusOr<Array> Picture(const std::string& modality) const {
    const torch::Tensor decoded = model_.Decode(imagined_).at(modality)[0];
    return ToArray(((decoded + 0.5) * 255).round().clamp(0, 255).to(torch::kUInt8).permute({1, 2, 0}).contiguous());
  }
  void Act(const torch::Tensor& action) { action_ = action; }
  const LatentState& belief() const { return belief_; }

 private:
  const WorldModel& model_;
  torch::Generator generator_;
  LatentState belief_;
  LatentState imagined_;
  torch::Tensor action_;
};

Array WithBar(const Array& seen, const Array& imagined, bool sees) {
  Array bar = Array::Zeros(DType::kUInt8, {kBarRows, seen.shape[1], 3});
  for (size_t i = sees ? 1 : 0; i < bar.bytes.size(); i += 3) bar.bytes[i] = '\xc0';
  return Above(Above(seen, bar), imagined);
}

// Name of the first picture of three channels; NOT_FOUND without one.
absl::StatusOr<std::string> FilmedModality(const config::v1::Model& model) {
  for (const config::v1::Modality& modality : model.modalities()) {
    if (modality.has_image() && modality.image().channels() == 3) return modality.name();
  }
  return absl::NotFoundError("film: the model has no modality with pictures of 3 channels");
}

absl::StatusOr<std::string> Film(const WorldModel& model, const Planner& planner, Environment& environment,
                                 const EpisodeFilmOptions& options) {
  const torch::NoGradGuard no_grad;
  ASSIGN_OR_RETURN(const std::string modality, FilmedModality(model.config()));
  ASSIGN_OR_RETURN(TimeStep step, environment.Reset(options.seed));
  Dreamer dreamer(model, options.seed);
  std::unique_ptr<FilmWriter> film;
  for (int row = 0; row < options.max_frames; ++row) {
    const bool see = row % options.window < options.context;
    dreamer.Observe(step.observation, see);
    const auto seen = step.observation.find(modality);
    if (seen == step.observation.end()) {
      return absl::NotFoundError("film: the environment has no '" + modality + "'");
    }
    ASSIGN_OR_RETURN(const Array imagined, dreamer.Picture(modality));
    const Array frame = WithBar(Enlarge(seen->second, options.enlarge), Enlarge(imagined, options.enlarge), see);
    if (film == nullptr) {
      ASSIGN_OR_RETURN(film, FilmWriter::Create(static_cast<int>(frame.shape[0]), static_cast<int>(frame.shape[1]),
                                                options.frame_millis));
    }
    RETURN_IF_ERROR(film->AddFrame(frame));
    if (step.is_last || step.is_terminal) break;
    const uint64_t seed = DeriveSeed(options.seed, "act", static_cast<uint64_t>(row));
    ASSIGN_OR_RETURN(const PlanResult plan, planner.Plan(model, {dreamer.belief(), {seed}}));
    const torch::Tensor action = plan.action.to(torch::kCPU, torch::kFloat32).contiguous();
    dreamer.Act(action);
    ASSIGN_OR_RETURN(step, environment.Step({action.data_ptr<float>(), static_cast<size_t>(action.numel())}));
  }
  return film->Finish();
}

}  // namespace

absl::StatusOr<std::string> FilmEpisode(const WorldModel& model, const Planner& planner, Environment& environment,
                                        const EpisodeFilmOptions& options) {
  return CatchExceptions("film", [&] { return Film(model, planner, environment, options); });
}

}  // namespace orrery
