// What the parts of `orrery bench` share: flags, medians, one line per measurement.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "libs/config/config.h"
#include "tools/orrery/command.h"

namespace orrery {

// Each part declares those it has a use for.
struct BenchFlags {
  std::string config;
  std::vector<std::string> set;
  int warm_up = 2;
  int repeats = 5;
  int threads = 0;
  bool json = false;
};

// --warm_up and --repeats.
void AddRepeatFlags(CLI::App& part, BenchFlags& flags);
// --config and --set; `instead` says what is used without --config.
void AddExperimentFlags(CLI::App& part, BenchFlags& flags, const std::string& instead);
// --json, and `body` to run when this part is named on the command line.
void FinishPart(CLI::App& part, Command& command, BenchFlags& flags, std::function<absl::Status()> body);

// The experiment of --config, or else of the text proto `instead`, with the --set assignments; its model complete.
absl::StatusOr<config::v1::Experiment> BenchExperiment(const BenchFlags& flags, const std::string& instead);

// Median seconds of one call, after a warm-up.
absl::StatusOr<double> MedianSeconds(const BenchFlags& flags, const std::function<absl::Status()>& call);
// The smallest value that at least the share `q` of the values do not exceed; `values` not empty, `q` in (0, 1].
double Quantile(std::vector<double> values, double q);
// One line: an object, or without --json its keys and values.
void PrintResult(const BenchFlags& flags, const nlohmann::ordered_json& result);

// The parts, each in its own file.
void AddReplayBench(CLI::App& bench, Command& command);
void AddLoadBench(CLI::App& bench, Command& command);
void AddEnvironmentBench(CLI::App& bench, Command& command);

}  // namespace orrery
