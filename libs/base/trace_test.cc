#include "libs/base/trace.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "libs/base/log.h"
#include "libs/base/log_testing.h"
#include "libs/base/log_text.h"

namespace orrery {
namespace {
using ::testing::EndsWith;
using ::testing::HasSubstr;

// The examples of the recommendation.
constexpr char kTraceId[] = "4bf92f3577b34da6a3ce929d0e0e4736";
constexpr char kSampled[] = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
constexpr char kNotSampled[] = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";

TEST(ParseTraceparent, TakesTheExamplesOfTheRecommendation) {
  const std::optional<TraceContext> sampled = ParseTraceparent(kSampled);
  ASSERT_TRUE(sampled.has_value());
  EXPECT_EQ(sampled->trace_high, 0x4bf92f3577b34da6u);
  EXPECT_EQ(sampled->trace_low, 0xa3ce929d0e0e4736u);
  EXPECT_EQ(sampled->span, 0x00f067aa0ba902b7u);
  EXPECT_TRUE(sampled->sampled);
  EXPECT_EQ(sampled->trace_id(), kTraceId);
  EXPECT_EQ(sampled->traceparent(), kSampled);
  const std::optional<TraceContext> not_sampled = ParseTraceparent(kNotSampled);
  ASSERT_TRUE(not_sampled.has_value());
  EXPECT_FALSE(not_sampled->sampled);
  EXPECT_EQ(not_sampled->traceparent(), kNotSampled);
}

TEST(ParseTraceparent, KnowsOnlyTheFlagSampled) {
  const std::pair<const char*, bool> all_flags[] = {{"ff", true}, {"03", true}, {"fe", false}, {"02", false}};
  for (const auto& [flags, sampled] : all_flags) {
    const auto context = ParseTraceparent(absl::StrCat("00-", kTraceId, "-00f067aa0ba902b7-", flags));
    ASSERT_TRUE(context.has_value()) << flags;
    EXPECT_EQ(context->traceparent(), sampled ? kSampled : kNotSampled) << flags;
  }
}

TEST(ParseTraceparent, TakesWhatLaterVersionsHaveInCommon) {
  for (const char* text : {"cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
                           "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-the-future-will-be-like",
                           "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-"}) {
    const auto context = ParseTraceparent(text);
    ASSERT_TRUE(context.has_value()) << text;
    EXPECT_EQ(context->traceparent(), kSampled) << text;
  }
}

TEST(ParseTraceparent, RefusesWhatIsNotOne) {
  const std::string id = kTraceId, ids = id + "-00f067aa0ba902b7";
  const std::vector<std::string> texts = {
      "", "-", "00", id,
      // Versions, lengths and ends.
      "ff-" + ids + "-01", "0-" + ids + "-01", "00-" + ids + "-0", "00-" + ids, "00-" + ids + "-01-", "00-" + ids + "-011",
      "00-" + ids + "-01-extra", "cc-" + ids + "-01.what-the-future-will-not-be-like", "cc-" + ids + "-011",
      " 00-" + ids + "-01", "00-" + ids + "-01 ",
      // Zeros.
      "00-00000000000000000000000000000000-00f067aa0ba902b7-01", "00-" + id + "-0000000000000000-01",
      // Uppercase.
      "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", "00-" + id + "-00F067AA0BA902B7-01", "CC-" + ids + "-01",
      "00-" + ids + "-0A",
      // A digit too few, too many, or none.
      "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01", "00-4bf92f3577b34da6a3ce929d0e0e4736a-00f067aa0ba902b7-01",
      "00-4bf92f3577b34da6a3ce929d0e0e473g-00f067aa0ba902b7-01", "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
      "00-0x4bf92f3577b34da6a3ce929d0e0e47-00f067aa0ba902b7-01",
      // No dash.
      "00_" + ids + "-01", "00-" + id + "_00f067aa0ba902b7-01", "00-" + ids + "_01",
      // Bytes.
      std::string(55, '\0'), std::string(55, '\xff'), std::string(10000, '0'), std::string(10000, '-')};
  for (const std::string& text : texts) EXPECT_FALSE(ParseTraceparent(text).has_value()) << text.substr(0, 80);
}

TEST(TraceContext, ChildrenAreOtherSpansOfTheTrace) {
  const TraceContext parent = *ParseTraceparent(kNotSampled);
  std::set<uint64_t> spans = {parent.span};
  for (int i = 0; i < 1000; ++i) {
    const TraceContext child = parent.Child();
    EXPECT_EQ(child.trace_id(), kTraceId);
    EXPECT_FALSE(child.sampled);
    EXPECT_TRUE(child.valid());
    EXPECT_TRUE(spans.insert(child.span).second);
  }
}

TEST(NewTrace, IsNewOnEveryThread) {
  std::vector<std::vector<TraceContext>> made(4, std::vector<TraceContext>(1000));
  std::vector<std::thread> threads;
  for (auto& mine : made) {
    threads.emplace_back([&mine] {
      for (TraceContext& context : mine) context = NewTrace();
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::set<std::string> ids;
  for (const auto& mine : made) {
    for (const TraceContext& context : mine) {
      EXPECT_TRUE(context.sampled);
      EXPECT_TRUE(ids.insert(context.trace_id()).second);
      const auto parsed = ParseTraceparent(context.traceparent());
      ASSERT_TRUE(parsed.has_value()) << context.traceparent();
      EXPECT_EQ(parsed->traceparent(), context.traceparent());
    }
  }
}

TEST(TraceScope, NestsAndBelongsToItsThread) {
  EXPECT_FALSE(CurrentTrace().valid());
  const TraceContext outer = NewTrace(), inner = NewTrace();
  {
    const TraceScope scope(outer);
    {
      const TraceScope nested(inner);
      EXPECT_EQ(CurrentTrace().traceparent(), inner.traceparent());
      std::thread([] { EXPECT_FALSE(CurrentTrace().valid()); }).join();
      const TraceScope none(TraceContext{});
      EXPECT_FALSE(CurrentTrace().valid());
    }
    EXPECT_EQ(CurrentTrace().traceparent(), outer.traceparent());
  }
  EXPECT_FALSE(CurrentTrace().valid());
}

TEST(Log, NamesTheTraceInsideAScope) {
  CapturedLog log("info");
  LogInfo("before");
  {
    const TraceScope scope(*ParseTraceparent(kSampled));
    LogInfo("within key={}", 7);
  }
  LogInfo("after");
  const std::string lines = log.Take();
  EXPECT_THAT(lines, HasSubstr("test] before\n"));
  EXPECT_THAT(lines, HasSubstr(absl::StrCat("test] within key=7 trace_id=", kTraceId, "\n")));
  EXPECT_THAT(lines, EndsWith("test] after\n"));
}

TEST(LogText, StaysOnOneLineAndBetweenItsQuotes) {
  EXPECT_EQ(LogText("it's a\n\"b\"\x1b\xc2\x85"), "it's a\\n\\\"b\\\"\\033\\302\\205");
  EXPECT_EQ(LogText(std::string(501, 'x')), std::string(500, 'x'));
}

}  // namespace
}  // namespace orrery
