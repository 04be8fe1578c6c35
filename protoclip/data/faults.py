"""Pairs that cannot be read: found by reading all of them, or noted as training meets them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple

import numpy as np

from protoclip.common.files import DataError
from protoclip.common.waits import Wait
from protoclip.data.feature_pairs import feature_pairs
from protoclip.data.types import Batch, PairDataset, Subset
from protoclip.distributed import gather_objects, is_main, own_slice

QUEUED = 4096  # pairs that are handed to the threads at once
NAMED = 20  # bad samples reported one by one


class Readable(NamedTuple):
    """The pairs of a data set that can be read, and what is wrong with the others."""

    pairs: PairDataset
    faults: dict[int, str]  # position -> why this pair cannot be read, in the order of positions


def readable(dataset: PairDataset, report: Callable[[str], Any] | None = None) -> Readable:
    """Read every pair once, pictures decoded. A collective call: each rank reads a slice.

    ``report`` gets this rank's faults as they are found. Stored features are
    not read: those that are not finite are refused where they are used.
    """
    if feature_pairs(dataset):
        return Readable(dataset, {})
    share = own_slice(len(dataset))
    find = functools.partial(_fault_of, dataset)
    faults: dict[int, str] = {}
    # Threads suffice because Pillow releases the interpreter's lock while it decodes.
    with (
        ThreadPool() as pool,
        Wait("checking", share.stop - share.start, "pictures") as wait,
    ):
        for start in range(share.start, share.stop, QUEUED):
            part = range(start, min(start + QUEUED, share.stop))
            dataset.prefetch(np.asarray(part))
            for i, fault in zip(part, pool.imap(find, part, chunksize=16), strict=True):
                wait.update()
                if fault:
                    faults[i] = fault
                    if report is not None:
                        report(fault)
    faults = {i: fault for of_rank in gather_objects(faults) for i, fault in of_rank.items()}
    if not faults:
        return Readable(dataset, faults)
    good = [i for i in range(len(dataset)) if i not in faults]
    return Readable(Subset(dataset, good), faults)


def _fault_of(dataset: PairDataset, i: int) -> str:
    """Why pair ``i`` cannot be read, or ""."""
    try:
        dataset.image(i)
        dataset.captions(i)
    except DataError as error:
        return str(error)
    return ""


class Faults:
    """The known bad samples of a data set, including those skipped when it was opened.

    A share above ``max_fraction`` raises a DataError; ``report`` gets a message for each new one.
    """

    def __init__(
        self, dataset: PairDataset, max_fraction: float, report: Callable[[str], Any] = print
    ) -> None:
        self.name = dataset.name
        self.max_fraction = max_fraction
        self.report = report
        self.known = round(dataset.facts.num_skipped)
        self.total = len(dataset) + self.known
        self.positions: set[int] = set()
        self.reasons: list[str] = []  # of the first of them
        self.check(0)

    def noted(self, batch: Batch) -> Batch:
        """Note the bad samples of a batch, each once, and return the batch."""
        for position, reason in batch.bad:
            if position not in self.positions:
                self.positions.add(position)
                if len(self.positions) <= NAMED:
                    self.reasons.append(reason)
                    self.report(f"skipped sample {len(self.positions)}: {reason}")
                self.check(len(self.positions), f"; the last one: {reason}")
        return batch

    def check(self, found: int, last: str = "") -> None:
        """Raise a DataError if so many bad samples, beyond those known before, are too many."""
        count = self.known + found
        if count > self.max_fraction * self.total:
            raise DataError(
                f"{self.name}: {count} of {self.total} samples cannot be used, more than "
                f"--max-bad-fraction {self.max_fraction:g}{last}; fix the data (python -m "
                "protoclip.data --check lists what is wrong), or allow more"
            )

    def state(self) -> list[int]:
        """The positions that any rank has noted, for a checkpoint; a collective call."""
        return sorted({fault for faults in gather_objects(self.positions) for fault in faults})

    def load_state(self, positions: Iterable[int]) -> None:
        """Continue with what ``state`` gave, which rank 0 counts."""
        self.positions = set(positions) if is_main() else set()
