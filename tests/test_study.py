"""The study: sets and concepts apart, statistics by hand, no run done twice, a page."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.study import data as study_data
from benchmarks.study import protocol as study
from benchmarks.study import report as study_report
from benchmarks.study.data import Icons
from benchmarks.study.split import Split, make_split

RULES = study.QUICK.rules
TINY = dataclasses.replace(study.QUICK, main_seeds={study.MLP: 1, study.CNN: 1})


@pytest.fixture(scope="module")
def icons(tmp_path_factory: pytest.TempPathFactory) -> Icons:
    pytest.importorskip("resvg_py")
    return study_data.toy_icons(tmp_path_factory.mktemp("icons"))


# ---- icons ----


@pytest.mark.parametrize(
    "name, words",
    [
        ("calendar-alt-24-filled", "calendar"),
        ("outline-sun", "sun"),
        ("arrow-left", "arrow left"),
        ("bold", "bold"),  # a style, but there is nothing else
        ("24", "24"),
        ("user_2", "user"),
    ],
)
def test_a_name_says_what_is_drawn(name: str, words: str) -> None:
    assert study_data.strip(name) == words


@pytest.mark.parametrize(
    "name, other",
    [
        ("fa6-solid", "la"),
        ("mdi-light", "material-symbols-light"),
        ("lucide-lab", "feather"),
    ],
)
def test_sets_of_one_maker_are_one_family(name: str, other: str) -> None:
    assert study_data.family_of(name) == study_data.family_of(other)


def test_sets_whose_names_begin_alike_need_not_be_one_family() -> None:
    assert study_data.family_of("pixelarticons") != study_data.family_of("pixel")


DRAWING = {"body": '<path d="M0 0h9v9z"/>'}


def write_package(folder: Path, sets: dict[str, dict[str, Any]], of_brands: list[str]) -> None:
    """Sets of icons as the package has them, on a box that begins at -2."""
    collections = {name: {"category": "Logos"} for name in of_brands}
    (folder / "json").mkdir()
    (folder / "collections.json").write_text(json.dumps(collections))
    for name, drawings in sets.items():
        content = {"icons": drawings, "width": 20, "left": -2}
        (folder / "json" / f"{name}.json").write_text(json.dumps(content))


def test_a_package_gives_one_icon_of_each_name_and_set(tmp_path: Path) -> None:
    """Without brands, flags and what is hidden; the SVG keeps the icon's own box."""
    sets = {
        "simple-icons": {"acme": DRAWING},
        "logos": {"acme": DRAWING},
        "drawn": {
            "home": DRAWING,
            "home-filled": DRAWING,
            "acme": DRAWING,
            "old": DRAWING | {"hidden": True},
        },
        "circle-flags": {"xy": DRAWING},
    }
    write_package(tmp_path, sets, of_brands=["simple-icons", "logos"])
    (icon,) = study_data.icons_of(tmp_path)
    assert icon.set == "drawn" and icon.words == "home"
    assert icon.name in ("home", "home-filled")
    assert 'viewBox="-2 0 20 16"' in icon.svg


@pytest.fixture
def triangle() -> np.ndarray:
    grey = np.full((48, 48), 255, np.uint8)
    grey[4:20, 4:20][np.triu_indices(16)] = 0
    return grey


def test_a_fingerprint_ignores_margins_and_tells_drawings_apart(triangle: np.ndarray) -> None:
    moved = np.roll(triangle, (20, 9), (0, 1))
    upside_down = triangle[::-1]
    fingerprint = study_data.fingerprint(triangle)
    assert (fingerprint == study_data.fingerprint(moved)).all()
    assert (fingerprint != study_data.fingerprint(upside_down)).sum() > 12


def test_near_duplicates_are_found_by_their_fingerprints(triangle: np.ndarray) -> None:
    drawings = [triangle, triangle[::-1], np.roll(triangle, (20, 9), (0, 1))]
    packed = np.packbits(np.stack([study_data.fingerprint(x) for x in drawings]), axis=1)
    pairs = {row: rows.tolist() for row, rows in study_data.near(packed[:2], packed, 12)}
    assert pairs == {0: [0, 2], 1: [1]}


# ---- the split ----


@pytest.mark.parametrize("tuning", [False, True], ids=["results", "tuning"])
def test_no_set_and_no_concept_is_on_both_sides(icons: Icons, tuning: bool) -> None:
    split = make_split(icons, RULES, tuning=tuning)
    held_out = RULES.tuning_sets if tuning else RULES.test_sets
    families = {study_data.family_of(name) for name in icons.set[split.pool]}
    assert families.isdisjoint(map(study_data.family_of, held_out))
    assert set(icons.set[split.judged_seen]) == set(held_out)
    assert set(icons.set[split.judged_new]) == set(held_out)
    trained = [set(words.split()) for words in icons.words[split.pool].tolist()]
    for concept in split.new:
        assert not any(set(concept.split()) <= words for words in trained)
    assert len(split.new) == RULES.new_concepts
    assert set(split.seen).isdisjoint(split.new)
    assert set(icons.words[split.labelled_seen]) <= set(split.seen)
    assert set(icons.words[split.labelled_new]) <= set(split.new)
    assert len(set(icons.words[split.queries])) == len(split.queries)


def test_what_is_judged_is_not_tuned_on(icons: Icons) -> None:
    results: Split = make_split(icons, RULES, tuning=False)
    tuning: Split = make_split(icons, RULES, tuning=True)
    assert set(results.new).isdisjoint(tuning.new)
    held_out = {*RULES.test_sets, *RULES.tuning_sets}
    assert set(icons.set[tuning.pool]).isdisjoint(held_out)


def test_copies_do_not_cross_the_split(icons: Icons) -> None:
    """A training drawing that looks like one held out does not train."""
    split = make_split(icons, RULES, tuning=False)
    copy = int(split.pool[0])
    original = int(split.judged_seen[0])
    hashes = icons.hashes.copy()
    hashes[copy] = hashes[original]
    with_copy = make_split(dataclasses.replace(icons, hashes=hashes), RULES, tuning=False)
    assert copy not in with_copy.pool
    counted = "near-duplicates of held-out icons"
    assert with_copy.counts[counted] == split.counts[counted] + 1


# ---- runs ----


@pytest.mark.parametrize("row", study.ROWS)
def test_rows_are_flags_that_training_takes(row: str, tmp_path: Path) -> None:
    task = study.Task("main", study.MLP, row, seed=3, lr=2e-3, epochs=2.5)
    config = study.configure(task, study.FULL, tmp_path / "teacher.npz")
    assert config.run.seed == 3
    assert config.optim.epochs == 2.5
    assert config.optim.lr == 2e-3
    assert config.episode.size == 15_000
    num_clusters = {"K = N / 20": 750, "K = N / 100": 150}.get(row, 1500)
    assert config.episode.num_clusters == num_clusters


def run_of(task: study.Task, value: float, **changes: Any) -> dict[str, Any]:
    """The record of a finished run, with one value for all metrics."""
    metrics = (*study_report.PRIMARY, *study_report.SECONDARY)
    return {
        **dataclasses.asdict(task),
        "metrics": dict.fromkeys(metrics, value),
        "cpu_seconds": 2.0,
        "episodes": [],
        "entropies": [],
        "machine": "M",
        "commit": "abc",
        "torch": "2.13",
        **changes,
    }


def made(row: str, seed: int, value: float, stage: str = "main", **changes: Any) -> dict[str, Any]:
    task = study.Task(stage, study.MLP, row, seed, lr=1e-3, epochs=4.0)
    return run_of(task, value, **changes)


# ---- the report ----

CLIP_VALUES = (0.5, 0.3, 0.4)
EQUAL_TIME_VALUES = (0.51, 0.32, 0.4)
PROTO_VALUES = (0.56, 0.37, 0.44)


@dataclass(frozen=True)
class Report:
    text: str

    def lines(self, row: str) -> list[list[str]]:
        """The cells of the table lines that begin with a row's name."""
        tables = [line for line in self.text.splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables]
        return [line for line in cells if line[0] == row]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Of three seeds a row, in a page that had an older one."""
    runs = [made(study.CLIP, seed, value) for seed, value in enumerate(CLIP_VALUES)]
    runs += [made(study.EQUAL_TIME, seed, value) for seed, value in enumerate(EQUAL_TIME_VALUES)]
    runs += [made(study.PROTO, seed, value) for seed, value in enumerate(PROTO_VALUES)]
    runs += [
        made("HOG", 0, 0.125, "floor"),
        made(study.PROTO, 1000, 0, "pairs", ratio=1.25),
        made(study.CLIP, 1000, 0.25, "tune"),
    ]
    page = tmp_path_factory.mktemp("docs") / "evidence.md"
    page.write_text(f"above\n{study_report.BEGIN}\nold\n{study_report.END}\nbelow\n")
    wanted = {study.MLP: {study.CLIP: 3, study.PROTO: 5, study.EQUAL_TIME: 3}}
    study_report.write_report(runs, wanted, study.FLOORS, {}, page)
    return Report(page.read_text())


def test_the_answer_stands_above_and_every_table_can_be_opened(report: Report) -> None:
    above, _, below = report.text.partition("<details>")
    assert "1. **At equal CPU time**" in above
    assert "Finished are 9 of the 11 runs that are compared, and 1 of tuning." in above
    assert "|" not in above
    assert below.count("<details>") + 1 == below.count("</details>") == below.count("<summary>")


def test_without_two_seeds_there_is_no_answer_and_the_report_says_so() -> None:
    runs = [made(study.CLIP, seed=0, value=0.5)]
    wanted = {study.MLP: {study.CLIP: 3, study.PROTO: 3}}
    text = study_report.section(runs, wanted, study.FLOORS, {})
    assert text.startswith(study_report.NO_ANSWER)
    assert "Finished are 1 of the 6 runs" in text


def test_the_report_replaces_its_part_of_the_page_only(report: Report) -> None:
    assert report.text.startswith("above\n") and report.text.endswith("below\n")
    assert "\nold\n" not in report.text


def test_a_row_says_the_values_of_clip_and_differences_to_them(report: Report) -> None:
    clip, *_ = report.lines("CLIP")
    assert clip == ["CLIP", "3", "0.001, 4", "1.00", "0.400", "0.400", "0.400"]
    test = stats.ttest_rel(PROTO_VALUES, CLIP_VALUES)
    corrected = 3 * test.pvalue  # three primary metrics, all alike: Holm triples p
    proto, *_ = report.lines("ProtoCLIP")
    assert f"+0.057 ± 0.038 (p {corrected:.2g})" in proto[-1]


def test_floors_and_tuning_have_their_tables(report: Report) -> None:
    (floor,) = report.lines("HOG")
    assert floor[1] == "0.125"
    assert ["CLIP", "**0.250**"] in report.lines("CLIP")


def test_the_report_says_what_a_sample_costs_and_what_is_missing(report: Report) -> None:
    assert "a sample costs ProtoCLIP 1.25 times CLIP's" in report.text
    assert "seeds missing: ProtoCLIP (mlp) 2." in report.text


def test_holm_by_hand() -> None:
    p = {"a": 0.01, "b": 0.04, "c": 0.03}
    differences = {
        name: study_report.Difference(mean=0, half=0, p=value, seeds=3) for name, value in p.items()
    }
    corrected = study_report.holm(differences)
    assert corrected == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_rows_that_are_equal_in_every_seed_do_not_spoil_the_correction_of_others() -> None:
    same = study_report.paired({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6})
    assert same == study_report.Difference(mean=0, half=0, p=1, seeds=2)
    other = study_report.Difference(mean=0, half=0, p=0.01, seeds=2)
    assert study_report.holm({"same": same, "other": other}) == {"other": 0.02, "same": 1}


# ---- no run is done twice ----


@dataclass
class QuickStudy:
    """The command, whose runs are only noted."""

    out: Path
    tasks: list[study.Task]

    @property
    def record(self) -> Path:
        return self.out / "quick" / "runs.jsonl"

    def __call__(self, *flags: str) -> int:
        return study.main(["--quick", "--out", str(self.out), *flags], TINY)


@pytest.fixture
def quick_study(icons: Icons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> QuickStudy:
    command = QuickStudy(tmp_path, tasks=[])

    def run(task: study.Task, *_: object) -> dict[str, Any]:
        command.tasks.append(task)
        return run_of(task, 0.5, ratio=1.1)

    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "toy_icons", lambda folder: icons)
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return command


def test_a_report_alone_does_no_run(
    quick_study: QuickStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quick_study("--report") == 0
    assert not quick_study.tasks
    assert "No run is finished yet" in capsys.readouterr().out


def test_every_run_is_done_once_and_reported(
    quick_study: QuickStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quick_study() == 0
    printed = Report(capsys.readouterr().out)
    assert "missing" not in printed.text
    for row in study.ROWS:
        assert "1" in {cells[1] for cells in printed.lines(row)}  # its seeds
    assert len(quick_study.record.read_text().splitlines()) == len(quick_study.tasks)
    assert len(set(quick_study.tasks)) == len(quick_study.tasks)


def test_clip_trains_as_long_as_protoclip_was_measured_to_take(quick_study: QuickStudy) -> None:
    assert quick_study() == 0
    epochs = {task.epochs for task in quick_study.tasks if task.row == study.EQUAL_TIME}
    assert epochs == {2.2}


def test_only_a_run_whose_line_is_torn_is_done_again(quick_study: QuickStudy) -> None:
    assert quick_study() == 0
    tasks = list(quick_study.tasks)
    lines = quick_study.record.read_text().splitlines()
    quick_study.record.write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    assert quick_study() == 0
    assert quick_study.tasks == [*tasks, tasks[-1]]


# ---- whole runs ----


@pytest.mark.slow
@pytest.mark.parametrize("tower", (study.MLP, study.CNN))
def test_a_run_trains_and_is_judged(icons: Icons, tower: str) -> None:
    data = study.Data(icons, RULES)
    task = study.Task("main", tower, study.PROTO, seed=0, lr=1e-3, epochs=3)
    result = study.Run(task, TINY, data, study.Towers(data)).finish()
    assert set(result["metrics"]) == {*study_report.PRIMARY, *study_report.SECONDARY}
    steps = -(-3 * 400 // 32)
    assert result["samples"] == steps * 32
    assert result["cpu_seconds"] > 0
    assert len(result["episodes"]) == -(-steps // 4)
    last_episode = result["episodes"][-1]
    assert last_episode["image_inertia"] > 0 and last_episode["external_inertia"] > 0
    entropies = result["entropies"][-1]
    assert 0 <= entropies["image"] < entropies["most"]
    if tower == study.MLP:
        assert result["metrics"]["zero-shot"] > 0.5  # of 46 concepts


@pytest.mark.slow
def test_episodes_alternate(icons: Icons) -> None:
    data = study.Data(icons, RULES)
    task = study.Task("pairs", study.MLP, study.PROTO, seed=1000, lr=1e-3, epochs=2)
    result = study.measure_pair(task, TINY, data, study.Towers(data), (1e-3, 1e-3))
    clip = result["seconds_by_episode"][study.CLIP]
    proto = result["seconds_by_episode"][study.PROTO]
    assert len(clip) == len(proto) > 3
    assert result["ratio"] == pytest.approx(sum(proto) / sum(clip), abs=1e-3)
