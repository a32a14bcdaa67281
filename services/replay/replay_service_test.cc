#include "services/replay/replay_service_impl.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "libs/base/log_testing.h"
#include "libs/base/status.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/base/trace.h"
#include "libs/client/channel.h"
#include "libs/client/chunk_proto.h"
#include "libs/client/replay_client.h"
#include "libs/client/sequence_stream.h"
#include "libs/client/status.h"
#include "libs/replay/chunk_codec.h"
#include "libs/replay/memory_store.h"
#include "libs/replay/naive_index.h"
#include "libs/replay/testing/fault_store.h"
#include "libs/replay/testing/redis_server.h"
#include "libs/telemetry/metrics.h"
#include "libs/telemetry/service_host.h"

namespace orrery {
namespace {
using replay::v1::ReplayService;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kRun[] = "test";
constexpr uint64_t kHash = 0xabcdef0123456789;
constexpr absl::Duration kLong = absl::Seconds(60);

absl::Time Soon() { return absl::Now() + kLong; }

config::v1::Experiment MakeExperiment(const std::string& more = "") {
  auto experiment = ParseExperiment(
      "name: 'test' environment { task: 'point_pixels' } learning { schedule: CONCURRENT sequence_length: 4 } "
      "collection { seed_episodes: 1000 } replay { limiter { tolerance: 1e9 } }");
  EXPECT_OK(experiment);
  const auto changes = ParseExperiment(more);
  EXPECT_OK(changes);
  experiment->MergeFrom(*changes);
  return *std::move(experiment);
}

// A store whose operations can be made to fail.
class FlakyStore : public Store {
 public:
  explicit FlakyStore(Store* store) : store_(store) {}
  std::atomic<bool> away = false;
  std::atomic<bool> full = false;  // for appends only

  absl::Status Append(const Chunk& chunk) override {
    if (full) return absl::ResourceExhaustedError("the store is full");
    return away ? Away() : store_->Append(chunk);
  }
  absl::StatusOr<std::vector<std::optional<Chunk>>> Read(absl::Span<const ChunkKey> keys) override {
    if (away) return Away();
    return store_->Read(keys);
  }
  absl::StatusOr<ChangeBatch> Changes(const std::string& cursor, int max, absl::Duration wait) override {
    if (away) return Away();
    return store_->Changes(cursor, max, wait);
  }
  absl::Status Evict(absl::Span<const ChunkKey> keys) override { return away ? Away() : store_->Evict(keys); }
  absl::StatusOr<VersionedValue> Get(const std::string& name) override {
    if (away) return Away();
    return store_->Get(name);
  }
  absl::Status CompareAndSet(const std::string& name, int64_t version, const std::string& value) override {
    return away ? Away() : store_->CompareAndSet(name, version, value);
  }
  absl::Status PutSnapshot(const Snapshot& snapshot) override { return away ? Away() : store_->PutSnapshot(snapshot); }
  absl::StatusOr<Snapshot> GetSnapshot() override {
    if (away) return Away();
    return store_->GetSnapshot();
  }
  absl::StatusOr<absl::Time> Now() override {
    if (away) return Away();
    return store_->Now();
  }

 private:
  static absl::Status Away() { return absl::UnavailableError("the store is away"); }
  Store* const store_;
};

// A store where the answer to a write of a value comes late or is lost. The write takes effect.
class SlowStore : public FlakyStore {
 public:
  using FlakyStore::FlakyStore;
  std::atomic<bool> hold = false;  // until it is false again
  std::atomic<bool> held = false;  // a write has taken effect whose answer waits
  std::atomic<int> lost = 0;       // answers yet to be lost: not even reading tells that writer what became of its value

  absl::StatusOr<VersionedValue> Get(const std::string& name) override {
    if (std::exchange(Ignorant(), false)) return absl::UnavailableError("the store is away");
    return FlakyStore::Get(name);
  }
  absl::Status CompareAndSet(const std::string& name, int64_t version, const std::string& value) override {
    const absl::Status status = FlakyStore::CompareAndSet(name, version, value);
    while (status.ok() && hold) {
      held = true;
      hold.wait(true);
    }
    if (!status.ok() || lost == 0) return status;
    --lost;
    Ignorant() = true;
    return absl::UnavailableError("the answer was lost");
  }

 private:
  static bool& Ignorant() {  // whether this thread's next reading fails
    thread_local bool ignorant = false;
    return ignorant;
  }
};

// A server with its host; ready when made.
class Served {
 public:
  Served(Store* store, const config::v1::Experiment& experiment, const std::string& listen = "") {
    auto created = ReplayServer::Create({experiment, store, registry});
    EXPECT_OK(created);
    server = *std::move(created);
    HostOptions options;
    options.name = "replay";
    options.listen = listen;
    options.registry = registry;
    options.services = {server->service()};
    auto started = ServiceHost::Start(options);
    EXPECT_OK(started);
    host = *std::move(started);
    server->Start([this](bool ready) {
      host->SetReady(ready);
      absl::MutexLock lock(&mu_);
      ready_ = ready;
    });
    AwaitReady(true);
  }
  ~Served() {
    server->Shutdown();
    host->Shutdown(absl::ZeroDuration());
  }

  void AwaitReady(bool ready) {
    absl::MutexLock lock(&mu_);
    auto as_wanted = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return ready_ == ready; };
    ASSERT_TRUE(mu_.AwaitWithTimeout(absl::Condition(&as_wanted), kLong));
  }
  double Value(const std::string& name, const prometheus::Labels& labels = {}) {
    return AddCounter(*registry, name, "", labels).Value();
  }
  // Batches drawn by SampleSequences.
  int64_t Drawn() {
    const prometheus::ClientMetric metric = AddHistogram(*registry, "replay_sample_seconds", "", SecondsBuckets()).Collect();
    return static_cast<int64_t>(metric.histogram.sample_count);
  }
  std::string address() const { return absl::StrCat("127.0.0.1:", host->port()); }

  const std::shared_ptr<prometheus::Registry> registry = std::make_shared<prometheus::Registry>();
  std::unique_ptr<ReplayServer> server;
  std::unique_ptr<ServiceHost> host;

 private:
  absl::Mutex mu_;
  bool ready_ ABSL_GUARDED_BY(mu_) = false;
};

// Every row says where it is from: observation "place" is (episode, row).
Chunk MakeChunk(const std::string& run_id, int64_t episode, int64_t first_row, int rows,
                EpisodeEnd end = EpisodeEnd::kContinues, EpisodeMode mode = EpisodeMode::kRandom, int pixels = 64) {
  ArrayMap fields;
  fields["place"] = Array::Zeros(DType::kInt64, {rows, 2});
  fields["image"] = Array::Zeros(DType::kUInt8, {rows, pixels, 3});
  fields[kAction] = Array::Zeros(DType::kFloat32, {rows, 2});
  fields[kReward] = Array::Zeros(DType::kFloat32, {rows});
  fields[kIsFirst] = Array::Zeros(DType::kUInt8, {rows});
  fields[kIsTerminal] = Array::Zeros(DType::kUInt8, {rows});
  for (int i = 0; i < rows; ++i) {
    fields["place"].mutable_as<int64_t>()[2 * i] = episode;
    fields["place"].mutable_as<int64_t>()[2 * i + 1] = first_row + i;
    fields["image"].mutable_as<uint8_t>()[i * pixels * 3] = static_cast<uint8_t>(first_row + i);
    fields[kReward].mutable_as<float>()[i] = static_cast<float>(first_row + i);
  }
  if (first_row == 0) fields[kIsFirst].mutable_as<uint8_t>()[0] = 1;
  Chunk chunk;
  chunk.run_id = run_id;
  chunk.info.key = {episode, first_row};
  chunk.info.rows = rows;
  chunk.info.mode = mode;
  chunk.info.end = end;
  chunk.info.specification_hash = kHash;
  auto payload = EncodeRows(fields);
  EXPECT_OK(payload);
  chunk.payload = *std::move(payload);
  chunk.info.payload_bytes = static_cast<int64_t>(chunk.payload.size());
  return chunk;
}

// One row with so many bytes that cannot be packed.
Chunk MakeNoisyChunk(const std::string& run_id, int64_t episode, int64_t row, int64_t bytes) {
  Chunk chunk = MakeChunk(run_id, episode, row, 1);
  auto fields = DecodeRows(chunk.payload, 1);
  EXPECT_OK(fields);
  std::mt19937 random(static_cast<uint32_t>(row));
  Array& noise = (*fields)["noise"] = Array::Zeros(DType::kUInt8, {1, bytes});
  for (char& byte : noise.bytes) byte = static_cast<char>(random());
  auto payload = EncodeRows(*fields);
  EXPECT_OK(payload);
  chunk.payload = *std::move(payload);
  chunk.info.payload_bytes = static_cast<int64_t>(chunk.payload.size());
  return chunk;
}

ReplayClient::Episode Begin(ReplayClient& client, const std::string& actor = "actor") {
  auto episode = client.BeginEpisode(actor, kHash, Soon());
  EXPECT_OK(episode);
  return episode.ok() && episode->has_value() ? **episode : ReplayClient::Episode{};
}

absl::Status AppendAll(const std::shared_ptr<grpc::Channel>& channel, const std::vector<Chunk>& chunks) {
  auto writer = ReplayWriter::Create(channel, kRun, {});
  for (const Chunk& chunk : chunks) RETURN_IF_ERROR(writer->Append(chunk, Soon()));
  return writer->Flush(Soon());
}

// One stream of requests, its acknowledgements, and how it ended.
absl::Status AppendRaw(const std::shared_ptr<grpc::Channel>& channel,
                       const std::vector<replay::v1::AppendChunksRequest>& requests, std::vector<ChunkKey>* acknowledged) {
  auto stub = ReplayService::NewStub(channel);
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(Soon()));
  auto stream = stub->AppendChunks(&context);
  // Beside the reads: in process nothing is buffered between the two sides.
  std::thread writer([&] {
    for (const auto& request : requests) {
      if (!stream->Write(request)) break;
    }
    stream->WritesDone();
  });
  replay::v1::AppendChunksResponse response;
  while (stream->Read(&response)) acknowledged->push_back({response.episode_id(), response.first_row()});
  writer.join();
  return FromGrpc(stream->Finish());
}

replay::v1::AppendChunksRequest RequestFor(const Chunk& chunk) {
  replay::v1::AppendChunksRequest request;
  request.set_run(kRun);
  *request.mutable_chunk() = ToProto(chunk);
  return request;
}

// What a watcher knows after its events.
struct Mirror {
  std::map<ChunkKey, Chunk> live;
  int resets = 0;
  int appends = 0;
  bool caught_up = false;

  absl::Status Take(ChunkWatcher& watcher) {
    absl::StatusOr<ChunkWatcher::Event> event = watcher.Next(Soon());
    RETURN_IF_ERROR(event.status());
    if (event->reset) {
      live.clear();
      ++resets;
    }
    caught_up = (caught_up && !event->interrupted) || event->caught_up;
    if (event->appended.has_value()) {
      ++appends;
      EXPECT_TRUE(live.emplace(event->appended->info.key, *event->appended).second) << "sent twice";
    }
    if (event->evicted.has_value()) {
      EXPECT_EQ(live.erase(*event->evicted), 1u);
    }
    return absl::OkStatus();
  }
  absl::Status TakeUntilCaughtUp(ChunkWatcher& watcher) {
    while (!caught_up) RETURN_IF_ERROR(Take(watcher));
    return absl::OkStatus();
  }
  absl::Status TakeUntilLive(ChunkWatcher& watcher, size_t count) {
    while (live.size() != count) RETURN_IF_ERROR(Take(watcher));
    return absl::OkStatus();
  }
};

class ReplayServiceTest : public ::testing::Test {
 protected:
  void Start(const std::string& more = "") {
    served_.emplace(store_.get(), MakeExperiment(more));
    channel_ = served_->host->InProcessChannel();
    client_.emplace(channel_, kRun);
  }
  // Until the server's index knows what was appended and evicted.
  void AwaitRows(int64_t rows) {
    const absl::Time limit = Soon();
    while (true) {
      ASSERT_OK_AND_ASSIGN(const auto stats, client_->GetStats(limit));
      if (stats.rows() == rows) return;
      ASSERT_LT(absl::Now(), limit);
      std::this_thread::yield();
    }
  }
  std::string run_id() { return RunCoordinator(store_.get(), MakeExperiment()).Progress()->run_id; }

  const std::unique_ptr<Store> store_ = MakeMemoryStore();
  std::optional<Served> served_;
  std::shared_ptr<grpc::Channel> channel_;
  std::optional<ReplayClient> client_;
};

TEST_F(ReplayServiceTest, AcknowledgesWhatIsInTheStore) {
  Start();
  const auto episode = Begin(*client_);
  EXPECT_EQ(episode.assignment.task, "point_pixels");
  EXPECT_EQ(episode.lease_seconds, 60);
  const std::string run = episode.assignment.run_id;
  const std::vector<Chunk> chunks = {MakeChunk(run, 1, 0, 5), MakeChunk(run, 1, 5, 3, EpisodeEnd::kTruncated)};
  std::vector<ChunkKey> acknowledged;
  // The first one twice: it is stored and counted once, and acknowledged each time.
  ASSERT_OK(AppendRaw(channel_, {RequestFor(chunks[0]), RequestFor(chunks[1])}, &acknowledged));
  ASSERT_OK_AND_ASSIGN(const auto stored, store_->Read({chunks[0].info.key, chunks[1].info.key}));
  EXPECT_EQ(stored[0], chunks[0]);
  EXPECT_EQ(stored[1], chunks[1]);
  auto watcher = ChunkWatcher::Create(channel_, kRun);
  Mirror mirror;
  ASSERT_OK(mirror.TakeUntilLive(*watcher, 2));  // so that the server's index has them too
  ASSERT_OK(AppendRaw(channel_, {RequestFor(chunks[0])}, &acknowledged));
  EXPECT_EQ(acknowledged, (std::vector<ChunkKey>{{1, 0}, {1, 5}, {1, 0}}));
  ASSERT_OK_AND_ASSIGN(const auto stats, client_->GetStats(Soon()));
  EXPECT_EQ(stats.rows(), 8);
  EXPECT_EQ(stats.rows_appended(), 8);
  EXPECT_EQ(stats.chunks(), 2);
  EXPECT_EQ(stats.episodes(), 1);
  EXPECT_EQ(stats.episodes_finished(), 1);
  EXPECT_EQ(stats.bytes(), chunks[0].info.payload_bytes + chunks[1].info.payload_bytes);
  EXPECT_FALSE(stats.has_snapshot_version());
  EXPECT_EQ(served_->Value("replay_steps_appended_total"), 8);
  EXPECT_EQ(served_->Value("replay_chunks_appended_total"), 2);
  EXPECT_EQ(served_->Value("replay_bytes_appended_total"), stats.bytes());
}

TEST_F(ReplayServiceTest, LogsEachChunkInTheTraceOfItsEpisode) {
  CapturedLog captured("debug");
  Start();
  const TraceContext first = NewTrace(), second = NewTrace();
  std::string run;
  {
    const TraceScope trace(first);
    run = Begin(*client_).assignment.run_id;
  }
  Begin(*client_);
  auto writer = ReplayWriter::Create(channel_, kRun, {});  // one stream for both
  const auto append = [&](const TraceContext& context, int64_t episode, int64_t first_row) {
    const TraceScope trace(context);
    EXPECT_OK(writer->Append(MakeChunk(run, episode, first_row, 5), Soon()));
  };
  append(first, 1, 0);
  append(second, 2, 0);
  append(first, 1, 5);
  EXPECT_OK(writer->Flush(Soon()));
  const std::string log = captured.Take();
  EXPECT_THAT(log, ContainsRegex(absl::StrCat("/BeginEpisode code=OK seconds=[0-9.]+ trace_id=", first.trace_id())));
  EXPECT_THAT(log, HasSubstr(absl::StrCat("chunk appended episode=1 first_row=0 rows=5 trace_id=", first.trace_id(), "\n")));
  EXPECT_THAT(log, HasSubstr(absl::StrCat("chunk appended episode=2 first_row=0 rows=5 trace_id=", second.trace_id(), "\n")));
  EXPECT_THAT(log, HasSubstr(absl::StrCat("chunk appended episode=1 first_row=5 rows=5 trace_id=", first.trace_id(), "\n")));
}

TEST_F(ReplayServiceTest, LogsADamagedChunkInItsTrace) {
  CapturedLog captured("info");
  Start();
  const TraceContext trace = NewTrace();
  replay::v1::AppendChunksRequest request = RequestFor(MakeChunk(Begin(*client_).assignment.run_id, 1, 0, 5));
  request.mutable_chunk()->mutable_payload()->resize(20);
  std::vector<ChunkKey> acknowledged;
  for (const std::string& traceparent : {trace.traceparent(), std::string(10'000, '\n')}) {  // the second is as good as none
    request.set_traceparent(traceparent);
    EXPECT_THAT(AppendRaw(channel_, {request}, &acknowledged), StatusIs(absl::StatusCode::kInvalidArgument));
  }
  const std::string log = captured.Take();
  const std::string refused = "refused episode=1 first_row=0 rows=5 error=\"INVALID_ARGUMENT: chunk.payload[^\n]*\" trace_id=";
  const size_t other = log.find("chunk refused", log.find("chunk refused") + 1);
  ASSERT_NE(other, std::string::npos);
  EXPECT_THAT(log.substr(0, other), ContainsRegex(absl::StrCat(refused, trace.trace_id(), "\n")));
  EXPECT_THAT(log.substr(other), ContainsRegex(absl::StrCat(refused, "[0-9a-f]{32}\n")));
  EXPECT_THAT(log.substr(other), Not(HasSubstr(trace.trace_id())));
}

TEST_F(ReplayServiceTest, RefusesOtherContentsUnderTheSameKey) {
  Start();
  const std::string run = Begin(*client_).assignment.run_id;
  Begin(*client_);
  auto writer = ReplayWriter::Create(channel_, kRun, {});
  ASSERT_OK(writer->Append(MakeChunk(run, 1, 0, 5), Soon()));
  ASSERT_OK(writer->Flush(Soon()));
  ASSERT_OK(writer->Append(MakeChunk(run, 1, 0, 6), Soon()));
  ASSERT_OK(writer->Append(MakeChunk(run, 2, 0, 5), Soon()));
  EXPECT_THAT(writer->Flush(Soon()), StatusIs(absl::StatusCode::kAlreadyExists));
  EXPECT_OK(writer->Flush(Soon()));
  EXPECT_THAT(writer->Append(MakeChunk(run, 1, 6, 5), Soon()), StatusIs(absl::StatusCode::kAlreadyExists));
  EXPECT_EQ(writer->unacknowledged_bytes(), 0);
  // The other episode is not touched by it.
  ASSERT_OK(writer->Append(MakeChunk(run, 2, 5, 5), Soon()));
  ASSERT_OK(writer->Flush(Soon()));
  ASSERT_OK_AND_ASSIGN(const auto stored, store_->Read({{1, 0}, {2, 0}, {2, 5}}));
  ASSERT_TRUE(stored[0].has_value() && stored[1].has_value() && stored[2].has_value());
  EXPECT_EQ(stored[0]->info.rows, 5);
}

TEST_F(ReplayServiceTest, WatchSendsEveryLiveChunkOnceThenChanges) {
  Start();
  const std::string run = Begin(*client_).assignment.run_id;
  ASSERT_OK(AppendAll(channel_, {MakeChunk(run, 1, 0, 5), MakeChunk(run, 1, 5, 5, EpisodeEnd::kTerminated),
                                 MakeChunk(run, 9, 0, 5, EpisodeEnd::kTruncated, EpisodeMode::kEvaluate)}));
  auto training = ChunkWatcher::Create(channel_, kRun);
  auto all = ChunkWatcher::Create(channel_, kRun, /*include_evaluation=*/true);
  Mirror training_mirror, all_mirror;
  ASSERT_OK(training_mirror.TakeUntilCaughtUp(*training));
  ASSERT_OK(all_mirror.TakeUntilCaughtUp(*all));
  ASSERT_OK(training_mirror.TakeUntilLive(*training, 2));
  ASSERT_OK(all_mirror.TakeUntilLive(*all, 3));
  EXPECT_EQ(training_mirror.live.at({1, 5}), MakeChunk(run, 1, 5, 5, EpisodeEnd::kTerminated));
  ASSERT_OK(AppendAll(channel_, {MakeChunk(run, 2, 0, 5)}));
  ASSERT_OK(training_mirror.TakeUntilLive(*training, 3));
  ASSERT_OK(store_->Evict({{1, 0}, {9, 0}}));
  ASSERT_OK(training_mirror.TakeUntilLive(*training, 2));
  ASSERT_OK(all_mirror.TakeUntilLive(*all, 4));
  ASSERT_OK(all_mirror.TakeUntilLive(*all, 2));
  EXPECT_FALSE(training_mirror.live.contains({1, 0}));
  EXPECT_THAT(training->Next(absl::Now() + absl::Milliseconds(300)), StatusIs(absl::StatusCode::kDeadlineExceeded));
  EXPECT_EQ(training_mirror.appends, 3);
  EXPECT_EQ(training_mirror.resets, 0);
  training->Close();
  EXPECT_THAT(training->Next(Soon()), StatusIs(absl::StatusCode::kCancelled));
}

TEST_F(ReplayServiceTest, WatchGoesOnFromACursor) {
  Start();
  const std::string run = Begin(*client_).assignment.run_id;
  ASSERT_OK(AppendAll(channel_, {MakeChunk(run, 1, 0, 5)}));
  auto stub = ReplayService::NewStub(channel_);
  replay::v1::WatchChunksRequest request;
  request.set_run(kRun);
  replay::v1::WatchChunksResponse response;
  std::string cursor;
  {
    grpc::ClientContext context;
    auto stream = stub->WatchChunks(&context, request);
    while (stream->Read(&response)) {
      cursor = response.cursor();
      if (response.caught_up() && !response.has_appended()) break;
    }
    context.TryCancel();
    EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  ASSERT_FALSE(cursor.empty());
  ASSERT_OK(AppendAll(channel_, {MakeChunk(run, 1, 5, 5)}));
  request.set_cursor(cursor);
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(Soon()));
  auto stream = stub->WatchChunks(&context, request);
  while (stream->Read(&response) && !response.has_appended()) {
  }
  EXPECT_EQ(response.appended().first_row(), 5);
}

TEST_F(ReplayServiceTest, WatchRefusesACursorOfOtherData) {
  Start();
  auto stub = ReplayService::NewStub(channel_);
  for (const char* cursor : {"nonsense", "0 0", "\xff\xfe"}) {
    replay::v1::WatchChunksRequest request;
    request.set_run(kRun);
    request.set_cursor(cursor);
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(Soon()));
    auto stream = stub->WatchChunks(&context, request);
    replay::v1::WatchChunksResponse response;
    EXPECT_FALSE(stream->Read(&response));
    EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::OUT_OF_RANGE);
  }
}

TEST_F(ReplayServiceTest, EvictsTheOldestBeyondTheLimit) {
  Start("replay { max_rows: 10 }");
  const std::string run = Begin(*client_).assignment.run_id;
  auto watcher = ChunkWatcher::Create(channel_, kRun);
  Mirror mirror;
  std::vector<Chunk> chunks;
  for (int i = 0; i < 4; ++i) chunks.push_back(MakeChunk(run, 1, 5 * i, 5));
  ASSERT_OK(AppendAll(channel_, chunks));
  while (mirror.live.size() != 2 || !mirror.live.contains({1, 15})) ASSERT_OK(mirror.Take(*watcher));
  EXPECT_TRUE(mirror.live.contains({1, 10}));
  ASSERT_OK_AND_ASSIGN(const auto stored, store_->Read({{1, 0}, {1, 5}, {1, 10}, {1, 15}}));
  EXPECT_FALSE(stored[0].has_value() || stored[1].has_value());
  EXPECT_TRUE(stored[2].has_value() && stored[3].has_value());
}

replay::v1::SampleSequencesRequest SampleRequest(int batch_size, int length, int64_t batches, uint64_t seed) {
  replay::v1::SampleSequencesRequest request;
  request.set_run(kRun);
  request.set_batch_size(batch_size);
  request.set_sequence_length(length);
  request.set_batches(batches);
  request.set_seed(seed);
  return request;
}

// Batches of a SampleSequences call: fields by name, in the order of sequences.
absl::StatusOr<std::vector<ArrayMap>> SampleRaw(const std::shared_ptr<grpc::Channel>& channel,
                                                const replay::v1::SampleSequencesRequest& request, absl::Time deadline,
                                                int* parts = nullptr) {
  auto stub = ReplayService::NewStub(channel);
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(deadline));
  auto stream = stub->SampleSequences(&context, request);
  replay::v1::SampleSequencesResponse response;
  std::vector<ArrayMap> result(1);
  while (stream->Read(&response)) {
    if (parts != nullptr) ++*parts;
    EXPECT_EQ(response.batch(), static_cast<int64_t>(result.size()) - 1);
    EXPECT_LE(response.ByteSizeLong(), (size_t{2} << 20) + 1024);
    const common::v1::Tensor& tensor = response.field().tensor();
    Array& array = result.back()[response.field().name()];
    if (array.shape.empty()) {
      array.dtype = static_cast<DType>(tensor.data_type());
      array.shape.assign(tensor.shape().begin(), tensor.shape().end());
      array.shape[0] = 0;
    }
    EXPECT_EQ(array.shape[0], response.first_sequence());
    array.shape[0] += tensor.shape(0);
    array.bytes += tensor.data();
    if (response.last_part()) result.emplace_back();
  }
  result.pop_back();
  RETURN_IF_ERROR(FromGrpc(stream->Finish()));
  return result;
}

absl::StatusOr<std::vector<ArrayMap>> SampleRaw(const std::shared_ptr<grpc::Channel>& channel, int batch_size, int length,
                                                int64_t batches, uint64_t seed, absl::Time deadline, int* parts = nullptr) {
  return SampleRaw(channel, SampleRequest(batch_size, length, batches, seed), deadline, parts);
}

// Episode and first row of every sequence of the batches.
std::set<std::pair<int64_t, int64_t>> StartsOf(const std::vector<ArrayMap>& batches) {
  std::set<std::pair<int64_t, int64_t>> starts;
  for (const ArrayMap& batch : batches) {
    const Array& place = batch.at("place");
    for (int64_t s = 0; s < place.shape[0]; ++s) {
      const auto first = place.as<int64_t>().subspan(s * place.shape[1] * 2);
      starts.insert({first[0], first[1]});
    }
  }
  return starts;
}

TEST_F(ReplayServiceTest, SampledSequencesNeverCrossAnEpisode) {
  Start();
  const std::string run = Begin(*client_).assignment.run_id;
  std::vector<Chunk> chunks;
  for (int episode = 1; episode <= 5; ++episode) {
    for (int row = 0; row < 3 * episode; row += 3) chunks.push_back(MakeChunk(run, episode, row, 3));
  }
  chunks.push_back(MakeChunk(run, 6, 0, 9, EpisodeEnd::kTruncated, EpisodeMode::kEvaluate));
  ASSERT_OK(AppendAll(channel_, chunks));
  auto watcher = ChunkWatcher::Create(channel_, kRun, true);
  Mirror mirror;
  ASSERT_OK(mirror.TakeUntilLive(*watcher, chunks.size()));
  for (int length : {4, 1, 7, 15}) {
    ASSERT_OK_AND_ASSIGN(const auto batches, SampleRaw(channel_, 16, length, 20, 7, Soon()));
    ASSERT_EQ(batches.size(), 20u);
    std::set<std::pair<int64_t, int64_t>> starts;
    for (const ArrayMap& batch : batches) {
      ASSERT_EQ(batch.at("place").shape, (std::vector<int64_t>{16, length, 2}));
      ASSERT_EQ(batch.at("image").shape, (std::vector<int64_t>{16, length, 64, 3}));
      ASSERT_EQ(batch.at(kReward).shape, (std::vector<int64_t>{16, length}));
      const auto place = batch.at("place").as<int64_t>();
      for (int s = 0; s < 16; ++s) {
        const int64_t episode = place[s * length * 2], first = place[s * length * 2 + 1];
        starts.insert({episode, first});
        ASSERT_LE(episode, 5);
        for (int t = 0; t < length; ++t) {
          const int at = s * length + t;
          ASSERT_EQ(place[2 * at], episode);
          ASSERT_EQ(place[2 * at + 1], first + t);
          ASSERT_EQ(batch.at(kReward).as<float>()[at], static_cast<float>(first + t));
          ASSERT_EQ(batch.at("image").as<uint8_t>()[at * 64 * 3], static_cast<uint8_t>(first + t));
          ASSERT_EQ(batch.at(kIsFirst).as<uint8_t>()[at], first + t == 0 ? 1 : 0);
        }
      }
    }
    size_t valid = 0;
    for (int episode = 1; episode <= 5; ++episode) valid += std::max(0, 3 * episode - length + 1);
    EXPECT_EQ(starts.size(), valid) << "length " << length;
    ASSERT_OK_AND_ASSIGN(const auto again, SampleRaw(channel_, 16, length, 20, 7, Soon()));
    EXPECT_EQ(again, batches);
  }
  EXPECT_EQ(served_->Value("replay_sequences_sampled_total"), 4 * 2 * 20 * 16);
}

TEST_F(ReplayServiceTest, SendsLargeBatchesInSmallParts) {
  Start();
  const std::string run = Begin(*client_).assignment.run_id;
  ASSERT_OK(AppendAll(channel_, {MakeChunk(run, 1, 0, 50, EpisodeEnd::kTruncated, EpisodeMode::kRandom, 64 * 64)}));
  int parts = 0;
  ASSERT_OK_AND_ASSIGN(const auto batches, SampleRaw(channel_, 50, 20, 1, 3, Soon(), &parts));
  ASSERT_EQ(batches.size(), 1u);
  EXPECT_EQ(batches[0].at("image").bytes.size(), 50u * 20 * 64 * 64 * 3);
  EXPECT_EQ(parts, 5 + 7);  // 8 sequences of 245,760 bytes a part; five small fields
}

TEST_F(ReplayServiceTest, SamplingWaitsForEnoughRows) {
  Start();
  const std::string run = Begin(*client_).assignment.run_id;
  ASSERT_OK(AppendAll(channel_, {MakeChunk(run, 1, 0, 3)}));
  EXPECT_THAT(SampleRaw(channel_, 2, 4, 1, 1, absl::Now() + absl::Milliseconds(500)),
              StatusIs(absl::StatusCode::kDeadlineExceeded));
  absl::StatusOr<std::vector<ArrayMap>> batches;
  std::thread sampler([&] { batches = SampleRaw(channel_, 2, 4, 1, 1, Soon()); });
  EXPECT_OK(AppendAll(channel_, {MakeChunk(run, 1, 3, 1)}));
  sampler.join();
  ASSERT_OK(batches);
  EXPECT_EQ(batches->size(), 1u);
}

TEST_F(ReplayServiceTest, SamplesByTheRuleAskedFor) {
  Start();
  const std::string run = Begin(*client_).assignment.run_id;
  Chunk other_task = MakeChunk(run, 2, 0, 6);
  other_task.info.task = 1;
  ASSERT_OK(AppendAll(channel_, {MakeChunk(run, 1, 0, 6), other_task, MakeChunk(run, 1, 6, 2)}));
  auto watcher = ChunkWatcher::Create(channel_, kRun);
  Mirror mirror;
  ASSERT_OK(mirror.TakeUntilLive(*watcher, 3));
  using Starts = std::set<std::pair<int64_t, int64_t>>;
  replay::v1::SampleSequencesRequest request = SampleRequest(50, 4, 10, 1);
  request.mutable_sampler()->mutable_recency()->set_share(1);
  request.mutable_sampler()->mutable_recency()->set_newest_rows(2);
  ASSERT_OK_AND_ASSIGN(const auto newest, SampleRaw(channel_, request, Soon()));
  EXPECT_EQ(StartsOf(newest), (Starts{{1, 3}, {1, 4}}));
  request.mutable_sampler()->mutable_recency()->set_share(0.5);
  const Starts all = {{1, 0}, {1, 1}, {1, 2}, {1, 3}, {1, 4}, {2, 0}, {2, 1}, {2, 2}};
  ASSERT_OK_AND_ASSIGN(const auto mixed, SampleRaw(channel_, request, Soon()));
  EXPECT_EQ(StartsOf(mixed), all);
  request.mutable_sampler()->mutable_tasks();
  ASSERT_OK_AND_ASSIGN(const auto tasks, SampleRaw(channel_, request, Soon()));
  EXPECT_EQ(StartsOf(tasks), all);
  request.mutable_sampler()->mutable_tasks()->add_weights(0);
  request.mutable_sampler()->mutable_tasks()->add_weights(1);
  ASSERT_OK_AND_ASSIGN(const auto second, SampleRaw(channel_, request, Soon()));
  EXPECT_EQ(StartsOf(second), (Starts{{2, 0}, {2, 1}, {2, 2}}));
  // There is nothing of the third task.
  request.mutable_sampler()->mutable_tasks()->set_weights(1, 0);
  request.mutable_sampler()->mutable_tasks()->add_weights(1);
  EXPECT_THAT(SampleRaw(channel_, request, absl::Now() + absl::Milliseconds(300)),
              StatusIs(absl::StatusCode::kDeadlineExceeded));
  request.mutable_sampler()->mutable_tasks()->set_weights(1, -1);
  EXPECT_THAT(SampleRaw(channel_, request, Soon()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("weights[1] is -1")));
  request.mutable_sampler()->mutable_recency();
  EXPECT_THAT(SampleRaw(channel_, request, Soon()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("newest_rows is 0")));
}

replay::v1::UpdatePrioritiesRequest PrioritiesRequest(const std::map<ChunkKey, double>& priorities) {
  replay::v1::UpdatePrioritiesRequest request;
  request.set_run(kRun);
  for (const auto& [key, priority] : priorities) {
    *request.add_priorities()->mutable_chunk() = ToProto(key);
    request.mutable_priorities()->rbegin()->set_priority(priority);
  }
  return request;
}

// How many of them were known.
absl::StatusOr<int> UpdatePriorities(const std::shared_ptr<grpc::Channel>& channel,
                                     const replay::v1::UpdatePrioritiesRequest& request) {
  auto stub = ReplayService::NewStub(channel);
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(Soon()));
  replay::v1::UpdatePrioritiesResponse response;
  RETURN_IF_ERROR(FromGrpc(stub->UpdatePriorities(&context, request, &response)));
  return response.known();
}

// Draws many sequences of 4 rows by priority: each start must come as often as `expected` says, and say so itself.
void ExpectDrawnBy(const std::shared_ptr<grpc::Channel>& channel, const replay::v1::PrioritizedSampler& rule,
                   const std::map<Start, double>& expected) {
  constexpr int kBatch = 100, kBatches = 200;
  SequenceStream::Options options;
  options.run = kRun;
  options.batch_size = kBatch;
  options.sequence_length = 4;
  options.batches = kBatches;
  options.seed = 11;
  *options.sampler.mutable_prioritized() = rule;
  const auto stream = SequenceStream::Create(channel, options);
  std::map<Start, int> counts;
  for (const auto& [start, probability] : expected) counts[start] = 0;
  ArrayMap batch;
  std::vector<SequenceBatch::Start> starts;
  for (int i = 0; i < kBatches; ++i) {
    ASSERT_OK(stream->Next(batch, starts, Soon()));
    for (size_t s = 0; s < starts.size(); ++s) {
      const auto place = batch.at("place").as<int64_t>().subspan(s * 8, 2);
      const Start start = {place[0], place[1]};
      ASSERT_EQ(start, Start(starts[s].chunk.episode_id, starts[s].chunk.first_row + starts[s].begin));
      ASSERT_NEAR(starts[s].probability, expected.at(start), 1e-12) << start.first << " " << start.second;
      ++counts[start];
    }
  }
  ASSERT_EQ(counts.size(), expected.size());
  ExpectProportional(counts, [&](const Start& start) { return kBatch * kBatches * expected.at(start); });
}

TEST_F(ReplayServiceTest, SamplesByThePrioritiesItWasTold) {
  Start();
  const std::string run = Begin(*client_).assignment.run_id;
  // Valid starts: five in the chunk of six rows, none in the one after it, four in the long one.
  std::vector<Chunk> chunks = {MakeChunk(run, 1, 0, 6), MakeChunk(run, 1, 6, 2), MakeChunk(run, 2, 0, 3),
                               MakeChunk(run, 3, 0, 7)};
  ASSERT_OK(AppendAll(channel_, chunks));
  AwaitRows(18);
  NaiveIndex model(4);
  for (const Chunk& chunk : chunks) model.Append(chunk.info);
  replay::v1::PrioritizedSampler rule;
  ASSERT_NO_FATAL_FAILURE(ExpectDrawnBy(channel_, rule, model.Prioritized(0.6, 0.1)));

  const std::map<ChunkKey, double> priorities = {{{1, 0}, 0.25}, {{2, 0}, 4}, {{3, 0}, 1.5}, {{4, 0}, 100}};
  EXPECT_THAT(UpdatePriorities(channel_, PrioritiesRequest(priorities)), IsOkAndHolds(3));
  for (const auto& [key, priority] : priorities) model.SetPriority(key, priority);
  ASSERT_NO_FATAL_FAILURE(ExpectDrawnBy(channel_, rule, model.Prioritized(0.6, 0.1)));
  // A chunk that comes later has the largest priority so far, and rows that come later make more starts.
  chunks = {MakeChunk(run, 2, 3, 3), MakeChunk(run, 4, 0, 5)};
  ASSERT_OK(AppendAll(channel_, chunks));
  ASSERT_OK(store_->Evict({{1, 0}}));
  AwaitRows(20);
  EXPECT_THAT(UpdatePriorities(channel_, PrioritiesRequest({{{1, 0}, 9}})), IsOkAndHolds(0));
  rule.set_exponent(1);
  rule.set_uniform_share(0.5);
  // Starts: three in episode 2's first chunk with 4, four of 1.5, two of 4.
  const double sum = 3 * 4 + 4 * 1.5 + 2 * 4;
  std::map<orrery::Start, double> expected;
  for (const int64_t row : {0, 1, 2}) expected[{2, row}] = 0.5 / 9 + 0.5 * 4 / sum;
  for (const int64_t row : {0, 1, 2, 3}) expected[{3, row}] = 0.5 / 9 + 0.5 * 1.5 / sum;
  for (const int64_t row : {0, 1}) expected[{4, row}] = 0.5 / 9 + 0.5 * 4 / sum;
  ASSERT_NO_FATAL_FAILURE(ExpectDrawnBy(channel_, rule, expected));

  // A server that begins again knows no priorities.
  served_.reset();
  Start();
  rule.set_uniform_share(0);
  for (auto& [start, probability] : expected) probability = 1.0 / 9;
  ASSERT_NO_FATAL_FAILURE(ExpectDrawnBy(channel_, rule, expected));
}

TEST_F(ReplayServiceTest, RefusesWrongPrioritiesAndTakesNoneOfThem) {
  Start();
  const std::string run = Begin(*client_).assignment.run_id;
  ASSERT_OK(AppendAll(channel_, {MakeChunk(run, 1, 0, 5), MakeChunk(run, 2, 0, 5)}));
  AwaitRows(10);
  const auto refuse = [&](const replay::v1::UpdatePrioritiesRequest& request, const std::string& words) {
    EXPECT_THAT(UpdatePriorities(channel_, request), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(words)));
  };
  refuse(PrioritiesRequest({}), "number of priorities is 0: expected 1 to 65536");
  replay::v1::UpdatePrioritiesRequest many;
  many.set_run(kRun);
  for (int i = 0; i < 65'537; ++i) *many.add_priorities()->mutable_chunk() = ToProto(ChunkKey{1, 0});
  refuse(many, "number of priorities is 65537: expected 1 to 65536");
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  for (const double wrong : {-1.0, 1e21, infinity, nan}) {
    refuse(PrioritiesRequest({{{1, 0}, 50}, {{2, 0}, wrong}}),
           absl::StrCat("priorities[1].priority is ", wrong, ": expected 0 to 1e+20"));
  }
  refuse(PrioritiesRequest({{{0, 0}, 1}}), "priorities[0].chunk.episode_id is 0: expected at least 1");
  refuse(PrioritiesRequest({{{1, -1}, 1}}), "priorities[0].chunk.first_row is -1: expected at least 0");
  replay::v1::UpdatePrioritiesRequest request = PrioritiesRequest({{{1, 0}, 50}});
  request.clear_run();
  refuse(request, "run is not set");
  request.set_run("other");
  EXPECT_THAT(UpdatePriorities(channel_, request), StatusIs(absl::StatusCode::kNotFound, HasSubstr("other")));
  replay::v1::PrioritizedSampler rule;
  rule.set_exponent(1);
  rule.set_uniform_share(0);
  ASSERT_NO_FATAL_FAILURE(
      ExpectDrawnBy(channel_, rule, {{{1, 0}, 0.25}, {{1, 1}, 0.25}, {{2, 0}, 0.25}, {{2, 1}, 0.25}}));
  replay::v1::SampleSequencesRequest sample = SampleRequest(1, 4, 1, 1);
  sample.mutable_sampler()->mutable_prioritized()->set_exponent(11);
  EXPECT_THAT(SampleRaw(channel_, sample, Soon()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("sampler.prioritized.exponent is 11: expected 0 to 10")));
  sample.mutable_sampler()->mutable_prioritized()->set_exponent(1);
  sample.mutable_sampler()->mutable_prioritized()->set_uniform_share(1.5);
  EXPECT_THAT(SampleRaw(channel_, sample, Soon()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("uniform_share is 1.5: expected 0 to 1")));
}

TEST_F(ReplayServiceTest, DrawsTheNextBatchWhileOneIsSentButNoMore) {
  Start();
  const std::string run = Begin(*client_).assignment.run_id;
  ASSERT_OK(AppendAll(channel_, {MakeChunk(run, 1, 0, 50)}));
  auto stub = ReplayService::NewStub(channel_);
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(Soon()));
  auto stream = stub->SampleSequences(&context, SampleRequest(4, 10, 0, 1));
  replay::v1::SampleSequencesResponse response;
  for (int64_t batch = 0; batch < 5; ++batch) {
    do {
      ASSERT_TRUE(stream->Read(&response));
    } while (response.batch() < batch);
    // Nobody reads on, and the next batch gets ready all the same: this would not end otherwise.
    while (served_->Drawn() < batch + 2) {
      ASSERT_FALSE(context.deadline() < std::chrono::system_clock::now());
      std::this_thread::yield();
    }
    EXPECT_EQ(served_->Drawn(), batch + 2);
  }
  context.TryCancel();
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(ReplayServiceTest, ListsEpisodesAndSendsTheirChunks) {
  Start();
  const std::string run = Begin(*client_).assignment.run_id;
  Chunk planned = MakeChunk(run, 2, 3, 4, EpisodeEnd::kTerminated, EpisodeMode::kTrain);
  planned.info.reward_sum = 2.5;
  planned.info.snapshot_version = {1, 20};
  const std::vector<Chunk> chunks = {
      MakeChunk(run, 1, 0, 5), MakeChunk(run, 2, 0, 3, EpisodeEnd::kContinues, EpisodeMode::kTrain), planned,
      MakeChunk(run, 7, 0, 3, EpisodeEnd::kTruncated, EpisodeMode::kEvaluate), MakeChunk(run, 9, 0, 3)};
  ASSERT_OK(AppendAll(channel_, chunks));
  auto watcher = ChunkWatcher::Create(channel_, kRun, /*include_evaluation=*/true);
  Mirror mirror;
  ASSERT_OK(mirror.TakeUntilLive(*watcher, chunks.size()));
  const auto any = replay::v1::EPISODE_MODE_UNSPECIFIED;
  ASSERT_OK_AND_ASSIGN(const auto page, client_->ListEpisodes(0, 2, any, Soon()));
  ASSERT_EQ(page.episodes_size(), 2);
  EXPECT_EQ(page.next_episode_id(), 7);
  EXPECT_EQ(page.episodes(0).episode_id(), 1);
  const replay::v1::EpisodeSummary& episode = page.episodes(1);
  EXPECT_EQ(episode.episode_id(), 2);
  EXPECT_EQ(episode.mode(), replay::v1::TRAIN);
  EXPECT_EQ(episode.end(), replay::v1::TERMINATED);
  EXPECT_EQ(episode.rows(), 7);
  EXPECT_EQ(episode.chunks(), 2);
  EXPECT_EQ(episode.reward_sum(), 2.5);
  EXPECT_EQ(episode.bytes(), chunks[1].info.payload_bytes + planned.info.payload_bytes);
  EXPECT_EQ(episode.snapshot_version().counter(), 20);
  ASSERT_OK_AND_ASSIGN(const auto rest, client_->ListEpisodes(7, 2, any, Soon()));
  ASSERT_EQ(rest.episodes_size(), 2);
  EXPECT_EQ(rest.episodes(1).episode_id(), 9);
  EXPECT_EQ(rest.next_episode_id(), 0);
  ASSERT_OK_AND_ASSIGN(const auto evaluation, client_->ListEpisodes(0, 10, replay::v1::EVALUATE, Soon()));
  ASSERT_EQ(evaluation.episodes_size(), 1);
  EXPECT_EQ(evaluation.episodes(0).episode_id(), 7);

  EXPECT_THAT(client_->GetEpisode(2, Soon()), IsOkAndHolds(::testing::ElementsAre(chunks[1], planned)));
  using enum absl::StatusCode;
  EXPECT_THAT(client_->GetEpisode(3, Soon()), StatusIs(kNotFound, HasSubstr("episode 3")));
  EXPECT_THAT(client_->GetEpisode(0, Soon()), StatusIs(kInvalidArgument, HasSubstr("episode_id")));
  EXPECT_THAT(client_->ListEpisodes(-1, 10, any, Soon()), StatusIs(kInvalidArgument, HasSubstr("first_episode_id")));
  EXPECT_THAT(client_->ListEpisodes(0, 1001, any, Soon()), StatusIs(kInvalidArgument, HasSubstr("page_size")));
  EXPECT_THAT(client_->ListEpisodes(0, 10, static_cast<replay::v1::EpisodeMode>(9), Soon()),
              StatusIs(kInvalidArgument, HasSubstr("mode")));
  ASSERT_OK(store_->Evict({{2, 0}, {2, 3}}));
  EXPECT_THAT(client_->GetEpisode(2, Soon()), StatusIs(kNotFound, HasSubstr("episode 2")));  // whether the index knows or not
}

TEST_F(ReplayServiceTest, SendsALongEpisodeByTheByte) {
  Start();
  const std::string run = Begin(*client_).assignment.run_id;
  std::vector<Chunk> chunks;
  for (int i = 0; i < 12; ++i) chunks.push_back(MakeNoisyChunk(run, 1, i, 1 << 20));
  ASSERT_OK(AppendAll(channel_, chunks));
  auto watcher = ChunkWatcher::Create(channel_, kRun);
  Mirror mirror;
  ASSERT_OK(mirror.TakeUntilLive(*watcher, chunks.size()));
  ASSERT_OK_AND_ASSIGN(const std::vector<Chunk> sent, client_->GetEpisode(1, Soon()));
  EXPECT_TRUE(sent == chunks);
}

TEST_F(ReplayServiceTest, AlternatesCollectingAndLearning) {
  Start("learning { schedule: ALTERNATE initial_updates: 7 updates_per_episode: 3 } collection { seed_episodes: 1 } "
        "evaluation { every_episodes: 0 }");
  const auto seed_episode = Begin(*client_);
  EXPECT_EQ(seed_episode.assignment.mode, EpisodeMode::kRandom);
  const std::string run = seed_episode.assignment.run_id;
  ASSERT_OK_AND_ASSIGN(const int64_t generation, client_->AcquireLearner("learner", Soon()));
  // Nobody may go on before the episode has ended; both are told before their deadlines.
  EXPECT_THAT(client_->BeginEpisode("actor", kHash, absl::Now() + absl::Milliseconds(400)), IsOkAndHolds(::testing::ResultOf([](const auto& e) { return e.has_value(); }, false)));
  absl::StatusOr<RunCoordinator::Grant> grant =
      client_->ReserveUpdates(generation, 0, 100, absl::Now() + absl::Milliseconds(400));
  ASSERT_OK(grant);
  EXPECT_EQ(grant->updates, 0);
  EXPECT_GT(served_->Value("replay_limiter_blocked_seconds_total", {{"side", "actor"}}), 0.1);
  EXPECT_GT(served_->Value("replay_limiter_blocked_seconds_total", {{"side", "learner"}}), 0.1);

  std::thread learner([&] { grant = client_->ReserveUpdates(generation, 0, 100, Soon()); });
  EXPECT_OK(AppendAll(channel_, {MakeChunk(run, 1, 0, 5, EpisodeEnd::kTruncated)}));
  learner.join();
  ASSERT_OK(grant);
  EXPECT_EQ(grant->updates, 7);
  absl::StatusOr<std::optional<ReplayClient::Episode>> next;
  std::thread actor([&] { next = client_->BeginEpisode("actor", kHash, Soon()); });
  EXPECT_OK(client_->ReserveUpdates(generation, 7, 0, Soon()));
  actor.join();
  ASSERT_OK(next);
  ASSERT_TRUE(next->has_value());
  EXPECT_EQ((*next)->assignment.mode, EpisodeMode::kTrain);
  EXPECT_EQ((*next)->assignment.episode_id, 2);
  ASSERT_OK_AND_ASSIGN(const auto stats, client_->GetStats(Soon()));
  EXPECT_EQ(stats.updates_done(), 7);
}

TEST_F(ReplayServiceTest, AnAnswerThatComesTooLateIsGivenAgain) {
  SlowStore slow(store_.get());
  Served served(&slow, MakeExperiment());
  auto channel = served.host->InProcessChannel();
  ReplayClient client(channel, kRun), other(channel, kRun);
  slow.hold = true;
  // The first try that comes so far writes that it was handed an episode; it and all after it hear nothing.
  while (!slow.held) {
    ASSERT_OK_AND_ASSIGN(const auto none, client.BeginEpisode("actor", kHash, absl::Now() + absl::Milliseconds(100)));
    ASSERT_FALSE(none.has_value());
  }
  slow.hold = false;
  slow.hold.notify_all();
  const EpisodeAssignment first = Begin(client).assignment;
  EXPECT_EQ(first.episode_id, 1);
  EXPECT_EQ(first.task, "point_pixels");
  EXPECT_EQ(RunCoordinator(store_.get(), MakeExperiment()).Progress()->episodes_started, 1);
  // That question is answered: the next one, and another client's, are others.
  EXPECT_EQ(Begin(other).assignment.episode_id, 2);
  EXPECT_EQ(Begin(client).assignment.episode_id, 3);
  EXPECT_EQ(RunCoordinator(store_.get(), MakeExperiment()).Progress()->episodes_started, 3);
}

TEST_F(ReplayServiceTest, WhoHasGoneBeforeItsTurnGetsNoEpisode) {
  SlowStore slow(store_.get());
  Served served(&slow, MakeExperiment());
  auto channel = served.host->InProcessChannel();
  ReplayClient client(channel, kRun);
  slow.hold = true;
  auto ask_briefly = [&](const std::string& actor) {
    EXPECT_OK(client.BeginEpisode(actor, kHash, absl::Now() + absl::Milliseconds(100)));
  };
  while (!slow.held) ask_briefly("first");
  for (int i = 0; i < 3; ++i) ask_briefly("gone");  // wait behind that write
  slow.hold = false;
  slow.hold.notify_all();
  EXPECT_EQ(Begin(client, "later").assignment.episode_id, 2);
  EXPECT_EQ(RunCoordinator(store_.get(), MakeExperiment()).Progress()->episodes_started, 2);
}

TEST_F(ReplayServiceTest, AnAnswerThatWasLostIsGivenAgain) {
  SlowStore slow(store_.get());
  Served served(&slow, MakeExperiment());
  auto channel = served.host->InProcessChannel();
  ReplayClient client(channel, kRun);
  slow.lost = 2;  // the client asks again at once, and the second time there is nothing to write
  EXPECT_EQ(Begin(client).assignment.episode_id, 1);
  EXPECT_EQ(slow.lost, 1);
  EXPECT_EQ(RunCoordinator(store_.get(), MakeExperiment()).Progress()->episodes_started, 1);
  EXPECT_EQ(Begin(client).assignment.episode_id, 2);
  EXPECT_EQ(slow.lost, 0);
  EXPECT_EQ(RunCoordinator(store_.get(), MakeExperiment()).Progress()->episodes_started, 2);
}

TEST_F(ReplayServiceTest, QuestionsAskedAtTheSameTimeAreDifferentOnes) {
  SlowStore slow(store_.get());
  Served served(&slow, MakeExperiment());
  auto channel = served.host->InProcessChannel();
  ReplayClient client(channel, kRun);
  slow.lost = 4;
  absl::Mutex mu;
  std::multiset<int64_t> episodes;
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      const int64_t episode = Begin(client).assignment.episode_id;
      absl::MutexLock lock(&mu);
      episodes.insert(episode);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(episodes, ::testing::ElementsAre(1, 2, 3, 4, 5, 6, 7, 8));
  EXPECT_EQ(RunCoordinator(store_.get(), MakeExperiment()).Progress()->episodes_started, 8);
}

TEST_F(ReplayServiceTest, TellsThatTheRunIsComplete) {
  Start("learning { schedule: ALTERNATE updates_per_episode: 2 max_episodes: 1 } collection { seed_episodes: 1 } "
        "evaluation { every_episodes: 0 }");
  const std::string run = Begin(*client_).assignment.run_id;
  ASSERT_OK(AppendAll(channel_, {MakeChunk(run, 1, 0, 5, EpisodeEnd::kTruncated)}));
  ASSERT_OK_AND_ASSIGN(const int64_t generation, client_->AcquireLearner("learner", Soon()));
  ASSERT_OK_AND_ASSIGN(const auto grant, client_->ReserveUpdates(generation, 0, 10, Soon()));
  EXPECT_EQ(grant.updates, 2);
  ASSERT_OK_AND_ASSIGN(const auto after, client_->ReserveUpdates(generation, 2, 10, Soon()));
  EXPECT_TRUE(after.run_complete);
  EXPECT_TRUE(Begin(*client_).assignment.run_complete);
}

TEST_F(ReplayServiceTest, FencesASecondLearner) {
  Start();
  ASSERT_OK_AND_ASSIGN(const int64_t generation, client_->AcquireLearner("first", Soon()));
  EXPECT_THAT(client_->AcquireLearner("second", Soon()), StatusIs(absl::StatusCode::kAlreadyExists));
  EXPECT_THAT(client_->AcquireLearner("first", Soon()), IsOkAndHolds(generation));
  EXPECT_THAT(client_->ReserveUpdates(generation + 1, 0, 1, Soon()), StatusIs(absl::StatusCode::kFailedPrecondition));
}

TEST_F(ReplayServiceTest, ALearnerThatEndsLetsAnotherOneIn) {
  Start();
  ASSERT_OK_AND_ASSIGN(const int64_t generation, client_->AcquireLearner("first", Soon()));
  ASSERT_OK(client_->ReleaseLearner(generation, 0, Soon()));
  EXPECT_THAT(client_->AcquireLearner("second", Soon()), IsOkAndHolds(generation + 1));
  EXPECT_THAT(client_->ReleaseLearner(generation, 0, Soon()), StatusIs(absl::StatusCode::kFailedPrecondition));
}

TEST_F(ReplayServiceTest, KeepsTheNewestSnapshot) {
  Start();
  EXPECT_THAT(client_->GetSnapshot(Soon()), StatusIs(absl::StatusCode::kNotFound));
  Store::Snapshot snapshot{{1, 100}, std::string(6 << 20, 'w')};
  for (size_t i = 0; i < snapshot.file.size(); i += 1000) snapshot.file[i] = static_cast<char>(i / 1000);
  ASSERT_OK(client_->PutSnapshot(snapshot, Soon()));
  ASSERT_OK(client_->PutSnapshot({{1, 50}, "an older one"}, Soon()));
  ASSERT_OK_AND_ASSIGN(const Store::Snapshot kept, client_->GetSnapshot(Soon()));
  EXPECT_EQ(kept.version, snapshot.version);
  EXPECT_TRUE(kept.file == snapshot.file);
  ASSERT_OK_AND_ASSIGN(const auto stats, client_->GetStats(Soon()));
  EXPECT_EQ(stats.snapshot_version().generation(), 1);
  EXPECT_EQ(stats.snapshot_version().counter(), 100);
}

absl::Status PutRaw(const std::shared_ptr<grpc::Channel>& channel, const std::vector<replay::v1::PutSnapshotRequest>& parts) {
  auto stub = ReplayService::NewStub(channel);
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(Soon()));
  replay::v1::PutSnapshotResponse response;
  auto stream = stub->PutSnapshot(&context, &response);
  for (const auto& part : parts) {
    if (!stream->Write(part)) break;
  }
  stream->WritesDone();
  return FromGrpc(stream->Finish());
}

TEST_F(ReplayServiceTest, RefusesADamagedSnapshot) {
  Start();
  std::vector<replay::v1::PutSnapshotRequest> parts;
  ASSERT_OK(SplitSnapshot({{1, 1}, std::string(3'000'000, 'w')}, [&](const common::v1::SnapshotPart& part) {
    parts.emplace_back().set_run(kRun);
    *parts.back().mutable_part() = part;
    return true;
  }));
  auto damaged = parts;
  damaged[1].mutable_part()->mutable_data()->front() ^= 1;
  EXPECT_THAT(PutRaw(channel_, damaged), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("checksum")));
  damaged = {parts[0], parts[2]};
  EXPECT_THAT(PutRaw(channel_, damaged), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("offset")));
  damaged = {parts[0], parts[1]};
  EXPECT_THAT(PutRaw(channel_, damaged), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("ended before")));
  damaged = parts;
  damaged.push_back(parts[0]);
  EXPECT_THAT(PutRaw(channel_, damaged), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("beyond")));
  EXPECT_THAT(PutRaw(channel_, {}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("ended before")));
  EXPECT_THAT(client_->GetSnapshot(Soon()), StatusIs(absl::StatusCode::kNotFound));
  EXPECT_OK(PutRaw(channel_, parts));
}

TEST_F(ReplayServiceTest, RefusesChunksThatAreWrong) {
  Start();
  const std::string run = Begin(*client_).assignment.run_id;
  const Chunk good = MakeChunk(run, 1, 0, 5);
  auto refuse = [&](auto change, absl::StatusCode code, const std::string& words) {
    auto request = RequestFor(good);
    change(request);
    std::vector<ChunkKey> acknowledged;
    EXPECT_THAT(AppendRaw(channel_, {request}, &acknowledged), StatusIs(code, HasSubstr(words)));
    EXPECT_TRUE(acknowledged.empty());
  };
  using Request = replay::v1::AppendChunksRequest;
  using enum absl::StatusCode;
  refuse([](Request& r) { r.clear_run(); }, kInvalidArgument, "run is not set");
  refuse([](Request& r) { r.set_run("other"); }, kNotFound, "other");
  refuse([](Request& r) { r.mutable_chunk()->set_rows(1001); }, kInvalidArgument, "rows");
  refuse([](Request& r) { r.mutable_chunk()->set_rows(6); }, kInvalidArgument, "payload");
  refuse([](Request& r) { r.mutable_chunk()->set_run_id("former"); }, kFailedPrecondition, "former");
  refuse([](Request& r) { r.mutable_chunk()->set_specification_hash(1); }, kFailedPrecondition, "specification");
  refuse([](Request& r) { r.mutable_chunk()->mutable_payload()->pop_back(); }, kInvalidArgument, "payload");
  for (size_t at = 0; at < good.payload.size(); at += 7) {
    refuse([at](Request& r) { (*r.mutable_chunk()->mutable_payload())[at] ^= 4; }, kInvalidArgument, "payload");
  }
  for (const char* field : {kAction, kReward, kIsFirst, kIsTerminal}) {
    ASSERT_OK_AND_ASSIGN(ArrayMap fields, DecodeRows(good.payload, 5));
    fields.erase(field);
    ASSERT_OK_AND_ASSIGN(const std::string payload, EncodeRows(fields));
    refuse([&](Request& r) { r.mutable_chunk()->set_payload(payload); }, kInvalidArgument, field);
  }
  ASSERT_OK_AND_ASSIGN(ArrayMap fields, DecodeRows(good.payload, 5));
  fields.erase("place");
  fields.erase("image");
  ASSERT_OK_AND_ASSIGN(const std::string blind, EncodeRows(fields));
  refuse([&](Request& r) { r.mutable_chunk()->set_payload(blind); }, kInvalidArgument, "observation");
  ASSERT_OK_AND_ASSIGN(const auto stored, store_->Read({good.info.key}));
  EXPECT_FALSE(stored[0].has_value());
}

TEST_F(ReplayServiceTest, BadRequestsGetTheRightCode) {
  Start();
  using enum absl::StatusCode;
  ReplayClient unnamed(channel_, ""), other(channel_, "other");
  for (auto& [client, code] : {std::pair{&unnamed, kInvalidArgument}, std::pair{&other, kNotFound}}) {
    EXPECT_THAT(client->BeginEpisode("actor", kHash, Soon()), StatusIs(code));
    EXPECT_THAT(client->AcquireLearner("learner", Soon()), StatusIs(code));
    EXPECT_THAT(client->ReserveUpdates(1, 0, 1, Soon()), StatusIs(code));
    EXPECT_THAT(client->PutSnapshot({{1, 1}, "12345678"}, Soon()), StatusIs(code));
    EXPECT_THAT(client->GetSnapshot(Soon()), StatusIs(code));
    EXPECT_THAT(client->GetStats(Soon()), StatusIs(code));
    EXPECT_THAT(client->ListEpisodes(0, 1, replay::v1::TRAIN, Soon()), StatusIs(code));
    EXPECT_THAT(client->GetEpisode(1, Soon()), StatusIs(code));
    auto watcher = ChunkWatcher::Create(channel_, client->run());
    EXPECT_THAT(watcher->Next(Soon()), StatusIs(code));
  }
  EXPECT_THAT(client_->BeginEpisode("", kHash, Soon()), StatusIs(kInvalidArgument, HasSubstr("actor_id")));
  EXPECT_THAT(client_->BeginEpisode(std::string(129, 'x'), kHash, Soon()), StatusIs(kInvalidArgument));
  replay::v1::BeginEpisodeRequest begin;
  begin.set_run(kRun);
  begin.set_actor_id("actor");
  begin.set_request_id(std::string(65, 'x'));
  replay::v1::BeginEpisodeResponse begun;
  grpc::ClientContext context;
  EXPECT_THAT(FromGrpc(ReplayService::NewStub(channel_)->BeginEpisode(&context, begin, &begun)),
              StatusIs(kInvalidArgument, HasSubstr("request_id has 65 bytes")));
  Begin(*client_);
  EXPECT_THAT(client_->BeginEpisode("actor", kHash + 1, Soon()), StatusIs(kFailedPrecondition));
  EXPECT_THAT(client_->AcquireLearner("", Soon()), StatusIs(kInvalidArgument, HasSubstr("learner_id")));
  EXPECT_THAT(client_->ReserveUpdates(0, 0, 1, Soon()), StatusIs(kInvalidArgument, HasSubstr("generation")));
  EXPECT_THAT(client_->ReserveUpdates(1, -1, 1, Soon()), StatusIs(kInvalidArgument, HasSubstr("updates_done")));
  EXPECT_THAT(client_->ReserveUpdates(1, 0, 1'000'001, Soon()), StatusIs(kInvalidArgument, HasSubstr("updates_wanted")));
  EXPECT_THAT(client_->ReserveUpdates(1, 0, -1, Soon()), StatusIs(kInvalidArgument, HasSubstr("updates_wanted")));
  EXPECT_THAT(SampleRaw(channel_, 0, 4, 1, 1, Soon()), StatusIs(kInvalidArgument, HasSubstr("batch_size")));
  EXPECT_THAT(SampleRaw(channel_, 4097, 4, 1, 1, Soon()), StatusIs(kInvalidArgument, HasSubstr("batch_size")));
  EXPECT_THAT(SampleRaw(channel_, 1, 1001, 1, 1, Soon()), StatusIs(kInvalidArgument, HasSubstr("sequence_length")));
  EXPECT_THAT(SampleRaw(channel_, 1, 4, -1, 1, Soon()), StatusIs(kInvalidArgument, HasSubstr("batches")));
}

TEST_F(ReplayServiceTest, NothingIsAcknowledgedWhileTheStoreIsAway) {
  FlakyStore flaky(store_.get());
  Served served(&flaky, MakeExperiment());
  auto channel = served.host->InProcessChannel();
  ReplayClient client(channel, kRun);
  const std::string run = Begin(client).assignment.run_id;
  auto writer = ReplayWriter::Create(channel, kRun, {});
  ASSERT_OK(writer->Append(MakeChunk(run, 1, 0, 5), Soon()));
  ASSERT_OK(writer->Flush(Soon()));
  flaky.away = true;
  served.AwaitReady(false);
  ASSERT_OK(writer->Append(MakeChunk(run, 1, 5, 5), Soon()));
  EXPECT_THAT(writer->Flush(absl::Now() + absl::Milliseconds(300)), StatusIs(absl::StatusCode::kDeadlineExceeded));
  EXPECT_GT(writer->unacknowledged_bytes(), 0);
  EXPECT_GT(served.Value("replay_store_errors_total", {{"operation", "append"}}), 0);
  EXPECT_GT(served.Value("replay_store_errors_total", {{"operation", "changes"}}), 0);
  EXPECT_THAT(client.GetStats(absl::Now() + absl::Seconds(2)), StatusIs(absl::StatusCode::kUnavailable));
  flaky.away = false;
  EXPECT_OK(writer->Flush(Soon()));
  served.AwaitReady(true);
  ASSERT_OK_AND_ASSIGN(const auto stored, store_->Read({{1, 5}}));
  EXPECT_TRUE(stored[0].has_value());
}

TEST_F(ReplayServiceTest, AppendsWaitForRoomThenSayThatTheStoreIsFull) {
  FlakyStore flaky(store_.get());
  Served served(&flaky, MakeExperiment());
  auto channel = served.host->InProcessChannel();
  ReplayClient client(channel, kRun);
  const std::string run = Begin(client).assignment.run_id;
  const prometheus::Labels full = {{"store", "full"}};
  flaky.full = true;
  auto writer = ReplayWriter::Create(channel, kRun, {});
  ASSERT_OK(writer->Append(MakeChunk(run, 1, 0, 5), Soon()));
  while (served.Value("replay_append_blocked_seconds_total", full) == 0) std::this_thread::yield();
  flaky.full = false;
  ASSERT_OK(writer->Flush(Soon()));

  flaky.full = true;
  std::vector<ChunkKey> acknowledged;
  EXPECT_THAT(AppendRaw(channel, {RequestFor(MakeChunk(run, 1, 5, 5))}, &acknowledged),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("full")));
  EXPECT_TRUE(acknowledged.empty());
  EXPECT_EQ(served.Value("replay_append_blocked_seconds_total", {{"store", "away"}}), 0);
  // The writer keeps the chunk, no more than it may, and brings it once there is room.
  ReplayWriter::Options small;
  small.max_unacknowledged_bytes = 1;
  auto bounded = ReplayWriter::Create(channel, kRun, small);
  ASSERT_OK(bounded->Append(MakeChunk(run, 1, 5, 5), Soon()));
  EXPECT_THAT(bounded->Append(MakeChunk(run, 1, 10, 5), absl::Now() + absl::Milliseconds(200)),
              StatusIs(absl::StatusCode::kDeadlineExceeded));
  flaky.full = false;
  ASSERT_OK(bounded->Append(MakeChunk(run, 1, 10, 5), Soon()));
  ASSERT_OK(bounded->Flush(Soon()));
  ASSERT_OK_AND_ASSIGN(const auto stored, store_->Read({{1, 0}, {1, 5}, {1, 10}}));
  EXPECT_TRUE(stored[0].has_value() && stored[1].has_value() && stored[2].has_value());
}

TEST_F(ReplayServiceTest, EverythingArrivesThoughTheStoreFailsNowAndThen) {
  FaultStore faulty(store_.get(), 4);
  Served served(&faulty, MakeExperiment());
  auto channel = served.host->InProcessChannel();
  ReplayClient client(channel, kRun);
  const std::string run = Begin(client).assignment.run_id;
  std::vector<Chunk> chunks;
  for (int i = 0; i < 40; ++i) chunks.push_back(MakeChunk(run, 1, i, 1));
  auto watcher = ChunkWatcher::Create(channel, kRun);
  Mirror mirror;
  ASSERT_OK(AppendAll(channel, chunks));
  while (mirror.live.size() != chunks.size()) ASSERT_OK(mirror.Take(*watcher));
  for (const Chunk& chunk : chunks) EXPECT_EQ(mirror.live.at(chunk.info.key), chunk);
  EXPECT_GT(faulty.faults(), 10);
}

TEST_F(ReplayServiceTest, WriterBoundsWhatIsUnacknowledged) {
  ASSERT_OK_AND_ASSIGN(auto nowhere, MakeChannel("127.0.0.1:1"));
  const Chunk chunk = MakeChunk("run", 1, 0, 5);
  ReplayWriter::Options options;
  options.max_unacknowledged_bytes = 10;
  auto writer = ReplayWriter::Create(nowhere, kRun, options);
  ASSERT_OK(writer->Append(chunk, Soon()));  // one always fits alone
  EXPECT_THAT(writer->Append(MakeChunk("run", 1, 5, 5), absl::Now() + absl::Milliseconds(200)),
              StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("acknowledged")));
  EXPECT_GE(writer->unacknowledged_bytes(), chunk.info.payload_bytes);
  EXPECT_THAT(writer->Flush(absl::Now() + absl::Milliseconds(100)), StatusIs(absl::StatusCode::kDeadlineExceeded));
  Chunk huge = chunk;
  huge.payload.assign(kMaxPayloadBytes + 1, 'x');
  EXPECT_THAT(writer->Append(huge, Soon()), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST_F(ReplayServiceTest, HeartbeatsKeepAnEpisodeAlive) {
  Start("collection { lease_seconds: 1 }");
  Begin(*client_);
  Begin(*client_);
  ReplayWriter::Options options;
  options.heartbeat = absl::Milliseconds(100);
  auto writer = ReplayWriter::Create(channel_, kRun, options);
  writer->KeepAlive({1});
  // The second episode is abandoned when its second has passed; the first one is not.
  const absl::Time end = absl::Now() + kLong;
  int64_t finished = 0;
  while (finished == 0 && absl::Now() < end) {
    ASSERT_OK_AND_ASSIGN(const auto stats, client_->GetStats(Soon()));
    finished = stats.episodes_finished();
  }
  EXPECT_EQ(finished, 1);
  const absl::Time later = absl::Now() + absl::Milliseconds(1500);
  while (absl::Now() < later) {
    ASSERT_OK_AND_ASSIGN(const auto stats, client_->GetStats(Soon()));
    ASSERT_EQ(stats.episodes_finished(), 1);
  }
}

TEST_F(ReplayServiceTest, WriterAndWatcherSurviveRestartsOnTheSamePort) {
  served_.emplace(store_.get(), MakeExperiment(), "127.0.0.1:0");
  const std::string address = served_->address();
  ASSERT_OK_AND_ASSIGN(auto channel, MakeChannel(address));
  ReplayClient client(channel, kRun);
  const std::string run = Begin(client).assignment.run_id;
  auto watcher = ChunkWatcher::Create(channel, kRun);
  auto writer = ReplayWriter::Create(channel, kRun, {});
  Mirror mirror;
  ASSERT_OK(mirror.TakeUntilCaughtUp(*watcher));
  constexpr int kChunks = 300;
  std::thread appender([&] {
    for (int i = 0; i < kChunks; ++i) EXPECT_OK(writer->Append(MakeChunk(run, 1, i, 1), Soon()));
  });
  for (int restart = 1; restart <= 3; ++restart) {
    ASSERT_OK(mirror.TakeUntilLive(*watcher, 10 * restart));
    served_.reset();  // streams are cut at once
    served_.emplace(store_.get(), MakeExperiment(), address);
  }
  appender.join();
  EXPECT_OK(writer->Flush(Soon()));
  ASSERT_OK(mirror.TakeUntilLive(*watcher, kChunks));
  EXPECT_EQ(mirror.appends, kChunks);
  EXPECT_EQ(mirror.resets, 0);
  ReplayClient after(channel, kRun);
  ASSERT_OK_AND_ASSIGN(const auto stats, after.GetStats(Soon()));
  EXPECT_EQ(stats.chunks(), kChunks);
  EXPECT_EQ(stats.rows_appended(), kChunks);
  for (int i = 0; i < kChunks; ++i) EXPECT_EQ(mirror.live.at({1, i}), MakeChunk(run, 1, i, 1));
}

// A learner that was away for an hour: the log still reaches back, or it does not.
TEST_F(ReplayServiceTest, AWatcherThatWasAwayGoesOnOrBeginsAnew) {
  for (const int log_length : {100, 10}) {
    const std::unique_ptr<Store> store = MakeMemoryStore({.change_log_length = log_length});
    std::optional<Served> served;
    served.emplace(store.get(), MakeExperiment(), "127.0.0.1:0");
    const std::string address = served->address();
    ASSERT_OK_AND_ASSIGN(auto channel, MakeChannel(address));
    ReplayClient client(channel, kRun);
    const std::string run = Begin(client).assignment.run_id;
    ASSERT_OK(AppendAll(channel, {MakeChunk(run, 1, 0, 5), MakeChunk(run, 1, 5, 5)}));
    auto watcher = ChunkWatcher::Create(channel, kRun);
    Mirror mirror;
    ASSERT_OK(mirror.TakeUntilLive(*watcher, 2));
    ASSERT_OK(mirror.TakeUntilCaughtUp(*watcher));
    served.reset();  // the watcher is cut off, and much happens meanwhile
    while (mirror.caught_up) ASSERT_OK(mirror.Take(*watcher));
    for (int i = 0; i < 20; ++i) ASSERT_OK(store->Append(MakeChunk(run, 2, i, 1)));
    ASSERT_OK(store->Evict({{1, 0}, {2, 3}}));
    served.emplace(store.get(), MakeExperiment(), address);
    while (mirror.live.size() != 20 || mirror.live.contains({1, 0})) ASSERT_OK(mirror.Take(*watcher));
    EXPECT_FALSE(mirror.live.contains({2, 3}));
    EXPECT_TRUE(mirror.live.contains({1, 5}));
    EXPECT_EQ(mirror.resets, log_length == 100 ? 0 : 1);
    EXPECT_EQ(mirror.live.at({2, 19}), MakeChunk(run, 2, 19, 1));
    ASSERT_OK(mirror.TakeUntilCaughtUp(*watcher));
    // And it follows again.
    ASSERT_OK(AppendAll(channel, {MakeChunk(run, 3, 0, 5)}));
    while (!mirror.live.contains({3, 0})) ASSERT_OK(mirror.Take(*watcher));
    EXPECT_EQ(mirror.resets, log_length == 100 ? 0 : 1);
  }
}

TEST_F(ReplayServiceTest, WatcherBeginsAnewOnOtherData) {
  served_.emplace(store_.get(), MakeExperiment(), "127.0.0.1:0");
  const std::string address = served_->address();
  ASSERT_OK_AND_ASSIGN(auto channel, MakeChannel(address));
  ReplayClient client(channel, kRun);
  ASSERT_OK(AppendAll(channel, {MakeChunk(Begin(client).assignment.run_id, 1, 0, 5)}));
  auto watcher = ChunkWatcher::Create(channel, kRun);
  Mirror mirror;
  ASSERT_OK(mirror.TakeUntilLive(*watcher, 1));
  // Let the cursor move past the chunk.
  ASSERT_OK(AppendAll(channel, {MakeChunk(run_id(), 1, 5, 5)}));
  ASSERT_OK(mirror.TakeUntilLive(*watcher, 2));
  const std::unique_ptr<Store> other_store = MakeMemoryStore();
  served_.reset();
  served_.emplace(other_store.get(), MakeExperiment(), address);
  ASSERT_OK(AppendAll(channel, {MakeChunk(Begin(client).assignment.run_id, 1, 10, 5)}));
  while (!mirror.live.contains({1, 10})) ASSERT_OK(mirror.Take(*watcher));
  EXPECT_EQ(mirror.resets, 1);
  EXPECT_EQ(mirror.live.size(), 1u);
  served_.reset();
}

TEST_F(ReplayServiceTest, ACancelledWatchFreesItsHandler) {
  Start();
  auto stub = ReplayService::NewStub(channel_);
  for (int i = 0; i < 8; ++i) {
    replay::v1::WatchChunksRequest request;
    request.set_run(kRun);
    grpc::ClientContext context;
    auto stream = stub->WatchChunks(&context, request);
    replay::v1::WatchChunksResponse response;
    ASSERT_TRUE(stream->Read(&response));
    context.TryCancel();
    EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  // Shutdown waits for running handlers as long as it may: it must find none.
  const absl::Time start = absl::Now();
  served_->host->Shutdown(kLong);
  EXPECT_LT(absl::Now() - start, kLong / 2);
}

TEST_F(ReplayServiceTest, ShutdownWakesEveryWaitingHandler) {
  Start("learning { schedule: ALTERNATE } collection { seed_episodes: 1 }");
  Begin(*client_);
  ASSERT_OK_AND_ASSIGN(const int64_t generation, client_->AcquireLearner("learner", Soon()));
  auto stub = ReplayService::NewStub(channel_);
  std::vector<std::thread> threads;
  auto call = [&](auto method) {
    threads.emplace_back([method] {
      grpc::ClientContext context;
      EXPECT_EQ(method(context).error_code(), grpc::StatusCode::UNAVAILABLE);
    });
  };
  call([&](grpc::ClientContext& context) {
    replay::v1::BeginEpisodeRequest request;
    request.set_run(kRun);
    request.set_actor_id("a");
    request.set_specification_hash(kHash);
    replay::v1::BeginEpisodeResponse response;
    return stub->BeginEpisode(&context, request, &response);
  });
  call([&](grpc::ClientContext& context) {
    replay::v1::ReserveUpdatesRequest request;
    request.set_run(kRun);
    request.set_generation(generation);
    request.set_updates_wanted(1);
    replay::v1::ReserveUpdatesResponse response;
    return stub->ReserveUpdates(&context, request, &response);
  });
  call([&](grpc::ClientContext& context) {
    replay::v1::WatchChunksRequest request;
    request.set_run(kRun);
    auto stream = stub->WatchChunks(&context, request);
    replay::v1::WatchChunksResponse response;
    while (stream->Read(&response)) {
    }
    return stream->Finish();
  });
  auto writer = ReplayWriter::Create(channel_, kRun, {});
  writer->KeepAlive({1});
  // Both sides are seen to wait before the end.
  for (const char* side : {"actor", "learner"}) {
    while (served_->Value("replay_limiter_blocked_seconds_total", {{"side", side}}) == 0) std::this_thread::yield();
  }
  served_->server->Shutdown();
  const absl::Time start = absl::Now();
  served_->host->Shutdown(kLong);
  EXPECT_LT(absl::Now() - start, kLong / 2);
  for (std::thread& thread : threads) thread.join();
}

// What goes in at one replica is sampled and listed at the other one, and the other way round.
void ExpectOneDataSet(Store* first_store, Store* second_store) {
  Served first(first_store, MakeExperiment()), second(second_store, MakeExperiment());
  auto at_first = first.host->InProcessChannel(), at_second = second.host->InProcessChannel();
  ReplayClient first_client(at_first, kRun), second_client(at_second, kRun);
  const auto one = Begin(first_client).assignment, two = Begin(second_client).assignment;
  EXPECT_EQ(one.run_id, two.run_id);
  EXPECT_EQ(one.episode_id, 1);
  EXPECT_EQ(two.episode_id, 2);
  ASSERT_OK(AppendAll(at_first, {MakeChunk(one.run_id, 1, 0, 4)}));
  ASSERT_OK_AND_ASSIGN(const auto batches, SampleRaw(at_second, 8, 4, 1, 1, Soon()));
  EXPECT_EQ(StartsOf(batches), (std::set<std::pair<int64_t, int64_t>>{{1, 0}}));
  EXPECT_THAT(second_client.GetEpisode(1, Soon()), IsOkAndHolds(::testing::ElementsAre(MakeChunk(one.run_id, 1, 0, 4))));
  // The same chunk through the other one is stored once.
  ASSERT_OK(AppendAll(at_second, {MakeChunk(one.run_id, 1, 0, 4), MakeChunk(one.run_id, 2, 0, 5, EpisodeEnd::kTruncated)}));
  auto watcher = ChunkWatcher::Create(at_first, kRun);
  Mirror mirror;
  ASSERT_OK(mirror.TakeUntilLive(*watcher, 2));
  ASSERT_OK_AND_ASSIGN(const auto stats, first_client.GetStats(Soon()));
  EXPECT_EQ(stats.rows_appended(), 9);
}

TEST(Replicas, ServeOneDataSetInMemory) {
  const std::unique_ptr<Store> store = MakeMemoryStore();
  ExpectOneDataSet(store.get(), store.get());
}

TEST(Replicas, ServeOneDataSetInRedis) {
  TempDir folder;
  ASSERT_OK_AND_ASSIGN(const auto redis, RedisServer::Start(folder.path()));
  const StoreOptions options = {.location = redis->url(), .run = kRun, .partitions = 2};
  ASSERT_OK_AND_ASSIGN(const auto first, OpenStore(options));
  ASSERT_OK_AND_ASSIGN(const auto second, OpenStore(options));
  ExpectOneDataSet(first.get(), second.get());
}

TEST(ReplayServer, AppendsWaitForARedisThatIsGone) {
  TempDir folder;
  ASSERT_OK_AND_ASSIGN(const auto redis, RedisServer::Start(folder.path()));
  ASSERT_OK_AND_ASSIGN(const auto store, OpenStore({.location = redis->url(), .run = kRun, .partitions = 2}));
  Served served(store.get(), MakeExperiment());
  auto channel = served.host->InProcessChannel();
  ReplayClient client(channel, kRun);
  const std::string run = Begin(client).assignment.run_id;
  auto writer = ReplayWriter::Create(channel, kRun, {});
  ASSERT_OK(writer->Append(MakeChunk(run, 1, 0, 5), Soon()));
  ASSERT_OK(writer->Flush(Soon()));
  redis->Kill();
  ASSERT_OK(writer->Append(MakeChunk(run, 1, 5, 5), Soon()));
  const prometheus::Labels away = {{"store", "away"}};
  while (served.Value("replay_append_blocked_seconds_total", away) == 0) std::this_thread::yield();
  EXPECT_GT(writer->unacknowledged_bytes(), 0);
  ASSERT_OK(redis->Restart());
  ASSERT_OK(writer->Flush(Soon()));
  served.AwaitReady(true);
  EXPECT_THAT(store->Read({{1, 0}, {1, 5}}), IsOkAndHolds(::testing::Each(::testing::Optional(::testing::_))));
}

TEST(ReplayServer, AFullRedisTakesAppendsAgainOnceThereIsRoom) {
  TempDir folder;
  ASSERT_OK_AND_ASSIGN(const auto redis, RedisServer::Start(folder.path(), {"--maxmemory", "8mb"}));
  ASSERT_OK_AND_ASSIGN(const auto store, OpenStore({.location = redis->url(), .run = kRun, .partitions = 2}));
  Served served(store.get(), MakeExperiment());
  auto channel = served.host->InProcessChannel();
  ReplayClient client(channel, kRun);
  const std::string run = Begin(client).assignment.run_id;
  ReplayWriter::Options options;
  options.max_unacknowledged_bytes = 1 << 20;
  auto writer = ReplayWriter::Create(channel, kRun, options);
  int64_t rows = 0;
  while (served.Value("replay_append_blocked_seconds_total", {{"store", "full"}}) == 0) {
    const absl::Status status = writer->Append(MakeNoisyChunk(run, 1, rows, 100'000), absl::Now() + absl::Milliseconds(200));
    rows += status.ok();
    ASSERT_TRUE(status.ok() || absl::IsDeadlineExceeded(status)) << status;
  }
  EXPECT_LE(writer->unacknowledged_bytes(), options.max_unacknowledged_bytes);
  constexpr int kEvicted = 20;
  ASSERT_GT(rows, kEvicted);
  std::vector<ChunkKey> gone, kept;
  for (int64_t row = 0; row < rows; ++row) (row < kEvicted ? gone : kept).push_back({1, row});
  ASSERT_OK(store->Evict(gone));
  ASSERT_OK(writer->Flush(Soon()));
  EXPECT_THAT(store->Read(kept), IsOkAndHolds(::testing::Each(::testing::Optional(::testing::_))));
}

TEST(ReplayServer, RefusesAnExperimentThatCannotRun) {
  const std::unique_ptr<Store> store = MakeMemoryStore();
  auto registry = std::make_shared<prometheus::Registry>();
  EXPECT_THAT(ReplayServer::Create({MakeExperiment("replay { limiter { updates_per_row: 100 tolerance: 1 } }"), store.get(), registry}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("limiter")));
  const auto refuse = [&](const std::string& more, const std::string& words) {
    EXPECT_THAT(ReplayServer::Create({MakeExperiment(more), store.get(), registry}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(words)));
  };
  refuse("replay { max_rows: 3 }", "replay.max_rows is 3, expected at least learning.sequence_length, 4");
  // An episode of 10 steps, 4 at a time, has 1 + 3 rows.
  refuse("learning { sequence_length: 5 } environment { time_limit: 10 action_repeat: 4 }",
         "learning.sequence_length is 5, expected at most 4, the rows of an episode of task \"point_pixels\"");
  EXPECT_OK(ReplayServer::Create({MakeExperiment("environment { time_limit: 10 action_repeat: 4 }"), store.get(),
                                  std::make_shared<prometheus::Registry>()}));
  auto unnamed = MakeExperiment();
  unnamed.clear_name();
  EXPECT_THAT(ReplayServer::Create({unnamed, store.get(), registry}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("name")));
}

}  // namespace
}  // namespace orrery
