"""Sums over weights that one attention pass cannot hold: wide or fp32 rows, and gradients of keys.

A wave of weights W_ik = 2^(step (s_ik - max_i)) is formed again and written to a bounded scratch; a
real GEMM then multiplies it: W V for values of wide rows (waves of rows), or G^T q with
G_ik = w_i (W_ik / sum_i - [y_i = k]) for the gradient of the keys (waves of keys). Every
output element is complete after its own wave: nothing is accumulated across waves, no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels.attention import load_tile, products_tile, split_scale
from protoclip.kernels.launch import chunked_row

SCRATCH_BYTES = 256 << 20
# G is at most 1 after dividing by the largest weight; this keeps small entries normal in fp16.
G_UNIT = 4096.0


@triton.jit(
    do_not_specialize=["n", "k_count", "first_key"],
    do_not_specialize_on_alignment=["labels_ptr", "max_ptr", "sum_ptr", "weight_ptr"],
)
def weights_kernel(
    q_ptr, scale_ptr, k_ptr,  # [N, D], [], [K, D]
    labels_ptr, max_ptr, sum_ptr, weight_ptr,  # [N]
    out_ptr,  # [N, K], contiguous
    n, k_count, d, first_key,
    stride_q_n, stride_q_d, stride_k_n, stride_k_d,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    GRADIENT: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, key tiles): W, or UNIT * G where GRADIENT. first_key: of this wave."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    first_column = tl.program_id(1).to(tl.int64) * BLOCK_K
    i = tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_K)
    rows = first_row + i
    used = rows < n
    k_used = j < k_count - first_column
    q_ptr += first_row * stride_q_n
    columns = tl.arange(0, BLOCK_D)
    q = load_tile(q_ptr, i, used, columns, d, stride_q_n, stride_q_d, False)
    sign, step = split_scale(scale_ptr)
    s, _ = products_tile(
        q, q_ptr, i, used, stride_q_n, stride_q_d,
        k_ptr + first_column * stride_k_n, j, k_used, stride_k_n, stride_k_d,
        d, BLOCK_D, False, False, True,
    )  # fmt: skip
    s *= sign
    s = tl.where(k_used[None, :], s, -float("inf"))
    w = tl.exp2((s - tl.load(max_ptr + rows, mask=used, other=0.0)[:, None]) * step)
    if GRADIENT:
        label = tl.load(labels_ptr + rows, mask=used, other=-100)
        w = w / tl.load(sum_ptr + rows, mask=used, other=1.0)[:, None]
        if HARD:
            keys = first_key + first_column + j
            w = tl.where(label[:, None] == keys[None, :], w - 1.0, w)
        weight = tl.load(weight_ptr + rows, mask=used, other=0.0)
        w = tl.where((label >= 0)[:, None], w * (weight * UNIT)[:, None], 0.0)
    pointers = out_ptr + rows[:, None] * k_count + (first_column + j)[None, :]
    tl.store(pointers, w.to(out_ptr.dtype.element_ty), mask=used[:, None] & k_used[None, :])


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, D] -> fp32 [M, D]; fp32 operands as ``torch.backends.cuda.matmul`` says."""
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype != torch.float32:
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()  # the CPU, under the interpreter, has no mixed form


def weights(q, keys, scale, row_max, *, first_key=0, gradient=None) -> Tensor:
    """W [N, K] in q's dtype, or G_UNIT * G; gradient: (labels, row_sum, weight, hard)."""
    (n, d), k = q.shape, len(keys)
    out = q.new_empty((n, k))
    labels, row_sum, weight, hard = gradient or (row_max, row_max, row_max, False)
    tile = chunked_row(q.device, q.dtype)
    with torch.cuda.device_of(q):
        weights_kernel[(triton.cdiv(n, tile.block_n), triton.cdiv(k, tile.block_m))](
            q, scale, keys, labels, row_max, row_sum, weight, out, n, k, d, first_key,
            *q.stride(), *keys.stride(),
            UNIT=G_UNIT, BLOCK_N=tile.block_n, BLOCK_K=tile.block_m, BLOCK_D=tile.block_d,
            GRADIENT=gradient is not None, HARD=hard, **tile.options,
        )  # fmt: skip
    return out


def _wave(other: int, itemsize: int) -> int:
    """Rows (or keys) of a wave whose other side is given: at least 16."""
    fit = SCRATCH_BYTES // (max(1, other) * itemsize)
    return max(16, fit // 128 * 128 or fit)


def weighted_values(q, keys, values, scale, row_max, out: Tensor) -> None:
    """out [N, DV] fp32 = sum_k W_ik v_k."""
    rows = _wave(len(keys), q.element_size())
    for a in range(0, len(q), rows):
        part = slice(a, a + rows)
        out[part] = product(weights(q[part], keys, scale, row_max[part]), values)


def key_gradient(q, keys, labels, scale, row_max, row_sum, weight, hard: bool) -> Tensor:
    """scale * sum_i w_i (p_ik - [hard and y_i = k]) q_i, [K, D] in the keys' dtype."""
    out = torch.zeros_like(keys, memory_format=torch.contiguous_format)
    if not len(q) or not out.numel():
        return out
    largest = weight.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    gradient = (labels, row_sum, weight / largest, hard)
    factor = scale.reshape(()) * largest / G_UNIT
    columns = _wave(len(q), q.element_size())
    for first in range(0, len(keys), columns):
        part = slice(first, first + columns)
        g = weights(q, keys[part], scale, row_max, first_key=first, gradient=gradient)
        out[part] = factor * product(g.T, q)
    return out
