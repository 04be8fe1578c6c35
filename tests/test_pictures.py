"""The front page's pictures: made from records and from a run's page, readable as vectors."""

import json
import re
from xml.etree import ElementTree

import pytest

from benchmarks import pictures
from benchmarks.report import RESULTS, newest_cpu
from protoclip.data.icons import builtin_icons
from protoclip.report.snapshot import Snapshot, Thumbnails, save_snapshot

SVG = "{http://www.w3.org/2000/svg}"


def texts_of(svg):
    """(x, words) of each line of text; the picture must be well-formed XML."""
    found = ElementTree.fromstring(svg).iter(f"{SVG}text")
    return [(float(one.get("x")), one.text) for one in found]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder whose page shows two unseen drawings and one group of eight drawings."""
    icons, thumbs = builtin_icons(), Thumbnails()
    place = {key: i for i, key in enumerate(icons.keys)}
    anchor, bug = (
        thumbs.item(icons, place[f"lucide/{name}"], side=128) for name in ("anchor", "bug")
    )
    answers = ["guitar", "key", "cloud moon rain", "bug", "sun"]
    shown = [
        {"query": anchor, "own": "anchor", "answers": [{"caption": "anchor", "hit": True}] * 5},
        {
            "query": bug,
            "own": "bug",
            "answers": [{"caption": name, "hit": name == "bug"} for name in answers],
        },
    ]
    group = [key for key in icons.keys if key.startswith("phosphor/") and key.endswith("/star")]
    group += [key for key in icons.keys if key.startswith("heroicons/")][: 8 - len(group)]
    images = [thumbs.item(icons, place[key]) for key in group]
    card = {"cluster": 0, "samples": 21, "words": "star, sky", "images": images, "captions": []}
    folder = tmp_path_factory.mktemp("run")
    snapshot = Snapshot(
        pictures=thumbs.made,
        clusters=[{"name": "image", "clusters": 1, "cards": [card]}],
        named={"label": "concept", "classes": 430, "shown": shown},
    )
    save_snapshot(folder, snapshot)
    return folder, group


def test_the_pictures_of_a_run(run, tmp_path):
    folder, group = run
    assert pictures.main([str(folder), "--out", str(tmp_path)]) == 0
    names, groups = ((tmp_path / name).read_text() for name in ("names.svg", "groups.svg"))
    words = [text for _, text in texts_of(names)]
    assert words[:3] == ["1. anchor ✓"] + ["2. anchor ✓", "3. anchor ✓"]
    assert words[3:] == ["1. guitar", "2. key", "3. cloud moon rain", "(it is: bug)"]
    assert "Right at once: anchor. Not at once: bug." in names
    assert texts_of(groups) == [(0.0, "21: star, sky")]
    drawings = pictures.Drawings(pictures.load_snapshot(folder))
    for key in group[: pictures.MEMBERS]:  # the very drawing, in the colour of the text
        path = re.search(r'<path[^>]* d="([^"]{20})', drawings.sources[key])[1]
        assert path in groups, key
    for svg in (names, groups):
        inner = list(ElementTree.fromstring(svg).iter(f"{SVG}svg"))[1:]
        assert inner and all(one.get("class") == "icon" for one in inner)
        assert "currentColor" in svg and "prefers-color-scheme: dark" in svg and "<image" not in svg


@pytest.mark.parametrize("name", ["peers.svg", "names.svg", "groups.svg"])
def test_the_pictures_of_the_front_page_fit_and_are_described(name):
    svg = (pictures.DOCS / name).read_text(encoding="utf-8")
    for x, words in texts_of(svg):  # a letter of 13 pixels is at most 8 wide, on average
        assert x + 7.2 * len(words) <= pictures.WIDTH + 20, words
    title = ElementTree.fromstring(svg).find(f"{SVG}title").text
    assert f"![{title}](docs/{name})" in pictures.README.read_text(encoding="utf-8")


def test_the_peers_are_those_of_the_newest_record():
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    fresh = pictures.draw_peers(newest_cpu(found))
    assert fresh == (pictures.DOCS / "peers.svg").read_text(encoding="utf-8"), "make pictures"
    words = [text for _, text in texts_of(fresh)]
    assert words.count("protoclip") == len(pictures.SHOWN) and "open_clip" in words


def test_a_run_of_other_data_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        pictures.main([str(tmp_path), "--out", str(tmp_path)])
    assert "expected a finished run on builtin:icons" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.svg"))
