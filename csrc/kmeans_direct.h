// Squared distances of points to few centroids of few coordinates, all of them, from differences:
// there the 8-bit screening (kmeans_block.h) takes longer than what it saves.
#pragma once

#include <algorithm>

#include "int8_tile.h"
#include "memory_pool.h"

namespace protoclip {

constexpr int64_t kDirectRows = 4;                    // points of a tile
constexpr int64_t kDirectColumns = 2 * int8::kLanes;  // centroids of a tile
constexpr int64_t kDirectRun = 64;                    // coordinates

constexpr int64_t kDirect = 2048;         // K D up to which that is so
constexpr int64_t kThreadWork = 1 << 20;  // multiply-adds worth a thread of their own

// Centroids [K, D], fp32, by coordinate: [panels][D][kDirectColumns]. Slots past K are at infinity.
struct Panels {
  Panels(const float* rows, int64_t k, int64_t d)
      : k(k), d(d), count(blocks(k, kDirectColumns)), data(count * d * kDirectColumns, kInfinity) {
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = 0; j < d; ++j)
        data.get()[(i / kDirectColumns * d + j) * kDirectColumns + i % kDirectColumns] =
            rows[i * d + j];
  }

  const float* column(int64_t panel, int64_t j) const {
    return data.get() + (panel * d + j) * kDirectColumns;
  }

  int64_t k, d, count;
  Buffer<float> data;
};

// each(r, v, distances) of kDirectRows points to vector v of a panel's centroids. Coordinates are
// added in runs of kDirectRun, for fewer roundings.
template <class F>
inline ALWAYS_INLINE void direct_tile(const float* const* points, const Panels& panels,
                                      int64_t panel, F each) {
  constexpr int kSums = 2 * kDirectRows;
  int8::Float totals[kSums] = {};
  for (int64_t begin = 0; begin < panels.d; begin += kDirectRun) {
    const int64_t end = std::min(panels.d, begin + kDirectRun);
    int8::Float sums[kSums] = {}, columns[2], point;
    for (int64_t j = begin; j < end; ++j)
      int8::unrolled<kSums>([&](auto i) ALWAYS_INLINE {
        constexpr int r = i / 2, v = i % 2;
        if constexpr (r == 0) columns[v] = int8::load(panels.column(panel, j) + v * int8::kLanes);
        if constexpr (v == 0) point = int8::broadcast(points[r][j]);
        const auto gap = point - columns[v];
        sums[i] += gap * gap;
      });
    int8::unrolled<kSums>([&](auto i) ALWAYS_INLINE { totals[i] += sums[i]; });
  }
  int8::unrolled<kSums>([&](auto i) ALWAYS_INLINE {
    each(std::integral_constant<int, i / 2>{}, std::integral_constant<int, i % 2>{}, totals[i]);
  });
}

}  // namespace protoclip
