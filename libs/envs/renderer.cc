#include "libs/envs/renderer.h"

#include <string>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

constexpr int kMaxGeoms = 1000;  // dm_control's

// Averages squares of `scale` x `scale` pixels and turns the picture upright.
void ShrinkAndFlip(const uint8_t* from, int height, int width, int scale, uint8_t* to) {
  const int area = scale * scale;
  const size_t row_bytes = static_cast<size_t>(width) * scale * 3;
  for (int row = 0; row < height; ++row) {
    const uint8_t* block = from + static_cast<size_t>(height - 1 - row) * scale * row_bytes;
    for (int column = 0; column < width; ++column, block += scale * 3) {
      int sum[3] = {area / 2, area / 2, area / 2};
      for (int y = 0; y < scale; ++y) {
        const uint8_t* pixel = block + y * row_bytes;
        for (int x = 0; x < scale; ++x, pixel += 3) {
          for (int c = 0; c < 3; ++c) sum[c] += pixel[c];
        }
      }
      for (int c = 0; c < 3; ++c) *to++ = static_cast<uint8_t>(sum[c] / area);
    }
  }
}

}  // namespace

Renderer::Renderer(std::unique_ptr<GlContext> gl, int max_height, int max_width, int scale)
    : gl_(std::move(gl)), max_height_(max_height), max_width_(max_width), scale_(scale) {
  mjr_defaultContext(&context_);
  mjv_defaultScene(&scene_);
}

Renderer::~Renderer() {
  mjv_freeScene(&scene_);
  // A context that cannot be made current takes its objects with it when it is destroyed.
  gl_->Run([this] {
       mjr_freeContext(&context_);
       return absl::OkStatus();
     }).IgnoreError();
}

absl::StatusOr<std::unique_ptr<Renderer>> Renderer::Create(mjModel& model, int max_height, int max_width,
                                                           EnvironmentOptions::Quality quality, int fast_scale) {
  const bool fast = quality == EnvironmentOptions::Quality::kFast;
  ASSIGN_OR_RETURN(auto gl, GlContext::Create());
  std::unique_ptr<Renderer> renderer(new Renderer(std::move(gl), max_height, max_width, fast ? fast_scale : 1));
  absl::Cleanup restore = [&model, visual = model.vis] { model.vis = visual; };
  if (fast) {
    model.vis.quality.offsamples = 0;
    model.vis.quality.shadowsize = 0;
    model.vis.global.offheight = max_height * fast_scale;
    model.vis.global.offwidth = max_width * fast_scale;
  }
  RETURN_IF_ERROR(renderer->gl_->Run([&] {
    mjr_makeContext(&model, &renderer->context_, mjFONTSCALE_150);
    mjr_setBuffer(mjFB_OFFSCREEN, &renderer->context_);
    return absl::OkStatus();
  }));
  mjv_makeScene(&model, &renderer->scene_, kMaxGeoms);
  if (fast) {
    renderer->scene_.flags[mjRND_SHADOW] = 0;
    renderer->scene_.flags[mjRND_REFLECTION] = 0;
  }
  return renderer;
}

absl::StatusOr<Array> Renderer::Draw(const mjModel& model, mjData& data, int camera, int height, int width) {
  if (height < 1 || width < 1 || height > max_height_ || width > max_width_) {
    return absl::InvalidArgumentError(
        absl::StrCat("picture of ", height, "x", width, ", expected 1x1 to ", max_height_, "x", max_width_));
  }
  mjvOption option;
  mjv_defaultOption(&option);
  mjvCamera view;
  mjv_defaultCamera(&view);
  view.type = mjCAMERA_FIXED;
  view.fixedcamid = camera;
  mjv_updateScene(&model, &data, &option, nullptr, &view, mjCAT_ALL, &scene_);
  const mjrRect area = {0, 0, width * scale_, height * scale_};
  drawn_.resize(static_cast<size_t>(area.width) * area.height * 3);
  auto* pixels = reinterpret_cast<uint8_t*>(drawn_.data());
  RETURN_IF_ERROR(gl_->Run([&] {
    mjr_render(area, &scene_, &context_);
    mjr_readPixels(pixels, nullptr, area, &context_);
    return absl::OkStatus();
  }));
  Array image = Array::Zeros(DType::kUInt8, {height, width, 3});
  ShrinkAndFlip(pixels, height, width, scale_, image.mutable_as<uint8_t>().data());
  return image;
}

}  // namespace orrery
