// Which columns a row of a strip sees and which are its positives, tile by tile. Contract:
// protoclip/ops/pairs.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "strip_gradient.h"

namespace protoclip {

// Row i sees all columns; its positive is column i + offset.
struct DiagonalPairs {
  static constexpr bool kMatched = false;
  int64_t offset;
  bool has_own(const TileRange& range) const { return range.has_positive(offset); }
};

// The logit of a column that a row does not see. It is finite, so that a tile without any other
// gives no NaN; what it adds to a sum goes with the first logit that is seen.
constexpr float kUnseen = -1e30f;

class MatchedPairs {
 public:
  static constexpr bool kMatched = true;
  struct Lanes {
    Ints unseen, positive;  // -1 where it is so
  };

  MatchedPairs(const char* op, int64_t n, int64_t m, const at::Tensor& own,
               const std::optional<at::Tensor>& exclude, const std::optional<at::Tensor>& query_ids,
               const std::optional<at::Tensor>& key_ids, const std::optional<at::Tensor>& key_bias,
               bool same_positive)
      : same_positive_(same_positive),
        has_bias_(key_bias.has_value()),
        ids_(key_ids.has_value() ? key_ids->size(0) : 0),
        stride_(round_up(m, kLanes)),
        queries_(n),
        own_(n),
        exclude_(n),
        query_ids_(ids_ * n),
        key_ids_(ids_ * stride_),
        bias_(stride_) {
    TORCH_CHECK(own.numel() == n &&
                    (ids_ == 0 || (query_ids->numel() == ids_ * n && key_ids->numel() == ids_ * m)),
                op, ": expected own [N] and ids [R, N] and [R, M]");
    copy<int32_t>(own, own_.get(), n);
    std::fill_n(exclude_.get(), n, -1);
    if (exclude.has_value()) copy<int32_t>(*exclude, exclude_.get(), n);
    for (int64_t r = 0; r < ids_; ++r) {
      copy<int32_t>((*query_ids)[r], query_ids_.get() + r * n, n);
      std::fill_n(key_ids_.get() + r * stride_, stride_, -2);  // past the last: no query's
      copy<int32_t>((*key_ids)[r], key_ids_.get() + r * stride_, m);
    }
    std::fill_n(bias_.get(), stride_, 0.f);
    if (has_bias_) {
      copy<float>(*key_bias, bias_.get(), m);
      for (int64_t j = 0; j < m; ++j) bias_.get()[j] *= kLog2E;
    }
  }

  bool has_bias() const { return has_bias_; }

  // Base-2 logits of the kLanes columns from `column` on, with their biases.
  Floats biased(Floats v, int64_t column) const {
    return has_bias_ ? v + load(bias_.get() + column) : v;
  }

  // Of a row and the kLanes columns from `column` on.
  Lanes at(int64_t row, int64_t column) const {
    const Ints same = same_ids(row, column);
    Lanes out{};
    (same_positive_ ? out.positive : out.unseen) = same;
    const int64_t own = own_.get()[row] - column, gone = exclude_.get()[row] - column;
    if (0 <= own && own < kLanes) out.positive[own] = -1, out.unseen[own] = 0;
    if (0 <= gone && gone < kLanes) out.unseen[gone] = -1;
    if (has_bias_) out.unseen |= load(bias_.get() + column) == broadcast(-kInfinity);
    out.positive &= ~out.unseen;
    return out;
  }

  // Whether the tile holds a row's own column.
  bool has_own(const TileRange& range) const {
    for (int64_t i = range.row; i < range.row + range.rows; ++i) {
      const int64_t own = own_.get()[i] - range.column;
      if (0 <= own && own < range.columns) return true;
    }
    return false;
  }

 private:
  template <typename T>
  static void copy(const at::Tensor& from, T* to, int64_t count) {
    std::copy_n(from.contiguous().const_data_ptr<T>(), count, to);
  }

  Ints same_ids(int64_t row, int64_t column) const {
    Ints same{};
    for (int64_t r = 0; r < ids_; ++r) {
      Ints keys;
      std::memcpy(&keys, key_ids_.get() + r * stride_ + column, sizeof keys);
      same |= keys == query_ids_.get()[r * queries_ + row];
    }
    return same;
  }

  bool same_positive_, has_bias_;
  int64_t ids_, stride_, queries_;
  Buffer<int32_t> own_, exclude_, query_ids_, key_ids_;
  Buffer<float> bias_;
};

}  // namespace protoclip
