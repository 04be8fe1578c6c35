// csrc/int8_tile.h in whatever vector width this file is compiled for, to be called by ctypes.
#include "../../csrc/kmeans_screen.h"

using namespace protoclip;

extern "C" {

int SIZES[] = {int8::kLanes, int8::kRows, int8::kColumns, int8::kLeftMax};

void tile(const uint8_t* left, int64_t depth, const int8_t* right, const int32_t* start,
          float* out) {
  const uint8_t* rows[int8::kRows];
  for (int r = 0; r < int8::kRows; ++r) rows[r] = left + r * depth;
  int8::tile(rows, right, start, depth, [&](auto i, int8::Int sum) {
    int8::store(out + i * int8::kLanes, int8::to_float(sum));
  });
}

uint32_t lanes(const float* x, const float* y, float* found) {
  found[0] = maximum(int8::load(x)), found[1] = sum(int8::load(x));
  return int8::mask_ge(int8::load(x), int8::load(y));
}

}  // extern "C"
