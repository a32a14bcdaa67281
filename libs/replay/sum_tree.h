// Weights by slot that one of them can be drawn by.
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

namespace orrery {

// Not thread-safe. Set and Find cost O(log slots). Each sum is made of its two parts anew when one changes, so that errors of
// rounding do not add up, however often weights change. Takes 16 to 32 bytes for each slot up to the highest one set.
class SumTree {
 public:
  double total() const { return nodes_[1]; }

  // `weight`: at least 0, and so that all together are finite. Weights that were not set are 0.
  void Set(size_t slot, double weight) {
    while (slot >= leaves_) Grow();
    size_t node = leaves_ + slot;
    nodes_[node] = weight;
    for (node /= 2; node >= 1; node /= 2) nodes_[node] = nodes_[2 * node] + nodes_[2 * node + 1];
  }

  // The slot that a position in [0, total()) falls into; its weight is above 0. There must be one.
  size_t Find(double position) const {
    size_t node = 1;
    while (node < leaves_) {
      const double left = nodes_[2 * node];
      // What was subtracted may have been rounded: nothing lies right of the last weight.
      const bool go_right = position >= left && nodes_[2 * node + 1] > 0;
      if (go_right) position -= left;
      node = 2 * node + go_right;
    }
    return node - leaves_;
  }

 private:
  void Grow() {
    std::vector<double> nodes(4 * leaves_, 0.0);
    std::copy(nodes_.begin() + static_cast<std::ptrdiff_t>(leaves_), nodes_.end(),
              nodes.begin() + static_cast<std::ptrdiff_t>(2 * leaves_));
    for (size_t node = 2 * leaves_ - 1; node >= 1; --node) nodes[node] = nodes[2 * node] + nodes[2 * node + 1];
    nodes_ = std::move(nodes);
    leaves_ *= 2;
  }

  size_t leaves_ = 1;                   // a power of two
  std::vector<double> nodes_ = {0, 0};  // node i has the children 2 i and 2 i + 1; the last `leaves_` are the slots'
};

}  // namespace orrery
