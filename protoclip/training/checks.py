"""Which losses the settings of a run ask for, and whether the settings can work on this machine.

A run checks all of this before it creates its folder.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from protoclip.data import data_kind
from protoclip.distributed import GlobalBatchNorm1d, is_distributed
from protoclip.episodes.teacher import teacher_spec
from protoclip.lloyd.faiss_backend import load_faiss
from protoclip.losses.objective import Term
from protoclip.model import check_model
from protoclip.ops.dispatch import why_not
from protoclip.settings.config import LossConfig, TrainConfig, flat, to_dict
from protoclip.training.schedule import parse_interval

# Names of metrics, which no term of a user's own may have.
LOGGED = {
    "accuracy", "bad_samples", "bad_steps", "contrastive_loss", "distill_loss", "epoch", "episode",
    "external_accuracy", "external_loss", "grad_norm", "in_a_row", "logit_bias", "logit_scale",
    "loss", "lr", "proto_accuracy", "proto_logit_scale", "proto_loss", "same_caption", "samples",
    "samples_per_second", "step",
}  # fmt: skip


# Settings that make sense for pictures only, and for stored features only.
OF_PICTURES = (
    "data.augmentation", "model.model", "model.pretrained", "model.force_image_size",
    "model.force_context_length", "model.lock_image", "model.lock_text", "model.grad_checkpointing",
)  # fmt: skip
OF_FEATURES = (
    "data.labels", "data.class_features", "data.mixup", "model.head", "model.head_depth",
    "model.embed_dim", "model.image_width", "model.text_width",
)  # fmt: skip


@dataclass(frozen=True)
class ActiveLosses:
    """The losses that a run trains besides InfoNCE."""

    internal: bool  # prototypes of the model's own features
    external: bool  # prototypes of a teacher's
    distillation: bool

    @property
    def prototypes(self) -> bool:
        """Whether any term needs episodes with prototypes."""
        return self.internal or self.external

    @property
    def projects(self) -> bool:
        """Whether the heads run; from step 0, so that their running statistics are ready."""
        return self.prototypes or self.distillation

    def words(self) -> str:
        """What is trained, in words."""
        names = {
            "internal prototypes": self.internal,
            "a teacher's prototypes": self.external,
            "distillation": self.distillation,
        }
        return " and ".join(name for name, there in names.items() if there) or "InfoNCE alone"


def loss_weights(config: TrainConfig, *, has_teacher: bool) -> LossConfig:
    """The weights that a run trains with: ``w_distill`` is 0 where there is nothing to distil;
    ``w_proto`` is as given, or if it is below 0 (automatic) 0 where prototypes of a teacher are
    trained and 1 where not."""
    weights = config.loss
    if config.method == "clip" or not has_teacher:
        weights = replace(weights, w_distill=0.0)
    if weights.w_proto >= 0:
        return weights
    external = has_teacher and weights.w_proto_external > 0
    return replace(weights, w_proto=0.0 if external else 1.0)


def active_losses(config: TrainConfig, *, has_teacher: bool) -> ActiveLosses:
    """The terms with a positive weight."""
    weights = loss_weights(config, has_teacher=has_teacher)
    proto = config.method == "protoclip"
    return ActiveLosses(
        internal=proto and weights.w_proto > 0,
        external=proto and has_teacher and weights.w_proto_external > 0,
        distillation=weights.w_distill > 0,
    )


def check_terms(terms: Mapping[str, Term]) -> None:
    """Raise ValueError or TypeError for terms that cannot be trained or logged."""
    if not isinstance(terms, Mapping):
        raise TypeError(
            "train(terms=): expected a dict that gives each term the name under which it is "
            f"logged, got a {type(terms).__name__}; write terms={{'mine': Term(module)}}"
        )
    for name, term in terms.items():
        if not isinstance(term, Term) or not isinstance(term.module, nn.Module):
            raise TypeError(
                f"term {name!r}: expected Term(module, weight) with an nn.Module, got {term!r}"
            )
        if not 0 < term.weight < math.inf:
            raise ValueError(f"term {name!r}: expected a weight above 0, got {term.weight}")
        if (
            not isinstance(name, str)
            or not name.isidentifier()
            or name in LOGGED
            or name.startswith(("seconds_", "val_"))
        ):
            raise ValueError(
                f"term {name!r}: expected a name that is a word and that no other metric has; "
                "rename the term"
            )


def check_settings(
    config: TrainConfig, device: torch.device, terms: Mapping[str, Term] | None = None
) -> None:
    """Raise ValueError for settings that cannot work, whatever the data. ``terms``: losses of the
    user's own."""
    check_terms(terms or {})
    if data_kind(config.data.train_data) == "features":
        _check_features(config)
    else:
        _check_pictures(config)
    parse_interval(config.run.save_every)
    _check_val_fraction(config)
    if "wandb" in config.run.report_to and importlib.util.find_spec("wandb") is None:
        raise ValueError("--report-to wandb: wandb is not installed; pip install wandb")
    if -1 < config.loss.w_proto < 0:
        raise ValueError(
            f"--w-proto: expected -1 (automatic), or 0 and more, got {config.loss.w_proto:g}"
        )
    if not terms:
        _check_every_step_has_a_loss(config)
    _check_kmeans(config.episode.kmeans_backend, device)


def _check_features(config: TrainConfig) -> None:
    """Refuse settings of encoders of pictures and texts, which have run already."""
    if changed := _changed(config, OF_PICTURES):
        raise ValueError(
            f"{changed}: expected pictures and captions with it, got the stored features "
            f"{config.data.train_data}, whose encoders have done their work; leave the flag out"
        )
    if config.data.val_data and data_kind(config.data.val_data) != "features":
        raise ValueError(
            f"--val-data: expected stored features, as in --train-data, got {config.data.val_data};"
            " encode it with the same encoders"
        )


def _check_pictures(config: TrainConfig) -> None:
    if changed := _changed(config, OF_FEATURES):
        raise ValueError(
            f"{changed}: expected stored features with it, got --train-data "
            f"{config.data.train_data}; encode them with protoclip encode, or leave the flag out"
        )
    check_model(config.model)


def _changed(config: TrainConfig, settings: Sequence[str]) -> str:
    """The flag of the first of these settings that is not at its default; "": all are."""
    default = flat(to_dict(TrainConfig()))
    now = flat(to_dict(config))
    changed = [name for name in settings if now[name] != default[name]]
    return "--" + changed[0].partition(".")[2].replace("_", "-") if changed else ""


def _check_val_fraction(config: TrainConfig) -> None:
    data = config.data
    if data.val_fraction and data.val_data:
        raise ValueError(
            f"--val-fraction: expected no other data to evaluate on, got --val-data {data.val_data}"
            "; leave one of them out"
        )
    if data.val_fraction and data.train_data.startswith("builtin:"):
        raise ValueError(
            f"--val-fraction: {data.train_data} has a held-out part of its own, on which the run "
            "is evaluated; leave the flag out"
        )


def _check_every_step_has_a_loss(config: TrainConfig) -> None:
    has_teacher = bool(teacher_spec(config)[0])
    active = active_losses(config, has_teacher=has_teacher)
    from_the_start = not (config.episode.infonce_warmup or config.episode.lit_start)
    always = active.distillation or (active.prototypes and from_the_start)
    if config.loss.w_clip == 0 and not always:
        raise ValueError(
            f"--w-clip 0 leaves some steps without a loss, with --method {config.method} and "
            f"{'an' if has_teacher else 'no'} external teacher; use --w-clip 1, or "
            "prototypes from the first step on: --infonce-warmup-epoch 0 and --lit-start 0"
        )


def _check_kmeans(backend: str, device: torch.device) -> None:
    if backend == "faiss":
        load_faiss()
        if is_distributed():
            raise ValueError("--kmeans-backend faiss: expected one process; use auto")
    elif backend != "auto":
        for op in ("kmeans_assign", "segment_mean"):
            if reason := why_not(op, backend, device.type, torch.float32):
                raise ValueError(f"--kmeans-backend {backend}: {reason}; use --kmeans-backend auto")


def depends_on_split(model: nn.Module) -> bool:
    """Whether dropout or batch norm makes a step depend on how its batch is split."""
    for module in model.modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        chances = [getattr(module, name, 0) for name in ("p", "prob", "drop_prob", "dropout")]
        dropout = any(isinstance(chance, float) and chance > 0 for chance in chances)
        if dropout or (norm and not isinstance(module, GlobalBatchNorm1d)):
            return True
    return False
