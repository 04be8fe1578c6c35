// The pool as torch sees it: tensors in its blocks.
#include <torch/library.h>

#include "pooled_tensor.h"

namespace protoclip {
namespace {

at::Tensor pooled(int64_t count) { return pooled_empty({count}, at::kShort); }

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
