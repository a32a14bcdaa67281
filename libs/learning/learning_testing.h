// Small models and data for the tests of learning.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "libs/base/array.h"
#include "libs/client/replay_client.h"
#include "libs/config/config.h"
#include "libs/replay/chunk_codec.h"

namespace orrery {

inline constexpr int kTestVector = 3;
inline constexpr int kTestActions = 2;

// "camera" 32×32×3 and "joints" of 3 numbers, or the joints only (fast to train).
inline config::v1::Model SmallModel(bool with_image) {
  config::v1::Model model;
  model.set_deterministic_size(8);
  model.set_stochastic_size(4);
  model.set_hidden_size(8);
  model.mutable_action()->mutable_continuous()->set_size(kTestActions);
  if (with_image) {
    config::v1::Modality& camera = *model.add_modalities();
    camera.set_name("camera");
    camera.mutable_image()->set_height(32);
    camera.mutable_image()->set_width(32);
    camera.mutable_image()->set_channels(3);
    camera.mutable_image()->set_depth(2);
  }
  config::v1::Modality& joints = *model.add_modalities();
  joints.set_name("joints");
  joints.mutable_vector()->set_size(kTestVector);
  joints.mutable_vector()->set_layers(1);
  joints.mutable_vector()->set_hidden_size(8);
  model.mutable_reward()->set_layers(1);
  model.mutable_reward()->set_hidden_size(8);
  return model;
}

// What every byte of row `row` of `episode` is computed from.
inline uint8_t TestPixel(int64_t episode, int64_t row, size_t i) { return static_cast<uint8_t>(episode * 31 + row * 7 + i); }
inline float TestNumber(int64_t episode, int64_t row, size_t i) {
  return static_cast<float>(episode) + static_cast<float>(row) * 0.01f + static_cast<float>(i) * 0.001f;
}

inline ArrayMap TestRows(int64_t episode, int64_t first_row, int rows, bool with_image) {
  ArrayMap fields;
  if (with_image) fields["camera"] = Array::Zeros(DType::kUInt8, {rows, 32, 32, 3});
  fields["joints"] = Array::Zeros(DType::kFloat32, {rows, kTestVector});
  fields[kAction] = Array::Zeros(DType::kFloat32, {rows, kTestActions});
  fields[kReward] = Array::Zeros(DType::kFloat32, {rows});
  fields[kIsFirst] = Array::Zeros(DType::kUInt8, {rows});
  fields[kIsTerminal] = Array::Zeros(DType::kUInt8, {rows});
  for (int t = 0; t < rows; ++t) {
    const int64_t row = first_row + t;
    for (size_t i = 0; with_image && i < 32 * 32 * 3; ++i) {
      fields["camera"].mutable_as<uint8_t>()[t * 32 * 32 * 3 + i] = TestPixel(episode, row, i);
    }
    for (size_t i = 0; i < kTestVector; ++i) {
      fields["joints"].mutable_as<float>()[t * kTestVector + i] = TestNumber(episode, row, i);
    }
    for (size_t i = 0; i < kTestActions; ++i) {
      fields[kAction].mutable_as<float>()[t * kTestActions + i] = 0.1f * TestNumber(episode, row, i);
    }
    fields[kReward].mutable_as<float>()[t] = TestNumber(episode, row, 9);
    fields[kIsFirst].mutable_as<uint8_t>()[t] = row == 0 ? 1 : 0;
  }
  return fields;
}

inline Chunk MakeChunk(int64_t episode, int64_t first_row, int rows, const ArrayMap& fields) {
  Chunk chunk;
  chunk.run_id = "run-id";
  chunk.payload = EncodeRows(fields).value();
  chunk.info.key = {episode, first_row};
  chunk.info.rows = rows;
  chunk.info.payload_bytes = static_cast<int64_t>(chunk.payload.size());
  return chunk;
}

inline Chunk TestChunk(int64_t episode, int64_t first_row, int rows, bool with_image = false) {
  return MakeChunk(episode, first_row, rows, TestRows(episode, first_row, rows, with_image));
}

inline ChunkWatcher::Event Appended(Chunk chunk) {
  ChunkWatcher::Event event;
  event.appended = std::move(chunk);
  return event;
}

inline ChunkWatcher::Event Evicted(ChunkKey key) {
  ChunkWatcher::Event event;
  event.evicted = key;
  return event;
}

inline ChunkWatcher::Event CaughtUp() {
  ChunkWatcher::Event event;
  event.caught_up = true;
  return event;
}

// Plays given events, then waits for Close. Thread-safe.
class FakeWatcher : public ChunkWatcher {
 public:
  explicit FakeWatcher(std::vector<Event> events = {}) : events_(events.begin(), events.end()) {}
  void Push(Event event) {
    absl::MutexLock lock(&mu_);
    events_.push_back(std::move(event));
  }
  absl::StatusOr<Event> Next(absl::Time deadline) override {
    absl::MutexLock lock(&mu_);
    const auto ready = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return closed_ || !events_.empty(); };
    mu_.AwaitWithDeadline(absl::Condition(&ready), deadline);
    if (closed_) return absl::CancelledError("closed");
    if (events_.empty()) return absl::DeadlineExceededError("nothing");
    Event event = std::move(events_.front());
    events_.pop_front();
    return event;
  }
  void Close() override {
    absl::MutexLock lock(&mu_);
    closed_ = true;
  }

 private:
  absl::Mutex mu_;
  std::deque<Event> events_ ABSL_GUARDED_BY(mu_);
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace orrery
