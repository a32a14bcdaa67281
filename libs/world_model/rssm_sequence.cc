#include "libs/world_model/rssm_sequence.h"

#include <algorithm>

namespace orrery {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor Rows(const Tensor& x) { return x.reshape({-1, x.size(-1)}); }
// Gradient of a weight: over all rows at once.
Tensor WeightGradient(const Tensor& output_gradient, const Tensor& input) {
  return Rows(output_gradient).t().mm(Rows(input));
}
Tensor BiasGradient(const Tensor& output_gradient) { return Rows(output_gradient).sum(0); }
// States before each row: zero, then the rows shifted by one, with resets applied.
Tensor Previous(const Tensor& x, const Tensor& keep, bool any_reset) {
  const Tensor shifted = at::cat({at::zeros_like(x.slice(0, 0, 1)), x.slice(0, 0, -1)});
  return any_reset ? shifted * keep : shifted;
}

// What the backward pass needs besides inputs and outputs.
struct Saved {
  Tensor input_pre, input;      // [T, B, U]: rssm.input before and after its activation
  Tensor reset_update;          // [T, B, 2D]: gates r and z
  Tensor candidate;             // [T, B, D]: n
  Tensor gates_hh;              // [T, B, 3D]: recurrent part of the gates
  Tensor hidden_pre, hidden;    // [T, B, U]: rssm.posterior.hidden
  Tensor out;                   // [T, B, 2S]: mean and raw std
};

class RssmSequenceFunction : public torch::autograd::Function<RssmSequenceFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& action_part, const Tensor& embed_part,
                               const Tensor& state_weight, const Tensor& weight_ih, const Tensor& bias_ih,
                               const Tensor& weight_hh, const Tensor& bias_hh, const Tensor& deter_weight,
                               const Tensor& out_weight, const Tensor& out_bias, const RssmSequenceInputs& in);
  static variable_list backward(AutogradContext* ctx, variable_list gradients);

 private:
  static void GruStep(const RssmSequenceInputs& in, const Tensor& x, const Tensor& h, const Tensor& scratch,
                      Tensor gates_hh, Tensor reset_update, Tensor candidate, Tensor out);
};

void RssmSequenceFunction::GruStep(const RssmSequenceInputs& in, const Tensor& x, const Tensor& h,
                                   const Tensor& scratch, Tensor gates_hh, Tensor reset_update, Tensor candidate,
                                   Tensor out) {
  const int64_t d = h.size(1);
  Tensor gates_ih = scratch;
  at::addmm_out(gates_ih, in.bias_ih, x, in.weight_ih.t());
  at::addmm_out(gates_hh, in.bias_hh, h, in.weight_hh.t());
  at::add_out(reset_update, gates_ih.narrow(1, 0, 2 * d), gates_hh.narrow(1, 0, 2 * d)).sigmoid_();
  at::addcmul_out(candidate, gates_ih.narrow(1, 2 * d, d), reset_update.narrow(1, 0, d), gates_hh.narrow(1, 2 * d, d))
      .tanh_();
  at::lerp_out(out, candidate, h, reset_update.narrow(1, d, d));  // n + z (h - n)
}

variable_list RssmSequenceFunction::forward(AutogradContext* ctx, const Tensor& action_part, const Tensor& embed_part,
                                            const Tensor& state_weight, const Tensor& weight_ih, const Tensor& bias_ih,
                                            const Tensor& weight_hh, const Tensor& bias_hh, const Tensor& deter_weight,
                                            const Tensor& out_weight, const Tensor& out_bias,
                                            const RssmSequenceInputs& in) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const int64_t t_size = in.noise.size(0), b = in.noise.size(1), s_size = in.noise.size(2);
  const int64_t d = weight_hh.size(1), u = state_weight.size(0);
  const auto make = [&](int64_t width) { return at::empty({t_size, b, width}, in.noise.options()); };
  Saved v{make(u), make(u), make(2 * d), make(d), make(3 * d), make(u), make(u), make(2 * s_size)};
  Tensor deter = make(d), stoch = make(s_size), std = make(s_size);
  const Tensor scratch = at::empty({b, 3 * d}, in.noise.options());

  const auto actions = action_part.unbind(), embeds = embed_part.unbind(), noises = in.noise.unbind();
  auto input_pre = v.input_pre.unbind(), inputs = v.input.unbind(), hidden_pre = v.hidden_pre.unbind(),
       hidden = v.hidden.unbind(), outs = v.out.unbind(), means = v.out.narrow(2, 0, s_size).unbind(),
       raws = v.out.narrow(2, s_size, s_size).unbind(), deters = deter.unbind(), stochs = stoch.unbind(),
       stds = std.unbind(), gates_hh = v.gates_hh.unbind(), reset_update = v.reset_update.unbind(),
       candidates = v.candidate.unbind();
  const Tensor state_weight_t = state_weight.t(), deter_weight_t = deter_weight.t(), out_weight_t = out_weight.t();
  Tensor h = at::zeros({b, d}, in.noise.options()), s = at::zeros({b, s_size}, in.noise.options());
  for (int64_t t = 0; t < t_size; ++t) {
    if (t > 0 && in.resets[t]) {
      const Tensor keep = in.keep.select(0, t);
      h = h * keep;
      s = s * keep;
    }
    at::addmm_out(input_pre[t], actions[t], s, state_weight_t);
    ActivateInto(in.activation, input_pre[t], inputs[t]);
    GruStep(in, inputs[t], h, scratch, gates_hh[t], reset_update[t], candidates[t], deters[t]);
    h = deters[t];
    at::addmm_out(hidden_pre[t], embeds[t], h, deter_weight_t);
    ActivateInto(in.activation, hidden_pre[t], hidden[t]);
    at::addmm_out(outs[t], out_bias, hidden[t], out_weight_t);
    at::softplus_out(stds[t], raws[t]).add_(in.min_std);
    at::addcmul_out(stochs[t], means[t], stds[t], noises[t]);
    s = stochs[t];
  }
  const Tensor mean = v.out.narrow(2, 0, s_size).contiguous();
  ctx->save_for_backward({state_weight, weight_ih, weight_hh, deter_weight, out_weight, in.noise, in.keep, v.input_pre,
                          v.input, v.reset_update, v.candidate, v.gates_hh, v.hidden_pre, v.hidden, v.out, deter,
                          stoch});
  ctx->saved_data["activation"] = static_cast<int64_t>(in.activation);
  std::vector<int64_t> resets(in.resets.begin(), in.resets.end());
  ctx->saved_data["resets"] = resets;
  (void)bias_ih, (void)bias_hh;  // read through `in`; they are parameters only to be differentiated
  return {deter, stoch, mean, std};
}

variable_list RssmSequenceFunction::backward(AutogradContext* ctx, variable_list gradients) {
  at::NoGradGuard no_grad;
  at::AutoDispatchBelowADInplaceOrView guard;
  const variable_list saved = ctx->get_saved_variables();
  const Tensor &state_weight = saved[0], &weight_ih = saved[1], &weight_hh = saved[2], &deter_weight = saved[3],
               &out_weight = saved[4], &noise = saved[5], &keep = saved[6];
  const Saved v{saved[7], saved[8], saved[9], saved[10], saved[11], saved[12], saved[13], saved[14]};
  const Tensor &deter = saved[15], &stoch = saved[16];
  const auto activation = static_cast<Activation>(ctx->saved_data["activation"].toInt());
  const std::vector<int64_t> resets = ctx->saved_data["resets"].toIntVector();
  const bool any_reset = std::any_of(resets.begin() + 1, resets.end(), [](int64_t r) { return r != 0; });
  const int64_t t_size = noise.size(0), b = noise.size(1), s_size = noise.size(2), d = deter.size(2);

  // Slopes of every nonlinearity, for all rows at once.
  const Tensor previous_deter = Previous(deter, keep, any_reset), previous_stoch = Previous(stoch, keep, any_reset);
  const Tensor r = v.reset_update.narrow(2, 0, d), z = v.reset_update.narrow(2, d, d), n = v.candidate;
  const Tensor slope_n = (1 - z) * (1 - n * n);
  const Tensor slope_r = slope_n * v.gates_hh.narrow(2, 2 * d, d) * r * (1 - r);
  const Tensor slope_z = (previous_deter - n) * z * (1 - z);
  const Tensor slope_ih = at::stack({slope_r, slope_z, slope_n}, 2);      // [T, B, 3, D]
  const Tensor slope_hh = at::stack({slope_r, slope_z, slope_n * r}, 2);  // [T, B, 3, D]
  const Tensor carry_deter = any_reset ? z * keep : z;
  const Tensor slope_input = ActivationSlope(activation, v.input_pre, v.input);
  const Tensor slope_hidden = ActivationSlope(activation, v.hidden_pre, v.hidden);
  const Tensor slope_std = at::sigmoid(v.out.narrow(2, s_size, s_size));
  const Tensor slope_out = at::stack({at::ones_like(noise), noise * slope_std}, 2);  // [T, B, 2, S]

  // Gradients from outside; the recurrence adds to them row by row.
  Tensor d_out = at::stack({gradients[2], gradients[3] * slope_std}, 2).addcmul_(gradients[1].unsqueeze(2), slope_out);
  Tensor d_deter = gradients[0].clone(at::MemoryFormat::Contiguous);
  Tensor d_hidden = at::empty_like(v.hidden), d_input = at::empty_like(v.input);
  Tensor d_gates_ih = at::empty({t_size, b, 3, d}, noise.options()), d_gates_hh = at::empty_like(d_gates_ih);

  auto d_outs = d_out.unbind(), d_deters = d_deter.unbind(), d_hiddens = d_hidden.unbind(), d_inputs = d_input.unbind();
  auto d_ih = d_gates_ih.unbind(), d_hh = d_gates_hh.unbind();
  const auto out_slopes = slope_out.unbind(), hidden_slopes = slope_hidden.unbind(),
             input_slopes = slope_input.unbind(), ih_slopes = slope_ih.unbind(), hh_slopes = slope_hh.unbind(),
             carries = carry_deter.unbind();
  Tensor d_stoch;
  for (int64_t t = t_size - 1; t >= 0; --t) {
    if (d_stoch.defined()) d_outs[t].addcmul_(d_stoch.unsqueeze(1), out_slopes[t]);
    at::mm_out(d_hiddens[t], d_outs[t].view({b, 2 * s_size}), out_weight).mul_(hidden_slopes[t]);
    d_deters[t].addmm_(d_hiddens[t], deter_weight);
    const Tensor d_state = d_deters[t].unsqueeze(1);
    at::mul_out(d_ih[t], d_state, ih_slopes[t]);
    at::mul_out(d_hh[t], d_state, hh_slopes[t]);
    at::mm_out(d_inputs[t], d_ih[t].view({b, 3 * d}), weight_ih).mul_(input_slopes[t]);
    if (t == 0) break;
    d_stoch = d_inputs[t].mm(state_weight);
    Tensor d_recurrent = d_hh[t].view({b, 3 * d});
    if (resets[t]) {
      d_stoch.mul_(keep.select(0, t));
      d_recurrent = d_recurrent * keep.select(0, t);
    }
    d_deters[t - 1].addcmul_(d_deters[t], carries[t]).addmm_(d_recurrent, weight_hh);
  }
  d_out = d_out.view({t_size, b, 2 * s_size});
  d_gates_ih = d_gates_ih.view({t_size, b, 3 * d});
  d_gates_hh = d_gates_hh.view({t_size, b, 3 * d});
  return {d_input,
          d_hidden,
          WeightGradient(d_input, previous_stoch),
          WeightGradient(d_gates_ih, v.input),
          BiasGradient(d_gates_ih),
          WeightGradient(d_gates_hh, previous_deter),
          BiasGradient(d_gates_hh),
          WeightGradient(d_hidden, deter),
          WeightGradient(d_out, v.hidden),
          BiasGradient(d_out),
          Tensor()};
}

}  // namespace

RssmSequenceOutputs RunRssmSequence(const RssmSequenceInputs& in) {
  const variable_list out = RssmSequenceFunction::apply(in.action_part, in.embed_part, in.state_weight, in.weight_ih,
                                                        in.bias_ih, in.weight_hh, in.bias_hh, in.deter_weight,
                                                        in.out_weight, in.out_bias, in);
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace orrery
