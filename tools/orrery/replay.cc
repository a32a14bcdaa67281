// orrery replay export|import|list|delete: experience as files, and the data sets of a store.
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/time/time.h"
#include "libs/base/status.h"
#include "libs/client/channel.h"
#include "libs/client/replay_client.h"
#include "libs/replay/store.h"
#include "tools/orrery/command.h"
#include "tools/orrery/replay_files.h"

namespace orrery {
namespace {

constexpr absl::Duration kListTimeout = absl::Seconds(60);

struct Flags {
  std::string replay, store, run, folder, episodes, mode;
  bool json = false, yes = false;
};

absl::StatusOr<std::optional<EpisodeMode>> ParseMode(const std::string& text) {
  if (text.empty()) return std::optional<EpisodeMode>();
  if (text == "random") return EpisodeMode::kRandom;
  if (text == "train") return EpisodeMode::kTrain;
  if (text == "evaluate") return EpisodeMode::kEvaluate;
  return absl::InvalidArgumentError(absl::StrCat("--mode=", text, ": expected random, train or evaluate"));
}

// "A-B" or "A".
absl::Status ParseEpisodes(const std::string& text, int64_t& first, int64_t& last) {
  if (text.empty()) return absl::OkStatus();
  const std::vector<std::string> parts = absl::StrSplit(text, '-');
  if (parts.size() <= 2 && absl::SimpleAtoi(parts.front(), &first) && absl::SimpleAtoi(parts.back(), &last) && first >= 1 &&
      first <= last) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("--episodes=", text, ": expected A-B or A with 1 <= A <= B"));
}

void PrintTotals(const std::string& done, const EpisodeTotals& totals) {
  std::cout << absl::StreamFormat("%s %d episodes, %d chunks, %d rows, %d bytes\n", done, totals.episodes, totals.chunks,
                                  totals.rows, totals.bytes);
}

absl::Status RunExport(const Flags& flags) {
  UnblockShutdownSignals();
  if (flags.replay.empty() == flags.store.empty()) {
    return absl::InvalidArgumentError("give one of --replay=HOST:PORT and --store=LOCATION");
  }
  ExportOptions options;
  options.run = flags.run;
  options.folder = flags.folder;
  RETURN_IF_ERROR(ParseEpisodes(flags.episodes, options.first, options.last));
  ASSIGN_OR_RETURN(options.mode, ParseMode(flags.mode));
  std::unique_ptr<Store> store;
  std::unique_ptr<ReplayClient> client;
  std::unique_ptr<EpisodeSource> source;
  if (flags.replay.empty()) {
    ASSIGN_OR_RETURN(store, OpenStore({.location = flags.store, .run = flags.run}));
    source = MakeStoreSource(store.get());
  } else {
    ASSIGN_OR_RETURN(std::shared_ptr<grpc::Channel> channel, MakeChannel(flags.replay));
    client = std::make_unique<ReplayClient>(std::move(channel), flags.run);
    source = MakeServiceSource(client.get());
  }
  ASSIGN_OR_RETURN(const EpisodeTotals totals, ExportEpisodes(*source, options));
  PrintTotals("exported", totals);
  return absl::OkStatus();
}

absl::Status RunImport(const Flags& flags) {
  UnblockShutdownSignals();
  ASSIGN_OR_RETURN(const std::unique_ptr<Store> store, OpenStore({.location = flags.store, .run = flags.run}));
  ASSIGN_OR_RETURN(const EpisodeTotals totals, ImportEpisodes(flags.folder, *store));
  PrintTotals("imported", totals);
  return absl::OkStatus();
}

absl::Status RunList(const Flags& flags) {
  UnblockShutdownSignals();
  ASSIGN_OR_RETURN(const std::vector<DataSetSummary> data_sets, ListDataSets(flags.store, kListTimeout));
  if (!flags.json) std::cout << absl::StreamFormat("%10s  %14s  %s\n", "chunks", "bytes", "run");
  for (const DataSetSummary& data_set : data_sets) {
    if (flags.json) {
      const nlohmann::ordered_json line = {{"run", data_set.run}, {"chunks", data_set.chunks}, {"bytes", data_set.bytes}};
      std::cout << line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
    } else {
      std::cout << absl::StreamFormat("%10d  %14d  %s\n", data_set.chunks, data_set.bytes, data_set.run);
    }
  }
  return absl::OkStatus();
}

absl::Status RunDelete(const Flags& flags) {
  UnblockShutdownSignals();
  if (!flags.yes) {
    return absl::InvalidArgumentError(absl::StrCat("nothing was deleted: with --yes experience, snapshot and state of run '",
                                                   flags.run, "' go for good"));
  }
  RETURN_IF_ERROR(DeleteDataSet({.location = flags.store, .run = flags.run}));
  std::cout << absl::StreamFormat("deleted the data set of run '%s'\n", flags.run);
  return absl::OkStatus();
}

CLI::Option* AddStore(CLI::App* command, Flags& flags) {
  return command->add_option("--store", flags.store, "Where the experience lives: file:FOLDER or redis://HOST:PORT")
      ->type_name("LOCATION");
}

CLI::Option* AddRun(CLI::App* command, Flags& flags) {
  return command->add_option("--run", flags.run, "Name of the run")->required();
}

}  // namespace

void AddReplayCommand(CLI::App& app, Command& command) {
  CLI::App* replay = app.add_subcommand("replay", "Experience as files, and the data sets of a store");
  replay->require_subcommand(1);
  auto flags = std::make_shared<Flags>();
  const auto on = [&command, flags](CLI::App* sub, absl::Status (*run)(const Flags&)) {
    sub->callback([&command, flags, run] { command = [flags, run] { return run(*flags); }; });
  };

  CLI::App* exporting = replay->add_subcommand("export", "Writes a safetensors file for each episode");
  exporting->add_option("--replay", flags->replay, "Replay service to read from")->type_name("HOST:PORT");
  AddStore(exporting, *flags);
  AddRun(exporting, *flags);
  exporting->add_option("--out", flags->folder, "Folder for the files, which has none yet")->type_name("FOLDER")->required();
  exporting->add_option("--episodes", flags->episodes, "Only these numbers (default: all)")->type_name("A-B");
  exporting->add_option("--mode", flags->mode, "Only random, train or evaluate (default: all)");
  on(exporting, RunExport);

  CLI::App* importing = replay->add_subcommand("import", "Puts the files of an export into a data set, with their numbers");
  importing->add_option("--in", flags->folder, "Folder of the files")->type_name("FOLDER")->required();
  AddStore(importing, *flags)->required();
  AddRun(importing, *flags);
  on(importing, RunImport);

  CLI::App* listing = replay->add_subcommand("list", "Lists the data sets of a store");
  AddStore(listing, *flags)->required();
  listing->add_flag("--json", flags->json, "Prints one JSON object a line");
  on(listing, RunList);

  CLI::App* deleting = replay->add_subcommand("delete", "Deletes a data set");
  AddStore(deleting, *flags)->required();
  AddRun(deleting, *flags);
  deleting->add_flag("--yes", flags->yes, "Deletes; without it nothing happens");
  on(deleting, RunDelete);
}

}  // namespace orrery
