// orrery inspect film: open-loop predictions beside what came, as a film or one picture.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace orrery {

struct InspectFilmOptions {
  std::string snapshot;
  std::string batch;        // as `orrery inspect imagine` takes it, or the rows of one episode; the first element is shown
  std::string out;          // WebP
  std::string noise = "0";  // seed of the samples
  std::string modality;     // image to show; empty: the model's first
  int context = 5;          // rows that are seen before the prediction begins
  int first_row = 0;
  int rows = 50;            // at most; fewer where the batch ends
  int samples = 3;          // predictions drawn beside their mean
  bool per_action = false;  // instead: one prediction (means) for each choice of a discrete action, repeated
  bool still = false;       // one picture, time from left to right, instead of a film
  int zoom = 2;
};

// From above: what came, the mean of the predictions, the predictions. A red frame marks what was seen, a grey one what is
// predicted. Pictures of one channel are shown grey. INVALID_ARGUMENT names the option or tensor that does not fit.
absl::Status InspectFilm(const InspectFilmOptions& options);

}  // namespace orrery
