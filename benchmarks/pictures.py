"""Pictures of docs/ from records: speed compared with other implementations, and unseen drawings.

    python -m benchmarks.pictures    both pictures, and README's alt texts (the pictures' titles)

The pictures are vectors in the colours of the reader's theme, on a ground of their own, and can be
read at 400 pixels.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TypedDict
from xml.sax.saxutils import escape

from benchmarks.report import (
    RESULTS,
    ROOT,
    Record,
    Row,
    case_name,
    cases,
    digits,
    headline_cases,
    lost_cases,
    mib,
    newest_cpu,
    newest_per_machine,
    others,
    sizes,
)
from protoclip.common.files import write_atomic

DOCS = ROOT / "docs"
README = ROOT / "README.md"
LEARNT = RESULTS / "default_run" / "pictures.json"
WIDTH, MARGIN = 440, 12  # of every picture in its own units; GitHub shrinks it on a narrow screen
NEAREST = 3  # names of an icon
SHOWN = (  # of README's cases
    "InfoNCE and gradient, bf16", "SigLIP", "prototype", "k-means", "training step",
)  # fmt: skip
LINE = 18  # between two lines of text
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


class Learnt(TypedDict):
    """What a run on ``builtin:icons`` has learnt, with the drawings themselves."""

    classes: int  # names to choose from
    named: list[NamedDrawing]
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
            panels[name] = [rows[0], *others(rows)]
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


def draw_peers(record: Record, which: str) -> str:
    """Time and extra memory of each peer beside ours, a panel for each case, and the cases in which
    a peer is faster. ``which``: which machine it is, of how many."""
    left, longest = 150, 150
    y = 12.0
    parts = [text(0, y, "Time, and extra memory. × = time relative to protoclip", "muted")]
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
    lost = lost_cases(record)
    if lost:
        y += 28
        parts.append(
            text(0, y, f"A peer is faster in {len(lost)} of {compared(record)} cases", "head")
        )
        for row in lost:
            y += 18
            parts.append(text(0, y, case_name(row), "muted"))
            y += 16
            parts.append(text(left, y, f"{row['variant']}: {digits(row['ratio'], 2)}×"))
    y += 26
    parts.append(text(0, y, machine(record), "muted"))
    y += LINE
    parts.append(text(0, y, which, "muted"))
    return picture(peers_title(record, which), y + 2, parts)


def compared(record: Record) -> int:
    """The cases of a record that have a peer."""
    return sum(bool(others(group)) for group in cases(record["rows"]))


def peers_title(record: Record, which: str) -> str:
    """The picture of peers in a sentence: its alt text."""
    panels = []
    for name, rows in shown_peers(record).items():
        ratios = [digits(row["ratio"], 2) for row in (rows[1], rows[-1])]
        panels.append(f"{name.partition(',')[0]} {' to '.join(dict.fromkeys(ratios))}×")
    return (
        f"Times of other implementations relative to protoclip's, {machine(record)}: "
        f"{'; '.join(panels)}. A peer is faster in {len(lost_cases(record))} of {compared(record)} "
        f"cases. This is {which}; all numbers: benchmarks/results/speed.md."
    )


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


def with_alt_texts(page: str, drawn: Mapping[str, str]) -> str:
    """README with the titles of its pictures as alt texts."""
    for name, content in drawn.items():
        title = content.partition("<title>")[2].partition("</title>")[0]
        before, target, after = page.partition(f"](docs/{name})")
        if target:
            page = f"{before[: before.rindex('![')]}![{title}{target}{after}"
    return page


def which_machine(records: Sequence[Record]) -> str:
    count = len(newest_per_machine(records))
    return f"the newest record of {count} machines" if count > 1 else "the record of one machine"


def draw() -> dict[str, str]:
    """Every picture by its file's name."""
    drawn = {"names.svg": draw_names(json.loads(LEARNT.read_text(encoding="utf-8")))}
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    speed = newest_cpu(records)
    if speed is not None:
        drawn["peers.svg"] = draw_peers(speed, which_machine(records))
    return drawn


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pictures", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.parse_args(arguments)
    drawn = draw()
    for name, svg in drawn.items():
        write_atomic(DOCS / name, svg)
    write_atomic(README, with_alt_texts(README.read_text(encoding="utf-8"), drawn))
    return 0


if __name__ == "__main__":
    sys.exit(main())
