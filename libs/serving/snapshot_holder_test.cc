#include "libs/serving/snapshot_holder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>

#include "libs/base/log_testing.h"
#include "libs/base/status_matchers.h"
#include "libs/serving/testing.h"
#include "libs/tensors/safetensors.h"

namespace orrery {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class SnapshotHolderTest : public ::testing::Test {
 protected:
  SnapshotHolderTest() {
    options_.registry = registry_;
    options_.clock = &clock_;
    options_.default_name = "fallback";
    options_.warm_up = [this](const ServedModel&) {
      ++warm_ups_;
      return warm_up_status_;
    };
    options_.on_swap = [this](const ServedModel& served) { swapped_.push_back(served.version.counter); };
  }
  double Value(const std::string& name) {
    for (const auto& family : registry_->Collect()) {
      if (family.name != name) continue;
      return family.type == prometheus::MetricType::Counter ? family.metric.at(0).counter.value
                                                            : family.metric.at(0).gauge.value;
    }
    return -1;
  }

  FakeClock clock_{absl::FromUnixSeconds(1234)};
  std::shared_ptr<prometheus::Registry> registry_ = std::make_shared<prometheus::Registry>();
  SnapshotHolder::Options options_;
  int warm_ups_ = 0;
  absl::Status warm_up_status_;
  std::vector<int64_t> swapped_;
};

TEST_F(SnapshotHolderTest, ServesNothingUntilLoaded) {
  SnapshotHolder holder(options_);
  EXPECT_EQ(holder.Get(), nullptr);
  EXPECT_EQ(holder.version(), SnapshotVersion{});
}

TEST_F(SnapshotHolderTest, SwapsNewerSnapshotsInAndKeepsTheOldOneForItsUsers) {
  SnapshotHolder holder(options_);
  ASSERT_OK(holder.Load(TinySnapshot(5)));
  const std::shared_ptr<const ServedModel> old = holder.Get();
  EXPECT_EQ(old->name, "tiny");
  EXPECT_EQ(old->info.planner.cem().candidates(), 64);
  EXPECT_EQ(Value("orrery_planner_snapshot_version"), 5);
  EXPECT_EQ(Value("orrery_planner_snapshot_timestamp_seconds"), 1234);
  clock_.Advance(absl::Seconds(6));
  ASSERT_OK(holder.Load(TinySnapshot(6, 2)));
  EXPECT_EQ(holder.version(), (SnapshotVersion{1, 6}));
  EXPECT_EQ(Value("orrery_planner_snapshot_timestamp_seconds"), 1240);
  EXPECT_EQ(old->version, (SnapshotVersion{1, 5}));
  EXPECT_EQ(old->structure_hash, holder.Get()->structure_hash);
  EXPECT_THAT(swapped_, ElementsAre(5, 6));
  EXPECT_EQ(warm_ups_, 1) << "the same structure needs no second trial";
}

TEST_F(SnapshotHolderTest, WarmsUpEachSnapshotBeforeItIsServedWhereAsked) {
  options_.warm_up_each = true;
  SnapshotHolder* warming = nullptr;
  std::vector<int64_t> warmed;
  options_.warm_up = [&](const ServedModel& served) {
    warmed.push_back(served.version.counter);
    EXPECT_LT(warming->version().counter, served.version.counter) << "the one before is served meanwhile";
    return warm_up_status_;
  };
  SnapshotHolder holder(options_);
  warming = &holder;
  for (int64_t counter : {1, 2, 3}) ASSERT_OK(holder.Load(TinySnapshot(counter)));
  EXPECT_THAT(warmed, ElementsAre(1, 2, 3));
  warm_up_status_ = absl::InternalError("no memory");
  EXPECT_THAT(holder.Load(TinySnapshot(4)), StatusIs(absl::StatusCode::kInternal, HasSubstr("warming up: no memory")));
  EXPECT_EQ(holder.version().counter, 3);
}

TEST_F(SnapshotHolderTest, KeepsTheOneBeforeAndThoseAskedForLately) {
  SnapshotHolder holder(options_);
  EXPECT_EQ(holder.Get(SnapshotVersion{1, 1}), nullptr);
  const auto version = [](int64_t counter) { return SnapshotVersion{1, counter}; };
  const auto got = [&](int64_t counter) { return holder.Get(version(counter))->version.counter; };
  for (int64_t counter : {1, 2, 3}) ASSERT_OK(holder.Load(TinySnapshot(counter)));
  EXPECT_EQ(got(1), 3) << "gone: the newest instead";
  EXPECT_EQ(got(2), 2);
  for (int64_t counter : {4, 5, 6}) {
    clock_.Advance(absl::Seconds(50));
    ASSERT_OK(holder.Load(TinySnapshot(counter)));
    EXPECT_EQ(got(2), 2) << "asked for all the time";
  }
  EXPECT_EQ(got(4), 6);
  EXPECT_EQ(got(5), 5);
  clock_.Advance(absl::Seconds(61));
  ASSERT_OK(holder.Load(TinySnapshot(7)));
  EXPECT_EQ(got(2), 7);
  EXPECT_EQ(got(6), 6);
  EXPECT_EQ(got(7), 7);
  EXPECT_EQ(got(8), 7);
  EXPECT_EQ(holder.version(), version(7));
}

TEST_F(SnapshotHolderTest, RollbackServesTheOneBeforeUntilResumed) {
  SnapshotHolder holder(options_);
  for (int64_t counter : {1, 2, 3}) ASSERT_OK(holder.Load(TinySnapshot(counter)));
  clock_.Advance(absl::Seconds(6));
  EXPECT_THAT(holder.Rollback(), IsOkAndHolds(SnapshotVersion{1, 3}));
  EXPECT_EQ(holder.version(), (SnapshotVersion{1, 2}));
  EXPECT_EQ(holder.Get()->version, (SnapshotVersion{1, 2}));
  EXPECT_EQ(Value("orrery_planner_snapshot_version"), 2);
  EXPECT_EQ(Value("orrery_planner_snapshot_timestamp_seconds"), 1240);
  EXPECT_EQ(Value("orrery_planner_snapshot_held"), 1);

  // What comes is loaded, checked and kept, and the held one stays, however many come.
  for (int64_t counter = 4; counter < 20; ++counter) ASSERT_OK(holder.Load(TinySnapshot(counter)));
  EXPECT_FALSE(holder.Load("no snapshot").ok());
  EXPECT_THAT(holder.Load(TinySnapshot(19)), StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("not newer than 1.19")));
  EXPECT_EQ(holder.version(), (SnapshotVersion{1, 2}));
  EXPECT_EQ(holder.Get(SnapshotVersion{1, 19})->version.counter, 19);
  EXPECT_EQ(holder.Get(SnapshotVersion{1, 7})->version.counter, 2) << "not kept: what is served";
  SnapshotHolder::State state = holder.state();
  EXPECT_EQ(state.served, (SnapshotVersion{1, 2}));
  EXPECT_EQ(state.newest, (SnapshotVersion{1, 19}));
  EXPECT_EQ(state.previous, std::nullopt);
  EXPECT_TRUE(state.held);

  ASSERT_OK(holder.Resume());
  EXPECT_EQ(holder.version(), (SnapshotVersion{1, 19}));
  EXPECT_EQ(Value("orrery_planner_snapshot_version"), 19);
  EXPECT_EQ(Value("orrery_planner_snapshot_held"), 0);
  ASSERT_OK(holder.Load(TinySnapshot(20)));
  EXPECT_EQ(holder.version(), (SnapshotVersion{1, 20}));
  state = holder.state();
  EXPECT_EQ(state.previous, (SnapshotVersion{1, 19}));
  EXPECT_FALSE(state.held);
}

TEST_F(SnapshotHolderTest, RollbackGoesBackAsFarAsSnapshotsAreKept) {
  SnapshotHolder holder(options_);
  for (int64_t counter : {1, 2, 3}) {
    ASSERT_OK(holder.Load(TinySnapshot(counter)));
    holder.Get(SnapshotVersion{1, counter});  // asked for: all are kept
  }
  EXPECT_THAT(holder.Rollback(SnapshotVersion{1, 2}),
              StatusIs(absl::StatusCode::kAborted, HasSubstr("snapshot 1.3 is served, expected 1.2")));
  EXPECT_THAT(holder.Rollback(SnapshotVersion{1, 3}), IsOkAndHolds(SnapshotVersion{1, 3}));
  EXPECT_EQ(holder.state().previous, (SnapshotVersion{1, 1}));
  // The one before the held one stays, too, when it is not asked for any more.
  clock_.Advance(absl::Minutes(5));
  for (int64_t counter : {4, 5}) ASSERT_OK(holder.Load(TinySnapshot(counter)));
  EXPECT_THAT(holder.Rollback(), IsOkAndHolds(SnapshotVersion{1, 2}));
  EXPECT_EQ(holder.version(), (SnapshotVersion{1, 1}));
  EXPECT_THAT(holder.Rollback(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("no snapshot before 1.1 is kept")));
  EXPECT_EQ(holder.version(), (SnapshotVersion{1, 1}));
}

TEST_F(SnapshotHolderTest, NothingToRollBackOrResumeWithoutASnapshot) {
  SnapshotHolder holder(options_);
  EXPECT_THAT(holder.Rollback(), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_THAT(holder.Resume(), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_EQ(holder.state().served, std::nullopt);
  ASSERT_OK(holder.Load(TinySnapshot(1)));
  EXPECT_THAT(holder.Rollback(), StatusIs(absl::StatusCode::kFailedPrecondition));
  EXPECT_OK(holder.Resume()) << "nothing is held";
  EXPECT_EQ(holder.version(), (SnapshotVersion{1, 1}));
}

TEST_F(SnapshotHolderTest, AGivenNameReplacesTheSnapshotsOwn) {
  options_.name = "challenger";
  options_.labels = {{"model", "challenger"}};
  SnapshotHolder holder(options_);
  ASSERT_OK(holder.Load(TinySnapshot(1)));
  EXPECT_EQ(holder.Get()->name, "challenger");
  const auto families = registry_->Collect();
  const auto version = std::find_if(families.begin(), families.end(),
                                    [](const auto& family) { return family.name == "orrery_planner_snapshot_version"; });
  ASSERT_NE(version, families.end());
  EXPECT_EQ(version->metric.at(0).label.at(0).value, "challenger");
}

TEST_F(SnapshotHolderTest, KeepsABoundedNumber) {
  SnapshotHolder holder(options_);
  constexpr int64_t kLast = 3 * static_cast<int64_t>(SnapshotHolder::kMostKept);
  for (int64_t counter = 1; counter <= kLast; ++counter) {
    ASSERT_OK(holder.Load(TinySnapshot(counter)));
    EXPECT_EQ(holder.Get(SnapshotVersion{1, counter})->version.counter, counter);
  }
  const auto is_kept = [&](int64_t counter) { return holder.Get(SnapshotVersion{1, counter})->version.counter == counter; };
  EXPECT_FALSE(is_kept(kLast - static_cast<int64_t>(SnapshotHolder::kMostKept)));
  EXPECT_TRUE(is_kept(kLast - static_cast<int64_t>(SnapshotHolder::kMostKept) + 1));
}

TEST_F(SnapshotHolderTest, SkipsWhatIsNotNewer) {
  SnapshotHolder holder(options_);
  ASSERT_OK(holder.Load(TinySnapshot(5)));
  EXPECT_THAT(holder.Load(TinySnapshot(5, 2)), StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("1.5 is not newer than 1.5")));
  EXPECT_THAT(holder.Load(TinySnapshot(4, 2)), StatusIs(absl::StatusCode::kAlreadyExists));
  EXPECT_OK(holder.Load(TinySnapshot(4, 2), SnapshotVersion{2, 0})) << "the sender's version counts";
  EXPECT_EQ(holder.version(), (SnapshotVersion{2, 0}));
  EXPECT_EQ(Value("orrery_planner_snapshots_refused_total"), 0);
}

TEST_F(SnapshotHolderTest, RefusesADamagedSnapshotAndKeepsServing) {
  SnapshotHolder holder(options_);
  ASSERT_OK(holder.Load(TinySnapshot(5)));
  const std::shared_ptr<const ServedModel> old = holder.Get();
  const std::string good = TinySnapshot(6);
  EXPECT_FALSE(holder.Load(good.substr(0, good.size() / 2)).ok());
  EXPECT_FALSE(holder.Load("").ok());
  ASSERT_OK_AND_ASSIGN(SafeTensors tensors, ParseSafeTensors(good));
  tensors.tensors.begin()->second = torch::zeros({3, 3});
  ASSERT_OK_AND_ASSIGN(const std::string reshaped, SerializeSafeTensors(tensors));
  EXPECT_THAT(holder.Load(reshaped), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(tensors.tensors.begin()->first)));
  ASSERT_OK_AND_ASSIGN(tensors, ParseSafeTensors(good));
  tensors.tensors.begin()->second.fill_(std::numeric_limits<float>::quiet_NaN());
  ASSERT_OK_AND_ASSIGN(const std::string poisoned, SerializeSafeTensors(tensors));
  EXPECT_THAT(holder.Load(poisoned), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("finite")));
  EXPECT_EQ(holder.Get(), old);
  EXPECT_EQ(Value("orrery_planner_snapshots_refused_total"), 4);
  EXPECT_OK(holder.Load(good));
}

TEST_F(SnapshotHolderTest, LogsAndCountsEachRefusal) {
  CapturedLog log("warning");
  SnapshotHolder holder(options_);
  const absl::Status refused = holder.Load("no snapshot", SnapshotVersion{1, 4});
  EXPECT_FALSE(refused.ok());
  ASSERT_OK(holder.Load(TinySnapshot(5)));
  holder.Refuse(absl::DataLossError("cut off"), SnapshotVersion{1, 6});
  holder.Refuse(absl::InvalidArgumentError("no part"), std::nullopt);
  EXPECT_EQ(Value("orrery_planner_snapshots_refused_total"), 3);
  const std::string lines = log.Take();
  EXPECT_THAT(lines, HasSubstr("snapshot refused version=1.4 serving=nothing error=\"" + refused.ToString() + "\""));
  EXPECT_THAT(lines, HasSubstr("snapshot refused version=1.6 serving=1.5 error=\"DATA_LOSS: cut off\""));
  EXPECT_THAT(lines, HasSubstr("snapshot refused version=unknown serving=1.5 error=\"INVALID_ARGUMENT: no part\""));
}

TEST_F(SnapshotHolderTest, RefusesWhatCannotBeWarmedUp) {
  SnapshotHolder holder(options_);
  warm_up_status_ = absl::InternalError("no memory");
  EXPECT_THAT(holder.Load(TinySnapshot(5)), StatusIs(absl::StatusCode::kInternal, HasSubstr("warming up: no memory")));
  EXPECT_EQ(holder.Get(), nullptr);
}

TEST_F(SnapshotHolderTest, AConfiguredPlannerReplacesTheSnapshotsOwn) {
  options_.planner.emplace().mutable_random();
  SnapshotHolder holder(options_);
  ASSERT_OK(holder.Load(TinySnapshot(5)));
  EXPECT_TRUE(holder.Get()->info.planner.has_random());
}

TEST_F(SnapshotHolderTest, NamesAModelThatDoesNotSayItsRun) {
  SnapshotHolder holder(options_);
  SnapshotInfo info;
  info.model = TinyModel();
  ASSERT_OK_AND_ASSIGN(const std::string file, SerializeSnapshot(**WorldModel::Create(info.model, 1), info));
  ASSERT_OK(holder.Load(file));
  EXPECT_EQ(holder.Get()->name, "fallback");
}

}  // namespace
}  // namespace orrery
