"""Choose the implementation that runs: one literal table, one rule.

A backend named by the caller never falls back. ``auto`` (which ``PROTOCLIP_BACKEND`` overrides)
takes the first backend of ``AUTO_ORDER`` that is usable on the tensors' device.

All fused backends of an op have the same functions, which take the same arguments, by keyword; the
contracts are in the files that define the ops. C++'s are in ``csrc/bindings.cpp``, CUDA's in
``csrc/cuda_bindings.cpp``, Triton's in ``kernels/``; each is imported or compiled at first use.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy
import torch
from torch.torch_version import TorchVersion

from protoclip.ops import native, reference
from protoclip.ops.operators import ANY_FLOAT, FLOATS, in_transform

Function = Callable[..., Any]


@dataclass(frozen=True)
class Backend:
    """One implementation of an op, and which tensors and machines it supports."""

    function: Callable[[str], Function]  # by its name in the contract
    device_types: tuple[str, ...] | None  # None: any
    dtypes: tuple[torch.dtype, ...]
    why_not: Callable[[], str | None]  # None: usable on this machine
    # Whether forward functions fill a ``stash`` that backward functions read (stash.py).
    keeps_stash: bool = False
    # Whether it has a kernel that turns ids into small numbers (id_codes.py).
    codes_ids: bool = False
    # The largest K for which coding the points first is faster; -1: it cannot code them.
    most_coded_clusters: float = -1
    # Up to this K x D it measures all distances, without codes.
    most_measured: int = 0
    # Whether it has the functions kmeans_greedy_start and kmeans_iteration.
    runs_kmeans: bool = False


@cache
def _no_triton() -> str | None:
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels slowly on the CPU)"
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if torch.cuda.is_available():
        from protoclip.kernels import launch

        return launch.why_not()
    # Older Triton calls int() on arrays of one element, which numpy 2.4 refuses.
    old = TorchVersion(triton.__version__) < "3.7" and TorchVersion(numpy.__version__) >= "2.4"
    return "the interpreter of triton < 3.7 needs numpy < 2.4 (a GPU does not)" if old else None


def _of_cpu(name: str) -> Function:
    return getattr(native.cpu_ops(), name).default


def _of_cuda(name: str) -> Function:
    return getattr(native.cuda_ops(), f"{name}_cuda").default


def triton_backend(file: str) -> Backend:
    """Triton's launchers in a file of kernels/. CPU tensors are for its interpreter only."""

    def launcher(name: str) -> Function:
        return getattr(importlib.import_module(f"protoclip.kernels.{file}"), name)

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return Backend(launcher, ("cuda", "cpu") if interpreted else ("cuda",), FLOATS, _no_triton)


CPU = Backend(_of_cpu, ("cpu",), FLOATS, partial(native.why_not, "cpu"))
CUDA = Backend(_of_cuda, ("cuda",), FLOATS, partial(native.why_not, "cuda"))
# Losses call it directly instead: its autograd is torch's own.
REFERENCE = Backend(partial(getattr, reference), None, ANY_FLOAT, lambda: None)

SOFTMAX = {
    "cpu": replace(CPU, keeps_stash=True),
    "triton": replace(triton_backend("contrastive"), codes_ids=True),
    "reference": REFERENCE,
}
PROTOTYPES = triton_backend("prototype_cross_entropy")
CLUSTERS = {
    # Beyond 1,024 coding is less than 4 % of an assignment. K x D: kDirect in kmeans_direct.h.
    "cpu": replace(CPU, most_coded_clusters=1024, most_measured=2048, runs_kmeans=True),
    "cuda": replace(CUDA, most_coded_clusters=float("inf")),
    "triton": replace(triton_backend("clusters"), most_coded_clusters=float("inf")),
    "reference": REFERENCE,
}
TABLE: dict[str, dict[str, Backend]] = {
    "info_nce": SOFTMAX,
    "contrastive": SOFTMAX,
    "sigmoid_loss": {"cpu": CPU, "triton": triton_backend("sigmoid_loss"), "reference": REFERENCE},
    "prototype_cross_entropy": {"cpu": CPU, "triton": PROTOTYPES, "reference": REFERENCE},
    "soft_targets": {"cpu": CPU, "triton": PROTOTYPES, "reference": REFERENCE},
    "kmeans_assign": CLUSTERS,
    "segment_mean": CLUSTERS,
}
ROW_OF = {  # public name -> row of TABLE, where they differ
    "nt_xent": "contrastive",
    "sup_con": "contrastive",
    "contrastive_parts": "contrastive",
    "prototype_losses": "prototype_cross_entropy",
    "ClipLoss": "info_nce",
    "SigLipLoss": "sigmoid_loss",
    "ProtoClipLoss": "info_nce",
    "kmeans": "kmeans_assign",
    "KMeans": "kmeans_assign",
}
AUTO_ORDER = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}  # then the reference


@cache
def function(op: str, backend: str, name: str) -> Function:
    """A function of an op's contract as a backend has it."""
    return TABLE[op][backend].function(name)


def backends(op: str) -> dict[str, str | None]:
    """Say which backends of an op work on this machine.

    Args:
        op: a public op's name, e.g. ``"info_nce"``.
    Returns:
        backend name -> None if it is usable here, else the reason in words. The call may compile
        the native library (once).
    Raises:
        ValueError: no such op.

    Example:
        >>> protoclip.backends("info_nce")["reference"] is None
        True
    """
    row_name = ROW_OF.get(op, op)
    if row_name not in TABLE:
        raise ValueError(f"backends: expected one of {sorted({*TABLE, *ROW_OF})}, got {op!r}")
    return {name: backend.why_not() for name, backend in TABLE[row_name].items()}


def why_not(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run an op on such tensors, in words; None if it can."""
    implementation = TABLE[op].get(backend)
    if implementation is None:
        return f"{op} has only {', '.join(sorted(TABLE[op]))}"
    if backend != "reference" and in_transform():
        return "torch.func's transforms and forward-mode differentiation need the reference"
    device_types = implementation.device_types
    if device_types is not None and device_type not in device_types:
        return f"it runs on {' or '.join(device_types)}, the tensors are on {device_type}"
    if dtype not in implementation.dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in implementation.dtypes)
        return f"it takes {names}, the tensors are {str(dtype).removeprefix('torch.')}"
    return implementation.why_not()


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
    for name in AUTO_ORDER.get(device_type, ()):
        if name in TABLE[op] and why_not(op, name, device_type, dtype) is None:
            return name
    if device_type in ("cuda", "xpu", "mps") and dtype in FLOATS and not in_transform():
        _warn_slow(op, device_type)
    return "reference"


@cache  # once for each op
def _warn_slow(op: str, device_type: str) -> None:
    reasons = f"none runs on {device_type}"
    if device_type == "cuda":
        reasons = "; ".join(f"{name}: {reason}" for name, reason in backends(op).items() if reason)
    warnings.warn(
        f"{op}: expected a fast backend on this GPU, got none ({reasons}), so plain torch runs, "
        "many times slower; install what is missing, or pass backend='reference' to accept it",
        stacklevel=4,
    )


# Same as torch.compiler.assume_constant_result, which would load dynamo and triton (1.8 s).
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
