// csrc/segment_mean.cu compiled for the host, behind a C function for ctypes.
#define PROTOCLIP_EMULATION
#include "../csrc/segment_mean.cu"

extern "C" int segment_mean(const void* values, int64_t strides[2], const int* keys,
                            const int64_t* rows, const int* starts, float* pieces, int64_t n, int k,
                            int d, int dtype, float* means, int64_t* counts) {
  using namespace protoclip;
  float* tails = pieces + ceil_div<int64_t>(n, kSegmentTile) * d;
  const SegmentMean call{
      {values, strides[0], strides[1]}, keys, rows, starts, pieces, tails, n, k, d,
      static_cast<Dtype>(dtype)};
  return launch_segment_mean(call, means, counts, nullptr);
}
