// AVX-512 with dot products of bfloat16: 24 sums in 32 registers.
#define ORRERY_LANES 16
#define ORRERY_PART 12
#define ORRERY_BFLOAT16
#include "libs/world_model/rollout_kernel_inl.h"

namespace orrery {
const RolloutKernel kRolloutAvx512bf16 = {"avx512bf16", kRows, kPair, RollBlock, DrawNormals};
}  // namespace orrery
