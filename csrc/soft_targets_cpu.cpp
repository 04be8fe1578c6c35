// Soft targets on the CPU: m = softmax(S S^T / tau) C in fp32, attention with query = key = source
// and value = prototypes; never [K, K]. Contract: ops/soft_targets.py.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "prototype_attention.h"
#include "strip_inputs.h"

namespace protoclip {
namespace {

at::Tensor soft_targets(const at::Tensor& source, const at::Tensor& prototypes, double temperature,
                        c10::string_view name) {
  const at::Tensor s = prepare(source, Arithmetic::kFloat);
  const at::Tensor c = prepare(prototypes, Arithmetic::kFloat);
  at::Tensor out = at::empty(c.sizes(), c.options());
  if (out.numel() == 0) return out;
  const Arithmetic arithmetic =
      pick_arithmetic("soft_targets", at::kFloat, prototypes.size(0), name);
  float* m = out.mutable_data_ptr<float>();
  const int64_t d = c.size(1), ld = std::max<int64_t>(c.stride(0), d);
  const Base2 base2(1 / temperature);
  dispatch_arithmetic(arithmetic, [&](auto a) {
    if constexpr (decltype(a)::value != Arithmetic::kBf16) {
      const Strip<decltype(a)::value> strip(s, s);
      Attention<decltype(a)::value> attention(strip, c.const_data_ptr<float>(), d, ld, nullptr,
                                              base2);
      attention.run([&](int64_t row, const RowState& state, float, const float* acc) {
        const float weights = static_cast<float>(state.weights);
        for (int64_t e = 0; e < d; ++e) m[row * d + e] = acc[e] / weights;
      });
    }
  });
  return out;
}

}  // namespace
}  // namespace protoclip

TORCH_LIBRARY_FRAGMENT(protoclip_native, m) {
  m.def(
      "soft_targets(Tensor source, Tensor prototypes, float temperature, str arithmetic)"
      " -> Tensor");
}

TORCH_LIBRARY_IMPL(protoclip_native, CPU, m) { m.impl("soft_targets", protoclip::soft_targets); }
