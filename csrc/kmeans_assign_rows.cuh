// The parts of nearest centroid that look at whole rows: packing before the tile kernel of
// kmeans_assign.cu, and deciding after it. One warp per row.
//
// Rounding bound of a score s = x.c - |c|^2 / 2, C = max |c|, S = |x| C + C^2 / 2:
//   accumulation: products of 8- or 11-bit significands are exact in fp32. A tensor core adds 16
//     of them to the accumulator after cutting each to 2^-23 of the largest, and cuts the sum: at
//     most 18 errors of 2^-23 S for every 16 products of every term; 20 of 16 covers |c|^2 / 2 too.
//   screen: hi alone is off by at most 2^-8 of |x| and of |c|, together 2^-7 |x||c| and 3 %.
//   split (parts = 2): hi = bf16(x) is off by at most 2^-8 |x|, lo = bf16(x - hi) by 2^-17 |x|;
//     the dropped lo.lo is at most 2^-16 |x||c|, the two representations 2^-17 |x||c| each, and
//     the centring x - m rounds by 2^-24 |x - m|: together 2^-15 |x||c| and 3 % for the cross
//     terms.
//   underflow: products, parts and squares below 2^-126 may become zero.
// Two scores are in true order if they differ by more than twice the bound.
#pragma once

#include <cmath>

#include "device.cuh"

namespace protoclip {

constexpr int kRowThreads = 256;
constexpr int kRowsPerBlock = kRowThreads / 32;
constexpr int kNoIndex = 0x7fffffff;

// The best and second best score with their centroids, and the third score.
struct Best {
  float first, second, third;
  int first_index, second_index;
};

__device__ inline Best no_best() { return {-INFINITY, -INFINITY, -INFINITY, kNoIndex, kNoIndex}; }

__device__ inline bool better(float a, int a_index, float b, int b_index) {
  return a > b || (a == b && a_index < b_index);
}

__device__ inline Best merge(Best a, Best b) {
  if (better(b.first, b.first_index, a.first, a.first_index)) {
    const Best swap = a;
    a = b;
    b = swap;
  }
  if (better(b.first, b.first_index, a.second, a.second_index)) {
    return {a.first, b.first, fmaxf(a.second, b.second), a.first_index, b.first_index};
  }
  a.third = fmaxf(a.third, b.first);
  return a;
}

// Device-side results that later kernels of the same call read.
struct Tally {
  unsigned largest;  // bits of max |c|^2 in fp32; NaN if a centroid is not finite
  int screened;      // length of the list that the screen leaves open
  int open_rows;     // length of the list for rescore_kernel
};

// The rows of a matrix [N, D] that a kernel looks at: all, or those of a list made on the device.
struct Chosen {
  const int *list, *count;
  int64_t n;

  __device__ int64_t size() const { return list == nullptr ? n : *count; }
  __device__ int64_t row(int64_t entry) const { return list == nullptr ? entry : list[entry]; }
};

template <typename T>
struct Rows {
  const T* data;
  int64_t row_stride, column_stride;
  const float* centre;  // [D], subtracted from fp32 rows; null for 16-bit rows

  explicit Rows(const Matrix& m, const float* centre = nullptr)
      : data(static_cast<const T*>(m.data)),
        row_stride(m.row_stride),
        column_stride(m.column_stride),
        centre(centre) {}

  __device__ float raw(int64_t row, int column) const {
    return to_float(data[row * row_stride + column * column_stride]);
  }
  __device__ float operator()(int64_t row, int column) const {
    if constexpr (sizeof(T) == 2) return raw(row, column);
    return raw(row, column) - centre[column];
  }
};

__device__ inline int64_t warp_row() {
  return static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
}

// centre [D] = mean of at most 1024 centroids. Distances do not change under a shift, but |x| |c|
// and with it the rounding bound shrink: features of a young encoder share a large mean.
__global__ void centre_kernel(Rows<float> centroids, int k, int d, float* centre) {
  __shared__ float sums[kRowThreads / 32][32];
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int column = blockIdx.x * 32 + lane;
  const int samples = k < 1024 ? k : 1024, step = k / samples;
  float sum = 0;
  for (int i = group; column < d && i < samples; i += kRowThreads / 32) {
    const float x = centroids.raw(static_cast<int64_t>(i) * step, column);
    if (isfinite(x)) sum += x;  // a row that is not shall spoil no other
  }
  sums[group][lane] = sum;
  __syncthreads();
  if (group != 0 || column >= d) return;
  for (int i = 1; i < kRowThreads / 32; ++i) sum += sums[i][lane];
  centre[column] = sum / static_cast<float>(samples);
}

__device__ inline uint16_t bits_of(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
__device__ inline uint16_t bits_of(__half x) { return __half_as_ushort(x); }
__device__ inline uint16_t bits_of(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// packed [rows, parts, packed_d]: the rows in 16-bit parts, padded with zeros. With bias (for the
// centroids): bias = -|row|^2 / 2, -inf past the last row, and tally->largest.
template <typename T>
__global__ void pack_kernel(Rows<T> matrix, int64_t rows, int d, int packed_d, uint16_t* packed,
                            float* bias, Tally* tally) {
  constexpr int parts = sizeof(T) == 4 ? 2 : 1;  // as ``Packed`` of kmeans_assign.cu
  const int64_t row = warp_row();
  const int lane = threadIdx.x % 32;
  if (row >= rows) {
    if (bias != nullptr && lane == 0) bias[row] = -INFINITY;
    return;
  }
  uint16_t* out = packed + row * parts * packed_d;
  double square = 0;
  bool finite = true;
  for (int i = lane; i < packed_d; i += 32) {
    uint16_t hi = 0, lo = 0;
    if (i < d) {
      const float x = matrix(row, i);
      finite = finite && isfinite(matrix.raw(row, i));
      square += static_cast<double>(x) * x;
      if constexpr (sizeof(T) == 2) {
        hi = bits_of(matrix.data[row * matrix.row_stride + i * matrix.column_stride]);
      } else {
        hi = bits_of(x);
        lo = bits_of(x - __bfloat162float(__ushort_as_bfloat16(hi)));
      }
    }
    out[i] = hi;
    if constexpr (parts == 2) out[packed_d + i] = lo;
  }
  if (bias == nullptr) return;
  square = warp_sum(square);
  finite = __all_sync(kFullWarp, finite);
  if (lane != 0) return;
  bias[row] = static_cast<float>(-0.5 * square);
  const unsigned nan = 0x7fffffffu;  // above every number, as unsigned
  atomicMax(&tally->largest, finite ? __float_as_uint(static_cast<float>(square)) : nan);
}

// What the representation of both sides can change in a product, as a share of |x| |c|.
constexpr double kSplitError = 1.03 * 0x1p-15;  // hi and lo
constexpr double kScreenError = 1.03 * 0x1p-7;  // hi alone, 2^-8 of each side

struct Bound {
  double representation;
  int terms, packed_d;

  __device__ double operator()(float point_square, float centroid_square) const {
    const double underflow = packed_d * 0x1p-125;
    const double x = sqrt(point_square + underflow) * 1.001;  // 1.001: the squares' own rounding
    const double c = sqrt(centroid_square + underflow) * 1.001;
    const double products = terms * (packed_d + 32.0) + 16;  // the last k-block is padded
    const double accumulation = products * (20.0 / 16) * 0x1p-23 * (x * c * 1.04 + c * c / 2);
    return accumulation + representation * x * c + products * 0x1p-124 * (1 + x + c);
  }
};

template <typename T>
__device__ inline double exact_distance(const Rows<T>& points, const Rows<T>& centroids,
                                        int64_t row, int64_t index, int d) {
  double sum = 0;
  for (int i = threadIdx.x % 32; i < d; i += 32) {
    const double gap = static_cast<double>(points.raw(row, i)) - centroids.raw(index, i);
    sum += gap * gap;
  }
  return warp_sum(sum);
}

// Merges the partial results [splits, stride] of a row and decides it: at once if the margin is
// above the bound, between two candidates in fp64, or later if a third one is in reach.
template <typename T>
__global__ void decide_kernel(Rows<T> points, Rows<T> centroids, Chosen chosen, int64_t stride,
                              int d, int splits, const Best* partial, Bound bound,
                              const Tally* tally, int* open_rows, int* open_count, int64_t* labels,
                              float* distances) {
  const int64_t entry = warp_row();
  if (entry >= chosen.size()) return;
  const int64_t row = chosen.row(entry);
  const int lane = threadIdx.x % 32;
  Best best = partial[entry];
  for (int i = 1; i < splits; ++i) best = merge(best, partial[i * stride + entry]);

  float square = 0;
  bool finite = true;
  for (int i = lane; i < d; i += 32) {
    const float x = points(row, i);
    square += x * x;
    finite = finite && isfinite(points.raw(row, i));
  }
  square = warp_sum(square);
  const float largest = __uint_as_float(tally->largest);
  const bool defined = __all_sync(kFullWarp, finite) && !isnan(largest);

  if (defined) {
    const double reach = 2 * bound(square, largest);
    if (!(best.first - best.third > reach)) {  // also where either is NaN or infinite
      if (lane == 0) open_rows[atomicAdd(open_count, 1)] = static_cast<int>(row);
      return;
    }
    if (!(best.first - best.second > reach)) {
      const double a = exact_distance(points, centroids, row, best.first_index, d);
      const double b = exact_distance(points, centroids, row, best.second_index, d);
      if (b < a || (b == a && best.second_index < best.first_index)) {
        best.first_index = best.second_index;
      }
    }
  }
  const bool found = defined && best.first_index != kNoIndex;
  const double distance = found ? exact_distance(points, centroids, row, best.first_index, d) : NAN;
  if (lane != 0) return;
  labels[row] = found ? best.first_index : -1;
  distances[row] = static_cast<float>(distance);
}

// All centroids against the listed rows in fp64, a block for each row, a warp for each centroid.
// The list's order depends on timing, each row's result does not.
template <typename T>
__global__ void rescore_kernel(Rows<T> points, Rows<T> centroids, int k, int d, const Tally* tally,
                               const int* open_rows, int64_t* labels, float* distances) {
  __shared__ double best_of[kRowsPerBlock];
  __shared__ int index_of[kRowsPerBlock];
  const int warp = threadIdx.x / 32;
  for (int entry = blockIdx.x; entry < tally->open_rows; entry += gridDim.x) {
    const int64_t row = open_rows[entry];
    double best = INFINITY;
    int best_index = kNoIndex;
    for (int index = warp; index < k; index += kRowsPerBlock) {
      const double distance = exact_distance(points, centroids, row, index, d);
      if (distance < best) {  // the first of equals has the lowest index
        best = distance;
        best_index = index;
      }
    }
    if (threadIdx.x % 32 == 0) {
      best_of[warp] = best;
      index_of[warp] = best_index;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 1; i < kRowsPerBlock; ++i) {
        if (best_of[i] < best || (best_of[i] == best && index_of[i] < best_index)) {
          best = best_of[i];
          best_index = index_of[i];
        }
      }
      labels[row] = best_index;
      distances[row] = static_cast<float>(best);
    }
    __syncthreads();
  }
}

}  // namespace protoclip
