// csrc/kmeans_assign.cu behind C functions for ctypes.
#include "kmeans_assign.cu"

extern "C" {

int64_t packed_bytes(const protoclip::KmeansAssign& call) {
  return static_cast<int64_t>(protoclip::kmeans_packed_bytes(call));
}

int encode(const protoclip::KmeansAssign& call) {
  return protoclip::launch_kmeans_encode(call, nullptr);
}

int plan(const protoclip::KmeansAssign& call, int64_t report[3]) {
  protoclip::KmeansAssignPlan plan;
  const int error = protoclip::plan_kmeans_assign(call, &plan);
  report[0] = plan.scratch_bytes;
  report[1] = plan.resident;
  report[2] = plan.splits;
  return error;
}

int assign(const protoclip::KmeansAssign& call, void* scratch, int64_t* labels, float* distances,
           int64_t report[2]) {
  protoclip::KmeansAssignPlan plan;
  if (const int error = protoclip::plan_kmeans_assign(call, &plan)) return error;
  const int error =
      protoclip::launch_kmeans_assign(call, plan, scratch, labels, distances, nullptr);
  const protoclip::Buffers at(call, plan, scratch);
  report[0] = at.tally->open_rows;
  report[1] = at.tally->screened;
  return error;
}
}
