"""Runs OpenCLIP's real trainer several times in one process, and writes down every loss.

The arguments are CASES.json and OUT_FOLDER. A case is {"name", "ours": bool, "flags": [...]}:
``protoclip.openclip`` or open_clip_train alone.
OUT_FOLDER/RANK.json gets, per case, the terms of every call of the loss, and the exit code.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip_train.data
import open_clip_train.main as trainer
import torch
import torch.distributed as dist
from open_clip.transformer import MultimodalTransformer

from protoclip import openclip as command
from protoclip.model import register_configs

# The shuffle buffer is seeded by the clock; without it two runs see the same batches.
open_clip_train.data._SAMPLE_SHUFFLE_SIZE = 1
open_clip_train.data._SAMPLE_SHUFFLE_INITIAL = 1


original_decoder = MultimodalTransformer.__init__


def initialised(decoder: MultimodalTransformer, *arguments: Any, **options: Any) -> None:
    """OpenCLIP leaves a weight of CoCa's decoder as the memory was, so two runs would differ."""
    original_decoder(decoder, *arguments, **options)
    torch.nn.init.normal_(decoder.text_projection, std=len(decoder.text_projection) ** -0.5)


MultimodalTransformer.__init__ = initialised
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # of --torchcompile
original_init = dist.init_process_group


def init_once(*arguments: Any, **options: Any) -> None:
    """One process group for all cases: the ranks' store cannot be used for a second one."""
    if not dist.is_initialized():
        original_init(*arguments, **options)


dist.init_process_group = init_once


def recorded(factory: Callable[..., Any], calls: list[dict[str, float]]) -> Callable[..., Any]:
    """A factory of losses (3.3) or tasks (4) whose product writes its terms down."""

    def note(module: Any, inputs: Any, terms: dict[str, torch.Tensor]) -> None:
        calls.append({name: float(value.detach()) for name, value in terms.items()})

    def make(*arguments: Any, **options: Any) -> Any:
        product = factory(*arguments, **options)
        getattr(product, "loss", product).register_forward_hook(note)
        return product

    return make


def run(case: dict[str, Any]) -> dict[str, Any]:
    calls: list[dict[str, float]] = []
    flags = case["flags"]
    name = "create_task" if hasattr(trainer, "create_task") else "create_loss"
    holder = command if case["ours"] else trainer
    original = getattr(holder, name)
    setattr(holder, name, recorded(original, calls))
    try:
        if case["ours"]:
            code = command.main(flags)
        else:
            with command.repaired():
                _, _, open_clip_flags = command.split_flags(flags)
                code = trainer.main(open_clip_flags) or 0
    finally:
        setattr(holder, name, original)
    return {"calls": calls, "code": code}


def main(argv: list[str]) -> int:
    plan, out = map(Path, argv)
    cases = json.loads(plan.read_text())
    register_configs()
    results = {case["name"]: run(case) for case in cases}
    if dist.is_initialized():
        dist.destroy_process_group()
    with contextlib.suppress(FileExistsError):
        out.mkdir(parents=True)
    (out / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(results))
    return 0
