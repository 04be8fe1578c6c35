"""k-means assignment and segment means on a GPU without nvcc: what ops/clusters.py calls.

Assignment: scores x.c - |c|^2 / 2 from 16-bit products (of a bf16 copy where points are fp32), the
best two kept beside the product. Rows whose margin is within what rounding can change, or is not a
number that says anything, are collected, without waiting for the device, and take the least
|x - c|^2 in fp32: labels are exact.
Segment mean: rows sorted by label, in pieces of at most PIECE rows, each summed in order and then
joined in order: no atomics, the same bits every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels.attention import load_tile
from protoclip.kernels.launch import INTERPRETED, Launch
from protoclip.kernels.tiles import operands, products

ASSIGN = Launch(128, 64, 64, warps=8, stages=3)
RESCORE = Launch(*((128, 256) if INTERPRETED else (64, 64)), 16, warps=8, stages=1)
MEAN = Launch(32, 0, 128, warps=4, stages=1)
PIECE = 1024  # rows of a piece of a segment
CHUNK = 1 << 16  # points at a time whose distance to their centroid is taken


@triton.jit(do_not_specialize=["n", "k_count"])
def assign_kernel(
    x_ptr, c_ptr, half_norm_ptr, reach_ptr,  # [N, D], [K, D], [K], [N]: of the rounding
    rows_ptr, count_ptr,  # [N], []: which rows, or None for all
    label_ptr, near_ptr,  # [N], [N]: whether the margin is within reach; None for rescored rows
    n, k_count, d, strides,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    DIRECT: tl.constexpr,
):  # fmt: skip
    """Best centroid of a tile of rows. DIRECT: by -|x - c|^2 itself, in units of the distance to
    the label so far where its square would leave fp32."""
    stride_x_n, stride_x_d, stride_c_k, stride_c_d = strides
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if rows_ptr is not None:
        n = tl.load(count_ptr).to(tl.int32)
    used, rows = at < n, at
    if tl.program_id(0) * BLOCK_N < n:
        if rows_ptr is not None:
            rows = tl.load(rows_ptr + at, mask=used, other=0)
        best = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        second = best
        label = tl.zeros((BLOCK_N,), tl.int64)
        keys = tl.arange(0, BLOCK_M)
        if DIRECT:
            known = c_ptr + tl.load(label_ptr + rows, mask=used, other=0) * stride_c_k
            widest = tl.zeros((BLOCK_N,), tl.float32)
            for column in range(0, d):
                x = tl.load(x_ptr + rows * stride_x_n + column * stride_x_d, mask=used, other=0.0)
                c = tl.load(known + column * stride_c_d, mask=used, other=0.0)
                widest = tl.maximum(widest, tl.abs(x.to(tl.float32) - c.to(tl.float32)))
            usual = (widest > 1e-10) & (widest < 1e10)
            unit = tl.where(usual, 1.0, 1.0 / tl.maximum(widest, 1e-37))[:, None]
        for start in range(0, k_count, BLOCK_M):
            some = start + keys
            inside = some < k_count
            s = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            if DIRECT:
                for first in range(0, d, BLOCK_D):  # sums of sums round less
                    part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                    for column in range(first, min(first + BLOCK_D, d)):
                        x_at = x_ptr + rows * stride_x_n + column * stride_x_d
                        c_at = c_ptr + some.to(tl.int64) * stride_c_k + column * stride_c_d
                        x = tl.load(x_at, mask=used, other=0.0).to(tl.float32)
                        c = tl.load(c_at, mask=inside, other=0.0).to(tl.float32)
                        difference = (x[:, None] - c[None, :]) * unit
                        part += difference * difference
                    s -= part
            else:
                row0 = tl.program_id(0) * BLOCK_N
                s = products(
                    x_ptr, c_ptr, row0, start, n, k_count, d, strides,
                    BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D,
                )  # fmt: skip
                s -= tl.load(half_norm_ptr + some, mask=inside, other=0.0)[None, :]
            s = tl.where(inside[None, :], s, -float("inf"))
            top = tl.max(s, 1)
            index = tl.min(tl.where(s == top[:, None], keys[None, :], BLOCK_M), 1)
            runner_up = tl.max(tl.where(keys[None, :] == index[:, None], -float("inf"), s), 1)
            better = top > best  # not where equal: the lowest index wins
            second = tl.maximum(tl.where(better, best, second), tl.where(better, runner_up, top))
            best = tl.where(better, top, best)
            label = tl.where(better, start + index, label)
        tl.store(label_ptr + rows, label, mask=used)
        if near_ptr is not None:
            reach = tl.load(reach_ptr + at, mask=used, other=0.0)
            margin = best - second  # NaN and infinite after an overflow
            clear = (margin > reach) & (margin < float("inf"))
            tl.store(near_ptr + at, tl.where(clear, 0, 1).to(tl.int64), mask=used)


def kmeans_encode(points: Tensor) -> tuple[Tensor, Tensor]:
    """[N, D] -> what ``kmeans_assign_coded`` takes of them: in 16 bits, and their norms [N]."""
    norms = torch.linalg.vector_norm(points, dim=1, dtype=torch.float32)
    return points.bfloat16() if points.dtype == torch.float32 else points, norms


def kmeans_assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """[N, D], [K, D] -> labels int64 [N], squared distances fp32 [N]."""
    return kmeans_assign_coded(points, centroids, *kmeans_encode(points))


def kmeans_assign_coded(
    points: Tensor, centroids: Tensor, x: Tensor, x_norms: Tensor
) -> tuple[Tensor, Tensor]:
    """``kmeans_assign`` of points whose 16-bit copy and norms are there."""
    (n, d), k = points.shape, len(centroids)
    labels = torch.zeros(n, dtype=torch.int64, device=points.device)
    distances = torch.zeros(n, dtype=torch.float32, device=points.device)
    if not n:
        return labels, distances
    # At most what their squares lose below the normal numbers is missing from the norms.
    lost = d**0.5 * 2.0**-62
    norms = torch.linalg.vector_norm(centroids, dim=1, dtype=torch.float32)  # [K]
    size = x_norms + lost  # [N]
    largest = norms.amax() + lost
    # What rounding both operands to bf16, 2^-8 of a number each, or summing in fp32 can change in a
    # difference of scores.
    wide = points.dtype == torch.float32
    rounding = 4 * 1.01 * 2.0**-8 if wide else 0.0
    sums = (d + 16) * 2.0**-22
    reach = largest * (size * (rounding + sums) + largest * sums)
    reach += (size + largest + 1) * (d + 16) * 2.0**-125  # below the normal numbers
    near = torch.zeros_like(labels)
    c = centroids.to(x.dtype)
    _, options = operands(x, c, ASSIGN)
    with torch.cuda.device_of(points):
        assign_kernel[(triton.cdiv(n, ASSIGN.block_n),)](
            x, c, norms.square() / 2, reach, None, None, labels, near, n, k, d,
            (*x.stride(), *c.stride()), DIRECT=False, **options,
        )  # fmt: skip
        rows, count = near.argsort(descending=True), near.sum()
        _, options = operands(points, centroids, RESCORE)
        assign_kernel[(triton.cdiv(n, RESCORE.block_n),)](
            points, centroids, norms, reach, rows, count, labels, None, n, k, d,
            (*points.stride(), *centroids.stride()), DIRECT=True, **options,
        )  # fmt: skip
    for part in (slice(i, i + CHUNK) for i in range(0, n, CHUNK)):
        gap = points[part].float() - centroids[labels[part]].float()
        distances[part] = gap.square().sum(dim=1)
    return labels.where(~distances.isnan(), -1), distances


@triton.jit(do_not_specialize=["n"])
def sum_kernel(
    values_ptr, rows_ptr, first_ptr, last_ptr, count_ptr, out_ptr,  # [., D], [.], [N] x 3, [N, D]
    n, d, stride_n, stride_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of consecutive rows first to last, in order, over their count where given; ``rows``
    may say which rows those are."""
    part = tl.program_id(0).to(tl.int64)
    depth = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = tl.load(first_ptr + part), tl.load(last_ptr + part)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(first, last, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        used, rows = at < last, at
        if rows_ptr is not None:
            rows = tl.load(rows_ptr + at, mask=used, other=0)
        v = load_tile(values_ptr, rows, used, depth, d, stride_n, stride_d, False)
        total += tl.sum(v.to(tl.float32), 0)
    if count_ptr is not None:
        total /= tl.maximum(tl.load(count_ptr + part), 1).to(tl.float32)
    tl.store(out_ptr + part * d + depth, total, mask=depth < d)


def segment_mean(values: Tensor, labels: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """[N, D], [N], K -> means fp32 [K, D], counts int64 [K]; other labels are left out."""
    (n, d), k, device = values.shape, num_segments, values.device
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
    tiles, block = triton.cdiv(d, MEAN.block_d), {"BLOCK_N": MEAN.block_n, "BLOCK_D": MEAN.block_d}
    with torch.cuda.device_of(values):
        sum_kernel[(len(pieces), tiles)](
            values, rows, first, last, None, sums, n, d, *values.stride(), **block, **MEAN.options
        )
        sum_kernel[(k, tiles)](
            sums, None, begins, ends, counts, means, n, d, *sums.stride(), **block, **MEAN.options
        )
    return means, counts
