// A register tile of unsigned-by-signed 8-bit dot products, and the vectors of its epilogue. One of
// three widths is compiled: AVX-512 VNNI, AVX2, or plain loops.
//
// AVX2 has no 8-bit dot product that cannot saturate at full range: there the unsigned operand
// keeps 7 bits (kLeftMax), which costs accuracy of the codes, never correctness.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "vector_math.h"

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define PROTOCLIP_INT8_AVX512
#elif defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
#define PROTOCLIP_INT8_AVX2
#include <immintrin.h>
#endif

#define ALWAYS_INLINE __attribute__((always_inline))

namespace protoclip::int8 {

#if defined(PROTOCLIP_INT8_AVX512)
constexpr int kLanes = 16, kRows = 8, kVectors = 3, kLeftMax = 127;
#elif defined(PROTOCLIP_INT8_AVX2)
constexpr int kLanes = 8, kRows = 4, kVectors = 2, kLeftMax = 63;
#else
constexpr int kLanes = 8, kRows = 4, kVectors = 2, kLeftMax = 127;
#endif

// int32 lanes, not __m512i: GCC 12 keeps a stack copy of every sum that changes its type.
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
typedef float Float __attribute__((vector_size(4 * kLanes)));

inline Int load(const void* p) {
  Int v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Float load(const float* p) {
  Float v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Float x) { std::memcpy(p, &x, sizeof x); }
inline Int broadcast4(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return word - Int{};
}
inline Float broadcast(float x) { return x - Float{}; }
inline Float to_float(Int x) { return __builtin_convertvector(x, Float); }

inline Int dot4(Int sum, Int left, Int right) {
#if defined(PROTOCLIP_INT8_AVX512)
  return (Int)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)left, (__m512i)right);
#elif defined(PROTOCLIP_INT8_AVX2)
  const __m256i pairs =
      _mm256_maddubs_epi16((__m256i)left, (__m256i)right);  // |pair| <= 2 * 127 * 127 < 2^15
  return sum + (Int)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  uint8_t a[4 * kLanes];
  int8_t b[4 * kLanes];
  std::memcpy(a, &left, sizeof a);
  std::memcpy(b, &right, sizeof b);
  for (int i = 0; i < 4 * kLanes; ++i) sum[i / 4] += a[i] * b[i];
  return sum;
#endif
}

inline uint32_t mask_ge(Float a, Float b) {
#if defined(PROTOCLIP_INT8_AVX512)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#elif defined(PROTOCLIP_INT8_AVX2)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= uint32_t{a[i] >= b[i]} << i;
  return mask;
#endif
}

inline uint32_t mask_lt(Float a, Float b) {
#if defined(PROTOCLIP_INT8_AVX512)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
#elif defined(PROTOCLIP_INT8_AVX2)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= uint32_t{a[i] < b[i]} << i;
  return mask;
#endif
}

// Without NaN.
inline float minimum(Float x) {
#if defined(PROTOCLIP_INT8_AVX512)
  return _mm512_reduce_min_ps((__m512)x);
#else
  typedef float Half __attribute__((vector_size(2 * kLanes)));
  Half low, high;
  std::memcpy(&low, &x, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
  low = high < low ? high : low;
  const float first = low[0] < low[1] ? low[0] : low[1];
  const float second = low[2] < low[3] ? low[2] : low[3];
  return first < second ? first : second;
#endif
}

constexpr int kColumns = kLanes * kVectors;

// f(0) ... f(COUNT - 1) with constant arguments: arrays of vectors then stay in registers.
template <class F, int... I>
inline ALWAYS_INLINE void unrolled(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int COUNT, class F>
inline ALWAYS_INLINE void unrolled(F f) {
  unrolled(f, std::make_integer_sequence<int, COUNT>{});
}

// sums[r * kVectors + v] = start[v] + sum_j left[r][j] right[j][v]: left are kRows rows, right a
// panel [depth / 4][kColumns][4], start the initial int32 [kColumns]; then each(i, sums[i]).
template <class F>
inline ALWAYS_INLINE void tile(const uint8_t* const (&left)[kRows], const int8_t* right,
                               const int32_t* start, int64_t depth, F each) {
  Int sums[kRows * kVectors], columns[kVectors], row;
  const auto begin = [&](auto i) ALWAYS_INLINE { sums[i] = load(start + i % kVectors * kLanes); };
  const auto step = [&](auto i, int64_t j) ALWAYS_INLINE {
    constexpr int r = i / kVectors, v = i % kVectors;
    if constexpr (r == 0) columns[v] = load(right + j * kColumns + v * kLanes * 4);
    if constexpr (v == 0) row = broadcast4(left[r] + j);
    sums[i] = dot4(sums[i], row, columns[v]);
  };
  unrolled<kRows * kVectors>(begin);
  for (int64_t j = 0; j < depth; j += 4)
    unrolled<kRows * kVectors>([&](auto i) ALWAYS_INLINE { step(i, j); });
  unrolled<kRows * kVectors>([&](auto i) ALWAYS_INLINE { each(i, sums[i]); });
}

}  // namespace protoclip::int8
