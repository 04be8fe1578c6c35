"""``protoclip cluster DATA --k 50``: which pictures, or rows of features, belong together.

Writes clusters.csv (file, cluster, squared distance to its centroid, rank within it),
centroids.safetensors (``protoclip.Clusters.load`` reads it), report.html and, for pictures,
features.npz (for --features) to a folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import stat
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from protoclip.common.files import (
    lines_of,
    plural,
    printable,
    printable_lines,
    state_of,
    whole_files,
    write_atomic,
    write_csv,
)
from protoclip.common.json_text import parse_json
from protoclip.common.paths import check_above, check_exists
from protoclip.data import (
    DataError,
    Faults,
    PairDataset,
    Pictures,
    Subset,
    data_kind,
    open_dataset,
    readable,
)
from protoclip.data.folders import ImageFolder
from protoclip.distributed import run_command
from protoclip.episodes.teacher import SUFFIXES, read_rows, write_rows
from protoclip.evaluate.load import load_model, open_encoder
from protoclip.evaluate.results import Outcome
from protoclip.evaluate.tasks import Encoder
from protoclip.lloyd import choose_num_clusters, kmeans, numbers_to_try
from protoclip.model import Encoded, choose_device
from protoclip.report import page, snapshot
from protoclip.settings.commands import cluster_parser
from protoclip.settings.config import TABLE

PROG = "protoclip cluster"
CSV = "clusters.csv"
CENTROIDS = "centroids.safetensors"
FEATURES = "features.npz"
MARK = ".protoclip-cluster"  # says which files of a folder the command wrote
# OpenCLIP's own example.
MODEL = "ViT-B-32"
WEIGHTS = "laion2b_s34b_b79k"
MAPPED = 2000  # samples on the page's map
FACES = 400  # samples of which the map shows pictures at once (page.js); of more it shows dots
SHEET = 24  # pictures of a group on the page, where the map does not show all of them anyway
THUMB = 96  # pixels of a picture on the page
SHARP = 1500  # pictures of that size, at most; more are smaller, so that the page can be mailed
NAMED_GROUPS = 40  # groups whose names stand below the map
SILHOUETTE_ROWS = 3000  # --k auto: rows whose silhouettes are computed
LARGEST_K = 300  # --k auto
FEWEST = 6  # --k auto: rows
BLOCK = 65_536  # rows whose distances are computed at once
ROUNDING = 32  # relative deviations of the features of equal pictures, in units of the dtype's eps
PLUS_PLUS = 1024  # largest K for which k-means++ runs three times


class FeatureRows(PairDataset):
    """Rows of a file of features, as a data set without pictures."""

    def __init__(self, name: str, keys: Sequence[str], captions: Sequence[str]) -> None:
        self.name = name
        self.keys = keys
        self._captions = captions or keys

    def __len__(self) -> int:
        return len(self.keys)

    def captions(self, i: int) -> tuple[str, ...]:
        """The row's text, or its key."""
        return (self._captions[i],)

    def image(self, i: int) -> Any:
        raise DataError(f"{self.name}: features have no pictures")


@dataclass(frozen=True)
class Points:
    """The rows to cluster, and what they stand for."""

    dataset: PairDataset  # of length N
    rows: Tensor  # [N, D]
    of: str  # what the rows are, for the page
    shown: tuple[str, ...]  # what the dataset has: images, captions or names
    weights: Tensor | None  # float64 [N]


@dataclass(frozen=True)
class Groups:
    """The groups, with their members sorted by distance."""

    labels: Tensor  # int64 [N]
    squared: Tensor  # [N], squared distance to the own centroid
    order: np.ndarray  # int64 [N], rows by group, then distance
    ends: np.ndarray  # int64 [K], where each group ends in the order

    @classmethod
    def of(cls, labels: Tensor, squared: Tensor) -> Groups:
        """The groups of rows with these labels and distances, on the CPU."""
        order = np.lexsort((squared.numpy(), labels.numpy()))
        return cls(labels, squared, order, np.bincount(labels.numpy()).cumsum())

    def members(self, group: int) -> list[int]:
        """The rows of a group, from the nearest to the farthest."""
        start = self.ends[group - 1] if group else 0
        return self.order[start : self.ends[group]].tolist()


def run(args: argparse.Namespace) -> None:
    """Run the command: features, K, k-means, and files."""
    check_exists(args.data, "DATA", "check the path")
    out = Path(args.out)
    is_file = Path(args.data).suffix in SUFFIXES
    is_encoded = not (is_file or args.features)
    names = [CSV, CENTROIDS, page.NAME]
    if is_encoded:
        names.append(FEATURES)
    with open_output(out, names, args.overwrite):
        began_at = time.perf_counter()
        points = read_features(args) if is_file else encode_pictures(args)
        if is_encoded:
            with whole_files(out) as temporary:
                write_rows(temporary / FEATURES, points.rows.cpu().numpy(), points.dataset.keys)
                write_mark(temporary, out)
        write_groups(args, out, points, began_at)


def write_groups(args: argparse.Namespace, out: Path, points: Points, began_at: float) -> None:
    """K, k-means, and the files; ``began_at``: on the clock of ``time.perf_counter``."""
    rows = points.rows.to(choose_device(args.device))
    features_done_at = time.perf_counter()
    k, why = choose_k(args.k, rows, args.seed)
    centroid_bytes = k * rows.shape[1] * rows.element_size()
    kmeans_bytes = rows.nbytes + 4 * centroid_bytes + 32 * len(rows)
    print(
        f"{plural(len(rows), 'row')} of {plural(rows.shape[1], 'number')} into {k:,} groups{why}; "
        f"k-means needs {math.ceil(kmeans_bytes / 2**20):,} MiB",
        file=sys.stderr,
    )
    few_groups = k <= PLUS_PLUS
    num_restarts = 3 if few_groups else 1
    max_iterations = num_restarts * args.iters
    with tqdm(total=max_iterations, desc="k-means", unit=" iterations", disable=None) as bar:
        restarts_left = num_restarts

        def progress(iteration: int, inertia: Tensor) -> None:
            nonlocal restarts_left
            if iteration == 0:  # the run before may have come to rest early
                bar.total = bar.n + restarts_left * args.iters
                restarts_left -= 1
            bar.update()
            bar.set_postfix_str(f"inertia {float(inertia):.6g}")

        clusters = kmeans(
            rows,
            k,
            num_iters=args.iters,
            num_restarts=num_restarts,
            init="k-means++" if few_groups else "random",
            seed=args.seed,
            weights=points.weights,
            progress=progress,
        )
        bar.total = bar.n
    blocks = zip(rows.split(BLOCK), clusters.labels.split(BLOCK), strict=True)
    squared_distances = [
        (block_rows - clusters.centroids[block_labels]).square().sum(1)
        for block_rows, block_labels in blocks
    ]
    labels = clusters.labels.cpu()
    if empty_groups := fewer_groups(labels, k):
        print(f"note: {empty_groups}", file=sys.stderr)
    groups = Groups.of(labels, torch.cat(squared_distances).cpu())
    seconds = {
        "features": features_done_at - began_at,
        "k-means": time.perf_counter() - features_done_at,
    }
    with whole_files(out) as temporary:  # a table without its page helps nobody
        write_table(temporary / CSV, points.dataset.keys, groups)
        clusters.save(temporary / CENTROIDS)
        html = write_page(points, groups, k, seconds, why)
        write_atomic(temporary / page.NAME, printable_lines(html))
        write_mark(temporary, out)
    if args.link_to or args.copy_to:
        folder = Path(args.link_to or args.copy_to)
        write_folders(folder, points.dataset, groups, copy=bool(args.copy_to))
    name = printable(str(out))
    print(f"{clusters}\n{name}/{CSV}, {CENTROIDS}; look at {name}/{page.NAME}")


@contextlib.contextmanager
def open_output(out: Path, names: Sequence[str], overwrite: bool) -> Iterator[None]:
    """Make the folder in which files of these names will be written; ValueError if that would
    replace a file of others, or, without ``overwrite``, those of an earlier run. A new folder in
    which nothing was written goes again."""
    check_above(out / CSV, "--out")
    present = [name for name in names if (out / name).exists()]
    shown = printable(str(out))
    written = read_mark(out)
    if others := [name for name in present if written.get(name) != state_of(out / name)]:
        raise ValueError(
            f"--out: {shown} holds {', '.join(others)}, which {PROG} did not write there, or which "
            "changed since; choose a new folder"
        )
    if CSV in present and not overwrite:
        raise ValueError(
            f"--out: {shown} holds an earlier run of {PROG}; choose another folder, or replace it "
            "with --overwrite"
        )
    if FEATURES in present and not overwrite:
        raise ValueError(
            f"--out: {shown} holds the features of a run that did not end; go on from them with "
            f"--features {shown}/{FEATURES}, or replace them with --overwrite"
        )
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"--out: {shown} cannot be created ({error.strerror})") from error
    try:
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                out.rmdir()


def read_mark(out: Path) -> dict[str, tuple[int, ...]]:
    """The files that the command wrote in a folder, by name, with their state then."""
    try:
        written = parse_json((out / MARK).read_text(encoding="utf-8"))
        return {name: tuple(state) for name, state in written.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def write_mark(temporary: Path, out: Path) -> None:
    """Write the mark that ``out`` gets with the files in ``temporary``."""
    written = read_mark(out) | {file.name: state_of(file) for file in temporary.iterdir()}
    write_atomic(temporary / MARK, json.dumps(written))


def encode_pictures(args: argparse.Namespace) -> Points:
    """Unit features of the pictures, from the model or the file that the command line names."""
    if args.captions or args.normalize:
        expected = f"expected a file of features ({', '.join(SUFFIXES)})"
        raise ValueError(f"--captions, --normalize: {expected}, got {args.data}")
    sources = {
        "--run": args.run,
        "--model, --pretrained": args.model + args.pretrained,
        "--features": args.features,
    }
    source_flags = [flag for flag, value in sources.items() if value]
    if len(source_flags) > 1:
        raise ValueError(
            f"{source_flags[0]}: expected one source of features; leave out {source_flags[1]}"
        )
    path = Path(args.data)
    source_type = data_kind(args.data)
    is_image_folder = source_type == "folder"
    if not source_type:
        raise ValueError(
            "DATA: expected a folder of pictures, a .csv or .tsv, shards, .parquet files, "
            f"builtin:NAME or features ({', '.join(SUFFIXES)}), got {args.data}"
        )
    dataset: PairDataset
    if is_image_folder:
        dataset = ImageFolder(path)
    else:
        options = {name: value for name, value in vars(args).items() if name in TABLE}
        dataset = open_dataset(args.data, **options)
    for line in dataset.facts.left_out:
        print(line, file=sys.stderr)
    open_group_folder(args, dataset)
    numbers = dataset.picture_numbers()
    if len(np.unique(numbers)) < len(dataset):  # a table with a row for each caption
        dataset = Pictures(dataset, numbers)
    weights = read_weights(args.weights, len(dataset))
    shown = ("images",) if is_image_folder else ("images", "captions")
    if args.features:
        positions, rows = _features_from_file(Path(args.features), dataset)
        return Points(
            dataset=Subset(dataset, positions),
            rows=rows,
            of=f"the rows of {short(args.features)}",
            shown=shown,
            weights=None if weights is None else weights[positions],
        )
    name = args.run or args.model or MODEL
    pretrained = args.pretrained
    if name == MODEL and not pretrained:
        pretrained = WEIGHTS
    try:
        loaded = load_model(name, pretrained)
    except ValueError as error:
        if args.run or args.model or args.pretrained:
            raise
        raise ValueError(
            f"the weights {WEIGHTS} of {MODEL} cannot be downloaded here; give --run logs/NAME, "
            "--model NAME --pretrained FILE, or a file of features as DATA"
        ) from error
    check_k(args.k, len(dataset))  # before hours of encoding
    with open_encoder(loaded.model, args, "encoding") as encoder:
        positions, rows = _encoded(encoder, dataset)
    if len(positions) < len(dataset):
        weights = None if weights is None else weights[positions]
        dataset = Subset(dataset, positions)
    source = short(args.run) if args.run else f"{short(name)} ({short(pretrained)})"
    return Points(
        dataset=dataset,
        rows=F.normalize(rows, dim=1),
        of=f"the pictures' features by {source}",
        shown=shown,
        weights=weights,
    )


def _features_from_file(path: Path, dataset: PairDataset) -> tuple[list[int], Tensor]:
    """The positions of the pictures whose keys have features in a file, and these features."""
    array, keys = read_rows(path, "--features")
    row_of = {key: row for row, key in enumerate(keys or ())}
    positions = [i for i, key in enumerate(dataset.keys) if key in row_of]
    if len(positions) < 2 or len(row_of) != len(array):
        raise ValueError(f"--features: expected {FEATURES} of these pictures, got {path}")
    if missing := len(dataset) - len(positions):
        print(f"left out {plural(missing, 'picture')} without features in {path}", file=sys.stderr)
    rows = array[[row_of[dataset.keys[i]] for i in positions]]
    return positions, as_rows(rows)


def as_rows(array: np.ndarray) -> Tensor:
    """Features as fp32, or as fp64 where fp32 may not hold all of their digits."""
    dtype = np.float32 if np.can_cast(array.dtype, np.float32) else np.float64
    return torch.from_numpy(array.astype(dtype, copy=False))


def _encoded(encoder: Encoder, dataset: PairDataset) -> tuple[list[int], Tensor]:
    """The positions of the pictures that can be read, and their rows; names the others."""
    noted = Faults(dataset, max_fraction=1.0, report=lambda _: None)  # they are named at the end
    try:
        rows = encoder.images(dataset, noted)  # others stand in for those that cannot be read
        positions = [i for i in range(len(dataset)) if i not in noted.positions]
        rows = rows[positions]
    except DataError:  # most of the pictures of a batch
        pairs, faults = readable(dataset)
        if len(pairs) < 2 or not faults:
            raise
        for i, fault in faults.items():
            noted.note(i, fault)
        positions = [i for i in range(len(dataset)) if i not in faults]
        rows = encoder.images(pairs)
    if noted.positions:
        count = len(noted.positions)
        if len(positions) < 2:
            raise DataError(noted.reasons[0])
        lines = [f"left out {count:,} of {plural(len(dataset), 'picture')}:", *noted.reasons]
        if more := count - len(noted.reasons):
            lines.append(f"and {more:,} more")
        print(printable_lines("\n  ".join(lines)), file=sys.stderr)
    return positions, rows


def read_features(args: argparse.Namespace) -> Points:
    """The rows of a features file."""
    if args.run or args.model or args.pretrained or args.features:
        raise ValueError("--run, --model, --pretrained, --features: drop them, DATA has features")
    if not Path(args.data).is_file():
        raise ValueError(f"DATA: expected a file of features, found no file {args.data}")
    array, keys = read_rows(Path(args.data), "DATA")
    captions: list[str] = []
    if args.captions:
        try:
            captions = lines_of(Path(args.captions).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--captions: expected a text file in UTF-8, got {error}") from error
    for name, texts in (("captions", captions), ("keys", keys or ())):
        if texts and len(texts) != len(array):
            raise ValueError(
                f"--{name}: expected one for each of the {len(array):,} rows of {args.data}, got "
                f"{len(texts):,}"
            )
    rows = as_rows(array)
    if args.normalize:
        rows = F.normalize(rows, dim=1)
    keys = keys or [str(i) for i in range(len(rows))]
    dataset = FeatureRows(args.data, keys, captions)
    open_group_folder(args, dataset)
    return Points(
        dataset=dataset,
        rows=rows,
        of=f"the rows of {short(args.data)}",
        shown=("captions",) if captions else ("names",),
        weights=read_weights(args.weights, len(rows)),
    )


def read_weights(path: str, n: int) -> Tensor | None:
    """The weights of n pictures or rows, unreadable ones included, from one number per line."""
    if not path:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8").split()
        weights = torch.tensor([float(line) for line in lines], dtype=torch.float64)
    except (OSError, ValueError) as error:
        raise ValueError(f"--weights: expected one number a line in {path}, got {error}") from error
    if len(weights) != n:
        expected = f"a number for each of the {n:,} pictures or rows"
        raise ValueError(f"--weights: expected {expected} in {path}, got {len(weights):,}")
    if not bool((weights >= 0).all() and weights.isfinite().all() and weights.any()):
        raise ValueError(f"--weights: expected numbers from 0 on, not all 0, in {path}")
    return weights


def open_group_folder(args: argparse.Namespace, dataset: PairDataset) -> None:
    """Make the folder of --link-to or --copy-to; ValueError if it will not do."""
    if not (args.link_to or args.copy_to):
        return
    flag = "--link-to" if args.link_to else "--copy-to"
    folder = Path(args.link_to or args.copy_to)
    if not dataset.path(0):
        raise ValueError(
            f"{flag}: expected a folder of pictures or a table of files as DATA, got {args.data}; "
            "leave the flag out"
        )
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{flag}: expected a new or empty folder, but {folder} is in use")
    check_above(folder / "0", flag)
    probe = folder / "link"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if args.link_to:
            probe.symlink_to("nowhere")
            probe.unlink()
    except OSError as error:
        reason = f"{folder} cannot hold links ({error.strerror}); use --copy-to"
        if args.copy_to or not folder.is_dir():
            reason = f"{folder} cannot be created ({error.strerror})"
        raise ValueError(f"{flag}: {reason}") from error


def write_folders(folder: Path, dataset: PairDataset, groups: Groups, copy: bool) -> None:
    """Put links to the files of each group, or copies, into a folder named by its number.

    ``folder`` is empty. Where files of a group have one name, the nearest to the centroid keeps it.
    """
    numbers = groups.labels.unique().tolist()
    width = len(str(numbers[-1]))
    with whole_files(folder) as temporary:
        for group in tqdm(numbers, "groups as folders", leave=False, disable=None):
            group_folder = temporary / f"{group:0{width}}"
            group_folder.mkdir()
            files = list(dict.fromkeys(dataset.path(i) for i in groups.members(group)))
            for file, name in zip(files, different_names(files), strict=True):
                if copy:
                    shutil.copyfile(file, group_folder / name)
                    with contextlib.suppress(OSError):  # a disk without such times or permissions
                        shutil.copystat(file, group_folder / name)
                        mode = stat.S_IMODE(os.stat(file).st_mode) & 0o777
                        os.chmod(group_folder / name, mode)  # without another user's set-user-ID
                else:
                    (group_folder / name).symlink_to(os.path.abspath(file))


def different_names(files: Sequence[str]) -> list[str]:
    """The names of files, numbered where one has come before: x.png, x (2).png. Upper and lower
    case are not told apart, as on the disks of cameras."""
    used_names: set[str] = set()
    repeats: Counter[str] = Counter()  # how often each name has come before
    names = []
    for file in files:
        base_name = os.path.basename(file)
        stem, ending = os.path.splitext(base_name)
        name = base_name
        while name.casefold() in used_names:
            repeats[base_name.casefold()] += 1
            name = f"{stem} ({repeats[base_name.casefold()] + 1}){ending}"
        used_names.add(name.casefold())
        names.append(name)
    return names


def check_k(k_text: str, n: int) -> None:
    """ValueError if n pictures or rows cannot have so many groups."""
    if k_text == "auto" and n < FEWEST:
        raise ValueError(
            f"--k auto: expected at least {FEWEST} pictures or rows, got {n}; give --k, such as "
            "--k 2"
        )
    if k_text != "auto" and not (k_text.isdecimal() and 2 <= int(k_text) <= n):
        raise ValueError(f"--k: expected auto or 2 to N = {n:,} groups, got {k_text}")


def choose_k(k_text: str, rows: Tensor, seed: int) -> tuple[int, str]:
    """K, and the reason for it; "auto": by ``choose_num_clusters``."""
    check_k(k_text, len(rows))
    if k_text != "auto":
        return int(k_text), ""
    candidates = numbers_to_try(min(SILHOUETTE_ROWS, len(rows)), LARGEST_K)
    with tqdm(total=len(candidates), desc="choosing K", leave=False, disable=None) as bar:

        def progress(number: int, silhouette: float) -> None:
            bar.update()

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
    choice = f"of 2 to {candidates[-1]}, the number with the largest mean silhouette"
    return k, f" ({choice}, {silhouettes[k]:.3f})"


def write_table(path: Path, keys: Sequence[str], groups: Groups) -> None:
    """Write clusters.csv; rank 1 is nearest to the centroid. A name that a spreadsheet would take
    for a formula begins with "./"."""
    rank = np.empty(len(keys), dtype=np.int64)
    counts = np.diff(groups.ends, prepend=0)
    rank[groups.order] = np.arange(len(keys)) - np.repeat(groups.ends - counts, counts) + 1
    names = (f"./{key}" if key.startswith(tuple("=+@-")) else key for key in keys)
    rows = zip(names, groups.labels.tolist(), groups.squared.tolist(), rank.tolist(), strict=True)
    header = ("file", "cluster", "squared_distance", "rank")
    write_csv(path, header, ((key, k, f"{d:.7g}", r) for key, k, d, r in rows))


def fewer_groups(labels: Tensor, k: int) -> str:
    """A sentence about groups that stayed empty; "" if none did."""
    nonempty = len(labels.unique())
    if nonempty == k:
        return ""
    return (
        f"{nonempty:,} of {plural(k, 'group')} {'has' if nonempty == 1 else 'have'} members; the "
        "others stayed empty, as they do where there are fewer different rows than groups"
    )


def explained(points: Points, squared: Tensor) -> str:
    """A sentence about the share of the variance that lies between the groups."""
    weights = torch.ones(len(squared)) if points.weights is None else points.weights.cpu()
    shares = (weights.double() / weights.sum())[:, None]
    blocks = list(zip(points.rows.split(BLOCK), shares.split(BLOCK), strict=True))

    def mean_of(function: Callable[[Tensor], Tensor]) -> Tensor:
        """The weighted mean of a function of the rows, block by block: fp64 of all is large."""
        sums = [(share * function(rows.cpu().double())).sum(0) for rows, share in blocks]
        return torch.stack(sums).sum(0)

    mean = mean_of(lambda rows: rows)
    total = float(mean_of(lambda rows: (rows - mean).square()).sum())
    rounding = ROUNDING * torch.finfo(points.rows.dtype).eps
    if total <= rounding**2 * float(mean_of(Tensor.square).sum()):
        return "The rows are equal up to rounding, so there is no variance to account for."
    within = float((shares[:, 0] * squared.double()).sum())
    return f"The groups account for {max(0.0, 1 - within / total):.0%} of the variance."


def short(path: str) -> str:
    """The last part of a path: the command on the page has the whole."""
    return Path(path).name or path


def write_page(
    points: Points, groups: Groups, k: int, seconds: Mapping[str, float], why: str
) -> str:
    """The report page: a summary, every group, and the map."""
    labels = groups.labels
    counts = labels.bincount()
    counts = counts[counts > 0]
    noun = "picture" if "images" in points.shown else "row"
    text = [
        f"{plural(len(labels), noun)} of {short(points.dataset.name)} in "
        f"{plural(len(counts), 'group')}{why}; "
        f"the smallest has {int(counts.min()):,}, the largest {int(counts.max()):,}, the median "
        f"{float(counts.double().quantile(0.5)):,.10g}.",
        f"Grouped by k-means on {points.of}. {explained(points, groups.squared)}",
    ]
    if empty_groups := fewer_groups(labels, k):
        text.append(f"{empty_groups[0].upper()}{empty_groups[1:]}.")
    dataset = points.dataset
    images = len(labels) if len(labels) <= FACES else SHEET
    shown = min(len(labels), images * len(counts))
    thumbs = snapshot.Thumbnails(THUMB if shown <= SHARP else snapshot.SIDE)
    nearness = dict.fromkeys(points.shown, -groups.squared)
    block = snapshot.cluster_block(
        dataset,
        labels,
        nearness,
        thumbs,
        all_clusters=labels,
        all_labels=dataset.labels,
        images=images,
    )
    for card in block["cards"]:
        card["members"] = [printable(dataset.keys[i]) for i in groups.members(card["cluster"])]
        tiny = [thumbs.tiny[item["picture"]] for item in card.get("images", ())]
        card["duplicates"] = snapshot.near_duplicates(tiny)
    if number := sum(len(card["duplicates"]) for card in block["cards"]):
        text.append(
            f"{plural(number, 'picture')} marked ≈ {'looks' if number == 1 else 'look'} nearly the "
            "same as another of the group."
        )
    mapped = snapshot.every(torch.arange(len(labels)), MAPPED)
    mapped_rows = points.rows[mapped.to(points.rows.device)].cpu()
    encoded = Encoded(image=mapped_rows, text=mapped_rows[:0])
    samples = snapshot.Samples(
        dataset=Subset(dataset, mapped),
        encoded=encoded,
        projected=encoded,
        clusters={"k-means": labels[mapped]},
    )
    plane = snapshot.plane(
        samples, thumbs if "images" in points.shown else None, reads=len(mapped) <= FACES
    )
    words = {card["cluster"]: card["words"] for card in block["cards"]}
    if plane and len(groups.ends) <= NAMED_GROUPS and any(words.values()):
        names = [words.get(group) or f"group {group}" for group in range(len(groups.ends))]
        times = Counter(names)
        names = [
            f"{name} #{group}" if times[name] > 1 else name for group, name in enumerate(names)
        ]
        plane["by"]["cluster (k-means)"]["names"] = names
    page_content = snapshot.Snapshot(
        pictures=thumbs.made,
        clusters=[{"name": "k-means", "of": points.of, **block}],
        plane=plane,
        facts={**snapshot.environment(), "command": shlex.join(["protoclip", *sys.argv[1:]])},
    )
    name = short(dataset.name)
    outcome = Outcome(dataset.name, "", "", {}, seconds=seconds)
    return page.render([page.Run(name, None, {}, outcome, snapshot=page_content)], text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake prints one line and gives status 2."""
    return run_command(lambda: run(cluster_parser().parse_args(argv)), PROG)


if __name__ == "__main__":
    sys.exit(main())
