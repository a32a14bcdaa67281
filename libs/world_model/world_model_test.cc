#include "libs/world_model/world_model.h"

#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <latch>
#include <map>
#include <mutex>
#include <numbers>
#include <set>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/world_model/golden.h"
#include "libs/world_model/imagine.h"
#include "libs/world_model/parallel_rows.h"
#include "libs/world_model/rollout.h"
#include "libs/world_model/transposed_conv.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;
using torch::Tensor;

config::v1::Model Parse(const std::string& text) {
  auto model = ParseModel(text);
  EXPECT_OK(model);
  return *model;
}

// Two modalities, image at 32×32.
config::v1::Model SmallConfig(const std::string& more = "") {
  return Parse(
      "deterministic_size: 5 stochastic_size: 3 hidden_size: 4 activation: ELU conv_activation: TANH "
      "action { continuous { size: 2 } } modalities { name: 'vector' vector { size: 4 layers: 2 hidden_size: 3 } } "
      "modalities { name: 'image' image { channels: 1 height: 32 width: 32 depth: 1 scale: 0.03125 } } "
      "reward { layers: 1 hidden_size: 4 } objective { free_nats: 0 " +
      more + " }");
}

std::shared_ptr<WorldModel> Make(const config::v1::Model& config, uint64_t seed = 1) {
  auto model = WorldModel::Create(config, seed);
  EXPECT_OK(model);
  return *model;
}

torch::Generator Seeded(uint64_t seed) { return at::make_generator<at::CPUGeneratorImpl>(seed); }

Batch RandomBatch(const config::v1::Model& config, int64_t t, int64_t b, at::ScalarType type = at::kFloat) {
  torch::Generator g = Seeded(7);
  const auto draw = [&](at::IntArrayRef shape) { return at::randn(shape, g, at::TensorOptions(type)); };
  Batch batch;
  for (const auto& m : config.modalities()) {
    batch.observations[m.name()] =
        m.has_image() ? draw({t, b, m.image().channels(), m.image().height(), m.image().width()}) * 0.3
                      : draw({t, b, m.vector().size()});
  }
  batch.action = draw({t, b, ActionSize(config)});
  batch.reward = draw({t, b});
  batch.is_first = at::zeros({t, b}, at::kByte);
  batch.is_first[0][0] = 1;
  batch.is_first[t / 2][b - 1] = 1;
  return batch;
}

class GoldenTest : public ::testing::TestWithParam<std::string> {};

TEST_P(GoldenTest, OutputsAndLossesMatch) {
  const Golden golden = LoadGolden(GetParam());
  torch::NoGradGuard no_grad;
  const LossOutputs o = golden.model->Loss(golden.batch(), golden.noise(), /*with_overshooting=*/true);
  const std::map<std::string, Tensor> actual = {
      {"deter", o.deter},           {"stoch", o.stoch},
      {"prior_mean", o.prior_mean}, {"prior_std", o.prior_std},
      {"post_mean", o.post_mean},   {"post_std", o.post_std},
      {"embed", o.embed},           {"recon", o.recon.at("image")},
      {"reward_mean", o.reward_mean}, {"kl", o.kl},
      {"loss_observation", o.loss_observation}, {"loss_reward", o.loss_reward},
      {"loss_kl", o.loss_kl},       {"loss_overshooting", o.loss_overshooting},
      {"loss_total", o.loss_total}};
  for (const auto& [name, tensor] : golden.file.tensors) {
    if (!absl::StartsWith(name, "expect/") || absl::StartsWith(name, "expect/plan")) continue;
    const std::string key = name.substr(7);
    ASSERT_TRUE(actual.count(key)) << key;
    EXPECT_TRUE(Near(actual.at(key), tensor)) << key;
  }
}

void ExpectGradients(const Golden& golden, const Tensor& loss, const std::string& prefix) {
  const auto parameters = golden.model->named_parameters();
  const auto gradients = torch::autograd::grad({loss}, parameters.values(), {}, true, false, /*allow_unused=*/true);
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto expected = golden.file.tensors.find(prefix + parameters[i].key());
    if (expected == golden.file.tensors.end()) {
      EXPECT_FALSE(gradients[i].defined()) << parameters[i].key();
    } else {
      EXPECT_TRUE(Near(gradients[i], expected->second)) << parameters[i].key();
    }
  }
}

TEST_P(GoldenTest, EveryGradientMatches) {
  const Golden golden = LoadGolden(GetParam());
  const LossOutputs o = golden.model->Loss(golden.batch(), golden.noise(), /*with_overshooting=*/true);
  ExpectGradients(golden, o.loss_total, "expect_grad/");
  ExpectGradients(golden, o.loss_overshooting, "expect_grad_overshooting/");
}

INSTANTIATE_TEST_SUITE_P(Oracle, GoldenTest, ::testing::Values("planet", "planet_elu"));

TEST(WorldModel, HasTheParametersOfTheDocumentation) {
  const auto model = Make(SmallConfig());
  std::vector<std::string> names;
  for (const auto& p : model->named_parameters())
    if (absl::EndsWith(p.key(), "weight") || absl::StrContains(p.key(), "gru")) names.push_back(p.key());
  EXPECT_THAT(names, ::testing::UnorderedElementsAre(
                         "encoder.image.conv1.weight", "encoder.image.conv2.weight", "encoder.image.conv3.weight",
                         "encoder.vector.fc1.weight", "encoder.vector.fc2.weight", "decoder.image.input.weight",
                         "decoder.image.deconv1.weight", "decoder.image.deconv2.weight", "decoder.image.deconv3.weight",
                         "decoder.vector.fc1.weight", "decoder.vector.fc2.weight", "decoder.vector.out.weight",
                         "rssm.input.weight", "rssm.gru.weight_ih", "rssm.gru.weight_hh", "rssm.gru.bias_ih",
                         "rssm.gru.bias_hh", "rssm.prior.hidden.weight", "rssm.prior.out.weight",
                         "rssm.posterior.hidden.weight", "rssm.posterior.out.weight", "reward.fc1.weight",
                         "reward.out.weight"));
  const auto parameters = model->named_parameters();
  EXPECT_EQ(parameters["decoder.image.input.weight"].sizes(), (at::IntArrayRef{16, 8}));
  EXPECT_EQ(parameters["decoder.image.deconv2.weight"].sizes(), (at::IntArrayRef{2, 1, 6, 6}));
  EXPECT_EQ(parameters["rssm.posterior.hidden.weight"].sizes(), (at::IntArrayRef{4, 5 + 16 + 3}));
}

// Layers and embeddings counted by hand; the decoder gives the picture its size back.
TEST(WorldModel, PicturesMayHaveOtherSizes) {
  struct Case {
    int side, layers, embedding, first_kernel;
  };
  for (const Case& c : {Case{32, 3, 4 * 2 * 2, 5}, {48, 4, 8, 3}, {64, 4, 8 * 2 * 2, 5}, {65, 4, 8 * 2 * 2, 5}, {84, 4, 8 * 3 * 3, 7},
                        {96, 5, 16, 3}, {128, 5, 16 * 2 * 2, 5}}) {
    config::v1::Model config = SmallConfig();
    config.mutable_modalities(1)->mutable_image()->set_height(c.side);
    config.mutable_modalities(1)->mutable_image()->set_width(c.side);
    const auto model = Make(config);
    const auto parameters = model->named_parameters();
    EXPECT_TRUE(parameters.contains(absl::StrCat("encoder.image.conv", c.layers, ".weight"))) << c.side;
    EXPECT_FALSE(parameters.contains(absl::StrCat("encoder.image.conv", c.layers + 1, ".weight"))) << c.side;
    EXPECT_EQ(parameters["decoder.image.input.weight"].sizes(), (at::IntArrayRef{c.embedding, 8})) << c.side;
    EXPECT_EQ(parameters["decoder.image.deconv1.weight"].size(2), c.first_kernel) << c.side;
    torch::Generator g = Seeded(3);
    const LossOutputs o = model->Loss(RandomBatch(config, 3, 2), model->DrawNoise(3, 2, g, false), false);
    EXPECT_EQ(o.embed.size(-1), c.embedding + 3) << c.side;
    EXPECT_EQ(o.recon.at("image").sizes(), (at::IntArrayRef{3, 2, 1, c.side, c.side}));
    o.loss_total.backward();
    for (const auto& p : parameters) EXPECT_TRUE(p.value().grad().defined() && p.value().grad().isfinite().all().item<bool>()) << p.key();
  }
}

TEST(WorldModel, InitialisesFromTheSeedAlone) {
  torch::manual_seed(3);
  const Tensor before = at::rand({4});
  torch::manual_seed(3);
  const auto a = Make(SmallConfig(), 1), b = Make(SmallConfig(), 1), c = Make(SmallConfig(), 2);
  EXPECT_TRUE(at::equal(before, at::rand({4}))) << "the global generator was used";
  for (const auto& p : a->named_parameters()) {
    EXPECT_TRUE(at::equal(p.value(), b->named_parameters()[p.key()]));
    EXPECT_FALSE(at::equal(p.value(), c->named_parameters()[p.key()])) << p.key();
  }
  EXPECT_EQ(a->StructureHash(), c->StructureHash());
  config::v1::Model other = SmallConfig();
  other.set_deterministic_size(6);
  EXPECT_NE(a->StructureHash(), Make(other)->StructureHash());
}

TEST(WorldModel, InitialisesInTorchsRange) {
  const auto parameters = Make(SmallConfig())->named_parameters();
  const auto largest = [&](const std::string& name) { return parameters[name].abs().max().item<double>(); };
  EXPECT_LE(largest("encoder.image.conv2.weight"), 1 / std::sqrt(16.0));
  EXPECT_GE(largest("encoder.image.conv2.weight"), 0.7 / std::sqrt(16.0));
  EXPECT_LE(largest("rssm.gru.weight_ih"), 1 / std::sqrt(5.0));
  EXPECT_LE(largest("decoder.image.deconv3.bias"), 1 / std::sqrt(36.0));
}

TEST(WorldModel, RefusesAModelWithoutModalities) {
  EXPECT_THAT(WorldModel::Create(Parse("action { continuous { size: 2 } }"), 0),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("modalities")));
}

// The sequence operation against the step-by-step interface that acting uses.
class ActivationTest : public ::testing::TestWithParam<config::v1::Model::Activation> {};

TEST_P(ActivationTest, LossFollowsTheStepByStepModel) {
  config::v1::Model config = SmallConfig("free_nats_rule: AVERAGED kl_scale: 0.75 reward_scale: 2");
  config.set_activation(GetParam());
  const auto model = Make(config);
  model->to(at::kDouble);
  const Batch batch = RandomBatch(config, 5, 3, at::kDouble);
  const LossNoise noise{at::randn({5, 3, 3}, at::kDouble), {}};
  const LossOutputs o = model->Loss(batch, noise, false);

  LatentState state = model->InitialState(3);
  Tensor kl_sum = at::zeros({}, at::kDouble), loss = at::zeros({}, at::kDouble);
  for (int t = 0; t < 5; ++t) {
    const Tensor keep = (1 - batch.is_first[t].to(at::kDouble)).unsqueeze(-1);
    TensorMap row;
    for (const auto& [name, x] : batch.observations) row[name] = x[t];
    const Predicted predicted = model->Predict({state.deter * keep, state.stoch * keep}, batch.action[t] * keep);
    const LatentDistribution p = predicted.prior, q = model->Posterior(predicted, model->Encode(row));
    state = {predicted.deter, q.mean + q.std * noise.posterior[t]};
    EXPECT_TRUE(Near(o.deter[t], state.deter, 1e-12));
    EXPECT_TRUE(Near(o.stoch[t], state.stoch, 1e-12));
    kl_sum = kl_sum + ((p.std / q.std).log() + (q.std.square() + (q.mean - p.mean).square()) / (2 * p.std.square()) - 0.5).sum();
    const TensorMap recon = model->Decode(state);
    loss = loss + 0.5 * 0.03125 * (recon.at("image") - batch.observations.at("image")[t]).square().sum() / 15 +
           0.5 * (recon.at("vector") - batch.observations.at("vector")[t]).square().sum() / 15 +
           (model->Reward(state) - batch.reward[t]).square().sum() / 15;  // 2 · ½
  }
  loss = loss + 0.75 * (kl_sum / 15).clamp_min(0);
  EXPECT_TRUE(Near(o.loss_total, loss, 1e-10));
  const auto parameters = model->parameters();
  const auto actual = torch::autograd::grad({o.loss_total}, parameters), expected = torch::autograd::grad({loss}, parameters);
  for (size_t i = 0; i < parameters.size(); ++i) EXPECT_TRUE(Near(actual[i], expected[i], 1e-8)) << i;
}

INSTANTIATE_TEST_SUITE_P(All, ActivationTest,
                         ::testing::Values(config::v1::Model::RELU, config::v1::Model::ELU, config::v1::Model::TANH,
                                           config::v1::Model::SILU));

// In a single row the prior does not know the posterior: its parameters feel only the dynamics weight, the posterior's only
// the representation weight.
TEST(WorldModel, BalancedDivergenceWeighsPriorAndPosteriorApart) {
  const config::v1::Model plain = SmallConfig();
  config::v1::Model balanced = plain;
  balanced.mutable_objective()->mutable_kl_balance()->set_dynamics(0.5);
  balanced.mutable_objective()->mutable_kl_balance()->set_representation(0.25);
  const Batch batch = RandomBatch(plain, 1, 2, at::kDouble);
  const LossNoise noise{at::randn({1, 2, 3}, at::kDouble), {}};
  const std::vector<std::pair<std::string, double>> weights = {
      {"rssm.prior.out.weight", 0.5}, {"rssm.posterior.out.weight", 0.25}, {"encoder.image.conv1.weight", 0.25}};
  const auto a = Make(plain), b = Make(balanced);  // from one seed: the same parameters
  a->to(at::kDouble);
  b->to(at::kDouble);
  const Tensor expected = a->Loss(batch, noise, false).loss_kl, actual = b->Loss(batch, noise, false).loss_kl;
  EXPECT_NEAR(actual.item<double>(), 0.75 * expected.item<double>(), 1e-12);
  for (const auto& [name, weight] : weights) {
    const auto gradient = [&name = name](const auto& model, const Tensor& loss) {
      return torch::autograd::grad({loss}, {model->named_parameters()[name]}, {}, /*retain_graph=*/true)[0];
    };
    EXPECT_GT(gradient(a, expected).abs().max().template item<double>(), 0) << name;
    EXPECT_TRUE(Near(gradient(b, actual), weight * gradient(a, expected), 1e-12)) << name;
  }
}

// Slices on several threads: the same loss and gradients, and the same bits for every number of threads.
TEST(WorldModel, ThreadsShareTheConvolutions) {
  const config::v1::Model config = SmallConfig();
  const Batch batch = RandomBatch(config, 12, 9, at::kFloat);
  const LossNoise noise{at::randn({12, 9, 3}), {}};
  const auto gradients = [&](int threads) {
    const auto model = Make(config);
    if (threads > 0) model->UseWorkers(std::make_shared<RowWorkers>(threads));
    const LossOutputs o = model->Loss(batch, noise, false);
    auto result = torch::autograd::grad({o.loss_total}, model->parameters());
    result.push_back(o.loss_total.detach());
    result.push_back(o.recon.at("image").detach());
    return result;
  };
  const auto whole = gradients(0), one = gradients(1), three = gradients(3);
  for (size_t i = 0; i < whole.size(); ++i) {
    EXPECT_TRUE(Near(one[i], whole[i], 1e-5 * (1 + whole[i].abs().max().item<double>()))) << i;
    EXPECT_TRUE(at::equal(one[i], three[i])) << i;
  }
}

// An exception in a slice reaches the caller, and the workers go on.
TEST(WorldModel, ASliceThatFailsIsReported) {
  RowWorkers workers(3);
  const Tensor x = at::ones({64, 2});
  EXPECT_THROW(ParallelRows(workers, [](const Tensor& rows) { return rows.mm(at::ones({3, 1})); }, x, {}), c10::Error);
  EXPECT_TRUE(at::equal(ParallelRows(workers, [](const Tensor& rows) { return rows.sum(1); }, x, {}), x.sum(1)));
}

// OpenMP's own default is one thread a processor, also on a machine with one.
TEST(WorldModel, WorkersHaveTheThreadsOfLibTorchThatWereSet) {
  const int before = at::get_num_threads();
  at::set_num_threads(5);
  RowWorkers workers(3);
  std::mutex mu;
  std::map<std::thread::id, int> threads;
  std::latch all(3);
  workers.Run(3, [&](int64_t) {
    all.arrive_and_wait();  // one task to each thread
    const std::lock_guard lock(mu);
    threads[std::this_thread::get_id()] = OpenMpThreads();
  });
  at::set_num_threads(before);
  ASSERT_EQ(threads.size(), 3u);
  for (const auto& [id, count] : threads) EXPECT_EQ(count, 5);
}

// A task may itself ask for the workers: within Run they are busy with others, and of RunWhole's last ones all help.
TEST(WorldModel, WorkersAreSharedByTasksWithinTasks) {
  RowWorkers workers(3);
  for (const int64_t tasks : {0, 1, 2, 3, 7}) {
    std::vector<std::atomic<int>> done(tasks);
    std::vector<std::set<std::thread::id>> helpers(tasks);
    workers.RunWhole(tasks, [&](int64_t i) {
      std::mutex mu;
      std::atomic<int> parts = 0;
      std::latch all(3);
      workers.Run(3, [&](int64_t) {
        ++parts;
        if (i >= tasks / 3 * 3) all.arrive_and_wait();  // all three threads are there
        const std::lock_guard lock(mu);
        helpers[i].insert(std::this_thread::get_id());
      });
      EXPECT_EQ(parts, 3);
      ++done[i];
    });
    for (int64_t i = 0; i < tasks; ++i) {
      EXPECT_EQ(done[i], 1) << i << " of " << tasks;
      EXPECT_EQ(helpers[i].size(), i < tasks / 3 * 3 ? 1u : 3u) << i << " of " << tasks;
    }
  }
}

// Every kernel against LibTorch's operations in double precision, with sizes that fill neither vectors nor tiles; and a
// changed parameter is noticed.
TEST_P(ActivationTest, RolloutKernelsGiveTheReturnsOfTheModel) {
  config::v1::Model config = SmallConfig();
  config.set_activation(GetParam());
  config.mutable_reward()->set_layers(2);
  config.set_deterministic_size(19);
  config.set_hidden_size(30);
  config.set_stochastic_size(7);
  const auto model = Make(config), reference = Make(config);
  reference->to(at::kDouble);
  const int64_t h = 6, n = 2, j = 45;
  const LatentState start{at::randn({n, 19}), at::randn({n, 7})};
  const Tensor actions = at::rand({h, n, j, 2}) * 2 - 1, noise = at::randn({h, n, j, 7});
  const auto expected = [&] {
    return reference->ImaginedReturns({start.deter.to(at::kDouble), start.stoch.to(at::kDouble)}, actions.to(at::kDouble),
                                      noise.to(at::kDouble));
  };
  EXPECT_TRUE(Near(model->ImaginedReturns(start, actions, noise).to(at::kDouble), expected(), 2e-6));
  for (const RolloutKernel& kernel : RolloutKernels()) {
    Tensor returns = at::zeros({n, j});
    Roll(kernel, model->PackForRollouts(kernel)->model,
         {.horizon = h, .agents = n, .candidates = j, .deter = start.deter.const_data_ptr<float>(),
          .stoch = start.stoch.const_data_ptr<float>(), .actions = actions.const_data_ptr<float>(),
          .noise = noise.const_data_ptr<float>(), .returns = returns.mutable_data_ptr<float>()},
         /*workers=*/nullptr);
    EXPECT_TRUE(Near(returns.to(at::kDouble), expected(), kernel.pair == 1 ? 2e-6 : 2e-2)) << kernel.name;
  }
  torch::NoGradGuard no_grad;
  model->named_parameters()["reward.out.bias"].add_(0.5);
  reference->named_parameters()["reward.out.bias"].add_(0.5);
  EXPECT_TRUE(Near(model->ImaginedReturns(start, actions, noise).to(at::kDouble), expected(), 2e-6));
  // What is not a number stays so, for that candidate alone.
  Tensor broken = actions.clone();
  broken[1][0][3][0] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(model->ImaginedReturns(start, broken, noise).isnan().sum().item<int64_t>(), 1);
}

// Threefry-4x32 with 20 rounds, written down from the paper (Salmon et al. 2011) word by word.
std::array<uint32_t, 4> Threefry(std::array<uint32_t, 4> x, const std::array<uint32_t, 4>& key) {
  const int rotations[8][2] = {{10, 26}, {11, 21}, {13, 27}, {23, 5}, {6, 20}, {17, 11}, {25, 10}, {18, 20}};
  const uint32_t keys[5] = {key[0], key[1], key[2], key[3], 0x1bd11bda ^ key[0] ^ key[1] ^ key[2] ^ key[3]};
  for (size_t i = 0; i < 4; ++i) x[i] += keys[i];
  for (uint32_t round = 0; round < 20; ++round) {
    const size_t a = round % 2 == 0 ? 1 : 3, b = 4 - a;
    x[0] += x[a];
    x[a] = std::rotl(x[a], rotations[round % 8][0]) ^ x[0];
    x[2] += x[b];
    x[b] = std::rotl(x[b], rotations[round % 8][1]) ^ x[2];
    if (round % 4 != 3) continue;
    const uint32_t group = round / 4 + 1;
    for (size_t i = 0; i < 4; ++i) x[i] += keys[(group + i) % 5];
    x[3] += group;
  }
  return x;
}

// Number `k` of the normals of a candidate at a step, in double precision.
double ExpectedNormal(uint64_t seed, uint32_t draw, uint32_t candidate, uint32_t step, uint32_t k) {
  const auto words = Threefry({candidate, step, k / 4, draw}, {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), 0, 0});
  const uint32_t u = words[k % 4 / 2 * 2] >> 8, v = words[k % 4 / 2 * 2 + 1] >> 8;
  const double radius = std::sqrt(-2 * std::log(std::ldexp(u + 1.0, -24))), angle = 2 * std::numbers::pi * std::ldexp(v, -24);
  return radius * (k % 2 == 0 ? std::cos(angle) : std::sin(angle));
}

// The expected words are Random123's known answers for threefry4x32 with 20 rounds.
TEST(RolloutKernels, DrawTheNormalsOfThreefry) {
  using Words = std::array<uint32_t, 4>;
  EXPECT_EQ(Threefry({}, {}), (Words{0x9c6ca96a, 0xe17eae66, 0xfc10ecd4, 0x5256a7d8}));
  const uint32_t ones = 0xffffffff;
  EXPECT_EQ(Threefry({ones, ones, ones, ones}, {ones, ones, ones, ones}),
            (Words{0x2a881696, 0x57012287, 0xf6c7446e, 0xa16a6732}));
  const int64_t count = 7;
  const uint64_t seed = 0x0123456789abcdef;
  for (const RolloutKernel& kernel : RolloutKernels()) {
    double sum = 0, squares = 0;
    const int64_t blocks = 200;
    for (int64_t block = 0; block < blocks; ++block) {
      std::vector<float> drawn(static_cast<size_t>(count * kernel.rows));
      kernel.draw_normals(seed, /*draw=*/3, block * kernel.rows, /*step=*/11, count, drawn.data());
      for (int64_t i = 0; i < std::ssize(drawn); ++i) {
        const auto candidate = static_cast<uint32_t>(block * kernel.rows + i % kernel.rows);
        const double expected = ExpectedNormal(seed, 3, candidate, 11, static_cast<uint32_t>(i / kernel.rows));
        ASSERT_NEAR(drawn[static_cast<size_t>(i)], expected, 2e-6) << kernel.name << " candidate " << candidate;
        sum += expected;
        squares += expected * expected;
      }
    }
    // Of so many normals, within five standard deviations.
    const double n = static_cast<double>(blocks * count * kernel.rows);
    EXPECT_NEAR(sum / n, 0, 5 / std::sqrt(n));
    EXPECT_NEAR(squares / n, 1, 5 * std::sqrt(2 / n));
  }
}

// What is drawn on the way is what one would have given, whatever else is computed beside it.
TEST(WorldModel, ReturnsWithDrawnNoiseAreThoseWithTheSameNoiseGiven) {
  const auto model = Make(SmallConfig());
  ASSERT_TRUE(model->DrawsNoise());
  config::v1::Model normalised = SmallConfig();
  normalised.set_layer_norm(true);
  EXPECT_FALSE(Make(normalised)->DrawsNoise());
  const int64_t h = 4, j = 37, s = model->stochastic_size();
  const LatentState start{at::randn({2, model->deterministic_size()}), at::randn({2, s})};
  const Tensor actions = at::rand({h, 2, j, 2}) * 2 - 1;
  const std::vector<uint64_t> seeds = {5, uint64_t{6} << 40};
  const uint32_t draw = 9;
  Tensor noise = at::empty({h, 2, j, s});
  auto given = noise.accessor<float, 4>();
  for (int64_t t = 0; t < h; ++t)
    for (int64_t n = 0; n < 2; ++n)
      for (int64_t c = 0; c < j; ++c)
        for (int64_t k = 0; k < s; ++k)
          given[t][n][c][k] = static_cast<float>(ExpectedNormal(seeds[static_cast<size_t>(n)], draw, static_cast<uint32_t>(c),
                                                                static_cast<uint32_t>(t), static_cast<uint32_t>(k)));
  const Tensor together = model->ImaginedReturns(start, actions, SeededNoise{seeds, draw});
  EXPECT_TRUE(Near(together, model->ImaginedReturns(start, actions, noise), 1e-5));
  const Tensor alone = model->ImaginedReturns({start.deter.narrow(0, 1, 1), start.stoch.narrow(0, 1, 1)}, actions.narrow(1, 1, 1),
                                              SeededNoise{{&seeds[1], 1}, draw});
  EXPECT_TRUE(at::equal(alone, together.narrow(0, 1, 1)));
}

// Without overshooting: its targets are constants of the loss, which differences of the loss do not know.
TEST(WorldModel, GradientsAreFiniteDifferences) {
  const auto model = Make(SmallConfig());
  model->to(at::kDouble);
  const Batch batch = RandomBatch(model->config(), 4, 2, at::kDouble);
  const LossNoise noise{at::randn({4, 2, 3}, at::kDouble), {}};
  ExpectFiniteDifferences(model->named_parameters(), [&] { return model->Loss(batch, noise, false).loss_total; });
}

TEST(WorldModel, TotalHoldsOvershootingAtItsScale) {
  const auto model = Make(SmallConfig("overshooting { distance: 3 scale: 0.5 }"));
  torch::NoGradGuard no_grad;
  const Batch batch = RandomBatch(model->config(), 5, 2);
  torch::Generator g = Seeded(1);
  const LossOutputs o = model->Loss(batch, model->DrawNoise(5, 2, g, false), false);
  ASSERT_TRUE(o.loss_overshooting.defined());
  EXPECT_GT(o.loss_overshooting.item<float>(), 0);
  EXPECT_TRUE(Near(o.loss_total, o.loss_observation + 10 * o.loss_reward + o.loss_kl + 0.5 * o.loss_overshooting, 1e-6));
}

TEST(WorldModel, OvershootingDistanceIsClampedToTheSequence) {
  const auto far = Make(SmallConfig("overshooting { distance: 9 }")), near = Make(SmallConfig("overshooting { distance: 2 }"));
  torch::NoGradGuard no_grad;
  const Batch batch = RandomBatch(far->config(), 3, 2);
  torch::Generator g = Seeded(1);
  const LossNoise noise = far->DrawNoise(3, 2, g, true);
  EXPECT_EQ(noise.overshooting.sizes(), (at::IntArrayRef{10, 3, 2, 3}));
  EXPECT_TRUE(at::equal(far->Loss(batch, noise, true).loss_overshooting, near->Loss(batch, noise, true).loss_overshooting));
  const Batch two = RandomBatch(far->config(), 2, 2);
  EXPECT_EQ(far->Loss(two, far->DrawNoise(2, 2, g, true), true).loss_overshooting.item<float>(), 0);
}

// Whatever happened before a reset must not reach what comes after it.
TEST(WorldModel, IsFirstForgetsThePast) {
  const auto model = Make(SmallConfig());
  torch::NoGradGuard no_grad;
  Batch batch = RandomBatch(model->config(), 6, 2);
  const LossNoise noise{at::randn({6, 2, 3}), {}};
  const LossOutputs before = model->Loss(batch, noise, false);
  batch.observations["vector"] = batch.observations["vector"].clone();
  batch.observations["vector"].slice(0, 0, 3).add_(1);
  batch.action = batch.action.clone();
  batch.action[3].add_(1);  // the action into the reset row counts for nothing
  const LossOutputs after = model->Loss(batch, noise, false);
  EXPECT_TRUE(at::equal(before.stoch.slice(0, 3).select(1, 1), after.stoch.slice(0, 3).select(1, 1)));
  EXPECT_FALSE(at::equal(before.stoch.slice(0, 3).select(1, 0), after.stoch.slice(0, 3).select(1, 0)));
}

TEST(WorldModel, PreprocessQuantisesAndCentresPictures) {
  config::v1::Model config = SmallConfig();
  const auto five = Make(config);
  config.mutable_modalities(1)->mutable_image()->set_bits(8);
  const auto eight = Make(config);
  TensorMap stored{{"image", at::arange(1024, at::kByte).view({1, 32, 32, 1})}, {"vector", at::ones({1, 4})}};
  const Tensor flat = stored["image"].view(-1).to(at::kFloat);
  const TensorMap exact = five->Preprocess(stored, c10::nullopt);
  EXPECT_EQ(exact.at("image").sizes(), (at::IntArrayRef{1, 1, 32, 32}));
  EXPECT_FLOAT_EQ(exact.at("image").max().item<float>(), 0.46875);  // pixel 255
  EXPECT_FLOAT_EQ(exact.at("image").min().item<float>(), -0.5);
  EXPECT_TRUE(at::equal(exact.at("vector"), stored["vector"]));
  torch::Generator g = Seeded(1);
  const Tensor noise = five->Preprocess(stored, g).at("image") - exact.at("image");
  EXPECT_GE(noise.min().item<float>(), -1e-7);
  EXPECT_LT(noise.max().item<float>(), 1.0 / 32 + 1e-7);
  EXPECT_NEAR(noise.mean().item<float>(), 1.0 / 64, 0.001);
  EXPECT_FALSE(at::equal(five->Preprocess(stored, g).at("image") - exact.at("image"), noise)) << "not drawn afresh";
  EXPECT_TRUE(Near(eight->Preprocess(stored, g).at("image").reshape(-1), flat / 255 - 0.5, 1e-6));
}

TEST(WorldModel, PreprocessMovesChannelsFirst) {
  const auto model = Make(Parse("action { continuous { size: 1 } } modalities { name: 'image' image { height: 32 width: 32 bits: 8 depth: 2 } }"));
  Tensor image = at::zeros({2, 3, 32, 32, 3}, at::kByte);
  image[1][2][4][5][1] = 255;
  const Tensor x = model->Preprocess({{"image", image}}, c10::nullopt).at("image");
  EXPECT_EQ(x.sizes(), (at::IntArrayRef{2, 3, 3, 32, 32}));
  EXPECT_FLOAT_EQ((x[1][2][1][4][5].item<float>()), 0.5);
  EXPECT_FLOAT_EQ(x.sum().item<float>(), -0.5f * x.numel() + 1);
}

TEST(WorldModel, EncodesZerosForAMissingModality) {
  const auto model = Make(SmallConfig());
  torch::NoGradGuard no_grad;
  const Tensor vector = at::randn({3, 4}), image = at::randn({3, 1, 32, 32});
  const Embedding both = model->Encode({{"vector", vector}, {"image", image}}), one = model->Encode({{"vector", vector}});
  EXPECT_EQ(both.value.sizes(), (at::IntArrayRef{3, 19}));  // image, then vector
  EXPECT_FALSE(both.available.defined());
  EXPECT_TRUE(at::equal(one.value.slice(1, 16), both.value.slice(1, 16)));
  EXPECT_EQ(one.value.slice(1, 0, 16).abs().max().item<float>(), 0);
  EXPECT_TRUE(at::equal(one.available, at::stack({at::zeros({3}, at::kBool), at::ones({3}, at::kBool)})));
  const Tensor mask = at::tensor({1, 0, 1}, at::kByte).ne(0);
  const Embedding some = model->Encode({{"vector", vector}, {"image", image}}, {{"image", mask}});
  EXPECT_TRUE(at::equal(some.value[0], both.value[0]));
  EXPECT_TRUE(at::equal(some.value[1], one.value[1]));
  EXPECT_TRUE(at::equal(some.available[0], mask));
}

TEST(TransposedConv, IsTorchsWithItsGradients) {
  struct Case {
    int64_t in, out, kernel, size;
  };
  for (const Case& c : {Case{6, 4, 5, 1}, Case{5, 3, 6, 4}, Case{4, 2, 5, 4}, Case{3, 9, 6, 3}}) {
    const auto leaf = [](at::IntArrayRef shape) { return at::randn(shape, at::kDouble).requires_grad_(true); };
    const std::vector<Tensor> inputs = {leaf({2, c.in, c.size, c.size}), leaf({c.in, c.out, c.kernel, c.kernel}), leaf({c.out})};
    const Tensor actual = TransposedConv(inputs[0], inputs[1], inputs[2]);
    const Tensor expected = at::conv_transpose2d(inputs[0], inputs[1], inputs[2], 2);
    EXPECT_TRUE(Near(actual, expected, 1e-12)) << c.kernel << " at " << c.size;
    const Tensor direction = at::randn_like(expected);
    const auto a = torch::autograd::grad({actual}, inputs, {direction}), e = torch::autograd::grad({expected}, inputs, {direction});
    for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(Near(a[i], e[i], 1e-12)) << c.kernel << " at " << c.size << ", input " << i;
  }
}

TEST(Imagine, FiltersThenPredicts) {
  const auto model = Make(SmallConfig());
  Batch batch = RandomBatch(model->config(), 6, 2);
  batch.is_first.slice(0, 1).zero_();
  const Tensor noise = at::randn({6, 2, 3});
  torch::NoGradGuard no_grad;
  const LossOutputs filtered = model->Loss(batch, {noise, {}}, false);
  const Imagined all = Imagine(*model, batch, 6, noise), some = Imagine(*model, batch, 2, noise);
  for (const char* name : {"image", "vector"}) {
    EXPECT_TRUE(Near(all.recon.at(name), filtered.recon.at(name), 1e-5));
    EXPECT_TRUE(Near(some.recon.at(name).slice(0, 0, 2), filtered.recon.at(name).slice(0, 0, 2), 1e-5));
    EXPECT_FALSE(Near(some.recon.at(name)[3], filtered.recon.at(name)[3], 1e-5));
  }
  EXPECT_TRUE(Near(all.reward_mean, filtered.reward_mean, 1e-5));
  // What comes after the context is not looked at.
  Batch blind = batch;
  for (auto& [name, x] : blind.observations) x = x.clone().slice(0, 0, 2);
  EXPECT_TRUE(at::equal(Imagine(*model, blind, 2, noise).reward_mean, some.reward_mean));
  batch.observations["vector"] = batch.observations["vector"].clone();
  batch.observations["vector"].slice(0, 2).add_(1);
  EXPECT_TRUE(at::equal(Imagine(*model, batch, 2, noise).recon.at("image"), some.recon.at("image")));
}

TEST(WorldModel, VectorsWithoutLayersPassThrough) {
  const auto model = Make(Parse("action { discrete { size: 3 } } modalities { name: 'v' vector { size: 4 layers: 0 } } reward { layers: 0 }"));
  torch::NoGradGuard no_grad;
  const Tensor x = at::randn({2, 4});
  EXPECT_TRUE(at::equal(model->Encode({{"v", x}}).value, x));
  EXPECT_EQ(model->Decode(model->InitialState(2)).at("v").sizes(), x.sizes());
  EXPECT_EQ(model->Reward(model->InitialState(2)).sizes(), (at::IntArrayRef{2}));
  EXPECT_EQ(model->action_size(), 3);
}

}  // namespace
}  // namespace orrery
