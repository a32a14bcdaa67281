// How much more often than others the sequences that begin in a chunk are drawn: proportional prioritised sampling (Schaul et
// al., 2015) by chunks.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <random>
#include <vector>

#include "libs/replay/store.h"
#include "libs/replay/sum_tree.h"

namespace orrery {

inline constexpr double kMaxPriority = 1e20;  // to the power of kMaxPriorityExponent, times all starts, is a finite number
inline constexpr double kMaxPriorityExponent = 10;

struct ChunkPriority {
  ChunkKey key;
  double priority = 0;  // 0 to kMaxPriority
};

// The chunks of one EpisodeIndex in numbered slots. Not thread-safe. Drawing and changes cost O(log chunks). Takes 32 to 64
// bytes for each chunk of the most that were there at once, and 16 to 32 more for each of up to kMaxExponents exponents.
class ChunkPriorities {
 public:
  static constexpr uint32_t kNoSlot = std::numeric_limits<uint32_t>::max();
  static constexpr size_t kMaxExponents = 2;

  // `largest`: what new chunks begin with until a larger priority is set.
  explicit ChunkPriorities(double largest = 1) : largest_(largest) {}

  // A chunk without valid starts, with the largest priority so far.
  uint32_t Add(const ChunkKey& key);
  void Remove(uint32_t slot);
  // How many sequences begin in the chunk.
  void SetStarts(uint32_t slot, int32_t starts);
  void SetPriority(uint32_t slot, double priority);

  double largest() const { return largest_; }
  const ChunkKey& key(uint32_t slot) const { return slots_[slot].key; }
  int32_t starts(uint32_t slot) const { return slots_[slot].starts; }
  double priority(uint32_t slot) const { return slots_[slot].priority; }
  // A slot with a probability proportional to starts * priority ^ exponent; nothing when all of these are 0. `exponent` is 0 to
  // kMaxPriorityExponent; 0 ^ 0 is 1. One that was not drawn by lately costs O(chunks).
  std::optional<uint32_t> Draw(double exponent, std::mt19937_64& random);
  // Probability with which Draw gives the slot, divided by its starts; nothing when Draw gives nothing.
  std::optional<double> Probability(double exponent, uint32_t slot);

 private:
  struct Slot {
    ChunkKey key;
    double priority = 0;
    int32_t starts = 0;
  };
  struct Tree {
    double exponent = 0;
    int64_t last_use = 0;
    SumTree weights;
  };

  const SumTree& TreeFor(double exponent);
  // Sets the weight of the slot in every tree.
  void Weigh(uint32_t slot);

  double largest_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_slots_;
  std::vector<Tree> trees_;  // at most kMaxExponents
  int64_t uses_ = 0;
};

}  // namespace orrery
