// torch.ops.protoclip_native of the CPU library. The only source that includes torch/library.h,
// whose 5 seconds are half of what an op's own source takes to compile.
#include <torch/library.h>

#include "cpu_ops.h"
#include "memory_pool.h"
#include "pairs.h"

// What is said of pairs, in the order of ``Ids`` and ``Compared`` (protoclip/ops/pairs.py).
#define IDS "int offset, Tensor? query_ids, Tensor? key_ids, bool same_positive,"
#define COMPARED IDS " Tensor? own_key, Tensor? exclude, Tensor? key_bias,"

// What Python asks beside the ops, by ctypes.
extern "C" {

int protoclip_stash_rows() { return protoclip::Stash::kRows; }

int protoclip_stash_columns() { return protoclip::Stash::kColumns; }

// What -march=native let the compiler use.
const char* protoclip_cpu_features() {
  return ""
#ifdef __AVX2__
         " avx2"
#endif
#ifdef __AVX512F__
         " avx512f"
#endif
#ifdef __AVX512VNNI__
         " avx512_vnni"
#endif
#ifdef __AVX512BF16__
         " avx512_bf16"
#endif
#ifdef __AMX_BF16__
         " amx_bf16"
#endif
      ;
}

}  // extern "C"

namespace protoclip {
namespace {

int64_t idle_memory() { return MemoryPool::instance().idle_bytes(); }

void release_memory() { MemoryPool::instance().clear(); }

// The op whose fourth argument is a struct, with that one spelled out.
template <typename Result, typename... More>
auto spelled(Result (*op)(const Tensor&, const Tensor&, const Tensor&, const PairArguments&,
                          More...)) {
  return [op](const Tensor& x, const Tensor& y, const Tensor& logit_scale, int64_t offset,
              const Optional& query_ids, const Optional& key_ids, bool same_positive,
              const Optional& own_key, const Optional& exclude, const Optional& key_bias,
              More... more) {
    return op(x, y, logit_scale,
              {offset, query_ids, key_ids, same_positive, own_key, exclude, key_bias}, more...);
  };
}

auto spelled_sigmoid_loss(const Tensor& x, const Tensor& y, const Tensor& logit_scale,
                          const Tensor& logit_bias, int64_t offset, const Optional& query_ids,
                          const Optional& key_ids, bool same_positive, bool gradients) {
  return sigmoid_loss(x, y, logit_scale, logit_bias, {offset, query_ids, key_ids, same_positive},
                      gradients);
}

}  // namespace
}  // namespace protoclip

TORCH_LIBRARY_FRAGMENT(protoclip_native, m) {
  const auto cpu = [](auto op) { return torch::dispatch(c10::DispatchKey::CPU, op); };
  m.def("empty_stash(int num_bytes) -> Tensor", &protoclip::empty_stash);
  m.def("idle_memory() -> int", &protoclip::idle_memory);
  m.def("release_memory() -> ()", &protoclip::release_memory);
  m.def("contrastive_fwd(Tensor x, Tensor y, Tensor logit_scale, " COMPARED
        " bool both_directions, float pair_weight, bool summed, Tensor(a!)? stash=None)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        cpu(protoclip::spelled(&protoclip::contrastive_fwd)));
  m.def("contrastive_bwd(Tensor x, Tensor y, Tensor logit_scale, " COMPARED
        " Tensor row_statistics, Tensor column_statistics, Tensor query_weight,"
        " Tensor? positive_mean_weight, Tensor key_weight, float pair_weight, Tensor? stash=None)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        cpu(protoclip::spelled(&protoclip::contrastive_bwd)));
  m.def("sigmoid_loss(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, " IDS
        " bool gradients) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        cpu(&protoclip::spelled_sigmoid_loss));
  m.def(
      "sigmoid_loss_bwd(Tensor grad, Tensor dx, Tensor dy, Tensor dlogit_scale,"
      " Tensor dlogit_bias) -> (Tensor, Tensor, Tensor, Tensor)",
      cpu(&protoclip::sigmoid_loss_bwd));
  m.def(
      "prototype_cross_entropy_fwd(Tensor features, Tensor prototypes, Tensor targets, Tensor "
      "labels,"
      " Tensor logit_scale, bool need_grad, bool need_nearest, bool need_scale_gradient,"
      " str reduction) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      cpu(&protoclip::prototype_cross_entropy_fwd));
  m.def(
      "prototype_cross_entropy_scale(Tensor grad, Tensor divisor, Tensor logit_scale,"
      " Tensor gradient, Tensor scale_gradient, Tensor features) -> (Tensor, Tensor)",
      cpu(&protoclip::prototype_cross_entropy_scale));
  m.def(
      "prototype_cross_entropy_bwd(Tensor features, Tensor prototypes, Tensor labels,"
      " Tensor logit_scale, Tensor row_max, Tensor row_sum, Tensor weight, bool hard) -> Tensor",
      cpu(&protoclip::prototype_cross_entropy_bwd));
  m.def("soft_targets(Tensor source_centroids, Tensor prototypes, float temperature) -> Tensor",
        cpu(&protoclip::soft_targets));
  m.def("kmeans_assign(Tensor points, Tensor centroids) -> (Tensor, Tensor)",
        cpu(&protoclip::kmeans_assign));
  m.def("kmeans_encode(Tensor points) -> Tensor[]", cpu(&protoclip::kmeans_encode));
  m.def("kmeans_assign_coded(Tensor points, Tensor centroids, Tensor[] codes) -> (Tensor, Tensor)",
        cpu(&protoclip::kmeans_assign_coded));
  m.def("kmeans_prepare(Tensor centroids, Tensor some, bool coded, Tensor? order=None) -> Tensor[]",
        cpu(&protoclip::kmeans_prepare));
  m.def("kmeans_assign_prepared(Tensor points, Tensor[] prepared) -> (Tensor, Tensor)",
        cpu(&protoclip::kmeans_assign_prepared));
  m.def("kmeans_group_size(int num_clusters) -> int", &protoclip::kmeans_group_size);
  m.def(
      "kmeans_reassign(Tensor points, Tensor[] prepared, Tensor order, Tensor[] codes,"
      " Tensor previous, Tensor labels, Tensor distances, Tensor(a!) bounds)"
      " -> (Tensor, Tensor, float)",
      cpu(&protoclip::kmeans_reassign));
  m.def(
      "kmeans_greedy_start(Tensor points, Tensor? weights, Tensor[] codes, int first,"
      " int num_clusters, int trials, int rounds, Generator? generator) -> Tensor",
      cpu(&protoclip::kmeans_greedy_start));
  m.def(
      "kmeans_iteration(Tensor points, Tensor values, Tensor? weights, float weight,"
      " Tensor? centre, Tensor centroids, Tensor labels, Tensor distances, Tensor[] codes,"
      " float limit) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      cpu(&protoclip::kmeans_iteration));
  m.def("segment_mean(Tensor values, Tensor labels, int num_segments) -> (Tensor, Tensor)",
        cpu(&protoclip::segment_mean));
  m.def(
      "segment_add(Tensor values, Tensor labels, Tensor(a!) open, Tensor(b!) closed,"
      " Tensor(c!) counts) -> ()",
      cpu(&protoclip::segment_add));
  m.def("segment_sums_mean(Tensor open, Tensor closed, Tensor counts) -> Tensor",
        cpu(&protoclip::segment_sums_mean));
}
