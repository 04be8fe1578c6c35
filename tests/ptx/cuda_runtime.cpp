// The functions of the CUDA runtime that csrc/*.cu calls; launches go to a Python callback.
#include <cstdint>
#include <cstring>
#include <map>
#include <string>

struct Dim3 {
  unsigned x, y, z;
};

using Callback = int (*)(const char* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                         unsigned threads_x, unsigned threads_y, void** args, size_t shared);

namespace {

enum Attribute { kProcessors = 16, kSharedOfProcessor = 81, kSharedOfBlock = 97 };

Callback callback;
std::map<int, int> attributes;

struct {
  Dim3 grid, block;
  size_t shared;
  void* stream;
} configuration;

// Kernels register themselves before other constructors run.
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> by_function;
  return by_function;
}

}  // namespace

extern "C" {

void set_callback(Callback f) { callback = f; }

void set_device(int processors, int shared_of_processor, int shared_of_block) {
  attributes = {{kProcessors, processors},
                {kSharedOfProcessor, shared_of_processor},
                {kSharedOfBlock, shared_of_block}};
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void**) {}

char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  names()[host] = name;
}

void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}

int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void** stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *stream = configuration.stream;
  return 0;
}

int cudaLaunchKernel(const void* f, Dim3 grid, Dim3 block, void** args, size_t shared, void*) {
  return callback(names()[f].c_str(), grid.x, grid.y, grid.z, block.x, block.y * block.z, args,
                  shared);
}

int __cudaGetKernel(void** kernel, const void* f) {
  *kernel = const_cast<void*>(f);
  return 0;
}

int __cudaLaunchKernel(void* f, Dim3 grid, Dim3 block, void** args, size_t shared, void* stream) {
  return cudaLaunchKernel(f, grid, block, args, shared, stream);
}

int __cudaLaunchKernel_ptsz(void* f, Dim3 grid, Dim3 block, void** args, size_t shared,
                            void* stream) {
  return cudaLaunchKernel(f, grid, block, args, shared, stream);
}

int cudaGetLastError() { return 0; }

int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}

int cudaDeviceGetAttribute(int* value, int attribute, int) {
  const auto found = attributes.find(attribute);
  *value = found == attributes.end() ? -1 : found->second;
  return found == attributes.end();
}

int cudaFuncSetAttribute(const void*, int, int) { return 0; }

int cudaMemsetAsync(void* at, int value, size_t bytes, void*) {
  memset(at, value, bytes);
  return 0;
}
}
