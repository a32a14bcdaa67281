#include "libs/envs/gl_context.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "libs/base/status_matchers.h"
#include "libs/envs/egl_display.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

std::string Wanted() {
  // Before the first context: the choice may correct it.
  static const char* const wanted = std::getenv("MUJOCO_GL");
  static const std::string text = wanted == nullptr ? "" : wanted;
  return text;
}

TEST(GlContextTest, IsWhatTheEnvironmentSays) {
  const bool forced = Wanted() == "egl";
  const auto egl = EglDisplay::Open(/*software=*/forced);
  if (forced && !egl.ok()) GTEST_SKIP() << "no EGL here: " << egl.status();
  const bool expected = Wanted() != "osmesa" && egl.ok();
  EXPECT_THAT(GlContext::Description(), StartsWith(expected ? "EGL (device " : "OSMesa ("));
}

TEST(GlContextTest, RunsWhileCurrentAndReportsFailures) {
  ASSERT_OK_AND_ASSIGN(auto first, GlContext::Create());
  ASSERT_OK_AND_ASSIGN(auto second, GlContext::Create());
  int runs = 0;
  for (GlContext* const context : {first.get(), second.get(), first.get()}) {
    EXPECT_OK(context->Run([&] {
      ++runs;
      return absl::OkStatus();
    }));
  }
  EXPECT_EQ(runs, 3);
  EXPECT_THAT(first->Run([] { return absl::AbortedError("of the caller's"); }),
              StatusIs(absl::StatusCode::kAborted, HasSubstr("of the caller's")));
  EXPECT_THAT(first->Run([]() -> absl::Status { throw std::runtime_error("thrown"); }),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("thrown")));
  EXPECT_OK(first->Run([] { return absl::OkStatus(); })) << "released by the failures";
}

TEST(EglDisplayTest, SaysWhyADeviceCannotBeUsed) {
  const absl::Status none = EglDisplay::Open(/*software=*/true, /*device=*/1000).status();
  EXPECT_EQ(none.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(none.message()), HasSubstr("EGL"));
}

}  // namespace
}  // namespace orrery
