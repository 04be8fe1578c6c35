"""Intervals for means of per-sample values."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float


def bootstrap_mean(
    values: Tensor,
    minus: Tensor | None = None,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a mean, or of a paired difference of means.

    Args:
        values: one value per sample [N], e.g. the hits of a recall.
        minus: the same samples under another model [N]; the interval is then that of
            mean(values - minus), which is narrower than two intervals side by side.
        resamples: draws of N samples with replacement.
        confidence: share of the resampled means inside, 0 .. 1.
        seed: the same seed, the same interval.
    Returns:
        The mean of all samples and the bounds; NaN when there are none.
    """
    if values.ndim != 1 or (minus is not None and minus.shape != values.shape):
        raise ValueError(
            "bootstrap_mean: expected one vector, or two of the same length, got "
            f"{tuple(values.shape)}" + ("" if minus is None else f" and {tuple(minus.shape)}")
        )
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            "bootstrap_mean: expected 0 < confidence < 1 and resamples >= 1, "
            f"got {confidence} and {resamples}"
        )
    x = values.detach().cpu().double()
    if minus is not None:
        x = x - minus.detach().cpu().double()
    n = x.numel()
    if n == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    generator = torch.Generator().manual_seed(seed)
    step = max(1, (1 << 22) // n)  # 32 MiB of drawn positions at a time
    means = torch.cat(
        [
            x[torch.randint(n, (min(step, resamples - i), n), generator=generator)].mean(1)
            for i in range(0, resamples, step)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(x.mean()), low, high)
