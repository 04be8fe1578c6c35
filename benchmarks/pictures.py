"""Pictures from records: speed beside peers, what the default run has learnt, and small batches.

    python -m benchmarks.pictures        all pictures of docs/, and their alt texts
    python -m benchmarks.pictures RUN    the same, after a new record of what RUN has learnt

RUN is a run folder of ``protoclip train`` on the built-in icons; its record holds no more than the
pictures show. The pictures are vectors in the colours of the reader's theme, on a ground of their
own, and can be read at 400 pixels. README's alt texts are their titles.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from benchmarks.report import (
    RESULTS,
    ROOT,
    Record,
    Row,
    digits,
    headline_cases,
    mib,
    newest_cpu,
    sizes,
)
from benchmarks.study import small_batches
from benchmarks.study.protocol import finished
from benchmarks.study.report import PRIMARY, TOWERS
from benchmarks.study.small_batches_report import (
    SHORT_TOWERS,
    Gained,
    enough_seeds,
    gained_at_one_rate,
    gained_by_batch,
    picture_title,
    runs_of,
    seeds_by_batch,
)
from protoclip.common.files import write_atomic
from protoclip.data.icons import FAMILIES, builtin_icons
from protoclip.report.snapshot import Snapshot, load_snapshot
from protoclip.settings.config import parse_json

DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", DOCS / "evidence.md")  # with pictures
LEARNT = RESULTS / "default_run" / "pictures.json"
WIDTH, MARGIN = 440, 12  # of every picture in its own units; GitHub shrinks it on a narrow screen
GROUPS, MEMBERS = 8, 5  # groups of icons, and icons of each
NEAREST = 3  # names of an icon
SHOWN = ("InfoNCE and gradient, bf16", "SigLIP", "prototype", "k-means")  # of README's cases
LINE = 18  # between two lines of text
LABEL = 27  # letters of a group's words
STYLE = """
.ground { fill: #ffffff; }
text { font: 14px system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; fill: #1c2430; }
.icon { color: #1c2430; }
.muted { fill: #5d6875; font-size: 13px; }
.head { font-weight: 600; }
.right { fill: #0a7a43; font-weight: 600; }
.ours { fill: #c8501e; }
.peer { fill: #2a78d6; }
@media (prefers-color-scheme: dark) {
  .ground { fill: #0d1117; }
  text { fill: #e4e8ed; }
  .icon { color: #e4e8ed; }
  .muted { fill: #9aa5b1; }
  .right { fill: #5cc48d; }
  .ours { fill: #ee8a56; }
  .peer { fill: #5b9fee; }
}
"""


class Answer(TypedDict):
    """One of the nearest names of a drawing."""

    name: str
    right: bool


class NamedDrawing(TypedDict):
    """A drawing that the model has never seen, with its own name and the nearest ones."""

    drawing: str
    name: str
    answers: list[Answer]


class Group(TypedDict):
    """A group of training drawings: its size, the words in common, and those nearest its mean."""

    samples: int
    words: str
    drawings: list[str]


class Learnt(TypedDict):
    """What the pictures show of a run, with the drawings themselves."""

    run: dict[str, Any]  # its settings and versions, for the reader of the record
    classes: int  # names to choose from
    named: list[NamedDrawing]
    clusters: int
    groups: list[Group]  # the largest
    groups_run: dict[str, Any]  # the run that they are of, as in ``run``
    drawings: dict[str, str]  # key in builtin:icons -> SVG


def picture(title: str, height: float, parts: Sequence[str]) -> str:
    """An SVG with a title for those who cannot see it.

    The ground is the page's own colour on GitHub, and keeps the text readable on any other.
    """
    edge, wide, high = -MARGIN, WIDTH + 2 * MARGIN, height + 2 * MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high:g}" '
        f'viewBox="{edge} {edge} {wide} {high:g}" role="img" aria-label="{escape(title)}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n"
        f'<rect x="{edge}" y="{edge}" width="{wide}" height="{high:g}" rx="8" class="ground"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """A line of text that begins at (x, y)."""
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{style}>{escape(words)}</text>'


def shown_peers(record: Record) -> dict[str, list[Row]]:
    """README's cases that the picture shows, ours first, then the others from fast to slow."""
    panels = {}
    for name, rows in headline_cases(record).items():
        if name.startswith(SHOWN):
            compared = [row for row in rows[1:] if row["ratio"] is not None]
            panels[name] = [rows[0], *sorted(compared, key=lambda row: row["ratio"])]
    return panels


def variant(row: Row) -> str:
    return "protoclip" if row["ratio"] is None else str(row["variant"])


def cost(row: Row) -> str:
    """Time, ours in milliseconds and another's as a multiple of ours, and extra memory."""
    ratio = row["ratio"]
    time = f"{digits(row['median_ms'])} ms" if ratio is None else f"{digits(ratio, 2)}×"
    return f"{time}, {mib(row)}"


def machine(record: Record) -> str:
    run = record["runs"][-1]
    return f"{run['machine']}, {run['date'][:10]}"


def draw_peers(record: Record) -> str:
    """Time and extra memory of each peer beside ours, a panel for each case."""
    left, longest = 150, 150
    y = 12.0
    parts = [text(0, y, "Time, and extra memory. × : times as long as protoclip", "muted")]
    for name, rows in shown_peers(record).items():
        slowest = max(row["ratio"] or 1.0 for row in rows)
        y += 28
        parts.append(text(0, y, name, "head"))
        parts.append(text(0, y + 16, sizes(rows[0]), "muted"))
        y += 22
        for row in rows:
            length = longest * (row["ratio"] or 1.0) / slowest
            name = "ours" if row is rows[0] else "peer"
            parts.append(text(0, y + 14, variant(row)))
            parts.append(
                f'<rect x="{left}" y="{y + 3:g}" width="{length:.1f}" height="13" class="{name}"/>'
            )
            parts.append(text(left + length + 6, y + 14, cost(row)))
            y += 20
    y += 20
    parts.append(text(0, y, machine(record), "muted"))
    return picture(peers_title(record), y + 2, parts)


def peers_title(record: Record) -> str:
    """The picture of peers in sentences: its alt text."""
    panels = [
        f"{name}, {sizes(rows[0])}: {'; '.join(f'{variant(row)} {cost(row)}' for row in rows)}"
        for name, rows in shown_peers(record).items()
    ]
    return (
        "Time and extra memory of protoclip and of other implementations on a CPU "
        f"({machine(record)}); × is times as long as protoclip. {'. '.join(panels)}."
    )


class Drawings:
    """The drawings of ``builtin:icons`` by key, found by what a run's page shows of them."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.dataset = builtin_icons()
        self.by_caption: dict[str, list[int]] = {}
        for i in range(len(self.dataset)):
            self.by_caption.setdefault(self.dataset.captions(i)[0], []).append(i)

    def key(self, item: Mapping[str, Any]) -> str:
        """The key of an item of the page; ValueError if it is not of these drawings."""
        stream = io.BytesIO(base64.b64decode(self.snapshot.pictures[item["picture"]]))
        with Image.open(stream) as opened:
            thumbnail = np.asarray(opened.convert("L"), dtype=np.float32)
        distances = {}
        for i in self.by_caption.get(item["caption"], ()):
            drawn = np.asarray(self.dataset.image(i).convert("L"), dtype=np.float32)
            if drawn.shape == thumbnail.shape:
                distances[i] = float(np.abs(drawn - thumbnail).mean())
        if not distances:
            raise ValueError(f"{item['caption']}: not a drawing of builtin:icons; name such a run")
        return self.dataset.keys[min(distances, key=lambda i: distances[i])]


def learnt(folder: Path, earlier: Learnt | None = None) -> Learnt:
    """What the pictures show of a run; the groups of a run without image prototypes are those of
    ``earlier``.

    Raises:
        ValueError: not a finished run on the icons, or without groups where ``earlier`` has none.
    """
    snapshot = load_snapshot(folder)
    if not snapshot.named:
        raise ValueError(f"expected a finished run on builtin:icons, found none in {folder}")
    drawings = Drawings(snapshot)
    named: list[NamedDrawing] = [
        {
            "drawing": drawings.key(shown["query"]),
            "name": shown["own"],
            "answers": [
                {"name": answer["caption"], "right": answer["hit"]}
                for answer in shown["answers"][:NEAREST]
            ],
        }
        for shown in snapshot.named["shown"]
    ]
    config = parse_json((folder / "config.json").read_text(encoding="utf-8"))
    facts = {name: snapshot.facts[name] for name in ("protoclip", "torch", "cpu")}
    weight = config["loss"]["w_proto"]
    run = {"method": config["method"], "w_proto": weight, "seed": config["run"]["seed"], **facts}
    block = image_groups(snapshot)
    groups_run = run
    if block is not None:
        clusters = block["clusters"]
        groups = [recorded_group(card, drawings) for card in block["cards"][:GROUPS]]
    elif earlier is not None:
        clusters, groups = earlier["clusters"], earlier["groups"]
        groups_run = earlier["groups_run"]
    else:
        raise ValueError("expected a run with image prototypes (--w-proto 1), found none")
    keys = {drawing["drawing"] for drawing in named}
    keys.update(*(group["drawings"] for group in groups))
    sources = {
        "/".join(filter(None, (icon.family, icon.style, icon.name))): icon.svg
        for read_family in FAMILIES.values()
        for icon in read_family()
    }
    return {
        "run": run,
        "classes": snapshot.named["classes"],
        "named": named,
        "clusters": clusters,
        "groups": groups,
        "groups_run": groups_run,
        "drawings": {key: sources[key] for key in sorted(keys)},
    }


def image_groups(snapshot: Snapshot) -> Mapping[str, Any] | None:
    """The page's clusters of image features; None if the run had none."""
    return next((block for block in snapshot.clusters if block["name"] == "image"), None)


def recorded_group(card: Mapping[str, Any], drawings: Drawings) -> Group:
    """A group of the page, with its drawings by name."""
    return {
        "samples": card["samples"],
        "words": card["words"],
        "drawings": [drawings.key(item) for item in card["images"][:MEMBERS]],
    }


def nested(source: str, x: float, y: float, side: float) -> str:
    """An icon's SVG at a place inside another one, in the colour of its text."""
    whole = re.search(r"<svg\b([^>]*)>(.*)</svg>", source, re.S)
    if whole is None:
        raise ValueError(f"expected an SVG, got {source[:60]!r}")
    attributes, content = whole.groups()
    style = dict(re.findall(r'([\w-]+)="([^"]*)"', attributes))
    for name in ("width", "height", "class", "xmlns", "x", "y", "aria-hidden", "data-slot"):
        style.pop(name, None)
    style.setdefault("fill", "currentColor")
    words = " ".join(f'{name}="{value}"' for name, value in style.items())
    content = re.sub(r"<!--.*?-->", "", content, flags=re.S)
    content = re.sub(r'"(#0f172a|#000000|#000|black)"', '"currentColor"', content, flags=re.I)
    content = re.sub(r"\s*\n\s*", "", content)
    return (
        f'<svg x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" class="icon" {words}>'
        f"{content}</svg>"
    )


def draw_names(record: Learnt) -> str:
    """The unseen drawings, each with its nearest names, right and wrong as they come."""
    parts: list[str] = []
    side, height, column = 56, 84, WIDTH / 2
    for place, drawing in enumerate(record["named"]):
        x, y = (place % 2) * column, (place // 2) * height
        parts.append(nested(record["drawings"][drawing["drawing"]], x, y + 2, side))
        for rank, answer in enumerate(drawing["answers"]):
            words = f"{rank + 1}. {answer['name']}" + (" ✓" if answer["right"] else "")
            name = "right" if answer["right"] else ""
            parts.append(text(x + side + 14, y + 14 + rank * LINE, words, name))
        if not any(answer["right"] for answer in drawing["answers"]):
            words = f"(it is: {drawing['name']})"
            parts.append(text(x + side + 14, y + 14 + NEAREST * LINE, words, "muted"))
    rows = (len(record["named"]) + 1) // 2
    return picture(names_title(record), rows * height - 10, parts)


def names_title(record: Learnt) -> str:
    """The picture of names in a sentence: its alt text."""
    named = record["named"]
    first = [drawing["name"] for drawing in named if drawing["answers"][0]["right"]]
    missed = [drawing["name"] for drawing in named if not drawing["answers"][0]["right"]]
    sentence = (
        f"{len(named)} drawings of a family of icons that the model has never seen, each with its "
        f"{NEAREST} nearest of {record['classes']} names. Right at once: {', '.join(first)}"
    )
    return sentence + (f". Not at once: {', '.join(missed)}." if missed else ".")


def draw_groups(record: Learnt) -> str:
    """The largest groups of the image features, with the drawings nearest to the mean of each."""
    parts: list[str] = []
    side, gap, height, column = 36, 5, 76, WIDTH / 2
    for place, group in enumerate(record["groups"]):
        x, y = (place % 2) * column, (place // 2) * height
        parts.append(text(x, y + 12, group_label(group), "muted"))
        for number, key in enumerate(group["drawings"]):
            parts.append(nested(record["drawings"][key], x + number * (side + gap), y + 22, side))
    rows = (len(record["groups"]) + 1) // 2
    return picture(groups_title(record), rows * height - 14, parts)


def group_label(group: Group) -> str:
    """A group's size, and as many of its words as fit on a line."""
    words = group["words"].split(", ")
    while len(words) > 1 and len(", ".join(words)) > LABEL:
        words.pop()
    return f"{group['samples']}: {', '.join(words) or '(no word in common)'}"


def groups_title(record: Learnt) -> str:
    """The picture of groups in a sentence: its alt text."""
    labels = "; ".join(group_label(group) for group in record["groups"])
    return (
        f"The {len(record['groups'])} largest of {record['clusters']} groups of drawings that "
        f"training made, with their size and the words that set each apart. {labels}."
    )


def draw_small_batches(gained: Gained, at_one_rate: Gained) -> str:
    """A panel for each metric: mean and interval of each tower at each batch, beside zero, which is
    CLIP; few seeds are pale, and a ring is the mean if CLIP has the other's learning rate."""
    towers = list(gained)
    shown = [(tower, batch) for tower in towers for batch in gained[tower][PRIMARY[0]]]
    deltas = {
        (metric, tower, batch): delta
        for tower, of_tower in gained.items()
        for metric, of_metric in of_tower.items()
        for batch, delta in of_metric.items()
    }
    left, height, gap = 74, 104, 12  # of the metrics' names, of a panel, and between two towers
    column = (WIDTH - left - gap * (len(towers) - 1)) / len(shown)
    places = {
        (tower, batch): left + 6 + column * place + gap * towers.index(tower)
        for place, (tower, batch) in enumerate(shown)
    }
    unit = (height / 2 - 6) / max(abs(delta.mean) + delta.half for delta in deltas.values())
    zeros = {metric: LINE + height * (n + 0.5) for n, metric in enumerate(PRIMARY)}
    parts = [text(0, 14, "gain over CLIP (the line) for the same CPU time, 95 %", "muted")]
    for metric, zero in zeros.items():
        parts.append(text(0, zero + 5, metric, "head"))
        parts.append(
            f'<rect x="{left}" y="{zero:g}" width="{WIDTH - left}" height="1" class="muted"/>'
        )
    for (metric, tower, batch), delta in deltas.items():
        x, zero = places[tower, batch], zeros[metric]
        mean, top = zero - unit * delta.mean, zero - unit * (delta.mean + delta.half)
        pale = "" if enough_seeds(tower, delta.seeds) else ' opacity="0.45"'
        parts.append(
            f'<rect x="{x - 1:g}" y="{top:g}" width="2" height="{2 * unit * delta.half:g}" '
            f'class="ours"{pale}/><circle cx="{x:g}" cy="{mean:g}" r="4" class="ours"{pale}/>'
        )
        base = zero - 5 if abs(mean - zero) < 12 else mean + 5  # not across the line
        parts.append(text(x + 6, base, f"{delta.mean:+.3f}".replace("0.", "."), "muted"))
    for tower, of_tower in at_one_rate.items():
        for metric, of_metric in of_tower.items():
            for batch, delta in of_metric.items():
                x, y = places[tower, batch], zeros[metric] - unit * delta.mean
                parts.append(
                    f'<circle cx="{x:g}" cy="{y:g}" r="5" class="icon" fill="none" '
                    'stroke="currentColor" stroke-width="1.5"/>'
                )
    bottom = len(PRIMARY) * height + 2 * LINE
    parts.append(text(0, bottom, "batch", "muted"))
    for (tower, batch), x in places.items():
        parts.append(text(x - 4, bottom, f"{batch:,}"))
        if batch == min(gained[tower][PRIMARY[0]]):
            parts.append(text(x - 4, bottom + LINE, SHORT_TOWERS[tower], "head"))
    bottom += LINE
    for tower, of_tower in gained.items():
        bottom += LINE
        words = f"{SHORT_TOWERS[tower]}: {seeds_by_batch(of_tower)}"
        parts.append(text(0, bottom, words + (" (pale)" if ";" in words else ""), "muted"))
    if at_one_rate:
        bottom += LINE
        parts.append(
            text(0, bottom, "○ if CLIP has their learning rate, not that of tuning", "muted")
        )
    return picture(picture_title(gained, at_one_rate), bottom + 6, parts)


def with_alt_texts(page: str, drawn: Mapping[str, str]) -> str:
    """A page whose pictures have their titles as alt texts."""
    for name, content in drawn.items():
        title = content.partition("<title>")[2].partition("</title>")[0]
        for target in (f"](docs/{name})", f"]({name})"):  # in README, and in a page of docs/
            before, there, after = page.partition(target)
            if there:
                page = f"{before[: before.rindex('![')]}![{title}{target}{after}"
    return page


def draw(record: Learnt) -> dict[str, str]:
    """Every picture by its file's name."""
    drawn = {"names.svg": draw_names(record), "groups.svg": draw_groups(record)}
    speed = newest_cpu(json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json")))
    if speed is not None:
        drawn["peers.svg"] = draw_peers(speed)
    judged = [*finished(small_batches.RESULTS / "runs.jsonl", small_batches.Task).values()]
    by_tower = {tower: runs_of(judged, tower) for tower in TOWERS}
    if gained := gained_by_batch(by_tower):
        at_one_rate = gained_at_one_rate(judged, by_tower)
        drawn["small-batches.svg"] = draw_small_batches(gained, at_one_rate)
    return drawn


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pictures", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("run", nargs="?", type=Path, help="a run on builtin:icons to record")
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder to write to")
    parser.add_argument("--record", type=Path, default=LEARNT, help="of a run: read, or written")
    options = parser.parse_args(arguments)
    if options.run is not None:
        earlier: Learnt | None = None
        if options.record.is_file():
            earlier = json.loads(options.record.read_text(encoding="utf-8"))
        try:
            content = learnt(options.run, earlier)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        options.record.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.record, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    record: Learnt = json.loads(options.record.read_text(encoding="utf-8"))
    drawn = draw(record)
    for name, svg in drawn.items():
        write_atomic(options.out / name, svg)
    if options.out == DOCS:
        for page in PAGES:
            write_atomic(page, with_alt_texts(page.read_text(encoding="utf-8"), drawn))
    return 0


if __name__ == "__main__":
    sys.exit(main())
