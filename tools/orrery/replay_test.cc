// `orrery replay` as a program, over file stores.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/replay/chunk_codec.h"
#include "libs/replay/store.h"
#include "tools/orrery/program_testing.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

Outcome Replay(const std::string& arguments) { return Orrery("replay " + arguments); }

class ReplayCommandTest : public ::testing::Test {
 protected:
  // Three episodes of 4 rows; the store is closed again.
  void SetUp() override {
    ASSERT_OK_AND_ASSIGN(const auto store, OpenStore({.location = Location("store"), .run = "mine"}));
    for (const int64_t episode : {1, 2, 3}) {
      Chunk chunk;
      chunk.run_id = "0123456789abcdef";
      chunk.info = {.key = {episode, 0}, .rows = 4, .mode = EpisodeMode::kRandom, .end = EpisodeEnd::kTruncated};
      ASSERT_OK_AND_ASSIGN(chunk.payload, EncodeRows({{kReward, Array::Zeros(DType::kFloat32, {4})},
                                                      {kAction, Array::Zeros(DType::kFloat32, {4, 2})},
                                                      {kIsFirst, Array::Zeros(DType::kUInt8, {4})},
                                                      {kIsTerminal, Array::Zeros(DType::kUInt8, {4})},
                                                      {"image", Array::Zeros(DType::kUInt8, {4, 8, 8, 3})}}));
      chunk.info.payload_bytes = static_cast<int64_t>(chunk.payload.size());
      ASSERT_OK(store->Append(chunk));
      bytes_ += chunk.info.payload_bytes;
    }
  }
  std::string Location(const std::string& name) const { return absl::StrCat("file:", folder_ / name); }
  // Chunks and bytes by run, as the list tells them.
  nlohmann::json Listed(const std::string& name) const {
    const Outcome listed = Replay(absl::StrCat("list --json --store=", Location(name)));
    EXPECT_EQ(listed.code, 0) << listed.output;
    nlohmann::json runs = nlohmann::json::object();
    for (absl::string_view line : absl::StrSplit(listed.output, '\n', absl::SkipEmpty())) {
      const nlohmann::json run = nlohmann::json::parse(line);
      runs[run["run"].get<std::string>()] = {run["chunks"], run["bytes"]};
    }
    return runs;
  }

  const TempDir folder_;
  int64_t bytes_ = 0;
};

TEST_F(ReplayCommandTest, MovesADataSetToAnotherStore) {
  const std::string files = folder_ / "files";
  const Outcome out = Replay(absl::StrCat("export --run=mine --episodes=2-3 --out=", files, " --store=", Location("store")));
  EXPECT_EQ(out.code, 0) << out.output;
  EXPECT_THAT(out.output, HasSubstr("exported 2 episodes, 2 chunks, 8 rows, "));
  EXPECT_TRUE(std::filesystem::exists(files + "/episode-000000003.safetensors"));
  const Outcome in = Replay(absl::StrCat("import --run=yours --in=", files, " --store=", Location("other")));
  EXPECT_EQ(in.code, 0) << in.output;
  EXPECT_THAT(in.output, HasSubstr("imported 2 episodes, 2 chunks, 8 rows, "));
  const nlohmann::json pair = {2, bytes_ / 3 * 2};
  EXPECT_EQ(Listed("other"), (nlohmann::json{{"yours", pair}}));
}

TEST_F(ReplayCommandTest, DeletesOnlyWhenTold) {
  EXPECT_EQ(Listed("store"), (nlohmann::json{{"mine", {3, bytes_}}}));
  const std::string deletion = absl::StrCat("delete --run=mine --store=", Location("store"));
  const Outcome kept = Replay(deletion);
  EXPECT_EQ(kept.code, 1);
  EXPECT_THAT(kept.output, HasSubstr("nothing was deleted: with --yes"));
  EXPECT_EQ(Listed("store").size(), 1u);
  EXPECT_EQ(Replay(deletion + " --yes").code, 0);
  EXPECT_EQ(Listed("store").size(), 0u);
  const Outcome again = Replay(deletion + " --yes");
  EXPECT_EQ(again.code, 1);
  EXPECT_THAT(again.output, HasSubstr("mine"));
}

TEST_F(ReplayCommandTest, NamesTheFlagThatIsWrong) {
  const std::string place = absl::StrCat(" --run=mine --out=", folder_ / "files");
  const auto refuse = [](const std::string& arguments, int code, const std::string& words) {
    const Outcome outcome = Replay(arguments);
    EXPECT_EQ(outcome.code, code) << outcome.output;
    EXPECT_THAT(outcome.output, HasSubstr(words));
  };
  refuse("export" + place, 1, "give one of --replay=HOST:PORT and --store=LOCATION");
  const std::string store = " --store=" + Location("store");
  for (const char* episodes : {"0-3", "3-2", "1-2-3"}) {
    refuse(absl::StrCat("export", place, store, " --episodes=", episodes), 1, absl::StrCat("--episodes=", episodes));
  }
  refuse("export" + place + store + " --mode=fast", 1, "--mode=fast: expected random, train or evaluate");
  refuse("export" + place + store + " --episodes=7", 1, "no stored episode");
  refuse("export" + store + " --run=mine", 2, "--out");
  refuse("list --store=disk:/x", 1, "disk:/x");
}

}  // namespace
}  // namespace orrery
