#include "tools/orrery/bench_rows.h"

#include <memory>
#include <random>
#include <utility>

#include "libs/base/status.h"
#include "libs/envs/environment.h"
#include "libs/envs/tasks.h"
#include "libs/replay/chunk_codec.h"
#include "services/actor/actor.h"

namespace orrery {
namespace {

// Room for `rows` rows, filled one by one.
class PartBuilder {
 public:
  PartBuilder(const EnvironmentSpec& spec, int rows) : rows_(rows) {
    for (const TensorSpec& tensor : spec.observations) Add(tensor.name, tensor.dtype, tensor.shape);
    Add(kAction, DType::kFloat32, {spec.action.size});
    Add(kReward, DType::kFloat32, {});
    Add(kIsFirst, DType::kUInt8, {});
    Add(kIsTerminal, DType::kUInt8, {});
  }

  bool full() const { return filled_ == rows_; }

  void AddRow(const TimeStep& step, const std::vector<float>& action, bool is_first) {
    for (const auto& [name, value] : step.observation) Put(name, value.bytes.data(), value.bytes.size());
    Put(kAction, action.data(), action.size() * sizeof(float));
    const float reward = static_cast<float>(step.reward);
    Put(kReward, &reward, sizeof(reward));
    Put(kIsFirst, &is_first, 1);
    Put(kIsTerminal, &step.is_terminal, 1);
    part_.reward_sum += step.reward;
    ++filled_;
  }

  absl::StatusOr<RecordedRows::Part> Take() {
    for (const auto& [name, array] : part_.fields) RETURN_IF_ERROR(CheckArray(array, name));
    ASSIGN_OR_RETURN(part_.payload, EncodeRows(part_.fields));
    return std::move(part_);
  }

 private:
  void Add(const std::string& name, DType dtype, const std::vector<int64_t>& shape) {
    std::vector<int64_t> all = {rows_};
    all.insert(all.end(), shape.begin(), shape.end());
    part_.fields[name] = Array{dtype, std::move(all), std::string()};
  }
  void Put(const std::string& name, const void* bytes, size_t size) {
    part_.fields[name].bytes.append(static_cast<const char*>(bytes), size);
  }

  const int rows_;
  int filled_ = 0;
  RecordedRows::Part part_;
};

}  // namespace

absl::StatusOr<RecordedRows> RecordRows(const config::v1::Experiment& experiment) {
  ASSIGN_OR_RETURN(const std::vector<EnvironmentOptions> tasks, TaskOptions(experiment.environment()));
  ASSIGN_OR_RETURN(const std::unique_ptr<Environment> environment, MakeEnvironment(tasks.front()));
  const EnvironmentSpec& spec = environment->spec();
  RecordedRows recorded;
  recorded.part_rows = experiment.replay().chunk_rows();
  recorded.specification_hash = Hash(spec);
  std::mt19937_64 random(1);
  std::vector<float> action(static_cast<size_t>(spec.action.size), 0.0f);
  ASSIGN_OR_RETURN(TimeStep step, environment->Reset(random()));
  bool is_first = true;
  while (static_cast<int>(recorded.parts.size()) * recorded.part_rows < kRecordedRows) {
    PartBuilder builder(spec, recorded.part_rows);
    while (!builder.full()) {
      builder.AddRow(step, action, std::exchange(is_first, false));
      if (step.is_last) {
        ASSIGN_OR_RETURN(step, environment->Reset(random()));
      } else {
        action = RandomAction(spec.action, random);
        ASSIGN_OR_RETURN(step, environment->Step(action));
      }
    }
    ASSIGN_OR_RETURN(RecordedRows::Part part, builder.Take());
    recorded.parts.push_back(std::move(part));
  }
  return recorded;
}

Chunk MakeChunk(const RecordedRows& recorded, const EpisodeAssignment& episode, size_t index, std::string payload) {
  Chunk chunk;
  chunk.run_id = episode.run_id;
  chunk.info.key = {episode.episode_id, static_cast<int64_t>(index) * recorded.part_rows};
  chunk.info.rows = recorded.part_rows;
  chunk.info.mode = episode.mode;
  chunk.info.end = index + 1 == recorded.parts.size() ? EpisodeEnd::kTruncated : EpisodeEnd::kContinues;
  chunk.info.specification_hash = recorded.specification_hash;
  chunk.info.reward_sum = recorded.parts[index].reward_sum;
  chunk.payload = std::move(payload);
  chunk.info.payload_bytes = static_cast<int64_t>(chunk.payload.size());
  return chunk;
}

}  // namespace orrery
