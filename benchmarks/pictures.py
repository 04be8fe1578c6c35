"""README's pictures, from records: speed beside peers, and what a run on icons has learnt.

    python -m benchmarks.pictures        docs/peers.svg, from the newest record of a CPU
    python -m benchmarks.pictures RUN    and docs/names.svg and docs/groups.svg

RUN is a run folder of ``protoclip train`` on the built-in icons. The pictures are vectors in the
colours of the reader's theme, and can be read at 400 pixels. README's alt texts are their titles.
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
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from benchmarks.report import (
    RESULTS,
    ROOT,
    Record,
    digits,
    headline_cases,
    mib,
    newest_cpu,
    sizes,
)
from protoclip.data.files import write_atomic
from protoclip.data.icons import FAMILIES, builtin_icons
from protoclip.report.snapshot import Snapshot, load_snapshot

DOCS, README = ROOT / "docs", ROOT / "README.md"
WIDTH = 480  # of every picture, in its own units; GitHub shrinks it on a narrow screen
GROUPS, MEMBERS = 8, 6  # groups of icons, and icons of each
NEAREST = 3  # names of an icon
PEERS_TITLE = "Time and extra memory of protoclip and of other implementations, on a CPU"
SHOWN = ("InfoNCE and gradient, bf16", "SigLIP", "prototype", "k-means")  # of README's cases
LINE = 17  # between two lines of text
STYLE = """
text { font: 13px system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; fill: #1c2430; }
.icon { color: #1c2430; }
.muted { fill: #5d6875; font-size: 12px; }
.head { font-weight: 600; }
.right { fill: #0a7a43; font-weight: 600; }
.ours { fill: #c8501e; }
.peer { fill: #2a78d6; }
@media (prefers-color-scheme: dark) {
  text { fill: #e4e8ed; }
  .icon { color: #e4e8ed; }
  .muted { fill: #9aa5b1; }
  .right { fill: #5cc48d; }
  .ours { fill: #ee8a56; }
  .peer { fill: #5b9fee; }
}
"""


def picture(title: str, height: float, parts: Sequence[str]) -> str:
    """An SVG of ``WIDTH`` with a title for those who cannot see it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" '
        f'viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """A line of text that begins at (x, y)."""
    own = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{own}>{escape(words)}</text>'


def draw_peers(record: Record) -> str:
    """Time and extra memory of each peer beside ours, a panel for each case."""
    parts: list[str] = []
    y, left, longest = 0.0, 142, 170
    for name, rows in headline_cases(record).items():
        if not name.startswith(SHOWN):
            continue
        compared = [row for row in rows[1:] if row["ratio"] is not None]
        shown = [rows[0], *sorted(compared, key=lambda row: row["ratio"])]
        slowest = max(row["ratio"] or 1.0 for row in shown)
        y += 20
        parts.append(text(0, y, f"{name}", "head"))
        parts.append(text(0, y + 15, sizes(rows[0]), "muted"))
        y += 21
        for row in shown:
            ours = row is rows[0]
            ratio = 1.0 if ours else row["ratio"]
            label = "protoclip" if ours else row["variant"]
            time = f"{digits(row['median_ms'])} ms" if ours else f"{digits(ratio, 2)}×"
            length = longest * ratio / slowest
            parts.append(text(0, y + 13, label))
            kind = "ours" if ours else "peer"
            parts.append(
                f'<rect x="{left}" y="{y + 2:g}" width="{length:.1f}" height="13" class="{kind}"/>'
            )
            parts.append(text(left + length + 6, y + 13, f"{time}, {mib(row)}"))
            y += 19
    run = record["runs"][-1]
    y += 22
    parts.append(text(0, y, f"{run['machine']}, {run['date'][:10]}", "muted"))
    return picture(PEERS_TITLE, y + 6, parts)


class Drawings:
    """The drawings of ``builtin:icons`` as SVG, found by what a run's page shows of them."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.dataset = builtin_icons()
        self.by_caption: dict[str, list[int]] = {}
        for i in range(len(self.dataset)):
            self.by_caption.setdefault(self.dataset.captions(i)[0], []).append(i)
        self.sources = {
            "/".join(filter(None, (icon.family, icon.style, icon.name))): icon.svg
            for read in FAMILIES.values()
            for icon in read()
        }

    def svg(self, item: Mapping[str, Any], x: float, y: float, side: float) -> str:
        """The drawing of an item of the page, as a nested SVG; ValueError if there is none."""
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
        best = min(distances, key=lambda i: distances[i])
        return nested(self.sources[self.dataset.keys[best]], x, y, side)


def nested(source: str, x: float, y: float, side: float) -> str:
    """An icon's SVG at a place inside another one, in the colour of its text."""
    whole = re.search(r"<svg\b([^>]*)>(.*)</svg>", source, re.S)
    if whole is None:
        raise ValueError(f"expected an SVG, got {source[:60]!r}")
    attributes, content = whole.groups()
    kept = dict(re.findall(r'([\w-]+)="([^"]*)"', attributes))
    for name in ("width", "height", "class", "xmlns", "x", "y", "aria-hidden", "data-slot"):
        kept.pop(name, None)
    kept.setdefault("fill", "currentColor")
    words = " ".join(f'{name}="{value}"' for name, value in kept.items())
    content = re.sub(r"<!--.*?-->", "", content, flags=re.S)
    content = re.sub(r'"(#0f172a|#000000|#000|black)"', '"currentColor"', content, flags=re.I)
    content = re.sub(r"\s*\n\s*", "", content)
    return (
        f'<svg x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" class="icon" {words}>'
        f"{content}</svg>"
    )


def draw_names(drawings: Drawings) -> str:
    """The page's unseen icons, each with its nearest names, right and wrong as they come."""
    named = drawings.snapshot.named
    parts: list[str] = []
    side, height, column = 52, 88, WIDTH / 2
    for place, one in enumerate(named["shown"]):
        x, y = (place % 2) * column, (place // 2) * height
        parts.append(drawings.svg(one["query"], x + 4, y + 8, side))
        answers = one["answers"][:NEAREST]
        for rank, answer in enumerate(answers):
            words = f"{rank + 1}. {answer['caption']}" + (" ✓" if answer["hit"] else "")
            kind = "right" if answer["hit"] else ""
            parts.append(text(x + side + 18, y + 20 + rank * LINE, words, kind))
        if not any(answer["hit"] for answer in answers):
            words = f"(it is: {one['own']})"
            parts.append(text(x + side + 18, y + 20 + NEAREST * LINE, words, "muted"))
    rows = (len(named["shown"]) + 1) // 2
    return picture(names_title(drawings.snapshot), rows * height, parts)


def names_title(snapshot: Snapshot) -> str:
    """The picture of names in a sentence: its alt text."""
    shown = snapshot.named["shown"]
    first = [one["own"] for one in shown if one["answers"][0]["hit"]]
    others = [one["own"] for one in shown if not one["answers"][0]["hit"]]
    sentence = (
        f"{len(shown)} drawings of a family of icons that the model has never seen, each with its "
        f"{NEAREST} nearest of {snapshot.named['classes']} names. Right at once: {', '.join(first)}"
    )
    return sentence + (f". Not at once: {', '.join(others)}." if others else ".")


def draw_groups(drawings: Drawings) -> str:
    """The largest groups of the image features, with the drawings nearest to the mean of each."""
    block = _image_groups(drawings.snapshot)
    parts: list[str] = []
    side, height, column = 32, 66, WIDTH / 2
    for place, card in enumerate(block["cards"][:GROUPS]):
        x, y = (place % 2) * column, (place // 2) * height
        words = f"{card['samples']}: {card['words']}"
        parts.append(text(x, y + 14, words if len(words) < 36 else words[:34] + "…", "muted"))
        for number, item in enumerate(card["images"][:MEMBERS]):
            parts.append(drawings.svg(item, x + number * (side + 5), y + 22, side))
    title = groups_title(drawings.snapshot)
    return picture(title, (GROUPS + 1) // 2 * height, parts)


def _image_groups(snapshot: Snapshot) -> Mapping[str, Any]:
    for block in snapshot.clusters:
        if block["name"] == "image":
            return block
    raise ValueError("expected a run with image prototypes (--method protoclip), found none")


def groups_title(snapshot: Snapshot) -> str:
    """The picture of groups in a sentence: its alt text."""
    block = _image_groups(snapshot)
    words = "; ".join(card["words"] for card in block["cards"][:GROUPS])
    return (
        f"The {GROUPS} largest of {block['clusters']} groups of drawings that training made, with "
        f"their size and the words that set each apart: {words}."
    )


def with_alt_texts(page: str, drawn: Mapping[str, str]) -> str:
    """A page whose pictures have their titles as alt texts."""
    for name, content in drawn.items():
        title = content.partition("<title>")[2].partition("</title>")[0]
        own = f"](docs/{name})"
        before, found, after = page.partition(own)
        if found:
            page = f"{before[: before.rindex('![')]}![{title}{own}{after}"
    return page


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pictures", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("run", nargs="?", type=Path, help="a run on builtin:icons")
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder to write to")
    options = parser.parse_args(arguments)
    drawn: dict[str, str] = {}
    record = newest_cpu(json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json")))
    if record is not None:
        drawn["peers.svg"] = draw_peers(record)
    if options.run is not None:
        snapshot = load_snapshot(options.run)
        if not snapshot.named:
            parser.error(f"expected a finished run on builtin:icons, found none in {options.run}")
        drawings = Drawings(snapshot)
        drawn |= {"names.svg": draw_names(drawings), "groups.svg": draw_groups(drawings)}
    for name, content in drawn.items():
        write_atomic(options.out / name, content)
    if options.out == DOCS:
        write_atomic(README, with_alt_texts(README.read_text(encoding="utf-8"), drawn))
    return 0


if __name__ == "__main__":
    sys.exit(main())
