#include "libs/client/sequence_stream.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "libs/base/status_matchers.h"
#include "libs/replay/chunk_codec.h"

namespace orrery {
namespace {

using replay::v1::SampleSequencesRequest;
using replay::v1::SampleSequencesResponse;
using ::testing::HasSubstr;

constexpr int kSequences = 3, kLength = 4;

absl::Time Soon() { return absl::Now() + absl::Seconds(60); }

// The value of a row: different for every batch, chunk and row.
int64_t Value(int64_t batch, int chunk, int row) { return batch * 1000 + chunk * 100 + row; }

double Probability(int64_t batch, int sequence) { return 1.0 / static_cast<double>(2 + batch * 10 + sequence); }

// Batch `number`, as a server sends it: two chunks of five rows; sequences over the first one, over both and over the second.
std::vector<SampleSequencesResponse> Parts(int64_t number) {
  std::vector<SampleSequencesResponse> parts(3);
  for (SampleSequencesResponse& part : parts) part.set_batch(number);
  for (int c = 0; c < 2; ++c) {
    Array values = Array::Zeros(DType::kInt64, {5});
    for (int r = 0; r < 5; ++r) values.mutable_as<int64_t>()[r] = Value(number, c, r);
    replay::v1::SampledChunk& chunk = *parts[c].add_chunks();
    chunk.mutable_key()->set_episode_id(1);
    chunk.mutable_key()->set_first_row(5 * c);
    chunk.set_rows(5);
    chunk.set_payload(*EncodeRows({{"value", values}}));
  }
  const auto add = [&](const std::vector<std::vector<int>>& slices) {
    replay::v1::SampledSequence& sequence = *parts[2].add_sequences();
    for (const std::vector<int>& slice : slices) {
      replay::v1::SampledSlice& sent = *sequence.add_slices();
      sent.set_chunk(slice[0]);
      sent.set_begin(slice[1]);
      sent.set_rows(slice[2]);
    }
  };
  add({{0, 1, 4}});
  add({{0, 3, 2}, {1, 0, 2}});
  add({{1, 0, 4}});
  for (int i = 0; i < kSequences; ++i) parts[2].mutable_sequences(i)->set_probability(Probability(number, i));
  parts[2].set_last_part(true);
  return parts;
}

// What a caller gets of it.
ArrayMap Expected(int64_t number) {
  const std::vector<int64_t> values = {
      Value(number, 0, 1), Value(number, 0, 2), Value(number, 0, 3), Value(number, 0, 4),
      Value(number, 0, 3), Value(number, 0, 4), Value(number, 1, 0), Value(number, 1, 1),
      Value(number, 1, 0), Value(number, 1, 1), Value(number, 1, 2), Value(number, 1, 3)};
  return {{"value", Array::From<int64_t>(values, {kSequences, kLength})}};
}

std::vector<SequenceBatch::Start> ExpectedStarts(int64_t number) {
  return {{{1, 0}, 1, Probability(number, 0)}, {{1, 0}, 3, Probability(number, 1)}, {{1, 5}, 0, Probability(number, 2)}};
}

// Sends what the test says.
class FakeReplay : public replay::v1::ReplayService::Service {
 public:
  using Writer = grpc::ServerWriter<SampleSequencesResponse>;
  using Script = std::function<grpc::Status(const SampleSequencesRequest&, Writer&)>;

  explicit FakeReplay(Script script) : script_(std::move(script)) {
    grpc::ServerBuilder builder;
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~FakeReplay() override { server_->Shutdown(std::chrono::system_clock::now()); }

  grpc::Status SampleSequences(grpc::ServerContext*, const SampleSequencesRequest* request, Writer* writer) override {
    return script_(*request, *writer);
  }

  grpc::Status UpdatePriorities(grpc::ServerContext*, const replay::v1::UpdatePrioritiesRequest* request,
                                replay::v1::UpdatePrioritiesResponse* response) override {
    if (++priority_calls_ == 1) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "not yet");
    if (request->priorities_size() == 0) return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "no priorities");
    EXPECT_EQ(request->run(), "run");
    for (const replay::v1::ChunkPriority& priority : request->priorities()) {
      priorities_[{priority.chunk().episode_id(), priority.chunk().first_row()}] = priority.priority();
    }
    response->set_known(7);
    return grpc::Status::OK;
  }
  // What was told, after all calls have returned.
  const std::map<ChunkKey, double>& priorities() const { return priorities_; }

  std::unique_ptr<SequenceStream> Stream(int threads, int64_t batches) {
    SequenceStream::Options options;
    options.run = "run";
    options.batch_size = kSequences;
    options.sequence_length = kLength;
    options.batches = batches;
    options.seed = 17;
    options.threads = threads;
    options.sampler.mutable_recency()->set_newest_rows(9);
    return SequenceStream::Create(server_->InProcessChannel({}), options);
  }

 private:
  const Script script_;
  std::atomic<int> priority_calls_ = 0;
  std::map<ChunkKey, double> priorities_;
  std::unique_ptr<grpc::Server> server_;
};

// Sends batches until the caller is gone or has enough.
grpc::Status SendBatches(const SampleSequencesRequest& request, FakeReplay::Writer& writer,
                         std::atomic<int64_t>* begun = nullptr) {
  for (int64_t number = 0; request.batches() == 0 || number < request.batches(); ++number) {
    if (begun != nullptr) *begun = number + 1;
    for (const SampleSequencesResponse& part : Parts(number)) {
      if (!writer.Write(part)) return grpc::Status::CANCELLED;
    }
  }
  return grpc::Status::OK;
}

TEST(SequenceStream, GivesEveryBatchInOrderWhateverTheThreads) {
  for (const int threads : {1, 2, 7}) {
    FakeReplay replay([&](const SampleSequencesRequest& request, FakeReplay::Writer& writer) {
      EXPECT_EQ(request.run(), "run");
      EXPECT_EQ(request.batch_size(), kSequences);
      EXPECT_EQ(request.sequence_length(), kLength);
      EXPECT_EQ(request.seed(), 17u);
      EXPECT_EQ(request.sampler().recency().newest_rows(), 9);
      EXPECT_TRUE(request.as_chunks());
      return SendBatches(request, writer);
    });
    const auto stream = replay.Stream(threads, 40);
    ArrayMap batch;
    std::vector<SequenceBatch::Start> starts;
    for (int64_t number = 0; number < 40; ++number) {
      ASSERT_OK(stream->Next(batch, starts, Soon()));
      ASSERT_EQ(batch, Expected(number)) << "batch " << number << ", " << threads << " threads";
      ASSERT_EQ(starts, ExpectedStarts(number));
    }
    for (int i = 0; i < 2; ++i) EXPECT_THAT(stream->Next(batch, Soon()), StatusIs(absl::StatusCode::kOutOfRange));
  }
}

TEST(SequenceStream, ReadsNoFurtherAheadThanItsThreads) {
  std::atomic<int64_t> begun = 0;
  FakeReplay replay([&](const SampleSequencesRequest& request, FakeReplay::Writer& writer) {
    return SendBatches(request, writer, &begun);
  });
  const auto stream = replay.Stream(2, 0);
  ArrayMap batch;
  for (int64_t taken = 1; taken < 6; ++taken) {
    ASSERT_OK(stream->Next(batch, Soon()));
    // Two more are read, and the server waits with the one after them: in process nothing is buffered between the two sides.
    for (const absl::Time limit = Soon(); begun < taken + 3; std::this_thread::yield()) ASSERT_LT(absl::Now(), limit);
    EXPECT_EQ(begun, taken + 3);
  }
}

TEST(SequenceStream, RefusesWhatTheServerMustNotSend) {
  using Change = std::function<void(std::vector<SampleSequencesResponse>&)>;
  const std::vector<std::pair<Change, std::string>> cases = {
      {[](auto& parts) { parts[0].set_batch(2); }, "a part of batch 2: expected batch 1"},
      {[](auto& parts) { parts[0].mutable_field()->set_name("value"); }, "decoded rows: expected chunks"},
      {[](auto& parts) { parts[0].mutable_chunks(0)->set_rows(0); }, "a chunk of 0 rows: expected 1 to 1000"},
      {[](auto& parts) { parts[0].mutable_chunks(0)->set_rows(4); }, "5 rows, expected 4"},
      {[](auto& parts) { parts[1].mutable_chunks(0)->mutable_payload()->back() ^= 1; },
       "a chunk: damaged chunk payload: checksum"},
      {[](auto& parts) { parts[2].set_first_sequence(1); }, "sequences from number 1: expected 0"},
      {[](auto& parts) { parts[2].mutable_sequences()->RemoveLast(); }, "a batch of 2 sequences: expected 3"},
      {[](auto& parts) { *parts[2].add_sequences() = parts[2].sequences(0); }, "a batch of 4 sequences: expected 3"},
      {[](auto& parts) { parts[2].mutable_sequences(0)->mutable_slices(0)->set_chunk(2); }, "chunk 2: expected 0 to 1"},
      {[](auto& parts) { parts[2].mutable_sequences(0)->mutable_slices(0)->set_begin(2); }, "4 rows from row 2"},
      {[](auto& parts) { parts[2].mutable_sequences(0)->mutable_slices(0)->set_rows(3); }, "a sequence of 4 rows: expected 3"},
      {[](auto& parts) { parts[2].mutable_sequences(0)->clear_slices(); }, "a sequence without a row"},
      {[](auto& parts) {
         for (int i = 0; i < 5; ++i) *parts[2].mutable_sequences(1)->add_slices() = parts[2].sequences(0).slices(0);
       },
       "a sequence of 7 slices: expected 4 rows"},
      {[](auto& parts) {
         for (auto& sequence : *parts[2].mutable_sequences()) {
           sequence.clear_slices();
           sequence.add_slices()->set_rows(3);
         }
       },
       "sequences of 3 rows: expected 4"},
      {[](auto& parts) {
         for (int i = 0; i < 12; ++i) *parts[1].add_chunks() = parts[0].chunks(0);
       },
       "more chunks than the batch has rows, 12"},
      {[](auto& parts) { parts[2].mutable_sequences(1)->set_probability(1.5); },
       "a sequence of probability 1.5: expected 0 to 1"},
      {[](auto& parts) { parts.pop_back(); }, "replay ended the stream in batch 1"},
  };
  for (const auto& [change, words] : cases) {
    FakeReplay replay([&](const SampleSequencesRequest&, FakeReplay::Writer& writer) {
      std::vector<SampleSequencesResponse> parts = Parts(1);
      change(parts);
      for (const SampleSequencesResponse& part : Parts(0)) writer.Write(part);
      for (const SampleSequencesResponse& part : parts) writer.Write(part);
      return grpc::Status::OK;
    });
    const auto stream = replay.Stream(2, 0);
    ArrayMap batch;
    ASSERT_OK(stream->Next(batch, Soon())) << words;
    EXPECT_EQ(batch, Expected(0)) << words;
    for (int i = 0; i < 2; ++i) {
      EXPECT_THAT(stream->Next(batch, Soon()), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(words)));
    }
  }
}

TEST(SequenceStream, TellsPriorities) {
  FakeReplay replay([&](const SampleSequencesRequest& request, FakeReplay::Writer& writer) {
    return SendBatches(request, writer);
  });
  const auto stream = replay.Stream(1, 0);
  const std::vector<ChunkPriority> priorities = {{{1, 0}, 2.5}, {{1, 5}, 0}};
  ASSERT_OK_AND_ASSIGN(const int known, stream->UpdatePriorities(priorities, Soon()));
  EXPECT_EQ(known, 7);
  EXPECT_THAT(stream->UpdatePriorities({}, Soon()), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no priorities")));
  EXPECT_EQ(replay.priorities(), (std::map<ChunkKey, double>{{{1, 0}, 2.5}, {{1, 5}, 0}}));
}

TEST(SequenceStream, GivesTheServersErrorAfterTheBatchesBeforeIt) {
  FakeReplay replay([&](const SampleSequencesRequest&, FakeReplay::Writer& writer) {
    for (const SampleSequencesResponse& part : Parts(0)) writer.Write(part);
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "replay is shutting down");
  });
  const auto stream = replay.Stream(3, 0);
  ArrayMap batch;
  ASSERT_OK(stream->Next(batch, Soon()));
  EXPECT_THAT(stream->Next(batch, Soon()), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("shutting down")));
}

TEST(SequenceStream, WaitsUntilTheDeadlineOrUntilItIsClosed) {
  absl::Notification over;
  FakeReplay replay([&](const SampleSequencesRequest& request, FakeReplay::Writer& writer) {
    over.WaitForNotification();
    return SendBatches(request, writer);
  });
  ArrayMap batch;
  {
    const auto stream = replay.Stream(2, 1);
    EXPECT_THAT(stream->Next(batch, absl::Now() + absl::Milliseconds(20)), StatusIs(absl::StatusCode::kDeadlineExceeded));
    std::thread closer([&] { stream->Close(); });
    EXPECT_THAT(stream->Next(batch, Soon()), StatusIs(absl::StatusCode::kCancelled));
    closer.join();
    over.Notify();
  }
  const auto stream = replay.Stream(2, 1);
  EXPECT_OK(stream->Next(batch, Soon()));
}

}  // namespace
}  // namespace orrery
