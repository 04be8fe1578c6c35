"""Which model is meant: a run, a checkpoint, a name that OpenCLIP knows, or a folder of weights."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch

from protoclip import checkpoint
from protoclip.config import ModelConfig, TrainConfig, from_dict
from protoclip.model import ProtoModel, build_model, register_configs
from protoclip.openclip_runs import model_config, run_preprocess

RANDOM = "random"


@dataclass(frozen=True)
class Loaded:
    """A model to evaluate, on the CPU, and where it came from."""

    model: ProtoModel
    name: str  # OpenCLIP's model name
    pretrained: str  # checkpoint or tag
    config: TrainConfig | None = None  # of the run that trained it


def load_model(spec: str, pretrained: str = "") -> Loaded:
    """Load what the command line calls MODEL.

    Args:
        spec: a run folder or a checkpoint of ``protoclip.train`` or of OpenCLIP's trainer, an
            OpenCLIP name ("ViT-B-32", or "ViT-B-32,TAG" as in CLIP_benchmark), a model config
            .json, "local-dir:PATH" or "hf-hub:ID".
        pretrained: OpenCLIP's tag or weights file for a name; "random": as initialised.
    Raises:
        ValueError: no such model or weights; the message says what is known.
    """
    name, _, tag = spec.partition(",")
    if _is_name(name) and (name.endswith(".json") or not os.path.exists(spec)):
        return _from_open_clip(name, pretrained or tag)
    if not os.path.exists(spec) and os.sep not in spec:
        try:
            build_model(ModelConfig(model=spec))
        except ValueError as error:
            reason = str(error).removeprefix("--model: ")
            raise ValueError(
                f"{spec}: found nothing of that name, neither run nor checkpoint; {reason}"
            ) from error
    path = checkpoint.find(spec)
    payload = checkpoint.load(path)
    stored = payload.get("protoclip", {}).get("config")
    if stored is None:
        return _from_openclip_run(path)
    config = from_dict(TrainConfig, stored)
    # Its weights come from the checkpoint; what it once started from need not be there any more.
    model = build_model(dataclasses.replace(config.model, pretrained=""))
    model.load_state(payload)
    return Loaded(model, config.model.model, str(path), config)


def _from_openclip_run(path: Path) -> Loaded:
    """A checkpoint of OpenCLIP's trainer, whose params.txt names the model."""
    try:
        config = model_config(path)
    except ValueError as error:
        raise ValueError(
            f"checkpoint: {path} was not written by protoclip.train, and no params.txt beside it "
            "names a model that OpenCLIP knows; name the model, or its config file, and give the "
            f"checkpoint as weights: MODEL --pretrained {path}"
        ) from error
    model = build_model(dataclasses.replace(config, pretrained=str(path)))
    model.prepare_as(run_preprocess(path, model.clip.visual, config.model))
    return Loaded(model, config.model, str(path))


def _is_name(name: str) -> bool:
    register_configs()
    known = name.startswith(("local-dir:", "hf-hub:")) or name in open_clip.list_models()
    return known or (name.endswith(".json") and Path(name).is_file())


def _from_open_clip(name: str, pretrained: str) -> Loaded:
    holds_weights = name.startswith(("local-dir:", "hf-hub:"))
    if not pretrained and not holds_weights:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(
            f"{name}: --pretrained is missing: a weights file, {RANDOM} for none, or a tag "
            f"({', '.join(tags) if tags else 'this model has none'})"
        )
    if pretrained == RANDOM:
        torch.manual_seed(0)
    weights = "" if pretrained == RANDOM or holds_weights else pretrained
    model = build_model(ModelConfig(model=name, pretrained=weights, add_projection_head=False))
    return Loaded(model, name, pretrained or name)
