#include "libs/config/config.h"

#include <gmock/gmock.h>
#include <google/protobuf/descriptor.h>
#include <google/protobuf/util/message_differencer.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"

namespace orrery {
namespace {

using ::google::protobuf::FieldDescriptor;
using ::google::protobuf::Message;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr char kExperiment[] = R"(
  name: "cartpole.1"
  environment { task: "cartpole_balance" action_repeat: 8 }
  model {
    activation: ELU
    action { continuous { size: 6 } }
    modalities { name: "image" image { channels: 3 height: 64 width: 64 depth: 32 } }
    modalities { name: "joints" vector { size: 26 } }
    objective { overshooting { distance: 4 } }
  }
  planner { cem { candidates: 200 elites: 20 } }
  learning { learning_rate: 0.00030000001 batch_size: 16 }
)";

constexpr char kSnapshotModel[] = R"(
  latent: RSSM  deterministic_size: 200  stochastic_size: 30  hidden_size: 200  activation: RELU  conv_activation: RELU  min_std: 0.1
  action { discrete { size: 5 } }
  modalities { name: "image" image { channels: 3 height: 64 width: 64 depth: 32 } }
  modalities { name: "joints" vector { size: 26 layers: 2 hidden_size: 200 } }
  posterior: JOINT
  reward { layers: 3 hidden_size: 300 }
  objective { free_nats: 3 reward_scale: 10 kl_scale: 1 overshooting { distance: 4 scale: 0 free_nats: 0 } })";

config::v1::Experiment Experiment(const std::string& more = "") {
  auto experiment = ParseExperiment(absl::StrCat(kExperiment, more));
  EXPECT_OK(experiment);
  return experiment.value_or(config::v1::Experiment());
}

auto Refuses(const std::string& message) { return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)); }

TEST(Parse, DefaultsAreRead) {
  const config::v1::Experiment experiment = Experiment();
  EXPECT_EQ(experiment.learning().batch_size(), 16);
  EXPECT_EQ(experiment.learning().sequence_length(), 50);
  EXPECT_EQ(experiment.replay().limiter().absent_seconds(), 60);
  EXPECT_OK(Validate(experiment));
}

TEST(Parse, ErrorsNameLineAndColumn) {
  EXPECT_THAT(ParseExperiment("name: \"x\"\nlearning {\n  batchsize: 3\n}"),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(StartsWith("line 3, column "), HasSubstr("batchsize"))));
  EXPECT_THAT(ParseExperiment("learning { batch_size: \"x\" }"), Refuses("line 1, column 24"));
  EXPECT_THAT(ParseExperiment("learning { batch_size: 3000000000 }"), Refuses("line 1"));
  EXPECT_THAT(ParseExperiment("learning { schedule: SOMETIMES }"), Refuses("SOMETIMES"));
  EXPECT_THAT(ParseExperiment("learning {"), Refuses("line 1"));
  EXPECT_THAT(ParseExperiment("seed: 1 seed: 2"), Refuses("seed"));
  EXPECT_THAT(ParseModel("action { continuous { size: 1 } discrete { size: 2 } }"), Refuses("discrete"));
  EXPECT_THAT(ParsePlanner("newton {}"), Refuses("newton"));
}

TEST(Parse, TextParsesBackToTheSame) {
  const config::v1::Experiment experiment = Experiment();
  ASSERT_OK_AND_ASSIGN(const config::v1::Experiment again, ParseExperiment(ToText(experiment)));
  EXPECT_TRUE(google::protobuf::util::MessageDifferencer::Equals(experiment, again));
}

TEST(Model, ActionIsReadFromEitherKind) {
  ASSERT_OK_AND_ASSIGN(const config::v1::Model model, ParseModel(kSnapshotModel));
  EXPECT_OK(Validate(model, true));
  EXPECT_TRUE(IsDiscrete(model));
  EXPECT_EQ(ActionSize(model), 5);
  EXPECT_FALSE(IsDiscrete(Experiment().model()));
  EXPECT_EQ(ActionSize(Experiment().model()), 6);
}

TEST(SetField, SetsEveryKindOfField) {
  config::v1::Experiment experiment = Experiment();
  for (const char* assignment :
       {"learning.batch_size=32", "learning.learning_rate = 1e-3", "learning.schedule=CONCURRENT", "name=a b=c",
        "environment.task=\"quoted\\ttask\"", "model.modalities[1].name=touch", "model.modalities[2].name=sound",
        "model.modalities[2].vector.size=7", "model.objective.overshooting.scale=0.5", "replay.max_bytes=99999999999",
        "planner.random={}", "collection={seed_episodes: 3}"}) {
    EXPECT_OK(SetField(experiment, assignment)) << assignment;
  }
  EXPECT_EQ(experiment.learning().batch_size(), 32);
  EXPECT_EQ(experiment.learning().learning_rate(), 1e-3);
  EXPECT_EQ(experiment.learning().schedule(), config::v1::Learning::CONCURRENT);
  EXPECT_EQ(experiment.name(), "a b=c");
  EXPECT_EQ(experiment.environment().task(), "quoted\ttask");
  EXPECT_EQ(experiment.model().modalities(1).name(), "touch");
  EXPECT_EQ(experiment.model().modalities(2).vector().size(), 7);
  EXPECT_EQ(experiment.model().objective().overshooting().distance(), 4);
  EXPECT_EQ(experiment.model().objective().overshooting().scale(), 0.5f);
  EXPECT_EQ(experiment.replay().max_bytes(), 99999999999);
  EXPECT_TRUE(experiment.planner().has_random());
  EXPECT_EQ(experiment.collection().seed_episodes(), 3);
}

TEST(SetField, MakesTheMemberOfAOneof) {
  config::v1::Experiment experiment;
  ASSERT_OK(SetField(experiment, "planner.random={}"));
  ASSERT_OK(SetField(experiment, "planner.cem.horizon=5"));
  EXPECT_FALSE(experiment.planner().has_random());
  EXPECT_EQ(experiment.planner().cem().horizon(), 5);
}

TEST(SetField, ErrorsNameThePathAndLeaveTheExperimentAlone) {
  const config::v1::Experiment before = Experiment();
  config::v1::Experiment experiment = before;
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"learning", "expected path=value"},
      {"=3", "\"\" is no field of Experiment"},
      {"learning.batchsize=3", "learning.batchsize: \"batchsize\" is no field of Learning, expected one of schedule"},
      {"learning.batch_size=x", "learning.batch_size: \"x\" is not valid, expected int32"},
      {"learning.batch_size=1.5", "learning.batch_size: \"1.5\""},
      {"learning.batch_size=3000000000", "learning.batch_size: \"3000000000\""},
      {"learning.batch_size=3 4", "learning.batch_size: \"3 4\""},
      {"learning.batch_size=", "learning.batch_size: \"\""},
      {"learning.batch_size.x=3", "\"batch_size\" has no fields"},
      {"learning.batch_size[0]=3", "is not a list"},
      {"learning.schedule=NEVER", "\"NEVER\" is not valid, expected ALTERNATE, CONCURRENT"},
      {"learning=3", "learning: expected a field of it"},
      {"learning={x: 3}", "learning: line 1, column"},
      {"model.modalities.name=x", "is a list"},
      {"model.modalities[x].name=x", "expected an index"},
      {"model.modalities[-1].name=x", "expected an index"},
      {"model.modalities[0.name=x", "expected an index"},
      {"model.modalities[3].name=x", "modalities[3]: the list has 2 entries"},
      {"environment.task=\"open", "environment.task"},
  };
  for (const auto& [assignment, message] : cases) {
    EXPECT_THAT(SetField(experiment, assignment), Refuses(message)) << assignment;
    EXPECT_TRUE(google::protobuf::util::MessageDifferencer::Equals(experiment, before)) << assignment;
  }
}

TEST(LoadExperiment, AppliesAssignmentsInOrderAndValidates) {
  TempDir dir;
  const std::string path = dir / "e.textproto";
  ASSERT_OK(WriteFileAtomically(path, kExperiment));
  ASSERT_OK_AND_ASSIGN(const auto experiment, LoadExperiment(path, {"seed=3", "seed=4", "planner.cem.elites=200"}));
  EXPECT_EQ(experiment.seed(), 4);
  EXPECT_EQ(experiment.planner().cem().elites(), 200);
}

TEST(LoadExperiment, ErrorsNameTheFile) {
  TempDir dir;
  const std::string path = dir / "e.textproto";
  EXPECT_THAT(LoadExperiment(path), StatusIs(absl::StatusCode::kNotFound, HasSubstr(path)));
  ASSERT_OK(WriteFileAtomically(path, kExperiment));
  EXPECT_THAT(LoadExperiment(path, {"learning.batch_size=0"}),
              Refuses(path + ": learning.batch_size: 0 is out of range, expected 1 to 4096"));
  EXPECT_THAT(LoadExperiment(path, {"nothing=0"}), Refuses(path + ": nothing: "));
  ASSERT_OK(WriteFileAtomically(path, "name 3"));
  EXPECT_THAT(LoadExperiment(path), Refuses(path + ": line 1, column 6"));
}

// Calls `visit` with every scalar field reachable in `message`, having made the messages around it.
void VisitScalars(Message& message, const std::string& prefix,
                  const std::function<void(Message&, const FieldDescriptor*, const std::string&)>& visit) {
  const auto& reflection = *message.GetReflection();
  for (int i = 0; i < message.GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor* field = message.GetDescriptor()->field(i);
    const std::string path = prefix + field->name();
    if (field->is_repeated()) {
      ASSERT_EQ(field->cpp_type(), FieldDescriptor::CPPTYPE_MESSAGE) << "Validate expects lists of messages: " << path;
      VisitScalars(*reflection.AddMessage(&message, field), path + "[0].", visit);
      reflection.ClearField(&message, field);
    } else if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      VisitScalars(*reflection.MutableMessage(&message, field), path + ".", visit);
      reflection.ClearField(&message, field);
    } else {
      visit(message, field, path);
      reflection.ClearField(&message, field);
    }
  }
}

TEST(Validate, EveryNumberHasARangeAndEveryEnumRefusesUnspecified) {
  config::v1::Experiment experiment;
  int numbers = 0;
  VisitScalars(experiment, "", [&](Message& message, const FieldDescriptor* field, const std::string& path) {
    const auto& reflection = *message.GetReflection();
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_STRING:
      case FieldDescriptor::CPPTYPE_BOOL:
        return;
      case FieldDescriptor::CPPTYPE_ENUM:
        reflection.SetEnumValue(&message, field, 0);
        EXPECT_THAT(Validate(experiment), Refuses(path + ": " + field->enum_type()->value(0)->name()));
        return;
      case FieldDescriptor::CPPTYPE_INT32:
        reflection.SetInt32(&message, field, -1);
        break;
      case FieldDescriptor::CPPTYPE_INT64:
        reflection.SetInt64(&message, field, -1);
        break;
      case FieldDescriptor::CPPTYPE_FLOAT:
        for (float wrong : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
          reflection.SetFloat(&message, field, wrong);
          EXPECT_THAT(Validate(experiment), Refuses(path + ": "));
        }
        reflection.SetFloat(&message, field, -1);
        break;
      case FieldDescriptor::CPPTYPE_DOUBLE:
        for (double wrong : {std::nan(""), std::numeric_limits<double>::infinity()}) {
          reflection.SetDouble(&message, field, wrong);
          EXPECT_THAT(Validate(experiment), Refuses(path + ": "));
        }
        reflection.SetDouble(&message, field, -1);
        break;
      default:
        FAIL() << path << " has a type that Validate does not know";
    }
    ++numbers;
    if (path == "collection.early_end.reward_below") return;  // any finite number
    EXPECT_THAT(Validate(experiment), Refuses(path + ": -1 is out of range, expected "));
  });
  EXPECT_GT(numbers, 50);
}

TEST(Validate, BoundsAreAsDocumented) {
  const std::vector<std::tuple<std::string, std::string, std::string>> cases = {
      // path, accepted, refused
      {"learning.batch_size", "4096", "4097"},
      {"learning.sequence_length", "2", "1"},
      {"learning.learning_rate", "1e-9", "0"},
      {"learning.initial_updates", "0", "-1"},
      {"learning.mirror_bytes", "1048576", "1048575"},
      {"learning.rate_schedule.warm_up_updates", "0", "-1"},
      {"learning.rate_schedule.decay_updates", "1", "0"},
      {"learning.rate_schedule.final_fraction", "1", "1.5"},
      {"learning.weight_average_decay", "0.9999", "1.5"},
      {"learning.snapshot_every_seconds", "0.5", "0"},
      {"learning.max_updates", "1", "0"},
      {"replay.max_rows", "9223372036854775807", "0"},
      {"collection.exploration_noise", "10", "10.01"},
      {"collection.early_end.reward_below", "-1000", "inf"},
      {"collection.early_end.failed_rows", "1", "0"},
      {"environment.image_size", "128", "129"},
      {"environment.time_limit", "1000000", "1000001"},
      {"model.min_std", "0.0001", "0"},
      {"model.action.discrete.size", "2", "1"},
      {"model.modalities[0].image.bits", "8", "9"},
      {"model.modalities[1].vector.layers", "0", "17"},
      {"planner.cem.momentum", "0.5", "1.5"},
      {"planner.cem.discount", "0", "1.5"},
      {"planner.cem.early_stop_std", "0.5", "-1"},
      {"planner.icem.noise_beta", "10", "11"},
      {"planner.icem.candidates_decay", "1", "0.5"},
      {"planner.icem.kept_elites", "1", "1.5"},
      {"planner.icem.initial_std", "0.25", "0"},
      {"planner.mppi.temperature", "10", "0"},
      {"planner.mppi.min_std", "0", "-1"},
      {"planner.genetic.population", "2", "1"},
      {"planner.genetic.simulations", "1000", "1001"},
      {"planner.genetic.mutation_probability", "1", "1.5"},
      {"planner.random_shooting.candidates", "65536", "65537"},
      {"planner_service.max_delay_micros", "0", "1000001"},
      {"evaluation.every_episodes", "0", "-1"},
  };
  for (const auto& [path, accepted, refused] : cases) {
    config::v1::Experiment experiment = Experiment();
    ASSERT_OK(SetField(experiment, path + "=" + accepted));
    EXPECT_OK(Validate(experiment)) << path;
    ASSERT_OK(SetField(experiment, path + "=" + refused));
    EXPECT_THAT(Validate(experiment), Refuses(path + ": " + refused)) << path;
  }
}

TEST(Validate, FieldsMustFitEachOther) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"name=", "name: \"\" is refused"},
      {"name=a/b", "name: \"a/b\" is refused, expected 1 to 64 letters, digits or any of _-."},
      {"name=" + std::string(65, 'a'), "name: "},
      {"environment.task=", "environment.task: not set"},
      {"planner.cem.elites=201", "planner.cem.elites: 201 is out of range, expected 1 to the candidates, 200"},
      {"planner.cem={candidates: 99}", "planner.cem.elites: 100"},
      {"planner.cem.momentum=1", "planner.cem.momentum: 1 is out of range, expected below 1"},
      {"planner.icem.elites=41", "planner.icem.elites: 41 is out of range, expected 1 to the candidates, 40"},
      {"planner.icem.momentum=1", "planner.icem.momentum: 1 is out of range, expected below 1"},
      {"planner.mppi.elites=513", "planner.mppi.elites: 513 is out of range, expected 1 to the candidates, 512"},
      {"planner.mppi.proposals=513", "planner.mppi.proposals: 513 is out of range, expected 0 to the candidates, 512"},
      {"planner.mppi.min_std=3", "planner.mppi.min_std: 3 is out of range, expected 0 to max_std, 2"},
      {"learning.weight_average_decay=1", "learning.weight_average_decay: 1 is out of range, expected below 1"},
      {"learning.rate_schedule={shape: COSINE}",
       "learning.rate_schedule.decay_updates: not set, expected 1 to 1000000000 with COSINE"},
      {"learning.rate_schedule.shape=LINEAR", "expected 1 to 1000000000 with LINEAR"},
      {"planner_service.max_queue=15", "planner_service.max_queue: 15 is out of range, expected at least max_batch, 16"},
      {"model.action={}", "model.action: not set"},
      {"model.action.discrete={}", "model.action: not set"},
      {"model.modalities[0].image.height=48", "model.modalities[0].image.width: 64 is refused, expected the height, 48"},
      {"model.modalities[0].image.height=129", "model.modalities[0].image.height: 129 is out of range, expected 32 to 128"},
      {"environment.image_size=31", "environment.image_size: 31 is out of range, expected 32 to 128"},
      {"environment.tasks[0].name=a", "environment.task: \"cartpole_balance\" is set beside tasks"},
      {"environment={}", "environment.task: not set"},
      {"environment={tasks {}}", "environment.tasks[0].name: not set"},
      {"environment={tasks {name: \"a\"} tasks {name: \"a\"}}", "environment.tasks[1].name: \"a\" is used twice"},
      {"environment={tasks {name: \"a\" action_repeat: 0}}", "environment.tasks[0].action_repeat: 0 is out of range, expected 1 to 64"},
      {"model.modalities[0].image.height=32", "model.modalities[0].image.width: 64 is refused, expected the height, 32"},
      {"model.modalities[1].name=image", "model.modalities[1].name: \"image\" is used twice"},
      {"model.modalities[1].name=a.b", "model.modalities[1].name: \"a.b\""},
      {"model.modalities[1].name=", "model.modalities[1].name: \"\""},
      {"model.modalities[1].name=is_first", "model.modalities[1].name: \"is_first\""},
      {"model.modalities[1].vector={}", "model.modalities[1].vector.size: not set"},
      {"model.modalities[2].name=touch", "model.modalities[2]: no kind is set"},
      {"model={categorical {} posterior: POE}", "model.posterior: experts need a Gaussian state"},
      {"model={categorical {} latent: RNN}", "model.latent: RNN has no samples"},
      {"model.reward={output: TWO_HOT transform: TANH}", "model.reward.transform: TWO_HOT"},
      {"model.reward={output: TWO_HOT variance: SHARED}", "model.reward.variance: TWO_HOT"},
  };
  for (const auto& [assignment, message] : cases) {
    config::v1::Experiment experiment = Experiment();
    ASSERT_OK(SetField(experiment, assignment));
    EXPECT_THAT(Validate(experiment), Refuses(message)) << assignment;
  }
}

TEST(Validate, OnlyACompleteModelNeedsActionAndModalities) {
  config::v1::Model model;
  EXPECT_OK(Validate(model, false));
  EXPECT_THAT(Validate(model, true), Refuses("action: not set"));
  model.mutable_action()->mutable_continuous()->set_size(1);
  EXPECT_THAT(Validate(model, true), Refuses("modalities: empty"));
  model.set_hidden_size(0);
  EXPECT_THAT(Validate(model, false), StatusIs(absl::StatusCode::kInvalidArgument, StartsWith("hidden_size: 0")));
}

TEST(TaskEnvironments, TakeWhatTheTaskLeavesOpenFromTheEnvironment) {
  ASSERT_OK_AND_ASSIGN(const config::v1::Experiment several, ParseExperiment(
      "environment { action_repeat: 4 image_size: 32 time_limit: 100 "
      "tasks { name: 'a' } tasks { name: 'b' action_repeat: 2 time_limit: 50 } }"));
  const std::vector<config::v1::Environment> tasks = TaskEnvironments(several.environment());
  ASSERT_EQ(tasks.size(), 2);
  EXPECT_EQ(ToText(tasks[0]), "task: \"a\"\naction_repeat: 4\nimage_size: 32\ntime_limit: 100\n");
  EXPECT_EQ(ToText(tasks[1]), "task: \"b\"\naction_repeat: 2\nimage_size: 32\ntime_limit: 50\n");
  // Two episodes of 100 steps have 25 and 50 rows.
  EXPECT_DOUBLE_EQ(StepsPerRow(several.environment()), 200.0 / 75);
  EXPECT_EQ(TaskEnvironments(tasks[1]).size(), 1);
  EXPECT_DOUBLE_EQ(StepsPerRow(tasks[1]), 2);
}

TEST(Validate, PlannerAloneIsChecked) {
  config::v1::Planner planner;
  EXPECT_OK(Validate(planner));
  planner.mutable_cem()->set_candidates(10);
  EXPECT_THAT(Validate(planner), StatusIs(absl::StatusCode::kInvalidArgument, StartsWith("cem.elites: 100")));
  planner.mutable_random();
  EXPECT_OK(Validate(planner));
}

}  // namespace
}  // namespace orrery
