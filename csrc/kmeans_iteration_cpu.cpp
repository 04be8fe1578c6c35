// An iteration of Lloyd's algorithm as one op: the steps of protoclip/lloyd with their bits, and no
// Python between them.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sum.h>

#include "checks.h"
#include "cpu_ops.h"

namespace protoclip {
namespace {

// Means of the clusters' points. `values`: the points, or weight x point and weight.
struct Update {
  Tensor centroids;  // [K, D]
  Tensor counts;     // int64 [K]; 0 where a cluster has no weight, and its centroid stays
  bool has_empty = false;

  Update(const Tensor& values, const Tensor& labels, const Tensor& old, const Optional& centre) {
    const int64_t k = old.size(0), d = old.size(1), stride = values.size(1);
    const auto [means, sizes] = segment_mean(values, labels, k);
    counts = sizes;
    const Tensor rows = old.contiguous();
    centroids = at::empty_like(rows);
    const float* middle = centre ? centre->const_data_ptr<float>() : nullptr;
    for (int64_t i = 0; i < k; ++i) {
      const float* mean = means.const_data_ptr<float>() + i * stride;
      const float mass = stride > d ? mean[d] : 1;
      int64_t& count = counts.mutable_data_ptr<int64_t>()[i];
      if (!(mass > 0)) count = 0;
      has_empty |= count == 0;
      const float* from = rows.const_data_ptr<float>() + i * d;
      float* to = centroids.mutable_data_ptr<float>() + i * d;
      for (int64_t j = 0; j < d; ++j) to[j] = count ? mean[j] / mass : from[j];
      for (int64_t j = 0; middle && j < d; ++j) to[j] = (to[j] + middle[j]) - middle[j];
    }
  }
};

bool moved(const Tensor& old, const Tensor& updated, double limit) {
  if (limit == 0) return !old.equal(updated);
  const double norm =
      at::linalg_vector_norm(at::sub(updated, old), 2, {}, false, at::kDouble).item<double>();
  return !(norm * norm <= limit);
}

}  // namespace

// centroids [K, D] with their labels and distances -> the updated ones, their counts, facts fp64
// [3] (inertia before the update, whether centroids moved, whether clusters are empty), and the
// labels and distances of the updated ones, where they differ and all have points.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> kmeans_iteration(
    const Tensor& points, const Tensor& values, const Optional& weights, double weight,
    const Optional& centre, const Tensor& centroids, const Tensor& labels, const Tensor& distances,
    at::TensorList codes, double limit) {
  const char* op = "kmeans_iteration";
  expect(op, "points", points, {kAny, kAny}, kFloats);
  const int64_t n = points.size(0), d = points.size(1);
  expect(op, "centroids", centroids, {kAny, d}, at::kFloat);
  const bool weighted = values.dim() == 2 && values.size(1) == d + 1;
  expect(op, "values", values, {n, weighted ? d + 1 : d}, kFloats);
  expect(op, "distances", distances, {n}, kSums);
  if (weights) expect(op, "weights", *weights, {n}, kSums);
  if (centre) expect(op, "centre", *centre, {d}, at::kFloat);
  const Update update(values, labels, centroids, centre);
  const bool moving = moved(centroids, update.centroids, limit);
  const Tensor squared = distances.to(at::kDouble);
  const Tensor facts = at::empty({3}, squared.options());
  double* fact = facts.mutable_data_ptr<double>();
  fact[0] = at::sum(weights ? at::mul(squared, *weights) : squared).item<double>() * weight;
  fact[1] = moving;
  fact[2] = update.has_empty;
  if (update.has_empty || (limit == 0 && !moving))
    return {update.centroids, update.counts, facts, at::empty({0}, labels.options()),
            at::empty({0}, distances.options())};
  const auto [new_labels, new_distances] =
      codes.empty() ? kmeans_assign(points, update.centroids)
                    : kmeans_assign_coded(points, update.centroids, codes);
  return {update.centroids, update.counts, facts, new_labels, new_distances};
}

}  // namespace protoclip
