// Recordings on CUDA devices. In builds with ORRERY_CUDA only; no_graph.cc takes its place in the others.
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/core/StreamGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdlib>
#include <string_view>
#include <utility>

#include "absl/base/const_init.h"
#include "absl/synchronization/mutex.h"
#include "libs/device/captured_step.h"

namespace orrery {
namespace {

// Streams come from a pool and two graphs may get the same one: what a thread does on such a stream must not end up in the
// recording of another thread.
ABSL_CONST_INIT absl::Mutex recording_mu(absl::kConstInit);

class CudaGraph : public DeviceGraph {
 public:
  CudaGraph(torch::Device device, std::vector<torch::Generator> generators)
      : stream_(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device.index())), generators_(std::move(generators)) {}

  void RunAside(const std::function<void()>& work) override {
    absl::MutexLock lock(&recording_mu);
    // What lies on the current stream comes first, and this before what is put there next.
    c10::cuda::getCurrentCUDAStream(stream_.device_index()).synchronize();
    const c10::StreamGuard guard(stream_.unwrap());
    work();
    stream_.synchronize();
  }

  void Record(const std::function<void()>& work) override {
    absl::MutexLock lock(&recording_mu);
    c10::cuda::getCurrentCUDAStream(stream_.device_index()).synchronize();
    const c10::StreamGuard guard(stream_.unwrap());
    auto graph = std::make_unique<at::cuda::CUDAGraph>();
    for (const torch::Generator& generator : generators_) graph->register_generator_state(generator);
    // Other threads go on using the device meanwhile.
    graph->capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
    try {
      work();
    } catch (...) {
      EndFailed(*graph);
      throw;
    }
    graph->capture_end();
    graph_ = std::move(graph);
  }

  void Replay() override { graph_->replay(); }

 private:
  // The first error says more than that of the recording which it spoilt.
  static void EndFailed(at::cuda::CUDAGraph& graph) {
    try {
      graph.capture_end();
    } catch (const std::exception&) {
    }
  }

  const c10::cuda::CUDAStream stream_;
  const std::vector<torch::Generator> generators_;
  std::unique_ptr<at::cuda::CUDAGraph> graph_;
};

}  // namespace

std::unique_ptr<DeviceGraph> MakeDeviceGraph(torch::Device device, const std::vector<torch::Generator>& generators) {
  const char* const wanted = std::getenv("ORRERY_CUDA_GRAPHS");
  if (!device.is_cuda() || (wanted != nullptr && std::string_view(wanted) == "0")) return nullptr;
  return std::make_unique<CudaGraph>(device, generators);
}

}  // namespace orrery
