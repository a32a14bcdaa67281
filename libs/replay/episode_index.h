// Which rows are live, and sampling of sequences: uniformly over all valid starts, or by priorities of the chunks.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/replay/chunk_priorities.h"
#include "libs/replay/store.h"

namespace orrery {

// The part of a chunk that a sequence takes.
struct ChunkSlice {
  ChunkKey key;
  int32_t begin = 0;  // first row within the chunk
  int32_t rows = 0;
};

// A sequence of L consecutive rows of one episode.
struct Sequence {
  int64_t episode_id = 0;
  int64_t first_row = 0;
  std::vector<ChunkSlice> slices;  // in order, rows add up to L
  double probability = 0;          // with which a draw of the sampler gives this one; 0: no sampler drew it
};

// Sequences that begin at rows first_row … first_row + starts - 1 of one episode.
struct StartRange {
  int64_t episode_id = 0;
  int64_t first_row = 0;
  int64_t starts = 0;  // at least 1
};

struct IndexTotals {
  int64_t rows = 0;      // live, of the chunks this index was given
  int64_t bytes = 0;     // payload bytes
  int64_t chunks = 0;
  int64_t episodes = 0;  // with at least one live chunk
};

// Not thread-safe. A valid start is (episode, row) such that rows row … row + L - 1 are all live and of that episode;
// every valid start is equally likely. Sampling costs O(log episodes), whatever the number of rows.
class EpisodeIndex {
 public:
  // Sequences of `sequence_length` rows will be drawn; evaluation chunks are counted in totals but never sampled.
  explicit EpisodeIndex(int sequence_length);
  ~EpisodeIndex();
  // Repeats are ignored. Chunks may come in any order (gaps break an episode into runs of consecutive rows). The task of an
  // episode is that of its first chunk here.
  void Append(const ChunkInfo& info);
  // Unknown keys are ignored.
  void Evict(const ChunkKey& key);
  // Nothing when there is no valid start.
  std::optional<Sequence> Sample(std::mt19937_64& random) const;
  // The same among the valid starts of one task.
  std::optional<Sequence> SampleTask(int task, std::mt19937_64& random) const;
  // Drawing by priorities. Each training chunk has one, which counts for the sequences that begin in it: the largest that any
  // chunk here ever had, at least 1, until it is set. Memory (ChunkPriorities) and time are spent on it only after one of these
  // was called; then a change costs O(log chunks) for each chunk in which sequences begin that it makes valid or invalid.
  //
  // Sets the priority, 0 to kMaxPriority. False: there is no such chunk.
  bool SetPriority(const ChunkKey& key, double priority);
  // Takes over the priorities of `other`, which holds the same chunks.
  void CopyPriorities(const EpisodeIndex& other);
  // A valid start with a probability proportional to priority ^ exponent (0 to kMaxPriorityExponent) of its chunk; while all of
  // these are 0 every start is equally likely. Nothing when there is no valid start.
  std::optional<Sequence> SamplePrioritized(double exponent, std::mt19937_64& random);
  // Probability with which SamplePrioritized gives one certain sequence that begins in this chunk, which must have one.
  double PrioritizedProbability(double exponent, const ChunkKey& key);
  // The sequence that begins there, which must be a valid start.
  Sequence SequenceAt(int64_t episode_id, int64_t first_row) const;
  // The valid starts of sequences whose last row is in one of the newest training chunks: as many chunks, in order of arrival,
  // as hold at least `rows` rows, or all. Each start once. Costs O(chunks looked at * log chunks of an episode).
  std::vector<StartRange> NewestStarts(int64_t rows) const;
  int64_t valid_starts() const;
  // By task, tasks without one left out.
  std::map<int, int64_t> task_starts() const;
  IndexTotals totals() const;
  // Chunks to evict so that rows and bytes fit: the oldest first, in order of arrival.
  std::vector<ChunkKey> OldestBeyond(int64_t max_rows, int64_t max_bytes) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace orrery
