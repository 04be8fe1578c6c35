// A register tile of unsigned-by-signed 8-bit dot products, with the few vector operations its
// epilogue needs. One of three widths is compiled: AVX-512 VNNI, AVX2, or plain loops.
//
// AVX2 has no 8-bit dot product that cannot saturate at full range: there the unsigned operand
// keeps 7 bits (LEFT_MAX), which costs accuracy of the codes, never correctness.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define ALWAYS_INLINE __attribute__((always_inline))

namespace protoclip::int8 {

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512VNNI__) && defined(__AVX512BW__)

constexpr int LANES = 16, ROWS = 8, VECS = 3, LEFT_MAX = 127;
// As int32 lanes, not __m512i: GCC 12 keeps a stack copy of every sum that changes its type.
typedef int32_t Int __attribute__((vector_size(64)));
using Float = __m512;

inline Int load(const void* p) { return (Int)_mm512_loadu_si512(p); }
inline Float load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
inline Int broadcast4(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return (Int)_mm512_set1_epi32(word);
}
inline Float broadcast(float x) { return _mm512_set1_ps(x); }
inline Int dot4(Int sum, Int left, Int right) {
  return (Int)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)left, (__m512i)right);
}
inline Float to_float(Int x) { return _mm512_cvtepi32_ps((__m512i)x); }
inline Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
inline Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
inline Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
inline Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
inline Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
inline float max_lane(Float a) { return _mm512_reduce_max_ps(a); }
inline float sum_lanes(Float a) { return _mm512_reduce_add_ps(a); }
inline uint32_t mask_ge(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }

#elif defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

constexpr int LANES = 8, ROWS = 4, VECS = 2, LEFT_MAX = 63;
typedef int32_t Int __attribute__((vector_size(32)));
using Float = __m256;

inline Int load(const void* p) { return (Int)_mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Float load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
inline Int broadcast4(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return (Int)_mm256_set1_epi32(word);
}
inline Float broadcast(float x) { return _mm256_set1_ps(x); }
inline Int dot4(Int sum, Int left, Int right) {
  const __m256i pairs =
      _mm256_maddubs_epi16((__m256i)left, (__m256i)right);  // |pair| <= 2 * 127 * 127 < 2^15
  return sum + (Int)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
inline Float to_float(Int x) { return _mm256_cvtepi32_ps((__m256i)x); }
inline Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
inline Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
inline Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
inline Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
inline Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
inline uint32_t mask_ge(Float a, Float b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ));
}
inline float max_lane(Float a) {
  float lanes[LANES], best = -INFINITY;
  store(lanes, a);
  for (float lane : lanes) best = lane > best ? lane : best;
  return best;
}
inline float sum_lanes(Float a) {
  float lanes[LANES];
  store(lanes, a);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

#else

constexpr int LANES = 8, ROWS = 4, VECS = 2, LEFT_MAX = 127;
struct Int {
  int32_t at[LANES];
};
struct Float {
  float at[LANES];
};

template <class Out, class F>
inline Out each(F f) {
  Out out;
  for (int i = 0; i < LANES; ++i) out.at[i] = f(i);
  return out;
}
inline Int load(const void* p) {
  Int out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}
inline Float load(const float* p) {
  return each<Float>([&](int i) { return p[i]; });
}
inline void store(float* p, Float x) { std::memcpy(p, x.at, sizeof(x)); }
inline Int broadcast4(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return each<Int>([&](int) { return word; });
}
inline Float broadcast(float x) {
  return each<Float>([&](int) { return x; });
}
inline Int dot4(Int sum, Int left, Int right) {
  uint8_t a[4 * LANES];
  int8_t b[4 * LANES];
  std::memcpy(a, &left, sizeof(a));
  std::memcpy(b, &right, sizeof(b));
  for (int i = 0; i < 4 * LANES; ++i) sum.at[i / 4] += a[i] * b[i];
  return sum;
}
inline Float to_float(Int x) {
  return each<Float>([&](int i) { return static_cast<float>(x.at[i]); });
}
inline Float mul(Float a, Float b) {
  return each<Float>([&](int i) { return a.at[i] * b.at[i]; });
}
inline Float add(Float a, Float b) {
  return each<Float>([&](int i) { return a.at[i] + b.at[i]; });
}
inline Float sub(Float a, Float b) {
  return each<Float>([&](int i) { return a.at[i] - b.at[i]; });
}
inline Float fma(Float a, Float b, Float c) {
  return each<Float>([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
}
inline Float max(Float a, Float b) {
  return each<Float>([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
}
inline uint32_t mask_ge(Float a, Float b) {
  uint32_t mask = 0;
  for (int i = 0; i < LANES; ++i) mask |= uint32_t{a.at[i] >= b.at[i]} << i;
  return mask;
}
inline float max_lane(Float a) {
  float best = -INFINITY;
  for (float lane : a.at) best = lane > best ? lane : best;
  return best;
}
inline float sum_lanes(Float a) {
  float sum = 0;
  for (float lane : a.at) sum += lane;
  return sum;
}

#endif

constexpr int COLS = LANES * VECS;

// f(0) ... f(COUNT - 1) with constant arguments: arrays of vectors then stay in registers.
template <class F, int... I>
inline ALWAYS_INLINE void unrolled(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int COUNT, class F>
inline ALWAYS_INLINE void unrolled(F f) {
  unrolled(f, std::make_integer_sequence<int, COUNT>{});
}

// sums[r * VECS + v] = start[v] + sum_j left[r][j] right[j][v]: left is ROWS rows `stride` bytes
// apart, right a panel [depth / 4][COLS][4], start the initial int32 [COLS]; then each(i, sums[i]).
template <class F>
inline ALWAYS_INLINE void tile(const uint8_t* left, int64_t stride, const int8_t* right,
                               const int32_t* start, int64_t depth, F each) {
  Int sums[ROWS * VECS], columns[VECS], row;
  const auto begin = [&](auto i) ALWAYS_INLINE { sums[i] = load(start + i % VECS * LANES); };
  const auto step = [&](auto i, int64_t j) ALWAYS_INLINE {
    constexpr int r = i / VECS, v = i % VECS;
    if constexpr (r == 0) columns[v] = load(right + j * COLS + v * LANES * 4);
    if constexpr (v == 0) row = broadcast4(left + r * stride + j);
    sums[i] = dot4(sums[i], row, columns[v]);
  };
  unrolled<ROWS * VECS>(begin);
  for (int64_t j = 0; j < depth; j += 4)
    unrolled<ROWS * VECS>([&](auto i) ALWAYS_INLINE { step(i, j); });
  unrolled<ROWS * VECS>([&](auto i) ALWAYS_INLINE { each(i, sums[i]); });
}

}  // namespace protoclip::int8
