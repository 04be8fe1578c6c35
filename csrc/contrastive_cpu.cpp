// InfoNCE and the sigmoid loss on the CPU: the statistics of a strip, and its gradients. Contract:
// ops/contrastive.py.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <vector>

#include "cpu_ops.h"
#include "strip_gradient.h"
#include "strip_inputs.h"
#include "strip_statistics.h"

namespace protoclip {
namespace {

// What a row or a column brings into G: its reference and its weight over its sum.
struct Side {
  Buffer<float> reference, weight;
  Side(const at::Tensor& max, const at::Tensor& sum, const at::Tensor& weight_, int64_t count)
      : reference(round_up(count, kLanes)), weight(round_up(count, kLanes)) {
    const bool given = max.numel() > 0;
    for (int64_t i = 0; i < round_up(count, kLanes); ++i) {
      const bool used = given && i < count;
      reference.get()[i] = used ? max.const_data_ptr<float>()[i] : 0.f;
      weight.get()[i] =
          used ? weight_.const_data_ptr<float>()[i] / sum.const_data_ptr<float>()[i] : 0.f;
    }
  }
};

// Turns dot products into G = row_weight P_row + column_weight P_column - weights at positives.
class InfoNceGradient {
 public:
  InfoNceGradient(const Side& row, const Side& column, const float* row_weight,
                  const float* column_weight, Base2 base2, int64_t offset)
      : row_(row),
        column_(column),
        row_weight_(row_weight),
        column_weight_(column_weight),
        base2_(base2),
        offset_(offset) {}

  GradientSums operator()(const TileRange& range, float* s, int64_t ld) const {
    if (range.has_positive(offset_)) return exact(range, s, ld);
    const float* row = row_.reference.get() + range.row;
    const auto rows = std::minmax_element(row, row + range.rows);
    float low = *rows.first, high = *rows.second;
    if (column_weight_ != nullptr) {
      const float* column = column_.reference.get() + range.column;
      const auto columns = std::minmax_element(column, column + range.columns);
      low = std::min(low, *columns.first), high = std::max(high, *columns.second);
    }
    return high - low <= kSharedSpread ? shared(range, s, ld, low) : exact(range, s, ld);
  }

 private:
  // `weigh(i, j, v) -> G` on vectors of base-2 logits, for all of the tile.
  template <typename Weigh>
  GradientSums each(const TileRange& range, float* s, int64_t ld, const Weigh& weigh) const {
    GradientSums sums;
    for (int64_t i = 0; i < range.rows; ++i, s += ld) {
      Floats row{};
      for (int64_t j = 0; j < range.columns; j += kLanes) {
        Floats dot = load(s + j);
        const int64_t used = range.columns - j;
        for (int64_t lane = used; lane < kLanes; ++lane) dot[lane] = 0.f;
        Floats g = weigh(i, j, base2_(dot));
        for (int64_t lane = used; lane < kLanes; ++lane) g[lane] = 0.f;
        row += g * dot;
        store(s + j, g);
      }
      sums.g_dot += sum(row);
    }
    return sums;
  }

  GradientSums shared(const TileRange& range, float* s, int64_t ld, float low) const {
    const Floats reference = broadcast(low);
    alignas(64) float rows[256], columns[256];
    factors(row_, range.row, range.rows, reference, rows);
    factors(column_, range.column, range.columns, reference, columns);
    return each(range, s, ld, [&](int64_t i, int64_t j, Floats v) {
      return exp2(v - reference) * (load(columns + j) + rows[i]);
    });
  }

  static void factors(const Side& side, int64_t first, int64_t count, Floats reference,
                      float* out) {
    for (int64_t i = 0; i < count; i += kLanes)
      store(out + i, load(side.weight.get() + first + i) *
                         exp2(reference - load(side.reference.get() + first + i)));
  }

  GradientSums exact(const TileRange& range, float* s, int64_t ld) const {
    const float *row_reference = row_.reference.get() + range.row,
                *row_factor = row_.weight.get() + range.row,
                *column_reference = column_.reference.get() + range.column,
                *column_factor = column_.weight.get() + range.column;
    return each(range, s, ld, [&](int64_t i, int64_t j, Floats v) {
      Floats g = exp2(v - row_reference[i]) * row_factor[i];
      if (column_weight_ != nullptr)
        g += exp2(v - load(column_reference + j)) * load(column_factor + j);
      const int64_t p = range.row + i + offset_ - range.column - j;  // the positive's lane
      if (0 <= p && p < kLanes) g[p] -= positive_weight(range.row + i);
      return g;
    });
  }

  float positive_weight(int64_t i) const {
    return row_weight_[i] + (column_weight_ != nullptr ? column_weight_[i + offset_] : 0.f);
  }

  const Side &row_, &column_;
  const float *row_weight_, *column_weight_;
  Base2 base2_;
  int64_t offset_;
};

constexpr int64_t kStashBytes = 64 << 20;  // of fp32 products: N = 4,096

// `stash`: the room, as plain bytes, or none.
KeptProducts kept_products(const char* op, const std::optional<at::Tensor>& stash,
                           const Inputs& in) {
  if (!stash.has_value()) return {};
  const int64_t size = KeptProducts::size(in.x.size(0), in.y.size(0));
  TORCH_CHECK(stash->is_contiguous() && stash->nbytes() == size * sizeof(float), op,
              ": expected a stash of ", size, " floats, got ", stash->nbytes(), " bytes");
  return {static_cast<float*>(stash->mutable_data_ptr()), in.y.size(0)};
}

template <Arithmetic A>
std::vector<at::Tensor> forward(const Inputs& in, int64_t offset, bool columns, KeptProducts kept) {
  const Strip<A> strip(in.x, in.y);
  Statistics<A> statistics(strip, Base2(in.scale), offset, columns, kept);
  at::Tensor positive = at::empty({strip.n}, at::kFloat);
  statistics.run(positive.mutable_data_ptr<float>());
  const auto rows = statistics.rows(), by_column = statistics.columns();
  return {rows.max, rows.sum, by_column.max, by_column.sum, positive};
}

}  // namespace

int64_t stash_size(int64_t n, int64_t m) {
  const int64_t bytes = KeptProducts::size(n, m) * static_cast<int64_t>(sizeof(float));
  return bytes <= kStashBytes ? bytes / static_cast<int64_t>(sizeof(int16_t)) : 0;
}

at::Tensor pooled(int64_t count) { return pooled_empty({count}, at::kShort); }

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_fwd(
    const at::Tensor& x, const at::Tensor& y, const at::Tensor& scale, int64_t offset, bool columns,
    const std::optional<at::Tensor>& stash) {
  const char* op = "contrastive_fwd";
  const Inputs in(op, x, y, scale, offset);
  const KeptProducts kept = kept_products(op, stash, in);
  const auto out =
      in.dispatch([&](auto a) { return forward<decltype(a)::value>(in, offset, columns, kept); });
  return {out[0], out[1], out[2], out[3], out[4]};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> contrastive_bwd(
    const at::Tensor& x, const at::Tensor& y, const at::Tensor& scale, const at::Tensor& row_max,
    const at::Tensor& row_sum, const at::Tensor& column_max, const at::Tensor& column_sum,
    const at::Tensor& row_weight, const at::Tensor& column_weight, int64_t offset,
    const std::optional<at::Tensor>& stash) {
  const char* op = "contrastive_bwd";
  const Inputs in(op, x, y, scale, offset);
  const KeptProducts kept = kept_products(op, stash, in);
  const bool columns = column_max.numel() > 0;
  const at::Tensor row_w = row_weight.to(at::kFloat).contiguous();
  const at::Tensor column_w = column_weight.to(at::kFloat).contiguous();
  const Side row(row_max.contiguous(), row_sum.contiguous(), row_w, in.x.size(0));
  const Side column(column_max.contiguous(), column_sum.contiguous(), column_w, in.y.size(0));
  const InfoNceGradient epilogue(row, column, row_w.const_data_ptr<float>(),
                                 columns ? column_w.const_data_ptr<float>() : nullptr,
                                 Base2(in.scale), offset);
  Gradients out(in);
  const GradientSums sums = in.dispatch([&](auto a) {
    const Strip<decltype(a)::value> strip(in.x, in.y);
    using Pass = GradientPass<decltype(a)::value>;
    using Input = typename Operands<decltype(a)::value>::Input;
    return Pass::run(strip, epilogue, in.scale, true, out.dx.mutable_data_ptr<Input>(),
                     out.dy.mutable_data_ptr<Input>(), Pass::kDefaultChain, kept);
  });
  return {out.finish(out.dx, x), out.finish(out.dy, y),
          at::full({}, sums.g_dot, at::TensorOptions(at::kFloat))};
}

namespace {

// ---- the sigmoid loss: sum of softplus(-z (scale x.y + bias)), z = 1 at positives, else -1 ----
// No row or column statistics, so loss and gradients come from one pass: 3 products, not 4.

constexpr float kLog2E = 1.4426950408889634f;

// log(1 + u) for u in [0, 1], as 2 atanh(z): relative error below 1e-7.
inline Floats log1p(Floats u) {
  const Floats z = u / (u + 2.f), w = z * z;
  Floats p = broadcast(1.f / 15);
  for (int k = 13; k >= 1; k -= 2) p = p * w + 1.f / k;
  return 2.f * z * p;
}

class SigmoidGradient {
 public:
  SigmoidGradient(float scale, float bias, int64_t offset)
      : scale_(scale), bias_(bias), offset_(offset) {}

  GradientSums operator()(const TileRange& range, float* s, int64_t ld) const {
    GradientSums sums;
    for (int64_t i = 0; i < range.rows; ++i, s += ld) {
      Floats loss{}, g_sum{}, g_dot{};
      for (int64_t j = 0; j < range.columns; j += kLanes) {
        Floats dot = load(s + j), sign = broadcast(1.f), used = broadcast(1.f);
        const int64_t positive = range.row + i + offset_ - range.column - j;
        if (0 <= positive && positive < kLanes) sign[positive] = -1.f;
        for (int64_t lane = range.columns - j; lane < kLanes; ++lane) dot[lane] = used[lane] = 0.f;
        const Floats v = sign * (dot * scale_ + bias_);  // a logit that should be low
        const Floats size = v < 0.f ? -v : v;
        const Floats u = exp2(size * -kLog2E), inverse = 1.f / (1.f + u);
        const Floats g = sign * used * (v < 0.f ? u * inverse : inverse);
        loss += used * (larger(Floats{}, v) + log1p(u));
        g_sum += g;
        g_dot += g * dot;
        store(s + j, g);
      }
      sums += {sum(g_dot), sum(g_sum), sum(loss)};
    }
    return sums;
  }

 private:
  float scale_, bias_;
  int64_t offset_;
};

at::Tensor scalar(double value) { return at::full({}, value, at::TensorOptions(at::kFloat)); }

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sigmoid_loss(
    const at::Tensor& x, const at::Tensor& y, const at::Tensor& scale, const at::Tensor& bias,
    int64_t offset, bool gradients) {
  // An offset past the last column: a chunk of another rank's texts, without positives.
  const Inputs in("sigmoid_loss", x, y, scale, offset < y.size(0) ? offset : 0);
  const SigmoidGradient epilogue(in.scale, bias.item<float>(), offset);
  Gradients out(in);
  const GradientSums sums = in.dispatch([&](auto a) {
    const Strip<decltype(a)::value> strip(in.x, in.y);
    using Input = typename Operands<decltype(a)::value>::Input;
    return GradientPass<decltype(a)::value>::run(strip, epilogue, in.scale, gradients,
                                                 out.dx.mutable_data_ptr<Input>(),
                                                 out.dy.mutable_data_ptr<Input>());
  });
  if (!gradients) out.dx = out.dy = at::empty({0, in.x.size(1)}, in.x.options());
  return {scalar(sums.loss), out.finish(out.dx, x), out.finish(out.dy, y), scalar(sums.g_dot),
          scalar(sums.g)};
}

}  // namespace protoclip
