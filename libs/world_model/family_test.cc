// The members of the model family, each against values computed another way.
#include <cmath>

#include "libs/base/status_matchers.h"
#include "libs/world_model/experts.h"
#include "libs/world_model/golden.h"
#include "libs/world_model/heads.h"
#include "libs/world_model/imagine.h"
#include "libs/world_model/latents.h"
#include "libs/world_model/layout.h"
#include "libs/world_model/parallel_rows.h"
#include "libs/world_model/world_model.h"

namespace orrery {
namespace {

using config::v1::Model;
using torch::Tensor;

Model Parse(const std::string& text) {
  auto model = ParseModel(text);
  EXPECT_OK(model);
  return *model;
}

// Two vector modalities and no image: small enough for differences of every parameter.
Model Small(const std::string& more, const std::string& objective = "", const std::string& vector = "",
            const std::string& reward = "") {
  return Parse("deterministic_size: 5 stochastic_size: 4 hidden_size: 6 activation: ELU action { continuous { size: 2 } } "
               "modalities { name: 'joints' vector { size: 3 layers: 1 hidden_size: 4 " + vector + " } } "
               "modalities { name: 'touch' vector { size: 2 layers: 0 " + vector + " } } "
               "reward { layers: 1 hidden_size: 4 " + reward + " } "
               "objective { " + (objective.find("free_nats:") == std::string::npos ? "free_nats: 0 " : "") + objective + " } " + more);
}

std::shared_ptr<WorldModel> Make(const Model& config) {
  auto model = WorldModel::Create(config, 1);
  EXPECT_OK(model);
  (*model)->to(at::kDouble);
  return *model;
}

torch::Generator Seeded(uint64_t seed) { return at::make_generator<at::CPUGeneratorImpl>(seed); }

Batch RandomBatch(const Model& config, int64_t t, int64_t b) {
  torch::Generator g = Seeded(7);
  const auto draw = [&](at::IntArrayRef shape) { return at::randn(shape, g, at::kDouble); };
  Batch batch;
  for (const auto& m : config.modalities()) batch.observations[m.name()] = draw({t, b, m.vector().size()});
  batch.action = draw({t, b, ActionSize(config)});
  batch.reward = draw({t, b});
  batch.is_first = at::zeros({t, b}, at::kByte);
  batch.is_first[0][0] = 1;
  batch.is_first[t / 2][b - 1] = 1;
  batch.is_terminal = at::zeros({t, b}, at::kByte);
  batch.is_terminal[t - 1][0] = 1;
  return batch;
}

LossNoise Noise(const WorldModel& model, int64_t t, int64_t b) {
  torch::Generator g = Seeded(3);
  return model.DrawNoise(t, b, g, true);
}

struct Case {
  std::string name;
  Model config;
};

std::vector<Case> SmoothCases() {
  return {
      {"Ssm", Small("latent: SSM")},
      {"Rnn", Small("latent: RNN")},
      {"LayerNorm", Small("layer_norm: true")},
      {"Glorot", Small("initialization: GLOROT")},
      {"Poe", Small("posterior: POE")},
      {"Moe", Small("posterior: MOE")},
      {"Mopoe", Small("posterior: MOPOE")},
      {"MopoeAveraged", Small("posterior: MOPOE_AVERAGED")},
      {"SsmPoe", Small("latent: SSM posterior: POE")},
      {"GlobalPrior", Small("", "global_prior_scale: 0.3")},
      {"PerOutput", Small("", "", "variance: PER_OUTPUT symlog: true", "variance: PER_OUTPUT transform: TANH")},
      {"Shared", Small("", "", "variance: SHARED decoder_layers: 2 decoder_hidden_size: 3", "variance: SHARED transform: SYMLOG")},
      {"DecoderActivation", Small("", "", "decoder_layers: 1 decoder_activation: TANH")},
      {"TwoHot", Small("", "", "", "output: TWO_HOT")},
      {"Continue", Small("continue_head { layers: 1 hidden_size: 3 }", "continue_scale: 0.7")},
      {"ObservationOvershooting", Small("", "observation_overshooting { distance: 2 scale: 0.4 }")},
      {"ArticleOvershooting", Small("posterior: MOPOE", "overshooting { distance: 3 scale: 0.5 form: ARTICLE weights {} weights { weight: 0.5 } }")},
      {"ObservationOvershootingRnn", Small("latent: RNN", "observation_overshooting { distance: 3 }")},
  };
}

class FamilyTest : public ::testing::TestWithParam<int> {
 protected:
  const Case case_ = SmoothCases()[GetParam()];
};

TEST_P(FamilyTest, GradientsAreFiniteDifferences) {
  const auto model = Make(case_.config);
  const Batch batch = RandomBatch(case_.config, 4, 3);
  LossNoise noise = Noise(*model, 4, 3);
  ExpectFiniteDifferences(model->named_parameters(), [&] { return model->Loss(batch, noise, false).loss_total; });
}

// Training's sequence against the step-by-step interface that acting uses. Of a mixture training draws one component and acting takes
// the product: they are the same where one modality is there.
TEST_P(FamilyTest, SequenceFollowsTheStepByStepModel) {
  const auto model = Make(case_.config);
  torch::NoGradGuard no_grad;
  Batch batch = RandomBatch(case_.config, 5, 3);
  const bool alone = HasMixture(case_.config);
  if (alone) batch.available["touch"] = at::zeros({5, 3}, at::kByte);
  const LossNoise noise = Noise(*model, 5, 3);
  const LossOutputs o = model->Loss(batch, noise, false);
  LatentState state = model->InitialState(3);
  for (int t = 0; t < 5; ++t) {
    const Tensor keep = (1 - batch.is_first[t].to(at::kDouble)).unsqueeze(-1);
    TensorMap row;
    for (const auto& [name, x] : batch.observations)
      if (!alone || name != "touch") row[name] = x[t];
    const Predicted predicted = model->Predict({state.deter * keep, state.stoch * keep}, batch.action[t] * keep);
    const LatentDistribution q = model->Posterior(predicted, model->Encode(row));
    state = {predicted.deter, model->latents().Sample(q, noise.posterior[t])};
    if (state.deter.numel() > 0) {
      EXPECT_TRUE(Near(o.deter[t], state.deter, 1e-10));
    }
    EXPECT_TRUE(Near(o.stoch[t], state.stoch, 1e-10));
    EXPECT_TRUE(Near(o.kl[t], model->latents().Divergence(q, predicted.prior), 1e-10));
  }
}

// Rollouts by LibTorch or by kernels: the sum of Reward over Predict and Sample, as long as Continue says that there is one.
TEST_P(FamilyTest, ReturnsAreSumsOfRewards) {
  const auto model = *WorldModel::Create(case_.config, 1);
  torch::NoGradGuard no_grad;
  const int64_t h = 4, n = 2, j = 3, s = model->stochastic_size();
  const LatentState start{at::randn({n, model->deterministic_size()}), at::randn({n, s})};
  const Tensor actions = at::rand({h, n, j, 2}) * 2 - 1, noise = at::randn({h, n, j, s});
  Tensor expected = at::zeros({n, j});
  for (int64_t c = 0; c < j; ++c) {
    LatentState state = start;
    Tensor weight = at::ones({n});
    for (int64_t t = 0; t < h; ++t) {
      const Predicted predicted = model->Predict(state, actions[t].select(1, c));
      state = {predicted.deter, model->latents().Sample(predicted.prior, noise[t].select(1, c))};
      expected.select(1, c).add_(weight * model->Reward(state));
      weight = 0.8 * weight * model->Continue(state);
    }
  }
  EXPECT_TRUE(Near(model->ImaginedReturns(start, actions, noise, {.discount = 0.8}), expected, 1e-5));
}

INSTANTIATE_TEST_SUITE_P(All, FamilyTest, ::testing::Range(0, static_cast<int>(SmoothCases().size())),
                         [](const auto& which) { return SmoothCases()[which.param].name; });

// Pictures with a learned deviation: the same on several threads as on one, a shared deviation also by its definition.
TEST(Family, PicturesMayHaveALearnedDeviation) {
  for (const char* variance : {"PER_OUTPUT", "SHARED"}) {
    const Model config = Parse(std::string("deterministic_size: 5 stochastic_size: 3 hidden_size: 4 action { continuous { size: 2 } } modalities { "
                                           "name: 'image' image { channels: 1 height: 32 width: 32 depth: 1 variance: ") +
                               variance + " } } reward { layers: 0 } objective { free_nats: 0 }");
    Batch batch;
    batch.observations["image"] = at::randn({8, 6, 1, 32, 32}) * 0.3;
    batch.action = at::randn({8, 6, 2});
    batch.reward = at::randn({8, 6});
    batch.is_first = at::zeros({8, 6}, at::kByte);
    const LossNoise noise{at::randn({8, 6, 3}), {}};
    const auto run = [&](int threads) {
      const auto model = *WorldModel::Create(config, 1);
      if (threads > 0) model->UseWorkers(std::make_shared<RowWorkers>(threads));
      const LossOutputs o = model->Loss(batch, noise, false);
      auto result = torch::autograd::grad({o.loss_total}, model->parameters());
      result.push_back(o.loss_observation.detach());
      const auto names = model->named_parameters();
      if (threads == 0 && std::string(variance) == "SHARED") {
        const Tensor std = LikelihoodStd(names["decoder.image.std"]).detach();
        const Tensor nll = GaussianNll(o.recon.at("image").detach(), std, batch.observations.at("image"));
        EXPECT_TRUE(Near(o.loss_observation, nll.sum() / 48, 1e-5));
      }
      return result;
    };
    const auto whole = run(0), shared = run(3);
    for (size_t i = 0; i < whole.size(); ++i) EXPECT_TRUE(Near(shared[i], whole[i], 1e-4)) << variance << " " << i;
  }
}

TEST(Latents, CategoricalDivergenceIsTheOracles) {
  const Latents latents(Parse("categorical { groups: 2 classes: 3 }"));
  const auto of = [&](std::vector<double> logits) { return latents.FromOutputs(at::tensor(logits, at::kDouble).view({1, 6})); };
  const Tensor kl = latents.Divergence(of({2, -1, .5, -.5, 1.5, 0}), of({0, 1, -1, 1, -.5, .5}));
  EXPECT_NEAR(kl.item<double>(), 1.9163513, 1e-6);  // model.md's number
}

TEST(Latents, CategoricalSamplesFollowTheProbabilitiesWithStraightThroughGradients) {
  const Latents latents(Parse("categorical { groups: 1 classes: 3 uniform_mix: 0 }"));
  const Tensor logits = at::tensor({0.0, 1.0, -1.0}, at::kDouble).set_requires_grad(true);
  const LatentDistribution d = latents.FromOutputs(logits);
  torch::Generator g = Seeded(5);
  const Tensor many = latents.Sample({d.mean.expand({20000, 3}), {}}, at::randn({20000, 3}, g, at::kDouble));
  EXPECT_TRUE(Near(many.mean(0), d.mean, 0.02));
  EXPECT_TRUE(at::equal(many.detach().sum(1).round(), at::ones({20000}, at::kDouble)));
  const Tensor one = latents.Sample(d, at::zeros({3}, at::kDouble));
  const Tensor weight = at::tensor({1.0, 2.0, 3.0}, at::kDouble);
  const auto through = torch::autograd::grad({(one * weight).sum()}, {logits}, {}, true)[0];
  EXPECT_TRUE(Near(through, torch::autograd::grad({(d.mean * weight).sum()}, {logits})[0], 1e-12));
}

// Categorical models draw one-hot states, whose loss jumps: only what the straight-through rule does not touch is compared.
TEST(Family, CategoricalModelsTrainAndAct) {
  for (const char* latent : {"RSSM", "SSM"}) {
    const Model config = Small(std::string("layer_norm: true latent: ") + latent + " categorical { groups: 3 classes: 4 }", "kl_balance {}");
    const auto model = Make(config);
    const LossOutputs o = model->Loss(RandomBatch(config, 4, 3), Noise(*model, 4, 3), true);
    EXPECT_EQ(o.stoch.sizes(), (at::IntArrayRef{4, 3, 12}));
    EXPECT_TRUE(Near(o.stoch.detach().unflatten(-1, {3, 4}).sum(-1), at::ones({4, 3, 3}, at::kDouble), 1e-12));
    EXPECT_FALSE(o.post_std.defined());
    const auto gradients = torch::autograd::grad({o.loss_total}, model->parameters(), {}, c10::nullopt, false, true);
    for (size_t i = 0; i < gradients.size(); ++i) {
      ASSERT_TRUE(gradients[i].defined()) << model->named_parameters().keys()[i];
      EXPECT_TRUE(gradients[i].isfinite().all().item<bool>());
    }
  }
}

TEST(Experts, AreTheOracles) {
  auto file = LoadSafeTensors(SourceFile("tests/golden/golden_mopoe.safetensors"));
  ASSERT_OK(file);
  const std::vector<std::string> names = {"image", "joints", "touch"};
  std::vector<Tensor> means, stds;
  for (const auto& name : names) {
    means.push_back(file->tensors.at("mean/" + name));
    stds.push_back(file->tensors.at("std/" + name));
  }
  const LatentDistribution experts{at::stack(means), at::stack(stds)}, prior{at::zeros_like(means[0]), at::ones_like(stds[0])};
  const std::vector<std::pair<std::string, std::vector<bool>>> cases = {
      {"image+joints+touch", {true, true, true}}, {"image+joints", {true, true, false}}, {"touch", {false, false, true}}};
  int compared = 0;
  for (const auto& [available, mask] : cases) {
    Tensor there = at::zeros({3, 5}, at::kBool);
    for (int m = 0; m < 3; ++m) there[m].fill_(static_cast<bool>(mask[m]));
    const Mixture mixture = JoinExperts(Model::MOPOE, experts, there, prior);
    const std::vector<unsigned> subsets = Subsets(Model::MOPOE, 3);
    for (size_t k = 0; k < subsets.size(); ++k) {
      std::string subset;
      for (int m = 0; m < 3; ++m)
        if (subsets[k] >> m & 1) subset += (subset.empty() ? "" : "+") + names[m];
      const auto expected = file->tensors.find("expect/" + available + "/" + subset + "/mean");
      const double weight = mixture.weight[k][0].item<double>();
      ASSERT_EQ(expected != file->tensors.end(), weight > 0) << available << " " << subset;
      if (weight == 0) continue;
      EXPECT_TRUE(Near(mixture.components.mean[k], expected->second, 1e-5));
      EXPECT_TRUE(Near(mixture.components.std[k], file->tensors.at("expect/" + available + "/" + subset + "/std"), 1e-5));
      ++compared;
    }
    const Mixture averaged = JoinExperts(Model::MOPOE_AVERAGED, experts, there, prior);
    EXPECT_TRUE(Near(averaged.components.mean[0], file->tensors.at("expect/" + available + "/averaged/mean"), 1e-5));
    EXPECT_TRUE(Near(averaged.components.std[0], file->tensors.at("expect/" + available + "/averaged/std"), 1e-5));
  }
  EXPECT_EQ(compared, 7 + 3 + 1);
}

// model.md's numbers: experts N(0, 1) and N(2, 2), prior N(0.5, 1.5).
TEST(Experts, DivergencesAreTheDocumentations) {
  const LatentDistribution experts{at::tensor({0.0, 2.0}, at::kDouble).view({2, 1, 1}), at::tensor({1.0, 2.0}, at::kDouble).view({2, 1, 1})};
  const LatentDistribution prior{at::full({1, 1}, 0.5, at::kDouble), at::full({1, 1}, 1.5, at::kDouble)};
  const Tensor all = at::ones({2, 1}, at::kBool);
  const Latents latents(Parse("stochastic_size: 1"));
  const Mixture mixture = JoinExperts(Model::MOPOE, experts, all, prior);
  EXPECT_NEAR((latents.Divergence(mixture.components, prior) * mixture.weight).sum().item<double>(), 0.327162, 1e-6);
  const Mixture averaged = JoinExperts(Model::MOPOE_AVERAGED, experts, all, prior);
  EXPECT_NEAR(averaged.components.mean.item<double>(), 0.8, 1e-12);
  EXPECT_NEAR(averaged.components.std.item<double>(), 0.802773, 1e-6);
  EXPECT_NEAR(latents.Divergence(averaged.components, prior).sum().item<double>(), 0.288358, 1e-6);
}

TEST(Experts, ElementsHaveTheirOwnMasksAndNothingGivesThePrior) {
  const LatentDistribution experts{at::randn({2, 3, 4}), at::rand({2, 3, 4}) + 0.1}, prior{at::randn({3, 4}), at::rand({3, 4}) + 0.1};
  const Tensor there = at::tensor({1, 0, 0, 1, 1, 0}, at::kInt).view({2, 3}).ne(0);  // both; the second; nothing
  for (const auto kind : {Model::POE, Model::MOE, Model::MOPOE, Model::MOPOE_AVERAGED}) {
    const Mixture mixture = JoinExperts(kind, experts, there, prior);
    EXPECT_TRUE(Near(mixture.weight.sum(0), at::ones({3}), 1e-6));
    for (const double u : {0.0, 0.5, 0.999999}) {
      const LatentDistribution drawn = DrawComponent(mixture, at::full({3}, u));
      EXPECT_TRUE(Near(drawn.mean[1], experts.mean[1][1], 1e-6)) << kind;
      EXPECT_TRUE(at::equal(drawn.mean[2], prior.mean[2])) << kind;
      EXPECT_TRUE(at::equal(drawn.std[2], prior.std[2])) << kind;
    }
  }
  const LatentDistribution product = ProductOfExperts(experts, there, prior);
  const Tensor precision = experts.std.square().reciprocal();
  EXPECT_TRUE(Near(product.std[0], (precision[0][0] + precision[1][0]).rsqrt(), 1e-5));
  EXPECT_TRUE(at::equal(product.mean[2], prior.mean[2]));
}

TEST(Experts, DrawsEveryComponentThatCounts) {
  const Mixture mixture{{at::arange(3, at::kFloat).view({3, 1, 1}), at::ones({3, 1, 1})}, at::tensor({0.5f, 0.0f, 0.5f}).view({3, 1})};
  for (const auto& [u, expected] : std::map<double, float>{{0, 0}, {0.49, 0}, {0.5, 2}, {0.99, 2}})
    EXPECT_EQ(DrawComponent(mixture, at::full({1}, u)).mean.item<float>(), expected) << u;
}

TEST(Heads, LearnedDeviationGivesTheDocumentationsLikelihood) {
  const Tensor nll = GaussianNll(at::zeros({1}, at::kDouble), LikelihoodStd(at::zeros({1}, at::kDouble)), at::full({1}, 0.5, at::kDouble));
  EXPECT_NEAR(nll.item<double>(), 0.885894, 1e-5);
}

TEST(Heads, TwoHotIsExactWhereItMust) {
  const auto options = torch::TensorOptions(at::kDouble);
  const Tensor bins = TwoHotBins(options);
  EXPECT_EQ(bins.numel(), 255);
  EXPECT_NEAR(bins[0].item<double>(), -485165194.4, 1);  // symexp(-20)
  EXPECT_EQ(bins[127].item<double>(), 0);
  EXPECT_TRUE(at::equal(bins, -bins.flip(0)));
  EXPECT_EQ(TwoHotMean(at::zeros({1, 255})).item<float>(), 0) << "float32, exactly";
  const Tensor x = at::tensor({-3.7, 0.0, 0.02, 5e8, -1e9, 12345.6}, at::kDouble);
  const Tensor weights = TwoHot(x);
  EXPECT_TRUE(Near(weights.sum(-1), at::ones({6}, at::kDouble), 1e-12));
  EXPECT_EQ(weights.gt(1e-12).sum(-1).max().item<int64_t>(), 2);
  EXPECT_TRUE(Near((weights * bins).sum(-1).index({at::tensor({0, 1, 2, 5})}), x.index({at::tensor({0, 1, 2, 5})}), 1e-9));
  EXPECT_EQ((weights * bins).sum(-1)[3].item<double>(), bins[254].item<double>());
  EXPECT_EQ((weights * bins).sum(-1)[4].item<double>(), bins[0].item<double>());
  EXPECT_NEAR(TwoHotNll(at::zeros({1, 255}, options), at::zeros({1}, options)).item<double>(), std::log(255.0), 1e-12);
}

TEST(Heads, SymlogIsInvertedBySymexp) {
  const Tensor x = at::tensor({-1000.0, -0.5, 0.0, 2.0, 1e6}, at::kDouble);
  EXPECT_TRUE(Near(Symexp(Symlog(x)), x, 1e-12));
  EXPECT_NEAR(Symexp(at::full({1}, 10.0, at::kDouble)).item<double>(), 22025.4648, 1e-3);
  EXPECT_NEAR(Symlog(at::full({1}, std::exp(1.0) - 1, at::kDouble)).item<double>(), 1, 1e-12);
}

// An absent modality is neither seen nor reconstructed, wherever it is absent.
TEST(Family, AbsentModalitiesCountForNothing) {
  for (const char* kind : {"JOINT", "POE", "MOE", "MOPOE", "MOPOE_AVERAGED"}) {
    const Model config = Small(std::string("posterior: ") + kind);
    const auto model = Make(config);
    torch::NoGradGuard no_grad;
    Batch batch = RandomBatch(config, 5, 2);
    const LossNoise noise = Noise(*model, 5, 2);
    const double all = model->Loss(batch, noise, false).loss_total.item<double>();
    batch.available["touch"] = at::ones({5, 2}, at::kByte);
    EXPECT_NEAR(model->Loss(batch, noise, false).loss_total.item<double>(), all, 1e-9) << kind;
    batch.available["touch"][2][1] = 0;
    const double hidden = model->Loss(batch, noise, false).loss_total.item<double>();
    EXPECT_NE(hidden, all) << kind;
    batch.observations["touch"] = batch.observations["touch"].clone();
    batch.observations["touch"][2][1].add_(3);
    EXPECT_EQ(model->Loss(batch, noise, false).loss_total.item<double>(), hidden) << kind;
    batch.available["joints"] = batch.available["touch"];
    EXPECT_NEAR(model->Loss(batch, noise, false).kl[2][1].item<double>(), 0, 1e-12) << kind << ": nothing is there";
  }
}

TEST(Family, DropoutHidesModalitiesByItsNoise) {
  const Model config = Small("posterior: POE modality_dropout: 0.5");
  const auto model = Make(config);
  torch::NoGradGuard no_grad;
  Batch batch = RandomBatch(config, 4, 2);
  LossNoise noise = Noise(*model, 4, 2);
  ASSERT_EQ(noise.dropout.sizes(), (at::IntArrayRef{4, 2, 2}));
  const LossOutputs dropped = model->Loss(batch, noise, false);
  batch.available["joints"] = noise.dropout.select(-1, 0).ge(0.5).to(at::kByte);
  batch.available["touch"] = noise.dropout.select(-1, 1).ge(0.5).to(at::kByte);
  noise.dropout = Tensor();
  EXPECT_TRUE(at::equal(dropped.loss_total, model->Loss(batch, noise, false).loss_total));
}

TEST(Family, ObservationOvershootingOfDistanceOneIsThePriorsPrediction) {
  const Model config = Small("latent: RNN", "observation_overshooting { distance: 1 } reward_scale: 2");
  const auto model = Make(config);
  torch::NoGradGuard no_grad;
  Batch batch = RandomBatch(config, 3, 2);
  batch.is_first.slice(0, 1).zero_();
  const LossNoise noise = Noise(*model, 3, 2);
  const LossOutputs o = model->Loss(batch, noise, true);
  Tensor expected = at::zeros({}, at::kDouble);
  for (int t = 1; t < 3; ++t) {
    const Predicted predicted = model->Predict({o.deter[t - 1], o.stoch[t - 1]}, batch.action[t]);
    const LatentState state{predicted.deter, predicted.prior.mean};
    for (const auto& [name, x] : model->Decode(state)) expected += 0.5 * (x - batch.observations.at(name)[t]).square().sum() / 4;
    expected += 2 * 0.5 * (model->Reward(state) - batch.reward[t]).square().sum() / 4;
  }
  EXPECT_TRUE(Near(o.loss_observation_overshooting, expected, 1e-10));
}

// A model whose state is its observation and whose prior adds the action, both with deviation 1: s' = s + a, q = o. Open-loop
// predictions from the rows 10, 20, … then land on sums that can be written down.
TEST(Family, OvershootingLandsWhereAMockCellDoes) {
  const std::vector<double> o = {10, 20, 30, 40, 50, 60};
  const std::vector<std::vector<double>> landing = {
      {10.1, 20.2, 30.3, 40.4, 50.5}, {10.3, 20.5, 30.7, 40.9}, {10.6, 20.9, 31.2}, {11, 21.4}};  // by distance, on rows d to 5
  for (const bool article : {false, true}) {
    const auto model = Make(Parse("latent: SSM stochastic_size: 1 hidden_size: 1 activation: RELU min_std: 0.30685281944005469 "
                                  "action { continuous { size: 1 } } modalities { name: 'o' vector { size: 1 layers: 0 } } "
                                  "reward { layers: 0 } objective { free_nats: 0 overshooting { distance: 4 scale: 1 " +
                                  std::string(article ? "form: ARTICLE" : "") + " } }"));
    torch::NoGradGuard no_grad;
    auto parameters = model->named_parameters();
    for (auto& p : parameters) p.value().zero_();
    parameters["rssm.prior.hidden.weight"].fill_(1);           // [s, a] -> s + a
    parameters["rssm.posterior.hidden.weight"][0][2] = 1;      // [mean, std, o] -> o
    for (const char* name : {"rssm.prior.out.weight", "rssm.posterior.out.weight"}) parameters[name][0][0] = 1;
    Batch batch;
    batch.observations["o"] = at::tensor(o, at::kDouble).view({6, 1, 1});
    batch.action = at::arange(6, at::kDouble).view({6, 1, 1}) / 10;
    batch.reward = at::zeros({6, 1}, at::kDouble);
    batch.is_first = at::zeros({6, 1}, at::kByte);
    batch.is_first[0][0] = 1;
    const LossOutputs out = model->Loss(batch, {.posterior = at::zeros({6, 1, 1}, at::kDouble),
                                                .overshooting = at::zeros({5, 6, 1, 1}, at::kDouble)}, true);
    double expected = 0;
    for (size_t d = article ? 1 : 2; d <= 4; ++d) {
      double sum = 0;
      for (size_t i = 0; i < landing[d - 1].size(); ++i) sum += std::pow(o[d + i] - landing[d - 1][i], 2) / 2;
      expected += sum / static_cast<double>(landing[d - 1].size()) / (article ? 4 : 3);
    }
    EXPECT_TRUE(Near(out.loss_overshooting, at::scalar_tensor(expected, at::kDouble), 1e-7)) << article;
  }
}

// With distance 1 alone the article's form is the ordinary divergence where nothing resets.
TEST(Family, ArticleOvershootingCountsDistanceOne) {
  const Model config = Small("", "overshooting { distance: 2 scale: 1 form: ARTICLE weights { weight: 2 } weights { weight: 0 } }");
  const auto model = Make(config);
  torch::NoGradGuard no_grad;
  Batch batch = RandomBatch(config, 4, 2);
  batch.is_first.slice(0, 1).zero_();
  const LossOutputs o = model->Loss(batch, Noise(*model, 4, 2), true);
  // Two distances, weighed 2 and 0: their mean is distance 1, the divergence of the rows after the first.
  EXPECT_TRUE(Near(o.loss_overshooting, o.kl.slice(0, 1).mean(), 1e-10));
}

TEST(Family, FreeNatsApplyToEachComponent) {
  for (const char* rule : {"PER_ELEMENT", "AVERAGED"}) {
    const Model config = Small("posterior: MOE", std::string("free_nats_rule: ") + rule + " free_nats: 0.5");
    Model bare = config;
    bare.mutable_objective()->set_free_nats(0);
    const auto model = Make(config), reference = Make(bare);
    torch::NoGradGuard no_grad;
    const Batch batch = RandomBatch(config, 1, 2);
    // In a single row with one expert at a time the divergence of that expert alone is the other's absence.
    Tensor expected = at::zeros({}, at::kDouble);
    for (const char* alone : {"joints", "touch"}) {
      Batch one = batch;
      one.available[std::string(alone) == "joints" ? "touch" : "joints"] = at::zeros({1, 2}, at::kByte);
      const Tensor kl = reference->Loss(one, Noise(*model, 1, 2), false).kl;
      expected += 0.5 * (std::string(rule) == "AVERAGED" ? kl.mean().clamp_min(0.5) : (kl - 0.5).clamp_min(0).mean());
    }
    EXPECT_TRUE(Near(model->Loss(batch, Noise(*model, 1, 2), false).loss_kl, expected, 1e-10)) << rule;
  }
}

TEST(Family, InitialisesAsConfigured) {
  const auto parameters = (*WorldModel::Create(Small("initialization: GLOROT layer_norm: true", "", "", "output: TWO_HOT"), 1))->named_parameters();
  EXPECT_LE(parameters["rssm.input.weight"].abs().max().item<double>(), std::sqrt(6.0 / (6 + 6)));
  EXPECT_GE(parameters["rssm.input.weight"].abs().max().item<double>(), 0.6 * std::sqrt(6.0 / (6 + 6)));
  EXPECT_EQ(parameters["rssm.input.bias"].abs().max().item<double>(), 0);
  EXPECT_EQ(parameters["rssm.gru.bias_hh"].abs().max().item<double>(), 0);
  EXPECT_TRUE(at::equal(parameters["rssm.gru.norm.weight"], at::ones({15})));
  EXPECT_TRUE(at::equal(parameters["reward.fc1.norm.bias"], at::zeros({4})));
  EXPECT_EQ(parameters["reward.out.weight"].abs().max().item<double>(), 0);
  EXPECT_EQ(parameters["reward.out.weight"].size(0), 255);
}

TEST(Family, ImaginationGoesOnWithoutWhatIsMissing) {
  const Model config = Small("posterior: MOPOE");
  const auto model = Make(config);
  const Batch batch = RandomBatch(config, 5, 2);
  const Imagined imagined = Imagine(*model, batch, 3, at::zeros({5, 2, 4}, at::kDouble));
  EXPECT_EQ(imagined.recon.at("joints").sizes(), (at::IntArrayRef{5, 2, 3}));
  EXPECT_TRUE(imagined.reward_mean.isfinite().all().item<bool>());
}

}  // namespace
}  // namespace orrery
