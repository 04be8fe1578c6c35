"""Checks and helpers shared by the metrics."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 1 << 24  # one block of scores: 64 MiB in float32


def check_matrix(name: str, x: Tensor, rows: int | None = None, cols: int | None = None) -> None:
    """Raises unless ``x`` is a floating [rows, cols] matrix (None: any size)."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating-point matrix, got {x.dtype} {tuple(x.shape)}"
        )
    if (rows is not None and x.shape[0] != rows) or (cols is not None and x.shape[1] != cols):
        raise ValueError(
            f"{name}: expected shape [{'any' if rows is None else rows}, "
            f"{'any' if cols is None else cols}], got {tuple(x.shape)}"
        )


def check_labels(name: str, labels: Tensor, rows: int) -> None:
    """Raises unless ``labels`` is an integer vector with one entry per row."""
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{name}: expected a vector of integers, got {labels.dtype} {tuple(labels.shape)}"
        )
    if labels.shape[0] != rows:
        raise ValueError(
            f"{name}: expected one label per row ({rows}), got {labels.shape[0]} labels"
        )


def unit(x: Tensor) -> Tensor:
    """Rows of ``x`` at length 1, in at least float32; a zero row stays zero."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)


def rows_per_block(columns: int) -> int:
    """How many rows of scores with this many columns fit one block."""
    return max(1, BLOCK_ELEMENTS // max(columns, 1))
