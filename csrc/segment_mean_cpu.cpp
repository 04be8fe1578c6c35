// Mean of the rows of each segment: a stable counting sort of the row numbers, then every segment's
// rows are added in order, in pieces of fixed size. The pieces depend on the labels alone, so the
// bits are the same whatever the number of threads; the values are read once.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "vector_math.h"

namespace protoclip {
namespace {

constexpr int64_t PIECE = 256;  // rows added in fp32 before the sum moves to fp64
constexpr int64_t AHEAD = 6;    // rows prefetched: they lie anywhere in memory
constexpr int64_t BLOCK = 8;    // vectors of columns summed in registers

// order: the rows of segment k are order[begin[k]] ... order[begin[k + 1] - 1], ascending.
struct Sorted {
  std::vector<int64_t> begin, order;
};

Sorted counting_sort(const at::Tensor& labels, int64_t k) {
  const int64_t n = labels.size(0), stride = labels.stride(0);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  Sorted out{std::vector<int64_t>(k + 1), {}};
  for (int64_t i = 0; i < n; ++i) {
    const int64_t segment = label[i * stride];
    TORCH_CHECK_VALUE(segment < k, "segment_mean: expected labels below num_segments=", k, ", got ",
                      segment, "; pass a larger num_segments or renumber the labels");
    if (segment >= 0) ++out.begin[segment + 1];
  }
  for (int64_t i = 0; i < k; ++i) out.begin[i + 1] += out.begin[i];
  out.order.resize(out.begin[k]);
  std::vector<int64_t> next(out.begin.begin(), out.begin.end() - 1);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t segment = label[i * stride];
    if (segment >= 0) out.order[next[segment]++] = i;
  }
  return out;
}

template <class T>
struct Rows {
  const T* data;
  int64_t d, row_stride, stride;

  // sum [D] = rows order[first] ... order[last - 1], added in that order; `end` bounds prefetches.
  // A block of columns stays in registers; rows are fetched whole, with their first block.
  void add(const int64_t* order, int64_t first, int64_t last, int64_t end, float* sum) const {
    int64_t j = 0;
    if (stride == 1) {
      for (; j + BLOCK * kLanes <= d; j += BLOCK * kLanes)
        add_block<BLOCK>(order, first, last, end, j, sum);
      for (; j + kLanes <= d; j += kLanes) add_block<1>(order, first, last, end, j, sum);
    }
    std::fill(sum + j, sum + d, 0.0f);
    if (j == d) return;
    for (int64_t i = first; i < last; ++i) {
      if (j == 0 && i + AHEAD < end) prefetch(order[i + AHEAD]);
      const T* row = data + order[i] * row_stride;
      for (int64_t c = j; c < d; ++c) sum[c] += static_cast<float>(row[c * stride]);
    }
  }

  template <int64_t BLOCKS>
  void add_block(const int64_t* order, int64_t first, int64_t last, int64_t end, int64_t column,
                 float* sum) const {
    Floats total[BLOCKS] = {};
    for (int64_t i = first; i < last; ++i) {
      if (column == 0 && i + AHEAD < end) prefetch(order[i + AHEAD]);
      const T* row = data + order[i] * row_stride + column;
      for (int64_t b = 0; b < BLOCKS; ++b) total[b] += widened(row + b * kLanes);
    }
    for (int64_t b = 0; b < BLOCKS; ++b) store(sum + column + b * kLanes, total[b]);
  }

  static Floats widened(const T* row) {
    if constexpr (std::is_same_v<T, float>) {
      return load(row);
    } else {
      Floats v;
      for (int64_t lane = 0; lane < kLanes; ++lane) v[lane] = static_cast<float>(row[lane]);
      return v;
    }
  }

  void prefetch(int64_t row) const {
    constexpr int64_t LINE = 64 / sizeof(T);
    for (int64_t j = 0; j < d; j += LINE) __builtin_prefetch(data + row * row_stride + j * stride);
  }
};

template <class T>
void means(const Rows<T>& rows, const Sorted& sorted, int64_t k, float* out) {
  const int64_t d = rows.d, n = static_cast<int64_t>(sorted.order.size());
  const int64_t* order = sorted.order.data();
  // Segments longer than a piece are split: part[i] .. part[i + 1] are the pieces of long_ones[i].
  std::vector<int64_t> long_ones, part{0};
  for (int64_t i = 0; i < k; ++i) {
    const int64_t count = sorted.begin[i + 1] - sorted.begin[i];
    if (count <= PIECE) continue;
    long_ones.push_back(i);
    part.push_back(part.back() + (count + PIECE - 1) / PIECE);
  }
  at::parallel_for(0, k, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = sorted.begin[i], last = sorted.begin[i + 1];
      float* mean = out + i * d;
      if (last - first > PIECE) continue;
      rows.add(order, first, last, n, mean);
      const float count = static_cast<float>(std::max<int64_t>(1, last - first));
      for (int64_t j = 0; j < d; ++j) mean[j] /= count;
    }
  });
  std::vector<float> sums(part.back() * d);  // at most N / PIECE + K rows
  at::parallel_for(0, part.back(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t which = std::upper_bound(part.begin(), part.end(), p) - part.begin() - 1;
      const int64_t segment = long_ones[which];
      const int64_t first = sorted.begin[segment] + (p - part[which]) * PIECE;
      const int64_t last = std::min(first + PIECE, sorted.begin[segment + 1]);
      rows.add(order, first, last, n, sums.data() + p * d);
    }
  });
  at::parallel_for(0, static_cast<int64_t>(long_ones.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<double> total(d);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t segment = long_ones[i];
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t p = part[i]; p < part[i + 1]; ++p)
        for (int64_t j = 0; j < d; ++j) total[j] += sums[p * d + j];
      const auto count = static_cast<double>(sorted.begin[segment + 1] - sorted.begin[segment]);
      for (int64_t j = 0; j < d; ++j) out[segment * d + j] = static_cast<float>(total[j] / count);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> segment_mean(const at::Tensor& values, const at::Tensor& labels,
                                                int64_t num_segments) {
  const int64_t d = values.size(1);
  const Sorted sorted = counting_sort(labels, num_segments);
  auto out = at::empty({num_segments, d}, values.options().dtype(at::kFloat));
  auto counts = at::empty({num_segments}, labels.options());
  for (int64_t i = 0; i < num_segments; ++i)
    counts.mutable_data_ptr<int64_t>()[i] = sorted.begin[i + 1] - sorted.begin[i];
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, values.scalar_type(), "segment_mean", [&] {
        const Rows<scalar_t> rows{values.const_data_ptr<scalar_t>(), d, values.stride(0),
                                  values.stride(1)};
        means(rows, sorted, num_segments, out.mutable_data_ptr<float>());
      });
  return {out, counts};
}

}  // namespace
}  // namespace protoclip

TORCH_LIBRARY_FRAGMENT(protoclip_native, m) {
  m.def("segment_mean(Tensor values, Tensor labels, int num_segments) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(protoclip_native, CPU, m) { m.impl("segment_mean", protoclip::segment_mean); }
