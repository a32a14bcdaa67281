// orrery inspect: exact, scriptable views, from safetensors files to safetensors files.
#include <iostream>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"
#include "libs/envs/rollout.h"
#include "libs/tensors/safetensors.h"
#include "libs/tensors/tensors.h"
#include "tools/orrery/command.h"
#include "tools/orrery/inspect_model.h"

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
    } else {
      return absl::InvalidArgumentError(
          absl::StrCat(flags.input, ": unknown tensor '", name, "', expected action, qpos and qvel"));
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
  rollout->add_option("--input", flags->input, "action [T, A] in the task's own units; optionally qpos, qvel")
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
  AddModelView(view, command, options, "Standard normals: posterior [T, B, S], overshooting [distance + 1, T, B, S]",
               InspectLoss);
}

void AddPlan(CLI::App& inspect, Command& command) {
  CLI::App* view = inspect.add_subcommand("plan", "The plan from a belief: its means and deviations");
  auto options = std::make_shared<InspectPlanOptions>();
  view->add_option("--state", options->state, "deter [D], stoch [S]")->type_name("FILE")->required();
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

}  // namespace

void AddInspectCommand(CLI::App& app, Command& command) {
  CLI::App* inspect = app.add_subcommand("inspect", "Exact views of losses, plans, imagination, rollouts and snapshots");
  inspect->require_subcommand(1);
  AddLoss(*inspect, command);
  AddPlan(*inspect, command);
  AddImagine(*inspect, command);
  AddRollout(*inspect, command);
  AddSnapshot(*inspect, command);
}

}  // namespace orrery
