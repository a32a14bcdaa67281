#include "libs/learning/training_log.h"

#include <cstring>
#include <filesystem>

#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

TEST(CsvLog, WritesTheHeaderOnceAndOneLinePerStep) {
  const TempDir dir;
  const std::string path = dir / "curve.csv";
  for (int run = 0; run < 2; ++run) {
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<CsvLog> log, CsvLog::Open(path, {"loss", "norm"}, 1000));
    ASSERT_OK(log->Add(10 * run + 1, {{"loss", 0.5}, {"other", 3}}));
    ASSERT_OK(log->Add(10 * run + 2, {{"loss", -2}, {"norm", 1e-9}}));
  }
  EXPECT_THAT(ReadFile(path), IsOkAndHolds("step,loss,norm\n1,0.5,\n2,-2,1e-09\n11,0.5,\n12,-2,1e-09\n"));
}

TEST(CsvLog, DropsRowsThatWillBeMadeAgainAndAHalfRow) {
  const TempDir dir;
  const std::string path = dir / "curve.csv";
  ASSERT_OK(WriteFileAtomically(path, "step,loss\n1,5\n2,4\n3,3\n4,2,7\n1"));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<CsvLog> log, CsvLog::Open(path, {"loss"}, 2));
  ASSERT_OK(log->Add(3, {{"loss", 30}}));
  EXPECT_THAT(ReadFile(path), IsOkAndHolds("step,loss\n1,5\n2,4\n3,30\n"));
}

TEST(CsvLog, RefusesAFileOfOtherColumns) {
  const TempDir dir;
  const std::string path = dir / "curve.csv";
  ASSERT_OK(WriteFileAtomically(path, "step,reward\n1,5\n"));
  EXPECT_THAT(CsvLog::Open(path, {"loss"}, 2),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("step,reward")));
  EXPECT_THAT(ReadFile(path), IsOkAndHolds("step,reward\n1,5\n"));
}

TEST(EventLog, ChecksumIsCastagnolis) {
  EXPECT_EQ(Crc32c("123456789"), 0xE3069283u);
  EXPECT_EQ(Crc32c(""), 0u);
  EXPECT_EQ(Crc32c(std::string(32, '\0')), 0x8A9136AAu);  // RFC 3720
}

TEST(EventLog, WritesTheEventsOfTensorBoard) {
  const TempDir dir;
  {
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<EventLog> log,
                         EventLog::Create(dir.path(), 7, absl::FromUnixSeconds(2)));
    ASSERT_OK(log->Add(300, absl::FromUnixSeconds(4), {{"loss", 0.5}, {"n", 2}}));
  }
  std::string path;
  for (const auto& entry : std::filesystem::directory_iterator(dir.path())) path = entry.path().string();
  EXPECT_THAT(path, HasSubstr("/events.out.tfevents.2.orrery."));
  const auto bytes = [](absl::string_view text) { return std::string(text); };
  // wall_time as double, step as varint, then the payload.
  const std::string at_2 = bytes(absl::string_view("\x09\0\0\0\0\0\0\0\x40", 9));
  const std::string at_4 = bytes(absl::string_view("\x09\0\0\0\0\0\0\x10\x40", 9));
  const std::string version = at_2 + bytes(absl::string_view("\x10\0\x1a\x0d", 4)) + "brain.Event:2";
  const std::string start = at_2 + bytes(absl::string_view("\x10\x07\x3a\x02\x08\x01", 6));
  const std::string loss = bytes(absl::string_view("\x0a\x0b\x0a\x04loss\x15\0\0\0\x3f", 13));
  const std::string n = bytes(absl::string_view("\x0a\x08\x0a\x01n\x15\0\0\0\x40", 10));
  const std::string summary = at_4 + bytes(absl::string_view("\x10\xac\x02\x2a\x17", 5)) + loss + n;
  EXPECT_THAT(ReadFile(path), IsOkAndHolds(FrameRecord(version) + FrameRecord(start) + FrameRecord(summary)));
}

TEST(EventLog, FramesARecordWithMaskedChecksums) {
  const std::string record = FrameRecord("abc");
  ASSERT_EQ(record.size(), 8 + 4 + 3 + 4u);
  EXPECT_EQ(record.substr(0, 8), std::string("\x03\0\0\0\0\0\0\0", 8));
  EXPECT_EQ(record.substr(12, 3), "abc");
  uint32_t masked = 0;
  std::memcpy(&masked, record.data() + 15, 4);
  const uint32_t rotated = masked - 0xa282ead8u;
  EXPECT_EQ((rotated >> 17) | (rotated << 15), Crc32c("abc"));
}

}  // namespace
}  // namespace orrery
