// Prototype cross-entropy on the CPU, its losses and gradients and the gradient of trainable
// prototypes, and soft targets. Contract: ops/prototypes.py.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "cpu_ops.h"
#include "prototype_attention.h"
#include "strip_gradient.h"

namespace protoclip {
namespace {

constexpr const char* kOp = "prototype_cross_entropy";
constexpr int64_t kLeftOut = -100;
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// What is written for each sample; the gradients are null where not asked for, as is nearest.
struct RowOutputs {
  float *loss, *gradient;
  int64_t* nearest;
  float *row_max, *row_sum, *scale_gradient;
  int64_t d;  // width of gradient
};

template <typename T>
T* data_or_null(const Tensor& t) {
  return t.size(0) == 0 ? nullptr : t.mutable_data_ptr<T>();
}

template <typename Input>
float dot(const Input* a, const Input* b, int64_t n) {
  Floats total{};
  int64_t e = 0;
  for (; e + kLanes <= n; e += kLanes) total += load(a + e) * load(b + e);
  float rest = 0.f;
  for (; e < n; ++e) rest += static_cast<float>(a[e]) * static_cast<float>(b[e]);
  return sum(total) + rest;
}

// Turns the attention of a row into its loss and gradients, by the row m_y of its target.
template <typename Input>
struct FinishRow {
  const Input* features;
  int64_t ld;
  const int64_t* labels;
  const Input* targets;
  int64_t ld_targets;
  bool hard;
  float logit_scale;
  RowOutputs out;

  void operator()(int64_t row, const RowState& state, float positive, const float* acc) const {
    out.row_max[row] = state.max;
    out.row_sum[row] = static_cast<float>(state.sum);
    if (out.nearest != nullptr) out.nearest[row] = state.best;
    float* gradient = out.gradient == nullptr ? nullptr : out.gradient + row * out.d;
    if (labels[row] == kLeftOut) {
      out.loss[row] = 0.f;
      const auto zero = static_cast<float>(0. * state.logits);  // NaN if features are not finite
      if (out.scale_gradient != nullptr) out.scale_gradient[row] = zero;
      if (gradient != nullptr) std::fill_n(gradient, out.d, zero);
      return;
    }
    const Input *h = features + row * ld, *target = targets + labels[row] * ld_targets;
    if (!hard) positive = Base2(logit_scale)(broadcast(dot(h, target, out.d)))[0];
    // A logit of -inf weighs nothing, but 0 * -inf in `logits` keeps it visible.
    out.loss[row] = static_cast<float>(kLn2 * (std::log2(state.sum) + (state.max - positive)) +
                                       0. * state.logits);
    if (gradient == nullptr) return;
    const float weights = static_cast<float>(state.sum);
    int64_t e = 0;
    for (; e + kLanes <= out.d; e += kLanes)
      store(gradient + e, load(acc + e) / weights - load(target + e));
    for (; e < out.d; ++e) gradient[e] = acc[e] / weights - static_cast<float>(target[e]);
    if (out.scale_gradient == nullptr) return;
    if (std::abs(logit_scale) < 1e-30f) {
      float product = 0.f;
      for (e = 0; e < out.d; ++e) product += gradient[e] * static_cast<float>(h[e]);
      out.scale_gradient[row] = product;
    } else {  // from the logits, which no rounding of the weights touches
      const double difference = state.logits / state.sum - positive;
      out.scale_gradient[row] = static_cast<float>(difference / (logit_scale * kLog2E));
    }
  }
};

void expect_samples(const char* op, const Tensor& features, const Tensor& prototypes,
                    const Tensor& labels) {
  expect(op, "features", features, {kAny, kAny}, kFloats);
  expect(op, "prototypes", prototypes, {kAny, features.size(1)}, kFloats);
  expect_labels(op, labels, features.size(0), prototypes.size(0), kLeftOut);
}

template <Arithmetic A>
void forward(const Tensor& h, const Tensor& prototypes, const Tensor& targets, const Tensor& labels,
             bool hard, float logit_scale, const RowOutputs& out) {
  using Input = typename Operands<A>::Input;
  const Strip<A> strip(h, prototypes);
  const int64_t* y = labels.const_data_ptr<int64_t>();
  const Input* values = out.gradient == nullptr ? nullptr : strip.y;
  Attention<A> attention(strip, values, strip.d, strip.ld_y, hard ? y : nullptr,
                         Base2(logit_scale));
  const int64_t ld_targets = std::max<int64_t>(targets.stride(0), strip.d);
  attention.run(FinishRow<Input>{strip.x, strip.ld_x, y, targets.const_data_ptr<Input>(),
                                 ld_targets, hard, logit_scale, out});
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prototype_cross_entropy_fwd(
    const Tensor& features, const Tensor& prototypes, const Tensor& targets, const Tensor& labels,
    const Tensor& logit_scale, bool need_grad, bool need_nearest, bool need_scale_gradient,
    c10::string_view reduction) {
  expect_samples(kOp, features, prototypes, labels);
  const bool hard = targets.dim() > 0 && targets.size(0) == 0;
  expect(kOp, "targets", targets, {hard ? 0 : prototypes.size(0), features.size(1)}, kFloats);
  const float scale = number(kOp, "logit_scale", logit_scale);
  const int64_t n = features.size(0), d = features.size(1), graded = need_grad ? n : 0;
  const auto fp32 = at::TensorOptions(at::kFloat);
  const Tensor loss = at::empty({n}, fp32), gradient = at::empty({graded, d}, fp32),
               nearest = at::empty({need_nearest ? n : 0}, at::kLong), max = at::empty({n}, fp32),
               sum = at::empty({n}, fp32),
               scale_gradient = at::zeros({need_scale_gradient ? graded : 0}, fp32);  // D = 0: 0
  if (n > 0) {
    const RowOutputs out{data_or_null<float>(loss),
                         data_or_null<float>(gradient),
                         data_or_null<int64_t>(nearest),
                         data_or_null<float>(max),
                         data_or_null<float>(sum),
                         data_or_null<float>(scale_gradient),
                         d};
    const Arithmetic arithmetic = arithmetic_of(features.scalar_type());
    const Tensor h = prepare(features, arithmetic), c = prepare(prototypes, arithmetic);
    const Tensor y = labels.contiguous();
    const Tensor m = hard ? c : prepare(targets, arithmetic);
    dispatch_arithmetic(arithmetic,
                        [&](auto a) { forward<decltype(a)::value>(h, c, m, y, hard, scale, out); });
  }
  if (reduction == "none")
    return {loss, at::empty({0}, fp32), gradient, nearest, max, sum, scale_gradient};
  Tensor divisor = at::ones({}, fp32);
  if (reduction == "mean") divisor = labels.ne(kLeftOut).sum().clamp_min(1).to(at::kFloat);
  return {loss.sum() / divisor, divisor, gradient, nearest, max, sum, scale_gradient};
}

std::tuple<Tensor, Tensor> prototype_cross_entropy_scale(const Tensor& grad, const Tensor& divisor,
                                                         const Tensor& logit_scale,
                                                         const Tensor& gradient,
                                                         const Tensor& scale_gradient,
                                                         const Tensor& features) {
  const char* op = "prototype_cross_entropy_scale";
  expect(op, "features", features, {kAny, kAny}, kFloats);
  const int64_t n = features.size(0), d = features.size(1);
  const bool by_row = divisor.dim() == 1, graded = gradient.dim() > 0 && gradient.size(0) > 0;
  by_row ? expect(op, "divisor", divisor, {0}, kSums) : expect(op, "divisor", divisor, {}, kSums);
  by_row ? expect(op, "grad", grad, {n}, kSums) : expect(op, "grad", grad, {}, kSums);
  expect(op, "gradient", gradient, {graded ? n : 0, d}, at::kFloat);
  const bool scaled_too = scale_gradient.dim() > 0 && scale_gradient.size(0) > 0;
  expect(op, "scale_gradient", scale_gradient, {scaled_too ? n : 0}, at::kFloat);
  number(op, "logit_scale", logit_scale);
  const Tensor weight =
      (divisor.numel() == 0 ? grad : grad / divisor).to(at::kFloat).expand({features.size(0)});
  Tensor of_features = at::empty({0, features.size(1)}, features.options());
  if (gradient.size(0) == features.size(0)) {
    const Tensor scaled = weight * logit_scale.reshape({});
    of_features = (gradient * scaled.unsqueeze(1)).to(features.scalar_type());
  }
  Tensor of_scale = at::zeros({}, at::TensorOptions(at::kFloat));
  if (scale_gradient.numel() > 0) of_scale = (weight * scale_gradient).sum();
  return {of_features, of_scale};
}

namespace {

// Turns dot products into G = w (p - [hard and y = k]).
struct PrototypeGradient {
  const int64_t* labels;
  const float *max, *sum, *weight;
  bool hard;
  Base2 base2;

  GradientSums operator()(const GradientTile& tile) const {
    const float* dots = tile.dots;
    float* g = tile.g;
    for (int64_t i = tile.row; i < tile.row + tile.rows; ++i, dots += tile.ld_dots, g += tile.ld) {
      const int64_t label = labels[i] - tile.column, width = round_up(tile.columns, kLanes);
      if (labels[i] == kLeftOut) {
        std::fill_n(g, width, 0.f);
        continue;
      }
      const Floats reference = broadcast(max[i]), factor = broadcast(weight[i] / sum[i]);
      for (int64_t j = 0; j < width; j += kLanes)
        store(g + j, exp2(base2(load(dots + j)) - reference) * factor);
      std::fill(g + tile.columns, g + width, 0.f);
      if (hard && 0 <= label && label < tile.columns) g[label] -= weight[i];
    }
    return {};
  }
};

}  // namespace

Tensor prototype_cross_entropy_bwd(const Tensor& features, const Tensor& prototypes,
                                   const Tensor& labels, const Tensor& logit_scale,
                                   const Tensor& row_max, const Tensor& row_sum,
                                   const Tensor& weight, bool hard) {
  const char* op = "prototype_cross_entropy_bwd";
  expect_samples(op, features, prototypes, labels);
  expect(op, "row_max", row_max, {features.size(0)}, at::kFloat);
  expect(op, "row_sum", row_sum, {features.size(0)}, at::kFloat);
  expect(op, "weight", weight, {features.size(0)}, kSums);
  const float s = number(op, "logit_scale", logit_scale);
  const Arithmetic arithmetic = arithmetic_of(features.scalar_type());
  const Tensor x = prepare(features, arithmetic), c = prepare(prototypes, arithmetic);
  const Tensor y = labels.contiguous(), w = weight.to(at::kFloat).contiguous();
  const Tensor max = row_max.contiguous(), sum = row_sum.contiguous();
  const PrototypeGradient epilogue{y.const_data_ptr<int64_t>(),
                                   max.const_data_ptr<float>(),
                                   sum.const_data_ptr<float>(),
                                   w.const_data_ptr<float>(),
                                   hard,
                                   Base2(s)};
  Tensor out = at::empty(c.sizes(), c.options());
  dispatch_arithmetic(arithmetic, [&](auto a) {
    using Input = typename Operands<decltype(a)::value>::Input;
    const Strip<decltype(a)::value> strip(x, c);
    GradientPass<decltype(a)::value>::run(strip, epilogue, s, nullptr,
                                          out.mutable_data_ptr<Input>(),
                                          dot_chain(arithmetic, strip.n, strip.m));
  });
  return Gradients::finish(out, prototypes);
}

// m = softmax(S S^T / tau) C in fp32: attention with query = key = source and value = prototypes;
// never [K, K].
Tensor soft_targets(const Tensor& source_centroids, const Tensor& prototypes, double temperature) {
  expect("soft_targets", "source_centroids", source_centroids, {kAny, kAny}, kFloats);
  expect("soft_targets", "prototypes", prototypes, {source_centroids.size(0), kAny}, kFloats);
  constexpr Arithmetic fp32 = Arithmetic::kFloat;
  const Tensor s = prepare(source_centroids, fp32), c = prepare(prototypes, fp32);
  Tensor out = at::empty(c.sizes(), c.options());
  if (out.numel() == 0) return out;
  float* m = out.mutable_data_ptr<float>();
  const int64_t d = c.size(1), ld = std::max<int64_t>(c.stride(0), d);
  const Strip<fp32> strip(s, s);
  Attention<fp32> attention(strip, c.const_data_ptr<float>(), d, ld, nullptr,
                            Base2(1 / temperature));
  attention.run([&](int64_t row, const RowState& state, float, const float* acc) {
    const float weights = static_cast<float>(state.sum);
    for (int64_t e = 0; e < d; ++e) m[row * d + e] = acc[e] / weights;
  });
  return out;
}

}  // namespace protoclip
