// Mean of the rows of each segment on CUDA: what the launcher takes.
#pragma once

#include "device_types.h"

namespace protoclip {

struct SegmentMean {
  Matrix values;          // [N, D]
  const int64_t* labels;  // [N]; those outside [0, K) are left out
  int64_t label_stride;
  int64_t n;  // N < 2^31
  int k, d;   // 1 <= K < 2^31 - 1
  Dtype dtype;
};

size_t segment_mean_scratch_bytes(const SegmentMean& call);

// Writes all of means [K, D] and counts [K]; waits for nothing. scratch: 256-byte aligned.
cudaError_t launch_segment_mean(const SegmentMean& call, void* scratch, float* means,
                                int64_t* counts, cudaStream_t stream);

}  // namespace protoclip
