#include "tools/orrery/replay_files.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/config/config.h"
#include "libs/replay/chunk_codec.h"
#include "libs/replay/memory_store.h"
#include "libs/replay/run_coordinator.h"
#include "libs/telemetry/service_host.h"
#include "libs/tensors/safetensors.h"
#include "services/replay/replay_service_impl.h"

namespace orrery {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kRun[] = "test";
constexpr char kRunId[] = "0123456789abcdef";
constexpr uint64_t kHash = 0xfedcba9876543210;

config::v1::Experiment MakeExperiment() {
  auto experiment = ParseExperiment(
      "name: 'test' environment { task: 'point_pixels' } learning { schedule: CONCURRENT sequence_length: 4 } "
      "collection { seed_episodes: 1 } evaluation { every_episodes: 0 } replay { limiter { tolerance: 1e9 } }");
  EXPECT_OK(experiment);
  return *std::move(experiment);
}

// Every byte of the observation counts: noise, so that it holds numbers of all kinds, not-a-numbers included.
Chunk MakeChunk(int64_t episode, int64_t first_row, int rows, EpisodeMode mode, EpisodeEnd end) {
  std::mt19937 random(static_cast<uint32_t>(episode * 1000 + first_row));
  ArrayMap fields;
  fields["image"] = Array::Zeros(DType::kUInt8, {rows, 16, 16, 3});
  fields["image"].bytes[5] = 'x';
  fields["joints"] = Array::Zeros(DType::kFloat32, {rows, 7});
  fields["clock"] = Array::Zeros(DType::kInt64, {rows});
  for (const char* name : {"joints", "clock"}) {
    for (char& byte : fields[name].bytes) byte = static_cast<char>(random());
  }
  fields[kAction] = Array::Zeros(DType::kFloat32, {rows, 2});
  fields[kReward] = Array::Zeros(DType::kFloat32, {rows});
  fields[kIsFirst] = Array::Zeros(DType::kUInt8, {rows});
  fields[kIsTerminal] = Array::Zeros(DType::kUInt8, {rows});
  for (int i = 0; i < rows; ++i) fields[kReward].mutable_as<float>()[i] = static_cast<float>(first_row + i);
  Chunk chunk;
  chunk.run_id = kRunId;
  chunk.info.key = {episode, first_row};
  chunk.info.rows = rows;
  chunk.info.mode = mode;
  chunk.info.end = end;
  chunk.info.specification_hash = kHash;
  chunk.info.task = static_cast<int32_t>(episode % 2);
  if (mode != EpisodeMode::kRandom) chunk.info.snapshot_version = {2, 100 + first_row};
  chunk.info.reward_sum = 0.1 + static_cast<double>(first_row);
  auto payload = EncodeRows(fields);
  EXPECT_OK(payload);
  chunk.payload = *std::move(payload);
  chunk.info.payload_bytes = static_cast<int64_t>(chunk.payload.size());
  return chunk;
}

// One whole episode, one without its beginning and with a gap, and an evaluation.
std::vector<Chunk> SomeChunks() {
  using enum EpisodeMode;
  using enum EpisodeEnd;
  return {MakeChunk(1, 0, 5, kRandom, kContinues), MakeChunk(1, 5, 3, kRandom, kTruncated),
          MakeChunk(3, 10, 5, kTrain, kContinues), MakeChunk(3, 20, 2, kTrain, kContinues),
          MakeChunk(12, 0, 4, kEvaluate, kTerminated)};
}

absl::StatusOr<std::vector<Chunk>> ChunksOf(Store& store) {
  std::vector<Chunk> all;
  auto batch = store.Changes("", 1000, absl::ZeroDuration());
  if (!batch.ok()) return batch.status();
  for (const Change& change : batch->changes) {
    auto chunks = store.Read({change.info.key});
    if (!chunks.ok()) return chunks.status();
    all.push_back(*(*chunks)[0]);
  }
  return all;
}

class ReplayFilesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    for (const Chunk& chunk : SomeChunks()) ASSERT_OK(store_->Append(chunk));
  }
  absl::StatusOr<EpisodeTotals> Export(const std::string& folder, int64_t first = 1, int64_t last = 1000,
                                       std::optional<EpisodeMode> mode = std::nullopt) {
    return ExportEpisodes(*MakeStoreSource(store_.get()), {kRun, folder, first, last, mode});
  }
  static std::vector<std::string> Names(const std::string& folder) {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
  }

  const std::unique_ptr<Store> store_ = MakeMemoryStore();
  const TempDir folder_;
};

TEST_F(ReplayFilesTest, ComesBackBitForBit) {
  ASSERT_OK_AND_ASSIGN(const EpisodeTotals out, Export(folder_ / "out"));
  EXPECT_EQ(out.episodes, 3);
  EXPECT_EQ(out.chunks, 5);
  EXPECT_EQ(out.rows, 19);
  EXPECT_THAT(Names(folder_ / "out"), ElementsAre("episode-000000001.safetensors", "episode-000000003.safetensors",
                                                  "episode-000000012.safetensors"));
  const std::unique_ptr<Store> other = MakeMemoryStore();
  ASSERT_OK_AND_ASSIGN(const EpisodeTotals in, ImportEpisodes(folder_ / "out", *other));
  EXPECT_EQ(in.chunks, 5);
  EXPECT_EQ(in.rows, 19);
  EXPECT_EQ(in.bytes, out.bytes);
  ASSERT_OK_AND_ASSIGN(const std::vector<Chunk> chunks, ChunksOf(*other));
  EXPECT_TRUE(chunks == SomeChunks());
  // Once more changes nothing.
  EXPECT_OK(ImportEpisodes(folder_ / "out", *other));
  ASSERT_OK_AND_ASSIGN(const std::vector<Chunk> again, ChunksOf(*other));
  EXPECT_TRUE(again == chunks);
}

TEST_F(ReplayFilesTest, AFileSaysWhatItHolds) {
  ASSERT_OK(Export(folder_ / "out"));
  ASSERT_OK_AND_ASSIGN(const SafeTensors file, LoadSafeTensors(folder_ / "out/episode-000000003.safetensors"));
  const std::map<std::string, std::string> expected = {{"format", "orrery-episode 1"},
                                                       {"run", kRun},
                                                       {"run_id", kRunId},
                                                       {"episode", "3"},
                                                       {"mode", "train"},
                                                       {"end", "open"},
                                                       {"task", "1"},
                                                       {"first_row", "10"},
                                                       {"specification_hash", "fedcba9876543210"},
                                                       {"snapshot_version", "2 120"},
                                                       {"return", "30.200000000000003"}};
  for (const auto& [name, value] : expected) {
    ASSERT_TRUE(file.metadata.contains(name)) << name;
    EXPECT_EQ(file.metadata.at(name), value) << name;
  }
  ASSERT_TRUE(file.tensors.contains("reward"));
  const torch::Tensor reward = file.tensors.at("reward");
  EXPECT_TRUE(torch::equal(reward, torch::tensor({10.f, 11.f, 12.f, 13.f, 14.f, 20.f, 21.f})));
  EXPECT_EQ(file.tensors.at("image").sizes(), (std::vector<int64_t>{7, 16, 16, 3}));
  EXPECT_EQ(file.tensors.at("image").scalar_type(), torch::kUInt8);
  EXPECT_EQ(file.tensors.at("clock").scalar_type(), torch::kInt64);
}

TEST_F(ReplayFilesTest, ExportsTheSameThroughTheService) {
  auto registry = std::make_shared<prometheus::Registry>();
  ASSERT_OK_AND_ASSIGN(const auto server, ReplayServer::Create({MakeExperiment(), store_.get(), registry}));
  HostOptions options;
  options.name = "replay";
  options.registry = registry;
  options.services = {server->service()};
  ASSERT_OK_AND_ASSIGN(const auto host, ServiceHost::Start(options));
  absl::Notification ready;
  server->Start([&](bool is_ready) {
    if (is_ready && !ready.HasBeenNotified()) ready.Notify();
  });
  ready.WaitForNotification();
  ReplayClient client(host->InProcessChannel(), kRun);
  const auto source = MakeServiceSource(&client);
  ASSERT_OK(Export(folder_ / "store"));
  ASSERT_OK(ExportEpisodes(*source, {.run = kRun, .folder = folder_ / "service"}));
  ASSERT_EQ(Names(folder_ / "service"), Names(folder_ / "store"));
  for (const std::string& name : Names(folder_ / "store")) {
    EXPECT_TRUE(*ReadFile(folder_ / ("service/" + name)) == *ReadFile(folder_ / ("store/" + name))) << name;
  }
  EXPECT_THAT(source->List(2, 11, std::nullopt), IsOkAndHolds(ElementsAre(3)));
  EXPECT_THAT(source->List(1, 100, EpisodeMode::kEvaluate), IsOkAndHolds(ElementsAre(12)));
  EXPECT_THAT(source->Read(2), StatusIs(absl::StatusCode::kNotFound));
  server->Shutdown();
  host->Shutdown(absl::ZeroDuration());
}

TEST_F(ReplayFilesTest, ExportsOnlyWhatIsAskedFor) {
  ASSERT_OK(Export(folder_ / "range", 2, 3));
  EXPECT_THAT(Names(folder_ / "range"), ElementsAre("episode-000000003.safetensors"));
  ASSERT_OK(Export(folder_ / "mode", 1, 1000, EpisodeMode::kEvaluate));
  EXPECT_THAT(Names(folder_ / "mode"), ElementsAre("episode-000000012.safetensors"));
  EXPECT_THAT(Export(folder_ / "none", 4, 11), StatusIs(absl::StatusCode::kNotFound));
  EXPECT_THAT(Export(folder_ / "mode"), StatusIs(absl::StatusCode::kFailedPrecondition,
                                                 HasSubstr("episode-000000012.safetensors is there already")));
}

TEST_F(ReplayFilesTest, TrainingGoesOnWithAnImportedDataSet) {
  ASSERT_OK(Export(folder_ / "out"));
  const std::unique_ptr<Store> other = MakeMemoryStore();
  ASSERT_OK(ImportEpisodes(folder_ / "out", *other));
  RunCoordinator coordinator(other.get(), MakeExperiment());
  ASSERT_OK_AND_ASSIGN(const RunProgress progress, coordinator.Progress());
  EXPECT_EQ(progress.run_id, kRunId);
  EXPECT_EQ(progress.specification_hash, kHash);
  EXPECT_EQ(progress.episodes_started, 2);
  EXPECT_EQ(progress.episodes_finished, 2);
  EXPECT_EQ(progress.rows_appended, 8 + 22);
  EXPECT_EQ(progress.updates_done, 0);
  EXPECT_THAT(coordinator.BeginEpisode("actor", kHash + 1), StatusIs(absl::StatusCode::kFailedPrecondition));
  ASSERT_OK_AND_ASSIGN(const auto episode, coordinator.BeginEpisode("actor", kHash));
  ASSERT_TRUE(episode.has_value());
  EXPECT_EQ(episode->episode_id, 13);
  EXPECT_EQ(episode->mode, EpisodeMode::kTrain);
  EXPECT_EQ(episode->run_id, kRunId);
  ASSERT_OK_AND_ASSIGN(const int64_t generation, coordinator.AcquireLearner("learner"));
  ASSERT_OK_AND_ASSIGN(const auto grant, coordinator.ReserveUpdates(generation, 0, 10));
  EXPECT_EQ(grant.updates, 10);
}

TEST_F(ReplayFilesTest, LeavesAnotherRunAlone) {
  ASSERT_OK(Export(folder_ / "out"));
  const std::unique_ptr<Store> other = MakeMemoryStore();
  ASSERT_OK(RunCoordinator(other.get(), MakeExperiment()).BeginEpisode("actor", kHash));
  EXPECT_THAT(ImportEpisodes(folder_ / "out", *other),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("episode-000000001.safetensors"),
                             HasSubstr("metadata \"run_id\" is \"0123456789abcdef\""))));
  ASSERT_OK_AND_ASSIGN(const std::vector<Chunk> chunks, ChunksOf(*other));
  EXPECT_TRUE(chunks.empty());
  ASSERT_OK(other->CompareAndSet("run", other->Get("run")->version, "{\"run_id\": 7}"));
  EXPECT_THAT(ImportEpisodes(folder_ / "out", *other), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("value 'run'")));
}

TEST_F(ReplayFilesTest, NamesFileAndFieldOfWhatIsWrong) {
  ASSERT_OK(Export(folder_ / "out", 1, 1));
  const std::string name = "episode-000000001.safetensors";
  ASSERT_OK_AND_ASSIGN(const SafeTensors good, LoadSafeTensors(folder_ / ("out/" + name)));
  const auto refuse = [&](const std::string& words, const std::function<void(SafeTensors&)>& damage) {
    SafeTensors file = good;
    damage(file);
    const TempDir folder;
    ASSERT_OK(SaveSafeTensors(folder / name, file));
    const std::unique_ptr<Store> other = MakeMemoryStore();
    const absl::Status status = ImportEpisodes(folder.path(), *other).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status) || absl::IsDataLoss(status) || absl::IsFailedPrecondition(status));
    EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr(name), HasSubstr(words)));
    EXPECT_EQ(other->Get("run")->version, 0);
  };
  const std::string line = "1 0 5 1 1 fedcba9876543210 0 0 0.5 9 0";
  refuse("metadata \"format\" is missing", [](SafeTensors& f) { f.metadata.clear(); });
  refuse("metadata \"format\" is \"orrery-episode 2\"", [](SafeTensors& f) { f.metadata["format"] = "orrery-episode 2"; });
  for (const char* entry : {"run_id", "episode", "chunks"}) {
    refuse(absl::StrCat("metadata \"", entry, "\" is missing"), [&](SafeTensors& f) { f.metadata.erase(entry); });
  }
  refuse("run_id is not set", [](SafeTensors& f) { f.metadata["run_id"] = ""; });
  refuse("metadata \"chunks\": damaged", [](SafeTensors& f) { f.metadata["chunks"] = "1 0 8"; });
  refuse("metadata \"chunks\": damaged", [](SafeTensors& f) { f.metadata["chunks"] += "\n"; });
  refuse("names episode 1: expected 2", [](SafeTensors& f) { f.metadata["episode"] = "2"; });
  refuse("has row 0 after row 4", [&](SafeTensors& f) { f.metadata["chunks"] = line + "\n" + line; });
  refuse("\" is [8]: expected 5 rows", [&](SafeTensors& f) {
    f.metadata["chunks"] = line;
    f.tensors = {{"reward", f.tensors["reward"]}};
  });
  refuse("field \"reward\" is missing", [](SafeTensors& f) { f.tensors.erase("reward"); });
  refuse("field \"reward\" is float64", [](SafeTensors& f) { f.tensors["reward"] = f.tensors["reward"].to(torch::kFloat64); });
  refuse("field \"joints\"", [](SafeTensors& f) { f.tensors["joints"] = f.tensors["joints"].to(torch::kFloat16); });
  refuse("the specification hash of row 5", [](SafeTensors& f) {
    std::string& text = f.metadata["chunks"];
    text.replace(text.rfind("fedc"), 4, "0000");
  });
  ASSERT_OK(MakeDirectory(folder_ / "cut"));
  ASSERT_OK_AND_ASSIGN(const std::string bytes, ReadFile(folder_ / ("out/" + name)));
  ASSERT_OK(WriteFileAtomically(folder_ / ("cut/" + name), bytes.substr(0, bytes.size() - 1)));
  EXPECT_THAT(ImportEpisodes(folder_ / "cut", *store_), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(name)));
  EXPECT_THAT(ImportEpisodes(folder_ / "nowhere", *store_), StatusIs(absl::StatusCode::kNotFound, HasSubstr("nowhere")));
}

TEST_F(ReplayFilesTest, RefusesOtherContentsUnderTheSameNumbers) {
  ASSERT_OK(Export(folder_ / "out"));
  const std::unique_ptr<Store> other = MakeMemoryStore();
  Chunk different = SomeChunks()[2];
  different.info.reward_sum = 7;
  ASSERT_OK(other->Append(different));
  EXPECT_THAT(ImportEpisodes(folder_ / "out", *other),
              StatusIs(absl::StatusCode::kAlreadyExists,
                       AllOf(HasSubstr("episode-000000003"), HasSubstr("episode 3 at row 10"))));
  EXPECT_EQ(other->Get("run")->version, 0);
}

TEST_F(ReplayFilesTest, RefusesAnEpisodeWhoseChunksDiffer) {
  Chunk other = MakeChunk(5, 5, 3, EpisodeMode::kTrain, EpisodeEnd::kContinues);
  ASSERT_OK_AND_ASSIGN(ArrayMap fields, DecodeRows(other.payload, 3));
  fields.erase("joints");
  ASSERT_OK_AND_ASSIGN(other.payload, EncodeRows(fields));
  other.info.payload_bytes = static_cast<int64_t>(other.payload.size());
  ASSERT_OK(store_->Append(MakeChunk(5, 0, 5, EpisodeMode::kTrain, EpisodeEnd::kContinues)));
  ASSERT_OK(store_->Append(other));
  EXPECT_THAT(Export(folder_ / "out"), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("episode 5 row 5: field")));
}

}  // namespace
}  // namespace orrery
