"""OpenCLIP's trainer with our losses: ``protoclip openclip <open_clip_train flags>``.

The command removes our flags, replaces OpenCLIP's losses by ours, and runs OpenCLIP's ``main``.
"""

from __future__ import annotations

import sys

from protoclip.settings.commands import show_help

if __name__ == "__main__":  # answered before the imports below, which take seconds
    show_help("openclip", sys.argv[1:])

import argparse
import contextlib
import dataclasses
import functools
import importlib
import inspect
import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import open_clip
import torch
from open_clip import loss as theirs
from torch import nn

from protoclip.common.files import torch_reason
from protoclip.common.signals import Interrupted, Signals, name_of
from protoclip.losses import (
    ClipLoss,
    CoCaLoss,
    DistillClipLoss,
    ProtoClipLoss,
    SigLipLoss,
)
from protoclip.losses.objective import caption_ids
from protoclip.model import register_configs
from protoclip.settings.command_line import check_openclips_flags
from protoclip.settings.commands import openclip_parser
from protoclip.settings.config import ProtoConfig

PROG = "protoclip openclip"
LOGGER = logging.getLogger(__name__)
DistributedDataParallel = nn.parallel.DistributedDataParallel
REPLACEMENTS: dict[type, Any] = {
    theirs.ClipLoss: ClipLoss,
    theirs.SigLipLoss: SigLipLoss,
    theirs.CoCaLoss: CoCaLoss,
    theirs.DistillClipLoss: DistillClipLoss,
}
CONTRASTIVE_TASKS = ("CLIPTask", "SigLIPTask", "CLAPTask", "CoCaTask", "DistillCLIPTask")


def create_loss(args: Any, proto: ProtoConfig | None = None) -> nn.Module:
    """OpenCLIP's ``create_loss`` with fused losses; ``proto`` adds prototypes.

    To patch by hand: ``open_clip_train.main.create_loss = protoclip.create_loss``. For Horovod and
    losses that are not contrastive it returns OpenCLIP's own and logs a line.

    Raises:
        ValueError: prototypes for a loss that has none.
    """
    original = open_clip.create_loss(args)
    return _fused(original, args, proto) or original


def create_task(
    args: Any,
    model: nn.Module,
    dist_model: nn.Module | None = None,
    naflex_data_config: Any = None,
    proto: ProtoConfig | None = None,
) -> nn.Module:
    """OpenCLIP 4's ``create_task``; the task's ``loss`` is the one from ``create_loss``.

    Raises:
        ValueError: prototypes for a loss that has none, or an OpenCLIP without tasks.
    """
    if not hasattr(open_clip, "create_task"):
        raise ValueError(
            f"create_task: expected OpenCLIP 4, got {open_clip.__version__}, which has no tasks; "
            "use protoclip.create_loss"
        )
    task = open_clip.create_task(
        args, model=model, dist_model=dist_model, naflex_data_config=naflex_data_config
    )
    contrastive = type(task).__name__ in CONTRASTIVE_TASKS
    if fused := _fused(task.loss if contrastive else task, args, proto):
        task.loss = fused
    return task


def _fused(original: nn.Module, args: Any, proto: ProtoConfig | None) -> nn.Module | None:
    """Our loss to replace OpenCLIP's contrastive one; None: keep OpenCLIP's."""
    horovod = getattr(args, "horovod", False)
    if proto is not None and type(original) is theirs.ClipLoss and not horovod:
        return _with_prototypes(args, proto)
    if proto is not None:
        raise ValueError(
            "--proto-*: expected the plain contrastive loss, got another one; leave out --siglip, "
            "CoCa, distillation and Horovod, or the --proto-* flags"
        )
    ours = REPLACEMENTS.get(type(original))
    if ours is not None and not horovod:
        _say(args, f"OpenCLIP's {ours.__name__} without its matrix of logits")
        common: dict[str, Any] = {
            "cache_labels": bool(original.cache_labels),
            "rank": args.rank,
            "world_size": args.world_size,
        }
        if ours is SigLipLoss:
            return SigLipLoss(dist_impl=args.loss_dist_impl, **common)
        common |= {"local_loss": args.local_loss, "gather_with_grad": args.gather_with_grad}
        if ours is CoCaLoss:
            return CoCaLoss(
                caption_loss_weight=args.coca_caption_loss_weight,
                clip_loss_weight=args.coca_contrastive_loss_weight,
                pad_id=original.caption_loss.ignore_index,  # type: ignore[union-attr,arg-type]
                **common,
            )
        return ours(**common)
    _say(args, f"OpenCLIP's own {type(original).__name__} is used: protoclip has no replacement")
    return None


def _with_prototypes(args: Any, proto: ProtoConfig) -> ProtoClipLoss:
    accum_freq = getattr(args, "accum_freq", 1)
    resumed = getattr(args, "resume", None)
    if resumed and proto.warmup:
        left = max(0, proto.warmup - _steps_done(resumed))
        proto = dataclasses.replace(proto, warmup=left)
    loss = ProtoClipLoss(
        local_loss=args.local_loss,
        gather_with_grad=args.gather_with_grad,
        rank=args.rank,
        world_size=args.world_size,
        proto=proto,
        accum_freq=accum_freq,
    )
    steps = loss.steps_to_prototypes(args.batch_size * accum_freq)
    _say(
        args,
        f"ClipLoss and online prototypes: K = {proto.num_clusters} per modality of the newest "
        f"{proto.effective_queue} pairs; InfoNCE alone for {steps} steps until the queue is full"
        + (" (again: a checkpoint does not hold it)" if resumed else ""),
    )
    return loss


def _warn_if_too_short(loss: ProtoClipLoss, args: Any, batches: int) -> None:
    """Log a warning if a run of ``batches`` an epoch ends before it has prototypes."""
    accum_freq = getattr(args, "accum_freq", 1)
    warmup = loss.steps_to_prototypes(args.batch_size * accum_freq)
    steps = batches // accum_freq * args.epochs
    if steps <= warmup and args.rank == 0:
        LOGGER.warning(
            "protoclip: the run has %d steps, and prototypes start after %d, so it trains plain "
            "CLIP; use a smaller --proto-queue or --proto-warmup, or more epochs",
            steps,
            warmup,
        )


def _steps_done(checkpoint: str) -> int:
    """The optimiser's steps until a checkpoint of OpenCLIP's trainer; 0 if it does not say."""
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        if "global_step" in saved:  # of OpenCLIP after 3.3
            return int(saved["global_step"])
        optimizer = saved["optimizer"]
        places = [*optimizer["state"].values(), *optimizer["param_groups"]]
        steps = [int(place["step"]) for place in places if "step" in place]
        if not steps:
            raise KeyError("its optimizer does not count them")
        return max(steps)
    except (OSError, RuntimeError, pickle.UnpicklingError, KeyError) as error:
        LOGGER.warning(
            "protoclip: --proto-warmup begins again, as the steps in %s cannot be read (%s)",
            checkpoint,
            torch_reason(error),
        )
        return 0


def _say(args: Any, text: str) -> None:
    if args.rank == 0:
        LOGGER.info("protoclip: %s", text)


class _DdpAnywhere(DistributedDataParallel):
    """DistributedDataParallel that accepts OpenCLIP's ``device_ids=[device]`` for CPUs too."""

    def __init__(self, module: nn.Module, device_ids: Any = None, **kwargs: Any) -> None:
        if device_ids and all(torch.device(device).type == "cpu" for device in device_ids):
            device_ids = None
        super().__init__(module, device_ids=device_ids, **kwargs)


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """Inside this context OpenCLIP can read shards with webdataset 1.x and train ranks on CPUs.

    webdataset 1.x ends each shard with an empty sample, on which OpenCLIP 3.3's reader dies with
    ``KeyError: 'fname'`` (open_clip #935); this turns the empty sample off.
    """
    data: Any = importlib.import_module("open_clip_train.data")
    expander = getattr(data, "tar_file_expander", None)
    parallel: Any = nn.parallel
    parallel.DistributedDataParallel = _DdpAnywhere
    if expander is not None and "eof_value" in inspect.signature(expander).parameters:
        data.tar_file_expander = functools.partial(expander, eof_value=None)
    try:
        yield
    finally:
        parallel.DistributedDataParallel = DistributedDataParallel
        if expander is not None:
            data.tar_file_expander = expander


class CaptionLoss(nn.Module):
    """A loss that knows which pairs share a caption, from the tokens that the model received."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.tokens: torch.Tensor | None = None
        self.watch = nn.modules.module.register_module_forward_hook(self._see, with_kwargs=True)

    def _see(self, model: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        # OpenCLIP 3 calls the model by position, 4 by name.
        if hasattr(model, "encode_image") and hasattr(model, "encode_text"):
            self.tokens = inputs[1] if len(inputs) == 2 else named.get("text")

    def forward(self, image_features: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        tokens = self.tokens
        self.tokens = None
        if tokens is None or len(tokens) != len(image_features):
            raise ValueError(
                "--dedup caption: expected a loop that gives the model images and tokens, and the "
                "loss their features, as OpenCLIP's does; leave the flag out"
            )
        return self.loss(image_features, *args, ids=caption_ids(tokens), **kwargs)


@contextlib.contextmanager
def patched(trainer: Any, proto: ProtoConfig | None, dedup: bool = False) -> Iterator[None]:
    """Inside this context the trainer uses our loss.

    With ``dedup``, pairs with the same caption are not negatives of each other.
    """
    ours: dict[str, Callable[..., Any]] = {"create_task": create_task, "create_loss": create_loss}
    if (name := next((name for name in ours if hasattr(trainer, name)), "")) not in ours:
        raise ValueError(f"openclip: expected create_loss or create_task in {trainer}, got neither")
    original = getattr(trainer, name)
    get_data = getattr(trainer, "get_data", None) if proto else None
    opened: dict[str, Any] = {}
    watches = []

    def keep_data(*args: Any, **kwargs: Any) -> Any:
        opened.update(get_data(*args, **kwargs))  # type: ignore[misc]
        return opened

    def factory(*args: Any, **kwargs: Any) -> nn.Module:
        loss_or_task = ours[name](*args, proto=proto, **kwargs)
        loss = getattr(loss_or_task, "loss", loss_or_task)
        if isinstance(loss, ProtoClipLoss) and "train" in opened:
            _warn_if_too_short(loss, args[0], opened["train"].dataloader.num_batches)
        if not dedup:
            return loss_or_task
        loss = CaptionLoss(loss_or_task if name == "create_loss" else loss_or_task.loss)
        watches.append(loss.watch)
        if name == "create_loss":
            return loss
        loss_or_task.loss = loss
        return loss_or_task

    setattr(trainer, name, factory)
    if get_data:
        trainer.get_data = keep_data
    try:
        with repaired():
            yield
    finally:
        setattr(trainer, name, original)
        if get_data:
            trainer.get_data = get_data
        for watch in watches:
            watch.remove()


def split_flags(argv: Sequence[str]) -> tuple[ProtoConfig | None, bool, list[str]]:
    """Split the command line into our settings (None without a --proto-* flag), whether --dedup
    caption is given, and OpenCLIP's part; register our models and a --model config file.

    Raises:
        ValueError: a value out of range.
    """
    parser = openclip_parser()
    parser.add_argument("--model", default="", help=argparse.SUPPRESS)
    parsed, words_for_openclip = parser.parse_known_args(list(argv))
    settings = vars(parsed)
    dedup = settings.pop("dedup") == "caption"
    model = register_configs(settings.pop("model"), audio=hasattr(open_clip, "create_task"))
    proto = ProtoConfig(**settings) if settings else None
    if model:
        words_for_openclip += ["--model", model]
    return proto, dedup, words_for_openclip


def _check(trainer: Any, proto: ProtoConfig | None, dedup: bool, words: list[str]) -> None:
    """Report flags that cannot work now, in one line: OpenCLIP would print a page about them, or
    they would fail after minutes of loading."""
    check_openclips_flags(words)
    args = trainer.parse_args(list(words))
    for ours, name, is_used in (
        (proto or dedup, "a CoCa model", "coca" in args.model.lower()),
        (proto or dedup, "--distill-model", args.distill_model),
        (proto or dedup, "--horovod", getattr(args, "horovod", False)),
        (proto, "--siglip", args.siglip),
        (dedup, "--accum-freq", getattr(args, "accum_freq", 1) > 1),
        (dedup, "--torchcompile", getattr(args, "torchcompile", False)),
    ):
        if ours and is_used:
            flag = "--dedup caption" if ours is True else "--proto-*"
            raise ValueError(f"{flag} cannot be combined with {name}; leave one of them out")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake in our flags prints one line and gives status 2, a signal
    128 and its number."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        proto, dedup, words = split_flags(argv)
        trainer: Any = importlib.import_module("open_clip_train.main")
        _check(trainer, proto, dedup, words)
    except ModuleNotFoundError as error:
        print(f"{PROG}: error: {error}; pip install -e '.[openclip]'", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    try:
        with patched(trainer, proto, dedup), Signals():
            return 1 if trainer.main(words) else 0
    except Interrupted as interrupted:
        print(f"{PROG}: interrupted by {name_of(interrupted.number)}", file=sys.stderr)
        return 128 + interrupted.number


if __name__ == "__main__":
    sys.exit(main())
