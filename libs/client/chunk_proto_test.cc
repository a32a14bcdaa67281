#include "libs/client/chunk_proto.h"

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/client/channel.h"

namespace orrery {
namespace {
using ::testing::HasSubstr;

Chunk SomeChunk() {
  Chunk chunk;
  chunk.run_id = "run-1";
  chunk.info.key = {7, 50};
  chunk.info.rows = 25;
  chunk.info.mode = EpisodeMode::kEvaluate;
  chunk.info.end = EpisodeEnd::kTruncated;
  chunk.info.specification_hash = 0xfedcba9876543210;
  chunk.info.snapshot_version = {2, 300};
  chunk.info.reward_sum = -1.5;
  chunk.info.task = 3;
  chunk.payload = std::string("rows\0rows", 9);
  chunk.info.payload_bytes = 9;
  return chunk;
}

TEST(ChunkProto, KeepsEveryField) {
  EXPECT_THAT(FromProto(ToProto(SomeChunk())), IsOkAndHolds(SomeChunk()));
  Chunk random = SomeChunk();
  random.info.snapshot_version = {};
  EXPECT_FALSE(ToProto(random).has_snapshot_version());
  EXPECT_THAT(FromProto(ToProto(random)), IsOkAndHolds(random));
}

TEST(ChunkProto, NamesTheFieldThatIsWrong) {
  using Proto = replay::v1::Chunk;
  const std::vector<std::pair<std::string, std::function<void(Proto&)>>> cases = {
      {"run_id", [](Proto& c) { c.clear_run_id(); }},
      {"episode_id", [](Proto& c) { c.set_episode_id(0); }},
      {"episode_id", [](Proto& c) { c.set_episode_id(std::numeric_limits<int64_t>::max()); }},
      {"first_row", [](Proto& c) { c.set_first_row(-1); }},
      {"rows", [](Proto& c) { c.set_rows(0); }},
      {"rows", [](Proto& c) { c.set_rows(1001); }},
      {"episode mode", [](Proto& c) { c.clear_mode(); }},
      {"episode mode", [](Proto& c) { c.set_mode(static_cast<replay::v1::EpisodeMode>(9)); }},
      {"episode end", [](Proto& c) { c.clear_end(); }},
      {"episode end", [](Proto& c) { c.set_end(static_cast<replay::v1::EpisodeEnd>(9)); }},
      {"snapshot version", [](Proto& c) { c.mutable_snapshot_version()->set_counter(-1); }},
      {"task", [](Proto& c) { c.set_task(-1); }},
      {"task", [](Proto& c) { c.set_task(10000); }},
      {"reward_sum", [](Proto& c) { c.set_reward_sum(std::numeric_limits<double>::quiet_NaN()); }},
      {"payload", [](Proto& c) { c.clear_payload(); }},
      {"payload", [](Proto& c) { c.set_payload(std::string(kMaxPayloadBytes + 1, 'x')); }},
  };
  for (const auto& [field, damage] : cases) {
    Proto proto = ToProto(SomeChunk());
    damage(proto);
    EXPECT_THAT(FromProto(proto), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(field)));
  }
}

TEST(Summarise, AddsUpWhatIsThere) {
  ChunkInfo first = SomeChunk().info, second = first, third = first;
  first.snapshot_version = {2, 400};
  first.end = EpisodeEnd::kContinues;
  second.key.first_row = 80;  // 5 rows after the first one's end
  third.key.first_row = 90;   // overlaps: a client's mistake
  third.end = EpisodeEnd::kTerminated;
  third.snapshot_version = {};
  const replay::v1::EpisodeSummary summary = Summarise({first, second, third});
  EXPECT_EQ(summary.episode_id(), 7);
  EXPECT_EQ(summary.mode(), replay::v1::EVALUATE);
  EXPECT_EQ(summary.end(), replay::v1::TERMINATED);
  EXPECT_EQ(summary.first_row(), 50);
  EXPECT_EQ(summary.task(), 3);
  EXPECT_EQ(summary.rows(), 75);
  EXPECT_EQ(summary.missing_rows(), 5);
  EXPECT_EQ(summary.chunks(), 3);
  EXPECT_EQ(summary.reward_sum(), -4.5);
  EXPECT_EQ(summary.bytes(), 27);
  EXPECT_EQ(summary.snapshot_version().generation(), 2);
  EXPECT_EQ(summary.snapshot_version().counter(), 400);
  EXPECT_FALSE(Summarise({third}).has_snapshot_version());
}

std::vector<common::v1::SnapshotPart> Split(const Store::Snapshot& snapshot) {
  std::vector<common::v1::SnapshotPart> parts;
  EXPECT_OK(SplitSnapshot(snapshot, [&](const common::v1::SnapshotPart& part) {
    parts.push_back(part);
    return true;
  }));
  return parts;
}

Store::Snapshot SomeSnapshot(size_t bytes) {
  Store::Snapshot snapshot{{3, 400}, std::string(bytes, '\0')};
  for (size_t i = 0; i < bytes; ++i) snapshot.file[i] = static_cast<char>(i * 31 + i / 1000);
  return snapshot;
}

TEST(Snapshot, GoesThroughPartsUnchanged) {
  for (size_t bytes : {size_t{8}, size_t{1} << 20, (size_t{1} << 20) + 1, size_t{6'000'000}}) {
    const Store::Snapshot snapshot = SomeSnapshot(bytes);
    const auto parts = Split(snapshot);
    EXPECT_EQ(parts.size(), (bytes + kSnapshotPartBytes - 1) / kSnapshotPartBytes);
    SnapshotAssembler assembler;
    for (size_t i = 0; i < parts.size(); ++i) EXPECT_THAT(assembler.Add(parts[i]), IsOkAndHolds(i + 1 == parts.size()));
    const Store::Snapshot result = assembler.Take();
    EXPECT_EQ(result.version, snapshot.version);
    EXPECT_TRUE(result.file == snapshot.file);
    EXPECT_TRUE(assembler.empty());
  }
}

TEST(Snapshot, RefusesPartsThatDoNotFit) {
  const auto parts = Split(SomeSnapshot(3'000'000));
  const std::vector<std::function<void(common::v1::SnapshotPart&)>> damages = {
      [](auto& p) { p.clear_version(); },
      [](auto& p) { p.mutable_version()->set_counter(401); },
      [](auto& p) { p.mutable_version()->set_generation(-1); },
      [](auto& p) { p.set_total_bytes(7); },
      [](auto& p) { p.set_total_bytes(3'000'001); },
      [](auto& p) { p.set_total_bytes(std::numeric_limits<int64_t>::max()); },
      [](auto& p) { p.set_checksum(p.checksum() + 1); },
      [](auto& p) { p.set_offset(p.offset() + 1); },
      [](auto& p) { p.set_offset(-1); },
      [](auto& p) { p.clear_data(); },
      [](auto& p) { p.mutable_data()->push_back('x'); },
  };
  for (const auto& damage : damages) {
    SnapshotAssembler assembler;
    ASSERT_OK(assembler.Add(parts[0]));
    common::v1::SnapshotPart second = parts[1];
    damage(second);
    EXPECT_THAT(assembler.Add(second), StatusIs(absl::StatusCode::kInvalidArgument)) << second.ShortDebugString().substr(0, 200);
    EXPECT_TRUE(assembler.empty());
  }
  SnapshotAssembler assembler;
  EXPECT_THAT(assembler.Add(parts[1]), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("offset")));
}

TEST(Snapshot, RefusesAWrongChecksum) {
  auto parts = Split(SomeSnapshot(2'000'000));
  parts[1].mutable_data()->back() ^= 1;
  SnapshotAssembler assembler;
  ASSERT_OK(assembler.Add(parts[0]));
  EXPECT_THAT(assembler.Add(parts[1]), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("checksum")));
  EXPECT_TRUE(assembler.empty());
}

TEST(Snapshot, RefusesAFileThatIsTooShort) {
  EXPECT_THAT(SplitSnapshot({{1, 1}, "short"}, [](const auto&) { return true; }), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST(Backoff, DoublesUpToItsLimit) {
  Backoff backoff(absl::Milliseconds(100), absl::Milliseconds(400));
  for (int limit : {100, 200, 400, 400, 400}) {
    const absl::Duration wait = backoff.Next();
    EXPECT_LE(wait, absl::Milliseconds(limit));
    EXPECT_GE(wait, absl::Milliseconds(limit / 2));
  }
  backoff.Reset();
  EXPECT_LE(backoff.Next(), absl::Milliseconds(100));
}

TEST(RetryUnavailable, RetriesOnlyUnavailable) {
  int calls = 0;
  auto third_time = [&](grpc::ClientContext&) {
    return ++calls < 3 ? grpc::Status(grpc::StatusCode::UNAVAILABLE, "away") : grpc::Status::OK;
  };
  EXPECT_OK(RetryUnavailable(absl::Now() + absl::Seconds(30), third_time));
  EXPECT_EQ(calls, 3);
  calls = 0;
  auto refused = [&](grpc::ClientContext&) {
    ++calls;
    return grpc::Status(grpc::StatusCode::NOT_FOUND, "no such run");
  };
  EXPECT_THAT(RetryUnavailable(absl::Now() + absl::Seconds(30), refused), StatusIs(absl::StatusCode::kNotFound, "no such run"));
  EXPECT_EQ(calls, 1);
  auto away = [](grpc::ClientContext&) { return grpc::Status(grpc::StatusCode::UNAVAILABLE, "away"); };
  EXPECT_THAT(RetryUnavailable(absl::Now() + absl::Milliseconds(120), away), StatusIs(absl::StatusCode::kUnavailable, "away"));
}

TEST(MakeChannel, RefusesAnEmptyAddress) {
  EXPECT_THAT(MakeChannel(""), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("HOST:PORT")));
}

}  // namespace
}  // namespace orrery
