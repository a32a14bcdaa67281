#include "libs/learning/complete_model.h"

#include "libs/base/status_matchers.h"

namespace orrery {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

EnvironmentSpec Spec() {
  return {{{"image", DType::kUInt8, {32, 32, 3}}, {"joints", DType::kFloat32, {5}}}, {2, false}};
}

TEST(CompleteModel, TakesEverythingFromTheEnvironmentWhenNothingIsNamed) {
  config::v1::Model model;
  EXPECT_TRUE(NeedsEnvironment(model));
  ASSERT_OK_AND_ASSIGN(model, CompleteModel(model, Spec()));
  ASSERT_EQ(model.modalities_size(), 2);
  EXPECT_EQ(model.modalities(0).name(), "image");
  EXPECT_EQ(model.modalities(0).image().height(), 32);
  EXPECT_EQ(model.modalities(0).image().channels(), 3);
  EXPECT_EQ(model.modalities(1).name(), "joints");
  EXPECT_EQ(model.modalities(1).vector().size(), 5);
  EXPECT_EQ(model.action().continuous().size(), 2);
  EXPECT_OK(Validate(model, /*complete=*/true));
  EXPECT_FALSE(NeedsEnvironment(model));
}

TEST(CompleteModel, FillsSizesAndKeepsWhatIsConfigured) {
  ASSERT_OK_AND_ASSIGN(config::v1::Model model,
                       ParseModel("modalities { name: \"image\" image { depth: 8 bits: 8 } } action { discrete {} }"));
  EXPECT_TRUE(NeedsEnvironment(model));
  EnvironmentSpec spec = Spec();
  spec.action = {4, true};
  ASSERT_OK_AND_ASSIGN(model, CompleteModel(model, spec));
  ASSERT_EQ(model.modalities_size(), 1);
  EXPECT_EQ(model.modalities(0).image().width(), 32);
  EXPECT_EQ(model.modalities(0).image().depth(), 8);
  EXPECT_EQ(model.modalities(0).image().bits(), 8);
  EXPECT_EQ(model.action().discrete().size(), 4);
}

TEST(CompleteModel, NamesWhatDoesNotFit) {
  const auto complete = [](const std::string& text) { return CompleteModel(ParseModel(text).value(), Spec()); };
  EXPECT_THAT(complete("modalities { name: \"depth\" image {} }"),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("\"depth\""), HasSubstr("image, joints"))));
  EXPECT_THAT(complete("modalities { name: \"image\" image { height: 64 width: 64 } }"),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("[64, 64, 3]"), HasSubstr("uint8 [32, 32, 3]"))));
  EXPECT_THAT(complete("modalities { name: \"joints\" vector { size: 6 } }"),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("[6]"), HasSubstr("float32 [5]"))));
  EXPECT_THAT(complete("modalities { name: \"image\" vector {} }"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("as a vector")));
  EXPECT_THAT(complete("action { continuous { size: 3 } }"),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("continuous 3"), HasSubstr("continuous 2"))));
  EXPECT_THAT(complete("action { discrete { size: 2 } }"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("discrete 2")));
}

TEST(CompleteExperiment, MakesTheEnvironmentOnlyWhereItIsNeeded) {
  config::v1::Experiment experiment;
  experiment.mutable_environment()->set_task("no_such_task");
  EXPECT_THAT(CompleteExperiment(experiment), StatusIs(absl::StatusCode::kNotFound, HasSubstr("no_such_task")));
  ASSERT_OK_AND_ASSIGN(*experiment.mutable_model(), CompleteModel(experiment.model(), Spec()));
  EXPECT_OK(CompleteExperiment(experiment));
}

}  // namespace
}  // namespace orrery
