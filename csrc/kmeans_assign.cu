// Nearest centroid: argmax_k x.c_k - |c_k|^2 / 2 fused into the matrix product, never [N, K].
//
// Once for the points: pack (kmeans_assign_rows.cuh). Then, for any centroids: pack those ->
// assign_kernel (kmeans_assign_tiles.cuh), a partial Best for each split of K -> decide -> rescore.
// fp32 rows take one term first and all three, from assign_kernel on, where that cannot decide:
// nowhere in clustered points, for a quarter of points without any structure (D = 128, K = 4096),
// so 1 to 1.9 products in place of 3. Bytes: points twice (packed in the tiles, themselves to
// decide), centroids once per 128 points (from L2), 20 N a split, distances and labels once.
#include <algorithm>
#include <type_traits>

#include "kmeans_assign_rows.cuh"
#include "kmeans_assign_tiles.cuh"

namespace protoclip {
namespace {

// What is made of the points once for any centroids.
struct Packed {
  int parts;         // 2: fp32 rows are split into bf16 hi + lo; 1: bf16 or fp16 as they are
  int packed_d;      // D rounded up to 16 bytes
  uint16_t* points;  // [N, parts, packed_d]; null: the tile kernel reads the points where they are
  float* centre;     // [D]; null for 16-bit rows, whose products are exact
  size_t bytes;

  explicit Packed(const KmeansAssign& call)
      : parts(call.dtype == Dtype::kFloat32 ? 2 : 1),
        packed_d(std::max(8, ceil_div(call.d, 8) * 8)) {
    Arena arena{static_cast<unsigned char*>(call.packed)};
    const bool aligned = parts == 1 && call.d == packed_d && call.points.column_stride == 1 &&
                         call.points.row_stride % 8 == 0 &&
                         reinterpret_cast<uintptr_t>(call.points.data) % 16 == 0;
    points = aligned ? nullptr : arena.take<uint16_t>(call.n * parts * packed_d);
    centre = parts == 1 || call.d == 0 ? nullptr : arena.take<float>(call.d);
    bytes = arena.used;
  }
};

struct Buffers : Packed {
  uint16_t* packed_centroids;      // [K, parts, packed_d]
  float* bias;                     // [K rounded up to kTileK]
  Best* partial;                   // [splits, N]
  int *screened_rows, *open_rows;  // [N], the first of which tally counts
  Tally* tally;
  size_t scratch_bytes;

  Buffers(const KmeansAssign& call, const KmeansAssignPlan& plan, void* scratch) : Packed(call) {
    Arena arena{static_cast<unsigned char*>(scratch)};
    packed_centroids = arena.take<uint16_t>(static_cast<size_t>(call.k) * parts * packed_d);
    bias = arena.take<float>(static_cast<size_t>(ceil_div(call.k, kTileK)) * kTileK);
    partial = arena.take<Best>(static_cast<size_t>(call.n) * plan.splits);
    screened_rows = arena.take<int>(parts == 2 ? call.n : 0);
    open_rows = arena.take<int>(call.n);
    tally = arena.take<Tally>(1);
    scratch_bytes = arena.used;
  }
};

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

dim3 row_blocks(int64_t n) { return static_cast<unsigned>(ceil_div<int64_t>(n, kRowsPerBlock)); }

// One pass over chosen points, and of how many products their scores are.
struct Pass {
  Chosen chosen;
  int terms;
  double representation;
  int *open_rows, *open_count;
};

template <typename T>
cudaError_t launch_pass(const KmeansAssign& call, const KmeansAssignPlan& plan, const Buffers& at,
                        const Pass& pass, const Rows<T>& points, const Rows<T>& centroids,
                        int64_t* labels, float* distances, cudaStream_t stream) {
  Tiles tiles;
  tiles.points = at.points != nullptr ? at.points : static_cast<const uint16_t*>(call.points.data);
  tiles.centroids = at.packed_centroids;
  tiles.centroid_stride = static_cast<int64_t>(at.parts) * at.packed_d;
  tiles.point_stride = at.points != nullptr ? tiles.centroid_stride : call.points.row_stride;
  tiles.chosen = pass.chosen;
  tiles.bias = at.bias;
  tiles.partial = at.partial;
  tiles.k = call.k;
  tiles.packed_d = at.packed_d;
  tiles.blocks_d = ceil_div(at.packed_d, kTileD);
  tiles.terms = pass.terms;
  tiles.tiles_per_split = plan.tiles_per_split;
  tiles.tiles = ceil_div(call.k, kTileK);
  tiles.resident = plan.resident;
  const auto kernel = call.dtype == Dtype::kFloat16 ? assign_kernel<true> : assign_kernel<false>;
  PROTOCLIP_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(plan.shared_bytes)));
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(call.n, kTileN)), plan.splits);
  PROTOCLIP_TRY(launch(kernel, grid, kThreads, plan.shared_bytes, stream, tiles));
  return launch(decide_kernel<T>, row_blocks(call.n), kRowThreads, 0, stream, points, centroids,
                pass.chosen, call.n, call.d, plan.splits, at.partial,
                Bound{pass.representation, pass.terms, at.packed_d}, at.tally, pass.open_rows,
                pass.open_count, labels, distances);
}

}  // namespace

size_t kmeans_packed_bytes(const KmeansAssign& call) { return Packed(call).bytes; }

cudaError_t launch_kmeans_encode(const KmeansAssign& call, cudaStream_t stream) {
  const Packed packed(call);
  if (packed.centre != nullptr) {
    PROTOCLIP_TRY(launch(centre_kernel, dim3(ceil_div(call.d, 32)), kRowThreads, 0, stream,
                         Rows<float>(call.centroids), call.k, call.d, packed.centre));
  }
  if (packed.points == nullptr) return cudaSuccess;
  return with_dtype(call.dtype, [&](auto* type) -> cudaError_t {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    return launch(pack_kernel<T>, row_blocks(call.n), kRowThreads, 0, stream,
                  Rows<T>(call.points, packed.centre), call.n, call.d, packed.packed_d,
                  packed.points, nullptr, nullptr);
  });
}

cudaError_t plan_kmeans_assign(const KmeansAssign& call, KmeansAssignPlan* plan) {
  int device, processors, shared_per_processor, shared_per_block;
  PROTOCLIP_TRY(cudaGetDevice(&device));
  const auto query = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, device);
  };
  PROTOCLIP_TRY(query(&processors, cudaDevAttrMultiProcessorCount));
  PROTOCLIP_TRY(query(&shared_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor));
  PROTOCLIP_TRY(query(&shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin));

  const Packed packed(call);
  const size_t fixed = kStages * kTileBytes + kStateBytes;
  const size_t streamed = fixed + kStages * kTileBytes;
  const size_t resident =
      fixed + static_cast<size_t>(ceil_div(packed.packed_d, kTileD)) * packed.parts * kTileBytes;
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
  plan->scratch_bytes = Buffers(call, *plan, nullptr).scratch_bytes;
  return cudaSuccess;
}

cudaError_t launch_kmeans_assign(const KmeansAssign& call, const KmeansAssignPlan& plan,
                                 void* scratch, int64_t* labels, float* distances,
                                 cudaStream_t stream) {
  const Buffers at(call, plan, scratch);
  PROTOCLIP_TRY(cudaMemsetAsync(at.tally, 0, sizeof(Tally), stream));
  return with_dtype(call.dtype, [&](auto* type) -> cudaError_t {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const Rows<T> points(call.points, at.centre), centroids(call.centroids, at.centre);
    PROTOCLIP_TRY(launch(pack_kernel<T>, row_blocks(ceil_div<int64_t>(call.k, kTileK) * kTileK),
                         kRowThreads, 0, stream, centroids, call.k, call.d, at.packed_d,
                         at.packed_centroids, at.bias, at.tally));
    Pass pass{{nullptr, nullptr, call.n}, 1, 0, at.open_rows, &at.tally->open_rows};
    if (at.parts == 2) {  // hi.hi first, + lo.hi + hi.lo for the rows that it leaves open
      const Pass screen{pass.chosen, 1, kScreenError, at.screened_rows, &at.tally->screened};
      PROTOCLIP_TRY(
          launch_pass(call, plan, at, screen, points, centroids, labels, distances, stream));
      pass.chosen = {screen.open_rows, screen.open_count, call.n};
      pass.terms = 3, pass.representation = kSplitError;
    }
    PROTOCLIP_TRY(launch_pass(call, plan, at, pass, points, centroids, labels, distances, stream));
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(call.n, 1024));
    return launch(rescore_kernel<T>, dim3(blocks), kRowThreads, 0, stream, points, centroids,
                  call.k, call.d, at.tally, at.open_rows, labels, distances);
  });
}

}  // namespace protoclip
