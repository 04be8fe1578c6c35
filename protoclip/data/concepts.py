"""emoji.tsv as values: what each emoji is called and where Unicode puts it."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from importlib import resources

LANGUAGES = ("de", "es", "fr", "it", "pt")


@dataclass(frozen=True)
class Concept:
    """One row of emoji.tsv."""

    key: str  # code points in hexadecimal, joined by "-"
    text: str  # the characters themselves
    group: str
    subgroup: str
    captions: tuple[str, ...]  # the English label first


@functools.cache
def table() -> tuple[Concept, ...]:
    """All concepts in Unicode's order."""
    file = resources.files("protoclip.data").joinpath("emoji.tsv")
    with file.open(encoding="utf-8") as lines:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return tuple(
            Concept(r["hexcode"], r["emoji"], r["group"], r["subgroup"], _captions(r)) for r in rows
        )


def _captions(row: dict[str, str]) -> tuple[str, ...]:
    label = row["label"]
    tags = [tag for tag in row["tags"].split("|") if tag and tag != label]
    captions = [label, *(f"{label}, {tag}" for tag in tags)]
    if len(tags) > 1:
        captions.append(", ".join(tags))
    captions += [row[f"label_{language}"] for language in LANGUAGES]
    return tuple(dict.fromkeys(caption for caption in captions if caption))
