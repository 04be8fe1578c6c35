// One pass over the logits of a strip, x [N, D] against y [M, D], tile by tile, that forms
// G = dloss/dlogits and multiplies it on: dx = logit_scale G y, dy = logit_scale G^T x.
//
// A block of G at a time, in two rounds of parallel tasks. In the first a task has a tile of
// columns: it forms their G, keeps it, and adds G^T x to its rows of dy. In the second a task has
// some rows and features of dx and adds G y. So a sum belongs to one task, and its terms come in an
// order that depends on the shape alone: the bits do not depend on the number of threads. Both
// rounds have 64 tasks or more where N, M >= 4,096 and D >= 64. Beyond the outputs a pass keeps
// kBlockRows * kBlockColumns elements of G, and where the inputs are bf16 a block's rows of x and y
// again, and fp32 sums: M * D, and kBlockRows * D.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "strip.h"

namespace protoclip {

// Sums over all logits that an epilogue reports beside G.
struct GradientSums {
  double g_dot = 0, g = 0, loss = 0;
  void operator+=(const GradientSums& other) {
    g_dot += other.g_dot, g += other.g, loss += other.loss;
  }
};

// What an epilogue takes to G: dot products, which may lie where G goes.
struct GradientTile : TileRange {
  static constexpr int64_t kRows = 128, kColumns = 64;  // at most: 32 KB of fp32 logits
  const float* dots;
  int64_t ld_dots;
  float* g;
  int64_t ld;
};

template <Arithmetic A>
class GradientPass {
  using Ops = Operands<A>;
  using Input = typename Ops::Input;
  static constexpr bool kFloat = A == Arithmetic::kFloat;
  static constexpr int64_t kRows = GradientTile::kRows, kColumns = GradientTile::kColumns;
  static constexpr int64_t kBlockRows = 1024, kBlockColumns = 4096;
  static constexpr int64_t kTaskRows = 64, kTaskParts = 4;  // of dx, and of its features
  static constexpr int64_t kPad = 32;  // elements: rows a power of two apart share their cache sets

 public:
  static constexpr int64_t kDefaultChain = kFloat ? kChain : kBf16Chain;
  // Few features give no other errors for those of a long chain to drown in.
  static constexpr int64_t kFewFeatures = 16, kShortChain = 16;

  // `epilogue(tile) -> GradientSums` turns dot products into G and sets the lanes past the last
  // column, up to whole vectors, to zero. dx may be null: only dy is formed; or both. Where the
  // epilogue knows statistics of the logits, `chain` is that of the products behind them. Products
  // in the `stash` are read, not formed.
  template <typename Epilogue>
  static GradientSums run(const Strip<A>& strip, const Epilogue& epilogue, float logit_scale,
                          Input* dx, Input* dy, int64_t chain = kDefaultChain, Stash stash = {}) {
    if (dy != nullptr && strip.n == 0) std::fill_n(dy, strip.m * strip.d, Input(0.f));
    GradientPass pass(strip, logit_scale, dx, dy, chain, stash);
    GradientSums total;
    for (int64_t row = 0; row < strip.n; row += kBlockRows) {
      const int64_t rows = std::min(kBlockRows, strip.n - row);
      pass.pack_rows(row, rows);
      for (int64_t column = 0; column < strip.m; column += kBlockColumns) {
        const int64_t columns = std::min(kBlockColumns, strip.m - column);
        total += pass.block({row, rows, column, columns}, epilogue);
      }
    }
    return total;
  }

 private:
  // Rows as right operand: in place, or in pairs.
  struct RightRows {
    const Input* data;
    int64_t ld;
    const Input* at(int64_t row, int64_t feature) const {
      return data + row * ld + (kFloat ? feature : 2 * feature);
    }
  };

  struct Scratch {  // of one thread
    Buffer<Input> right_t, g, g_t;
    Buffer<float> s;
    explicit Scratch(int64_t d)
        : right_t(Ops::depth(d) * kColumns),
          g(kRows * kColumns),
          g_t(kColumns * kLdTransposed),
          s(kRows * kColumns) {}
  };
  static constexpr int64_t kLdTransposed = kDefaultChain + kPad;

  GradientPass(const Strip<A>& strip, float logit_scale, Input* dx, Input* dy, int64_t chain,
               Stash stash)
      : strip_(strip),
        logit_scale_(logit_scale),
        dx_(dx),
        dy_(dy),
        chain_(chain),
        stash_(stash),
        block_rows_(std::min(kBlockRows, round_up(strip.n, kRows))),
        block_columns_(std::min(kBlockColumns, round_up(strip.m, kColumns))),
        ld_g_(block_columns_ + kPad),
        ld_pairs_(strip.d + kPad / 2),
        g_(dx != nullptr ? block_rows_ * ld_g_ : 0),
        x_pairs_(!kFloat && dy != nullptr ? block_rows_ * ld_pairs_ : 0),
        y_pairs_(!kFloat && dx != nullptr ? block_columns_ * ld_pairs_ : 0),
        dx_sums_(!kFloat && dx != nullptr ? block_rows_ * strip.d : 0),
        dy_sums_(!kFloat && dy != nullptr ? strip.m * strip.d : 0) {
    for (int i = 0; i < at::get_num_threads(); ++i) scratch_.emplace_back(strip.d);
  }

  int64_t chain_of_g() const {
    return kFloat && strip_.d <= kFewFeatures ? kShortChain : kDefaultChain;
  }
  float* dx_sums(int64_t row) const {
    if constexpr (kFloat)
      return dx_ + row * strip_.d;
    else
      return dx_sums_.get();
  }
  float* dy_sums() const {
    if constexpr (kFloat)
      return dy_;
    else
      return dy_sums_.get();
  }
  // The block's rows of x, and of y.
  RightRows right_x(const TileRange& block) const {
    return kFloat ? RightRows{strip_.x + block.row * strip_.ld_x, strip_.ld_x}
                  : RightRows{x_pairs_.get(), ld_pairs_};
  }
  RightRows right_y(const TileRange& block) const {
    return kFloat ? RightRows{strip_.y + block.column * strip_.ld_y, strip_.ld_y}
                  : RightRows{y_pairs_.get(), ld_pairs_};
  }

  void pack_rows(int64_t first, int64_t rows) {
    if (kFloat || dy_ == nullptr) return;
    at::parallel_for(0, blocks(rows, kRows), 1, [&](int64_t begin, int64_t end) {
      const int64_t row = begin * kRows, last = std::min(end * kRows, rows);
      Ops::right_rows(strip_.x + (first + row) * strip_.ld_x, strip_.ld_x, last - row, strip_.d,
                      x_pairs_.get() + row * ld_pairs_, ld_pairs_);
    });
  }

  template <typename Epilogue>
  GradientSums block(const TileRange& block, const Epilogue& epilogue) {
    std::vector<GradientSums> sums(blocks(block.columns, kColumns));
    at::parallel_for(0, sums.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile)
        sums[tile] = column_tile(block, tile * kColumns, epilogue);
      release_matrix_unit();
    });
    if (dx_ != nullptr) {
      const int64_t features = std::max(round_up(blocks(strip_.d, kTaskParts), kLanes), kLanes);
      const int64_t parts = blocks(strip_.d, features),
                    tasks = blocks(block.rows, kTaskRows) * parts;
      at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task)
          add_dx(block, task / parts * kTaskRows, task % parts * features, features);
        release_matrix_unit();
      });
    }
    GradientSums total;
    for (const GradientSums& part : sums) total += part;
    return total;
  }

  // The columns from the block's `first` on against all of its rows.
  template <typename Epilogue>
  GradientSums column_tile(const TileRange& block, int64_t first, const Epilogue& epilogue) {
    Scratch& scratch = scratch_[at::get_thread_num()];
    const int64_t d = strip_.d, column = block.column + first;
    const int64_t columns = std::min(kColumns, block.columns - first);
    const Input* y = strip_.y + column * strip_.ld_y;
    if (!stash_) Ops::right_transposed(y, strip_.ld_y, columns, d, scratch.right_t.get(), kColumns);
    if (dx_ != nullptr)
      Ops::right_rows(y, strip_.ld_y, columns, d, y_pairs_.get() + first * ld_pairs_, ld_pairs_);
    GradientSums sums;
    for (int64_t row = 0; row < block.rows; row += kRows) {
      const TileRange range{block.row + row, std::min(kRows, block.rows - row), column, columns};
      Input* g = dx_ != nullptr ? g_.get() + row * ld_g_ + first : scratch.g.get();
      const int64_t ld_g = dx_ != nullptr ? ld_g_ : kColumns;
      sums += form(range, epilogue, g, ld_g, scratch);
      if (dy_ != nullptr) add_dy(block, range, g, ld_g, scratch);
    }
    if (dy_ != nullptr && block.row + block.rows == strip_.n)
      write(dy_sums() + column * d, columns, d, dy_ + column * d);
    return sums;
  }

  // G of a tile, from the stash or the inputs.
  template <typename Epilogue>
  GradientSums form(const TileRange& range, const Epilogue& epilogue, Input* g, int64_t ld_g,
                    Scratch& scratch) {
    float* s = scratch.s.get();
    int64_t ld = kColumns;
    if constexpr (kFloat) s = g, ld = ld_g;
    GradientTile tile{range, s, ld, s, ld};
    if (stash_) {
      tile.dots = stash_.tile(range.row, range.column), tile.ld_dots = Stash::kColumns;
    } else {
      multiply(range.rows, range.columns, strip_.d, strip_.x + range.row * strip_.ld_x, strip_.ld_x,
               scratch.right_t.get(), kColumns, s, ld, false, chain_);
    }
    const GradientSums sums = epilogue(tile);
    if constexpr (!kFloat) {
      for (int64_t i = 0; dy_ != nullptr && i < range.rows; ++i)
        to_bf16(s + i * ld, Ops::depth(range.columns), g + i * ld_g);
    }
    return sums;
  }

  // Adds G^T x of the tile's rows to dy, once they are as many as a chain or the block's last.
  void add_dy(const TileRange& block, const TileRange& range, const Input* g, int64_t ld_g,
              Scratch& scratch) {
    const int64_t d = strip_.d, row = range.row - block.row, waiting = row % kDefaultChain;
    const int64_t first = row - waiting, rows = waiting + range.rows;
    Input* g_t = scratch.g_t.get();
    transpose(g, ld_g, range.rows, range.columns, g_t + waiting, kLdTransposed);
    if (rows < kDefaultChain && row + range.rows < block.rows) return;
    if (Ops::depth(rows) > rows)
      for (int64_t j = 0; j < range.columns; ++j) g_t[j * kLdTransposed + rows] = Input(0.f);
    const RightRows x = right_x(block);
    multiply(range.columns, d, Ops::depth(rows), g_t, kLdTransposed, x.at(first, 0), x.ld,
             dy_sums() + range.column * d, d, block.row + first > 0, chain_of_g());
  }

  // Adds G y to dx, from the block's `row` and `feature` on.
  void add_dx(const TileRange& block, int64_t row, int64_t feature, int64_t most_features) {
    const int64_t d = strip_.d, rows = std::min(kTaskRows, block.rows - row);
    const int64_t features = std::min(most_features, d - feature);
    const RightRows y = right_y(block);
    float* sums = dx_sums(block.row) + row * d + feature;
    for (int64_t column = 0; column < block.columns; column += kDefaultChain)
      multiply(rows, features, Ops::depth(std::min(kDefaultChain, block.columns - column)),
               g_.get() + row * ld_g_ + column, ld_g_, y.at(column, feature), y.ld, sums, d,
               block.column + column > 0, chain_of_g());
    if (block.column + block.columns == strip_.m)
      write(sums, rows, features, dx_ + (block.row + row) * d + feature);
  }

  // out = logit_scale * sums, in the dtype of the inputs; rows of both are D apart.
  void write(const float* sums, int64_t rows, int64_t features, Input* out) const {
    for (int64_t i = 0; i < rows; ++i, sums += strip_.d, out += strip_.d) {
      int64_t e = 0;
      for (; e + kLanes <= features; e += kLanes) {
        alignas(64) float scaled[kLanes];
        store(scaled, load(sums + e) * logit_scale_);
        narrow(scaled, kLanes, out + e);
      }
      for (; e < features; ++e) out[e] = static_cast<Input>(logit_scale_ * sums[e]);
    }
  }

  static void narrow(const float* in, int64_t count, float* out) { std::copy_n(in, count, out); }
  static void narrow(const float* in, int64_t count, BFloat16* out) { to_bf16(in, count, out); }

  const Strip<A>& strip_;
  float logit_scale_;
  Input *dx_, *dy_;  // null where not asked for
  int64_t chain_;
  Stash stash_;
  int64_t block_rows_, block_columns_, ld_g_, ld_pairs_;
  Buffer<Input> g_, x_pairs_, y_pairs_;  // of a block: G [rows, ld_g], x and y in pairs of rows
  Buffer<float> dx_sums_, dy_sums_;      // of a block's rows, and of all columns
  std::vector<Scratch> scratch_;
};

}  // namespace protoclip
