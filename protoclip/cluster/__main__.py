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
from protoclip.cluster.output import (
    CENTROIDS,
    CSV,
    LEFT_OUT,
    PROG,
    STATE,
    check_output,
    open_output,
    write_files,
)
from protoclip.cluster.page import make_page
from protoclip.cluster.points import (
    BLOCK,
    Points,
    blocks_of,
    encode_pictures,
    float_dtype,
    open_source,
    read_points,
)
from protoclip.common.files import (
    plural,
    printable,
    printable_lines,
    say_left_out,
    write_atomic,
)
from protoclip.common.paths import check_exists
from protoclip.common.sealed import is_sealed
from protoclip.common.signals import StopSignals, stop_if_asked
from protoclip.common.waits import Wait
from protoclip.distributed import run_command
from protoclip.features import FeatureRows
from protoclip.lloyd import Clusters, kmeans
from protoclip.lloyd.state import OtherCallError, place_of, remove_state
from protoclip.model import choose_device
from protoclip.report import page
from protoclip.settings.commands import cluster_parser

PLUS_PLUS = 1024  # largest K for which k-means++ runs three times


def run(args: argparse.Namespace) -> None:
    """Run the command: features, K, k-means, and files."""
    check_exists(args.data, "DATA", "check the path")
    out = Path(args.out)
    names = [CSV, LEFT_OUT, CENTROIDS, page.NAME]
    check_output(out, names, args.overwrite)
    began_at = time.perf_counter()
    points = open_source(args)
    is_encoded = points.stored is None
    if is_encoded:
        from protoclip.encode.encoders import clip_encoders  # imports open_clip

        images, _ = clip_encoders(args)
        check_k(args.k, len(points.source))  # before hours of encoding
    with open_output(out, names, args.overwrite):
        if args.overwrite and (out / STATE).exists() and is_sealed(out / STATE):
            remove_state(out / STATE)
        if is_encoded:
            points = encode_pictures(points, images, args, out)
        points = read_points(points, args)
        if not is_encoded:
            noun = "picture" if "images" in points.shown else "row"
            say_left_out(list(points.left_out.values()), len(points.source), noun)
        next_step = "the same command continues"
        if is_encoded:
            next_step = "the features are kept, and the same command continues with them"
        with StopSignals() as signals:
            write_groups(
                args,
                out,
                points,
                began_at,
                lambda: stop_if_asked(signals, f"before its end; {next_step}"),
            )


def write_groups(
    args: argparse.Namespace,
    out: Path,
    points: Points,
    began_at: float,
    check_signals: Callable[[], None],
) -> None:
    """K, k-means, and the files; ``began_at``: on the clock of ``time.perf_counter``.
    ``check_signals`` ends it; once k-means has come to its end, so does the run."""
    rows = points.rows
    if isinstance(rows, Tensor):
        rows = rows.to(choose_device(args.device))
    features_done_at = time.perf_counter()
    chosen = choose_k(args.k, rows, args.seed, check_signals)
    k = chosen.k
    row_bytes = rows.shape[1] * float_dtype(rows).itemsize
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
    centroids = clusters.centroids
    blocks = zip(blocks_of(rows), clusters.labels.split(BLOCK), strict=True)
    squared_distances = [
        (block.to(centroids.device) - centroids[block_labels]).square().sum(1)
        for block, block_labels in blocks
    ]
    labels = clusters.labels.cpu()
    notes = [*points.notes, *converged_or_not(clusters, args.iters)]
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if empty_groups := fewer_groups(labels, k):
        print(f"note: {empty_groups}", file=sys.stderr)
    groups = Groups.of(labels, torch.cat(squared_distances).cpu())
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


def converged_or_not(clusters: Clusters, iterations: int) -> list[str]:
    """A sentence if k-means was stopped by --iters; none if it converged before."""
    if clusters.converged:
        return []
    return [
        f"k-means stopped after {plural(iterations, 'iteration')} before it converged; --iters "
        "sets a larger number."
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake prints one line and gives 2, a signal 128 + its number."""
    return run_command(lambda: run(cluster_parser().parse_args(argv)), PROG)


if __name__ == "__main__":
    sys.exit(main())
