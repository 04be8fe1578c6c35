"""The study: sets and concepts apart, statistics by hand, no run done twice, a page."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

from benchmarks import study, study_data, study_report
from benchmarks.study_split import make_split

RULES = study.QUICK.rules
TINY = dataclasses.replace(study.QUICK, main_seeds={study.MLP: 1, study.CNN: 1})


@pytest.fixture(scope="module")
def icons(tmp_path_factory):
    pytest.importorskip("resvg_py")
    return study_data.toy_icons(tmp_path_factory.mktemp("icons"))


def test_a_name_says_what_is_drawn():
    names = ("calendar-alt-24-filled", "outline-sun", "arrow-left", "bold", "24", "user_2")
    want = ["calendar", "sun", "arrow left", "bold", "24", "user"]
    assert [study_data.strip(name) for name in names] == want
    alike = ("fa6-solid", "la"), ("mdi-light", "material-symbols-light"), ("lucide-lab", "feather")
    for one, other in alike:
        assert study_data.family_of(one) == study_data.family_of(other)
    assert study_data.family_of("pixelarticons") != study_data.family_of("pixel")


def test_a_package_gives_one_icon_of_each_name_and_set(tmp_path):
    """Without brands, flags and what is hidden; the SVG keeps the icon's own box."""
    body = {"body": '<path d="M0 0h9v9z"/>'}
    sets = {
        "simple-icons": {"acme": body},
        "logos": {"acme": body},
        "drawn": {"home": body, "home-filled": body, "acme": body, "old": {**body, "hidden": True}},
        "circle-flags": {"xy": body},
    }
    known = {name: {"category": "Logos"} for name in ("simple-icons", "logos")}
    (tmp_path / "json").mkdir()
    (tmp_path / "collections.json").write_text(json.dumps(known))
    for name, icons in sets.items():
        content = {"icons": icons, "width": 20, "left": -2}
        (tmp_path / "json" / f"{name}.json").write_text(json.dumps(content))
    (icon,) = study_data.icons_of(tmp_path)
    assert (icon.set, icon.words) == ("drawn", "home") and icon.name in ("home", "home-filled")
    assert 'viewBox="-2 0 20 16"' in icon.svg


def test_a_fingerprint_ignores_margins_and_tells_drawings_apart():
    grey = np.full((48, 48), 255, np.uint8)
    grey[4:20, 4:20][np.triu_indices(16)] = 0
    moved = np.roll(grey, (20, 9), (0, 1))
    one, two, other = map(study_data.fingerprint, (grey, moved, grey[::-1]))
    assert (one == two).all() and (one != other).sum() > 12
    packed = np.packbits(np.stack([one, other, two]), axis=1)
    pairs = {i: rows.tolist() for i, rows in study_data.near(packed[:2], packed, 12)}
    assert pairs == {0: [0, 2], 1: [1]}


def test_no_set_and_no_concept_is_on_both_sides(icons):
    splits = [make_split(icons, RULES, tuning=tuning) for tuning in (False, True)]
    for split, sets in zip(splits, (RULES.test_sets, RULES.tuning_sets), strict=True):
        families = set(map(study_data.family_of, icons.set[split.pool]))
        assert families.isdisjoint(map(study_data.family_of, sets))
        assert set(icons.set[split.judged_seen]) == set(sets) == set(icons.set[split.judged_new])
        trained = [set(words.split()) for words in icons.words[split.pool].tolist()]
        for concept in split.new:
            assert not any(set(concept.split()) <= words for words in trained)
        assert set(split.seen).isdisjoint(split.new) and len(split.new) == RULES.new_concepts
        assert set(icons.words[split.labelled_seen]) <= set(split.seen)
        assert set(icons.words[split.labelled_new]) <= set(split.new)
        assert len(set(icons.words[split.queries])) == len(split.queries)
    test, tuning = splits
    assert set(test.new).isdisjoint(tuning.new)
    assert not set(icons.set[tuning.pool]) & {*RULES.test_sets, *RULES.tuning_sets}


def test_copies_do_not_cross_the_split(icons):
    """A training drawing that looks like one held out does not train."""
    split = make_split(icons, RULES, tuning=False)
    hashes = icons.hashes.copy()
    copy, original = int(split.pool[0]), int(split.judged_seen[0])
    hashes[copy] = hashes[original]
    found = make_split(dataclasses.replace(icons, hashes=hashes), RULES, tuning=False)
    assert copy not in found.pool
    assert (
        found.counts["near-duplicates of held-out icons"]
        == 1 + split.counts["near-duplicates of held-out icons"]
    )


@pytest.mark.parametrize("row", study.ROWS)
def test_rows_are_flags_that_training_takes(row, tmp_path):
    task = study.Task("main", study.MLP, row, 3, 2e-3, 2.5)
    config = study.configure(task, study.FULL, tmp_path / "teacher.npz")
    assert (config.run.seed, config.optim.epochs, config.optim.lr) == (3, 2.5, 2e-3)
    k = {"K = N / 20": 750, "K = N / 100": 150}.get(row, 1500)
    assert (config.episode.num_clusters, config.episode.size) == (k, 15_000)


def made(row, seed, value, stage="main", **changes):
    scores = dict.fromkeys((*study_report.PRIMARY, *study_report.SECONDARY), value)
    run = dataclasses.asdict(study.Task(stage, study.MLP, row, seed, 1e-3, 4.0))
    run |= {"metrics": scores, "cpu_seconds": 2.0, "episodes": [], "entropies": []}
    return run | {"machine": "M", "commit": "abc", "torch": "2.13"} | changes


def test_the_report_says_what_the_runs_say(tmp_path):
    clip, equal, proto = (0.5, 0.3, 0.4), (0.51, 0.32, 0.4), (0.56, 0.37, 0.44)
    rows = {study.CLIP: clip, study.EQUAL_TIME: equal, study.PROTO: proto}
    runs = [made(row, s, v) for row, values in rows.items() for s, v in enumerate(values)]
    runs += [made("HOG", 0, 0.125, "floor"), made(study.PROTO, 1000, 0, "pairs", ratio=1.25)]
    runs += [made(study.CLIP, 1000, 0.25, "tune")]
    page = tmp_path / "evidence.md"
    page.write_text(f"above\n{study_report.BEGIN}\nold\n{study_report.END}\nbelow\n")
    wanted = {study.MLP: {study.CLIP: 3, study.PROTO: 5}}
    wanted[study.MLP] |= {study.EQUAL_TIME: 3}
    study_report.write_report(runs, wanted, study.FLOORS, {}, page)
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "\nold\n" not in text
    want = stats.ttest_rel(proto, clip)  # three primary metrics, all alike: Holm triples p
    assert f"+0.057 ± 0.038 (p {3 * want.pvalue:.2g})" in text
    assert "| CLIP | 3 | 0.001, 4 | 1.00 | 0.400 | 0.400 | 0.400 |" in text
    assert "a sample costs ProtoCLIP 1.25 times CLIP's" in text
    assert "| HOG | 0.125 |" in text and "seeds missing: ProtoCLIP (mlp) 2." in text
    assert "| CLIP | **0.250** |" in text
    first, _, rest = text.partition("<details>")  # the answer stands outside, all tables inside
    assert "1. **At equal CPU time**" in first and "| CLIP |" not in first
    assert "Finished are 9 of the 11 runs that are compared, and 1 of tuning." in first
    assert rest.count("<details>") + 1 == rest.count("</details>") == rest.count("<summary>")
    nothing = study_report.section(runs[:1], wanted, study.FLOORS, {})
    assert nothing.startswith(study_report.NO_ANSWER)


def test_holm_by_hand():
    given = {"a": 0.01, "b": 0.04, "c": 0.03}
    found = study_report.holm({k: study_report.Difference(0, 0, p, 3) for k, p in given.items()})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_no_run_is_done_twice(icons, tmp_path, monkeypatch, capsys):
    """A torn line is done again; a run that another process holds is left to it."""
    asked, argv = [], ["--quick", "--out", str(tmp_path)]

    def run(task, size, data, towers, done):
        asked.append(task)
        return (
            made(task.row, task.seed, 0.5, task.stage) | dataclasses.asdict(task) | {"ratio": 1.1}
        )

    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "toy_icons", lambda folder: icons)
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    assert study.main([*argv, "--report"], TINY) == 0
    assert not asked and "No run is finished yet" in capsys.readouterr().out
    assert study.main(argv, TINY) == 0
    told, path = capsys.readouterr().out, tmp_path / "quick" / "runs.jsonl"
    assert all(f"| {row} | 1 |" in told for row in study.ROWS) and "missing" not in told
    first, lines = list(asked), path.read_text().splitlines()
    assert len(lines) == len(set(first)) == len(first)
    assert {task.epochs for task in first if task.row == study.EQUAL_TIME} == {2.2}
    path.write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    assert study.main(argv, TINY) == 0 and asked == [*first, first[-1]]


@pytest.mark.slow
@pytest.mark.parametrize("tower", (study.MLP, study.CNN))
def test_a_run_trains_and_is_judged(icons, tower):
    data = study.Data(icons, RULES)
    towers, task = study.Towers(data), study.Task("main", tower, study.PROTO, 0, 1e-3, 3)
    done = study.Run(task, TINY, data, towers).finish()
    assert set(done["metrics"]) == {*study_report.PRIMARY, *study_report.SECONDARY}
    steps = -(-3 * 400 // 32)
    assert done["cpu_seconds"] > 0 and done["samples"] == steps * 32
    assert len(done["episodes"]) == -(-steps // 4)
    last = done["episodes"][-1]
    assert last["image_inertia"] > 0 and last["external_inertia"] > 0
    assert 0 <= done["entropies"][-1]["image"] < done["entropies"][-1]["most"]
    if tower == study.MLP:
        assert done["metrics"]["zero-shot"] > 0.5  # of 46 concepts


@pytest.mark.slow
def test_episodes_alternate(icons):
    data = study.Data(icons, RULES)
    task = study.Task("pairs", study.MLP, study.PROTO, 1000, 1e-3, 2)
    found = study.measure_pair(task, TINY, data, study.Towers(data), (1e-3, 1e-3))
    clip, proto = (found["seconds_by_episode"][row] for row in (study.CLIP, study.PROTO))
    assert len(clip) == len(proto) > 3
    assert found["ratio"] == pytest.approx(sum(proto) / sum(clip), abs=1e-3)
