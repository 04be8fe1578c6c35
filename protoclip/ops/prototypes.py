"""Prototype cross-entropy and its soft targets: contract, autograd and dispatch.

L_i = LSE_k(s h_i.C_k) - s h_i.m_y: soft and hard targets share one kernel, because the target
depends only on the sample's cluster (m is computed once per episode). With frozen prototypes one
pass gives loss and gradient, dL_i/dh_i = s (sum_k p_ik C_k - m_y), an attention output with
key = value = C; the backward pass only multiplies. Several prototype sets (banks) share one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protoclip.ops import checks, reference
from protoclip.ops.backends import (
    accumulator,
    define,
    define_gradient,
    implementation,
    reduce,
    resolve,
    wants_gradient,
    without_autocast,
)

COLDEST = 1e-30  # the lowest temperature: below it fp32 logits would overflow


def _fwd(h, prototypes, targets, labels, scale, need_grad, need_nearest, backend, need_dscale):
    """S banks; ``targets[b]`` is [0, D] for hard labels.

    -> loss [S, N], gradient sum_k p_k C_k - m_y [S, N, D] (both 0 where ignored), argmax int64
    [S, N], row_max, row_sum [S, N] in the units of the backend's own backward, and the gradient of
    the scale h.gradient [S, N] (rounded without need_dscale). Unwanted results are [S, 0]."""
    run = implementation("prototype_cross_entropy", backend, "prototype_ce_fwd_banks")
    options = {"need_dscale": need_dscale} if backend == "triton" else {}
    return run(h, prototypes, targets, labels, scale, need_grad, need_nearest, **options)


def _fake_fwd(h, prototypes, targets, labels, scale, need_grad, need_nearest, *_):
    (n, d), s = h.shape, len(prototypes)
    wide = accumulator(h)
    row = h.new_empty((s, n), dtype=wide)
    gradient = h.new_empty((s, n if need_grad else 0, d), dtype=wide)
    nearest = row.new_empty((s, n if need_nearest else 0), dtype=torch.int64)
    return row, gradient, nearest, row.clone(), row.clone(), gradient.new_empty(gradient.shape[:2])


def _bwd_prototypes(h, prototypes, *rest):
    """-> s * sum_i w_i (p_ik - [hard and y_i = k]) h_i, [K, D] in the prototypes' dtype."""
    *arguments, backend = rest
    run = implementation("prototype_cross_entropy", backend, "prototype_ce_bwd_prototypes")
    return run(h, prototypes, *arguments)


def _setup(ctx, inputs, output) -> None:
    h, prototypes, targets, labels, scale, _, _, ctx.backend, _ = inputs
    _, gradient, _, row_max, row_sum, scale_gradient = output
    ctx.set_materialize_grads(False)  # only the loss has one; saves zeros of [S, N, D]
    ctx.hard = [len(m) == 0 for m in targets]
    ctx.save_for_backward(
        h, scale, gradient, row_max, row_sum, scale_gradient, *prototypes, *labels
    )


def _autograd(ctx, grad, *_):
    h, scale, gradient, row_max, row_sum, scale_gradient, *rest = ctx.saved_tensors
    banks = len(ctx.hard)
    if grad is None:
        return None, [None] * banks, [None] * banks, [None] * banks, *(None,) * 5
    dh = dscale = None
    wanted_h, wanted_prototypes, _, _, wanted_scale, *_ = ctx.needs_input_grad
    if wanted_h:  # weight the gradient from the forward pass
        weight = (scale.reshape(()) * grad)[:, :, None]
        dh = torch.ops.protoclip.scaled(weight, gradient).sum(dim=0).to(h.dtype)
    if wanted_scale:
        dscale = torch.ops.protoclip.scaled(grad, scale_gradient).sum()
        dscale = dscale.to(scale.dtype).reshape(scale.shape)
    prototype_grads = [
        torch.ops.protoclip.prototype_ce_bwd_prototypes(
            h, c, y, scale, row_max[b], row_sum[b], grad[b], ctx.hard[b], ctx.backend
        )
        if wanted_prototypes[b]
        else None
        for b, (c, y) in enumerate(zip(rest[:banks], rest[banks:], strict=True))
    ]
    return dh, prototype_grads, [None] * banks, [None] * banks, dscale, *(None,) * 4


define(
    "prototype_ce(Tensor h, Tensor[] prototypes, Tensor[] targets, Tensor[] labels, Tensor scale,"
    " bool need_grad, bool need_nearest, str backend, bool need_dscale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fake_fwd,
)
define(
    "prototype_ce_bwd_prototypes(Tensor h, Tensor prototypes, Tensor labels, Tensor scale,"
    " Tensor row_max, Tensor row_sum, Tensor weight, bool hard, str backend) -> Tensor",
    _bwd_prototypes,
    lambda h, prototypes, *_: prototypes.new_empty(prototypes.shape),
)
define_gradient("prototype_ce", "prototype_cross_entropy", _autograd, _setup)
define_gradient("prototype_ce_bwd_prototypes", "prototype_cross_entropy")


@dataclass(frozen=True)
class Bank:
    """A set of prototypes and the samples' labels."""

    prototypes: Tensor  # [K, D]
    labels: Tensor  # int64 [N], -100 = ignore
    targets: Tensor | None = None  # [K, D], rows m_y; None: hard labels


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
        reduction: "mean" (over the samples with a label), "sum", or "none".
        backend: "auto" or a row of ``protoclip.backends("prototype_cross_entropy")``.
    Returns:
        float32 (float64 for float64 input), nats: [] or [N]. Gradients reach ``features``,
        ``logit_scale`` and, where it requires grad, ``prototypes``. No samples: 0.
    Raises:
        ValueError, TypeError: shapes or devices disagree, dtypes are not floating point,
            ``targets`` requires grad, K = 0 with N > 0, or the named backend cannot run.
    Source:
        ProtoCLIP (arXiv 2206.10996), prototype loss, simplified by linearity in the target.
    """
    banks = [Bank(prototypes, labels, targets)]
    return _losses(features, banks, logit_scale, reduction, backend, need_nearest=False).loss[0]


def prototype_losses(
    features: Tensor,
    banks: Sequence[Bank],
    logit_scale: Tensor | float,
    *,
    reduction: str = "mean",
    backend: str = "auto",
) -> PrototypeLosses:
    """``prototype_cross_entropy`` against several banks of prototypes, in one call.

    Args:
        features: [N, D], as in ``prototype_cross_entropy``.
        banks: S >= 1 banks, each with its own K.
        logit_scale, reduction, backend: as in ``prototype_cross_entropy``.
    Returns:
        The losses per bank, and per sample the nearest prototype (for prototype accuracy).
    Raises:
        ValueError, TypeError: as in ``prototype_cross_entropy``.
    """
    return _losses(features, banks, logit_scale, reduction, backend, need_nearest=True)


def _losses(
    features: Tensor,
    banks: Sequence[Bank],
    logit_scale: Tensor | float,
    reduction: str,
    backend: str,
    need_nearest: bool,
) -> PrototypeLosses:
    op = "prototype_cross_entropy"
    checks.matrix(op, "features", features, "[N, D]")
    checks.one_of(op, "reduction", reduction, checks.REDUCTIONS)
    scale = checks.scalar(op, "logit_scale", logit_scale, features.device, accumulator(features))
    if not banks:
        raise ValueError(f"{op}: expected at least one bank, got none")
    for bank in banks:
        _check_bank(op, features, bank)
    labels = [bank.labels for bank in banks]
    hard = features.new_empty((0, features.shape[1]))
    targets = [hard if bank.targets is None else bank.targets for bank in banks]
    features, *rest = checks.promoted(features, *(bank.prototypes for bank in banks), *targets)
    sets = rest[: len(banks)], rest[len(banks) :], labels
    name = resolve(op, backend, features.device.type, features.dtype)
    if name == "reference":
        with without_autocast(features.device.type):
            found = [_reference(op, features, *bank, scale) for bank in zip(*sets, strict=True)]
        rows, nearest = (torch.stack(results) for results in zip(*found, strict=True))
    else:
        wanted = wants_gradient(features, scale), need_nearest, name, wants_gradient(scale)
        rows, _, nearest, *_ = torch.ops.protoclip.prototype_ce(features, *sets, scale, *wanted)
    counts = [(y != -100).sum() for y in labels]
    reduced = [reduce(row, reduction, count) for row, count in zip(rows, counts, strict=True)]
    return PrototypeLosses(torch.stack(reduced), nearest)


def _check_bank(op: str, features: Tensor, bank: Bank) -> None:
    checks.matrix(op, "prototypes", bank.prototypes, "[K, D]")
    checks.like(op, "prototypes", bank.prototypes, "features", features)
    checks.labels(op, bank.labels, features)
    if len(features) and not len(bank.prototypes):
        raise ValueError(f"{op}: expected K >= 1 prototypes for N = {len(features)} samples, got 0")
    if bank.targets is not None:
        checks.matrix(op, "targets", bank.targets, "[K, D]")
        checks.like(op, "targets", bank.targets, "prototypes", bank.prototypes)
        if bank.targets.shape != bank.prototypes.shape:
            raise ValueError(
                f"{op}: expected targets of the prototypes' shape {tuple(bank.prototypes.shape)}, "
                f"got {tuple(bank.targets.shape)}"
            )
        if bank.targets.requires_grad:
            raise ValueError(f"{op}: targets are constants, got one that requires grad; detach it")


def _reference(op: str, h: Tensor, c: Tensor, m: Tensor, y: Tensor, scale: Tensor):
    """One bank -> losses [N], nearest [N]."""
    if h.device.type == "cpu" and checks.readable(y):
        checks.label_values(op, y, len(c))
    loss = reference.prototype_cross_entropy(h, c, y, scale, m if len(m) else None)
    with torch.no_grad():
        logits = torch.sign(scale).to(h.dtype) * h @ c.T
        return loss, logits.argmax(dim=1) if len(c) else torch.zeros_like(y)


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
    """
    op = "soft_targets"
    checks.matrix(op, "source_centroids", source_centroids, "[K, Ds]")
    checks.matrix(op, "prototypes", prototypes, "[K, D]")
    here, there = source_centroids.device, prototypes.device
    if len(source_centroids) != len(prototypes) or here != there:
        raise ValueError(
            f"{op}: expected one prototype per source centroid, on one device, got "
            f"{len(prototypes)} on {there} and {len(source_centroids)} on {here}"
        )
    if not isinstance(temperature, (int, float)):
        kind = type(temperature).__name__
        raise TypeError(f"{op}: expected temperature as a Python number, got {kind}; use .item()")
    if temperature <= 0:
        return (prototypes if prototypes.dtype == torch.float64 else prototypes.float()).clone()
    source_centroids, prototypes = checks.promoted(source_centroids, prototypes)
    name = resolve(op, backend, prototypes.device.type, prototypes.dtype)
    with without_autocast(prototypes.device.type):
        run = reference.soft_targets if name == "reference" else implementation(op, name, op)
        return run(source_centroids, prototypes, max(float(temperature), COLDEST))
