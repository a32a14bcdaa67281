// `orrery bench`: how long the parts take on this machine. One line per measurement; with --json one object per line.
#include "tools/orrery/bench.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "libs/base/cpu.h"
#include "libs/base/status.h"
#include "libs/device/parse_device.h"
#include "libs/learning/complete_model.h"
#include "libs/learning/trainer.h"
#include "libs/planning/planner.h"
#include "libs/serving/engine.h"

namespace orrery {
namespace {

struct Flags : BenchFlags {
  std::string device = "cpu";
  std::vector<int> batches = {1, 8};
  std::string precision = "float32";
};

// PlaNet's sizes with six actions.
constexpr char kPaper[] = R"(
  name: "paper"
  environment { task: "cartpole_swingup" }
  model {
    action { continuous { size: 6 } }
    modalities { name: "image" image { channels: 3 height: 64 width: 64 depth: 32 } }
  })";

void Print(const Flags& flags, nlohmann::ordered_json result) {
  result["device"] = flags.device;
  result["threads"] = flags.threads;
  PrintResult(flags, result);
}

StoredBatch RandomBatch(const config::v1::Experiment& experiment) {
  const int64_t t = experiment.learning().sequence_length(), b = experiment.learning().batch_size();
  StoredBatch batch;
  for (const config::v1::Modality& modality : experiment.model().modalities()) {
    const auto& image = modality.image();
    batch.observations[modality.name()] =
        modality.has_image()
            ? at::randint(0, 256, {t, b, image.height(), image.width(), image.channels()}, at::kByte)
            : at::randn({t, b, modality.vector().size()});
  }
  batch.action = at::rand({t, b, ActionSize(experiment.model())}) * 2 - 1;
  batch.reward = at::rand({t, b});
  batch.is_first = at::zeros({t, b}, at::kByte);
  batch.is_terminal = at::zeros({t, b}, at::kByte);
  return batch;
}

absl::Status BenchLearner(Flags flags) {
  SetTorchThreads(1);
  flags.threads = ThreadsOf(flags.threads);
  ASSIGN_OR_RETURN(const config::v1::Experiment experiment, BenchExperiment(flags, kPaper));
  ASSIGN_OR_RETURN(const torch::Device device, ParseDevice(flags.device));
  ASSIGN_OR_RETURN(const std::unique_ptr<Trainer> trainer,
                   Trainer::Create(experiment.model(), experiment.learning(), /*seed=*/0, device, flags.threads,
                                   flags.precision == "bfloat16"));
  const StoredBatch batch = RandomBatch(experiment);
  ASSIGN_OR_RETURN(const double seconds, MedianSeconds(flags, [&] { return trainer->Update(batch).status(); }));
  Print(flags, {{"what", "update"},
                {"batch", experiment.learning().batch_size()},
                {"length", experiment.learning().sequence_length()},
                {"seconds", seconds},
                {"precision", flags.precision}});
  return absl::OkStatus();
}

absl::Status BenchPlanner(Flags flags) {
  flags.threads = ThreadsOf(flags.threads);
  SetTorchThreads(1);
  ASSIGN_OR_RETURN(const config::v1::Experiment experiment, BenchExperiment(flags, kPaper));
  ASSIGN_OR_RETURN(const torch::Device device, ParseDevice(flags.device));
  ASSIGN_OR_RETURN(const std::shared_ptr<WorldModel> model, WorldModel::Create(experiment.model(), /*seed=*/0));
  model->to(device);
  model->UseWorkers(std::make_shared<RowWorkers>(flags.threads));
  if (flags.precision == "bfloat16") model->UseBfloat16();
  ASSIGN_OR_RETURN(const std::unique_ptr<Planner> planner, MakePlanner(experiment.planner(), experiment.model()));
  torch::NoGradGuard no_grad;
  for (const int agents : flags.batches) {
    const LatentState belief = model->InitialState(agents);
    std::vector<uint64_t> seeds(agents);
    for (int i = 0; i < agents; ++i) seeds[i] = static_cast<uint64_t>(i);
    ASSIGN_OR_RETURN(const double seconds, MedianSeconds(flags, [&]() -> absl::Status {
                       ASSIGN_OR_RETURN(const PlanResult plan, planner->Plan(*model, {belief, seeds}));
                       (void)plan.action.cpu();  // waits for the device
                       return absl::OkStatus();
                     }));
    Print(flags, {{"what", "plan"}, {"batch", agents}, {"seconds", seconds}, {"precision", flags.precision}});
  }
  return absl::OkStatus();
}

// A part that computes with a model.
CLI::App* AddModelPart(CLI::App& bench, Command& command, const std::string& name, const std::string& what,
                       std::shared_ptr<Flags> flags, absl::Status (*body)(Flags)) {
  CLI::App* part = bench.add_subcommand(name, what);
  AddExperimentFlags(*part, *flags, "PlaNet's sizes with 6 actions");
  part->add_option("--device", flags->device, "cpu, cuda or cuda:N")->capture_default_str();
  AddRepeatFlags(*part, *flags);
  AddThreadsFlag(*part, flags->threads, "Threads that compute");
  FinishPart(*part, command, *flags, [flags, body] { return body(*flags); });
  return part;
}

}  // namespace

void AddRepeatFlags(CLI::App& part, BenchFlags& flags) {
  part.add_option("--warm_up", flags.warm_up, "Calls before the measured ones")
      ->check(CLI::Range(0, 1000000))
      ->capture_default_str();
  part.add_option("--repeats", flags.repeats, "Measured calls; the median is printed")
      ->check(CLI::Range(1, 1000000))
      ->capture_default_str();
}

void AddExperimentFlags(CLI::App& part, BenchFlags& flags, const std::string& instead) {
  part.add_option("--config", flags.config, absl::StrCat("Experiment (default: ", instead, ")"))->type_name("FILE");
  part.add_option("--set", flags.set, "Sets one field of the experiment; may be repeated")
      ->type_name("KEY=VALUE")
      ->allow_extra_args(false);
}

void FinishPart(CLI::App& part, Command& command, BenchFlags& flags, std::function<absl::Status()> body) {
  part.add_flag("--json", flags.json, "One JSON object per line");
  part.callback([&command, body = std::move(body)] {
    command = [body] {
      UnblockShutdownSignals();
      return body();
    };
  });
}

absl::StatusOr<config::v1::Experiment> BenchExperiment(const BenchFlags& flags, const std::string& instead) {
  if (!flags.config.empty()) {
    ASSIGN_OR_RETURN(const config::v1::Experiment loaded, LoadExperiment(flags.config, flags.set));
    return CompleteExperiment(loaded);
  }
  ASSIGN_OR_RETURN(config::v1::Experiment experiment, ParseExperiment(instead));
  for (const std::string& assignment : flags.set) RETURN_IF_ERROR(SetField(experiment, assignment));
  RETURN_IF_ERROR(Validate(experiment));
  return CompleteExperiment(experiment);
}

absl::StatusOr<double> MedianSeconds(const BenchFlags& flags, const std::function<absl::Status()>& call) {
  std::vector<double> seconds;
  for (int i = 0; i < flags.warm_up + flags.repeats; ++i) {
    const absl::Time begin = absl::Now();
    RETURN_IF_ERROR(call());
    if (i >= flags.warm_up) seconds.push_back(absl::ToDoubleSeconds(absl::Now() - begin));
  }
  std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
  return seconds[seconds.size() / 2];
}

double Quantile(std::vector<double> values, double q) {
  const double rank = std::ceil(q * static_cast<double>(values.size()));
  const size_t index = static_cast<size_t>(std::max(rank, 1.0)) - 1;
  const auto at = values.begin() + static_cast<std::ptrdiff_t>(std::min(index, values.size() - 1));
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

void PrintResult(const BenchFlags& flags, const nlohmann::ordered_json& result) {
  if (flags.json) {
    std::printf("%s\n", result.dump().c_str());
  } else {
    std::string line;
    for (const auto& [key, value] : result.items())
      absl::StrAppend(&line, line.empty() ? "" : "  ", key, " ", value.is_string() ? value.get<std::string>() : value.dump());
    std::printf("%s\n", line.c_str());
  }
  std::fflush(stdout);
}

void AddBenchCommand(CLI::App& app, Command& command) {
  CLI::App* bench = app.add_subcommand("bench", "Measures the parts on this machine");
  bench->require_subcommand(1);
  const auto add_precision = [](CLI::App* part, Flags& flags, const char* help) {
    part->add_option("--precision", flags.precision, help)->check(CLI::IsMember({"float32", "bfloat16"}))->capture_default_str();
  };
  const auto learner_flags = std::make_shared<Flags>();
  CLI::App* learner = AddModelPart(*bench, command, "learner", "Seconds of one update", learner_flags, BenchLearner);
  add_precision(learner, *learner_flags, "float32 or bfloat16 (on CUDA, of convolutions)");
  const auto flags = std::make_shared<Flags>();
  CLI::App* planner = AddModelPart(*bench, command, "planner", "Seconds of one plan", flags, BenchPlanner);
  add_precision(planner, *flags, "float32 or bfloat16 (on the CPU, where it has AVX512-BF16)");
  planner->add_option("--batch", flags->batches, "Agents planned for together; several, separated by commas")
      ->delimiter(',')
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  AddReplayBench(*bench, command);
  AddLoadBench(*bench, command);
  AddEnvironmentBench(*bench, command);
}

}  // namespace orrery
