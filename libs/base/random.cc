#include "libs/base/random.h"

namespace orrery {
namespace {
uint64_t Mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
}  // namespace

uint64_t DeriveSeed(uint64_t base, absl::string_view name, uint64_t index) {
  uint64_t hash = 0xCBF29CE484222325ull;
  for (unsigned char c : name) hash = (hash ^ c) * 0x100000001B3ull;
  return Mix(Mix(Mix(base) ^ hash) ^ index);
}

}  // namespace orrery
