#include "libs/client/sequence_stream.h"

#include <algorithm>
#include <map>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "libs/base/status.h"
#include "libs/client/channel.h"
#include "libs/client/chunk_proto.h"
#include "libs/client/status.h"
#include "libs/client/trace.h"
#include "libs/replay/sequence_batch.h"

namespace orrery {
namespace {
constexpr int kMaxThreads = 64;

// What was received of one batch. Memory grows with what was received, up to the limit of a batch.
class BatchAssembler {
 public:
  BatchAssembler(int64_t number, const SequenceStream::Options& options) : number_(number), options_(options) {}

  // True after the last part.
  absl::StatusOr<bool> Add(replay::v1::SampleSequencesResponse& part) {
    if (part.batch() != number_) return Wrong("a part of batch ", part.batch(), ": expected batch ", number_);
    if (part.has_field()) return Wrong("decoded rows: expected chunks");
    for (replay::v1::SampledChunk& chunk : *part.mutable_chunks()) RETURN_IF_ERROR(AddChunk(chunk));
    if (part.sequences_size() > 0 && part.first_sequence() != static_cast<int64_t>(sequences_.size())) {
      return Wrong("sequences from number ", part.first_sequence(), ": expected ", sequences_.size());
    }
    for (const replay::v1::SampledSequence& sequence : part.sequences()) {
      if (sequence.slices_size() > options_.sequence_length) {
        return Wrong("a sequence of ", sequence.slices_size(), " slices: expected ", options_.sequence_length, " rows");
      }
      probabilities_.push_back(sequence.probability());
      std::vector<SequenceBatch::Slice>& slices = sequences_.emplace_back();
      for (const auto& slice : sequence.slices()) slices.push_back({slice.chunk(), slice.begin(), slice.rows()});
    }
    if (static_cast<int64_t>(sequences_.size()) > options_.batch_size) return WrongSequences();
    return part.last_part();
  }

  absl::StatusOr<SequenceBatch> Take() {
    if (static_cast<int64_t>(sequences_.size()) != options_.batch_size) return WrongSequences();
    absl::StatusOr<SequenceBatch> batch =
        SequenceBatch::Create(std::move(chunks_), std::move(sequences_), std::move(probabilities_));
    if (!batch.ok()) return Wrong(batch.status().message());
    if (batch->length() != options_.sequence_length) {
      return Wrong("sequences of ", batch->length(), " rows: expected ", options_.sequence_length);
    }
    return batch;
  }

 private:
  template <typename... Words>
  static absl::Status Wrong(const Words&... words) {
    return absl::DataLossError(absl::StrCat("replay sent ", words...));
  }
  absl::Status WrongSequences() const {
    return Wrong("a batch of ", sequences_.size(), " sequences: expected ", options_.batch_size);
  }

  absl::Status AddChunk(replay::v1::SampledChunk& chunk) {
    if (chunk.rows() < 1 || chunk.rows() > kMaxChunkRows) {
      return Wrong("a chunk of ", chunk.rows(), " rows: expected 1 to ", kMaxChunkRows);
    }
    const int64_t most = int64_t{options_.batch_size} * options_.sequence_length;
    if (static_cast<int64_t>(chunks_.size()) >= most) return Wrong("more chunks than the batch has rows, ", most);
    bytes_ += static_cast<int64_t>(chunk.payload().size());
    if (bytes_ > SequenceBatch::kMaxBytes) {
      return Wrong("chunks of more than ", SequenceBatch::kMaxBytes, " bytes for one batch");
    }
    absl::StatusOr<EncodedRows> rows = EncodedRows::Open(std::move(*chunk.mutable_payload()), chunk.rows());
    if (!rows.ok()) return Wrong("a chunk: ", rows.status().message());
    bytes_ += rows->memory_bytes() - static_cast<int64_t>(rows->payload().size());
    if (bytes_ > SequenceBatch::kMaxBytes) return Wrong("chunks of too many fields for one batch");
    chunks_.push_back({{chunk.key().episode_id(), chunk.key().first_row()},
                       std::make_shared<const EncodedRows>(*std::move(rows))});
    return absl::OkStatus();
  }

  const int64_t number_;
  const SequenceStream::Options& options_;
  int64_t bytes_ = 0;
  std::vector<SequenceBatch::Source> chunks_;
  std::vector<std::vector<SequenceBatch::Slice>> sequences_;
  std::vector<double> probabilities_;  // of the sequences
};

// Each thread reads a whole batch, in turn with the others, and then decodes it beside them.
class SequenceStreamImpl : public SequenceStream {
 public:
  SequenceStreamImpl(const std::shared_ptr<grpc::Channel>& channel, const Options& options)
      : options_(options), stub_(replay::v1::ReplayService::NewStub(channel)) {
    replay::v1::SampleSequencesRequest request;
    request.set_run(options.run);
    request.set_batch_size(options.batch_size);
    request.set_sequence_length(options.sequence_length);
    request.set_batches(options.batches);
    request.set_seed(options.seed);
    *request.mutable_sampler() = options.sampler;
    request.set_as_chunks(true);
    SendTrace(context_);
    stream_ = stub_->SampleSequences(&context_, request);
    ahead_ = std::clamp(options.threads, 1, kMaxThreads);
    for (int i = 0; i < ahead_; ++i) {
      threads_.emplace_back([this] {
        while (Step()) {
        }
      });
    }
  }

  ~SequenceStreamImpl() override {
    SequenceStreamImpl::Close();
    for (std::thread& thread : threads_) thread.join();
    absl::MutexLock lock(&read_mu_);
    if (!finished_) stream_->Finish();
  }

  absl::Status Next(ArrayMap& batch, std::vector<SequenceBatch::Start>& starts, absl::Time deadline) override {
    absl::MutexLock lock(&mu_);
    const auto is_there = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return closed_ || decoded_.contains(taken_); };
    if (!mu_.AwaitWithDeadline(absl::Condition(&is_there), deadline)) {
      return absl::DeadlineExceededError("replay sent no batch before the deadline");
    }
    if (closed_) return absl::CancelledError("the stream was closed");
    const auto found = decoded_.find(taken_);
    if (!found->second.ok()) return found->second.status();  // stays, for every later call
    std::swap(batch, found->second->fields);
    starts = std::move(found->second->starts);
    spare_.push_back(std::move(found->second->fields));
    decoded_.erase(found);
    ++taken_;
    return absl::OkStatus();
  }

  absl::StatusOr<int> UpdatePriorities(absl::Span<const ChunkPriority> priorities, absl::Time deadline) override {
    replay::v1::UpdatePrioritiesRequest request;
    request.set_run(options_.run);
    for (const ChunkPriority& priority : priorities) {
      replay::v1::ChunkPriority& sent = *request.add_priorities();
      *sent.mutable_chunk() = ToProto(priority.key);
      sent.set_priority(priority.priority);
    }
    replay::v1::UpdatePrioritiesResponse response;
    RETURN_IF_ERROR(RetryUnavailable(deadline, [&](grpc::ClientContext& context) {
      return stub_->UpdatePriorities(&context, request, &response);
    }));
    return response.known();
  }

  void Close() override {
    context_.TryCancel();
    absl::MutexLock lock(&mu_);
    closed_ = true;
  }

 private:
  struct Decoded {
    ArrayMap fields;
    std::vector<SequenceBatch::Start> starts;
  };

  // Reads and decodes one batch; false at the end.
  bool Step() {
    int64_t number = 0;
    absl::StatusOr<SequenceBatch> batch = absl::CancelledError("the stream was closed");
    {
      absl::MutexLock lock(&read_mu_);
      if (finished_) return false;
      number = read_;
      if (!AwaitRoom(number)) return false;
      batch = Read(number);
      ++read_;
    }
    Decoded decoded{TakeSpare(), {}};
    const absl::Status status = batch.ok() ? batch->ReadAll(decoded.fields) : batch.status();
    if (status.ok()) decoded.starts = batch->Starts();
    absl::MutexLock lock(&mu_);
    if (status.ok()) {
      decoded_.emplace(number, std::move(decoded));
    } else {
      decoded_.emplace(number, status);
    }
    return status.ok();
  }

  // Waits until no more than the allowed batches are ahead of the consumer; false when closed.
  bool AwaitRoom(int64_t number) {
    absl::MutexLock lock(&mu_);
    const auto room = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return closed_ || number < taken_ + ahead_; };
    mu_.Await(absl::Condition(&room));
    return !closed_;
  }

  absl::StatusOr<SequenceBatch> Read(int64_t number) ABSL_EXCLUSIVE_LOCKS_REQUIRED(read_mu_) {
    BatchAssembler assembler(number, options_);
    replay::v1::SampleSequencesResponse part;
    while (stream_->Read(&part)) {
      const absl::StatusOr<bool> complete = assembler.Add(part);
      if (!complete.ok()) return Abandon(complete.status());
      if (!*complete) continue;
      absl::StatusOr<SequenceBatch> batch = assembler.Take();
      if (!batch.ok()) return Abandon(batch.status());
      return batch;
    }
    finished_ = true;
    RETURN_IF_ERROR(FromGrpc(stream_->Finish()));
    if (options_.batches > 0 && number >= options_.batches) return absl::OutOfRangeError("replay sent every batch");
    return absl::DataLossError(absl::StrCat("replay ended the stream in batch ", number));
  }

  absl::Status Abandon(const absl::Status& reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(read_mu_) {
    context_.TryCancel();
    stream_->Finish();
    finished_ = true;
    return reason;
  }

  ArrayMap TakeSpare() {
    absl::MutexLock lock(&mu_);
    if (spare_.empty()) return {};
    ArrayMap spare = std::move(spare_.back());
    spare_.pop_back();
    return spare;
  }

  // Constant after construction.
  const Options options_;
  int ahead_ = 1;
  const std::unique_ptr<replay::v1::ReplayService::Stub> stub_;
  grpc::ClientContext context_;

  absl::Mutex read_mu_ ABSL_ACQUIRED_BEFORE(mu_);
  std::unique_ptr<grpc::ClientReader<replay::v1::SampleSequencesResponse>> stream_ ABSL_GUARDED_BY(read_mu_);
  int64_t read_ ABSL_GUARDED_BY(read_mu_) = 0;  // batches
  bool finished_ ABSL_GUARDED_BY(read_mu_) = false;

  absl::Mutex mu_;
  std::map<int64_t, absl::StatusOr<Decoded>> decoded_ ABSL_GUARDED_BY(mu_);  // by number; an error is the last one
  std::vector<ArrayMap> spare_ ABSL_GUARDED_BY(mu_);                         // whose memory is used again
  int64_t taken_ ABSL_GUARDED_BY(mu_) = 0;                                   // batches
  bool closed_ ABSL_GUARDED_BY(mu_) = false;

  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<SequenceStream> SequenceStream::Create(const std::shared_ptr<grpc::Channel>& channel, const Options& options) {
  return std::make_unique<SequenceStreamImpl>(channel, options);
}

}  // namespace orrery
