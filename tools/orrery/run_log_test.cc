#include "tools/orrery/run_log.h"

#include <gtest/gtest.h>

#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"

namespace orrery {
namespace {

using testing::HasSubstr;
using testing::Not;

EpisodeSummary Played(int64_t id, EpisodeMode mode, double episode_return, int64_t steps) {
  EpisodeSummary episode;
  episode.episode_id = id;
  episode.mode = mode;
  episode.task = "task";
  episode.rows = steps / 4 + 1;
  episode.environment_steps = steps;
  episode.episode_return = episode_return;
  return episode;
}

Learner::UpdateReport Update(int64_t updates, double loss) {
  Learner::UpdateReport report;
  report.updates = updates;
  report.result.losses = {{"total", loss}, {"kl", 1}};
  report.rows_appended = 10;
  return report;
}

TEST(RunLog, CountsTrainingAndEvaluationApart) {
  const TempDir dir;
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<RunLog> log, RunLog::Open(dir.path(), 0, 4));
  log->AddEpisode(Played(1, EpisodeMode::kRandom, 10, 40), 0);
  log->AddEpisode(Played(2, EpisodeMode::kTrain, 30, 40), 100);
  log->AddEpisode(Played(3, EpisodeMode::kTrain, 20, 40), 200);
  log->AddEpisode(Played(4, EpisodeMode::kEvaluate, 50, 40), 200);
  const RunTotals totals = log->totals();
  EXPECT_EQ(totals.episodes, 3);
  EXPECT_EQ(totals.environment_steps, 120);
  EXPECT_EQ(totals.last_return, 20);
  EXPECT_EQ(totals.best_return, 30);
  EXPECT_EQ(totals.evaluation_return, 50);
  ASSERT_OK_AND_ASSIGN(const std::string file, ReadFile(dir / "episodes.csv"));
  EXPECT_THAT(file, HasSubstr("\n2,train,truncated,task,11,30.000000,80,100,"));
  EXPECT_THAT(file, HasSubstr("\n4,evaluate,truncated,task,11,50.000000,120,200,"));
}

TEST(RunLog, GoesOnBehindAnEarlierSession) {
  const TempDir dir;
  {
    ASSERT_OK_AND_ASSIGN(std::unique_ptr<RunLog> log, RunLog::Open(dir.path(), 0, 4));
    log->AddEpisode(Played(1, EpisodeMode::kRandom, 10, 40), 0);
    log->AddEpisode(Played(2, EpisodeMode::kEvaluate, 70, 40), 0);
    for (int i = 1; i <= 3; ++i) log->AddUpdate(Update(i, 100 + i));
  }
  // A crash cut the last line short.
  ASSERT_OK_AND_ASSIGN(const std::string before, ReadFile(dir / "episodes.csv"));
  ASSERT_OK(WriteFileAtomically(dir / "episodes.csv", before + "3,train,trunc"));
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<RunLog> log, RunLog::Open(dir.path(), 2, 4));
  EXPECT_EQ(log->totals().episodes, 1);
  EXPECT_EQ(log->totals().environment_steps, 40);
  EXPECT_EQ(log->totals().evaluation_return, 70);
  log->AddEpisode(Played(3, EpisodeMode::kTrain, 5, 40), 2);
  log->AddUpdate(Update(3, 203));
  EXPECT_EQ(log->totals().environment_steps, 80);
  EXPECT_EQ(log->totals().best_return, 10);
  ASSERT_OK_AND_ASSIGN(const std::string episodes, ReadFile(dir / "episodes.csv"));
  EXPECT_THAT(episodes, HasSubstr(before));
  EXPECT_THAT(episodes, Not(HasSubstr("trunc\n")));
  ASSERT_OK_AND_ASSIGN(const std::string metrics, ReadFile(dir / "metrics.csv"));
  EXPECT_THAT(metrics, HasSubstr("102"));
  EXPECT_THAT(metrics, Not(HasSubstr("103"))) << "made again after the resume";
  EXPECT_THAT(metrics, HasSubstr("203"));
}

TEST(FormatProgress, ShowsWhatIsKnown) {
  ProgressView view;
  EXPECT_EQ(FormatProgress(view), "episode 0  steps 0  updates 0 (0.0/s)");
  view.totals = {12, 12000, 60, 210.1, 240.3, 300.0};
  view.max_episodes = 40;
  view.updates = 700;
  view.updates_per_second = 13.2;
  view.loss = 12.3;
  view.seconds_left = 192;
  EXPECT_EQ(FormatProgress(view),
            "episode 12/40  steps 12000  updates 700 (13.2/s)  return 210.1 (best 240.3)  eval 300.0  loss 12.30  "
            "left 3:12");
  view.seconds_left = 3 * 3600 + 61;
  EXPECT_THAT(FormatProgress(view), HasSubstr("left 3:01:01"));
}

}  // namespace
}  // namespace orrery
