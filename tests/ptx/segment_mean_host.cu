// csrc/segment_mean.cu behind a C function for ctypes.
#include "segment_mean.cu"

extern "C" int segment_mean(const void* values, const int64_t strides[2], const int* keys,
                            const int64_t* rows, const int* starts, float* heads, float* tails,
                            int64_t n, int k, int d, int dtype, float* means, int64_t* counts) {
  using namespace protoclip;
  const SegmentMean call{
      {values, strides[0], strides[1]}, keys, rows, starts, heads, tails, n, k, d,
      static_cast<Dtype>(dtype)};
  return launch_segment_mean(call, means, counts, nullptr);
}
