// What the entries require of their tensors, before they read them.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

namespace protoclip {

constexpr int64_t kAny = -1;  // a size that is not required
constexpr at::ScalarType kFloats[] = {at::kFloat, at::kBFloat16, at::kHalf};
constexpr at::ScalarType kSums[] = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};

inline void expect(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef sizes,
                   at::ArrayRef<at::ScalarType> dtypes) {
  const auto fits = [](int64_t expected, int64_t size) {
    return expected == kAny || expected == size;
  };
  const at::IntArrayRef got = t.sizes();
  TORCH_CHECK_VALUE(std::equal(sizes.begin(), sizes.end(), got.begin(), got.end(), fits) &&
                        std::find(dtypes.begin(), dtypes.end(), t.scalar_type()) != dtypes.end(),
                    op, ": expected ", name, " as ", dtypes, " of sizes ", sizes,
                    " (-1: any), got ", t.scalar_type(), " of ", got);
}

inline float number(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.numel() == 1 && t.is_floating_point(), op, ": expected ", name,
                    " as one floating-point number, got ", t.scalar_type(), " of ", t.sizes());
  return t.item<float>();
}

// Labels int64 [N] below k; of negative ones only `left_out`, if that is one.
inline void expect_labels(const char* op, const at::Tensor& labels, int64_t n, int64_t k,
                          int64_t left_out, const char* name = "labels") {
  expect(op, name, labels, {n}, at::kLong);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    const int64_t y = label[i * labels.stride(0)];
    TORCH_CHECK_VALUE((0 <= y && y < k) || y == left_out, op, ": expected ", name, " in [0, K) or ",
                      left_out, ", got ", y, " at row ", i, " for K = ", k);
  }
}

}  // namespace protoclip
