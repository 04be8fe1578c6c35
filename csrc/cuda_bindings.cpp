// torch.ops.protoclip_native of the CUDA half: checks, allocation, device, stream, launch errors.
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/where.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "checks.h"
#include "launchers.h"

namespace protoclip {
namespace {

constexpr int64_t kIntMax = std::numeric_limits<int>::max();

Dtype dtype_of(const char* op, const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBfloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, op, ": expected float32, bfloat16 or float16, got ", x.scalar_type());
  }
}

Matrix matrix_of(const at::Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }

at::Tensor scratch_on(const at::Tensor& x, size_t bytes) {  // torch aligns to 512 bytes
  return at::empty({static_cast<int64_t>(bytes)}, x.options().dtype(at::kByte));
}

void expect_device(const char* op, const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK_VALUE(a.device() == b.device(), op, ": expected one device, got ", a.device(),
                    " and ", b.device());
}

KmeansAssign kmeans_call(const at::Tensor& points, const at::Tensor& centroids) {
  const char* op = "kmeans_assign";
  expect(op, "points", points, {kAny, kAny}, kFloats);
  expect(op, "centroids", centroids, {kAny, points.size(1)}, points.scalar_type());
  expect_device(op, points, centroids);
  const int64_t n = points.size(0), k = centroids.size(0), d = points.size(1);
  TORCH_CHECK_VALUE(n < kIntMax && k < kIntMax - 1024 && d < kIntMax - 1024, op,
                    ": expected N, K and D below 2^31, got ", n, ", ", k, ", ", d,
                    "; assign the points in parts");
  TORCH_CHECK_VALUE(n == 0 || k > 0, op, ": expected K >= 1 centroids, got 0");
  return {matrix_of(points),   matrix_of(centroids), n,      static_cast<int>(k),
          static_cast<int>(d), dtype_of(op, points), nullptr};
}

at::Tensor packed_for(KmeansAssign call, const at::Tensor& points) {
  const at::Tensor packed = scratch_on(points, kmeans_packed_bytes(call));
  call.packed = packed.mutable_data_ptr();
  C10_CUDA_CHECK(launch_kmeans_encode(call, c10::cuda::getCurrentCUDAStream()));
  return packed;
}

// What kmeans_assign_coded takes of N >= 1 points, for centroids that are means of them.
std::vector<at::Tensor> kmeans_encode_cuda(const at::Tensor& points) {
  const c10::cuda::CUDAGuard guard(points.device());
  return {packed_for(kmeans_call(points, points), points)};
}

// codes: of kmeans_encode_cuda, or none.
std::tuple<at::Tensor, at::Tensor> assigned(const at::Tensor& points, const at::Tensor& centroids,
                                            at::TensorList codes) {
  KmeansAssign call = kmeans_call(points, centroids);
  const c10::cuda::CUDAGuard guard(points.device());
  at::Tensor labels = at::empty({call.n}, points.options().dtype(at::kLong));
  at::Tensor distances = at::empty({call.n}, points.options().dtype(at::kFloat));
  if (call.n == 0) return {labels, distances};

  const auto num_bytes = static_cast<int64_t>(kmeans_packed_bytes(call));
  if (!codes.empty()) {
    expect("kmeans_assign_coded", "codes[0]", codes[0], {num_bytes}, at::kByte);
    expect_device("kmeans_assign_coded", points, codes[0]);
  }
  const at::Tensor packed = codes.empty() ? packed_for(call, points) : codes[0];
  call.packed = packed.mutable_data_ptr();
  KmeansAssignPlan plan;
  C10_CUDA_CHECK(plan_kmeans_assign(call, &plan));
  const at::Tensor scratch = scratch_on(points, plan.scratch_bytes);
  C10_CUDA_CHECK(launch_kmeans_assign(
      call, plan, scratch.mutable_data_ptr(), labels.mutable_data_ptr<int64_t>(),
      distances.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
  return {labels, distances};
}

std::tuple<at::Tensor, at::Tensor> kmeans_assign_cuda(const at::Tensor& points,
                                                      const at::Tensor& centroids) {
  return assigned(points, centroids, {});
}

std::tuple<at::Tensor, at::Tensor> segment_mean_cuda(const at::Tensor& values,
                                                     const at::Tensor& labels, int64_t k) {
  const char* op = "segment_mean";
  expect(op, "values", values, {kAny, kAny}, kFloats);
  expect(op, "labels", labels, {values.size(0)}, at::kLong);
  expect_device(op, values, labels);
  const int64_t n = values.size(0), d = values.size(1);
  TORCH_CHECK_VALUE(n < kIntMax && d < kIntMax && k >= 0 && k < kIntMax - 1, op,
                    ": expected N, K and D in [0, 2^31), got ", n, ", ", k, ", ", d);
  const c10::cuda::CUDAGuard guard(values.device());
  at::Tensor means = at::empty({k, d}, values.options().dtype(at::kFloat));
  at::Tensor counts = at::empty({k}, labels.options());
  if (k == 0) return {means, counts};

  const at::Tensor used = labels.ge(0).logical_and_(labels.lt(k));
  const auto [keys, rows] =
      at::where(used, labels, k).to(at::kInt).sort(/*stable=*/true, /*dim=*/0);
  const at::Tensor starts =
      at::searchsorted(keys, at::arange(k + 1, keys.options()), /*out_int32=*/true);
  const int64_t tiles = (n + kSegmentTile - 1) / kSegmentTile;
  const at::Tensor pieces = at::empty({2, tiles, d}, means.options());
  float* heads = pieces.mutable_data_ptr<float>();
  const SegmentMean call{matrix_of(values),
                         keys.const_data_ptr<int>(),
                         rows.const_data_ptr<int64_t>(),
                         starts.const_data_ptr<int>(),
                         heads,
                         heads + tiles * d,
                         n,
                         static_cast<int>(k),
                         static_cast<int>(d),
                         dtype_of(op, values)};
  C10_CUDA_CHECK(launch_segment_mean(call, means.mutable_data_ptr<float>(),
                                     counts.mutable_data_ptr<int64_t>(),
                                     c10::cuda::getCurrentCUDAStream()));
  return {means, counts};
}

}  // namespace
}  // namespace protoclip

TORCH_LIBRARY_FRAGMENT(protoclip_native, m) {
  const auto cuda = [](auto* op) { return torch::dispatch(c10::DispatchKey::CUDA, op); };
  m.def("kmeans_assign_cuda(Tensor points, Tensor centroids) -> (Tensor, Tensor)",
        cuda(&protoclip::kmeans_assign_cuda));
  m.def(
      "kmeans_assign_coded_cuda(Tensor points, Tensor centroids, Tensor[] codes)"
      " -> (Tensor, Tensor)",
      cuda(&protoclip::assigned));
  m.def("kmeans_encode_cuda(Tensor points) -> Tensor[]", cuda(&protoclip::kmeans_encode_cuda));
  m.def("segment_mean_cuda(Tensor values, Tensor labels, int num_segments) -> (Tensor, Tensor)",
        cuda(&protoclip::segment_mean_cuda));
}
