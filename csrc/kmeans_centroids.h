// The centroids of one kmeans_assign call, centred, coded and laid out for the screening.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "kmeans_screen.h"
#include "memory_pool.h"

namespace protoclip {

constexpr int64_t kChunkBytes = 320 << 10;  // of codes: they stay in the L2 cache over a block
constexpr int64_t kChunkPanels = 24;        // scratch of bounds: kRows * 24 * kColumns floats
constexpr int64_t kSample = 256;            // rows looked at to decide on the rotation
constexpr double kPeaky = 4.5;              // normal coordinates: 2.6 at D = 64 to 3.4 at D = 1024

// The coordinates in which points and centroids are coded: from a centre, rotated where peaky.
struct Frame {
  explicit Frame(const at::Tensor& centre);  // fp32 [D]

  int64_t d;
  bool rotated = false;
  screen::Rotation rotation;
  Buffer<float> mean;  // [D], the centre

  // out = row - mean; its squared norm.
  double centre(const float* row, float* out) const {
    return screen::centre(row, mean.get(), d, out);
  }

  // Of about kSample of the rows, fp32 and contiguous: is the largest coordinate mostly far above
  // the root mean square?
  bool peaky(const at::Tensor& rows) const;
};

inline Frame::Frame(const at::Tensor& centre) : d(centre.size(0)), rotation(d), mean(d) {
  std::copy_n(centre.const_data_ptr<float>(), d, mean.get());
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
    mean.mutable_data_ptr<float>()[j] = static_cast<float>(sum[j] / std::max<int64_t>(n, 1));
  return mean;
}

inline bool Frame::peaky(const at::Tensor& rows) const {
  const int64_t step = std::max<int64_t>(1, rows.size(0) / kSample);
  std::vector<float> row(d);
  double sum = 0, count = 0;
  for (int64_t i = 0; i < rows.size(0); i += step) {
    const double square = centre(rows.const_data_ptr<float>() + i * d, row.data());
    const double norm = std::sqrt(square / std::max<int64_t>(d, 1));
    if (!(norm > 0 && std::isfinite(norm))) continue;
    sum += screen::peak(row.data(), d) / norm;
    count += 1;
  }
  return count > 0 && sum / count > kPeaky;
}

// A buffer in a tensor, which can be handed out and come back. `get` is called in the innermost
// loops, where a tensor's data_ptr() would double the time of an assignment.
template <class T>
class Array {
 public:
  explicit Array(int64_t count)
      : Array(pooled_empty({count + kSpare}, c10::CppTypeToScalarType<T>::value)) {}
  Array(int64_t count, T value) : Array(count) { std::fill_n(get(), count, value); }
  explicit Array(const at::Tensor& tensor)
      : tensor(tensor), data(static_cast<T*>(tensor.data_ptr())) {}
  T* get() const { return data; }

  static constexpr int64_t kSpare = 64;  // a vector's width and more
  at::Tensor tensor;

 private:
  T* data;
};

struct Centroids {
  // Rows: fp32 and contiguous. `order`: the row in each slot of the codes, int64 [K]; null: as they
  // are.
  Centroids(const at::Tensor& rows, const Frame& frame, const int64_t* order = nullptr);
  // What `packed` gave for these rows and this frame.
  Centroids(const at::Tensor& rows, const Frame& frame, at::TensorList packed);
  std::vector<at::Tensor> packed() const;

  const float* rows;  // [K, D]
  const Frame& frame;
  int64_t k, d, depth, panels;
  float largest = 0, error_ratio = 0;           // max |c'|; typical |f| / |c'|
  Array<int8_t> codes;                          // [panels][depth / 4][int8::kColumns][4]
  Array<int32_t> start;                         // [panels * int8::kColumns], takes kOffset out
  Array<float> scale, half_square, norm_bound;  // [panels * int8::kColumns]

  // Panels that a block of points meets at once.
  int64_t chunk() const {
    return std::max<int64_t>(1, std::min(kChunkPanels, kChunkBytes / (int8::kColumns * depth + 1)));
  }

 private:
  void encode_panel(int64_t panel, const int64_t* order, float* error);
};

inline Centroids::Centroids(const at::Tensor& centroids, const Frame& frame, const int64_t* order)
    : rows(centroids.const_data_ptr<float>()),
      frame(frame),
      k(centroids.size(0)),
      d(centroids.size(1)),
      depth(round_up(d, 4)),
      panels(blocks(k, int8::kColumns)),
      codes(panels * int8::kColumns * depth, 0),
      start(panels * int8::kColumns, 0),
      scale(panels * int8::kColumns, 0),
      half_square(panels * int8::kColumns, kInfinity),  // slots past K lose against every centroid
      norm_bound(panels * int8::kColumns, 0) {
  std::vector<float> error(panels * int8::kColumns);
  at::parallel_for(0, panels, 1 + (1 << 15) / (int8::kColumns * depth + 1),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t panel = begin; panel < end; ++panel)
                       encode_panel(panel, order, error.data());
                   });
  double errors = 0, norms = 0;
  for (int64_t i = 0; i < k; ++i) {
    errors += error[i];
    norms += norm_bound.get()[i];
    largest = std::max(largest, norm_bound.get()[i]);
  }
  error_ratio = norms > 0 ? static_cast<float>(errors / norms) : 0.0f;
  for (int64_t i = 0; i < k && error_ratio > 0; ++i)
    norm_bound.get()[i] = std::max(norm_bound.get()[i], error[i] / error_ratio);
}

inline Centroids::Centroids(const at::Tensor& centroids, const Frame& frame, at::TensorList packed)
    : rows(centroids.const_data_ptr<float>()),
      frame(frame),
      k(centroids.size(0)),
      d(centroids.size(1)),
      depth(round_up(d, 4)),
      panels(blocks(k, int8::kColumns)),
      largest(packed[0].const_data_ptr<float>()[0]),
      error_ratio(packed[0].const_data_ptr<float>()[1]),
      codes(packed[1]),
      start(packed[2]),
      scale(packed[3]),
      half_square(packed[4]),
      norm_bound(packed[5]) {}

inline std::vector<at::Tensor> Centroids::packed() const {
  auto numbers = at::empty({2}, at::kFloat);
  numbers.mutable_data_ptr<float>()[0] = largest;
  numbers.mutable_data_ptr<float>()[1] = error_ratio;
  return {numbers, codes.tensor, start.tensor, scale.tensor, half_square.tensor, norm_bound.tensor};
}

inline void Centroids::encode_panel(int64_t panel, const int64_t* order, float* error) {
  std::vector<float> row(d);
  std::vector<int8_t> code(depth);
  int8_t* out = codes.get() + panel * depth * int8::kColumns;
  for (int64_t i = panel * int8::kColumns; i < std::min(k, (panel + 1) * int8::kColumns); ++i) {
    const double square = frame.centre(rows + (order ? order[i] : i) * d, row.data());
    if (frame.rotated) frame.rotation(row.data());
    const auto coded = screen::encode(row.data(), d, 127, 0, 1e-30f, code.data());
    int32_t total = 0;
    for (int64_t j = 0; j < depth; ++j) {
      out[(j / 4 * int8::kColumns + i % int8::kColumns) * 4 + j % 4] = code[j];
      total += code[j];
    }
    start.get()[i] = -screen::kOffset * total;
    scale.get()[i] = coded.scale;
    half_square.get()[i] = static_cast<float>(square / 2 * (1 - screen::kSlack));
    norm_bound.get()[i] = static_cast<float>(std::sqrt(square));
    error[i] = coded.error;
  }
}

}  // namespace protoclip
