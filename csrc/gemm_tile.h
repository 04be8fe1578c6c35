// Products of small tiles on the CPU, shared by its kernels.
//
// C [m, n] = A [m, k] B [k, n], fp32 accumulators, one thread, everything in L2. A ("left") is
// row-major. B ("right") is packed: fp32 row-major [k, ldb], bf16 in pairs of rows [k/2, ldb, 2].
// Two arithmetics:
//   kFloat  fp32 FMA, through oneDNN's brgemm or, where that is missing, plain vector code;
//   kBf16   bf16 operands as they are (vdpbf16ps or AMX).
#pragma once

#include <ATen/Context.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "memory_pool.h"
#include "vector_math.h"

namespace protoclip {

using BFloat16 = c10::BFloat16;

// ---- layout changes ----

// out [n, m] = transpose of in [m, n].
inline void transpose(const float* in, int64_t ld_in, int64_t m, int64_t n, float* out,
                      int64_t ld_out) {
  for (int64_t i = 0; i < m; i += 16)
    for (int64_t j = 0; j < n; j += 16)
      at::vec::transpose_mxn<float>(in + i * ld_in + j, ld_in, out + j * ld_out + i, ld_out,
                                    std::min<int64_t>(16, m - i), std::min<int64_t>(16, n - j));
}

inline void transpose(const BFloat16* in, int64_t ld_in, int64_t m, int64_t n, BFloat16* out,
                      int64_t ld_out) {
  for (int64_t i = 0; i < m; i += 32)
    for (int64_t j = 0; j < n; j += 32)
      at::vec::transpose_mxn<BFloat16>(in + i * ld_in + j, ld_in, out + j * ld_out + i, ld_out,
                                       std::min<int64_t>(32, m - i), std::min<int64_t>(32, n - j));
}

inline Floats load(const BFloat16* p) {
#ifdef __AVX512BW__
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return (Floats)_mm512_slli_epi32(wide, 16);
#else
  Floats v;
  for (int64_t lane = 0; lane < kLanes; ++lane) v[lane] = static_cast<float>(p[lane]);
  return v;
#endif
}

inline void to_bf16(const float* in, int64_t n, BFloat16* out) {
  int64_t i = 0;
#ifdef __AVX512BF16__
  for (; i + kLanes <= n; i += kLanes) {
    const __m256bh v = _mm512_cvtneps_pbh((__m512)load(in + i));
    std::memcpy(out + i, &v, sizeof v);
  }
#endif
  for (; i < n; ++i) out[i] = static_cast<BFloat16>(in[i]);
}

// The right operand of X Y^T: y [n, k] -> [k/2, ldb, 2]; k is even.
inline void pack_transposed(const BFloat16* y, int64_t ld, int64_t n, int64_t k, BFloat16* out,
                            int64_t ldb) {
  if (ld % 2 == 0) {  // a pair of bf16 moves as one float
    return transpose(reinterpret_cast<const float*>(y), ld / 2, n, k / 2,
                     reinterpret_cast<float*>(out), ldb);
  }
  for (int64_t j = 0; j < n; ++j)
    for (int64_t p = 0; p < k; ++p) out[(p / 2 * ldb + j) * 2 + p % 2] = y[j * ld + p];
}

// Two rows as one of pairs: a_0 b_0 a_1 b_1 ...
inline void interleave(const BFloat16* a, const BFloat16* b, int64_t n, BFloat16* out) {
  int64_t j = 0;
#ifdef __AVX512BW__
  for (; j + kLanes <= n; j += kLanes) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(a + j)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(b + j)));
    _mm512_storeu_si512(out + 2 * j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
#endif
  for (; j < n; ++j) out[2 * j] = a[j], out[2 * j + 1] = b[j];
}

// Two rows of floats, rounded: each by itself, and as one of pairs.
inline void round_rows(const float* a, const float* b, int64_t n, BFloat16* out_a, BFloat16* out_b,
                       BFloat16* pairs) {
  int64_t j = 0;
#ifdef __AVX512BF16__
  const __m512i halves =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (; j + kLanes <= n; j += kLanes) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)load(b + j), (__m512)load(a + j));
    _mm256_storeu_si256((__m256i*)(out_a + j), _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i*)(out_b + j), _mm512_extracti64x4_epi64(both, 1));
    _mm512_storeu_si512(pairs + 2 * j, _mm512_permutexvar_epi16(halves, both));
  }
#endif
  for (; j < n; ++j) {
    pairs[2 * j] = out_a[j] = static_cast<BFloat16>(a[j]);
    pairs[2 * j + 1] = out_b[j] = static_cast<BFloat16>(b[j]);
  }
}

// out [m, n] = in, rounded, and its transpose: pairs of rows move as one float. n is at most
// kMostColumns; where it is odd, `in` has a column more. With odd m, so has the transpose: zeros.
constexpr int64_t kMostColumns = 64;
inline void round_and_transpose(const float* in, int64_t ld_in, int64_t m, int64_t n, BFloat16* out,
                                int64_t ld_out, BFloat16* transposed, int64_t ld_transposed) {
  alignas(64) BFloat16 pairs[16 * 2 * kMostColumns], dropped[kMostColumns];
  alignas(64) static constexpr float zeros[kMostColumns] = {};
  for (int64_t i = 0; i < m; i += 32) {
    const int64_t rows = std::min<int64_t>(32, m - i);
    for (int64_t r = i; r < i + rows; r += 2) {
      const bool last = r + 1 == m;
      round_rows(in + r * ld_in, last ? zeros : in + (r + 1) * ld_in, round_up(n, 2),
                 out + r * ld_out, last ? dropped : out + (r + 1) * ld_out,
                 pairs + (r - i) * kMostColumns);
    }
    transpose(reinterpret_cast<const float*>(pairs), kMostColumns, blocks(rows, 2), n,
              reinterpret_cast<float*>(transposed + i), ld_transposed / 2);
  }
}

// The right operand of G Y: y [k, n] -> [ceil(k/2), ldb, 2], a missing last row as zeros.
inline void pack_rows(const BFloat16* y, int64_t ld, int64_t k, int64_t n, BFloat16* out,
                      int64_t ldb) {
  const std::vector<BFloat16> zeros(k % 2 ? n : 0);
  for (int64_t p = 0; p < k; p += 2)
    interleave(y + p * ld, p + 1 < k ? y + (p + 1) * ld : zeros.data(), n, out + p * ldb);
}

// ---- products ----

// `Rows` rows of C at once; the accumulators stay in registers over the whole depth.
template <int Rows>
void multiply_rows(int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                   float* c, int64_t ldc, bool accumulate) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    Floats acc[Rows];
    for (int r = 0; r < Rows; ++r) acc[r] = accumulate ? load(c + r * ldc + j) : Floats{};
    for (int64_t p = 0; p < k; ++p) {
      const Floats right = load(b + p * ldb + j);
      for (int r = 0; r < Rows; ++r) acc[r] += a[r * lda + p] * right;
    }
    for (int r = 0; r < Rows; ++r) store(c + r * ldc + j, acc[r]);
  }
  for (; j < n; ++j)
    for (int r = 0; r < Rows; ++r) {
      float acc = accumulate ? c[r * ldc + j] : 0.f;
      for (int64_t p = 0; p < k; ++p) acc += a[r * lda + p] * b[p * ldb + j];
      c[r * ldc + j] = acc;
    }
}

inline void multiply_plain(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
                           const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  int64_t i = 0;
  for (; i + 6 <= m; i += 6)
    multiply_rows<6>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
  for (; i < m; ++i) multiply_rows<1>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
}

template <typename T>
bool brgemm_works() {  // torch may have no oneDNN, or not be x86
  try {
    const T one[2] = {T(1.f), T(1.f)};
    float out = 0.f;
    at::native::cpublas::brgemm(1, 1, 2, 2, 1, 1, false, one, one, &out, sizeof(T) == 2);
    at::native::cpublas::brgemm_release(sizeof(T) == 2);
    return out == 2.f;
  } catch (const std::exception&) {
    return false;
  }
}

struct CpuMatrixUnits {
  bool fp32, bf16, amx;  // fp32: brgemm, which need not be a unit of its own
};

inline CpuMatrixUnits find_matrix_units() {
#if defined(__x86_64__) && defined(__AVX512BF16__)  // -march=native: what this machine has
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  const bool works = brgemm_works<BFloat16>();
  return {brgemm_works<float>(), works, works && (edx >> 22 & 1) != 0};
#else
  return {brgemm_works<float>(), false, false};
#endif
}

inline CpuMatrixUnits cpu_matrix_units() {
  // torch.backends.mkldnn.flags(enabled=False) switches oneDNN off, and brgemm with it.
  if (!at::globalContext().userEnabledMkldnn()) return {false, false, false};
  // Asked once: on a virtual machine cpuid is answered by its host.
  static const CpuMatrixUnits units = find_matrix_units();
  return units;
}

// brgemm adds a whole depth in one chain; sums of shorter chains keep the error near MKL's.
constexpr int64_t kChain = 128, kBf16Chain = 512;

template <typename T>
void multiply_chains(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
                     int64_t ldb, float* c, int64_t ldc, bool accumulate, int64_t chain) {
  constexpr bool bf16 = sizeof(T) == 2;
  at::native::cpublas::brgemm(m, n, std::min(k, chain), lda, ldb, ldc, accumulate, a, b, c, bf16);
  if (k <= chain) return;
  thread_local std::vector<float> more;
  more.resize(m * n);
  for (int64_t p = chain; p < k; p += chain) {
    at::native::cpublas::brgemm(m, n, std::min(k - p, chain), lda, ldb, n, false, a + p,
                                b + p * ldb, more.data(), bf16);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) c[i * ldc + j] += more[i * n + j];
  }
}

inline void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                     int64_t ldb, float* c, int64_t ldc, bool accumulate = false,
                     int64_t chain = kChain) {
  if (m == 0 || n == 0) return;  // oneDNN refuses
  if (!cpu_matrix_units().fp32 || k == 0)
    return multiply_plain(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
  multiply_chains(m, n, k, a, lda, b, ldb, c, ldc, accumulate, chain);
}

// `chain` is even.
inline void multiply(int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t lda,
                     const BFloat16* b, int64_t ldb, float* c, int64_t ldc, bool accumulate = false,
                     int64_t chain = kBf16Chain) {
  if (m == 0 || n == 0) return;
  if (k > 0) return multiply_chains(m, n, k, a, lda, b, ldb, c, ldc, accumulate, chain);
  for (int64_t i = 0; i < m && !accumulate; ++i) std::fill_n(c + i * ldc, n, 0.f);
}

// Gives AMX's tile registers back; call at the end of each thread's work.
inline void release_matrix_unit() {
  if (cpu_matrix_units().amx) at::native::cpublas::brgemm_release(true);
}

// ---- operands of the two arithmetics ----

enum class Arithmetic { kFloat, kBf16 };

// `depth(k)` is the packed length of a reduced dimension k. A is used in place (kBf16: k is even).
// `right_transposed` and `right_rows` pack B for X Y^T and, unless kRightRowsInPlace, for G Y.
template <Arithmetic>
struct Operands;

template <>
struct Operands<Arithmetic::kFloat> {
  using Input = float;
  static constexpr bool kRightRowsInPlace = true;
  static int64_t depth(int64_t k) { return k; }
  static void right_transposed(const float* y, int64_t ld, int64_t n, int64_t k, float* out,
                               int64_t ldb) {
    transpose(y, ld, n, k, out, ldb);
  }
  static void right_rows(const float*, int64_t, int64_t, int64_t, float*, int64_t) {}
};

template <>
struct Operands<Arithmetic::kBf16> {
  using Input = BFloat16;
  static constexpr bool kRightRowsInPlace = false;
  static int64_t depth(int64_t k) { return round_up(k, 2); }
  static void right_transposed(const BFloat16* y, int64_t ld, int64_t n, int64_t k, BFloat16* out,
                               int64_t ldb) {
    pack_transposed(y, ld, n, k, out, ldb);
  }
  static void right_rows(const BFloat16* y, int64_t ld, int64_t k, int64_t n, BFloat16* out,
                         int64_t ldb) {
    pack_rows(y, ld, k, n, out, ldb);
  }
};

}  // namespace protoclip
