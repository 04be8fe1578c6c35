"""A teacher's features of a whole data set, in parts on disk, so that a stop costs one part."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from protoclip.data import PairDataset
from protoclip.teacher.encoders import Encoder
from protoclip.teacher.files import write_features
from protoclip.teacher.principal import components

PART_ROWS = 4096


def extract_features(
    encoder: Encoder,
    dataset: PairDataset,
    out: Path,
    *,
    teacher: str,
    dim: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    part_rows: int = PART_ROWS,
    progress: Callable[[int], None] | None = None,
) -> tuple[int, int]:
    """Write the features of every sample, with its key, to ``out``; go on where a stop left off.

    Until it is done the parts lie in the folder ``out``.parts.

    Args:
        encoder: gives the rows.
        dataset: N samples.
        out: the .npz to write.
        teacher: a description of the encoder; parts of another one are refused.
        dim: principal components to keep; 0: all.
        batch_size: samples per forward pass.
        device: where the components are computed.
        part_rows: samples per part.
        progress: told the number of samples after each part, those found on disk too.
    Returns:
        N and the number of columns written.
    Raises:
        ValueError: ``out`` is no .npz, or the parts there are of another teacher or data set.
    """
    if out.suffix != ".npz":
        raise ValueError(f"--out: expected a name that ends in .npz, got {out}")
    folder = out.with_name(out.name + ".parts")
    _claim(folder, {"teacher": teacher, "data": _digest(dataset), "part_rows": part_rows})
    paths = []
    for start in range(0, len(dataset), part_rows):
        positions = range(start, min(start + part_rows, len(dataset)))
        path = folder / f"{start:012d}.npy"
        if not path.is_file():
            rows = encoder.rows(dataset, positions, batch_size)
            temporary = path.with_suffix(".tmp")
            with open(temporary, "wb") as file:
                np.save(file, rows.numpy())
            temporary.replace(path)
        paths.append(path)
        if progress is not None:
            progress(len(positions))
    features = _joined(paths, len(dataset), dim, device)
    write_features(out, features, dataset.keys)
    shutil.rmtree(folder)
    return features.shape[0], features.shape[1]


def _claim(folder: Path, manifest: dict) -> None:
    path = folder / "manifest.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(manifest) + "\n")
        return
    found = json.loads(path.read_text())
    if found != manifest:
        differs = sorted(name for name in manifest if found.get(name) != manifest[name])
        raise ValueError(
            f"--out: {folder} holds parts of another run ({', '.join(differs)} differ); remove "
            "that folder or choose another --out"
        )


def _digest(dataset: PairDataset) -> str:
    """Of the keys, in order."""
    digest = hashlib.sha256()
    for key in dataset.keys:
        digest.update(key.encode() + b"\n")
    return digest.hexdigest()


def _joined(paths: list[Path], count: int, dim: int, device: torch.device | str) -> np.ndarray:
    """All parts as float32 [count, d], on their principal components where asked for."""

    def stream() -> Iterator[Tensor]:
        for path in paths:
            yield torch.from_numpy(np.load(path, allow_pickle=False)).to(device)

    width = next(stream()).shape[1]
    reduced = 0 < dim < width
    mean, directions = components(stream, dim) if reduced else (None, None)
    whole = np.empty((count, dim if reduced else width), dtype=np.float32)
    row = 0
    for rows in stream():
        if mean is not None and directions is not None:
            rows = (rows.double() - mean) @ directions
        whole[row : row + len(rows)] = rows.float().cpu().numpy()
        row += len(rows)
    return whole
