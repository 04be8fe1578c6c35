// Tensors in the pool's blocks.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include "memory_pool.h"

namespace protoclip {

// Uninitialised and contiguous; a large one's block goes back to the pool with the tensor.
inline at::Tensor pooled_empty(at::IntArrayRef sizes, at::ScalarType type) {
  int64_t bytes = static_cast<int64_t>(c10::elementSize(type));
  for (const int64_t size : sizes) bytes *= size;
  if (bytes < MemoryPool::kSmallest) return at::empty(sizes, type);
  void* data = MemoryPool::instance().take(bytes);
  const auto give = [bytes](void* p) { MemoryPool::instance().give(p, bytes); };
  return at::from_blob(data, sizes, give, type);
}

}  // namespace protoclip
