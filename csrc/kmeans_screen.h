// 8-bit codes of points and centroids with provable bounds, for the screening in kmeans_assign.
//
// With x' = x - mean and c' = c - mean (distances do not change), codes x' = s q + e and
// c' = t p + f, the score x'.c' - |c'|^2 / 2 is at most
//   s t q.p - |c'|^2 / 2 + |e| |c'| + |s q| |f|          (Cauchy-Schwarz)
// A centroid whose bound is below the score of one already measured cannot be the nearest.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "int8_tile.h"

namespace protoclip::screen {

constexpr float SLACK = 1.0f / (1 << 19);  // relative, over every fp32 rounding of the bound
constexpr int OFFSET = int8::LEFT_MAX + 1;

// What is known of a row after coding it with `scale`.
struct Coded {
  float scale;  // s
  float norm;   // |s q|
  float error;  // |e|
};

// Orthogonal map that spreads outlying coordinates over all of them, so that 8 bits suffice: random
// signs and a Walsh-Hadamard transform of the first, then of the last, power-of-two coordinates.
class Rotation {
 public:
  explicit Rotation(int64_t d) : d_(d), signs_(2 * d) {
    while (2 * size_ <= d) size_ *= 2;
    uint32_t state = 2463534242u;  // xorshift32 (Marsaglia 2003)
    const float unit = 1 / std::sqrt(static_cast<float>(size_));
    for (float& sign : signs_) {
      state ^= state << 13, state ^= state >> 17, state ^= state << 5;
      sign = state >> 31 ? unit : -unit;
    }
  }

  void operator()(float* row) const {
    transform(row, signs_.data());
    if (size_ < d_) transform(row + d_ - size_, signs_.data() + d_);
  }

 private:
  void transform(float* x, const float* sign) const {
    for (int64_t i = 0; i < size_; ++i) x[i] *= sign[i];
    for (int64_t half = size_ / 2; half >= 16; half /= 2)
      for (int64_t at = 0; at < size_; at += 2 * half)
        for (int64_t i = at; i < at + half; ++i) butterfly(x[i], x[i + half]);
    for (int64_t half = std::min<int64_t>(8, size_ / 2); half >= 1; half /= 2)
      for (int64_t at = 0; at < size_; at += 2 * half)
        for (int64_t i = at; i < at + half; ++i) butterfly(x[i], x[i + half]);
  }

  static void butterfly(float& a, float& b) {
    const float sum = a + b;
    b = a - b;
    a = sum;
  }

  int64_t d_, size_ = 1;
  std::vector<float> signs_;
};

inline float peak(const float* x, int64_t d) {
  float top = 0;
  for (int64_t j = 0; j < d; ++j) top = std::max(top, std::abs(x[j]));
  return top;
}

inline double squared_norm(const float* x, int64_t d) {
  constexpr int WAYS = 16;
  float sums[WAYS] = {};
  int64_t j = 0;
  for (; j + WAYS <= d; j += WAYS)
    for (int i = 0; i < WAYS; ++i) sums[i] += x[j + i] * x[j + i];
  double total = 0;
  for (; j < d; ++j) total += static_cast<double>(x[j]) * x[j];
  for (float sum : sums) total += sum;
  return total;
}

// q = round(x / scale) + offset into codes [d], its largest magnitude `limit`.
template <class Code>
Coded encode(const float* x, int64_t d, int limit, int offset, float min_scale, Code* codes) {
  const float scale = std::max(peak(x, d) / limit, min_scale), inverse = 1 / scale;
  constexpr int WAYS = 16;
  float coded[WAYS] = {}, left[WAYS] = {};
  const auto one = [&](int64_t j, int way) {
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
    const float q = (x[j] * inverse + 12582912.0f) - 12582912.0f;
    const float value = scale * q, error = x[j] - value;
    codes[j] = static_cast<Code>(static_cast<int32_t>(q) + offset);
    coded[way] += value * value;
    left[way] += error * error;
  };
  int64_t j = 0;
  for (; j + WAYS <= d; j += WAYS)
    for (int i = 0; i < WAYS; ++i) one(j + i, i);
  for (; j < d; ++j) one(j, 0);
  double norm = 0, error = 0;
  for (int i = 0; i < WAYS; ++i) norm += coded[i], error += left[i];
  return {scale, static_cast<float>(std::sqrt(norm)), static_cast<float>(std::sqrt(error))};
}

}  // namespace protoclip::screen
