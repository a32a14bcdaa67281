#include "services/replay/replay_service_impl.h"

#include <algorithm>
#include <future>
#include <random>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/cleanup/cleanup.h"
#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/log_text.h"
#include "libs/base/status.h"
#include "libs/base/trace.h"
#include "libs/client/channel.h"
#include "libs/client/chunk_proto.h"
#include "libs/client/status.h"
#include "libs/replay/chunk_codec.h"
#include "libs/replay/chunk_priorities.h"
#include "libs/replay/run_coordinator.h"
#include "libs/replay/sampler.h"
#include "libs/telemetry/call_trace.h"
#include "libs/telemetry/metrics.h"
#include "orrery/replay/v1/replay.grpc.pb.h"
#include "services/replay/append_streams.h"
#include "services/replay/bell.h"
#include "services/replay/data_set.h"
#include "services/replay/metered_store.h"
#include "services/replay/sample_parts.h"
#include "services/replay/sequence_reader.h"

namespace orrery {
namespace {
using grpc::ServerContext;

// A waiting handler answers this long before its caller's deadline.
constexpr absl::Duration kDeadlineMargin = absl::Milliseconds(50);
// How often it looks for what other replicas changed and whether the caller is gone.
constexpr absl::Duration kRecheck = absl::Milliseconds(200);
// Threads that append, for all actors together: enough that Redis always has something to do, and fewer than the connections
// to it, so that nobody else waits for one because of them.
constexpr int kAppendThreads = 32;
// How long an append waits for a store that is full or away, and between its tries.
constexpr absl::Duration kAppendPatience = absl::Seconds(5);
constexpr absl::Duration kFirstRetry = absl::Milliseconds(20), kLastRetry = absl::Milliseconds(500);
constexpr int kChangesPerRead = 256;
constexpr int64_t kBytesPerRead = int64_t{8} << 20;
constexpr int64_t kMaxDecodedBytes = int64_t{256} << 20;
constexpr int kMaxBatch = 4096;
constexpr int kMaxPage = 1000, kDefaultPage = 100;
constexpr int kMaxUpdatesWanted = 1'000'000;
constexpr int kMaxAliveEpisodes = 65'536;
constexpr int kMaxPriorities = 65'536;
// Small value in the store: a serialized SnapshotVersion, so that totals do not cost reading a snapshot.
constexpr char kSnapshotVersionName[] = "snapshot_version";

template <typename... Words>
absl::Status Invalid(const Words&... words) {
  return absl::InvalidArgumentError(absl::StrCat(words...));
}

absl::Status CheckRange(absl::string_view field, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return Invalid(field, " is ", value, ": expected ", low, " to ", high);
}

absl::Status CheckId(absl::string_view field, const std::string& id) {
  if (!id.empty() && id.size() <= 128) return absl::OkStatus();
  return Invalid(field, " has ", id.size(), " characters: expected 1 to 128");
}

absl::StatusOr<std::unique_ptr<Sampler>> SamplerOf(const replay::v1::Sampler& proto) {
  switch (proto.rule_case()) {
    case replay::v1::Sampler::kRecency:
      return MakeRecencySampler(proto.recency().share(), proto.recency().newest_rows());
    case replay::v1::Sampler::kTasks:
      return MakeTaskSampler({proto.tasks().weights().begin(), proto.tasks().weights().end()});
    case replay::v1::Sampler::kPrioritized: {
      const replay::v1::PrioritizedSampler& rule = proto.prioritized();
      return MakePrioritizedSampler(rule.has_exponent() ? rule.exponent() : kDefaultPriorityExponent,
                                    rule.has_uniform_share() ? rule.uniform_share() : kDefaultUniformShare);
    }
    case replay::v1::Sampler::RULE_NOT_SET:
      break;
  }
  return MakeUniformSampler();
}

absl::StatusOr<ChunkPriority> PriorityOf(const replay::v1::ChunkPriority& proto, size_t place) {
  const ChunkKey key = {proto.chunk().episode_id(), proto.chunk().first_row()};
  if (key.episode_id < 1) {
    return Invalid("priorities[", place, "].chunk.episode_id is ", key.episode_id, ": expected at least 1");
  }
  if (key.first_row < 0) return Invalid("priorities[", place, "].chunk.first_row is ", key.first_row, ": expected at least 0");
  if (!(proto.priority() >= 0 && proto.priority() <= kMaxPriority)) {
    return Invalid("priorities[", place, "].priority is ", proto.priority(), ": expected 0 to ", kMaxPriority);
  }
  return ChunkPriority{key, proto.priority()};
}

// Where no sequence can ever be whole, everybody would wait for ever.
absl::Status ValidateSequences(const config::v1::Experiment& experiment) {
  const int64_t length = experiment.learning().sequence_length();
  if (experiment.replay().max_rows() < length) {
    return Invalid("replay.max_rows is ", experiment.replay().max_rows(), ", expected at least learning.sequence_length, ",
                   length, ": no sequence would ever be whole");
  }
  for (const config::v1::Environment& task : TaskEnvironments(experiment.environment())) {
    if (!task.has_time_limit()) continue;
    const int64_t repeat = std::max(1, task.action_repeat());
    const int64_t rows = (task.time_limit() + repeat - 1) / repeat + 1;
    if (rows >= length) continue;
    return Invalid("learning.sequence_length is ", length, ", expected at most ", rows, ", the rows of an episode of task \"",
                   task.task(), "\" (environment.time_limit / environment.action_repeat + 1)");
  }
  return absl::OkStatus();
}

struct Metrics {
  explicit Metrics(prometheus::Registry& r)
      : steps(AddCounter(r, "replay_steps_appended_total", "Rows acknowledged, repeats not counted.")),
        chunks(AddCounter(r, "replay_chunks_appended_total", "Chunks acknowledged, repeats not counted.")),
        bytes(AddCounter(r, "replay_bytes_appended_total", "Payload bytes acknowledged, repeats not counted.")),
        sequences(AddCounter(r, "replay_sequences_sampled_total", "Sequences sent by SampleSequences.")),
        append_seconds(AddHistogram(r, "replay_append_seconds", "From a chunk's arrival to its acknowledgement.",
                                    SecondsBuckets())),
        sample_seconds(AddHistogram(r, "replay_sample_seconds", "Time to draw one batch and find its chunks.",
                                    SecondsBuckets())),
        blocked_actor(Blocked(r, "actor")),
        blocked_learner(Blocked(r, "learner")),
        append_full(AppendBlocked(r, "full")),
        append_away(AppendBlocked(r, "away")) {}

  static prometheus::Counter& Blocked(prometheus::Registry& r, const std::string& side) {
    return AddCounter(r, "replay_limiter_blocked_seconds_total", "Time that callers waited for the schedule.",
                      {{"side", side}});
  }

  static prometheus::Counter& AppendBlocked(prometheus::Registry& r, const std::string& store) {
    return AddCounter(r, "replay_append_blocked_seconds_total",
                      "Time that appends waited for a store that was full or could not be reached.", {{"store", store}});
  }

  prometheus::Counter& steps;
  prometheus::Counter& chunks;
  prometheus::Counter& bytes;
  prometheus::Counter& sequences;
  prometheus::Histogram& append_seconds;
  prometheus::Histogram& sample_seconds;
  prometheus::Counter& blocked_actor;
  prometheus::Counter& blocked_learner;
  prometheus::Counter& append_full;
  prometheus::Counter& append_away;
};

class ReplayServerImpl : public ReplayServer,
                         public replay::v1::ReplayService::WithCallbackMethod_AppendChunks<replay::v1::ReplayService::Service> {
 public:
  explicit ReplayServerImpl(const Options& options)
      : experiment_(options.experiment),
        registry_(options.registry),
        metrics_(*registry_),
        store_(MakeMeteredStore(options.store, *registry_)),
        coordinator_(store_.get(), experiment_),
        data_set_(store_.get(), {experiment_.replay().max_rows(), experiment_.replay().max_bytes()},
                  experiment_.learning().sequence_length(), *registry_),
        reader_(store_.get()),
        appends_({[this](const AppendMessage& message, AppendResponse& response) { return TakeAppend(message, response); },
                  [this] { return progress_.stopped() ? absl::OkStatus() : coordinator_.WriteRows(); }},
                 kAppendThreads) {}
  ~ReplayServerImpl() override { ReplayServerImpl::Shutdown(); }

  grpc::Service* service() override { return this; }
  void Start(std::function<void(bool)> on_ready) override { data_set_.Start(std::move(on_ready)); }

  void Shutdown() override {
    progress_.Stop();
    data_set_.Stop();
    appends_.Shutdown();  // what is not acknowledged is sent again elsewhere
    if (const absl::Status status = coordinator_.WriteRows(); !status.ok()) {  // once for all streams
      LogWarning("the last rows were not counted error=\"{}\"", status.ToString());
    }
  }

  grpc::Status BeginEpisode(ServerContext* context, const replay::v1::BeginEpisodeRequest* request,
                            replay::v1::BeginEpisodeResponse* response) override {
    return Answer(*context, [&] { return DoBeginEpisode(*context, *request, *response); });
  }
  using WithCallbackMethod_AppendChunks::AppendChunks;
  AppendStreams::Stream* AppendChunks(grpc::CallbackServerContext* context) override { return appends_.Open(context); }
  grpc::Status WatchChunks(ServerContext* context, const replay::v1::WatchChunksRequest* request,
                           grpc::ServerWriter<replay::v1::WatchChunksResponse>* stream) override {
    return Answer(*context, [&] { return DoWatchChunks(*context, *request, *stream); });
  }
  grpc::Status SampleSequences(ServerContext* context, const replay::v1::SampleSequencesRequest* request,
                               grpc::ServerWriter<replay::v1::SampleSequencesResponse>* stream) override {
    return Answer(*context, [&] { return DoSampleSequences(*context, *request, *stream); });
  }
  grpc::Status UpdatePriorities(ServerContext* context, const replay::v1::UpdatePrioritiesRequest* request,
                                replay::v1::UpdatePrioritiesResponse* response) override {
    return Answer(*context, [&] { return DoUpdatePriorities(*context, *request, *response); });
  }
  grpc::Status ListEpisodes(ServerContext* context, const replay::v1::ListEpisodesRequest* request,
                            replay::v1::ListEpisodesResponse* response) override {
    return Answer(*context, [&] { return DoListEpisodes(*context, *request, *response); });
  }
  grpc::Status GetEpisode(ServerContext* context, const replay::v1::GetEpisodeRequest* request,
                          grpc::ServerWriter<replay::v1::GetEpisodeResponse>* stream) override {
    return Answer(*context, [&] { return DoGetEpisode(*context, *request, *stream); });
  }
  grpc::Status AcquireLearner(ServerContext* context, const replay::v1::AcquireLearnerRequest* request,
                              replay::v1::AcquireLearnerResponse* response) override {
    return Answer(*context, [&] { return DoAcquireLearner(*request, *response); });
  }
  grpc::Status ReserveUpdates(ServerContext* context, const replay::v1::ReserveUpdatesRequest* request,
                              replay::v1::ReserveUpdatesResponse* response) override {
    return Answer(*context, [&] { return DoReserveUpdates(*context, *request, *response); });
  }
  grpc::Status PutSnapshot(ServerContext* context, grpc::ServerReader<replay::v1::PutSnapshotRequest>* stream,
                           replay::v1::PutSnapshotResponse*) override {
    return Answer(*context, [&] { return DoPutSnapshot(*stream); });
  }
  grpc::Status GetSnapshot(ServerContext* context, const replay::v1::GetSnapshotRequest* request,
                           grpc::ServerWriter<replay::v1::GetSnapshotResponse>* stream) override {
    return Answer(*context, [&] { return DoGetSnapshot(*request, *stream); });
  }
  grpc::Status GetStats(ServerContext* context, const replay::v1::GetStatsRequest* request,
                        replay::v1::GetStatsResponse* response) override {
    return Answer(*context, [&] { return DoGetStats(*context, *request, *response); });
  }

 private:
  using AppendResponse = replay::v1::AppendChunksResponse;
  using WatchStream = grpc::ServerWriter<replay::v1::WatchChunksResponse>;
  using SampleStream = grpc::ServerWriter<replay::v1::SampleSequencesResponse>;

  // What `act` says, in the trace of the call.
  static grpc::Status Answer(const ServerContext& context, absl::FunctionRef<absl::Status()> act) {
    const TraceScope trace(TraceOf(context));
    return ToGrpc(act());
  }

  absl::Status CheckRun(const std::string& run) const {
    if (run.empty()) return Invalid("run is not set");
    if (run == experiment_.name()) return absl::OkStatus();
    return absl::NotFoundError(absl::StrCat("run \"", run, "\" is not served here: expected \"", experiment_.name(), "\""));
  }

  // How long the store is waited for.
  static absl::Time PatientUntil(const AppendMessage& message) {
    return std::min(message.arrived + kAppendPatience, message.deadline - kDeadlineMargin);
  }

  // Waits until `bell` rings or it is time to look again. CANCELLED: the caller is gone. DEADLINE_EXCEEDED: its deadline is
  // near. UNAVAILABLE: this server is going away.
  static absl::Status AwaitRing(const ServerContext& context, Bell& bell, int64_t seen) {
    if (context.IsCancelled()) return absl::CancelledError("the caller is gone");
    const absl::Time now = absl::Now();
    const absl::Time limit = absl::FromChrono(context.deadline()) - kDeadlineMargin;
    if (now >= limit) return absl::DeadlineExceededError("the schedule or the data did not allow it before the deadline");
    if (!bell.Await(seen, std::min(limit, now + kRecheck))) return absl::UnavailableError("replay is shutting down");
    return absl::OkStatus();
  }

  absl::Status AwaitProgress(const ServerContext& context, int64_t seen, prometheus::Counter& blocked) {
    const absl::Time start = absl::Now();
    absl::Status status = AwaitRing(context, progress_, seen);
    blocked.Increment(absl::ToDoubleSeconds(absl::Now() - start));
    return status;
  }

  // The index answers for all data only after it has caught up once.
  absl::Status AwaitCaughtUp(const ServerContext& context) {
    while (true) {
      const int64_t seen = data_set_.changes().rings();
      if (data_set_.caught_up()) return absl::OkStatus();
      const absl::Status status = AwaitRing(context, data_set_.changes(), seen);
      if (absl::IsDeadlineExceeded(status)) return absl::UnavailableError("the index is still being read from the store");
      RETURN_IF_ERROR(status);
    }
  }

  absl::Status DoBeginEpisode(const ServerContext& context, const replay::v1::BeginEpisodeRequest& request,
                              replay::v1::BeginEpisodeResponse& response);
  absl::StatusOr<bool> TakeAppend(const AppendMessage& message, AppendResponse& response);
  absl::Status AppendOne(const AppendMessage& message);
  // Logs what became of the chunk that `response` names.
  void NoteAppend(const AppendResponse& response, int rows, const absl::Status& appended);
  // Calls `act` again while the store is full or away, as long as PatientUntil says.
  absl::Status Patiently(const AppendMessage& message, absl::FunctionRef<absl::Status()> act);
  absl::Status CheckBelongs(const Chunk& chunk);
  absl::Status DoWatchChunks(const ServerContext& context, const replay::v1::WatchChunksRequest& request,
                             WatchStream& stream);
  absl::Status SendChanges(const std::vector<Change>& changes, bool include_evaluation,
                           replay::v1::WatchChunksResponse& response, WatchStream& stream);
  absl::Status SendChunks(const std::vector<ChunkKey>& keys, replay::v1::WatchChunksResponse& response,
                          WatchStream& stream);
  absl::Status DoSampleSequences(const ServerContext& context, const replay::v1::SampleSequencesRequest& request,
                                 SampleStream& stream);
  absl::StatusOr<SequenceBatch> DrawBatch(const ServerContext& context, const replay::v1::SampleSequencesRequest& request,
                                          const Sampler& sampler, std::mt19937_64& random);
  absl::Status DoUpdatePriorities(const ServerContext& context, const replay::v1::UpdatePrioritiesRequest& request,
                                  replay::v1::UpdatePrioritiesResponse& response);
  absl::Status DoListEpisodes(const ServerContext& context, const replay::v1::ListEpisodesRequest& request,
                              replay::v1::ListEpisodesResponse& response);
  absl::Status DoGetEpisode(const ServerContext& context, const replay::v1::GetEpisodeRequest& request,
                            grpc::ServerWriter<replay::v1::GetEpisodeResponse>& stream);
  absl::Status DoAcquireLearner(const replay::v1::AcquireLearnerRequest& request,
                                replay::v1::AcquireLearnerResponse& response);
  absl::Status DoReserveUpdates(const ServerContext& context, const replay::v1::ReserveUpdatesRequest& request,
                                replay::v1::ReserveUpdatesResponse& response);
  absl::Status DoPutSnapshot(grpc::ServerReader<replay::v1::PutSnapshotRequest>& stream);
  absl::Status PublishSnapshotVersion(const SnapshotVersion& version);
  absl::Status DoGetSnapshot(const replay::v1::GetSnapshotRequest& request,
                             grpc::ServerWriter<replay::v1::GetSnapshotResponse>& stream);
  absl::Status DoGetStats(const ServerContext& context, const replay::v1::GetStatsRequest& request,
                          replay::v1::GetStatsResponse& response);

  // Constant after construction; thread-safe themselves.
  const config::v1::Experiment experiment_;
  const std::shared_ptr<prometheus::Registry> registry_;
  Metrics metrics_;
  const std::unique_ptr<Store> store_;
  RunCoordinator coordinator_;
  DataSet data_set_;
  SequenceReader reader_;
  LineLimit refusals_;
  Bell progress_;  // rings when rows or updates were reported

  absl::Mutex mu_;
  RunProgress run_ ABSL_GUARDED_BY(mu_);  // as read last; only its identity is used
  int64_t run_clears_ ABSL_GUARDED_BY(mu_) = 0;  // DataSet::clears at that time

  AppendStreams appends_;  // last: its threads use everything above
};

absl::Status ReplayServerImpl::DoBeginEpisode(const ServerContext& context,
                                              const replay::v1::BeginEpisodeRequest& request,
                                              replay::v1::BeginEpisodeResponse& response) {
  RETURN_IF_ERROR(CheckRun(request.run()));
  RETURN_IF_ERROR(CheckId("actor_id", request.actor_id()));
  const absl::Time deadline = absl::FromChrono(context.deadline());
  // Nobody plays what is handed out to a caller that has gone, and by a late try the question may have been answered.
  const auto check_waits = [&]() -> absl::Status {
    if (absl::Now() >= deadline) return absl::DeadlineExceededError("the store took longer than the caller's deadline");
    return context.IsCancelled() ? absl::CancelledError("the caller is gone") : absl::OkStatus();
  };
  std::optional<EpisodeAssignment> assignment;
  while (true) {
    const int64_t seen = progress_.rings();
    ASSIGN_OR_RETURN(assignment, coordinator_.BeginEpisode(request.actor_id(), request.specification_hash(),
                                                           request.request_id(), check_waits));
    if (assignment.has_value()) break;
    RETURN_IF_ERROR(AwaitProgress(context, seen, metrics_.blocked_actor));
  }
  response.set_run_id(assignment->run_id);
  response.set_run_complete(assignment->run_complete);
  if (assignment->run_complete) return absl::OkStatus();
  response.set_episode_id(assignment->episode_id);
  response.set_mode(ToProto(assignment->mode));
  response.set_task(assignment->task);
  response.set_seed(assignment->seed);
  response.set_lease_seconds(experiment_.collection().lease_seconds());
  return absl::OkStatus();
}

absl::StatusOr<bool> ReplayServerImpl::TakeAppend(const AppendMessage& message, AppendResponse& response) {
  const replay::v1::AppendChunksRequest& request = message.request;
  RETURN_IF_ERROR(CheckRun(request.run()));
  if (request.alive_episode_ids_size() > 0) {
    RETURN_IF_ERROR(CheckRange("number of alive_episode_ids", request.alive_episode_ids_size(), 0, kMaxAliveEpisodes));
    const std::vector<int64_t> alive(request.alive_episode_ids().begin(), request.alive_episode_ids().end());
    RETURN_IF_ERROR(Patiently(message, [&] { return coordinator_.RenewLeases(alive); }));
  }
  if (!request.has_chunk()) return false;
  response.set_episode_id(request.chunk().episode_id());
  response.set_first_row(request.chunk().first_row());
  const int rows = request.chunk().rows();
  const absl::Status appended = AppendOne(message);
  NoteAppend(response, rows, appended);
  RETURN_IF_ERROR(appended);
  return true;
}

void ReplayServerImpl::NoteAppend(const AppendResponse& response, int rows, const absl::Status& appended) {
  if (appended.ok()) {
    LogDebug("chunk appended episode={} first_row={} rows={}", response.episode_id(), response.first_row(), rows);
    return;
  }
  std::optional<int64_t> left_out;
  if (IsFinalError(appended.code())) left_out = refusals_.Pass(absl::Now());
  if (!left_out.has_value()) {
    LogDebug("chunk not appended episode={} first_row={} rows={} error=\"{}\"", response.episode_id(), response.first_row(),
             rows, LogText(appended.ToString()));
    return;
  }
  const std::string more = *left_out > 0 ? absl::StrCat(" lines_left_out=", *left_out) : "";
  LogWarning("chunk refused episode={} first_row={} rows={} error=\"{}\"{}", response.episode_id(), response.first_row(), rows,
             LogText(appended.ToString()), more);
}

// OK means: in the store and counted.
absl::Status ReplayServerImpl::AppendOne(const AppendMessage& message) {
  ASSIGN_OR_RETURN(const Chunk chunk, FromProto(std::move(*message.request.mutable_chunk())));
  RETURN_IF_ERROR(Patiently(message, [&] { return CheckBelongs(chunk); }));
  // A damaged chunk, or one that a learner could not use, never enters the store.
  const absl::Status usable = CheckPayload(chunk.payload, chunk.info.rows, kMaxDecodedBytes);
  if (!usable.ok()) return Invalid("chunk.payload: ", usable.message());
  const bool repeated = data_set_.Contains(chunk.info.key);
  RETURN_IF_ERROR(Patiently(message, [&] { return store_->Append(chunk); }));
  RETURN_IF_ERROR(Patiently(message, [&] { return coordinator_.RecordChunk(chunk.info); }));
  progress_.Ring();
  metrics_.append_seconds.Observe(absl::ToDoubleSeconds(absl::Now() - message.arrived));
  if (repeated) return absl::OkStatus();
  metrics_.steps.Increment(chunk.info.rows);
  metrics_.chunks.Increment();
  metrics_.bytes.Increment(static_cast<double>(chunk.info.payload_bytes));
  return absl::OkStatus();
}

// A store that was restarted comes back, eviction makes room in a full one.
absl::Status ReplayServerImpl::Patiently(const AppendMessage& message, absl::FunctionRef<absl::Status()> act) {
  const absl::Time limit = PatientUntil(message);
  Backoff backoff(kFirstRetry, kLastRetry);
  while (true) {
    const absl::Time start = absl::Now();
    const absl::Status status = act();
    // That is about this server's login, not about the chunk: the actor keeps it and sends it again.
    if (absl::IsPermissionDenied(status)) return absl::UnavailableError(status.message());
    const bool full = absl::IsResourceExhausted(status);
    if (!full && !absl::IsUnavailable(status)) return status;
    const bool waited = data_set_.changes().Sleep(std::min(limit, absl::Now() + backoff.Next()));
    (full ? metrics_.append_full : metrics_.append_away).Increment(absl::ToDoubleSeconds(absl::Now() - start));
    if (!waited) return absl::UnavailableError("replay is shutting down");
    if (absl::Now() >= limit || message.gone) return status;
  }
}

// The run's identity is read again when it does not fit: another replica may just have begun the run.
absl::Status ReplayServerImpl::CheckBelongs(const Chunk& chunk) {
  auto fits = [&](const RunProgress& run) {
    return run.run_id == chunk.run_id && run.specification_hash == chunk.info.specification_hash;
  };
  const int64_t clears = data_set_.clears();
  {
    absl::MutexLock lock(&mu_);
    if (run_clears_ == clears && fits(run_)) return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(RunProgress run, coordinator_.Progress());
  if (run.run_id != chunk.run_id) {
    return absl::FailedPreconditionError(
        absl::StrCat("chunk.run_id is \"", chunk.run_id, "\": expected \"", run.run_id, "\", this data's run"));
  }
  if (!fits(run)) {
    return absl::FailedPreconditionError(absl::StrCat("chunk.specification_hash is ", chunk.info.specification_hash,
                                                      ": expected ", run.specification_hash,
                                                      ", the hash of this run's environment specification"));
  }
  absl::MutexLock lock(&mu_);
  run_ = std::move(run);
  run_clears_ = clears;
  return absl::OkStatus();
}

absl::Status ReplayServerImpl::DoWatchChunks(const ServerContext& context,
                                             const replay::v1::WatchChunksRequest& request, WatchStream& stream) {
  RETURN_IF_ERROR(CheckRun(request.run()));
  std::string cursor = request.cursor();
  bool caught_up = false;
  while (true) {
    const int64_t seen = data_set_.changes().rings();
    ASSIGN_OR_RETURN(const ChangeBatch batch, store_->Changes(cursor, kChangesPerRead, absl::ZeroDuration()));
    replay::v1::WatchChunksResponse response;
    response.set_cursor(cursor);
    response.set_caught_up(caught_up);
    RETURN_IF_ERROR(SendChanges(batch.changes, request.include_evaluation(), response, stream));
    // The cursor moves on only after everything before it was sent.
    const bool news = !batch.changes.empty() || (batch.caught_up && !caught_up);
    caught_up = caught_up || batch.caught_up;
    cursor = batch.cursor;
    if (news) {
      response.clear_change();
      response.set_cursor(cursor);
      response.set_caught_up(caught_up);
      if (!stream.Write(response)) return absl::CancelledError("the caller is gone");
    }
    if (batch.changes.empty() && caught_up) RETURN_IF_ERROR(AwaitRing(context, data_set_.changes(), seen));
    if (context.IsCancelled()) return absl::CancelledError("the caller is gone");
  }
}

absl::Status ReplayServerImpl::SendChanges(const std::vector<Change>& changes, bool include_evaluation,
                                           replay::v1::WatchChunksResponse& response, WatchStream& stream) {
  std::vector<ChunkKey> keys;  // appended ones that wait to be read together
  int64_t bytes = 0;
  auto flush = [&]() -> absl::Status {
    bytes = 0;
    return keys.empty() ? absl::OkStatus() : SendChunks(std::exchange(keys, {}), response, stream);
  };
  for (const Change& change : changes) {
    if (change.info.mode == EpisodeMode::kEvaluate && !include_evaluation) continue;
    if (change.kind == Change::Kind::kAppend) {
      if (bytes + change.info.payload_bytes > kBytesPerRead) RETURN_IF_ERROR(flush());
      keys.push_back(change.info.key);
      bytes += change.info.payload_bytes;
      continue;
    }
    RETURN_IF_ERROR(flush());
    *response.mutable_evicted() = ToProto(change.info.key);
    if (!stream.Write(response)) return absl::CancelledError("the caller is gone");
  }
  return flush();
}

absl::Status ReplayServerImpl::SendChunks(const std::vector<ChunkKey>& keys, replay::v1::WatchChunksResponse& response,
                                          WatchStream& stream) {
  ASSIGN_OR_RETURN(std::vector<std::optional<Chunk>> chunks, store_->Read(keys));
  for (std::optional<Chunk>& chunk : chunks) {
    if (!chunk.has_value()) continue;  // evicted meanwhile
    std::string payload = std::move(chunk->payload);
    *response.mutable_appended() = ToProto(*chunk);
    response.mutable_appended()->set_payload(std::move(payload));
    if (!stream.Write(response)) return absl::CancelledError("the caller is gone");
  }
  return absl::OkStatus();
}

absl::Status ReplayServerImpl::DoSampleSequences(const ServerContext& context,
                                                 const replay::v1::SampleSequencesRequest& request,
                                                 SampleStream& stream) {
  RETURN_IF_ERROR(CheckRun(request.run()));
  RETURN_IF_ERROR(CheckRange("batch_size", request.batch_size(), 1, kMaxBatch));
  RETURN_IF_ERROR(CheckRange("sequence_length", request.sequence_length(), 1, kMaxChunkRows));
  if (request.batches() < 0) return Invalid("batches is ", request.batches(), ": expected at least 0");
  ASSIGN_OR_RETURN(const std::unique_ptr<Sampler> sampler, SamplerOf(request.sampler()));
  RETURN_IF_ERROR(AwaitCaughtUp(context));
  std::mt19937_64 random(request.seed());
  if (request.seed() == 0) random.seed((uint64_t{std::random_device()()} << 32) | std::random_device()());
  const auto draw = [&] {
    return std::async(std::launch::async, [&, trace = CurrentTrace()] {
      const TraceScope scope(trace);
      return DrawBatch(context, request, *sampler, random);
    });
  };
  const SendPart send = [&](const replay::v1::SampleSequencesResponse& part) { return stream.Write(part); };
  std::future<absl::StatusOr<SequenceBatch>> next = draw();  // waits for its thread when it goes out of scope
  for (int64_t number = 0;; ++number) {
    ASSIGN_OR_RETURN(const SequenceBatch batch, next.get());
    const bool last = number + 1 == request.batches();
    if (!last) next = draw();  // while this one is being sent
    RETURN_IF_ERROR(request.as_chunks() ? SendSampledChunks(batch, number, send) : SendSampledFields(batch, number, send));
    metrics_.sequences.Increment(request.batch_size());
    if (last) return absl::OkStatus();
    if (data_set_.changes().stopped()) return absl::UnavailableError("replay is shutting down");
  }
}

absl::StatusOr<SequenceBatch> ReplayServerImpl::DrawBatch(const ServerContext& context,
                                                          const replay::v1::SampleSequencesRequest& request,
                                                          const Sampler& sampler, std::mt19937_64& random) {
  while (true) {
    const int64_t seen = data_set_.changes().rings();
    const absl::Time start = absl::Now();
    const std::vector<Sequence> sequences =
        data_set_.Sample(sampler, request.sequence_length(), request.batch_size(), random);
    if (!sequences.empty()) {
      absl::StatusOr<SequenceBatch> batch = reader_.Open(sequences, data_set_.clears());
      metrics_.sample_seconds.Observe(absl::ToDoubleSeconds(absl::Now() - start));
      if (!absl::IsNotFound(batch.status())) return batch;
    }
    // Too little data, or a chunk was evicted and the index does not know yet.
    RETURN_IF_ERROR(AwaitRing(context, data_set_.changes(), seen));
  }
}

absl::Status ReplayServerImpl::DoUpdatePriorities(const ServerContext& context,
                                                  const replay::v1::UpdatePrioritiesRequest& request,
                                                  replay::v1::UpdatePrioritiesResponse& response) {
  RETURN_IF_ERROR(CheckRun(request.run()));
  RETURN_IF_ERROR(CheckRange("number of priorities", request.priorities_size(), 1, kMaxPriorities));
  std::vector<ChunkPriority> priorities;
  for (const replay::v1::ChunkPriority& proto : request.priorities()) {
    ASSIGN_OR_RETURN(const ChunkPriority priority, PriorityOf(proto, priorities.size()));
    priorities.push_back(priority);
  }
  RETURN_IF_ERROR(AwaitCaughtUp(context));
  response.set_known(data_set_.SetPriorities(priorities));
  return absl::OkStatus();
}

absl::Status ReplayServerImpl::DoListEpisodes(const ServerContext& context,
                                              const replay::v1::ListEpisodesRequest& request,
                                              replay::v1::ListEpisodesResponse& response) {
  RETURN_IF_ERROR(CheckRun(request.run()));
  if (request.first_episode_id() < 0) {
    return Invalid("first_episode_id is ", request.first_episode_id(), ": expected at least 0");
  }
  RETURN_IF_ERROR(CheckRange("page_size", request.page_size(), 0, kMaxPage));
  std::optional<EpisodeMode> mode;
  if (request.mode() != replay::v1::EPISODE_MODE_UNSPECIFIED) {
    ASSIGN_OR_RETURN(mode, FromProto(request.mode()));
  }
  RETURN_IF_ERROR(AwaitCaughtUp(context));
  const int page = request.page_size() == 0 ? kDefaultPage : request.page_size();
  int64_t next = 0;
  for (const std::vector<ChunkInfo>& episode : data_set_.Episodes(request.first_episode_id(), page, mode, next)) {
    *response.add_episodes() = Summarise(episode);
  }
  response.set_next_episode_id(next);
  return absl::OkStatus();
}

absl::Status ReplayServerImpl::DoGetEpisode(const ServerContext& context, const replay::v1::GetEpisodeRequest& request,
                                            grpc::ServerWriter<replay::v1::GetEpisodeResponse>& stream) {
  RETURN_IF_ERROR(CheckRun(request.run()));
  const int64_t id = request.episode_id();
  if (id < 1) return Invalid("episode_id is ", id, ": expected at least 1");
  RETURN_IF_ERROR(AwaitCaughtUp(context));
  int64_t next = 0;
  const std::vector<std::vector<ChunkInfo>> found = data_set_.Episodes(id, 1, std::nullopt, next);
  if (found.empty() || found[0][0].key.episode_id != id) {
    return absl::NotFoundError(absl::StrCat("episode ", id, " is not stored"));
  }
  const std::vector<ChunkInfo>& infos = found[0];
  for (size_t i = 0; i < infos.size();) {
    std::vector<ChunkKey> keys;
    for (int64_t bytes = 0; i < infos.size() && (keys.empty() || bytes + infos[i].payload_bytes <= kBytesPerRead); ++i) {
      keys.push_back(infos[i].key);
      bytes += infos[i].payload_bytes;
    }
    ASSIGN_OR_RETURN(const std::vector<std::optional<Chunk>> chunks, store_->Read(keys));
    for (const std::optional<Chunk>& chunk : chunks) {
      if (!chunk.has_value()) return absl::NotFoundError(absl::StrCat("a chunk of episode ", id, " was evicted meanwhile"));
      replay::v1::GetEpisodeResponse response;
      *response.mutable_chunk() = ToProto(*chunk);
      if (!stream.Write(response)) return absl::CancelledError("the caller is gone");
    }
  }
  return absl::OkStatus();
}

absl::Status ReplayServerImpl::DoAcquireLearner(const replay::v1::AcquireLearnerRequest& request,
                                                replay::v1::AcquireLearnerResponse& response) {
  RETURN_IF_ERROR(CheckRun(request.run()));
  RETURN_IF_ERROR(CheckId("learner_id", request.learner_id()));
  ASSIGN_OR_RETURN(const int64_t generation, coordinator_.AcquireLearner(request.learner_id()));
  response.set_generation(generation);
  response.set_lease_seconds(RunCoordinator::kLearnerLeaseSeconds);
  return absl::OkStatus();
}

absl::Status ReplayServerImpl::DoReserveUpdates(const ServerContext& context,
                                                const replay::v1::ReserveUpdatesRequest& request,
                                                replay::v1::ReserveUpdatesResponse& response) {
  RETURN_IF_ERROR(CheckRun(request.run()));
  if (request.generation() < 1) return Invalid("generation is ", request.generation(), ": expected at least 1");
  if (request.updates_done() < 0) return Invalid("updates_done is ", request.updates_done(), ": expected at least 0");
  RETURN_IF_ERROR(CheckRange("updates_wanted", request.updates_wanted(), 0, kMaxUpdatesWanted));
  if (request.release()) {
    RETURN_IF_ERROR(coordinator_.ReleaseLearner(request.generation(), request.updates_done()));
    progress_.Ring();
    return absl::OkStatus();
  }
  bool reported = false;
  while (true) {
    if (context.IsCancelled()) return absl::CancelledError("the caller is gone");  // it may have released the run since
    const int64_t seen = progress_.rings();
    ASSIGN_OR_RETURN(const RunCoordinator::Grant grant,
                     coordinator_.ReserveUpdates(request.generation(), request.updates_done(), request.updates_wanted()));
    if (!reported) progress_.Ring();  // the report may let an episode begin
    reported = true;
    response.set_updates_granted(grant.updates);
    response.set_run_complete(grant.run_complete);
    if (grant.updates > 0 || grant.run_complete || request.updates_wanted() == 0) return absl::OkStatus();
    const absl::Status status = AwaitProgress(context, seen, metrics_.blocked_learner);
    if (absl::IsDeadlineExceeded(status)) return absl::OkStatus();
    RETURN_IF_ERROR(status);
  }
}

absl::Status ReplayServerImpl::DoPutSnapshot(grpc::ServerReader<replay::v1::PutSnapshotRequest>& stream) {
  SnapshotAssembler assembler;
  replay::v1::PutSnapshotRequest request;
  bool complete = false;
  while (stream.Read(&request)) {
    RETURN_IF_ERROR(CheckRun(request.run()));
    if (complete) return Invalid("snapshot part beyond total_bytes");
    ASSIGN_OR_RETURN(complete, assembler.Add(request.part()));
  }
  if (!complete) return Invalid("the stream ended before the snapshot was complete");
  const Store::Snapshot snapshot = assembler.Take();
  RETURN_IF_ERROR(store_->PutSnapshot(snapshot));
  return PublishSnapshotVersion(snapshot.version);
}

absl::Status ReplayServerImpl::PublishSnapshotVersion(const SnapshotVersion& version) {
  while (true) {
    ASSIGN_OR_RETURN(const VersionedValue kept, store_->Get(kSnapshotVersionName));
    common::v1::SnapshotVersion proto;
    if (kept.version > 0 && !proto.ParseFromString(kept.value)) {
      return absl::DataLossError(absl::StrCat("\"", kSnapshotVersionName, "\" in the store is damaged"));
    }
    if (SnapshotVersion{proto.generation(), proto.counter()} >= version) return absl::OkStatus();
    const absl::Status status =
        store_->CompareAndSet(kSnapshotVersionName, kept.version, ToProto(version).SerializeAsString());
    if (!absl::IsAborted(status)) return status;
  }
}

absl::Status ReplayServerImpl::DoGetSnapshot(const replay::v1::GetSnapshotRequest& request,
                                             grpc::ServerWriter<replay::v1::GetSnapshotResponse>& stream) {
  RETURN_IF_ERROR(CheckRun(request.run()));
  ASSIGN_OR_RETURN(const Store::Snapshot snapshot, store_->GetSnapshot());
  replay::v1::GetSnapshotResponse response;
  return SplitSnapshot(snapshot, [&](const common::v1::SnapshotPart& part) {
    *response.mutable_part() = part;
    return stream.Write(response);
  });
}

absl::Status ReplayServerImpl::DoGetStats(const ServerContext& context, const replay::v1::GetStatsRequest& request,
                                          replay::v1::GetStatsResponse& response) {
  RETURN_IF_ERROR(CheckRun(request.run()));
  RETURN_IF_ERROR(AwaitCaughtUp(context));
  ASSIGN_OR_RETURN(const RunProgress progress, coordinator_.Progress());
  ASSIGN_OR_RETURN(const VersionedValue version, store_->Get(kSnapshotVersionName));
  const IndexTotals totals = data_set_.totals();
  response.set_rows(totals.rows);
  response.set_bytes(totals.bytes);
  response.set_chunks(totals.chunks);
  response.set_episodes(totals.episodes);
  response.set_rows_appended(progress.rows_appended);
  response.set_episodes_finished(progress.episodes_finished);
  response.set_updates_done(progress.updates_done);
  if (version.version > 0 && !response.mutable_snapshot_version()->ParseFromString(version.value)) {
    return absl::DataLossError(absl::StrCat("\"", kSnapshotVersionName, "\" in the store is damaged"));
  }
  return absl::OkStatus();
}
}  // namespace

absl::StatusOr<std::unique_ptr<ReplayServer>> ReplayServer::Create(Options options) {
  if (options.experiment.name().empty()) return absl::InvalidArgumentError("name is not set: replay serves one run by name");
  RETURN_IF_ERROR(ValidatePacing(options.experiment));
  RETURN_IF_ERROR(ValidateSequences(options.experiment));
  return std::make_unique<ReplayServerImpl>(options);
}

}  // namespace orrery
