// Mean of the rows of each segment: a stable counting sort of the row numbers, then every segment's
// rows are added in order, in pieces of fixed size. The pieces depend on the labels alone, so the
// bits are the same whatever the number of threads; the values are read once.
//
// The rows lie anywhere in memory. Prefetched into the L2 cache, not the L1, many more of their
// lines are on the way at once, and they come nearly as fast as a plain scan would read them.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu_ops.h"
#include "memory_pool.h"
#include "vector_math.h"

namespace protoclip {
namespace {

constexpr int64_t kPiece = 256;            // rows added in fp32 before the sum moves to fp64
constexpr int64_t kAheadBytes = 16 << 10;  // of rows, prefetched
constexpr int64_t kBlock = 8;              // vectors of columns summed in registers
constexpr int64_t kCached = 1 << 20;       // bytes of means; more are written past the caches

// order: the rows of segment k are order[begin[k]] ... order[begin[k + 1] - 1], ascending.
// Index: int32_t where it holds N, for half the memory traffic.
template <class Index>
struct Sorted {
  std::vector<Index> begin, order;
};

template <class Index>
Sorted<Index> counting_sort(const Tensor& labels, int64_t k) {
  const int64_t n = labels.size(0), stride = labels.stride(0);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  Sorted<Index> out{std::vector<Index>(k + 1), {}};
  for (int64_t i = 0; i < n; ++i) {
    const int64_t segment = label[i * stride];
    TORCH_CHECK_VALUE(segment < k, "segment_mean: expected labels below num_segments=", k, ", got ",
                      segment, "; pass a larger num_segments or renumber the labels");
    if (segment >= 0) ++out.begin[segment + 1];
  }
  for (int64_t i = 0; i < k; ++i) out.begin[i + 1] += out.begin[i];
  out.order.resize(out.begin[k]);
  std::vector<Index> next(out.begin.begin(), out.begin.end() - 1);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t segment = label[i * stride];
    if (segment >= 0) out.order[next[segment]++] = static_cast<Index>(i);
  }
  return out;
}

// The sum of `from` [D], if there is one, and some rows over `count`, to be written to `out` [D].
struct Target {
  float* out;
  float count;
  bool past_caches;  // `out` is on a vector's boundary, and D a multiple of kLanes
  const float* from = nullptr;

  void write(int64_t column, Floats sum) const {
    if (past_caches)
      store_past_caches(out + column, sum / count);
    else
      store(out + column, sum / count);
  }
};

template <class T, class Index>
struct Rows {
  Rows(const Tensor& values, const std::vector<Index>& order)
      : data(values.const_data_ptr<T>()),
        d(values.size(1)),
        row_stride(values.stride(0)),
        stride(values.stride(1)),
        order(order.data()),
        end(order.size()),
        ahead(std::clamp<int64_t>(kAheadBytes / (d * sizeof(T) + 1), 4, 64)) {}

  const T* data;
  int64_t d, row_stride, stride;
  const Index* order;
  int64_t end, ahead;  // `order`'s length; how many rows ahead are prefetched

  // Adds rows order[first] ... order[last - 1] in that order. A block of columns stays in
  // registers; rows are fetched whole, with their first block.
  void add(int64_t first, int64_t last, const Target& target) const {
    int64_t j = 0;
    if (stride == 1) {
      for (; j + kBlock * kLanes <= d; j += kBlock * kLanes)
        add_block<kBlock>(first, last, j, target);
      for (; j + kLanes <= d; j += kLanes) add_block<1>(first, last, j, target);
      // The last vector overlaps, where it does not read what has been written.
      if (j < d && j > 0 && target.from != target.out)
        add_block<1>(first, last, d - kLanes, target), j = d;
    }
    if (j == d) return;
    for (int64_t c = j; c < d; ++c) target.out[c] = target.from ? target.from[c] : 0.0f;
    for (int64_t i = first; i < last; ++i) {
      if (j == 0) prefetch(i + ahead);
      const T* row = data + order[i] * row_stride;
      for (int64_t c = j; c < d; ++c) target.out[c] += static_cast<float>(row[c * stride]);
    }
    for (int64_t c = j; c < d; ++c) target.out[c] /= target.count;
  }

  template <int64_t kBlocks>
  void add_block(int64_t first, int64_t last, int64_t column, const Target& target) const {
    Floats total[kBlocks] = {};
    for (int64_t b = 0; target.from && b < kBlocks; ++b)
      total[b] = load(target.from + column + b * kLanes);
    for (int64_t i = first; i < last; ++i) {
      if (column == 0) prefetch(i + ahead);
      const T* row = data + order[i] * row_stride + column;
      for (int64_t b = 0; b < kBlocks; ++b) total[b] += widened(row + b * kLanes);
    }
    for (int64_t b = 0; b < kBlocks; ++b) target.write(column + b * kLanes, total[b]);
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

  void prefetch(int64_t i) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    if (i >= end) return;
    const T* row = data + order[i] * row_stride;
    for (int64_t j = 0; j < d; j += kLine) __builtin_prefetch(row + j * stride, 0, 2);
  }
};

template <class T, class Index>
void means(const Rows<T, Index>& rows, const Sorted<Index>& sorted, int64_t k, float* out) {
  const int64_t d = rows.d;
  const auto& starts = sorted.begin;
  const auto size = [&](int64_t i) -> int64_t { return starts[i + 1] - starts[i]; };
  // Segments longer than a piece are split: part[i] .. part[i + 1] are the pieces of long_ones[i].
  std::vector<int64_t> long_ones, part{0};
  for (int64_t i = 0; i < k; ++i) {
    if (size(i) <= kPiece) continue;
    long_ones.push_back(i);
    part.push_back(part.back() + (size(i) + kPiece - 1) / kPiece);
  }
  const bool past_caches = k * d * int64_t{sizeof(float)} > kCached && d % kLanes == 0 &&
                           reinterpret_cast<uintptr_t>(out) % sizeof(Floats) == 0;
  at::parallel_for(0, k, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (size(i) > kPiece) continue;
      const auto count = static_cast<float>(std::max<int64_t>(1, size(i)));
      rows.add(starts[i], starts[i + 1], {out + i * d, count, past_caches});
    }
    wait_for_stores();
  });
  std::vector<float> sums(part.back() * d);  // at most N / kPiece + K rows
  at::parallel_for(0, part.back(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t which = std::upper_bound(part.begin(), part.end(), p) - part.begin() - 1;
      const int64_t segment = long_ones[which];
      const int64_t first = starts[segment] + (p - part[which]) * kPiece;
      const int64_t last = std::min<int64_t>(first + kPiece, starts[segment + 1]);
      rows.add(first, last, {sums.data() + p * d, 1, false});
    }
  });
  at::parallel_for(0, static_cast<int64_t>(long_ones.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<double> total(d);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t segment = long_ones[i];
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t p = part[i]; p < part[i + 1]; ++p)
        for (int64_t j = 0; j < d; ++j) total[j] += sums[p * d + j];
      const auto count = static_cast<double>(size(segment));
      for (int64_t j = 0; j < d; ++j) out[segment * d + j] = static_cast<float>(total[j] / count);
    }
  });
}

template <class Index>
std::tuple<Tensor, Tensor> sorted_means(const Tensor& values, const Tensor& labels, int64_t k) {
  const auto sorted = counting_sort<Index>(labels, k);
  auto out = pooled_empty({k, values.size(1)}, at::kFloat);  // no page faults each time
  auto counts = at::empty({k}, labels.options());
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < k; ++i) count[i] = sorted.begin[i + 1] - sorted.begin[i];
  with_dtype(values.scalar_type(), [&](auto type) {
    means(Rows<decltype(type), Index>(values, sorted.order), sorted, k,
          out.mutable_data_ptr<float>());
  });
  return {out, counts};
}

// Sums of each segment's rows so far: of its full pieces, and of the open one.
struct OpenSums {
  float* open;      // [K, D]
  double* closed;   // [K, D]
  int64_t* counts;  // [K], rows
  int64_t d;

  // Rows that the open piece still takes. A full one stays open until the next row comes, since
  // the mean of a single piece is divided in fp32.
  int64_t room(int64_t segment) const {
    const int64_t count = counts[segment];
    return count == 0 ? kPiece : (kPiece - count % kPiece) % kPiece;
  }
  void close(int64_t segment, const float* piece) const {
    for (int64_t j = 0; j < d; ++j) closed[segment * d + j] += piece[j];
  }
};

template <class Index>
void add_rows(const Tensor& values, const Tensor& labels, int64_t k, const OpenSums& sums) {
  const auto sorted = counting_sort<Index>(labels, k);
  const Rows<float, Index> rows(values, sorted.order);
  const int64_t d = rows.d;
  const auto& starts = sorted.begin;
  const auto size = [&](int64_t i) -> int64_t { return starts[i + 1] - starts[i]; };
  // Segments whose open piece ends: part[i] .. part[i + 1] are the pieces of ending[i].
  std::vector<int64_t> ending, part{0};
  for (int64_t i = 0; i < k; ++i) {
    const int64_t beyond = size(i) - sums.room(i);
    if (beyond <= 0) continue;
    ending.push_back(i);
    part.push_back(part.back() + 1 + (beyond + kPiece - 1) / kPiece);
  }
  at::parallel_for(0, k, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (size(i) == 0 || size(i) > sums.room(i)) continue;
      float* open = sums.open + i * d;
      rows.add(starts[i], starts[i + 1], {open, 1, false, open});
    }
  });
  std::vector<float> pieces(part.back() * d);
  at::parallel_for(0, part.back(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t which = std::upper_bound(part.begin(), part.end(), p) - part.begin() - 1;
      const int64_t segment = ending[which], number = p - part[which];
      const int64_t last = starts[segment] + sums.room(segment) + number * kPiece;
      const int64_t first = number == 0 ? starts[segment] : last - kPiece;
      const float* from = number == 0 ? sums.open + segment * d : nullptr;
      rows.add(first, std::min<int64_t>(last, starts[segment + 1]),
               {pieces.data() + p * d, 1, false, from});
    }
  });
  at::parallel_for(0, static_cast<int64_t>(ending.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t p = part[i]; p < part[i + 1] - 1; ++p)
        sums.close(ending[i], pieces.data() + p * d);
      std::copy_n(pieces.data() + (part[i + 1] - 1) * d, d, sums.open + ending[i] * d);
    }
  });
  for (int64_t i = 0; i < k; ++i) sums.counts[i] += size(i);
}

void expect_sums(const char* op, const Tensor& open, const Tensor& closed, const Tensor& counts) {
  expect(op, "open", open, {kAny, kAny}, at::kFloat);
  expect(op, "closed", closed, open.sizes(), at::kDouble);
  expect(op, "counts", counts, {open.size(0)}, at::kLong);
  TORCH_CHECK_VALUE(open.is_contiguous() && closed.is_contiguous() && counts.is_contiguous(), op,
                    ": expected contiguous sums and counts");
}

}  // namespace

// Adds fp32 rows [N, D] to the sums of their segments: open fp32 [K, D], closed fp64 [K, D], counts
// int64 [K], zeros at first. segment_sums_mean then has the bits of segment_mean of all rows.
void segment_add(const Tensor& values, const Tensor& labels, const Tensor& open,
                 const Tensor& closed, const Tensor& counts) {
  const char* op = "segment_add";
  expect(op, "values", values, {kAny, kAny}, at::kFloat);
  expect(op, "labels", labels, {values.size(0)}, at::kLong);
  expect_sums(op, open, closed, counts);
  expect(op, "open", open, {kAny, values.size(1)}, at::kFloat);
  const OpenSums sums{open.mutable_data_ptr<float>(), closed.mutable_data_ptr<double>(),
                      counts.mutable_data_ptr<int64_t>(), open.size(1)};
  const bool fits = values.size(0) <= std::numeric_limits<int32_t>::max();
  fits ? add_rows<int32_t>(values, labels, open.size(0), sums)
       : add_rows<int64_t>(values, labels, open.size(0), sums);
}

Tensor segment_sums_mean(const Tensor& open, const Tensor& closed, const Tensor& counts) {
  expect_sums("segment_sums_mean", open, closed, counts);
  const int64_t k = open.size(0), d = open.size(1);
  const Tensor means = at::empty_like(open);
  const float* last = open.const_data_ptr<float>();
  const double* full = closed.const_data_ptr<double>();
  float* out = means.mutable_data_ptr<float>();
  at::parallel_for(0, k, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t count = counts.const_data_ptr<int64_t>()[i];
      const auto divisor = static_cast<double>(count);
      for (int64_t j = i * d; j < (i + 1) * d; ++j)
        out[j] = count > kPiece ? static_cast<float>((full[j] + last[j]) / divisor)
                                : last[j] / static_cast<float>(std::max<int64_t>(1, count));
    }
  });
  return means;
}

std::tuple<Tensor, Tensor> segment_mean(const Tensor& values, const Tensor& labels,
                                        int64_t num_segments) {
  expect("segment_mean", "values", values, {kAny, kAny}, kFloats);
  expect("segment_mean", "labels", labels, {values.size(0)}, at::kLong);
  const bool fits = values.size(0) <= std::numeric_limits<int32_t>::max();
  return fits ? sorted_means<int32_t>(values, labels, num_segments)
              : sorted_means<int64_t>(values, labels, num_segments);
}

}  // namespace protoclip
