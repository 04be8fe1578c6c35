// From the tensors a caller gives to what the strip kernels take, and back.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <optional>
#include <type_traits>

#include "gemm_tile.h"

namespace protoclip {

// bf16 features are multiplied as such where the CPU can, all else in fp32.
inline Arithmetic arithmetic_of(at::ScalarType dtype) {
  const bool bf16 = dtype == at::kBFloat16 && cpu_matrix_units().bf16;
  return bf16 ? Arithmetic::kBf16 : Arithmetic::kFloat;
}

// bf16 stays bf16 where it is multiplied as such, everything else becomes fp32; rows contiguous;
// bf16 rows of even length (one zero column more).
inline at::Tensor prepare(const at::Tensor& t, Arithmetic arithmetic) {
  const bool bf16 = arithmetic == Arithmetic::kBf16;
  at::Tensor out = t.to(bf16 ? at::kBFloat16 : at::kFloat);
  if (bf16 && t.size(1) % 2) return at::constant_pad_nd(out, {0, 1});
  const bool rows = (out.size(1) < 2 || out.stride(1) == 1) && out.stride(0) >= out.size(1);
  return rows ? out : out.contiguous();
}

template <typename F>
auto dispatch_arithmetic(Arithmetic arithmetic, const F& f) {
  if (arithmetic == Arithmetic::kBf16)
    return f(std::integral_constant<Arithmetic, Arithmetic::kBf16>{});
  return f(std::integral_constant<Arithmetic, Arithmetic::kFloat>{});
}

struct Inputs {
  at::Tensor x, y;
  float scale;
  Arithmetic arithmetic;

  // With an offset row i belongs to column i + offset.
  Inputs(const char* op, const at::Tensor& x_in, const at::Tensor& y_in, const at::Tensor& scale_in,
         std::optional<int64_t> row_offset = {}) {
    const int64_t offset = row_offset.value_or(0);
    TORCH_CHECK(x_in.dim() == 2 && y_in.dim() == 2 && x_in.size(1) == y_in.size(1), op,
                ": expected x [N, D] and y [M, D], got ", x_in.sizes(), " and ", y_in.sizes());
    TORCH_CHECK(x_in.scalar_type() == y_in.scalar_type(), op, ": expected one dtype, got ",
                x_in.scalar_type(), " and ", y_in.scalar_type());
    TORCH_CHECK(
        !row_offset || offset >= 0 && (x_in.size(0) == 0 || offset + x_in.size(0) <= y_in.size(0)),
        op, ": expected row i's positive at column i + offset, got N=", x_in.size(0),
        ", M=", y_in.size(0), ", offset=", offset);
    arithmetic = arithmetic_of(x_in.scalar_type());
    x = prepare(x_in, arithmetic);
    y = prepare(y_in, arithmetic);
    scale = scale_in.item<float>();
  }

  template <typename F>
  auto dispatch(const F& f) const {
    return dispatch_arithmetic(arithmetic, f);
  }
};

// dx and dy in the kernels' dtype and width; `finish` gives them those of the caller's tensor.
struct Gradients {
  at::Tensor dx, dy;
  explicit Gradients(const Inputs& in)
      : dx(at::empty(in.x.sizes(), in.x.options())), dy(at::empty(in.y.sizes(), in.y.options())) {
    if (in.y.size(0) == 0) dx.zero_();
  }
  static at::Tensor finish(const at::Tensor& grad, const at::Tensor& like) {
    return grad.narrow(1, 0, like.size(1)).to(like.scalar_type()).contiguous();
  }
};

}  // namespace protoclip
