"""``protoclip export RUN --out DIR``: a folder that OpenCLIP and CLIP_benchmark load.

``open_clip.create_model_and_transforms("local-dir:DIR")`` then loads the trained model without
protoclip. Heads on stored features become a folder for ``protoclip.load_heads``. The folder can be
uploaded to the Hugging Face hub as it is.
"""

from __future__ import annotations

import sys

from protoclip.settings.commands import show_help

if __name__ == "__main__":  # answered before the imports below, which take seconds
    show_help("export", sys.argv[1:])

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from protoclip.common.files import printable_lines, whole_files, write_atomic, write_safetensors
from protoclip.common.paths import check_above, run_of
from protoclip.distributed import run_command
from protoclip.evaluate.results import TRAIN, format_table, read_results
from protoclip.heads import CONFIG_FILE, WEIGHTS_FILE
from protoclip.model import build_model, register_configs
from protoclip.runs import checkpoint
from protoclip.settings.commands import export_parser
from protoclip.settings.config import ModelConfig, TrainConfig, flat, from_dict

PROG = "protoclip export"
TASK = "zero-shot-image-classification"  # as the hub calls it
PREPROCESS = ("mean", "std", "interpolation", "resize_mode")
LOADING = """Trained with protoclip, loads in OpenCLIP:

```python
import open_clip

path = "local-dir:PATH_OF_THIS_FOLDER"
model, _, preprocess = open_clip.create_model_and_transforms(path)
tokenizer = open_clip.get_tokenizer(path)
```
"""
LOADING_HEADS = """Heads on the features of frozen encoders, trained with protoclip:

```python
import protoclip

heads = protoclip.load_heads("PATH_OF_THIS_FOLDER")
image = heads.encode_image(image_rows, normalize=True)  # rows of the same encoders as in training
text = heads.encode_text(text_rows, normalize=True)
```
"""


def export(run: str | Path, out: str | Path, model: str = "") -> Path:
    """Write config, weights and model card of a trained model; returns ``out``.

    Args:
        run: a run folder or a checkpoint of ``protoclip.train``, or a checkpoint of OpenCLIP's
            trainer.
        out: a new or empty folder.
        model: OpenCLIP name or config file, for a checkpoint of OpenCLIP's trainer.
    Raises:
        ValueError: no such run, ``out`` is in use, or the checkpoint does not fit the model.
        OSError: the disk is full; then ``out`` is as it was.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: expected a new or empty folder, but {out} is in use")
    check_above(out, "--out")
    path, payload = checkpoint.load_newest(run)
    config = _model_config(payload.get("protoclip", {}), path, model)
    exported = _heads(path, config, payload) if config.image_width else _clip(path, config, payload)
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with whole_files(out) as temporary:
            write_safetensors(temporary / exported.weights_file, exported.module.state_dict())
            text = json.dumps(exported.settings, indent=2) + "\n"
            write_atomic(temporary / exported.settings_file, text)
            card = printable_lines(str(_card(path, config, payload, exported)))
            write_atomic(temporary / "README.md", card)
    except OSError:
        if is_new:
            out.rmdir()
        raise
    return out


class Exported(NamedTuple):
    """What the files of a folder hold."""

    module: nn.Module
    weights_file: str
    settings: Mapping[str, Any]
    settings_file: str
    library: str  # that loads the folder
    loading: str  # how, for the card


def _heads(path: Path, config: ModelConfig, payload: dict[str, Any]) -> Exported:
    """Heads on stored features."""
    heads = build_model(config).clip
    _load(heads, payload["state_dict"], path, config)
    return Exported(
        module=heads,
        weights_file=WEIGHTS_FILE,
        settings=heads.settings,
        settings_file=CONFIG_FILE,
        library="protoclip",
        loading=LOADING_HEADS,
    )


def _clip(path: Path, config: ModelConfig, payload: dict[str, Any]) -> Exported:
    """A model of OpenCLIP."""
    name = register_configs(config.model)
    # The weights come from the checkpoint; those that training started from may be gone.
    clip = build_model(dataclasses.replace(config, pretrained="")).clip
    weights = payload.get("state_dict", payload)
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    model_cfg = open_clip.get_model_config(name)
    if "logit_bias" in weights:  # trained with --siglip; the model config may have none
        clip.logit_bias = nn.Parameter(torch.zeros_like(weights["logit_bias"]))
        model_cfg["init_logit_bias"] = 0.0
    _load(clip, weights, path, config)
    if config.force_image_size:
        model_cfg["vision_cfg"]["image_size"] = config.force_image_size
    if config.force_context_length:
        model_cfg["text_cfg"]["context_length"] = config.force_context_length
    preprocess = {
        **clip.visual.preprocess_cfg,
        **payload.get("protoclip", {}).get("preprocess", {}),
    }
    preprocess_cfg = {key: preprocess[key] for key in PREPROCESS}
    return Exported(
        module=clip,
        weights_file="open_clip_model.safetensors",
        settings={"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg},
        settings_file="open_clip_config.json",
        library="open_clip",
        loading=LOADING,
    )


def _load(module: nn.Module, weights: Mapping[str, Any], path: Path, config: ModelConfig) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"--model {config.name}: {path} does not fit it ({reason})") from error


def _model_config(ours: dict[str, Any], path: Path, model: str) -> ModelConfig:
    """The config of the trained model, from the checkpoint or from the caller."""
    if "config" not in ours:
        if not model:
            raise ValueError(
                f"--model: {path} was not written by protoclip.train and does not name its model; "
                "give the OpenCLIP name or config file that it was trained with"
            )
        return ModelConfig(model, add_projection_head=False)
    stored = from_dict(TrainConfig, ours["config"]).model
    if model not in ("", stored.model):
        raise ValueError(f"--model: {path} names its own model; leave the flag out")
    return dataclasses.replace(stored, add_projection_head=False)


def _card(
    path: Path, config: ModelConfig, payload: dict[str, Any], exported: Exported
) -> ModelCard:
    """The model card for the hub: how to load the model, its training, and its results."""
    run = run_of(path)
    ours = payload.get("protoclip", {})
    settings = flat(ours.get("config", {}))
    facts = {
        "architecture": config.name,
        "epochs": payload.get("epoch"),
        "steps": ours.get("step"),
        "method": settings.get("method"),
        "training data": settings.get("data.train_data"),
        "seed": settings.get("run.seed"),
    }
    lines = [f"# {run.name}", "", exported.loading, "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in facts.items() if value is not None]
    head = ModelCardData(
        library_name=exported.library, pipeline_tag=TASK, tags=["clip", "protoclip"]
    )
    head.model_name = run.name
    file = run / "results.json"
    outcome = read_results(file) if file.is_file() else None
    if outcome and outcome.steps == ours.get("step"):  # not those of an earlier or later checkpoint
        lines += ["", f"## Results on {outcome.data}", "", "```", format_table(outcome), "```"]
        evaluated = [
            EvalResult(TASK, outcome.data, eval_set.title, name, value)
            for key, eval_set in outcome.trained.items()
            if key != TRAIN
            for name, value in eval_set.metrics.items()
            if name.endswith(("/acc1", "recall@5"))
        ]
        head.eval_results = evaluated or None
    return ModelCard(f"---\n{head.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake prints one line and gives status 2."""
    args = export_parser().parse_args(argv)

    def work() -> None:
        out = export(args.run, args.out, args.model)
        loads = f'open_clip.create_model_and_transforms("local-dir:{out}")'
        if (out / WEIGHTS_FILE).exists():
            loads = f'protoclip.load_heads("{out}")'
        print(f"{out}: {loads}")

    return run_command(work, PROG)


if __name__ == "__main__":
    sys.exit(main())
