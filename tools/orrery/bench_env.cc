// `orrery bench env`: how fast tasks are simulated and drawn.
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "libs/base/cpu.h"
#include "libs/base/status.h"
#include "libs/envs/simulator.h"
#include "tools/orrery/bench.h"

namespace orrery {
namespace {

struct Flags : BenchFlags {
  std::vector<std::string> tasks = {"cartpole_swingup"};
  std::string quality = "fast";
  int size = 64;
  int steps = 2000;
  int frames = 50;
};

// Random actions in one simulator, which begins anew at its time limit and where the simulation becomes invalid.
class RandomPlay {
 public:
  RandomPlay(std::unique_ptr<Simulator> simulator, uint64_t seed) : simulator_(std::move(simulator)), random_(seed) {}

  absl::Status Step(int count) {
    for (int i = 0; i < count; ++i) {
      if (steps_left_ == 0) {
        RETURN_IF_ERROR(simulator_->Reset(random_()));
        steps_left_ = simulator_->time_limit();
      }
      action_.clear();
      for (const auto& [low, high] : simulator_->action_range()) {
        action_.push_back(std::uniform_real_distribution<double>(low, high)(random_));
      }
      const absl::Status status = simulator_->Step(action_).status();
      if (!status.ok() && !absl::IsOutOfRange(status)) return status;
      steps_left_ = status.ok() ? steps_left_ - 1 : 0;
    }
    return absl::OkStatus();
  }

  // Pictures of a state that was not drawn before.
  absl::Status Draw(int count) {
    RETURN_IF_ERROR(Step(1));
    for (int i = 0; i < count; ++i) RETURN_IF_ERROR(simulator_->Image().status());
    return absl::OkStatus();
  }

 private:
  std::unique_ptr<Simulator> simulator_;
  std::mt19937_64 random_;
  std::vector<double> action_;
  int steps_left_ = 0;
};

// `steps` steps in each, every one on a thread of its own; the first error.
absl::Status StepAll(std::vector<RandomPlay>& plays, int steps) {
  std::vector<absl::Status> results(plays.size());
  std::vector<std::thread> threads;
  for (size_t i = 1; i < plays.size(); ++i) {
    threads.emplace_back([&, i] { results[i] = plays[i].Step(steps); });
  }
  results[0] = plays[0].Step(steps);
  for (std::thread& thread : threads) thread.join();
  for (const absl::Status& result : results) RETURN_IF_ERROR(result);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<RandomPlay>> MakePlays(const Flags& flags, const std::string& task, int count) {
  const auto quality =
      flags.quality == "reference" ? EnvironmentOptions::Quality::kReference : EnvironmentOptions::Quality::kFast;
  std::vector<RandomPlay> plays;
  for (int i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(std::unique_ptr<Simulator> simulator, MakeSimulator(task, flags.size, quality));
    plays.emplace_back(std::move(simulator), static_cast<uint64_t>(i));
  }
  return plays;
}

absl::Status BenchSteps(const Flags& flags, const std::string& task, int threads) {
  ASSIGN_OR_RETURN(std::vector<RandomPlay> plays, MakePlays(flags, task, threads));
  ASSIGN_OR_RETURN(const double seconds, MedianSeconds(flags, [&] { return StepAll(plays, flags.steps); }));
  PrintResult(flags, {{"what", "step"},
                      {"task", task},
                      {"threads", threads},
                      {"steps_per_second", static_cast<double>(flags.steps) * threads / seconds}});
  return absl::OkStatus();
}

absl::Status BenchPictures(const Flags& flags, const std::string& task, int threads) {
  ASSIGN_OR_RETURN(std::vector<RandomPlay> plays, MakePlays(flags, task, 1));
  ASSIGN_OR_RETURN(const double seconds, MedianSeconds(flags, [&] { return plays[0].Draw(flags.frames); }));
  PrintResult(flags, {{"what", "render"},
                      {"task", task},
                      {"quality", flags.quality},
                      {"size", flags.size},
                      {"threads", threads},
                      {"frames_per_second", flags.frames / seconds}});
  return absl::OkStatus();
}

absl::Status Run(const Flags& flags) {
  const int threads = ThreadsOf(flags.threads);
  // A process draws one picture at a time, each on as many threads of Mesa's as this says (0: on none but the caller's).
  // Mesa reads it when the first picture is drawn.
  setenv("LP_NUM_THREADS", threads == 1 ? "0" : absl::StrCat(threads).c_str(), /*overwrite=*/1);
  for (const std::string& task : flags.tasks) {
    RETURN_IF_ERROR(BenchPictures(flags, task, threads));
    RETURN_IF_ERROR(BenchSteps(flags, task, 1));
    if (threads > 1) RETURN_IF_ERROR(BenchSteps(flags, task, threads));
  }
  return absl::OkStatus();
}

}  // namespace

void AddEnvironmentBench(CLI::App& bench, Command& command) {
  CLI::App* part = bench.add_subcommand("env", "Steps and pictures per second of tasks");
  const auto flags = std::make_shared<Flags>();
  part->add_option("--task", flags->tasks, "Tasks, separated by commas")->delimiter(',')->capture_default_str();
  part->add_option("--quality", flags->quality, "Rendering: fast or reference")
      ->check(CLI::IsMember({"fast", "reference"}))
      ->capture_default_str();
  part->add_option("--size", flags->size, "Height and width of the pictures")->capture_default_str();
  part->add_option("--steps", flags->steps, "Simulator steps of one measured call, on each thread")
      ->check(CLI::Range(1, 100000000))
      ->capture_default_str();
  part->add_option("--frames", flags->frames, "Pictures of one measured call")
      ->check(CLI::Range(1, 1000000))
      ->capture_default_str();
  AddRepeatFlags(*part, *flags);
  AddThreadsFlag(*part, flags->threads,
                 "Threads that draw a picture (a process draws one at a time) and that step, one environment each, beside a "
                 "measurement of steps on one");
  FinishPart(*part, command, *flags, [flags] { return Run(*flags); });
}

}  // namespace orrery
