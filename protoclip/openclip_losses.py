"""OpenCLIP's losses with OpenCLIP's signatures, on the fused ops: one line to swap them in.

Features of several ranks are gathered in OpenCLIP's four ways, with OpenCLIP's gradients; what is
never formed is the matrix of logits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from protoclip.global_losses import global_info_nce, global_sigmoid_loss
from protoclip.ops import checks
from protoclip.ops.backends import resolve
from protoclip.ops.info_nce import info_nce
from protoclip.ops.siglip import sigmoid_loss

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


def _one_dtype(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


class _GatherWithGrad(torch.autograd.Function):
    """[N, D] of each rank -> [W * N, D]; the gradient is summed over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, rank: int) -> Tensor:
        ctx.rank, ctx.rows = rank, len(x)
        return torch.cat(_gather(x))

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad[ctx.rank * ctx.rows :][: ctx.rows], None


def _gather(x: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(_world())]
    dist.all_gather(parts, x.contiguous())
    return parts


def _world() -> int:
    return dist.get_world_size()


def _gather_features(x: Tensor, rank: int, with_grad: bool, keep_own: bool) -> Tensor:
    """All ranks' rows in rank order; without ``with_grad`` a gradient reaches the own rows only
    where ``keep_own``."""
    if with_grad:
        return _GatherWithGrad.apply(x, rank)
    parts = _gather(x.detach())
    if keep_own:
        parts[rank] = x
    return torch.cat(parts)


class ClipLoss(nn.Module):
    """OpenCLIP's ``ClipLoss`` without its [N, N] logits.

    Args:
        local_loss: each rank's rows against all ranks' columns, instead of all against all.
        gather_with_grad: gradients also flow to the rows of other ranks. With ``local_loss`` this
            is the choice that is exact and scales; ours, ``global_info_nce``, gathers the texts
            only. (A rank's gradient of the scale is then its strip's; the mean over the ranks is
            OpenCLIP's.)
        cache_labels: taken for the signature's sake: there are no labels to cache.
        rank, world_size: of this process.
        use_horovod: must be false.
        stash: as in ``info_nce``; not OpenCLIP's. Left unused by ``local_loss`` on several ranks.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        stash: bool | None = None,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError(
                "ClipLoss: expected use_horovod=False, got True; run with torch.distributed "
                "(torchrun) instead of --horovod"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.stash = stash

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Mean InfoNCE of both directions.

        Args:
            image_features, text_features: [N, D], unit rows; float dtypes, mixed ones are promoted.
            logit_scale: [] or [1], the multiplier (not its logarithm).
            logit_bias: [] or [1]; softmax does not see it, its gradient is zero.
            output_dict: return ``{"contrastive_loss": loss}``.
        Returns:
            float32 [], nats.
        """
        x, y = _one_dtype(image_features, text_features)
        loss = self._loss(x, y, logit_scale)
        if logit_bias is not None:
            loss = loss + 0 * logit_bias.sum()  # keeps the bias in the graph, as OpenCLIP's does
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(self, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        if self.world_size == 1:
            return info_nce(x, y, scale, stash=self.stash)
        if self.local_loss and self.gather_with_grad:
            return global_info_nce(x, y, scale)
        all_x, all_y = self._of_all_ranks(x), self._of_all_ranks(y)
        if not self.local_loss:
            return info_nce(all_x, all_y, scale, stash=self.stash)
        return (self._one_way(x, all_y, scale) + self._one_way(y, all_x, scale)) / 2

    def _of_all_ranks(self, x: Tensor) -> Tensor:
        if self.world_size == 1:
            return x
        return _gather_features(x, self.rank, self.gather_with_grad, not self.local_loss)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The logits of both directions, whole: [N, M] each, M pairs of all ranks (N = M without
        ``local_loss``). For subclasses written for OpenCLIP's class; ``forward`` never forms them.
        """
        x, y = _one_dtype(image_features, text_features)
        all_x, all_y = self._of_all_ranks(x), self._of_all_ranks(y)
        if not self.local_loss:
            x, y = all_x, all_y
        images, texts = logit_scale * x @ all_y.T, logit_scale * y @ all_x.T
        return (images, texts) if logit_bias is None else (images + logit_bias, texts + logit_bias)

    def get_ground_truth(self, device: torch.device | str, num_logits: int) -> Tensor:
        """int64 [num_logits]: the column of each row's positive in ``get_logits``."""
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        return torch.arange(first, first + num_logits, device=device)

    def _one_way(self, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        """Mean cross-entropy of rows x [N, D] against all columns y [W * N, D]."""
        scale = checks.scalar("ClipLoss", "logit_scale", scale, x.device)
        backend = resolve("info_nce", "auto", x.device.type, x.dtype)
        offset = self.rank * len(x)
        return torch.ops.protoclip.contrastive(x, y, scale, offset, False, "mean", backend)[0]


class SigLipLoss(nn.Module):
    """OpenCLIP's ``SigLipLoss`` without its [N, N] logits.

    Args:
        cache_labels, chunk_size: taken for the signature's sake; nothing is cached or held whole.
        rank, world_size: of this process.
        dist_impl: "bidir", "shift", "reduce" or "gather": one value and one gradient, which here
            all come from one ring exchange of the texts.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size
        if self.dist_impl not in DIST_IMPLS:
            raise ValueError(f"SigLipLoss: expected dist_impl in {DIST_IMPLS}, got {dist_impl!r}")

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Sum over pairs of the sigmoid loss, divided by the local batch.

        Args:
            image_features, text_features: [N, D], unit rows; float dtypes, mixed ones are promoted.
            logit_scale: [] or [1], the multiplier (not its logarithm).
            logit_bias: [] or [1]; None is zero.
            output_dict: return ``{"contrastive_loss": loss}``.
        Returns:
            float32 [], nats.
        """
        if image_features.shape[:1] != text_features.shape[:1]:
            raise ValueError(
                "SigLipLoss: expected one text per image, got image_features "
                f"{tuple(image_features.shape)} and text_features {tuple(text_features.shape)}; "
                "give row i of each the same pair"
            )
        x, y = _one_dtype(image_features, text_features)
        bias = torch.zeros((), device=x.device) if logit_bias is None else logit_bias
        total = global_sigmoid_loss if self.world_size > 1 else sigmoid_loss
        loss = total(x, y, logit_scale, bias) / max(len(x), 1)
        return {"contrastive_loss": loss} if output_dict else loss
