// Pictures of a MuJoCo model.
#pragma once

#include <mujoco/mujoco.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "libs/base/array.h"
#include "libs/envs/environment.h"
#include "libs/envs/gl_context.h"

namespace orrery {

// Draws one model. kReference: as dm_control's physics.render, pixel by pixel. kFast: without shadows, reflections and
// multisampling, at `fast_scale` times the size, averaged down. Not thread-safe; may move between threads.
class Renderer {
 public:
  static constexpr int kFastScale = 4;  // keeps parts whole that are wider than a quarter of a pixel

  // For pictures up to `max_height` x `max_width`. `model` is changed during the call and restored.
  static absl::StatusOr<std::unique_ptr<Renderer>> Create(mjModel& model, int max_height, int max_width,
                                                          EnvironmentOptions::Quality quality,
                                                          int fast_scale = kFastScale);
  ~Renderer();
  Renderer(const Renderer&) = delete;
  Renderer& operator=(const Renderer&) = delete;

  // [height, width, 3] uint8 from the model's camera number `camera`. INVALID_ARGUMENT for a size out of range.
  absl::StatusOr<Array> Draw(const mjModel& model, mjData& data, int camera, int height, int width);

 private:
  Renderer(std::unique_ptr<GlContext> gl, int max_height, int max_width, int scale);

  const std::unique_ptr<GlContext> gl_;
  const int max_height_;
  const int max_width_;
  const int scale_;
  mjrContext context_;
  mjvScene scene_;
  std::string drawn_;  // the picture at `scale_` times its size, bottom row first
};

}  // namespace orrery
