// `orrery bench replay`: rows in and batches out of a replay service, and what sampling costs by the size of the data set.
//
// The rows are real ones of the experiment's environment, so that they compress as they do in use. Without --replay the service
// runs on threads of this process, behind a port on loopback: it shares the processors with the client.
#include <ATen/Context.h>
#include <torch/torch.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/client/channel.h"
#include "libs/client/replay_client.h"
#include "libs/client/sequence_stream.h"
#include "libs/client/status.h"
#include "libs/learning/mirror.h"
#include "libs/replay/chunk_codec.h"
#include "libs/replay/episode_index.h"
#include "libs/replay/sampler.h"
#include "libs/telemetry/service_host.h"
#include "libs/world_model/world_model.h"
#include "services/replay/replay_service_impl.h"
#include "tools/orrery/bench.h"
#include "tools/orrery/bench_rows.h"

// jemalloc's; absent under another allocator.
extern "C" int mallctl(const char* name, void* old_value, size_t* old_size, void* new_value, size_t new_size)
    __attribute__((weak));

namespace orrery {
namespace {

struct Flags : BenchFlags {
  std::string store;
  std::string replay;
  int append_rows = 20000;
  int batches = 20;
  std::vector<int64_t> rows;
  std::vector<std::string> only;
  int decode_threads = 2;
};

// What is measured against a service.
constexpr char kAppend[] = "append";
constexpr char kAppendEncoded[] = "append_encoded";
constexpr char kSampleMirrored[] = "sample_mirrored";
constexpr char kPreprocess[] = "preprocess";
constexpr char kSampleRemote[] = "sample_remote";
constexpr char kSampleRemoteDecoded[] = "sample_remote_decoded";

constexpr char kExperiment[] = R"(
  name: "bench"
  environment { task: "cartpole_swingup" }
  collection { seed_episodes: 100000 }
  learning { schedule: CONCURRENT }
  replay { max_rows: 100000 limiter { tolerance: 1e12 } })";

// Longer than anything measured here takes.
absl::Time Deadline() { return absl::Now() + absl::Seconds(600); }

// A replay service on threads of this process, over a data set of its own that is deleted at the end.
class LocalReplay {
 public:
  static absl::StatusOr<std::unique_ptr<LocalReplay>> Start(const config::v1::Experiment& experiment,
                                                            const std::string& location) {
    auto local = std::unique_ptr<LocalReplay>(new LocalReplay);
    local->store_options_ = {.location = location,
                             .run = experiment.name(),
                             .partitions = experiment.replay().partitions()};
    ASSIGN_OR_RETURN(local->store_, OpenStore(local->store_options_));
    const auto registry = std::make_shared<prometheus::Registry>();
    ASSIGN_OR_RETURN(local->server_, ReplayServer::Create({experiment, local->store_.get(), registry}));
    HostOptions host;
    host.name = "replay";
    host.listen = "127.0.0.1:0";
    host.registry = registry;
    host.services = {local->server_->service()};
    ASSIGN_OR_RETURN(local->host_, ServiceHost::Start(std::move(host)));
    local->server_->Start([](bool) {});
    return local;
  }

  ~LocalReplay() {
    if (server_ != nullptr) server_->Shutdown();
    if (host_ != nullptr) host_->Shutdown(absl::ZeroDuration());
    if (store_ == nullptr) return;
    store_.reset();
    if (store_options_.location == kMemory) return;
    const absl::Status status = DeleteDataSet(store_options_);
    if (!status.ok()) LogWarning("data set \"{}\" was not deleted: {}", store_options_.run, status.ToString());
  }

  std::string address() const { return absl::StrCat("127.0.0.1:", host_->port()); }

  static constexpr char kMemory[] = "memory:";

 private:
  LocalReplay() = default;

  StoreOptions store_options_;
  std::unique_ptr<Store> store_;
  std::unique_ptr<ReplayServer> server_;
  std::unique_ptr<ServiceHost> host_;
};

// One actor's connection, without the actor.
class Appender {
 public:
  // `recorded` must outlive this.
  Appender(std::shared_ptr<grpc::Channel> channel, const std::string& run, const RecordedRows& recorded)
      : recorded_(recorded), client_(channel, run), writer_(ReplayWriter::Create(channel, run, {})) {}

  // Whole episodes of at least `rows` rows in total, until the last one is acknowledged. Encodes every chunk, or sends what was
  // encoded before.
  absl::Status Append(int64_t rows, bool encode) {
    int64_t sent = 0;
    while (sent < rows) {
      ASSIGN_OR_RETURN(const std::optional<ReplayClient::Episode> episode,
                       client_.BeginEpisode("bench", recorded_.specification_hash, Deadline()));
      if (!episode.has_value() || episode->assignment.run_complete) {
        return absl::FailedPreconditionError(
            "replay hands out no episode: the benchmark needs a schedule with enough collection.seed_episodes and a wide "
            "replay.limiter");
      }
      for (size_t i = 0; i < recorded_.parts.size(); ++i) {
        std::string payload;
        if (encode) {
          ASSIGN_OR_RETURN(payload, EncodeRows(recorded_.parts[i].fields));
        } else {
          payload = recorded_.parts[i].payload;
        }
        RETURN_IF_ERROR(writer_->Append(MakeChunk(recorded_, episode->assignment, i, std::move(payload)), Deadline()));
        sent += recorded_.part_rows;
      }
    }
    appended_ = sent;
    return writer_->Flush(Deadline());
  }
  // Rows of the last call.
  int64_t appended() const { return appended_; }

 private:
  const RecordedRows& recorded_;
  ReplayClient client_;
  const std::unique_ptr<ReplayWriter> writer_;
  int64_t appended_ = 0;
};

// Batches of SampleSequences that the server has decoded, put together as a learner takes them: [B, L, …] by field.
class DecodedBatches {
 public:
  DecodedBatches(const std::shared_ptr<grpc::Channel>& channel, const config::v1::Experiment& experiment)
      : sequences_(experiment.learning().batch_size()), stub_(replay::v1::ReplayService::NewStub(channel)) {
    replay::v1::SampleSequencesRequest request;
    request.set_run(experiment.name());
    request.set_batch_size(experiment.learning().batch_size());
    request.set_sequence_length(experiment.learning().sequence_length());
    request.set_seed(1);
    stream_ = stub_->SampleSequences(&context_, request);
  }
  ~DecodedBatches() {
    if (stream_ == nullptr) return;
    context_.TryCancel();
    stream_->Finish();
  }

  // Not to be called again after an error.
  absl::Status Next() {
    while (true) {
      if (!stream_->Read(&part_)) {
        const absl::Status status = FromGrpc(stream_->Finish());
        stream_.reset();
        return status.ok() ? absl::UnavailableError("replay ended SampleSequences") : status;
      }
      RETURN_IF_ERROR(Put());
      if (part_.last_part()) return absl::OkStatus();
    }
  }

 private:
  absl::Status Put() {
    const common::v1::Tensor& tensor = part_.field().tensor();
    const int64_t first = part_.first_sequence(), count = tensor.shape_size() > 0 ? tensor.shape(0) : 0;
    if (first < 0 || count < 1 || count > sequences_ - first) {
      return absl::InternalError(absl::StrCat("replay sent ", count, " sequences from number ", first, " of field \"",
                                              part_.field().name(), "\", expected ", sequences_, " in all"));
    }
    const size_t bytes = tensor.data().size() / static_cast<size_t>(count);
    std::string& field = fields_[part_.field().name()];
    field.resize(bytes * static_cast<size_t>(sequences_));
    std::memcpy(field.data() + bytes * static_cast<size_t>(first), tensor.data().data(), bytes * static_cast<size_t>(count));
    return absl::OkStatus();
  }

  const int64_t sequences_;
  const std::unique_ptr<replay::v1::ReplayService::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReader<replay::v1::SampleSequencesResponse>> stream_;
  replay::v1::SampleSequencesResponse part_;
  std::map<std::string, std::string> fields_;
};

// Everything that is measured against one service.
class ServiceBench {
 public:
  ServiceBench(const Flags& flags, const config::v1::Experiment& experiment, std::shared_ptr<grpc::Channel> channel)
      : flags_(flags), experiment_(experiment), channel_(std::move(channel)) {}

  absl::Status Run() {
    ASSIGN_OR_RETURN(const RecordedRows recorded, RecordRows(experiment_));
    Appender appender(channel_, experiment_.name(), recorded);
    if (!Wanted(kAppend) && !Wanted(kAppendEncoded)) RETURN_IF_ERROR(appender.Append(flags_.append_rows, /*encode=*/false));
    if (Wanted(kAppend)) RETURN_IF_ERROR(BenchAppend(appender, kAppend, /*encode=*/true));
    if (Wanted(kAppendEncoded)) RETURN_IF_ERROR(BenchAppend(appender, kAppendEncoded, /*encode=*/false));
    ReplayClient client(channel_, experiment_.name());
    ASSIGN_OR_RETURN(const replay::v1::GetStatsResponse stats, client.GetStats(Deadline()));
    rows_ = stats.rows();
    if (Wanted(kSampleMirrored) || Wanted(kPreprocess)) RETURN_IF_ERROR(BenchMirrored());
    if (Wanted(kSampleRemote)) RETURN_IF_ERROR(BenchRemote());
    if (!Wanted(kSampleRemoteDecoded)) return absl::OkStatus();
    DecodedBatches decoded(channel_, experiment_);
    return BenchBatches(kSampleRemoteDecoded, [&] { return decoded.Next(); });
  }

 private:
  bool Wanted(const std::string& what) const {
    return flags_.only.empty() || std::find(flags_.only.begin(), flags_.only.end(), what) != flags_.only.end();
  }

  void Print(nlohmann::ordered_json result) const {
    result["server"] = flags_.replay.empty() ? "this process" : flags_.replay;
    if (flags_.replay.empty()) {
      // No more than the kind: the location may hold a password.
      result["store"] = flags_.store.substr(0, flags_.store.find(':'));
    }
    result["task"] = experiment_.environment().task();
    PrintResult(flags_, result);
  }

  absl::Status BenchAppend(Appender& appender, const std::string& what, bool encode) {
    ASSIGN_OR_RETURN(const double seconds, MedianSeconds(flags_, [&] { return appender.Append(flags_.append_rows, encode); }));
    Print({{"what", what},
           {"chunk_rows", experiment_.replay().chunk_rows()},
           {"rows_per_second", static_cast<double>(appender.appended()) / seconds}});
    return absl::OkStatus();
  }

  absl::Status BenchBatches(const std::string& what, const std::function<absl::Status()>& next) {
    const auto several = [&]() -> absl::Status {
      for (int i = 0; i < flags_.batches; ++i) RETURN_IF_ERROR(next());
      return absl::OkStatus();
    };
    ASSIGN_OR_RETURN(const double seconds, MedianSeconds(flags_, several));
    Print({{"what", what},
           {"batch", experiment_.learning().batch_size()},
           {"length", experiment_.learning().sequence_length()},
           {"rows", rows_},
           {"batches_per_second", flags_.batches / seconds}});
    return absl::OkStatus();
  }

  // As a learner without a mirror: the chunks are decoded here.
  absl::Status BenchRemote() {
    SequenceStream::Options options;
    options.run = experiment_.name();
    options.batch_size = experiment_.learning().batch_size();
    options.sequence_length = experiment_.learning().sequence_length();
    options.seed = 1;
    options.threads = flags_.decode_threads;
    const std::unique_ptr<SequenceStream> stream = SequenceStream::Create(channel_, options);
    ArrayMap batch;
    return BenchBatches(kSampleRemote, [&] { return stream->Next(batch, Deadline()); });
  }

  // Gathering and preprocessing, each alone.
  absl::Status BenchMirrored() {
    Mirror::Options options;
    options.model = experiment_.model();
    options.sequence_length = experiment_.learning().sequence_length();
    options.max_rows = experiment_.replay().max_rows();
    options.max_bytes = experiment_.learning().mirror_bytes();
    ASSIGN_OR_RETURN(const std::unique_ptr<Mirror> mirror, Mirror::Create(options));
    mirror->Follow(ChunkWatcher::Create(channel_, experiment_.name()));
    RETURN_IF_ERROR(mirror->WaitForRows(rows_, absl::Seconds(5), Deadline()));
    MirroredSource source(mirror.get(), experiment_.learning().batch_size(), /*seed=*/1);
    if (Wanted(kSampleMirrored)) {
      RETURN_IF_ERROR(BenchBatches(kSampleMirrored, [&] { return source.Next(Deadline()).status(); }));
    }
    if (!Wanted(kPreprocess)) return absl::OkStatus();

    ASSIGN_OR_RETURN(const std::shared_ptr<WorldModel> model, WorldModel::Create(experiment_.model(), /*seed=*/0));
    ASSIGN_OR_RETURN(const StoredBatch batch, source.Next(Deadline()));
    torch::NoGradGuard no_grad;
    return BenchBatches(kPreprocess, [&] {
      return CatchExceptions("preprocessing", [&] {
        model->Preprocess(batch.observations, at::globalContext().defaultGenerator(torch::kCPU));
        return absl::OkStatus();
      });
    });
  }

  const Flags& flags_;
  const config::v1::Experiment& experiment_;
  const std::shared_ptr<grpc::Channel> channel_;
  int64_t rows_ = 0;  // in the data set that is sampled
};

constexpr int kScalingBatch = 50;
constexpr int kScalingLength = 50;
constexpr int kScalingChunkRows = 50;
constexpr int kScalingEpisodeChunks = 20;

config::v1::Model ScalingModel() {
  config::v1::Model model;
  model.mutable_action()->mutable_continuous()->set_size(1);
  config::v1::Modality& modality = *model.add_modalities();
  modality.set_name("state");
  modality.mutable_vector()->set_size(4);
  return model;
}

// The `number`-th chunk of a synthetic data set.
ChunkInfo ScalingInfo(int64_t number, int64_t payload_bytes) {
  ChunkInfo info;
  info.key = {1 + number / kScalingEpisodeChunks, number % kScalingEpisodeChunks * kScalingChunkRows};
  info.rows = kScalingChunkRows;
  info.payload_bytes = payload_bytes;
  return info;
}

absl::StatusOr<std::unique_ptr<Mirror>> ScalingMirror(int64_t chunks) {
  Mirror::Options options;
  options.model = ScalingModel();
  options.sequence_length = kScalingLength;
  options.max_rows = chunks * kScalingChunkRows;
  options.max_bytes = int64_t{1} << 40;
  ASSIGN_OR_RETURN(std::unique_ptr<Mirror> mirror, Mirror::Create(options));
  ArrayMap fields;
  for (const Mirror::Field& field : mirror->fields()) {
    std::vector<int64_t> shape = {kScalingChunkRows};
    shape.insert(shape.end(), field.shape.begin(), field.shape.end());
    fields[field.name] = Array::Zeros(field.dtype, std::move(shape));
  }
  ASSIGN_OR_RETURN(const std::string payload, EncodeRows(fields));
  for (int64_t i = 0; i < chunks; ++i) {
    ChunkWatcher::Event event;
    event.appended = Chunk{"bench", ScalingInfo(i, static_cast<int64_t>(payload.size())), payload};
    RETURN_IF_ERROR(mirror->Apply(std::move(event)));
  }
  return mirror;
}

// Bytes that this thread has allocated and not freed; nullopt when the allocator does not count them.
std::optional<int64_t> AllocatedBytes() {
  uint64_t allocated = 0, freed = 0;
  size_t size = sizeof(uint64_t);
  if (mallctl == nullptr || mallctl("thread.allocated", &allocated, &size, nullptr, 0) != 0 ||
      mallctl("thread.deallocated", &freed, &size, nullptr, 0) != 0) {
    return std::nullopt;
  }
  return static_cast<int64_t>(allocated - freed);
}

// What `does` allocates for each of `rows` rows; null when the allocator does not count.
nlohmann::ordered_json AllocatedPerRow(int64_t rows, const std::function<void()>& does) {
  const std::optional<int64_t> before = AllocatedBytes();
  does();
  const std::optional<int64_t> after = AllocatedBytes();
  if (!before.has_value() || !after.has_value()) return nullptr;
  return static_cast<double>(*after - *before) / static_cast<double>(rows);
}

// Microseconds for a batch that `sampler` draws.
absl::StatusOr<double> DrawMicros(const Flags& flags, const Sampler& sampler, EpisodeIndex& index) {
  std::mt19937_64 random(1);
  ASSIGN_OR_RETURN(const double seconds, MedianSeconds(flags, [&]() -> absl::Status {
                     for (int i = 0; i < flags.batches; ++i) {
                       if (sampler.Draw(index, kScalingBatch, random).empty()) {
                         return absl::InternalError("the index drew no sequence");
                       }
                     }
                     return absl::OkStatus();
                   }));
  return 1e6 * seconds / flags.batches;
}

absl::Status BenchScaling(const Flags& flags, int64_t rows) {
  const int64_t chunks = (rows + kScalingChunkRows - 1) / kScalingChunkRows;
  const int64_t held = chunks * kScalingChunkRows;
  EpisodeIndex index(kScalingLength);
  const nlohmann::ordered_json index_bytes = AllocatedPerRow(held, [&] {
    for (int64_t i = 0; i < chunks; ++i) index.Append(ScalingInfo(i, 1));
  });
  ASSIGN_OR_RETURN(const double draw_micros, DrawMicros(flags, *MakeUniformSampler(), index));
  ASSIGN_OR_RETURN(const auto by_priority, MakePrioritizedSampler(kDefaultPriorityExponent, kDefaultUniformShare));
  std::mt19937_64 random(1);
  const nlohmann::ordered_json priority_bytes = AllocatedPerRow(held, [&] {
    std::exponential_distribution<double> priority;
    for (int64_t i = 0; i < chunks; ++i) index.SetPriority(ScalingInfo(i, 1).key, priority(random));
    by_priority->Draw(index, 1, random);
  });
  ASSIGN_OR_RETURN(const double prioritized_micros, DrawMicros(flags, *by_priority, index));
  ASSIGN_OR_RETURN(const std::unique_ptr<Mirror> mirror, ScalingMirror(chunks));
  MirroredSource source(mirror.get(), kScalingBatch, /*seed=*/1);
  ASSIGN_OR_RETURN(const double seconds, MedianSeconds(flags, [&]() -> absl::Status {
                     for (int i = 0; i < flags.batches; ++i) RETURN_IF_ERROR(source.Next(Deadline()).status());
                     return absl::OkStatus();
                   }));
  PrintResult(flags, {{"what", "sample_scaling"},
                      {"rows", held},
                      {"batch", kScalingBatch},
                      {"length", kScalingLength},
                      {"row_bytes", mirror->row_bytes()},
                      {"batches_per_second", flags.batches / seconds},
                      {"draw_batch_micros", draw_micros},
                      {"draw_prioritized_batch_micros", prioritized_micros},
                      {"index_bytes_per_row", index_bytes},
                      {"priority_bytes_per_row", priority_bytes}});
  return absl::OkStatus();
}

absl::Status CheckFlags(const Flags& flags) {
  const bool service = !flags.store.empty() || !flags.replay.empty() || !flags.config.empty() || !flags.set.empty();
  if (!flags.rows.empty() && service) {
    return absl::InvalidArgumentError(
        "--rows measures synthetic rows without a service: give it without --store, --replay, --config and --set");
  }
  if (!flags.store.empty() && !flags.replay.empty()) {
    return absl::InvalidArgumentError("--store starts a service, --replay=HOST:PORT takes a running one: give one of them");
  }
  if (!flags.replay.empty() && flags.config.empty()) {
    return absl::InvalidArgumentError("--replay needs --config=FILE, the experiment that the service runs");
  }
  return absl::OkStatus();
}

absl::Status Run(Flags flags) {
  RETURN_IF_ERROR(CheckFlags(flags));
  SetTorchThreads(1);
  for (const int64_t rows : flags.rows) RETURN_IF_ERROR(BenchScaling(flags, rows));
  if (!flags.rows.empty()) return absl::OkStatus();
  ASSIGN_OR_RETURN(config::v1::Experiment experiment, BenchExperiment(flags, kExperiment));
  std::unique_ptr<LocalReplay> local;
  std::string address = flags.replay;
  if (address.empty()) {
    if (flags.store.empty()) flags.store = LocalReplay::kMemory;
    // A data set of its own, whatever else lies in the store.
    experiment.set_name(absl::StrCat("bench-", getpid(), "-", absl::ToUnixMillis(absl::Now())));
    ASSIGN_OR_RETURN(local, LocalReplay::Start(experiment, flags.store));
    address = local->address();
  }
  ASSIGN_OR_RETURN(std::shared_ptr<grpc::Channel> channel, MakeChannel(address));
  return ServiceBench(flags, experiment, std::move(channel)).Run();
}

}  // namespace

void AddReplayBench(CLI::App& bench, Command& command) {
  CLI::App* part = bench.add_subcommand("replay", "Rows appended and batches sampled per second");
  const auto flags = std::make_shared<Flags>();
  AddExperimentFlags(*part, *flags, "cartpole_swingup at 64x64, 50 sequences of 50 rows, 100,000 rows kept");
  part->add_option("--store", flags->store,
                   "Starts a service in this process over a new data set here (default: memory:); deleted at the end")
      ->type_name("LOCATION");
  part->add_option("--replay", flags->replay, "A running service instead, whose run is that of --config; rows are added to it")
      ->type_name("HOST:PORT");
  part->add_option("--append_rows", flags->append_rows, "Rows of one measured call, up to whole episodes")
      ->check(CLI::Range(1, 100000000))
      ->capture_default_str();
  part->add_option("--batches", flags->batches, "Batches of one measured call")
      ->check(CLI::Range(1, 1000000))
      ->capture_default_str();
  part->add_option("--only", flags->only, "What of a service is measured, separated by commas (default: everything)")
      ->delimiter(',')
      ->check(CLI::IsMember({kAppend, kAppendEncoded, kSampleMirrored, kPreprocess, kSampleRemote, kSampleRemoteDecoded}));
  part->add_option("--decode_threads", flags->decode_threads, "Threads that decode what sample_remote receives")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  part->add_option("--rows", flags->rows,
                   "Only: what sampling costs in data sets of so many small synthetic rows; several, separated by commas")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{1}, int64_t{100000000}));
  AddRepeatFlags(*part, *flags);
  FinishPart(*part, command, *flags, [flags] { return Run(*flags); });
}

}  // namespace orrery
