// The belief token: what an agent knows, as opaque bytes that travel with the client.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "libs/replay/store.h"

namespace orrery {

// A plain value.
struct Belief {
  std::string model;            // name of the model, at most 255 bytes
  uint64_t structure_hash = 0;  // of the parameters that made it
  SnapshotVersion version;      // of those parameters; numbers of at least 0
  std::vector<float> deter;     // [D], each in [-1, 1]
  std::vector<float> stoch;     // [S]
  int64_t plan_horizon = 0;     // H, 0 to 256; 0: no plan
  std::vector<float> plan;      // [H, A] from which the next search begins, each in [-1, 1]
};

// What a belief must fit.
struct BeliefShape {
  std::string model;
  uint64_t structure_hash = 0;
  int deterministic_size = 0;
  int stochastic_size = 0;
  int action_size = 0;
  int64_t plan_horizon = 0;  // of the plans that are wanted; 0: none are
};

// Little endian: "OBLF", u8 format, u8 length of the name, name, u64 structure hash, i64 generation, i64 counter, u32 D,
// u32 S, D and S float32, u32 CRC-32 of everything before. Format 1 is that; format 2, with a plan, has u32 H and u32 A
// after S and H · A float32 after the states. INVALID_ARGUMENT: a number is not finite, the deterministic state leaves
// [-1, 1], which no recurrent cell started at zero does, the plan does or has another size than it says, or a number of the
// version is below 0.
absl::StatusOr<std::string> SerializeBelief(const Belief& belief);

// INVALID_ARGUMENT: damaged, of the wrong size, or numbers that no model could have made. FAILED_PRECONDITION: of another
// model, structure or format; begin a new belief. A plan of another horizon than the one wanted is checked and left out.
// Never trusts a length: `token` comes from the network.
absl::StatusOr<Belief> ParseBelief(absl::string_view token, const BeliefShape& expected);

}  // namespace orrery
