"""What OpenCLIP's trainer calls to get its loss: ``create_loss`` (3.3), ``create_task`` (4)."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import open_clip
from open_clip import loss as theirs
from torch import nn

from protoclip.losses import ClipLoss, ProtoClipLoss, ProtoConfig, SigLipLoss

LOGGER = logging.getLogger(__name__)


def create_loss(args: Any, proto: ProtoConfig | None = None) -> nn.Module:
    """OpenCLIP's ``create_loss`` with fused losses.

    To patch by hand: ``open_clip_train.main.create_loss = protoclip.create_loss``; with prototypes,
    a ``functools.partial`` that sets ``proto``.

    Args:
        args: what OpenCLIP's parser returns.
        proto: settings of the prototypes; None: no prototypes.
    Returns:
        ``ClipLoss``, ``SigLipLoss`` or ``ProtoClipLoss``; OpenCLIP's own loss, with a line in the
        log, where that is none of the first two (CoCa, distillation, Horovod).
    Raises:
        ValueError: prototypes for a loss that has none.
    """
    own = open_clip.create_loss(args)
    return _fused(own, args, proto) or own


def create_task(
    args: Any,
    model: nn.Module,
    dist_model: nn.Module | None = None,
    naflex_data_config: Any = None,
    proto: ProtoConfig | None = None,
) -> nn.Module:
    """OpenCLIP 4's ``create_task`` with fused losses; to be patched in as ``create_loss`` is.

    Args:
        args, model, dist_model, naflex_data_config: what OpenCLIP's ``main`` passes.
        proto: settings of the prototypes; None: no prototypes.
    Returns:
        OpenCLIP's task; its ``loss`` is ours where ``create_loss`` would give ours.
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
    contrastive = type(task).__name__ in ("CLIPTask", "SigLIPTask")
    fused = _fused(task.loss if contrastive else task, args, proto)
    if fused is not None:
        task.loss = fused
    return task


def _fused(own: nn.Module, args: Any, proto: ProtoConfig | None) -> nn.Module | None:
    """Ours for OpenCLIP's plain ClipLoss or SigLipLoss; None: OpenCLIP's stays."""
    shared: dict[str, Any] = {"rank": args.rank, "world_size": args.world_size}
    if type(own) is theirs.ClipLoss and not getattr(args, "horovod", False):
        shared |= {"local_loss": args.local_loss, "gather_with_grad": args.gather_with_grad}
        if proto is not None:
            return _with_prototypes(args, proto, shared)
        _say(args, "OpenCLIP's ClipLoss without its matrix of logits")
        return ClipLoss(**shared)
    if proto is not None:
        raise ValueError(
            "--proto-*: prototypes go with the plain contrastive loss only, not with --siglip, "
            "CoCa, distillation or Horovod; leave the --proto-* flags out, or those"
        )
    if type(own) is theirs.SigLipLoss:
        _say(args, "OpenCLIP's SigLipLoss without its matrix of logits")
        return SigLipLoss(dist_impl=args.loss_dist_impl, **shared)
    _say(args, f"OpenCLIP's own {type(own).__name__} stays: protoclip has no other for it")
    return None


def _with_prototypes(args: Any, proto: ProtoConfig, shared: dict[str, Any]) -> ProtoClipLoss:
    accum_freq = getattr(args, "accum_freq", 1)
    if getattr(args, "resume", None):
        # The warm-up was in the part that is resumed; only the queue has to fill again.
        proto = dataclasses.replace(proto, warmup=0)
    loss = ProtoClipLoss(**shared, proto=proto, accum_freq=accum_freq)
    steps = loss.steps_to_prototypes(args.batch_size * accum_freq)
    _say(
        args,
        f"ClipLoss and online prototypes: K = {proto.num_clusters} a modality from the newest "
        f"{proto.queue} pairs; InfoNCE alone for {steps} steps until the queue is full"
        + (" (again: a checkpoint does not hold it)" if getattr(args, "resume", None) else ""),
    )
    return loss


def _say(args: Any, text: str) -> None:
    if args.rank == 0:
        LOGGER.info("protoclip: %s", text)
