#include "libs/device/captured_step.h"

#include <utility>

namespace orrery {

using torch::Tensor;

CapturedStep::CapturedStep(torch::Device device, Step step, std::unique_ptr<DeviceGraph> graph)
    : device_(device), step_(std::move(step)), graph_(std::move(graph)) {}

std::vector<Tensor> CapturedStep::Run(const std::vector<Tensor>& inputs) {
  // Always in the same mode: what is made in inference mode could not be written outside it at a later run.
  const c10::InferenceMode normal(false);
  if (graph_ == nullptr) {
    std::vector<Tensor> here;
    for (const Tensor& input : inputs) here.push_back(input.to(device_));
    return step_(here);
  }
  Fill(inputs);
  const auto work = [this] { outputs_ = step_(inputs_); };
  if (warm_ups_ < kWarmUps) {
    graph_->RunAside(work);
    ++warm_ups_;
    return outputs_;
  }
  if (!recorded_) {
    outputs_.clear();
    graph_->Record(work);
    recorded_ = true;
  }
  graph_->Replay();
  return outputs_;
}

void CapturedStep::Fill(const std::vector<Tensor>& inputs) {
  const torch::NoGradGuard no_grad;
  if (inputs_.empty())
    for (const Tensor& input : inputs)
      inputs_.push_back(at::empty(input.sizes(), at::TensorOptions(input.scalar_type()).device(device_)));
  TORCH_CHECK(inputs.size() == inputs_.size(), "a captured step got ", inputs.size(), " tensors; expected ", inputs_.size(),
              " as at its first run");
  for (size_t i = 0; i < inputs.size(); ++i) {
    const bool same = inputs[i].sizes() == inputs_[i].sizes() && inputs[i].scalar_type() == inputs_[i].scalar_type();
    TORCH_CHECK(same, "input ", i, " of a captured step is ", inputs[i].scalar_type(), " ", inputs[i].sizes(), "; expected ",
                inputs_[i].scalar_type(), " ", inputs_[i].sizes(), " as at its first run");
    inputs_[i].copy_(inputs[i], /*non_blocking=*/true);
  }
}

}  // namespace orrery
