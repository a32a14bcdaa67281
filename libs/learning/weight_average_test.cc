#include "libs/learning/weight_average.h"

#include <utility>
#include <vector>

#include "libs/base/status_matchers.h"
#include "libs/learning/learning_testing.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

class WeightAverageTest : public ::testing::Test {
 protected:
  static std::shared_ptr<WorldModel> MakeModel(uint64_t seed) {
    return WorldModel::Create(SmallModel(/*with_image=*/true), seed).value();
  }
  void Fill(double value) {
    const torch::NoGradGuard no_grad;
    for (torch::Tensor& parameter : model_->parameters()) parameter.fill_(value);
  }
  // Every weight of the mean is `value`.
  static void ExpectAll(const WorldModel& mean, double value) {
    for (const auto& parameter : mean.named_parameters()) {
      const torch::Tensor expected = torch::full_like(parameter.value().detach(), value);
      EXPECT_TRUE(torch::allclose(parameter.value(), expected, 1e-6, 1e-7)) << parameter.key() << " " << value;
    }
  }

  const std::shared_ptr<WorldModel> model_ = MakeModel(1);
};

TEST_F(WeightAverageTest, BeginsAsTheModel) {
  const WeightAverage average(model_, MakeModel(2), 0.9);
  const auto expected = model_->named_parameters();
  for (const auto& parameter : average.model().named_parameters()) {
    EXPECT_TRUE(torch::equal(parameter.value(), expected[parameter.key()])) << parameter.key();
  }
}

TEST_F(WeightAverageTest, IsTheWeightedMeanThatOneComputesByHand) {
  struct Case {
    double decay;
    std::vector<double> means;  // after weights of 1, 2, 4 and -3
  };
  for (const Case& c : std::vector<Case>{
           {0, {1, 2, 4, -3}},
           // (0.5 + 2) / 1.5; (0.25 + 1 + 4) / 1.75; (0.125 + 0.5 + 2 - 3) / 1.875
           {0.5, {1, 1.6666667, 3, -0.2}},
           // (0.9 + 2) / 1.9; (0.81 + 1.8 + 4) / 2.71; (0.729 + 1.62 + 3.6 - 3) / 3.439
           {0.9, {1, 1.5263158, 2.4391144, 0.8575167}}}) {
    Fill(77);  // initial weights, which do not count
    WeightAverage average(model_, MakeModel(2), c.decay);
    int64_t update = 0;
    for (const double weight : {1, 2, 4, -3}) {
      Fill(weight);
      average.Add(++update);
      ExpectAll(average.model(), c.means[update - 1]);
    }
  }
}

TEST_F(WeightAverageTest, GoesOnAfterRestoreBitForBit) {
  WeightAverage straight(model_, MakeModel(2), 0.7), resumed(model_, MakeModel(3), 0.7);
  Fill(0.1);
  straight.Add(1);
  Fill(0.7);
  straight.Add(2);
  const TensorMap state = straight.State();
  ASSERT_OK(resumed.Check(state));
  resumed.Restore(state);
  Fill(-1.3);
  straight.Add(3);
  resumed.Add(3);
  const TensorMap a = straight.State(), b = resumed.State();
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [name, tensor] : a) EXPECT_TRUE(torch::equal(tensor, b.at(name))) << name;
}

TEST_F(WeightAverageTest, RefusesAStateThatDoesNotFit) {
  const WeightAverage average(model_, MakeModel(2), 0.7);
  const TensorMap good = average.State();
  EXPECT_OK(average.Check(good));
  const std::string name = good.begin()->first;
  TensorMap state = good;
  state.erase(name);
  EXPECT_THAT(average.Check(state), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(name + " is missing")));
  state[name] = torch::zeros({1, 2, 3});
  EXPECT_THAT(average.Check(state), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(name + " is Float [1, 2, 3]")));
}

}  // namespace
}  // namespace orrery
