// The pool as torch sees it: tensors in its blocks.
#include "memory_pool.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

namespace protoclip {
namespace {

// int16 [count], uninitialised; its block goes back to the pool with the tensor.
at::Tensor pooled(int64_t count) {
  const int64_t bytes = 2 * count;
  if (bytes < MemoryPool::kSmallest) return at::empty({count}, at::kShort);
  void* data = MemoryPool::instance().take(bytes);
  return at::from_blob(
      data, {count}, [bytes](void* p) { MemoryPool::instance().give(p, bytes); }, at::kShort);
}

int64_t kept_memory() { return MemoryPool::instance().kept(); }  // bytes nobody uses

void release_memory() { MemoryPool::instance().clear(); }

}  // namespace
}  // namespace protoclip

TORCH_LIBRARY_FRAGMENT(protoclip_native, m) {
  m.def("pooled(int count) -> Tensor");
  m.def("kept_memory() -> int");
  m.def("release_memory() -> ()");
}

TORCH_LIBRARY_IMPL(protoclip_native, CompositeExplicitAutograd, m) {
  m.impl("pooled", protoclip::pooled);
  m.impl("kept_memory", protoclip::kept_memory);
  m.impl("release_memory", protoclip::release_memory);
}
