#include "libs/world_model/snapshot.h"

#include <cmath>

#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/tensors/safetensors.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

constexpr char kModel[] =
    "deterministic_size: 5 stochastic_size: 3 hidden_size: 4 action { continuous { size: 2 } } "
    "modalities { name: 'v' vector { size: 4 layers: 1 hidden_size: 3 } } reward { layers: 1 hidden_size: 4 }";

SafeTensors MakeFile() {
  SnapshotInfo info;
  info.model = *ParseModel(kModel);
  info.planner.mutable_cem()->set_horizon(7);
  info.run = "run-1";
  info.generation = 2;
  info.counter = 300;
  auto model = WorldModel::Create(info.model, 5);
  EXPECT_OK(model);
  auto bytes = SerializeSnapshot(**model, info);
  EXPECT_OK(bytes);
  auto file = ParseSafeTensors(*bytes);
  EXPECT_OK(file);
  return *file;
}

absl::StatusOr<ModelSnapshot> Parse(const SafeTensors& file) {
  auto bytes = SerializeSafeTensors(file);
  EXPECT_OK(bytes);
  return ParseSnapshot(*bytes);
}

TEST(Snapshot, ComesBackAsItWas) {
  const SafeTensors file = MakeFile();
  ASSERT_OK_AND_ASSIGN(const ModelSnapshot snapshot, Parse(file));
  EXPECT_EQ(snapshot.info.model.deterministic_size(), 5);
  EXPECT_EQ(snapshot.info.planner.cem().horizon(), 7);
  EXPECT_EQ(snapshot.info.run, "run-1");
  EXPECT_EQ(snapshot.info.generation, 2);
  EXPECT_EQ(snapshot.info.counter, 300);
  const auto parameters = snapshot.model->named_parameters();
  EXPECT_EQ(parameters.size(), file.tensors.size());
  for (const auto& [name, tensor] : file.tensors) EXPECT_TRUE(at::equal(parameters[name], tensor)) << name;
}

TEST(Snapshot, NeedsTheModelOnly) {
  SafeTensors file = MakeFile();
  file.metadata = {{"orrery.model", kModel}, {"format", "pt"}};
  ASSERT_OK_AND_ASSIGN(const ModelSnapshot snapshot, Parse(file));
  EXPECT_TRUE(snapshot.info.planner.has_cem());
  EXPECT_EQ(snapshot.info.planner.cem().candidates(), 1000);
  EXPECT_EQ(snapshot.info.counter, 0);
}

void ExpectRefused(const SafeTensors& file, const std::string& message) {
  EXPECT_THAT(Parse(file), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
}

TEST(Snapshot, NamesTheFirstWrongParameter) {
  SafeTensors file = MakeFile();
  file.tensors.erase("rssm.gru.bias_hh");
  ExpectRefused(file, "rssm.gru.bias_hh is missing; expected float32 [15]");
  file = MakeFile();
  file.tensors["reward.fc2.weight"] = at::zeros({1});
  ExpectRefused(file, "reward.fc2.weight is unknown");
  file = MakeFile();
  file.tensors["rssm.input.weight"] = at::zeros({5, 4});
  ExpectRefused(file, "rssm.input.weight is Float [5, 4]; expected float32 [4, 5]");
  file = MakeFile();
  file.tensors["reward.out.bias"] = at::zeros({1}, at::kDouble);
  ExpectRefused(file, "reward.out.bias is Double [1]; expected float32 [1]");
  file = MakeFile();
  file.tensors["encoder.v.fc1.weight"][1][1] = std::nanf("");
  ExpectRefused(file, "encoder.v.fc1.weight holds a number that is not finite");
}

TEST(Snapshot, RefusesWrongMetadata) {
  SafeTensors file = MakeFile();
  file.metadata.erase("orrery.model");
  ExpectRefused(file, "orrery.model is missing");
  file = MakeFile();
  file.metadata["orrery.model"] = "deterministic_sise: 5";
  ExpectRefused(file, "deterministic_sise");
  file = MakeFile();
  file.metadata["orrery.model"] = "deterministic_size: 5";
  ExpectRefused(file, "orrery.model");
  file = MakeFile();
  file.metadata["orrery.planner"] = "cem { elites: 0 }";
  ExpectRefused(file, "elites");
  file = MakeFile();
  file.metadata["orrery.counter"] = "many";
  ExpectRefused(file, "orrery.counter is 'many'");
  file = MakeFile();
  file.metadata["orrery.format"] = "2";
  ExpectRefused(file, "orrery.format is '2'");
}

// The sizes in the metadata are checked against the tensors before anything of that size is made.
TEST(Snapshot, RefusesHugeSizesWithoutAllocatingThem) {
  SafeTensors file = MakeFile();
  config::v1::Model model = *ParseModel(kModel);
  model.set_deterministic_size(8192);
  model.set_hidden_size(8192);
  file.metadata["orrery.model"] = ToText(model);
  ExpectRefused(file, "decoder.v.fc1.weight is Float [3, 8]; expected float32 [3, 8195]");
}

TEST(Snapshot, RefusesADamagedFileAndNamesIt) {
  auto bytes = SerializeSafeTensors(MakeFile());
  ASSERT_OK(bytes);
  const TempDir dir;
  const std::string path = dir / "s.safetensors";
  ASSERT_OK(WriteFileAtomically(path, bytes->substr(0, bytes->size() - 5)));
  EXPECT_THAT(LoadSnapshot(path), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(path)));
  EXPECT_THAT(LoadSnapshot(dir / "none"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("none")));
}

}  // namespace
}  // namespace orrery
