"""InfoNCE over tiles of the logits, which never reach memory: what ops/contrastive.py calls.

Base-2 logits s_ij = scale log2(e) x_i.y_j; row i is positive at column i + offset. The forward pass
(``info_nce_forward.py``) keeps O(N) statistics, the backward pass (``info_nce_backward.py``) forms
the logits again: four matrix products in all.

Up to ``info_nce_forward.ONE_PROGRAM`` pairs a step is six launches: forward, merge (which takes the
loss); gradient, two products, finish (with the scale's gradient); and no torch op around them. More
pairs take a ``sum`` of the losses, many more pairs waves and chunks.

Sums are fp32 and in a fixed order: no atomics, the same bits each time. Nothing is read back from
the device, so both passes can be captured in a CUDA graph. Extra memory: 64 MiB of partial sums
forward, ``waves.SCRATCH_BYTES`` plus fp32 gradients backward. fp32 features are multiplied in fp32,
never tf32, by these kernels; ``torch.backends.cuda.matmul`` settings hold for the backward's two
products.
"""

from __future__ import annotations

from torch import Tensor

from protoclip.kernels import info_nce_backward, info_nce_forward


def contrastive_fwd(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    offset: int,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of the strip x [N, D] against y [M, D], as in ops/contrastive.py."""
    found = _statistics(x, y, scale, offset, columns, 1.0)
    return found.row_max, found.row_sum, found.column_max, found.column_sum, found.positive


def contrastive(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    offset: int,
    columns: bool,
    pair_weight: float,
    summed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The losses [N], or their sum [], and the statistics that their gradient needs."""
    found = _statistics(x, y, scale, offset, columns, pair_weight)
    loss = found.loss
    if summed:
        loss = found.shares.sum() if len(found.shares) > 1 else found.shares.view(())
    return loss, found.row_max, found.row_sum, found.column_max, found.column_sum


def _statistics(x, y, scale, offset, columns, weight) -> info_nce_forward.Statistics:
    _check_strip(len(x), len(y), offset)
    return info_nce_forward.statistics(x, y, scale, offset, columns, weight)


def contrastive_bwd(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    column_max: Tensor,
    column_sum: Tensor,
    row_weight: Tensor,
    column_weight: Tensor,
    offset: int,
    pair_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the strip, as in ops/contrastive.py, from what the forward pass kept.

    The weights, of any stride, 0 too, are multiplied by ``pair_weight``.
    """
    _check_strip(len(x), len(y), offset)
    rows = (row_max, row_sum, row_weight)
    columns = (column_max, column_sum, column_weight)
    return info_nce_backward.gradients(x, y, scale, rows, columns, offset, pair_weight)


def _check_strip(n: int, m: int, offset: int) -> None:
    if n and not 0 <= offset <= m - n:
        raise ValueError(
            f"info_nce: expected the positives of {n} rows, columns {offset} to {offset + n - 1}, "
            f"among the {m} columns; pass offset between 0 and M - N"
        )
