#include "libs/replay/redis_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <set>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/config/config.h"
#include "libs/replay/chunk_codec.h"
#include "libs/replay/redis_connection.h"
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
  // Asks Redis itself, as another program would.
  std::string Ask(const std::vector<std::string>& words) { return server_->Ask(words); }

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
  const std::string info = "6 0 3 2 1 fedcba9876543210 3 400 6 " + std::to_string(payload.size()) + " 0";
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
  EXPECT_EQ(Ask({"HMGET", "orrery:{r}:value:run", "version", "value"}),
            absl::StrCat("[", NextVersion(0, "state"), ", state]"));
  EXPECT_EQ(Ask({"HMGET", "orrery:{r}:snapshot", "generation", "counter", "file"}), "[2, 17, file]");
}

// An elected replica has not got the newest change, and another server makes one in its place.
TEST_F(RedisStoreTest, AValueFromBeforeAFailoverDoesNotOverwriteAnother) {
  Start();
  const auto a = Open(), b = Open();
  const std::string key = "orrery:{r}:value:run";
  ASSERT_OK(a->CompareAndSet("run", 0, "common"));
  ASSERT_OK_AND_ASSIGN(const VersionedValue common, a->Get("run"));
  const std::string replica = absl::StrCat(key, ":replica");
  ASSERT_EQ(Ask({"COPY", key, replica}), "1");
  ASSERT_OK(a->CompareAndSet("run", common.version, "of a"));
  ASSERT_OK_AND_ASSIGN(const VersionedValue of_a, a->Get("run"));
  ASSERT_EQ(Ask({"COPY", replica, key, "REPLACE"}), "1");
  ASSERT_OK(b->CompareAndSet("run", common.version, "of b"));
  EXPECT_THAT(a->CompareAndSet("run", of_a.version, "of a again"), StatusIs(absl::StatusCode::kAborted));
  ASSERT_OK_AND_ASSIGN(const VersionedValue of_b, a->Get("run"));
  EXPECT_EQ(of_b.value, "of b");
  EXPECT_OK(a->CompareAndSet("run", of_b.version, "of a again"));
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

TEST_F(RedisStoreTest, LogsInWithThePassword) {
  Start({"--requirepass", "p@ss:word"});
  EXPECT_THAT(TryOpen(), StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("NOAUTH")));
  const std::string refused = absl::StrCat("Redis at 127.0.0.1:", server_->port(), " refuses the password of ");
  EXPECT_THAT(TryOpen(":wrong@"), StatusIs(absl::StatusCode::kPermissionDenied, refused + "the default user"));
  EXPECT_THAT(TryOpen("someone:wrong@"), StatusIs(absl::StatusCode::kPermissionDenied, refused + "user 'someone'"));
  EXPECT_OK(TryOpen(":p%40ss:word@"));
  EXPECT_OK(TryOpen("default:p%40ss:word@"));
}

TEST_F(RedisStoreTest, SaysThatRedisHasNoPassword) {
  Start();
  EXPECT_THAT(TryOpen(":secret@"), StatusIs(absl::StatusCode::kPermissionDenied,
                                            ::testing::AllOf(HasSubstr("has no password for the default user"),
                                                             ::testing::Not(HasSubstr("secret")))));
}

// The rules in docs/replay_storage.md are enough for everything that a store does.
TEST_F(RedisStoreTest, LogsInAsAnAclUser) {
  Start();
  const std::string password = "a%b/c@d";
  EXPECT_EQ(Ask({"ACL", "SETUSER", "orrery", "on", ">" + password, "~orrery:*", "+@read", "+@write", "+@scripting", "+time",
                 "+cluster|slots", "+asking"}),
            "OK");
  EXPECT_EQ(Ask({"ACL", "SETUSER", "reader", "on", ">" + password, "~orrery:*", "+@read"}), "OK");
  const std::string login = "orrery:a%25b%2Fc%40d@";
  const auto opened = TryOpen(login);
  ASSERT_OK(opened);
  Store& store = **opened;
  ASSERT_OK(store.Append(MakeChunk(1, 0)));
  ASSERT_OK(store.Append(MakeChunk(2, 0)));
  ASSERT_OK(store.Evict({{1, 0}}));
  ASSERT_OK_AND_ASSIGN(const ChangeBatch batch, store.Changes("", 10, absl::ZeroDuration()));
  EXPECT_EQ(batch.changes.size(), 1u);
  EXPECT_OK(store.Changes(batch.cursor, 10, absl::Milliseconds(10)));
  EXPECT_OK(store.CompareAndSet("run", 0, "x"));
  EXPECT_OK(store.PutSnapshot({{1, 1}, "file"}));
  EXPECT_OK(store.GetSnapshot());
  EXPECT_OK(store.Now());
  const StoreOptions options = {.location = absl::StrCat("redis://", login, "127.0.0.1:", server_->port()), .run = "r"};
  EXPECT_THAT(ListDataSets(options.location, absl::Seconds(5)), IsOkAndHolds(ElementsAre(DataSetSummary{"r", 1, 7})));
  EXPECT_OK(DeleteDataSet(options));
  EXPECT_THAT(TryOpen("reader:a%25b%2Fc%40d@"), StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("NOPERM")));
  EXPECT_THAT(TryOpen("orrery:wrong@"), StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("password of user 'orrery'")));
}

// hiredis of Debian 12 has no TLS: docs/replay_storage.md tells to put stunnel beside the program.
class RedisTlsTest : public RedisStoreTest {
 protected:
  void MakeCertificate(const std::string& name) {
    ASSERT_OK(RunProcess({"openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
                          "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout",
                          folder_ / (name + ".key"), "-out", folder_ / (name + ".pem")},
                         folder_ / "openssl.log"));
  }
  // Listens on a port that it returns, and passes on to `tls_port` of a server with the certificate.
  absl::StatusOr<int> StartStunnel(const std::string& certificate, int tls_port) {
    const absl::StatusOr<int> port = FreePort();
    if (!port.ok()) return port;
    const std::string configuration = folder_ / (certificate + ".conf");
    const absl::Status written = WriteFileAtomically(
        configuration, absl::StrCat("foreground = yes\npid =\n[redis]\nclient = yes\naccept = 127.0.0.1:", *port,
                                    "\nconnect = 127.0.0.1:", tls_port, "\nverifyChain = yes\nCAfile = ",
                                    folder_ / (certificate + ".pem"), "\ncheckHost = localhost\n"));
    if (!written.ok()) return written;
    auto process = ChildProcess::Start({"stunnel4", configuration}, folder_ / "stunnel.log");
    if (!process.ok()) return process.status();
    stunnels_.push_back(*std::move(process));
    return *port;
  }
  // As soon as stunnel takes connections.
  absl::StatusOr<std::unique_ptr<Store>> OpenThrough(int port) {
    const absl::Time deadline = absl::Now() + absl::Seconds(20);
    absl::StatusOr<std::unique_ptr<Store>> store;
    do {
      store = OpenStore({.location = absl::StrCat("redis://127.0.0.1:", port), .run = "r"});
    } while (absl::IsUnavailable(store.status()) && absl::StrContains(store.status().message(), "cannot connect") &&
             absl::Now() < deadline);
    return store;
  }

  std::vector<std::unique_ptr<ChildProcess>> stunnels_;
};

TEST_F(RedisTlsTest, GoesThroughStunnel) {
  if (absl::IsNotFound(RunProcess({"stunnel4", "-version"}, folder_ / "stunnel.log"))) {
    GTEST_SKIP() << "stunnel4 is not installed";
  }
  MakeCertificate("redis");
  MakeCertificate("other");
  ASSERT_OK_AND_ASSIGN(const int tls_port, FreePort());
  Start({"--tls-port", absl::StrCat(tls_port), "--tls-cert-file", folder_ / "redis.pem", "--tls-key-file", folder_ / "redis.key",
         "--tls-ca-cert-file", folder_ / "redis.pem", "--tls-auth-clients", "no"});
  ASSERT_OK_AND_ASSIGN(const int port, StartStunnel("redis", tls_port));
  ASSERT_OK_AND_ASSIGN(const auto store, OpenThrough(port));
  const Chunk large = MakeChunk(1, 0, 50, std::string(3 << 20, 'x'));
  ASSERT_OK(store->Append(large));
  EXPECT_EQ((*store->Read({{1, 0}}))[0], large);
  ASSERT_OK_AND_ASSIGN(const ChangeBatch batch, store->Changes("", 10, absl::ZeroDuration()));
  std::thread writer([&] { EXPECT_OK(store->Append(MakeChunk(2, 0))); });
  ASSERT_OK_AND_ASSIGN(const ChangeBatch next, store->Changes(batch.cursor, 10, absl::Seconds(60)));
  writer.join();
  EXPECT_EQ(next.changes.size(), 1u);
  EXPECT_EQ(Ask({"EXISTS", "orrery:{r:1}:chunk:1:0"}), "1");

  // Without stunnel that port is of no use, and stunnel does not connect to a server with another certificate.
  EXPECT_THAT(OpenStore({.location = absl::StrCat("redis://127.0.0.1:", tls_port), .run = "r"}),
              StatusIs(absl::StatusCode::kUnavailable));
  ASSERT_OK_AND_ASSIGN(const int wrong, StartStunnel("other", tls_port));
  EXPECT_THAT(OpenThrough(wrong),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr(absl::StrCat("127.0.0.1:", wrong, ": connection lost"))));
}

TEST_F(RedisStoreTest, DeletesADataSetAndNothingElse) {
  Start();
  const auto options = [&](const std::string& run) { return StoreOptions{.location = server_->url(), .run = run}; };
  for (const std::string run : {"r", "rr", "r.1"}) {
    ASSERT_OK_AND_ASSIGN(const auto store, OpenStore(options(run)));
    for (int i = 1; i <= 3; ++i) ASSERT_OK(store->Append(MakeChunk(i, 0)));
  }
  Ask({"SET", "orrery:{r", "x"});
  Ask({"SET", "other:{r}:data_set", "x"});
  const DataSetSummary second{"r.1", 3, 21}, third{"rr", 3, 21};
  EXPECT_THAT(ListDataSets(server_->url(), absl::Seconds(5)), IsOkAndHolds(ElementsAre(DataSetSummary{"r", 3, 21}, second, third)));
  // More keys than one step of a scan finds, as a deletion that was interrupted leaves them.
  Ask({"EVAL", "for i = 1, 5000 do redis.call('SET', 'orrery:{r:9}:chunk:' .. i .. ':0', 'x') end", "1", "orrery:{r:9}:live"});
  ASSERT_OK(DeleteDataSet(options("r")));
  EXPECT_EQ(Ask({"KEYS", "orrery:{r[:}]*"}), "[]");
  EXPECT_THAT(ListDataSets(server_->url(), absl::Seconds(5)), IsOkAndHolds(ElementsAre(second, third)));
  EXPECT_EQ(Ask({"EXISTS", "orrery:{r", "other:{r}:data_set"}), "2");
  EXPECT_THAT(DeleteDataSet(options("r")), StatusIs(absl::StatusCode::kNotFound, HasSubstr("there is no data set 'r' in Redis")));
  // Leftovers are found without the key that names the data set.
  Ask({"SET", "orrery:{r:1}:chunk:1:0", "x"});
  EXPECT_OK(DeleteDataSet(options("r")));
  EXPECT_EQ(Ask({"EXISTS", "orrery:{r:1}:chunk:1:0"}), "0");
}

TEST_F(RedisStoreTest, ListsButDoesNotDeleteAnotherSchema) {
  Start();
  Ask({"HSET", "orrery:{r}:data_set", "schema", "2", "partitions", "4", "generation", "x"});
  EXPECT_THAT(ListDataSets(server_->url(), absl::Seconds(5)), IsOkAndHolds(ElementsAre(DataSetSummary{"r", 0, 0})));
  EXPECT_THAT(DeleteDataSet({.location = server_->url(), .run = "r"}),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("schema version '2', expected 1")));
  EXPECT_EQ(Ask({"EXISTS", "orrery:{r}:data_set"}), "1");
}

// What Redis itself counts, in its answer to CLIENT LIST. Those who ask that are left out.
int64_t Connections(const std::string& clients) {
  const std::vector<absl::string_view> lines = absl::StrSplit(clients, '\n', absl::SkipEmpty());
  return std::count_if(lines.begin(), lines.end(), [](absl::string_view line) { return !absl::StrContains(line, "cmd=client"); });
}

TEST_F(RedisStoreTest, ManyThreadsShareAFewConnections) {
  constexpr int kLimit = 5, kThreads = 60, kChunks = 10;
  Start();
  ASSERT_OK_AND_ASSIGN(const auto store, OpenStore({.location = server_->url(), .run = "r", .max_connections = kLimit}));
  std::atomic<int> running = kThreads;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kChunks; ++i) EXPECT_OK(store->Append(MakeChunk(1 + t, i * 10, 10, std::string(10000, 'x'))));
      --running;
    });
  }
  // A reader that waits has one beside them.
  std::string cursor;
  std::set<ChunkKey> seen;
  int64_t most = 0;
  for (bool done = false; !done;) {
    const bool last = running == 0;
    const auto batch = store->Changes(cursor, 100, absl::Milliseconds(100));
    EXPECT_OK(batch);
    done = !batch.ok() || (last && batch->caught_up);
    if (!batch.ok()) continue;
    cursor = batch->cursor;
    for (const Change& change : batch->changes) seen.insert(change.info.key);
    most = std::max(most, Connections(Ask({"CLIENT", "LIST"})));
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(seen.size(), static_cast<size_t>(kThreads * kChunks));
  EXPECT_GE(most, kLimit) << "there was no contention";
  EXPECT_LE(most, kLimit + 1);
}

TEST_F(RedisStoreTest, RefusesALimitThatCannotBe) {
  Start();
  for (const int limit : {0, 10001}) {
    EXPECT_THAT(OpenStore({.location = server_->url(), .run = "r", .max_connections = limit}),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         HasSubstr(absl::StrCat("max_connections is ", limit, ", expected 1 to 10000"))));
  }
}

class RedisPoolTest : public RedisStoreTest {
 protected:
  static absl::Time Soon() { return absl::Now() + absl::Seconds(60); }
  static absl::Status Ping(RedisConnection& connection) {
    const RedisCommand command = {"PING"};
    return connection.Run({&command}, Soon()).status();
  }
};

TEST_F(RedisPoolTest, LendsNoMoreThanItsLimit) {
  Start();
  RedisPool pool({"127.0.0.1", server_->port()}, {}, 2);
  const auto in_use = StatusIs(absl::StatusCode::kUnavailable, HasSubstr("all 2 connections are in use"));
  {
    ASSERT_OK_AND_ASSIGN(RedisPool::Loan first, pool.Take(Soon()));
    ASSERT_OK_AND_ASSIGN(RedisPool::Loan second, pool.Take(Soon()));
    EXPECT_FALSE(first.was_idle() || second.was_idle());
    EXPECT_THAT(pool.Take(absl::Now() + absl::Milliseconds(10)).status(), in_use);
    EXPECT_OK(Ping(*first));
    first.GiveBack();
    ASSERT_OK_AND_ASSIGN(RedisPool::Loan third, pool.Take(Soon()));
    EXPECT_TRUE(third.was_idle());
    EXPECT_OK(Ping(*third));
    EXPECT_THAT(pool.Take(absl::InfinitePast()).status(), in_use);
    ASSERT_OK_AND_ASSIGN(const auto own, pool.Open(Soon()));
    EXPECT_OK(Ping(*own));
  }
  // Neither was given back: their connections are closed, their places free.
  ASSERT_OK_AND_ASSIGN(RedisPool::Loan first, pool.Take(Soon()));
  ASSERT_OK_AND_ASSIGN(RedisPool::Loan second, pool.Take(Soon()));
  EXPECT_FALSE(first.was_idle() || second.was_idle());
}

TEST_F(RedisPoolTest, AConnectionThatCannotBeMadeLeavesItsPlaceFree) {
  ASSERT_OK_AND_ASSIGN(const int port, FreePort());
  RedisPool pool({"127.0.0.1", port}, {}, 1);
  for (int i = 0; i < 3; ++i) {
    EXPECT_THAT(pool.Take(Soon()).status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("cannot connect")));
  }
}

TEST_F(RedisPoolTest, ThoseWhoWaitGetOneInTheOrderOfTheirComing) {
  constexpr int kWaiters = 4;
  Start();
  RedisPool pool({"127.0.0.1", server_->port()}, {}, 1);
  absl::Mutex mu;
  std::vector<int> order;
  std::vector<std::thread> threads;
  {
    ASSERT_OK_AND_ASSIGN(RedisPool::Loan first, pool.Take(Soon()));
    for (int i = 0; i < kWaiters; ++i) {
      threads.emplace_back([&, i] {
        absl::StatusOr<RedisPool::Loan> loan = pool.Take(Soon());
        ASSERT_OK(loan);
        absl::MutexLock lock(&mu);
        order.push_back(i);
        if (i % 2 == 0) loan->GiveBack();  // the others close theirs
      });
      while (pool.waiting() <= static_cast<size_t>(i)) std::this_thread::yield();
    }
    first.GiveBack();
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(order, ElementsAre(0, 1, 2, 3));
}

TEST_F(RedisStoreTest, SaysThatItIsNoCluster) {
  Start();
  EXPECT_THAT(OpenStore({.location = absl::StrCat("redis-cluster://127.0.0.1:", server_->port()), .run = "r"}),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("not part of a cluster, expected redis://")));
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
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("no answer in ")));
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
