// `orrery` as a program: a tiny run on the built-in task, resumed and evaluated; wrong command lines; bad input.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <webp/demux.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/tensors/safetensors.h"
#include "tests/process.h"
#include "tools/orrery/program_testing.h"

namespace orrery {
namespace {

using testing::HasSubstr;

// Rows of a CSV file, without its header.
std::vector<std::vector<std::string>> Rows(const std::string& path) {
  std::vector<std::vector<std::string>> rows;
  const absl::StatusOr<std::string> file = ReadFile(path);
  EXPECT_OK(file);
  if (!file.ok()) return rows;
  for (absl::string_view line : absl::StrSplit(*file, '\n', absl::SkipEmpty())) {
    rows.push_back(absl::StrSplit(line, ','));
  }
  if (!rows.empty()) rows.erase(rows.begin());
  return rows;
}

double MeanLoss(const std::vector<std::vector<std::string>>& rows, size_t begin, size_t end) {
  double sum = 0;
  for (size_t i = begin; i < end; ++i) {
    double value = 0;
    EXPECT_TRUE(absl::SimpleAtod(rows[i][1], &value));
    sum += value;
  }
  return sum / static_cast<double>(end - begin);
}

int FilmFrames(const std::string& path) {
  const absl::StatusOr<std::string> file = ReadFile(path);
  if (!file.ok()) return -1;
  WebPData data{reinterpret_cast<const uint8_t*>(file->data()), file->size()};
  WebPAnimDecoder* decoder = WebPAnimDecoderNew(&data, nullptr);
  if (decoder == nullptr) return -1;
  WebPAnimInfo info;
  const int frames = WebPAnimDecoderGetInfo(decoder, &info) ? static_cast<int>(info.frame_count) : -1;
  WebPAnimDecoderDelete(decoder);
  return frames;
}

std::string TinyRun(const std::string& run_dir) {
  return absl::StrCat("train --threads=1 --config=", SourceFile("configs/point_pixels.textproto"), " --run_dir=", run_dir,
                      " --set collection.seed_episodes=3 --set learning.initial_updates=40"
                      " --set learning.updates_per_episode=10 --set evaluation.every_episodes=2"
                      " --set planner.cem.candidates=30 --set planner.cem.iterations=2 ");
}

TEST(Train, SeveralTasksTakeTurns) {
  const TempDir dir;
  const std::string run = dir / "run";
  const Outcome trained = Orrery(TinyRun(run) + "--set learning.max_episodes=5 --set 'environment={image_size: 32 "
                                 "tasks {name: \"point_pixels\"} tasks {name: \"cartpole_swingup\" action_repeat: 8 time_limit: 400}}'");
  ASSERT_EQ(trained.code, 0) << trained.output;
  std::vector<std::string> played;
  for (const auto& episode : Rows(run + "/episodes.csv")) played.push_back(absl::StrCat(episode[1], " ", episode[3], " ", episode[6]));
  EXPECT_THAT(played, testing::ElementsAre("random point_pixels 50", "random cartpole_swingup 450", "random point_pixels 500",
                                           "train cartpole_swingup 900", "train point_pixels 950",
                                           testing::StartsWith("evaluate point_pixels"),
                                           testing::StartsWith("evaluate cartpole_swingup")));
  const std::string eval = absl::StrCat("eval --json --snapshot=", run, "/snapshots/latest.safetensors");
  const Outcome unclear = Orrery(eval);
  EXPECT_EQ(unclear.code, 1);
  EXPECT_THAT(unclear.output, HasSubstr("choose one with --env, expected one of point_pixels, cartpole_swingup"));
  const Outcome agent = Orrery(eval + " --env=cartpole_swingup");
  ASSERT_EQ(agent.code, 0) << agent.output;
  EXPECT_EQ(nlohmann::json::parse(agent.output)["rows"][0], 51) << "the task's own repeat and limit";
}

TEST(Train, ChoicesAreLearnedFromRandomActions) {
  const TempDir dir;
  const std::string run = dir / "run";
  const Outcome trained =
      Orrery(TinyRun(run) + "--set learning.max_episodes=5 --set environment.task=point_pixels_discrete --set planner.genetic={} "
                            "--set collection.random_actions=true");
  ASSERT_EQ(trained.code, 0) << trained.output;
  std::vector<std::string> modes;
  for (const auto& episode : Rows(run + "/episodes.csv")) modes.push_back(episode[1]);
  EXPECT_EQ(modes, (std::vector<std::string>{"random", "random", "random", "random", "random", "evaluate"}));
}

TEST(Train, RunsResumesAndIsEvaluated) {
  const TempDir dir;
  const std::string run = dir / "run";
  const Outcome first = Orrery(TinyRun(run) + "--set learning.max_episodes=5");
  ASSERT_EQ(first.code, 0) << first.output;
  for (const char* file : {"config.textproto", "metrics.csv", "episodes.csv", "snapshots/latest.safetensors"}) {
    EXPECT_OK(ReadFile(run + "/" + file)) << first.output;
  }
  EXPECT_FALSE(std::filesystem::is_empty(run + "/checkpoints"));
  EXPECT_FALSE(std::filesystem::is_empty(run + "/replay"));
  EXPECT_GE(FilmFrames(run + "/film.webp"), 20) << first.output;  // equal frames are joined

  const std::vector<std::vector<std::string>> updates = Rows(run + "/metrics.csv");
  ASSERT_EQ(updates.size(), 60u) << "40 after the seed episodes, 10 after each of the two others";
  EXPECT_LT(MeanLoss(updates, 40, 60), 0.8 * MeanLoss(updates, 0, 10));
  std::vector<std::string> modes;
  for (const auto& episode : Rows(run + "/episodes.csv")) modes.push_back(episode[1]);
  EXPECT_EQ(modes, (std::vector<std::string>{"random", "random", "random", "train", "train", "evaluate"}));

  EXPECT_EQ(Orrery(TinyRun(run)).code, 1) << "the folder holds a run";
  const Outcome second = Orrery(absl::StrCat("train --threads=1 --resume --run_dir=", run, " --set learning.max_episodes=7"));
  ASSERT_EQ(second.code, 0) << second.output;
  const std::vector<std::vector<std::string>> resumed = Rows(run + "/metrics.csv");
  ASSERT_EQ(resumed.size(), 80u) << second.output;
  EXPECT_TRUE(std::equal(updates.begin(), updates.end(), resumed.begin()));
  EXPECT_LT(MeanLoss(resumed, 60, 80), 0.8 * MeanLoss(resumed, 0, 10)) << "went on with the parameters";
  EXPECT_EQ(Rows(run + "/episodes.csv").size(), 9u);

  const Outcome agent =
      Orrery(absl::StrCat("eval --json --threads=1 --episodes=2 --seed=3 --snapshot=", run, "/snapshots/latest.safetensors"));
  ASSERT_EQ(agent.code, 0) << agent.output;
  const auto evaluated = nlohmann::json::parse(agent.output);
  EXPECT_EQ(evaluated["env"], "point_pixels");
  EXPECT_EQ(evaluated["returns"].size(), 2u);
  EXPECT_EQ(evaluated["snapshot"]["counter"], 80);
  EXPECT_EQ(Orrery(absl::StrCat("eval --json --threads=1 --episodes=2 --seed=3 --snapshot=", run,
                                "/snapshots/latest.safetensors"))
                .output,
            agent.output)
      << "the same seed gives the same returns";

  EXPECT_EQ(evaluated["algorithm"], "cem") << "as the snapshot says";
  const std::string snapshot = absl::StrCat("eval --json --threads=1 --seed=3 --snapshot=", run, "/snapshots/latest.safetensors ");
  const Outcome shooting = Orrery(snapshot + "--algorithm=random_shooting");
  ASSERT_EQ(shooting.code, 0) << shooting.output;
  EXPECT_EQ(nlohmann::json::parse(shooting.output)["algorithm"], "random_shooting");
  EXPECT_THAT(Orrery(snapshot + "--algorithm=actor").output, HasSubstr("actor: the model has no actor and value"));
  EXPECT_THAT(Orrery(snapshot + "--drop=sound").output, HasSubstr("--drop=sound: expected one of image"));
  EXPECT_THAT(Orrery(snapshot + "--drop=image").output, HasSubstr("observations is empty, expected at least one modality"));
}

int64_t Updates(const std::string& run) {
  const absl::StatusOr<std::string> file = ReadFile(run + "/metrics.csv");
  return file.ok() ? std::count(file->begin(), file->end(), '\n') - 1 : 0;
}

TEST(Train, SavesAndEndsCleanlyOnSigterm) {
  const TempDir dir;
  const std::string run = dir / "run";
  Process process({"/bin/sh", "-c", absl::StrCat("exec ", ORRERY_BIN_DIR, "/orrery ", TinyRun(run),
                                                 "--set learning.max_episodes=100000 --set learning.max_seconds=3600")},
                  dir / "log");
  while (process.Running() && Updates(run) < 1) absl::SleepFor(absl::Milliseconds(20));
  process.Signal(SIGTERM);
  EXPECT_EQ(process.Wait(absl::Seconds(60)), 0) << process.Log();
  EXPECT_THAT(process.Log(), HasSubstr("saving a checkpoint"));
  EXPECT_THAT(process.Log(), HasSubstr("snapshot "));
  EXPECT_FALSE(std::filesystem::is_empty(run + "/checkpoints"));
}

void ExpectSameModel(const std::string& run, const std::string& other) {
  ASSERT_OK_AND_ASSIGN(const SafeTensors a, LoadSafeTensors(run + "/snapshots/latest.safetensors"));
  ASSERT_OK_AND_ASSIGN(const SafeTensors b, LoadSafeTensors(other + "/snapshots/latest.safetensors"));
  EXPECT_EQ(a.metadata.at("orrery.counter"), b.metadata.at("orrery.counter"));
  ASSERT_EQ(a.tensors.size(), b.tensors.size());
  for (const auto& [name, tensor] : a.tensors) EXPECT_TRUE(torch::equal(tensor, b.tensors.at(name))) << name;
}

// With a schedule of the learning rate and averaged weights, which go on where they were.
TEST(Train, KilledWhileItLearnsItComesToTheSameModel) {
  const TempDir dir;
  const std::string straight = dir / "straight", killed = dir / "killed";
  const std::string set = "--set learning.initial_updates=600 --set learning.max_episodes=5 --set learning.max_seconds=3600"
                          " --set learning.checkpoint_every_updates=100 --set learning.weight_average_decay=0.99"
                          " --set learning.rate_schedule.shape=COSINE --set learning.rate_schedule.warm_up_updates=50"
                          " --set learning.rate_schedule.decay_updates=500 --set learning.rate_schedule.final_fraction=0.1";
  const Outcome whole = Orrery(TinyRun(straight) + set);
  ASSERT_EQ(whole.code, 0) << whole.output;

  Process process({"/bin/sh", "-c", absl::StrCat("exec ", ORRERY_BIN_DIR, "/orrery ", TinyRun(killed), set)}, dir / "log");
  while (process.Running() && Updates(killed) < 150) absl::SleepFor(absl::Milliseconds(5));
  process.Kill();
  ASSERT_GE(Updates(killed), 150) << process.Log();
  ASSERT_LT(Updates(killed), 600) << "not in time: an episode was being played";
  const Outcome resumed = Orrery(absl::StrCat("train --threads=1 --resume --run_dir=", killed));
  ASSERT_EQ(resumed.code, 0) << resumed.output;
  ExpectSameModel(straight, killed);
}

TEST(Train, OfflineLearnsFromWhatWasStored) {
  const TempDir dir;
  const std::string run = dir / "run", offline = dir / "offline", again = dir / "again";
  const Outcome collected = Orrery(TinyRun(run) + "--set learning.max_episodes=4");
  ASSERT_EQ(collected.code, 0) << collected.output;
  const std::string stored = absl::StrCat(" --offline --store=file:", run, "/replay --data_set=point_pixels ");
  const std::string set = "--set name=another --set learning.max_updates=120 --set learning.snapshot_every_updates=50 ";
  const Outcome learnt = Orrery(TinyRun(offline) + stored + set);
  ASSERT_EQ(learnt.code, 0) << learnt.output;
  EXPECT_THAT(learnt.output, HasSubstr("episodes 0, environment steps 0, updates 120"));
  EXPECT_THAT(learnt.output, HasSubstr("evaluation of point_pixels: mean return "));
  const std::vector<std::vector<std::string>> updates = Rows(offline + "/metrics.csv");
  ASSERT_EQ(updates.size(), 120u);
  EXPECT_LT(MeanLoss(updates, 100, 120), 0.8 * MeanLoss(updates, 0, 10));
  EXPECT_GE(FilmFrames(offline + "/film.webp"), 20) << learnt.output;
  EXPECT_FALSE(std::filesystem::exists(offline + "/replay"));

  // In two parts it comes to the same, and the data set is as it was.
  const Outcome first = Orrery(TinyRun(again) + stored + set + "--set learning.max_updates=70");
  ASSERT_EQ(first.code, 0) << first.output;
  const Outcome second =
      Orrery(absl::StrCat("train --threads=1 --resume --run_dir=", again, stored, "--set learning.max_updates=120"));
  ASSERT_EQ(second.code, 0) << second.output;
  ExpectSameModel(offline, again);
  const Outcome resumed = Orrery(absl::StrCat("train --threads=1 --resume --run_dir=", run, " --set learning.max_episodes=5"));
  EXPECT_EQ(resumed.code, 0) << resumed.output;

  const Outcome other = Orrery(TinyRun(dir / "other") + stored +
                               "--set environment.image_size=64 --set model.modalities[0].image.height=64"
                               " --set model.modalities[0].image.width=64");
  EXPECT_EQ(other.code, 1);
  EXPECT_THAT(other.output, HasSubstr("field \"image\" is uint8 [25, 32, 32, 3], the model expects uint8 [25, 64, 64, 3]"));
}

TEST(Train, EndsAfterTheMostUpdates) {
  const TempDir dir;
  const Outcome outcome = Orrery(TinyRun(dir / "run") + "--set learning.max_updates=45");
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  EXPECT_EQ(Rows(dir / "run/metrics.csv").size(), 45u) << "40 after the seed episodes, 5 of the next 10";
}

TEST(Bench, PrintsOneObjectPerLine) {
  const std::string sizes = " --json --repeats=1 --warm_up=0 --threads=2 --set model.deterministic_size=8"
                            " --set model.modalities[0].image.depth=1 --set learning.batch_size=3"
                            " --set learning.sequence_length=4 --set planner.cem.candidates=20 --set planner.cem.elites=2";
  const Outcome update = Orrery("bench learner" + sizes);
  ASSERT_EQ(update.code, 0) << update.output;
  const auto learner = nlohmann::json::parse(update.output);
  EXPECT_EQ(learner["what"], "update");
  EXPECT_EQ(learner["batch"], 3);
  EXPECT_EQ(learner["length"], 4);
  EXPECT_GT(learner["seconds"], 0);
  const Outcome plans = Orrery("bench planner --batch=1,3 --precision=bfloat16" + sizes);
  ASSERT_EQ(plans.code, 0) << plans.output;
  std::vector<int> batches;
  for (const absl::string_view line : absl::StrSplit(plans.output, '\n', absl::SkipEmpty())) {
    const auto plan = nlohmann::json::parse(line);
    EXPECT_EQ(plan["what"], "plan");
    EXPECT_EQ(plan["precision"], "bfloat16");
    batches.push_back(plan["batch"]);
  }
  EXPECT_EQ(batches, (std::vector<int>{1, 3}));
}

TEST(CommandLine, WrongOnesExitWithTwo) {
  for (const char* arguments : {"", "trian", "train --confg=x", "eval --algorithm=magic", "inspect", "inspect rolout",
                                "eval --episodes=0", "train --threads=-1", "bench", "bench planner --batch=0"}) {
    const Outcome outcome = Orrery(arguments);
    EXPECT_EQ(outcome.code, 2) << arguments;
    EXPECT_THAT(outcome.output, testing::StartsWith("orrery: error: "));
    EXPECT_EQ(std::count(outcome.output.begin(), outcome.output.end(), '\n'), 1) << outcome.output;
  }
}

TEST(CommandLine, HelpAndVersionExitWithZero) {
  EXPECT_EQ(Orrery("--help").code, 0);
  EXPECT_THAT(Orrery("train --help").output, HasSubstr("--run_dir"));
  EXPECT_THAT(Orrery("--version").output, HasSubstr("orrery 0."));
}

TEST(CommandLine, BadInputIsOneLineAndExitsWithOne) {
  const TempDir dir;
  ASSERT_OK(WriteFileAtomically(dir / "typo.textproto", "name: \"x\"\nenvironment { tusk: \"point_pixels\" }\n"));
  ASSERT_OK(WriteFileAtomically(dir / "damaged.safetensors", "not a snapshot"));
  const std::string config = SourceFile("configs/point_pixels.textproto");
  struct Case {
    std::string arguments;
    std::string names;
  };
  for (const Case& bad : std::vector<Case>{
           {absl::StrCat("train --config=", dir / "none.textproto"), "none.textproto"},
           {absl::StrCat("train --config=", dir / "typo.textproto"), "tusk"},
           {absl::StrCat("train --config=", config, " --run_dir=", dir / "a", " --set learning.batch_size=0"), "batch_size"},
           {absl::StrCat("train --config=", config, " --run_dir=", dir / "a", " --set environment.task=nope"), "nope"},
           {absl::StrCat("train --config=", config, " --run_dir=", dir / "a", " --store=nowhere"), "nowhere"},
           {absl::StrCat("train --resume --run_dir=", dir / "none"), "none"},
           {absl::StrCat("train --config=", config, " --run_dir=", dir / "b", " --offline"), "--store=LOCATION"},
           {absl::StrCat("train --config=", config, " --run_dir=", dir / "b", " --data_set=x"), "--data_set=x is for --offline"},
           {absl::StrCat("train --config=", config, " --run_dir=", dir / "b", " --offline --store=file:", dir / "none"), "none"},
           {absl::StrCat("train --config=", config, " --run_dir=", dir / "b", " --offline --store=file:", dir.path()),
            "data set \"point_pixels\" is not in the store"},
           {"eval --env=point_pixels", "--snapshot"},
           {absl::StrCat("eval --env=point_pixels --snapshot=", dir / "none"), "none"},
           {absl::StrCat("eval --env=point_pixels --snapshot=", dir / "damaged.safetensors"), "damaged.safetensors"},
           {absl::StrCat("inspect rollout --env=point_pixels --input=", dir / "damaged.safetensors", " --out=", dir / "o"),
            "damaged.safetensors"},
           {"eval --env=point_pixels --algorithm=random --drop=image", "does not look at observations"},
           {"doctor --redis=127.0.0.1:1", "missing"}}) {
    const Outcome outcome = Orrery(bad.arguments);
    EXPECT_EQ(outcome.code, 1) << bad.arguments << "\n" << outcome.output;
    EXPECT_THAT(outcome.output, HasSubstr("orrery: error: "));
    EXPECT_THAT(outcome.output, HasSubstr(bad.names));
  }
}

TEST(Eval, RandomActionsNeedNoPlanner) {
  const Outcome outcome = Orrery("eval --env=point_pixels --algorithm=random --episodes=3 --json");
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  const auto evaluated = nlohmann::json::parse(outcome.output);
  EXPECT_EQ(evaluated["returns"].size(), 3u);
  EXPECT_EQ(evaluated["rows"][0], 51);
}

TEST(Inspect, ShowsARollout) {
  const TempDir dir;
  // A safetensors file with action [2, 2] float32: zeros.
  const std::string header = R"({"action":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}})";
  std::string file(8, '\0');
  file[0] = static_cast<char>(header.size());
  ASSERT_OK(WriteFileAtomically(dir / "in", file + header + std::string(16, '\0')));
  const Outcome outcome = Orrery(absl::StrCat("inspect rollout --env=point_pixels --input=", dir / "in", " --out=", dir / "out"));
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  ASSERT_OK_AND_ASSIGN(const std::string out, ReadFile(dir / "out"));
  for (const char* part : {R"("reward":{)", R"("qpos":{)", R"("image":{)", "[3,64,64,3]", "F64"}) EXPECT_THAT(out, HasSubstr(part));
  const Outcome shown = Orrery(absl::StrCat("inspect snapshot ", dir / "in"));
  EXPECT_THAT(shown.output, HasSubstr("action"));
}

TEST(Doctor, FindsEverythingRequired) {
  const Outcome outcome = Orrery("doctor");
  EXPECT_EQ(outcome.code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, HasSubstr("LibTorch   2."));
  EXPECT_THAT(outcome.output, HasSubstr("MuJoCo     3."));
  EXPECT_THAT(outcome.output, HasSubstr("cartpole_balance simulates and renders"));
}

}  // namespace
}  // namespace orrery
