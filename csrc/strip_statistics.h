// The statistics of a strip, x [N, D] against y [M, D]: for each row and each column of its base-2
// logits the maximum and the sum of 2^(s - maximum), in one pass over the tiles; of MatchedPairs
// (pairs.h) over the logits that are seen, and the sum and count of the positives' logits.
//
// The parallel tasks are chunks of rows by chunks of columns; their partial statistics, at most
// kColumnChunks a row and kRowChunks a column, are merged in order. Chunks depend on the shape
// alone, so the bits do not depend on the number of threads. y is transposed once for all chunks of
// rows where that takes kMostTransposed bytes at most.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <utility>
#include <vector>

#include "pairs.h"

namespace protoclip {

// Logits this far apart (base 2) still share one reference value: 2^-126 is below the rounding of
// the smallest maximum's sum.
constexpr float kSpread = 80.f;  // SPREAD of the Triton kernels, which share a reference both ways

// (max, sum of 2^(s - max)) of `count` rows or columns, merged into a running pair.
inline void merge(float* max, float* sum, const float* other_max, const float* other_sum,
                  int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats a = load(max + i), b = load(other_max + i), top = larger(a, b);
    store(sum + i, load(sum + i) * exp2(a - top) + load(other_sum + i) * exp2(b - top));
    store(max + i, top);
  }
}

// The rows of the statistics, as the contrastive ops return and take them: PairStatistics
// (kernels/results.py).
enum StatisticsRow : int64_t { kMaxRow, kSumRow, kPositiveSumRow, kNumPositivesRow };

// The length of such a row: a GPU reads whole sectors then.
inline int64_t statistics_length(int64_t length) { return round_up(length, 8); }

inline float* row_of(const at::Tensor& statistics, StatisticsRow row) {
  return static_cast<float*>(statistics.data_ptr()) + row * statistics.size(1);
}

template <Arithmetic A, typename Pairs>
class Statistics {
  using Ops = Operands<A>;
  using Input = typename Ops::Input;
  static constexpr int64_t kRows = Stash::kRows, kColumns = Stash::kColumns;
  static constexpr int64_t kGroup = 16;                         // rows of one column sum
  static constexpr int64_t kRowChunks = 4, kColumnChunks = 32;  // at most: the parallel tasks
  static constexpr int64_t kMostTransposed = 5 << 20;           // 4,096 x 512 in bf16
  static constexpr int64_t kLdRight = kColumns + kLanes;

 public:
  // Where there is a `stash`, the dot products stay there for the backward pass.
  Statistics(const Strip<A>& strip, Base2 base2, const Pairs& pairs, bool both_directions,
             Stash stash)
      : strip_(strip),
        base2_(base2),
        pairs_(pairs),
        both_directions_(both_directions),
        stash_(stash),
        row_chunk_(kRows * blocks(strip.n, kRows * kRowChunks)),
        column_chunk_(kColumns * blocks(strip.m, kColumns * kColumnChunks)),
        row_chunks_(blocks(strip.n, std::max<int64_t>(row_chunk_, 1))),
        column_chunks_(blocks(strip.m, std::max<int64_t>(column_chunk_, 1))),
        row_stride_(round_up(strip.n, kRows)),
        column_stride_(round_up(strip.m, kColumns)),
        rows_(column_chunks_, row_stride_),
        by_column_(row_chunks_, column_stride_),
        transposed_size_(Ops::depth(strip.d) * kLdRight * (column_stride_ / kColumns)),
        // Of one tile of columns every task may as well have its own, in its caches.
        transposes_once_(row_chunks_ > 1 && column_chunks_ > 1 &&
                         transposed_size_ * int64_t{sizeof(Input)} <= kMostTransposed),
        transposed_(transposes_once_ ? transposed_size_ : 0),
        of_rows_(at::zeros({4, statistics_length(strip.n)}, at::kFloat)),
        of_columns_(at::zeros({4, both_directions ? statistics_length(strip.m) : 0}, at::kFloat)) {
    for (int i = 0; i < at::get_num_threads(); ++i)
      scratch_.emplace_back(transposes_once_ ? 0 : strip.d);
  }

  // The statistics of the rows, and of the columns, or [4, 0] of one direction.
  std::pair<at::Tensor, at::Tensor> run() {
    at::parallel_for(0, transposes_once_ ? blocks(strip_.m, kColumns) : 0, 1,
                     [&](int64_t begin, int64_t end) {
                       for (int64_t tile = begin; tile < end; ++tile)
                         transpose(tile * kColumns, transposed(tile * kColumns));
                     });
    at::parallel_for(0, row_chunks_ * column_chunks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task)
        chunk(task / column_chunks_, task % column_chunks_);
      release_matrix_unit();
    });
    rows_.total(of_rows_, strip_.n);
    by_column_.total(of_columns_, both_directions_ ? strip_.m : 0);
    return {of_rows_, of_columns_};
  }

 private:
  struct SideBuffers {  // of rows or columns
    Buffer<float> max, sum, positive_sum, num_positives;
    explicit SideBuffers(int64_t size)
        : max(size),
          sum(size),
          positive_sum(Pairs::kMatched ? size : 0),
          num_positives(Pairs::kMatched ? size : 0) {}
  };

  struct Scratch {  // of one thread and tile
    Buffer<Input> right;
    Buffer<float> s, group_sum;
    SideBuffers row, column;
    explicit Scratch(int64_t d)
        : right(Ops::depth(d) * kLdRight),
          s(kRows * kColumns),
          group_sum(kColumns),
          row(kRows),
          column(kColumns) {}
  };

  // Partial statistics, [chunks, stride].
  struct Partials : SideBuffers {
    using SideBuffers::max, SideBuffers::num_positives, SideBuffers::positive_sum, SideBuffers::sum;
    int64_t chunks, stride;
    Partials(int64_t chunks, int64_t stride)
        : SideBuffers(chunks * stride), chunks(chunks), stride(stride) {}

    // Merges those of a tile into the `size` from `at` on.
    void add(int64_t at, const SideBuffers& tile, int64_t size) const {
      merge(max.get() + at, sum.get() + at, tile.max.get(), tile.sum.get(), size);
      for (int64_t i = 0; Pairs::kMatched && i < size; ++i) {
        positive_sum.get()[at + i] += tile.positive_sum.get()[i];
        num_positives.get()[at + i] += tile.num_positives.get()[i];
      }
    }

    void clear(int64_t chunk, int64_t begin, int64_t end) const {
      const int64_t at = chunk * stride + begin, size = end - begin;
      std::fill_n(max.get() + at, size, -kInfinity);
      std::fill_n(sum.get() + at, size, 0.f);
      if constexpr (Pairs::kMatched) {
        std::fill_n(positive_sum.get() + at, size, 0.f);
        std::fill_n(num_positives.get() + at, size, 0.f);
      }
    }

    // Into the statistics of `size`, of which the positives' of DiagonalPairs are there already.
    void total(const at::Tensor& out, int64_t size) const {
      if (chunks == 0) std::fill_n(row_of(out, kMaxRow), size, -kInfinity);
      if (chunks == 0) return;
      for (int64_t c = 1; c < chunks; ++c)
        merge(max.get(), sum.get(), max.get() + c * stride, sum.get() + c * stride, size);
      for (int64_t i = 0; Pairs::kMatched && i < size; ++i)
        if (max.get()[i] <= kUnseen) max.get()[i] = -kInfinity, sum.get()[i] = 0.f;
      std::copy_n(max.get(), size, row_of(out, kMaxRow));
      std::copy_n(sum.get(), size, row_of(out, kSumRow));
      float *sums = row_of(out, kPositiveSumRow), *counts = row_of(out, kNumPositivesRow);
      for (int64_t c = 0; Pairs::kMatched && c < chunks; ++c) {
        for (int64_t i = 0; i < size; ++i) {
          sums[i] += positive_sum.get()[c * stride + i];
          counts[i] += num_positives.get()[c * stride + i];
        }
      }
    }
  };

  // y transposed, of the tile of columns from `column` on.
  Input* transposed(int64_t column) const {
    return transposed_.get() + column / kColumns * kLdRight * Ops::depth(strip_.d);
  }

  void transpose(int64_t column, Input* out) const {
    Ops::right_transposed(strip_.y + column * strip_.ld_y, strip_.ld_y,
                          std::min(kColumns, strip_.m - column), strip_.d, out, kLdRight);
  }

  void chunk(int64_t row_chunk, int64_t column_chunk) {
    Scratch& scratch = scratch_[at::get_thread_num()];
    const int64_t row_begin = row_chunk * row_chunk_, column_begin = column_chunk * column_chunk_;
    const int64_t row_end = std::min(row_begin + row_chunk_, strip_.n);
    const int64_t column_end = std::min(column_begin + column_chunk_, strip_.m);
    const int64_t rows = column_chunk * row_stride_, by_column = row_chunk * column_stride_;
    rows_.clear(column_chunk, row_begin, round_up(row_end, kRows));
    by_column_.clear(row_chunk, column_begin, round_up(column_end, kColumns));
    for (int64_t column = column_begin; column < column_end; column += kColumns) {
      const int64_t columns = std::min(kColumns, column_end - column);
      const Input* right = transposes_once_ ? transposed(column) : scratch.right.get();
      if (!transposes_once_) transpose(column, scratch.right.get());
      for (int64_t row = row_begin; row < row_end; row += kRows) {
        const TileRange range{row, std::min(kRows, row_end - row), column, columns};
        tile(range, right, scratch);
        rows_.add(rows + row, scratch.row, range.rows);
        if (both_directions_) by_column_.add(by_column + column, scratch.column, range.columns);
      }
    }
  }

  void tile(const TileRange& range, const Input* right, Scratch& scratch) {
    float* s = scratch.s.get();
    float* dots = stash_ ? stash_.tile(range.row, range.column) : s;
    multiply(range.rows, range.columns, strip_.d, strip_.x + range.row * strip_.ld_x, strip_.ld_x,
             right, kLdRight, dots, kColumns);
    const bool has_own = pairs_.has_own(range);
    maxima(range, dots, scratch);
    if constexpr (!Pairs::kMatched) {
      for (int64_t i = 0; has_own && i < range.rows; ++i) {
        const int64_t j = range.row + i + pairs_.offset - range.column;
        if (j < 0 || j >= range.columns) continue;
        note_positive(of_rows_, range.row + i, s[i * kColumns + j]);
        if (both_directions_) note_positive(of_columns_, range.column + j, s[i * kColumns + j]);
      }
    }
    // One exponential a logit, where a shared reference loses nothing. Not at the positives: a loss
    // near zero needs the maximum's own weight to be exactly one.
    const float top = *std::max_element(scratch.row.max.get(), scratch.row.max.get() + range.rows);
    const float low = std::min(
        *std::min_element(scratch.row.max.get(), scratch.row.max.get() + range.rows),
        *std::min_element(scratch.column.max.get(), scratch.column.max.get() + range.columns));
    if (!has_own && top - low <= kSpread)
      sums_shared(range, top, scratch);
    else
      sums_exact(range, scratch);
  }

  // The only positive of a row or a column.
  static void note_positive(const at::Tensor& statistics, int64_t i, float logit) {
    row_of(statistics, kPositiveSumRow)[i] = logit;
    row_of(statistics, kNumPositivesRow)[i] = 1.f;
  }

  // Scales the tile to base-2 logits, fills the lanes past the last column with -inf, and finds
  // the maxima of rows and columns.
  void maxima(const TileRange& range, const float* dots, Scratch& scratch) const {
    const int64_t width = round_up(range.columns, kLanes);
    const Floats lowest = broadcast(-kInfinity);
    if (Pairs::kMatched) {
      std::fill_n(scratch.column.positive_sum.get(), width, 0.f);
      std::fill_n(scratch.column.num_positives.get(), width, 0.f);
    }
    for (int64_t j = 0; j < width; j += kLanes) store(scratch.column.max.get() + j, lowest);
    for (int64_t i = 0; i < range.rows; ++i) {
      float* s = scratch.s.get() + i * kColumns;
      Floats row = lowest, positive_sum{}, num_positives{};
      const auto pairs = pairs_.row(range.row + i);
      for (int64_t j = 0; j < width; j += kLanes) {
        Floats v = base2_(load(dots + i * kColumns + j));
        if constexpr (Pairs::kMatched) {
          v = pairs.biased(v, range.column + j);
          const Lanes lanes = pairs.at(range.column + j);
          v = lanes.unseen ? broadcast(kUnseen) : v;
          if (any(lanes.positive)) {
            const Floats positive = lanes.positive ? v : Floats{};
            const Floats one = lanes.positive ? broadcast(1.f) : Floats{};
            float* column_sum = scratch.column.positive_sum.get() + j;
            float* column_count = scratch.column.num_positives.get() + j;
            store(column_sum, load(column_sum) + positive);
            store(column_count, load(column_count) + one);
            positive_sum += positive, num_positives += one;
          }
        }
        if (j + kLanes > range.columns)
          for (int64_t lane = range.columns - j; lane < kLanes; ++lane) v[lane] = -kInfinity;
        store(s + j, v);
        row = larger(row, v);
        float* column = scratch.column.max.get() + j;
        store(column, larger(load(column), v));
      }
      scratch.row.max.get()[i] = maximum(row);
      if (Pairs::kMatched) {
        scratch.row.positive_sum.get()[i] = sum(positive_sum);
        scratch.row.num_positives.get()[i] = sum(num_positives);
      }
    }
  }

  void sums_shared(const TileRange& range, float top, Scratch& scratch) const {
    const int64_t width = round_up(range.columns, kLanes);
    const Floats reference = broadcast(top);
    float *row_sum = scratch.row.sum.get(), *column_sum = scratch.column.sum.get();
    by_row_groups(range, width, scratch, [&](int64_t i, const float* s, float* group_sum) {
      Floats row{};
      for (int64_t j = 0; j < width; j += kLanes) {
        const Floats e = exp2(load(s + j) - reference);
        row += e;
        store(group_sum + j, load(group_sum + j) + e);
      }
      row_sum[i] = sum(row);
    });
    rebase(row_sum, scratch.row.max.get(), reference, range.rows);
    rebase(column_sum, scratch.column.max.get(), reference, range.columns);
  }

  static void rebase(float* sum, const float* max, Floats reference, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes)
      store(sum + i, load(sum + i) * exp2(reference - load(max + i)));
  }

  void sums_exact(const TileRange& range, Scratch& scratch) const {
    const int64_t width = round_up(range.columns, kLanes);
    const float *row_max = scratch.row.max.get(), *column_max = scratch.column.max.get();
    by_row_groups(range, width, scratch, [&](int64_t i, const float* s, float* group_sum) {
      const Floats reference = broadcast(row_max[i]);
      Floats row{};
      for (int64_t j = 0; j < width; j += kLanes) {
        const Floats v = load(s + j);
        row += exp2(v - reference);
        store(group_sum + j, load(group_sum + j) + exp2(v - load(column_max + j)));
      }
      scratch.row.sum.get()[i] = sum(row);
    });
  }

  // Column sums by groups of rows: a long chain of equal terms rounds the same way at each step.
  // `add(i, logits of row i, sums of the group)` adds a row to its group.
  template <typename Add>
  static void by_row_groups(const TileRange& range, int64_t width, Scratch& scratch,
                            const Add& add) {
    float *column_sum = scratch.column.sum.get(), *group_sum = scratch.group_sum.get();
    std::fill_n(column_sum, width, 0.f);
    for (int64_t first = 0; first < range.rows; first += kGroup) {
      std::fill_n(group_sum, width, 0.f);
      for (int64_t i = first; i < std::min(first + kGroup, range.rows); ++i)
        add(i, scratch.s.get() + i * kColumns, group_sum);
      for (int64_t j = 0; j < width; j += kLanes)
        store(column_sum + j, load(column_sum + j) + load(group_sum + j));
    }
  }

  const Strip<A>& strip_;
  Base2 base2_;
  const Pairs& pairs_;
  bool both_directions_;
  Stash stash_;
  int64_t row_chunk_, column_chunk_, row_chunks_, column_chunks_, row_stride_, column_stride_;
  Partials rows_, by_column_;
  int64_t transposed_size_;  // of all of y, in whole tiles
  bool transposes_once_;
  Buffer<Input> transposed_;
  std::vector<Scratch> scratch_;
  at::Tensor of_rows_, of_columns_;
};

}  // namespace protoclip
