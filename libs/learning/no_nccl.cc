// Builds without CUDA have no gradients on a GPU.
#include "libs/learning/nccl_sum.h"

namespace orrery {

std::string NcclSum::MakeId() { C10_THROW_ERROR(Error, "this build has no NCCL"); }

std::unique_ptr<NcclSum> NcclSum::Create(const std::string&, int, int, torch::Device) {
  C10_THROW_ERROR(Error, "this build has no NCCL");
}

}  // namespace orrery
