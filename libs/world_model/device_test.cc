// What computing on a device asks of the model, as far as it can be seen on the CPU.
#include <ATen/CPUGeneratorImpl.h>

#include "libs/base/status_matchers.h"
#include "libs/world_model/golden.h"
#include "libs/world_model/heads.h"

namespace orrery {
namespace {

using torch::Tensor;

torch::Generator Seeded(uint64_t seed) { return at::make_generator<at::CPUGeneratorImpl>(seed); }

TEST(ParameterVersions, StayUntilAParameterChanges) {
  const Golden golden = LoadGolden("planet_elu");
  const auto versions = golden.model->ParameterVersions();
  EXPECT_EQ(golden.model->ParameterVersions(), versions);
  {
    torch::NoGradGuard no_grad;
    golden.model->parameters().back().mul_(1);
  }
  const auto changed = golden.model->ParameterVersions();
  EXPECT_NE(changed, versions);
  golden.model->to(at::kDouble);
  EXPECT_NE(golden.model->ParameterVersions(), changed);
}

TEST(ParameterVersions, DifferBetweenModels) {
  const Golden one = LoadGolden("planet_elu"), other = LoadGolden("planet_elu");
  EXPECT_NE(one.model->ParameterVersions()[0], other.model->ParameterVersions()[0]);
}

// A model whose weights are bfloat16 is rolled out by the operations that CUDA takes.
TEST(ImaginedReturns, OfBfloat16WeightsAddUpInFloat32) {
  for (const char* more : {"", " layer_norm: true", " latent: SSM", " categorical { groups: 3 classes: 4 }"}) {
    constexpr char kModel[] =
        "deterministic_size: 24 stochastic_size: 6 hidden_size: 20 action { continuous { size: 2 } } "
        "modalities { name: 'v' vector { size: 3 } }";
    ASSERT_OK_AND_ASSIGN(const config::v1::Model config, ParseModel(std::string(kModel) + more));
    ASSERT_OK_AND_ASSIGN(const std::shared_ptr<WorldModel> model, WorldModel::Create(config, 1));
    torch::Generator g = Seeded(3);
    const LatentState start = model->InitialState(2);
    const Tensor actions = at::rand({5, 2, 40, 2}, g, at::kFloat) * 2 - 1;
    const Tensor noise = at::randn({5, 2, 40, model->stochastic_size()}, g, at::kFloat) * 0.1;
    const Tensor expected = model->ImaginedReturns(start, actions, noise, {.discount = 0.9});
    model->to(at::kBFloat16);
    const auto low = [](const Tensor& x) { return x.to(at::kBFloat16); };
    const LatentState low_start{low(start.deter), low(start.stoch)};
    const Tensor returns = model->ImaginedReturns(low_start, low(actions), noise, {.discount = 0.9});
    EXPECT_EQ(returns.scalar_type(), at::kFloat) << more;
    ASSERT_EQ(returns.sizes(), expected.sizes());
    // A class that is drawn otherwise changes all that follows: there only the whole is compared.
    const Tensor error = config.has_categorical() ? (returns.mean() - expected.mean()).abs() : (returns - expected).abs().max();
    EXPECT_LT(error.item<double>(), 0.05 * expected.abs().max().item<double>()) << more;
    EXPECT_GT(error.item<double>(), 0) << more;
  }
}

TEST(TwoHot, TakesTargetsOutsideAsTheOutermostBins) {
  const Tensor weights = TwoHot(at::tensor({-1e30f, 0.0f, 1e30f}));
  EXPECT_EQ(weights[0][0].item<float>(), 1);
  EXPECT_EQ(weights[1][127].item<float>(), 1);
  EXPECT_EQ(weights[2][254].item<float>(), 1);
  EXPECT_TRUE(at::equal(weights.sum(1), at::ones({3})));
}

}  // namespace
}  // namespace orrery
