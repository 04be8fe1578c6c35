"""Device and precision, from the flags that name them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from protoclip.launchers import find_place


def choose_device(name: str) -> torch.device:
    """The device a flag asks for; "auto" is the GPU if there is one.

    Raises:
        ValueError: no such device on this machine.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        place = find_place()  # several processes of a machine have a GPU each
        return (
            torch.device("cuda", place.local_rank) if place.world_size > 1 else torch.device("cuda")
        )
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device: {name} is not on this machine, which has {torch.cuda.device_count()} CUDA "
            "devices that torch can use; use --device auto"
        )
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {name!r}")
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """ "fp32", "amp_bf16" or "amp" for a flag that may say "auto"."""
    if name == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return "amp_bf16" if bf16 else "fp32"
    if name == "amp" and device.type == "cpu":
        if find_place().rank == 0:
            note = "fp16 needs a GPU; this is fp32, and amp_bf16 works on CPUs too"
            print(f"note: --precision amp: {note}", file=sys.stderr)
        return "fp32"
    return name


def autocast_for(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Makes the context in which a forward pass runs."""
    if precision == "fp32":
        return contextlib.nullcontext
    dtype = torch.bfloat16 if precision == "amp_bf16" else torch.float16
    return lambda: torch.autocast(device.type, dtype=dtype)
