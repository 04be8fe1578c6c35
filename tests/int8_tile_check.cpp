// Checks csrc/int8_tile.h and csrc/kmeans_screen.h against scalar loops, for whatever vector width
// this file is compiled with. Exit status 0: all is well.
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
  expect(int8::max_lane(int8::load(x.data())) == top, "max_lane");
  const int8::Float both = int8::add(int8::load(x.data()), int8::load(y.data()));
  expect(int8::max_lane(int8::sub(both, int8::load(y.data()))) > top - 1e-4f, "add");
  expect(std::abs(int8::sum_lanes(int8::load(x.data())) - sum) < 1e-4f, "sum_lanes");
}

// The rotation keeps norms and inner products and flattens a peak; codes err by what they say.
void check_codes(int64_t d) {
  std::vector<float> x(d), y(d, 0.0f), centred(d);
  std::normal_distribution<float> normal;
  for (auto& value : x) value = normal(rng);
  y[d / 3] = 5;
  const auto dot = [d](const std::vector<float>& a, const std::vector<float>& b) {
    double sum = 0;
    for (int64_t j = 0; j < d; ++j) sum += static_cast<double>(a[j]) * b[j];
    return sum;
  };
  const double from_y = screen::centre(x.data(), y.data(), d, centred.data());
  expect(std::abs(from_y - dot(centred, centred)) <= 1e-6 * from_y, "centre: norm");
  for (int64_t j = 0; j < d; ++j) expect(centred[j] == x[j] - y[j], "centre: row");
  const double before = dot(x, y), square = dot(x, x);
  const screen::Rotation rotation(d);
  rotation(x.data());
  rotation(y.data());
  expect(std::abs(dot(x, y) - before) < 1e-4 * d, "rotation: inner product");
  expect(std::abs(dot(x, x) - square) < 1e-5 * square, "rotation: norm");
  if (d >= 64) expect(screen::peak(y.data(), d) < 2.6f, "rotation: peak");
  std::vector<int8_t> codes(d);
  const auto coded = screen::encode(x.data(), d, 127, 0, 1e-30f, codes.data());
  double error = 0, norm = 0;
  for (int64_t j = 0; j < d; ++j) {
    error += std::pow(x[j] - coded.scale * codes[j], 2);
    norm += std::pow(coded.scale * codes[j], 2);
  }
  expect(std::abs(std::sqrt(norm) - coded.norm) <= 1e-6 * coded.norm, "encode: norm");
  expect(std::abs(std::sqrt(error) - coded.error) <= 1e-4 * coded.error + 1e-7, "encode: error");
  expect(coded.error <= coded.scale / 2 * std::sqrt(d) * 1.001, "encode: half a step");
}

}  // namespace

int main() {
  for (int64_t depth : {4, 12, 256, 1024}) check_tile(depth, false), check_tile(depth, true);
  check_lanes();
  for (int64_t d : {1, 2, 3, 17, 64, 100, 256, 768}) check_codes(d);
  std::printf("lanes %d\n", int8::LANES);
  return failures > 0;
}
