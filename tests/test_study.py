"""The study: splits that do not overlap, paired intervals, runs that are not redone."""

import json

import numpy as np
import pytest
from scipy import stats

from benchmarks import study, study_report
from benchmarks.study import split_concepts
from protoclip.config import build_parser, parse


def test_no_setting_is_chosen_on_a_concept_that_is_reported():
    trained, judged, noto = split_concepts("select", 0)
    assert not np.intersect1d(trained, judged).size and np.array_equal(judged, noto)
    for seed in range(3):
        own, heldout, drawn = split_concepts("main", seed)
        assert not np.intersect1d(own, heldout).size
        assert not np.intersect1d(judged, heldout).size and not np.intersect1d(judged, drawn).size
        assert np.array_equal(np.union1d(own, heldout), np.union1d(drawn, judged))
    assert not np.array_equal(heldout, split_concepts("main", 0)[1])


@pytest.mark.parametrize("row", study.main_rows([], study.CANDIDATES["distillation"]["tau 0.1"]))
def test_rows_are_flags_that_training_takes(row):
    flags = study.main_rows([], study.CANDIDATES["distillation"]["tau 0.1"])[row]
    config = parse(build_parser("study", ""), study.arguments(flags, 3, 2.0))
    assert config.run.seed == 3 and config.optim.epochs == 2.0


def made(row, seed, value):
    run = study.task("main", row, seed, 1.0, [])
    scores = {}
    for key in study_report.SHOWN:
        chosen, _, metric = key.partition(" ")
        scores.setdefault(chosen, {})[metric] = value
    return run | {"metrics": scores, "cpu_seconds": 2.0}


RUNS = [made("CLIP", s, v) for s, v in enumerate((0.5, 0.3, 0.4))]
RUNS += [made("ProtoCLIP", s, v) for s, v in enumerate((0.56, 0.37, 0.44))]


def test_intervals_are_those_of_the_paired_t_test():
    summary = study_report.summarise(RUNS, ["CLIP", "ProtoCLIP"])
    got = summary["ProtoCLIP"]["scores"]["HO group/ami"]["minus CLIP"]
    mean, half = got["mean"], got["half_width"]
    want = stats.ttest_rel([0.56, 0.37, 0.44], [0.5, 0.3, 0.4]).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((want.low, want.high), rel=1e-3)
    assert study_report.interval([0.1])["half_width"] is None


def test_the_report_says_what_the_runs_say(tmp_path, monkeypatch):
    chosen = {"chosen": "shipped default", "flags": []}
    selection = {"seeds": [1], "ProtoCLIP": chosen, "distillation": chosen}
    (tmp_path / "selection.json").write_text(json.dumps(selection))
    page = tmp_path / "evidence.md"
    page.write_text(f"above\n{study_report.BEGIN}\nold\n{study_report.END}\nbelow\n")
    monkeypatch.setattr(study_report, "PAGE", page)
    study_report.write_report(RUNS, ["CLIP", "ProtoCLIP"], tmp_path, quick=False)
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "\nold\n" not in text
    assert "| ProtoCLIP | 3 | 1.00× | **+0.057 ± 0.038** |" in text
    assert "| CLIP | 3 | 1.00× | 0.400 |" in text
    assert (tmp_path / "plot.png").stat().st_size > 1000
    page.write_text("no marks")
    with pytest.raises(ValueError, match="once each"):
        study_report.write_report(RUNS, ["CLIP", "ProtoCLIP"], tmp_path, quick=False)


def test_finished_runs_are_kept_and_torn_lines_are_not(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(RUNS[0]) + "\n" + json.dumps(RUNS[1])[:40])
    assert list(study.finished(path)) == [study.key_of(RUNS[0])]
    done = study.do_all([study.task("main", "CLIP", 0, 1.0, [])], tmp_path, jobs=1)
    assert done == [RUNS[0]]
    assert study.key_of(RUNS[0]) != study.key_of(RUNS[0] | {"flags": ["--k", "5"]})
