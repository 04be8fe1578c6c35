"""The statistics of a comparison: simulated families, and the intervals of docs/evidence.md."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks import frozen
from benchmarks.default_run import evidence_table
from protoclip.evaluate.results import Outcome, SetResults
from protoclip.report import comparison
from protoclip.report.comparison import Row, compare_rows, with_shown
from protoclip.report.statistics import (
    LEVEL,
    MOST_SEEDS,
    POWER,
    holm,
    paired,
    power,
    seeds_needed,
)
from protoclip.settings.comparison import Record
from protoclip.settings.config import TrainConfig

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
EVIDENCE = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
DRAWS = 5000
SEEDS = 5
EQUAL_TIME = "CLIP, time of ProtoCLIP"
METRICS = ("class/acc1", "class/nn_acc1", "class/ami")


def within_three_errors(share: float, expected: float) -> bool:
    return abs(share - expected) <= 3 * math.sqrt(expected * (1 - expected) / DRAWS)


@pytest.mark.parametrize("effect", [0.0, 0.8, 1.5, 2.5])
def test_the_power_of_a_test_is_that_of_theory(effect: float) -> None:
    """Without a difference it is the level, for which no theory is needed."""
    differences = np.random.default_rng(0).normal(effect, size=(DRAWS, SEEDS))
    p = paired(differences).p
    for level in (LEVEL, LEVEL / len(METRICS)):
        expected = power(effect, SEEDS, level) if effect else level
        assert within_three_errors(float((p < level).mean()), expected)


def row(name: str, values: np.ndarray) -> Row:
    """A row whose runs have these values [seeds, scores]."""
    runs = {}
    for seed, scores in enumerate(values.tolist()):
        metrics = dict(zip(METRICS, scores, strict=True))
        runs[seed] = Outcome("", "", "", {"ALL": SetResults("", 100, 0, metrics)})
    return Row(name, runs, {})


def test_a_first_table_and_then_a_further_baseline_err_in_5_percent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of families without a difference, in at most 5 % something is starred."""
    # It takes two thirds of the time and stars nothing.
    monkeypatch.setattr(comparison, "seeds_needed", lambda differences, level: None)
    random = np.random.default_rng(0)
    primary = [("ALL", metric) for metric in METRICS]
    begun = Record({"CLIP": TrainConfig(), "P": TrainConfig()}, tuple(range(SEEDS)), Path())
    starred = counted = 0
    for _ in range(DRAWS):
        # A seed's part of a run is shared by its scores and, through its data order, by all rows.
        of_seed = random.normal(size=(SEEDS, 1))
        of_run = random.normal(size=(3, SEEDS, 1))
        rows = of_seed + of_run + random.normal(size=(3, SEEDS, len(METRICS)))
        clip, protoclip = row("CLIP", rows[0]), row("P", rows[1])
        first = with_shown(begun, compare_rows([clip, protoclip], primary, begun))
        longer = replace(first, rows={"CLIP, longer": TrainConfig(), "P": TrainConfig()})
        second = compare_rows([row("CLIP, longer", rows[2]), protoclip], primary, longer)
        cells = second.contrasts[0].cells.values()
        starred += bool(first.shown[0].starred) or any(cell.significant for cell in cells)
        counted += any(cell.p < LEVEL for cell in cells)
    assert starred / DRAWS <= LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / DRAWS)
    assert starred > counted > 0.015 * DRAWS  # Holm over six tests, half of which are known


def test_the_t_tests_are_scipys() -> None:
    random = np.random.default_rng(1)
    ours = random.normal(0.3, 1, size=5)
    theirs = random.normal(0, 2, size=5)
    of_pairs = paired(ours - theirs)
    expected = stats.ttest_rel(ours, theirs)
    low, high = expected.confidence_interval(0.95)
    assert of_pairs.p == pytest.approx(expected.pvalue)
    assert (of_pairs.mean - of_pairs.half, of_pairs.mean + of_pairs.half) == (
        pytest.approx(low),
        pytest.approx(high),
    )
    assert holm(np.array([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.06, 0.06])
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])


def test_what_cannot_be_tested_is_not_called_significant() -> None:
    one = paired(np.array([0.2]))
    assert one.mean == pytest.approx(0.2) and math.isinf(one.half) and one.p == 1
    assert paired(np.array([0.25, 0.25, 0.25])).p == 1
    assert seeds_needed(np.array([0.25, 0.25, 0.25])) is None


def test_seeds_that_are_needed_have_the_power() -> None:
    random = np.random.default_rng(2)
    differences = random.normal(size=6)
    differences = (differences - differences.mean()) / differences.std(ddof=1)
    needed = seeds_needed(differences + 0.9)
    assert needed is not None
    assert power(0.9, needed) >= POWER > power(0.9, needed - 1)
    strict = seeds_needed(differences + 0.9, LEVEL / 3)
    assert strict is not None and strict > needed
    assert power(0.2, MOST_SEEDS) < POWER and seeds_needed(differences + 0.2) is None


def records(name: str, **wanted: Any) -> list[dict[str, Any]]:
    """The recorded runs of a study with these values."""
    with (RESULTS / name / "runs.jsonl").open() as file:
        runs: Iterable[dict[str, Any]] = map(json.loads, file)
        return [run for run in runs if all(run.get(key) == wanted[key] for key in wanted)]


def gains(row: str, metric: str, study: str, **wanted: Any) -> np.ndarray:
    """A row minus CLIP at equal time, by the seeds that both have."""
    if study == "small_batches":
        wanted["icons"] = 60_000
    theirs, ours = (
        {
            run["seed"]: run["metrics"][metric]
            for run in records(study, stage="main", row=name, **wanted)
        }
        for name in (EQUAL_TIME, row)
    )
    return np.array([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


# Tower, metric, and differences at equal time: of the first study at batch 256 with p after Holm,
# of the second at 64, at 256.
STUDIES = """
    mlp | zero-shot | -0.010 ± 0.008 | 0.076 | -0.002 ± 0.003 | -0.014 ± 0.005
    mlp | probe     | +0.006 ± 0.006 | 0.14  | +0.007 ± 0.004 | +0.000 ± 0.003
    mlp | AMI       | +0.012 ± 0.006 | 0.013 | +0.012 ± 0.005 | +0.015 ± 0.004
    cnn | zero-shot | -0.016 ± 0.009 | 0.045 | +0.004 ± 0.010 | -0.007 ± 0.009
    cnn | probe     | -0.003 ± 0.010 | 0.59  | +0.012 ± 0.005 | +0.009 ± 0.004
    cnn | AMI       | -0.003 ± 0.007 | 0.59  | +0.030 ± 0.011 | +0.007 ± 0.003
"""


def test_the_studies_are_reproduced() -> None:
    """ProtoCLIP minus CLIP at equal time, one family of six tests; then a teacher's prototypes."""
    tests = []
    lines = [line.split("|") for line in STUDIES.strip().splitlines()]
    for tower, metric, *expected in ([word.strip() for word in line] for line in lines):
        first, _, at_64, at_256 = expected
        of_first = paired(gains("ProtoCLIP", metric, "study", tower=tower))
        tests.append(of_first)
        of_second = [
            paired(gains("external only", metric, "small_batches", tower=tower, batch=batch))
            for batch in (64, 256)
        ]
        measured = [f"{test.mean:+.3f} ± {test.half:.3f}" for test in (of_first, *of_second)]
        assert measured == [first, at_64, at_256]
        assert all(difference in EVIDENCE for difference in measured)
    corrected = holm(np.array([test.p for test in tests]))
    assert [f"{p:.2g}" for p in corrected] == [line[3].strip() for line in lines]


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_has_differences_of_the_second_study() -> None:
    studies = [[word.strip() for word in line.split("|")] for line in STUDIES.split("\n") if line]
    at_64 = [line[4] for line in studies if line[1] != "probe"]
    (at_256,) = (line[5] for line in studies if line[:2] == ["mlp", "zero-shot"])
    said = re.findall(r"[+-]\d\.\d{3} ± \d\.\d{3}", " ".join(README.split()))
    assert sorted(said) == sorted([*at_64, at_256])


def test_the_pages_say_where_the_time_was_not_equal() -> None:
    """Mean CPU seconds over seeds of the second study's runs at equal time."""

    def seconds(tower: str, batch: int, row: str) -> float:
        runs = records(
            "small_batches", stage="main", tower=tower, batch=batch, icons=60_000, row=row
        )
        return float(np.mean([run["cpu_seconds"] for run in runs]))

    for tower, batch in (("mlp", 64), ("mlp", 256), ("cnn", 64), ("cnn", 256)):
        ours, theirs = (seconds(tower, batch, row) for row in ("external only", EQUAL_TIME))
        if abs(ours / theirs - 1) > 0.03:
            said = f"ProtoCLIP took {ours:.0f} s of CPU, CLIP {theirs:.0f}"
            assert (tower, batch) == ("cnn", 256)
            assert said in EVIDENCE


def test_the_default_run_is_reproduced() -> None:
    recorded = json.loads((RESULTS / "default_run" / "seeds.json").read_text(encoding="utf-8"))
    assert evidence_table(recorded) in EVIDENCE


def heads(data: str) -> str:
    """The table of the heads on frozen encoders that were trained on these drawings."""
    recorded = json.loads((RESULTS / "frozen" / f"{data}.json").read_text(encoding="utf-8"))
    return frozen.evidence_table(recorded)


def test_the_heads_on_frozen_encoders_are_reproduced() -> None:
    """Of Open Clip Art, the page has the differences that are significant."""
    page = (ROOT / "docs" / "frozen.md").read_text(encoding="utf-8")
    assert heads("icons") in page
    paragraph = page[page.index("On Open Clip Art") :].partition("\n\n")[0]
    said = re.findall(r"\(([+-]\d[^)]*)\)", " ".join(paragraph.split()))
    assert said == re.findall(r"\*\*(.*?)\*\*", heads("openclipart"))
