#include "libs/serving/belief.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "libs/base/file.h"
#include "libs/base/status_matchers.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

const BeliefShape kShape = {"cartpole", 0xABCDEF0123456789ull, 3, 2, /*action_size=*/2};
// Of a planner that begins from plans of three actions.
const BeliefShape kPlanShape = {"cartpole", 0xABCDEF0123456789ull, 3, 2, /*action_size=*/2, /*plan_horizon=*/3};

Belief SomeBelief() { return {"cartpole", kShape.structure_hash, {2, 700}, {0.5f, -1, 1}, {123.5f, -3}}; }

Belief SomeBeliefWithPlan() {
  Belief belief = SomeBelief();
  belief.plan_horizon = 3;
  belief.plan = {0.25f, -1, 1, 0, -0.5f, 0.125f};
  return belief;
}

// Makes the checksum fit again after a change.
std::string Resign(std::string token) {
  token.resize(token.size() - 4);
  const uint32_t checksum = Checksum(token);
  token.append(reinterpret_cast<const char*>(&checksum), 4);
  return token;
}

TEST(BeliefTest, RoundTrips) {
  const Belief belief = SomeBelief();
  ASSERT_OK_AND_ASSIGN(const std::string token, SerializeBelief(belief));
  ASSERT_OK_AND_ASSIGN(const Belief parsed, ParseBelief(token, kShape));
  EXPECT_EQ(parsed.model, belief.model);
  EXPECT_EQ(parsed.structure_hash, belief.structure_hash);
  EXPECT_EQ(parsed.version, belief.version);
  EXPECT_EQ(parsed.deter, belief.deter);
  EXPECT_EQ(parsed.stoch, belief.stoch);
}

TEST(BeliefTest, RoundTripsWithAPlan) {
  const Belief belief = SomeBeliefWithPlan();
  ASSERT_OK_AND_ASSIGN(const std::string token, SerializeBelief(belief));
  EXPECT_EQ(token[4], 2);
  ASSERT_OK_AND_ASSIGN(const Belief parsed, ParseBelief(token, kPlanShape));
  EXPECT_EQ(parsed.deter, belief.deter);
  EXPECT_EQ(parsed.stoch, belief.stoch);
  EXPECT_EQ(parsed.plan_horizon, 3);
  EXPECT_EQ(parsed.plan, belief.plan);
}

TEST(BeliefTest, WithoutAPlanHasTheFormatWithoutOne) {
  ASSERT_OK_AND_ASSIGN(const std::string token, SerializeBelief(SomeBelief()));
  EXPECT_EQ(token[4], 1);
  ASSERT_OK_AND_ASSIGN(const Belief parsed, ParseBelief(token, kPlanShape));
  EXPECT_EQ(parsed.plan_horizon, 0);
  EXPECT_TRUE(parsed.plan.empty());
}

TEST(BeliefTest, LeavesOutAPlanOfAnotherHorizon) {
  ASSERT_OK_AND_ASSIGN(const std::string token, SerializeBelief(SomeBeliefWithPlan()));
  BeliefShape longer = kPlanShape;
  longer.plan_horizon = 4;
  for (const BeliefShape& shape : {kShape, longer}) {
    ASSERT_OK_AND_ASSIGN(const Belief parsed, ParseBelief(token, shape));
    EXPECT_EQ(parsed.deter, SomeBelief().deter);
    EXPECT_EQ(parsed.plan_horizon, 0);
    EXPECT_TRUE(parsed.plan.empty());
  }
}

TEST(BeliefTest, RefusesAPlanThatNoPlannerMade) {
  const auto refused = [](const std::string& message) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message));
  };
  ASSERT_OK_AND_ASSIGN(const std::string token, SerializeBelief(SomeBeliefWithPlan()));
  // The plan's first number, H and A, counted from the end.
  const size_t plan = token.size() - 4 - 6 * 4, states = plan - 5 * 4, h = states - 8, a = states - 4;
  const auto with = [&](size_t at, const auto& value) {
    std::string changed = token;
    std::memcpy(changed.data() + at, &value, sizeof(value));
    return Resign(changed);
  };
  ASSERT_OK(ParseBelief(with(plan, -1.0f), kPlanShape));
  EXPECT_THAT(ParseBelief(with(plan, 1.5f), kPlanShape), refused("plan [0] is 1.5, expected -1 to 1"));
  EXPECT_THAT(ParseBelief(with(plan + 4, std::nanf("")), kPlanShape), refused("plan [1] is nan"));
  EXPECT_THAT(ParseBelief(with(h, uint32_t{0}), kPlanShape), refused("a plan of 0 × 2 numbers, expected 1 to 256 × 2"));
  EXPECT_THAT(ParseBelief(with(h, uint32_t{257}), kPlanShape), refused("a plan of 257 × 2 numbers"));
  EXPECT_THAT(ParseBelief(with(h, uint32_t{0xFFFFFFFF}), kPlanShape), refused("a plan of 4294967295 × 2 numbers"));
  EXPECT_THAT(ParseBelief(with(a, uint32_t{3}), kPlanShape), refused("a plan of 3 × 3 numbers"));
  EXPECT_THAT(ParseBelief(with(h, uint32_t{4}), kPlanShape), refused("wrong size"));
  EXPECT_THAT(ParseBelief(with(plan, 1.5f), kShape), refused("plan [0] is 1.5")) << "even where no plan is wanted";
  Belief bad = SomeBeliefWithPlan();
  bad.plan[5] = 2;
  EXPECT_THAT(SerializeBelief(bad), refused("plan [5] is 2"));
  bad = SomeBeliefWithPlan();
  bad.plan.pop_back();
  EXPECT_THAT(SerializeBelief(bad), refused("a plan of 3 actions has 5 numbers"));
  bad.plan_horizon = 0;
  EXPECT_THAT(SerializeBelief(bad), refused("a plan of 0 actions has 5 numbers"));
  bad.plan_horizon = 3;
  bad.plan.clear();
  EXPECT_THAT(SerializeBelief(bad), refused("a plan of 3 actions has 0 numbers"));
}

TEST(BeliefTest, IsAboutAKilobyteAtThePapersSize) {
  ASSERT_OK_AND_ASSIGN(const std::string token, SerializeBelief({"planet", 1, {1, 1}, std::vector<float>(200), std::vector<float>(30)}));
  EXPECT_LE(token.size(), 1024u);
}

TEST(BeliefTest, RefusesEveryTruncationAndEveryChangedByte) {
  for (const Belief& belief : {SomeBelief(), SomeBeliefWithPlan()}) {
    ASSERT_OK_AND_ASSIGN(const std::string token, SerializeBelief(belief));
    for (size_t n = 0; n < token.size(); ++n) {
      EXPECT_THAT(ParseBelief(token.substr(0, n), kPlanShape),
                  StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("belief"))) << n;
      std::string changed = token;
      changed[n] = static_cast<char>(changed[n] ^ 0x40);
      EXPECT_THAT(ParseBelief(changed, kPlanShape), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("damaged"))) << n;
    }
    EXPECT_THAT(ParseBelief(token + "x", kPlanShape), StatusIs(absl::StatusCode::kInvalidArgument));
  }
}

TEST(BeliefTest, NeverTrustsALengthThatIsSignedCorrectly) {
  ASSERT_OK_AND_ASSIGN(const std::string without, SerializeBelief(SomeBelief()));
  ASSERT_OK_AND_ASSIGN(const std::string with, SerializeBelief(SomeBeliefWithPlan()));
  std::mt19937 random(1);
  for (int i = 0; i < 20000; ++i) {
    std::string changed = i % 2 == 0 ? without : with;
    // Structured fields only, so that the parser gets past the checksum into odd lengths.
    for (int k = 0; k < 3; ++k) changed[4 + random() % (changed.size() - 8)] = static_cast<char>(random());
    if (random() % 4 == 0) changed.resize(8 + random() % changed.size());
    const absl::StatusOr<Belief> parsed = ParseBelief(Resign(changed), kPlanShape);
    if (parsed.ok()) {
      EXPECT_EQ(parsed->deter.size(), 3u);
      EXPECT_EQ(parsed->stoch.size(), 2u);
      EXPECT_EQ(parsed->plan.size(), static_cast<size_t>(2 * parsed->plan_horizon));
    }
  }
}

TEST(BeliefTest, OfAnotherStructureOrModelAsksForANewOne) {
  Belief other = SomeBelief();
  other.structure_hash = 7;
  other.deter.resize(40);
  ASSERT_OK_AND_ASSIGN(std::string token, SerializeBelief(other));
  EXPECT_THAT(ParseBelief(token, kShape),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("begin a new belief")));
  other = SomeBelief();
  other.model = "cheetah";
  ASSERT_OK_AND_ASSIGN(token, SerializeBelief(other));
  EXPECT_THAT(ParseBelief(token, kShape), StatusIs(absl::StatusCode::kFailedPrecondition,
                                                   HasSubstr("belief of model \"cheetah\", but \"cartpole\" is served")));
  ASSERT_OK_AND_ASSIGN(token, SerializeBelief(SomeBelief()));
  token[4] = 3;
  EXPECT_THAT(ParseBelief(Resign(token), kShape),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("format 3, expected 1 or 2")));
}

TEST(BeliefTest, OfTheSameStructureHashButOtherSizesIsRefused) {
  Belief other = SomeBelief();
  other.stoch.resize(5);
  ASSERT_OK_AND_ASSIGN(const std::string token, SerializeBelief(other));
  EXPECT_THAT(ParseBelief(token, kShape),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("3 + 5 numbers, expected 3 + 2")));
}

TEST(BeliefTest, VersionsThatNoSnapshotHasAreRefusedBothWays) {
  constexpr int64_t kSmallest = std::numeric_limits<int64_t>::min(), kLargest = std::numeric_limits<int64_t>::max();
  ASSERT_OK_AND_ASSIGN(const std::string token, SerializeBelief(SomeBelief()));
  const auto with = [&token](const SnapshotVersion& version) {
    std::string changed = token;
    const size_t at = 4 + 1 + 1 + SomeBelief().model.size() + 8;  // behind magic, format, name and structure hash
    std::memcpy(changed.data() + at, &version.generation, 8);
    std::memcpy(changed.data() + at + 8, &version.counter, 8);
    return Resign(changed);
  };
  EXPECT_EQ(with({2, 700}), token);
  ASSERT_OK_AND_ASSIGN(const Belief largest, ParseBelief(with({kLargest, kLargest}), kShape));
  EXPECT_EQ(largest.version, (SnapshotVersion{kLargest, kLargest}));
  EXPECT_OK(ParseBelief(with({0, 0}), kShape));
  const auto refuse = [&](const SnapshotVersion& version, const std::string& message) {
    EXPECT_THAT(ParseBelief(with(version), kShape), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
    Belief bad = SomeBelief();
    bad.version = version;
    EXPECT_THAT(SerializeBelief(bad), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  };
  refuse({2, -1}, "snapshot version (2, -1), expected numbers of at least 0");
  refuse({-3, 700}, "snapshot version (-3, 700)");
  refuse({0, kSmallest}, "snapshot version (0, -9223372036854775808)");
  refuse({kSmallest, 0}, "snapshot version (-9223372036854775808, 0)");
}

TEST(BeliefTest, NumbersThatNoModelMakesAreRefusedBothWays) {
  const auto refuse = [](float deter, float stoch, const char* message) {
    Belief bad = SomeBelief();
    bad.deter[1] = deter;
    bad.stoch[0] = stoch;
    EXPECT_THAT(SerializeBelief(bad), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
    std::string token = *SerializeBelief(SomeBelief());
    std::memcpy(token.data() + token.size() - 4 - 4 * 4, &deter, 4);
    std::memcpy(token.data() + token.size() - 4 - 2 * 4, &stoch, 4);
    EXPECT_THAT(ParseBelief(Resign(token), kShape), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  refuse(1.01f, 0, "deterministic state [1] is 1.01, expected -1 to 1");
  refuse(nan, 0, "deterministic state [1]");
  refuse(0, inf, "stochastic state [0] is inf");
  refuse(0, nan, "stochastic state [0]");
}

}  // namespace
}  // namespace orrery
