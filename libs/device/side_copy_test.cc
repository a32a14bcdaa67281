#include "libs/device/side_copy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace orrery {
namespace {

// On a GPU: libs/serving/gpu_test.cc.
TEST(SideCopy, GivesTheTensorsThemselvesOnACpu) {
  SideCopy to_device(torch::kCPU);
  const torch::Tensor first = at::arange(3), second = at::zeros({0, 2}, at::kByte);
  const std::vector<torch::Tensor> there = to_device.Copy({first, second});
  ASSERT_EQ(there.size(), 2u);
  EXPECT_TRUE(there[0].is_same(first));
  EXPECT_TRUE(there[1].is_same(second));
  EXPECT_TRUE(to_device.Copy({}).empty());
}

}  // namespace
}  // namespace orrery
