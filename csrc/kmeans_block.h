// A block of points on its way past the centroids: screened in 8 bits, measured in fp32.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "kmeans_centroids.h"

namespace protoclip {

using int8::kColumns;
using int8::kRows;
using int8::kVectors;

constexpr int64_t kBlockRows = 128;  // points that share one pass over the centroids' codes
constexpr int64_t kMostRows = 512;   // of a block of few rows (kmeans_reassign_cpu.cpp)
// Norms outside (kTooSmall, kTooLarge) have squares near fp32's ends: such a row is done in fp64.
constexpr float kTooSmall = 1e-10f, kTooLarge = 1e15f;
// Sums of more products of codes may leave int32: rows that are wider are done in fp64 too.
constexpr int64_t kMostProducts = std::numeric_limits<int32_t>::max() / (screen::kOffset * 127);

// The nearest centroid of a point.
struct Nearest {
  int64_t label = -1;
  float distance = kInfinity;  // squared
};

// Without bounds, for points whose squares leave fp32; those that are not finite have no label.
inline Nearest nearest_in_fp64(const float* x, const float* centroids, int64_t k, int64_t d) {
  double best = std::numeric_limits<double>::infinity();
  Nearest nearest{-1, std::numeric_limits<float>::quiet_NaN()};
  for (int64_t i = 0; i < k; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < d; ++j) {
      const double gap = static_cast<double>(x[j]) - centroids[i * d + j];
      sum += gap * gap;
    }
    if (sum < best) {
      best = sum;
      nearest = {i, static_cast<float>(sum)};
    }
  }
  return nearest;
}

// A centroid that may be nearer than the best so far.
struct Hit {
  int64_t centroid;
  float bound;
};

// What the bounds of a point need beside its code: a row of CodedPoints::code_bounds.
struct CodedRow {
  static constexpr int64_t kSize = 4;
  screen::Coded coded;
  float square;  // |x'|^2

  static CodedRow load(const float* row) { return {{row[0], row[1], row[2]}, row[3]}; }
  void store(float* row) const {
    row[0] = coded.scale;
    row[1] = coded.norm;
    row[2] = coded.error;
    row[3] = square;
  }
};

// Of points that meet many sets of centroids, in one frame.
struct CodedPoints {
  at::Tensor codes;        // uint8 [N, depth]
  at::Tensor code_bounds;  // fp32 [N, CodedRow::kSize]
};

// Codes as kmeans_encode gives them for points [N, D].
inline void expect_codes(const char* op, at::TensorList codes, int64_t n, int64_t d) {
  TORCH_CHECK_VALUE(codes.size() == 4, op, ": expected the 4 tensors of kmeans_encode, got ",
                    codes.size());
  expect(op, "codes[0]", codes[0], {n, round_up(d, 4)}, at::kByte);
  expect(op, "codes[1]", codes[1], {n, CodedRow::kSize}, at::kFloat);
  expect(op, "codes[2]", codes[2], {d}, at::kFloat);
  expect(op, "codes[3]", codes[3], {}, at::kBool);
  for (const at::Tensor& code : codes)
    TORCH_CHECK_VALUE(code.is_contiguous(), op, ": expected contiguous codes");
}

inline void expect_points(const char* op, const at::Tensor& points, const at::Tensor& centroids) {
  expect(op, "points", points, {kAny, kAny}, kFloats);
  expect(op, "centroids", centroids, {kAny, points.size(1)}, kFloats);
  TORCH_CHECK_VALUE(points.size(0) == 0 || centroids.size(0) > 0, op,
                    ": expected K >= 1 centroids, got 0");
}

// `prepared` as kmeans_prepare gives it where not all distances are measured.
inline void expect_prepared(const char* op, at::TensorList prepared, int64_t d) {
  TORCH_CHECK_VALUE(prepared.size() == 9, op,
                    ": expected the 1 or 9 tensors of kmeans_prepare, got ", prepared.size());
  const int64_t slots = round_up(prepared[0].size(0), int8::kColumns);
  const int64_t spare = Array<float>::kSpare;
  expect(op, "prepared[1]", prepared[1], {d}, at::kFloat);
  expect(op, "prepared[2]", prepared[2], {}, at::kBool);
  expect(op, "prepared[3]", prepared[3], {2}, at::kFloat);
  expect(op, "prepared[4]", prepared[4], {slots * round_up(d, 4) + spare}, at::kChar);
  expect(op, "prepared[5]", prepared[5], {slots + spare}, at::kInt);
  for (int i = 6; i < 9; ++i) expect(op, "prepared", prepared[i], {slots + spare}, at::kFloat);
  for (const at::Tensor& part : prepared)
    TORCH_CHECK_VALUE(part.is_contiguous(), op, ": expected contiguous tensors");
}

inline void expect_order(const char* op, const at::Tensor& order, int64_t k) {
  expect_labels(op, order, k, k, 0, "order");
  TORCH_CHECK_VALUE(order.is_contiguous(), op, ": expected a contiguous order");
}

// Relative, of a squared distance of rows [D].
inline double rounding_of_square(int64_t d) {
  return (static_cast<double>(d) / int8::kLanes + 16) / (1 << 24);
}

// A block of points, their codes, and the best centroid so far of each.
struct Block {
  explicit Block(const Centroids& c, int64_t rows = kBlockRows)
      : c(c),
        converted(rows * c.d),
        centred(c.d),
        codes(rows * c.depth),
        bounds(kChunkPanels * kRows * kColumns),
        highest(kRows * kChunkPanels * int8::kLanes),
        hits(kChunkPanels * kColumns),
        min_scale(std::max(c.largest * 1e-12f, 1e-30f)),
        rounding(rounding_of_square(c.d)) {}

  const Centroids& c;
  Buffer<float> converted;        // [rows, D]
  const float* point[kMostRows];  // [D], in `converted` where the input is not fp32 as it stands
  Buffer<float> centred;          // [D]
  Buffer<uint8_t> codes;          // [rows, depth]
  Buffer<float> bounds;           // [chunk's panels][kRows][kColumns]
  Buffer<float> highest;          // [kRows][chunk's panels][int8::kLanes], of a panel's vectors
  std::vector<Hit> hits;          // of one row in a chunk
  // Next to far larger centroids a point needs no digits, and 1 / s must stay finite.
  float min_scale;
  double rounding;             // relative, of a squared distance
  float inverse[kMostRows];    // 1 / s
  float widening[kMostRows];   // (|e| + |s q| error_ratio) / s
  float threshold[kMostRows];  // score / s of the best centroid, from below
  double square[kMostRows];    // |x'|^2
  float distance[kMostRows];
  int64_t label[kMostRows];

  template <class T>
  void read(int64_t row, const T* x, int64_t stride);
  bool encode(int64_t row);
  bool take(int64_t row, const CodedPoints& points, int64_t from);
  bool expect(int64_t row, const CodedPoints& points, int64_t from, float nearest);
  bool begin(int64_t row, double square);
  bool fits(int64_t row) const;
  float least_score(int64_t row, float distance) const;
  void finish(int64_t row, const screen::Coded& coded);
  template <class Row>
  void screen_panel(Row row, int64_t panel, int64_t p);
  void screen_chunk(int64_t group, int64_t panel, int64_t panels);
  int64_t find_hits(int64_t row, int64_t panel, int64_t panels, float least);
  void measure_chunk(int64_t row, int64_t panel, int64_t panels);
  void measure(int64_t row, int64_t candidate);
  bool is_nearer(int64_t row, float distance, int64_t candidate) const;
  void hold(int64_t row, float distance, int64_t candidate);
  void brute_force(int64_t row);
};

template <class T>
void Block::read(int64_t row, const T* x, int64_t stride) {
  if constexpr (std::is_same_v<T, float>) {
    point[row] = x;
    if (stride == 1) return;
  }
  float* out = converted.get() + row * c.d;
  point[row] = out;
  if (stride == 1)
    for (int64_t j = 0; j < c.d; ++j) out[j] = static_cast<float>(x[j]);
  else
    for (int64_t j = 0; j < c.d; ++j) out[j] = static_cast<float>(x[j * stride]);
}

// False where the point is done already (`begin`).
inline bool Block::encode(int64_t row) {
  if (!begin(row, c.frame.centre(point[row], centred.get()))) return false;
  if (c.frame.rotated) c.frame.rotation(centred.get());
  uint8_t* code = codes.get() + row * c.depth;
  finish(row, screen::encode(centred.get(), c.d, int8::kLeftMax, screen::kOffset, min_scale, code));
  std::fill(code + c.d, code + c.depth, screen::kOffset);
  return true;
}

// The code of point `from`, instead of encoding it again.
inline bool Block::take(int64_t row, const CodedPoints& points, int64_t from) {
  const CodedRow point =
      CodedRow::load(points.code_bounds.const_data_ptr<float>() + from * CodedRow::kSize);
  if (point.coded.scale < min_scale) return encode(row);
  std::copy_n(points.codes.const_data_ptr<uint8_t>() + from * c.depth, c.depth,
              codes.get() + row * c.depth);
  if (!begin(row, point.square)) return false;
  finish(row, point.coded);
  return true;
}

// False where the point is done already: its squares would leave fp32, or are not finite.
inline bool Block::begin(int64_t row, double squared_norm) {
  square[row] = squared_norm;
  label[row] = -1;
  inverse[row] = widening[row] = 0;
  threshold[row] = -kInfinity;
  distance[row] = std::numeric_limits<float>::quiet_NaN();
  if (fits(row)) return true;
  threshold[row] = kInfinity;  // nothing passes
  brute_force(row);
  return false;
}

inline bool Block::fits(int64_t row) const {
  const double norm = std::max<double>(std::sqrt(square[row]), c.largest);
  return c.d <= kMostProducts && norm < kTooLarge && norm >= kTooSmall;
}

// As `take`, of a point whose centroids farther than `nearest`, squared, do not matter. False where
// bounds cannot tell: all are to be measured, and none passes.
inline bool Block::expect(int64_t row, const CodedPoints& points, int64_t from, float nearest) {
  const CodedRow point =
      CodedRow::load(points.code_bounds.const_data_ptr<float>() + from * CodedRow::kSize);
  std::copy_n(points.codes.const_data_ptr<uint8_t>() + from * c.depth, c.depth,
              codes.get() + row * c.depth);
  square[row] = point.square;
  inverse[row] = widening[row] = 0;
  threshold[row] = kInfinity;
  if (!fits(row) || point.coded.scale < min_scale) return false;
  finish(row, point.coded);
  threshold[row] = least_score(row, nearest);
  return true;
}

// score / s of a centroid at this squared distance, from below.
inline float Block::least_score(int64_t row, float distance) const {
  const double score =
      (square[row] * (1 - rounding) - distance * (1 + rounding)) / 2 * inverse[row];
  return static_cast<float>(score - std::abs(score) * 1e-6);
}

inline void Block::finish(int64_t row, const screen::Coded& coded) {
  inverse[row] = 1 / coded.scale;
  const double exact = (coded.error + static_cast<double>(coded.norm) * c.error_ratio) * 1.001;
  widening[row] =
      static_cast<float>((exact + std::sqrt(square[row]) * screen::kSlack) / coded.scale);
}

// Bounds of the points row(0) ... row(kRows - 1) against a panel, the p-th of a chunk.
template <class Row>
inline ALWAYS_INLINE void Block::screen_panel(Row row, int64_t panel, int64_t p) {
  const int64_t at = panel * kColumns;
  const uint8_t* left[kRows];
  for (int r = 0; r < kRows; ++r) left[r] = codes.get() + row(r) * c.depth;
  int8::Float high;
  int8::tile(left, c.codes.get() + at * c.depth, c.start.get() + at, c.depth,
             [&](auto i, int8::Int sum) ALWAYS_INLINE {
               constexpr int r = i / kVectors, v = i % kVectors;
               const auto scale = int8::load(c.scale.get() + at + v * int8::kLanes);
               const auto half = int8::load(c.half_square.get() + at + v * int8::kLanes);
               const auto norm = int8::load(c.norm_bound.get() + at + v * int8::kLanes);
               const auto bound =
                   int8::to_float(sum) * scale + (norm * widening[row(r)] - half * inverse[row(r)]);
               int8::store(bounds.get() + (p * kRows + r) * kColumns + v * int8::kLanes, bound);
               high = v == 0 ? bound : larger(high, bound);
               if constexpr (v == kVectors - 1)
                 int8::store(highest.get() + (r * kChunkPanels + p) * int8::kLanes, high);
             });
}

// Bounds of kRows points against a chunk of panels.
inline void Block::screen_chunk(int64_t group, int64_t panel, int64_t panels) {
  for (int64_t p = 0; p < panels; ++p)
    screen_panel([=](int64_t r) { return group + r; }, panel + p, p);
}

// Fills `hits` with the centroids of a chunk whose bound is at least `least`, in rising order.
inline int64_t Block::find_hits(int64_t row, int64_t panel, int64_t panels, float least) {
  int64_t found = 0;
  const auto limit = int8::broadcast(least);
  const float* high = highest.get() + row % kRows * kChunkPanels * int8::kLanes;
  for (int64_t p = 0; p < panels; ++p) {
    if (!int8::mask_ge(int8::load(high + p * int8::kLanes), limit)) continue;
    const float* bound = bounds.get() + (p * kRows + row % kRows) * kColumns;
    for (int v = 0; v < kVectors; ++v)
      for (uint32_t mask = int8::mask_ge(int8::load(bound + v * int8::kLanes), limit); mask;
           mask &= mask - 1) {
        const int64_t i = v * int8::kLanes + __builtin_ctz(mask);
        hits[found++] = {(panel + p) * kColumns + i, bound[i]};
      }
  }
  return found;
}

// Measures the centroids of a chunk that may be nearer than the best so far, likeliest first.
inline void Block::measure_chunk(int64_t row, int64_t panel, int64_t panels) {
  const float* high = highest.get() + row % kRows * kChunkPanels * int8::kLanes;
  auto best = int8::load(high);
  for (int64_t p = 1; p < panels; ++p) best = larger(best, int8::load(high + p * int8::kLanes));
  const float top = maximum(best);
  if (!(top >= threshold[row])) return;
  // The likeliest will raise the threshold to about this, so that one search is enough.
  const float least = std::max(threshold[row], top - 1.25f * widening[row] * c.largest);
  int64_t found = find_hits(row, panel, panels, least), likeliest = 0;
  while (hits[likeliest].bound < top) ++likeliest;
  const int64_t first = hits[likeliest].centroid;
  measure(row, first);
  if (threshold[row] < least) found = find_hits(row, panel, panels, threshold[row]);
  for (int64_t i = 0; i < found; ++i)
    if (hits[i].centroid != first && hits[i].bound >= threshold[row])
      measure(row, hits[i].centroid);
}

inline float squared_distance(const float* x, const float* y, int64_t d) {
  constexpr int kWays = 4;
  int8::Float sums[kWays] = {};
  int64_t j = 0;
  for (; j + kWays * int8::kLanes <= d; j += kWays * int8::kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < kWays; ++i) {
      const auto gap = int8::load(x + j + i * int8::kLanes) - int8::load(y + j + i * int8::kLanes);
      sums[i] += gap * gap;
    }
  for (; j + int8::kLanes <= d; j += int8::kLanes) {
    const auto gap = int8::load(x + j) - int8::load(y + j);
    sums[0] += gap * gap;
  }
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; j < d; ++j) total += (x[j] - y[j]) * (x[j] - y[j]);
  return total;
}

inline void Block::measure(int64_t row, int64_t candidate) {
  if (candidate >= c.k) return;  // a slot of padding ties at -inf
  const float now = squared_distance(point[row], c.rows + candidate * c.d, c.d);
  if (label[row] < 0 || is_nearer(row, now, candidate)) hold(row, now, candidate);
}

// Than the best so far; of equal ones the first is.
inline bool Block::is_nearer(int64_t row, float now, int64_t candidate) const {
  return now < distance[row] || (now == distance[row] && candidate < label[row]);
}

// The best so far.
inline void Block::hold(int64_t row, float now, int64_t candidate) {
  label[row] = candidate;
  distance[row] = now;
  threshold[row] = least_score(row, now);
}

inline void Block::brute_force(int64_t row) {
  const Nearest nearest = nearest_in_fp64(point[row], c.rows, c.k, c.d);
  label[row] = nearest.label;
  distance[row] = nearest.distance;
}

}  // namespace protoclip
