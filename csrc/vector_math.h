// Vectors of 16 floats, and 2^x on them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // 64-byte vectors are only passed inline
#endif

namespace protoclip {

typedef float Floats __attribute__((vector_size(64)));  // AVX2 and NEON split it in two or four
typedef int32_t Ints __attribute__((vector_size(64)));
constexpr int64_t kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.4426950408889634f;

constexpr int64_t blocks(int64_t n, int64_t step) { return (n + step - 1) / step; }
constexpr int64_t round_up(int64_t n, int64_t step) { return blocks(n, step) * step; }

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Ints load(const int32_t* p) {
  Ints v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
// To a multiple of 64 bytes that is not read soon; then `wait_for_stores` before others may.
inline void store_past_caches(float* p, Floats v) {
#ifdef __AVX512F__
  _mm512_stream_ps(p, (__m512)v);
#else
  store(p, v);
#endif
}
inline void wait_for_stores() {
#ifdef __AVX512F__
  _mm_sfence();
#endif
}
inline Floats broadcast(float a) { return a - Floats{}; }
inline Ints broadcast(int32_t a) { return a - Ints{}; }
constexpr Ints kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// v in the first `count` lanes, 0 in the others.
inline Floats first_lanes(Floats v, int64_t count) {
  return kLaneNumbers < static_cast<int32_t>(count) ? v : Floats{};
}

// A NaN in b stays; one in a is dropped.
template <typename Vector>
Vector larger(Vector a, Vector b) {
#ifdef __AVX512F__
  if constexpr (sizeof a == 64) return (Vector)_mm512_max_ps((__m512)a, (__m512)b);
#endif
  return a > b ? a : b;
}

template <typename Vector>
float sum(Vector v) {
#ifdef __AVX512F__
  if constexpr (sizeof v == 64) return _mm512_reduce_add_ps((__m512)v);
#endif
  for (size_t width = sizeof v / 8; width > 0; width /= 2)
    for (size_t i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
}

inline bool any(Ints v) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0;
#else
  int32_t found = 0;
  for (int64_t i = 0; i < kLanes; ++i) found |= v[i];
  return found != 0;
#endif
}

template <typename Vector>
float maximum(Vector v) {
#ifdef __AVX512F__
  if constexpr (sizeof v == 64) return _mm512_reduce_max_ps((__m512)v);
#endif
  float best = v[0];
  for (size_t i = 1; i < sizeof v / 4; ++i) best = std::max(best, v[i]);
  return best;
}

// 2^x within 1 ulp, exactly 1 at 0; 0 below -126 (no denormals), NaN stays NaN.
inline Floats exp2(Floats x) {
#ifdef __AVX512F__
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  const Floats n = (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  const Floats f = x - n;
#else
  Floats bounded = x < -126.f ? broadcast(-126.f) : x;
  bounded = bounded > 128.f ? broadcast(128.f) : bounded;
  const Floats rounder = broadcast(12582912.f);  // 1.5 * 2^23: the sum drops the fraction
  const Floats n = (bounded + rounder) - rounder;
  const Floats f = bounded - n;
#endif
  // Minimax on [-1/2, 1/2], relative error 2e-9.
  Floats p = broadcast(1.5353361959569156e-04f);
  p = p * f + 1.3398875016719103e-03f;
  p = p * f + 9.6184369176626205e-03f;
  p = p * f + 5.5503323674201965e-02f;
  p = p * f + 2.4022647738456726e-01f;
  p = p * f + 6.9314718246459961e-01f;
  p = p * f + 1.f;
#ifdef __AVX512F__
  return (Floats)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  Floats scale;
  std::memcpy(&scale, &power, sizeof scale);
  return x < -126.f ? Floats{} : p * scale;
#endif
}

// Dot products to base-2 logits, by scale * log2(e) in two terms: rounded to one, it would move all
// logits of a tile the same way.
struct Base2 {
  float high, low;
  explicit Base2(float scale) {
    const double exact = scale * 1.4426950408889634;
    high = static_cast<float>(exact);
    low = std::isfinite(high) ? static_cast<float>(exact - high) : 0.f;
  }
  Floats operator()(Floats dot) const { return dot * high + dot * low; }
};

}  // namespace protoclip
