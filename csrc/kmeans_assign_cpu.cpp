// Nearest centroid of each point, exactly, at the speed of 8-bit dot products.
//
// A tile of ROWS points against COLS centroids gives upper bounds of their scores (kmeans_screen.h)
// for a chunk of centroids; only those above the score of the best centroid measured so far are
// measured themselves, as fp32 sums of (x - c)^2. On random data of D = 256, K = 1024 that is about
// 4 centroids a point. Scores live in an [ROWS, chunk] scratch: never [N, K].
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <limits>

#include "kmeans_screen.h"

namespace protoclip {
namespace {

using int8::COLS;
using int8::LANES;
using int8::ROWS;
using int8::VECS;

constexpr int64_t BLOCK_ROWS = 128;       // points that share one pass over the centroids' codes
constexpr int64_t CHUNK_BYTES = 1 << 18;  // of codes: they stay in the L2 cache over the block
constexpr int64_t CHUNK_PANELS = 12;      // scratch of scores: ROWS * 12 * COLS floats, in L1
constexpr float TOO_LARGE = 1e15f;        // squares near fp32's end: such a row is done in fp64

constexpr int64_t SAMPLE = 256;  // rows looked at to decide on the rotation
constexpr double PEAKY = 4.5;    // normal coordinates: 2.6 at D = 64 to 3.4 at D = 1024

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Centroids {
  Centroids(const at::Tensor& rows, const at::Tensor& sample);

  const float* rows;  // [K, D]
  int64_t k, d, depth, panels;
  bool finite = true, rotated = false;
  float largest = 0, error_ratio = 0;  // max |c'|; typical |f| / |c'|
  screen::Rotation rotation;
  std::vector<float> mean;                            // [D]
  std::vector<int8_t> codes;                          // [panels][depth / 4][COLS][4]
  std::vector<int32_t> start;                         // [panels * COLS], takes OFFSET out
  std::vector<float> scale, half_square, norm_bound;  // [panels * COLS]

  void centre(const float* row, float* out) const {
    for (int64_t j = 0; j < d; ++j) out[j] = row[j] - mean[j];
  }

 private:
  void find_mean();
  double peakiness(const at::Tensor& sample) const;
  void encode_panel(int64_t panel, float* error);
};

// `sample`: some of the points; both are fp32 and contiguous.
Centroids::Centroids(const at::Tensor& centroids, const at::Tensor& sample)
    : rows(centroids.const_data_ptr<float>()),
      k(centroids.size(0)),
      d(centroids.size(1)),
      depth(round_up(d, 4)),
      panels((k + COLS - 1) / COLS),
      rotation(d) {
  find_mean();
  if (!finite) return;
  rotated = std::max(peakiness(sample), peakiness(centroids)) > PEAKY;
  const int64_t slots = panels * COLS;
  codes.resize(slots * depth);
  start.resize(slots);
  scale.resize(slots);
  // Slots past K lose against every centroid.
  half_square.resize(slots, std::numeric_limits<float>::infinity());
  norm_bound.resize(slots);
  std::vector<float> error(slots);
  at::parallel_for(0, panels, 1 + (1 << 15) / (COLS * depth + 1), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) encode_panel(panel, error.data());
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

void Centroids::find_mean() {
  std::vector<double> sum(d);
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < d; ++j) sum[j] += rows[i * d + j];
  mean.resize(d);
  for (int64_t j = 0; j < d; ++j) {
    mean[j] = static_cast<float>(sum[j] / k);
    finite = finite && std::isfinite(mean[j]);
  }
}

// Mean over some rows of the largest coordinate over the root mean square, after centring.
double Centroids::peakiness(const at::Tensor& sample) const {
  const int64_t step = std::max<int64_t>(1, sample.size(0) / SAMPLE);
  std::vector<float> row(d);
  double sum = 0, count = 0;
  for (int64_t i = 0; i < sample.size(0); i += step) {
    centre(sample.const_data_ptr<float>() + i * d, row.data());
    const double norm = std::sqrt(screen::squared_norm(row.data(), d) / std::max<int64_t>(d, 1));
    if (!(norm > 0 && std::isfinite(norm))) continue;
    sum += screen::peak(row.data(), d) / norm;
    count += 1;
  }
  return count > 0 ? sum / count : 0;
}

void Centroids::encode_panel(int64_t panel, float* error) {
  std::vector<float> row(d);
  std::vector<int8_t> code(depth);
  int8_t* out = codes.data() + panel * depth * COLS;
  for (int64_t i = panel * COLS; i < std::min(k, (panel + 1) * COLS); ++i) {
    centre(rows + i * d, row.data());
    const double square = screen::squared_norm(row.data(), d);
    if (rotated) rotation(row.data());
    const auto coded = screen::encode(row.data(), d, 127, 0, 1e-30f, code.data());
    int32_t total = 0;
    for (int64_t j = 0; j < depth; ++j) {
      out[(j / 4 * COLS + i % COLS) * 4 + j % 4] = code[j];
      total += code[j];
    }
    start[i] = -screen::OFFSET * total;
    scale[i] = coded.scale;
    half_square[i] = static_cast<float>(square / 2 * (1 - screen::SLACK));
    norm_bound[i] = static_cast<float>(std::sqrt(square));
    error[i] = coded.error;
  }
}

// A block of points, their codes, and the best centroid so far of each.
struct Block {
  explicit Block(const Centroids& c)
      : c(c),
        points(BLOCK_ROWS * c.d),
        centred(c.d),
        codes(BLOCK_ROWS * c.depth),
        bounds(ROWS * CHUNK_PANELS * COLS) {}

  const Centroids& c;
  std::vector<float> points;    // [BLOCK_ROWS, D]
  std::vector<float> centred;   // [D]
  std::vector<uint8_t> codes;   // [BLOCK_ROWS, depth]
  std::vector<float> bounds;    // [ROWS, chunk]
  float inverse[BLOCK_ROWS];    // 1 / s
  float widening[BLOCK_ROWS];   // (|e| + |s q| error_ratio) / s
  float threshold[BLOCK_ROWS];  // score / s of the best centroid, from below
  double square[BLOCK_ROWS];    // |x'|^2
  float distance[BLOCK_ROWS];
  int64_t label[BLOCK_ROWS];

  void encode(int64_t row);
  void screen_chunk(int64_t group, int64_t panel, int64_t panels, float (&top)[ROWS]);
  void measure_chunk(int64_t row, int64_t first, int64_t count, const float* bound, float top);
  void measure(int64_t row, int64_t candidate);
  void brute_force(int64_t row);
};

void Block::encode(int64_t row) {
  const float* x = points.data() + row * c.d;
  uint8_t* code = codes.data() + row * c.depth;
  c.centre(x, centred.data());
  square[row] = screen::squared_norm(centred.data(), c.d);
  label[row] = -1;
  inverse[row] = widening[row] = 0;
  threshold[row] = -std::numeric_limits<float>::infinity();
  distance[row] = std::numeric_limits<float>::quiet_NaN();
  if (!(square[row] < TOO_LARGE * TOO_LARGE) || c.largest > TOO_LARGE) {
    threshold[row] = std::numeric_limits<float>::infinity();  // nothing passes
    std::fill(code, code + c.depth, 0);
    brute_force(row);
    return;
  }
  if (c.rotated) c.rotation(centred.data());
  // Next to far larger centroids a point needs no digits, and 1 / s must stay finite.
  const float min_scale = std::max(c.largest * 1e-12f, 1e-30f);
  const auto coded =
      screen::encode(centred.data(), c.d, int8::LEFT_MAX, screen::OFFSET, min_scale, code);
  std::fill(code + c.d, code + c.depth, screen::OFFSET);
  inverse[row] = 1 / coded.scale;
  const double exact = (coded.error + static_cast<double>(coded.norm) * c.error_ratio) * 1.001;
  widening[row] =
      static_cast<float>((exact + std::sqrt(square[row]) * screen::SLACK) / coded.scale);
}

// Bounds of ROWS points against a chunk of panels, and the highest of each row.
void Block::screen_chunk(int64_t group, int64_t panel, int64_t panels, float (&top)[ROWS]) {
  int8::Float best[ROWS];
  for (auto& b : best) b = int8::broadcast(-std::numeric_limits<float>::infinity());
  const int64_t stride = panels * COLS;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t at = (panel + p) * COLS;
    int8::tile(codes.data() + group * c.depth, c.depth, c.codes.data() + at * c.depth,
               c.start.data() + at, c.depth, [&](auto i, int8::Int sum) ALWAYS_INLINE {
                 constexpr int r = i / VECS, v = i % VECS;
                 const auto scale = int8::load(c.scale.data() + at + v * LANES);
                 const auto half = int8::load(c.half_square.data() + at + v * LANES);
                 const auto norm = int8::load(c.norm_bound.data() + at + v * LANES);
                 const auto slack = int8::mul(norm, int8::broadcast(widening[group + r]));
                 const auto offset = int8::fma(half, int8::broadcast(-inverse[group + r]), slack);
                 const auto bound = int8::fma(int8::to_float(sum), scale, offset);
                 int8::store(bounds.data() + r * stride + p * COLS + v * LANES, bound);
                 best[r] = int8::max(best[r], bound);
               });
  }
  for (int r = 0; r < ROWS; ++r) top[r] = int8::max_lane(best[r]);
}

// Measures the centroids of a chunk that may be nearer than the best so far, likeliest first.
void Block::measure_chunk(int64_t row, int64_t first, int64_t count, const float* bound,
                          float top) {
  if (!(top >= threshold[row])) return;
  int64_t likeliest = 0;
  while (likeliest < count) {
    if (const uint32_t hit = int8::mask_ge(int8::load(bound + likeliest), int8::broadcast(top))) {
      likeliest += __builtin_ctz(hit);
      break;
    }
    likeliest += LANES;
  }
  measure(row, first + likeliest);
  for (int64_t at = 0; at < count; at += LANES) {
    const auto bounds = int8::load(bound + at);
    uint32_t hits = int8::mask_ge(bounds, int8::broadcast(threshold[row]));
    for (; hits; hits &= hits - 1) {
      const int64_t i = at + __builtin_ctz(hits);
      if (i != likeliest && bound[i] >= threshold[row]) measure(row, first + i);
    }
  }
}

float squared_distance(const float* x, const float* y, int64_t d) {
  constexpr int WAYS = 4;
  int8::Float sums[WAYS];
  for (auto& s : sums) s = int8::broadcast(0);
  int64_t j = 0;
  for (; j + WAYS * LANES <= d; j += WAYS * LANES)
#pragma GCC unroll 4
    for (int i = 0; i < WAYS; ++i) {
      const auto gap = int8::sub(int8::load(x + j + i * LANES), int8::load(y + j + i * LANES));
      sums[i] = int8::fma(gap, gap, sums[i]);
    }
  for (; j + LANES <= d; j += LANES) {
    const auto gap = int8::sub(int8::load(x + j), int8::load(y + j));
    sums[0] = int8::fma(gap, gap, sums[0]);
  }
  float total = 0;
  for (const auto& s : sums) total += int8::sum_lanes(s);
  for (; j < d; ++j) total += (x[j] - y[j]) * (x[j] - y[j]);
  return total;
}

void Block::measure(int64_t row, int64_t candidate) {
  if (candidate >= c.k) return;  // a slot of padding ties at -inf
  const float now = squared_distance(points.data() + row * c.d, c.rows + candidate * c.d, c.d);
  const bool nearer = now < distance[row] || (now == distance[row] && candidate < label[row]);
  if (label[row] >= 0 && !nearer) return;
  label[row] = candidate;
  distance[row] = now;
  const double rounding = (static_cast<double>(c.d) / LANES + 16) / (1 << 24);
  const double score = (square[row] * (1 - rounding) - now * (1 + rounding)) / 2 * inverse[row];
  threshold[row] = static_cast<float>(score - std::abs(score) * 1e-6);
}

// fp64 without bounds, for points too large for fp32 squares; non-finite points stay without label.
void Block::brute_force(int64_t row) {
  const float* x = points.data() + row * c.d;
  double best = std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < c.k; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < c.d; ++j) {
      const double gap = static_cast<double>(x[j]) - c.rows[i * c.d + j];
      sum += gap * gap;
    }
    if (sum < best) {
      best = sum;
      label[row] = i;
      distance[row] = static_cast<float>(sum);
    }
  }
}

template <class T>
void assign(const at::Tensor& points, const Centroids& c, int64_t* labels, float* distances) {
  const int64_t n = points.size(0), row_stride = points.stride(0), stride = points.stride(1);
  const T* data = points.const_data_ptr<T>();
  const int64_t chunk =
      std::max<int64_t>(1, std::min(CHUNK_PANELS, CHUNK_BYTES / (COLS * c.depth + 1)));
  const int64_t blocks = (n + BLOCK_ROWS - 1) / BLOCK_ROWS;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    Block block(c);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t base = b * BLOCK_ROWS, rows = std::min(BLOCK_ROWS, n - base);
      for (int64_t r = 0; r < rows; ++r) {
        const T* x = data + (base + r) * row_stride;
        float* out = block.points.data() + r * c.d;
        for (int64_t j = 0; j < c.d; ++j) out[j] = static_cast<float>(x[j * stride]);
        block.encode(r);
      }
      for (int64_t panel = 0; panel < c.panels; panel += chunk) {
        const int64_t count = std::min(chunk, c.panels - panel);
        for (int64_t group = 0; group < rows; group += ROWS) {
          float top[ROWS];
          block.screen_chunk(group, panel, count, top);
          for (int64_t r = 0; r < std::min<int64_t>(ROWS, rows - group); ++r)
            block.measure_chunk(group + r, panel * COLS, count * COLS,
                                block.bounds.data() + r * count * COLS, top[r]);
        }
      }
      std::copy(block.label, block.label + rows, labels + base);
      std::copy(block.distance, block.distance + rows, distances + base);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> kmeans_assign(const at::Tensor& points,
                                                 const at::Tensor& centroids) {
  const int64_t n = points.size(0);
  auto labels = at::full({n}, -1, points.options().dtype(at::kLong));
  auto distances =
      at::full({n}, std::numeric_limits<float>::quiet_NaN(), points.options().dtype(at::kFloat));
  if (n == 0) return {labels, distances};
  const at::Tensor rows = centroids.to(at::kFloat).contiguous();
  const int64_t step = std::max<int64_t>(1, n / SAMPLE);
  const at::Tensor sample = points.slice(0, 0, n, step).to(at::kFloat).contiguous();
  const Centroids prepared(rows, sample);
  if (!prepared.finite) return {labels, distances};
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, points.scalar_type(), "kmeans_assign", [&] {
        assign<scalar_t>(points, prepared, labels.mutable_data_ptr<int64_t>(),
                         distances.mutable_data_ptr<float>());
      });
  return {labels, distances};
}

}  // namespace
}  // namespace protoclip

TORCH_LIBRARY_FRAGMENT(protoclip_native, m) {
  m.def("kmeans_assign(Tensor points, Tensor centroids) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(protoclip_native, CPU, m) { m.impl("kmeans_assign", protoclip::kmeans_assign); }
