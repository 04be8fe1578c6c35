"""Evidence for ``protoclip curate``: uniform samples of circles, rare concepts of icons.

    python -m benchmarks.curation rings
    python -m benchmarks.curation icons WORK  # encoded by benchmarks.frozen --until encode

Each writes benchmarks/results/curation/NAME.json and the table of docs/curate.md that quotes it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.frozen import picture_name
from protoclip import Hierarchy, balanced_sample, hierarchical_kmeans
from protoclip.evaluate.datasets import open_layout
from protoclip.features import open_folder
from protoclip.features.table import FILE

RESULTS = Path(__file__).parent / "results" / "curation"
PAGE = Path(__file__).parent.parent / "docs" / "curate.md"
SEEDS = range(5)

# Of Vo et al. 2024, figure 3: points and centre of each circle.
RINGS = ((20_000, (-2.2, 1.0)), (200, (0.0, 1.0)), (1000, (2.2, 1.0)), (500, (-1.2, 0.2)),
         (8000, (1.2, 0.2)))  # fmt: skip
INNER, OUTER = 0.7, 1.0  # radii between which points lie
CELL = 0.25
FINE = 64  # by which a cell's side is divided to measure its share of the area
CHOSEN = 1000

MOST = 200  # copies of each drawing of the most frequent concept
NOISE = 0.1  # length of the noise added to a copy, relative to the row
SHARE = 0.1  # of the rows that are chosen
ICON_ITERATIONS = 10  # of each k-means

Points = np.ndarray
Choice = Callable[[Tensor, int, int], Tensor]  # points, target, seed -> positions


def kmeans_then_equal_shares(*levels: int, **options: Any) -> Choice:
    def choose(points: Tensor, target: int, seed: int) -> Tensor:
        hierarchy = hierarchical_kmeans(points, levels, seed=seed, **options)
        return balanced_sample(hierarchy, target, seed=seed)

    return choose


def at_random(points: Tensor, target: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(len(points), generator=generator)[:target]


def ring_points(seed: int) -> Points:
    generator = np.random.default_rng(seed)
    parts = []
    for count, centre in RINGS:
        radius = generator.uniform(INNER, OUTER, count)
        angle = generator.uniform(0, 2 * np.pi, count)
        parts.append(
            np.array(centre) + np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
        )
    return np.concatenate(parts)


def in_rings(points: Points) -> np.ndarray:
    """Whether points [N, 2] lie in a ring: bool [N]."""
    distances = [np.linalg.norm(points - np.array(centre), axis=1) for _, centre in RINGS]
    return np.any([(d >= INNER) & (d <= OUTER) for d in distances], axis=0)


def cells(points: Points, side: float = CELL) -> np.ndarray:
    """The cell of each point, int64 [N]."""
    column, row = (np.floor(points / side).astype(np.int64) + 1000).T
    return column * 2000 + row


def area_shares() -> dict[int, float]:
    """The share of the rings' area in each cell."""
    side = CELL / FINE
    axis = (np.arange(-4 / side, 4 / side) + 0.5) * side
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    numbers, counts = np.unique(cells(grid[in_rings(grid)]), return_counts=True)
    return dict(zip(numbers.tolist(), (counts / counts.sum()).tolist(), strict=True))


def divergence(points: Points, shares: dict[int, float]) -> float:
    """Kullback-Leibler divergence, in nats, of the points' cells to the shares of the area."""
    smallest = min(shares.values())
    numbers, counts = np.unique(cells(points), return_counts=True)
    parts = counts / counts.sum()
    area = np.array([shares.get(number, smallest) for number in numbers.tolist()])
    return float((parts * np.log(parts / area)).sum())


def uniform_points(count: int, seed: int) -> Points:
    """Points drawn uniformly from the rings' area."""
    generator = np.random.default_rng(seed)
    drawn = generator.uniform((-3.5, -1), (3.5, 2.5), (20 * count, 2))
    return drawn[in_rings(drawn)][:count]


RING_CHOICES: dict[str, Choice] = {
    "random rows": at_random,
    "k-means, 1,000 clusters": kmeans_then_equal_shares(1000, resamplings=0),
    "k-means, 300 clusters": kmeans_then_equal_shares(300, resamplings=0),
    "hierarchical": kmeans_then_equal_shares(1000, 300, resamplings=0),
    "hierarchical with resampling": kmeans_then_equal_shares(1000, 300, sample_sizes=[15, 2]),
}


def rings() -> dict[str, Any]:
    """How far 1,000 chosen points are from uniform."""
    shares = area_shares()
    result: dict[str, list[float]] = {name: [] for name in RING_CHOICES}
    result["uniform points"] = [divergence(uniform_points(CHOSEN, seed), shares) for seed in SEEDS]
    for seed in SEEDS:
        points = ring_points(seed)
        for name, choose in RING_CHOICES.items():
            chosen = choose(torch.from_numpy(points).float(), CHOSEN, seed)
            result[name].append(divergence(points[chosen.numpy()], shares))
            print(seed, name, f"{result[name][-1]:.4f}", flush=True)
    return {"cells": len(shares), "chosen": CHOSEN, "divergence": result}


def repeated_icons(features: Points, concepts: list[str], seed: int) -> tuple[Points, np.ndarray]:
    """Each drawing of the concept of rank j ceil(200 / j) times, with noise: rows and the number
    of each row's concept. Ranks are by number of drawings, then name."""
    names, numbers, counts = np.unique(concepts, return_inverse=True, return_counts=True)
    ranks = np.empty(len(names), dtype=np.int64)
    ranks[np.lexsort((names, -counts))] = np.arange(1, 1 + len(names))
    copies = -(-MOST // ranks[numbers])
    rows = np.repeat(features, copies, axis=0)
    generator = np.random.default_rng(seed)
    noise = generator.normal(size=rows.shape).astype(np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True) / np.sqrt(rows.shape[1])
    return rows + NOISE * lengths * noise, np.repeat(numbers, copies)


def encoded_icons(work: str) -> tuple[Points, list[str]]:
    """Rows of the built-in drawings that benchmarks.frozen has encoded, and their concepts."""
    layout = open_layout("builtin:icons")
    assert layout.train is not None
    concept_of = {}
    for pairs in (layout.train, *(layout.parts[key].test for key in ("NEW", "HO"))):
        concept = pairs.labels["concept"]
        for key, number in zip(pairs.keys, concept.ids, strict=True):
            concept_of[picture_name(key)] = concept.names[int(number)]
    folder = open_folder(Path(work) / "encoded")
    assert folder.images is not None and folder.table is not None
    files = [Path(file).name for file in folder.table.column(FILE) or ()]
    rows = np.array([row for row, file in enumerate(files) if file in concept_of])
    return folder.images.take(rows).astype(np.float32), [concept_of[files[row]] for row in rows]


def icons(work: str) -> dict[str, Any]:
    """Concepts that a tenth of the rows covers."""
    rows, concepts = encoded_icons(work)
    result: dict[str, Any] = {"drawings": len(rows), "columns": rows.shape[1], "choices": {}}
    for seed in SEEDS:
        points, numbers = repeated_icons(rows, concepts, seed)
        target = round(SHARE * len(points))
        levels = [target, round(0.3 * target)]  # in the ratio of the circles' levels
        result |= {"rows": len(points), "target": target, "levels": levels}
        result["concepts"] = int(numbers.max()) + 1
        for name, chosen in icon_choices(torch.from_numpy(points), target, levels, seed):
            counts = np.bincount(numbers[chosen.numpy()])
            shares = counts[counts > 0] / counts.sum()
            scores = result["choices"].setdefault(name, {"covered": [], "entropy": []})
            scores["covered"].append(int((counts > 0).sum()))
            scores["entropy"].append(float(-(shares * np.log(shares)).sum()))
            print(seed, name, scores["covered"][-1], f"{scores['entropy'][-1]:.3f}", flush=True)
    return result


def icon_choices(
    points: Tensor, target: int, levels: Sequence[int], seed: int
) -> Iterator[tuple[str, Tensor]]:
    yield "random rows", at_random(points, target, seed)
    for name, resamplings in (("hierarchical", 0), ("hierarchical with resampling", 10)):
        hierarchy = hierarchical_kmeans(
            points, levels, resamplings=resamplings, num_iters=ICON_ITERATIONS, seed=seed
        )
        if not resamplings:
            lowest = Hierarchy(hierarchy.levels[:1])
            yield "k-means, equal shares", balanced_sample(lowest, target, seed=seed)
        yield name, balanced_sample(hierarchy, target, seed=seed)


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and the smallest and largest value."""
    mean, low, high = np.mean(values), min(values), max(values)
    return f"{mean:,.{digits}f} | {low:,.{digits}f} to {high:,.{digits}f}"


def rings_table(record: Mapping[str, Any]) -> list[str]:
    lines = ["| 1,000 points of 29,700 | divergence (nats) | five seeds |", "|---|---|---|"]
    names = [*RING_CHOICES, "uniform points"]
    return lines + [f"| {name} | {spread(record['divergence'][name], 3)} |" for name in names]


def icons_table(record: Mapping[str, Any]) -> list[str]:
    low, high = record["levels"]
    lines = [
        "**Icons.** The built-in drawings as features of an ImageNet model, each of the concept of "
        "rank j repeated",
        '⌈200 / j⌉ times with noise of a tenth of its length. "k-means" takes equal shares of '
        f"{low:,} clusters,",
        f'"hierarchical" has levels of {low:,} and {high:,}. Ranges of the seeds; `num_iters=10`.',
        "",
        f"| {record['target']:,} of {record['rows']:,} rows | concepts of {record['concepts']:,} | "
        "seeds | entropy (nats) | seeds |",
        "|---|---|---|---|---|",
    ]
    for name, scores in record["choices"].items():
        lines.append(
            f"| {name} | {spread(scores['covered'], 0)} | {spread(scores['entropy'], 2)} |"
        )
    return lines


TABLES = {"rings": rings_table, "icons": icons_table}


def block_of(page: str, name: str, lines: Sequence[str]) -> str:
    """The page with its block of this name replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = page.partition(begin)
    return "\n".join([before + begin, *lines, end + rest.partition(end)[2]])


def write(name: str, result: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine.describe(), **result}
    text = json.dumps(record, indent=1) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(block_of(page, name, TABLES[name](record)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curation", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    commands.add_parser("rings")
    icons_parser = commands.add_parser("icons")
    icons_parser.add_argument("work", help="folder in which benchmarks.frozen encoded the icons")
    arguments = vars(parser.parse_args())
    name = arguments.pop("name")
    run = {"rings": rings, "icons": icons}[name]
    write(name, run(**arguments))


if __name__ == "__main__":
    main()
