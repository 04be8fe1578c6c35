// The instructions that CUDA C++ has no name for, and the one way kernels are launched.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launchers.h"

namespace protoclip {

// 16 bytes of global memory to shared memory, asynchronously; the bytes past `valid` become zeros.
__device__ inline void copy_async_16(void* shared, const void* global, int valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(valid)
               : "memory");
}

__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 2-byte elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrix_x4(uint32_t (&r)[4], const void* shared_row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// acc [16, 8] += a [16, 16] b [8, 16]^T on tensor cores, fp32 accumulators.
template <bool kHalf>
__device__ inline void mma_16x8x16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
  if constexpr (kHalf) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return dynamic_shared_bytes;
}

template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes,
                   cudaStream_t stream, A... args) {
  kernel<<<grid, threads, shared_bytes, stream>>>(static_cast<P>(args)...);
  return cudaGetLastError();
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

// Calls f with a null pointer of the element type, which carries the type to a generic lambda.
template <typename F>
cudaError_t with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kBfloat16:
      return f(static_cast<const __nv_bfloat16*>(nullptr));
    case Dtype::kFloat16:
      return f(static_cast<const __half*>(nullptr));
    default:
      return f(static_cast<const float*>(nullptr));
  }
}

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// Hands out pieces of a scratch allocation; with a null base it only counts.
struct Arena {
  unsigned char* base;
  size_t used = 0;

  template <typename T>
  T* take(size_t count) {
    T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += ceil_div<size_t>(count * sizeof(T), 256) * 256;
    return piece;
  }
};

constexpr unsigned kFullWarp = 0xffffffffu;

template <typename T>
__device__ inline T warp_sum(T x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;  // the same bits in every lane: each level adds the same two numbers
}

}  // namespace protoclip

#define PROTOCLIP_TRY(expression)             \
  do {                                        \
    const cudaError_t error_ = (expression);  \
    if (error_ != cudaSuccess) return error_; \
  } while (false)
