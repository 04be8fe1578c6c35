"""Features kept between evaluations, found again by what they were made of."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from protoclip.data import PairDataset
from protoclip.ops.native import cache_dir

SAMPLED = 16  # pictures whose pixels are part of a data set's digest, where files cannot tell


class FeatureCache:
    """Features by model, data and precision, in ``cache_dir()/features``.

    Args:
        model: in the state that makes the features; what is trained later is another model.
        settings: what else decides about the features, such as the precision.
        folder: where they are kept.
    """

    def __init__(self, model: nn.Module, settings: str = "", folder: Path | None = None) -> None:
        self.folder = folder or cache_dir() / "features"
        self._model = model_hash(model) + settings
        self.rows_found = 0

    def path(self, kind: str, content: str) -> Path:
        return self.folder / f"{kind}-{digest([self._model, content])[:40]}.safetensors"

    def load(self, path: Path) -> Tensor | None:
        """The stored features (CPU); None where there is no file, or a damaged one."""
        try:
            rows = load_file(path)["features"]
        except (OSError, SafetensorError, KeyError):
            return None
        self.rows_found += len(rows)
        return rows

    def store(self, path: Path, rows: Tensor) -> None:
        """Write the file whole or not at all; a disk that cannot take it costs only time."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"features": rows.detach().cpu().contiguous()}, temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError):
            temporary.unlink(missing_ok=True)


def digest(parts: Iterable[str | bytes]) -> str:
    """SHA-256 of a sequence of texts; their borders count."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def model_hash(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, by name, type, shape and value."""

    def parts() -> Iterable[str | bytes]:
        for name, tensor in sorted(model.state_dict().items()):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""

    return digest(parts())


def dataset_hash(dataset: PairDataset) -> str:
    """Digest of a data set's pictures: by size and time of its files, else by samples of them.

    Built-in data has no files of its own; its keys and the pixels of a few pictures stand for it.
    """
    base: Any = dataset
    chain: list[str | bytes] = []
    while hasattr(base, "dataset") and hasattr(base, "indices"):  # a Subset
        chain.append(base.indices.tobytes())
        base = base.dataset
    chain += [base.name, *base.keys]
    if hasattr(base, "stamp"):
        return digest([*chain, *base.stamp()])
    if hasattr(base, "shards"):
        return digest([*chain, *_stats(base.shards)])
    if hasattr(base, "folder"):  # a table: its pictures are files
        return digest([*chain, *_stats(base.path(i) for i in range(len(base)))])
    step = max(1, len(base) // SAMPLED)
    return digest([*chain, *(base.image(i).tobytes() for i in range(0, len(base), step))])


def _stats(paths: Iterable[str]) -> Iterable[str]:
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            yield f"{path} missing"  # the reader says so, with its row
            continue
        yield f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}"
