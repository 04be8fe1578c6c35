// csrc/segment_mean.cu compiled for the host, behind a C function for ctypes.
#define PROTOCLIP_EMULATION
#include "../csrc/segment_mean.cu"

extern "C" int segment_mean(const void* values, int64_t strides[2], const int* keys,
                            const int64_t* rows, int64_t n, int k, int d, int dtype, float* means,
                            int64_t* counts) {
  using namespace protoclip;
  const SegmentMean call{{values, strides[0], strides[1]}, keys, rows, n, k, d,
                         static_cast<Dtype>(dtype)};
  const size_t bytes = segment_mean_scratch_bytes(call);
  std::vector<unsigned char> memory(bytes + 512, 0xff);
  auto* scratch = reinterpret_cast<unsigned char*>(
      (reinterpret_cast<uintptr_t>(memory.data()) + 255) / 256 * 256);
  if (const cudaError_t error = launch_segment_mean(call, scratch, means, counts, nullptr)) {
    return error;
  }
  for (const unsigned char* p = scratch + bytes; p < memory.data() + memory.size(); ++p) {
    if (*p != 0xff) return -1;  // wrote past the scratch it asked for
  }
  return 0;
}
