#include "libs/learning/trainer.h"

#include "libs/base/status_matchers.h"
#include "libs/learning/learning_testing.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

StoredBatch MakeStored() {
  StoredBatch batch;
  batch.observations["joints"] = torch::zeros({4, 2, kTestVector});
  batch.action = torch::zeros({4, 2, kTestActions});
  batch.reward = torch::zeros({4, 2});
  batch.is_first = torch::zeros({4, 2}, torch::kByte);
  return batch;
}

TEST(Trainer, NamesWhatABatchLacks) {
  config::v1::Model model = SmallModel(/*with_image=*/false);
  model.mutable_continue_head();
  ASSERT_OK_AND_ASSIGN(const auto trainer, Trainer::Create(model, config::v1::Learning(), 1, torch::kCPU, 1));
  const auto refused = [&](const StoredBatch& batch, const std::string& message) {
    EXPECT_THAT(trainer->Update(batch), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  };
  StoredBatch batch = MakeStored();
  refused(batch, "the batch has no is_terminal");
  batch.is_terminal = torch::zeros({4, 2}, torch::kByte);
  EXPECT_OK(trainer->Update(batch));
  StoredBatch blind = batch;
  blind.observations.clear();
  refused(blind, "the batch has no modality \"joints\"");
  StoredBatch still = batch;
  still.action = torch::Tensor();
  refused(still, "the batch has no action");
}

}  // namespace
}  // namespace orrery
