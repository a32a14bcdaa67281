#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <thread>

#include "libs/base/array.h"
#include "libs/base/clock.h"
#include "libs/base/file.h"
#include "libs/base/random.h"
#include "libs/base/status.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

TEST(Array, CheckNamesTheThingAndTheExpectedSize) {
  Array a{DType::kFloat32, {2, 3}, std::string(20, '\0')};
  EXPECT_THAT(CheckArray(a, "reward"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("reward: float32[2, 3] takes 24 bytes, got 20")));
  a.bytes.resize(24);
  EXPECT_OK(CheckArray(a, "reward"));
}

TEST(Array, ElementCountRefusesOverflowAndNegativeSizes) {
  EXPECT_THAT(ElementCount({int64_t{1} << 40, int64_t{1} << 40}), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(ElementCount({3, -1}), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(ElementCount({int64_t{1} << 50, 0}), IsOkAndHolds(0));
  EXPECT_THAT(ElementCount({}), IsOkAndHolds(1));
}

TEST(File, AtomicWriteReplacesAndReadsBack) {
  TempDir dir;
  ASSERT_OK(WriteFileAtomically(dir / "f", "one"));
  ASSERT_OK(WriteFileAtomically(dir / "f", std::string("t\0o", 3)));
  EXPECT_THAT(ReadFile(dir / "f"), IsOkAndHolds(std::string("t\0o", 3)));
  EXPECT_THAT(ReadFile(dir / "missing"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("missing")));
}

TEST(File, ChecksumMatchesThePublishedCheckValue) { EXPECT_EQ(Checksum("123456789"), 0xCBF43926u); }

TEST(Random, StreamsDifferAndAreFixed) {
  EXPECT_EQ(DeriveSeed(1, "actor", 0), DeriveSeed(1, "actor", 0));
  EXPECT_NE(DeriveSeed(1, "actor", 0), DeriveSeed(1, "actor", 1));
  EXPECT_NE(DeriveSeed(1, "actor", 0), DeriveSeed(1, "batch", 0));
  EXPECT_NE(DeriveSeed(1, "actor", 0), DeriveSeed(2, "actor", 0));
}

TEST(Status, ExceptionsBecomeStatuses) {
  auto throws = []() -> absl::Status { throw std::runtime_error("boom"); };
  EXPECT_THAT(CatchExceptions("loading", throws), StatusIs(absl::StatusCode::kInternal, "loading: boom"));
}

TEST(FakeClock, WaitEndsWhenTimeIsMovedOn) {
  FakeClock clock;
  absl::Mutex mu;
  absl::CondVar cv;
  bool timed_out = false;
  std::thread waiter([&] {
    absl::MutexLock lock(&mu);
    const absl::Time deadline = absl::UnixEpoch() + absl::Seconds(5);
    while (!timed_out) timed_out = clock.WaitUntil(cv, mu, deadline);
  });
  clock.AwaitWaiters(1);
  clock.Advance(absl::Seconds(5));
  waiter.join();
  EXPECT_TRUE(timed_out);
}

}  // namespace
}  // namespace orrery
