// What every processor has.
#define ORRERY_LANES 4
#define ORRERY_PART 6
#include "libs/world_model/rollout_kernel_inl.h"

namespace orrery {
const RolloutKernel kRolloutPortable = {"portable", kRows, kPair, RollBlock, DrawNormals};
}  // namespace orrery
