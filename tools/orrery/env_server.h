// Environments for a program in another language, which starts `orrery env` and talks to it through two pipes.
#pragma once

#include "absl/status/status.h"
#include "libs/envs/vector_environment.h"

namespace orrery {

// Answers on `out` what is asked on `in` until the end of that stream. `environments` must be idle. OK at an end between two
// messages; INVALID_ARGUMENT for a message that is none, DATA_LOSS when the stream ends within one, UNAVAILABLE when nobody
// reads: after these nothing can be made of the stream.
//
// A message is the length of what follows it (uint32), a kind (uint8) and a body. Numbers are little endian, arrays row-major.
// With N environments and actions of A numbers ([-1, 1]; discrete: one-hot):
//
//   1 READY    from the server, first: orrery.common.v1.EnvironmentSpec
//   2 ADVANCE  from the client: uint8 [N] what to do (0 nothing, 1 reset, 2 step), uint64 [N] seeds, float32 [N, A] actions;
//              seeds and actions that are not needed are ignored
//   3 RENDER   from the client: uint32 environment, height, width, the sizes from 1 to 2048
//   4 STATES   after ADVANCE: float64 [N] rewards, uint8 [N] flags (1: the task ended, 2: the episode ended), then every
//              modality, [N, its shape], in READY's order. Where nothing was done: reward and flags 0, and the observation
//              as before (zeros before the first reset)
//   5 PICTURE  after RENDER: uint8 [height, width, 3]
//   6 ERROR    in place of 4 or 5: text (UTF-8) that names the environment. One that failed needs a reset; the others have done
//              what they were asked for.
absl::Status ServeEnvironments(VectorEnvironment& environments, int in, int out);

}  // namespace orrery
