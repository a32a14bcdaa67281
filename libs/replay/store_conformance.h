// What every store must do: one parameterised suite, instantiated by store_test.cc for each implementation.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <ostream>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "libs/base/status_matchers.h"
#include "libs/replay/store.h"
#include "libs/replay/testing/chunks.h"
#include "libs/replay/testing/fault_store.h"

namespace orrery {

// A place where one data set can be opened.
class StorePlace {
 public:
  virtual ~StorePlace() = default;
  // A new view of the data; those opened before must be closed first unless `shared`.
  virtual absl::StatusOr<std::unique_ptr<Store>> Open(int change_log_length) = 0;
  // Where it is, for what is done to whole data sets.
  virtual StoreOptions Options() = 0;
};

struct StoreKind {
  std::string name;
  std::function<std::unique_ptr<StorePlace>()> make;
  bool lasting = true;  // data outlives the store object
  bool shared = false;  // several may be open at once
};
inline void PrintTo(const StoreKind& kind, std::ostream* out) { *out << kind.name; }

class StoreConformance : public ::testing::TestWithParam<StoreKind> {
 protected:
  void SetUp() override { Open(); }
  void Open(int change_log_length = 100000) {
    store_.reset();
    auto store = place_->Open(change_log_length);
    ASSERT_OK(store);
    store_ = *std::move(store);
  }

  // Reads every change after `cursor` and moves it on; checks that batches keep to `max`.
  std::vector<Change> Drain(Store& store, std::string& cursor, int max = 7) {
    std::vector<Change> changes;
    while (true) {
      const auto batch = store.Changes(cursor, max, absl::ZeroDuration());
      EXPECT_OK(batch);
      if (!batch.ok()) return changes;
      EXPECT_LE(static_cast<int>(batch->changes.size()), max);
      changes.insert(changes.end(), batch->changes.begin(), batch->changes.end());
      cursor = batch->cursor;
      if (batch->caught_up) return changes;
    }
  }

  static void Apply(const std::vector<Change>& changes, std::map<ChunkKey, ChunkInfo>& live) {
    for (const Change& change : changes) {
      if (change.kind == Change::Kind::kAppend) {
        live[change.info.key] = change.info;
      } else {
        live.erase(change.info.key);
      }
    }
  }
  // What a reader that begins now finds live.
  std::map<ChunkKey, ChunkInfo> Live(Store& store, int max = 7) {
    std::string cursor;
    std::map<ChunkKey, ChunkInfo> live;
    Apply(Drain(store, cursor, max), live);
    return live;
  }

  // What ListDataSets says of this data set.
  std::optional<DataSetSummary> Listed() {
    const StoreOptions options = place_->Options();
    const auto all = ListDataSets(options.location, absl::Seconds(10));
    EXPECT_OK(all);
    std::optional<DataSetSummary> listed;
    for (const DataSetSummary& summary : all.value_or(std::vector<DataSetSummary>())) {
      if (summary.run != options.run) continue;
      EXPECT_FALSE(listed.has_value()) << "twice";
      listed = summary;
    }
    return listed;
  }

  std::unique_ptr<StorePlace> place_ = GetParam().make();
  std::unique_ptr<Store> store_;
};

TEST_P(StoreConformance, GivesBackWhatItWasGiven) {
  Chunk chunk = MakeChunk(5, 50, 10, std::string("\0\xff\n binary \r\n", 14));
  chunk.info.mode = EpisodeMode::kEvaluate;
  chunk.info.end = EpisodeEnd::kTerminated;
  chunk.info.reward_sum = -1.0 / 3;
  chunk.info.task = 7;
  const Chunk large = MakeChunk(6, 0, 50, std::string(3 << 20, 'x'));
  ASSERT_OK(store_->Append(chunk));
  ASSERT_OK(store_->Append(large));
  const std::vector<ChunkKey> keys = {{6, 0}, {5, 0}, {5, 50}, {7, 0}, {5, 50}};
  ASSERT_OK_AND_ASSIGN(const auto chunks, store_->Read(keys));
  ASSERT_EQ(chunks.size(), 5u);
  EXPECT_EQ(chunks[0], large);
  EXPECT_EQ(chunks[1], std::nullopt);
  EXPECT_EQ(chunks[2], chunk);
  EXPECT_EQ(chunks[3], std::nullopt);
  EXPECT_EQ(chunks[4], chunk);
  EXPECT_EQ(Live(*store_).at({5, 50}), chunk.info);
}

TEST_P(StoreConformance, StoresTheSameChunkOnceAndRefusesOtherContents) {
  const Chunk chunk = MakeChunk(1, 0);
  ASSERT_OK(store_->Append(chunk));
  EXPECT_OK(store_->Append(chunk));
  std::string cursor;
  EXPECT_EQ(Drain(*store_, cursor).size(), 1u);
  EXPECT_OK(store_->Append(chunk));
  EXPECT_EQ(Drain(*store_, cursor).size(), 0u);

  const auto refused = StatusIs(absl::StatusCode::kAlreadyExists, ::testing::HasSubstr("episode 1 at row 0"));
  EXPECT_THAT(store_->Append(MakeChunk(1, 0, 10, "Payload")), refused);
  EXPECT_THAT(store_->Append(MakeChunk(1, 0, 11)), refused);
  Chunk other_run = chunk;
  other_run.run_id = "another";
  EXPECT_THAT(store_->Append(other_run), refused);
  EXPECT_EQ((*store_->Read({chunk.info.key}))[0], chunk);
}

TEST_P(StoreConformance, RefusesChunksThatCannotBe) {
  const auto expect_refused = [&](absl::string_view field, auto change) {
    Chunk chunk = MakeChunk(1, 0);
    change(chunk);
    EXPECT_THAT(store_->Append(chunk), StatusIs(absl::StatusCode::kInvalidArgument, ::testing::HasSubstr(std::string(field))));
  };
  expect_refused("episode_id is 0", [](Chunk& c) { c.info.key.episode_id = 0; });
  expect_refused("first_row is -1", [](Chunk& c) { c.info.key.first_row = -1; });
  expect_refused("rows is 0", [](Chunk& c) { c.info.rows = 0; });
  expect_refused("task is -1", [](Chunk& c) { c.info.task = -1; });
  expect_refused("mode is 9", [](Chunk& c) { c.info.mode = static_cast<EpisodeMode>(9); });
  expect_refused("end is 0", [](Chunk& c) { c.info.end = static_cast<EpisodeEnd>(0); });
  expect_refused("payload_bytes is 3", [](Chunk& c) { c.info.payload_bytes = 3; });
  expect_refused("run_id", [](Chunk& c) { c.run_id = std::string(200, 'x'); });
  EXPECT_TRUE(Live(*store_).empty());
}

TEST_P(StoreConformance, KeepsExtremeNumbers) {
  Chunk chunk = MakeChunk(std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::max() - 1000);
  chunk.info.snapshot_version = {std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()};
  chunk.info.reward_sum = std::numeric_limits<double>::denorm_min();
  ASSERT_OK(store_->Append(chunk));
  EXPECT_EQ((*store_->Read({chunk.info.key}))[0], chunk);
  Chunk nan = MakeChunk(1, 0);
  nan.info.reward_sum = std::numeric_limits<double>::quiet_NaN();
  ASSERT_OK(store_->Append(nan));
  EXPECT_OK(store_->Append(nan));
  EXPECT_EQ(Live(*store_).size(), 2u);
}

TEST_P(StoreConformance, EmptyStoreIsCaughtUpAtOnce) {
  const absl::Time begin = absl::Now();
  ASSERT_OK_AND_ASSIGN(const ChangeBatch batch, store_->Changes("", 10, absl::Seconds(30)));
  EXPECT_TRUE(batch.changes.empty());
  EXPECT_TRUE(batch.caught_up);
  EXPECT_FALSE(batch.cursor.empty());
  EXPECT_LT(absl::Now() - begin, absl::Seconds(20));
  EXPECT_THAT(store_->Read({}), IsOkAndHolds(::testing::IsEmpty()));
  EXPECT_OK(store_->Evict({}));
}

TEST_P(StoreConformance, ListsLiveChunksByEpisodeAndRowThenFollowsTheLog) {
  for (const int64_t episode : {9, 2, 5, 1, 10}) {
    for (const int64_t row : {20, 0, 10}) ASSERT_OK(store_->Append(MakeChunk(episode, row)));
  }
  ASSERT_OK(store_->Evict({{5, 10}, {77, 0}, {5, 10}}));
  for (const int max : {1, 3, 7, 14, 100}) {
    std::string cursor;
    std::vector<ChunkKey> listed;
    for (const Change& change : Drain(*store_, cursor, max)) {
      EXPECT_EQ(change.kind, Change::Kind::kAppend);
      listed.push_back(change.info.key);
    }
    EXPECT_EQ(listed.size(), 14u);
    EXPECT_TRUE(std::is_sorted(listed.begin(), listed.end()));
  }
  std::string cursor;
  Drain(*store_, cursor);
  ASSERT_OK(store_->Append(MakeChunk(3, 0)));
  ASSERT_OK(store_->Evict({{9, 0}, {3, 0}, {3, 0}}));
  ASSERT_OK(store_->Append(MakeChunk(3, 0)));  // the store need not know it any more: then it is stored anew
  std::map<ChunkKey, ChunkInfo> live;
  const std::vector<Change> changes = Drain(*store_, cursor, 1);
  EXPECT_GE(changes.size(), 3u);
  EXPECT_EQ((*store_->Read({{9, 0}}))[0], std::nullopt);
  EXPECT_EQ((*store_->Read({{3, 0}}))[0].has_value(), Live(*store_).count({3, 0}) == 1);
}

TEST_P(StoreConformance, AReaderSeesWhatChangesWhileItLists) {
  for (int episode = 1; episode <= 20; ++episode) ASSERT_OK(store_->Append(MakeChunk(episode, 0)));
  ASSERT_OK_AND_ASSIGN(ChangeBatch batch, store_->Changes("", 10, absl::ZeroDuration()));
  EXPECT_EQ(batch.changes.size(), 10u);
  EXPECT_FALSE(batch.caught_up);
  ASSERT_OK(store_->Evict({{1, 0}, {15, 0}}));
  ASSERT_OK(store_->Append(MakeChunk(2, 10)));
  ASSERT_OK(store_->Append(MakeChunk(30, 0)));
  std::map<ChunkKey, ChunkInfo> live;
  Apply(batch.changes, live);
  Apply(Drain(*store_, batch.cursor), live);
  EXPECT_EQ(live, Live(*store_));
  EXPECT_EQ(live.size(), 20u);
}

TEST_P(StoreConformance, WaitsForAChange) {
  std::string cursor;
  Drain(*store_, cursor);
  ASSERT_OK_AND_ASSIGN(const ChangeBatch nothing, store_->Changes(cursor, 10, absl::Milliseconds(20)));
  EXPECT_TRUE(nothing.changes.empty());
  EXPECT_TRUE(nothing.caught_up);
  std::thread writer([&] { EXPECT_OK(store_->Append(MakeChunk(1, 0))); });
  ASSERT_OK_AND_ASSIGN(const ChangeBatch batch, store_->Changes(nothing.cursor, 10, absl::Seconds(60)));
  writer.join();
  ASSERT_EQ(batch.changes.size(), 1u);
  EXPECT_EQ(batch.changes[0].info, MakeChunk(1, 0).info);
}

TEST_P(StoreConformance, RefusesCursorsOfOthersAndOldOnes) {
  Open(/*change_log_length=*/5);
  std::string cursor;
  Drain(*store_, cursor);
  for (const std::string& wrong : {std::string("x"), std::string("1 2 3 4"), cursor + "9999999", std::string("\0\xff", 2),
                                   "0" + cursor, cursor + " x"}) {
    EXPECT_THAT(store_->Changes(wrong, 10, absl::ZeroDuration()), StatusIs(absl::StatusCode::kOutOfRange)) << wrong;
  }
  ASSERT_OK_AND_ASSIGN(const auto other, GetParam().make()->Open(5));
  EXPECT_THAT(other->Changes(cursor, 10, absl::ZeroDuration()), StatusIs(absl::StatusCode::kOutOfRange));
  // Redis trims its log by whole nodes of a hundred entries; every partition must get more than that.
  std::vector<ChunkKey> keys;
  for (int i = 1; i <= 250; ++i) {
    ASSERT_OK(store_->Append(MakeChunk(i, 0)));
    keys.push_back({i, 0});
  }
  for (int round = 0; round < 2; ++round) {
    EXPECT_THAT(store_->Changes(cursor, 10, absl::ZeroDuration()), StatusIs(absl::StatusCode::kOutOfRange));
    ASSERT_OK(store_->Evict(keys));
    EXPECT_TRUE(Live(*store_).empty());
  }
}

TEST_P(StoreConformance, SetsAValueOnlyAtItsVersion) {
  ASSERT_OK_AND_ASSIGN(VersionedValue value, store_->Get("run"));
  EXPECT_EQ(value.version, 0);
  EXPECT_THAT(store_->CompareAndSet("run", 1, "a"), StatusIs(absl::StatusCode::kAborted));
  const std::string binary("\0\n\xff{}", 5);
  ASSERT_OK(store_->CompareAndSet("run", 0, binary));
  EXPECT_THAT(store_->CompareAndSet("run", 0, "b"), StatusIs(absl::StatusCode::kAborted));
  ASSERT_OK_AND_ASSIGN(value, store_->Get("run"));
  EXPECT_EQ(value.value, binary);
  EXPECT_EQ(value.version, NextVersion(0, binary));
  const int64_t first = value.version;
  ASSERT_OK(store_->CompareAndSet("run", first, ""));
  EXPECT_THAT(store_->CompareAndSet("run", first, "b"), StatusIs(absl::StatusCode::kAborted));
  ASSERT_OK_AND_ASSIGN(value, store_->Get("run"));
  EXPECT_EQ(value.value, "");
  EXPECT_EQ(value.version, NextVersion(first, ""));
  EXPECT_EQ(store_->Get("learner")->version, 0);
  EXPECT_THAT(store_->Get("../x"), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(store_->CompareAndSet("", 0, "x"), StatusIs(absl::StatusCode::kInvalidArgument));
}

// As after a failover: two stores were the same until one value, and as many came after it.
TEST_P(StoreConformance, RefusesTheVersionOfAnotherValueThatCameAfterTheSameOne) {
  const std::unique_ptr<StorePlace> other_place = GetParam().make();
  ASSERT_OK_AND_ASSIGN(const auto other, other_place->Open(1000));
  for (Store* store : {store_.get(), other.get()}) ASSERT_OK(store->CompareAndSet("run", 0, "common"));
  ASSERT_OK_AND_ASSIGN(const VersionedValue common, store_->Get("run"));
  EXPECT_EQ(other->Get("run")->version, common.version);
  ASSERT_OK(store_->CompareAndSet("run", common.version, "ours"));
  ASSERT_OK(other->CompareAndSet("run", common.version, "theirs"));
  const int64_t ours = store_->Get("run")->version;
  EXPECT_THAT(other->CompareAndSet("run", ours, "ours again"), StatusIs(absl::StatusCode::kAborted));
  EXPECT_EQ(other->Get("run")->value, "theirs");
  // Nor do versions come again when a value does.
  ASSERT_OK(store_->CompareAndSet("run", ours, "common"));
  EXPECT_THAT(store_->CompareAndSet("run", common.version, "x"), StatusIs(absl::StatusCode::kAborted));
}

TEST_P(StoreConformance, LeavesOutAKnownValue) {
  const auto get = [&](const ValueIdentity& known) -> std::optional<VersionedValue> {
    const auto answer = store_->GetUnlessKnown("run", known);
    EXPECT_OK(answer);
    if (!answer.ok()) return std::nullopt;
    EXPECT_LT(absl::AbsDuration(answer->now - absl::Now()), absl::Minutes(1));
    return answer->value;
  };
  ASSERT_TRUE(get({}).has_value());
  EXPECT_EQ(get({})->version, 0);
  const std::string first("\0\n\xff{}", 5);
  ASSERT_OK(store_->CompareAndSet("run", 0, first));
  const int64_t version = NextVersion(0, first);
  const ValueIdentity known = IdentityOf({first, version});
  EXPECT_EQ(get(known), std::nullopt);
  for (const ValueIdentity& unknown : {ValueIdentity{}, IdentityOf({"another", version}), IdentityOf({first, 2})}) {
    ASSERT_TRUE(get(unknown).has_value());
    EXPECT_EQ(get(unknown)->value, first);
    EXPECT_EQ(get(unknown)->version, version);
  }
  ASSERT_OK(store_->CompareAndSet("run", version, ""));
  ASSERT_TRUE(get(known).has_value());
  EXPECT_EQ(get(known)->value, "");
  EXPECT_EQ(get(known)->version, NextVersion(version, ""));
  EXPECT_EQ(get(IdentityOf({"", NextVersion(version, "")})), std::nullopt);
  EXPECT_THAT(store_->GetUnlessKnown("../x", {}), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST_P(StoreConformance, KeepsTheNewestSnapshot) {
  EXPECT_THAT(store_->GetSnapshot(), StatusIs(absl::StatusCode::kNotFound));
  EXPECT_OK(store_->PutSnapshot({{0, 0}, "none"}));
  EXPECT_THAT(store_->GetSnapshot(), StatusIs(absl::StatusCode::kNotFound));
  const auto expect = [&](SnapshotVersion version, const std::string& file) {
    const auto snapshot = store_->GetSnapshot();
    ASSERT_OK(snapshot);
    EXPECT_EQ(snapshot->version, version);
    EXPECT_EQ(snapshot->file, file);
  };
  const std::string large = std::string("\0\n\xff", 3) + std::string(2 << 20, 's');
  EXPECT_OK(store_->PutSnapshot({{1, 0}, large}));
  expect({1, 0}, large);
  EXPECT_OK(store_->PutSnapshot({{1, 9}, "nine"}));
  EXPECT_OK(store_->PutSnapshot({{1, 10}, "ten"}));
  EXPECT_OK(store_->PutSnapshot({{1, 9}, "late"}));
  EXPECT_OK(store_->PutSnapshot({{1, 10}, "again"}));
  expect({1, 10}, "ten");
  EXPECT_OK(store_->PutSnapshot({{2, 0}, "next"}));
  EXPECT_OK(store_->PutSnapshot({{1, 500}, "old generation"}));
  expect({2, 0}, "next");
}

TEST_P(StoreConformance, HasAClock) {
  ASSERT_OK_AND_ASSIGN(const absl::Time now, store_->Now());
  EXPECT_LT(absl::AbsDuration(now - absl::Now()), absl::Minutes(1));
}

TEST_P(StoreConformance, ManyThreadsAtOnce) {
  constexpr int kThreads = 6, kChunks = 15;
  std::atomic<int> sets = 0;
  std::map<ChunkKey, ChunkInfo> seen;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kChunks; ++i) {
        EXPECT_OK(store_->Append(MakeChunk(1 + t, i * 10)));
        EXPECT_OK(store_->Append(MakeChunk(100, i * 10)));  // all threads the same
        const auto value = store_->Get("count");
        ASSERT_OK(value);
        int count = 0;
        EXPECT_TRUE(value->version == 0 || absl::SimpleAtoi(value->value, &count));
        const absl::Status status = store_->CompareAndSet("count", value->version, absl::StrCat(count + 1));
        if (status.ok()) {
          ++sets;
        } else {
          EXPECT_THAT(status, StatusIs(absl::StatusCode::kAborted));
        }
        EXPECT_THAT(store_->Read({{1 + t, i * 10}}), IsOkAndHolds(::testing::Each(::testing::Optional(::testing::_))));
      }
    });
  }
  // A reader beside them sees everything, each chunk once.
  std::string cursor;
  const absl::Time deadline = absl::Now() + absl::Seconds(60);
  while (seen.size() < (kThreads + 1) * kChunks && absl::Now() < deadline) {
    const auto batch = store_->Changes(cursor, 10, absl::Seconds(1));
    ASSERT_OK(batch);
    for (const Change& change : batch->changes) seen[change.info.key] = change.info;
    cursor = batch->cursor;
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(seen.size(), static_cast<size_t>((kThreads + 1) * kChunks));
  EXPECT_EQ(seen, Live(*store_));
  EXPECT_EQ(store_->Get("count")->value, absl::StrCat(sets.load()));
}

// Random appends (repeats and lost replies included) and evictions against a plain map, with a reader that follows.
TEST_P(StoreConformance, AgreesWithAPlainMapWhateverIsLost) {
  std::mt19937_64 random(11);
  FaultStore faulty(store_.get(), 3);
  std::map<ChunkKey, Chunk> model;
  std::map<ChunkKey, ChunkInfo> followed;
  std::string cursor;
  for (int step = 0; step < 150; ++step) {
    const ChunkKey key{1 + static_cast<int64_t>(random() % 6), static_cast<int64_t>(random() % 5) * 10};
    const Chunk chunk = MakeChunk(key.episode_id, key.first_row, 10, std::string(key.episode_id * 100, 'p'));
    if (random() % 3 < 2) {
      while (!faulty.Append(chunk).ok()) {
      }
      model.emplace(key, chunk);
    } else {
      while (!faulty.Evict({key}).ok()) {
      }
      model.erase(key);
    }
    if (step % 10 == 0) Apply(Drain(*store_, cursor), followed);
  }
  Apply(Drain(*store_, cursor), followed);
  if (GetParam().lasting) Open();
  std::map<ChunkKey, ChunkInfo> expected;
  std::vector<ChunkKey> keys;
  for (const auto& [key, chunk] : model) {
    expected[key] = chunk.info;
    keys.push_back(key);
  }
  EXPECT_EQ(followed, expected);
  EXPECT_EQ(Live(*store_), expected);
  ASSERT_OK_AND_ASSIGN(const auto chunks, store_->Read(keys));
  for (size_t i = 0; i < keys.size(); ++i) EXPECT_EQ(chunks[i], model.at(keys[i]));
  EXPECT_GT(faulty.faults(), 20);
}

TEST_P(StoreConformance, FindsEverythingAgainWhenOpenedAgain) {
  if (!GetParam().lasting) GTEST_SKIP() << "its data ends with it";
  for (int episode = 1; episode <= 5; ++episode) ASSERT_OK(store_->Append(MakeChunk(episode, 0)));
  ASSERT_OK(store_->Evict({{2, 0}}));
  ASSERT_OK(store_->CompareAndSet("run", 0, "state\nof the run"));
  ASSERT_OK(store_->PutSnapshot({{1, 2}, "snapshot\nfile"}));
  Open();
  EXPECT_EQ(Live(*store_).size(), 4u);
  EXPECT_EQ((*store_->Read({{2, 0}}))[0], std::nullopt);
  EXPECT_EQ((*store_->Read({{5, 0}}))[0], MakeChunk(5, 0));
  EXPECT_EQ(store_->Get("run")->value, "state\nof the run");
  EXPECT_EQ(store_->Get("run")->version, NextVersion(0, "state\nof the run"));
  EXPECT_OK(store_->PutSnapshot({{1, 1}, "older"}));
  EXPECT_EQ(store_->GetSnapshot()->file, "snapshot\nfile");
  EXPECT_OK(store_->Append(MakeChunk(5, 0)));
  EXPECT_THAT(store_->Append(MakeChunk(5, 0, 10, "other")), StatusIs(absl::StatusCode::kAlreadyExists));
}

TEST_P(StoreConformance, ReplicasSeeEachOther) {
  if (!GetParam().shared) GTEST_SKIP() << "one at a time";
  ASSERT_OK_AND_ASSIGN(const auto other, place_->Open(100000));
  std::string cursor;
  Drain(*other, cursor);
  ASSERT_OK(store_->Append(MakeChunk(1, 0)));
  EXPECT_EQ(Drain(*other, cursor).size(), 1u);
  EXPECT_EQ((*other->Read({{1, 0}}))[0], MakeChunk(1, 0));
  EXPECT_OK(other->Append(MakeChunk(1, 0)));
  ASSERT_OK(other->Evict({{1, 0}}));
  EXPECT_EQ((*store_->Read({{1, 0}}))[0], std::nullopt);
  ASSERT_OK(other->CompareAndSet("run", 0, "x"));
  EXPECT_THAT(store_->CompareAndSet("run", 0, "y"), StatusIs(absl::StatusCode::kAborted));
  // A cursor is good at every replica.
  EXPECT_EQ(Drain(*store_, cursor).size(), 1u);
}

TEST_P(StoreConformance, IsListedAndDeleted) {
  const auto not_found = StatusIs(absl::StatusCode::kNotFound);
  if (!GetParam().lasting) {
    EXPECT_EQ(Listed(), std::nullopt);
    EXPECT_THAT(DeleteDataSet(place_->Options()), not_found);
    return;
  }
  for (int episode = 1; episode <= 9; ++episode) {
    ASSERT_OK(store_->Append(MakeChunk(episode, 0, 10, std::string(episode * 100, 'x'))));
  }
  ASSERT_OK(store_->Evict({{9, 0}, {8, 0}}));
  ASSERT_OK(store_->CompareAndSet("run", 0, "state"));
  ASSERT_OK(store_->PutSnapshot({{1, 2}, "snapshot"}));
  for (const bool open : {true, false}) {
    if (!open) store_.reset();
    const std::optional<DataSetSummary> listed = Listed();
    ASSERT_TRUE(listed.has_value());
    EXPECT_EQ(listed->chunks, 7);
    EXPECT_EQ(listed->bytes, 100 + 200 + 300 + 400 + 500 + 600 + 700);
    if (open && !GetParam().shared) {
      EXPECT_THAT(DeleteDataSet(place_->Options()), StatusIs(absl::StatusCode::kFailedPrecondition));
      EXPECT_EQ(Live(*store_).size(), 7u);
    }
  }
  ASSERT_OK(DeleteDataSet(place_->Options()));
  EXPECT_EQ(Listed(), std::nullopt);
  EXPECT_THAT(DeleteDataSet(place_->Options()), not_found);
  Open();
  EXPECT_TRUE(Live(*store_).empty());
  EXPECT_EQ((*store_->Read({{1, 0}}))[0], std::nullopt);
  EXPECT_EQ(store_->Get("run")->version, 0);
  EXPECT_THAT(store_->GetSnapshot(), not_found);
  EXPECT_EQ(Listed().value_or(DataSetSummary{"", -1}).chunks, 0);
}

}  // namespace orrery
