#include "libs/learning/data_parallel.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/learning/checkpoint.h"
#include "libs/learning/learning_testing.h"
#include "libs/learning/trainer.h"
#include "libs/replay/testing/child_process.h"

namespace orrery {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int kRanks = 2, kRows = 6, kSequences = 4, kUpdates = 8;
constexpr double kRate = 1e-3;
// Of a parameter after kUpdates, which have moved some by 8e-3: sums of float32 in another order. 3e-8 was seen.
constexpr double kTolerance = 1e-6;

config::v1::Model MakeModel() {
  config::v1::Model model = SmallModel(/*with_image=*/true);
  config::v1::Behavior& behavior = *model.mutable_behavior();
  behavior.set_horizon(3);
  behavior.set_actor_layers(1);
  behavior.set_actor_hidden_size(5);
  behavior.set_value_layers(1);
  behavior.set_value_hidden_size(5);
  return model;
}

config::v1::Learning MakeLearning() {
  config::v1::Learning learning;
  learning.set_learning_rate(kRate);
  learning.set_actor_learning_rate(kRate);
  learning.set_value_learning_rate(kRate);
  learning.set_gradient_clip(1);
  return learning;
}

StoredBatch MakeBatch(uint64_t seed) {
  torch::Generator g = at::make_generator<at::CPUGeneratorImpl>(seed);
  StoredBatch batch;
  batch.observations["camera"] = at::randint(256, {kRows, kSequences, 32, 32, 3}, g, at::kByte);
  batch.observations["joints"] = at::randn({kRows, kSequences, kTestVector}, g, at::kFloat);
  batch.action = at::rand({kRows, kSequences, kTestActions}, g, at::kFloat);
  batch.reward = at::randn({kRows, kSequences}, g, at::kFloat);
  batch.is_first = at::zeros({kRows, kSequences}, at::kByte);
  batch.is_first[0].fill_(1);
  batch.is_first[3][1] = 1;
  batch.is_terminal = at::zeros({kRows, kSequences}, at::kByte);
  return batch;
}

StoredBatch PartOf(const DataParallel& group, const StoredBatch& whole) {
  StoredBatch part;
  for (const auto& [name, tensor] : whole.observations) part.observations[name] = group.Part(tensor, 1);
  part.action = group.Part(whole.action, 1);
  part.reward = group.Part(whole.reward, 1);
  part.is_first = group.Part(whole.is_first, 1);
  part.is_terminal = group.Part(whole.is_terminal, 1);
  return part;
}

std::string Name(int rank) { return absl::StrCat("rank", rank); }

// What one rank does, in a process of its own.

void MakeCalls(DataParallel& group) {
  torch::Tensor values = torch::arange(5, torch::kFloat) * (group.rank() + 1);
  ASSERT_OK(group.Mean(values));
  EXPECT_TRUE(torch::equal(values, torch::arange(5, torch::kFloat) * 1.5));
  ASSERT_OK_AND_ASSIGN(const int64_t sum, group.Sum(10 + group.rank()));
  EXPECT_EQ(sum, 21);
  int64_t numbers[] = {group.rank() + 7, group.rank() - 7};
  ASSERT_OK(group.Broadcast(absl::MakeSpan(numbers)));
  EXPECT_EQ(numbers[0], 7);
  EXPECT_EQ(numbers[1], -7);
  for (const std::string& sent : {std::string(), std::string("zero\0byte", 9), std::string(300000, 'x')}) {
    std::string bytes = group.rank() == 0 ? sent : "something else";
    ASSERT_OK(group.Broadcast(bytes));
    EXPECT_EQ(bytes, sent);
  }
}

void MakeUpdates(DataParallel& group, const std::string& folder) {
  ASSERT_OK_AND_ASSIGN(const auto trainer, Trainer::Create(MakeModel(), MakeLearning(), 5, torch::kCPU, 1, false, &group));
  double loss = 0;
  for (int i = 0; i < kUpdates; ++i) {
    ASSERT_OK_AND_ASSIGN(const UpdateResult result, trainer->Update(PartOf(group, MakeBatch(i))));
    EXPECT_FALSE(result.skipped);
    loss = result.losses.at("total");
  }
  // One rank has a number that is not finite: all skip.
  StoredBatch bad = PartOf(group, MakeBatch(0));
  if (group.rank() == 1) bad.reward[2][0] = std::nan("");
  ASSERT_OK_AND_ASSIGN(const UpdateResult result, trainer->Update(bad));
  EXPECT_TRUE(result.skipped);
  Checkpoint checkpoint;
  checkpoint.tensors = trainer->State();
  checkpoint.tensors["loss"] = torch::scalar_tensor(loss, torch::kDouble);
  ASSERT_OK_AND_ASSIGN(const std::string file, SerializeCheckpoint(checkpoint));
  ASSERT_OK(WriteFileAtomically(absl::StrCat(folder, "/", Name(group.rank())), file));
}

// Rank 1 goes, or stays away, after a first call.
void LoseRank(DataParallel& group, bool dies) {
  torch::Tensor values = torch::ones(3);
  ASSERT_OK(group.Mean(values));
  if (group.rank() == 1 && dies) _exit(0);
  if (group.rank() == 1) pause();
  const auto failed = StatusIs(absl::StatusCode::kUnavailable, AllOf(HasSubstr("rank 0 of 2"), HasSubstr("within 2s")));
  EXPECT_THAT(group.Mean(values), failed);
  EXPECT_THAT(group.Sum(1), failed) << "a group that has failed stays so";
}

TEST(Rank, DISABLED_Runs) {
  torch::set_num_threads(1);
  const char *task = std::getenv("RANK_TASK"), *folder = std::getenv("RANK_FOLDER");
  if (task == nullptr || folder == nullptr) GTEST_SKIP() << "is run by the tests below";
  const std::string what = task;
  ASSERT_OK_AND_ASSIGN(std::optional<DataParallel::Options> options, DataParallel::FromEnvironment());
  ASSERT_TRUE(options.has_value());
  options->join_limit = absl::Seconds(60);
  options->limit = what == "die" || what == "stay away" ? absl::Seconds(2) : absl::Seconds(60);
  absl::StatusOr<std::unique_ptr<DataParallel>> group = DataParallel::Join(*options);
  if (what == "join twice") {
    EXPECT_THAT(group, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("rank 1 was in this group before")));
    return;
  }
  ASSERT_OK(group);
  if (what == "calls") MakeCalls(**group);
  if (what == "updates") MakeUpdates(**group, folder);
  if (what == "die" || what == "stay away") LoseRank(**group, what == "die");
  if (what == "join" && options->rank == 0) pause();
}

class DataParallelTest : public ::testing::Test {
 protected:
  DataParallelTest() : port_(FreePort().value()) { torch::set_num_threads(1); }

  std::unique_ptr<ChildProcess> Start(int rank, const std::string& task) {
    const std::string program = std::filesystem::read_symlink("/proc/self/exe");
    absl::StatusOr<std::unique_ptr<ChildProcess>> process = ChildProcess::Start(
        {"env", absl::StrCat("WORLD_SIZE=", kRanks), absl::StrCat("RANK=", rank), "MASTER_ADDR=127.0.0.1",
         absl::StrCat("MASTER_PORT=", port_), "GLOO_SOCKET_IFNAME=lo", absl::StrCat("RANK_TASK=", task),
         absl::StrCat("RANK_FOLDER=", dir_.path()), program, "--gtest_also_run_disabled_tests",
         "--gtest_filter=Rank.DISABLED_Runs"},
        Log(rank));
    EXPECT_OK(process);
    return *std::move(process);
  }
  std::string Log(int rank) const { return dir_ / (Name(rank) + ".log"); }
  std::string LogText(int rank) const { return ReadFile(Log(rank)).value_or(""); }

  // Both ranks to their ends.
  void RunBoth(const std::string& task) {
    const auto first = Start(0, task), second = Start(1, task);
    EXPECT_OK(first->Await(absl::Seconds(90))) << LogText(0);
    EXPECT_OK(second->Await(absl::Seconds(90))) << LogText(1);
  }

  TensorMap StateOf(int rank) const {
    return ParseCheckpoint(ReadFile(dir_ / Name(rank)).value()).value().tensors;
  }

  const TempDir dir_;
  const int port_;
};

TEST_F(DataParallelTest, CallsGiveWhatTheySay) { RunBoth("calls"); }

TEST_F(DataParallelTest, TwoRanksLearnAsOneProcessDoesFromTheWholeBatch) {
  ASSERT_OK_AND_ASSIGN(const auto alone, Trainer::Create(MakeModel(), MakeLearning(), 5, torch::kCPU, 1));
  const TensorMap begin = alone->State();
  double loss = 0;
  for (int i = 0; i < kUpdates; ++i) {
    ASSERT_OK_AND_ASSIGN(const UpdateResult result, alone->Update(MakeBatch(i)));
    loss = result.losses.at("total");
  }
  RunBoth("updates");
  const TensorMap first = StateOf(0), second = StateOf(1);
  EXPECT_NEAR(first.at("loss").item<double>(), loss, 1e-4 * std::abs(loss));
  EXPECT_EQ(first.at("adam.step").item<int64_t>(), kUpdates);
  double largest = 0, moved = 0;
  for (const auto& [name, tensor] : alone->State()) {
    if (name == "random.generator") continue;  // the ranks drew once more, for the update that they skipped
    EXPECT_TRUE(torch::equal(first.at(name), second.at(name))) << name;
    if (name.find("param.") != 0) continue;
    largest = std::max(largest, (first.at(name) - tensor).abs().max().item<double>());
    moved = std::max(moved, (begin.at(name) - tensor).abs().max().item<double>());
  }
  EXPECT_LT(largest, kTolerance);
  EXPECT_GT(moved, 1000 * kTolerance);
  RecordProperty("largest_difference", absl::StrCat(largest));
  RecordProperty("largest_step", absl::StrCat(moved));
}

TEST_F(DataParallelTest, ARankThatDiesIsNoticed) { RunBoth("die"); }

TEST_F(DataParallelTest, ARankThatStaysAwayIsNoticedAtTheLimit) {
  const auto first = Start(0, "stay away"), second = Start(1, "stay away");
  EXPECT_OK(first->Await(absl::Seconds(90))) << LogText(0);
  absl::Status status;
  EXPECT_FALSE(second->Ended(status)) << LogText(1);
}

TEST_F(DataParallelTest, ARankThatComesBackAloneIsRefused) {
  const auto first = Start(0, "join");
  EXPECT_OK(Start(1, "join")->Await(absl::Seconds(90))) << LogText(1);
  EXPECT_OK(Start(1, "join twice")->Await(absl::Seconds(90))) << LogText(1);
  absl::Status status;
  EXPECT_FALSE(first->Ended(status)) << LogText(0);
}

TEST(DataParallel, ReadsTorchrunsVariables) {
  const auto set = [](const std::vector<std::pair<const char*, const char*>>& variables) {
    for (const char* name : {"WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE",
                             "TORCHELASTIC_RESTART_COUNT"}) {
      unsetenv(name);
    }
    for (const auto& [name, value] : variables) setenv(name, value, 1);
    return DataParallel::FromEnvironment();
  };
  EXPECT_FALSE(set({}).value().has_value());
  EXPECT_FALSE(set({{"WORLD_SIZE", "1"}}).value().has_value());
  auto options = set({{"WORLD_SIZE", "4"}, {"RANK", "3"}, {"MASTER_ADDR", "learner-0"}, {"MASTER_PORT", "29500"}});
  ASSERT_OK(options);
  EXPECT_EQ((*options)->rank, 3);
  EXPECT_EQ((*options)->size, 4);
  EXPECT_EQ((*options)->local_rank, 0);
  EXPECT_EQ((*options)->master_address, "learner-0");
  EXPECT_EQ((*options)->master_port, 29500);
  EXPECT_TRUE((*options)->serve_store);
  options = set({{"WORLD_SIZE", "4"}, {"RANK", "3"}, {"LOCAL_RANK", "1"}, {"MASTER_ADDR", "learner-0"},
                 {"MASTER_PORT", "29500"}, {"TORCHELASTIC_USE_AGENT_STORE", "True"}, {"TORCHELASTIC_RESTART_COUNT", "2"}});
  ASSERT_OK(options);
  EXPECT_EQ((*options)->local_rank, 1);
  EXPECT_FALSE((*options)->serve_store);
  EXPECT_EQ((*options)->store_prefix, "2");
  const auto refused = [](const std::string& message) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message));
  };
  EXPECT_THAT(set({{"WORLD_SIZE", "many"}}), refused("WORLD_SIZE is \"many\""));
  EXPECT_THAT(set({{"WORLD_SIZE", "2"}}), refused("RANK is not set"));
  EXPECT_THAT(set({{"WORLD_SIZE", "2"}, {"RANK", "2"}}), refused("RANK is \"2\"; expected a number from 0 to 1"));
  EXPECT_THAT(set({{"WORLD_SIZE", "2"}, {"RANK", "1"}, {"MASTER_ADDR", "a"}}), refused("MASTER_PORT is not set"));
  EXPECT_THAT(set({{"WORLD_SIZE", "2"}, {"RANK", "1"}, {"MASTER_PORT", "1"}}), refused("MASTER_ADDR is not set"));
}

}  // namespace
}  // namespace orrery
