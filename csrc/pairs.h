// Which columns a row of a strip sees and which are its positives, tile by tile. Contract:
// protoclip/ops/pairs.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "strip.h"

namespace protoclip {

// All that is said of N rows and M columns: the fields of ``Compared``, in order.
struct PairArguments {
  int64_t offset = 0;
  std::optional<at::Tensor> query_ids, key_ids;
  bool same_positive = false;
  std::optional<at::Tensor> own_key, exclude, key_bias;

  bool plain() const { return !query_ids && !key_ids && !own_key && !exclude && !key_bias; }
};

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

  MatchedPairs(const char* op, int64_t n, int64_t m, const PairArguments& pairs)
      : same_positive_(pairs.same_positive),
        has_key_bias_(pairs.key_bias.has_value()),
        ids_(pairs.key_ids && pairs.key_ids->dim() > 0 ? pairs.key_ids->size(0) : 0),
        stride_(round_up(m, kLanes)),
        queries_(n),
        own_key_(n),
        exclude_(n, -1),
        query_ids_(2 * n, -1),
        key_ids_(2 * stride_, -2),  // no query's; also past the last
        key_bias_(stride_, 0.f) {
    const auto& [offset, query_ids, key_ids, same_positive, own_key, exclude, key_bias] = pairs;
    if (own_key) expect(op, "own_key", *own_key, {n}, at::kInt);
    if (exclude) expect(op, "exclude", *exclude, {n}, at::kInt);
    if (key_bias) expect(op, "key_bias", *key_bias, {m}, at::kFloat);
    TORCH_CHECK_VALUE(ids_ <= 2 && query_ids.has_value() == key_ids.has_value(), op,
                      ": expected query_ids and key_ids of one or two rows, or neither");
    if (key_ids) expect(op, "key_ids", *key_ids, {ids_, m}, at::kInt);
    if (key_ids) expect(op, "query_ids", *query_ids, {ids_, n}, at::kInt);
    for (int64_t i = 0; i < n; ++i) own_key_.get()[i] = i + offset;
    if (own_key) copy<int32_t>(*own_key, own_key_.get(), n);
    if (exclude) copy<int32_t>(*exclude, exclude_.get(), n);
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
