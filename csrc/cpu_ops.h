// The CPU's ops, as bindings.cpp registers them. Contracts: protoclip/ops.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace protoclip {

struct PairArguments;  // pairs.h

using at::Tensor;
using Optional = std::optional<Tensor>;

// Calls f with a value of the element type, for the three types that the ops take.
template <typename F>
void with_dtype(at::ScalarType dtype, const F& f) {
  if (dtype == at::kFloat) return f(float{});
  if (dtype == at::kBFloat16) return f(at::BFloat16{});
  TORCH_CHECK(dtype == at::kHalf, "expected float32, bfloat16 or float16, got ", dtype);
  f(at::Half{});
}

// uint8 [num_bytes], uninitialised, in memory that the next step gets again (memory_pool.h).
Tensor empty_stash(int64_t num_bytes);
std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_fwd(const Tensor& x, const Tensor& y,
                                                           const Tensor& logit_scale,
                                                           const PairArguments& pairs,
                                                           bool both_directions, double pair_weight,
                                                           bool summed, const Optional& stash);
std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_bwd(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale, const PairArguments& pairs,
    const Tensor& row_statistics, const Tensor& column_statistics, const Tensor& query_weight,
    const Optional& positive_mean_weight, const Tensor& key_weight, double pair_weight,
    const Optional& stash);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid_loss(const Tensor& x, const Tensor& y,
                                                                const Tensor& logit_scale,
                                                                const Tensor& logit_bias,
                                                                const PairArguments& ids,
                                                                bool gradients);
std::tuple<Tensor, Tensor, Tensor, Tensor> sigmoid_loss_bwd(const Tensor& grad, const Tensor& dx,
                                                            const Tensor& dy,
                                                            const Tensor& dlogit_scale,
                                                            const Tensor& dlogit_bias);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prototype_cross_entropy_fwd(
    const Tensor& features, const Tensor& prototypes, const Tensor& targets, const Tensor& labels,
    const Tensor& logit_scale, bool need_grad, bool need_nearest, bool need_scale_gradient,
    c10::string_view reduction);
std::tuple<Tensor, Tensor> prototype_cross_entropy_scale(const Tensor& grad, const Tensor& divisor,
                                                         const Tensor& logit_scale,
                                                         const Tensor& gradient,
                                                         const Tensor& scale_gradient,
                                                         const Tensor& features);
Tensor prototype_cross_entropy_bwd(const Tensor& features, const Tensor& prototypes,
                                   const Tensor& labels, const Tensor& logit_scale,
                                   const Tensor& row_max, const Tensor& row_sum,
                                   const Tensor& weight, bool hard);
Tensor soft_targets(const Tensor& source_centroids, const Tensor& prototypes, double temperature);

std::tuple<Tensor, Tensor> kmeans_assign(const Tensor& points, const Tensor& centroids);
std::vector<Tensor> kmeans_encode(const Tensor& points);
std::tuple<Tensor, Tensor> kmeans_assign_coded(const Tensor& points, const Tensor& centroids,
                                               at::TensorList codes);
std::vector<Tensor> kmeans_prepare(const Tensor& centroids, const Tensor& some, bool coded,
                                   const Optional& order);
std::tuple<Tensor, Tensor> kmeans_assign_prepared(const Tensor& points, at::TensorList prepared);
int64_t kmeans_group_size(int64_t num_clusters);
std::tuple<Tensor, Tensor, double> kmeans_reassign(const Tensor& points, at::TensorList prepared,
                                                   const Tensor& order, at::TensorList codes,
                                                   const Tensor& previous, const Tensor& labels,
                                                   const Tensor& distances, const Tensor& bounds);
Tensor kmeans_greedy_start(const Tensor& points, const Optional& weights, at::TensorList codes,
                           int64_t first, int64_t num_clusters, int64_t trials, int64_t rounds,
                           at::Generator generator);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> kmeans_iteration(
    const Tensor& points, const Tensor& values, const Optional& weights, double weight,
    const Optional& centre, const Tensor& centroids, const Tensor& labels, const Tensor& distances,
    at::TensorList codes, double limit);
std::tuple<Tensor, Tensor> segment_mean(const Tensor& values, const Tensor& labels,
                                        int64_t num_segments);
void segment_add(const Tensor& values, const Tensor& labels, const Tensor& open,
                 const Tensor& closed, const Tensor& counts);
Tensor segment_sums_mean(const Tensor& open, const Tensor& closed, const Tensor& counts);

}  // namespace protoclip
