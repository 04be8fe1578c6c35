"""The front page's pictures: made from records, readable as vectors, described in words."""

import json
from xml.etree import ElementTree

import pytest

from benchmarks import pictures
from benchmarks.report import RESULTS, case_name, digits, lost_cases, mib, newest_cpu

SVG = "{http://www.w3.org/2000/svg}"


def texts_of(svg):
    """(x, words) of each line of text; the picture must be well-formed XML."""
    texts = ElementTree.fromstring(svg).iter(f"{SVG}text")
    return [(float(element.get("x")), element.text) for element in texts]


DRAWING = '<svg viewBox="0 0 8 8" width="8"><path d="M1 1h6v6z" fill="#000"/></svg>'


def test_names_are_drawn_right_and_wrong():
    anchor = [{"name": "anchor", "right": True}]
    bug = [{"name": "guitar", "right": False}, {"name": "key", "right": False}]
    record = {
        "classes": 430,
        "named": [
            {"drawing": "lucide/anchor", "name": "anchor", "answers": anchor},
            {"drawing": "lucide/bug", "name": "bug", "answers": bug},
        ],
        "drawings": {"lucide/anchor": DRAWING, "lucide/bug": DRAWING},
    }
    svg = pictures.draw_names(record)
    assert [words for _, words in texts_of(svg)] == [
        "1. anchor ✓", "1. guitar", "2. key", "(it is: bug)"
    ]  # fmt: skip
    assert "Right at once: anchor. Not at once: bug." in svg
    inner = list(ElementTree.fromstring(svg).iter(f"{SVG}svg"))[1:]
    assert [icon.get("class") for icon in inner] == ["icon", "icon"]
    assert all(icon.get("fill") == "currentColor" for icon in inner)  # the colour of the text
    assert "M1 1h6v6z" in svg and "prefers-color-scheme: dark" in svg


def test_the_pictures_are_those_of_the_records():
    fresh = pictures.draw()
    assert fresh.keys() == {"names.svg", "peers.svg"}
    for name, svg in fresh.items():
        assert svg == (pictures.DOCS / name).read_text(encoding="utf-8"), "make pictures"
    text = pictures.README.read_text(encoding="utf-8")
    assert pictures.with_alt_texts(text, fresh) == text, "make pictures"


@pytest.mark.parametrize("name", ["peers.svg", "names.svg"])
def test_the_pictures_of_the_front_page_fit_and_are_described(name):
    svg = (pictures.DOCS / name).read_text(encoding="utf-8")
    for x, words in texts_of(svg):  # a letter of 14 pixels is 8 wide, on average at most
        assert "…" not in words and x + 8 * len(words) <= pictures.WIDTH + 20, words
    root = ElementTree.fromstring(svg)
    assert root[2].get("class") == "ground"  # readable on a page of any colour
    title = root.find(f"{SVG}title").text
    assert f"![{title}](docs/{name})" in pictures.README.read_text(encoding="utf-8")


def test_every_peer_is_drawn_and_the_alt_text_has_the_range_of_each_case():
    speed = newest_cpu(json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json")))
    panels = pictures.shown_peers(speed)
    assert len(panels) == len(pictures.SHOWN)
    title = pictures.peers_title(speed, "the newest record of 4 machines")
    svg = pictures.draw_peers(speed, "the newest record of 4 machines")
    drawn = [text for _, text in texts_of(svg)]
    assert drawn.count("protoclip") == len(panels) and "open_clip" in drawn
    for rows in panels.values():
        for row in rows:
            assert pictures.cost(row) in drawn and mib(row) in pictures.cost(row)
        ratios = sorted(row["ratio"] for row in rows[1:])
        assert f"{digits(ratios[0], 2)}" in title and f"{digits(ratios[-1], 2)}×" in title
    lost = lost_cases(speed)
    assert lost and all(row["ratio"] < 1 for row in lost)
    for row in lost:  # the chart left out whatever a peer won
        assert case_name(row) in drawn and f"{row['variant']}: {digits(row['ratio'], 2)}×" in drawn
    assert f"A peer is faster in {len(lost)} of " in title and "of 4 machines" in title
