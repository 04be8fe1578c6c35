"""Error budgets of the op tests: no tolerance is invented, the reference's own error sets it.

truth: the reference in fp64 on the same rounded inputs; base: the reference in the tested dtype;
got: the backend under test.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(
    got: Tensor, truth: Tensor, base: Tensor, name: str = "", magnitude: float | None = None
) -> None:
    """max|got - truth| <= 2 max|base - truth| + eps(dtype of got) * magnitude.

    ``magnitude``: the size of what was rounded; by default max|truth|. Where the result is a sum
    that cancels (the gradient of one scalar), the sum of its terms' absolute values.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(truth.shape)}"
    assert got.dtype == base.dtype, f"{name}: {got.dtype}, the reference has {base.dtype}"
    if truth.numel() == 0:
        return
    exact = truth.double()
    size = exact.abs().max().item() if magnitude is None else magnitude
    error = (got.double() - exact).abs().max().item()
    own = (base.double() - exact).abs().max().item()
    allowed = 2 * own + torch.finfo(got.dtype).eps * size
    assert error <= allowed, (
        f"{name}: error {error:.3e} over the budget {allowed:.3e} (the reference's own is "
        f"{own:.3e}, magnitude {size:.3e})"
    )


def assert_draws_within_budget(got: list, truth: list, base: list, terms: dict) -> None:
    """The budget over all draws of one case: the rounding of a single number, or of a handful, is
    a matter of luck. Each draw is a dict of results; ``terms``: magnitudes above max|truth|."""
    for name in got[0]:
        values = [torch.stack([draw[name] for draw in draws]) for draws in (got, truth, base)]
        size = max(values[1].abs().max().item() if values[1].numel() else 0.0, terms.get(name, 0.0))
        assert_within_budget(*values, name, size)
