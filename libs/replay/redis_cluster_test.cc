// The Redis store on real clusters: slots that move, nodes that die. What a store must do anyway is tested by store_test.cc.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/replay/redis_slots.h"
#include "libs/replay/store.h"
#include "libs/replay/testing/chunks.h"
#include "libs/replay/testing/redis_cluster.h"

namespace orrery {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// Follows a store from a cursor on, in a thread of its own, and counts how often it was told of each chunk.
class Follower {
 public:
  Follower(Store* store, std::string cursor) : store_(store), cursor_(std::move(cursor)), thread_([this] { Follow(); }) {}
  ~Follower() {
    stop_ = true;
    thread_.join();
  }
  // Once it has seen this many chunks, or after a minute.
  std::map<ChunkKey, int> Await(size_t chunks) {
    const auto enough = [&] {
      mu_.AssertReaderHeld();
      return seen_.size() >= chunks;
    };
    absl::MutexLock lock(&mu_);
    mu_.AwaitWithTimeout(absl::Condition(&enough), absl::Minutes(1));
    return seen_;
  }

 private:
  void Follow() {
    while (!stop_) {
      const auto batch = store_->Changes(cursor_, 100, absl::Seconds(1));
      ASSERT_OK(batch);
      cursor_ = batch->cursor;
      absl::MutexLock lock(&mu_);
      for (const Change& change : batch->changes) ++seen_[change.info.key];
    }
  }

  Store* const store_;
  std::string cursor_;  // of the thread
  std::atomic<bool> stop_ = false;
  absl::Mutex mu_;
  std::map<ChunkKey, int> seen_ ABSL_GUARDED_BY(mu_);
  std::thread thread_;
};

class RedisClusterTest : public ::testing::Test {
 protected:
  StoreOptions Options(RedisCluster& cluster, int partitions) const {
    return {.location = cluster.url(), .run = run_, .partitions = partitions, .timeout = absl::Seconds(30)};
  }
  std::unique_ptr<Store> Open(RedisCluster& cluster, int partitions, absl::Duration timeout = absl::Seconds(30)) {
    StoreOptions options = Options(cluster, partitions);
    options.timeout = timeout;
    auto store = OpenStore(options);
    EXPECT_OK(store);
    return store.ok() ? *std::move(store) : nullptr;
  }
  std::string PartitionKey(int p, const std::string& name) const { return absl::StrCat("orrery:{", run_, ":", p, "}:", name); }
  int Slot(RedisCluster& cluster, int p) const {
    int slot = -1;
    EXPECT_TRUE(absl::SimpleAtoi(cluster.Ask(0, {"CLUSTER", "KEYSLOT", PartitionKey(p, "live")}), &slot));
    return slot;
  }
  // Every chunk of episodes 1 to `episodes`, and each only once in the list of live chunks and in the log.
  void ExpectAllOnce(RedisCluster& cluster, Store& store, int episodes, int partitions) {
    std::vector<ChunkKey> keys;
    for (int i = 1; i <= episodes; ++i) keys.push_back({i, 0});
    ASSERT_OK_AND_ASSIGN(const auto chunks, store.Read(keys));
    for (int i = 1; i <= episodes; ++i) EXPECT_EQ(chunks[i - 1], MakeChunk(i, 0)) << "episode " << i;
    ASSERT_OK_AND_ASSIGN(const ChangeBatch all, store.Changes("", episodes + 1, absl::ZeroDuration()));
    std::vector<ChunkKey> listed;
    for (const Change& change : all.changes) listed.push_back(change.info.key);
    EXPECT_EQ(listed, keys);
    int logged = 0;
    for (int p = 0; p < partitions; ++p) {
      int entries = 0;
      EXPECT_TRUE(absl::SimpleAtoi(cluster.Ask(cluster.Owner(Slot(cluster, p)), {"XLEN", PartitionKey(p, "log")}), &entries));
      logged += entries;
    }
    EXPECT_EQ(logged, episodes);
  }

  // Names differ, so that tests can share a cluster.
  const std::string run_ = ::testing::UnitTest::GetInstance()->current_test_info()->name();
};

// These leave the cluster as it was, so they share one.
class SharedClusterTest : public RedisClusterTest {
 protected:
  static void SetUpTestSuite() {
    folder_ = std::make_unique<TempDir>();
    auto cluster = RedisCluster::Start(folder_->path());
    ASSERT_OK(cluster);
    cluster_ = *std::move(cluster);
  }
  static void TearDownTestSuite() {
    cluster_.reset();
    folder_.reset();
  }
  void SetUp() override { ASSERT_NE(cluster_, nullptr); }

  static std::unique_ptr<TempDir> folder_;
  static std::unique_ptr<RedisCluster> cluster_;
};
std::unique_ptr<TempDir> SharedClusterTest::folder_;
std::unique_ptr<RedisCluster> SharedClusterTest::cluster_;

TEST_F(SharedClusterTest, KeysHaveTheSlotsThatRedisSays) {
  std::mt19937_64 random(3);
  const std::string letters("ab{}{}:\0\xff", 9);
  for (int i = 0; i < 300; ++i) {
    std::string key(random() % 12, '\0');
    for (char& c : key) c = letters[random() % letters.size()];
    EXPECT_EQ(cluster_->Ask(0, {"CLUSTER", "KEYSLOT", key}), absl::StrCat(RedisKeySlot(key))) << ::testing::PrintToString(key);
  }
}

TEST_F(SharedClusterTest, SpreadsPartitionsOverTheNodesAndDeletesThemAll) {
  constexpr int kPartitions = 24;
  {
    const auto store = Open(*cluster_, kPartitions);
    for (int i = 1; i <= 48; ++i) ASSERT_OK(store->Append(MakeChunk(i, 0)));
    ASSERT_OK(store->PutSnapshot({{1, 1}, "file"}));
    ExpectAllOnce(*cluster_, *store, 48, kPartitions);
  }
  std::vector<int> partitions_of(cluster_->size());
  for (int p = 0; p < kPartitions; ++p) ++partitions_of[cluster_->Owner(Slot(*cluster_, p))];
  EXPECT_THAT(partitions_of, ::testing::Each(::testing::Gt(0)));
  EXPECT_THAT(ListDataSets(cluster_->url(), absl::Seconds(10)),
              IsOkAndHolds(::testing::Contains(DataSetSummary{run_, 48, 48 * 7})));
  ASSERT_OK(DeleteDataSet(Options(*cluster_, kPartitions)));
  for (int i = 0; i < cluster_->size(); ++i) EXPECT_EQ(cluster_->Ask(i, {"KEYS", absl::StrCat("orrery:{", run_, "*")}), "[]");
  EXPECT_THAT(DeleteDataSet(Options(*cluster_, kPartitions)), StatusIs(absl::StatusCode::kNotFound));
}

TEST_F(SharedClusterTest, ScriptsThatNodesForgotAreSentAgain) {
  const auto store = Open(*cluster_, 6);
  for (int i = 1; i <= 12; ++i) {
    if (i % 6 == 1) {
      for (int n = 0; n < cluster_->size(); ++n) EXPECT_EQ(cluster_->Ask(n, {"SCRIPT", "FLUSH"}), "OK");
    }
    ASSERT_OK(store->Append(MakeChunk(i, 0)));
  }
  ExpectAllOnce(*cluster_, *store, 12, 6);
}

// The wait of a minute would outlast the test if a change did not end it.
TEST_F(SharedClusterTest, AChangeOfAnyPartitionEndsTheWait) {
  constexpr int kPartitions = 8;
  const auto store = Open(*cluster_, kPartitions);
  ASSERT_OK_AND_ASSIGN(ChangeBatch batch, store->Changes("", 10, absl::ZeroDuration()));
  for (int i = 1; i <= 2 * kPartitions; ++i) {
    std::thread writer([&] { EXPECT_OK(store->Append(MakeChunk(i, 0))); });
    const auto next = store->Changes(batch.cursor, 10, absl::Minutes(1));
    writer.join();
    ASSERT_OK(next);
    ASSERT_EQ(next->changes.size(), 1u);
    EXPECT_EQ(next->changes[0].info.key, (ChunkKey{i, 0}));
    batch = *next;
  }
  ASSERT_OK_AND_ASSIGN(const ChangeBatch nothing, store->Changes(batch.cursor, 10, absl::Milliseconds(20)));
  EXPECT_TRUE(nothing.changes.empty());
  EXPECT_TRUE(nothing.caught_up);
}

TEST_F(SharedClusterTest, FollowsSlotsThatMoveWhileChunksAreAppended) {
  constexpr int kPartitions = 3, kMoves = 7;
  const auto store = Open(*cluster_, kPartitions);
  const auto reader = Open(*cluster_, kPartitions);
  ASSERT_OK_AND_ASSIGN(const ChangeBatch empty, reader->Changes("", 10, absl::ZeroDuration()));
  Follower follower(reader.get(), empty.cursor);
  std::atomic<int> acknowledged = 0;
  std::atomic<bool> stop = false;
  std::thread writer([&] {
    for (int i = 1; !stop; ++i) {
      const absl::Status status = store->Append(MakeChunk(i, 0));
      EXPECT_OK(status);
      if (!status.ok()) return;
      acknowledged = i;
    }
  });
  const auto await_more = [&](int more) {
    const int goal = acknowledged + more;
    const absl::Time deadline = absl::Now() + absl::Minutes(1);
    while (acknowledged < goal && absl::Now() < deadline) std::this_thread::yield();
    EXPECT_GE(acknowledged, goal);
  };
  for (int move = 0; move < kMoves; ++move) {
    await_more(20);
    const int slot = Slot(*cluster_, move % kPartitions);
    const int from = cluster_->Owner(slot), to = (from + 1) % cluster_->size();
    EXPECT_EQ(cluster_->BeginMove(slot, from, to), "");
    std::string moved;
    while (moved.empty()) moved = cluster_->MoveKeys(slot, from, to, 10);
    EXPECT_EQ(moved, "NOKEY");
    EXPECT_EQ(cluster_->EndMove(slot, from, to), "");
    EXPECT_EQ(cluster_->Owner(slot), to);
  }
  await_more(20);
  stop = true;
  writer.join();
  ExpectAllOnce(*cluster_, *store, acknowledged, kPartitions);
  const std::map<ChunkKey, int> seen = follower.Await(acknowledged);
  EXPECT_EQ(seen.size(), static_cast<size_t>(acknowledged));
  for (const auto& [key, times] : seen) EXPECT_EQ(times, 1) << "episode " << key.episode_id;
}

TEST_F(SharedClusterTest, ReadsFromASlotThatIsHalfMovedAndAppendsOnceItHasMoved) {
  const auto store = Open(*cluster_, 1);
  for (int i = 1; i <= 20; ++i) ASSERT_OK(store->Append(MakeChunk(i, 0)));
  const int slot = Slot(*cluster_, 0);
  const int from = cluster_->Owner(slot), to = (from + 1) % cluster_->size();
  EXPECT_EQ(cluster_->BeginMove(slot, from, to), "");
  EXPECT_EQ(cluster_->MoveKeys(slot, from, to, 10), "");
  const std::string here = cluster_->Ask(from, {"CLUSTER", "COUNTKEYSINSLOT", absl::StrCat(slot)});
  const std::string there = cluster_->Ask(to, {"CLUSTER", "COUNTKEYSINSLOT", absl::StrCat(slot)});
  EXPECT_EQ(here, "13");  // of 20 chunks, live, log and sequence
  EXPECT_EQ(there, "10");
  std::vector<ChunkKey> keys;
  for (int i = 1; i <= 20; ++i) keys.push_back({i, 0});
  ASSERT_OK_AND_ASSIGN(const auto chunks, store->Read(keys));
  for (int i = 1; i <= 20; ++i) EXPECT_EQ(chunks[i - 1], MakeChunk(i, 0)) << "episode " << i;

  // A script needs all its keys at one node. It is tried again until the timeout has passed.
  const auto hasty = Open(*cluster_, 1, absl::Seconds(1));
  EXPECT_THAT(hasty->Append(MakeChunk(21, 0)),
              StatusIs(absl::StatusCode::kUnavailable, AllOf(HasSubstr("Redis at 127.0.0.1:"), HasSubstr("TRYAGAIN"))));
  std::thread writer([&] { EXPECT_OK(store->Append(MakeChunk(21, 0))); });
  std::string moved;
  while (moved.empty()) moved = cluster_->MoveKeys(slot, from, to, 10);
  EXPECT_EQ(moved, "NOKEY");
  EXPECT_EQ(cluster_->EndMove(slot, from, to), "");
  writer.join();
  ExpectAllOnce(*cluster_, *store, 21, 1);
}

TEST_F(SharedClusterTest, RunsAScriptAtANodeThatDoesNotKnowItAndGetsTheSlot) {
  const auto store = Open(*cluster_, 1);
  ASSERT_OK(store->CompareAndSet("old", 0, "x"));
  const int slot = RedisKeySlot("{" + run_ + "}");
  const int from = cluster_->Owner(slot), to = (from + 1) % cluster_->size();
  const std::string key = absl::StrCat("orrery:{", run_, "}:value:new");
  EXPECT_EQ(cluster_->Ask(to, {"SCRIPT", "FLUSH"}), "OK");
  EXPECT_EQ(cluster_->BeginMove(slot, from, to), "");
  ASSERT_OK(store->CompareAndSet("new", 0, "y"));
  EXPECT_EQ(cluster_->Ask(to, {"CLUSTER", "GETKEYSINSLOT", absl::StrCat(slot), "10"}), "[" + key + "]");
  EXPECT_EQ(store->Get("new")->value, "y");
  EXPECT_EQ(store->Get("old")->value, "x");
  EXPECT_EQ(cluster_->MoveKeys(slot, from, to, 10), "");
  EXPECT_EQ(cluster_->EndMove(slot, from, to), "");
  EXPECT_THAT(store->CompareAndSet("old", 0, "z"), StatusIs(absl::StatusCode::kAborted));
  EXPECT_OK(store->CompareAndSet("new", NextVersion(0, "y"), "z"));
}

TEST_F(SharedClusterTest, OneNodeThatAnswersIsEnoughToOpen) {
  ASSERT_OK_AND_ASSIGN(const int dead, FreePort());
  const auto open = [&](const std::string& endpoints) {
    return OpenStore({.location = "redis-cluster://" + endpoints, .run = run_, .timeout = absl::Seconds(2)});
  };
  const std::string alive = absl::StrCat("127.0.0.1:", cluster_->node(2).port());
  ASSERT_OK_AND_ASSIGN(const auto store, open(absl::StrCat("127.0.0.1:", dead, ",", alive)));
  EXPECT_OK(store->Append(MakeChunk(1, 0)));
  EXPECT_THAT(open(absl::StrCat("127.0.0.1:", dead)),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr(absl::StrCat("Redis at 127.0.0.1:", dead, ": cannot connect"))));
}

TEST_F(SharedClusterTest, SaysThatItIsACluster) {
  const int other = (cluster_->Owner(RedisKeySlot("{" + run_ + "}")) + 1) % cluster_->size();
  EXPECT_THAT(OpenStore({.location = cluster_->node(other).url(), .run = run_}),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("part of a cluster, expected redis-cluster://")));
}

// Replicas get changes after they were acknowledged: only what had reached the replica is promised (docs/replay_storage.md).
TEST_F(RedisClusterTest, GoesOnWithTheReplicaOfAPrimaryThatWasKilled) {
  constexpr int kPartitions = 8, kEpisodes = 40;
  TempDir folder;
  ASSERT_OK_AND_ASSIGN(const auto cluster,
                       RedisCluster::Start(folder.path(), {.replicas = 1, .node_timeout = absl::Seconds(2)}));
  const auto store = Open(*cluster, kPartitions);
  for (int i = 1; i <= kEpisodes; ++i) ASSERT_OK(store->Append(MakeChunk(i, 0)));
  ASSERT_OK(store->CompareAndSet("run", 0, "state"));
  ASSERT_OK_AND_ASSIGN(const ChangeBatch before, store->Changes("", 1000, absl::ZeroDuration()));
  EXPECT_EQ(before.changes.size(), static_cast<size_t>(kEpisodes));
  int lost = 0;
  for (int p = 0; p < kPartitions; ++p) lost += cluster->Owner(Slot(*cluster, p)) == 0 ? 1 : 0;
  ASSERT_GT(lost, 0) << "no partition on the node that is to die";
  const int replica = 3;
  ASSERT_OK(cluster->AwaitReplication(0, replica));
  cluster->node(0).Kill();

  for (int i = kEpisodes + 1; i <= 2 * kEpisodes; ++i) ASSERT_OK(store->Append(MakeChunk(i, 0))) << "episode " << i;
  EXPECT_THAT(cluster->Ask(replica, {"INFO", "replication"}), HasSubstr("role:master"));
  EXPECT_OK(store->Now());
  EXPECT_EQ(store->Get("run")->value, "state");
  EXPECT_OK(store->CompareAndSet("run", NextVersion(0, "state"), "next"));
  // A reader that goes on where it was gets what is new, once.
  std::string cursor = before.cursor;
  std::vector<ChunkKey> fresh;
  bool caught_up = false;
  while (!caught_up) {
    ASSERT_OK_AND_ASSIGN(const ChangeBatch batch, store->Changes(cursor, 1000, absl::ZeroDuration()));
    for (const Change& change : batch.changes) fresh.push_back(change.info.key);
    cursor = batch.cursor;
    caught_up = batch.caught_up;
  }
  std::sort(fresh.begin(), fresh.end());
  ASSERT_EQ(fresh.size(), static_cast<size_t>(kEpisodes));
  for (int i = 0; i < kEpisodes; ++i) EXPECT_EQ(fresh[i], (ChunkKey{kEpisodes + 1 + i, 0}));

  // The dead one comes back as a replica.
  ASSERT_OK(cluster->node(0).Restart());
  ASSERT_OK(cluster->AwaitReplication(replica, 0));
  ASSERT_OK(store->Append(MakeChunk(2 * kEpisodes + 1, 0)));
  const auto other = Open(*cluster, kPartitions);
  ExpectAllOnce(*cluster, *other, 2 * kEpisodes + 1, kPartitions);

  // Without any node each call ends, and says which one it wanted.
  const auto hasty = Open(*cluster, kPartitions, absl::Seconds(1));
  for (int i = 0; i < cluster->size(); ++i) cluster->node(i).Kill();
  EXPECT_THAT(hasty->Append(MakeChunk(1, 10)), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("Redis at 127.0.0.1:")));
  EXPECT_THAT(hasty->CompareAndSet("run", 2, "x"), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("Redis at 127.0.0.1:")));
}

}  // namespace
}  // namespace orrery
