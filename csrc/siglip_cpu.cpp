// The sigmoid loss on the CPU: sum of softplus(-z (scale x.y + bias)), z = 1 at positives, else -1.
// No row or column statistics, so loss and gradients come from one pass: 3 products, not 4.
#include <torch/library.h>

#include "strip_gradient.h"
#include "strip_inputs.h"

namespace protoclip {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

// log(1 + u) for u in [0, 1], as 2 atanh(z): relative error below 1e-7.
inline Floats log1p(Floats u) {
  const Floats z = u / (u + 2.f), w = z * z;
  Floats p = broadcast(1.f / 15);
  for (int k = 13; k >= 1; k -= 2) p = p * w + 1.f / k;
  return 2.f * z * p;
}

class SigmoidGradient {
 public:
  SigmoidGradient(float scale, float bias, int64_t offset)
      : scale_(scale), bias_(bias), offset_(offset) {}

  GradientSums operator()(const TileRange& range, float* s, int64_t ld) const {
    GradientSums sums;
    for (int64_t i = 0; i < range.rows; ++i, s += ld) {
      Floats loss{}, g_sum{}, g_dot{};
      for (int64_t j = 0; j < range.columns; j += kLanes) {
        Floats dot = load(s + j), sign = broadcast(1.f), used = broadcast(1.f);
        const int64_t positive = range.row + i + offset_ - range.column - j;
        if (0 <= positive && positive < kLanes) sign[positive] = -1.f;
        for (int64_t lane = range.columns - j; lane < kLanes; ++lane) dot[lane] = used[lane] = 0.f;
        const Floats v = sign * (dot * scale_ + bias_);  // a logit that should be low
        const Floats size = v < 0.f ? -v : v;
        const Floats u = exp2(size * -kLog2E), inverse = 1.f / (1.f + u);
        const Floats g = sign * used * (v < 0.f ? u * inverse : inverse);
        loss += used * (larger(Floats{}, v) + log1p(u));
        g_sum += g;
        g_dot += g * dot;
        store(s + j, g);
      }
      sums += {sum(g_dot), sum(g_sum), sum(loss)};
    }
    return sums;
  }

 private:
  float scale_, bias_;
  int64_t offset_;
};

at::Tensor scalar(double value) { return at::full({}, value, at::TensorOptions(at::kFloat)); }

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sigmoid_loss(
    const at::Tensor& x, const at::Tensor& y, const at::Tensor& scale, const at::Tensor& bias,
    int64_t offset, bool gradients, c10::string_view arithmetic) {
  // An offset past the last column: a chunk of another rank's texts, without positives.
  const Inputs in("sigmoid_loss", x, y, scale, offset < y.size(0) ? offset : 0, arithmetic);
  const SigmoidGradient epilogue(in.scale, bias.item<float>(), offset);
  Gradients out(in);
  const GradientSums sums = in.dispatch([&](auto a) {
    const Strip<decltype(a)::value> strip(in.x, in.y);
    using Input = typename Operands<decltype(a)::value>::Input;
    return GradientPass<decltype(a)::value>::run(strip, epilogue, in.scale, gradients,
                                                 out.dx.mutable_data_ptr<Input>(),
                                                 out.dy.mutable_data_ptr<Input>());
  });
  if (!gradients) out.dx = out.dy = at::empty({0, in.x.size(1)}, in.x.options());
  return {scalar(sums.loss), out.finish(out.dx, x), out.finish(out.dy, y), scalar(sums.g_dot),
          scalar(sums.g)};
}

}  // namespace
}  // namespace protoclip

TORCH_LIBRARY_FRAGMENT(protoclip_native, m) {
  m.def(
      "sigmoid_loss(Tensor x, Tensor y, Tensor scale, Tensor bias, int offset, bool gradients,"
      " str arithmetic) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(protoclip_native, CPU, m) { m.impl("sigmoid_loss", protoclip::sigmoid_loss); }
