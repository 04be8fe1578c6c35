// Greedy k-means++ as one op: for each new centre a few candidates are drawn by weight x squared
// distance, and the one that lowers the sum most is taken.
//
// Candidates of several centres are drawn at once, by rejection sampling, and meet the points
// together (protoclip/lloyd/starts.py, which is the specification). A centre changes the distances
// of few points: those that a candidate is nearer to than their nearest centre are listed, found as
// in kmeans_assign by bounds from 8-bit codes, or by their distances where those are cheaper.
// Choosing a centre then reads the lists of its candidates alone.
#include <ATen/Parallel.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rand.h>

#include <algorithm>
#include <vector>

#include "cpu_ops.h"
#include "kmeans_block.h"
#include "kmeans_direct.h"

namespace protoclip {
namespace {

constexpr int64_t kSlice =
    8 * kBlockRows;  // points of a task; sums are by slice, whoever adds them

// Slices that a thread takes at least, for so many multiply-adds a point.
int64_t grain(int64_t work) { return 1 + kThreadWork / (kSlice * work + 1); }

// A point that is nearer to a candidate than to its nearest centre.
struct Near {
  int32_t candidate;
  int32_t point;  // of the slice
  float distance;
};

// Of a slice: `near` of candidate i are near[begin[i]] ... near[begin[i + 1] - 1], by point.
struct NearPoints {
  std::vector<int64_t> begin;
  std::vector<Near> near, found;  // sorted by candidate, and by point

  void sort(int64_t candidates) {
    begin.assign(candidates + 1, 0);
    for (const Near& at : found) ++begin[at.candidate + 1];
    for (int64_t i = 0; i < candidates; ++i) begin[i + 1] += begin[i];
    near.resize(found.size());
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (const Near& at : found) near[next[at.candidate]++] = at;
  }
};

struct Points {
  const float* rows;      // [N, D]
  const double* weights;  // [N], or null: all 1
  int64_t n, d, slices;

  const float* row(int64_t i) const { return rows + i * d; }
  double weight(int64_t i) const { return weights ? weights[i] : 1; }
  int64_t size(int64_t slice) const { return std::min(kSlice, n - slice * kSlice); }

  // f(slice) for all of them; `work`: multiply-adds a point.
  template <class F>
  void each_slice(int64_t work, const F& f) const {
    at::parallel_for(0, slices, grain(work), [&](int64_t begin, int64_t end) {
      for (int64_t slice = begin; slice < end; ++slice) f(slice);
    });
  }
};

// Candidates that are drawn together.
struct Candidates {
  std::vector<int64_t> index;    // of the points that they are
  std::vector<double> distance;  // squared, to the nearest centre when they were drawn
  std::vector<double> luck;

  int64_t size() const { return static_cast<int64_t>(index.size()); }
  // Whether it is still kept as a draw, now at distance `now`. All distances are 0 if only
  // duplicates are left; then any point will do.
  bool keeps(int64_t i, double now) const {
    return now >= luck[i] * distance[i] && (now > 0 || distance[i] == 0);
  }
};

class Start {
 public:
  Start(const Points& points, at::TensorList codes)
      : points_(points),
        codes_(codes),
        nearest_(points.n),
        running_(points.n),
        lists_(points.slices) {}

  std::vector<int64_t> run(int64_t first, int64_t num_clusters, int64_t trials, int64_t rounds,
                           const at::Generator& generator);

 private:
  void begin_at(int64_t first);
  Candidates draw(int64_t count, const at::Generator& generator);
  void find(const Candidates& candidates);
  void find_in_slice(const Panels& panels, int64_t slice);
  void find_in_slice(Block& block, const CodedPoints& coded, int64_t slice);
  int64_t best_of(const std::vector<int64_t>& candidates) const;
  void take(int64_t candidate);

  const Points& points_;
  at::TensorList codes_;           // of kmeans_encode, or none: all distances are measured
  std::vector<float> nearest_;     // [N], the squared distance to the nearest centre
  std::vector<double> running_;    // [N], sums of weight x distance in the slice
  std::vector<NearPoints> lists_;  // by slice
};

void Start::begin_at(int64_t first) {
  points_.each_slice(points_.d, [&](int64_t slice) {
    for (int64_t i = slice * kSlice; i < slice * kSlice + points_.size(slice); ++i)
      nearest_[i] = squared_distance(points_.row(i), points_.row(first), points_.d);
  });
}

// A candidate is the point where the running sum of weight x squared distance passes a random part
// of the total.
Candidates Start::draw(int64_t count, const at::Generator& generator) {
  std::vector<double> end(points_.slices);
  points_.each_slice(4, [&](int64_t slice) {
    double sum = 0;
    for (int64_t i = slice * kSlice; i < slice * kSlice + points_.size(slice); ++i)
      running_[i] = sum += points_.weight(i) * nearest_[i];
    end[slice] = sum;
  });
  for (int64_t slice = 1; slice < points_.slices; ++slice) end[slice] += end[slice - 1];
  const Tensor uniform = at::rand({2, count}, generator, at::TensorOptions(at::kDouble));
  const double *where = uniform.const_data_ptr<double>(), *luck = where + count;
  Candidates drawn;
  drawn.luck.assign(luck, luck + count);
  for (int64_t i = 0; i < count; ++i) {
    const double aim = where[i] * end.back();
    const int64_t passed = std::upper_bound(end.begin(), end.end(), aim) - end.begin();
    const int64_t slice = std::min(passed, points_.slices - 1);
    const double local = slice ? aim - end[slice - 1] : aim;
    const double* sums = running_.data() + slice * kSlice;
    const int64_t size = points_.size(slice);
    const int64_t row = std::upper_bound(sums, sums + size, local) - sums;
    drawn.index.push_back(slice * kSlice + std::min(row, size - 1));
    drawn.distance.push_back(nearest_[drawn.index.back()]);
  }
  return drawn;
}

// Lists the points that each candidate is nearer to than their nearest centre.
void Start::find(const Candidates& candidates) {
  const int64_t count = candidates.size(), d = points_.d;
  const Tensor rows = at::empty({count, d}, at::TensorOptions(at::kFloat));
  for (int64_t i = 0; i < count; ++i)
    std::copy_n(points_.row(candidates.index[i]), d, rows.mutable_data_ptr<float>() + i * d);
  if (codes_.empty()) {
    const Panels panels(rows.const_data_ptr<float>(), count, d);
    points_.each_slice(count * d, [&](int64_t slice) {
      lists_[slice].found.clear();
      find_in_slice(panels, slice);
      lists_[slice].sort(count);
    });
    return;
  }
  const CodedPoints coded{codes_[0], codes_[1]};
  Frame frame(codes_[2]);
  frame.rotated = codes_[3].item<bool>();
  const Centroids prepared(rows, frame);
  at::parallel_for(0, points_.slices, grain(count * d / 4), [&](int64_t begin, int64_t end) {
    Block block(prepared);
    for (int64_t slice = begin; slice < end; ++slice) {
      lists_[slice].found.clear();
      find_in_slice(block, coded, slice);
      lists_[slice].sort(count);
    }
  });
}

void Start::find_in_slice(const Panels& panels, int64_t slice) {
  const int64_t base = slice * kSlice, size = points_.size(slice);
  std::vector<Near>& found = lists_[slice].found;
  for (int64_t from = 0; from < size; from += kDirectRows) {
    const float* row[kDirectRows];
    float nearest[kDirectRows];
    for (int64_t r = 0; r < kDirectRows; ++r) {
      row[r] = points_.row(base + std::min(from + r, size - 1));
      nearest[r] = from + r < size ? nearest_[base + from + r] : -1.0f;  // nothing is nearer
    }
    for (int64_t panel = 0; panel < panels.count; ++panel)
      direct_tile(row, panels, panel, [&](auto r, auto v, int8::Float distance) ALWAYS_INLINE {
        for (uint32_t mask = int8::mask_lt(distance, int8::broadcast(nearest[r])); mask;
             mask &= mask - 1) {
          const int lane = __builtin_ctz(mask);
          const int64_t candidate = panel * kDirectColumns + v * int8::kLanes + lane;
          found.push_back(
              {static_cast<int32_t>(candidate), static_cast<int32_t>(from + r), distance[lane]});
        }
      });
  }
}

void Start::find_in_slice(Block& block, const CodedPoints& coded, int64_t slice) {
  const Centroids& c = block.c;
  const int64_t chunk = c.chunk();
  const auto measure = [&](int64_t i, int64_t candidate) {
    const float distance = squared_distance(points_.row(i), c.rows + candidate * c.d, c.d);
    if (distance < nearest_[i])
      lists_[slice].found.push_back(
          {static_cast<int32_t>(candidate), static_cast<int32_t>(i - slice * kSlice), distance});
  };
  const int64_t end = slice * kSlice + points_.size(slice);
  for (int64_t base = slice * kSlice; base < end; base += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, end - base);
    for (int64_t r = 0; r < rows; ++r)
      if (!block.expect(r, coded, base + r, nearest_[base + r]))
        for (int64_t candidate = 0; candidate < c.k; ++candidate) measure(base + r, candidate);
    for (int64_t panel = 0; panel < c.panels; panel += chunk) {
      const int64_t count = std::min(chunk, c.panels - panel);
      for (int64_t group = 0; group < rows; group += kRows) {
        block.screen_chunk(group, panel, count);
        for (int64_t r = group; r < std::min(group + kRows, rows); ++r) {
          const int64_t hits = block.find_hits(r, panel, count, block.threshold[r]);
          for (int64_t i = 0; i < hits; ++i)
            if (block.hits[i].centroid < c.k) measure(base + r, block.hits[i].centroid);
        }
      }
    }
  }
}

// The candidate that lowers the sum of weight x distance most; the first of equal ones.
int64_t Start::best_of(const std::vector<int64_t>& candidates) const {
  const auto trials = static_cast<int64_t>(candidates.size());
  std::vector<double> gain(points_.slices * trials);
  points_.each_slice(trials, [&](int64_t slice) {
    const NearPoints& list = lists_[slice];
    for (int64_t t = 0; t < trials; ++t) {
      double sum = 0;
      for (int64_t at = list.begin[candidates[t]]; at < list.begin[candidates[t] + 1]; ++at) {
        const int64_t i = slice * kSlice + list.near[at].point;
        const float fall = nearest_[i] - list.near[at].distance;
        if (fall > 0) sum += points_.weight(i) * fall;
      }
      gain[slice * trials + t] = sum;
    }
  });
  for (int64_t slice = 1; slice < points_.slices; ++slice)
    for (int64_t t = 0; t < trials; ++t) gain[t] += gain[slice * trials + t];
  return candidates[std::max_element(gain.begin(), gain.begin() + trials) - gain.begin()];
}

void Start::take(int64_t candidate) {
  for (int64_t slice = 0; slice < points_.slices; ++slice) {
    const NearPoints& list = lists_[slice];
    for (int64_t at = list.begin[candidate]; at < list.begin[candidate + 1]; ++at) {
      float& nearest = nearest_[slice * kSlice + list.near[at].point];
      nearest = std::min(nearest, list.near[at].distance);
    }
  }
}

std::vector<int64_t> Start::run(int64_t first, int64_t num_clusters, int64_t trials,
                                int64_t most_rounds, const at::Generator& generator) {
  std::vector<int64_t> chosen{first};
  const auto missing = [&] { return num_clusters - static_cast<int64_t>(chosen.size()); };
  begin_at(first);
  while (missing() > 0) {
    // While half as many more centres are chosen, few of the candidates become too near.
    const auto half = static_cast<int64_t>(chosen.size() / 2);
    const int64_t rounds = std::max<int64_t>(1, std::min({most_rounds, half, missing()}));
    const Candidates candidates = draw(trials * rounds, generator);
    find(candidates);
    int64_t visited = 0;
    while (missing() > 0) {
      std::vector<int64_t> kept;
      int64_t next = visited;
      for (; next < candidates.size() && static_cast<int64_t>(kept.size()) < trials; ++next)
        if (candidates.keeps(next, nearest_[candidates.index[next]])) kept.push_back(next);
      if (static_cast<int64_t>(kept.size()) < trials && visited) break;
      visited = next;
      const int64_t best = best_of(kept);
      take(best);
      chosen.push_back(candidates.index[best]);
    }
  }
  return chosen;
}

}  // namespace

// Points: fp32 [N, D]; weights: fp64 [N]. The numbers of the chosen points, int64 [num_clusters].
Tensor kmeans_greedy_start(const Tensor& strided_points, const Optional& weights,
                           at::TensorList codes, int64_t first, int64_t num_clusters,
                           int64_t trials, int64_t rounds, at::Generator generator) {
  const char* op = "kmeans_greedy_start";
  expect(op, "points", strided_points, {kAny, kAny}, at::kFloat);
  const int64_t n = strided_points.size(0);
  if (weights) expect(op, "weights", *weights, {n}, at::kDouble);
  if (!codes.empty()) expect_codes(op, codes, n, strided_points.size(1));
  TORCH_CHECK_VALUE(0 <= first && first < n && trials > 0 && num_clusters > 0, op,
                    ": expected a first point below N, clusters and trials, got ", first, ", ",
                    num_clusters, " and ", trials, " for N = ", n);
  const Tensor rows = strided_points.contiguous();
  const Tensor by_point = weights ? weights->contiguous() : Tensor();
  const Points points{rows.const_data_ptr<float>(),
                      weights ? by_point.const_data_ptr<double>() : nullptr, n, rows.size(1),
                      blocks(n, kSlice)};
  const auto chosen = Start(points, codes).run(first, num_clusters, trials, rounds, generator);
  const Tensor index = at::empty({num_clusters}, at::TensorOptions(at::kLong));
  std::copy(chosen.begin(), chosen.end(), index.mutable_data_ptr<int64_t>());
  return index;
}

}  // namespace protoclip
