// Nearest centroid of each point, exactly, at the speed of 8-bit dot products.
//
// A tile of ROWS points against COLS centroids gives upper bounds of their scores (kmeans_screen.h)
// for a chunk of centroids; only those above the score of the best centroid measured so far are
// measured themselves, as fp32 sums of (x - c)^2. On random data of D = 256, K = 1024 that is about
// 4 centroids a point. Scores live in an [ROWS, chunk] scratch: never [N, K].
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <limits>

#include "cpu_ops.h"
#include "kmeans_block.h"

namespace protoclip {
namespace {

template <class T>
void prefetch(const T* row, int64_t d) {
  constexpr int64_t LINE = 64 / sizeof(T);
  for (int64_t j = 0; j < d; j += LINE) __builtin_prefetch(row + j, 0, 2);
}

// `coded`: the points' codes, or null.
template <class T>
void assign(const Tensor& points, const Centroids& c, const CodedPoints* coded, int64_t* labels,
            float* distances) {
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
        block.read(r, data + (base + r) * row_stride, stride);
        coded ? block.take(r, *coded, base + r) : block.encode(r);
      }
      for (int64_t panel = 0; panel < c.panels; panel += chunk) {
        const int64_t count = std::min(chunk, c.panels - panel);
        for (int64_t group = 0; group < rows; group += ROWS) {
          block.screen_chunk(group, panel, count);
          for (int64_t r = group; r < std::min(group + ROWS, rows); ++r) {
            const int64_t next = base + BLOCK_ROWS + r;  // of the next block: into the L2 cache
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

std::tuple<Tensor, Tensor> assign_in(const Frame& frame, const Tensor& points,
                                     const Tensor& centroids, bool finite,
                                     const CodedPoints* coded) {
  const int64_t n = points.size(0);
  auto labels = at::full({n}, -1, points.options().dtype(at::kLong));
  auto distances =
      at::full({n}, std::numeric_limits<float>::quiet_NaN(), points.options().dtype(at::kFloat));
  if (n == 0 || !finite) return {labels, distances};
  const Centroids prepared(centroids, frame);
  const auto run = [&](auto type) {
    assign<decltype(type)>(points, prepared, coded, labels.mutable_data_ptr<int64_t>(),
                           distances.mutable_data_ptr<float>());
  };
  with_dtype(points.scalar_type(), run);
  return {labels, distances};
}

Tensor sample(const Tensor& points) {
  const int64_t step = std::max<int64_t>(1, points.size(0) / SAMPLE);
  return points.slice(0, 0, points.size(0), step).to(at::kFloat).contiguous();
}

}  // namespace

std::tuple<Tensor, Tensor> kmeans_assign(const Tensor& points, const Tensor& centroids) {
  const Tensor rows = centroids.to(at::kFloat).contiguous();
  Frame frame(mean_row(rows));
  const bool finite = frame.finite();
  frame.rotated = finite && (frame.peaky(sample(points)) || frame.peaky(rows));
  return assign_in(frame, points, rows, finite, nullptr);
}

// For kmeans_assign_coded: codes [N, depth], their bounds [N, CodedRow::SIZE], the frame's
// centre, and whether it is rotated. Points: fp32.
std::vector<Tensor> kmeans_encode(const Tensor& strided_points) {
  const Tensor points = strided_points.contiguous();
  const int64_t n = points.size(0), d = points.size(1), depth = round_up(d, 4);
  const Tensor some = sample(points), centre = mean_row(some);
  Frame frame(centre);
  frame.rotated = frame.peaky(some);
  auto codes = at::full({n, depth}, screen::OFFSET, points.options().dtype(at::kByte));
  auto code_bounds = at::empty({n, CodedRow::SIZE}, points.options());
  const float* data = points.const_data_ptr<float>();
  at::parallel_for(0, n, 256, [&](int64_t begin, int64_t end) {
    Buffer<float> row(d);
    for (int64_t i = begin; i < end; ++i) {
      const double square = frame.centre(data + i * d, row.get());
      if (frame.rotated) frame.rotation(row.get());
      const auto coded = screen::encode(row.get(), d, int8::LEFT_MAX, screen::OFFSET, 1e-30f,
                                        codes.mutable_data_ptr<uint8_t>() + i * depth);
      const CodedRow bounds{coded, static_cast<float>(square)};
      bounds.store(code_bounds.mutable_data_ptr<float>() + i * CodedRow::SIZE);
    }
  });
  return {codes, code_bounds, centre, at::full({}, frame.rotated, at::kBool)};
}

std::tuple<Tensor, Tensor> kmeans_assign_coded(const Tensor& points, const Tensor& centroids,
                                               at::TensorList codes) {
  const Tensor rows = centroids.contiguous();
  const bool finite = Frame(mean_row(rows)).finite();
  Frame frame(codes[2]);
  frame.rotated = codes[3].item<bool>();
  const CodedPoints coded{codes[0], codes[1]};
  return assign_in(frame, points, rows, finite, &coded);
}

}  // namespace protoclip
