"""k-means assignment and segment means on a GPU without nvcc: what ops/clusters.py calls.

Assignment takes up to three passes, each over the rows that the previous one left open, without
waiting for the device. Scores are x.c - |c|^2 / 2. The two best are kept beside the product, and a
row stays open if rounding could account for their margin, or if the margin is infinite or NaN:
1. products of 16-bit operands (of a bf16 copy where points are fp32), all rows;
2. fp32 points only: x and c as sums of two bf16 numbers, three products of the four;
3. the least |x - c|^2 itself in fp32: labels are exact.
Segment mean: rows sorted by label, in pieces of at most PIECE rows; each piece is summed in order,
then the pieces are: no atomics, the same bits every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels import launch
from protoclip.kernels.attention import load_tile
from protoclip.kernels.launch import cdiv
from protoclip.kernels.tiles import dot, products, tile_options

PIECE = 1024  # rows of a piece of a segment
CHUNK = 1 << 16  # points at a time in the last step, the distances to their centroids
HALF_ULP = 1.01 * 2.0**-8  # relative error of rounding to bf16


@triton.jit
def leads(score, best):
    """Whether a score is the best so far; a tie is not: the lowest index wins."""
    return score > best


@triton.jit
def _none_yet(BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """-> best and second score and the tile of the best, for each row and place in a tile."""
    none = tl.full((BLOCK_N, BLOCK_M), -float("inf"), tl.float32)
    return none, none, tl.zeros((BLOCK_N, BLOCK_M), tl.int32)


@triton.jit
def _keep_best(s, start, best, second, tile):
    """The same with one more tile s [rows, keys]. Each place has its own best: reducing over the
    keys would cost shuffles and barriers in each tile, so that is done once, at the end."""
    better = leads(s, best)
    second = tl.maximum(second, tl.minimum(s, best))
    return tl.where(better, s, best), second, tl.where(better, start, tile)


@triton.jit
def _best_of_row(best, second, tile):
    """-> best and second score of each row, and the index of the best."""
    index = tile + tl.arange(0, best.shape[1])[None, :]
    top = tl.max(best, 1)
    index_of_top = tl.where(best == top[:, None], index, 2147483647)
    label = tl.min(index_of_top, 1)
    without_top = tl.where(index == label[:, None], second, best)
    return top, tl.max(without_top, 1), label


@triton.jit
def _three_products(
    x_ptr, c_ptr, c_low_ptr, rows, keys, d, strides, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr
):  # fmt: skip
    """-> x c^T of fp32 rows and of centroids in two bf16 parts; both indices within range."""
    stride_x_n, stride_x_d, stride_c_k, stride_c_d = strides
    acc = tl.zeros((rows.shape[0], keys.shape[0]), tl.float32)
    depth = tl.arange(0, BLOCK_D)
    for first in range(0, d, BLOCK_D):
        column = (first + depth).to(tl.int64)
        x_at = rows[:, None] * stride_x_n + column[None, :] * stride_x_d
        c_at = keys[None, :] * stride_c_k + column[:, None] * stride_c_d
        if EVEN_D:
            x = tl.load(x_ptr + x_at)
            c = tl.load(c_ptr + c_at)
            c_low = tl.load(c_low_ptr + c_at)
        else:
            x = tl.load(x_ptr + x_at, mask=(column < d)[None, :], other=0.0)
            c = tl.load(c_ptr + c_at, mask=(column < d)[:, None], other=0.0)
            c_low = tl.load(c_low_ptr + c_at, mask=(column < d)[:, None], other=0.0)
        high = x.to(c.dtype)
        low = (x - high.to(tl.float32)).to(c.dtype)
        acc = dot(high, c, dot(high, c_low, dot(low, c, acc)))
    return acc


@triton.jit(do_not_specialize=["n", "k"], do_not_specialize_on_alignment=["count_ptr"])
def screen_kernel(
    x_ptr, c_ptr, c_low_ptr, half_norm_ptr, reach_ptr,  # [N, D], [K, D] x 2, [K], [N]: of rounding
    rows_ptr, count_ptr,  # [N], []: which rows, with THREE; all without
    label_ptr, open_ptr,  # [N], [N]: 1 where the margin is within reach
    n, k, d, strides,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    THREE: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Best centroid of a tile of rows by scores that are rounded; THREE: of fp32 rows. HELD: the
    rows fit one tile and are read once, so that only centroids stream from L2."""
    stride_x_n, stride_x_d, stride_c_k, stride_c_d = strides
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_N
    if THREE:
        n = tl.load(count_ptr).to(tl.int32)
    if row0 < n:
        at = row0 + tl.arange(0, BLOCK_N)
        used = at < n
        rows = at
        if THREE:
            rows = tl.load(rows_ptr + at, mask=used, other=0)
        best, second, tile = _none_yet(BLOCK_N, BLOCK_M)
        keys = tl.arange(0, BLOCK_M)
        depth = tl.arange(0, BLOCK_D)
        if HELD:
            x = load_tile(x_ptr, rows, used, depth, d, stride_x_n, stride_x_d, EVEN_D)
            high = x.to(c_ptr.dtype.element_ty)
            if THREE:
                low = (x - high.to(tl.float32)).to(high.dtype)
        for start in range(0, k, BLOCK_M):
            inside = start + keys < k
            half_norm = tl.load(half_norm_ptr + start + keys, mask=inside, other=float("inf"))
            centroids = tl.minimum(start + keys, k - 1).to(tl.int64)
            if HELD:
                c = load_tile(
                    c_ptr, centroids, inside, depth, d, stride_c_k, stride_c_d, EVEN_D, False
                )
                s = dot(high, tl.trans(c))
                if THREE:
                    c_low = load_tile(
                        c_low_ptr, centroids, inside, depth, d, stride_c_k, stride_c_d,
                        EVEN_D, False,
                    )  # fmt: skip
                    s = dot(high, tl.trans(c_low), dot(low, tl.trans(c), s))
            elif THREE:
                s = _three_products(
                    x_ptr, c_ptr, c_low_ptr, rows, centroids, d, strides, BLOCK_D, EVEN_D
                )
            else:
                s = products(
                    x_ptr, c_ptr, tl.program_id(0) * BLOCK_N, start, n, k, d, strides,
                    BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D,
                )  # fmt: skip
            s -= half_norm[None, :]  # infinite past the end
            best, second, tile = _keep_best(s, start, best, second, tile)
        best, second, label = _best_of_row(best, second, tile)
        margin = best - second  # NaN and infinite after an overflow
        reach = tl.load(reach_ptr + rows, mask=used, other=0.0)
        clear = (margin > reach) & (margin < float("inf"))
        tl.store(label_ptr + rows, label.to(tl.int64), mask=used)
        tl.store(open_ptr + rows, tl.where(clear, 0, 1).to(tl.int32), mask=used)


@triton.jit
def load_columns(ptr, rows, used, columns, d, stride_n, stride_d):
    """[columns, rows] of a matrix in fp32, columns first so that a thread sums over them alone."""
    at = rows[None, :].to(tl.int64) * stride_n + columns[:, None].to(tl.int64) * stride_d
    values = tl.load(ptr + at, mask=used[None, :] & (columns < d)[:, None], other=0.0)
    return values.to(tl.float32)


@triton.jit
def _widest(x_ptr, c_ptr, rows, label, used, d, strides, BLOCK_D: tl.constexpr):
    """-> the largest |x - c| of rows and the centroids of their labels."""
    stride_x_n, stride_x_d, stride_c_k, stride_c_d = strides
    widest = tl.zeros(rows.shape, tl.float32)
    for first in range(0, d, BLOCK_D):
        depth = first + tl.arange(0, BLOCK_D)
        x = load_columns(x_ptr, rows, used, depth, d, stride_x_n, stride_x_d)
        c = load_columns(c_ptr, label, used, depth, d, stride_c_k, stride_c_d)
        widest = tl.maximum(widest, tl.max(tl.abs(x - c), 0))
    return widest


@triton.jit(do_not_specialize=["k"], do_not_specialize_on_alignment=["count_ptr"])
def exact_kernel(
    x_ptr, c_ptr, rows_ptr, count_ptr, label_ptr,  # [N, D], [K, D], [N], [], [N]
    k, d, strides,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Nearest centroid of a tile of the rows listed by |x - c|^2 itself, in units of the distance
    to the label so far where its square would leave fp32."""
    stride_x_n, stride_x_d, stride_c_k, stride_c_d = strides
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.load(count_ptr)
    if row0 < n:
        at = row0 + tl.arange(0, BLOCK_N)
        used = at < n
        rows = tl.load(rows_ptr + at, mask=used, other=0)
        label = tl.load(label_ptr + rows, mask=used, other=0)
        widest = _widest(x_ptr, c_ptr, rows, label, used, d, strides, BLOCK_D)
        usual = (widest > 1e-10) & (widest < 1e10)
        unit = tl.where(usual, 1.0, 1.0 / tl.maximum(widest, 1e-37))[None, :, None]
        best, second, tile = _none_yet(BLOCK_N, BLOCK_M)
        for start in range(0, k, BLOCK_M):
            keys = start + tl.arange(0, BLOCK_M)
            inside = keys < k
            s = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for first in range(0, d, BLOCK_D):  # sums of sums round less
                depth = first + tl.arange(0, BLOCK_D)
                x = load_columns(x_ptr, rows, used, depth, d, stride_x_n, stride_x_d)
                c = load_columns(c_ptr, keys, inside, depth, d, stride_c_k, stride_c_d)
                gap = (x[:, :, None] - c[:, None, :]) * unit
                s -= tl.sum(gap * gap, 0)
            s = tl.where(inside[None, :], s, -float("inf"))
            best, second, tile = _keep_best(s, start, best, second, tile)
        _, _, label = _best_of_row(best, second, tile)
        tl.store(label_ptr + rows, label.to(tl.int64), mask=used)


def reach(norms: Tensor, largest: Tensor, d: int, *, rounding: float, terms: int) -> Tensor:
    """The most that a difference of two scores can change, [N], if products are rounded by
    ``rounding`` |x| |c| and ``terms`` times D of them are summed.

    A tensor core cuts each of 16 products and their sum: csrc/kmeans_assign_rows.cuh argues 20
    errors of 2^-23 for 16 products, of each of the two scores."""
    lost = d**0.5 * 2.0**-62  # what norms lose where squares fall below the normal numbers
    products = terms * (d + 32.0) + 16
    sums = products * (20 / 16) * 2.0**-22
    size = norms + lost
    largest = largest + lost
    normal = largest * (size * (2 * rounding + sums) + largest * sums)
    return normal + (size + largest + 1) * products * 2.0**-123  # below the normal numbers


def kmeans_encode(points: Tensor) -> list[Tensor]:
    """[N, D] -> the points in 16 bits, and their norms [N], for ``kmeans_assign_coded``."""
    norms = torch.linalg.vector_norm(points, dim=1, dtype=torch.float32)
    half = points.bfloat16() if points.dtype == torch.float32 else points
    return [half, norms]


def kmeans_assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """[N, D], [K, D] -> labels int64 [N], squared distances fp32 [N]."""
    return kmeans_assign_coded(points, centroids, kmeans_encode(points))


def kmeans_assign_coded(
    points: Tensor, centroids: Tensor, codes: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """``kmeans_assign`` of points that ``kmeans_encode`` has coded."""
    half, norms = codes
    n, d = points.shape
    k = len(centroids)
    labels = torch.zeros(n, dtype=torch.int64, device=points.device)
    distances = torch.zeros(n, dtype=torch.float32, device=points.device)
    if not n:
        return labels, distances
    centroid_norms = torch.linalg.vector_norm(centroids, dim=1, dtype=torch.float32)  # [K]
    half_norms = centroid_norms.square() / 2
    largest = centroid_norms.amax()
    wide = points.dtype == torch.float32
    c = centroids.to(half.dtype)
    is_open = torch.zeros(n, dtype=torch.int32, device=points.device)
    config = launch.assign_config(half)
    with torch.cuda.device_of(points):
        screen_kernel[(cdiv(n, config.block_n),)](
            x_ptr=half, c_ptr=c, c_low_ptr=None, half_norm_ptr=half_norms,
            reach_ptr=reach(norms, largest, d, rounding=2 * HALF_ULP if wide else 0.0, terms=1),
            rows_ptr=None, count_ptr=None,
            label_ptr=labels, open_ptr=is_open,
            n=n, k=k, d=d, strides=(*half.stride(), *c.stride()),
            THREE=False, HELD=d <= config.block_d, **tile_options(d, config),
        )  # fmt: skip
        open_rows, count = _listed(is_open)
        if wide:
            c_low = (centroids - c.float()).to(c.dtype)
            config = launch.assign_config(points)
            is_open.zero_()
            # Left out: the product of both low parts, and what these were rounded by.
            screen_kernel[(cdiv(n, config.block_n),)](
                x_ptr=points, c_ptr=c, c_low_ptr=c_low, half_norm_ptr=half_norms,
                reach_ptr=reach(norms, largest, d, rounding=3 * HALF_ULP**2, terms=3),
                rows_ptr=open_rows, count_ptr=count,
                label_ptr=labels, open_ptr=is_open,
                n=n, k=k, d=d, strides=(*points.stride(), *c.stride()),
                THREE=True, HELD=d <= config.block_d, **tile_options(d, config),
            )  # fmt: skip
            open_rows, count = _listed(is_open)
        config = launch.ASSIGN_EXACT
        exact_kernel[(cdiv(n, config.block_n),)](
            x_ptr=points, c_ptr=centroids, rows_ptr=open_rows, count_ptr=count, label_ptr=labels,
            k=k, d=d, strides=(*points.stride(), *centroids.stride()),
            BLOCK_N=config.block_n, BLOCK_M=config.block_m, BLOCK_D=config.block_d,
            **config.options,
        )  # fmt: skip
    # Comparisons pass over a NaN: with one in a centroid, or infinity, all distances become NaN.
    nan_or_zero = 0 * torch.linalg.vector_norm(centroids, torch.inf, dtype=torch.float32)
    for start in range(0, n, CHUNK):
        part = slice(start, start + CHUNK)
        gap = points[part].float() - centroids[labels[part]].float()
        torch.add(gap.square().sum(dim=1), nan_or_zero, out=distances[part])
    return labels.where(~distances.isnan(), -1), distances


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """-> the rows where ``chosen`` [N] is 1, in the first places of [N], and their count []."""
    n = len(chosen)
    ends = chosen.cumsum(0)
    rows = ends.new_empty(n + 1)  # the last place takes all others
    place = torch.where(chosen == 1, ends - 1, n)
    rows.scatter_(0, place, torch.arange(n, device=chosen.device))
    return rows[:n], ends[-1]


@triton.jit
def sum_kernel(
    values_ptr, rows_ptr, first_ptr, last_ptr, count_ptr, out_ptr,  # [., D], [.], [N] x 3, [N, D]
    d, stride_n, stride_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of the rows at positions first to last, in order, divided by ``count`` if there is one.
    Position i is row i, or row ``rows[i]``."""
    part = tl.program_id(0).to(tl.int64)
    depth = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(first_ptr + part)
    last = tl.load(last_ptr + part)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(first, last, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        used = at < last
        rows = at
        if rows_ptr is not None:
            rows = tl.load(rows_ptr + at, mask=used, other=0)
        v = load_tile(values_ptr, rows, used, depth, d, stride_n, stride_d, False)
        total += tl.sum(v.to(tl.float32), 0)
    if count_ptr is not None:  # correctly rounded; "/" may be two units in the last place off
        total = tl.div_rn(total, tl.maximum(tl.load(count_ptr + part), 1).to(tl.float32))
    tl.store(out_ptr + part * d + depth, total, mask=depth < d)


def segment_mean(values: Tensor, labels: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """[N, D], [N], K -> means fp32 [K, D], counts int64 [K]; negative labels are left out."""
    n, d = values.shape
    k = num_segments
    if n and not values.is_cuda and int(labels.max()) >= k:  # the interpreter, which may read them
        raise ValueError(
            f"segment_mean: expected labels below num_segments={k}, got {int(labels.max())}; pass "
            "a larger num_segments or renumber the labels"
        )
    device = values.device
    means = torch.zeros((k, d), dtype=torch.float32, device=device)
    order, rows = labels.sort(stable=True)
    edges = torch.searchsorted(order, torch.arange(k + 1, device=device))  # [K + 1]
    counts = edges[1:] - edges[:-1]
    if not means.numel() or not n:
        return means, counts
    ends = ((counts + PIECE - 1) // PIECE).cumsum(0)  # pieces up to each segment
    pieces = torch.arange(k + n // PIECE, device=device)  # at least as many as there are
    owner = torch.searchsorted(ends, pieces, right=True).clamp_max(k - 1)
    begins = ends - (counts + PIECE - 1) // PIECE
    first = edges[owner] + (pieces - begins[owner]) * PIECE
    last = torch.minimum(first + PIECE, edges[owner + 1])
    sums = torch.empty((len(pieces), d), dtype=torch.float32, device=device)
    config = launch.SEGMENT_MEAN
    tiles = cdiv(d, config.block_d)
    with torch.cuda.device_of(values):
        sum_kernel[(len(pieces), tiles)](
            values_ptr=values, rows_ptr=rows, first_ptr=first, last_ptr=last, count_ptr=None,
            out_ptr=sums, d=d, stride_n=values.stride(0), stride_d=values.stride(1),
            BLOCK_N=config.block_n, BLOCK_D=config.block_d, **config.options,
        )  # fmt: skip
        sum_kernel[(k, tiles)](
            values_ptr=sums, rows_ptr=None, first_ptr=begins, last_ptr=ends, count_ptr=counts,
            out_ptr=means, d=d, stride_n=sums.stride(0), stride_d=sums.stride(1),
            BLOCK_N=config.block_n, BLOCK_D=config.block_d, **config.options,
        )  # fmt: skip
    return means, counts
