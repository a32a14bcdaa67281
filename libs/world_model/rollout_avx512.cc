// AVX-512: 24 sums in 32 registers.
#define ORRERY_LANES 16
#define ORRERY_PART 12
#include "libs/world_model/rollout_kernel_inl.h"

namespace orrery {
const RolloutKernel kRolloutAvx512 = {"avx512", kRows, kPair, RollBlock, DrawNormals};
}  // namespace orrery
