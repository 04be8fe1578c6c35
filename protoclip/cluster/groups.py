"""How many groups there are, the groups that k-means found, and the tables about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from protoclip.common.files import path_in_table, plural, write_csv
from protoclip.common.waits import Wait
from protoclip.data import PairDataset
from protoclip.data.feature_pairs import FeaturePairs, origin
from protoclip.features import FeatureRows
from protoclip.lloyd.number import choose_num_clusters, numbers_to_try

SILHOUETTE_ROWS = 3000  # --k auto: rows whose silhouettes are computed
LARGEST_K = 300  # --k auto
FEWEST = 6  # --k auto: rows
CLEAR = 0.2  # --k auto: a largest mean silhouette below it says that no number of groups is clear


@dataclass(frozen=True)
class NumGroups:
    """K, and how it was chosen."""

    k: int
    why: str = ""  # for a summary, in brackets; "": it was given
    scores: Mapping[int, float] = field(default_factory=dict)  # K tried -> mean silhouette

    @property
    def scores_in_words(self) -> str:
        listed = ", ".join(f"{k:,}: {score:.3f}" for k, score in self.scores.items())
        return f"Mean silhouette by number of groups: {listed}"


def check_k(k_text: str, n: int) -> None:
    """ValueError if n pictures or rows cannot have so many groups."""
    if k_text == "auto" and n < FEWEST:
        raise ValueError(
            f"--k auto: expected at least {FEWEST} pictures or rows, got {n}; give --k, such as "
            "--k 2"
        )
    if n < 2:
        raise ValueError(f"DATA: expected at least 2 pictures or rows, got {n}; add some")
    if k_text != "auto" and not (k_text.isdecimal() and 2 <= int(k_text) <= n):
        raise ValueError(f"--k: expected auto or 2 to N = {n:,} groups, got {k_text}")


def choose_k(
    k_text: str, rows: FeatureRows, seed: int, check_signals: Callable[[], None]
) -> NumGroups:
    """K; "auto": that with the largest mean silhouette, if it is clear, or else √(N/2)."""
    check_k(k_text, len(rows))
    if k_text != "auto":
        return NumGroups(int(k_text))
    candidates = numbers_to_try(min(SILHOUETTE_ROWS, len(rows)), LARGEST_K)
    with Wait("choosing K", len(candidates), "numbers") as wait:

        def progress(number: int, silhouette: float) -> None:
            wait.update()
            check_signals()

        try:
            k, silhouettes = choose_num_clusters(
                rows,
                max_clusters=LARGEST_K,
                max_points=SILHOUETTE_ROWS,
                seed=seed,
                progress=progress,
            )
        except ValueError as error:
            reason = str(error).partition(": ")[2].replace("points", "rows")
            raise ValueError(f"--k auto: {reason}") from error
    tried = f"of 2 to {candidates[-1]}"
    if silhouettes[k] >= CLEAR:
        why = f"{tried}, the number with the largest mean silhouette, {silhouettes[k]:.3f}"
    else:
        why = (
            f"√(N/2), because {tried} no number has a mean silhouette of {CLEAR}: the largest is "
            f"{silhouettes[k]:.3f} of {k:,}; --k sets another number"
        )
        k = min(LARGEST_K, max(2, round(math.sqrt(len(rows) / 2))))
    return NumGroups(k, f" ({why})", silhouettes)


class Groups:
    """The groups of rows with these labels, on the CPU, with their members sorted by distance."""

    def __init__(self, labels: Tensor, squared: Tensor) -> None:
        self.labels = labels  # int64 [N]
        self.squared = squared  # [N], squared distance to the own centroid
        self.order = np.lexsort((squared.numpy(), labels.numpy()))  # int64 [N], by group first
        self.ends = np.bincount(labels.numpy()).cumsum()  # int64 [K], of each group in the order

    def members(self, group: int) -> list[int]:
        """The rows of a group, from the nearest to the farthest."""
        start = self.ends[group - 1] if group else 0
        return self.order[start : self.ends[group]].tolist()

    def ranks(self) -> np.ndarray:
        """The place of each row in its group, int64 [N]; 1 is nearest to the centroid."""
        counts = np.diff(self.ends, prepend=0)
        ranks = np.empty(len(self.order), dtype=np.int64)
        starts = np.repeat(self.ends - counts, counts)
        ranks[self.order] = np.arange(len(self.order)) - starts + 1
        return ranks

    def outliers(self) -> np.ndarray:
        """Each row's distance to its centroid, divided by the mean distance of its group, [N]; 1
        in a group of equal rows."""
        labels = self.labels.numpy()
        distances = np.sqrt(self.squared.numpy().astype(np.float64))
        sums = np.bincount(labels, weights=distances)[labels]
        counts = np.bincount(labels)[labels]
        return np.divide(distances * counts, sums, out=np.ones_like(sums), where=sums > 0)


def names_in_table(dataset: PairDataset, chosen: Sequence[int]) -> dict[str, list[str]]:
    """The columns that say what the rows of a table are: the file, and before it, for stored
    features, the position of the row in DATA, which identifies it also where it has no key."""
    pairs, places = origin(dataset, np.asarray(chosen, np.int64))
    if not isinstance(pairs, FeaturePairs):
        return {"file": [path_in_table(dataset.keys[i]) for i in chosen]}
    cells = pairs.identity.cells(pairs.identity.first_rows[places])
    return {"position": list(cells["position"]), "file": list(map(path_in_table, cells["key"]))}


def write_table(
    path: Path, dataset: PairDataset, groups: Groups, duplicates: Mapping[int, int]
) -> None:
    """Write clusters.csv; ``duplicates``: row -> the row that it looks nearly the same as."""
    columns: dict[str, Any] = {**names_in_table(dataset, range(len(dataset)))}
    positions = columns.get("position", columns["file"])
    names = [file or row for file, row in zip(columns["file"], positions, strict=True)]
    columns |= {
        "cluster": groups.labels.tolist(),
        "squared_distance": [f"{value:.7g}" for value in groups.squared.tolist()],
        "rank": groups.ranks().tolist(),
        "outlier": [f"{value:.4g}" for value in groups.outliers().tolist()],
        "duplicate_of": [
            names[duplicates[i]] if i in duplicates else "" for i in range(len(names))
        ],
    }
    write_csv(path, list(columns), zip(*columns.values(), strict=True))


def write_left_out(path: Path, dataset: PairDataset, left_out: Mapping[int, str]) -> None:
    """Write left_out.csv; ``left_out``: position in the data set -> reason."""
    columns = names_in_table(dataset, list(left_out)) | {"reason": list(left_out.values())}
    write_csv(path, list(columns), zip(*columns.values(), strict=True))


def fewer_groups(labels: Tensor, k: int) -> list[str]:
    """A sentence about groups that stayed empty; none if none did."""
    nonempty = len(labels.unique())
    if nonempty == k:
        return []
    return [
        f"{nonempty:,} of {plural(k, 'group')} {'has' if nonempty == 1 else 'have'} members; the "
        "others are empty, as happens if there are fewer different rows than groups"
    ]
