// InfoNCE, the contrastive loss and the sigmoid loss on the CPU: the statistics of a strip, and its
// gradients. Contracts: ops/softmax.py, ops/siglip_loss.py.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "cpu_ops.h"
#include "strip_gradient.h"
#include "strip_statistics.h"

namespace protoclip {
namespace {

constexpr double kLn2 = 0.6931471805599453;

// What the rows or the columns bring into G: their references, their weights over their sums, and
// the weights of their positives. One without a loss brings zeros.
struct GradientSide {
  Buffer<float> reference, probability_weight, positive_weight;

  // Of statistics of `length`, or [4, 0], and the weights of the gap and of the mean positive
  // (none: 0).
  GradientSide(const Tensor& statistics, const Tensor& gap_weights, const Optional& mean_weights,
               float pair_weight, int64_t length)
      : reference(round_up(length, kLanes), 0.f),
        probability_weight(round_up(length, kLanes), 0.f),
        positive_weight(round_up(length, kLanes), 0.f) {
    const Tensor gap = gap_weights.to(at::kFloat).contiguous();
    const Tensor mean = mean_weights.has_value() ? mean_weights->to(at::kFloat).contiguous() : gap;
    const Tensor rows = statistics.contiguous();
    const float *max = row_of(rows, kMaxRow), *sum = row_of(rows, kSumRow),
                *num_positives = row_of(rows, kNumPositivesRow);
    const float *gap_weight = gap.const_data_ptr<float>(),
                *mean_weight = mean.const_data_ptr<float>();
    for (int64_t i = 0; i < gap.size(0); ++i) {
      const float lse_weight = gap_weight[i] * pair_weight;  // gap = LSE - mean
      const float of_mean = mean_weights.has_value() ? mean_weight[i] * pair_weight : 0.f;
      if (sum[i] != 0.f) {
        reference.get()[i] = max[i];
        probability_weight.get()[i] = lse_weight / sum[i];
      }
      positive_weight.get()[i] = (of_mean - lse_weight) / std::max(num_positives[i], 1.f);
    }
  }
};

// Turns dot products into G = row weight P_row + column weight P_column + weights at positives.
template <typename Pairs>
struct SoftmaxGradient {
  const GradientSide &by_row, &by_column;
  bool both_directions;  // whether columns have a loss too
  Base2 base2;
  const Pairs& pairs;
  float* dkey_bias = nullptr;  // [M], to which the column sums of G are added, or null

  GradientSums operator()(const GradientTile& tile) const {
    if (pairs.has_own(tile)) return exact(tile);
    const float* row = by_row.reference.get() + tile.row;
    const auto rows = std::minmax_element(row, row + tile.rows);
    float low = *rows.first, high = *rows.second;
    if (both_directions) {
      const float* column = by_column.reference.get() + tile.column;
      const auto columns = std::minmax_element(column, column + tile.columns);
      low = std::min(low, *columns.first), high = std::max(high, *columns.second);
    }
    return high - low <= kSpread ? shared(tile, low) : exact(tile);
  }

  // `weigh(i, j, v) -> G` on vectors of base-2 logits, for all of the tile.
  template <typename Weigh>
  GradientSums each(const GradientTile& tile, const Weigh& weigh) const {
    GradientSums sums;
    alignas(64) float bias_sums[GradientTile::kColumns];
    if (Pairs::kMatched && dkey_bias != nullptr) std::fill_n(bias_sums, tile.columns, 0.f);
    Floats g_dot{};
    for (int64_t i = 0; i < tile.rows; ++i) {
      const float* dots = tile.dots + i * tile.ld_dots;
      float* out = tile.g + i * tile.ld;
      const auto row_pairs = pairs.row(tile.row + i);
      const float row_positive = Pairs::kMatched ? by_row.positive_weight.get()[tile.row + i] : 0.f;
      for (int64_t j = 0; j < tile.columns; j += kLanes) {
        __builtin_prefetch(dots + kRowsAhead * tile.ld_dots + j);
        const Floats dot = first_lanes(load(dots + j), tile.columns - j);
        Floats g;
        if constexpr (Pairs::kMatched) {
          g = weigh(i, j, row_pairs.biased(base2(dot), tile.column + j));
          const Lanes lanes = row_pairs.at(tile.column + j);
          const Floats positive =
              row_positive + load(by_column.positive_weight.get() + tile.column + j);
          g = (lanes.unseen ? Floats{} : g) + (lanes.positive ? positive : Floats{});
        } else {
          g = weigh(i, j, base2(dot));
        }
        g = first_lanes(g, tile.columns - j);
        g_dot += g * dot;
        store(out + j, g);
        if (Pairs::kMatched && dkey_bias != nullptr) store(bias_sums + j, load(bias_sums + j) + g);
      }
      if (i % kSummedRows == kSummedRows - 1 || i + 1 == tile.rows)
        sums.g_dot += sum(g_dot), g_dot = Floats{};
    }
    // A column belongs to one thread, and its rows come in order.
    for (int64_t j = 0; Pairs::kMatched && dkey_bias != nullptr && j < tile.columns; ++j)
      dkey_bias[tile.column + j] += bias_sums[j];
    return sums;
  }

  GradientSums shared(const GradientTile& tile, float low) const {
    const Floats reference = broadcast(low);
    alignas(64) float rows[GradientTile::kRows], columns[GradientTile::kColumns] = {};
    factors(by_row, tile.row, tile.rows, reference, rows);
    if (both_directions)  // without, 0 times what may be infinite
      factors(by_column, tile.column, tile.columns, reference, columns);
    return each(tile, [&](int64_t i, int64_t j, Floats v) {
      return exp2(v - reference) * (load(columns + j) + rows[i]);
    });
  }

  static void factors(const GradientSide& side, int64_t first, int64_t count, Floats reference,
                      float* out) {
    for (int64_t i = 0; i < count; i += kLanes)
      store(out + i, load(side.probability_weight.get() + first + i) *
                         exp2(reference - load(side.reference.get() + first + i)));
  }

  GradientSums exact(const GradientTile& tile) const {
    const float *row_reference = by_row.reference.get() + tile.row,
                *row_factor = by_row.probability_weight.get() + tile.row,
                *column_reference = by_column.reference.get() + tile.column,
                *column_factor = by_column.probability_weight.get() + tile.column;
    return each(tile, [&](int64_t i, int64_t j, Floats v) {
      Floats g = exp2(v - row_reference[i]) * row_factor[i];
      if (both_directions) g += exp2(v - load(column_reference + j)) * load(column_factor + j);
      if constexpr (!Pairs::kMatched) {
        const int64_t p = tile.row + i + pairs.offset - tile.column - j;  // the positive's lane
        if (0 <= p && p < kLanes) {
          const int64_t row = tile.row + i;
          g[p] += by_row.positive_weight.get()[row] +
                  by_column.positive_weight.get()[row + pairs.offset];
        }
      }
      return g;
    });
  }

  // Rows of a stash lie too far apart for the processor to foresee the next.
  static constexpr int64_t kRowsAhead = 8;
  static constexpr int64_t kSummedRows = 8;  // in fp32, before they move to fp64
};

// The stash in `memory`, plain bytes, or none.
Stash stash_of(const char* op, const Optional& memory, const Inputs& in) {
  if (!memory.has_value()) return {};
  const int64_t num_bytes = Stash::num_bytes(in.x.size(0), in.y.size(0));
  expect(op, "stash", *memory, {num_bytes}, at::kByte);
  TORCH_CHECK_VALUE(memory->is_contiguous(), op, ": expected a contiguous stash");
  return {static_cast<float*>(memory->mutable_data_ptr()), in.y.size(0)};
}

// Calls f with the pairs: ids, positions and biases are compared only where there are any.
template <typename F>
auto with_pairs(const char* op, const Inputs& in, const PairArguments& pairs, const F& f) {
  if (pairs.plain()) return f(DiagonalPairs{pairs.offset});
  return f(MatchedPairs(op, in.x.size(0), in.y.size(0), pairs));
}

template <typename Pairs>
GradientSums backward(const Inputs& in, const SoftmaxGradient<Pairs>& epilogue, Stash stash,
                      Gradients& out) {
  return in.dispatch([&](auto a) {
    const Strip<decltype(a)::value> strip(in.x, in.y);
    using Pass = GradientPass<decltype(a)::value>;
    using Input = typename Operands<decltype(a)::value>::Input;
    return Pass::run(strip, epilogue, in.logit_scale, out.dx.mutable_data_ptr<Input>(),
                     out.dy.mutable_data_ptr<Input>(), Pass::kDefaultChain, stash);
  });
}

// LSE - mean positive, in base 2, of each of `size` rows or columns; and the mean positives, where
// there is room for them. The loop adds up what tensor operations would.
Tensor gaps(const Tensor& statistics, int64_t size, float* positive_mean = nullptr) {
  const Tensor out = statistics.select(0, kSumRow).narrow(0, 0, size).log2();
  float* gap = out.mutable_data_ptr<float>();
  const float *max = row_of(statistics, kMaxRow), *sums = row_of(statistics, kPositiveSumRow),
              *counts = row_of(statistics, kNumPositivesRow);
  for (int64_t i = 0; i < size; ++i) {
    const float mean = sums[i] / std::max(counts[i], 1.f);
    gap[i] += max[i] - mean;
    if (positive_mean != nullptr) positive_mean[i] = mean;
  }
  return out;
}

Tensor scalar(double value) { return at::full({}, value, at::TensorOptions(at::kFloat)); }

}  // namespace

Tensor empty_stash(int64_t num_bytes) { return pooled_empty({num_bytes}, at::kByte); }

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_fwd(const Tensor& x, const Tensor& y,
                                                           const Tensor& logit_scale,
                                                           const PairArguments& pairs,
                                                           bool both_directions, double pair_weight,
                                                           bool summed, const Optional& stash) {
  const char* op = "contrastive_fwd";
  const Inputs in(op, x, y, logit_scale);
  const Stash kept = stash_of(op, stash, in);
  const auto [rows, columns] = with_pairs(op, in, pairs, [&](const auto& compared) {
    return in.dispatch([&](auto a) {
      constexpr Arithmetic kArithmetic = decltype(a)::value;
      using Pairs = std::decay_t<decltype(compared)>;
      const Strip<kArithmetic> strip(in.x, in.y);
      return Statistics<kArithmetic, Pairs>(strip, Base2(in.logit_scale), compared, both_directions,
                                            kept)
          .run();
    });
  });
  Tensor means = at::empty({summed || both_directions ? 0 : x.size(0)}, at::kFloat);
  Tensor loss =
      gaps(rows, x.size(0), means.numel() > 0 ? means.mutable_data_ptr<float>() : nullptr);
  if (both_directions && x.size(0) == y.size(0)) loss += gaps(columns, y.size(0));
  if (summed) loss = loss.sum();
  return {loss * (kLn2 * pair_weight), means * kLn2, rows, columns};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_bwd(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale, const PairArguments& pairs,
    const Tensor& row_statistics, const Tensor& column_statistics, const Tensor& query_weight,
    const Optional& positive_mean_weight, const Tensor& key_weight, double pair_weight,
    const Optional& stash) {
  const char* op = "contrastive_bwd";
  const Inputs in(op, x, y, logit_scale);
  const bool both_directions = column_statistics.numel() > 0;
  const int64_t n = x.size(0), m = y.size(0), num_columns = both_directions ? m : 0;
  expect(op, "row_statistics", row_statistics, {4, statistics_length(n)}, at::kFloat);
  expect(op, "column_statistics", column_statistics, {4, statistics_length(num_columns)},
         at::kFloat);
  expect(op, "query_weight", query_weight, {n}, kSums);
  if (positive_mean_weight) expect(op, "positive_mean_weight", *positive_mean_weight, {n}, kSums);
  expect(op, "key_weight", key_weight, {num_columns}, kSums);
  const float weight = static_cast<float>(pair_weight);
  const GradientSide row(row_statistics, query_weight, positive_mean_weight, weight, n);
  const GradientSide column(column_statistics, key_weight, {}, weight, m);
  Tensor dkey_bias = at::zeros({pairs.key_bias ? m : 0}, at::kFloat);
  float* bias_sums = pairs.key_bias ? dkey_bias.mutable_data_ptr<float>() : nullptr;
  Gradients out(in);
  const GradientSums sums = with_pairs(op, in, pairs, [&](const auto& compared) {
    const SoftmaxGradient<std::decay_t<decltype(compared)>> epilogue{
        row, column, both_directions, Base2(in.logit_scale), compared, bias_sums};
    return backward(in, epilogue, stash_of(op, stash, in), out);
  });
  return {out.finish(out.dx, x), out.finish(out.dy, y), scalar(sums.g_dot), dkey_bias};
}

namespace {

// ---- the sigmoid loss: sum of softplus(-z l), l = logit_scale x.y + logit_bias, z = 1 at
// ---- positives, else -1. No row or column statistics, so loss and gradients come from one pass: 3
// ---- products, not 4.

// log(1 + u) for u in [0, 1], as 2 atanh(z): relative error below 1e-7.
inline Floats log1p(Floats u) {
  const Floats z = u / (u + 2.f), w = z * z;
  Floats p = broadcast(1.f / 15);
  for (int k = 13; k >= 1; k -= 2) p = p * w + 1.f / k;
  return 2.f * z * p;
}

template <typename Pairs>
struct SigmoidGradient {
  float logit_scale, logit_bias;
  const Pairs& pairs;

  GradientSums operator()(const GradientTile& tile) const {
    GradientSums sums;
    for (int64_t i = 0; i < tile.rows; ++i) {
      const float* dots = tile.dots + i * tile.ld_dots;
      float* out = tile.g + i * tile.ld;
      Floats loss{}, g_sum{}, g_dot{};
      const auto row_pairs = pairs.row(tile.row + i);
      for (int64_t j = 0; j < tile.columns; j += kLanes) {
        Floats dot = load(dots + j), sign = broadcast(1.f), used = broadcast(1.f);
        if constexpr (Pairs::kMatched) {
          const Lanes lanes = row_pairs.at(tile.column + j);
          sign = lanes.positive ? broadcast(-1.f) : sign;
          used = lanes.unseen ? Floats{} : used;
        } else {
          const int64_t positive = tile.row + i + pairs.offset - tile.column - j;
          if (0 <= positive && positive < kLanes) sign[positive] = -1.f;
        }
        for (int64_t lane = tile.columns - j; lane < kLanes; ++lane) dot[lane] = used[lane] = 0.f;
        const Floats v = sign * (dot * logit_scale + logit_bias);  // a logit that should be low
        const Floats size = v < 0.f ? -v : v;
        const Floats u = exp2(size * -kLog2E), inverse = 1.f / (1.f + u);
        const Floats g = sign * used * (v < 0.f ? u * inverse : inverse);
        loss += used * (larger(Floats{}, v) + log1p(u));
        g_sum += g;
        g_dot += g * dot;
        store(out + j, g);
      }
      sums += {sum(g_dot), sum(g_sum), sum(loss)};
    }
    return sums;
  }
};

template <typename Pairs>
GradientSums sigmoid(const Inputs& in, float logit_bias, const Pairs& pairs, bool gradients,
                     Gradients& out) {
  const SigmoidGradient<Pairs> epilogue{in.logit_scale, logit_bias, pairs};
  return in.dispatch([&](auto a) {
    const Strip<decltype(a)::value> strip(in.x, in.y);
    using Input = typename Operands<decltype(a)::value>::Input;
    const auto data = [&](Tensor& t) { return gradients ? t.mutable_data_ptr<Input>() : nullptr; };
    return GradientPass<decltype(a)::value>::run(strip, epilogue, in.logit_scale, data(out.dx),
                                                 data(out.dy));
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid_loss(const Tensor& x, const Tensor& y,
                                                                const Tensor& logit_scale,
                                                                const Tensor& logit_bias,
                                                                const PairArguments& ids,
                                                                bool gradients) {
  const char* op = "sigmoid_loss";
  const Inputs in(op, x, y, logit_scale);
  const float bias = number(op, "logit_bias", logit_bias);
  Gradients out(in);
  const GradientSums sums = with_pairs(
      op, in, ids, [&](const auto& pairs) { return sigmoid(in, bias, pairs, gradients, out); });
  if (!gradients) out.dx = out.dy = at::empty({0, in.x.size(1)}, in.x.options());
  return {scalar(sums.loss), out.finish(out.dx, x), out.finish(out.dy, y), scalar(sums.g_dot),
          scalar(sums.g)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sigmoid_loss_bwd(const Tensor& grad, const Tensor& dx,
                                                            const Tensor& dy,
                                                            const Tensor& dlogit_scale,
                                                            const Tensor& dlogit_bias) {
  const char* op = "sigmoid_loss_bwd";
  expect(op, "grad", grad, {}, kSums);
  expect(op, "dx", dx, {kAny, kAny}, kFloats);
  expect(op, "dy", dy, {kAny, dx.size(1)}, dx.scalar_type());
  expect(op, "dlogit_scale", dlogit_scale, {}, kSums);
  expect(op, "dlogit_bias", dlogit_bias, {}, kSums);
  return {dx * grad, dy * grad, dlogit_scale * grad, dlogit_bias * grad};
}

}  // namespace protoclip
