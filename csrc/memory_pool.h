// Large blocks of work memory, kept for the next call of the same size; buffers and tensors in
// them.
//
// The kernel zeroes every page it hands out and malloc returns large blocks at once, so 64 MiB that
// come and go cost 10 ms a step in huge pages and 60 ms in small ones: more than a matrix product.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <new>

namespace protoclip {

class MemoryPool {
 public:
  static constexpr int64_t kSmallest = 64 << 10;  // below, malloc's own lists serve
  static constexpr int64_t kAtMost = 128 << 20;   // idle bytes, kept for the next call

  static MemoryPool& instance() {
    static MemoryPool* pool = new MemoryPool;  // never destroyed: tensors may outlive statics
    return *pool;
  }

  // Uninitialised, on a page's boundary; `give` it back with the same number of bytes.
  void* take(int64_t bytes) {
    const int64_t size = whole_pages(bytes);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto block = blocks_.rbegin(); block != blocks_.rend();
           ++block)  // the latest: in caches
        if (block->size == size) {
          void* data = block->data;
          idle_bytes_ -= size;
          blocks_.erase(std::next(block).base());
          return data;
        }
    }
    void* data = std::aligned_alloc(page_of(bytes), size);
    if (data == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (size >= kHugePage) madvise(data, size, MADV_HUGEPAGE);
#endif
    return data;
  }

  void give(void* data, int64_t bytes) {
    const int64_t size = whole_pages(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.push_back({data, size});
    idle_bytes_ += size;
    while (idle_bytes_ > kAtMost) drop_oldest();
  }

  int64_t idle_bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return idle_bytes_;
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!blocks_.empty()) drop_oldest();
  }

 private:
  static constexpr int64_t kPage = 4 << 10, kHugePage = 2 << 20;
  struct Block {
    void* data;
    int64_t size;
  };

  // Half a huge page is taken whole.
  static int64_t page_of(int64_t bytes) { return bytes < kHugePage / 2 ? kPage : kHugePage; }
  static int64_t whole_pages(int64_t bytes) {
    const int64_t page = page_of(bytes);
    return (bytes + page - 1) / page * page;
  }

  void drop_oldest() {
    std::free(blocks_.front().data);
    idle_bytes_ -= blocks_.front().size;
    blocks_.pop_front();
  }

  std::mutex mutex_;
  std::deque<Block> blocks_;  // the oldest first
  int64_t idle_bytes_ = 0;
};

// Memory on cache lines, with a vector's width to spare at the end; uninitialised without a value.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(nullptr, Free{(count * int64_t{sizeof(T)} + 127) / 64 * 64}) {
    const int64_t bytes = data_.get_deleter().bytes;
    void* room = bytes < MemoryPool::kSmallest ? std::aligned_alloc(64, bytes)
                                               : MemoryPool::instance().take(bytes);
    if (room == nullptr) throw std::bad_alloc();
    data_.reset(static_cast<T*>(room));
  }
  Buffer(int64_t count, T value) : Buffer(count) { std::fill_n(get(), count, value); }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    int64_t bytes;
    void operator()(T* p) const {
      if (bytes < MemoryPool::kSmallest)
        std::free(p);
      else
        MemoryPool::instance().give(p, bytes);
    }
  };

  std::unique_ptr<T, Free> data_;
};

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
