#include "services/replay/sequence_reader.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "libs/base/status_matchers.h"
#include "libs/client/replay_client.h"
#include "libs/client/sequence_stream.h"
#include "libs/config/config.h"
#include "libs/replay/chunk_codec.h"
#include "libs/replay/memory_store.h"
#include "libs/telemetry/service_host.h"
#include "services/replay/replay_service_impl.h"
#include "services/replay/sample_parts.h"

namespace orrery {
namespace {

using replay::v1::SampleSequencesResponse;
using ::testing::HasSubstr;

constexpr char kRun[] = "reader";
constexpr uint64_t kHash = 5;
constexpr int kChunkRows = 7;

absl::Time Soon() { return absl::Now() + absl::Seconds(60); }

// A picture that is stored compressed, noise that is not, and a place.
ArrayMap Rows(int64_t episode, int64_t first_row, int pixels) {
  ArrayMap fields = {{"image", Array::Zeros(DType::kUInt8, {kChunkRows, pixels})},
                     {"noise", Array::Zeros(DType::kUInt8, {kChunkRows, pixels})},
                     {"place", Array::Zeros(DType::kInt64, {kChunkRows, 2})},
                     {kAction, Array::Zeros(DType::kFloat32, {kChunkRows, 1})},
                     {kReward, Array::Zeros(DType::kFloat32, {kChunkRows})},
                     {kIsFirst, Array::Zeros(DType::kUInt8, {kChunkRows})},
                     {kIsTerminal, Array::Zeros(DType::kUInt8, {kChunkRows})}};
  std::mt19937 random(static_cast<uint32_t>(1000 * episode + first_row));
  for (char& byte : fields["noise"].bytes) byte = static_cast<char>(random());
  for (int r = 0; r < kChunkRows; ++r) {
    fields["place"].mutable_as<int64_t>()[2 * r] = episode;
    fields["place"].mutable_as<int64_t>()[2 * r + 1] = first_row + r;
    for (int i = 0; i < pixels; i += 11) {
      fields["image"].mutable_as<uint8_t>()[r * pixels + i] = static_cast<uint8_t>(episode + first_row + r + i);
    }
  }
  return fields;
}

Chunk MakeChunk(const std::string& run_id, int64_t episode, int64_t first_row, int pixels) {
  Chunk chunk;
  chunk.run_id = run_id;
  chunk.info.key = {episode, first_row};
  chunk.info.rows = kChunkRows;
  chunk.info.specification_hash = kHash;
  chunk.payload = *EncodeRows(Rows(episode, first_row, pixels));
  chunk.info.payload_bytes = static_cast<int64_t>(chunk.payload.size());
  return chunk;
}

// Whether every row of the decoded batch is the one that `sequences` asks for.
void ExpectRows(const ArrayMap& batch, const std::vector<Sequence>& sequences, int64_t length, int pixels) {
  ASSERT_EQ(batch.size(), 7u);
  ASSERT_EQ(batch.at("image").shape, (std::vector<int64_t>{static_cast<int64_t>(sequences.size()), length, pixels}));
  for (size_t s = 0; s < sequences.size(); ++s) {
    for (int64_t t = 0; t < length; ++t) {
      const int64_t episode = sequences[s].episode_id, row = sequences[s].first_row + t, at = s * length + t;
      ASSERT_EQ(batch.at("place").as<int64_t>()[2 * at], episode);
      ASSERT_EQ(batch.at("place").as<int64_t>()[2 * at + 1], row);
      const ArrayMap rows = Rows(episode, row / kChunkRows * kChunkRows, pixels);
      for (const char* name : {"image", "noise"}) {
        ASSERT_EQ(batch.at(name).bytes.substr(at * pixels, pixels),
                  rows.at(name).bytes.substr(row % kChunkRows * pixels, pixels));
      }
    }
  }
}

class SequenceReaderTest : public ::testing::Test {
 protected:
  // Episodes of three chunks.
  void Fill(int episodes, int pixels) {
    pixels_ = pixels;
    for (int64_t episode = 1; episode <= episodes; ++episode) {
      for (int64_t row = 0; row < 3 * kChunkRows; row += kChunkRows) {
        const Chunk chunk = MakeChunk(kRun, episode, row, pixels);
        ASSERT_OK(store_->Append(chunk));
        index_.Append(chunk.info);
        payload_bytes_ = std::max(payload_bytes_, chunk.info.payload_bytes);
        memory_bytes_ = std::max(memory_bytes_, EncodedRows::Open(chunk.payload, kChunkRows)->memory_bytes());
      }
    }
  }
  Sequence At(int64_t episode, int64_t row) const { return index_.SequenceAt(episode, row); }

  static constexpr int kLength = 9;
  const std::unique_ptr<Store> store_ = MakeMemoryStore();
  EpisodeIndex index_{kLength};
  int pixels_ = 0;
  int64_t payload_bytes_ = 0;  // of the largest chunk
  int64_t memory_bytes_ = 0;   // it takes
};

TEST_F(SequenceReaderTest, OpensTheRowsAskedFor) {
  Fill(4, 500);
  SequenceReader reader(store_.get());
  std::mt19937_64 random(1);
  for (int i = 0; i < 20; ++i) {
    std::vector<Sequence> sequences;
    for (int s = 0; s < 5; ++s) sequences.push_back(*index_.Sample(random));
    ASSERT_OK_AND_ASSIGN(const SequenceBatch batch, reader.Open(sequences));
    EXPECT_LE(batch.chunks().size(), 12u) << "each chunk once";
    ArrayMap decoded;
    ASSERT_OK(batch.ReadAll(decoded));
    ExpectRows(decoded, sequences, kLength, pixels_);
  }
}

TEST_F(SequenceReaderTest, KeepsTheChunksUsedLast) {
  Fill(3, 500);
  // Room for two sequences of two chunks.
  SequenceReader reader(store_.get(), 4 * (memory_bytes_ + SequenceReader::kChunkOverheadBytes));
  ASSERT_OK(reader.Open({At(1, 0)}));
  ASSERT_OK(reader.Open({At(2, 0)}));
  ASSERT_OK(reader.Open({At(1, 0)}));
  ASSERT_OK(reader.Open({At(3, 0)}));  // takes the place of episode 2's
  // What is found from now on is cached: the store has nothing any more.
  for (int64_t episode = 1; episode <= 3; ++episode) ASSERT_OK(store_->Evict({{episode, 0}, {episode, kChunkRows}}));
  ASSERT_OK_AND_ASSIGN(const SequenceBatch batch, reader.Open({At(3, 2), At(1, 1)}));
  ArrayMap decoded;
  ASSERT_OK(batch.ReadAll(decoded));
  ExpectRows(decoded, {At(3, 2), At(1, 1)}, kLength, pixels_);
  EXPECT_THAT(reader.Open({At(1, 0), At(2, 0)}),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("chunk of episode 2 at row 0 was evicted")));
}

// A store that fell back hands out episode numbers again.
TEST_F(SequenceReaderTest, ForgetsWhatItKeptInANewEpoch) {
  Fill(1, 500);
  SequenceReader reader(store_.get());
  ASSERT_OK(reader.Open({At(1, 0)}, 1));
  ASSERT_OK(store_->Evict({{1, 0}, {1, kChunkRows}}));
  ASSERT_OK(reader.Open({At(1, 0)}, 1));
  EXPECT_THAT(reader.Open({At(1, 0)}, 2), StatusIs(absl::StatusCode::kNotFound, HasSubstr("was evicted")));
}

TEST_F(SequenceReaderTest, NamesADamagedChunk) {
  Chunk chunk = MakeChunk(kRun, 8, 0, 500);
  chunk.payload[chunk.payload.size() / 2] ^= 1;
  ASSERT_OK(store_->Append(chunk));
  SequenceReader reader(store_.get());
  EXPECT_THAT(reader.Open({{8, 0, {{{8, 0}, 0, 3}}}}),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("chunk of episode 8 at row 0: damaged chunk payload: checksum")));
}

TEST_F(SequenceReaderTest, SendsChunksInPartsThatAreBounded) {
  Fill(4, 40'000);
  SequenceReader reader(store_.get());
  std::vector<Sequence> sequences;
  for (int64_t episode = 1; episode <= 4; ++episode) sequences.insert(sequences.end(), {At(episode, 0), At(episode, 12)});
  ASSERT_OK_AND_ASSIGN(const SequenceBatch batch, reader.Open(sequences));
  ASSERT_EQ(batch.chunks().size(), 12u);
  ASSERT_GT(12 * payload_bytes_, kSamplePartBytes);
  std::vector<SampleSequencesResponse> parts;
  ASSERT_OK(SendSampledChunks(batch, 3, [&](const SampleSequencesResponse& part) {
    parts.push_back(part);
    return true;
  }));
  EXPECT_EQ(parts.size(), 3u) << "seven chunks, five chunks, the sequences";
  int chunks = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    EXPECT_EQ(parts[i].batch(), 3);
    EXPECT_EQ(parts[i].last_part(), i + 1 == parts.size());
    EXPECT_LE(parts[i].ByteSizeLong(), kSamplePartBytes + payload_bytes_);
    EXPECT_EQ(parts[i].sequences_size(), i + 1 == parts.size() ? 8 : 0);
    chunks += parts[i].chunks_size();
  }
  EXPECT_EQ(chunks, 12);
  // As soon as nobody takes them any more it ends.
  int sent = 0;
  EXPECT_THAT(SendSampledChunks(batch, 0, [&](const SampleSequencesResponse&) { return ++sent < 1; }),
              StatusIs(absl::StatusCode::kCancelled));
  EXPECT_THAT(SendSampledFields(batch, 0, [&](const SampleSequencesResponse&) { return ++sent < 3; }),
              StatusIs(absl::StatusCode::kCancelled));
  EXPECT_EQ(sent, 3);
}

// Both ways of sending give a caller the same rows for the same seed.
TEST(SampleSequences, GivesTheSameRowsDecodedHereOrThere) {
  config::v1::Experiment experiment;
  experiment.set_name(kRun);
  experiment.mutable_environment()->set_task("cartpole_swingup");
  experiment.mutable_learning()->set_sequence_length(10);
  const std::unique_ptr<Store> store = MakeMemoryStore();
  const auto registry = std::make_shared<prometheus::Registry>();
  ASSERT_OK_AND_ASSIGN(const auto server, ReplayServer::Create({experiment, store.get(), registry}));
  HostOptions host_options;
  host_options.name = "replay";
  host_options.registry = registry;
  host_options.services = {server->service()};
  ASSERT_OK_AND_ASSIGN(const auto host, ServiceHost::Start(std::move(host_options)));
  server->Start([](bool) {});
  const std::shared_ptr<grpc::Channel> channel = host->InProcessChannel();

  ReplayClient client(channel, kRun);
  ASSERT_OK_AND_ASSIGN(const auto episode, client.BeginEpisode("actor", kHash, Soon()));
  const auto writer = ReplayWriter::Create(channel, kRun, {});
  for (int64_t row = 0; row < 10 * kChunkRows; row += kChunkRows) {
    ASSERT_OK(writer->Append(MakeChunk(episode->assignment.run_id, 1, row, 3000), Soon()));
  }
  ASSERT_OK(writer->Flush(Soon()));
  while (client.GetStats(Soon())->rows() < 10 * kChunkRows) absl::SleepFor(absl::Milliseconds(1));

  replay::v1::SampleSequencesRequest request;
  request.set_run(kRun);
  request.set_batch_size(6);
  request.set_sequence_length(10);
  request.set_batches(15);
  request.set_seed(9);
  grpc::ClientContext context;
  const auto stub = replay::v1::ReplayService::NewStub(channel);
  const auto decoded = stub->SampleSequences(&context, request);

  SequenceStream::Options options;
  options.run = kRun;
  options.batch_size = 6;
  options.sequence_length = 10;
  options.batches = 15;
  options.seed = 9;
  const auto stream = SequenceStream::Create(channel, options);
  ArrayMap batch;
  std::vector<SequenceBatch::Start> starts;
  for (int64_t number = 0; number < 15; ++number) {
    ASSERT_OK(stream->Next(batch, starts, Soon()));
    ASSERT_EQ(starts.size(), 6u);
    std::vector<Sequence> sequences(6);
    for (size_t s = 0; s < 6; ++s) {
      sequences[s].episode_id = batch["place"].as<int64_t>()[20 * s];
      sequences[s].first_row = batch["place"].as<int64_t>()[20 * s + 1];
    }
    ExpectRows(batch, sequences, 10, 3000);
    std::map<std::string, std::string> bytes;
    SampleSequencesResponse part;
    do {
      ASSERT_TRUE(decoded->Read(&part));
      ASSERT_EQ(part.batch(), number);
      EXPECT_EQ(part.chunks_size() + part.sequences_size(), 0);
      EXPECT_EQ(part.starts_size(), part.last_part() ? 6 : 0);
      bytes[part.field().name()] += part.field().tensor().data();
    } while (!part.last_part());
    ASSERT_EQ(bytes.size(), batch.size());
    for (const auto& [name, array] : batch) EXPECT_EQ(bytes[name], array.bytes) << name;
    for (int s = 0; s < 6; ++s) {
      const replay::v1::SampledStart& sent = part.starts(s);
      const ChunkKey key = {sent.chunk().episode_id(), sent.chunk().first_row()};
      EXPECT_EQ(starts[s], (SequenceBatch::Start{key, sent.begin(), 1.0 / 61}));
      EXPECT_EQ(sent.probability(), 1.0 / 61);  // of 70 rows
      EXPECT_EQ(sequences[s].episode_id, sent.chunk().episode_id());
      EXPECT_EQ(sequences[s].first_row, sent.chunk().first_row() + sent.begin());
    }
  }
  EXPECT_THAT(stream->Next(batch, Soon()), StatusIs(absl::StatusCode::kOutOfRange));
  EXPECT_FALSE(decoded->Read(std::make_unique<SampleSequencesResponse>().get()));
  EXPECT_TRUE(decoded->Finish().ok());
  server->Shutdown();
  host->Shutdown(absl::ZeroDuration());
}

}  // namespace
}  // namespace orrery
