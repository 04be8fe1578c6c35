"""The page about runs: what it says, shows and weighs; in a browser, where there is one."""

from __future__ import annotations

import base64
import csv
import io
import json
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from html_page import Element, in_browser, needs_browser, parse_page, pictures_in, read_page
from PIL import Image
from ranks import metrics
from report_run import make_run

from protoclip.cluster.__main__ import main as cluster
from protoclip.data import Labels, open_dataset
from protoclip.data.shapes import ShapesDataset
from protoclip.evaluate.results import read_results
from protoclip.evaluate.tasks import EvalSet
from protoclip.report import figures
from protoclip.report import page as reading
from protoclip.report.__main__ import main
from protoclip.report.page import write_report
from protoclip.report.snapshot import (
    Thumbnails,
    caption_of,
    confusions,
    every,
    geometry,
    load_snapshot,
    retrieval,
    words_of_clusters,
)
from protoclip.train import main as train
from protoclip.training.checks import LOGGED

SECTIONS = [
    "names", "summary", "curves", "prototypes", "map", "gap", "zeroshot", "retrieval", "churn",
    "cost", "settings",
]  # fmt: skip


RECALL = "text_retrieval_recall@5"


@pytest.fixture(autouse=True, scope="module")
def drawn_once() -> Iterator[None]:
    """Most pages show the same curves, and a chart takes a fiftieth of a second."""
    filters = reading.environment().filters
    with pytest.MonkeyPatch.context() as patch:
        for name in ("chart", "histogram"):
            patch.setitem(filters, name, remembered(filters[name]))
        yield


def remembered(draw: Callable[..., str]) -> Callable[..., str]:
    drawn: dict[bytes, str] = {}

    def draw_once(*arguments: Any) -> str:
        key = pickle.dumps(arguments)
        if key not in drawn:
            drawn[key] = draw(*arguments)
        return drawn[key]

    return draw_once


class Runs(NamedTuple):
    ours: Path  # ProtoCLIP
    plain: Path  # CLIP, with the same settings


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("logs")
    return Runs(
        ours=make_run(root / "ours", noise=0.6),
        plain=make_run(root / "plain", "clip", noise=3.0),
    )


@pytest.fixture(scope="module")
def page(runs: Runs) -> Element:
    """Of the ProtoCLIP run alone."""
    return read_page(write_report([runs.ours]))


@pytest.fixture(scope="module")
def compared(runs: Runs) -> Element:
    """Of CLIP and ProtoCLIP."""
    return read_page(write_report([runs.plain, runs.ours]))


@pytest.fixture
def copy(runs: Runs, tmp_path: Path) -> Path:
    """The ProtoCLIP run, to be changed."""
    return Path(shutil.copytree(runs.ours, tmp_path / "ours"))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


# ---- the command ----


@pytest.mark.smoke
def test_the_command_writes_the_page_and_says_the_answer(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(runs.ours)]) == 0
    output = capsys.readouterr()
    assert output.out.strip() == f"report: {runs.ours / 'report.html'}"
    assert (runs.ours / "report.html").is_file()
    assert re.fullmatch(r"ours: It correctly names \d+ % of drawings .*\n", output.err)


def test_the_page_of_several_runs_is_beside_the_last_ones_own(runs: Runs) -> None:
    own = write_report([runs.ours])
    before = own.read_bytes()
    assert write_report([runs.plain, runs.ours]) == runs.ours / "report-with-plain.html"
    assert own.read_bytes() == before


def test_a_comparison_with_runs_of_other_folders_has_a_name_of_its_own(
    runs: Runs, tmp_path: Path
) -> None:
    """Runs named alike in two folders: one comparison does not replace the other."""
    ours = shutil.copytree(runs.ours, tmp_path / "first" / "ours")
    first_clip = shutil.copytree(runs.plain, tmp_path / "first" / "clip")
    second_clip = shutil.copytree(runs.plain, tmp_path / "second" / "clip")
    assert write_report([first_clip, ours]) == ours / "report-with-clip.html"
    assert write_report([second_clip, ours]) == ours / "report-with-second-clip.html"
    many = [tmp_path / "first" / f"a run with a rather long name, seed {i}" for i in range(5)]
    assert len({reading.default_name([*many[:n], ours]) for n in (2, 3, 4, 5)}) == 4


def test_a_file_that_is_no_report_is_not_replaced(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = tmp_path / "rows.npy"
    np.save(features, np.eye(20, 4, dtype=np.float32))
    assert cluster([str(features), "--k", "2", "--out", str(tmp_path / "groups")]) == 0
    groups = tmp_path / "groups" / "report.html"  # made of the same template
    notes = copy / "report.html"
    notes.write_text("<html><title>my notes</title></html>")
    for path, flags in (
        (features, ["--out", str(features)]),
        (groups, ["--out", str(groups)]),
        (notes, []),
    ):
        before = path.read_bytes()
        capsys.readouterr()
        assert main([str(copy), *flags]) == 2
        assert (
            f"--out: {path} exists and is not a page of protoclip report" in capsys.readouterr().err
        )
        assert path.read_bytes() == before


def test_a_report_is_replaced_without_asking(runs: Runs, tmp_path: Path) -> None:
    """Also the page of a run whose name, in its title, begins with protoclip."""
    path = tmp_path / "page.html"
    assert main([str(runs.ours), "--out", str(path)]) == 0
    before = path.read_text()
    assert main([str(runs.plain), str(runs.ours), "--output", str(path)]) == 0
    assert path.read_text() != before
    run = shutil.copytree(runs.ours, tmp_path / "protoclip-mine")
    (run / "report.html").unlink(missing_ok=True)
    assert main([str(run)]) == main([str(run)]) == 0


def test_the_page_is_the_same_every_time_but_for_its_date(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    filters = reading.environment().filters
    monkeypatch.setitem(filters, "chart", figures.chart_svg)
    monkeypatch.setitem(filters, "histogram", figures.histogram_svg)
    written = re.compile(r"<p class=note>written .*?</p>")
    first = write_report([runs.ours]).read_text()
    second = write_report([runs.ours]).read_text()
    assert written.sub("", first) == written.sub("", second)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "expected a run folder"),
        ("{", "expected settings as JSON"),
        ("[]", "expected settings as JSON"),
    ],
    ids=["no settings", "torn settings", "a list"],
)
def test_folders_that_are_not_runs_are_refused_in_one_line(
    copy: Path, error_of: Callable[..., str], content: str | None, words: str
) -> None:
    (copy / "report.html").unlink(missing_ok=True)
    (copy / "config.json").unlink()
    if content is not None:
        (copy / "config.json").write_text(content)
    assert words in error_of(main, [copy])
    assert not (copy / "report.html").exists()


def test_an_example_shows_five_different_captions() -> None:
    """Each caption stands for two pictures."""
    ids = torch.arange(24) // 2
    text = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))[ids]
    eval_set = EvalSet(text + 0.1, text, torch.arange(24), caption_ids=ids)
    dataset = CaptionsOfTwo(24)
    to_captions = retrieval(dataset, eval_set, Thumbnails())[0]
    assert to_captions["to"] == "caption" and to_captions["queries"]
    for query in to_captions["queries"]:
        captions = [answer["caption"] for answer in query["answers"]]
        assert len(set(captions)) == len(captions) == 5 and query["answers"][0]["hit"]


class CaptionsOfTwo(ShapesDataset):
    """Pairs of pictures with one caption."""

    def captions(self, i: int) -> tuple[str, ...]:
        return (f"pair {i // 2}",)


# ---- what is on the page ----


def test_the_page_has_every_section(page: Element) -> None:
    assert page.sections == SECTIONS
    links = [link.attributes["href"] for link in page.one("nav").all("a")]
    assert links == [f"#{name}" for name in SECTIONS]


def test_the_page_needs_no_network(page: Element) -> None:
    for element in page.all():
        for name in ("src", "href"):
            address = element.attributes.get(name, "#")
            assert address.startswith(("data:", "#")), address
    assert not any("@import" in style.source for style in page.all("style"))


def test_the_page_holds_its_pictures(page: Element) -> None:
    pictures = pictures_in(page)
    assert len(pictures) > 50
    for picture in pictures[:3]:
        assert Image.open(io.BytesIO(base64.b64decode(picture))).format == "WEBP"
    assert len(page.all("img")) > 20


def test_the_page_says_how_to_repeat_the_run_and_what_it_took(page: Element) -> None:
    settings = page.section("settings")
    assert "--preset run.json" in settings.text and "builtin:shapes:300" in settings.text
    assert "1,024 MiB" in page.section("cost").text


def test_the_curves_are_drawn_in_the_colours_of_the_page(page: Element) -> None:
    curves = page.section("curves")
    titles = {caption.text for caption in curves.all("figcaption")}
    assert {"Loss (nats)", "Recall at 5", "Logit scale", "Learning rate"} <= titles
    assert "prefers-color-scheme: dark" in page.one("head").one("style").source
    chart = curves.all("svg")[0]
    styles = [value for element in chart.all() for value in element.attributes.values()]
    styles += [style.source for style in chart.all("style")]
    assert any("var(--c0)" in style for style in styles)
    fixed = [style for style in styles if re.search(r"#(?!000000)[0-9a-f]{6}\b", style)]
    assert fixed == []


def test_what_stayed_the_same_is_a_number_and_no_chart(copy: Path) -> None:
    lines = [
        {
            "step": step,
            "external_churn": 0.0,
            "external_clusters": 761.0,
            "image_clusters": clusters,
        }
        for step, clusters in ((60, 20.0), (90, 19.0))
    ]
    (copy / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    churn = read_page(write_report([copy])).section("churn")
    assert [caption.text for caption in churn.all("figcaption")] == ["Clusters in use"]
    (row,) = churn.one("table").all("tr")
    assert row.one("th").text.startswith("Churn Share of samples")
    assert row.one("td").text == "teacher churn 0"


def test_a_run_that_nobody_named_is_called_by_method_and_seed(runs: Runs, tmp_path: Path) -> None:
    folder = "2026_11_29-12_35_23-protoclip-seed_0"
    ours = Path(shutil.copytree(runs.ours, tmp_path / folder))
    page = read_page(write_report([runs.plain, ours]))
    assert page.one("h1").text == "protoclip: plain and protoclip, seed 0"
    assert page.text.count(folder) == 1  # where the run lies
    # Two that would have the same name keep those of their folders.
    other = Path(shutil.copytree(runs.ours, tmp_path / folder.replace("12_35", "12_36")))
    page = read_page(write_report([other, ours]))
    assert page.one("h1").text == f"protoclip: {other.name} and {ours.name}"


@pytest.mark.parametrize("times, shown", [((5, 2, 1), 2), ((1, 1), 0)])
def test_a_single_confusion_is_not_listed(copy: Path, times: tuple[int, ...], shown: int) -> None:
    report = read_json(copy / "report.json")
    entry = {"label": "group", "right": 0.5, "names": [f"class {i}" for i in range(30)]}
    entry["worst"] = [[i, i + 1, number] for i, number in enumerate(times)]
    (copy / "report.json").write_text(json.dumps(report | {"confusions": [entry]}))
    section = read_page(write_report([copy])).section("zeroshot")
    assert len(section.all("td", class_="num")) == shown
    assert ("No class was predicted as the same other class twice" in section.text) == (shown == 0)


def test_the_worst_confusions_of_many_classes_take_no_table() -> None:
    """Of 200,000 classes a table would have 4e10 cells."""
    vectors = torch.randn(200_000, 16, generator=torch.Generator().manual_seed(0))
    taken_for = {3: [50_000] * 3, 9: [100_000] * 2, 150_000: [150_000, 0]}
    ids = torch.tensor([c for c, guesses in taken_for.items() for _ in guesses])
    seen = torch.tensor([guess for guesses in taken_for.values() for guess in guesses])
    labels = {"class": Labels(ids, tuple(map(str, range(len(vectors)))))}
    eval_set = EvalSet(vectors[seen], vectors[:0], labels=labels, class_vectors={"class": vectors})
    (entry,) = confusions(eval_set)
    assert entry["worst"] == [(3, 50_000, 3), (9, 100_000, 2), (150_000, 0, 1)]
    assert entry["right"] == pytest.approx(1 / 7) and "table" not in entry


def test_cards_of_many_clusters_have_whole_rows_of_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "protoclip.report.snapshot.map_data", lambda *_: {}
    )  # no map: it takes long
    for pictures, each in ((7, 4), (5, 4), (8, 8), (3, 3)):
        monkeypatch.setattr("protoclip.report.snapshot.PICTURES", pictures * 36)  # image clusters
        blocks = load_snapshot(make_run(tmp_path / str(pictures))).clusters
        (block,) = [block for block in blocks if block["name"] == "image"]
        assert block["clusters"] == 36
        assert max(len(card["images"]) for card in block["cards"]) == each


def test_labels_are_those_of_scalars_that_a_run_writes(trained: Path) -> None:
    sets = read_results(trained / "results.json").trained
    written = figures.read_series(trained / "metrics.jsonl").keys() | LOGGED
    written |= {name for scores in sets.values() for name in scores.metrics}
    labels = [key for key, _ in figures.LEGEND if not key.startswith("val_")]
    assert [key for key in labels if not any(key in name for name in written)] == []
    assert figures.words_of("contrastive_loss") == "contrastive loss"


def test_lines_are_named_where_there_are_several(page: Element) -> None:
    keys = {key.text for legend in page.all("div", class_="legend") for key in legend.all("span")}
    assert {
        "contrastive loss",
        "prototype loss (own features)",
        "matching",
        "drawn at random",
    } <= keys
    assert "lr" not in keys


def test_the_first_section_has_ten_images_with_their_five_nearest_names(
    runs: Runs, page: Element
) -> None:
    names = page.section("names")
    assert page.sections[0] == "names"
    assert "nearest of 12 names" in names.text
    assert len(names.all("img")) == 10
    lists = names.all("ol")
    assert [len(answers.all("li")) for answers in lists] == [5] * 10
    missed = []
    for image in read_json(runs.ours / "report.json")["named"]["shown"]:
        captions = [answer["caption"] for answer in image["answers"]]
        assert len(set(captions)) == 5
        hits = [answer["caption"] for answer in image["answers"] if answer["hit"]]
        assert hits == [name for name in captions if name == image["own"]]
        if not hits:
            missed.append(image["own"])
    # The right name is marked, or below.
    assert [small.text for small in names.all("small")] == [f"right: {name}" for name in missed]
    assert len(names.all("li", class_="hit")) == 10 - len(missed) > 0


def test_one_answer_stands_on_top(runs: Runs, page: Element) -> None:
    metrics_of_set = read_json(runs.ours / "results.json")["trained"]["HO"]["metrics"]
    right = 100 * metrics_of_set["group/acc1"]
    answer = page.one("p", class_="answer")
    assert answer.text == f"It correctly names {right:.0f} % of drawings it has never seen."
    elements = page.all()
    assert elements.index(answer) < elements.index(page.one("nav"))


def scores(page: Element, words: str) -> list[Element]:
    """The cells of a score's line in the first table of the summary."""
    table = page.section("summary").all("table", class_="numbers")[0]
    lines = [line for line in table.all("tr") if line.all("abbr")]
    (line,) = [line for line in lines if line.one("abbr").text == words]
    return line.all("td")


def test_each_score_has_its_floor(runs: Runs, copy: Path) -> None:
    """The best of several, and in its tip all of them."""
    results = read_json(copy / "results.json")
    held_out = results["trained"]["HO"]
    results["floors"] = {
        "chance": {"HO": held_out | {"metrics": {"group/acc1": 1 / 12, RECALL: 0.02}}},
        "HOG": {"HO": held_out | {"metrics": {RECALL: 0.9}}},
        "frequent": {"HO": held_out | {"metrics": {"group/acc1": 0.123}}},
    }
    results["untrained"]["HO"]["metrics"] = {"group/acc1": 0.1}
    (copy / "results.json").write_text(json.dumps(results))
    page = read_page(write_report([runs.plain, copy]))
    floor, *_ = scores(page, "zero-shot group")
    assert floor.text.split() == ["0.123", "frequent"]
    tip = "chance 0.083, frequent 0.123, untrained 0.100"
    assert floor.one("span").attributes["title"] == tip
    floor, *_ = scores(page, "image → text R@5")
    assert floor.text.split() == ["0.900", "HOG"]
    answers = [answer.text for answer in page.all("p", class_="answer")]
    assert any(text.startswith("ours:") and text.endswith("(guessing: 8 %).") for text in answers)


def folded_away(page: Element) -> set[int]:
    """The elements of the summary that show only when a reader unfolds them."""
    parts = page.section("summary").all("details")
    closed = [part for part in parts if "open" not in part.attributes]
    return {id(element) for part in closed for element in part.all()}


def test_the_table_folds_after_its_headline_numbers(compared: Element) -> None:
    first, whole = compared.section("summary").all("table", class_="numbers")
    shown = [row.text for row in first.all("abbr")]
    assert shown[0].startswith("zero-shot") and "image → text R@5" in shown
    assert "modality gap" not in shown and len(shown) <= 6
    folded = folded_away(compared)
    assert id(first) not in folded and id(whole) in folded
    assert set(shown) < {row.text for row in whole.all("abbr")}


@pytest.mark.parametrize("frequent, is_left_out", [(0.1, False), (0.3, True)])
def test_a_class_score_below_the_most_frequent_class_is_left_out(
    copy: Path, frequent: float, is_left_out: bool
) -> None:
    results = read_json(copy / "results.json")
    results["trained"]["HO"]["metrics"]["group/acc1"] = 0.2
    floor = results["trained"]["HO"] | {"metrics": {"group/acc1": frequent}}
    results["floors"] = {"frequent": {"HO": floor}}
    (copy / "results.json").write_text(json.dumps(results))
    summary = read_page(write_report([copy])).section("summary")
    first, whole = summary.all("table", class_="numbers")
    assert ("zero-shot group" in first.text) != is_left_out
    assert "zero-shot group" in whole.text  # every number is there
    assert ("most frequent class is better: zero-shot group." in summary.text) == is_left_out


def test_the_words_of_the_tables_are_explained_and_no_others(compared: Element) -> None:
    terms = {item.one("b").text for item in compared.section("summary").all("li")}
    assert {"zero-shot", "R@5", "modality gap", "group"} <= terms
    assert "k-means AMI" not in terms  # no such number on this page
    (explained,) = {
        abbr.attributes["title"] for abbr in compared.all("abbr") if abbr.text == "zero-shot group"
    }
    assert explained.startswith("share of images whose nearest class name is their own")


# ---- runs beside each other ----


def test_scores_of_several_runs_are_next_to_each_other(runs: Runs, compared: Element) -> None:
    """With the difference to plain CLIP, and no judgement of it."""
    plain, ours = (
        reading.read_run(run).outcome.trained["HO"].metrics[RECALL] for run in runs[::-1]
    )
    cells = scores(compared, "image → text R@5")
    assert [cell.one("b").text for cell in cells[-2:]] == [f"{plain:.3f}", f"{ours:.3f}"]
    (difference,) = (span for cell in cells for span in cell.all("span", class_="difference"))
    assert difference.text == f"{ours - plain:+.3f}".replace("-", "−")
    assert "ProtoCLIP also pulls" in compared.section("summary").text


def test_every_run_has_its_own_part_of_a_section(compared: Element) -> None:
    for section in ("names", "map", "gap", "cost"):
        headings = [heading.text for heading in compared.section(section).all("h3")]
        assert headings == ["plain", "ours"], section


def test_sets_have_names_that_people_read(compared: Element) -> None:
    assert "Held-out pairs" in compared.section("summary").text
    assert not re.search(r"\bN?HO\b", compared.text)


def test_the_teachers_prototypes_come_first(compared: Element) -> None:
    galleries = compared.section("prototypes").all("details", class_="gallery")
    assert [gallery.one("summary").one("b").text for gallery in galleries] == ["teacher", "image"]


def test_a_run_without_prototypes_has_no_such_section(runs: Runs) -> None:
    page = read_page(write_report([runs.plain]))
    assert "prototypes" not in page.sections
    assert "#prototypes" not in {link.attributes["href"] for link in page.one("nav").all("a")}


def test_the_page_says_which_settings_differ(copy: Path, runs: Runs) -> None:
    plain = reading.read_run(runs.plain)
    assert not reading.differences(reading.read_run(copy), plain)
    config = read_json(copy / "config.json")
    config["run"]["seed"] = 7
    config["optim"] |= {"lr": 0.5, "epochs": 2.0}
    (copy / "config.json").write_text(json.dumps(config))
    ours = reading.read_run(copy)
    words = reading.differences(ours, plain)
    assert "ours and plain differ in seed (7 and 0), --epochs (2.0 and 28.0), --lr (0.5 " in words
    assert words in read_page(write_report([runs.plain, copy])).section("summary").text
    # Runs that say how many steps they took.
    ours = replace(ours, outcome=replace(ours.outcome, steps=200))
    plain = replace(plain, outcome=replace(plain.outcome, steps=90))
    words = reading.differences(ours, plain)
    assert "seed (7 and 0), number of steps (200 and 90), --lr (0.5 and " in words


def never_reached(path: Path) -> Path:
    """The run as if it had ended before its first prototypes."""
    (path / "report.json").unlink()
    lines = [{"step": step, "contrastive_loss": 5.0} for step in (1, 30)]
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize(
    "step, words",
    [
        (
            61,
            "they train from step 61 on, which its 30 steps do not reach. So far it is plain CLIP",
        ),
        (0, "ours has trained no prototypes. So far it is plain CLIP"),  # interrupted
    ],
)
def test_a_run_that_never_reached_its_prototypes_is_not_called_protoclip(
    copy: Path, runs: Runs, capsys: pytest.CaptureFixture[str], step: int, words: str
) -> None:
    never_reached(copy)
    results = read_json(copy / "results.json") | {"first_prototype_step": step, "steps": 30}
    (copy / "results.json").write_text(json.dumps(results))
    page = read_page(write_report([runs.plain, copy]))
    heads = page.all("p", class_="answer")
    assert any(words in head.text for head in heads)
    columns = page.section("summary").all("thead")[0].all("small")
    assert [column.text for column in columns] == ["clip", "protoclip without prototypes"]
    assert main([str(runs.plain), str(copy)]) == 0
    assert words in capsys.readouterr().err


# ---- baselines ----


def test_the_baseline_is_the_first_run_of_clip_or_the_first_of_several(runs: Runs) -> None:
    ours, plain = map(reading.read_run, runs)
    assert reading.find_baseline([ours, plain]) is plain
    assert reading.find_baseline([ours, ours]) is ours
    assert reading.find_baseline([ours]) is None


# ---- what is shown of the data ----


def test_samples_are_evenly_spaced_in_large_data() -> None:
    """In fp32 the last place of 2^24 + 4 values would be one too far."""
    last = 2**24 + 3
    values = torch.zeros(last + 1, dtype=torch.int8)
    values[[0, last]] = 1
    assert every(values, 4096)[[0, -1]].tolist() == [1, 1]
    assert every(values[:3], 9).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("caption", "shown"),
    [
        ("a  cat\n", "a cat"),
        ("word " * 40, "word " * 17 + "word…"),
        ("这是一只猫" * 25, ("这是一只猫" * 25)[:89] + "…"),
        ("see https://example.org/" + "x" * 99, "see https://example.org/" + "x" * 65 + "…"),
    ],
)
def test_long_captions_are_cut_at_a_word_or_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, caption: str, shown: str
) -> None:
    monkeypatch.setattr(ShapesDataset, "captions", lambda self, i: (caption,))
    assert caption_of(open_dataset("builtin:shapes:4"), 0) == shown


# ---- words of clusters ----


def words_of(clusters: dict[int, list[str]]) -> dict[int, str]:
    """The words of clusters of captions."""
    captions = [caption for members in clusters.values() for caption in members]
    labels = [cluster for cluster, members in clusters.items() for _ in members]
    return words_of_clusters(captions.__getitem__, torch.tensor(labels))


def test_a_word_of_one_caption_of_several_does_not_describe_a_cluster() -> None:
    clusters = {
        0: ["red dog runs", "a dog", "dog dog sleeps", "notdef"],
        1: ["a cat", "cat cat"],
        2: ["otter"],
        3: ["crutch", "excel"],
    }
    assert words_of(clusters) == {0: "dog", 1: "cat", 2: "otter"}


@pytest.mark.parametrize("times, words", [(3, "sign, lira"), (2, "sign")])
def test_a_word_of_a_large_cluster_stands_in_a_tenth_of_its_captions(
    times: int, words: str
) -> None:
    captions = ["sign"] * (21 - times) + ["sign lira"] * times
    assert words_of({0: captions, 1: ["boat"]}) == {0: words, 1: "boat"}


def test_a_word_that_a_cluster_has_less_than_half_as_often_is_not_in_its_name() -> None:
    """Both captions are in both clusters, in other shares."""
    clusters = {0: ["red ball"] * 9 + ["blue box"] * 3, 1: ["red ball"] * 3 + ["blue box"] * 9}
    assert words_of(clusters) == {0: "ball, red", 1: "blue, box"}
    assert words_of({0: ["red ball"] * 9, 1: ["red ball"] * 5 + ["blue box"]}) == {}


def test_a_word_that_most_clusters_have_is_in_no_name() -> None:
    animals = ["cat", "dog", "owl", "bee", "fly", "rat"]
    clusters = {number: [f"a photo of a {animal}"] * 9 for number, animal in enumerate(animals)}
    clusters[0] += ["a photo of a dog"]  # a tenth is less than half of the dogs' share
    assert words_of(clusters) == dict(enumerate(animals))


# ---- runs that went wrong ----

EVIL = '</script><script>window.evil = 1</script>"><b>'


def test_words_of_the_data_cannot_break_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShapesDataset, "captions", lambda self, i: (EVIL,))
    path = make_run(tmp_path / "<script>window.evil = 1<")
    lines = [
        json.dumps({"step": i, f"{EVIL}loss": 1.0, f"val_{EVIL}/acc1": 0.5}) for i in range(300)
    ]
    torn = '{"step": 300, "lo'  # the run was killed here
    (path / "metrics.jsonl").write_text("\n".join([*lines, "[1, 2]", torn]))
    text = write_report([path]).read_text()
    assert "<script>window.evil" not in text and '"><b>' not in text
    assert EVIL in parse_page(text).text  # as words


def test_a_run_that_stopped_early_still_has_a_page(copy: Path) -> None:
    for name in ("results.json", "report.json", "metrics.jsonl"):
        (copy / name).unlink()
    page = read_page(write_report([copy]))
    assert "was not evaluated" in page.text
    assert page.sections == ["summary", "settings"]  # the others are empty


def test_a_model_that_diverged_still_has_a_page(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", noise=float("nan"))
    assert read_page(write_report([path])).all("canvas")


@pytest.mark.parametrize("spread", [0, 1e-8, 1e-7, 3e-7, 1e-6, 1e-5])
def test_a_model_that_collapsed_still_has_histograms(spread: float) -> None:
    draw = torch.Generator().manual_seed(0)
    point = torch.randn(64, generator=draw)
    image = point * (1 + spread * torch.randn(50, 64, generator=draw))
    text = -point * (1 + spread * torch.randn(50, 64, generator=draw))
    histograms = geometry(EvalSet(image, text, torch.arange(50)))
    for name in ("cosines", "along"):
        assert [sum(shares) for shares in histograms[name]["shares"]] == pytest.approx([1, 1])


def test_a_collapse_after_a_first_episode_of_few_samples_is_said_on_the_page(copy: Path) -> None:
    """As the log says it: the first episode's inertia is nothing to compare with."""
    inertias = {900: (0.05, 0.001), 950: (0.9, 0.6), 999: (1.0, 0.02)}  # share labelled, inertia
    with (copy / "metrics.jsonl").open("a") as file:
        for step, (labelled, inertia) in inertias.items():
            line = {"step": step, "image_labelled": labelled, "image_inertia": inertia}
            line |= {"image_clusters": 100, "image_largest_share": 0.05}
            file.write("\n" + json.dumps(line | {"image_proto_accuracy": 0.95}))
    page = read_page(write_report([copy]))
    assert "step 999: the image prototypes are collapsing: the inertia" in page.text
    assert "fell from 0.6 to 0.02" in page.text


@pytest.mark.parametrize("largest_share, collapsed", [(0.1, False), (0.4, True)])
def test_a_collapse_of_the_prototypes_is_said_on_the_page(
    copy: Path, largest_share: float, collapsed: bool
) -> None:
    healthy = {"image_inertia": 0.3, "image_clusters": 100, "image_largest_share": 0.05}
    lines = [
        healthy | {"step": 900},
        healthy | {"step": 950, "image_largest_share": largest_share},
    ]
    with (copy / "metrics.jsonl").open("a") as file:
        for line in lines:
            file.write("\n" + json.dumps(line))
    page = read_page(write_report([copy]))
    sentence = "step 950: the image prototypes are collapsing: one image cluster holds 40 %"
    assert (sentence in page.text) == collapsed


# ---- whole runs ----

TINY = [
    "--train-data", "builtin:shapes:80", "--batch-size", "16", "--report-to", "none",
    "--infonce-warmup-epoch", "0", "--k", "6",
]  # fmt: skip


def test_a_run_ends_with_its_report_and_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protoclip.report.capture.PICTURED", 40)  # as in a larger data set
    flags = ["--logs", str(tmp_path), "--name", "run", "--max-steps", "4", "--w-proto", "1"]
    assert train([*TINY, *flags, "--val-frequency", "0.4"]) == 0
    run = tmp_path / "run"
    output = capsys.readouterr().err
    assert f"report: {run / 'report.html'}" in output
    first = read_json(run / "results.json")["first_prototype_step"]
    assert f"prototypes train from step {first} on" in output
    page = read_page(run / "report.html")
    assert "Held-out pairs" in page.section("summary").text
    assert "6 clusters of " in page.section("prototypes").text
    assert len(pictures_in(page)) > 50
    evaluated = [
        line["step"] for line in metrics(run) if any(name.startswith("val_HO_") for name in line)
    ]
    assert evaluated == [2, 4]
    snapshot = load_snapshot(run)
    assert snapshot is not None
    assert {"image", "text"} <= {block["name"] for block in snapshot.clusters}
    with (run / "clusters.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert len(rows) > 60
    for block in snapshot.clusters:  # a card's number counts all of the data, pictured or not
        for label, value in block["purity"].items():
            logged = [line.get(f"{block['name']}_purity_{label}") for line in metrics(run)]
            assert value == pytest.approx([x for x in logged if x is not None][-1])
        sizes = Counter(row[block["name"]] for row in rows if row[block["name"]])
        assert {str(card["cluster"]): card["samples"] for card in block["cards"]} == sizes
    assert snapshot.facts["memory_bytes"]["forward"] > 2**20


CHECK = """<script>
addEventListener("load", () => {
  document.querySelectorAll(".gallery").forEach(box => box.open = true);
  setTimeout(check, 500);  // they are filled after an event
});
function check() {
  const out = document.createElement("pre");
  out.id = "state";
  const canvas = document.querySelector("canvas"), more = document.querySelector(".gallery button");
  const before = document.querySelectorAll(".proto").length;
  more?.click();
  canvas.focus();
  canvas.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", cancelable: true}));
  out.textContent = JSON.stringify({
    sections: [...document.querySelectorAll("section")].map(s => s.id),
    cards: document.querySelectorAll(".proto").length,
    more: document.querySelectorAll(".proto").length - before,
    focus: document.activeElement === canvas,
    said: canvas.closest(".map").querySelector("[data-hint]").textContent,
    images: document.images.length,
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
    lowest: Math.min(...[...document.querySelectorAll(".legend button")].map(b => b.offsetHeight)),
    wide: document.scrollingElement.scrollWidth - innerWidth,
    inked: [...document.querySelectorAll("canvas")].map(c =>
      c.getContext("2d").getImageData(0, 0, c.width, c.height).data.some(v => v)),
  });
  document.body.append(out);
}
</script>"""


@needs_browser
def test_a_real_browser_shows_it_narrow_and_dark(runs: Runs, tmp_path: Path) -> None:
    path = write_report([runs.plain, runs.ours], tmp_path / "page.html")
    state = in_browser(path, CHECK, tmp_path)
    assert state["sections"] == SECTIONS
    assert state["images"] > 50 and state["broken"] == 0 and state["cards"] > 0
    assert state["wide"] <= 0  # nothing sticks out on a narrow screen
    assert state["inked"] == [True, True]
    assert state["lowest"] >= 32  # a finger finds it
    # By keyboard: the button of a gallery, and an arrow key on the map.
    assert state["more"] > 0 and state["focus"]
    assert re.match("(image of|caption): ", state["said"])
