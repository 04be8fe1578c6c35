// Nearest centroid of each point, exactly, at the speed of 8-bit dot products.
//
// A tile of kRows points against kColumns centroids gives upper bounds of their scores
// (kmeans_screen.h) for a chunk of centroids; only those above the score of the best centroid
// measured so far are measured themselves, as fp32 sums of (x - c)^2. On random data of D = 256, K
// = 1024 that is about 4 centroids a point. Scores live in an [kRows, chunk] scratch: never [N, K].
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <limits>

#include "cpu_ops.h"
#include "kmeans_block.h"
#include "kmeans_direct.h"

namespace protoclip {
namespace {

template <class T>
void prefetch(const T* row, int64_t d) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t j = 0; j < d; j += kLine) __builtin_prefetch(row + j, 0, 2);
}

// Some rows in fp32.
template <class T>
struct DirectRows {
  explicit DirectRows(const Tensor& points)
      : data(points.const_data_ptr<T>()),
        last(points.size(0) - 1),
        d(points.size(1)),
        row_stride(points.stride(0)),
        stride(points.stride(1)),
        converted(kDirectRows * d) {}

  const T* data;
  int64_t last, d, row_stride, stride;
  Buffer<float> converted;
  const float* row[kDirectRows];

  // Rows from `first` on; past the end the last one again.
  void read(int64_t first) {
    for (int64_t r = 0; r < kDirectRows; ++r) {
      const T* x = data + std::min(first + r, last) * row_stride;
      if constexpr (std::is_same_v<T, float>) {
        row[r] = x;
        if (stride == 1) continue;
      }
      float* out = converted.get() + r * d;
      row[r] = out;
      for (int64_t j = 0; j < d; ++j) out[j] = static_cast<float>(x[j * stride]);
    }
  }
};

// The best centroid so far of each lane, for one point.
struct Lanes {
  int8::Float distance = int8::broadcast(kInfinity);
  int8::Int first = {};  // the number of the centroid in lane 0 at that time

  void meet(int8::Float distances, int64_t centroid) {
    const auto nearer = distances < distance;
    distance = nearer ? distances : distance;
    first = nearer ? static_cast<int32_t>(centroid) - int8::Int{} : first;
  }
  // Of equal ones the first.
  Nearest best() const {
    const float least = int8::minimum(distance);
    Nearest nearest{std::numeric_limits<int64_t>::max(), least};
    for (uint32_t mask = int8::mask_ge(int8::broadcast(least), distance); mask; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      nearest.label = std::min<int64_t>(nearest.label, first[lane] + lane);
    }
    return nearest;
  }
};

// Few centroids and coordinates: all distances are measured. `spread`: max |c'|.
template <class T>
void assign_directly(const Tensor& points, const Tensor& centroids, float spread, int64_t* labels,
                     float* distances) {
  const int64_t n = points.size(0), k = centroids.size(0), d = centroids.size(1);
  const float* rows = centroids.const_data_ptr<float>();
  const Panels panels(rows, k, d);
  // Where all centroids lie so near, squares near fp32's end decide.
  const float least = spread < kTooSmall ? kTooSmall * kTooSmall : 0;
  const int64_t grain = 1 + kThreadWork / (kDirectRows * panels.count * kDirectColumns * d + 1);
  at::parallel_for(0, blocks(n, kDirectRows), grain, [&](int64_t begin, int64_t end) {
    DirectRows<T> x(points);
    for (int64_t base = begin * kDirectRows; base < std::min(n, end * kDirectRows);
         base += kDirectRows) {
      x.read(base);
      Lanes lanes[kDirectRows];
      for (int64_t panel = 0; panel < panels.count; ++panel)
        direct_tile(x.row, panels, panel, [&](auto r, auto v, int8::Float distance) ALWAYS_INLINE {
          lanes[r].meet(distance, panel * kDirectColumns + v * int8::kLanes);
        });
      for (int64_t i = base; i < std::min(n, base + kDirectRows); ++i) {
        const float* row = x.row[i - base];
        Nearest nearest = lanes[i - base].best();
        if (nearest.distance < kTooLarge * kTooLarge && nearest.distance >= least)
          nearest.distance = squared_distance(row, rows + nearest.label * d, d);  // as the others'
        else
          nearest = nearest_in_fp64(row, rows, k, d);
        labels[i] = nearest.label;
        distances[i] = nearest.distance;
      }
    }
  });
}

// `coded`: the points' codes, or null.
template <class T>
void assign(const Tensor& points, const Centroids& c, const CodedPoints* coded, int64_t* labels,
            float* distances) {
  const int64_t n = points.size(0), row_stride = points.stride(0), stride = points.stride(1);
  const T* data = points.const_data_ptr<T>();
  const int64_t chunk = c.chunk();
  const int64_t blocks = (n + kBlockRows - 1) / kBlockRows;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    Block block(c);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t base = b * kBlockRows, rows = std::min(kBlockRows, n - base);
      for (int64_t r = 0; r < rows; ++r) {
        block.read(r, data + (base + r) * row_stride, stride);
        coded ? block.take(r, *coded, base + r) : block.encode(r);
      }
      for (int64_t panel = 0; panel < c.panels; panel += chunk) {
        const int64_t count = std::min(chunk, c.panels - panel);
        for (int64_t group = 0; group < rows; group += kRows) {
          block.screen_chunk(group, panel, count);
          for (int64_t r = group; r < std::min(group + kRows, rows); ++r) {
            const int64_t next = base + kBlockRows + r;  // of the next block: into the L2 cache
            if (panel == 0 && next < n) prefetch(data + next * row_stride, c.d);
            block.measure_chunk(r, panel, count);
          }
        }
      }
      std::copy(block.label, block.label + rows, labels + base);
      std::copy(block.distance, block.distance + rows, distances + base);
    }
  });
}

struct Assigned {
  explicit Assigned(const Tensor& points)
      : labels(at::full({points.size(0)}, -1, points.options().dtype(at::kLong))),
        distances(at::full({points.size(0)}, std::numeric_limits<float>::quiet_NaN(),
                           points.options().dtype(at::kFloat))) {}
  Tensor labels, distances;

  // f(type, labels, distances)
  template <class F>
  void fill(at::ScalarType dtype, const F& f) {
    with_dtype(dtype, [&](auto type) {
      f(type, labels.mutable_data_ptr<int64_t>(), distances.mutable_data_ptr<float>());
    });
  }
};

Tensor sample(const Tensor& points) {
  const int64_t step = std::max<int64_t>(1, points.size(0) / kSample);
  return points.slice(0, 0, points.size(0), step).to(at::kFloat).contiguous();
}

// The largest distance of a row from the mean.
float spread_about(const Tensor& mean, const Tensor& rows) {
  const int64_t d = rows.size(1);
  std::vector<float> centred(d);
  double largest = 0;
  for (int64_t i = 0; i < rows.size(0); ++i)
    largest = std::max(largest, screen::centre(rows.const_data_ptr<float>() + i * d,
                                               mean.const_data_ptr<float>(), d, centred.data()));
  return static_cast<float>(std::sqrt(largest));
}

// Centroids on their way to the points: fp32 and contiguous, and how the points meet them.
struct GivenCentroids {
  explicit GivenCentroids(const Tensor& centroids)
      : rows(centroids.to(at::kFloat).contiguous()), mean(mean_row(rows)) {
    const int64_t d = rows.size(1);
    const float* means = mean.const_data_ptr<float>();
    finite = std::all_of(means, means + d, [](float m) { return std::isfinite(m); });
    if (finite && rows.size(0) * d <= kDirect) spread = spread_about(mean, rows);
  }
  bool measures_all() const { return spread < kTooLarge; }

  // Where all distances are measured, or none.
  std::tuple<Tensor, Tensor> assign_without_codes(const Tensor& points) const {
    Assigned out(points);
    if (points.size(0) && finite)
      out.fill(points.scalar_type(), [&](auto type, int64_t* labels, float* distances) {
        assign_directly<decltype(type)>(points, rows, spread, labels, distances);
      });
    return {out.labels, out.distances};
  }

  Tensor rows, mean;
  bool finite;
  float spread = kInfinity;
};

// `coded`: the points' codes, or null.
std::tuple<Tensor, Tensor> assign_screened(const Tensor& points, const Centroids& prepared,
                                           const CodedPoints* coded) {
  Assigned out(points);
  out.fill(points.scalar_type(), [&](auto type, int64_t* labels, float* distances) {
    assign<decltype(type)>(points, prepared, coded, labels, distances);
  });
  return {out.labels, out.distances};
}

}  // namespace

std::tuple<Tensor, Tensor> kmeans_assign(const Tensor& points, const Tensor& centroids) {
  expect_points("kmeans_assign", points, centroids);
  const GivenCentroids given(centroids);
  if (points.size(0) == 0 || !given.finite || given.measures_all())
    return given.assign_without_codes(points);
  Frame frame(given.mean);
  frame.rotated = frame.peaky(sample(points)) || frame.peaky(given.rows);
  return assign_screened(points, Centroids(given.rows, frame), nullptr);
}

// For kmeans_assign_coded: codes [N, depth], their bounds [N, CodedRow::kSize], the frame's
// centre, and whether it is rotated. Points: fp32.
std::vector<Tensor> kmeans_encode(const Tensor& strided_points) {
  expect("kmeans_encode", "points", strided_points, {kAny, kAny}, at::kFloat);
  const Tensor points = strided_points.contiguous();
  const int64_t n = points.size(0), d = points.size(1), depth = round_up(d, 4);
  const Tensor some = sample(points), centre = mean_row(some);
  Frame frame(centre);
  frame.rotated = frame.peaky(some);
  auto codes = at::full({n, depth}, screen::kOffset, points.options().dtype(at::kByte));
  auto code_bounds = at::empty({n, CodedRow::kSize}, points.options());
  const float* data = points.const_data_ptr<float>();
  at::parallel_for(0, n, 256, [&](int64_t begin, int64_t end) {
    Buffer<float> row(d);
    for (int64_t i = begin; i < end; ++i) {
      const double square = frame.centre(data + i * d, row.get());
      if (frame.rotated) frame.rotation(row.get());
      const auto coded = screen::encode(row.get(), d, int8::kLeftMax, screen::kOffset, 1e-30f,
                                        codes.mutable_data_ptr<uint8_t>() + i * depth);
      const CodedRow bounds{coded, static_cast<float>(square)};
      bounds.store(code_bounds.mutable_data_ptr<float>() + i * CodedRow::kSize);
    }
  });
  return {codes, code_bounds, centre, at::full({}, frame.rotated, at::kBool)};
}

std::tuple<Tensor, Tensor> kmeans_assign_coded(const Tensor& points, const Tensor& centroids,
                                               at::TensorList codes) {
  expect_points("kmeans_assign_coded", points, centroids);
  expect_codes("kmeans_assign_coded", codes, points.size(0), points.size(1));
  const GivenCentroids given(centroids);
  if (points.size(0) == 0 || !given.finite || given.measures_all())
    return given.assign_without_codes(points);
  Frame frame(codes[2]);
  frame.rotated = codes[3].item<bool>();
  const CodedPoints coded{codes[0], codes[1]};
  return assign_screened(points, Centroids(given.rows, frame), &coded);
}

// For kmeans_assign_prepared, so that blocks of points meet the centroids in the frame that all
// points would have. `some`: rows of the points as `sample` takes them, fp32. `coded`: all points
// would have codes. `order`: for kmeans_reassign, the centroid in each slot of their codes.
std::vector<Tensor> kmeans_prepare(const Tensor& centroids, const Tensor& some, bool coded,
                                   const Optional& order) {
  expect_points("kmeans_prepare", some, centroids);
  expect("kmeans_prepare", "some", some, {kAny, kAny}, at::kFloat);
  if (order) expect_order("kmeans_prepare", *order, centroids.size(0));
  const GivenCentroids given(centroids);
  if (some.size(0) == 0 || !given.finite || given.measures_all()) return {given.rows};
  const Tensor sampled = some.contiguous(), centre = coded ? mean_row(sampled) : given.mean;
  Frame frame(centre);
  frame.rotated = frame.peaky(sampled) || (!coded && frame.peaky(given.rows));
  std::vector<Tensor> prepared{given.rows, centre, at::full({}, frame.rotated, at::kBool)};
  const int64_t* slots = order ? order->const_data_ptr<int64_t>() : nullptr;
  for (const Tensor& part : Centroids(given.rows, frame, slots).packed()) prepared.push_back(part);
  return prepared;
}

std::tuple<Tensor, Tensor> kmeans_assign_prepared(const Tensor& points, at::TensorList prepared) {
  const char* op = "kmeans_assign_prepared";
  TORCH_CHECK_VALUE(!prepared.empty(), op, ": expected the tensors of kmeans_prepare, got none");
  expect_points(op, points, prepared[0]);
  if (prepared.size() == 1) return GivenCentroids(prepared[0]).assign_without_codes(points);
  expect_prepared(op, prepared, points.size(1));
  Frame frame(prepared[1]);
  frame.rotated = prepared[2].item<bool>();
  return assign_screened(points, Centroids(prepared[0], frame, prepared.slice(3)), nullptr);
}

}  // namespace protoclip
