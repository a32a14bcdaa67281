// Of a program linked as `orrery` and `orrery-learner` are.
#include <gtest/gtest.h>
#include <jemalloc/jemalloc.h>

#include <cstring>
#include <memory>
#include <vector>

namespace {

size_t ResidentBytes() {
  uint64_t epoch = 1;
  size_t size = sizeof epoch;
  EXPECT_EQ(mallctl("epoch", &epoch, &size, &epoch, size), 0);  // takes a new look
  size_t resident = 0;
  size = sizeof resident;
  EXPECT_EQ(mallctl("stats.resident", &resident, &size, nullptr, 0), 0);
  return resident;
}

// Memory with something in every page.
std::unique_ptr<char[]> Touched(size_t bytes) {
  auto memory = std::make_unique_for_overwrite<char[]>(bytes);
  std::memset(memory.get(), 1, bytes);
  return memory;
}

// Training runs of an hour grew from 0.4 to 4 GB when freed memory that had grown together was too large for what was asked for next.
TEST(AllocatorTest, SmallArraysReuseWhatALargeOneLeft) {
  constexpr size_t kLarge = size_t{256} << 20, kSmall = size_t{64} << 10;
  Touched(kLarge).reset();
  const size_t before = ResidentBytes();
  EXPECT_GT(before, kLarge) << "freed memory is kept";
  std::vector<std::unique_ptr<char[]>> small;
  for (size_t bytes = 0; bytes < kLarge / 2; bytes += kSmall) small.push_back(Touched(kSmall));
  EXPECT_LT(ResidentBytes(), before + kLarge / 16);
}

}  // namespace
