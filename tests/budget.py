"""What the op tests share: the error budget, FlashAttention's own: no tolerance is invented.

truth: the plain PyTorch formula in fp64 on the same rounded inputs; base: that formula run in the
tested dtype, as users have it; got: the backend under test.

Results go by name: "loss", and "dx" for the gradient of the argument ``x``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

import protoclip
from protoclip.ops.dispatch import TABLE

Result = TypeVar("Result")
Results = dict[str, Tensor]


def usable(op: str) -> list[str]:
    """The backends of an op that run on CPU tensors here."""
    return [
        name
        for name, reason in protoclip.backends(op).items()
        if reason is None and "cpu" in (TABLE[op][name].device_types or ("cpu",))
    ]


def on_threads(run: Callable[[], Result], counts: Sequence[int] = (1, 2, 2)) -> list[Result]:
    """What ``run`` returns with each number of threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return results


@contextmanager
def said(row: Any) -> Iterator[None]:
    """The row is part of what a failure says."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{row}: {error}") from error


def leaf(tensor: Tensor | float, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    """The same values, with their strides, as a leaf that wants a gradient."""
    return torch.as_tensor(tensor, dtype=dtype, device=device).detach().requires_grad_()


def loss_and_gradients(loss: Tensor, upstream: Tensor | None = None, **leaves: Tensor) -> Results:
    """The loss and the gradients of sum(upstream * loss), all of 1 without ``upstream``."""
    if upstream is None:
        upstream = torch.ones((), device=loss.device)
    gradients = torch.autograd.grad(
        loss, list(leaves.values()), grad_outputs=upstream.to(loss).expand(loss.shape)
    )
    results = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"loss": loss.detach()} | results


def assert_same_bits(got: Any, expected: Any) -> None:
    """Of tensors, or of lists, tuples and dicts of tensors; dtypes too."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def assert_within_budget(
    got: Tensor,
    truth: Tensor,
    base: Tensor,
    name: str = "",
    magnitude: float | None = None,
    logit_scale: float = 0.0,
) -> None:
    """max|got - truth| <= 2 max|base - truth| + (eps(dtype of got) + 2^-21 logit_scale) magnitude.

    ``magnitude``: the size of what was rounded; by default max|truth|. Where the result is a sum
    that cancels (the gradient of one scalar), the sum of its terms' absolute values.
    ``logit_scale``: for what rounding one logit in fp32 is worth.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(truth.shape)}"
    assert got.dtype == base.dtype, f"{name}: {got.dtype}, the base has {base.dtype}"
    if truth.numel() == 0:
        return
    exact = truth.double()
    if magnitude is None:
        magnitude = exact.abs().max().item()
    error = (got.double() - exact).abs().max().item()
    base_error = (base.double() - exact).abs().max().item()
    rounding = torch.finfo(got.dtype).eps + 2**-21 * abs(logit_scale)
    allowed = 2 * base_error + rounding * magnitude
    assert error <= allowed, (
        f"{name}: error {error:.3e} over the budget {allowed:.3e} (the base's own is "
        f"{base_error:.3e}, magnitude {magnitude:.3e})"
    )


@dataclass(frozen=True)
class PlainResults:
    """What a plain formula gives in one dtype, by name."""

    values: Results
    dlogit_scale_terms: float  # the sum of the absolute values that make up dlogit_scale


def assert_results_within_budget(
    got: Mapping[str, Tensor],
    *,
    truth: PlainResults,
    base: PlainResults,
    logit_scale: float,
    magnitudes: Mapping[str, float] | None = None,
) -> None:
    """``assert_within_budget`` for each of ``got``. ``magnitudes``, by name: where it is not
    max|truth|, or the terms of dlogit_scale."""
    by_name = {"dlogit_scale": truth.dlogit_scale_terms, **(magnitudes or {})}
    for name, value in got.items():
        assert_within_budget(
            value,
            truth=truth.values[name],
            base=base.values[name],
            name=name,
            magnitude=by_name.get(name),
            logit_scale=logit_scale,
        )


def strip_gradients(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: float,
    row_weight: Tensor,
    column_weight: Tensor,
    dtype: torch.dtype,
    offset: int = 0,
) -> PlainResults:
    """The plain formula of InfoNCE's strip, run in ``dtype`` as under autocast: the products and
    the gradient of the logits in that dtype, cross-entropy in at least fp32. fp64 gives the truth.

    ``column_weight`` [M], or [0] without columns; columns may lack a positive. The terms of
    dlogit_scale have 2^-29 of the weights on top, which is what fp64 itself leaves of a
    probability of 1."""
    at_least_fp32 = torch.promote_types(dtype, torch.float32)
    x = leaf(x, dtype)
    y = leaf(y, dtype)
    scale = leaf(logit_scale, at_least_fp32, x.device)
    dots = x @ y.T
    logits = (scale.to(dtype) * dots).to(at_least_fp32)
    rows = torch.arange(len(x), device=x.device)
    positive = logits[rows, rows + offset]
    row_level = logits.logsumexp(1)
    column_level = logits.new_empty(0)
    total = ((row_level - positive) * row_weight.to(at_least_fp32)).sum()
    if len(column_weight):
        weight = column_weight.to(at_least_fp32)
        column_level = logits.logsumexp(0)
        total = total + (weight * column_level).sum() - (weight[rows + offset] * positive).sum()
    gradients = loss_and_gradients(total, x=x, y=y, logit_scale=scale, logits=logits)
    terms = (gradients["dlogits"] * dots).abs().sum() + 2**-29 * row_weight.abs().sum()
    values = {
        "row level": row_level.detach(),
        "column level": column_level.detach(),
        "positive": positive.detach(),
        "dx": gradients["dx"],
        "dy": gradients["dy"],
        "dlogit_scale": gradients["dlogit_scale"],
    }
    return PlainResults(values, terms.item())
