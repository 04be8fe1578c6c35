"""External teachers: features of any frozen model that say which samples belong together.

From a file that ``python -m protoclip.teacher`` or anything else wrote, or computed at the start of
a run by the built-in sentence encoder, once, and cached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from protoclip import checkpoint
from protoclip.data import PairDataset
from protoclip.ops.native import cache_dir
from protoclip.teacher.encoders import (
    MINILM,
    MINILM_PACKAGE,
    minilm,
    minilm_missing,
    teacher_text,
)
from protoclip.teacher.files import SUFFIXES, read_features
from protoclip.teacher.principal import pca

__all__ = ["MINILM", "encode_sentences", "load_teacher", "minilm_missing", "pca"]


def load_teacher(
    spec: str,
    dataset: PairDataset,
    *,
    dim: int = 64,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """A teacher's features of every sample of a dataset.

    Args:
        spec: "builtin:minilm" (captions under a sentence encoder) or a .npy, .npz or .safetensors
            file. Rows of a .npz with ``keys`` are found by the samples' keys, whatever their order
            and whatever else is in the file; other files must be [dataset, d] in its order.
        dataset: N samples; their order is the order of the rows.
        dim: reduce to that many principal components where d is larger; 0: keep all.
        device: where the sentence encoder runs.
        progress: told the number of captions after each batch.
    Returns:
        float32 [N, min(d, dim)] on the CPU.
    Raises:
        ValueError: no such file or teacher, a sample without a row, another number of rows than the
            dataset's, values that are not finite, or a teacher that is not installed.
    """
    if spec == MINILM:
        features = _cached_minilm(dataset, device, progress)
    elif Path(spec).suffix in SUFFIXES:
        features = read_features(Path(spec), dataset)
    else:
        raise ValueError(
            f"--external-teacher: expected {MINILM}, none, or a file ending in "
            f"{', '.join(SUFFIXES)}, got {spec!r}; python -m protoclip.teacher --model {spec} "
            "makes such a file"
        )
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(
            f"--external-teacher {spec}: expected finite features, got NaN or infinity in "
            f"{int((~finite).sum())} rows, first in that of {dataset.keys[row]!r}"
        )
    return pca(features, dim) if dim else features


def _cached_minilm(
    dataset: PairDataset, device: torch.device | str, progress: Callable[[int], None] | None
) -> Tensor:
    texts = [teacher_text(dataset.captions(i)) for i in range(len(dataset))]
    digest = hashlib.sha256(repr((MINILM_PACKAGE, texts)).encode()).hexdigest()[:16]
    path = cache_dir() / f"minilm-{digest}.pt"
    if path.is_file():
        try:
            features = checkpoint.load(path)["features"]
            if len(features) == len(texts):
                return features
        except (ValueError, KeyError, TypeError):
            pass
        # Torn, or with other rows than the data: compute it again and replace it.
    reason = minilm_missing()
    if reason is not None:
        raise ValueError(f"--external-teacher {MINILM}: {reason}, or --external-teacher none")
    features = encode_sentences(texts, device=device, progress=progress)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, {"features": features})
    except OSError:
        pass  # a cache that cannot be written costs time, not the run
    return features


def encode_sentences(
    texts: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """all-MiniLM-L6-v2: texts -> unit rows, float32 [N, 384] on the CPU."""
    return minilm(device).encode(texts, batch_size, progress)
