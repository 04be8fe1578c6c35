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

constexpr float kSlack = 1.0f / (1 << 19);  // relative, over every fp32 rounding of the bound
constexpr int kOffset = int8::kLeftMax + 1;

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
  Floats top = {};
  int64_t j = 0;
  for (; j + kLanes <= d; j += kLanes) {
    const Floats v = load(x + j);
    top = larger(top, larger(v, -v));
  }
  float best = maximum(top);
  for (; j < d; ++j) best = std::max(best, std::abs(x[j]));
  return best;
}

// out = x - mean; its squared norm.
inline double centre(const float* x, const float* mean, int64_t d, float* out) {
  Floats squares = {};
  int64_t j = 0;
  for (; j + kLanes <= d; j += kLanes) {
    const Floats v = load(x + j) - load(mean + j);
    store(out + j, v);
    squares += v * v;
  }
  double rest = 0;
  for (; j < d; ++j) {
    out[j] = x[j] - mean[j];
    rest += static_cast<double>(out[j]) * out[j];
  }
  return rest + sum(squares);
}

// q = round(x / scale) + offset into codes [d], its largest magnitude `limit`.
template <class Code>
Coded encode(const float* x, int64_t d, int limit, int offset, float min_scale, Code* codes) {
  typedef Code Codes __attribute__((vector_size(kLanes)));
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: the sum drops the fraction
  const float scale = std::max(peak(x, d) / limit, min_scale), inverse = 1 / scale;
  Floats value_squares = {}, error_squares = {};
  int64_t j = 0;
  for (; j + kLanes <= d; j += kLanes) {
    const Floats v = load(x + j), q = (v * inverse + kRounder) - kRounder;
    const Floats value = scale * q, error = v - value;
    const Codes code = __builtin_convertvector(__builtin_convertvector(q, Ints) + offset, Codes);
    std::memcpy(codes + j, &code, sizeof code);
    value_squares += value * value;
    error_squares += error * error;
  }
  double norm = 0, error = 0;
  for (; j < d; ++j) {
    const float q = (x[j] * inverse + kRounder) - kRounder, value = scale * q;
    codes[j] = static_cast<Code>(static_cast<int32_t>(q) + offset);
    norm += static_cast<double>(value) * value;
    error += (static_cast<double>(x[j]) - value) * (static_cast<double>(x[j]) - value);
  }
  norm += sum(value_squares), error += sum(error_squares);
  return {scale, static_cast<float>(std::sqrt(norm)), static_cast<float>(std::sqrt(error))};
}

}  // namespace protoclip::screen
