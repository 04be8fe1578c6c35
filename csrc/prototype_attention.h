// Attention whose queries are samples and whose keys (and usually values) are prototypes: softmax
// statistics and sum_k e_k V_k of each query, in one pass, never [N, K].
//
// Queries go in waves. The parallel tasks are chunks of a wave's rows by groups of keys: a task
// packs each tile of its keys once for all of its rows, and keeps a state and an [rows, DV]
// accumulator of its own; the groups are joined in order afterwards. Chunks and groups depend on
// the shape alone, so the bits do not depend on the number of threads. Beyond the outputs it keeps
// kPartRows * DV floats, and per thread a tile.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <vector>

#include "online_softmax.h"
#include "strip_gradient.h"
#include "strip_inputs.h"

namespace protoclip {

// So few prototypes are multiplied in fp32: weights in bf16 would show in a gradient that cancels.
constexpr int64_t kFewKeys = 512;

// The chain of the dot products of `rows` rows against `keys` keys. MKL sums few rows or columns in
// short ones, and the errors of few rows do not average out.
inline int64_t dot_chain(Arithmetic arithmetic, int64_t rows, int64_t keys) {
  constexpr int64_t few_rows = 16;
  if (rows <= few_rows) return 16;
  return keys <= kSmallBatch ? 32 : arithmetic == Arithmetic::kFloat ? kChain : 256;
}

template <Arithmetic A>
class Attention {
  using Ops = Operands<A>;
  using Input = typename Ops::Input;
  using Packed = typename Ops::Packed;
  static constexpr bool kRounded = A == Arithmetic::kBf16;
  static constexpr int64_t kRows = 128, kColumns = 256;  // 128 KB of fp32 logits
  static constexpr int64_t kChunkRows = 512;             // share the packing of the keys
  static constexpr int64_t kPartRows = 8192, kTasks = 16;

 public:
  // strip: queries x [N, D], keys y [K, D], K > 0. values: null (statistics only), or [K, dv] rows
  // that are ld_values apart, dv even for kBf16. labels: null, or the key whose logit is kept.
  Attention(const Strip<A>& strip, const Input* values, int64_t dv, int64_t ld_values,
            const int64_t* labels, Base2 base2)
      : strip_(strip),
        values_(values),
        dv_(values == nullptr ? 0 : dv),
        ld_values_(ld_values),
        labels_(labels),
        base2_(base2),
        tiles_(blocks(strip.m, kColumns)),
        chunk_(std::min(kRows * std::max<int64_t>(1, strip.n / (kRows * 8)), kChunkRows)),
        wave_(std::min(round_up(strip.n, chunk_), kPartRows)),
        groups_(wave_ == 0 ? 0 : std::clamp<int64_t>(kTasks / (wave_ / chunk_), 1, tiles_)),
        states_(groups_ * wave_),
        positive_(wave_),
        parts_(groups_ * wave_ * dv_) {
    for (int i = 0; i < at::get_num_threads(); ++i) scratch_.emplace_back(*this);
  }

  // finish(row, state, positive, acc [dv]) is called for every row, in parallel.
  template <typename Finish>
  void run(const Finish& finish) {
    for (int64_t first = 0; first < strip_.n; first += wave_) {
      const int64_t rows = std::min(wave_, strip_.n - first), chunks = blocks(rows, chunk_);
      at::parallel_for(0, chunks * groups_, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t row = task / groups_ * chunk_;
          attend(first, row, std::min(chunk_, rows - row), task % groups_);
        }
        release_matrix_unit();
      });
      at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const RowState& state = join(row);
          finish(first + row, state, positive_.get()[row], parts_.get() + row * dv_);
        }
      });
    }
  }

 private:
  struct Scratch {  // of one thread
    Buffer<Packed> key, value, left, weights;
    Buffer<float> s, factors;
    explicit Scratch(const Attention& a)
        : key(Ops::depth(a.strip_.d) * kColumns),
          value(Ops::kRightRowsInPlace ? 0 : Ops::depth(kColumns) * a.dv_),
          left(Ops::kLeftInPlace ? 0 : Ops::depth(a.strip_.d) * kChunkRows),
          weights(Ops::depth(kColumns) * kRows),
          s(kRows * kColumns),
          factors(kRows) {}
  };

  // All keys of a group against a chunk of rows, which starts at `row` of the wave.
  void attend(int64_t first, int64_t row, int64_t rows, int64_t group) {
    Scratch& scratch = scratch_[at::get_thread_num()];
    RowState* states = states_.get() + group * wave_ + row;
    std::fill_n(states, rows, RowState{});
    const Input* x = strip_.x + (first + row) * strip_.ld_x;
    if constexpr (!Ops::kLeftInPlace) Ops::left(x, strip_.ld_x, rows, strip_.d, scratch.left.get());
    const int64_t begin = tiles_ * group / groups_, end = tiles_ * (group + 1) / groups_;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t column = tile * kColumns, columns = std::min(kColumns, strip_.m - column);
      Ops::right_transposed(strip_.y + column * strip_.ld_y, strip_.ld_y, columns, strip_.d,
                            scratch.key.get(), kColumns);
      if (dv_ > 0)
        Ops::right_rows(values_ + column * ld_values_, ld_values_, columns, dv_,
                        scratch.value.get(), dv_);
      for (int64_t r = 0; r < rows; r += kRows) {
        const TileRange range{first + row + r, std::min(kRows, rows - r), column, columns};
        multiply(range.rows, columns, Ops::depth(strip_.d), left_operand(x, r, scratch),
                 left_stride(), scratch.key.get(), kColumns, scratch.s.get(), kColumns, false,
                 dot_chain(A, strip_.n, strip_.m));
        softmax(range, states + r, positive_.get() + row + r, scratch);
        if (dv_ > 0)
          accumulate(range, parts_.get() + (group * wave_ + row + r) * dv_, tile > begin, scratch);
      }
    }
  }

  int64_t left_stride() const { return Ops::kLeftInPlace ? strip_.ld_x : Ops::depth(strip_.d); }
  const Packed* left_operand(const Input* x, int64_t r, const Scratch& scratch) const {
    if constexpr (Ops::kLeftInPlace)
      return x + r * strip_.ld_x;
    else
      return scratch.left.get() + r * left_stride();
  }
  static BFloat16* rounded(const Scratch& scratch) {
    if constexpr (kRounded)
      return scratch.weights.get();
    else
      return nullptr;
  }

  void softmax(const TileRange& range, RowState* states, float* positive, Scratch& scratch) const {
    for (int64_t i = 0; i < range.rows; ++i) {
      const int64_t label = labels_ == nullptr ? -1 : labels_[range.row + i];
      scratch.factors.get()[i] = OnlineSoftmax::row<kRounded>(
          base2_, range.column, range.columns, label, scratch.s.get() + i * kColumns,
          kRounded ? rounded(scratch) + i * kColumns : nullptr, states[i], positive + i);
    }
  }

  // part [rows, dv] = factors * part + weights * values.
  void accumulate(const TileRange& range, float* part, bool more, Scratch& scratch) const {
    for (int64_t i = 0; i < range.rows && more; ++i) {
      const float factor = scratch.factors.get()[i];
      if (factor == 1.f) continue;
      for (int64_t e = 0; e < dv_; ++e) part[i * dv_ + e] *= factor;
    }
    const int64_t depth = Ops::depth(range.columns), column = range.column;
    if constexpr (A == Arithmetic::kFloat) {
      multiply(range.rows, dv_, depth, scratch.s.get(), kColumns, values_ + column * ld_values_,
               ld_values_, part, dv_, more);
    } else {
      int64_t ld = kColumns;
      if constexpr (!kRounded) {
        ld = depth;
        Ops::left_tile(scratch.s.get(), kColumns, range.rows, range.columns, scratch.weights.get());
      }
      multiply(range.rows, dv_, depth, scratch.weights.get(), ld, scratch.value.get(), dv_, part,
               dv_, more);
    }
  }

  // The groups' states and sums of a row of the wave, joined into the first.
  const RowState& join(int64_t row) {
    RowState& state = states_.get()[row];
    float* acc = parts_.get() + row * dv_;
    for (int64_t group = 1; group < groups_; ++group) {
      const auto factors = state.merge(states_.get()[group * wave_ + row]);
      const float* other = parts_.get() + (group * wave_ + row) * dv_;
      for (int64_t e = 0; e < dv_; ++e) acc[e] = acc[e] * factors.mine + other[e] * factors.other;
    }
    return state;
  }

  const Strip<A>& strip_;
  const Input* values_;
  int64_t dv_, ld_values_;
  const int64_t* labels_;
  Base2 base2_;
  int64_t tiles_, chunk_, wave_, groups_;
  Buffer<RowState> states_;  // [groups, wave]
  Buffer<float> positive_;   // [wave]
  Buffer<float> parts_;      // [groups, wave, dv]
  std::vector<Scratch> scratch_;
};

}  // namespace protoclip
