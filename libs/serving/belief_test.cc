#include "libs/serving/belief.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <random>

#include "libs/base/file.h"
#include "libs/base/status_matchers.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

const BeliefShape kShape = {"cartpole", 0xABCDEF0123456789ull, 3, 2};

Belief SomeBelief() { return {"cartpole", kShape.structure_hash, {2, 700}, {0.5f, -1, 1}, {123.5f, -3}}; }

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

TEST(BeliefTest, IsAboutAKilobyteAtThePapersSize) {
  ASSERT_OK_AND_ASSIGN(const std::string token, SerializeBelief({"planet", 1, {1, 1}, std::vector<float>(200), std::vector<float>(30)}));
  EXPECT_LE(token.size(), 1024u);
}

TEST(BeliefTest, RefusesEveryTruncationAndEveryChangedByte) {
  ASSERT_OK_AND_ASSIGN(const std::string token, SerializeBelief(SomeBelief()));
  for (size_t n = 0; n < token.size(); ++n) {
    EXPECT_THAT(ParseBelief(token.substr(0, n), kShape), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("belief"))) << n;
    std::string changed = token;
    changed[n] = static_cast<char>(changed[n] ^ 0x40);
    EXPECT_THAT(ParseBelief(changed, kShape), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("damaged"))) << n;
  }
  EXPECT_THAT(ParseBelief(token + "x", kShape), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST(BeliefTest, NeverTrustsALengthThatIsSignedCorrectly) {
  ASSERT_OK_AND_ASSIGN(const std::string token, SerializeBelief(SomeBelief()));
  std::mt19937 random(1);
  for (int i = 0; i < 20000; ++i) {
    std::string changed = token;
    // Structured fields only, so that the parser gets past the checksum into odd lengths.
    for (int k = 0; k < 3; ++k) changed[4 + random() % (changed.size() - 8)] = static_cast<char>(random());
    if (random() % 4 == 0) changed.resize(8 + random() % changed.size());
    const absl::StatusOr<Belief> parsed = ParseBelief(Resign(changed), kShape);
    if (parsed.ok()) {
      EXPECT_EQ(parsed->deter.size(), 3u);
      EXPECT_EQ(parsed->stoch.size(), 2u);
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
  token[4] = 2;
  EXPECT_THAT(ParseBelief(Resign(token), kShape),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("format 2, expected 1")));
}

TEST(BeliefTest, OfTheSameStructureHashButOtherSizesIsRefused) {
  Belief other = SomeBelief();
  other.stoch.resize(5);
  ASSERT_OK_AND_ASSIGN(const std::string token, SerializeBelief(other));
  EXPECT_THAT(ParseBelief(token, kShape),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("3 + 5 numbers, expected 3 + 2")));
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
