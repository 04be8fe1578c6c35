"""``protoclip curate FEATURES --levels 1000,100 --target 5000``: a balanced subset of features.

Writes selected.csv, left_out.csv, hierarchy.safetensors (``protoclip.Hierarchy.load`` reads it) and
report.html to a folder, and curate.state, from which an interrupted run continues.
"""

from __future__ import annotations

import sys

from protoclip.settings.commands import show_help

if __name__ == "__main__":  # answered before the imports below, which take seconds
    show_help("curate", sys.argv[1:])

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from protoclip.cluster.output import LEFT_OUT, open_output, write_files
from protoclip.common.files import mebibytes, plural, printable, printable_lines, write_atomic
from protoclip.common.paths import check_exists
from protoclip.common.signals import StopSignals, stop_if_asked
from protoclip.common.waits import Wait, in_words
from protoclip.curate.hierarchy import Hierarchy, LevelPlan, hierarchical_kmeans, plan_levels
from protoclip.curate.page import make_page
from protoclip.curate.sampling import balanced_sample, sample_without_duplicates
from protoclip.distributed import run_command
from protoclip.features import FeatureRows, open_features
from protoclip.features.rows import UnitRows
from protoclip.features.table import write_csv_table
from protoclip.lloyd.points import on_disk
from protoclip.lloyd.state import OtherCallError, remove_state
from protoclip.ops import kmeans_assign
from protoclip.report import page
from protoclip.settings.commands import curate_parser

PROG = "protoclip curate"
SELECTED = "selected.csv"
HIERARCHY = "hierarchy.safetensors"
STATE = "curate.state"
OLD_STATE = "state.safetensors"  # its name in earlier versions
NAMES = [SELECTED, LEFT_OUT, HIERARCHY, page.NAME]
TIMED_ROWS, TIMED_CLUSTERS = 4096, 1024  # of the assignment that --dry-run times


def run(args: argparse.Namespace) -> None:
    """Run the command: levels of clusters, a sample, and files."""
    check_exists(args.data, "DATA", "check the path")
    rows = open_features(args.data)
    plans = plan_levels(len(rows), args.levels, args.resamplings)
    check_target(args.target, len(rows))
    if args.dry_run:
        print(forecast(rows, plans, args.iters))
        return
    out = Path(args.out)
    began_at = time.perf_counter()
    with open_output(out, NAMES, args.overwrite, PROG):
        left_out = rows.not_finite()
        left_out_cells = rows.identity.cells(left_out)
        if len(left_out):
            print(
                f"left out {plural(len(left_out), 'row')} of {len(rows):,} with NaN or inf; "
                f"{LEFT_OUT} lists them",
                file=sys.stderr,
            )
            rows = rows.select(np.delete(np.arange(len(rows)), left_out))
        check_target(args.target, len(rows))
        if args.normalize:
            rows = UnitRows(rows)
        with StopSignals() as signals:
            next_step = "before its end; the same command continues"
            hierarchy = cluster_rows(rows, args, out, partial(stop_if_asked, signals, next_step))
        clustered_at = time.perf_counter()
        chosen, notes = choose_rows(rows, hierarchy, args)
        seconds = {
            "clusters": clustered_at - began_at,
            "sample": time.perf_counter() - clustered_at,
        }
        html = make_page(args.data, rows, hierarchy, chosen, notes, seconds)
        with write_files(out, PROG) as temporary:
            cells = rows.identity.cells(chosen.numpy())
            write_csv_table(temporary / SELECTED, cells | clusters_of(hierarchy, chosen))
            reasons = ["NaN or inf"] * len(left_out)
            write_csv_table(temporary / LEFT_OUT, left_out_cells | {"reason": reasons})
            hierarchy.save(temporary / HIERARCHY)
            write_atomic(temporary / page.NAME, printable_lines(html))
    for note in notes:
        print(note, file=sys.stderr)
    name = printable(str(out))
    print(
        f"{hierarchy}\nwrote {plural(len(chosen), 'row')} to {name}/{SELECTED}; open "
        f"{name}/{page.NAME}"
    )


def check_target(target: int, count: int) -> None:
    if target > count:
        raise ValueError(
            f"--target: expected at most the {count:,} rows of DATA, got {target:,}; lower it"
        )


def cluster_rows(
    rows: FeatureRows, args: argparse.Namespace, out: Path, check_signals: Callable[[], None]
) -> Hierarchy:
    """The hierarchy, which signals can stop."""
    total = len(args.levels) * (1 + args.resamplings)
    with Wait("k-means of levels", total, "runs") as wait:

        def progress(level: int, step: int, iteration: int) -> None:
            wait.done = (level - 1) * (1 + args.resamplings) + step
            wait.note = f"level {level}"
            check_signals()

        if (out / OLD_STATE).exists() and not (out / STATE).exists():
            (out / OLD_STATE).rename(out / STATE)
        cluster = partial(
            hierarchical_kmeans,
            rows,
            args.levels,
            resamplings=args.resamplings,
            num_iters=args.iters,
            seed=args.seed,
            state=out / STATE,
            progress=progress,
        )
        try:
            hierarchy = cluster()
        except OtherCallError as error:
            if not args.overwrite:
                raise ValueError(
                    f"--out: {printable(str(out))} holds clusters of other settings "
                    f"({', '.join(error.different)}); choose another folder, or replace them with "
                    "--overwrite"
                ) from error
            for file in [out / STATE, *out.glob(f"{STATE}.*.*")]:  # also of the k-means that ran
                remove_state(file)
            hierarchy = cluster()
    return hierarchy


def choose_rows(
    rows: FeatureRows, hierarchy: Hierarchy, args: argparse.Namespace
) -> tuple[Tensor, list[str]]:
    """The chosen rows, int64, increasing, and sentences about those that were passed over."""
    if not args.without_duplicates:
        return balanced_sample(hierarchy, args.target, choose=args.choose, seed=args.seed), []
    chosen, lacking = sample_without_duplicates(
        on_disk(rows, torch.device("cpu")),
        hierarchy,
        args.target,
        args.without_duplicates,
        choose=args.choose,
        seed=args.seed,
    )
    note = (
        f"No two chosen rows of a lowest cluster are nearer than {args.without_duplicates:g}; "
        f"{plural(int((lacking > 0).sum()), 'lowest cluster')} had too few such rows, so "
        f"{plural(int(lacking.sum()), 'row')} of {args.target:,} could not be chosen."
    )
    return chosen, [note]


def clusters_of(hierarchy: Hierarchy, chosen: Tensor) -> dict[str, Sequence[str]]:
    """The column of each level: the clusters of the chosen rows."""
    levels = range(1, 1 + len(hierarchy.levels))
    return {f"cluster_{i}": [str(k) for k in hierarchy.labels(i)[chosen].tolist()] for i in levels}


def forecast(rows: FeatureRows, plans: Sequence[LevelPlan], num_iters: int) -> str:
    """What a run will do: passes over the rows, bytes, and an estimate of its time."""
    row_bytes = rows.shape[1] * rows.dtype.itemsize
    lines = [
        f"{plural(len(rows), 'row')} of {plural(rows.shape[1], 'number')} ({rows.dtype}), "
        f"{mebibytes(len(rows) * row_bytes)}"
    ]
    products = 0.0  # of a row and a centroid
    for number, plan in enumerate(plans, 1):
        sampled = min(plan.rows, plan.clusters * plan.sample_size)
        visits = plan.rows * (num_iters + 2) + plan.resamplings * (
            sampled * (num_iters + 1) + plan.rows
        )
        products += visits * plan.clusters
        line = (
            f"level {number}: {plan.rows:,} into {plan.clusters:,} clusters, then "
            f"{plural(plan.resamplings, 'time')} {sampled:,} of them ({plan.sample_size:,} of a "
            f"cluster); at most {visits / plan.rows:,.0f} passes"
        )
        if number == 1:
            line += f" that read {mebibytes(visits * row_bytes)}"
        lines.append(line)
    seconds = products * seconds_of_product(rows)
    lines.append(
        f"at most about {in_words(seconds)} (from an assignment of some of the rows on this "
        "machine; k-means stops as soon as no centroid moves)"
    )
    return "\n".join(lines)


def seconds_of_product(rows: FeatureRows) -> float:
    """The time in which ``kmeans_assign`` compares a row with a centroid."""
    count = min(len(rows), TIMED_ROWS)
    points = on_disk(rows, torch.device("cpu")).take(torch.arange(count))
    centroids = points[:TIMED_CLUSTERS]
    kmeans_assign(points, centroids)  # the first call compiles
    began_at = time.perf_counter()
    kmeans_assign(points, centroids)
    return (time.perf_counter() - began_at) / (count * len(centroids))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake prints one line and gives 2, a signal 128 + its number."""
    return run_command(lambda: run(curate_parser().parse_args(argv)), PROG)


if __name__ == "__main__":
    sys.exit(main())
