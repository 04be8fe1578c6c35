"""Everything a run needs to go on as if nothing had happened, as plain tensors and numbers.

Which samples come next, their captions, augmentation and learning rate follow from (seed, step);
what does not is packed here: weights, optimiser, scaler, random states of every rank, the episode.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protoclip.distributed import gather_objects, rank, world_size

CLASS = "__class__"  # key that marks a packed dataclass


def pack(value: Any) -> Any:
    """Dataclasses, mappings and sequences of tensors, numbers and strings -> what
    ``torch.load(weights_only=True)`` reads. Tensors stay themselves, so shared ones stay shared."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: pack(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {CLASS: type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {key: pack(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(pack(item) for item in value)
    return value


def unpack(value: Any, classes: Mapping[str, type], device: torch.device) -> Any:
    """The inverse of ``pack``; only the named classes are made.

    Raises:
        ValueError: another class is asked for, or one with other fields.
    """
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict) and CLASS in value:
        name = value[CLASS]
        fields = {k: unpack(v, classes, device) for k, v in value.items() if k != CLASS}
        try:
            return classes[name](**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"checkpoint: this protoclip cannot take its {name} ({error}); resume with the "
                "version that wrote it"
            ) from error
    if isinstance(value, dict):
        return {key: unpack(item, classes, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(unpack(item, classes, device) for item in value)
    return value


def random_states(device: torch.device) -> list[dict[str, Any]]:
    """The global generators of every rank, in the order of ranks; a collective call."""
    version, internal, gauss = random.getstate()
    numpy: Any = np.random.get_state()
    kind, words, position, has_gauss, cached = numpy
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(words.astype(np.int64)), position, has_gauss, cached],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return gather_objects(state)


def set_random_state(states: Sequence[dict[str, Any]], device: torch.device) -> None:
    """Give this rank its generators back.

    Raises:
        ValueError: the checkpoint is of another number of ranks.
    """
    if len(states) != world_size():
        raise ValueError(
            f"--resume: the checkpoint is of {len(states)} ranks, this run has {world_size()}; "
            f"start {len(states)} processes"
        )
    state = states[rank()]
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, words, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), position, has_gauss, cached))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def fingerprint(keys: Sequence[str], samples: int = 1000) -> str:
    """A short name of a data set: its size and up to ``samples`` of its keys."""
    digest = hashlib.sha256(str(len(keys)).encode())
    for i in np.linspace(0, max(0, len(keys) - 1), min(samples, len(keys)), dtype=np.int64):
        digest.update(keys[int(i)].encode("utf-8", "surrogateescape") + b"\0")
    return f"{len(keys)}:{digest.hexdigest()[:16]}"
