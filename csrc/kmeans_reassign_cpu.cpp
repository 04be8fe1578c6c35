// Nearest centroid of each point where that of slightly other centroids is known: exactly, by
// comparing with those alone that may have become the nearest.
//
// Groups of centroids that are near each other have lower bounds of their distances to each point,
// the point's own centroid left out (Yinyang k-means, Ding et al., ICML 2015). A bound falls by
// what its group moved. A group whose bound is above the distance to the own centroid is skipped;
// tiles of points that need a group are screened in 8 bits, as in kmeans_assign_cpu.cpp, which
// gives its new bound. A group is a run of panels, so that a skipped one is skipped work.
//
// The centroids that moved farthest, as those of empty clusters do, would let their whole groups
// fall. They are treated alone: they are no nearer to a point than they are to its own centroid,
// less the point's distance to that one.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "cpu_ops.h"
#include "kmeans_block.h"

namespace protoclip {
namespace {

typedef uint16_t Shorts __attribute__((vector_size(2 * int8::kLanes)));

constexpr int64_t kMostGroups = 28;
constexpr int64_t kBoundsSize = 32;  // uint16: kMostGroups bounds, their scale, 4 bytes
constexpr float kMostBound = 65535;  // what a uint16 holds
constexpr int64_t kAlone = 32;       // centroids that are treated alone
constexpr float kAbove = 1 + 1e-6f;  // over the fp32 roundings of a few operations
constexpr float kBelow = 1 - 1e-6f;
constexpr float kTiny = 1e-18f;  // below, squared distances lose digits
constexpr float kStep = 0.01f;   // over the roundings of a difference of bounds

// Bounds of a distance, over the rounding of its square.
float from_above(double rounding, float square) {
  return std::sqrt(square) * static_cast<float>(1 + 2 * rounding) * kAbove + kTiny;
}
float from_below(double rounding, float square) {
  return std::sqrt(square) * static_cast<float>(1 - 2 * rounding) * kBelow;
}

// What became of the previous centroids.
struct Moves {
  Moves(const Centroids& c, const float* previous, const int64_t* order)
      : order(order),
        span(blocks(c.panels, kMostGroups)),
        groups(blocks(c.panels, span)),
        slot(c.k),
        stays(c.k),
        together(kBoundsSize, 0.0f),
        alone(kBoundsSize, 0.0f),
        apart(c.k * kBoundsSize, std::numeric_limits<float>::max()) {
    std::vector<std::pair<float, int64_t>> farthest(c.k);
    for (int64_t i = 0; i < c.k; ++i) {
      const int64_t centroid = order[i];
      const float *from = previous + centroid * c.d, *to = c.rows + centroid * c.d;
      double square = 0;
      for (int64_t j = 0; j < c.d; ++j) {
        const double gap = static_cast<double>(to[j]) - from[j];
        square += gap * gap;
      }
      slot[centroid] = static_cast<int32_t>(i);
      stays[centroid] = std::equal(from, from + c.d, to);
      farthest[i] = {static_cast<float>(std::sqrt(square)) * kAbove, centroid};
    }
    const auto rest = farthest.begin() + std::min(kAlone, c.k);
    std::partial_sort(farthest.begin(), rest, farthest.end(), std::greater<>());
    for (auto it = farthest.begin(); it != farthest.end(); ++it) {
      float& move = (it < rest ? alone : together)[group_of(it->second)];
      move = std::max(move, it->first);
    }
    at::parallel_for(0, c.k, 64, [&](int64_t begin, int64_t end) {
      for (int64_t centroid = begin; centroid < end; ++centroid)
        for (auto it = farthest.begin(); it != rest; ++it) {
          if (it->second == centroid) continue;  // the own one has no bound
          const float square =
              squared_distance(c.rows + centroid * c.d, c.rows + it->second * c.d, c.d);
          float& least = apart[centroid * kBoundsSize + group_of(it->second)];
          least = std::min(least, from_below(rounding_of_square(c.d), square));
        }
    });
  }

  int64_t group_of(int64_t centroid) const { return slot[centroid] / (span * kColumns); }

  const int64_t* order;         // [K], the centroid in each slot of the codes
  int64_t span, groups;         // panels of a group; their number
  std::vector<int32_t> slot;    // [K], of each centroid
  std::vector<char> stays;      // [K], whether it did not move at all
  std::vector<float> together;  // [kBoundsSize], move of a group's centroids, from above
  std::vector<float> alone;     // [kBoundsSize], of those that are treated alone
  std::vector<float> apart;     // [K, kBoundsSize], from each to those of a group, from below
};

// Of a point, one for each group: at most scale x the distance to the group's centroids without the
// point's own. All zeros: nothing is known.
class PointBounds {
 public:
  explicit PointBounds(uint8_t* record) : bounds_(reinterpret_cast<uint16_t*>(record)) {
    std::memcpy(&scale_, bounds_ + kMostGroups, sizeof scale_);
  }

  bool empty() const { return scale_ == 0; }
  void clear() {
    std::memset(bounds_, 0, kBoundsSize * sizeof *bounds_);
    scale_ = 0;
  }
  // `farthest`: about the largest distance to come; bounds above it count as this.
  void begin(float farthest) {
    scale_ = kMostBound / farthest;
    std::memcpy(bounds_ + kMostGroups, &scale_, sizeof scale_);
  }

  void set(int64_t group, float distance) { bounds_[group] = rounded(distance); }
  void lower_to(int64_t group, float distance) {
    bounds_[group] = std::min(bounds_[group], rounded(distance));
  }

  // Lowers the bounds by what the groups moved, to those of the centroids that are treated alone;
  // the groups whose bounds are not above `distance`, that of the point's `own` centroid.
  uint32_t fall(const Moves& moves, int64_t own, float distance) {
    const auto limit = int8::broadcast(distance * scale_ * kAbove);
    const float* apart = moves.apart.data() + own * kBoundsSize;
    uint32_t near = 0;
    for (int64_t g = 0; g < moves.groups; g += int8::kLanes) {
      Shorts stored;
      std::memcpy(&stored, bounds_ + g, sizeof stored);
      const auto bound = int8::to_float(__builtin_convertvector(stored, int8::Int));
      const auto fallen_by = [&](const std::vector<float>& largest) {
        const auto move = int8::load(largest.data() + g);
        return bound - (move > 0 ? move * scale_ + kStep : int8::Float{});
      };
      const auto alone = larger(fallen_by(moves.alone), int8::load(apart + g) * scale_ - limit);
      const auto together = fallen_by(moves.together);
      const auto fallen = larger(together < alone ? together : alone, int8::Float{});
      near |= int8::mask_ge(limit, fallen) << g;
      stored = __builtin_convertvector(__builtin_convertvector(fallen, int8::Int), Shorts);
      std::memcpy(bounds_ + g, &stored, sizeof stored);
    }
    return near & ((1u << moves.groups) - 1);
  }

 private:
  uint16_t rounded(float distance) const {
    return static_cast<uint16_t>(std::min(distance * scale_ * kBelow, kMostBound));
  }

  uint16_t* bounds_;
  float scale_;
};

// The score / s of a centroid at this squared distance, from above.
float most_score(const Block& block, int64_t row, float distance) {
  const double score =
      (block.square[row] * (1 + block.rounding) - distance * (1 - block.rounding)) / 2 *
      block.inverse[row];
  return static_cast<float>(score + std::abs(score) * 1e-6);
}

// The distance of a centroid with this score / s, from below.
float least_distance(const Block& block, int64_t row, float score) {
  const double square = block.square[row] * (1 - block.rounding) -
                        2 * (score + std::abs(score) * 1e-6) / block.inverse[row];
  return square > 0 ? from_below(block.rounding, static_cast<float>(square * (1 - 1e-6))) : 0.0f;
}

// Meets the centroids of the panel that was just screened for `row`, the r-th of its tile. The
// largest bound of their scores / s, without the centroid that is then the point's own; `others`
// rises to those that a group lost as the own one.
float meet_panel(Block& block, const Moves& moves, PointBounds bounds, int64_t row, int64_t r,
                 int64_t panel, float* others) {
  const int64_t first = panel * kColumns, group = panel / moves.span;
  float* bound = block.bounds.get() + r * kColumns;
  const auto without = [&](int64_t i) {
    bound[i] = -kInfinity;
    auto high = int8::load(bound);
    for (int v = 1; v < kVectors; ++v) high = larger(high, int8::load(bound + v * int8::kLanes));
    return maximum(high);
  };
  const int64_t own = moves.slot[block.label[row]] - first;
  float top = own >= 0 && own < kColumns
                  ? without(own)
                  : maximum(int8::load(block.highest.get() + r * kChunkPanels * int8::kLanes));
  while (top >= block.threshold[row]) {
    int64_t i = 0;
    while (bound[i] < top) ++i;
    const int64_t candidate = moves.order[first + i];
    const float now =
        squared_distance(block.point[row], block.c.rows + candidate * block.c.d, block.c.d);
    if (block.is_nearer(row, now, candidate)) {
      const int64_t loser = block.label[row];
      const float lost = block.distance[row];
      if (moves.group_of(loser) == group)
        *others = std::max(*others, most_score(block, row, lost));
      else
        bounds.lower_to(moves.group_of(loser), from_below(block.rounding, lost));
      block.hold(row, now, candidate);
    } else {
      *others = std::max(*others, std::min(top, most_score(block, row, now)));
    }
    top = without(i);
  }
  return top;
}

// Meets the centroids of a group for `rows`, `count` of a block, with room for a tile at the end.
void meet_group(Block& block, const Moves& moves, int64_t group, uint16_t* rows, int64_t count,
                uint8_t* records) {
  std::fill(rows + count, rows + count + kRows, rows[count - 1]);
  const int64_t end = std::min(block.c.panels, (group + 1) * moves.span);
  for (int64_t at = 0; at < count; at += kRows) {
    const uint16_t* row = rows + at;
    const int64_t size = std::min<int64_t>(kRows, count - at);
    float highest[kRows];
    std::fill(highest, highest + kRows, -kInfinity);
    for (int64_t panel = group * moves.span; panel < end; ++panel) {
      block.screen_panel([=](int64_t r) { return row[r]; }, panel, 0);
      for (int64_t r = 0; r < size; ++r) {
        const PointBounds bounds(records + row[r] * kBoundsSize * sizeof(uint16_t));
        float others = highest[r];
        const float top = meet_panel(block, moves, bounds, row[r], r, panel, &others);
        highest[r] = std::max(others, top);
      }
    }
    for (int64_t r = 0; r < size; ++r)
      PointBounds(records + row[r] * kBoundsSize * sizeof(uint16_t))
          .set(group, least_distance(block, row[r], highest[r]));
  }
}

// The points' labels and distances of the previous centroids become those of `c`; how many panels
// points met. `coded`: the points' codes, or null.
template <class T>
int64_t reassign(const Tensor& points, const Centroids& c, const Moves& moves,
                 const CodedPoints* coded, int64_t* labels, float* distances, uint8_t* records) {
  const int64_t n = points.size(0), row_stride = points.stride(0), stride = points.stride(1);
  const T* data = points.const_data_ptr<T>();
  const uint32_t all = (1u << moves.groups) - 1;
  // Farther points may not fit (Block::fits), and are never skipped.
  const float farthest =
      c.d <= kMostProducts && c.largest >= 2 * kTooSmall ? kTooLarge / 2 - c.largest : -1;
  std::atomic<int64_t> met{0};
  at::parallel_for(0, blocks(n, kMostRows), 1, [&](int64_t begin, int64_t end) {
    Block block(c, kMostRows);
    uint32_t needs[kMostRows];
    uint16_t list[kMostRows + kRows];
    int64_t visits = 0;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t base = b * kMostRows, rows = std::min(kMostRows, n - base);
      uint8_t* record = records + base * kBoundsSize * sizeof(uint16_t);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = base + r, own = labels[i];
        PointBounds bounds(record + r * kBoundsSize * sizeof(uint16_t));
        const bool stays = moves.stays[own] && !bounds.empty();
        float distance = distances[i];
        if (!stays) {
          block.read(r, data + i * row_stride, stride);
          distance = squared_distance(block.point[r], c.rows + own * c.d, c.d);
        }
        const float above = from_above(block.rounding, distance);
        needs[r] = bounds.fall(moves, own, above);
        if (bounds.empty() || !(above <= farthest)) needs[r] = all;
        block.label[r] = own;
        block.distance[r] = distance;
        if (!needs[r]) continue;
        if (stays) block.read(r, data + i * row_stride, stride);
        if (!(coded ? block.take(r, *coded, i) : block.encode(r))) {
          bounds.clear();
          needs[r] = 0;
          continue;
        }
        if (bounds.empty())
          bounds.begin(static_cast<float>(std::sqrt(block.square[r])) + c.largest);
        block.hold(r, distance, own);
      }
      for (int64_t group = 0; group < moves.groups; ++group) {
        int64_t count = 0;
        for (int64_t r = 0; r < rows; ++r) {
          list[count] = static_cast<uint16_t>(r);
          count += needs[r] >> group & 1;
        }
        if (!count) continue;
        meet_group(block, moves, group, list, count, record);
        visits += count * (std::min(c.panels, (group + 1) * moves.span) - group * moves.span);
      }
      std::copy(block.label, block.label + rows, labels + base);
      std::copy(block.distance, block.distance + rows, distances + base);
    }
    met += visits;
  });
  return met;
}

}  // namespace

// Centroids of a group, of K.
int64_t kmeans_group_size(int64_t num_clusters) {
  const int64_t panels = blocks(num_clusters, kColumns);
  return kColumns * blocks(panels, kMostGroups);
}

// The labels and distances of `previous` centroids [K, D] -> those of the prepared ones, as
// kmeans_assign_prepared has them, and the share of all products that it took. `prepared` with
// `order` (kmeans_prepare); `bounds`: uint8 [N, 64], zeros at first and for another order.
std::tuple<Tensor, Tensor, double> kmeans_reassign(const Tensor& points, at::TensorList prepared,
                                                   const Tensor& order, at::TensorList codes,
                                                   const Tensor& previous, const Tensor& labels,
                                                   const Tensor& distances, const Tensor& bounds) {
  const char* op = "kmeans_reassign";
  expect(op, "points", points, {kAny, kAny}, kFloats);
  const int64_t n = points.size(0), d = points.size(1);
  expect_prepared(op, prepared, d);
  expect_points(op, points, prepared[0]);
  const int64_t k = prepared[0].size(0);
  expect_order(op, order, k);
  if (!codes.empty()) expect_codes(op, codes, n, d);
  expect(op, "previous", previous, {k, d}, kSums);
  expect_labels(op, labels, n, k, 0);
  expect(op, "distances", distances, {n}, at::kFloat);
  expect(op, "bounds", bounds, {n, kBoundsSize * int64_t{sizeof(uint16_t)}}, at::kByte);
  TORCH_CHECK_VALUE(bounds.is_contiguous(), op, ": expected contiguous bounds");
  Frame frame(prepared[1]);
  frame.rotated = prepared[2].item<bool>();
  const Centroids c(prepared[0], frame, prepared.slice(3));
  const Tensor before = previous.to(at::kFloat).contiguous();
  const Moves moves(c, before.const_data_ptr<float>(), order.const_data_ptr<int64_t>());
  const Tensor new_labels = labels.clone(), new_distances = distances.clone();
  int64_t met = 0;
  with_dtype(points.scalar_type(), [&](auto type) {
    const auto run = [&](const CodedPoints* coded) {
      return reassign<decltype(type)>(
          points, c, moves, coded, new_labels.mutable_data_ptr<int64_t>(),
          new_distances.mutable_data_ptr<float>(), bounds.mutable_data_ptr<uint8_t>());
    };
    if (codes.empty()) {
      met = run(nullptr);
    } else {
      const CodedPoints coded{codes[0], codes[1]};
      met = run(&coded);
    }
  });
  const auto most = static_cast<double>(points.size(0) * c.panels);
  return {new_labels, new_distances, most > 0 ? met / most : 0.0};
}

}  // namespace protoclip
