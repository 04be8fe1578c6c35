// csrc/kmeans_assign.cu compiled for the host, behind C functions for ctypes.
#define PROTOCLIP_EMULATION
#include "../csrc/kmeans_assign.cu"

extern "C" {

void set_device(int processors, int shared_per_processor, int shared_per_block) {
  emulation::device_attributes[0] = processors;
  emulation::device_attributes[1] = shared_per_processor;
  emulation::device_attributes[2] = shared_per_block;
}

// report: parts, pack_points, resident, splits, rows that went to rescore_kernel, that the screen
// left
int kmeans_assign(const void* points, int64_t point_strides[2], const void* centroids,
                  int64_t centroid_strides[2], int64_t n, int k, int d, int dtype, int64_t* labels,
                  float* distances, int64_t report[6]) {
  using namespace protoclip;
  const KmeansAssign call{{points, point_strides[0], point_strides[1]},
                          {centroids, centroid_strides[0], centroid_strides[1]},
                          n,
                          k,
                          d,
                          static_cast<Dtype>(dtype)};
  KmeansAssignPlan plan;
  if (const cudaError_t error = plan_kmeans_assign(call, &plan)) return error;
  std::vector<unsigned char> memory(plan.scratch_bytes + 512, 0xff);
  auto* scratch = reinterpret_cast<unsigned char*>(
      (reinterpret_cast<uintptr_t>(memory.data()) + 255) / 256 * 256);
  if (const cudaError_t error =
          launch_kmeans_assign(call, plan, scratch, labels, distances, nullptr)) {
    return error;
  }
  const Tally* tally = Buffers(call, plan, scratch).tally;
  const int64_t facts[6] = {plan.parts,  plan.pack_points, plan.resident,
                            plan.splits, tally->open_rows, tally->screened};
  std::copy(facts, facts + 6, report);
  const auto untouched = [](unsigned char byte) { return byte == 0xff; };  // past what it asked for
  const unsigned char* end = memory.data() + memory.size();
  return std::all_of<const unsigned char*>(scratch + plan.scratch_bytes, end, untouched) ? 0 : -1;
}
}
