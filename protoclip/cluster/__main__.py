"""``protoclip cluster DATA --k 50``: group pictures, or stored features, by k-means.

Writes clusters.csv, left_out.csv, centroids.safetensors (``protoclip.Clusters.load`` reads it),
report.html and, for pictures, their features in a folder of ``protoclip encode``.
"""

from __future__ import annotations

import sys

from protoclip.settings.commands import show_help

if __name__ == "__main__":  # answered before the imports below, which take seconds
    show_help("cluster", sys.argv[1:])

import argparse
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from protoclip.cluster.folders import write_folders
from protoclip.cluster.groups import (
    Groups,
    check_k,
    choose_k,
    fewer_groups,
    write_left_out,
    write_table,
)
from protoclip.cluster.output import CENTROIDS, CSV, LEFT_OUT, PROG, STATE, open_output, write_files
from protoclip.cluster.page import make_page
from protoclip.cluster.points import (
    Points,
    encode_pictures,
    finite_points,
    open_pictures,
    open_stored,
    squared_distances,
)
from protoclip.common.files import plural, printable, printable_lines, say_left_out, write_atomic
from protoclip.common.paths import check_exists
from protoclip.common.sealed import is_sealed
from protoclip.common.signals import StopSignals, stop_if_asked
from protoclip.common.waits import Wait
from protoclip.distributed import run_command
from protoclip.features import FeatureRows, holds_features
from protoclip.features.layout import IMAGES
from protoclip.lloyd import Clusters, as_points, kmeans
from protoclip.lloyd.points import on_disk
from protoclip.lloyd.state import OtherCallError, place_of, remove_state
from protoclip.model import choose_device
from protoclip.report import page
from protoclip.settings.commands import cluster_parser

PLUS_PLUS = 1024  # largest K for which k-means++ runs three times
IN_MEMORY_BYTES = 256 << 20  # of rows that are loaded; k-means reads more from disk


def run(args: argparse.Namespace) -> None:
    """Run the command: features, K, k-means, and files."""
    check_exists(args.data, "DATA", "check the path")
    out = Path(args.out)
    began_at = time.perf_counter()
    with open_output(out, [CSV, LEFT_OUT, CENTROIDS, page.NAME], args.overwrite):
        points = open_stored(args) if holds_features(args.data) else open_pictures(args)
        is_encoded = points.stored is None
        if is_encoded:
            from protoclip.encode.encoders import clip_encoders  # imports open_clip

            images = clip_encoders(args)[IMAGES]
            check_k(args.k, len(points.source))  # before hours of encoding
        if args.overwrite and (out / STATE).exists() and is_sealed(out / STATE):
            remove_state(out / STATE)
        next_step = "the same command continues"
        if is_encoded:
            points = encode_pictures(points, images, args, out)
            next_step = "the features are kept, and the same command continues with them"
        points = finite_points(points)
        if not is_encoded:
            noun = "picture" if "images" in points.shown else "row"
            say_left_out(list(points.left_out.values()), len(points.source), noun)
        with StopSignals() as signals:
            check_signals = partial(stop_if_asked, signals, f"before its end; {next_step}")
            write_groups(args, out, points, began_at, check_signals)


def write_groups(
    args: argparse.Namespace,
    out: Path,
    points: Points,
    began_at: float,
    check_signals: Callable[[], None],
) -> None:
    """K, k-means, and the files; ``began_at``: on the clock of ``time.perf_counter``.
    ``check_signals`` ends it; once k-means has come to its end, so does the run."""
    rows: Tensor | FeatureRows = points.rows
    dtype = on_disk(points.rows, torch.device("cpu")).dtype
    if 4 * len(rows) * rows.shape[1] <= IN_MEMORY_BYTES:
        loaded = as_points(points.rows.rows(0, len(rows)))
        dtype = torch.promote_types(loaded.dtype, torch.float32)
        rows = loaded.to(choose_device(args.device), dtype)
    features_done_at = time.perf_counter()
    chosen = choose_k(args.k, points.rows, args.seed, check_signals)
    k = chosen.k
    row_bytes = rows.shape[1] * dtype.itemsize
    kmeans_bytes = 4 * k * row_bytes + 32 * len(rows)
    if isinstance(rows, Tensor):
        kmeans_bytes += rows.nbytes
    if chosen.scores:
        print(chosen.scores_in_words, file=sys.stderr)
    print(
        f"{plural(len(rows), 'row')} of {plural(rows.shape[1], 'number')} into {k:,} groups"
        f"{chosen.why}; k-means needs {math.ceil(kmeans_bytes / 2**20):,} MiB",
        file=sys.stderr,
    )
    clusters = cluster_rows(rows, k, args, out, points.weights, check_signals)
    squared = squared_distances(points.rows, clusters.labels, clusters.centroids)
    labels = clusters.labels.cpu()
    notes = [*points.notes]
    if not clusters.converged:
        notes.append(
            f"k-means stopped after {plural(args.iters, 'iteration')} before it converged; --iters "
            "sets a larger number."
        )
    notes += fewer_groups(labels, k)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    groups = Groups(labels, squared)
    seconds = {
        "features": features_done_at - began_at,
        "k-means": time.perf_counter() - features_done_at,
    }
    with Wait("drawing the page"):
        html, duplicates = make_page(points, groups, chosen, seconds, notes)
    with write_files(out) as temporary:  # a table without its page helps nobody
        write_table(temporary / CSV, points.dataset, groups, duplicates)
        write_left_out(temporary / LEFT_OUT, points.source, points.left_out)
        clusters.save(temporary / CENTROIDS)
        write_atomic(temporary / page.NAME, printable_lines(html))
    remove_state(out / STATE)
    if args.link_to or args.copy_to:
        folder = Path(args.link_to or args.copy_to)
        write_folders(folder, points.dataset, groups, copy=bool(args.copy_to))
    name = printable(str(out))
    print(f"{clusters}\nwrote {name}/{CSV} and {CENTROIDS}; open {name}/{page.NAME}")


def cluster_rows(
    rows: Tensor | FeatureRows,
    k: int,
    args: argparse.Namespace,
    out: Path,
    weights: Tensor | None,
    check_signals: Callable[[], None],
) -> Clusters:
    """k-means that signals can stop, from where the same command was stopped."""
    few_groups = k <= PLUS_PLUS
    num_restarts = 3 if few_groups else 1
    restart, begun_at = place_of(out / STATE)
    is_told = not (restart or begun_at)

    def progress(iteration: int, inertia: Tensor) -> None:
        nonlocal is_told
        if not is_told:
            of_run = f" of run {restart + 1} of {num_restarts}" if num_restarts > 1 else ""
            print(
                f"k-means continues after iteration {begun_at} of at most {args.iters}{of_run}",
                file=sys.stderr,
            )
            is_told = True
        check_signals()

    try:
        return kmeans(
            rows,
            k,
            num_iters=args.iters,
            tol=0,
            num_restarts=num_restarts,
            init="k-means++" if few_groups else "random",
            seed=args.seed,
            weights=weights,
            progress=progress,
            on_rows=lambda *_: check_signals(),
            state=out / STATE,
            warn=False,
        )
    except OtherCallError as error:
        raise ValueError(
            f"--out: {printable(str(out))} holds a run of k-means with other "
            f"{', '.join(error.different)}; choose another folder, or begin again with --overwrite"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake prints one line and gives 2, a signal 128 + its number."""
    return run_command(lambda: run(cluster_parser().parse_args(argv)), PROG)


if __name__ == "__main__":
    sys.exit(main())
