#include "libs/world_model/heads.h"

#include "libs/world_model/layout.h"

namespace orrery {

using config::v1::RewardHead;
using torch::Tensor;

namespace {

constexpr double kLimit = 20;
constexpr double kMinStd = 0.1;
constexpr double kHalfLog2Pi = 0.91893853320467274178;

}  // namespace

Tensor Symlog(const Tensor& x) { return at::sign(x) * at::log1p(at::abs(x)); }
Tensor Symexp(const Tensor& x) { return at::sign(x) * at::expm1(at::abs(x)); }

Tensor LikelihoodStd(const Tensor& raw) { return at::softplus(raw) + kMinStd; }

Tensor GaussianNll(const Tensor& mean, const Tensor& std, const Tensor& target) {
  return 0.5 * ((target - mean) / std).square() + std.log() + kHalfLog2Pi;
}

Tensor TwoHotBins(const torch::TensorOptions& options) {
  // Half of them, mirrored: linspace rounds its two ends differently.
  const int64_t half = kTwoHotBins / 2;
  const Tensor positive = Symexp(at::linspace(0, kLimit, half + 1, options.requires_grad(false)));
  return at::cat({-positive.slice(0, 1).flip(0), positive});
}

Tensor TwoHot(const Tensor& target) {
  const Tensor bins = TwoHotBins(target.options());
  const Tensor x = target.clamp(bins[0], bins[kTwoHotBins - 1]);  // as tensors: numbers would have to come from the device
  const Tensor above = at::searchsorted(bins, x.contiguous()).clamp(1, kTwoHotBins - 1), below = above - 1;
  const Tensor low = bins.index_select(0, below.flatten()).view_as(x), high = bins.index_select(0, above.flatten()).view_as(x);
  const Tensor share = (x - low) / (high - low);
  Tensor weights = at::zeros({x.numel(), kTwoHotBins}, x.options());
  weights.scatter_(1, below.flatten().unsqueeze(1), (1 - share).flatten().unsqueeze(1));
  weights.scatter_(1, above.flatten().unsqueeze(1), share.flatten().unsqueeze(1));
  std::vector<int64_t> shape = x.sizes().vec();
  shape.push_back(kTwoHotBins);
  return weights.view(shape);
}

Tensor TwoHotNll(const Tensor& logits, const Tensor& target) {
  return -(TwoHot(target) * at::log_softmax(logits, -1)).sum(-1);
}

Tensor TwoHotMean(const Tensor& logits) {
  const Tensor precise = logits.to(at::promote_types(logits.scalar_type(), at::kFloat));
  const Tensor terms = at::softmax(precise, -1) * TwoHotBins(precise.options());
  const int64_t half = kTwoHotBins / 2;
  return (terms.narrow(-1, half + 1, half) + terms.narrow(-1, 0, half).flip(-1)).sum(-1);  // the middle bin is 0
}

Tensor TransformReward(RewardHead::Transform transform, const Tensor& reward) {
  switch (transform) {
    case RewardHead::TANH: return at::tanh(reward);
    case RewardHead::SYMLOG: return Symlog(reward);
    default: return reward;
  }
}

Tensor PlannedReward(RewardHead::Transform transform, const Tensor& predicted) {
  return transform == RewardHead::SYMLOG ? Symexp(predicted) : predicted;
}

}  // namespace orrery
