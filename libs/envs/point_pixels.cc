#include "libs/envs/point_pixels.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"
#include "libs/envs/start_random.h"

namespace orrery {
namespace {

constexpr int kTimeLimit = 50;
constexpr int kMaxRender = 1024;
constexpr double kSpeed = 0.2;
constexpr double kRewardWidth = 0.3;
// The square shown is a little larger than the one the disc's centre moves in, [-1, 1]².
constexpr double kView = 1.25;
constexpr double kPointRadius = 0.2;
constexpr double kTargetRadius = 0.35;
using Colour = std::array<double, 3>;
constexpr Colour kBackground = {20, 20, 40};
constexpr Colour kTarget = {30, 80, 50};
constexpr Colour kPoint = {250, 230, 180};

// The part of a pixel at `distance` from a disc's centre that the disc covers, both in pixels.
double Coverage(double distance, double radius) { return std::clamp(radius - distance + 0.5, 0.0, 1.0); }

using Position = std::array<double, 2>;

// Moves the point; returns the reward of the place that it reaches.
double Move(absl::Span<const double> action, Position& position) {
  double square = 0;
  for (size_t i = 0; i < position.size(); ++i) {
    position[i] = std::clamp(position[i] + kSpeed * std::clamp(action[i], -1.0, 1.0), -1.0, 1.0);
    square += position[i] * position[i];
  }
  return std::exp(-square / (2 * kRewardWidth * kRewardWidth));
}

class PointPixelsCopy : public SimulatorCopy {
 public:
  explicit PointPixelsCopy(const Position& original) : original_(original) {}

  absl::Status Restart() override {
    position_ = original_;
    return absl::OkStatus();
  }

  absl::StatusOr<double> Step(absl::Span<const double> action) override { return Move(action, position_); }

 private:
  const Position& original_;
  Position position_{};
};

class PointPixels : public Simulator {
 public:
  explicit PointPixels(int image_size) : image_size_(image_size) {}

  const std::vector<std::pair<double, double>>& action_range() const override { return range_; }
  int time_limit() const override { return kTimeLimit; }

  absl::Status Reset(uint64_t seed) override {
    StartRandom random(seed);
    const double angle = random.Uniform(0, 2 * M_PI);
    const double radius = random.Uniform(0.7, 1.0);
    position_ = {radius * std::cos(angle), radius * std::sin(angle)};
    return absl::OkStatus();
  }

  absl::Status ResetTo(const SimulatorStart& start) override {
    if (start.qvel.has_value() && !start.qvel->empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("qvel has ", start.qvel->size(), " numbers, but point_pixels has no velocities"));
    }
    if (start.target.has_value()) return absl::InvalidArgumentError("target is given, but that of point_pixels never moves");
    position_ = {0, 0};
    if (!start.qpos.has_value()) return absl::OkStatus();
    RETURN_IF_ERROR(CheckNumbers(*start.qpos, position_.size(), "qpos"));
    for (size_t i = 0; i < position_.size(); ++i) position_[i] = std::clamp((*start.qpos)[i], -1.0, 1.0);
    return absl::OkStatus();
  }

  absl::StatusOr<double> Step(absl::Span<const double> action) override { return Move(action, position_); }

  ArrayMap State() const override {
    return {{"qpos", Array::From<double>(position_, {static_cast<int64_t>(position_.size())})}};
  }

  absl::StatusOr<Array> Image() override { return Render(image_size_, image_size_); }

  absl::StatusOr<Array> Render(int height, int width) override {
    if (height < 1 || width < 1 || height > kMaxRender || width > kMaxRender) {
      return absl::InvalidArgumentError(
          absl::StrCat("picture of ", height, "x", width, ", expected 1x1 to ", kMaxRender, "x", kMaxRender));
    }
    Array image = Array::Zeros(DType::kUInt8, {height, width, 3});
    auto pixels = image.mutable_as<uint8_t>();
    const double scale = std::min(height, width) / (2 * kView);  // pixels per unit
    const double x = width / 2.0 + scale * position_[0], y = height / 2.0 - scale * position_[1];
    for (int row = 0; row < height; ++row) {
      for (int column = 0; column < width; ++column) {
        const double px = column + 0.5, py = row + 0.5;
        const double target = Coverage(std::hypot(px - width / 2.0, py - height / 2.0), kTargetRadius * scale);
        const double point = Coverage(std::hypot(px - x, py - y), kPointRadius * scale);
        for (int c = 0; c < 3; ++c) {
          const double ground = kBackground[c] + target * (kTarget[c] - kBackground[c]);
          pixels[(row * width + column) * 3 + c] = static_cast<uint8_t>(ground + point * (kPoint[c] - ground) + 0.5);
        }
      }
    }
    return image;
  }

  absl::StatusOr<std::unique_ptr<SimulatorCopy>> MakeCopy() const override {
    return std::make_unique<PointPixelsCopy>(position_);
  }

 private:
  const int image_size_;
  const std::vector<std::pair<double, double>> range_{{-1, 1}, {-1, 1}};
  Position position_{};
};

}  // namespace

std::unique_ptr<Simulator> MakePointPixels(int image_size) { return std::make_unique<PointPixels>(image_size); }

}  // namespace orrery
