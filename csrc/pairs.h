// Which columns a row of a strip sees and which are its positives, tile by tile. Contract:
// protoclip/ops/pairs.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "strip.h"

namespace protoclip {

// Row i sees all columns; its positive is column i + offset.
struct DiagonalPairs {
  static constexpr bool kMatched = false;
  int64_t offset;
  bool has_own(const TileRange& range) const { return range.has_positive(offset); }
  struct Row {};
  Row row(int64_t) const { return {}; }
};

// The logit of a column that a row does not see. It is finite, so that a tile without any other
// gives no NaN; what it adds to a sum goes with the first logit that is seen.
constexpr float kUnseen = -1e30f;

// Masks over kLanes consecutive columns: -1 where true.
struct Lanes {
  Ints unseen, positive;
};

class MatchedPairs {
 public:
  static constexpr bool kMatched = true;

  // The ids, positions and biases of one row. Construct it outside the loop over columns, so that
  // it stays in registers.
  struct Row {
    Ints ids[2], own_key, exclude, same_unseen;  // the last: -1 where columns of its ids are unseen
    const int32_t* keys[2];                      // [M]; the second is null where there is one id
    const float* key_bias;                       // [M] in base 2, or null

    // Base-2 logits of the kLanes columns from `column` on, with their biases.
    Floats biased(Floats v, int64_t column) const {
      return key_bias == nullptr ? v : v + load(key_bias + column);
    }

    Lanes at(int64_t column) const {
      const Ints lanes = kLaneNumbers + static_cast<int32_t>(column);
      Ints same = load(keys[0] + column) == ids[0];
      if (keys[1] != nullptr) same |= load(keys[1] + column) == ids[1];
      const Ints is_own = lanes == own_key;
      Ints unseen = (same & same_unseen & ~is_own) | (lanes == exclude);
      if (key_bias != nullptr) unseen |= load(key_bias + column) == broadcast(-kInfinity);
      return {unseen, ((same & ~same_unseen) | is_own) & ~unseen};
    }
  };

  // Without `own_key` row i's own column is column i + offset.
  MatchedPairs(const char* op, int64_t n, int64_t m, const std::optional<at::Tensor>& own_key,
               int64_t offset, const std::optional<at::Tensor>& exclude,
               const std::optional<at::Tensor>& query_ids, const std::optional<at::Tensor>& key_ids,
               const std::optional<at::Tensor>& key_bias, bool same_positive)
      : same_positive_(same_positive),
        has_key_bias_(key_bias.has_value()),
        ids_(key_ids.has_value() ? key_ids->size(0) : 0),
        stride_(round_up(m, kLanes)),
        queries_(n),
        own_key_(n),
        exclude_(n, -1),
        query_ids_(2 * n, -1),
        key_ids_(2 * stride_, -2),  // no query's; also past the last
        key_bias_(stride_, 0.f) {
    TORCH_CHECK((!own_key.has_value() || own_key->numel() == n) && ids_ <= 2 &&
                    (ids_ == 0 || (query_ids->numel() == ids_ * n && key_ids->numel() == ids_ * m)),
                op, ": expected own_key [N] and ids [R, N] and [R, M], R <= 2");
    if (own_key.has_value()) copy<int32_t>(*own_key, own_key_.get(), n);
    for (int64_t i = 0; !own_key.has_value() && i < n; ++i) own_key_.get()[i] = i + offset;
    if (exclude.has_value()) copy<int32_t>(*exclude, exclude_.get(), n);
    for (int64_t r = 0; r < ids_; ++r) {
      copy<int32_t>((*query_ids)[r], query_ids_.get() + r * n, n);
      copy<int32_t>((*key_ids)[r], key_ids_.get() + r * stride_, m);
    }
    if (has_key_bias_) {
      copy<float>(*key_bias, key_bias_.get(), m);
      for (int64_t j = 0; j < m; ++j) key_bias_.get()[j] *= kLog2E;
    }
  }

  bool has_key_bias() const { return has_key_bias_; }

  Row row(int64_t i) const {
    const int32_t *ids = query_ids_.get() + i, *keys = key_ids_.get();
    return {{broadcast(ids[0]), broadcast(ids[queries_])},
            broadcast(own_key_.get()[i]),
            broadcast(exclude_.get()[i]),
            broadcast(same_positive_ ? 0 : -1),
            {keys, ids_ == 2 ? keys + stride_ : nullptr},
            has_key_bias_ ? key_bias_.get() : nullptr};
  }

  // Whether the tile holds a row's own column.
  bool has_own(const TileRange& range) const {
    for (int64_t i = range.row; i < range.row + range.rows; ++i) {
      const int64_t column = own_key_.get()[i] - range.column;
      if (0 <= column && column < range.columns) return true;
    }
    return false;
  }

 private:
  template <typename T>
  static void copy(const at::Tensor& from, T* to, int64_t count) {
    std::copy_n(from.contiguous().const_data_ptr<T>(), count, to);
  }

  bool same_positive_, has_key_bias_;
  int64_t ids_, stride_, queries_;
  Buffer<int32_t> own_key_, exclude_, query_ids_, key_ids_;
  Buffer<float> key_bias_;
};

}  // namespace protoclip
