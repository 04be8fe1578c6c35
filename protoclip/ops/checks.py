"""Argument checks shared by the ops. They raise before any work, in the form
``op: what was expected, what came, what to do``. Values on a GPU are never read."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from protoclip.ops.operators import ANY_FLOAT, accumulator, in_transform

REDUCTIONS = ("mean", "sum", "none")
INTEGERS = (torch.int64,)
OTHER_INTEGERS = (
    *(torch.int8, torch.int16, torch.int32),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
PAIR = ("image_features", "text_features")
LEFT_OUT = -100  # in place of a label or position, as in torch's cross-entropy


def matrix(op: str, name: str, x: Tensor, letters: str) -> None:
    """Require a floating-point [rows, columns] tensor."""
    _dense(op, name, x)
    if x.ndim != 2:
        raise ValueError(f"{op}: expected {name} of shape {letters}, got {tuple(x.shape)}")
    if x.dtype not in ANY_FLOAT:
        raise TypeError(
            f"{op}: expected {name} in float32, bfloat16, float16 or float64, got {x.dtype}; "
            f"cast it, e.g. {name}.float()"
        )


def _dense(op: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected {name} as a Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: expected {name} as a dense Tensor, got {x.layout}; use .to_dense()")


def like(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Require the same device and number of columns."""
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
    op: str, names: tuple[str, str], x: Tensor, y: Tensor, logit_scale: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Check [N, D] and [M, D]; return them in one dtype, and the scale as a tensor."""
    matrix(op, names[0], x, "[N, D]")
    matrix(op, names[1], y, "[M, D]")
    like(op, names[0], x, names[1], y)
    if x.dtype != y.dtype:
        x, y = promoted(x, y)
    return x, y, scale(op, logit_scale, x.device, accumulator(x))


def equal_rows(
    op: str, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """``strip`` for as many texts as images."""
    x, y, logit_scale = strip(op, PAIR, image_features, text_features, logit_scale)
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{op}: expected one text per image, got image_features {tuple(x.shape)} "
            f"and text_features {tuple(y.shape)}; give row i of each the same pair"
        )
    return x, y, logit_scale


def promoted(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the narrowest dtype that holds all of theirs, as torch promotes operands."""
    dtype = common_dtype(tensors)
    return [x if x.dtype == dtype else x.to(dtype) for x in tensors]


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype that torch promotes these operands to."""
    dtype = tensors[0].dtype
    if all(x.dtype == dtype for x in tensors):
        return dtype  # promote_types is an op, which costs a call
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors))


def scalar(
    op: str,
    name: str,
    x: Any,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A one-element float tensor on ``device``, from such a tensor or, in ``dtype``, from a real
    number."""
    if not isinstance(x, Tensor):
        # numpy's scalars and one-element arrays are numbers too; strings and booleans are not
        is_number = hasattr(x, "__float__") and getattr(x, "size", 1) == 1
        number = getattr(x, "item", lambda: x)() if is_number else x
        if not is_number or isinstance(number, (bool, str)):
            raise TypeError(
                f"{op}: expected {name} as a number or a Tensor of shape [] or [1], got "
                f"{type(x).__name__}; pass float({name})"
            )
        number = float(number)
        if math.isnan(number):
            raise ValueError(f"{op}: expected {name} as a number, got nan; check the model")
        return torch.full((), number, dtype=dtype, device=device)
    if x.shape not in ((), (1,)) or x.device != device:
        raise ValueError(
            f"{op}: expected {name} of shape [] or [1] on {device}, got {tuple(x.shape)} on "
            f"{x.device}"
        )
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{op}: expected {name} as a float tensor, got {x.dtype}; use .float()")
    return x if x.dtype in ANY_FLOAT else x.float()


def scale(op: str, x: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The logit scale as ``scalar`` gives it. ValueError if it is negative; a tensor on a GPU, or
    one that is traced, is not read. -inf is not finite, and so is the loss."""
    logit_scale = scalar(op, "logit_scale", x, device, dtype)
    number = 0.0
    if not isinstance(x, Tensor):
        number = x.item() if hasattr(x, "item") else float(x)  # NumPy's numbers and arrays
    elif type(x) in (Tensor, Parameter) and x.device.type == "cpu" and readable(x):
        number = x.item()
    if -math.inf < number < 0:
        raise ValueError(
            f"{op}: logit_scale is the multiplier, not its logarithm; got {number:g}; pass "
            "log_scale.exp()"
        )
    return logit_scale


def tensor(
    op: str,
    name: str,
    x: Any,
    *,
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
) -> None:
    """Require a tensor in one of the dtypes and shapes, on the features' device."""
    wants_integers = torch.int64 in dtypes
    if wants_integers and not isinstance(x, Tensor):
        raise TypeError(
            f"{op}: expected {name} as a Tensor, got {type(x).__name__}; use "
            f"torch.as_tensor({name}), in int64 or another integer dtype"
        )
    _dense(op, name, x)
    if x.dtype not in dtypes:
        if wants_integers:
            expected, method = "int64 or another integer dtype", "long"
        else:
            expected, method = "float32", "float"
        raise TypeError(
            f"{op}: expected {name} as {expected}, got {x.dtype}; use {name}.{method}()"
        )
    if tuple(x.shape) not in shapes:
        words = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{op}: expected {name} of shape {words}, got {list(x.shape)}")
    if x.device != device:
        raise ValueError(
            f"{op}: expected {name} on {device} like the features, got {x.device}; use .to()"
        )


def as_int64(x: Any) -> Any:
    """A tensor of other integers as int64, anything else as it is."""
    return x.long() if isinstance(x, Tensor) and x.dtype in OTHER_INTEGERS else x


def labels(op: str, x: Tensor, rows: Tensor) -> Tensor:
    """Require integers [N] on the device of the [N, D] rows; return them as int64."""
    x = as_int64(x)
    tensor(op, "labels", x, dtypes=INTEGERS, shapes=[(rows.shape[0],)], device=rows.device)
    return x


def label_values(op: str, x: Tensor, count: int) -> None:
    """Require labels in [0, count) or -100; only for CPU tensors, whose values may be read."""
    wrong = ((x < 0) | (x >= count)) & (x != LEFT_OUT)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{op}: expected labels in [0, K) or {LEFT_OUT}, got {int(x[row])} at row {row} for "
            f"K = {count}"
        )


def segments(op: str, used: int, num_segments: int) -> None:
    """Raise ValueError if labels go up to ``used`` - 1 but there are fewer segments."""
    if used > num_segments:
        raise ValueError(
            f"{op}: expected labels below num_segments={num_segments}, got {used - 1}; pass a "
            "larger num_segments or renumber the labels"
        )


def weights(op: str, x: Any, rows: Tensor, backend: str) -> None:
    """Require floats [N] without a gradient for the [N, D] rows; on a CPU and by the reference
    none below 0."""
    tensor(op, "weights", x, dtypes=ANY_FLOAT, shapes=[(rows.shape[0],)], device=rows.device)
    if x.requires_grad:
        raise ValueError(f"{op}: expected weights without a gradient, got some; detach them")
    may_read = readable(x) and (backend == "reference" or rows.device.type == "cpu")
    if may_read and (x < 0).any():
        raise ValueError(f"{op}: expected weights >= 0, got {x.min().item():g}")


def negatives(op: str, x: Any, rows: Tensor) -> None:
    """Require floats [N, H, D] for the [N, D] rows."""
    _dense(op, "negatives", x)
    if x.ndim != 3:
        raise ValueError(f"{op}: expected negatives of shape [N, H, D], got {list(x.shape)}")
    n, d = rows.shape
    shape = (n, x.shape[1], d)
    tensor(op, "negatives", x, dtypes=ANY_FLOAT, shapes=[shape], device=rows.device)


def label_smoothing(op: str, x: Any) -> None:
    """Require a number in [0, 1].

    Its default is the integer 0: with dynamic=True torch.compile makes a symbol of a default 0.0,
    finds that this check fixes it, and compiles again."""
    if not isinstance(x, (int, float)):
        raise TypeError(
            f"{op}: expected label_smoothing as a Python number, got {type(x).__name__}; "
            "pass float(label_smoothing)"
        )
    if not 0 <= x <= 1:
        raise ValueError(f"{op}: expected label_smoothing in [0, 1], got {x:g}")


def one_of(op: str, name: str, x: str, choices: Sequence[str]) -> None:
    if x not in choices:
        raise ValueError(f"{op}: expected {name} in {choices}, got {x!r}")


def readable(x: Tensor) -> bool:
    """Whether the reference may read these values for a check."""
    return not (x.is_meta or torch.compiler.is_compiling() or in_transform())
