"""Intervals for means of per-sample values."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 1000
DRAWS_AT_ONCE = 1 << 22  # drawn positions in memory: 32 MiB


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Sampled:
    """One value per sample, whose mean is wanted; with ``classes`` the mean over the classes that
    occur of each one's mean, as in the mean per class recall."""

    values: Tensor  # [N]
    classes: Tensor | None = None  # int64 [N], from 0


def bootstrap_intervals(
    samples: Mapping[str, Sampled],
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile bootstrap interval of each mean; entries of one length share their resamples.

    Args:
        samples: by name; a resample counts for all of them, so that more of them cost little.
        resamples: draws of N samples with replacement.
        confidence: share of the resampled means inside, 0 .. 1.
        seed: the same seed, the same intervals.
    Returns:
        The mean of all samples and the bounds; NaN where there are none.
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            "bootstrap: expected 0 < confidence < 1 and resamples >= 1, "
            f"got {confidence} and {resamples}"
        )
    means: dict[str, list[Tensor]] = {name: [] for name in samples}
    for n in {one.values.numel() for one in samples.values()}:
        own = {name: one for name, one in samples.items() if one.values.numel() == n}
        plain = [name for name, one in own.items() if one.classes is None]
        table = torch.stack([_cpu(own[name]) for name in plain], dim=1) if plain else None
        for counts in _counts(n, resamples, seed):  # [N, r]
            if table is not None:
                for name, row in zip(plain, table.T @ counts / n, strict=True):
                    means[name].append(row)
            for name in own.keys() - set(plain):
                means[name].append(_class_means(own[name], counts))
    tail = (1 - confidence) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    out = {}
    for name, one in samples.items():
        if one.values.numel() == 0:
            out[name] = Interval(float("nan"), float("nan"), float("nan"))
            continue
        low, high = torch.cat(means[name]).quantile(ends).tolist()
        ones = torch.ones(one.values.numel(), 1, dtype=torch.float64)
        whole = _cpu(one).mean() if one.classes is None else _class_means(one, ones)
        out[name] = Interval(float(whole), low, high)
    return out


def bootstrap_mean(
    values: Tensor,
    minus: Tensor | None = None,
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a mean, or of a paired difference of means.

    Args:
        values: one value per sample [N], e.g. the hits of a recall.
        minus: the same samples under another model [N]; the interval is then that of
            mean(values - minus), which is narrower than two intervals side by side.
        resamples, confidence, seed: as in ``bootstrap_intervals``.
    Returns:
        The mean of all samples and the bounds; NaN when there are none.
    """
    if values.ndim != 1 or (minus is not None and minus.shape != values.shape):
        raise ValueError(
            "bootstrap_mean: expected one vector, or two of the same length, got "
            f"{tuple(values.shape)}" + ("" if minus is None else f" and {tuple(minus.shape)}")
        )
    x = values.detach().cpu().double()
    if minus is not None:
        x = x - minus.detach().cpu().double()
    only = {"": Sampled(x)}
    return bootstrap_intervals(only, resamples=resamples, confidence=confidence, seed=seed)[""]


def _counts(n: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each sample is in each resample, float64 [N, r], some resamples at a time."""
    generator = torch.Generator().manual_seed(seed)
    step = max(1, DRAWS_AT_ONCE // max(n, 1))
    for start in range(0, resamples if n else 0, step):
        r = min(step, resamples - start)
        draws = torch.randint(n, (r, n), generator=generator)
        places = draws * r + torch.arange(r)[:, None]  # in the flat [N, r]
        yield torch.bincount(places.flatten(), minlength=n * r).double().reshape(n, r)


def _class_means(one: Sampled, counts: Tensor) -> Tensor:
    """Mean over the classes in a resample of each class's mean, [r]; counts [N, r]."""
    assert one.classes is not None
    labels = one.classes.detach().cpu()
    empty = counts.new_zeros(int(labels.max()) + 1, counts.shape[1])
    size = empty.index_add(0, labels, counts)  # [C, r]
    total = empty.index_add(0, labels, counts * _cpu(one)[:, None])
    return (total / size.clamp_min(1)).sum(0) / (size > 0).sum(0)


def _cpu(one: Sampled) -> Tensor:
    return one.values.detach().cpu().double()
