"""Choose the implementation that runs: one literal table, one rule.

A backend named by the caller never falls back. ``auto`` (which ``PROTOCLIP_BACKEND`` overrides)
takes the first backend of ``AUTO_ORDER`` that is usable on the tensors' device.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial

import numpy
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.torch_version import TorchVersion

from protoclip.ops import native

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ANY_FLOAT = (*FLOATS, torch.float64)
_LIBRARY = torch.library.Library("protoclip", "FRAGMENT")


@dataclass(frozen=True)
class Backend:
    """One implementation: where its functions are, and which tensors and machines it supports."""

    find: Callable[[str], Callable]  # name -> function, imported at first use
    device_types: tuple[str, ...] | None  # None: any
    dtypes: tuple[torch.dtype, ...]
    why_not: Callable[[], str | None]  # None: usable on this machine


@cache
def _no_triton() -> str | None:
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels slowly on the CPU)"
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if torch.cuda.is_available():
        return importlib.import_module("protoclip.kernels.launch").why_not()
    # Older Triton calls int() on arrays of one element, which numpy 2.4 refuses.
    old = TorchVersion(triton.__version__) < "3.7" and TorchVersion(numpy.__version__) >= "2.4"
    return "the interpreter of triton < 3.7 needs numpy < 2.4 (a GPU does not)" if old else None


def _from(module: str) -> Callable[[str], Callable]:
    return lambda name: getattr(importlib.import_module(module), name)


def _triton(module: str) -> Backend:
    # CPU tensors are for Triton's interpreter only.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    devices = ("cuda", "cpu") if interpreted else ("cuda",)
    return Backend(_from(f"protoclip.kernels.{module}"), devices, FLOATS, _no_triton)


REFERENCE = Backend(_from("protoclip.ops.reference"), None, ANY_FLOAT, lambda: None)
CPU = Backend(partial(native.op, "cpu"), ("cpu",), FLOATS, partial(native.why_not, "cpu"))
CUDA = Backend(partial(native.op, "cuda"), ("cuda",), FLOATS, partial(native.why_not, "cuda"))
ANYWHERE = {"cpu": CPU, "reference": REFERENCE}
CLUSTERS = ANYWHERE | {"cuda": CUDA, "triton": _triton("clusters")}
TABLE: dict[str, dict[str, Backend]] = {
    "info_nce": ANYWHERE | {"triton": _triton("info_nce")},
    "contrastive": ANYWHERE | {"triton": _triton("matched")},
    "siglip": ANYWHERE | {"triton": _triton("siglip")},
    "prototype_cross_entropy": ANYWHERE | {"triton": _triton("prototype_cross_entropy")},
    "soft_targets": ANYWHERE | {"triton": _triton("prototype_cross_entropy")},
    "kmeans_assign": CLUSTERS,
    "segment_mean": CLUSTERS,
}
PUBLIC = {  # ops that use the table row of another op
    "nt_xent": "contrastive",
    "sup_con": "contrastive",
    "contrastive_parts": "contrastive",
    "sigmoid_loss": "siglip",
    "prototype_losses": "prototype_cross_entropy",
}
AUTO_ORDER = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}  # then the reference


def backends(op: str) -> dict[str, str | None]:
    """Say which backends of an op work on this machine.

    Args:
        op: a public op's name, e.g. ``"info_nce"``.
    Returns:
        backend name -> None if it is usable here, else the reason in words. The call may compile
        the native library (once).
    Raises:
        ValueError: no such op.
    """
    if (row := PUBLIC.get(op, op)) not in TABLE:
        raise ValueError(f"backends: expected one of {sorted({*TABLE, *PUBLIC})}, got {op!r}")
    return {name: backend.why_not() for name, backend in TABLE[row].items()}


def why_not(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run an op on such tensors, in words; None if it can."""
    row = TABLE[op].get(backend)
    if row is None:
        return f"{op} has only {', '.join(sorted(TABLE[op]))}"
    if backend != "reference" and in_transform():
        return "torch.func's transforms and forward-mode differentiation need the reference"
    if row.device_types is not None and device_type not in row.device_types:
        return f"it runs on {' or '.join(row.device_types)}, the tensors are on {device_type}"
    if dtype not in row.dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in row.dtypes)
        return f"it takes {names}, the tensors are {str(dtype).removeprefix('torch.')}"
    return row.why_not()


def resolve(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str:
    """Name the backend that will run ``op``; a constant to torch.compile.

    Raises:
        ValueError: no such backend, or the named one cannot run here (the message says why).
    """
    if backend == "auto":
        backend = os.environ.get("PROTOCLIP_BACKEND") or "auto"
    if backend != "auto":
        if reason := why_not(op, backend, device_type, dtype):
            raise ValueError(
                f"{op}: backend {backend!r} cannot run: {reason}. Use backend='auto' to let "
                f"protoclip choose; protoclip.backends({op!r}) lists what works here"
            )
        return backend
    if in_transform():
        return "reference"
    for name in AUTO_ORDER.get(device_type, ()):
        if name in TABLE[op] and why_not(op, name, device_type, dtype) is None:
            return name
    if device_type == "cuda" and dtype in FLOATS:
        _warn_slow(op)
    return "reference"


@cache  # once for each op
def _warn_slow(op: str) -> None:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in backends(op).items() if reason)
    warnings.warn(
        f"{op}: expected a fast backend on this GPU, got none ({reasons}), so plain torch runs, "
        "many times slower; install what is missing, or pass backend='reference' to accept it",
        stacklevel=4,
    )


# Same as torch.compiler.assume_constant_result, which would load dynamo and triton (1.8 s).
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def implementation(op: str, backend: str, function: str) -> Callable:
    """The function of a backend's module, imported at first use."""
    return TABLE[op][backend].find(function)


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype of sums and losses: fp32, or fp64 for fp64 input (reference only)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def reduce(losses: Tensor, reduction: str, count: int | Tensor) -> Tensor:
    """Mean (0 for no rows), sum, or the rows themselves."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))


def without_autocast(device_type: str) -> AbstractContextManager:
    """Turn autocast off, on devices that have it ("meta" does not)."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def in_transform() -> bool:
    """Whether torch.func's grad, vmap or jvp, or forward-mode differentiation, is active."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def wants_gradient(*inputs: Tensor) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)


def define(schema: str, run: Callable, fake: Callable) -> None:
    """Add an op to ``torch.ops.protoclip``; ``fake`` gives the shapes of its results."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"protoclip::{name}", fake, lib=_LIBRARY)


def define_gradient(
    name: str, op: str, backward: Callable | None = None, setup_context: Callable | None = None
) -> None:
    """Give ``protoclip::name`` the gradient ``backward``. Without one, asking for a gradient (a
    second derivative of the public ``op``) raises an error that names ``op``."""

    def refuse(ctx, *_):
        raise RuntimeError(
            f"{op}: its fused backends have no second derivative; use backend='reference' for it"
        )

    torch.library.register_autograd(
        f"protoclip::{name}", backward or refuse, setup_context=setup_context, lib=_LIBRARY
    )


# This is an op so that a second derivative raises; plain autograd would ignore that ``saved``, from
# the forward pass, depends on the inputs.
define(
    "scaled(Tensor grad, Tensor saved) -> Tensor",
    lambda grad, saved: (grad.float() * saved).to(saved.dtype),
    lambda grad, saved: torch.empty_like(saved),
)
define_gradient("scaled", "this loss")
