// torch.ops.protoclip_native of the CPU half. The only source that includes torch/library.h, whose
// 5 seconds are half of what an op's own source takes to compile.
#include <torch/library.h>

#include "cpu_ops.h"
#include "memory_pool.h"

namespace protoclip {
namespace {

int64_t kept_memory() { return MemoryPool::instance().kept(); }  // bytes that nothing uses

void release_memory() { MemoryPool::instance().clear(); }

}  // namespace
}  // namespace protoclip

TORCH_LIBRARY_FRAGMENT(protoclip_native, m) {
  m.def("stash_size(int n, int m) -> int", &protoclip::stash_size);
  m.def("pooled(int count) -> Tensor", &protoclip::pooled);
  m.def("kept_memory() -> int", &protoclip::kept_memory);
  m.def("release_memory() -> ()", &protoclip::release_memory);
  m.def(
      "contrastive_fwd(Tensor x, Tensor y, Tensor scale, int offset, bool columns,"
      " Tensor(a!)? kept=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "contrastive_bwd(Tensor x, Tensor y, Tensor scale, Tensor row_max, Tensor row_sum,"
      " Tensor column_max, Tensor column_sum, Tensor row_weight, Tensor column_weight, int offset,"
      " Tensor? kept=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "matched_fwd(Tensor x, Tensor y, Tensor scale, Tensor own, Tensor? exclude,"
      " Tensor? query_ids, Tensor? key_ids, Tensor? key_bias, bool same_positive, bool columns,"
      " Tensor(a!)? kept=None) -> (Tensor, Tensor)");
  m.def(
      "matched_bwd(Tensor x, Tensor y, Tensor scale, Tensor own, Tensor? exclude,"
      " Tensor? query_ids, Tensor? key_ids, Tensor? key_bias, bool same_positive, Tensor rows,"
      " Tensor by_column, Tensor row_weights, Tensor column_weights, Tensor? kept=None)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sigmoid_loss(Tensor x, Tensor y, Tensor scale, Tensor bias, int offset, bool gradients,"
      " Tensor? query_ids=None, Tensor? key_ids=None, bool same_positive=True)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "prototype_ce_fwd_banks(Tensor h, Tensor[] prototypes, Tensor[] targets, Tensor[] labels,"
      " Tensor scale, bool need_grad, bool need_nearest)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "prototype_ce_bwd_prototypes(Tensor h, Tensor prototypes, Tensor labels, Tensor scale,"
      " Tensor row_max, Tensor row_sum, Tensor weight, bool hard) -> Tensor");
  m.def("soft_targets(Tensor source, Tensor prototypes, float temperature) -> Tensor");
  m.def("kmeans_assign(Tensor points, Tensor centroids) -> (Tensor, Tensor)");
  m.def("kmeans_encode(Tensor points) -> (Tensor, Tensor, Tensor, bool)");
  m.def(
      "kmeans_assign_coded(Tensor points, Tensor centroids, Tensor codes, Tensor known, "
      "Tensor centre, bool rotated) -> (Tensor, Tensor)");
  m.def("segment_mean(Tensor values, Tensor labels, int num_segments) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(protoclip_native, CPU, m) {
  m.impl("contrastive_fwd", &protoclip::contrastive_fwd);
  m.impl("contrastive_bwd", &protoclip::contrastive_bwd);
  m.impl("matched_fwd", &protoclip::matched_fwd);
  m.impl("matched_bwd", &protoclip::matched_bwd);
  m.impl("sigmoid_loss", &protoclip::sigmoid_loss);
  m.impl("prototype_ce_fwd_banks", &protoclip::prototype_ce_fwd_banks);
  m.impl("prototype_ce_bwd_prototypes", &protoclip::prototype_ce_bwd_prototypes);
  m.impl("soft_targets", &protoclip::soft_targets);
  m.impl("kmeans_assign", &protoclip::kmeans_assign);
  m.impl("kmeans_encode", &protoclip::kmeans_encode);
  m.impl("kmeans_assign_coded", &protoclip::kmeans_assign_coded);
  m.impl("segment_mean", &protoclip::segment_mean);
}
