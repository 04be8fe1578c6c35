// Checks csrc/int8_tile.h against scalar loops, for whatever vector width this file is compiled
// with: the op's own tests see the machine's only. Exit status 0: all is well.
#include <cstdio>
#include <random>
#include <vector>

#include "../csrc/kmeans_screen.h"

using namespace protoclip;

namespace {

std::mt19937 rng(0);
int failures = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  std::printf("wrong: %s\n", what);
  ++failures;
}

// Extreme codes included: with them a saturating instruction would show.
void check_tile(int64_t depth, bool extreme) {
  constexpr int OFFSET = screen::OFFSET;
  std::uniform_int_distribution<int> left_code(-int8::LEFT_MAX, int8::LEFT_MAX),
      right_code(-127, 127);
  std::vector<uint8_t> left(int8::ROWS * depth);
  std::vector<int8_t> right(depth * int8::COLS);
  std::vector<int32_t> start(int8::COLS);
  for (auto& x : left) x = OFFSET + (extreme ? int8::LEFT_MAX : left_code(rng));
  for (auto& x : right) x = extreme ? 127 : right_code(rng);
  for (auto& x : start) x = right_code(rng) * 1000;
  std::vector<float> got(int8::ROWS * int8::COLS);
  int8::tile(left.data(), depth, right.data(), start.data(), depth, [&](auto i, int8::Int sum) {
    int8::store(got.data() + i * int8::LANES, int8::to_float(sum));
  });
  for (int r = 0; r < int8::ROWS; ++r)
    for (int c = 0; c < int8::COLS; ++c) {
      int64_t want = start[c];
      for (int64_t j = 0; j < depth; ++j)
        want += left[r * depth + j] * right[(j / 4 * int8::COLS + c) * 4 + j % 4];
      expect(got[r * int8::COLS + c] == static_cast<float>(want), "tile");
    }
}

void check_lanes() {
  std::vector<float> x(int8::LANES), y(int8::LANES);
  std::normal_distribution<float> normal;
  for (int i = 0; i < int8::LANES; ++i) x[i] = normal(rng), y[i] = i % 3 ? normal(rng) : x[i];
  uint32_t mask = 0;
  float top = x[0], sum = 0;
  for (int i = 0; i < int8::LANES; ++i) {
    mask |= uint32_t{x[i] >= y[i]} << i;
    top = std::max(top, x[i]);
    sum += x[i];
  }
  expect(int8::mask_ge(int8::load(x.data()), int8::load(y.data())) == mask, "mask_ge");
  expect(maximum(int8::load(x.data())) == top, "maximum");
  expect(std::abs(protoclip::sum(int8::load(x.data())) - sum) < 1e-4f, "sum");
}

}  // namespace

int main() {
  for (int64_t depth : {4, 12, 256, 1024}) check_tile(depth, false), check_tile(depth, true);
  check_lanes();
  std::printf("lanes %d\n", int8::LANES);
  return failures > 0;
}
