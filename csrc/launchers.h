// The CUDA launchers and what they take from their callers. No torch headers, no device code.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace protoclip {

enum class Dtype { kFloat32, kBfloat16, kFloat16 };

struct Matrix {
  const void* data;                   // [rows, columns]
  int64_t row_stride, column_stride;  // in elements
};

// ---- nearest centroid ----

struct KmeansAssign {
  Matrix points, centroids;  // [N, D], [K, D]
  int64_t n;                 // 1 <= N < 2^31
  int k, d;                  // K >= 1, D >= 0
  Dtype dtype;
  void* packed;  // the packed points: kmeans_packed_bytes of device memory, 256-byte aligned
};

size_t kmeans_packed_bytes(const KmeansAssign& call);

// Writes `packed`, for these centroids and any others; waits for nothing.
cudaError_t launch_kmeans_encode(const KmeansAssign& call, cudaStream_t stream);

struct KmeansAssignPlan {
  bool resident;         // a block keeps its points in shared memory for all centroids
  int splits;            // of K, each with its own partial result
  int tiles_per_split;   // of kTileK centroids
  size_t shared_bytes;   // of the tile kernel
  size_t scratch_bytes;  // of device memory for launch_kmeans_assign, 256-byte aligned
};

cudaError_t plan_kmeans_assign(const KmeansAssign& call, KmeansAssignPlan* plan);

// Writes all of labels [N] and distances [N]; waits for nothing.
cudaError_t launch_kmeans_assign(const KmeansAssign& call, const KmeansAssignPlan& plan,
                                 void* scratch, int64_t* labels, float* distances,
                                 cudaStream_t stream);

// ---- mean of the rows of each segment ----

struct SegmentMean {
  Matrix values;         // [N, D]
  const int* keys;       // [N] labels in rising order; K: left out
  const int64_t* rows;   // [N], the rows they are of, rising where the label is the same
  const int* starts;     // [K + 1], the first key of each label, then that of those left out
  float *heads, *tails;  // scratch, [N / kSegmentTile rounded up, D]
  int64_t n;             // N < 2^31
  int k, d;              // 1 <= K < 2^31 - 1
  Dtype dtype;
};

constexpr int kSegmentTile = 128;  // rows a thread adds up in fp32

// Writes all of means [K, D] and counts [K]; waits for nothing.
cudaError_t launch_segment_mean(const SegmentMean& call, float* means, int64_t* counts,
                                cudaStream_t stream);

}  // namespace protoclip
