// What CUDA launchers take from their callers. No torch headers, no device code.
#pragma once

#ifdef PROTOCLIP_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

#include <cstddef>
#include <cstdint>

namespace protoclip {

enum class Dtype { kFloat32, kBfloat16, kFloat16 };

struct Matrix {
  const void* data;                   // [rows, columns]
  int64_t row_stride, column_stride;  // in elements
};

}  // namespace protoclip
