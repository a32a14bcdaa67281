// orrery train: the whole loop in one process.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "libs/base/cpu.h"
#include "libs/base/file.h"
#include "libs/base/log.h"
#include "libs/base/random.h"
#include "libs/base/shutdown.h"
#include "libs/base/status.h"
#include "libs/config/config.h"
#include "libs/envs/tasks.h"
#include "libs/learning/complete_model.h"
#include "libs/planning/planner.h"
#include "libs/world_model/snapshot.h"
#include "tools/orrery/command.h"
#include "tools/orrery/episode_film.h"
#include "tools/orrery/policy.h"
#include "tools/orrery/training_run.h"

namespace orrery {
namespace {

struct Flags {
  std::string config;
  std::vector<std::string> set;
  std::string run_dir;
  std::string store;
  std::string data_set;
  std::string metrics_listen;
  std::string device = "cpu";
  bool resume = false;
  bool offline = false;
  int threads = 0;
};

absl::Status CheckFlags(const Flags& flags) {
  if (flags.offline && flags.store.empty()) {
    return absl::InvalidArgumentError("--offline learns from what is stored: say where with --store=LOCATION");
  }
  if (!flags.offline && !flags.data_set.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("--data_set=", flags.data_set, " is for --offline"));
  }
  return absl::OkStatus();
}

// The configuration and its folder: --config, or when resuming what the folder holds.
struct Plan {
  config::v1::Experiment experiment;
  std::string run_dir;
};

absl::StatusOr<Plan> MakePlan(const Flags& flags) {
  Plan plan;
  std::string config = flags.config;
  if (config.empty()) {
    if (!flags.resume || flags.run_dir.empty()) {
      return absl::InvalidArgumentError("give --config=FILE, or --resume with --run_dir=FOLDER");
    }
    config = flags.run_dir + "/config.textproto";
  }
  ASSIGN_OR_RETURN(const config::v1::Experiment loaded, LoadExperiment(config, flags.set));
  ASSIGN_OR_RETURN(plan.experiment, CompleteExperiment(loaded));
  plan.run_dir = flags.run_dir.empty()
                     ? absl::StrCat("runs/", plan.experiment.name(), "-", plan.experiment.seed())
                     : flags.run_dir;
  std::error_code error;
  const bool occupied = std::filesystem::exists(plan.run_dir, error) && !std::filesystem::is_empty(plan.run_dir, error);
  if (occupied && !flags.resume) {
    return absl::FailedPreconditionError(absl::StrCat(
        plan.run_dir, " holds a run already: give --resume to go on with it, or another folder with --run_dir"));
  }
  if (flags.resume && !occupied) {
    return absl::NotFoundError(absl::StrCat(plan.run_dir, " holds no run that could be resumed"));
  }
  return plan;
}

// Shows the state of a run on standard error: one line rewritten on a terminal, else a line every few seconds.
class ProgressLine {
 public:
  explicit ProgressLine(const config::v1::Experiment& experiment)
      : learning_(experiment.learning()),
        seed_episodes_(experiment.collection().seed_episodes()),
        terminal_(isatty(STDERR_FILENO) == 1) {}

  void Show(const RunTotals& totals, const Learner::Progress& progress) {
    const absl::Time now = absl::Now();
    if (now < next_) return;
    const double seconds = absl::ToDoubleSeconds(now - last_);
    // While episodes are collected, the rate of the last updates stands.
    if (progress.updates > last_updates_ && last_updates_ >= 0) {
      updates_per_second_ = static_cast<double>(progress.updates - last_updates_) / seconds;
    }
    last_ = now;
    last_updates_ = progress.updates;
    next_ = now + (terminal_ ? absl::Milliseconds(500) : absl::Seconds(5));
    ProgressView view;
    view.totals = totals;
    if (learning_.has_max_episodes()) view.max_episodes = learning_.max_episodes();
    view.updates = progress.updates;
    view.updates_per_second = updates_per_second_;
    if (progress.loss != 0) view.loss = progress.loss;
    view.seconds_left = SecondsLeft(totals, now);
    std::fprintf(stderr, terminal_ ? "\r%s\x1b[K" : "%s\n", FormatProgress(view).c_str());
    std::fflush(stderr);
  }
  void End() {
    if (terminal_) std::fputc('\n', stderr);
  }

 private:
  std::optional<double> SecondsLeft(const RunTotals& totals, absl::Time now) {
    std::optional<double> left;
    if (learning_.has_max_seconds()) {
      left = static_cast<double>(learning_.max_seconds()) - absl::ToDoubleSeconds(now - begin_);
    }
    if (learning_.has_max_updates() && updates_per_second_ > 0) {
      const double by_updates = static_cast<double>(learning_.max_updates() - last_updates_) / updates_per_second_;
      left = std::min(left.value_or(by_updates), by_updates);
    }
    // Seed episodes are quick: the pace counts from their end.
    if (totals.episodes < seed_episodes_) return left;
    if (paced_since_ == absl::InfinitePast()) {
      paced_since_ = now;
      episodes_before_ = totals.episodes;
    }
    const int64_t played = totals.episodes - episodes_before_;
    if (learning_.has_max_episodes() && played > 0) {
      const double to_play = static_cast<double>(learning_.max_episodes() - totals.episodes);
      const double by_episodes = absl::ToDoubleSeconds(now - paced_since_) / static_cast<double>(played) * to_play;
      left = std::min(left.value_or(by_episodes), by_episodes);
    }
    return left;
  }

  const config::v1::Learning learning_;
  const int64_t seed_episodes_;
  const bool terminal_;
  const absl::Time begin_ = absl::Now();
  absl::Time paced_since_ = absl::InfinitePast();
  int64_t episodes_before_ = 0;
  absl::Time last_ = absl::Now();
  absl::Time next_ = absl::Now();
  int64_t last_updates_ = -1;
  double updates_per_second_ = 0;
};

// True when a signal ended it.
bool Watch(TrainingRun& run, const config::v1::Experiment& experiment) {
  const config::v1::Learning& learning = experiment.learning();
  const absl::Time end =
      learning.has_max_seconds() ? absl::Now() + absl::Seconds(learning.max_seconds()) : absl::InfiniteFuture();
  ProgressLine line(experiment);
  bool signalled = false;
  while (run.Running() && absl::Now() < end && !signalled) {
    line.Show(run.totals(), run.progress());
    signalled = WaitForShutdownSignal(absl::Milliseconds(200)) != 0;
  }
  line.End();
  return signalled;
}

absl::Status MakeFilm(const config::v1::Experiment& experiment, const std::string& snapshot, const std::string& path) {
  ASSIGN_OR_RETURN(const ModelSnapshot loaded, LoadSnapshot(snapshot));
  ASSIGN_OR_RETURN(std::unique_ptr<Planner> planner, MakePlanner(experiment.planner(), loaded.info.model));
  ASSIGN_OR_RETURN(const std::vector<EnvironmentOptions> tasks, TaskOptions(experiment.environment()));
  ASSIGN_OR_RETURN(std::unique_ptr<Environment> environment, MakeEnvironment(tasks[0]));
  EpisodeFilmOptions options;
  options.seed = DeriveSeed(static_cast<uint64_t>(experiment.seed()), "film");
  ASSIGN_OR_RETURN(const std::string film, FilmEpisode(*loaded.model, *planner, *environment, options));
  return WriteFileAtomically(path, film);
}

// Plays the tasks that this program knows by the newest snapshot, and prints their returns.
absl::Status PlayEvaluation(TrainingRun& run, const config::v1::Experiment& experiment) {
  const absl::StatusOr<std::vector<EnvironmentOptions>> tasks = TaskOptions(experiment.environment());
  if (absl::IsNotFound(tasks.status())) {
    LogWarning("no evaluation: {}", tasks.status().ToString());
    return absl::OkStatus();
  }
  RETURN_IF_ERROR(tasks.status());
  RETURN_IF_ERROR(run.ServeNewest());
  for (const EnvironmentOptions& task : *tasks) {
    const absl::StatusOr<std::unique_ptr<Environment>> environment = MakeEnvironment(task);
    if (absl::IsNotFound(environment.status())) {
      LogWarning("no evaluation: {}", environment.status().ToString());
      continue;
    }
    RETURN_IF_ERROR(environment.status());
    PlannerPolicy policy(run.Channel(), (*environment)->spec().action);
    ASSIGN_OR_RETURN(const Evaluation evaluation, Evaluate(**environment, policy, experiment.evaluation().episodes(),
                                                           static_cast<uint64_t>(experiment.seed())));
    std::printf("evaluation of %s: mean return %.1f, deviation %.1f, episodes %zu\n", task.task.c_str(),
                Mean(evaluation.returns), SampleDeviation(evaluation.returns), evaluation.returns.size());
  }
  return absl::OkStatus();
}

void PrintSummary(const RunTotals& totals, const Learner::Progress& progress, const Plan& plan,
                  const std::string& snapshot) {
  std::printf("episodes %lld, environment steps %lld, updates %lld\n", static_cast<long long>(totals.episodes),
              static_cast<long long>(totals.environment_steps), static_cast<long long>(progress.updates));
  if (totals.best_return.has_value()) std::printf("best return while collecting %.1f\n", *totals.best_return);
  if (totals.evaluation_return.has_value()) std::printf("last evaluation return %.1f\n", *totals.evaluation_return);
  std::printf("run folder %s\nsnapshot %s\n", plan.run_dir.c_str(), snapshot.c_str());
}

absl::Status Run(const Flags& flags) {
  SetTorchThreads(1);
  RETURN_IF_ERROR(CheckFlags(flags));
  ASSIGN_OR_RETURN(const Plan plan, MakePlan(flags));
  RETURN_IF_ERROR(MakeDirectory(plan.run_dir));
  const config::v1::Learning& learning = plan.experiment.learning();
  if (flags.offline && !learning.has_max_updates() && !learning.has_max_seconds()) {
    return absl::InvalidArgumentError(
        "--offline plays no episodes, so learning.max_episodes does not end it: set learning.max_updates or learning.max_seconds");
  }
  TrainingRun::Options options;
  options.experiment = plan.experiment;
  options.run_dir = plan.run_dir;
  options.store = flags.store.empty() ? absl::StrCat("file:", plan.run_dir, "/replay") : flags.store;
  if (flags.offline) options.offline_data_set = flags.data_set.empty() ? plan.experiment.name() : flags.data_set;
  options.metrics_listen = flags.metrics_listen;
  options.device = flags.device;
  options.threads = ThreadsOf(flags.threads);
  options.resume = flags.resume;
  ASSIGN_OR_RETURN(std::unique_ptr<TrainingRun> run, TrainingRun::Create(std::move(options)));
  RETURN_IF_ERROR(WriteFileAtomically(plan.run_dir + "/config.textproto", ToText(plan.experiment)));

  run->Start();
  const bool signalled = Watch(*run, plan.experiment);
  if (signalled) std::fprintf(stderr, "stopping: saving a checkpoint\n");
  RETURN_IF_ERROR(run->EndLearning());
  absl::Status evaluated;
  if (flags.offline && !signalled) {
    UnblockShutdownSignals();  // everything is saved
    evaluated = PlayEvaluation(*run, plan.experiment);
  }
  RETURN_IF_ERROR(run->Stop());
  RETURN_IF_ERROR(Annotate(evaluated, "evaluation"));
  PrintSummary(run->totals(), run->progress(), plan, run->snapshot_path());
  if (signalled) return absl::OkStatus();
  const std::string film = plan.run_dir + "/film.webp";
  const absl::Status filmed = MakeFilm(plan.experiment, run->snapshot_path(), film);
  if (absl::IsNotFound(filmed)) {
    LogWarning("no film: {}", filmed.ToString());  // nothing to see in this task, or offline a task of elsewhere
    return absl::OkStatus();
  }
  RETURN_IF_ERROR(filmed);
  std::printf("film %s (above: seen, below: imagined)\n", film.c_str());
  return absl::OkStatus();
}

}  // namespace

void AddTrainCommand(CLI::App& app, Command& command) {
  CLI::App* train = app.add_subcommand("train", "Trains an agent: replay, learner, planner and actor in one process");
  auto flags = std::make_shared<Flags>();
  train->add_option("--config", flags->config, "Experiment (default with --resume: the run folder's)")->type_name("FILE");
  train->add_option("--set", flags->set, "Sets one field of the experiment; may be repeated")
      ->type_name("KEY=VALUE")
      ->allow_extra_args(false);
  train->add_option("--run_dir", flags->run_dir, "Folder of the run (default: runs/NAME-SEED)")->type_name("FOLDER");
  train->add_flag("--resume", flags->resume, "Goes on with the run in --run_dir");
  train->add_option("--store", flags->store, "Where the experience lives: file:FOLDER, memory:, redis://HOST:PORT or redis-cluster://HOST:PORT "
                                             "(default: file:RUN_DIR/replay)");
  train->add_flag("--offline", flags->offline,
                  "Learns from a data set in --store alone; plays only an evaluation at the end");
  train->add_option("--data_set", flags->data_set,
                    "Name of the run that collected it or under which it was imported (with --offline; default: the experiment's)")
      ->type_name("NAME");
  train->add_option("--metrics_listen", flags->metrics_listen, "HOST:PORT for /metrics (default: none)");
  train->add_option("--device", flags->device, "cpu, cuda or cuda:N")->capture_default_str();
  AddThreadsFlag(*train, flags->threads, "Threads that share an update");
  train->callback([&command, flags] { command = [flags] { return Run(*flags); }; });
}

}  // namespace orrery
