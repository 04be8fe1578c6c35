"""Whether a gradient is right where the logits that are not positives make it.

dx = scale (G y + e y_partner): the entry e of a positive outweighs all others of its row, so that
dx without any G is off by 3 to 10 % of max |dx|, less than what bf16 rounds at a glance. Here the
positives are taken out: the error of dx, which is that of G's share once e is exact, is held
against G's share. The benchmarks assert this before they time anything, the tests of the hot paths
assert it for every form of a loss, and show that a wrong G fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def _unchanged(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x, y


Sides = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Form:
    """A loss written out on its logits."""

    loss: Callable[[Tensor], Tensor]  # [N, M] -> []
    taken_out: Tensor  # bool [N, M], the positives whose entries are not in G's share
    rounds_positives: bool = False  # their entries are rounded as those of G are, and add to both
    sides: Sides = _unchanged  # features -> queries, keys


@dataclass(frozen=True)
class Gradients:
    """Of a form, in one dtype; ``logits`` is its gradient for the logits, [N, M]."""

    loss: Tensor
    dx: Tensor
    dy: Tensor
    share_x: Tensor  # of dx, that of the entries which are not taken out
    share_y: Tensor
    dscale: Tensor
    logits: Tensor
    dscale_terms: Tensor  # the sum of the absolute values that make up dscale


def gradients(
    form: Form, x: Tensor, y: Tensor, scale: Tensor | float, dtype: torch.dtype
) -> Gradients:
    """The plain formula run in ``dtype`` as under autocast: products and the gradient of the logits
    in that dtype, the loss in at least fp32. fp64 gives the truth."""
    wide = torch.promote_types(dtype, torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    y = y.detach().to(dtype).requires_grad_()
    scale = torch.as_tensor(scale, device=x.device).detach().to(wide).requires_grad_()
    queries, keys = form.sides(x, y)
    dots = queries @ keys.T
    logits = (scale.to(dtype) * dots).to(wide)
    loss = form.loss(logits)
    (g,) = torch.autograd.grad(loss, logits, retain_graph=True)
    dx, dy, dscale = torch.autograd.grad(logits, (x, y, scale), g, retain_graph=True)
    share_x, share_y = torch.autograd.grad(logits, (x, y), g.masked_fill(form.taken_out, 0))
    return Gradients(
        loss=loss.detach(),
        dx=dx,
        dy=dy,
        share_x=share_x,
        share_y=share_y,
        dscale=dscale,
        logits=g,
        dscale_terms=(g * dots.detach()).abs().sum(),
    )


def assert_gradients(
    got_x: Tensor, got_y: Tensor | None, form: Form, truth: Gradients, base: Gradients, scale: float
) -> None:
    """max|got - truth| <= 2 max|base - truth| + (eps + 2^-21 scale) max|truth| + eps/2 max|dx|,
    where base and truth are G's share and dx is the whole gradient, which is rounded as one.

    Without ``got_y`` dx alone is compared."""
    sides = [_Side("dx", got_x, truth.dx, base.dx, truth.share_x, base.share_x)]
    if got_y is not None:
        sides.append(_Side("dy", got_y, truth.dy, base.dy, truth.share_y, base.share_y))
    for side in sides:
        base_error = _distance(side.base_share, side.share)
        if form.rounds_positives:
            base_error = _distance(side.base, side.truth)
        eps = torch.finfo(side.base.dtype).eps
        share = side.share.abs().max().item()
        whole = side.truth.abs().max().item()
        allowed = 2 * base_error + (eps + 2**-21 * abs(scale)) * share + eps / 2 * whole
        error = _distance(side.got, side.truth)
        assert error <= allowed, (
            f"{side.name}: error {error:.3e} over the budget {allowed:.3e} of G's share (the "
            f"base's own is {base_error:.3e}, the share {share:.3e}, the whole {whole:.3e})"
        )


class _Side(NamedTuple):
    """The gradient of the queries or of the keys."""

    name: str
    got: Tensor
    truth: Tensor
    base: Tensor
    share: Tensor  # of the truth
    base_share: Tensor


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b).abs().max().item()


def softmax_form(
    positive: Tensor,
    seen: Tensor,
    row_weight: Tensor,
    column_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    rounds_positives: bool = False,
    sides: Sides = _unchanged,
) -> Form:
    """Cross-entropy over the keys seen [N, M] against the mean of the positives [N, M], weighted by
    row and, where both directions count, by column."""

    def one_way(logits: Tensor, positive: Tensor, seen: Tensor, weight: Tensor) -> Tensor:
        count = positive.sum(1)
        level = logits.masked_fill(~seen, -torch.inf).logsumexp(1)
        mean = (logits.masked_fill(~positive, 0)).sum(1) / count.clamp_min(1)
        return ((level - mean).where(count > 0, 0) * weight.to(logits.dtype)).sum()

    def loss(logits: Tensor) -> Tensor:
        if key_bias is not None:
            logits = logits + key_bias.to(logits.dtype)
        total = one_way(logits, positive, seen, row_weight)
        if column_weight is not None:
            total = total + one_way(logits.T, positive.T, seen.T, column_weight)
        return total

    return Form(loss, taken_out=positive, rounds_positives=rounds_positives, sides=sides)


def sigmoid_form(own: Tensor, positive: Tensor, seen: Tensor, bias: float | Tensor) -> Form:
    """SigLIP's sum over the pairs seen; ``own``: the pairs that are taken out."""

    def loss(logits: Tensor) -> Tensor:
        z = logits + torch.as_tensor(bias, device=logits.device).detach().to(logits.dtype)
        return -F.logsigmoid(torch.where(positive, z, -z)).where(seen, 0).sum()

    return Form(loss, own)


def prototype_form(labels: Tensor, k: int, weight: Tensor, soft: bool) -> Form:
    """Cross-entropy of rows against K prototypes; the targets of soft labels are keys k to 2 k - 1.

    The softmax is over the prototypes, and all of it is G's share but a hard label's entry."""
    positive = F.one_hot(labels + k * soft, k * (1 + soft)).bool()
    seen = torch.arange(positive.shape[1], device=labels.device) < k

    def loss(logits: Tensor) -> Tensor:
        level = logits.masked_fill(~seen, -torch.inf).logsumexp(1)
        return ((level - logits[positive]) * weight.to(logits.dtype)).sum()

    return Form(loss, positive, rounds_positives=True)


def cone(n: int, m: int, d: int) -> tuple[Tensor, Tensor]:
    """Unit rows [N, D], [M, D] as CLIP trains them: all in a cone, pairs somewhat alike. Half of a
    gradient and more is G's share there, as each row is pulled towards the mean of the others."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(1, d, generator=generator)
    shared = torch.randn(max(n, m), d, generator=generator)

    def noisy() -> Tensor:
        noise = torch.randn(shared.shape, generator=generator)
        return F.normalize(2 * centre + shared + noise, dim=1)

    x = noisy()
    y = noisy()
    return x[:n], y[:m]
