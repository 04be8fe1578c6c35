"""A model to evaluate: from a run, a checkpoint or OpenCLIP's names, with an encoder for it."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from protoclip.common.waits import Wait
from protoclip.evaluate.tasks import Encoder
from protoclip.model import (
    ProtoModel,
    autocast_for,
    build_model,
    check_model,
    choose_device,
    choose_precision,
    put_channels_last,
)
from protoclip.runs import checkpoint
from protoclip.settings.config import ModelConfig, TrainConfig, from_dict

RANDOM = "random"
WEIGHTS = ("local-dir:", "hf-hub:")  # prefixes of names that include weights


@dataclass(frozen=True)
class Loaded:
    """A model to evaluate, on the CPU, and where it came from."""

    model: ProtoModel
    name: str  # OpenCLIP's model name, or heads in words
    pretrained: str  # checkpoint or tag
    config: TrainConfig | None = None  # of the run that trained it
    training_data: str = ""  # fingerprint of what the run trained on
    steps: int = 0  # of training; 0: not known


def load_model(what: str, pretrained: str = "", model: str = "") -> Loaded:
    """Load the MODEL of the command line.

    Args:
        what: a run folder or a checkpoint, an OpenCLIP name, a model config .json,
            "local-dir:PATH" or "hf-hub:ID".
        pretrained: OpenCLIP's tag or a weights file for a name; "random": as initialised.
        model: the OpenCLIP name for a checkpoint that does not hold its own.
    """
    if what.startswith(WEIGHTS) or what.endswith(".json"):
        return _by_name(what, pretrained)
    if not os.path.exists(what) and os.sep not in what:
        try:
            check_model(ModelConfig(model=what))
        except ValueError as error:
            reason = str(error).removeprefix("--model: ")
            raise ValueError(f"{what}: found no run and no checkpoint there; {reason}") from error
        return _by_name(what, pretrained)
    path, payload = checkpoint.load_newest(what)
    stored = payload.get("protoclip", {}).get("config")
    if stored is None:
        if not model:
            raise ValueError(
                f"{path}: expected a checkpoint of protoclip.train, got another one; give the "
                "OpenCLIP name or config file of its model as --model"
            )
        return dataclasses.replace(_by_name(model, str(path)), pretrained=str(path))
    config = from_dict(TrainConfig, stored)
    # The weights come from the checkpoint; those that training started from may be gone.
    architecture = model or config.model.model
    built = build_model(dataclasses.replace(config.model, model=architecture, pretrained=""))
    built.load_state(payload)
    ours = payload["protoclip"]
    training_data = ours.get("training", {}).get("data", "")
    steps = ours.get("step", 0)
    return Loaded(built, config.model.name, str(path), config, training_data, steps)


def _by_name(name: str, pretrained: str) -> Loaded:
    weights = "" if pretrained == RANDOM or name.startswith(WEIGHTS) else pretrained
    if not pretrained and not name.startswith(WEIGHTS):
        import open_clip

        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "this model has none"
        raise ValueError(
            f"{name}: --pretrained is missing: a weights file, {RANDOM} for none, or a tag ({tags})"
        )
    if pretrained == RANDOM:
        torch.manual_seed(0)
    model = build_model(ModelConfig(model=name, pretrained=weights, add_projection_head=False))
    return Loaded(model, name, pretrained or name)


@contextmanager
def open_encoder(model: ProtoModel, args: argparse.Namespace, what: str) -> Iterator[Encoder]:
    """An encoder, from --device, --precision, --batch-size and --workers."""
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    autocast = autocast_for(precision, device)
    model.to(device)
    put_channels_last(model, device)
    with Wait(what, unit="rows") as wait:
        yield Encoder(model, device, args.batch_size, args.workers, autocast, wait)
