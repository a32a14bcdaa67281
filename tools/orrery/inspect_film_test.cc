#include "tools/orrery/inspect_film.h"

#include <webp/decode.h>

#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/tensors/safetensors.h"
#include "libs/world_model/snapshot.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

class InspectFilmTest : public ::testing::Test {
 protected:
  // A model with pictures and an episode of 12 rows, without a batch dimension, as `inspect replay` writes it.
  void Make(const std::string& action, int action_size) {
    auto config = ParseModel("deterministic_size: 4 stochastic_size: 2 hidden_size: 4 action { " + action +
                             " } modalities { name: 'image' image { channels: 1 height: 32 width: 32 depth: 1 bits: 8 } }");
    ASSERT_OK(config);
    ASSERT_OK_AND_ASSIGN(const auto model, WorldModel::Create(*config, 1));
    SafeTensors snapshot, rows;
    for (const auto& p : model->named_parameters()) snapshot.tensors[p.key()] = p.value().detach();
    snapshot.metadata = {{"orrery.model", ToText(*config)}};
    rows.tensors["image"] = at::randint(256, {12, 32, 32, 1}, at::kByte);
    rows.tensors["action"] = at::zeros({12, action_size});
    rows.tensors["is_first"] = at::zeros({12}, at::kByte);
    ASSERT_OK(SaveSafeTensors(dir_ / "snapshot", snapshot));
    ASSERT_OK(SaveSafeTensors(dir_ / "rows", rows));
  }
  InspectFilmOptions Options() const {
    InspectFilmOptions options;
    options.snapshot = dir_ / "snapshot";
    options.batch = dir_ / "rows";
    options.out = dir_ / "out.webp";
    options.zoom = 1;
    return options;
  }
  WebPBitstreamFeatures Features() const {
    WebPBitstreamFeatures features{};
    const auto file = ReadFile(dir_ / "out.webp");
    EXPECT_OK(file);
    EXPECT_EQ(WebPGetFeatures(reinterpret_cast<const uint8_t*>(file->data()), file->size(), &features), VP8_STATUS_OK);
    return features;
  }
  const TempDir dir_;
};

TEST_F(InspectFilmTest, ShowsTruthMeanAndSamples) {
  Make("continuous { size: 2 }", 2);
  ASSERT_OK(InspectFilm(Options()));
  EXPECT_EQ(Features().has_animation, 1);
  EXPECT_EQ(Features().width, 34);
  EXPECT_EQ(Features().height, 5 * 34) << "truth, mean, three samples";
  InspectFilmOptions still = Options();
  still.still = true;
  still.samples = 1;
  still.first_row = 2;
  still.rows = 8;
  still.zoom = 2;
  ASSERT_OK(InspectFilm(still));
  EXPECT_EQ(Features().width, 8 * 34 * 2);
  EXPECT_EQ(Features().height, 3 * 34 * 2);
}

TEST_F(InspectFilmTest, ShowsEveryDiscreteAction) {
  Make("discrete { size: 3 }", 3);
  InspectFilmOptions options = Options();
  options.per_action = true;
  ASSERT_OK(InspectFilm(options));
  EXPECT_EQ(Features().height, 4 * 34) << "truth, three actions";
}

TEST_F(InspectFilmTest, NamesWhatDoesNotFit) {
  Make("continuous { size: 2 }", 2);
  const auto refused = [&](InspectFilmOptions options, const std::string& message) {
    EXPECT_THAT(InspectFilm(options), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  };
  InspectFilmOptions options = Options();
  options.per_action = true;
  refused(options, "--per_action: the model's action is continuous");
  options = Options();
  options.modality = "sound";
  refused(options, "--modality=sound: expected a modality");
  options = Options();
  options.first_row = 7;
  refused(options, "has 12 rows; expected more than 12, first_row + context");
}

}  // namespace
}  // namespace orrery
