// Attention whose queries are samples and whose keys (and usually values) are prototypes: softmax
// statistics and sum_k e_k V_k of each query, in one pass, never [N, K].
//
// Queries go in waves. The parallel tasks are chunks of a wave's rows by groups of keys: a task
// packs each tile of its keys once for all of its rows, and keeps a state and an [rows, DV]
// accumulator of its own; the groups are joined in order afterwards. Chunks and groups depend on
// the shape alone, so the bits do not depend on the number of threads. Beyond the outputs it keeps
// kPartRows * DV floats, and per thread a tile.
//
// Logits v are in base 2. The reference of a row is its exact running maximum, so the weight of
// the maximum is exactly 1: a loss near zero keeps its digits, and so does a gradient that nearly
// cancels, even with weights in bf16.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "strip.h"

namespace protoclip {

// What the keys seen so far say about one query.
struct RowState {
  float max = -kInfinity;  // of v
  double sum = 0;          // of e = 2^(v - max)
  double logits = 0;       // of e v
  int64_t best = 0;        // the lowest index of max

  // Moves the reference up to `top`; returns what earlier sums are multiplied by.
  float rebase(float top) {
    if (top == max) return 1.f;
    const float factor = exp2(broadcast(max - top))[0];
    max = top, sum *= factor, logits *= factor;
    return factor;
  }

  // Joins the state of later keys; returns the factors of both.
  struct Factors {
    float mine, other;
  };
  Factors merge(RowState other) {
    if (other.max > max) best = other.best;
    const float top = other.max > max ? other.max : max;
    const Factors factors{rebase(top), other.rebase(top)};
    sum += other.sum, logits += other.logits;
    return factors;
  }
};

inline void round_to_bf16(Floats a, Floats b, BFloat16* out) {
#ifdef __AVX512BF16__
  const __m512bh v = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  std::memcpy(out, &v, sizeof v);
#else
  for (int64_t lane = 0; lane < kLanes; ++lane)
    out[lane] = static_cast<BFloat16>(a[lane]), out[kLanes + lane] = static_cast<BFloat16>(b[lane]);
#endif
}

class OnlineSoftmax {
 public:
  static constexpr int64_t kStep = 2 * kLanes;  // tiles are written up to a multiple of it

  // Of one row: dot products s [columns], for the keys from `first` on, become weights e, in s
  // itself or, rounded, in `rounded`. `positive` receives the logit of key `label`, if it is here.
  // Returns the factor of earlier sums.
  template <bool kRounded>
  static float row(Base2 base2, int64_t first, int64_t columns, int64_t label, float* s,
                   BFloat16* rounded, RowState& state, float* positive) {
    const float top = scale(base2, columns, s);
    if (0 <= label - first && label - first < columns) *positive = s[label - first];
    float factor = 1.f;
    if (!(top <= state.max)) {  // NaN too
      state.best = first + place_of(top, s, columns);
      factor = state.rebase(top);
    }
    const Floats reference = broadcast(state.max);
    Floats sums{}, more{}, logits{};
    for (int64_t j = 0; j < columns; j += kStep) {
      const Floats a = load(s + j), b = load(s + j + kLanes);
      const Floats p = exp2(a - reference), q = exp2(b - reference);
      sums += p, more += q;
      logits += p * a + q * b;
      if constexpr (kRounded)
        round_to_bf16(p, q, rounded + j);
      else
        store(s + j, p), store(s + j + kLanes, q);
    }
    state.sum += protoclip::sum(sums + more);
    state.logits += protoclip::sum(logits);
    return factor;
  }

 private:
  // The first place of `value`, which lanes past the last column do not have; 0 of NaN.
  static int64_t place_of(float value, const float* s, int64_t columns) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      const Ints equal = load(s + j) == value;
      if (any(equal)) return std::find(s + j, s + columns, value) - s;
    }
    return 0;
  }

  // Dot products to logits; lanes past the last become finite numbers that weigh nothing. Returns
  // the maximum, NaN or less where a logit is NaN: its weight shows it.
  static float scale(Base2 base2, int64_t columns, float* s) {
    Floats top = broadcast(-kInfinity);
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) {
      const Floats v = base2(load(s + j));
      store(s + j, v);
      top = larger(top, v);
    }
    float best = maximum(top);
    for (; j < columns; ++j) {
      s[j] = base2(broadcast(s[j]))[0];
      best = s[j] > best ? s[j] : best;
    }
    std::fill(s + columns, s + round_up(columns, kStep), std::numeric_limits<float>::lowest());
    return best;
  }
};

// The chain of the dot products of `rows` rows against `keys` keys. MKL sums few rows or columns in
// short ones, and the errors of few rows do not average out.
inline int64_t dot_chain(Arithmetic arithmetic, int64_t rows, int64_t keys) {
  if (arithmetic == Arithmetic::kBf16) return kBf16Chain;
  return rows <= 16 ? 16 : keys <= 128 ? 32 : kChain;
}

template <Arithmetic A>
class Attention {
  using Ops = Operands<A>;
  using Input = typename Ops::Input;
  static constexpr bool kRounded = A == Arithmetic::kBf16;
  static constexpr int64_t kRows = 128, kColumns = 256;  // 128 KB of fp32 logits
  static constexpr int64_t kChunkRows = 512;             // share the packing of the keys
  static constexpr int64_t kLdKeys = kColumns + kLanes, kLdWeights = kColumns + 2 * kLanes;
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
        ld_value_(round_up(dv_, kLanes) + kLanes),
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
    Buffer<Input> key, value, weights;
    Buffer<float> s, factors;
    explicit Scratch(const Attention& a)
        : key(Ops::depth(a.strip_.d) * kLdKeys),
          value(Ops::kRightRowsInPlace ? 0 : Ops::depth(kColumns) * a.ld_value_),
          weights(kLdWeights * kRows),
          s(kRows * kColumns),
          factors(kRows) {}
  };

  // All keys of a group against a chunk of rows, which starts at `row` of the wave.
  void attend(int64_t first, int64_t row, int64_t rows, int64_t group) {
    Scratch& scratch = scratch_[at::get_thread_num()];
    RowState* states = states_.get() + group * wave_ + row;
    std::fill_n(states, rows, RowState{});
    const Input* x = strip_.x + (first + row) * strip_.ld_x;
    const int64_t begin = tiles_ * group / groups_, end = tiles_ * (group + 1) / groups_;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t column = tile * kColumns, columns = std::min(kColumns, strip_.m - column);
      Ops::right_transposed(strip_.y + column * strip_.ld_y, strip_.ld_y, columns, strip_.d,
                            scratch.key.get(), kLdKeys);
      if (dv_ > 0)
        Ops::right_rows(values_ + column * ld_values_, ld_values_, columns, dv_,
                        scratch.value.get(), ld_value_);
      for (int64_t r = 0; r < rows; r += kRows) {
        const TileRange range{first + row + r, std::min(kRows, rows - r), column, columns};
        multiply(range.rows, columns, strip_.d, x + r * strip_.ld_x, strip_.ld_x, scratch.key.get(),
                 kLdKeys, scratch.s.get(), kColumns, false, dot_chain(A, strip_.n, strip_.m));
        softmax(range, states + r, positive_.get() + row + r, scratch);
        if (dv_ > 0)
          accumulate(range, parts_.get() + (group * wave_ + row + r) * dv_, tile > begin, scratch);
      }
    }
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
          kRounded ? rounded(scratch) + i * kLdWeights : nullptr, states[i], positive + i);
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
      multiply(range.rows, dv_, depth, scratch.weights.get(), kLdWeights, scratch.value.get(),
               ld_value_, part, dv_, more);
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
  int64_t dv_, ld_values_, ld_value_;
  const int64_t* labels_;
  Base2 base2_;
  int64_t tiles_, chunk_, wave_, groups_;
  Buffer<RowState> states_;  // [groups, wave]
  Buffer<float> positive_;   // [wave]
  Buffer<float> parts_;      // [groups, wave, dv]
  std::vector<Scratch> scratch_;
};

}  // namespace protoclip
