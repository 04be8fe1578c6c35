// csrc/kmeans_assign.cu compiled for the host, behind C functions for ctypes.
#define PROTOCLIP_EMULATION
#include "../csrc/kmeans_assign.cu"

extern "C" {

void set_device(int processors, int shared_per_processor, int shared_per_block) {
  emulation::device_attributes[0] = processors;
  emulation::device_attributes[1] = shared_per_processor;
  emulation::device_attributes[2] = shared_per_block;
}

int64_t packed_bytes(const protoclip::KmeansAssign& call) {
  return static_cast<int64_t>(protoclip::kmeans_packed_bytes(call));
}

int encode(const protoclip::KmeansAssign& call) {
  return protoclip::launch_kmeans_encode(call, nullptr);
}

int launches_of_pack() {
  return emulation::launches[reinterpret_cast<const void*>(&protoclip::pack_kernel<float>)];
}

// report: parts, pack_points, resident, splits, rows that went to rescore_kernel, that the screen
// left
int kmeans_assign(const protoclip::KmeansAssign& call, int64_t* labels, float* distances,
                  int64_t report[6]) {
  using namespace protoclip;
  KmeansAssignPlan plan;
  if (const cudaError_t error = plan_kmeans_assign(call, &plan)) return error;
  std::vector<unsigned char> memory(plan.scratch_bytes + 512, 0xff);
  auto* scratch = reinterpret_cast<unsigned char*>(
      (reinterpret_cast<uintptr_t>(memory.data()) + 255) / 256 * 256);
  if (const cudaError_t error =
          launch_kmeans_assign(call, plan, scratch, labels, distances, nullptr)) {
    return error;
  }
  const Buffers at(call, plan, scratch);
  const int64_t facts[6] = {at.parts,    at.points != nullptr, plan.resident,
                            plan.splits, at.tally->open_rows,  at.tally->screened};
  std::copy(facts, facts + 6, report);
  const auto untouched = [](unsigned char byte) { return byte == 0xff; };  // past what it asked for
  const unsigned char* end = memory.data() + memory.size();
  return std::all_of<const unsigned char*>(scratch + plan.scratch_bytes, end, untouched) ? 0 : -1;
}
}
