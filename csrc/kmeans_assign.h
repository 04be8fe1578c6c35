// Nearest centroid on CUDA: what the launcher takes.
#pragma once

#include "device_types.h"

namespace protoclip {

struct KmeansAssign {
  Matrix points, centroids;  // [N, D], [K, D]
  int64_t n;                 // 1 <= N < 2^31
  int k, d;                  // K >= 1, D >= 0
  Dtype dtype;
  bool exact;  // decide again the rows whose margin is under the rounding bound
};

struct KmeansAssignPlan {
  int parts;             // 2: rows are split into bf16 hi + lo; 1: bf16 or fp16 as they are
  int terms;             // products of parts in a score: 3 = hi.hi + lo.hi + hi.lo, or 1
  int packed_d;          // D rounded up to 16 bytes
  bool pack_points;      // false: the tile kernel reads the points where they are
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

}  // namespace protoclip
