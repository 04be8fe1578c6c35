"""Contrastive losses of the global batch, each rank holding its own rows.

InfoNCE: a rank owns the rows of its images in the [G, G] matrix of logits. It gathers the texts,
sums its strip's rows and its share of every column, and all-reduces the 2 G column sums; backwards
it forms its strip again and reduce-scatters the texts' gradient. SigLIP needs no column sums, so
the texts and their gradient go round a ring of ranks instead. Neither holds a [B, G] matrix.

Gradients are those of the sum of all ranks' losses. What DDP then does, the mean over ranks, makes
them exactly those of the mean loss over the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from protoclip.distributed import gather_rows, scatter_sums
from protoclip.ops import checks, reference
from protoclip.ops.backends import implementation, resolve
from protoclip.ops.info_nce import LN2, info_nce
from protoclip.ops.siglip import sigmoid_loss

Group = dist.ProcessGroup | None


def global_info_nce(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    group: Group = None,
    backend: str = "auto",
) -> Tensor:
    """InfoNCE over the pairs of all ranks: the mean loss of this rank's B pairs.

    Its mean over the ranks is ``info_nce`` of the W * B pairs. Memory O(W B D); wire per rank one
    gather and one reduce-scatter of [W B, D], and 2 W B floats.

    Args:
        image_features, text_features: [B, D], the same B on every rank; as in ``info_nce``.
        logit_scale: [] or [1], the multiplier (not its logarithm).
        group: of the ranks; None: all of them.
        backend: as in ``info_nce``.
    Returns:
        float32 [] (float64 for float64 input), nats.
    Raises:
        ValueError, TypeError: as in ``info_nce``.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return info_nce(image_features, text_features, logit_scale, backend=backend)
    op = "global_info_nce"
    x, y, scale = _checked(op, image_features, text_features, logit_scale)
    name = resolve("info_nce", backend, x.device.type, x.dtype)
    rows, columns = _Strip.apply(x, y, scale, group, name)
    return (rows + columns).mean() / 2


def global_sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    group: Group = None,
    backend: str = "auto",
) -> Tensor:
    """SigLIP's loss of this rank's B images against the texts of all ranks, summed.

    Memory O(B D): the texts are passed from rank to rank and never gathered.

    Args:
        image_features, text_features: [B, D], the same B on every rank; as in ``sigmoid_loss``.
        logit_scale, logit_bias: [] or [1].
        group, backend: as in ``global_info_nce``.
    Returns:
        float32 [] (float64 for float64 input), nats.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return sigmoid_loss(image_features, text_features, logit_scale, logit_bias, backend=backend)
    op = "global_sigmoid_loss"
    x, y, scale = _checked(op, image_features, text_features, logit_scale)
    bias = checks.scalar(op, "logit_bias", logit_bias, x.device)
    name = resolve("siglip", backend, x.device.type, x.dtype)
    inputs = x, y, scale, bias
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return _Ring.apply(*inputs, group, name, wanted)


def _checked(op: str, x: Tensor, y: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    checks.matrix(op, "image_features", x, "[B, D]")
    checks.matrix(op, "text_features", y, "[B, D]")
    checks.like(op, "text_features", y, "image_features", x)
    if x.shape != y.shape:
        raise ValueError(
            f"{op}: expected one text per image, got image_features {tuple(x.shape)} and "
            f"text_features {tuple(y.shape)}"
        )
    x, y = checks.promoted(x, y)
    return x, y, checks.scalar(op, "logit_scale", scale, x.device)


class _Strip(torch.autograd.Function):
    """x, y [B, D] -> the losses of this rank's images against all texts, and of its texts against
    all images: [B], [B]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, group: Group, backend: str):
        all_y = gather_rows(y, group)  # [G, D]
        offset = dist.get_rank(group) * len(x)
        row_max, row_sum, column_max, column_sum, positive = torch.ops.protoclip.contrastive_fwd(
            x, all_y, scale, offset, True, backend
        )
        top = column_max.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        column_sum = column_sum * torch.exp2(column_max - top)
        dist.all_reduce(column_sum, group=group)
        ctx.save_for_backward(x, all_y, scale, row_max, row_sum, top, column_sum)
        ctx.offset, ctx.group, ctx.backend = offset, group, backend
        own = slice(offset, offset + len(x))
        rows = LN2 * (row_sum.log2() + (row_max - positive))
        return rows, LN2 * (column_sum[own].log2() + (top[own] - positive))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_grad: Tensor, column_grad: Tensor):
        x, all_y, scale, *statistics = ctx.saved_tensors
        dx, dy, dscale = torch.ops.protoclip.contrastive_bwd(
            x,
            all_y,
            scale,
            *statistics,
            row_grad,
            gather_rows(column_grad, ctx.group),
            ctx.offset,
            ctx.backend,
        )
        # Summed wider than bf16, whose rounding would grow with the number of ranks.
        dy = scatter_sums(dy.to(dscale.dtype), ctx.group).to(x.dtype)
        return dx, dy, dscale.to(scale.dtype).reshape(scale.shape), None, None


class _Ring(torch.autograd.Function):
    """The sum of the sigmoid losses of x [B, D] against the texts of every rank in turn.

    Loss and gradients come in one pass, as in ``sigmoid_loss``; the backward pass scales them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor,
        group: Group,
        backend: str,
        wanted: bool,
    ) -> Tensor:
        size = dist.get_world_size(group)
        chunk = _chunk(backend)
        texts, travelling = y, torch.zeros_like(y)
        totals: list[Tensor] = []
        for hop in range(size):
            coming = _pass_on(texts, group) if hop + 1 < size else None
            # Row i's own text comes with the first chunk; the others hold negatives only.
            first = 0 if hop == 0 else len(y)
            loss, dx, dy, *scalars = chunk(x, texts, scale, bias, first, wanted)
            parts = [loss, *(t.to(loss.dtype) for t in (dx, *scalars))]
            totals = [a + b for a, b in zip(totals, parts, strict=True)] if hop else parts
            if wanted:  # a chunk's gradient travels with it, and is home after the last hop
                dy = dy.to(loss.dtype)
                travelling = _pass_on(dy if hop == 0 else travelling + dy, group)()
            if coming is not None:
                texts = coming()
        loss, dx, dscale, dbias = totals
        if wanted:
            ctx.save_for_backward(dx, travelling, dscale, dbias)
        ctx.like = [(t.dtype, t.shape) for t in (x, y, scale, bias)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        grads = [
            (grad * saved).to(dtype).reshape(shape)
            for saved, (dtype, shape) in zip(ctx.saved_tensors, ctx.like, strict=True)
        ]
        return *grads, None, None, None


def _pass_on(tensor: Tensor, group: Group) -> Callable[[], Tensor]:
    """Start giving a tensor to the rank before; the result waits for that of the rank after."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    before, after = (rank - 1) % size, (rank + 1) % size
    if group is not None:
        before, after = (dist.get_global_rank(group, r) for r in (before, after))
    given = tensor.contiguous()
    taken = torch.empty_like(given)
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, given, before, group), dist.P2POp(dist.irecv, taken, after, group)]
    )

    def wait() -> Tensor:
        for work in works:
            work.wait()
        return taken

    return wait


def _chunk(backend: str) -> Callable[..., tuple[Tensor, ...]]:
    """(x, y, scale, bias, offset, gradients) -> loss, dx, dy, dscale, dbias."""
    return (
        _reference_chunk
        if backend == "reference"
        else implementation("siglip", backend, "sigmoid_loss")
    )


def _reference_chunk(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, offset: int, gradients: bool
) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (x, y, scale, bias)]
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        loss = reference.sigmoid_loss(leaves[0], leaves[1], leaves[2], leaves[3], offset)
    if not gradients:
        return loss.detach(), *(torch.zeros_like(t) for t in leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves)
