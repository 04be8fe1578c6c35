// Softmax over keys that come in tiles: the state of a row, and what a tile of dot products does to
// it. Logits v are in base 2. The reference of a row is its exact running maximum, so the weight of
// the maximum is exactly 1: a loss near zero keeps its digits, and so does a gradient that nearly
// cancels, even with weights in bf16.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "gemm_tile.h"

namespace protoclip {

// What the keys seen so far say about one query.
struct RowState {
  float max = -kInfinity;  // of v
  double sum = 0;          // of e = 2^(v - max)
  double weights = 0;      // of e rounded as it meets the values
  double logits = 0;       // of e v
  int64_t best = 0;        // the lowest index of max

  // Moves the reference up to `top`; returns what earlier sums are multiplied by.
  float rebase(float top) {
    if (top == max) return 1.f;
    const float factor = exp2(broadcast(max - top))[0];
    max = top, sum *= factor, weights *= factor, logits *= factor;
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
    sum += other.sum, weights += other.weights, logits += other.logits;
    return factors;
  }
};

// Rounds a, b to 32 bf16 at `out`; returns total + the rounded values, in 16 lanes.
inline Floats round_to_bf16(Floats a, Floats b, BFloat16* out, Floats total) {
#ifdef __AVX512BF16__
  const __m512bh v = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  std::memcpy(out, &v, sizeof v);
  return (Floats)_mm512_dpbf16_ps((__m512)total, v, (__m512bh)_mm512_set1_epi16(0x3f80));
#else
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    out[lane] = static_cast<BFloat16>(a[lane]), out[kLanes + lane] = static_cast<BFloat16>(b[lane]);
    total[lane] += static_cast<float>(out[lane]) + static_cast<float>(out[kLanes + lane]);
  }
  return total;
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
      const float* place = std::find(s, s + columns, top);
      state.best = first + (place - s) % columns;
      factor = state.rebase(top);
    }
    const Floats reference = broadcast(state.max);
    Floats sums{}, more{}, logits{}, weights{};
    for (int64_t j = 0; j < columns; j += kStep) {
      const Floats a = load(s + j), b = load(s + j + kLanes);
      const Floats p = exp2(a - reference), q = exp2(b - reference);
      sums += p, more += q;
      logits += p * a + q * b;
      if constexpr (kRounded)
        weights = round_to_bf16(p, q, rounded + j, weights);
      else
        store(s + j, p), store(s + j + kLanes, q);
    }
    const float total = protoclip::sum(sums + more);
    state.sum += total;
    state.weights += kRounded ? protoclip::sum(weights) : total;
    state.logits += protoclip::sum(logits);
    return factor;
  }

 private:
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

}  // namespace protoclip
