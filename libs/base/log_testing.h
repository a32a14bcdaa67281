// For tests of what is logged.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "libs/base/log.h"

namespace orrery {

// What this process writes to standard error while this lives, logged as the program "test" from `level` on. One at a time.
class CapturedLog {
 public:
  explicit CapturedLog(const std::string& level) {
    testing::internal::CaptureStderr();
    EXPECT_EQ(InitLogging("test", level), absl::OkStatus());
  }
  ~CapturedLog() {
    if (!taken_) testing::internal::GetCapturedStderr();
    EXPECT_EQ(InitLogging("test", "warning"), absl::OkStatus());
  }
  CapturedLog(const CapturedLog&) = delete;
  CapturedLog& operator=(const CapturedLog&) = delete;
  // All lines so far; the end of the capture. Once.
  std::string Take() {
    taken_ = true;
    return testing::internal::GetCapturedStderr();
  }

 private:
  bool taken_ = false;
};

}  // namespace orrery
