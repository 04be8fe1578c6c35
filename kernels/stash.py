"""Products of a forward pass kept in 16 bits for its backward pass.

Only whole tiles off the diagonal are kept; those on the edge and the diagonal are formed again, so
positives are exact. A tile has an anchor, the product x.y of its largest logit, and a step; the
code of a product is its distance from the anchor in steps, 0 to 65535. The step is the tile's
spread over 65535, or 2^-9 in base-2 logits if that is less, and what lies beyond 128 binary orders
below the anchor saturates, where its probability is under 2^-62. So a base-2 logit is off by at
most 2^-10, a probability by 0.07 %, at any scale. bf16, in as many bytes, is off by 2^-9 of the
logit itself: of a logit of 100 nats, by a fifth in probability.

Layout: the codes, int16, tile after tile, then fp32 [tiles, 2], their anchors and steps. The room
is for N and M rounded up to whole tiles of any launch row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels.launch import Launch, aligned

STASH_BYTES = 2 << 30  # of codes: N = 32,768
LARGEST_TILE = 128
SMALLEST_TILE = 32


@triton.jit
def _tile(row0, col0, tiles_m, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """-> a tile's number and where its elements lie from its first."""
    tile = (row0 // BLOCK_N).to(tl.int64) * tiles_m + col0 // BLOCK_M
    return tile, tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]


@triton.jit
def keep(
    acc, c, row0, col0, codes_ptr, anchors_ptr, tiles_m,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write one tile of products."""
    tile, at = _tile(row0, col0, tiles_m, BLOCK_N, BLOCK_M)
    low, high = tl.min(acc), tl.max(acc)
    anchor = low if c < 0 else high
    step = tl.minimum((high - low) * (1.0 / 65535.0), 0.001953125 / tl.abs(c))
    step = step if c < 0 else -step
    inverse = 0.0 if tl.abs(step) < 1e-30 else 1.0 / step
    code = tl.minimum((acc - anchor) * inverse, 65535.0) - 32767.5
    code = tl.floor(code).to(tl.int16)
    tl.store(codes_ptr + tile * (BLOCK_N * BLOCK_M) + at, code)
    tl.store(anchors_ptr + 2 * tile, anchor)
    tl.store(anchors_ptr + 2 * tile + 1, step)


@triton.jit
def kept(
    row0, col0, codes_ptr, anchors_ptr, tiles_m,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """-> the products of a tile, fp32."""
    tile, at = _tile(row0, col0, tiles_m, BLOCK_N, BLOCK_M)
    anchor, step = tl.load(anchors_ptr + 2 * tile), tl.load(anchors_ptr + 2 * tile + 1)
    code = tl.load(codes_ptr + tile * (BLOCK_N * BLOCK_M) + at)
    return code.to(tl.float32) * step + (anchor + 32768.0 * step)


@dataclass(frozen=True)
class Stash:
    """What is kept of logits with m columns, tile after tile."""

    codes: Tensor  # int16 [room for whole tiles]
    anchors: Tensor  # fp32 [tiles, 2]
    m: int


def _sides(n: int, m: int) -> tuple[int, int]:
    p, q = (-(-side // LARGEST_TILE) * LARGEST_TILE for side in (n, m))
    return p, q


def size(n: int, m: int) -> int:
    """int16 elements that keep n x m logits; 0 where they would pass ``STASH_BYTES``."""
    p, q = _sides(n, m)
    anchors = 4 * (p // SMALLEST_TILE) * (q // SMALLEST_TILE)
    return p * q + anchors if 2 * p * q <= STASH_BYTES else 0


def view(buffer: Tensor | None, n: int, m: int) -> Stash | None:
    """The parts of a buffer of ``size(n, m)`` elements."""
    if buffer is None:
        return None
    p, q = _sides(n, m)
    return Stash(buffer[: p * q], buffer[p * q :].view(torch.float32).view(-1, 2), m)


def arguments(stash: Stash | None, row: int, col: int, launch: Launch) -> dict[str, Any]:
    """The arguments of a kernel whose first tile is at (row, col)."""
    if stash is None:
        return {"codes_ptr": None, "anchors_ptr": None, "stash_tiles_m": 0, "STASH": False}
    tiles_m = -(-stash.m // launch.block_m)
    tile = row // launch.block_n * tiles_m + col // launch.block_m
    return {
        "codes_ptr": stash.codes[tile * launch.block_n * launch.block_m :],
        "anchors_ptr": stash.anchors[tile:],
        "stash_tiles_m": tiles_m,
        "STASH": True,
    }


def aligned_copies(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Features that ``launch.choose`` judges by D alone: both passes must cut the same tiles, and
    a saved tensor may come back elsewhere in memory."""
    if aligned(x) and aligned(y):
        return x, y
    x, y = (t.clone(memory_format=torch.contiguous_format) for t in (x, y))
    return x, y
