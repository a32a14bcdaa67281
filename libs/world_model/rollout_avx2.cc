// AVX2 and FMA: 12 sums in 16 registers.
#define ORRERY_LANES 8
#define ORRERY_PART 6
#include "libs/world_model/rollout_kernel_inl.h"

namespace orrery {
const RolloutKernel kRolloutAvx2 = {"avx2", kRows, kPair, RollBlock, DrawNormals};
}  // namespace orrery
