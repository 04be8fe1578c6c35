"""Argument checks shared by the ops: raised before any work, in the form
``op: what was expected, what came, what to do``. Values on the device are never read."""

from __future__ import annotations

import torch
from torch import Tensor

from protoclip.ops.backends import ANY_FLOAT

REDUCTIONS = ("mean", "sum", "none")


def matrix(op: str, name: str, x: Tensor, letters: str) -> None:
    """A floating-point [rows, columns] tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected {name} {letters} as a Tensor, got {type(x).__name__}")
    if x.ndim != 2:
        raise ValueError(
            f"{op}: expected {name} of shape {letters}, got {tuple(x.shape)}; flatten or unsqueeze"
        )
    if x.dtype not in ANY_FLOAT:
        raise TypeError(
            f"{op}: expected {name} in float32, bfloat16, float16 or float64, got {x.dtype}; "
            f"cast it, e.g. {name}.float()"
        )


def like(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype, device and number of columns."""
    if x.dtype != other.dtype:
        raise TypeError(
            f"{op}: expected {name} and {other_name} in one dtype, got {x.dtype} and "
            f"{other.dtype}; cast one, e.g. {name}.to({other_name}.dtype)"
        )
    if x.device != other.device:
        raise ValueError(
            f"{op}: expected {name} and {other_name} on one device, got {x.device} and "
            f"{other.device}; move one with .to()"
        )
    if x.shape[1] != other.shape[1]:
        raise ValueError(
            f"{op}: expected {name} and {other_name} to share D, got {tuple(x.shape)} and "
            f"{tuple(other.shape)}"
        )


def scalar(op: str, name: str, x: Tensor | float, device: torch.device) -> Tensor:
    """A float tensor of one element on ``device`` (a Python number is taken too)."""
    if isinstance(x, (int, float)):
        return torch.full((), float(x), dtype=torch.float32, device=device)
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected {name} as a Tensor or float, got {type(x).__name__}")
    if x.shape not in ((), (1,)):
        raise ValueError(f"{op}: expected {name} of shape [] or [1], got {tuple(x.shape)}")
    if x.dtype not in ANY_FLOAT:
        raise TypeError(f"{op}: expected {name} as a float tensor, got {x.dtype}")
    if x.device != device:
        raise ValueError(
            f"{op}: expected {name} on {device} like the features, got {x.device}; "
            f"move it with .to()"
        )
    return x


def labels(op: str, x: Tensor, rows_name: str, rows: Tensor) -> None:
    """int64 [N] beside the [N, D] rows."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected labels [N] as a Tensor, got {type(x).__name__}")
    if x.dtype != torch.int64:
        raise TypeError(f"{op}: expected labels as int64, got {x.dtype}; use labels.long()")
    if x.shape != rows.shape[:1]:
        raise ValueError(
            f"{op}: expected labels of shape [N] for {rows_name} {tuple(rows.shape)}, got "
            f"{tuple(x.shape)}"
        )
    if x.device != rows.device:
        raise ValueError(
            f"{op}: expected labels on {rows.device} like {rows_name}, got {x.device}; "
            f"move them with .to()"
        )


def label_values(op: str, x: Tensor, count: int) -> None:
    """Labels in [0, count) or -100; for tensors on the CPU, whose values may be read."""
    wrong = ((x < 0) | (x >= count)) & (x != -100)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{op}: expected labels in [0, K) or -100, got {int(x[row])} at row {row} for K = "
            f"{count}"
        )


def reduction(op: str, x: str) -> None:
    if x not in REDUCTIONS:
        raise ValueError(f"{op}: expected reduction in {REDUCTIONS}, got {x!r}")
