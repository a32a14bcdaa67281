#include "libs/replay/redis_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <hiredis.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <set>
#include <thread>

#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/config/config.h"
#include "libs/replay/chunk_codec.h"
#include "libs/replay/run_coordinator.h"
#include "libs/replay/testing/chunks.h"
#include "libs/replay/testing/redis_server.h"

namespace orrery {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class RedisStoreTest : public ::testing::Test {
 protected:
  void Start(std::vector<std::string> arguments = {}) {
    auto server = RedisServer::Start(folder_.path(), std::move(arguments));
    ASSERT_OK(server);
    server_ = *std::move(server);
  }
  absl::StatusOr<std::unique_ptr<Store>> TryOpen(const std::string& login = "", int partitions = 4) {
    const std::string location = absl::StrCat("redis://", login, "127.0.0.1:", server_->port());
    return OpenStore({.location = location, .run = "r", .partitions = partitions, .timeout = absl::Seconds(5)});
  }
  std::unique_ptr<Store> Open(int partitions = 4) {
    auto store = TryOpen("", partitions);
    EXPECT_OK(store);
    return store.ok() ? *std::move(store) : nullptr;
  }
  // A reply as text: arrays in brackets, a missing value as "-".
  static std::string Text(const redisReply& r) {
    if (r.type == REDIS_REPLY_INTEGER) return absl::StrCat(r.integer);
    if (r.type == REDIS_REPLY_NIL) return "-";
    if (r.type != REDIS_REPLY_ARRAY) return std::string(r.str, r.len);
    std::string text = "[";
    for (size_t i = 0; i < r.elements; ++i) absl::StrAppend(&text, i > 0 ? ", " : "", Text(*r.element[i]));
    return text + "]";
  }
  // Asks Redis itself, as another program would.
  std::string Ask(const std::vector<std::string>& words) {
    const std::unique_ptr<redisContext, void (*)(redisContext*)> context(redisConnect("127.0.0.1", server_->port()), redisFree);
    std::vector<const char*> argv;
    std::vector<size_t> sizes;
    for (const std::string& word : words) {
      argv.push_back(word.data());
      sizes.push_back(word.size());
    }
    const std::unique_ptr<void, void (*)(void*)> reply(
        redisCommandArgv(context.get(), static_cast<int>(argv.size()), argv.data(), sizes.data()), freeReplyObject);
    return reply == nullptr ? "no answer" : Text(*static_cast<const redisReply*>(reply.get()));
  }

  TempDir folder_;
  std::unique_ptr<RedisServer> server_;
};

// docs/replay_storage.md, read with nothing but Redis and the chunk codec.
TEST_F(RedisStoreTest, KeepsItsDataAsDocumented) {
  Start();
  const auto store = Open(4);
  const ArrayMap rows = {{kReward, Array::From<float>({1, 2, 3}, {3})}};
  const std::string payload = *EncodeRows(rows);
  Chunk chunk = MakeChunk(6, 0, 3, payload);
  chunk.info.reward_sum = 6;
  ASSERT_OK(store->Append(chunk));
  ASSERT_OK(store->Append(MakeChunk(7, 50)));
  ASSERT_OK(store->Evict({{7, 50}}));
  ASSERT_OK(store->CompareAndSet("run", 0, "state"));
  ASSERT_OK(store->PutSnapshot({{2, 17}, "file"}));

  EXPECT_EQ(Ask({"HMGET", "orrery:{r}:data_set", "schema", "partitions"}), "[1, 4]");
  EXPECT_EQ(Ask({"STRLEN", "orrery:{r}:data_set"}).substr(0, 9), "WRONGTYPE");
  const std::string info = "6 0 3 2 1 fedcba9876543210 3 400 6 " + std::to_string(payload.size());
  EXPECT_EQ(Ask({"HGET", "orrery:{r:2}:chunk:6:0", "run_id"}), "0123456789abcdef");
  EXPECT_EQ(Ask({"HGET", "orrery:{r:2}:chunk:6:0", "info"}), info);
  EXPECT_THAT(DecodeRows(Ask({"HGET", "orrery:{r:2}:chunk:6:0", "payload"}), 3), IsOkAndHolds(rows));
  EXPECT_EQ(Ask({"ZRANGE", "orrery:{r:2}:live", "0", "-1"}), "[0000000000000006:0000000000000000 " + info + "]");
  EXPECT_EQ(Ask({"XRANGE", "orrery:{r:2}:log", "-", "+"}), "[[1-0, [append, " + info + "]]]");
  EXPECT_EQ(Ask({"GET", "orrery:{r:2}:sequence"}), "1");
  EXPECT_EQ(Ask({"EXISTS", "orrery:{r:3}:chunk:7:50"}), "0");
  EXPECT_EQ(Ask({"ZCARD", "orrery:{r:3}:live"}), "0");
  EXPECT_EQ(Ask({"GET", "orrery:{r:3}:sequence"}), "2");
  EXPECT_THAT(Ask({"XRANGE", "orrery:{r:3}:log", "2-0", "+"}), ::testing::StartsWith("[[2-0, [evict, 7 50 10 "));
  EXPECT_EQ(Ask({"HMGET", "orrery:{r}:value:run", "version", "value"}), "[1, state]");
  EXPECT_EQ(Ask({"HMGET", "orrery:{r}:snapshot", "generation", "counter", "file"}), "[2, 17, file]");
}

TEST_F(RedisStoreTest, LosesNothingThatWasAcknowledgedWhenRedisIsKilled) {
  Start();
  const auto store = Open();
  std::atomic<int> acknowledged = 0;
  std::atomic<bool> stop = false;
  std::thread writer([&] {
    for (int i = 1; !stop; ++i) {
      absl::Status status;
      while (!(status = store->Append(MakeChunk(i, 0, 10, std::string(1000, 'a' + i % 26)))).ok()) {
        EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable));
        if (stop) return;
      }
      acknowledged = i;
    }
  });
  for (int round = 0; round < 2; ++round) {
    const int before = acknowledged;
    while (acknowledged < before + 50) std::this_thread::yield();
    server_->Kill();
    ASSERT_OK(server_->Restart());
  }
  const int before = acknowledged;
  while (acknowledged < before + 10) std::this_thread::yield();
  stop = true;
  writer.join();
  const auto other = Open();  // an empty replica elsewhere
  std::vector<ChunkKey> keys;
  for (int i = 1; i <= acknowledged; ++i) keys.push_back({i, 0});
  ASSERT_OK_AND_ASSIGN(const auto chunks, other->Read(keys));
  for (int i = 1; i <= acknowledged; ++i) {
    ASSERT_TRUE(chunks[i - 1].has_value()) << i;
    EXPECT_EQ(chunks[i - 1]->payload, std::string(1000, 'a' + i % 26));
  }
  ASSERT_OK_AND_ASSIGN(const ChangeBatch all, other->Changes("", 1 << 20, absl::ZeroDuration()));
  EXPECT_GE(static_cast<int>(all.changes.size()), acknowledged.load());
}

TEST_F(RedisStoreTest, ACursorSurvivesARestartOfRedis) {
  Start();
  const auto store = Open();
  ASSERT_OK(store->Append(MakeChunk(1, 0)));
  ASSERT_OK_AND_ASSIGN(const ChangeBatch first, store->Changes("", 10, absl::ZeroDuration()));
  ASSERT_OK(store->Append(MakeChunk(2, 0)));
  server_->Kill();
  EXPECT_THAT(store->Append(MakeChunk(3, 0)),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr(absl::StrCat("127.0.0.1:", server_->port()))));
  ASSERT_OK(server_->Restart());
  ASSERT_OK_AND_ASSIGN(const ChangeBatch second, store->Changes(first.cursor, 10, absl::ZeroDuration()));
  ASSERT_EQ(second.changes.size(), 1u);
  EXPECT_EQ(second.changes[0].info.key, (ChunkKey{2, 0}));
}

TEST_F(RedisStoreTest, FullMemoryIsResourceExhaustedUntilSomethingIsEvicted) {
  Start({"--maxmemory", "8mb", "--maxmemory-policy", "noeviction"});
  const auto store = Open();
  absl::Status status;
  std::vector<ChunkKey> stored;
  for (int i = 1; i <= 200 && status.ok(); ++i) {
    status = store->Append(MakeChunk(i, 0, 10, std::string(200000, 'x')));
    if (status.ok()) stored.push_back({i, 0});
  }
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("maxmemory")));
  ASSERT_GT(stored.size(), 10u);
  // Nothing half-done is left of the refused one.
  ASSERT_OK_AND_ASSIGN(const ChangeBatch all, store->Changes("", 1000, absl::ZeroDuration()));
  EXPECT_EQ(all.changes.size(), stored.size());
  ASSERT_OK(store->Evict(absl::MakeConstSpan(stored).subspan(0, 10)));
  // UNLINK frees the memory a little later.
  const absl::Time deadline = absl::Now() + absl::Seconds(20);
  do {
    status = store->Append(MakeChunk(1000, 0, 10, std::string(200000, 'x')));
  } while (absl::IsResourceExhausted(status) && absl::Now() < deadline);
  EXPECT_OK(status);
  EXPECT_EQ((*store->Read({stored[0], {1000, 0}}))[0], std::nullopt);
}

TEST_F(RedisStoreTest, ScriptsThatRedisForgotAreSentAgain) {
  Start();
  const auto store = Open();
  ASSERT_OK(store->Append(MakeChunk(1, 0)));
  EXPECT_EQ(Ask({"SCRIPT", "FLUSH"}), "OK");
  ASSERT_OK(store->Append(MakeChunk(2, 0)));
  EXPECT_EQ(Ask({"SCRIPT", "FLUSH"}), "OK");
  ASSERT_OK_AND_ASSIGN(const ChangeBatch all, store->Changes("", 10, absl::ZeroDuration()));
  EXPECT_OK(store->Changes(all.cursor, 10, absl::ZeroDuration()));
  EXPECT_EQ(all.changes.size(), 2u);
}

TEST_F(RedisStoreTest, AnExistingDataSetKeepsItsPartitions) {
  Start();
  {
    const auto store = Open(3);
    for (int i = 1; i <= 9; ++i) ASSERT_OK(store->Append(MakeChunk(i, 0)));
  }
  const auto store = Open(8);
  EXPECT_EQ((*store->Read({{8, 0}}))[0], MakeChunk(8, 0));
  EXPECT_EQ(Ask({"HGET", "orrery:{r}:data_set", "partitions"}), "3");
}

TEST_F(RedisStoreTest, RefusesAnotherSchemaAndForeignKeys) {
  Start();
  EXPECT_EQ(Ask({"HSET", "orrery:{r}:data_set", "schema", "2", "partitions", "4", "generation", "x"}), "3");
  EXPECT_THAT(TryOpen(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("data set 'r' in Redis has schema version '2', expected 1")));
  Ask({"HSET", "orrery:{r}:data_set", "schema", "1", "partitions", "99999999"});
  EXPECT_THAT(TryOpen(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("orrery:{r}:data_set")));
  Ask({"DEL", "orrery:{r}:data_set"});
  const auto store = Open();
  Ask({"SET", "orrery:{r:1}:chunk:1:0", "something else"});
  EXPECT_THAT(store->Read({{1, 0}}), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("WRONGTYPE")));
  Ask({"HSET", "orrery:{r:2}:chunk:2:0", "run_id", "x", "info", "nonsense", "payload", "y"});
  EXPECT_THAT(store->Read({{2, 0}}), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("orrery:{r:2}:chunk:2:0")));
  Ask({"ZADD", "orrery:{r:3}:live", "0", "nonsense"});
  EXPECT_THAT(store->Changes("", 10, absl::ZeroDuration()), StatusIs(absl::StatusCode::kDataLoss));
}

TEST_F(RedisStoreTest, AsksWithThePassword) {
  Start({"--requirepass", "p@ss:word"});
  EXPECT_THAT(TryOpen(), StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("NOAUTH")));
  EXPECT_THAT(TryOpen(":wrong@"), StatusIs(absl::StatusCode::kPermissionDenied, ::testing::Not(HasSubstr("wrong@"))));
  EXPECT_OK(TryOpen(":p%40ss:word@"));
  EXPECT_OK(TryOpen("default:p%40ss:word@"));
}

TEST_F(RedisStoreTest, NamesARedisThatIsNotThere) {
  Start();
  const int port = server_->port();
  server_->Kill();
  EXPECT_THAT(OpenStore({.location = absl::StrCat("redis://127.0.0.1:", port), .run = "r"}),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr(absl::StrCat("Redis at 127.0.0.1:", port, ": cannot connect"))));
}

TEST_F(RedisStoreTest, GivesUpOnARedisThatDoesNotAnswer) {
  // A port that takes connections and says nothing.
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), size), 0);
  ASSERT_EQ(listen(fd, 5), 0);
  ASSERT_EQ(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size), 0);
  EXPECT_THAT(OpenStore({.location = absl::StrCat("redis://127.0.0.1:", ntohs(address.sin_port)), .run = "r",
                         .timeout = absl::Milliseconds(100)}),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("no answer in 100ms")));
  close(fd);
}

TEST_F(RedisStoreTest, ReplicasCoordinateOverIt) {
  Start();
  config::v1::Experiment e;
  e.mutable_collection()->set_seed_episodes(1000);
  std::vector<std::thread> threads;
  absl::Mutex mu;
  std::set<int64_t> episodes;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      const auto store = Open();
      RunCoordinator coordinator(store.get(), e);
      for (int i = 0; i < 10; ++i) {
        const auto episode = coordinator.BeginEpisode("actor", 1);
        ASSERT_OK(episode);
        ASSERT_TRUE(episode->has_value());
        absl::MutexLock lock(&mu);
        EXPECT_TRUE(episodes.insert((*episode)->episode_id).second);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(episodes.size(), 40u);
  EXPECT_EQ(*episodes.rbegin(), 40);
}

}  // namespace
}  // namespace orrery
