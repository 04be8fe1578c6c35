"""What the op tests share: the error budget, FlashAttention's own: no tolerance is invented.

truth: the plain PyTorch formula in fp64 on the same rounded inputs; base: that formula run in the
tested dtype, as users have it; got: the backend under test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import protoclip
from protoclip.ops.dispatch import TABLE


def usable(op: str) -> list[str]:
    """The backends of an op that run on CPU tensors here."""
    return [
        name
        for name, reason in protoclip.backends(op).items()
        if reason is None and "cpu" in (TABLE[op][name].device_types or ("cpu",))
    ]


def on_threads(run: Callable[[], Any], counts: Sequence[int] = (1, 2, 2)) -> list[Any]:
    """What ``run`` returns with each number of threads."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    return results


def assert_within_budget(
    got: Tensor,
    truth: Tensor,
    base: Tensor,
    name: str = "",
    magnitude: float | None = None,
    scale: float = 0.0,
) -> None:
    """max|got - truth| <= 2 max|base - truth| + (eps(dtype of got) + 2^-21 scale) * magnitude.

    ``magnitude``: the size of what was rounded; by default max|truth|. Where the result is a sum
    that cancels (the gradient of one scalar), the sum of its terms' absolute values. ``scale``: of
    the logits, for what rounding one of them in fp32 is worth.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(truth.shape)}"
    assert got.dtype == base.dtype, f"{name}: {got.dtype}, the base has {base.dtype}"
    if truth.numel() == 0:
        return
    exact = truth.double()
    size = exact.abs().max().item() if magnitude is None else magnitude
    error = (got.double() - exact).abs().max().item()
    own = (base.double() - exact).abs().max().item()
    allowed = 2 * own + (torch.finfo(got.dtype).eps + 2**-21 * abs(scale)) * size
    assert error <= allowed, (
        f"{name}: error {error:.3e} over the budget {allowed:.3e} (the base's own is "
        f"{own:.3e}, magnitude {size:.3e})"
    )


def strip_gradients(x, y, scale, offset, row_weight, column_weight, dtype) -> dict[str, Tensor]:
    """The plain formula of InfoNCE's strip, run in ``dtype`` as under autocast: the products and
    the gradient of the logits in that dtype, cross-entropy in at least fp32. fp64 gives the truth.

    ``column_weight`` [M], or [0] without columns; columns may lack a positive. ``terms``: the sum
    of the absolute values that make up dscale, and 2^-29 of the weights, which is what fp64 itself
    leaves of a probability of 1."""
    wide = torch.promote_types(dtype, torch.float32)
    x, y = (t.detach().to(dtype).requires_grad_() for t in (x, y))
    scale = torch.tensor(scale, dtype=wide, device=x.device, requires_grad=True)
    dots = x @ y.T
    logits = (scale.to(dtype) * dots).to(wide)
    rows = torch.arange(len(x), device=x.device)
    positive, level = logits[rows, rows + offset], logits.logsumexp(1)
    total = ((level - positive) * row_weight.to(wide)).sum()
    column_level = logits.logsumexp(0) if len(column_weight) else logits.new_empty(0)
    if len(column_weight):
        weight = column_weight.to(wide)
        total = total + (weight * column_level).sum() - (weight[rows + offset] * positive).sum()
    dx, dy, dscale, g = torch.autograd.grad(total, (x, y, scale, logits))
    found = {"row level": level, "column level": column_level, "positive": positive}
    found |= {"dx": dx, "dy": dy, "dscale": dscale}
    found["terms"] = (g * dots).abs().sum() + 2**-29 * row_weight.abs().sum()
    return {name: value.detach() for name, value in found.items()}


def sigmoid_gradients(
    x, y, scale, bias, offset, dtype, ids=None, same_id="positive"
) -> dict[str, Tensor]:
    """As ``strip_gradients``, of the sigmoid loss; ids [M, R] are the columns'."""
    wide = torch.promote_types(dtype, torch.float32)
    x, y = (t.detach().to(dtype).requires_grad_() for t in (x, y))
    scale, bias = (
        torch.tensor(v, dtype=wide, device=x.device, requires_grad=True) for v in (scale, bias)
    )
    dots = x @ y.T
    logits = (scale.to(dtype) * dots + bias.to(dtype)).to(wide)
    columns = torch.arange(len(y), device=x.device)
    positive = columns == torch.arange(len(x), device=x.device)[:, None] + offset
    seen = torch.ones_like(positive)
    if ids is not None:
        same = (ids[offset : offset + len(x), None] == ids).any(dim=2)
        positive, seen = (
            (positive | same, seen) if same_id == "positive" else (positive, positive | ~same)
        )
    losses = -torch.nn.functional.logsigmoid(torch.where(positive, logits, -logits))
    loss = losses.where(seen, 0).sum()
    names = "dx", "dy", "dscale", "dbias", "g"
    grads = torch.autograd.grad(loss, (x, y, scale, bias, logits))
    found = {"loss": loss} | dict(zip(names, grads, strict=True))
    found["terms"] = (found.pop("g") * dots).abs().sum()
    return {name: value.detach() for name, value in found.items()}
