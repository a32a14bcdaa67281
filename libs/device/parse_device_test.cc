#include "libs/device/parse_device.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "libs/base/status_matchers.h"

namespace orrery {
namespace {

using testing::HasSubstr;

TEST(ParseDeviceTest, TakesCpuAndRefusesTheRest) {
  EXPECT_OK(ParseDevice("cpu"));
  EXPECT_THAT(ParseDevice("tpu9"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("\"tpu9\": expected cpu")));
  EXPECT_THAT(ParseDevice(""), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(ParseDevice("cuda:99"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not there")));
}

}  // namespace
}  // namespace orrery
