#include "services/planner/model_source.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "libs/base/status_matchers.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

TEST(ParseModelSource, ReadsAFile) {
  ASSERT_OK_AND_ASSIGN(const ModelSource source, ParseModelSource("base=file:/data/a=b:c.safetensors"));
  EXPECT_EQ(source.name, "base");
  EXPECT_EQ(source.snapshot, "/data/a=b:c.safetensors");
  EXPECT_EQ(source.learner, "");
  EXPECT_EQ(source.replay, "");
  EXPECT_EQ(source.run, "base");
}

TEST(ParseModelSource, ReadsServicesInAnyOrder) {
  ASSERT_OK_AND_ASSIGN(const ModelSource source,
                       ParseModelSource("new=run:cheetah-2,replay:10.0.0.2:7101,learner:dns:///learner:7102,file:f"));
  EXPECT_EQ(source.name, "new");
  EXPECT_EQ(source.snapshot, "f");
  EXPECT_EQ(source.learner, "dns:///learner:7102");
  EXPECT_EQ(source.replay, "10.0.0.2:7101");
  EXPECT_EQ(source.run, "cheetah-2");
}

TEST(ParseModelSource, NamesWhatIsWrong) {
  const auto refuse = [](const std::string& text, const std::string& why) {
    EXPECT_THAT(ParseModelSource(text),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--model=" + text + ": " + why)));
  };
  refuse("", "the name is empty");
  refuse("=file:f", "the name is empty");
  refuse("a", "\"\" is no kind of source");
  refuse("a=f.safetensors", "\"f.safetensors\" is no kind of source");
  refuse("a=file:", "file has no value");
  refuse("a=file:f,", "\"\" is no kind of source");
  refuse("a=file:f,file:g", "file is given twice");
  refuse("a=run:b", "no source is given");
}

}  // namespace
}  // namespace orrery
