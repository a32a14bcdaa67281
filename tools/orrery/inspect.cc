// orrery inspect: exact, scriptable views, from safetensors files to safetensors files.
#include <iostream>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"
#include "libs/config/config.h"
#include "libs/envs/rollout.h"
#include "libs/tensors/safetensors.h"
#include "libs/tensors/tensors.h"
#include "tools/orrery/command.h"
#include "tools/orrery/inspect_film.h"
#include "tools/orrery/inspect_model.h"
#include "tools/orrery/inspect_replay.h"

namespace orrery {
namespace {

struct RolloutFlags {
  std::string environment;
  std::string input;
  std::string out;
  std::string quality = "fast";
  int64_t seed = 0;
};

absl::Status RunRollout(const RolloutFlags& flags) {
  UnblockShutdownSignals();
  ASSIGN_OR_RETURN(const SafeTensors file, LoadSafeTensors(flags.input));
  RolloutInput input;
  input.seed = static_cast<uint64_t>(flags.seed);
  bool has_action = false;
  for (const auto& [name, tensor] : file.tensors) {
    absl::StatusOr<Array> array = ToArray(tensor);
    if (!array.ok()) return Annotate(array.status(), absl::StrCat(flags.input, ": ", name));
    if (name == "action") {
      input.action = *std::move(array);
      has_action = true;
    } else if (name == "qpos") {
      input.qpos = *std::move(array);
    } else if (name == "qvel") {
      input.qvel = *std::move(array);
    } else if (name == "target") {
      input.target = *std::move(array);
    } else {
      return absl::InvalidArgumentError(
          absl::StrCat(flags.input, ": unknown tensor '", name, "', expected action, qpos, qvel and target"));
    }
  }
  if (!has_action) return absl::InvalidArgumentError(absl::StrCat(flags.input, ": no tensor 'action' [T, A]"));
  ASSIGN_OR_RETURN(const ArrayMap result,
                   Rollout(flags.environment, input,
                           flags.quality == "reference" ? EnvironmentOptions::Quality::kReference
                                                        : EnvironmentOptions::Quality::kFast));
  SafeTensors out;
  for (const auto& [name, array] : result) out.tensors[name] = ToTorch(array);
  return SaveSafeTensors(flags.out, out);
}

void AddRollout(CLI::App& inspect, Command& command) {
  CLI::App* rollout = inspect.add_subcommand(
      "rollout", "Plays given actions step by step (action repeat 1) and writes rewards, states and pictures");
  auto flags = std::make_shared<RolloutFlags>();
  rollout->add_option("--env", flags->environment, "Task")->required();
  rollout->add_option("--input", flags->input, "action [T, A] in the task's own units; optionally qpos, qvel, target [2] (reacher_easy: "
                                               "metres; without it, where the task's file has it)")
      ->type_name("FILE")
      ->required();
  rollout->add_option("--out", flags->out, "reward, qpos, qvel, image and the other modalities")
      ->type_name("FILE")
      ->required();
  rollout->add_option("--quality", flags->quality, "Rendering: fast or reference")
      ->check(CLI::IsMember({"fast", "reference"}))
      ->capture_default_str();
  rollout->add_option("--seed", flags->seed, "Seed of the start, where qpos and qvel are not given")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  rollout->callback([&command, flags] { command = [flags] { return RunRollout(*flags); }; });
}

// Declares what every view of a model takes; the body runs with LibTorch's threads set.
template <typename Options>
void AddModelView(CLI::App* view, Command& command, std::shared_ptr<Options> options, const std::string& noise,
                  absl::Status (*body)(const Options&)) {
  view->add_option("--snapshot", options->snapshot, "Snapshot of the model")->type_name("FILE")->required();
  view->add_option("--out", options->out, "File to write")->type_name("FILE")->required();
  view->add_option("--noise", options->noise, noise)->type_name("FILE|zero|SEED")->capture_default_str();
  auto threads = std::make_shared<int>(0);
  AddThreadsFlag(*view, *threads);
  view->callback([&command, options, threads, body] {
    command = [options, threads, body] {
      UnblockShutdownSignals();
      SetTorchThreads(*threads);
      return body(*options);
    };
  });
}

void AddLoss(CLI::App& inspect, Command& command) {
  CLI::App* view = inspect.add_subcommand("loss", "The objective on a batch: outputs, terms, and gradients if asked");
  auto options = std::make_shared<InspectLossOptions>();
  view->add_option("--batch", options->batch, "Modalities [T, B, ...], action, reward, is_first")
      ->type_name("FILE")
      ->required();
  view->add_flag("--gradients", options->gradients, "Writes grad.PARAMETER too");
  view->add_option("--device", options->device, "cpu, cuda or cuda:N")->capture_default_str();
  AddModelView(view, command, options, "Standard normals: posterior [T, B, S], overshooting [distance + 1, T, B, S]",
               InspectLoss);
}

void AddPlan(CLI::App& inspect, Command& command) {
  CLI::App* view = inspect.add_subcommand("plan", "The plan from a belief: its means and deviations");
  auto options = std::make_shared<InspectPlanOptions>();
  view->add_option("--state", options->state, "deter [D], stoch [S]")->type_name("FILE")->required();
  view->add_option("--device", options->device, "cpu, cuda or cuda:N")->capture_default_str();
  AddModelView(view, command, options, "Standard normals: plan_action [I, H, J, A], plan_state [I, H, J, S]",
               InspectPlan);
}

void AddImagine(CLI::App& inspect, Command& command) {
  CLI::App* view = inspect.add_subcommand("imagine", "Sees some rows of a batch, then imagines the others");
  auto options = std::make_shared<InspectImagineOptions>();
  view->add_option("--batch", options->batch, "Modalities [T, B, ...], action, is_first")->type_name("FILE")->required();
  view->add_option("--context", options->context, "Rows that are seen")->check(CLI::Range(1, 1000))->capture_default_str();
  AddModelView(view, command, options, "Standard normals: posterior [T, B, S]; zero: means", InspectImagine);
}

void AddSnapshot(CLI::App& inspect, Command& command) {
  CLI::App* view = inspect.add_subcommand("snapshot", "Name, type, shape and norm of each tensor, and the metadata");
  auto path = std::make_shared<std::string>();
  view->add_option("snapshot", *path, "Snapshot")->type_name("FILE")->required();
  view->callback([&command, path] {
    command = [path] {
      UnblockShutdownSignals();
      return InspectSnapshot(*path, std::cout);
    };
  });
}

void AddFilm(CLI::App& inspect, Command& command) {
  CLI::App* view = inspect.add_subcommand("film", "A film of what came beside what the model predicts of it, open loop");
  auto options = std::make_shared<InspectFilmOptions>();
  view->add_option("--batch", options->batch, "As for imagine, or one episode (inspect replay --episode=N --out=FILE)")
      ->type_name("FILE")
      ->required();
  view->add_option("--context", options->context, "Rows that are seen")->check(CLI::Range(1, 1000))->capture_default_str();
  view->add_option("--first_row", options->first_row, "Row to begin with")->check(CLI::NonNegativeNumber)->capture_default_str();
  view->add_option("--rows", options->rows, "Rows to show")->check(CLI::Range(2, 10000))->capture_default_str();
  view->add_option("--samples", options->samples, "Predictions drawn, shown below their mean")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  view->add_flag("--per_action", options->per_action, "One prediction for each choice of a discrete action, repeated");
  view->add_flag("--still", options->still, "One picture, time from left to right");
  view->add_option("--modality", options->modality, "Picture to show (default: the model's first)");
  view->add_option("--zoom", options->zoom, "Size of a pixel")->check(CLI::Range(1, 16))->capture_default_str();
  AddModelView(view, command, options, "Seed of the samples; zero: means", InspectFilm);
}

struct ReplayFlags {
  std::string run_dir, store, run, rows;
  int64_t episode = 0;
  bool json = false;
};

absl::Status RunReplay(const ReplayFlags& flags, bool one_episode) {
  UnblockShutdownSignals();
  StoreOptions options{.location = flags.store, .run = flags.run};
  if (!flags.run_dir.empty()) {
    ASSIGN_OR_RETURN(const config::v1::Experiment experiment, LoadExperiment(flags.run_dir + "/config.textproto"));
    if (options.location.empty()) options.location = absl::StrCat("file:", flags.run_dir, "/replay");
    if (options.run.empty()) options.run = experiment.name();
  }
  if (options.location.empty() || options.run.empty()) {
    return absl::InvalidArgumentError("give --run_dir=FOLDER, or --store=LOCATION and --run=NAME");
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<Store> store, OpenStore(options));
  InspectReplayOptions view;
  view.json = flags.json;
  if (one_episode) view.episode = flags.episode;
  view.rows_out = flags.rows;
  return InspectReplay(*store, view, std::cout);
}

void AddReplay(CLI::App& inspect, Command& command) {
  CLI::App* replay = inspect.add_subcommand("replay", "Lists the episodes of a run's experience, or writes one's rows");
  auto flags = std::make_shared<ReplayFlags>();
  replay->add_option("--run_dir", flags->run_dir, "Folder of a run of `orrery train` that is not running")->type_name("FOLDER");
  replay->add_option("--store", flags->store, "Where the experience lives: file:FOLDER, redis://HOST:PORT or redis-cluster://HOST:PORT "
                                              "(default: file:RUN_DIR/replay)");
  replay->add_option("--run", flags->run, "Name of the run (default: the configuration's)");
  CLI::Option* episode = replay->add_option("--episode", flags->episode, "Writes the rows of this episode");
  CLI::Option* out = replay->add_option("--out", flags->rows, "Safetensors file for them")->type_name("FILE")->needs(episode);
  episode->needs(out);
  replay->add_flag("--json", flags->json, "Prints one JSON object a line");
  replay->callback([&command, flags, episode] {
    command = [flags, one = episode->count() > 0] { return RunReplay(*flags, one); };
  });
}

}  // namespace

void AddInspectCommand(CLI::App& app, Command& command) {
  CLI::App* inspect = app.add_subcommand("inspect", "Exact views of losses, plans, imagination, rollouts, snapshots and experience");
  inspect->require_subcommand(1);
  AddLoss(*inspect, command);
  AddPlan(*inspect, command);
  AddImagine(*inspect, command);
  AddFilm(*inspect, command);
  AddRollout(*inspect, command);
  AddSnapshot(*inspect, command);
  AddReplay(*inspect, command);
}

}  // namespace orrery
