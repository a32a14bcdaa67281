#include "libs/learning/checkpoint.h"

#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <utility>

#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"

namespace orrery {
namespace {
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;

Checkpoint MakeCheckpoint(int64_t updates) {
  Checkpoint checkpoint;
  checkpoint.updates = updates;
  checkpoint.generation = 3;
  checkpoint.sampler = "1 2 3";
  checkpoint.experiment = "name: \"a \\\"orrery.checksum\\\" b\"\n";
  checkpoint.tensors["param.w"] = torch::arange(6, torch::kFloat32).reshape({2, 3}) + static_cast<double>(updates);
  checkpoint.tensors["random.generator"] = torch::arange(10).to(torch::kUInt8);
  return checkpoint;
}

std::set<std::string> Names(const std::string& folder) {
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) names.insert(entry.path().filename().string());
  return names;
}

void FlipByte(const std::string& path) {
  std::string file = ReadFile(path).value();
  file[file.size() / 2] ^= 1;
  ASSERT_OK(WriteFileAtomically(path, file));
}

TEST(Checkpoint, ComesBackAsItWas) {
  const Checkpoint saved = MakeCheckpoint(12);
  ASSERT_OK_AND_ASSIGN(const std::string file, SerializeCheckpoint(saved));
  ASSERT_OK_AND_ASSIGN(const Checkpoint loaded, ParseCheckpoint(file));
  EXPECT_EQ(loaded.updates, 12);
  EXPECT_EQ(loaded.generation, 3);
  EXPECT_EQ(loaded.sampler, saved.sampler);
  EXPECT_EQ(loaded.experiment, saved.experiment);
  ASSERT_EQ(loaded.tensors.size(), 2u);
  EXPECT_TRUE(torch::equal(loaded.tensors.at("param.w"), saved.tensors.at("param.w")));
  EXPECT_TRUE(torch::equal(loaded.tensors.at("random.generator"), saved.tensors.at("random.generator")));
}

TEST(Checkpoint, EveryDamagedByteAndEveryCutIsDetected) {
  ASSERT_OK_AND_ASSIGN(const std::string file, SerializeCheckpoint(MakeCheckpoint(12)));
  for (size_t i = 0; i < file.size(); ++i) {
    for (const char bit : {1, 32, -128}) {
      std::string damaged = file;
      damaged[i] ^= bit;
      ASSERT_THAT(ParseCheckpoint(damaged), StatusIs(absl::StatusCode::kDataLoss)) << "byte " << i;
    }
    ASSERT_THAT(ParseCheckpoint(file.substr(0, i)), StatusIs(absl::StatusCode::kDataLoss)) << "cut at " << i;
  }
  EXPECT_THAT(ParseCheckpoint(file + "x"), StatusIs(absl::StatusCode::kDataLoss));
}

TEST(CheckpointFolder, KeepsTheNewestAndRemovesTemporaryFiles) {
  const TempDir dir;
  const std::string folder = dir / "new/checkpoints";
  ASSERT_OK_AND_ASSIGN(CheckpointFolder checkpoints, CheckpointFolder::Open(folder, 2));
  EXPECT_THAT(checkpoints.empty(), IsOkAndHolds(true));
  EXPECT_THAT(checkpoints.LoadNewest(), StatusIs(absl::StatusCode::kNotFound));
  for (const int64_t updates : {5, 90, 1000}) ASSERT_OK(checkpoints.Save(MakeCheckpoint(updates)));
  std::ofstream(folder + "/checkpoint-000000002000.safetensors.tmp.77") << "half";
  std::ofstream(folder + "/notes.txt") << "mine";
  ASSERT_OK_AND_ASSIGN(checkpoints, CheckpointFolder::Open(folder, 2));
  EXPECT_THAT(Names(folder), Contains(EndsWith(".tmp.77"))) << "another learner may be about to write it";
  EXPECT_THAT(checkpoints.empty(), IsOkAndHolds(false));
  EXPECT_EQ(checkpoints.LoadNewest().value().updates, 1000);
  ASSERT_OK(checkpoints.Save(MakeCheckpoint(1001)));
  EXPECT_THAT(Names(folder), ElementsAre("checkpoint-000000001000.safetensors", "checkpoint-000000001001.safetensors",
                                         "notes.txt"));
}

// The others may be files that this program cannot read.
TEST(CheckpointFolder, NeverRemovesTheOneJustWritten) {
  const TempDir dir;
  ASSERT_OK_AND_ASSIGN(CheckpointFolder checkpoints, CheckpointFolder::Open(dir.path(), 2));
  for (const int64_t updates : {10, 20, 30, 5}) ASSERT_OK(checkpoints.Save(MakeCheckpoint(updates)));
  EXPECT_THAT(Names(dir.path()), ElementsAre("checkpoint-000000000005.safetensors", "checkpoint-000000000020.safetensors",
                                             "checkpoint-000000000030.safetensors"));
}

TEST(CheckpointFolder, SetsADamagedOneAsideAndTakesTheOneBefore) {
  const TempDir dir;
  ASSERT_OK_AND_ASSIGN(CheckpointFolder checkpoints, CheckpointFolder::Open(dir.path(), 2));
  ASSERT_OK(checkpoints.Save(MakeCheckpoint(1)));
  ASSERT_OK(checkpoints.Save(MakeCheckpoint(2)));
  FlipByte(dir / "checkpoint-000000000002.safetensors");
  ASSERT_OK_AND_ASSIGN(const Checkpoint loaded, checkpoints.LoadNewest());
  EXPECT_EQ(loaded.updates, 1);
  EXPECT_EQ(Names(dir.path()), (std::set<std::string>{"checkpoint-000000000001.safetensors",
                                                      "checkpoint-000000000002.safetensors.damaged"}));
  FlipByte(dir / "checkpoint-000000000001.safetensors");
  for (int start = 0; start < 2; ++start) {  // the second one finds what the first has set aside
    EXPECT_THAT(checkpoints.LoadNewest(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("none of the 2 checkpoints")));
  }
}

TEST(CheckpointFolder, StepsPastNoneThatCannotBeRead) {
  const TempDir dir;
  ASSERT_OK_AND_ASSIGN(CheckpointFolder checkpoints, CheckpointFolder::Open(dir.path(), 2));
  ASSERT_OK(checkpoints.Save(MakeCheckpoint(1)));
  const std::string unreadable = dir / "checkpoint-000000000002.safetensors";
  std::filesystem::create_directory(unreadable);  // of root, too
  const absl::Status refused = checkpoints.LoadNewest().status();
  EXPECT_THAT(std::string(refused.message()), HasSubstr(unreadable));
  EXPECT_TRUE(std::filesystem::exists(unreadable));
  EXPECT_EQ(checkpoints.LoadNewest(/*before=*/2).value().updates, 1);
}

TEST(CheckpointFolder, AFailedWriteLeavesTheOthersAlone) {
  const TempDir dir;
  ASSERT_OK_AND_ASSIGN(CheckpointFolder checkpoints, CheckpointFolder::Open(dir.path(), 1));
  ASSERT_OK(checkpoints.Save(MakeCheckpoint(1)));
  // A folder in the file's place makes the last step of the write fail.
  std::filesystem::create_directory(dir / "checkpoint-000000000002.safetensors");
  EXPECT_FALSE(checkpoints.Save(MakeCheckpoint(2)).ok());
  std::filesystem::remove(dir / "checkpoint-000000000002.safetensors");
  EXPECT_EQ(checkpoints.LoadNewest().value().updates, 1);
}

// As on a disk that becomes full: the file ends in the middle.
TEST(CheckpointFolder, AWriteThatFailsHalfwayLeavesNothingBehind) {
  const TempDir dir;
  ASSERT_OK_AND_ASSIGN(CheckpointFolder checkpoints, CheckpointFolder::Open(dir.path(), 3));
  ASSERT_OK(checkpoints.Save(MakeCheckpoint(1)));
  const std::set<std::string> before = Names(dir.path());
  rlimit limit{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &limit), 0);
  const rlim_t usual = std::exchange(limit.rlim_cur, std::filesystem::file_size(dir / *before.begin()) / 2);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  const absl::Status failed = checkpoints.Save(MakeCheckpoint(2));
  limit.rlim_cur = usual;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_THAT(std::string(failed.message()), ::testing::HasSubstr("cannot write"));
  EXPECT_EQ(Names(dir.path()), before);
  EXPECT_EQ(checkpoints.LoadNewest().value().updates, 1);
  ASSERT_OK(checkpoints.Save(MakeCheckpoint(2)));
  EXPECT_EQ(checkpoints.LoadNewest().value().updates, 2);
}

}  // namespace
}  // namespace orrery
