"""Prototype cross-entropy and its soft targets: contract, autograd and dispatch.

L_i = LSE_k(s h_i.C_k) - s h_i.m_y: soft and hard targets share one kernel, because the target
depends only on the sample's cluster (m is computed once per episode). With frozen prototypes one
pass gives loss and gradient, dL_i/dh_i = s (sum_k p_ik C_k - m_y), an attention output with
key = value = C; the backward pass only multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from protoclip.kernels.results import SampleLosses, ScaledGradients
from protoclip.ops import checks, reference
from protoclip.ops.checks import LEFT_OUT
from protoclip.ops.dispatch import function, resolve
from protoclip.ops.operators import (
    accumulator,
    call_saved,
    define_gradient,
    empty,
    gradient_like,
    operator,
    reduce,
    reduce_weighted,
    refuse_gradient,
    save,
    saved_values,
    single,
    wanted_gradients,
    wants_gradient,
    without_autocast,
)

COLDEST = 1e-30  # the lowest temperature: below it fp32 logits would overflow


def _sample_losses_shapes(arguments: Any) -> SampleLosses:
    features = arguments.features
    n, d = features.shape
    graded = n if arguments.need_grad else 0
    by_row = arguments.reduction == "none"
    return SampleLosses(
        loss=empty(features, n) if by_row else empty(features),
        divisor=empty(features, 0) if by_row else empty(features),
        gradient=empty(features, graded, d),
        nearest=features.new_empty(n if arguments.need_nearest else 0, dtype=torch.int64),
        row_max=empty(features, n),
        row_sum=empty(features, n),
        scale_gradient=empty(features, graded if arguments.need_scale_gradient else 0),
    )


@operator("prototype_cross_entropy", _sample_losses_shapes, SampleLosses)
def sample_losses(
    features: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    labels: Tensor,
    logit_scale: Tensor,
    need_grad: bool,
    need_nearest: bool,
    need_scale_gradient: bool,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of each sample, or their sum, or their mean over those with a label; ``targets`` is
    [0, D] for hard labels."""
    run = function("prototype_cross_entropy", backend, "prototype_cross_entropy_fwd")
    return run(
        features=features,
        prototypes=prototypes,
        targets=targets,
        labels=labels,
        logit_scale=logit_scale,
        need_grad=need_grad,
        need_nearest=need_nearest,
        need_scale_gradient=need_scale_gradient,
        reduction=reduction,
    )


def _scaled_gradients_shapes(arguments: Any) -> ScaledGradients:
    return ScaledGradients(
        dfeatures=arguments.features.new_empty(arguments.gradient.shape),
        dlogit_scale=empty(arguments.features),
    )


@operator("prototype_cross_entropy_scale", _scaled_gradients_shapes, ScaledGradients)
def scaled_gradients(
    grad: Tensor,
    divisor: Tensor,
    logit_scale: Tensor,
    gradient: Tensor,
    scale_gradient: Tensor,
    features: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """What the forward pass saved times the upstream gradient, [N] or, with a ``divisor``, []. A
    saved gradient of no rows is not wanted."""
    run = function("prototype_cross_entropy", backend, "prototype_cross_entropy_scale")
    return run(
        grad=grad,
        divisor=divisor,
        logit_scale=logit_scale,
        gradient=gradient,
        scale_gradient=scale_gradient,
        features=features,
    )


def _prototype_gradient_shapes(arguments: Any) -> Tensor:
    return arguments.prototypes.new_empty(arguments.prototypes.shape)


@operator("prototype_cross_entropy_bwd", _prototype_gradient_shapes, single)
def prototype_gradient(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    logit_scale: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    weight: Tensor,
    hard: bool,
    backend: str,
) -> Tensor:
    """logit_scale * sum_i w_i (p_ik - [hard and y_i = k]) h_i, [K, D] in the prototypes' dtype."""
    run = function("prototype_cross_entropy", backend, "prototype_cross_entropy_bwd")
    return run(
        features=features,
        prototypes=prototypes,
        labels=labels,
        logit_scale=logit_scale,
        row_max=row_max,
        row_sum=row_sum,
        weight=weight,
        hard=hard,
    )


def _save_sample_losses(ctx: Any, arguments: Any, results: SampleLosses) -> None:
    save(
        ctx,
        features=arguments.features,
        prototypes=arguments.prototypes,
        labels=arguments.labels,
        logit_scale=arguments.logit_scale,
        hard=arguments.targets.shape[0] == 0,
        backend=arguments.backend,
        gradient=results.gradient,
        row_max=results.row_max,
        row_sum=results.row_sum,
        scale_gradient=results.scale_gradient,
        divisor=results.divisor,
    )


def _sample_losses_backward(ctx: Any, grads: SampleLosses) -> dict[str, Any]:
    if grads.loss is None:
        return {}
    by_name: dict[str, Any] = {}
    wanted = wanted_gradients(ctx, sample_losses)
    saved = saved_values(ctx)
    if wanted.features or wanted.logit_scale:
        gradients = call_saved(
            scaled_gradients,
            saved,
            grad=grads.loss,
            gradient=saved.gradient if wanted.features else saved.gradient[:0],
        )
        if wanted.features:
            by_name["features"] = gradients.dfeatures
        if wanted.logit_scale:
            by_name["logit_scale"] = gradient_like(gradients.dlogit_scale, saved.logit_scale)
    if wanted.prototypes:
        weight = grads.loss
        if weight.ndim == 0:
            weight = (weight / saved.divisor).expand(saved.row_sum.shape[0])
        by_name["prototypes"] = call_saved(prototype_gradient, saved, weight=weight)
    return by_name


define_gradient(sample_losses, save=_save_sample_losses, backward=_sample_losses_backward)
refuse_gradient(scaled_gradients, "prototype_cross_entropy")
refuse_gradient(prototype_gradient, "prototype_cross_entropy")


@dataclass(frozen=True)
class Bank:
    """A set of prototypes and the samples' labels."""

    prototypes: Tensor  # [K, D]
    labels: Tensor  # int64 [N], -100 = ignore
    targets: Tensor | None = None  # [K, D], rows m_y; None: hard labels

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", checks.as_int64(self.labels))


@dataclass(frozen=True)
class PrototypeLosses:
    """Results per bank."""

    loss: Tensor  # [S], or [S, N] for reduction "none"; nats
    nearest: Tensor  # int64 [S, N]: the prototype with the largest logit


def prototype_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    *,
    targets: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of each sample against all prototypes, soft or hard, without [N, K] in memory.

    Sums are fp32.

    Args:
        features: [N, D], usually unit rows; float32, bfloat16 or float16 (float64: reference).
        prototypes: [K, D] on the same device. Features, prototypes and targets whose dtypes differ
            are promoted.
        labels: int64 [N], the sample's cluster in [0, K); -100 leaves the sample out. Not checked
            on a GPU, where reading them would wait for the device.
        logit_scale: [] or [1], the multiplier (not its logarithm).
        targets: [K, D], rows m_y = sum_k t(y)_k C_k for target distributions t(y) that depend on
            the cluster (``protoclip.soft_targets``); constants. None: hard labels, m = prototypes.
        weights: float32 [N] >= 0, one per sample, without a gradient.
        label_smoothing: epsilon in [0, 1], a share of the target spread evenly over all prototypes,
            as in torch's cross-entropy; a number. With ``targets`` the result is a constant too.
        reduction: "mean": the sum of weighted losses over the total weight of the samples with a
            label; "sum"; or "none": weighted losses.
        backend: "auto" or a row of ``protoclip.backends("prototype_cross_entropy")``.
    Returns:
        float32 (float64 for float64 input), nats: [] or [N]. Gradients reach ``features``,
        ``logit_scale`` and, where it requires grad, ``prototypes``. No samples: 0.
    Raises:
        ValueError, TypeError: shapes or devices disagree, dtypes are not floating point,
            ``targets`` requires grad, K = 0 with N > 0, or the named backend cannot run.
    Source:
        ProtoCLIP (arXiv 2206.10996), prototype loss, simplified by linearity in the target.

    Example:
        >>> features = torch.nn.functional.normalize(torch.randn(8, 16), dim=1)
        >>> prototypes, labels = torch.randn(4, 16), torch.tensor([0, 1, 2, 3, 0, 1, 2, -100])
        >>> protoclip.prototype_cross_entropy(features, prototypes, labels, logit_scale=10.0).shape
        torch.Size([])
    """
    op = "prototype_cross_entropy"
    checks.label_smoothing(op, label_smoothing)
    bank = Bank(prototypes, labels, targets)
    _check_inputs(op, features, [bank], reduction)
    logit_scale = checks.scale(op, logit_scale, features.device, accumulator(features))
    if weights is not None:
        backend_name = resolve(op, backend, features.device.type, features.dtype)
        checks.weights(op, weights, features, backend_name)
    reduces = weights is None and not label_smoothing
    losses, _ = _sample_losses(
        op,
        features,
        bank,
        logit_scale,
        backend,
        need_nearest=False,
        reduction=reduction if reduces else "none",
    )
    if reduces:
        return losses
    if label_smoothing:
        spread = _mean_below_target(features, bank, logit_scale).to(losses.dtype)
        losses = losses + label_smoothing * spread
    return reduce_weighted(losses, (labels != LEFT_OUT).to(losses.dtype), weights, reduction)


def _mean_below_target(features: Tensor, bank: Bank, logit_scale: Tensor) -> Tensor:
    """Mean logit of each sample's target minus that of all prototypes, [N]; 0 where ignored.

    Smoothing the targets themselves, (1 - epsilon) m + epsilon mean, would round them to bfloat16
    and lose the gradient of trained prototypes. fp64, whose indexed sums have one order."""
    used = bank.labels != LEFT_OUT
    mean = bank.prototypes.double().mean(dim=0)
    if bank.targets is None:
        targets = bank.prototypes
    else:  # constants, and so is what is mixed into them
        targets = bank.targets
        mean = mean.detach()
    of_sample = targets.double()[bank.labels.clamp(0, targets.shape[0] - 1)]  # [N, D]
    gap = (features.double() * (of_sample - mean)).sum(dim=1)
    return (logit_scale.double().reshape(()) * gap).where(used, 0)


def prototype_losses(
    features: Tensor,
    banks: Sequence[Bank],
    logit_scale: Tensor | float,
    *,
    reduction: str = "mean",
    backend: str = "auto",
) -> PrototypeLosses:
    """``prototype_cross_entropy`` against several banks of prototypes.

    Args:
        features: [N, D], as in ``prototype_cross_entropy``.
        banks: S >= 1 banks, each with its own K.
        logit_scale, reduction, backend: as in ``prototype_cross_entropy``.
    Returns:
        The losses per bank, and per sample the nearest prototype (for prototype accuracy).
    Raises:
        ValueError, TypeError: as in ``prototype_cross_entropy``.

    Example:
        >>> labels = torch.tensor([0, 1, 2, 3])
        >>> bank = protoclip.Bank(torch.randn(4, 16), labels)
        >>> result = protoclip.prototype_losses(torch.randn(4, 16), [bank, bank], 10.0)
        >>> result.loss.shape, result.nearest.shape
        (torch.Size([2]), torch.Size([2, 4]))
    """
    op = "prototype_cross_entropy"
    if not banks:
        raise ValueError(f"{op}: expected at least one bank, got none")
    _check_inputs(op, features, banks, reduction)
    matrices = [matrix for bank in banks for matrix in (bank.prototypes, bank.targets)]
    dtype = checks.common_dtype([features, *(m for m in matrices if m is not None)])
    features = features.to(dtype)
    logit_scale = checks.scale(op, logit_scale, features.device, accumulator(features))
    losses = []
    nearest = []
    for bank in banks:
        loss, index = _sample_losses(
            op, features, bank, logit_scale, backend, need_nearest=True, reduction=reduction
        )
        losses.append(loss)
        nearest.append(index)
    return PrototypeLosses(torch.stack(losses), torch.stack(nearest))


def _sample_losses(
    op: str,
    features: Tensor,
    bank: Bank,
    logit_scale: Tensor,
    backend: str,
    need_nearest: bool,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Losses [N], or their mean or sum, and, where asked for, the nearest prototypes int64 [N]."""
    hard = features.new_empty((0, features.shape[1]))
    targets = hard if bank.targets is None else bank.targets
    dtype = checks.common_dtype([features, bank.prototypes, targets])
    features = features.to(dtype)
    prototypes = bank.prototypes.to(dtype)
    targets = targets.to(dtype)
    backend_name = resolve(op, backend, features.device.type, features.dtype)
    if backend_name == "reference":
        with without_autocast(features.device.type):
            losses, nearest = _reference(
                op, features, prototypes, targets, bank.labels, logit_scale
            )
        count = (bank.labels != LEFT_OUT).sum() if reduction == "mean" else 0
        return reduce(losses, reduction, count), nearest
    results = sample_losses(
        features,
        prototypes,
        targets,
        bank.labels,
        logit_scale,
        need_grad=wants_gradient(features, logit_scale),
        need_nearest=need_nearest,
        need_scale_gradient=wants_gradient(logit_scale),
        reduction=reduction,
        backend=backend_name,
    )
    return results.loss, results.nearest


def _check_inputs(op: str, features: Tensor, banks: Sequence[Bank], reduction: str) -> None:
    checks.matrix(op, "features", features, "[N, D]")
    checks.one_of(op, "reduction", reduction, checks.REDUCTIONS)
    for bank in banks:
        _check_bank(op, features, bank)


def _check_bank(op: str, features: Tensor, bank: Bank) -> None:
    checks.matrix(op, "prototypes", bank.prototypes, "[K, D]")
    checks.like(op, "features", features, "prototypes", bank.prototypes)
    checks.labels(op, bank.labels, features)
    n, k = features.shape[0], bank.prototypes.shape[0]
    if n and not k:
        raise ValueError(f"{op}: expected K >= 1 prototypes for N = {n} samples, got 0")
    if bank.targets is not None:
        checks.matrix(op, "targets", bank.targets, "[K, D]")
        checks.like(op, "prototypes", bank.prototypes, "targets", bank.targets)
        if bank.targets.shape != bank.prototypes.shape:
            raise ValueError(
                f"{op}: expected targets of the prototypes' shape {tuple(bank.prototypes.shape)}, "
                f"got {tuple(bank.targets.shape)}"
            )
        if bank.targets.requires_grad:
            raise ValueError(f"{op}: targets are constants, got one that requires grad; detach it")


def _reference(
    op: str,
    features: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    labels: Tensor,
    logit_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """One bank -> losses [N], nearest [N]."""
    k = prototypes.shape[0]
    if features.device.type == "cpu" and checks.readable(labels):
        checks.label_values(op, labels, k)
    soft = targets if targets.shape[0] else None
    loss = reference.prototype_cross_entropy(features, prototypes, labels, logit_scale, soft)
    with torch.no_grad():
        acc_dtype = accumulator(features)
        sign = torch.sign(logit_scale).to(acc_dtype)
        logits = sign * features.to(acc_dtype) @ prototypes.to(acc_dtype).T
        return loss, logits.argmax(dim=1) if k else torch.zeros_like(labels)


@torch.no_grad()
def soft_targets(
    source_centroids: Tensor, prototypes: Tensor, temperature: float, *, backend: str = "auto"
) -> Tensor:
    """The expected prototype of each cluster under its soft target: m_y = sum_k t(y)_k C_k.

    t(y) = softmax_k(S_y.S_k / temperature) over the source's own centroids. This is one pass of
    K x K x D work per episode; the fused backends never hold K x K.

    Args:
        source_centroids: [K, Ds], in the space where the clusters were found; any float dtype.
        prototypes: [K, D], the same clusters in the student's space (back translation); different
            dtypes are promoted.
        temperature: tau; <= 0 means hard targets, m = prototypes; values below 1e-30, for which
            fp32 logits would overflow, count as 1e-30.
        backend: "auto" or a row of ``protoclip.backends("soft_targets")``.
    Returns:
        [K, D] float32 (float64 for float64 input), a constant: no gradient.
    Raises:
        ValueError, TypeError: shapes or devices disagree, or the named backend cannot run.
    Source:
        ProtoCLIP (arXiv 2206.10996), soft targets; linearity of cross-entropy in the target.

    Example:
        >>> source_centroids, prototypes = torch.randn(4, 8), torch.randn(4, 16)
        >>> protoclip.soft_targets(source_centroids, prototypes, temperature=0.1).shape
        torch.Size([4, 16])
    """
    op = "soft_targets"
    checks.matrix(op, "source_centroids", source_centroids, "[K, Ds]")
    checks.matrix(op, "prototypes", prototypes, "[K, D]")
    same_number = source_centroids.shape[0] == prototypes.shape[0]
    if not same_number or source_centroids.device != prototypes.device:
        raise ValueError(
            f"{op}: expected one prototype per source centroid, on one device, got "
            f"{prototypes.shape[0]} on {prototypes.device} and "
            f"{source_centroids.shape[0]} on {source_centroids.device}"
        )
    if not isinstance(temperature, (int, float)):
        type_name = type(temperature).__name__
        raise TypeError(
            f"{op}: expected temperature as a Python number, got {type_name}; use .item()"
        )
    if temperature <= 0:
        return (prototypes if prototypes.dtype == torch.float64 else prototypes.float()).clone()
    source_centroids, prototypes = checks.promoted(source_centroids, prototypes)
    backend_name = resolve(op, backend, prototypes.device.type, prototypes.dtype)
    with without_autocast(prototypes.device.type):
        run = function(op, backend_name, "soft_targets")
        return run(
            source_centroids=source_centroids,
            prototypes=prototypes,
            temperature=max(float(temperature), COLDEST),
        )
