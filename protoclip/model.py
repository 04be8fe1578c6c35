"""Any OpenCLIP model, with ProtoCLIP's projection heads and second temperature beside it."""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import logging
import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import lock_text_tower
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from protoclip.config import ModelConfig
from protoclip.distributed import GlobalBatchNorm1d
from protoclip.short_text import encode_text, short_tokenizer

CONFIG_FOLDER = Path(__file__).parent / "model_configs"
MAX_LOG_SCALE = math.log(100)
INITIAL_LOG_SCALE = math.log(1 / 0.07)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """OpenCLIP reports every step of a model's making on the root logger; users need none of it."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


@dataclass(frozen=True)
class Encoded:
    """What the two towers say about a batch; rows are not normalised."""

    image: Tensor  # [B, D]
    text: Tensor  # [B, D]


class Projection(nn.Sequential):
    """Linear, BatchNorm, ReLU, Linear: [B, in_dim] -> [B, out_dim]; algorithm.md §1's g."""

    def __init__(
        self, in_dim: int, hidden_dim: int, out_dim: int, sync_batch_norm: bool = True
    ) -> None:
        super().__init__(
            nn.Linear(in_dim, hidden_dim),
            (GlobalBatchNorm1d if sync_batch_norm else nn.BatchNorm1d)(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, out_dim),
        )


class ProtoModel(nn.Module):
    """An OpenCLIP model and what ProtoCLIP adds.

    ``clip``'s state dict is OpenCLIP's own and loads there; heads and ``logit_scale_proto`` (a
    logarithm, as OpenCLIP's ``logit_scale`` is) live outside it.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        heads: tuple[Projection, Projection] | None,
    ) -> None:
        super().__init__()
        self.clip: Any = clip
        self.tokenizer = tokenizer  # OpenCLIP's own
        self.short_tokenizer = short_tokenizer(clip, tokenizer)  # for the two below
        self.image_head: Projection | None = heads[0] if heads else None
        self.text_head: Projection | None = heads[1] if heads else None
        self.logit_scale_proto = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))
        self.image_locked = self.text_locked = False
        visual: Any = clip.visual
        size = visual.image_size
        self.image_size: int = size[0] if isinstance(size, (tuple, list)) else size
        self.mean: tuple[float, ...] = tuple(visual.image_mean or open_clip.OPENAI_DATASET_MEAN)
        self.std: tuple[float, ...] = tuple(visual.image_std or open_clip.OPENAI_DATASET_STD)

    def lock_image(self) -> None:
        """Freeze the image tower from now on: no gradient, no dropout, fixed running statistics."""
        self.image_locked = True
        self.clip.visual.requires_grad_(False).eval()

    def lock_text(self) -> None:
        """Freeze the text tower from now on."""
        self.text_locked = True
        if hasattr(self.clip, "text"):
            self.clip.text.requires_grad_(False).eval()
        else:  # the tower's parts lie beside the image tower's, and none of them is random
            lock_text_tower(self.clip)

    def train(self, mode: bool = True) -> ProtoModel:
        super().train(mode)
        if self.image_locked:
            self.clip.visual.eval()
        if self.text_locked and hasattr(self.clip, "text"):
            self.clip.text.eval()
        return self

    def encode(self, image: Tensor, tokens: Tensor) -> Encoded:
        """u of both modalities, not normalised: [B, 3, H, W] and int64 [B, L] -> [B, D] each."""
        return Encoded(self.clip.encode_image(image), self.encode_text(tokens))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """u of texts, not normalised: int64 [B, L] of either tokenizer -> [B, D]."""
        return encode_text(self.clip, tokens)

    def project(self, encoded: Encoded) -> Encoded:
        """h of both modalities, unit rows, fp32 [B, Dh]; without heads the normalised embedding."""
        image = self.image_head(encoded.image) if self.image_head is not None else encoded.image
        text = self.text_head(encoded.text) if self.text_head is not None else encoded.text
        return Encoded(F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1))

    def forward(
        self, image: Tensor, tokens: Tensor, project: bool = True
    ) -> tuple[Encoded, Encoded | None]:
        """Embeddings and, when asked for, projections: one call, as DDP wants it."""
        encoded = self.encode(image, tokens)
        return encoded, self.project(encoded) if project else None

    @property
    def logit_scale(self) -> Tensor:
        """InfoNCE's multiplier, exp of the parameter."""
        return self.clip.logit_scale.exp()

    @property
    def proto_scale(self) -> Tensor:
        """The prototype terms' multiplier, exp of the parameter."""
        return self.logit_scale_proto.exp()

    @torch.no_grad()
    def clamp_scales(self) -> None:
        """Keep both multipliers in [1, 100]; call after every optimiser step."""
        self.clip.logit_scale.clamp_(0, MAX_LOG_SCALE)
        self.logit_scale_proto.clamp_(0, MAX_LOG_SCALE)

    def extra_state(self) -> dict[str, Any]:
        """What stands beside OpenCLIP's state dict in a checkpoint."""
        heads = {
            f"{name}.{key}": value
            for name, head in (("image", self.image_head), ("text", self.text_head))
            if head is not None
            for key, value in head.state_dict().items()
        }
        return {
            "heads": heads,
            "logit_scale_proto": self.logit_scale_proto.detach().clone(),
            "preprocess": self.preprocess(),
        }

    def preprocess(self) -> dict[str, Any]:
        """How pictures are prepared for the model, with OpenCLIP's words for it."""
        own = getattr(self.clip.visual, "preprocess_cfg", None) or {}
        words = {key: own[key] for key in ("interpolation", "resize_mode") if key in own}
        return {"mean": list(self.mean), "std": list(self.std), **words}

    def load_state(self, payload: dict[str, Any]) -> None:
        """Take the weights of a checkpoint that ``protoclip.train`` wrote.

        Raises:
            ValueError: they are of another model, or something is missing.
        """
        try:
            self._load_state(payload)
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"checkpoint: it does not fit this model ({reason})") from error

    def _load_state(self, payload: dict[str, Any]) -> None:
        self.clip.load_state_dict(payload["state_dict"])
        extra = payload["protoclip"]
        for name, head in (("image", self.image_head), ("text", self.text_head)):
            if head is not None:
                prefix = name + "."
                head.load_state_dict(
                    {
                        k.removeprefix(prefix): v
                        for k, v in extra["heads"].items()
                        if k.startswith(prefix)
                    }
                )
        with torch.no_grad():
            self.logit_scale_proto.copy_(extra["logit_scale_proto"])
        # The weights it started from may have had their own.
        self.prepare_as(extra.get("preprocess", {}))

    def prepare_as(self, prepared: Mapping[str, Any]) -> None:
        """Prepare pictures as ``preprocess`` of another model says; what it leaves out stays."""
        self.mean = tuple(prepared.get("mean", self.mean))
        self.std = tuple(prepared.get("std", self.std))
        self.clip.visual.preprocess_cfg = {
            **(getattr(self.clip.visual, "preprocess_cfg", None) or {}),
            **prepared,
        }


def register_configs(model: str = "") -> str:
    """Make protoclip's models and the config file ``model`` known to OpenCLIP; returns the name."""
    if "protoclip-tiny" not in open_clip.list_models():
        open_clip.add_model_config(CONFIG_FOLDER)
    if model.endswith(".json"):
        _check_config(Path(model))
        open_clip.add_model_config(Path(model))
        return Path(model).stem
    return model


def _check_config(path: Path) -> None:
    """OpenCLIP passes over a file that is no config, and stays broken after one that is no JSON."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--model: expected an OpenCLIP config in {path}: {error}") from error
    keys = {"embed_dim", "vision_cfg", "text_cfg"}
    if missing := sorted(keys - set(config if isinstance(config, dict) else ())):
        raise ValueError(f"--model: the OpenCLIP config {path} lacks {', '.join(missing)}")


def check_model(config: ModelConfig) -> str:
    """The name by which OpenCLIP knows the model; ValueError where it, or its weights, are none."""
    name = register_configs(config.model)
    _check_name(name)
    _check_pretrained(name, config.pretrained)
    return name


def _check_name(name: str) -> None:
    if name.startswith(("local-dir:", "hf-hub:")) or name in open_clip.list_models():
        return
    near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()"
    raise ValueError(f"--model: OpenCLIP knows no model {name!r}; {hint}")


def _check_pretrained(name: str, pretrained: str) -> None:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained and not Path(pretrained).is_file() and pretrained.lower() not in tags:
        known = f"its tags are {', '.join(tags)}" if tags else "this model has no tags"
        raise ValueError(f"--pretrained: {pretrained!r} is no file and no tag of {name}; {known}")


def _bias(name: str, pretrained: str) -> dict[str, float]:
    """Makes room for the bias of weights that OpenCLIP trained with --siglip, for a model that has
    none by its config; {} where there is no need."""
    if "init_logit_bias" in (open_clip.get_model_config(name) or {}):
        return {}
    try:
        if pretrained.endswith(".safetensors"):
            with safe_open(pretrained, "pt") as file:
                keys = set(file.keys())
        else:
            content = torch.load(pretrained, "cpu", mmap=True, weights_only=True)
            keys = set(content.get("state_dict", content))
    except Exception:  # a tag, or a file that cannot be read: left to OpenCLIP, or loaded whole
        return {}
    return {"init_logit_bias": 0.0} if {"logit_bias", "module.logit_bias"} & keys else {}


def build_model(config: ModelConfig, device: str = "cpu") -> ProtoModel:
    """The model a config asks for; what is not pretrained uses torch's generator.

    ``device`` "meta", within ``torch.device("meta")``, gives the shapes alone.

    Raises:
        ValueError: no such model, config, checkpoint or tag.
    """
    name = check_model(config)
    bias = _bias(name, config.pretrained)
    try:
        with _quiet():
            clip = open_clip.create_model(
                name,
                pretrained=config.pretrained or None,
                force_image_size=config.force_image_size or None,
                force_context_length=config.force_context_length or None,
                device=device,
                output_dict=True,
                **bias,
            )
            tokenizer = open_clip.get_tokenizer(
                name, context_length=getattr(clip, "context_length", None)
            )
    # What torch and safetensors raise on a torn file, and OpenCLIP on a config it does not like.
    except (
        RuntimeError, OSError, EOFError, pickle.UnpicklingError, SafetensorError, TypeError,
        KeyError, AssertionError, ZeroDivisionError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:300]
        if os.path.isfile(config.pretrained):
            reason += "; is the file whole, and a checkpoint of this model?"
        raise ValueError(
            f"--model {config.model} --pretrained {config.pretrained!r}: {reason}"
        ) from error
    if min(getattr(clip.visual, "grid_size", (1,))) < 1:
        raise ValueError("--force-image-size: expected at least one patch of the model in pixels")
    if bias:  # read and dropped: features know nothing of it, nor does InfoNCE
        clip.logit_bias = None
    heads = None
    if config.add_projection_head:
        hidden, out = config.projection_hidden_dim, config.projection_dim
        text_head = Projection(embedding_dim(clip), hidden, out, config.use_bn_sync)
        # The image head starts as a copy, as in the paper: equal features, equal projections.
        heads = (copy.deepcopy(text_head), text_head)
    if config.grad_checkpointing:
        clip.set_grad_checkpointing()
    model = ProtoModel(clip, tokenizer, heads)
    if config.lock_image:
        model.lock_image()
    if config.lock_text:
        model.lock_text()
    return model


def embedding_dim(clip: Any) -> int:
    """D, the width of both towers' output, found by encoding two tokens' worth of nothing."""
    length = getattr(clip, "context_length", 77)
    with torch.no_grad():
        was_training = clip.training
        features = clip.eval().encode_text(torch.zeros(1, length, dtype=torch.long))
        clip.train(was_training)
    return features.shape[-1]
