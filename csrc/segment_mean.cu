// Mean of the rows that share a label, in a fixed order: sort the row numbers by label (stable
// counting sort, 8 bits a pass), sum runs of equal labels within tiles of kTileRows sorted rows in
// index order, then add the pieces of the runs that cross tiles, in tile order. No float atomics.
//
// Bytes: N D values once; labels and pairs 24 N a pass (2 passes up to K = 65535); pieces of runs
// 8 N D / kTileRows. The sums' 8 loads in flight x 4 B x 2048 threads are 64 KiB an SM, several
// times what latency x bandwidth asks for (about 14 KiB on an H100).
#include <type_traits>

#include "device.cuh"

namespace protoclip {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kDigits = 256;     // one thread a digit
constexpr int kSortTile = 2048;  // 8 rounds of 32 rows for each warp
constexpr int kRounds = kSortTile / kThreads;
constexpr int kTileRows = 128;  // rows a thread adds up in fp32
constexpr int kUnroll = 8;

// The first pass reads labels, later ones what the last pass wrote.
struct Source {
  const int64_t* labels;
  int64_t label_stride;
  int k;
  const int *keys, *rows;

  __device__ int key(int64_t i) const {
    if (labels == nullptr) return keys[i];
    const int64_t label = labels[i * label_stride];
    return label >= 0 && label < k ? static_cast<int>(label) : k;  // left out: sorted last
  }
  __device__ int row(int64_t i) const { return labels == nullptr ? rows[i] : static_cast<int>(i); }
};

__device__ inline int digit_of(int key, int shift) { return key >> shift & (kDigits - 1); }

// Exclusive prefix sum over the block's threads; *total is the sum, in every thread.
__device__ inline int scan_block(int x, int* warp_sums, int* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = x;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kFullWarp, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int before = 0;
  *total = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before += warp_sums[i];
    *total += warp_sums[i];
  }
  __syncthreads();
  return before + sum - x;
}

// histogram [kDigits, blocks]
__global__ void histogram_kernel(Source source, int64_t n, int shift, int* histogram) {
  __shared__ int counts[kDigits];
  counts[threadIdx.x] = 0;
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSortTile;
  for (int i = threadIdx.x; i < kSortTile && first + i < n; i += kThreads) {
    atomicAdd(&counts[digit_of(source.key(first + i), shift)], 1);
  }
  __syncthreads();
  histogram[static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x] = counts[threadIdx.x];
}

// One block a digit: its counts become the starts of the blocks' rows within the digit.
__global__ void scan_kernel(int* histogram, int blocks, int* totals) {
  __shared__ int warp_sums[kWarps];
  int* counts = histogram + static_cast<int64_t>(blockIdx.x) * blocks;
  int carry = 0;
  for (int first = 0; first < blocks; first += kThreads) {
    const int i = first + threadIdx.x;
    int total;
    const int start = scan_block(i < blocks ? counts[i] : 0, warp_sums, &total);
    if (i < blocks) counts[i] = carry + start;
    carry += total;
  }
  if (threadIdx.x == 0) totals[blockIdx.x] = carry;
}

// Stable: a warp takes consecutive rows, 32 at a time, and ranks them by lane.
__global__ void scatter_kernel(Source source, int64_t n, int shift, const int* histogram,
                               const int* totals, int* keys, int* rows) {
  __shared__ int position[kWarps][kDigits];  // first a warp's counts, then where its rows start
  __shared__ int warp_sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = lane; i < kDigits; i += 32) position[warp][i] = 0;
  __syncwarp();

  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * kSortTile + warp * (kSortTile / kWarps) + lane;
  int key[kRounds], rank[kRounds];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t i = first + round * 32;
    key[round] = i < n ? source.key(i) : -1;
    const int digit = i < n ? digit_of(key[round], shift) : kDigits;
    const unsigned same = __match_any_sync(kFullWarp, static_cast<unsigned>(digit));
    const int before = i < n ? position[warp][digit] : 0;
    rank[round] = before + __popc(same & ((1u << lane) - 1));
    __syncwarp();
    if (i < n && lane == __ffs(static_cast<int>(same)) - 1) {
      position[warp][digit] = before + __popc(same);
    }
    __syncwarp();
  }
  __syncthreads();
  int unused;
  int start = scan_block(totals[threadIdx.x], warp_sums, &unused) +
              histogram[static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x];
  for (int i = 0; i < kWarps; ++i) {
    const int count = position[i][threadIdx.x];
    position[i][threadIdx.x] = start;
    start += count;
  }
  __syncthreads();
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t i = first + round * 32;
    if (i >= n) continue;
    const int to = position[warp][digit_of(key[round], shift)] + rank[round];
    keys[to] = key[round];
    rows[to] = source.row(i);
  }
}

// starts [K + 1]: the first sorted position of each label; starts [K] = rows that take part.
__global__ void starts_kernel(const int* keys, int n, int k, int* starts) {
  const int64_t label = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (label > k) return;
  int low = 0, high = n;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (keys[middle] < label) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  starts[label] = low;
}

// Sums the runs of a tile, a thread a column. Whole runs become means; a run that came in from the
// tile before goes to heads, one that only goes on in the next tile to tails; both [tiles, D].
template <typename T>
__global__ void runs_kernel(Matrix values, int d, int k, const int* keys, const int* rows,
                            const int* starts, float* means, float* heads, float* tails) {
  __shared__ int tile_rows[kTileRows], tile_keys[kTileRows + 2];  // and a neighbour on each side
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
      const int row = tile_rows[base + i < count ? base + i : count - 1];
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

// One block a segment: its count, zeros where empty, and the runs that cross tiles: each warp adds
// a slice of the pieces in fp64, the slices are added in order.
__global__ void segments_kernel(const int* starts, int d, const float* heads, const float* tails,
                                float* means, int64_t* counts) {
  __shared__ double sums[kWarps][32];
  const int segment = blockIdx.x, start = starts[segment], end = starts[segment + 1];
  if (threadIdx.x == 0) counts[segment] = end - start;
  float* mean = means + static_cast<int64_t>(segment) * d;
  if (start == end) {
    for (int i = threadIdx.x; i < d; i += kThreads) mean[i] = 0;
    return;
  }
  const int first = start / kTileRows, last = (end - 1) / kTileRows;
  if (first == last) return;  // runs_kernel wrote it
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int pieces = last - first, slice = ceil_div(pieces, kWarps);
  for (int base = 0; base < d; base += 32) {
    const int column = base + lane;
    double sum = 0;
    for (int i = warp * slice; column < d && i < pieces && i < (warp + 1) * slice; ++i) {
      sum += heads[static_cast<int64_t>(first + 1 + i) * d + column];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < d) {
      sum = tails[static_cast<int64_t>(first) * d + column];
      for (int i = 0; i < kWarps; ++i) sum += sums[i][lane];
      mean[column] = static_cast<float>(sum / (end - start));
    }
    __syncthreads();
  }
}

struct Buffers {
  int *keys[2], *rows[2];  // [N] each: what a pass reads and what it writes
  int *histogram, *totals, *starts;
  float *heads, *tails;
  size_t bytes;

  Buffers(const SegmentMean& call, void* scratch) {
    Arena arena{static_cast<unsigned char*>(scratch)};
    const size_t n = call.n, pieces = ceil_div<size_t>(n, kTileRows) * call.d;
    for (int i = 0; i < 2; ++i) {
      keys[i] = arena.take<int>(n);
      rows[i] = arena.take<int>(n);
    }
    histogram = arena.take<int>(ceil_div<size_t>(n, kSortTile) * kDigits);
    totals = arena.take<int>(kDigits);
    starts = arena.take<int>(static_cast<size_t>(call.k) + 1);
    heads = arena.take<float>(pieces);
    tails = arena.take<float>(pieces);
    bytes = arena.used;
  }
};

// Sorts by label; *sorted says which of the two buffers holds the result.
cudaError_t sort_rows(const SegmentMean& call, const Buffers& at, cudaStream_t stream,
                      int* sorted) {
  const int blocks = static_cast<int>(ceil_div<int64_t>(call.n, kSortTile));
  Source source{call.labels, call.label_stride, call.k, nullptr, nullptr};
  *sorted = 1;
  for (int shift = 0; shift < 32 && (shift == 0 || call.k >> shift != 0); shift += 8) {
    const int to = 1 - *sorted;
    PROTOCLIP_TRY(launch(histogram_kernel, dim3(blocks), kThreads, 0, stream, source, call.n, shift,
                         at.histogram));
    PROTOCLIP_TRY(
        launch(scan_kernel, dim3(kDigits), kThreads, 0, stream, at.histogram, blocks, at.totals));
    PROTOCLIP_TRY(launch(scatter_kernel, dim3(blocks), kThreads, 0, stream, source, call.n, shift,
                         at.histogram, at.totals, at.keys[to], at.rows[to]));
    source = {nullptr, 0, call.k, at.keys[to], at.rows[to]};
    *sorted = to;
  }
  return cudaSuccess;
}

}  // namespace

size_t segment_mean_scratch_bytes(const SegmentMean& call) { return Buffers(call, nullptr).bytes; }

cudaError_t launch_segment_mean(const SegmentMean& call, void* scratch, float* means,
                                int64_t* counts, cudaStream_t stream) {
  const Buffers at(call, scratch);
  int sorted = 0;
  if (call.n > 0) PROTOCLIP_TRY(sort_rows(call, at, stream, &sorted));
  PROTOCLIP_TRY(launch(starts_kernel, dim3(call.k / kThreads + 1), kThreads, 0, stream,
                       at.keys[sorted], static_cast<int>(call.n), call.k, at.starts));
  if (call.n > 0 && call.d > 0) {
    const int threads = call.d < 128 ? ceil_div(call.d, 32) * 32 : 128;
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(call.n, kTileRows)),
                    ceil_div(call.d, threads));
    PROTOCLIP_TRY(with_dtype(call.dtype, [&](auto* type) -> cudaError_t {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      return launch(runs_kernel<T>, grid, threads, 0, stream, call.values, call.d, call.k,
                    at.keys[sorted], at.rows[sorted], at.starts, means, at.heads, at.tails);
    }));
  }
  return launch(segments_kernel, dim3(call.k), kThreads, 0, stream, at.starts, call.d, at.heads,
                at.tails, means, counts);
}

}  // namespace protoclip
