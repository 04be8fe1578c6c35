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
  // Consecutive tasks of a thread are done together, so that a row of x, y or G that comes from
  // beyond L2 serves more products. The order of the terms of a sum stays the same. Tiles of fp32
  // gain nothing: their products take longer than what they read.
  static constexpr int64_t kTilesTogether = kFloat ? 1 : 3, kTasksTogether = 4;
  static constexpr int64_t kPad = 32;  // elements: rows a power of two apart share their cache sets
  static constexpr int64_t kLdRight = kColumns + kLanes;

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

  struct Scratch {  // of one thread; right_t and g_t of each tile that is done with others
    Buffer<Input> right_t, g, g_t;
    Buffer<float> s;
    explicit Scratch(int64_t d)
        : right_t(kTilesTogether * Ops::depth(d) * kLdRight),
          g(kRows * kColumns),
          g_t(kTilesTogether * kColumns * kLdTransposed),
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
      for (int64_t tile = begin; tile < end; tile += kTilesTogether)
        column_tiles(block, tile, std::min(tile + kTilesTogether, end), epilogue, sums.data());
      release_matrix_unit();
    });
    if (dx_ != nullptr) {
      const int64_t features = std::max(round_up(blocks(strip_.d, kTaskParts), kLanes), kLanes);
      const int64_t parts = std::max<int64_t>(blocks(strip_.d, features), 1);
      at::parallel_for(
          0, blocks(block.rows, kTaskRows) * parts, 1, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end;) {  // all features of some rows, or one part
              const bool whole = task % parts == 0 && end - task >= parts;
              const int64_t rows = whole ? std::min((end - task) / parts, kTasksTogether) : 1;
              add_dx(block, task / parts * kTaskRows, rows * kTaskRows, task % parts * features,
                     whole ? strip_.d : features);
              task += whole ? rows * parts : 1;
            }
            release_matrix_unit();
          });
    }
    GradientSums total;
    for (const GradientSums& part : sums) total += part;
    return total;
  }

  // The block's tiles of columns [begin, end) against all of its rows.
  template <typename Epilogue>
  void column_tiles(const TileRange& block, int64_t begin, int64_t end, const Epilogue& epilogue,
                    GradientSums* sums) {
    const int64_t d = strip_.d;
    Scratch& scratch = scratch_[at::get_thread_num()];
    const auto right_t = [&](int64_t tile) {
      return scratch.right_t.get() + (tile - begin) * Ops::depth(d) * kLdRight;
    };
    const auto g_t = [&](int64_t tile) {
      return scratch.g_t.get() + (tile - begin) * kColumns * kLdTransposed;
    };
    const auto range = [&](int64_t tile, int64_t row) {
      const int64_t column = tile * kColumns;
      return TileRange{block.row + row, std::min(kRows, block.rows - row), block.column + column,
                       std::min(kColumns, block.columns - column)};
    };
    for (int64_t tile = begin; tile < end; ++tile) {
      const auto [row, rows, column, columns] = range(tile, 0);
      const Input* y = strip_.y + column * strip_.ld_y;
      if (!stash_) Ops::right_transposed(y, strip_.ld_y, columns, d, right_t(tile), kLdRight);
      if (dx_ != nullptr && (block.row == 0 || strip_.m > kBlockColumns))
        Ops::right_rows(y, strip_.ld_y, columns, d, y_pairs_.get() + tile * kColumns * ld_pairs_,
                        ld_pairs_);
    }
    for (int64_t row = 0; row < block.rows; row += kDefaultChain) {
      const int64_t rows = std::min(kDefaultChain, block.rows - row);
      for (int64_t r = row; r < row + rows; r += kRows)
        for (int64_t tile = begin; tile < end; ++tile) {
          Input* g = dx_ != nullptr ? g_.get() + r * ld_g_ + tile * kColumns : scratch.g.get();
          sums[tile] +=
              form(range(tile, r), epilogue, right_t(tile), g, dx_ != nullptr ? ld_g_ : kColumns,
                   g_t(tile) + r - row, scratch.s.get());
        }
      for (int64_t tile = begin; dy_ != nullptr && tile < end; ++tile)
        add_dy(block, row, rows, range(tile, 0), g_t(tile));
    }
    for (int64_t tile = begin; tile < end; ++tile) {
      const auto [row, rows, column, columns] = range(tile, 0);
      if (dy_ != nullptr && block.row + block.rows == strip_.n)
        write(dy_sums() + column * d, columns, d, dy_ + column * d);
    }
  }

  // G of a tile, from the stash or the inputs, and its transpose.
  template <typename Epilogue>
  GradientSums form(const TileRange& range, const Epilogue& epilogue, const Input* right_t,
                    Input* g, int64_t ld_g, Input* g_t, float* s) {
    int64_t ld = kColumns;
    if constexpr (kFloat) s = g, ld = ld_g;
    GradientTile tile{range, s, ld, s, ld};
    if constexpr (!kFloat)  // the block's G is larger than L2: fetched during the products
      for (int64_t i = 0; i < range.rows; ++i)
        for (int64_t j = 0; j < kColumns; j += kPad) __builtin_prefetch(g + i * ld_g + j, 1);
    if (stash_) {
      tile.dots = stash_.tile(range.row, range.column), tile.ld_dots = Stash::kColumns;
    } else {
      multiply(range.rows, range.columns, strip_.d, strip_.x + range.row * strip_.ld_x, strip_.ld_x,
               right_t, kLdRight, s, ld, false, chain_);
    }
    const GradientSums sums = epilogue(tile);
    if (dy_ == nullptr) return sums;
    if constexpr (kFloat)
      transpose(g, ld_g, range.rows, range.columns, g_t, kLdTransposed);
    else
      round_and_transpose(s, ld, range.rows, range.columns, g, ld_g, g_t, kLdTransposed);
    return sums;
  }

  // Adds G^T x to dy, of the block's `rows` from `row` on and a tile of columns.
  void add_dy(const TileRange& block, int64_t row, int64_t rows, const TileRange& tile,
              const Input* g_t) const {
    const RightRows x = right_x(block);
    multiply(tile.columns, strip_.d, Ops::depth(rows), g_t, kLdTransposed, x.at(row, 0), x.ld,
             dy_sums() + tile.column * strip_.d, strip_.d, block.row + row > 0, chain_of_g());
  }

  // Adds G y to dx, from the block's `row` and `feature` on.
  void add_dx(const TileRange& block, int64_t row, int64_t most_rows, int64_t feature,
              int64_t most_features) {
    const int64_t d = strip_.d, rows = std::min(most_rows, block.rows - row);
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
