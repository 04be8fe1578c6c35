"""Argument checks shared by the ops: raised before any work, in the form
``op: what was expected, what came, what to do``. Values on the device are never read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from protoclip.ops.backends import ANY_FLOAT

REDUCTIONS = ("mean", "sum", "none")
INTEGERS = (torch.int64,)


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
    """Same device and number of columns."""
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


def strip(
    op: str, x_name: str, x: Tensor, y_name: str, y: Tensor, logit_scale: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, D] and [M, D] of one device, in one dtype, and the scale as a tensor."""
    matrix(op, x_name, x, "[N, D]")
    matrix(op, y_name, y, "[M, D]")
    like(op, y_name, y, x_name, x)
    x, y = promoted(x, y)
    return x, y, scalar(op, "logit_scale", logit_scale, x.device)


def pairs(
    op: str, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """``strip`` of as many texts as images."""
    names = "image_features", "text_features"
    x, y, scale = strip(op, names[0], image_features, names[1], text_features, logit_scale)
    if len(x) != len(y):
        raise ValueError(
            f"{op}: expected one text per image, got image_features {tuple(x.shape)} "
            f"and text_features {tuple(y.shape)}; give row i of each the same pair"
        )
    return x, y, scale


def promoted(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the narrowest dtype that holds all of theirs, as torch promotes operands."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in tensors]


def scalar(op: str, name: str, x: Any, device: torch.device) -> Tensor:
    """A float tensor of one element on ``device``, from such a tensor or any real number."""
    if not isinstance(x, Tensor):
        # numpy's scalars and its arrays of one element among them; not a number's text
        if isinstance(x, str) or not hasattr(x, "__float__") or getattr(x, "size", 1) != 1:
            raise TypeError(
                f"{op}: expected {name} as a number or a Tensor of shape [] or [1], got "
                f"{type(x).__name__}; pass float({name})"
            )
        return torch.full((), float(getattr(x, "item", lambda: x)()), device=device)
    if x.shape not in ((), (1,)) or x.device != device:
        raise ValueError(
            f"{op}: expected {name} of shape [] or [1] on {device}, got {tuple(x.shape)} on "
            f"{x.device}"
        )
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(
            f"{op}: expected {name} as a float tensor, got {x.dtype}; cast it with .float()"
        )
    return x if x.dtype in ANY_FLOAT else x.float()


def vector(
    op: str, name: str, x: Any, dtypes: Sequence[torch.dtype], shapes: Sequence[tuple[int, ...]],
    device: torch.device,
) -> None:  # fmt: skip
    """A tensor in one of the dtypes and shapes, beside the features."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected {name} as a Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        kind, cast = ("int64", "long") if torch.int64 in dtypes else ("float32", "float")
        raise TypeError(f"{op}: expected {name} as {kind}, got {x.dtype}; use {name}.{cast}()")
    if tuple(x.shape) not in shapes:
        words = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{op}: expected {name} of shape {words}, got {list(x.shape)}")
    if x.device != device:
        raise ValueError(
            f"{op}: expected {name} on {device} like the features, got {x.device}; use .to()"
        )


def labels(op: str, x: Tensor, rows: Tensor) -> None:
    """int64 [N] beside the [N, D] rows."""
    vector(op, "labels", x, INTEGERS, [(len(rows),)], rows.device)


def label_values(op: str, x: Tensor, count: int) -> None:
    """Labels in [0, count) or -100; for tensors on the CPU, whose values may be read."""
    wrong = ((x < 0) | (x >= count)) & (x != -100)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{op}: expected labels in [0, K) or -100, got {int(x[row])} at row {row} for K = "
            f"{count}"
        )


def segments(op: str, used: int, num_segments: int) -> None:
    """Raise ValueError where labels go up to ``used`` - 1 and there are fewer segments."""
    if used > num_segments:
        raise ValueError(
            f"{op}: expected labels below num_segments={num_segments}, got {used - 1}; pass a "
            "larger num_segments or renumber the labels"
        )


def reduction(op: str, x: str) -> None:
    if x not in REDUCTIONS:
        raise ValueError(f"{op}: expected reduction in {REDUCTIONS}, got {x!r}")
