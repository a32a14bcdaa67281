#include "libs/replay/chunk_priorities.h"

#include <algorithm>
#include <cmath>

namespace orrery {

uint32_t ChunkPriorities::Add(const ChunkKey& key) {
  if (free_slots_.empty()) {
    free_slots_.push_back(static_cast<uint32_t>(slots_.size()));
    slots_.emplace_back();
  }
  const uint32_t slot = free_slots_.back();
  free_slots_.pop_back();
  slots_[slot] = {key, largest_, 0};
  return slot;
}

void ChunkPriorities::Remove(uint32_t slot) {
  SetStarts(slot, 0);
  free_slots_.push_back(slot);
}

void ChunkPriorities::SetStarts(uint32_t slot, int32_t starts) {
  if (slots_[slot].starts == starts) return;
  slots_[slot].starts = starts;
  Weigh(slot);
}

void ChunkPriorities::SetPriority(uint32_t slot, double priority) {
  slots_[slot].priority = priority;
  largest_ = std::max(largest_, priority);
  Weigh(slot);
}

std::optional<uint32_t> ChunkPriorities::Draw(double exponent, std::mt19937_64& random) {
  const SumTree& weights = TreeFor(exponent);
  if (!(weights.total() > 0)) return std::nullopt;
  const double position = std::uniform_real_distribution<double>(0, 1)(random) * weights.total();
  return static_cast<uint32_t>(weights.Find(position));
}

std::optional<double> ChunkPriorities::Probability(double exponent, uint32_t slot) {
  const SumTree& weights = TreeFor(exponent);
  if (!(weights.total() > 0)) return std::nullopt;
  return std::pow(slots_[slot].priority, exponent) / weights.total();
}

const SumTree& ChunkPriorities::TreeFor(double exponent) {
  auto tree = std::find_if(trees_.begin(), trees_.end(), [&](const Tree& t) { return t.exponent == exponent; });
  if (tree == trees_.end()) {
    if (trees_.size() == kMaxExponents) {
      trees_.erase(std::min_element(trees_.begin(), trees_.end(),
                                    [](const Tree& a, const Tree& b) { return a.last_use < b.last_use; }));
    }
    tree = trees_.insert(trees_.end(), Tree{exponent, 0, {}});
    for (size_t slot = 0; slot < slots_.size(); ++slot) {
      tree->weights.Set(slot, slots_[slot].starts * std::pow(slots_[slot].priority, exponent));
    }
  }
  tree->last_use = ++uses_;
  return tree->weights;
}

void ChunkPriorities::Weigh(uint32_t slot) {
  const Slot& chunk = slots_[slot];
  for (Tree& tree : trees_) tree.weights.Set(slot, chunk.starts * std::pow(chunk.priority, tree.exponent));
}

}  // namespace orrery
