// One pass over the logits of a strip, x [N, D] against y [M, D], tile by tile, that forms
// G = dloss/dlogits and multiplies it on: dx = logit_scale G y, dy = logit_scale G^T x.
//
// Rows go in waves. Within a wave the columns are split into groups, the parallel tasks: a group
// owns its rows of dy and adds up its own part of the wave's dx; the parts are summed in order
// afterwards. Waves and groups depend on the shape alone, so the bits do not depend on the number
// of threads. Beyond the outputs it keeps kPartRows * D floats, and M * D floats where y is not
// fp32.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "gemm_tile.h"
#include "stash_tile.h"

namespace protoclip {

// ---- from a caller's tensors to what the kernels take, and back ----

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

  // With an offset row i belongs to column i + offset.
  Inputs(const char* op, const at::Tensor& x_in, const at::Tensor& y_in,
         const at::Tensor& logit_scale_in, std::optional<int64_t> row_offset = {}) {
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
    logit_scale = logit_scale_in.item<float>();
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
  static constexpr int64_t kRows = kStashRows, kColumns = kStashColumns;  // of a tile

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

// Sums over all logits that an epilogue reports beside G.
struct GradientSums {
  double g_dot = 0, g = 0, loss = 0;
  void operator+=(const GradientSums& other) {
    g_dot += other.g_dot, g += other.g, loss += other.loss;
  }
};

template <Arithmetic A>
class GradientPass {
  using Ops = Operands<A>;
  using Input = typename Ops::Input;
  static constexpr int64_t kRows = 128, kColumns = 128;  // 64 KB of fp32 logits
  static constexpr int64_t kMaxGroups = 16, kPartRows = 8192;

 public:
  static constexpr int64_t kDefaultChain = A == Arithmetic::kFloat ? kChain : kBf16Chain;
  // Few features give no other errors for those of a long chain to drown in.
  static constexpr int64_t kFewFeatures = 16, kShortChain = 16;

  // `epilogue(range, s, ld) -> GradientSums` turns the dot products s [rows, columns] into G and
  // sets the lanes past the last column, up to whole vectors, to zero. dx and dy are not touched
  // without `gradients`; dx may be null, then only dy is formed. Where the epilogue knows
  // statistics of the logits, `chain` is that of the products behind them. Products in the `stash`
  // are read, not formed.
  template <typename Epilogue>
  static GradientSums run(const Strip<A>& strip, const Epilogue& epilogue, float logit_scale,
                          bool gradients, Input* dx, Input* dy, int64_t chain = kDefaultChain,
                          Stash stash = {}) {
    GradientPass pass(strip, logit_scale, gradients, dx, dy, chain, stash);
    GradientSums total;
    for (int64_t row = 0; row < strip.n; row += pass.wave_)
      total += pass.wave(row, std::min(pass.wave_, strip.n - row), epilogue);
    if (gradients) pass.finish_dy();
    return total;
  }

 private:
  struct Scratch {  // of one thread
    Buffer<Input> right_t, right, g, g_t;
    Buffer<float> s, s_t;
    explicit Scratch(int64_t d)
        : right_t(Ops::depth(d) * kColumns),
          right(Ops::kRightRowsInPlace ? 0 : Ops::depth(kColumns) * d),
          g(Ops::depth(kColumns) * kRows),
          g_t(Ops::depth(kRows) * kColumns),
          s(kRows * kColumns),
          s_t(kRows * kColumns) {}
  };

  GradientPass(const Strip<A>& strip, float logit_scale, bool gradients, Input* dx, Input* dy,
               int64_t chain, Stash stash)
      : strip_(strip),
        logit_scale_(logit_scale),
        gradients_(gradients),
        dx_(dx),
        dy_(dy),
        chain_(chain),
        stash_(stash),
        tiles_(blocks(strip.m, kColumns)),
        groups_(std::min(tiles_, kMaxGroups)),
        wave_(std::max(kPartRows / std::max<int64_t>(groups_, 1) / kRows * kRows, kRows)),
        wave_rows_(std::min(wave_, round_up(strip.n, kRows))),
        parts_(gradients && dx != nullptr ? groups_ * wave_rows_ * strip.d : 0),
        dy_sums_(gradients && sizeof(Input) != 4 ? strip.m * strip.d : 0),
        right_(Ops::kRightRowsInPlace ? 0 : wave_rows_ / kRows * right_block()) {
    for (int i = 0; i < at::get_num_threads(); ++i) scratch_.emplace_back(strip.d);
  }

  int64_t chain_of_g() const { return strip_.d <= kFewFeatures ? kShortChain : kDefaultChain; }
  int64_t right_block() const { return Ops::depth(kRows) * strip_.d; }
  float* dy_sums() const {
    return sizeof(Input) == 4 ? reinterpret_cast<float*>(dy_) : dy_sums_.get();
  }

  template <typename Epilogue>
  GradientSums wave(int64_t first, int64_t rows, const Epilogue& epilogue) {
    pack_wave(first, rows);
    std::vector<GradientSums> sums(groups_);
    at::parallel_for(0, groups_, 1, [&](int64_t begin, int64_t end) {
      Scratch& scratch = scratch_[at::get_thread_num()];
      for (int64_t group = begin; group < end; ++group) {
        const int64_t last = tiles_ * (group + 1) / groups_;
        for (int64_t tile = tiles_ * group / groups_; tile < last; ++tile)
          sums[group] += column_tile(first, rows, group, tile, epilogue, scratch);
      }
      release_matrix_unit();
    });
    // Without columns there are no parts to add, and dx is zero already.
    if (gradients_ && dx_ != nullptr && groups_ > 0) finish_dx(first, rows);
    GradientSums total;
    for (const GradientSums& part : sums) total += part;
    return total;
  }

  // The wave's rows as right operand of G^T x.
  void pack_wave(int64_t first, int64_t rows) {
    if (Ops::kRightRowsInPlace || !gradients_) return;
    at::parallel_for(0, blocks(rows, kRows), 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t row = block * kRows, count = std::min(kRows, rows - row);
        const Input* x = strip_.x + (first + row) * strip_.ld_x;
        Ops::right_rows(x, strip_.ld_x, count, strip_.d, right_.get() + block * right_block(),
                        strip_.d);
      }
    });
  }

  template <typename Epilogue>
  GradientSums column_tile(int64_t first, int64_t rows, int64_t group, int64_t tile,
                           const Epilogue& epilogue, Scratch& scratch) {
    const int64_t d = strip_.d, column = tile * kColumns;
    const int64_t columns = std::min(kColumns, strip_.m - column);
    const Input* y = strip_.y + column * strip_.ld_y;
    if (!stash_) Ops::right_transposed(y, strip_.ld_y, columns, d, scratch.right_t.get(), kColumns);
    if (gradients_ && dx_ != nullptr)
      Ops::right_rows(y, strip_.ld_y, columns, d, scratch.right.get(), d);
    const bool first_tile = tile == tiles_ * group / groups_;
    GradientSums sums;
    for (int64_t row = 0; row < rows; row += kRows) {
      const TileRange range{first + row, std::min(kRows, rows - row), column, columns};
      products(range, scratch);
      sums += epilogue(range, scratch.s.get(), kColumns);
      if (!gradients_) continue;
      if (dx_ != nullptr)
        add_dx(range, parts_.get() + (group * wave_rows_ + row) * d, !first_tile, y, scratch);
      add_dy(range, right_operand(first, row), range.row > 0, scratch);
    }
    return sums;
  }

  void products(const TileRange& range, Scratch& scratch) const {
    float* s = scratch.s.get();
    if (stash_) {
      const float* dots = stash_.tile(range.row, range.column);
      for (int64_t i = 0; i < range.rows; ++i)
        std::copy_n(dots + i * Stash::kColumns, range.columns, s + i * kColumns);
    } else {
      multiply(range.rows, range.columns, strip_.d, strip_.x + range.row * strip_.ld_x, strip_.ld_x,
               scratch.right_t.get(), kColumns, s, kColumns, false, chain_);
    }
  }

  const Input* right_operand(int64_t first, int64_t row) const {
    if constexpr (Ops::kRightRowsInPlace)
      return strip_.x + (first + row) * strip_.ld_x;
    else
      return right_.get() + row / kRows * right_block();
  }

  void add_dx(const TileRange& range, float* part, bool accumulate, const Input* y,
              Scratch& scratch) {
    const int64_t d = strip_.d, depth = Ops::depth(range.columns);
    if constexpr (Ops::kRightRowsInPlace) {
      multiply(range.rows, d, depth, scratch.s.get(), kColumns, y, strip_.ld_y, part, d, accumulate,
               chain_of_g());
    } else {
      Ops::left_tile(scratch.s.get(), kColumns, range.rows, range.columns, scratch.g.get());
      multiply(range.rows, d, depth, scratch.g.get(), depth, scratch.right.get(), d, part, d,
               accumulate);
    }
  }

  void add_dy(const TileRange& range, const Input* right, bool accumulate, Scratch& scratch) {
    const int64_t d = strip_.d, depth = Ops::depth(range.rows);
    float* s_t = scratch.s_t.get();
    float* out = dy_sums() + range.column * d;
    transpose(scratch.s.get(), kColumns, range.rows, range.columns, s_t, kRows);
    if constexpr (A == Arithmetic::kFloat) {
      multiply(range.columns, d, depth, s_t, kRows, right, strip_.ld_x, out, d, accumulate,
               chain_of_g());
    } else {
      if (range.rows % 2)
        for (int64_t j = 0; j < range.columns; ++j) s_t[j * kRows + range.rows] = 0.f;
      Ops::left_tile(s_t, kRows, range.columns, range.rows, scratch.g_t.get());
      multiply(range.columns, d, depth, scratch.g_t.get(), depth, right, d, out, d, accumulate);
    }
  }

  void finish_dx(int64_t first, int64_t rows) {
    const int64_t d = strip_.d, part = wave_rows_ * d;
    at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      add_parts(parts_.get() + begin * d, part, groups_, (end - begin) * d,
                dx_ + (first + begin) * d);
    });
  }

  void finish_dy() {
    const int64_t d = strip_.d;
    if (strip_.n == 0) return void(std::fill_n(dy_, strip_.m * d, Input(0.f)));
    at::parallel_for(0, strip_.m, 16, [&](int64_t begin, int64_t end) {
      add_parts(dy_sums() + begin * d, 0, 1, (end - begin) * d, dy_ + begin * d);
    });
  }

  // out = logit_scale * (the sum of `parts` arrays, `stride` apart); out may be the first of them.
  void add_parts(const float* in, int64_t stride, int64_t parts, int64_t count, Input* out) const {
    int64_t e = 0;
    for (; e + kLanes <= count; e += kLanes) {
      Floats total = load(in + e);
      for (int64_t p = 1; p < parts; ++p) total += load(in + p * stride + e);
      alignas(64) float scaled[kLanes];
      store(scaled, total * logit_scale_);
      narrow(scaled, kLanes, out + e);
    }
    for (; e < count; ++e) {
      float total = in[e];
      for (int64_t p = 1; p < parts; ++p) total += in[p * stride + e];
      out[e] = static_cast<Input>(logit_scale_ * total);
    }
  }

  static void narrow(const float* in, int64_t count, float* out) { std::copy_n(in, count, out); }
  static void narrow(const float* in, int64_t count, BFloat16* out) { to_bf16(in, count, out); }

  const Strip<A>& strip_;
  float logit_scale_;
  bool gradients_;
  Input *dx_, *dy_;
  int64_t chain_;
  Stash stash_;
  int64_t tiles_, groups_, wave_, wave_rows_;
  Buffer<float> parts_, dy_sums_;
  Buffer<Input> right_;
  std::vector<Scratch> scratch_;
};

}  // namespace protoclip
