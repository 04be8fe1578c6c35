// InfoNCE on the CPU: the statistics of a strip, and its gradients. Contract: ops/info_nce.py.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "strip_gradient.h"
#include "strip_inputs.h"

namespace protoclip {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
// Logits this far apart (base 2) still share one reference value: 2^-126 is below the rounding of
// the smallest maximum's sum.
constexpr float kSharedSpread = 80.f;

// (max, sum of 2^(s - max)) of `count` rows or columns, merged into a running pair.
void merge(float* max, float* sum, const float* other_max, const float* other_sum, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats a = load(max + i), b = load(other_max + i), top = larger(a, b);
    store(sum + i, load(sum + i) * exp2(a - top) + load(other_sum + i) * exp2(b - top));
    store(max + i, top);
  }
}

struct Pair {
  at::Tensor max, sum;
};

template <Arithmetic A>
class Statistics {
  using Ops = Operands<A>;
  using Packed = typename Ops::Packed;
  static constexpr int64_t kRows = 128, kColumns = 256;         // 128 KB of fp32 logits
  static constexpr int64_t kRowChunks = 8, kColumnChunks = 32;  // at most: the parallel tasks

 public:
  Statistics(const Strip<A>& strip, float scale2, int64_t offset, bool columns)
      : strip_(strip),
        scale2_(scale2),
        offset_(offset),
        columns_(columns),
        row_chunk_(kRows * blocks(strip.n, kRows * kRowChunks)),
        column_chunk_(kColumns * blocks(strip.m, kColumns * kColumnChunks)),
        row_chunks_(blocks(strip.n, std::max<int64_t>(row_chunk_, 1))),
        column_chunks_(blocks(strip.m, std::max<int64_t>(column_chunk_, 1))),
        row_stride_(round_up(strip.n, kRows)),
        column_stride_(round_up(strip.m, kColumns)),
        row_max_(column_chunks_ * row_stride_),
        row_sum_(column_chunks_ * row_stride_),
        column_max_(row_chunks_ * column_stride_),
        column_sum_(row_chunks_ * column_stride_) {
    for (int i = 0; i < at::get_num_threads(); ++i) scratch_.emplace_back(strip.d);
  }

  void run(float* positive) {
    at::parallel_for(0, row_chunks_ * column_chunks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task)
        chunk(task / column_chunks_, task % column_chunks_, positive);
      release_matrix_unit();
    });
  }

  Pair rows() const { return total(row_max_, row_sum_, column_chunks_, row_stride_, strip_.n); }
  Pair columns() const {
    if (!columns_) return {at::empty({0}, at::kFloat), at::empty({0}, at::kFloat)};
    return total(column_max_, column_sum_, row_chunks_, column_stride_, strip_.m);
  }

 private:
  struct Scratch {  // of one thread
    Buffer<Packed> right, left;
    Buffer<float> s, row_max, row_sum, column_max, column_sum;
    explicit Scratch(int64_t d)
        : right(Ops::depth(d) * kColumns),
          left(Ops::kLeftInPlace ? 0 : Ops::depth(d) * kRows),
          s(kRows * kColumns),
          row_max(kRows),
          row_sum(kRows),
          column_max(kColumns),
          column_sum(kColumns) {}
  };

  void chunk(int64_t row_chunk, int64_t column_chunk, float* positive) {
    Scratch& scratch = scratch_[at::get_thread_num()];
    const int64_t row_begin = row_chunk * row_chunk_, column_begin = column_chunk * column_chunk_;
    const int64_t row_end = std::min(row_begin + row_chunk_, strip_.n);
    const int64_t column_end = std::min(column_begin + column_chunk_, strip_.m);
    float* row_max = row_max_.get() + column_chunk * row_stride_;
    float* row_sum = row_sum_.get() + column_chunk * row_stride_;
    float* column_max = column_max_.get() + row_chunk * column_stride_;
    float* column_sum = column_sum_.get() + row_chunk * column_stride_;
    clear(row_max, row_sum, row_begin, round_up(row_end, kRows));
    clear(column_max, column_sum, column_begin, round_up(column_end, kColumns));
    for (int64_t column = column_begin; column < column_end; column += kColumns) {
      const int64_t columns = std::min(kColumns, column_end - column);
      Ops::right_transposed(strip_.y + column * strip_.ld_y, strip_.ld_y, columns, strip_.d,
                            scratch.right.get(), kColumns);
      for (int64_t row = row_begin; row < row_end; row += kRows) {
        const TileRange range{row, std::min(kRows, row_end - row), column, columns};
        tile(range, positive, scratch);
        merge(row_max + row, row_sum + row, scratch.row_max.get(), scratch.row_sum.get(),
              range.rows);
        if (columns_)
          merge(column_max + column, column_sum + column, scratch.column_max.get(),
                scratch.column_sum.get(), range.columns);
      }
    }
  }

  static void clear(float* max, float* sum, int64_t begin, int64_t end) {
    std::fill(max + begin, max + end, -kInfinity);
    std::fill(sum + begin, sum + end, 0.f);
  }

  void tile(const TileRange& range, float* positive, Scratch& scratch) {
    float* s = scratch.s.get();
    const auto* left = left_operand(range, scratch);
    const int64_t stride = Ops::kLeftInPlace ? strip_.ld_x : Ops::depth(strip_.d);
    multiply(range.rows, range.columns, Ops::depth(strip_.d), left, stride, scratch.right.get(),
             kColumns, s, kColumns);
    maxima(range, scratch);
    const bool has_positive = range.has_positive(offset_);
    if (has_positive) {
      for (int64_t i = 0; i < range.rows; ++i) {
        const int64_t j = range.row + i + offset_ - range.column;
        if (0 <= j && j < range.columns) positive[range.row + i] = s[i * kColumns + j];
      }
    }
    // One exponential a logit, where a shared reference loses nothing. Not at the positives: a loss
    // near zero needs the maximum's own weight to be exactly one.
    const float top = *std::max_element(scratch.row_max.get(), scratch.row_max.get() + range.rows);
    const float low = std::min(
        *std::min_element(scratch.row_max.get(), scratch.row_max.get() + range.rows),
        *std::min_element(scratch.column_max.get(), scratch.column_max.get() + range.columns));
    if (!has_positive && top - low <= kSharedSpread)
      sums_shared(range, top, scratch);
    else
      sums_exact(range, scratch);
  }

  const Packed* left_operand(const TileRange& range, Scratch& scratch) const {
    const auto* x = strip_.x + range.row * strip_.ld_x;
    if constexpr (Ops::kLeftInPlace) {
      return x;
    } else {
      Ops::left(x, strip_.ld_x, range.rows, strip_.d, scratch.left.get());
      return scratch.left.get();
    }
  }

  // Scales the tile to base-2 logits, fills the lanes past the last column with -inf, and finds
  // the maxima of rows and columns.
  void maxima(const TileRange& range, Scratch& scratch) const {
    const int64_t width = round_up(range.columns, kLanes);
    const Floats scale = broadcast(scale2_), lowest = broadcast(-kInfinity);
    for (int64_t j = 0; j < width; j += kLanes) store(scratch.column_max.get() + j, lowest);
    for (int64_t i = 0; i < range.rows; ++i) {
      float* s = scratch.s.get() + i * kColumns;
      Floats row = lowest;
      for (int64_t j = 0; j < width; j += kLanes) {
        Floats v = load(s + j) * scale;
        if (j + kLanes > range.columns)
          for (int64_t lane = range.columns - j; lane < kLanes; ++lane) v[lane] = -kInfinity;
        store(s + j, v);
        row = larger(row, v);
        float* column = scratch.column_max.get() + j;
        store(column, larger(load(column), v));
      }
      scratch.row_max.get()[i] = maximum(row);
    }
  }

  void sums_shared(const TileRange& range, float top, Scratch& scratch) const {
    const int64_t width = round_up(range.columns, kLanes);
    const Floats reference = broadcast(top);
    float *row_sum = scratch.row_sum.get(), *column_sum = scratch.column_sum.get();
    std::fill_n(column_sum, width, 0.f);
    for (int64_t i = 0; i < range.rows; ++i) {
      const float* s = scratch.s.get() + i * kColumns;
      Floats row{};
      for (int64_t j = 0; j < width; j += kLanes) {
        const Floats e = exp2(load(s + j) - reference);
        row += e;
        store(column_sum + j, load(column_sum + j) + e);
      }
      row_sum[i] = sum(row);
    }
    rebase(row_sum, scratch.row_max.get(), reference, range.rows);
    rebase(column_sum, scratch.column_max.get(), reference, range.columns);
  }

  static void rebase(float* sum, const float* max, Floats reference, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes)
      store(sum + i, load(sum + i) * exp2(reference - load(max + i)));
  }

  void sums_exact(const TileRange& range, Scratch& scratch) const {
    const int64_t width = round_up(range.columns, kLanes);
    const float *row_max = scratch.row_max.get(), *column_max = scratch.column_max.get();
    float* column_sum = scratch.column_sum.get();
    std::fill_n(column_sum, width, 0.f);
    for (int64_t i = 0; i < range.rows; ++i) {
      const float* s = scratch.s.get() + i * kColumns;
      const Floats reference = broadcast(row_max[i]);
      Floats row{};
      for (int64_t j = 0; j < width; j += kLanes) {
        const Floats v = load(s + j);
        row += exp2(v - reference);
        store(column_sum + j, load(column_sum + j) + exp2(v - load(column_max + j)));
      }
      scratch.row_sum.get()[i] = sum(row);
    }
  }

  static Pair total(const Buffer<float>& max, const Buffer<float>& sum, int64_t chunks,
                    int64_t stride, int64_t count) {
    Pair out{at::empty({count}, at::kFloat), at::empty({count}, at::kFloat)};
    if (chunks == 0) {
      out.max.fill_(-kInfinity);
      out.sum.zero_();
      return out;
    }
    for (int64_t c = 1; c < chunks; ++c)
      merge(max.get(), sum.get(), max.get() + c * stride, sum.get() + c * stride, count);
    std::copy_n(max.get(), count, out.max.mutable_data_ptr<float>());
    std::copy_n(sum.get(), count, out.sum.mutable_data_ptr<float>());
    return out;
  }

  const Strip<A>& strip_;
  float scale2_;
  int64_t offset_;
  bool columns_;
  int64_t row_chunk_, column_chunk_, row_chunks_, column_chunks_, row_stride_, column_stride_;
  Buffer<float> row_max_, row_sum_, column_max_, column_sum_;  // [chunks, stride]
  std::vector<Scratch> scratch_;
};

// What a row or a column brings into G: its reference and its weight over its sum.
struct Side {
  Buffer<float> reference, weight;
  Side(const at::Tensor& max, const at::Tensor& sum, const at::Tensor& weight_, int64_t count)
      : reference(round_up(count, kLanes)), weight(round_up(count, kLanes)) {
    const bool given = max.numel() > 0;
    for (int64_t i = 0; i < round_up(count, kLanes); ++i) {
      const bool used = given && i < count;
      reference.get()[i] = used ? max.const_data_ptr<float>()[i] : 0.f;
      weight.get()[i] =
          used ? weight_.const_data_ptr<float>()[i] / sum.const_data_ptr<float>()[i] : 0.f;
    }
  }
};

// Turns dot products into G = row_weight P_row + column_weight P_column - weights at positives.
class InfoNceGradient {
 public:
  InfoNceGradient(const Side& row, const Side& column, const float* row_weight,
                  const float* column_weight, float scale2, int64_t offset)
      : row_(row),
        column_(column),
        row_weight_(row_weight),
        column_weight_(column_weight),
        scale2_(scale2),
        offset_(offset) {}

  GradientSums operator()(const TileRange& range, float* s, int64_t ld) const {
    if (range.has_positive(offset_)) return exact(range, s, ld);
    const float* row = row_.reference.get() + range.row;
    const auto rows = std::minmax_element(row, row + range.rows);
    float low = *rows.first, high = *rows.second;
    if (column_weight_ != nullptr) {
      const float* column = column_.reference.get() + range.column;
      const auto columns = std::minmax_element(column, column + range.columns);
      low = std::min(low, *columns.first), high = std::max(high, *columns.second);
    }
    return high - low <= kSharedSpread ? shared(range, s, ld, low) : exact(range, s, ld);
  }

 private:
  // `weigh(i, j, v) -> G` on vectors of base-2 logits, for all of the tile.
  template <typename Weigh>
  GradientSums each(const TileRange& range, float* s, int64_t ld, const Weigh& weigh) const {
    const Floats scale = broadcast(scale2_);
    GradientSums sums;
    for (int64_t i = 0; i < range.rows; ++i, s += ld) {
      Floats row{};
      for (int64_t j = 0; j < range.columns; j += kLanes) {
        Floats dot = load(s + j);
        const int64_t used = range.columns - j;
        for (int64_t lane = used; lane < kLanes; ++lane) dot[lane] = 0.f;
        Floats g = weigh(i, j, dot * scale);
        for (int64_t lane = used; lane < kLanes; ++lane) g[lane] = 0.f;
        row += g * dot;
        store(s + j, g);
      }
      sums.g_dot += sum(row);
    }
    return sums;
  }

  GradientSums shared(const TileRange& range, float* s, int64_t ld, float low) const {
    const Floats reference = broadcast(low);
    alignas(64) float rows[256], columns[256];
    factors(row_, range.row, range.rows, reference, rows);
    factors(column_, range.column, range.columns, reference, columns);
    return each(range, s, ld, [&](int64_t i, int64_t j, Floats v) {
      return exp2(v - reference) * (load(columns + j) + rows[i]);
    });
  }

  static void factors(const Side& side, int64_t first, int64_t count, Floats reference,
                      float* out) {
    for (int64_t i = 0; i < count; i += kLanes)
      store(out + i, load(side.weight.get() + first + i) *
                         exp2(reference - load(side.reference.get() + first + i)));
  }

  GradientSums exact(const TileRange& range, float* s, int64_t ld) const {
    const float *row_reference = row_.reference.get() + range.row,
                *row_factor = row_.weight.get() + range.row,
                *column_reference = column_.reference.get() + range.column,
                *column_factor = column_.weight.get() + range.column;
    return each(range, s, ld, [&](int64_t i, int64_t j, Floats v) {
      Floats g = exp2(v - row_reference[i]) * row_factor[i];
      if (column_weight_ != nullptr)
        g += exp2(v - load(column_reference + j)) * load(column_factor + j);
      const int64_t p = range.row + i + offset_ - range.column - j;  // the positive's lane
      if (0 <= p && p < kLanes) g[p] -= positive_weight(range.row + i);
      return g;
    });
  }

  float positive_weight(int64_t i) const {
    return row_weight_[i] + (column_weight_ != nullptr ? column_weight_[i + offset_] : 0.f);
  }

  const Side &row_, &column_;
  const float *row_weight_, *column_weight_;
  float scale2_;
  int64_t offset_;
};

template <Arithmetic A>
std::vector<at::Tensor> forward(const Inputs& in, int64_t offset, bool columns) {
  const Strip<A> strip(in.x, in.y);
  Statistics<A> statistics(strip, in.scale * kLog2E, offset, columns);
  at::Tensor positive = at::empty({strip.n}, at::kFloat);
  statistics.run(positive.mutable_data_ptr<float>());
  const auto rows = statistics.rows(), by_column = statistics.columns();
  return {rows.max, rows.sum, by_column.max, by_column.sum, positive};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_fwd(
    const at::Tensor& x, const at::Tensor& y, const at::Tensor& scale, int64_t offset, bool columns,
    c10::string_view arithmetic) {
  const Inputs in("contrastive_fwd", x, y, scale, offset, arithmetic);
  const auto out =
      in.dispatch([&](auto a) { return forward<decltype(a)::value>(in, offset, columns); });
  return {out[0], out[1], out[2], out[3], out[4]};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> contrastive_bwd(
    const at::Tensor& x, const at::Tensor& y, const at::Tensor& scale, const at::Tensor& row_max,
    const at::Tensor& row_sum, const at::Tensor& column_max, const at::Tensor& column_sum,
    const at::Tensor& row_weight, const at::Tensor& column_weight, int64_t offset,
    c10::string_view arithmetic) {
  const Inputs in("contrastive_bwd", x, y, scale, offset, arithmetic);
  const bool columns = column_max.numel() > 0;
  const at::Tensor row_w = row_weight.to(at::kFloat).contiguous();
  const at::Tensor column_w = column_weight.to(at::kFloat).contiguous();
  const Side row(row_max.contiguous(), row_sum.contiguous(), row_w, in.x.size(0));
  const Side column(column_max.contiguous(), column_sum.contiguous(), column_w, in.y.size(0));
  const InfoNceGradient epilogue(row, column, row_w.const_data_ptr<float>(),
                                 columns ? column_w.const_data_ptr<float>() : nullptr,
                                 in.scale * kLog2E, offset);
  Gradients out(in);
  const GradientSums sums = in.dispatch([&](auto a) {
    const Strip<decltype(a)::value> strip(in.x, in.y);
    using Input = typename Operands<decltype(a)::value>::Input;
    return GradientPass<decltype(a)::value>::run(strip, epilogue, in.scale, true,
                                                 out.dx.mutable_data_ptr<Input>(),
                                                 out.dy.mutable_data_ptr<Input>());
  });
  return {out.finish(out.dx, x), out.finish(out.dy, y),
          at::full({}, sums.g_dot, at::TensorOptions(at::kFloat))};
}

}  // namespace
}  // namespace protoclip

TORCH_LIBRARY_FRAGMENT(protoclip_native, m) {
  m.def(
      "contrastive_fwd(Tensor x, Tensor y, Tensor scale, int offset, bool columns,"
      " str arithmetic) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "contrastive_bwd(Tensor x, Tensor y, Tensor scale, Tensor row_max, Tensor row_sum,"
      " Tensor column_max, Tensor column_sum, Tensor row_weight, Tensor column_weight, int offset,"
      " str arithmetic) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(protoclip_native, CPU, m) {
  m.impl("contrastive_fwd", protoclip::contrastive_fwd);
  m.impl("contrastive_bwd", protoclip::contrastive_bwd);
}
