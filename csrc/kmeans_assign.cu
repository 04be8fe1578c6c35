// Nearest centroid: argmax_k x.c_k - |c_k|^2 / 2 fused into the matrix product, never [N, K].
//
// pack (kmeans_assign_rows.cuh) -> assign_kernel (kmeans_assign_tiles.cuh), a partial Best for each
// split of K -> decide -> rescore. fp32 rows take one term first and all three, from pack on, where
// that cannot decide: nowhere in clustered points, for a quarter of points without any structure
// (D = 128, K = 4096), so 1 to 1.9 products in place of 3. Bytes: points two or three times (read
// to pack, in the tiles, to decide), centroids once per 128 points (from L2), 20 N a split,
// distances and labels once.
#include <algorithm>
#include <type_traits>

#include "kmeans_assign_rows.cuh"
#include "kmeans_assign_tiles.cuh"

namespace protoclip {
namespace {

struct Buffers {
  uint16_t *packed_points, *packed_centroids;  // [N, parts, packed_d], [K, parts, packed_d]
  float *bias, *centre;                        // [K rounded up to kTileK], [D]
  Best* partial;                               // [splits, N]
  int *screened_rows, *open_rows;              // [N], the first of which tally counts
  Tally* tally;
  size_t bytes;

  Buffers(const KmeansAssign& call, const KmeansAssignPlan& plan, void* scratch) {
    Arena arena{static_cast<unsigned char*>(scratch)};
    const size_t row = static_cast<size_t>(plan.parts) * plan.packed_d;
    packed_points = arena.take<uint16_t>(plan.pack_points ? call.n * row : 0);
    packed_centroids = arena.take<uint16_t>(call.k * row);
    bias = arena.take<float>(static_cast<size_t>(ceil_div(call.k, kTileK)) * kTileK);
    centre = arena.take<float>(call.d);
    partial = arena.take<Best>(static_cast<size_t>(call.n) * plan.splits);
    screened_rows = arena.take<int>(plan.screen ? call.n : 0);
    open_rows = arena.take<int>(call.n);
    tally = arena.take<Tally>(1);
    bytes = arena.used;
  }
};

bool aligned_rows(const KmeansAssign& call) {
  return call.dtype != Dtype::kFloat32 && call.d > 0 && call.d % 8 == 0 &&
         call.points.column_stride == 1 && call.points.row_stride % 8 == 0 &&
         reinterpret_cast<uintptr_t>(call.points.data) % 16 == 0;
}

// The number of splits of K that ends first: waves of blocks x the tiles of each, where filling the
// pipeline, the first (ordered) selections and the partial result count as one and a half tiles.
int choose_splits(int64_t row_tiles, int tiles, int slots) {
  int best = 1;
  double least = INFINITY;
  for (int splits = 1; splits <= std::min(tiles, 64); ++splits) {
    const auto waves = static_cast<double>(ceil_div<int64_t>(row_tiles * splits, slots));
    const double cost = waves * (ceil_div(tiles, splits) + 1.5);
    if (cost < least) {
      least = cost;
      best = splits;
    }
  }
  return ceil_div(tiles, ceil_div(tiles, best));
}

unsigned row_blocks(int64_t rows) {
  return static_cast<unsigned>(ceil_div<int64_t>(rows, kRowsPerBlock));
}

// One pass over chosen points: how they are packed, and into how many products.
struct Pass {
  Chosen chosen;
  int parts, terms;
  double representation;
  int *open_rows, *open_count;
};

template <typename T>
cudaError_t launch_pass(const KmeansAssign& call, const KmeansAssignPlan& plan, const Buffers& at,
                        const Pass& pass, const Rows<T>& points, const Rows<T>& centroids,
                        int64_t* labels, float* distances, cudaStream_t stream) {
  if (plan.pack_points) {
    PROTOCLIP_TRY(launch(pack_kernel<T>, dim3(row_blocks(call.n)), kRowThreads, 0, stream, points,
                         pass.chosen, call.d, pass.parts, plan.packed_d, at.packed_points, nullptr,
                         0, nullptr));
  }
  Tiles tiles;
  tiles.points =
      plan.pack_points ? at.packed_points : static_cast<const uint16_t*>(call.points.data);
  tiles.centroids = at.packed_centroids;
  tiles.point_stride =
      plan.pack_points ? static_cast<int64_t>(pass.parts) * plan.packed_d : call.points.row_stride;
  tiles.n = call.n;
  tiles.centroid_stride = static_cast<int64_t>(plan.parts) * plan.packed_d;
  tiles.count = pass.chosen.count;
  tiles.bias = at.bias;
  tiles.partial = at.partial;
  tiles.k = call.k;
  tiles.packed_d = plan.packed_d;
  tiles.blocks_d = ceil_div(plan.packed_d, kTileD);
  tiles.terms = pass.terms;
  tiles.tiles_per_split = plan.tiles_per_split;
  tiles.tiles = ceil_div(call.k, kTileK);
  tiles.resident = plan.resident;
  const auto kernel = call.dtype == Dtype::kFloat16 ? assign_kernel<true> : assign_kernel<false>;
  PROTOCLIP_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(plan.shared_bytes)));
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(call.n, kTileN)), plan.splits);
  PROTOCLIP_TRY(launch(kernel, grid, kThreads, plan.shared_bytes, stream, tiles));
  return launch(decide_kernel<T>, dim3(row_blocks(call.n)), kRowThreads, 0, stream, points,
                centroids, pass.chosen, call.n, call.d, plan.splits, at.partial,
                Bound{pass.representation, pass.terms, plan.packed_d}, at.tally, pass.open_rows,
                pass.open_count, labels, distances);
}

}  // namespace

cudaError_t plan_kmeans_assign(const KmeansAssign& call, KmeansAssignPlan* plan) {
  int device, processors, shared_per_processor, shared_per_block;
  PROTOCLIP_TRY(cudaGetDevice(&device));
  const auto query = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, device);
  };
  PROTOCLIP_TRY(query(&processors, cudaDevAttrMultiProcessorCount));
  PROTOCLIP_TRY(query(&shared_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor));
  PROTOCLIP_TRY(query(&shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin));

  const bool split_parts = call.dtype == Dtype::kFloat32;
  plan->parts = split_parts ? 2 : 1;
  plan->terms = split_parts ? 3 : 1;
  plan->screen = split_parts;
  plan->packed_d = std::max(8, ceil_div(call.d, 8) * 8);
  plan->pack_points = !aligned_rows(call);

  const size_t fixed = kStages * kTileBytes + kStateBytes;
  const size_t streamed = fixed + kStages * kTileBytes;
  const size_t resident =
      fixed + static_cast<size_t>(ceil_div(plan->packed_d, kTileD)) * plan->parts * kTileBytes;
  const auto blocks = [&](size_t bytes) {  // per SM; 1 KiB of each is the system's
    return std::min(2, static_cast<int>(shared_per_processor / (bytes + 1024)));
  };
  plan->resident =
      resident <= static_cast<size_t>(shared_per_block) && blocks(resident) >= blocks(streamed);
  plan->shared_bytes = plan->resident ? resident : streamed;

  const int tiles = ceil_div(call.k, kTileK);
  const int slots = processors * std::max(1, blocks(plan->shared_bytes));
  plan->splits = choose_splits(ceil_div<int64_t>(call.n, kTileN), tiles, slots);
  plan->tiles_per_split = ceil_div(tiles, plan->splits);
  plan->scratch_bytes = Buffers(call, *plan, nullptr).bytes;
  return cudaSuccess;
}

cudaError_t launch_kmeans_assign(const KmeansAssign& call, const KmeansAssignPlan& plan,
                                 void* scratch, int64_t* labels, float* distances,
                                 cudaStream_t stream) {
  const Buffers at(call, plan, scratch);
  float* centre = nullptr;  // 16-bit rows stay as they are: their products are exact
  PROTOCLIP_TRY(cudaMemsetAsync(at.tally, 0, sizeof(Tally), stream));
  if (call.dtype == Dtype::kFloat32 && call.d > 0) {
    centre = at.centre;
    PROTOCLIP_TRY(launch(centre_kernel, dim3(ceil_div(call.d, 32)), kRowThreads, 0, stream,
                         Rows<float>(call.centroids), call.k, call.d, centre));
  }
  return with_dtype(call.dtype, [&](auto* type) -> cudaError_t {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const Rows<T> points(call.points, centre), centroids(call.centroids, centre);
    const int64_t bias_rows = static_cast<int64_t>(ceil_div(call.k, kTileK)) * kTileK;
    PROTOCLIP_TRY(launch(pack_kernel<T>, dim3(row_blocks(bias_rows)), kRowThreads, 0, stream,
                         centroids, Chosen{nullptr, nullptr, call.k}, call.d, plan.parts,
                         plan.packed_d, at.packed_centroids, at.bias, bias_rows, at.tally));
    Pass pass{{nullptr, nullptr, call.n},        plan.parts,   plan.terms,
              plan.parts == 2 ? kSplitError : 0, at.open_rows, &at.tally->open_rows};
    if (plan.screen) {
      const Pass screen{pass.chosen, 1, 1, kScreenError, at.screened_rows, &at.tally->screened};
      PROTOCLIP_TRY(
          launch_pass(call, plan, at, screen, points, centroids, labels, distances, stream));
      pass.chosen = {at.screened_rows, &at.tally->screened, call.n};
    }
    PROTOCLIP_TRY(launch_pass(call, plan, at, pass, points, centroids, labels, distances, stream));
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(call.n, 1024));
    return launch(rescore_kernel<T>, dim3(blocks), kRowThreads, 0, stream, points, centroids,
                  call.k, call.d, at.tally, at.open_rows, labels, distances);
  });
}

}  // namespace protoclip
