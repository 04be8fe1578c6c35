// Mean of the rows that share a label, in a fixed order: torch sorts the row numbers by label
// (stable), then runs of equal labels are summed within tiles of kSegmentTile sorted rows in index
// order, and the pieces of the runs that cross tiles are added in tile order. No float atomics.
//
// Bytes: N D values once; keys and rows 12 N once; pieces of runs 8 N D / kSegmentTile. The sums' 8
// loads in flight x 4 B x 2048 threads are 64 KiB an SM, several times what latency x bandwidth
// asks for (about 14 KiB on an H100).
#include <type_traits>

#include "device.cuh"

namespace protoclip {
namespace {

constexpr int kThreads = 256;
constexpr int kTileRows = kSegmentTile;
constexpr int kUnroll = 8;

// Sums the runs of a tile, a thread a column. Whole runs become means; a run that came in from the
// tile before goes to heads, one that only goes on in the next tile to tails; both [tiles, D].
template <typename T>
__global__ void runs_kernel(Matrix values, int d, int k, const int* keys, const int64_t* rows,
                            const int* starts, float* means, float* heads, float* tails) {
  __shared__ int64_t tile_rows[kTileRows];
  __shared__ int tile_keys[kTileRows + 2];  // and a neighbour on each side
  const int tile = blockIdx.x, used = starts[k];
  const int64_t first = static_cast<int64_t>(tile) * kTileRows;
  if (first >= used) return;
  const int count = used - first < kTileRows ? static_cast<int>(used - first) : kTileRows;
  for (int i = threadIdx.x; i < count + 2; i += blockDim.x) {
    const int64_t at = first + i - 1;
    tile_keys[i] = at >= 0 && at < used ? keys[at] : -1;
    if (i < count) tile_rows[i] = rows[first + i];
  }
  __syncthreads();
  const int column = blockIdx.y * blockDim.x + threadIdx.x;
  if (column >= d) return;
  const T* data = static_cast<const T*>(values.data) + column * values.column_stride;
  const int* key = tile_keys + 1;
  float sum = 0;
  int start = 0;
  for (int base = 0; base < count; base += kUnroll) {
    float x[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t row = tile_rows[base + i < count ? base + i : count - 1];
      x[i] = to_float(data[row * values.row_stride]);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int at = base + i;
      if (at >= count) break;
      sum += x[i];
      if (at + 1 < count && key[at + 1] == key[at]) continue;
      if (start == 0 && key[-1] == key[0]) {
        heads[static_cast<int64_t>(tile) * d + column] = sum;
      } else if (at + 1 == count && key[count] == key[at]) {
        tails[static_cast<int64_t>(tile) * d + column] = sum;
      } else {
        means[static_cast<int64_t>(key[at]) * d + column] =
            __fdiv_rn(sum, static_cast<float>(at + 1 - start));
      }
      sum = 0;
      start = at + 1;
    }
  }
}

// One block a segment: its count, zeros where empty, and the sum in fp64 of a run that crosses
// tiles.
__global__ void segments_kernel(const int* starts, int d, const float* heads, const float* tails,
                                float* means, int64_t* counts) {
  const int segment = blockIdx.x, start = starts[segment], end = starts[segment + 1];
  if (threadIdx.x == 0) counts[segment] = end - start;
  const int first = start / kTileRows, last = (end - 1) / kTileRows;
  if (start < end && first == last) return;  // runs_kernel wrote it
  for (int column = threadIdx.x; column < d; column += kThreads) {
    double sum = start < end ? tails[static_cast<int64_t>(first) * d + column] : 0;
    for (int64_t i = first + 1; i <= last; ++i) sum += heads[i * d + column];
    means[static_cast<int64_t>(segment) * d + column] =
        static_cast<float>(sum / max(1, end - start));
  }
}

}  // namespace

cudaError_t launch_segment_mean(const SegmentMean& call, float* means, int64_t* counts,
                                cudaStream_t stream) {
  if (call.n > 0 && call.d > 0) {
    const int threads = call.d < 128 ? ceil_div(call.d, 32) * 32 : 128;
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(call.n, kTileRows)),
                    ceil_div(call.d, threads));
    PROTOCLIP_TRY(with_dtype(call.dtype, [&](auto* type) -> cudaError_t {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      return launch(runs_kernel<T>, grid, threads, 0, stream, call.values, call.d, call.k,
                    call.keys, call.rows, call.starts, means, call.heads, call.tails);
    }));
  }
  return launch(segments_kernel, dim3(call.k), kThreads, 0, stream, call.starts, call.d, call.heads,
                call.tails, means, counts);
}

}  // namespace protoclip
