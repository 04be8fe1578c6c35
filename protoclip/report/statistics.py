"""Differences between methods over seeds: intervals, tests, Holm's correction, seeds needed.

The seeds of a comparison are paired: each method has trained on every seed. Functions take the
differences of the pairs, fp64 [..., seeds], and work on the last axis.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LEVEL = 0.05  # family-wise error, and one minus the coverage of an interval
POWER = 0.8
LEAST_SEEDS = 3  # for an interval and a test
MOST_SEEDS = 50  # more are not planned for


class Difference(NamedTuple):
    """Mean differences, half of their 95 % intervals, and the p of the two-sided t tests."""

    mean: np.ndarray
    half: np.ndarray  # infinite below three seeds
    p: np.ndarray  # 1 where it cannot be tested


def paired(differences: np.ndarray) -> Difference:
    """Student's t over the differences of paired seeds [..., seeds]."""
    count = differences.shape[-1]
    mean = differences.mean(-1)
    if count < LEAST_SEEDS:
        return Difference(mean, np.full_like(mean, np.inf), np.ones_like(mean))
    from scipy import special  # here, as most pages need no test

    error = differences.std(-1, ddof=1) / np.sqrt(count)
    half = special.stdtrit(count - 1, 1 - LEVEL / 2) * error
    # Scores of few pictures can repeat on every seed, which says nothing of their spread.
    spreads = error > 1e-12
    t = np.abs(mean) / np.where(spreads, error, 1.0)
    return Difference(mean, half, np.where(spreads, 2 * special.stdtr(count - 1, -t), 1.0))


def holm(p: np.ndarray, others: int = 0) -> np.ndarray:
    """p [..., tests], corrected for there being several (Holm 1979), and for the number of further
    tests of the family, of which nothing else is used."""
    count = p.shape[-1]
    order = np.argsort(p, axis=-1)
    scaled = np.take_along_axis(p, order, -1) * np.arange(count + others, others, -1)
    corrected = np.minimum(np.maximum.accumulate(scaled, axis=-1), 1.0)
    result = np.empty_like(corrected)
    np.put_along_axis(result, order, corrected, -1)
    return result


def power(effect: float, seeds: int, level: float = LEVEL) -> float:
    """How often the paired test finds a difference of ``effect`` standard deviations of the
    seeds' differences."""
    from scipy import special

    freedom = seeds - 1
    critical = special.stdtrit(freedom, 1 - level / 2)
    shift = effect * np.sqrt(seeds)
    below, above = special.nctdtr(freedom, shift, [-critical, critical])
    return float(below + 1 - above)


def seeds_needed(differences: np.ndarray, level: float = LEVEL) -> int | None:
    """The seeds with which the test would find a mean difference of the size of these [seeds] with
    80 % power; None: more than 50, or the spread is not known."""
    spread = differences.std(ddof=1) if len(differences) > 1 else 0.0
    if spread < 1e-12:
        return None
    effect = abs(float(differences.mean())) / float(spread)
    counts = range(3, MOST_SEEDS + 1)
    return next((count for count in counts if power(effect, count, level) >= POWER), None)
