// What csrc runs on ARM, where oneDNN's brgemm does not exist, without torch's library: the plain
// products, the vectors and the 8-bit tile, against sums in double. `make check-arm` runs it.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "../../csrc/gemm_tile.h"
#include "../../csrc/kmeans_screen.h"

using namespace protoclip;

namespace {

std::mt19937 random_bits(0);

std::vector<float> normal(int64_t count) {
  std::vector<float> out(count);
  std::normal_distribution<float> draw;
  for (float& v : out) v = draw(random_bits);
  return out;
}

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "wrong on this processor: %s\n", what);
  std::exit(1);
}

// C [m, n] = A B, or C + A B, for shapes with and without whole vectors and blocks of rows.
void check_products(int64_t m, int64_t n, int64_t k, bool accumulate) {
  const std::vector<float> a = normal(m * k), b = normal(k * n), before = normal(m * n);
  std::vector<float> c = before;
  multiply_plain(m, n, k, a.data(), k, b.data(), n, c.data(), n, accumulate);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double exact = accumulate ? before[i * n + j] : 0., size = std::abs(exact);
      for (int64_t p = 0; p < k; ++p) {
        const double term = double(a[i * k + p]) * b[p * n + j];
        exact += term, size += std::abs(term);
      }
      require(std::abs(c[i * n + j] - exact) <= (k + 1) * 6e-8 * size, "multiply_plain");
    }
}

void check_vectors() {
  const std::vector<float> x = normal(kLanes), y = normal(kLanes);
  const Floats powers = exp2(8.f * load(x.data())), most = larger(load(x.data()), load(y.data()));
  double total = 0;
  float top = x[0];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const double exact = std::exp2(double(8.f * x[lane]));
    require(std::abs(powers[lane] - exact) <= 1.2e-7 * exact, "exp2");
    require(most[lane] == std::max(x[lane], y[lane]), "larger");
    total += x[lane], top = std::max(top, x[lane]);
  }
  require(exp2(Floats{})[0] == 1.f && exp2(broadcast(-127.f))[0] == 0.f, "exp2 at its ends");
  require(std::abs(sum(load(x.data())) - total) <= 1e-5, "sum");
  require(maximum(load(x.data())) == top, "maximum");
}

void check_codes() {
  constexpr int64_t kDepth = 64;
  std::vector<uint8_t> left(int8::kRows * kDepth);
  std::vector<int8_t> right(kDepth * int8::kColumns);
  for (uint8_t& v : left) v = random_bits() % (2 * int8::kLeftMax + 2);
  for (int8_t& v : right) v = random_bits() % 255 - 127;
  const std::vector<int32_t> start(int8::kColumns, 7);
  std::vector<float> out(int8::kRows * int8::kColumns);
  int8::tile(left.data(), kDepth, right.data(), start.data(), kDepth, [&](auto i, int8::Int sums) {
    int8::store(out.data() + i * int8::kLanes, int8::to_float(sums));
  });
  for (int64_t r = 0; r < int8::kRows; ++r)
    for (int64_t c = 0; c < int8::kColumns; ++c) {
      int64_t exact = 7;
      for (int64_t p = 0; p < kDepth; ++p)
        exact += left[r * kDepth + p] * right[(p / 4 * int8::kColumns + c) * 4 + p % 4];
      require(out[r * int8::kColumns + c] == static_cast<float>(exact), "int8::tile");
    }
}

}  // namespace

int main() {
  for (const bool accumulate : {false, true})
    for (const int64_t m : {1, 6, 13})
      for (const int64_t n : {1, 16, 37})
        for (const int64_t k : {0, 1, 128}) check_products(m, n, k, accumulate);
  check_vectors();
  check_codes();
  std::puts("csrc's plain kernels are right on this processor");
}
