"""Which implementation runs: one literal table, one rule.

A backend named by the caller never falls back. ``auto`` (or ``PROTOCLIP_BACKEND``, which stands in
for ``auto``) takes the first row of ``AUTO_ORDER`` that is usable on the tensors' device.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ANY_FLOAT = (*FLOATS, torch.float64)


@dataclass(frozen=True)
class Backend:
    """One implementation: where its functions live, what it needs, what it takes."""

    module: str  # imported at first use
    device_types: tuple[str, ...] | None  # None: any
    dtypes: tuple[torch.dtype, ...]
    why_not: Callable[[], str | None]  # None: usable on this machine


def _always() -> str | None:
    return None


def _no_native() -> str | None:
    return importlib.import_module("protoclip.ops._native").why_not()


def _no_native_cuda() -> str | None:
    return importlib.import_module("protoclip.ops._native").why_not_cuda()


@cache
def _no_triton() -> str | None:
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels slowly on the CPU)"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return None if torch.cuda.is_available() else _no_interpreter()


def _no_interpreter() -> str | None:
    from importlib.metadata import version

    triton, numpy = (tuple(map(int, version(p).split(".")[:2])) for p in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):  # it takes int() of arrays of one element
        return f"the interpreter of triton {version('triton')} needs numpy < 2.4 (a card does not)"
    return None


REFERENCE = Backend("protoclip.ops.reference", None, ANY_FLOAT, _always)


def _cpu(op: str) -> Backend:
    return Backend(f"protoclip.ops.native_{op}", ("cpu",), FLOATS, _no_native)


def _cuda(op: str) -> Backend:
    return Backend(f"protoclip.ops.cuda_{op}", ("cuda",), FLOATS, _no_native_cuda)


def _triton(op: str) -> Backend:
    return Backend(f"protoclip.kernels.{op}", ("cuda", "cpu"), FLOATS, _no_triton)


TABLE: dict[str, dict[str, Backend]] = {
    "info_nce": {
        "cpu": _cpu("info_nce"),
        "triton": _triton("info_nce"),
        "reference": REFERENCE,
    },
    "siglip": {"cpu": _cpu("siglip"), "triton": _triton("siglip"), "reference": REFERENCE},
    "prototype_cross_entropy": {
        "cpu": _cpu("prototype_cross_entropy"),
        "triton": _triton("prototype_cross_entropy"),
        "reference": REFERENCE,
    },
    "soft_targets": {
        "cpu": _cpu("soft_targets"),
        "triton": _triton("soft_targets"),
        "reference": REFERENCE,
    },
    "kmeans_assign": {
        "cpu": _cpu("kmeans_assign"),
        "cuda": _cuda("kmeans_assign"),
        "reference": REFERENCE,
    },
    "segment_mean": {
        "cpu": _cpu("segment_mean"),
        "cuda": _cuda("segment_mean"),
        "reference": REFERENCE,
    },
}

AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda", "triton", "reference"),
    "cpu": ("cpu", "reference"),
}


def backends(op: str) -> dict[str, str | None]:
    """Say which backends of an op work on this machine.

    Args:
        op: a public op's name, e.g. ``"info_nce"``.
    Returns:
        backend name -> None where it is usable here, else the reason in words. Asking may compile
        the native library (once).
    Raises:
        ValueError: no such op.
    """
    return {name: row.why_not() for name, row in _rows(op).items()}


def _rows(op: str) -> dict[str, Backend]:
    if op not in TABLE:
        raise ValueError(f"backends: expected one of {sorted(TABLE)}, got {op!r}")
    return TABLE[op]


def _refusal(row: Backend, device_type: str, dtype: torch.dtype) -> str | None:
    if row.device_types is not None and device_type not in row.device_types:
        return f"it runs on {' or '.join(row.device_types)}, the tensors are on {device_type}"
    if dtype not in row.dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in row.dtypes)
        return f"it takes {names}, the tensors are {str(dtype).removeprefix('torch.')}"
    return row.why_not()


def why_not(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run an op on such tensors, in words; None where it can."""
    rows = _rows(op)
    if backend not in rows:
        return f"{op} has {', '.join(sorted(rows))}"
    return _refusal(rows[backend], device_type, dtype)


def resolve(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str:
    """Name the backend that will run ``op``; a constant to torch.compile.

    Raises:
        ValueError: no such backend, or the named one cannot run here (the message says why).
    """
    rows = _rows(op)
    if backend == "auto":
        backend = os.environ.get("PROTOCLIP_BACKEND", "auto") or "auto"
    if backend != "auto":
        if backend not in rows:
            raise ValueError(
                f"{op}: expected backend 'auto' or one of {sorted(rows)}, got {backend!r}"
            )
        reason = _refusal(rows[backend], device_type, dtype)
        if reason is not None:
            raise ValueError(
                f"{op}: backend {backend!r} cannot run: {reason}. Use backend='auto' to let "
                f"protoclip choose; protoclip.backends({op!r}) lists what works here"
            )
        return backend
    for name in AUTO_ORDER.get(device_type, ("reference",)):
        if name in rows and _refusal(rows[name], device_type, dtype) is None:
            return name
    return "reference"


# As torch.compiler.assume_constant_result, whose import loads dynamo and triton (1.8 s).
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def backend_module(op: str, backend: str) -> ModuleType:
    """The module of a backend, imported at first use."""
    return importlib.import_module(TABLE[op][backend].module)


@cache
def implementation(op: str, backend: str, function: str) -> Callable:
    """The function of a backend's module, imported at first use."""
    return getattr(backend_module(op, backend), function)
