#include "libs/learning/mirror.h"

#include <limits>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "libs/base/status_matchers.h"
#include "libs/learning/learning_testing.h"

namespace orrery {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int kLength = 4;
constexpr int kBatch = 8;

class MirrorTest : public ::testing::Test {
 protected:
  Mirror::Options Options() {
    Mirror::Options options;
    options.model = SmallModel(/*with_image=*/true);
    options.sequence_length = kLength;
    options.max_rows = 1000;
    options.max_bytes = int64_t{64} << 20;
    options.clock = &clock_;
    options.refused_chunks = &refused_;
    return options;
  }
  void SetUp() override { mirror_ = Mirror::Create(Options()).value(); }

  absl::Status Add(int64_t episode, int64_t first_row, int rows) {
    return mirror_->Apply(Appended(TestChunk(episode, first_row, rows, /*with_image=*/true)));
  }

  // Episodes that one batch shows; checks that every row is the stored one and follows the one before it.
  std::set<int64_t> CheckBatch(const StoredBatch& batch) {
    std::set<int64_t> episodes;
    EXPECT_EQ(batch.observations.size(), 2u);
    const torch::Tensor camera = batch.observations.at("camera");
    const torch::Tensor joints = batch.observations.at("joints");
    EXPECT_EQ(camera.sizes(), (std::vector<int64_t>{kLength, kBatch, 32, 32, 3}));
    EXPECT_EQ(camera.scalar_type(), torch::kUInt8);
    EXPECT_EQ(joints.sizes(), (std::vector<int64_t>{kLength, kBatch, kTestVector}));
    for (int b = 0; b < kBatch; ++b) {
      const float start = joints[0][b][0].item<float>();
      const auto episode = static_cast<int64_t>(start + 1e-4f);
      const auto first = std::lround((start - static_cast<float>(episode)) * 100);
      episodes.insert(episode);
      for (int t = 0; t < kLength; ++t) CheckRow(batch, t, b, episode, first + t);
    }
    return episodes;
  }

  void CheckRow(const StoredBatch& batch, int t, int b, int64_t episode, int64_t row) {
    const ArrayMap expected = TestRows(episode, row, 1, /*with_image=*/true);
    const auto same = [&](const torch::Tensor& tensor, const std::string& field) {
      const torch::Tensor contiguous = tensor.contiguous();
      return std::string(static_cast<const char*>(contiguous.data_ptr()), contiguous.nbytes()) ==
             expected.at(field).bytes;
    };
    ASSERT_TRUE(same(batch.observations.at("camera")[t][b], "camera")) << episode << " " << row;
    ASSERT_TRUE(same(batch.observations.at("joints")[t][b], "joints")) << episode << " " << row;
    ASSERT_TRUE(same(batch.action[t][b], kAction)) << episode << " " << row;
    ASSERT_TRUE(same(batch.reward[t][b], kReward)) << episode << " " << row;
    ASSERT_TRUE(same(batch.is_first[t][b], kIsFirst)) << episode << " " << row;
  }

  FakeClock clock_;
  prometheus::Counter refused_;
  std::unique_ptr<Mirror> mirror_;
};

TEST_F(MirrorTest, BatchesHoldTheStoredRowsAndNeverCrossEpisodes) {
  ASSERT_OK(Add(1, 0, 3));
  ASSERT_OK(Add(2, 0, 5));  // arrives between two chunks of episode 1
  ASSERT_OK(Add(1, 3, 4));
  ASSERT_OK(Add(3, 0, 3));  // shorter than a sequence
  MirroredSource source(mirror_.get(), kBatch, 1);
  std::set<int64_t> seen;
  for (int i = 0; i < 20; ++i) {
    ASSERT_OK_AND_ASSIGN(const StoredBatch batch, source.Next(clock_.Now()));
    seen.merge(CheckBatch(batch));
  }
  EXPECT_EQ(seen, (std::set<int64_t>{1, 2}));
}

TEST_F(MirrorTest, EvictedRowsAndThoseBeforeAResetAreNotSampled) {
  ASSERT_OK(Add(1, 0, 8));
  ASSERT_OK(Add(2, 0, 8));
  ASSERT_OK(mirror_->Apply(Evicted({1, 0})));
  ASSERT_OK(mirror_->Apply(Evicted({7, 0})));  // never heard of
  MirroredSource source(mirror_.get(), kBatch, 1);
  ASSERT_OK_AND_ASSIGN(StoredBatch batch, source.Next(clock_.Now()));
  EXPECT_EQ(CheckBatch(batch), (std::set<int64_t>{2}));
  ChunkWatcher::Event reset = Appended(TestChunk(3, 0, 8, /*with_image=*/true));
  reset.reset = true;
  ASSERT_OK(mirror_->Apply(std::move(reset)));
  ASSERT_OK_AND_ASSIGN(batch, source.Next(clock_.Now()));
  EXPECT_EQ(CheckBatch(batch), (std::set<int64_t>{3}));
  EXPECT_EQ(mirror_->totals().rows, 8);
}

TEST_F(MirrorTest, EvaluationEpisodesAreNotSampled) {
  Chunk chunk = TestChunk(1, 0, 8, /*with_image=*/true);
  chunk.info.mode = EpisodeMode::kEvaluate;
  ASSERT_OK(mirror_->Apply(Appended(std::move(chunk))));
  MirroredSource source(mirror_.get(), kBatch, 1);
  EXPECT_THAT(source.Next(clock_.Now()), StatusIs(absl::StatusCode::kDeadlineExceeded));
}

TEST_F(MirrorTest, BadChunksAreCountedAndSkipped) {
  ArrayMap wide = TestRows(1, 0, 8, /*with_image=*/true);
  wide["joints"] = Array::Zeros(DType::kFloat32, {8, 5});
  EXPECT_THAT(mirror_->Apply(Appended(MakeChunk(1, 0, 8, wide))),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("episode 1 row 0"), HasSubstr("\"joints\" is float32 [8, 5]"), HasSubstr("[8, 3]"))));
  ArrayMap missing = TestRows(2, 0, 8, /*with_image=*/true);
  missing.erase("camera");
  EXPECT_THAT(mirror_->Apply(Appended(MakeChunk(2, 0, 8, missing))),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("\"camera\"")));
  ArrayMap infinite = TestRows(3, 0, 8, /*with_image=*/true);
  infinite[kReward].mutable_as<float>()[5] = std::numeric_limits<float>::infinity();
  EXPECT_THAT(mirror_->Apply(Appended(MakeChunk(3, 0, 8, infinite))),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("\"reward\"")));
  Chunk damaged = TestChunk(4, 0, 8, /*with_image=*/true);
  damaged.payload[damaged.payload.size() / 2] ^= 1;
  EXPECT_THAT(mirror_->Apply(Appended(std::move(damaged))), StatusIs(absl::StatusCode::kDataLoss));
  EXPECT_EQ(refused_.Value(), 4);

  ASSERT_OK(Add(5, 0, 8));
  MirroredSource source(mirror_.get(), kBatch, 1);
  ASSERT_OK_AND_ASSIGN(const StoredBatch batch, source.Next(clock_.Now()));
  EXPECT_EQ(CheckBatch(batch), (std::set<int64_t>{5}));
  // Nobody waits for the refused rows.
  EXPECT_OK(mirror_->WaitForRows(40, absl::Seconds(1), clock_.Now()));
}

TEST_F(MirrorTest, PartsOfABatchAreTogetherTheWhole) {
  ASSERT_OK(Add(1, 0, 30));
  ASSERT_OK(Add(2, 0, 30));
  MirroredSource whole(mirror_.get(), 6, 7);
  std::vector<std::unique_ptr<MirroredSource>> parts;
  for (int rank = 0; rank < 3; ++rank) {
    parts.push_back(std::make_unique<MirroredSource>(mirror_.get(), 6, 7, torch::kCPU, BatchPart{rank, 3}));
  }
  for (int i = 0; i < 3; ++i) {
    ASSERT_OK_AND_ASSIGN(const StoredBatch expected, whole.Next(clock_.Now()));
    for (int rank = 0; rank < 3; ++rank) {
      ASSERT_OK_AND_ASSIGN(const StoredBatch part, parts[rank]->Next(clock_.Now()));
      EXPECT_TRUE(torch::equal(part.reward, expected.reward.narrow(1, 2 * rank, 2)));
      EXPECT_TRUE(torch::equal(part.observations.at("camera"), expected.observations.at("camera").narrow(1, 2 * rank, 2)));
      parts[rank]->Prefetch();
    }
  }
}

TEST_F(MirrorTest, SameSeedAndStateGiveTheSameBatches) {
  ASSERT_OK(Add(1, 0, 30));
  MirroredSource a(mirror_.get(), kBatch, 7), b(mirror_.get(), kBatch, 7), other(mirror_.get(), kBatch, 8);
  const StoredBatch first = a.Next(clock_.Now()).value();
  EXPECT_TRUE(torch::equal(first.reward, b.Next(clock_.Now()).value().reward));
  EXPECT_FALSE(torch::equal(first.reward, other.Next(clock_.Now()).value().reward));
  ASSERT_OK(other.SetState(a.State()));
  EXPECT_TRUE(torch::equal(a.Next(clock_.Now()).value().reward, other.Next(clock_.Now()).value().reward));
  EXPECT_THAT(other.SetState("no numbers"), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST_F(MirrorTest, ABatchThatIsHeldIsNotWrittenOver) {
  ASSERT_OK(Add(1, 0, 30));
  MirroredSource source(mirror_.get(), kBatch, 7);
  ASSERT_OK_AND_ASSIGN(const StoredBatch held, source.Next(clock_.Now()));
  const torch::Tensor view = source.Next(clock_.Now()).value().reward.slice(0, 0, 2);
  const torch::Tensor reward = held.reward.clone(), view_copy = view.clone();
  for (int i = 0; i < 5; ++i) ASSERT_OK(source.Next(clock_.Now()));
  EXPECT_TRUE(torch::equal(held.reward, reward));
  EXPECT_TRUE(torch::equal(view, view_copy));
}

TEST_F(MirrorTest, PrefetchedBatchesAreTheSameOnesInTheSameOrder) {
  ASSERT_OK(Add(1, 0, 30));
  ASSERT_OK(Add(2, 0, 30));
  MirroredSource plain(mirror_.get(), kBatch, 7), ahead(mirror_.get(), kBatch, 7);
  std::vector<torch::Tensor> held;  // what is held is not written over
  for (int i = 0; i < 6; ++i) {
    ASSERT_OK_AND_ASSIGN(const StoredBatch batch, ahead.Next(clock_.Now()));
    if (i != 3) {
      ahead.Prefetch();
      ahead.Prefetch();  // once is enough
    }
    CheckBatch(batch);
    held.push_back(batch.reward);
    EXPECT_TRUE(torch::equal(batch.reward, plain.Next(clock_.Now()).value().reward)) << i;
    EXPECT_EQ(ahead.State(), plain.State()) << i;  // without what was only prefetched
  }
  MirroredSource again(mirror_.get(), kBatch, 7);
  for (const torch::Tensor& reward : held) EXPECT_TRUE(torch::equal(reward, again.Next(clock_.Now()).value().reward));
}

TEST_F(MirrorTest, WhatWasPrefetchedIsDroppedWithAnotherState) {
  ASSERT_OK(Add(1, 0, 30));
  MirroredSource source(mirror_.get(), kBatch, 7);
  const std::string begin = source.State();
  const torch::Tensor first = source.Next(clock_.Now()).value().reward.clone();
  source.Prefetch();
  ASSERT_OK(source.SetState(begin));
  EXPECT_TRUE(torch::equal(source.Next(clock_.Now()).value().reward, first));
}

TEST_F(MirrorTest, PrefetchWithoutDataLeavesItToNext) {
  MirroredSource source(mirror_.get(), kBatch, 7), plain(mirror_.get(), kBatch, 7);
  source.Prefetch();
  EXPECT_THAT(source.Next(clock_.Now()), StatusIs(absl::StatusCode::kDeadlineExceeded));
  source.Prefetch();
  ASSERT_OK(Add(1, 0, 30));
  EXPECT_TRUE(torch::equal(source.Next(clock_.Now()).value().reward, plain.Next(clock_.Now()).value().reward));
}

TEST_F(MirrorTest, NextWaitsForTheFeeder) {
  auto owned = std::make_unique<FakeWatcher>();
  FakeWatcher* watcher = owned.get();
  mirror_->Follow(std::move(owned));
  MirroredSource source(mirror_.get(), kBatch, 1);
  absl::StatusOr<StoredBatch> batch;
  std::thread consumer([&] { batch = source.Next(absl::InfiniteFuture()); });
  clock_.AwaitWaiters(1);
  watcher->Push(Appended(TestChunk(1, 0, 8, /*with_image=*/true)));
  consumer.join();
  ASSERT_OK(batch);
  CheckBatch(*batch);
}

TEST_F(MirrorTest, StopWakesWaiters) {
  MirroredSource source(mirror_.get(), kBatch, 1);
  absl::StatusOr<StoredBatch> batch;
  std::thread consumer([&] { batch = source.Next(absl::InfiniteFuture()); });
  clock_.AwaitWaiters(1);
  mirror_->Stop();
  consumer.join();
  EXPECT_THAT(batch, StatusIs(absl::StatusCode::kCancelled));
}

TEST_F(MirrorTest, RowsEvictedBeforeTheWatchAreNotWaitedForLongerThanPatience) {
  ASSERT_OK(Add(5, 0, 10));
  EXPECT_THAT(mirror_->WaitForRows(30, absl::Seconds(5), clock_.Now()),
              StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("10 of 30")));
  clock_.Advance(absl::Seconds(100));  // not caught up yet: patience has not begun
  EXPECT_THAT(mirror_->WaitForRows(30, absl::Seconds(5), clock_.Now()),
              StatusIs(absl::StatusCode::kDeadlineExceeded));
  ASSERT_OK(mirror_->Apply(CaughtUp()));
  clock_.Advance(absl::Seconds(4));
  EXPECT_THAT(mirror_->WaitForRows(30, absl::Seconds(5), clock_.Now()),
              StatusIs(absl::StatusCode::kDeadlineExceeded));
  clock_.Advance(absl::Seconds(1));
  EXPECT_OK(mirror_->WaitForRows(30, absl::Seconds(5), clock_.Now()));
  // The missing 20 are known now: the next 10 rows are waited for, exactly.
  EXPECT_THAT(mirror_->WaitForRows(40, absl::Hours(1), clock_.Now()), StatusIs(absl::StatusCode::kDeadlineExceeded));
  ASSERT_OK(Add(6, 0, 10));
  EXPECT_OK(mirror_->WaitForRows(40, absl::Hours(1), clock_.Now()));
}

TEST_F(MirrorTest, PatienceBeginsWhenRowsAreAwaitedAndNotWhileTheWatchIsCut) {
  ASSERT_OK(Add(5, 0, 10));
  ASSERT_OK(mirror_->Apply(CaughtUp()));
  clock_.Advance(absl::Seconds(10));  // a block of updates, or an episode that takes long
  const auto wait = [&] { return mirror_->WaitForRows(20, absl::Seconds(5), clock_.Now()); };
  EXPECT_THAT(wait(), StatusIs(absl::StatusCode::kDeadlineExceeded));
  clock_.Advance(absl::Seconds(4));
  EXPECT_THAT(wait(), StatusIs(absl::StatusCode::kDeadlineExceeded));
  ChunkWatcher::Event interrupted;
  interrupted.interrupted = true;
  ASSERT_OK(mirror_->Apply(std::move(interrupted)));
  clock_.Advance(absl::Seconds(100));
  EXPECT_THAT(wait(), StatusIs(absl::StatusCode::kDeadlineExceeded));
  ASSERT_OK(mirror_->Apply(CaughtUp()));
  EXPECT_THAT(wait(), StatusIs(absl::StatusCode::kDeadlineExceeded));
  ASSERT_OK(Add(6, 0, 10));
  EXPECT_OK(wait());
  EXPECT_THAT(mirror_->WaitForRows(21, absl::Hours(1), clock_.Now()), StatusIs(absl::StatusCode::kDeadlineExceeded))
      << "none was taken for evicted";
}

TEST_F(MirrorTest, RefusesADataSetThatWouldNotFit) {
  Mirror::Options options = Options();
  options.max_bytes = 999 * mirror_->row_bytes();
  EXPECT_THAT(Mirror::Create(options), StatusIs(absl::StatusCode::kResourceExhausted,
                                                AllOf(HasSubstr("replay.max_rows 1000"), HasSubstr("lower replay.max_rows to 999"),
                                                      HasSubstr("learning.mirror_bytes"))));
  options.max_bytes = 1000 * mirror_->row_bytes();
  EXPECT_OK(Mirror::Create(options));
}

TEST_F(MirrorTest, StopsWhenTheDataSetGrowsBeyondItsSize) {
  Mirror::Options options = Options();
  options.max_rows = 16;
  options.max_bytes = 16 * mirror_->row_bytes();
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Mirror> mirror, Mirror::Create(options));
  auto watcher = std::make_unique<FakeWatcher>(std::vector<ChunkWatcher::Event>{
      Appended(TestChunk(1, 0, 16, true)), Appended(TestChunk(2, 0, 2, true)), Appended(TestChunk(3, 0, 2, true))});
  mirror->Follow(std::move(watcher));
  EXPECT_THAT(mirror->WaitForRows(1000, absl::Hours(1), absl::InfiniteFuture()),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("mirror_bytes")));
  EXPECT_THAT(MirroredSource(mirror.get(), kBatch, 1).Next(absl::InfiniteFuture()),
              StatusIs(absl::StatusCode::kResourceExhausted));
}

}  // namespace
}  // namespace orrery
