#include "libs/base/cpu.h"

#include <gtest/gtest.h>

#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"

namespace orrery {
namespace {

TEST(CgroupCpuLimitTest, TakesTheSmallestLimitOnTheWayUp) {
  TempDir root;
  ASSERT_OK(MakeDirectory(root / "pod/box"));
  ASSERT_OK(WriteFileAtomically(root / "pod/cpu.max", "150000 100000\n"));
  ASSERT_OK(WriteFileAtomically(root / "pod/box/cpu.max", "max 100000\n"));
  EXPECT_EQ(CgroupCpuLimit(root.path(), "0::/pod/box\n"), 1.5);
  ASSERT_OK(WriteFileAtomically(root / "pod/box/cpu.max", "50000 100000\n"));
  EXPECT_EQ(CgroupCpuLimit(root.path(), "1:name=x:/y\n0::/pod/box\n"), 0.5);
}

TEST(CgroupCpuLimitTest, ReadsTheRootInsideAContainer) {
  TempDir root;
  EXPECT_EQ(CgroupCpuLimit(root.path(), "0::/\n"), std::nullopt);
  ASSERT_OK(WriteFileAtomically(root / "cpu.max", "200000 100000"));
  EXPECT_EQ(CgroupCpuLimit(root.path(), "0::/\n"), 2.0);
}

TEST(CgroupCpuLimitTest, IgnoresWhatItCannotRead) {
  TempDir root;
  ASSERT_OK(WriteFileAtomically(root / "cpu.max", "many 100000"));
  EXPECT_EQ(CgroupCpuLimit(root.path(), ""), std::nullopt);
  ASSERT_OK(WriteFileAtomically(root / "cpu.max", "100000 0"));
  EXPECT_EQ(CgroupCpuLimit(root.path(), ""), std::nullopt);
}

TEST(AvailableCpusTest, IsAtLeastOne) { EXPECT_GE(AvailableCpus(), 1); }

}  // namespace
}  // namespace orrery
