// The film of an evaluation episode: what the agent saw above what it imagined.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "libs/envs/environment.h"
#include "libs/planning/planner.h"
#include "libs/world_model/world_model.h"

namespace orrery {

struct EpisodeFilmOptions {
  uint64_t seed = 0;
  // The imagination sees `context` rows, then rolls on with the actions taken alone, until `window` rows have passed.
  int context = 5;
  int window = 25;
  int enlarge = 4;
  int frame_millis = 60;
  int max_frames = 1000;
};

// Plays one episode without exploration noise and returns the film as an animated WebP. While the imagination still sees, a
// green bar separates the pictures; a red one when it is on its own. NOT_FOUND when the model has no image.
absl::StatusOr<std::string> FilmEpisode(const WorldModel& model, const Planner& planner, Environment& environment,
                                        const EpisodeFilmOptions& options);

}  // namespace orrery
