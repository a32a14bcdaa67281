#include "tools/orrery/inspect_film.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "libs/base/file.h"
#include "libs/base/status.h"
#include "libs/learning/update.h"
#include "libs/tensors/tensors.h"
#include "libs/world_model/imagine.h"
#include "libs/world_model/snapshot.h"
#include "tools/orrery/film.h"
#include "tools/orrery/inspect_files.h"

namespace orrery {
namespace {

using torch::Tensor;

constexpr int kFrameMillis = 100;

absl::StatusOr<std::string> ShownModality(const config::v1::Model& model, const std::string& name) {
  for (const config::v1::Modality& m : model.modalities()) {
    const bool shown = m.has_image() && (m.image().channels() == 1 || m.image().channels() == 3);
    if (shown && (name.empty() || m.name() == name)) return m.name();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "--modality=", name, ": expected a modality of the model with pictures of 1 or 3 channels"));
}

// The first element's rows that are to be shown.
Batch Cut(const Batch& whole, int64_t first, int64_t rows) {
  const auto cut = [&](const Tensor& x) { return x.defined() ? x.slice(0, first, first + rows).slice(1, 0, 1).contiguous() : x; };
  Batch batch;
  for (const auto& [name, x] : whole.observations) batch.observations[name] = cut(x);
  batch.action = cut(whole.action);
  batch.reward = at::zeros({batch.action.size(0), 1});
  batch.is_first = whole.is_first.defined() ? cut(whole.is_first) : at::zeros({batch.action.size(0), 1}, at::kByte);
  batch.is_terminal = at::zeros_like(batch.is_first);
  return batch;
}

// The same sequence `n` times.
Batch Repeat(const Batch& one, int64_t n) {
  const auto repeat = [&](const Tensor& x) {
    std::vector<int64_t> sizes(static_cast<size_t>(x.dim()), 1);
    sizes[1] = n;
    return x.repeat(sizes);
  };
  Batch batch;
  for (const auto& [name, x] : one.observations) batch.observations[name] = repeat(x);
  batch.action = repeat(one.action);
  batch.reward = repeat(one.reward);
  batch.is_first = repeat(one.is_first);
  batch.is_terminal = repeat(one.is_terminal);
  return batch;
}

// Predictions [R, T, C, H, W] in the order in which they are shown.
Tensor Predictions(const WorldModel& model, const Batch& one, const std::string& modality, const InspectFilmOptions& options,
                   InspectNoise& noise) {
  const int64_t t = one.action.size(0), a = one.action.size(2), s = model.stochastic_size();
  if (options.per_action) {
    Batch batch = Repeat(one, a);
    batch.action.slice(0, options.context).copy_(at::eye(a).expand({t - options.context, a, a}));
    return Imagine(model, batch, options.context, at::zeros({t, a, s})).recon.at(modality).transpose(0, 1);
  }
  const Tensor drawn = noise.generator.has_value() ? at::randn({t, options.samples, s}, noise.generator, at::kFloat)
                                                   : at::zeros({t, options.samples, s});
  const Tensor samples = Imagine(model, Repeat(one, options.samples), options.context, drawn).recon.at(modality).transpose(0, 1);
  return at::cat({samples.mean(0, /*keepdim=*/true), samples});
}

// Pictures [R, T, C, H, W] in [-0.5, 0.5] to uint8 [R, T, H + 2, W + 2, 3] with frames.
Tensor Framed(const Tensor& pictures, int64_t context) {
  Tensor x = ((pictures + 0.5) * 255).round().clamp(0, 255).to(at::kByte).movedim(2, -1);
  if (x.size(-1) == 1) x = x.expand({x.size(0), x.size(1), x.size(2), x.size(3), 3});
  Tensor framed = at::full({x.size(0), x.size(1), x.size(2) + 2, x.size(3) + 2, 3}, 0x60, at::kByte);
  framed.slice(1, 0, context).copy_(at::tensor({0xc0, 0, 0}, at::kByte));
  framed.slice(2, 1, -1).slice(3, 1, -1).copy_(x);
  return framed;
}

absl::StatusOr<std::string> Film(const Tensor& framed, const InspectFilmOptions& options) {
  // [frames, R · H, columns · W, 3]: all rows at once, or one after another.
  const int64_t r = framed.size(0), t = framed.size(1), h = framed.size(2), w = framed.size(3);
  const Tensor frames = options.still ? framed.permute({0, 2, 1, 3, 4}).reshape({1, r * h, t * w, 3})
                                      : framed.permute({1, 0, 2, 3, 4}).reshape({t, r * h, w, 3});
  ASSIGN_OR_RETURN(const std::unique_ptr<FilmWriter> film,
                   FilmWriter::Create(static_cast<int>(frames.size(1)) * options.zoom,
                                      static_cast<int>(frames.size(2)) * options.zoom, kFrameMillis));
  for (const Tensor& frame : frames.unbind()) {
    ASSIGN_OR_RETURN(const Array picture, ToArray(frame.contiguous()));
    RETURN_IF_ERROR(film->AddFrame(Enlarge(picture, options.zoom)));
  }
  return film->Finish();
}

}  // namespace

absl::Status InspectFilm(const InspectFilmOptions& options) {
  ASSIGN_OR_RETURN(const ModelSnapshot snapshot, LoadSnapshot(options.snapshot));
  ASSIGN_OR_RETURN(const std::string modality, ShownModality(snapshot.info.model, options.modality));
  if (options.per_action && !IsDiscrete(snapshot.info.model))
    return absl::InvalidArgumentError("--per_action: the model's action is continuous, expected a discrete one");
  ASSIGN_OR_RETURN(InspectNoise noise, OpenNoise(options.noise));
  ASSIGN_OR_RETURN(const Batch whole, LoadBatch(options.batch, *snapshot.model, noise));
  RETURN_IF_ERROR(CheckLeading(whole.action, 3, "action", options.batch));
  const int64_t rows = std::min<int64_t>(options.rows, whole.action.size(0) - options.first_row);
  if (rows <= options.context)
    return absl::InvalidArgumentError(absl::StrCat(options.batch, " has ", whole.action.size(0), " rows; expected more than ",
                                                   options.first_row + options.context, ", first_row + context"));
  const Batch batch = Cut(whole, options.first_row, rows);
  RETURN_IF_ERROR(Annotate(CheckBatch(snapshot.info.model, batch), options.batch));
  return CatchExceptions("imagining", [&]() -> absl::Status {
    torch::NoGradGuard no_grad;
    const Tensor truth = batch.observations.at(modality).transpose(0, 1);
    const Tensor predicted = Predictions(*snapshot.model, batch, modality, options, noise);
    ASSIGN_OR_RETURN(const std::string film, Film(Framed(at::cat({truth, predicted}), options.context), options));
    return WriteFileAtomically(options.out, film);
  });
}

}  // namespace orrery
