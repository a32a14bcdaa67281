#include "libs/device/captured_step.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>

namespace orrery {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using torch::Tensor;

// Records by keeping the function, and replays by calling it. The first `failures` recordings fail.
class FakeGraph : public DeviceGraph {
 public:
  explicit FakeGraph(std::vector<std::string>* calls, int failures = 0) : calls_(calls), failures_(failures) {}

  void RunAside(const std::function<void()>& work) override {
    calls_->push_back("aside");
    work();
  }
  void Record(const std::function<void()>& work) override {
    calls_->push_back("record");
    TORCH_CHECK(failures_-- <= 0, "not now");
    work_ = work;
  }
  void Replay() override {
    calls_->push_back("replay");
    work_();
  }

 private:
  std::vector<std::string>* const calls_;
  int failures_;
  std::function<void()> work_;
};

// Adds its input to a total that stays where it is; gives twice the input and the total.
struct Adder {
  Tensor total = at::zeros({2});
  const void* read_from = nullptr;

  CapturedStep::Step step() {
    return [this](const std::vector<Tensor>& in) {
      const torch::NoGradGuard no_grad;
      read_from = in[0].const_data_ptr();
      total.add_(in[0]);
      return std::vector<Tensor>{in[0] * 2, total.clone()};
    };
  }
};

Tensor Pair(double value) { return at::full({2}, value); }

TEST(CapturedStep, CallsTheStepWhereNothingIsRecorded) {
  EXPECT_EQ(MakeDeviceGraph(torch::kCPU, {}), nullptr);
  Adder adder;
  CapturedStep step(torch::kCPU, adder.step(), nullptr);
  for (int i = 1; i <= 5; ++i) {
    const std::vector<Tensor> out = step.Run({Pair(1)});
    EXPECT_TRUE(at::equal(out[0], Pair(2)));
    EXPECT_TRUE(at::equal(out[1], Pair(i)));
  }
}

TEST(CapturedStep, WarmsUpRecordsOnceAndReplays) {
  Adder adder;
  std::vector<std::string> calls;
  CapturedStep step(torch::kCPU, adder.step(), std::make_unique<FakeGraph>(&calls));
  const void* read_from = nullptr;
  double total = 0;
  for (int i = 0; i < 5; ++i) {
    total += i;
    const std::vector<Tensor> out = step.Run({Pair(i)});
    EXPECT_TRUE(at::equal(out[0], Pair(2 * i))) << i;
    EXPECT_TRUE(at::equal(out[1], Pair(total))) << "done once at each run: " << i;
    if (i == 0) read_from = adder.read_from;
    EXPECT_EQ(adder.read_from, read_from) << "inputs must stay where they are";
  }
  EXPECT_THAT(calls, ElementsAre("aside", "aside", "record", "replay", "replay", "replay"));
}

TEST(CapturedStep, WorksInsideAndOutsideInferenceMode) {
  Adder adder;
  std::vector<std::string> calls;
  CapturedStep step(torch::kCPU, adder.step(), std::make_unique<FakeGraph>(&calls));
  for (int i = 0; i < 6; ++i) {
    const c10::InferenceMode mode(i % 2 == 0);
    EXPECT_TRUE(at::equal(step.Run({Pair(i)})[0], Pair(2 * i))) << i;
  }
}

TEST(CapturedStep, NamesAnInputThatDoesNotFit) {
  Adder adder;
  std::vector<std::string> calls;
  CapturedStep step(torch::kCPU, adder.step(), std::make_unique<FakeGraph>(&calls));
  step.Run({Pair(0)});
  const auto message = [&](const std::vector<Tensor>& inputs) {
    try {
      step.Run(inputs);
    } catch (const c10::Error& e) {
      return std::string(e.what_without_backtrace());
    }
    return std::string("none");
  };
  EXPECT_THAT(message({at::zeros({3})}), HasSubstr("input 0 of a captured step is Float [3]; expected Float [2]"));
  EXPECT_THAT(message({at::zeros({2}, at::kDouble)}), HasSubstr("is Double [2]; expected Float [2]"));
  EXPECT_THAT(message({}), HasSubstr("got 0 tensors; expected 1"));
  EXPECT_TRUE(at::equal(step.Run({Pair(1)})[0], Pair(2)));
  EXPECT_THAT(calls, ElementsAre("aside", "aside"));
}

TEST(CapturedStep, RecordsAtTheNextRunAfterAFailure) {
  Adder adder;
  std::vector<std::string> calls;
  CapturedStep step(torch::kCPU, adder.step(), std::make_unique<FakeGraph>(&calls, /*failures=*/1));
  for (int i = 0; i < CapturedStep::kWarmUps; ++i) step.Run({Pair(1)});
  EXPECT_THROW(step.Run({Pair(1)}), c10::Error);
  EXPECT_TRUE(at::equal(step.Run({Pair(2)})[1], Pair(4))) << "the run that failed did nothing";
  EXPECT_THAT(calls, ElementsAre("aside", "aside", "record", "record", "replay"));
}

}  // namespace
}  // namespace orrery
