#include "tools/orrery/inspect_replay.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/str_split.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/replay/chunk_codec.h"
#include "libs/tensors/safetensors.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

class InspectReplayTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_OK_AND_ASSIGN(store_, OpenStore({.location = "memory:", .run = "r"})); }

  // Rows count on from `first`; each has its own number as reward.
  void Append(int64_t episode, int64_t first, int rows, EpisodeMode mode, EpisodeEnd end) {
    std::vector<float> reward;
    for (int i = 0; i < rows; ++i) reward.push_back(static_cast<float>(first + i));
    ArrayMap fields;
    fields[kReward] = Array::From<float>(reward, {rows});
    fields[kAction] = Array::Zeros(DType::kFloat32, {rows, 2});
    fields["image"] = Array::Zeros(DType::kUInt8, {rows, 4, 4, 3});
    Chunk chunk;
    chunk.run_id = "r";
    ASSERT_OK_AND_ASSIGN(chunk.payload, EncodeRows(fields));
    chunk.info = {.key = {episode, first}, .rows = rows, .mode = mode, .end = end, .snapshot_version = {1, first}};
    for (float r : reward) chunk.info.reward_sum += r;
    chunk.info.payload_bytes = static_cast<int64_t>(chunk.payload.size());
    ASSERT_OK(store_->Append(chunk));
  }
  absl::StatusOr<std::vector<nlohmann::json>> Listed() {
    std::ostringstream out;
    const absl::Status status = InspectReplay(*store_, {.json = true}, out);
    if (!status.ok()) return status;
    std::vector<nlohmann::json> lines;
    for (absl::string_view line : absl::StrSplit(out.str(), '\n', absl::SkipEmpty())) lines.push_back(nlohmann::json::parse(line));
    return lines;
  }
  std::unique_ptr<Store> store_;
};

TEST_F(InspectReplayTest, ListsEpisodesWithReturnsAndGaps) {
  Append(3, 0, 4, EpisodeMode::kRandom, EpisodeEnd::kContinues);
  Append(3, 4, 3, EpisodeMode::kRandom, EpisodeEnd::kTruncated);
  Append(5, 0, 2, EpisodeMode::kTrain, EpisodeEnd::kContinues);
  Append(5, 5, 2, EpisodeMode::kTrain, EpisodeEnd::kTerminated);
  ASSERT_OK_AND_ASSIGN(const auto lines, Listed());
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_EQ(lines[0]["episode"], 3);
  EXPECT_EQ(lines[0]["mode"], "random");
  EXPECT_EQ(lines[0]["end"], "truncated");
  EXPECT_EQ(lines[0]["rows"], 7);
  EXPECT_EQ(lines[0]["chunks"], 2);
  EXPECT_EQ(lines[0]["gaps"], 0);
  EXPECT_EQ(lines[0]["return"], 21.0);
  EXPECT_EQ(lines[0]["snapshot"]["counter"], 4);
  EXPECT_EQ(lines[1]["gaps"], 3);
  std::ostringstream table;
  ASSERT_OK(InspectReplay(*store_, {}, table));
  EXPECT_THAT(table.str(), HasSubstr("2 episodes, 11 rows, "));
}

TEST_F(InspectReplayTest, EvictedChunksAreNotListed) {
  Append(1, 0, 4, EpisodeMode::kTrain, EpisodeEnd::kContinues);
  Append(1, 4, 4, EpisodeMode::kTrain, EpisodeEnd::kTruncated);
  Append(2, 0, 4, EpisodeMode::kTrain, EpisodeEnd::kTruncated);
  const ChunkKey gone[] = {{1, 0}, {2, 0}};
  ASSERT_OK(store_->Evict(gone));
  ASSERT_OK_AND_ASSIGN(const auto lines, Listed());
  ASSERT_EQ(lines.size(), 1u);
  EXPECT_EQ(lines[0]["first_row"], 4);
  EXPECT_EQ(lines[0]["rows"], 4);
}

TEST_F(InspectReplayTest, WritesTheRowsOfAnEpisode) {
  Append(1, 0, 4, EpisodeMode::kTrain, EpisodeEnd::kContinues);
  Append(1, 4, 3, EpisodeMode::kTrain, EpisodeEnd::kTruncated);
  Append(2, 0, 1, EpisodeMode::kTrain, EpisodeEnd::kContinues);
  Append(2, 2, 1, EpisodeMode::kTrain, EpisodeEnd::kTruncated);
  const TempDir dir;
  std::ostringstream out;
  ASSERT_OK(InspectReplay(*store_, {.episode = 1, .rows_out = dir / "rows"}, out));
  ASSERT_OK_AND_ASSIGN(const SafeTensors file, LoadSafeTensors(dir / "rows"));
  EXPECT_TRUE(torch::equal(file.tensors.at("reward"), torch::arange(7, torch::kFloat)));
  EXPECT_EQ(file.tensors.at("action").sizes(), (at::IntArrayRef{7, 2}));
  EXPECT_EQ(file.tensors.at("image").sizes(), (at::IntArrayRef{7, 4, 4, 3}));
  EXPECT_EQ(file.metadata.at("episode"), "1");
  EXPECT_THAT(InspectReplay(*store_, {.episode = 7, .rows_out = dir / "x"}, out),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("episode 7 is not there")));
  EXPECT_THAT(InspectReplay(*store_, {.episode = 2, .rows_out = dir / "x"}, out),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("lacks 1 rows")));
}

TEST_F(InspectReplayTest, AnEmptyStoreIsAnEmptyTable) {
  std::ostringstream out;
  ASSERT_OK(InspectReplay(*store_, {}, out));
  EXPECT_THAT(out.str(), HasSubstr("0 episodes, 0 rows, 0 bytes"));
}

}  // namespace
}  // namespace orrery
