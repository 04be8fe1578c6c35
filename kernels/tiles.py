"""What every kernel over tiles of x y^T shares: the order of the tiles, the product, the operands.

A tile is BLOCK_N rows of x [N, D] against BLOCK_M rows of y [M, D]. Operands come by pointer and
strides (any D, any strides, any card) or by TMA descriptor (row strides of 16-byte multiples).

Most tiles hold no positive, no hidden pair and no edge, and have no masks. What needs more values
an element than registers hold for a whole tile goes slice by slice, SLICE_M columns at a time.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from protoclip.kernels.launch import INTERPRETED, Launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LEFT_OUT = tl.constexpr(-100)  # in place of a label, as in torch's cross-entropy
HIDDEN = tl.constexpr(1e30)  # finite: times a weight of 0 it is 0
SPREAD = tl.constexpr(64.0)  # of the 126 binary orders that fp32 has below 1; C++: kSpread
UPCAST = tl.constexpr(INTERPRETED)  # the interpreter multiplies bf16 bit patterns as integers


@triton.jit
def tile_origin(pid, n, m, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """-> first row and first column of a tile; GROUP row blocks share the y they read in L2."""
    blocks_n = tl.cdiv(n, BLOCK_N)
    blocks_m = tl.cdiv(m, BLOCK_M)
    group = pid // (GROUP * blocks_m)
    first = group * GROUP
    height = tl.minimum(blocks_n - first, GROUP)
    within = pid % (GROUP * blocks_m)
    return (first + within % height) * BLOCK_N, (within // height) * BLOCK_M


@triton.jit
def needs_mask(row0, col0, n, m, offset, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Whether a tile crosses the edge or holds a positive."""
    edge = (row0 + BLOCK_N > n) | (col0 + BLOCK_M > m)
    return edge | ((row0 + offset < col0 + BLOCK_M) & (row0 + BLOCK_N + offset > col0))


@triton.jit
def can_hide(base2_scale):
    """Whether a product in fp32 can stand for a logit of -HIDDEN."""
    return (tl.abs(base2_scale) > 1e-8) & (tl.abs(base2_scale) < 1e8)


@triton.jit
def hide(acc, base2_scale, row0, col0, n, m, offset):
    """-> the products of a tile, with logits of -HIDDEN at positives and past the ends, and the
    products of the positives [rows], 0 where it holds none."""
    rows = tl.arange(0, acc.shape[0])[:, None]
    cols = tl.arange(0, acc.shape[1])[None, :]
    shift = row0 + offset - col0
    hidden = -HIDDEN / base2_scale
    positive_product = tl.zeros((acc.shape[0],), tl.float32)
    if (row0 + acc.shape[0] > n) | (col0 + acc.shape[1] > m):
        acc = tl.where((rows < n - row0) & (cols < m - col0), acc, hidden)
    if (shift < acc.shape[1]) & (shift > -acc.shape[0]):
        positive_product = tl.sum(tl.where(cols == rows + shift, acc, 0.0), 1)
        # Compared the other way round, so that no register has to keep the first result.
        acc = tl.where(rows == cols - shift, hidden, acc)
    return acc, positive_product


@triton.jit
def dot(a, b, acc=None):
    """acc + a @ b, fp32. fp32 operands are split into two TF32 numbers each, and three of the four
    products run on tensor cores: within the error budget, at scale 100 too."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def products_at(
    x, y, rows, cols, d, strides, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr
):  # fmt: skip
    """-> the products of rows of x and rows of y, both int64 and within their matrix."""
    stride_x_n, stride_x_d, stride_y_m, stride_y_d = strides
    acc = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    depth = tl.arange(0, BLOCK_D)
    x_ptrs = x + rows[:, None] * stride_x_n + depth[None, :].to(tl.int64) * stride_x_d
    y_ptrs = y + cols[None, :] * stride_y_m + depth[:, None].to(tl.int64) * stride_y_d
    for start_d in range(0, d, BLOCK_D):
        if EVEN_D:
            a = tl.load(x_ptrs)
            b = tl.load(y_ptrs)
        else:
            a = tl.load(x_ptrs, mask=depth[None, :] < d - start_d, other=0.0)
            b = tl.load(y_ptrs, mask=depth[:, None] < d - start_d, other=0.0)
        acc = dot(a, b, acc)
        x_ptrs += tl.cast(stride_x_d, tl.int64) * BLOCK_D
        y_ptrs += tl.cast(stride_y_d, tl.int64) * BLOCK_D
    return acc


@triton.jit
def products(
    x, y, row0, col0, n, m, d, strides,  # strides: of x, then of y
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """-> x y^T of one tile, fp32 [BLOCK_N, BLOCK_M]; values past n or m are arbitrary."""
    if isinstance(x, tl.tensor_descriptor):
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start_d in range(0, d, BLOCK_D):
            acc = dot(x.load([row0, start_d]), y.load([col0, start_d]).T, acc)
        return acc
    else:
        # Rows past the end read the last row again: no mask, and the caller masks the logits.
        rows = tl.minimum(row0 + tl.arange(0, BLOCK_N), n - 1).to(tl.int64)
        cols = tl.minimum(col0 + tl.arange(0, BLOCK_M), m - 1).to(tl.int64)
        return products_at(x, y, rows, cols, d, strides, BLOCK_D, EVEN_D)


@triton.jit
def pinned(v):
    """v, computed once per element. Otherwise Triton repeats a vector's loads and arithmetic in
    every thread that needs an element, after the product; it does not repeat a reduction."""
    return tl.sum(tl.join(v, tl.zeros_like(v)), 1)


ID_STRIDES = ["stride_query_ids", "stride_key_ids"]
IDS = ["query_ids_ptr", "key_ids_ptr"]  # slices, which begin anywhere


@triton.jit
def id_pointers(query_ids_ptr, key_ids_ptr, stride_query, stride_key, NUM_IDS: tl.constexpr):
    """-> for each column of ids, of which there is at least one, a pointer to those of rows and one
    to those of columns. Triton 3.4 cannot return None, so the caller decides whether there are any.
    """
    if NUM_IDS == 1:
        return query_ids_ptr, key_ids_ptr
    else:
        return (
            query_ids_ptr, key_ids_ptr, query_ids_ptr + stride_query, key_ids_ptr + stride_key
        )  # fmt: skip


@triton.jit
def equal_ids(ids, row, col, PINNED: tl.constexpr = False):
    """-> where a row and a column share an id, [rows, cols]. ids: of ``id_pointers``."""
    same = tl.zeros((row.shape[0], col.shape[0]), tl.int1)
    for i in tl.static_range(0, len(ids), 2):
        row_ids = tl.load(ids[i] + row)
        col_ids = tl.load(ids[i + 1] + col)
        if PINNED:
            row_ids = pinned(row_ids)
            col_ids = pinned(col_ids)
        same = same | (row_ids[:, None] == col_ids[None, :])
    return same


@triton.jit
def with_ids(
    positive, seen, ids, row, col, SAME_POSITIVE: tl.constexpr, PINNED: tl.constexpr = False
):  # fmt: skip
    """-> the positives and the pairs seen of a tile where pairs with an equal id are positives too,
    or else are not seen unless they are positives."""
    if ids is not None:
        same = equal_ids(ids, row, col, PINNED)
        if SAME_POSITIVE:
            positive = positive | same
        else:
            seen = seen & (positive | (same == 0))
    return positive, seen


def id_arguments(query_ids: Tensor | None, key_ids: Tensor | None) -> dict[str, Any]:
    """Arguments of a kernel that compares ids, [R, N] and [R, M], R <= 2, or None."""
    if query_ids is None or key_ids is None:
        query_ids = key_ids = None
    return {
        "query_ids_ptr": query_ids,
        "key_ids_ptr": key_ids,
        "stride_query_ids": 0 if query_ids is None else query_ids.stride(0),
        "stride_key_ids": 0 if key_ids is None else key_ids.stride(0),
        "NUM_IDS": 0 if query_ids is None else len(query_ids),
    }


def tile_options(depth: int, config: Launch) -> dict[str, Any]:
    """What a kernel is compiled for that goes over tiles of features so deep."""
    return config.options | {
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "BLOCK_D": config.block_d,
        "EVEN_D": depth > 0 and depth % config.block_d == 0,
    }


def operands(x: Tensor, y: Tensor, config: Launch) -> dict[str, Any]:
    """Arguments of a kernel over tiles of x y^T: the features for whole tiles, by descriptor where
    the configuration says so, and by pointer for slices; their sizes; what it is compiled for."""
    n, d = x.shape
    m = y.shape[0]
    x_tile = x
    y_tile = y
    if config.descriptors:  # ``launch.choose`` gives those to aligned features only
        x_tile = TensorDescriptor.from_tensor(x, [config.block_n, config.block_d])
        y_tile = TensorDescriptor.from_tensor(y, [config.block_m, config.block_d])
    return tile_options(d, config) | {
        "x": x_tile,
        "y": y_tile,
        "x_ptr": x,
        "y_ptr": y,
        "n": n,
        "m": m,
        "d": d,
        "strides": (*x.stride(), *y.stride()),
        "SLICE_M": config.slice_m,
    }


def gradient_chunk(g: Tensor | None, config: Launch) -> dict[str, Any]:
    """Arguments of such a kernel that writes a chunk of G, in whole tiles, or None."""
    if g is None:
        return {"g": None, "g_ptr": None, "stride_g": 0}
    g_tile = g
    if config.descriptors:
        g_tile = TensorDescriptor.from_tensor(g, [config.block_n, config.block_m])
    return {"g": g_tile, "g_ptr": g, "stride_g": g.stride(0)}
