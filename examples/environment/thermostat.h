// A room to keep at 20 degrees: the picture is as bright as the room is warm, the action heats or cools.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "libs/envs/simulator.h"

class Thermostat : public orrery::Simulator {
 public:
  explicit Thermostat(int image_size) : image_size_(image_size) {}

  const std::vector<std::pair<double, double>>& action_range() const override { return power_; }
  int time_limit() const override { return 100; }

  absl::Status Reset(uint64_t seed) override {
    degrees_ = static_cast<double>(seed % 41);
    return absl::OkStatus();
  }
  absl::Status ResetTo(const orrery::SimulatorStart& start) override {
    if (!start.qpos.has_value()) return absl::InvalidArgumentError("qpos is not given, expected the temperature");
    if (const absl::Status status = orrery::CheckNumbers(*start.qpos, 1, "qpos"); !status.ok()) return status;
    degrees_ = start.qpos->front();
    return absl::OkStatus();
  }
  absl::StatusOr<double> Step(absl::Span<const double> action) override {
    degrees_ += action[0] - 0.05 * (degrees_ - 10);  // it is 10 degrees outside
    return std::exp(-std::abs(degrees_ - 20) / 5);   // the reward
  }
  orrery::ArrayMap State() const override { return {{"qpos", orrery::Array::From<double>({degrees_}, {1})}}; }

  absl::StatusOr<orrery::Array> Image() override { return Render(image_size_, image_size_); }
  absl::StatusOr<orrery::Array> Render(int height, int width) override {
    orrery::Array picture = orrery::Array::Zeros(orrery::DType::kUInt8, {height, width, 3});
    const double brightness = std::clamp(degrees_ * 255 / 40, 0.0, 255.0);
    for (uint8_t& value : picture.mutable_as<uint8_t>()) value = static_cast<uint8_t>(brightness);
    return picture;
  }

 private:
  const std::vector<std::pair<double, double>> power_ = {{-2, 2}};  // degrees a step; agents see it as [-1, 1]
  const int image_size_;
  double degrees_ = 0;
};
