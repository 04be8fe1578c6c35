"""Read everything once, and say what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from protoclip.data.types import DataError, PairDataset

LISTED = 100  # faults printed one by one


def faults_of(dataset: PairDataset, workers: int = 0, progress: Any = None) -> Iterator[str]:
    """What is wrong with each sample that cannot be used, in the order of the data.

    Every picture is decoded and every caption read. ``progress`` is told each sample; pictures are
    decoded by ``workers`` threads (Pillow lets go of the interpreter's lock).
    """
    for shard, key, reason in getattr(dataset, "skipped", []):
        yield f"{shard}: {key!r}: {reason}" if key else f"{shard}: {reason}"

    def judge(i: int) -> str:
        try:
            dataset.image(i)
            return "" if dataset.captions(i) else f"{dataset.keys[i]}: no caption"
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        block = 256 * max(1, workers)  # samples in flight: one block, whatever the size of the data
        for start in range(0, len(dataset), block):
            for fault in pool.map(judge, range(start, min(start + block, len(dataset)))):
                if progress is not None:
                    progress(1)
                if fault:
                    yield fault


def check_data(
    dataset: PairDataset, say: Callable[[str], Any], workers: int = 0, progress: Any = None
) -> int:
    """Report every fault of a data set in words; returns their number."""
    count = 0
    by_shard: Counter[str] = Counter()
    for fault in faults_of(dataset, workers, progress):
        count += 1
        by_shard[fault.split(": ", 1)[0]] += 1
        if count <= LISTED:
            say(fault)
    if count > LISTED:
        say(f"and {count - LISTED} more, by file:")
        for name, number in by_shard.most_common(20):
            say(f"  {number:8,} {name}")
    total = len(dataset) + len(getattr(dataset, "skipped", []))
    say(f"{dataset.name}: {total - count:,} of {total:,} samples are good, {count:,} are not")
    return count
