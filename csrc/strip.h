// A strip, x [N, D] against y [M, D]: from a caller's tensors to what the kernels take, and back;
// its tiles, and the stash of their dot products.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

#include <type_traits>

#include "checks.h"
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
  float logit_scale;
  Arithmetic arithmetic;

  Inputs(const char* op, const at::Tensor& x_in, const at::Tensor& y_in,
         const at::Tensor& logit_scale_in)
      : logit_scale(number(op, "logit_scale", logit_scale_in)),
        arithmetic(arithmetic_of(x_in.scalar_type())) {
    expect(op, "x", x_in, {kAny, kAny}, kFloats);
    expect(op, "y", y_in, {kAny, x_in.size(1)}, x_in.scalar_type());
    x = prepare(x_in, arithmetic);
    y = prepare(y_in, arithmetic);
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

template <Arithmetic A>
struct Strip {
  using Input = typename Operands<A>::Input;
  const Input *x, *y;  // rows of d contiguous elements; d is even for kBf16
  int64_t n, m, d, ld_x, ld_y;

  Strip(const at::Tensor& x, const at::Tensor& y)
      : x(x.const_data_ptr<Input>()),
        y(y.const_data_ptr<Input>()),
        n(x.size(0)),
        m(y.size(0)),
        d(x.size(1)),
        ld_x(std::max<int64_t>(x.stride(0), d)),
        ld_y(std::max<int64_t>(y.stride(0), d)) {}
};

// The part of the logits that a kernel sees at once: rows [row, row + rows) and columns likewise.
struct TileRange {
  int64_t row, rows, column, columns;
  // Whether row i's positive, column i + offset, falls into the tile for some i.
  bool has_positive(int64_t offset) const {
    return row + offset < column + columns && column < row + rows + offset;
  }
};

// Room for the fp32 dot products of all tiles, which a forward pass leaves to its backward pass;
// null where none is given. Tile after tile, each contiguous.
class Stash {
 public:
  static constexpr int64_t kRows = 128, kColumns = 256;  // of a tile: 128 KB of fp32

  Stash() = default;
  Stash(float* data, int64_t columns) : data_(data), tiles_(blocks(columns, kColumns)) {}
  static int64_t num_bytes(int64_t n, int64_t m) {
    return round_up(n, kRows) * round_up(m, kColumns) * int64_t{sizeof(float)};
  }

  explicit operator bool() const { return data_ != nullptr; }
  // The product at (row, column), `row` a multiple of kRows; rows are kColumns apart.
  float* tile(int64_t row, int64_t column) const {
    const int64_t index = row / kRows * tiles_ + column / kColumns;
    return data_ + index * kRows * kColumns + column % kColumns;
  }

 private:
  float* data_ = nullptr;
  int64_t tiles_ = 0;
};

}  // namespace protoclip
