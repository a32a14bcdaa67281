// Ranks that return to a checkpoint together.
#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <iterator>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "libs/base/file.h"
#include "libs/base/status.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/learning/learner.h"
#include "libs/learning/learning_testing.h"
#include "libs/replay/testing/child_process.h"
#include "libs/world_model/snapshot.h"

namespace orrery {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

constexpr int kRows = 10;
// Where blocks of updates end. Data change between blocks only; in the third the loss of one rank is not finite.
constexpr int64_t kBlockEnds[] = {2, 4, 14, 16};
constexpr int64_t kBadFrom = 4, kBadTo = 14;

// Grants a block at a time, and keeps the parameters of each snapshot by its updates.
class BlockReplay : public ReplayClient {
 public:
  BlockReplay() : ReplayClient(nullptr, "test") {}
  absl::StatusOr<int64_t> AcquireLearner(const std::string&, absl::Time) override { return 1; }
  absl::StatusOr<RunCoordinator::Grant> ReserveUpdates(int64_t, int64_t done, int32_t, absl::Time) override {
    RunCoordinator::Grant grant;
    const auto* const end = std::upper_bound(std::begin(kBlockEnds), std::end(kBlockEnds), done);
    grant.run_complete = end == std::end(kBlockEnds);
    if (!grant.run_complete) grant.updates = static_cast<int32_t>(*end - done);
    return grant;
  }
  absl::Status ReleaseLearner(int64_t, int64_t, absl::Time) override { return absl::OkStatus(); }
  absl::Status PutSnapshot(const Store::Snapshot& snapshot, absl::Time) override {
    ASSIGN_OR_RETURN(models[snapshot.version.counter], ParseSnapshot(snapshot.file));
    return absl::OkStatus();
  }
  absl::StatusOr<replay::v1::GetStatsResponse> GetStats(absl::Time) override {
    replay::v1::GetStatsResponse response;
    response.set_rows_appended(rows);
    return response;
  }

  int64_t rows = 0;
  std::map<int64_t, ModelSnapshot> models;
};

Chunk GoodChunk(int64_t episode) { return TestChunk(episode, 0, kRows); }

// Rewards whose squares overflow.
Chunk BadChunk(int64_t episode) {
  ArrayMap rows = TestRows(episode, 0, kRows, /*with_image=*/false);
  for (float& reward : rows[kReward].mutable_as<float>()) reward = 1e30f;
  return MakeChunk(episode, 0, kRows, rows);
}

TensorMap ParametersOf(const WorldModel& model) {
  TensorMap parameters;
  for (const auto& parameter : model.named_parameters()) parameters[parameter.key()] = parameter.value().detach().clone();
  return parameters;
}

bool Same(const TensorMap& a, const TensorMap& b) {
  return a.size() == b.size() &&
         std::all_of(a.begin(), a.end(), [&](const auto& entry) { return torch::equal(entry.second, b.at(entry.first)); });
}

std::string CheckpointFile(const std::string& folder, int64_t updates) {
  return absl::StrFormat("%s/checkpoint-%012d.safetensors", folder, updates);
}

void Damage(const std::string& path) {
  std::string file = ReadFile(path).value();
  file[file.size() / 2] ^= 1;
  ASSERT_OK(WriteFileAtomically(path, file));
}

// What a rank is told.
struct Task {
  int bad_rank = 0;          // whose loss is not finite in the third block
  bool all_damaged = false;  // rank 0's checkpoints of 2 and 4 updates; else that of 4 alone
  std::string folder;
};

class Rank {
 public:
  Rank(Task task, DataParallel* group) : task_(std::move(task)), group_(group) {}

  void Run() {
    Learner::Options options;
    options.experiment = Configuration();
    options.learner_id = absl::StrCat("learner-", group_->rank());
    if (group_->rank() == 0) options.checkpoint_dir = task_.folder;
    auto watcher = std::make_unique<FakeWatcher>();
    watcher_ = watcher.get();
    options.watcher = std::move(watcher);
    options.replay = replay_;
    options.publisher = &publisher_;
    options.registry = &registry_;
    options.group = group_;
    options.on_update = [this](const Learner::UpdateReport& report) { OnUpdate(report); };
    Append(GoodChunk(++episode_));
    watcher_->Push(CaughtUp());
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Learner> learner, Learner::Create(std::move(options)));
    Check(learner->Run(), *learner);
  }

 private:
  static config::v1::Experiment Configuration() {
    config::v1::Experiment experiment;
    experiment.set_name("test");
    experiment.mutable_environment()->set_task("point_pixels");
    *experiment.mutable_model() = SmallModel(/*with_image=*/false);
    config::v1::Learning& learning = *experiment.mutable_learning();
    learning.set_schedule(config::v1::Learning::ALTERNATE);
    learning.set_batch_size(4);
    learning.set_sequence_length(5);
    return experiment;
  }

  void Append(Chunk chunk) {
    watcher_->Push(Appended(std::move(chunk)));
    replay_->rows += kRows;
  }

  void OnUpdate(const Learner::UpdateReport& report) {
    if (report.result.skipped) skipped_.push_back(report.updates);
    if (report.updates == kBadFrom || report.updates == kBadTo) {
      const bool bad = report.updates == kBadFrom && group_->rank() == task_.bad_rank;
      if (group_->rank() == task_.bad_rank) watcher_->Push(Evicted({episode_, 0}));
      ++episode_;
      Append(bad ? BadChunk(episode_) : GoodChunk(episode_));
    }
    if (group_->rank() == 0 && report.updates == kBadFrom + 1) {
      Damage(CheckpointFile(task_.folder, 4));
      if (task_.all_damaged) Damage(CheckpointFile(task_.folder, 2));
    }
  }

  void Check(const absl::Status& ended, const Learner& learner) {
    std::vector<int64_t> expected(kBadTo - kBadFrom);
    std::iota(expected.begin(), expected.end(), kBadFrom + 1);
    EXPECT_THAT(skipped_, ElementsAreArray(expected));
    if (task_.all_damaged) {
      EXPECT_EQ(learner.progress().updates, kBadTo);
      if (group_->rank() == 0) {
        EXPECT_THAT(ended, StatusIs(absl::StatusCode::kInternal,
                                    AllOf(HasSubstr("10 updates in a row were not finite (updates 14)"),
                                          HasSubstr("none of the 2 checkpoints in " + task_.folder))));
      } else {
        EXPECT_THAT(ended, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("a rank was lost")));
      }
      return;
    }
    EXPECT_OK(ended);
    EXPECT_EQ(learner.progress().updates, 16);
    Checkpoint last;
    last.tensors = ParametersOf(learner.model());
    ASSERT_OK_AND_ASSIGN(const std::string file, SerializeCheckpoint(last));
    ASSERT_OK(WriteFileAtomically(absl::StrCat(task_.folder, "/rank", group_->rank()), file));
    if (group_->rank() == 0) CheckSnapshots();
  }

  // Rank 0's, one after each block.
  void CheckSnapshots() {
    std::vector<int64_t> published;
    std::vector<TensorMap> parameters;
    for (const auto& [updates, snapshot] : replay_->models) {
      published.push_back(updates);
      parameters.push_back(ParametersOf(*snapshot.model));
    }
    ASSERT_THAT(published, ElementsAre(0, 2, 4, 14, 16));
    EXPECT_FALSE(Same(parameters[1], parameters[2])) << "nothing to go back from";
    EXPECT_TRUE(Same(parameters[3], parameters[1])) << "not the checkpoint before the damaged one";
    EXPECT_FALSE(Same(parameters[4], parameters[3])) << "learning did not go on";
    EXPECT_TRUE(std::filesystem::exists(CheckpointFile(task_.folder, 4) + ".damaged"));
  }

  const Task task_;
  DataParallel* const group_;
  SnapshotPublisher publisher_;
  prometheus::Registry registry_;
  const std::shared_ptr<BlockReplay> replay_ = std::make_shared<BlockReplay>();
  FakeWatcher* watcher_ = nullptr;
  int64_t episode_ = 0;
  std::vector<int64_t> skipped_;
};

TEST(Rollback, DISABLED_IsARank) {
  torch::set_num_threads(1);
  const char *bad_rank = std::getenv("BAD_RANK"), *all_damaged = std::getenv("ALL_DAMAGED"),
             *folder = std::getenv("RANK_FOLDER");
  if (bad_rank == nullptr || all_damaged == nullptr || folder == nullptr) GTEST_SKIP() << "is run by the tests below";
  Task task;
  ASSERT_TRUE(absl::SimpleAtoi(bad_rank, &task.bad_rank) && absl::SimpleAtob(all_damaged, &task.all_damaged));
  task.folder = folder;
  ASSERT_OK_AND_ASSIGN(const std::optional<DataParallel::Options> options, DataParallel::FromEnvironment());
  ASSERT_TRUE(options.has_value());
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<DataParallel> group, DataParallel::Join(*options));
  Rank(task, group.get()).Run();
}

// Both ranks to their ends, in processes of their own.
void RunRanks(const std::string& folder, int bad_rank, bool all_damaged) {
  const std::string program = std::filesystem::read_symlink("/proc/self/exe");
  ASSERT_OK_AND_ASSIGN(const int port, FreePort());
  const auto log = [&](int rank) { return absl::StrCat(folder, "/rank", rank, ".log"); };
  std::vector<std::unique_ptr<ChildProcess>> ranks;
  for (int rank = 0; rank < 2; ++rank) {
    absl::StatusOr<std::unique_ptr<ChildProcess>> started = ChildProcess::Start(
        {"env", "WORLD_SIZE=2", absl::StrCat("RANK=", rank), "MASTER_ADDR=127.0.0.1", absl::StrCat("MASTER_PORT=", port),
         "GLOO_SOCKET_IFNAME=lo", absl::StrCat("BAD_RANK=", bad_rank), absl::StrCat("ALL_DAMAGED=", all_damaged ? 1 : 0),
         absl::StrCat("RANK_FOLDER=", folder), program, "--gtest_also_run_disabled_tests",
         "--gtest_filter=Rollback.DISABLED_IsARank"},
        log(rank));
    ASSERT_OK(started);
    ranks.push_back(*std::move(started));
  }
  for (int rank = 0; rank < 2; ++rank) {
    // Below the limit of a minute: a rank that has ended is noticed at once.
    EXPECT_OK(ranks[rank]->Await(absl::Seconds(50))) << ReadFile(log(rank)).value_or("");
  }
}

TEST(Rollback, RanksGoBackTogetherWhicheverSawTheBadBatches) {
  for (const int bad_rank : {0, 1}) {
    SCOPED_TRACE(absl::StrCat("rank ", bad_rank));
    const TempDir dir;
    RunRanks(dir.path(), bad_rank, /*all_damaged=*/false);
    const auto parameters = [&](int rank) {
      const absl::StatusOr<std::string> file = ReadFile(dir / absl::StrCat("rank", rank));
      EXPECT_OK(file);
      return file.ok() ? ParseCheckpoint(*file).value().tensors : TensorMap();
    };
    const TensorMap first = parameters(0);
    EXPECT_FALSE(first.empty());
    EXPECT_TRUE(Same(first, parameters(1)));
  }
}

TEST(Rollback, RanksEndWhereNoCheckpointIsWhole) {
  const TempDir dir;
  RunRanks(dir.path(), /*bad_rank=*/1, /*all_damaged=*/true);
  for (const int64_t updates : {2, 4}) {
    EXPECT_TRUE(std::filesystem::exists(CheckpointFile(dir.path(), updates) + ".damaged")) << updates;
  }
  EXPECT_THAT(ReadFile(dir / "rank1.log"), IsOkAndHolds(HasSubstr("learning ended updates=14 reason=UNAVAILABLE")));
}

}  // namespace
}  // namespace orrery
