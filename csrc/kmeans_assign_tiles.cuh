// Scores of all points against a range of centroids, and the best of each point, in one pass: the
// matrix product of nearest centroid with the selection as its epilogue.
//
// A block is 4 warps over 128 points x 128 centroids, each warp 64 x 64: per 16 of D it reads 4 KiB
// of shared memory for 32 mma, 128 B/clk per SM at Hopper's rate, which is the shared memory's own.
// 128 accumulators + 32 for operands + 8 thresholds fit 255 registers, so two blocks share an SM
// and one's selection hides behind the other's products. Shared memory: ring of 4 stages x 8 KiB
// for centroids, 128 points x 2 B x D x parts resident or 4 x 8 KiB more, 5 KiB of state:
// bf16, D = 128: 69 KiB; D = 256: 101 KiB; streamed at any D: 69 KiB. Two fit 164 KiB (sm_80) and
// 228 KiB (sm_90, sm_100), except resident D = 256 on sm_80, where the plan streams; sm_86 and
// sm_89 hold one (100 KiB).
#pragma once

#include "kmeans_assign_rows.cuh"

namespace protoclip {

constexpr int kTileN = 128, kTileK = 128, kTileD = 32;  // 64-byte rows: 4 chunks of 16 bytes
constexpr int kStages = 4;
constexpr int kThreads = 128;
constexpr int kTileBytes = 128 * kTileD * 2;  // of points and of centroids alike
constexpr int kStateBytes = 2 * kTileN * static_cast<int>(sizeof(Best));

struct Tiles {
  const uint16_t *points, *centroids;     // [N, parts, packed_d], [K, parts, packed_d]
  int64_t point_stride, centroid_stride;  // in elements
  Chosen chosen;                          // of the points
  const float* bias;                      // [tiles x kTileK]
  Best* partial;                          // [splits, N]
  int k, packed_d, blocks_d, terms, tiles_per_split, tiles;
  bool resident;
};

// One block of D of one term of one centroid tile: the unit of the pipeline.
struct Step {
  int tile = 0, block = 0, term = 0;
  __device__ void advance(const Tiles& t) {
    if (++term < t.terms) return;
    term = 0;
    if (++block < t.blocks_d) return;
    block = 0;
    ++tile;
  }
  __device__ int point_part() const { return term == 1; }  // hi.hi, lo.hi, hi.lo
  __device__ int centroid_part() const { return term == 2; }
};

// Chunk position within a tile: 8 neighbouring rows of one chunk column hit all 32 banks.
__device__ inline int chunk_offset(int row, int chunk) {
  return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4);
}

// What a thread copies of each tile: rows row, row + 32, ... of one chunk. All of it that does not
// change from step to step is worked out once for a block.
struct Copier {
  int row, column, offset;  // offset: in a tile's shared memory
  int64_t rows;             // from the thread's first point on
  const uint16_t *point[4], *centroid[4];

  __device__ explicit Copier(const Tiles& t)
      : row(threadIdx.x / 4), column(threadIdx.x % 4 * 8), offset(chunk_offset(row, column / 8)) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileN + row;
    rows = t.chosen.size() - first;
    for (int i = 0; i < 4; ++i) {
      const int64_t entry = i * (kThreads / 4);
      const int64_t point_row = entry < rows ? t.chosen.row(first + entry) : 0;
      point[i] = t.points + point_row * t.point_stride + column;
      centroid[i] = t.centroids + (row + entry) * t.centroid_stride + column;
    }
  }
};

// rows, columns: how many of the thread's first row and chunk on are there.
__device__ inline void load_tile(unsigned char* to, const uint16_t* const (&from)[4], int64_t skip,
                                 int rows, int columns) {
  if (columns <= 0) rows = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    copy_async_16(to + i * (kThreads / 4 * 64), from[i] + skip, i * (kThreads / 4) < rows ? 16 : 0);
  }
}

struct Shared {
  unsigned char *points, *centroids;
  Best* state;  // [2 warps along K, kTileN]

  __device__ explicit Shared(const Tiles& t) {
    centroids = dynamic_shared();
    state = reinterpret_cast<Best*>(centroids + kStages * kTileBytes);
    points = centroids + kStages * kTileBytes + kStateBytes;
  }
  __device__ unsigned char* point_tile(const Tiles& t, const Step& s, int stage) const {
    const int slot = t.resident ? s.point_part() * t.blocks_d + s.block : stage;
    return points + slot * kTileBytes;
  }
};

__device__ inline void load_step(const Tiles& t, const Shared& shared, const Copier& copier,
                                 const Step& s, int stage, int first_tile) {
  const int column = s.block * kTileD, columns = t.packed_d - column - copier.column;
  const int centroid = s.tile * kTileK;
  load_tile(shared.centroids + stage * kTileBytes + copier.offset, copier.centroid,
            centroid * t.centroid_stride + s.centroid_part() * t.packed_d + column,
            t.k - centroid - copier.row, columns);
  if (t.resident && (s.tile != first_tile || s.term == 2)) return;  // already there
  load_tile(shared.point_tile(t, s, stage) + copier.offset, copier.point,
            s.point_part() * t.packed_d + column,
            copier.rows < kTileN ? static_cast<int>(copier.rows) : kTileN, columns);
}

using Accumulators = float[4][8][4];  // 64 points x 64 centroids of a warp, m16n8 fragments

template <bool kHalf>
__device__ inline void multiply(Accumulators& acc, const unsigned char* points,
                                const unsigned char* centroids) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int point = warp / 2 * 64 + lane % 16, point_chunk = lane / 16;
  const int centroid = warp % 2 * 64 + lane / 16 * 8 + lane % 8, centroid_chunk = lane / 8 % 2;
#pragma unroll
  for (int step = 0; step < kTileD / 16; ++step) {
    uint32_t a[4][4], b[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_matrix_x4(a[i], points + chunk_offset(point + i * 16, step * 2 + point_chunk));
      load_matrix_x4(b[i], centroids + chunk_offset(centroid + i * 16, step * 2 + centroid_chunk));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        mma_16x8x16<kHalf>(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
}

// Loaded before the products and added after them, so that neither waits for memory.
struct Bias {
  float even[8], odd[8];

  __device__ explicit Bias(const float* from) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      even[j] = from[j * 8];
      odd[j] = from[j * 8 + 1];
    }
  }
  __device__ void add_to(Accumulators& acc) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        acc[i][j][0] += even[j];
        acc[i][j][1] += odd[j];
        acc[i][j][2] += even[j];
        acc[i][j][3] += odd[j];
      }
    }
  }
};

__device__ inline void insert(Best& best, float score, int index) {  // ascending index: ties stay
  if (score > best.first) {
    best = {score, best.first, best.second, index, best.first_index};
  } else if (score > best.second) {
    best.third = best.second;
    best.second = score;
    best.second_index = index;
  } else {
    best.third = fmaxf(best.third, score);
  }
}

__device__ inline Best shuffle_xor(const Best& x, int lanes) {
  return {__shfl_xor_sync(kFullWarp, x.first, lanes), __shfl_xor_sync(kFullWarp, x.second, lanes),
          __shfl_xor_sync(kFullWarp, x.third, lanes),
          __shfl_xor_sync(kFullWarp, x.first_index, lanes),
          __shfl_xor_sync(kFullWarp, x.second_index, lanes)};
}

// Folds a warp's scores into its rows' state. Per element one max; the ordered insertion runs only
// for the 8 rows x 64 scores where one of them beats its row's third best so far, which becomes
// rare: a share of about 24 / t at the t-th tile. NaN beats nothing.
__device__ inline void select(const Accumulators& acc, float (&threshold)[8], Best* state,
                              int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int row = 0; row < 8; ++row) {  // fragment row / 2, upper or lower half
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float* pair = &acc[row / 2][j][row % 2 * 2];
      largest = fmaxf(largest, fmaxf(pair[0], pair[1]));
    }
    if (!__any_sync(kFullWarp, largest > threshold[row])) continue;
    Best best = no_best();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      insert(best, acc[row / 2][j][row % 2 * 2], column + j * 8);
      insert(best, acc[row / 2][j][row % 2 * 2 + 1], column + j * 8 + 1);
    }
    best = merge(best, shuffle_xor(best, 1));
    best = merge(best, shuffle_xor(best, 2));
    if (lane % 4 == 0) {
      Best* mine = &state[row * 8 + lane / 4];
      best = merge(*mine, best);
      *mine = best;
    }
    threshold[row] = __shfl_sync(kFullWarp, best.third, lane & ~3);
  }
}

template <bool kHalf>
__global__ void __launch_bounds__(kThreads, 2) assign_kernel(Tiles t) {
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTileN;
  if (first_row >= t.chosen.size()) return;
  const Shared shared(t);
  const Copier copier(t);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_tile = blockIdx.y * t.tiles_per_split;
  const int tiles = min(t.tiles_per_split, t.tiles - first_tile);
  const int steps_per_tile = t.blocks_d * t.terms, steps = tiles * steps_per_tile;
  for (int i = threadIdx.x; i < 2 * kTileN; i += kThreads) shared.state[i] = no_best();

  Step load, use;
  load.tile = use.tile = first_tile;
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < steps) load_step(t, shared, copier, load, i, first_tile);
    load.advance(t);
    copy_async_commit();
  }
  Best* state = shared.state + warp % 2 * kTileN + warp / 2 * 64;
  float threshold[8];
#pragma unroll
  for (float& x : threshold) x = -INFINITY;
  int step = 0;
  for (int tile = first_tile; tile < first_tile + tiles; ++tile) {
    const int column = tile * kTileK + warp % 2 * 64 + lane % 4 * 2;
    const Bias bias(t.bias + column);
    Accumulators acc = {};
    for (int i = 0; i < steps_per_tile; ++i, ++step) {
      copy_async_wait<kStages - 2>();
      __syncthreads();  // this step's tiles are there, and all warps are done with the last step's
      if (step + kStages - 1 < steps) {
        load_step(t, shared, copier, load, (step + kStages - 1) % kStages, first_tile);
      }
      load.advance(t);
      copy_async_commit();
      multiply<kHalf>(acc, shared.point_tile(t, use, step % kStages),
                      shared.centroids + step % kStages * kTileBytes);
      use.advance(t);
    }
    bias.add_to(acc);
    select(acc, threshold, state, column);
  }
  __syncthreads();
  const int64_t row = first_row + threadIdx.x;
  if (row < t.chosen.n) {
    t.partial[blockIdx.y * t.chosen.n + row] =
        merge(shared.state[threadIdx.x], shared.state[kTileN + threadIdx.x]);
  }
}

}  // namespace protoclip
