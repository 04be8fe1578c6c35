"""What OpenCLIP's trainer leaves behind, read: a run's model, weights and optimiser."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor

from protoclip.config import ModelConfig
from protoclip.model import register_configs

PREPROCESS = ("mean", "std", "interpolation", "resize_mode")


def read_params(path: Path) -> dict[str, str]:
    """What OpenCLIP's trainer wrote down about the run of a checkpoint; {} where it is not one."""
    params = path.parent.parent / "params.txt"
    if path.parent.name != "checkpoints" or not params.is_file():
        return {}
    lines = params.read_text(encoding="utf-8", errors="replace").splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def state_dict(payload: Mapping[str, Any]) -> dict[str, Tensor]:
    """OpenCLIP's weights in a checkpoint, or in a bare state dict, without ``module.``."""
    weights = payload.get("state_dict", payload)
    return {key.removeprefix("module."): value for key, value in weights.items()}


def model_config(path: Path, model: str = "", force_image_size: int = 0) -> ModelConfig:
    """The model of a checkpoint of OpenCLIP's trainer, whose params.txt stands beside its folder.

    ``model`` and ``force_image_size`` replace what is written there.

    Raises:
        ValueError: neither names a model that OpenCLIP knows.
    """
    told = read_params(path)
    name = model or told.get("model", "")
    register_configs()
    if not model and name not in open_clip.list_models():
        raise ValueError(
            f"--model: {path} is not protoclip.train's and does not "
            + (f"bring its model {name!r}, which OpenCLIP does not know" if name else "name it")
            + "; give the name or config file that it was trained with"
        )
    size = told.get("force_image_size", "")
    return ModelConfig(
        model=name,
        pretrained=told.get("pretrained", "") if not model else "",
        force_image_size=force_image_size or (int(size) if size.isdecimal() else 0),
        add_projection_head=False,
    )


def adamw_states(
    payload: Mapping[str, Any], parameters: Collection[str]
) -> dict[str, dict[str, Tensor]]:
    """AdamW's state of each parameter by its name; {} where the checkpoint has another optimiser.

    The trainer keeps parameters by number: those without weight decay in one group, the rest in
    another, each in the order of the model.

    Args:
        payload: the checkpoint.
        parameters: names of the model's parameters; the rest of its state are buffers.
    """
    saved = payload.get("optimizer") or {}
    listed = [group["params"] for group in saved.get("param_groups", ())]
    names = {*parameters, "logit_bias"}  # the latter is SigLIP's, and may not be the model's
    weights = {name: x for name, x in state_dict(payload).items() if name in names}
    for undecayed in (_undecayed_in_3, _undecayed_in_4):
        plain = [name for name, value in weights.items() if undecayed(name, value)]
        rest = [name for name in weights if name not in set(plain)]
        for groups in ((plain, rest), (rest, plain)):  # main 4.x: the first one met comes first
            found = _numbered(groups, listed, saved.get("state", {}), weights)
            if found:
                return found
    return {}


def _undecayed_in_3(name: str, value: Tensor) -> bool:
    return value.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))


def _undecayed_in_4(name: str, value: Tensor) -> bool:
    return value.ndim < 2 or name.endswith(("positional_embedding", "class_embedding"))


def _numbered(
    groups: tuple[list[str], list[str]],
    listed: list[list[int]],
    state: Mapping[int, Mapping[str, Any]],
    weights: Mapping[str, Tensor],
) -> dict[str, dict[str, Tensor]]:
    """States by name if groups and shapes agree, else {}."""
    if [len(group) for group in groups] != [len(numbers) for numbers in listed]:
        return {}
    found = {}
    for name, number in zip(chain(*groups), chain(*listed), strict=True):
        own = dict(state.get(number, {}))
        if own and not _is_adamw(own, weights[name]):
            return {}
        if own:
            found[name] = own
    return found


def _is_adamw(state: Mapping[str, Any], value: Tensor) -> bool:
    moments = {"exp_avg", "exp_avg_sq"}
    return set(state) == {"step", *moments} and all(state[m].shape == value.shape for m in moments)


def preprocess(visual: Any, name: str, pretrained: str) -> dict[str, Any]:
    """How pictures are prepared for a model that started from ``pretrained``."""
    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    known = {**visual.preprocess_cfg, **tag}
    return {key: known[key] for key in PREPROCESS}


def run_preprocess(path: Path, visual: Any, name: str) -> dict[str, Any]:
    """How a run of the trainer prepared pictures: by its flags, else by what it started from."""
    started_from = read_params(path).get("pretrained", "")
    return {**preprocess(visual, name, started_from), **told_preprocess(path)}


def told_preprocess(path: Path) -> dict[str, Any]:
    """What the flags of the checkpoint's run said about it."""
    flags = {key: read_params(path).get(f"image_{key}", "None") for key in PREPROCESS}
    return {key: _value(text) for key, text in flags.items() if text != "None"}


def _value(text: str) -> Any:
    """ "[0.5, 0.5, 0.5]" as a list, other words as they are."""
    return json.loads(text) if text.startswith("[") else text
