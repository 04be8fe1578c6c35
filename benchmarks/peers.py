"""Variants to compare: every backend of an op that runs here, and how to call a peer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

import protoclip
from benchmarks.harness import OURS
from benchmarks.machine import DEVICE
from protoclip.ops.dispatch import TABLE


def ours(op: str) -> list[str]:
    """``protoclip-BACKEND`` for each row of the op's table that takes this device's tensors.

    The reference joins where no row was written for this device (Triton takes the CPU's tensors in
    its interpreter only).
    """
    names = [name for name, row in TABLE[op].items() if DEVICE in (row.device_types or ())]
    if not names or (DEVICE == "cpu" and names == ["triton"]):
        names.append("reference")
    return [f"{OURS}-{name}" for name in names]


def backend(op: str, variant: str) -> str:
    """The backend behind one of ``ours``; skips with the reason where it cannot run."""
    name = variant.removeprefix(f"{OURS}-")
    if (reason := protoclip.backends(op)[name]) is not None:
        pytest.skip(reason)
    return name


def is_ours(variant: str) -> bool:
    return variant.startswith(f"{OURS}-")


def optional(module: str, attribute: str = "") -> Any:
    """A peer's module or function; skips with the reason where it is not installed."""
    try:
        package = importlib.import_module(module)
        return getattr(package, attribute) if attribute else package
    except (ImportError, AttributeError) as error:
        pytest.skip(f"{module}.{attribute}: {error}".replace(".:", ":"))


def on_a_gpu(module: str, attribute: str) -> Any:
    """``optional`` of a peer that runs on GPUs only."""
    if DEVICE == "cpu":
        pytest.skip(f"{module} runs on GPUs only")
    return optional(module, attribute)


@cache
def compiled(function: Callable) -> Callable:
    """``function`` under torch.compile, every shape compiled for itself as a user would."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 256  # past it dynamo runs the eager form unasked
    return torch.compile(function, dynamic=False)
