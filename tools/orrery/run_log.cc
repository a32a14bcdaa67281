#include "tools/orrery/run_log.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "libs/base/file.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/replay/chunk_text.h"

namespace orrery {
namespace {

constexpr char kEpisodeHeader[] = "episode,mode,end,task,rows,return,environment_steps,updates,seconds\n";
constexpr int kEpisodeColumns = 9;
constexpr int kEventsEveryUpdates = 10;

std::string Minutes(double seconds) {
  const int64_t s = std::llround(std::max(0.0, seconds));
  return s < 3600 ? absl::StrFormat("%d:%02d", s / 60, s % 60)
                  : absl::StrFormat("%d:%02d:%02d", s / 3600, s / 60 % 60, s % 60);
}

}  // namespace

absl::StatusOr<std::unique_ptr<RunLog>> RunLog::Open(const std::string& folder, int64_t updates, double steps_per_row) {
  std::unique_ptr<RunLog> log(new RunLog(steps_per_row));
  absl::MutexLock lock(&log->mu_);
  std::vector<std::string> columns;
  for (const std::string& term : LossTerms()) columns.push_back("loss_" + term);
  columns.insert(columns.end(), {"gradient_norm", "update_seconds", "batch_wait_seconds", "environment_steps"});
  ASSIGN_OR_RETURN(log->metrics_, CsvLog::Open(folder + "/metrics.csv", std::move(columns), updates));
  ASSIGN_OR_RETURN(log->events_, EventLog::Create(folder, updates + 1, absl::Now()));
  RETURN_IF_ERROR(log->OpenEpisodes(folder + "/episodes.csv"));
  return log;
}

RunLog::~RunLog() {
  absl::MutexLock lock(&mu_);
  if (episodes_ != nullptr) std::fclose(episodes_);
}

absl::Status RunLog::OpenEpisodes(const std::string& path) {
  std::string kept = kEpisodeHeader;
  absl::StatusOr<std::string> old = ReadFile(path);
  if (!old.ok() && !absl::IsNotFound(old.status())) return old.status();
  if (old.ok()) {
    const std::vector<absl::string_view> lines = absl::StrSplit(*old, '\n');
    // The last piece has no line end: empty, or cut short by a crash.
    for (size_t i = 1; i + 1 < lines.size(); ++i) {
      const std::vector<absl::string_view> cells = absl::StrSplit(lines[i], ',');
      double episode_return = 0, seconds = 0;
      int64_t steps = 0;
      if (cells.size() != kEpisodeColumns || !absl::SimpleAtod(cells[5], &episode_return) ||
          !absl::SimpleAtoi(cells[6], &steps) || !absl::SimpleAtod(cells[8], &seconds)) {
        continue;
      }
      absl::StrAppend(&kept, lines[i], "\n");
      Count(std::string(cells[1]), episode_return, steps, seconds);
    }
  }
  seconds_before_ = totals_.seconds;
  RETURN_IF_ERROR(WriteFileAtomically(path, kept));
  episodes_ = std::fopen(path.c_str(), "a");
  if (episodes_ == nullptr) return absl::UnknownError(absl::StrCat("cannot open ", path, ": ", std::strerror(errno)));
  return absl::OkStatus();
}

void RunLog::Count(const std::string& mode, double episode_return, int64_t steps, double seconds) {
  totals_.environment_steps = steps;
  totals_.seconds = seconds;
  if (mode == "evaluate") {
    totals_.evaluation_return = episode_return;
    return;
  }
  totals_.episodes += 1;
  totals_.last_return = episode_return;
  totals_.best_return = std::max(totals_.best_return.value_or(episode_return), episode_return);
}

void RunLog::Note(const absl::Status& status) {
  if (status.ok() || failed_) return;
  failed_ = true;
  LogError("the training log is not complete: {}", status.ToString());
}

void RunLog::AddUpdate(const Learner::UpdateReport& report) {
  std::map<std::string, double> row = {
      {"gradient_norm", report.result.gradient_norm},
      {"update_seconds", report.update_seconds},
      {"batch_wait_seconds", report.batch_wait_seconds},
      {"environment_steps", static_cast<double>(report.rows_appended) * steps_per_row_}};
  std::map<std::string, double> event = row;
  for (const auto& [term, loss] : report.result.losses) {
    row["loss_" + term] = loss;
    event["loss/" + term] = loss;
  }
  absl::MutexLock lock(&mu_);
  Note(metrics_->Add(report.updates, row));
  if (report.updates % kEventsEveryUpdates == 0) Note(events_->Add(report.updates, absl::Now(), event));
}

void RunLog::AddEpisode(const EpisodeSummary& episode, int64_t updates) {
  const std::string mode = Name(episode.mode);
  const double seconds = seconds_before_ + absl::ToDoubleSeconds(absl::Now() - begin_);
  absl::MutexLock lock(&mu_);
  const bool training = episode.mode != EpisodeMode::kEvaluate;
  Count(mode, episode.episode_return, totals_.environment_steps + (training ? episode.environment_steps : 0), seconds);
  const std::string line = absl::StrFormat(
      "%d,%s,%s,%s,%d,%.6f,%d,%d,%.1f\n", episode.episode_id, mode,
      episode.end == EpisodeEnd::kTerminated ? "terminated" : "truncated", episode.task, episode.rows,
      episode.episode_return, totals_.environment_steps, updates, seconds);
  if (std::fputs(line.c_str(), episodes_) < 0 || std::fflush(episodes_) != 0) {
    Note(absl::UnknownError(absl::StrCat("episodes.csv: ", std::strerror(errno))));
  }
  Note(events_->Add(updates, absl::Now(), {{"return/" + mode, episode.episode_return}}));
}

RunTotals RunLog::totals() const {
  absl::MutexLock lock(&mu_);
  return totals_;
}

std::string FormatProgress(const ProgressView& view) {
  const RunTotals& totals = view.totals;
  std::string line = absl::StrCat("episode ", totals.episodes);
  if (view.max_episodes.has_value()) absl::StrAppend(&line, "/", *view.max_episodes);
  absl::StrAppendFormat(&line, "  steps %d  updates %d (%.1f/s)", totals.environment_steps, view.updates,
                        view.updates_per_second);
  if (totals.last_return.has_value()) {
    absl::StrAppendFormat(&line, "  return %.1f (best %.1f)", *totals.last_return, *totals.best_return);
  }
  if (totals.evaluation_return.has_value()) absl::StrAppendFormat(&line, "  eval %.1f", *totals.evaluation_return);
  if (view.loss.has_value()) absl::StrAppendFormat(&line, "  loss %.2f", *view.loss);
  if (view.seconds_left.has_value()) absl::StrAppend(&line, "  left ", Minutes(*view.seconds_left));
  return line;
}

}  // namespace orrery
