// A GPU for tests, on one host thread: what csrc/device.cuh needs of CUDA, for a C++ compiler.
//
// Blocks run one after another; a block's threads are coroutines that give way at barriers and at
// warp-wide instructions, which take place when all 32 lanes have come. Beyond computing, it is
// strict: shared memory starts as NaN, an asynchronous copy leaves NaN until it is waited for,
// misaligned copies, bank conflicts of ldmatrix and deadlocks abort. The tensor core aligns the
// accumulator and 16 products to the largest of them, cuts each to 2^-23 of it and then their sum:
// the model that csrc/kmeans_assign_rows.cuh takes its bound from.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- runtime API
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulation {

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kSharedBytes = 256 << 10;
inline int device_attributes[3] = {4, 228 << 10, 227 << 10};
inline std::map<const void*, int> launches;  // so far, of each kernel

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_emulation: %s\n", what);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;
  int valid;
};

struct Thread {
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = true;
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;                 // not yet committed
};

struct Meeting {  // of a block or of a warp
  int arrived = 0;
  uint64_t generation = 0;
  void* slots[32] = {};
};

struct State {
  dim3 thread, block, grid_size, block_size;
  Thread threads[kMaxThreads];
  Meeting barrier, warps[kMaxThreads / 32];
  int current = 0, alive = 0;
  uint64_t progress = 0;
  jmp_buf scheduler;
  std::function<void()> body;
  alignas(128) unsigned char shared[kSharedBytes];
};
inline State state;

__attribute__((noinline)) inline void give_way() {
  if (_setjmp(state.threads[state.current].resume) == 0) _longjmp(state.scheduler, 1);
}

inline void thread_main() {
  for (;;) {
    state.body();
    state.threads[state.current].done = true;
    --state.alive;
    ++state.progress;
    give_way();
  }
}

__attribute__((noinline)) inline void resume(int index) {
  Thread& t = state.threads[index];
  state.current = index;
  state.thread = dim3(static_cast<unsigned>(index), 0, 0);
  if (_setjmp(state.scheduler) != 0) return;
  if (t.started) _longjmp(t.resume, 1);
  t.started = true;
  getcontext(&t.start);
  t.start.uc_stack.ss_sp = std::malloc(kStackBytes);
  t.start.uc_stack.ss_size = kStackBytes;
  t.start.uc_link = nullptr;
  makecontext(&t.start, thread_main, 0);
  setcontext(&t.start);
}

inline void run_block(int threads) {
  std::memset(state.shared, 0xff, kSharedBytes);
  state.barrier = {};
  for (Meeting& w : state.warps) w = {};
  for (int i = 0; i < threads; ++i) {
    state.threads[i].done = false;
    state.threads[i].groups.clear();
    state.threads[i].open.clear();
  }
  state.alive = threads;
  while (state.alive > 0) {
    const uint64_t before = state.progress;
    for (int i = 0; i < threads; ++i) {
      if (!state.threads[i].done) resume(i);
    }
    if (state.progress == before) fail("deadlock: threads wait for others that never come");
  }
}

// All 32 lanes bring an argument; the last one runs `act` on all of them.
template <typename T, typename F>
void warp_wide(T* mine, F act) {
  Meeting& warp = state.warps[state.current / 32];
  warp.slots[state.current % 32] = mine;
  const uint64_t generation = warp.generation;
  if (++warp.arrived == 32) {
    act(reinterpret_cast<T**>(warp.slots));
    warp.arrived = 0;
    ++warp.generation;
    ++state.progress;
    return;
  }
  while (warp.generation == generation) give_way();
}

template <typename T>
struct Exchange {
  T value, result;
  int argument;
};

template <typename T, typename F>
T exchange(T value, int argument, F rule) {  // rule(all lanes, lane) -> result
  Exchange<T> mine{value, value, argument};
  warp_wide(&mine, [&](Exchange<T>** all) {
    for (int lane = 0; lane < 32; ++lane) all[lane]->result = rule(all, lane);
  });
  return mine.result;
}

template <typename To, typename From>
To bits_as(From x) {
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}

// fp32 by dropping the fraction's last 29 bits.
inline double cut_to_float(double x) {
  return x != x ? x : bits_as<double>(bits_as<uint64_t>(x) & ~((uint64_t{1} << 29) - 1));
}

}  // namespace emulation

#define threadIdx (emulation::state.thread)
#define blockIdx (emulation::state.block)
#define gridDim (emulation::state.grid_size)
#define blockDim (emulation::state.block_size)

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = emulation::device_attributes[attribute];
  return cudaSuccess;
}
template <typename F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

// ---- 16-bit floats
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline float __uint_as_float(unsigned x) { return emulation::bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return emulation::bits_as<unsigned>(x); }
inline float __bfloat162float(__nv_bfloat16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned u = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
  return static_cast<float>(emulation::bits_as<_Float16>(x.bits));
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t x) { return {x}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }

// ---- threads
inline void __syncthreads() {
  emulation::Meeting& barrier = emulation::state.barrier;
  const uint64_t generation = barrier.generation;
  ++barrier.arrived;
  while (barrier.generation == generation) {
    if (barrier.arrived == emulation::state.alive) {
      barrier.arrived = 0;
      ++barrier.generation;
      ++emulation::state.progress;
      return;
    }
    emulation::give_way();
  }
}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulation::exchange(value, source,
                             [](auto** all, int i) { return all[all[i]->argument & 31]->value; });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, emulation::state.current % 32 ^ lanes);
}
inline bool __any_sync(unsigned, bool value) {
  return emulation::exchange(value, 0, [](auto** all, int) {
    return std::any_of(all, all + 32, [](auto* lane) { return lane->value; });
  });
}
inline bool __all_sync(unsigned mask, bool value) { return !__any_sync(mask, !value); }
inline float __fdiv_rn(float a, float b) { return a / b; }
template <typename T>
T atomicAdd(T* to, T value) {
  const T old = *to;
  *to += value;
  return old;
}
template <typename T>
T atomicMax(T* to, T value) {
  const T old = *to;
  *to = max(old, value);
  return old;
}

// ---- csrc/device.cuh
namespace protoclip {

inline void copy_async_16(void* shared, const void* global, int valid) {
  const auto to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
  if (to % 16 != 0 || from % 16 != 0) emulation::fail("misaligned asynchronous copy");
  std::memset(shared, 0xff, 16);
  emulation::state.threads[emulation::state.current].open.push_back({shared, global, valid});
}

inline void copy_async_commit() {
  emulation::Thread& t = emulation::state.threads[emulation::state.current];
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

template <int kPending>
void copy_async_wait() {
  auto& groups = emulation::state.threads[emulation::state.current].groups;
  while (groups.size() > static_cast<size_t>(kPending)) {
    for (const emulation::Copy& c : groups.front()) {
      std::memset(c.to, 0, 16);
      std::memcpy(c.to, c.from, static_cast<size_t>(c.valid));
    }
    groups.erase(groups.begin());
  }
}

inline void load_matrix_x4(uint32_t (&r)[4], const void* shared_row) {
  struct Lane {
    const unsigned char* row;
    uint32_t* r;
  } mine{static_cast<const unsigned char*>(shared_row), r};
  emulation::warp_wide(&mine, [](Lane** all) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned banks = 0;
      for (int i = 0; i < 8; ++i) {
        const auto address = reinterpret_cast<uintptr_t>(all[matrix * 8 + i]->row);
        if (address % 16 != 0) emulation::fail("misaligned ldmatrix row");
        banks |= 1u << address / 16 % 8;
      }
      if (banks != 0xff) emulation::fail("bank conflict in ldmatrix");
      for (int lane = 0; lane < 32; ++lane) {
        std::memcpy(&all[lane]->r[matrix], all[matrix * 8 + lane / 4]->row + lane % 4 * 4, 4);
      }
    }
  });
}

template <bool kHalf>
void mma_16x8x16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* acc;
    const uint32_t* a;
    uint32_t b[2];
  } mine{acc, a, {b0, b1}};
  emulation::warp_wide(&mine, [](Lane** all) {
    const auto value = [](uint32_t word, int i) {
      const auto bits = static_cast<uint16_t>(word >> 16 * i);
      return kHalf ? __half2float({bits}) : __bfloat162float({bits});
    };
    double x[16][16], y[16][8], sums[16][8];  // a, b transposed, the result
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      for (int part = 0; part < 4; ++part) {
        for (int i = 0; i < 2; ++i) {
          x[row + part % 2 * 8][column + part / 2 * 8 + i] = value(all[lane]->a[part], i);
          if (part < 2) y[column + part * 8 + i][row] = value(all[lane]->b[part], i);
          sums[row + part / 2 * 8][column + i] = all[lane]->acc[part / 2 * 2 + i];
        }
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int i = 0; i < 8; ++i) {
        double addends[17], largest = std::fabs(sums[row][i]), sum = 0;
        addends[16] = sums[row][i];
        for (int k = 0; k < 16; ++k) {
          addends[k] = x[row][k] * y[k][i];
          largest = std::max(largest, std::fabs(addends[k]));
        }
        const double unit = std::ldexp(1, std::max(std::ilogb(largest), -126) - 23);
        for (const double addend : addends) {
          sum += largest > 0 && std::isfinite(largest) ? std::trunc(addend / unit) * unit : addend;
        }
        sums[row][i] = emulation::cut_to_float(sum);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) {
        all[lane]->acc[i] = static_cast<float>(sums[row + i / 2 * 8][column + i % 2]);
      }
    }
  });
}

inline unsigned char* dynamic_shared() { return emulation::state.shared; }

template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t,
                   A... args) {
  emulation::State& s = emulation::state;
  const auto limit =
      static_cast<size_t>(emulation::device_attributes[cudaDevAttrMaxSharedMemoryPerBlockOptin]);
  if (shared_bytes > limit || threads % 32 != 0 || threads > emulation::kMaxThreads ||
      grid.x == 0 || grid.y == 0 || grid.y > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  ++emulation::launches[reinterpret_cast<const void*>(kernel)];
  s.body = [&] { kernel(static_cast<P>(args)...); };
  s.grid_size = grid;
  s.block_size = dim3(static_cast<unsigned>(threads));
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      s.block = dim3(x, y);
      emulation::run_block(threads);
    }
  }
  return cudaSuccess;
}

}  // namespace protoclip
