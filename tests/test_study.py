"""The study: families apart, statistics by hand, no run done twice, a page from any state."""

import dataclasses

import pytest
from scipy import stats

from benchmarks import study, study_report
from protoclip.data import open_dataset

TINY = study.Size(((1e-3, 3),), (1000,), 1, 1, 1, 2, 60, ("--batch-size", "32"))


def test_no_family_and_no_style_is_on_both_sides():
    emoji = open_dataset(study.EMOJI)
    family = dict(zip(emoji.keys, emoji.families.ids.tolist(), strict=True))

    def families(dataset):
        return {family[key.rpartition("/")[2]] for key in dataset.keys}

    for seed in range(3):
        split, tuning = (study.open_split(study.EMOJI, seed, tuning=t) for t in (False, True))
        new, seen, own = (families(x) for x in (*split.judged.values(), split.train))
        assert new == seen and not own & new and not own & families(tuning.judged["new"])
        assert not new & families(tuning.judged["new"])
        drawn = {key.partition("/")[0] for key in split.train.keys}
        assert len(drawn) == 2 and study.STYLES[seed] not in drawn
        assert sum(map(len, split.judged.values())) >= 1000
    assert new != families(study.open_split(study.EMOJI, 0).judged["new"])


@pytest.mark.parametrize("row", study.ROWS)
def test_rows_are_flags_that_training_takes(row):
    config = study.configure(study.Task("main", study.EMOJI, row, 3, 2e-3, 2.5), study.FULL)
    assert (config.run.seed, config.optim.epochs, config.optim.lr) == (3, 2.5, 2e-3)


def made(row, seed, value, stage="main", machine="M"):
    scores = {}
    for key in (*study_report.PRIMARY, *study_report.SECONDARY):
        part, _, name = key.partition(" ")
        scores.setdefault(part, {})[name] = value
    return {
        "stage": stage, "data": study.EMOJI, "row": row, "seed": seed, "lr": 1e-3, "epochs": 33,
        "metrics": scores, "curve": [[10, 1.0, 0, 0], [20, 2.0, value, value]], "cpu_seconds": 2.0,
        "clusters": {}, "machine": machine, "commit": "abc", "torch": "2.13", "train": 9, "new": 8,
    }  # fmt: skip


def test_the_report_says_what_the_runs_say(tmp_path):
    clip, proto = (0.5, 0.3, 0.4), (0.56, 0.37, 0.44)
    runs = [made("CLIP", s, v) for s, v in enumerate(clip)]
    runs += [made("ProtoCLIP", s, v) for s, v in enumerate(proto)]
    runs.append(made("untrained", 0, 0.125, "floor"))
    rows = ("CLIP", "ProtoCLIP", "SigLIP")  # a control row ran elsewhere, with a CLIP of its own
    runs += [made(row, seed, 0.6, machine="N") for row in rows for seed in (0, 1)]
    page = tmp_path / "evidence.md"
    page.write_text(f"above\n{study_report.BEGIN}\nold\n{study_report.END}\nbelow\n")
    main, others = {"CLIP": 10, "ProtoCLIP": 3}, dict.fromkeys(rows, 2) | {"SigLIP": 3}
    wanted = {study.EMOJI: [main, others], study.CLIP_ART: [{"CLIP": 5}]}
    study_report.write_report(runs, wanted, study.FLOORS, tmp_path, page)
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "\nold\n" not in text
    want = stats.ttest_rel(proto, clip)  # two primary metrics, so Holm doubles the smaller p
    assert f"+0.057 ± 0.038 (p {2 * want.pvalue:.2g})" in text
    assert "| CLIP | 3 | 0.001, 33 | 1.00 | 0.400 | 0.400 |" in text
    assert "| *untrained* | 1 |" in text and "0.125" in text
    assert "| CLIP | 2 | 0.001, 33 | 1.00 | 0.600 |" in text
    assert "seeds missing: CLIP 7; SigLIP 1\n" in text and "seeds missing: CLIP 5\n" in text
    assert "CLIP's final AMI, ProtoCLIP: 0.94 of CLIP's samples" in text
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_holm_by_hand():
    given = {"a": 0.01, "b": 0.04, "c": 0.03}
    found = study_report.holm({k: study_report.Difference(0, 0, p) for k, p in given.items()})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_no_run_is_done_twice(tmp_path, monkeypatch, capsys):
    """A torn line is done again."""
    asked, argv = [], ["--quick", "--out", str(tmp_path)]

    def run(task, size):
        asked.append(task)
        result = made(task.row, task.seed, 0.5, task.stage) | {"teacher_seconds": 1.0}
        return result | dataclasses.asdict(task)

    monkeypatch.setattr(study, "run", run)
    assert study.main([*argv, "--hours", "0"], TINY) == 0
    assert not asked and "No run is finished yet" in capsys.readouterr().out
    assert study.main(argv, TINY) == 0
    told, path = capsys.readouterr().out, tmp_path / "quick" / "runs.jsonl"
    assert all(f"| {row} | 1 |" in told for row in study.ROWS)
    first, lines = list(asked), path.read_text().splitlines()
    assert len(lines) == len(set(first)) == len(first)
    path.write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    assert study.main(argv, TINY) == 0 and asked == [*first, first[-1]]


@pytest.mark.slow
@pytest.mark.parametrize("row", (study.PROTO, *study.EXPERIMENTS))
def test_a_run_trains_and_is_judged(row):
    done = study.run(study.Task("main", study.EMOJI, row, 0, 1e-3, 3), TINY)
    assert [0 < one["group/knn_acc1"] <= 1 for one in done["metrics"].values()] == [True, True]
    assert done["cpu_seconds"] > 0 and len(done["curve"]) == (2 if row == study.PROTO else 1)
    if row == study.PROTO:  # on another seed, where the targets are not hard to four digits
        found = study.run(study.Task("tune", study.EMOJI, row, 1000, 1e-3, 3), TINY)["clusters"]
        assert 0 < found["target_nats"] < found["most_nats"]
