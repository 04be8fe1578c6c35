// The centroids of one kmeans_assign call, centred, coded and laid out for the screening.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <new>
#include <vector>

#include "kmeans_screen.h"

namespace protoclip {

// std::vector on the boundaries of cache lines: a vector register's load or store touches one line.
template <class T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}

  T* allocate(std::size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), kLine));
  }
  void deallocate(T* data, std::size_t) { ::operator delete(data, kLine); }

  template <class U>
  bool operator==(const LineAllocator<U>&) const {
    return true;
  }
  template <class U>
  bool operator!=(const LineAllocator<U>&) const {
    return false;
  }
};

template <class T>
using AlignedVector = std::vector<T, LineAllocator<T>>;

constexpr int64_t SAMPLE = 256;  // rows looked at to decide on the rotation
constexpr double PEAKY = 4.5;    // normal coordinates: 2.6 at D = 64 to 3.4 at D = 1024

// The coordinates in which points and centroids are coded: from a centre, rotated where peaky.
struct Frame {
  explicit Frame(const at::Tensor& centre);  // fp32 [D]

  int64_t d;
  bool rotated = false;
  screen::Rotation rotation;
  AlignedVector<float> mean;  // [D], the centre

  // out = row - mean; its squared norm.
  double centre(const float* row, float* out) const {
    return screen::centre(row, mean.data(), d, out);
  }

  bool finite() const {
    return std::all_of(mean.begin(), mean.end(), [](float m) { return std::isfinite(m); });
  }

  // Of about SAMPLE of the rows, fp32 and contiguous: is the largest coordinate mostly far above
  // the root mean square?
  bool peaky(const at::Tensor& rows) const;
};

inline Frame::Frame(const at::Tensor& centre) : d(centre.size(0)), rotation(d), mean(d) {
  std::copy_n(centre.const_data_ptr<float>(), d, mean.data());
}

// Of rows [N, D], fp32 and contiguous: fp32 [D].
inline at::Tensor mean_row(const at::Tensor& rows) {
  const int64_t n = rows.size(0), d = rows.size(1);
  const float* data = rows.const_data_ptr<float>();
  std::vector<double> sum(d);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < d; ++j) sum[j] += data[i * d + j];
  auto mean = at::empty({d}, rows.options());
  for (int64_t j = 0; j < d; ++j)
    mean.mutable_data_ptr<float>()[j] = static_cast<float>(sum[j] / n);
  return mean;
}

inline bool Frame::peaky(const at::Tensor& rows) const {
  const int64_t step = std::max<int64_t>(1, rows.size(0) / SAMPLE);
  std::vector<float> row(d);
  double sum = 0, count = 0;
  for (int64_t i = 0; i < rows.size(0); i += step) {
    const double square = centre(rows.const_data_ptr<float>() + i * d, row.data());
    const double norm = std::sqrt(square / std::max<int64_t>(d, 1));
    if (!(norm > 0 && std::isfinite(norm))) continue;
    sum += screen::peak(row.data(), d) / norm;
    count += 1;
  }
  return count > 0 && sum / count > PEAKY;
}

struct Centroids {
  Centroids(const at::Tensor& rows, const Frame& frame);  // fp32 and contiguous

  const float* rows;  // [K, D]
  const Frame& frame;
  int64_t k, d, depth, panels;
  float largest = 0, error_ratio = 0;                   // max |c'|; typical |f| / |c'|
  AlignedVector<int8_t> codes;                          // [panels][depth / 4][int8::COLS][4]
  AlignedVector<int32_t> start;                         // [panels * int8::COLS], takes OFFSET out
  AlignedVector<float> scale, half_square, norm_bound;  // [panels * int8::COLS]

 private:
  void encode_panel(int64_t panel, float* error);
};

inline Centroids::Centroids(const at::Tensor& centroids, const Frame& frame)
    : rows(centroids.const_data_ptr<float>()),
      frame(frame),
      k(centroids.size(0)),
      d(centroids.size(1)),
      depth(round_up(d, 4)),
      panels((k + int8::COLS - 1) / int8::COLS) {
  const int64_t slots = panels * int8::COLS;
  codes.resize(slots * depth);
  start.resize(slots);
  scale.resize(slots);
  // Slots past K lose against every centroid.
  half_square.resize(slots, std::numeric_limits<float>::infinity());
  norm_bound.resize(slots);
  std::vector<float> error(slots);
  at::parallel_for(0, panels, 1 + (1 << 15) / (int8::COLS * depth + 1),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t panel = begin; panel < end; ++panel)
                       encode_panel(panel, error.data());
                   });
  double errors = 0, norms = 0;
  for (int64_t i = 0; i < k; ++i) {
    errors += error[i];
    norms += norm_bound[i];
    largest = std::max(largest, norm_bound[i]);
  }
  error_ratio = norms > 0 ? static_cast<float>(errors / norms) : 0.0f;
  for (int64_t i = 0; i < k && error_ratio > 0; ++i)
    norm_bound[i] = std::max(norm_bound[i], error[i] / error_ratio);
}

inline void Centroids::encode_panel(int64_t panel, float* error) {
  std::vector<float> row(d);
  std::vector<int8_t> code(depth);
  int8_t* out = codes.data() + panel * depth * int8::COLS;
  for (int64_t i = panel * int8::COLS; i < std::min(k, (panel + 1) * int8::COLS); ++i) {
    const double square = frame.centre(rows + i * d, row.data());
    if (frame.rotated) frame.rotation(row.data());
    const auto coded = screen::encode(row.data(), d, 127, 0, 1e-30f, code.data());
    int32_t total = 0;
    for (int64_t j = 0; j < depth; ++j) {
      out[(j / 4 * int8::COLS + i % int8::COLS) * 4 + j % 4] = code[j];
      total += code[j];
    }
    start[i] = -screen::OFFSET * total;
    scale[i] = coded.scale;
    half_square[i] = static_cast<float>(square / 2 * (1 - screen::SLACK));
    norm_bound[i] = static_cast<float>(std::sqrt(square));
    error[i] = coded.error;
  }
}

}  // namespace protoclip
