"""The front page's pictures: made from records, readable as vectors, described in words."""

import dataclasses
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import pictures
from benchmarks.report import RESULTS, between, mib, newest_cpu
from benchmarks.study import default_run
from protoclip.data.icons import FAMILIES, builtin_icons
from protoclip.report.snapshot import Snapshot, Thumbnails, load_snapshot, save_snapshot
from protoclip.settings.config import TrainConfig, to_dict

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"


def texts_of(svg):
    """(x, words) of each line of text; the picture must be well-formed XML."""
    texts = ElementTree.fromstring(svg).iter(f"{SVG}text")
    return [(float(element.get("x")), element.text) for element in texts]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder whose page shows two unseen drawings and one group of eight drawings."""
    icons = builtin_icons()
    thumbs = Thumbnails()
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
        facts={"protoclip": "0.1.0", "torch": "2.13.0", "cpu": "a CPU", "python": "3.11"},
    )
    save_snapshot(folder, snapshot)
    (folder / "config.json").write_text(json.dumps(to_dict(TrainConfig())))
    return folder, group


@pytest.fixture(scope="module")
def drawn(run, tmp_path_factory):
    """The pictures of that run, and its record."""
    out = tmp_path_factory.mktemp("drawn")
    record = out / "record" / "pictures.json"
    assert pictures.main([str(run[0]), "--out", str(out), "--record", str(record)]) == 0
    return out, record


def test_the_pictures_of_a_run(run, drawn):
    _, group = run
    out, _ = drawn
    names, groups = ((out / name).read_text() for name in ("names.svg", "groups.svg"))
    words = [text for _, text in texts_of(names)]
    assert words[:3] == ["1. anchor ✓"] + ["2. anchor ✓", "3. anchor ✓"]
    assert words[3:] == ["1. guitar", "2. key", "3. cloud moon rain", "(it is: bug)"]
    assert "Right at once: anchor. Not at once: bug." in names
    assert texts_of(groups) == [(0.0, "21: star, sky")]
    sources = {
        f"{icon.family}/{icon.style}/{icon.name}".replace("//", "/"): icon.svg
        for read in FAMILIES.values()
        for icon in read()
    }
    for key in group[: pictures.MEMBERS]:  # the very drawing, in the colour of the text
        path = re.search(r'<path[^>]* d="([^"]{20})', sources[key])[1]
        assert path in groups, key
    for svg in (names, groups):
        inner = list(ElementTree.fromstring(svg).iter(f"{SVG}svg"))[1:]
        assert inner and all(one.get("class") == "icon" for one in inner)
        assert "currentColor" in svg and "prefers-color-scheme: dark" in svg and "<image" not in svg


def test_a_run_without_image_prototypes_keeps_the_recorded_groups(run, drawn, tmp_path):
    snapshot = load_snapshot(run[0])
    without = [{**block, "name": "external"} for block in snapshot.clusters]
    save_snapshot(tmp_path, dataclasses.replace(snapshot, clusters=without))
    (tmp_path / "config.json").write_text((run[0] / "config.json").read_text())
    flags = [str(tmp_path), "--out", str(tmp_path), "--record", str(tmp_path / "pictures.json")]
    with pytest.raises(SystemExit):
        pictures.main(flags)
    (tmp_path / "pictures.json").write_text(drawn[1].read_text())
    assert pictures.main(flags) == 0
    assert (tmp_path / "groups.svg").read_text() == (drawn[0] / "groups.svg").read_text()


def test_the_record_makes_the_same_pictures_without_the_run(drawn, tmp_path):
    out, record = drawn
    assert pictures.main(["--out", str(tmp_path), "--record", str(record)]) == 0
    for name in ("names.svg", "groups.svg", "peers.svg"):
        assert (tmp_path / name).read_text() == (out / name).read_text(), name


def test_the_pictures_are_those_of_the_records():
    record = json.loads(pictures.LEARNT.read_text(encoding="utf-8"))
    fresh = pictures.draw(record)
    assert fresh.keys() == {"names.svg", "groups.svg", "peers.svg", "small-batches.svg"}
    for name, svg in fresh.items():
        assert svg == (pictures.DOCS / name).read_text(encoding="utf-8"), "make pictures"
    for page in pictures.PAGES:
        text = page.read_text(encoding="utf-8")
        assert pictures.with_alt_texts(text, fresh) == text, "make pictures"


@pytest.mark.parametrize("name", ["peers.svg", "names.svg", "groups.svg", "small-batches.svg"])
def test_the_pictures_of_the_front_page_fit_and_are_described(name):
    svg = (pictures.DOCS / name).read_text(encoding="utf-8")
    for x, words in texts_of(svg):  # a letter of 14 pixels is 8 wide, on average at most
        assert "…" not in words and x + 8 * len(words) <= pictures.WIDTH + 20, words
    root = ElementTree.fromstring(svg)
    assert root[2].get("class") == "ground"  # readable on a page of any colour
    title = root.find(f"{SVG}title").text
    texts = [page.read_text(encoding="utf-8") for page in pictures.PAGES]
    assert any(re.search(rf"!\[{re.escape(title)}\]\((docs/)?{name}\)", text) for text in texts)


def test_the_words_for_the_peers_have_every_number_that_is_drawn():
    speed = newest_cpu(json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json")))
    panels = pictures.shown_peers(speed)
    assert len(panels) == len(pictures.SHOWN)
    title = pictures.peers_title(speed)
    svg = pictures.draw_peers(speed)
    drawn = [text for _, text in texts_of(svg)]
    assert drawn.count("protoclip") == len(panels) and "open_clip" in drawn
    for rows in panels.values():
        for row in rows:
            assert pictures.cost(row) in drawn and mib(row) in pictures.cost(row)
            assert f"{pictures.variant(row)} {pictures.cost(row)}" in title


def test_a_group_without_common_words_says_so_and_others_fit():
    words = "clipping, receipt, invoice, vault, newspaper"
    group = {"samples": 14, "words": words, "drawings": []}
    assert pictures.group_label(group) == "14: clipping, receipt, invoice"
    assert pictures.group_label(group | {"words": ""}) == "14: (no word in common)"


def test_a_run_of_other_data_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        pictures.main([str(tmp_path), "--out", str(tmp_path), "--record", str(tmp_path / "no")])
    assert "expected a finished run on builtin:icons" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_table_of_the_default_run_is_that_of_the_record():
    recorded = json.loads(default_run.RECORD.read_text(encoding="utf-8"))
    assert all(len(seeds) >= 5 for seeds in recorded["seeds"].values())
    page = ROOT / "docs" / "evidence.md"
    _, written, _ = between(page, default_run.BEGIN, default_run.END)
    assert written.strip() == default_run.evidence_table(recorded).strip()


def test_a_difference_of_seeds_is_welch_s():
    title = "NEW: zero-shot, 430 names"
    seeds = {
        "protoclip": {"0": {title: 0.5}, "1": {title: 0.6}},
        "clip at equal time": {"0": {title: 0.3}, "1": {title: 0.4}},
    }
    delta = default_run.difference({"seeds": seeds}, title)
    # Two degrees of freedom: t = 4.303; the standard error is the root of 0.005 / 2 + 0.005 / 2.
    assert delta.mean == pytest.approx(0.2)
    assert delta.half_width == pytest.approx(4.3027 * 0.005**0.5, rel=1e-4)


def default_run_folder(folder, method, seed, epochs, score):
    """A folder with what the record needs of a run; every metric is ``score``."""
    metrics = {part: {"metrics": {}} for part in ("NEW", "HO")}
    for metric in default_run.METRICS:
        metrics[metric.part]["metrics"][metric.name] = score
    floors = dict.fromkeys(default_run.FLOORS, metrics)
    folder.mkdir()
    config = {"method": method, "run": {"seed": seed}, "optim": {"epochs": epochs}}
    (folder / "config.json").write_text(json.dumps(config))
    results = {"trained": metrics, "untrained": metrics, "floors": floors}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_clip_with_more_epochs_is_the_row_of_equal_time(tmp_path):
    runs = [
        default_run_folder(tmp_path / f"{method}-{epochs}-{seed}", method, seed, epochs, score)
        for method, epochs, score in (("clip", 30, 0.5), ("clip", 28, 0.3), ("protoclip", 28, 0.4))
        for seed in range(2)
    ]
    recorded = default_run.record(runs, "abc")
    assert recorded["epochs"] == {"protoclip": 28, "clip": 28, "clip at equal time": 30}
    title = default_run.METRICS[0].title
    assert default_run.of_seeds(recorded, "clip", title) == [0.3, 0.3]
    assert default_run.of_seeds(recorded, "clip at equal time", title) == [0.5, 0.5]


REFUSED = [
    ("siglip", 28, "expected --method protoclip or clip, got siglip"),
    ("clip", 27, "expected 28 epochs or more, got 27"),
    ("clip", 31, "expected 30 epochs .*, got 31"),
    ("clip", 28, "expected two seeds or more of protoclip, got 1"),
]


@pytest.mark.parametrize(("method", "epochs", "words"), REFUSED)
def test_a_run_that_stands_in_no_row_is_refused(tmp_path, method, epochs, words):
    runs = [
        default_run_folder(tmp_path / "0", "protoclip", 0, 28, 0.4),
        default_run_folder(tmp_path / "1", "clip", 0, 30, 0.5),
        default_run_folder(tmp_path / "2", method, 1, epochs, 0.5),
    ]
    with pytest.raises(ValueError, match=words):
        default_run.record(runs, "abc")
