#include "libs/learning/nccl_sum.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/cuda/CUDAStream.h>

#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "absl/time/clock.h"

// Of LibTorch's torch/csrc/cuda/nccl.h, which cannot be included without a CUDA toolkit.
namespace torch::cuda::nccl {
using ncclComm_t = void*;
typedef struct {
  char internal[128];
} ncclUniqueId;
void get_unique_id(ncclUniqueId& id);
ncclComm_t comm_init_rank(int nranks, const ncclUniqueId& comm_id, int rank);
void comm_destroy(ncclComm_t comm);
void all_reduce(const std::vector<at::Tensor>& inputs, std::vector<at::Tensor>& outputs, int32_t op,
                const std::vector<std::optional<c10::cuda::CUDAStream>>& streams, const std::vector<ncclComm_t>& user_comms);
}  // namespace torch::cuda::nccl

namespace orrery {
namespace {

namespace nccl = torch::cuda::nccl;
constexpr int32_t kSum = 0;  // ncclSum
constexpr absl::Duration kPoll = absl::Microseconds(20);

class Communicator final : public NcclSum {
 public:
  Communicator(nccl::ncclComm_t comm, torch::Device device) : device_(device), comm_(comm) {}
  // One that failed would wait for the lost rank: it ends with the process.
  ~Communicator() override {
    if (comm_ != nullptr) nccl::comm_destroy(comm_);
  }

  void Run(torch::Tensor& values, absl::Duration limit) override {
    TORCH_CHECK(comm_ != nullptr, "the communicator failed before");
    const nccl::ncclComm_t comm = std::exchange(comm_, nullptr);
    const c10::DeviceGuard guard(device_);
    const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device_.index());
    std::vector<torch::Tensor> outputs = {values};
    nccl::all_reduce({values}, outputs, kSum, {stream}, {comm});
    c10::Event done(c10::DeviceType::CUDA);
    done.record(stream.unwrap());
    // The device cannot be waited for with a limit.
    for (const absl::Time deadline = absl::Now() + limit; !done.query(); absl::SleepFor(kPoll)) {
      TORCH_CHECK(absl::Now() < deadline, "NCCL did not finish within ", absl::FormatDuration(limit));
    }
    comm_ = comm;
  }

 private:
  const torch::Device device_;
  nccl::ncclComm_t comm_;  // null: it failed
};

}  // namespace

std::string NcclSum::MakeId() {
  nccl::ncclUniqueId id;
  nccl::get_unique_id(id);
  return std::string(id.internal, sizeof(id.internal));
}

std::unique_ptr<NcclSum> NcclSum::Create(const std::string& id, int rank, int size, torch::Device device) {
  nccl::ncclUniqueId unique;
  TORCH_CHECK(id.size() == sizeof(unique.internal), "an id of NCCL has ", id.size(), " bytes, expected ",
              sizeof(unique.internal));
  std::memcpy(unique.internal, id.data(), id.size());
  const c10::DeviceGuard guard(device);
  return std::make_unique<Communicator>(nccl::comm_init_rank(size, unique, rank), device);
}

}  // namespace orrery
