"""The study of small batches: sets apart, equal time, rates, controls, no early answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from benchmarks import pictures
from benchmarks.study import protocol, small_batches, small_batches_report
from benchmarks.study.data import Icons, family_of, toy_icons
from benchmarks.study.report import EQUAL_TIME, PRIMARY, Difference
from benchmarks.study.small_batches import (
    BY_NAME,
    CLIP,
    CNN,
    FULL,
    INTERNAL_ONLY,
    LATE_QUEUES,
    MLP,
    OURS,
    QUEUES,
    ROWS,
    SHUFFLED,
    TINY,
    WITH_TEACHER,
    Cost,
    Order,
    Task,
)
from benchmarks.study.split import TEST_SETS, TUNING_SETS
from protoclip.settings.config import LossConfig

QUEUE = next(iter(QUEUES))


@pytest.fixture(scope="module")
def icons(tmp_path_factory: pytest.TempPathFactory) -> Icons:
    pytest.importorskip("resvg_py")
    return toy_icons(tmp_path_factory.mktemp("icons"))


def test_the_sets_are_of_families_that_were_never_judged_or_tuned_on() -> None:
    families = [family_of(name) for name in small_batches.TEST_SETS]
    assert len(set(families)) == 20
    assert set(families).isdisjoint(map(family_of, TEST_SETS + TUNING_SETS))
    assert FULL.rules.tuning_sets == TUNING_SETS


@pytest.mark.parametrize("row", ROWS)
def test_rows_are_flags_that_training_takes(row: str, tmp_path: Path) -> None:
    task = Task("main", MLP, row, seed=100, lr=1e-3, epochs=4.5, batch=64, icons=15_000)
    size = dataclasses.replace(FULL, batch=task.batch)
    config = protocol.configure(task, size, tmp_path / "teacher.npz", ROWS)
    assert (config.optim.batch_size, config.optim.epochs, config.run.seed) == (64, 4.5, 100)
    plain = row in (CLIP, EQUAL_TIME, WITH_TEACHER, *QUEUES, *LATE_QUEUES)
    assert config.method == ("clip" if plain else "protoclip")


# ---- rivals ----


@pytest.mark.parametrize("alone", [0, 2])
def test_a_queue_adds_the_last_steps_features_as_negatives(alone: int) -> None:
    torch.manual_seed(0)
    loss = small_batches.QueueLoss(LossConfig(), steps=2, alone=alone)
    steps = [
        SimpleNamespace(
            image=torch.randn(4, 8, requires_grad=True), text=torch.randn(4, 8, requires_grad=True)
        )
        for _ in range(4)
    ]
    scale = torch.tensor(10.0)
    for number, step in enumerate(steps):
        total = loss(step, None, torch.arange(4), logit_scale=scale).total
        older = steps[max(0, number - 2) : number] if number >= alone else []
        keys = [step, *older]
        image_keys, text_keys = (
            F.normalize(torch.cat([getattr(key, name) for key in keys]), dim=1)
            for name in ("image", "text")
        )
        images = image_keys[:4]
        texts = text_keys[:4]
        by_image = F.cross_entropy(scale * images @ text_keys.T, torch.arange(4))
        by_text = F.cross_entropy(scale * texts @ image_keys.T, torch.arange(4))
        torch.testing.assert_close(total, (by_image + by_text) / 2, rtol=1e-5, atol=1e-6)
    total.backward()
    assert steps[-1].image.grad is not None
    assert steps[-2].image.grad is None


def run_on(icons: Icons, row: str, epochs: float = 3.0) -> small_batches.Run:
    data = protocol.Data(icons, TINY.rules)
    task = Task("main", MLP, row, seed=100, lr=1e-3, epochs=epochs, batch=16, icons=300)
    return small_batches.Run(task, TINY, data, protocol.Towers(data))


def test_shuffled_features_are_the_teacher_s_of_other_samples(icons: Icons) -> None:
    teacher = run_on(icons, OURS).trainer.setup.teacher
    shuffled = run_on(icons, SHUFFLED).trainer.setup.teacher
    assert teacher is not None and shuffled is not None
    assert len(teacher) == 300
    same = (teacher == shuffled).all(1).float().mean()
    assert same < 0.2  # names repeat
    assert np.allclose(np.sort(teacher.numpy(), axis=0), np.sort(shuffled.numpy(), axis=0))


def test_features_shuffled_by_name_are_another_name_s_for_all_of_its_samples(icons: Icons) -> None:
    run = run_on(icons, BY_NAME)
    teacher, shuffled = run_on(icons, OURS).trainer.setup.teacher, run.trainer.setup.teacher
    assert teacher is not None and shuffled is not None
    words = np.array([run.trainer.dataset.captions(i)[0] for i in range(300)])
    of_name = {name: teacher[i] for i, name in enumerate(words)}
    others = {}
    for name, row in zip(words, shuffled, strict=True):
        (other,) = (other for other, of_other in of_name.items() if bool((of_other == row).all()))
        assert others.setdefault(name, other) == other
    assert sorted(others.values()) == sorted(others)  # each name once
    assert sum(name == other for name, other in others.items()) < len(others) / 4


@pytest.mark.slow
@pytest.mark.parametrize("row", [QUEUE, [*LATE_QUEUES][0], BY_NAME, "distillation"])
def test_a_rival_trains_and_is_judged(icons: Icons, row: str) -> None:
    run = run_on(icons, row)
    record = run.finish()
    assert record["pairs"] == 300
    assert record["samples"] == 57 * 16  # 3 epochs of 300 in batches of 16
    assert record["metrics"]["zero-shot"] > 0.3  # of 46 concepts
    drawings, right = np.array([*record["named"].values()]).sum(0)
    assert record["metrics"]["zero-shot"] == pytest.approx(right / drawings, abs=1e-5)
    if steps := (QUEUES | LATE_QUEUES).get(row):
        assert len(run.trainer.stepper.loss.queue) == steps


# ---- time ----


def test_a_run_s_later_episodes_cost_as_much_as_the_last_that_was_timed() -> None:
    cost = Cost((1.0, 1.0, 3.0, 2.0))
    assert cost.seconds(4) == 7
    assert cost.seconds(16) == 7 + 12 * 2
    assert cost.episodes(cost.seconds(16)) == 16


@pytest.fixture
def done() -> protocol.Done:
    """All timed runs: an episode takes CLIP 10 s, a teacher's prototypes 12 s and then 11 s, every
    other row 20 s; the teacher takes 32 s."""
    done: protocol.Done = {}
    for task in Order(FULL, {}).timed():
        record = dataclasses.asdict(task) | {"metrics": {}, "cpu_seconds": 32.0}
        row = [10.0, 10.0, 12.0, 11.0]
        if task.row != OURS:
            row = [20.0] * len(row)
        record["seconds_by_episode"] = {CLIP: [10.0] * 4, task.row: row}
        done[task.key] = record
    return done


def test_equal_time_is_the_row_s_time_in_epochs_of_clip(done: protocol.Done) -> None:
    order = Order(FULL, done)
    ratio = (10 + 10 + 12 + 13 * 11) / 160
    epochs = {
        row: order.epochs(MLP, row, 64, 60_000)
        for row in (CLIP, OURS, SHUFFLED, BY_NAME, EQUAL_TIME, WITH_TEACHER, QUEUE, INTERNAL_ONLY)
    }
    assert epochs[CLIP] == epochs[OURS] == epochs[SHUFFLED] == epochs[BY_NAME] == 4
    assert epochs[EQUAL_TIME] == pytest.approx(4 * ratio, abs=1e-3)
    assert epochs[WITH_TEACHER] == pytest.approx(4 * (ratio + 32 / 160), abs=1e-3)
    assert epochs[QUEUE] == epochs[INTERNAL_ONLY] == pytest.approx(4 * ratio / 2, abs=1e-3)
    short = (10 + 10 + 12 + 11) / 40  # 15,000 icons: four episodes
    assert order.epochs(MLP, EQUAL_TIME, 64, 15_000) == pytest.approx(4 * short, abs=1e-3)


def test_rows_for_another_s_time_wait_until_it_is_known() -> None:
    rows = {task.row for task in Order(FULL, {}).all() if task.stage != "floor"}
    assert rows == {CLIP, OURS, SHUFFLED}


def test_a_report_says_what_rows_wait_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, done: protocol.Done
) -> None:
    some = {key: run | ORIGIN | {"texts": 9} for key, run in list(done.items())[:-3]}
    small_batches.SmallBatches().report(some, tmp_path, tmp_path)
    assert "\n3 timed runs are missing (--pairs)" in capsys.readouterr().out


# ---- the order of the runs ----


def scored(task: Task, value: float) -> dict[str, Any]:
    return dataclasses.asdict(task) | {"metrics": dict.fromkeys(PRIMARY, value)}


def finish(done: protocol.Done, best_lr: float = 2e-3, best_batch: int = 128) -> list[Task]:
    """Pretend to do every run, one by one as ``work`` does; tuning prefers a rate and a batch."""
    tasks: list[Task] = []

    for task in Order(FULL, done).all():
        if task.key in done:
            continue
        value = 0.0
        if task.stage != "floor":
            worse = abs(np.log2(task.lr / best_lr)) + abs(np.log2(task.batch / best_batch))
            value = 1 - worse / 100
        done[task.key] = scored(task, value)
        tasks.append(task)
    assert all(task.key in done for task in Order(FULL, done).all())
    return tasks


def test_tuning_goes_on_until_the_best_rate_is_not_at_the_edge(done: protocol.Done) -> None:
    tasks = finish(done, best_lr=1.6e-2)
    tuned = {
        task.lr for task in tasks if (task.stage, task.row, task.batch) == ("tune", EQUAL_TIME, 64)
    }
    assert max(tuned) == 3.2e-2
    judged = [task for task in tasks if task.stage in ("main", "best")]
    assert {task.lr for task in judged} == {1.6e-2}


def test_planned_rows_are_judged_at_the_two_best_rates_of_ours(done: protocol.Done) -> None:
    best = {(EQUAL_TIME, 64): 1e-3, (OURS, 64): 1e-3, (EQUAL_TIME, 256): 1e-3, (OURS, 256): 2e-3}
    order = Order(FULL, done)
    assert not list(order.at_one_rate(MLP, FULL.batches))  # before tuning
    for (row, batch), lr_of_best in best.items():
        epochs = order.epochs(MLP, row, batch, 60_000)
        assert epochs is not None
        for lr, value in ((lr_of_best / 2, 0.5), (lr_of_best, 0.6), (lr_of_best * 2, 0.4)):
            task = Task("tune", MLP, row, 1000, lr, epochs, batch, 60_000)
            done[task.key] = scored(task, value)
    assert not list(order.at_one_rate(CNN, FULL.batches))
    tasks = list(order.at_one_rate(MLP, FULL.batches))
    assert {(task.stage, task.row, task.batch, task.lr) for task in tasks} == {
        ("rate", EQUAL_TIME, 64, 5e-4),
        ("rate", OURS, 64, 5e-4),
        ("rate", EQUAL_TIME, 256, 2e-3),
        ("rate", OURS, 256, 1e-3),
    }
    assert set(map(tuple, seeds_by_row(tasks).values())) == {tuple(range(100, 108))}
    assert all(task.epochs == order.epochs(MLP, task.row, task.batch, 60_000) for task in tasks)


def seeds_by_row(tasks: Iterable[Task]) -> dict[tuple[str, str, int, int], list[int]]:
    seeds: dict[tuple[str, str, int, int], list[int]] = {}
    for task in tasks:
        seeds.setdefault((task.tower, task.row, task.batch, task.icons), []).append(task.seed)
    return seeds


def test_every_row_has_its_seeds_and_no_run_is_done_twice(done: protocol.Done) -> None:
    tasks = finish(done)
    assert len({task.key for task in tasks}) == len(tasks)
    seeds = seeds_by_row(task for task in tasks if task.stage == "main")
    eight = list(range(100, 108))
    three = [100, 101, 102]
    for tower in (MLP, CNN):
        for batch in (64, 256):
            for row in (CLIP, EQUAL_TIME, WITH_TEACHER, OURS):
                planned = tower == MLP and row in (EQUAL_TIME, OURS)
                expected = list(range(100, 116)) if planned else eight
                assert seeds.pop((tower, row, batch, 60_000)) == expected
    for row in (small_batches.JUDGED_QUEUE, BY_NAME, *small_batches.CONTROLS):
        assert seeds.pop((MLP, row, 64, 60_000)) == eight
    for row in (EQUAL_TIME, OURS):
        for batch in FULL.axis:
            assert seeds.pop((MLP, row, batch, 60_000)) == three
        for icons in FULL.amounts:
            assert seeds.pop((MLP, row, 64, icons)) == three
    assert not seeds
    tuned = [task for task in tasks if task.stage == "tune" and task.batch in (64, 256)]
    assert {task.seed for task in tuned} == {1000, 1001, 1002}


def test_what_is_planned_comes_first_and_seed_by_seed(done: protocol.Done) -> None:
    judged = [task for task in finish(done) if task.stage == "main"]
    first = judged[:64]
    assert {(task.tower, task.row, task.batch) for task in first} == {
        (MLP, row, batch) for row in (EQUAL_TIME, OURS) for batch in (64, 256)
    }
    assert [task.seed for task in first] == sorted(task.seed for task in first)


def test_each_method_s_best_batch_has_the_same_time(done: protocol.Done) -> None:
    best = [task for task in finish(done, best_batch=512) if task.stage == "best"]
    assert len(best) == 16
    assert {task.batch for task in best} == {512}
    ours = next(task for task in best if task.row == OURS)
    clip = next(task for task in best if task.row == EQUAL_TIME)
    assert ours.epochs == 4  # here a batch of 512 takes as long as one of 64
    assert clip.epochs == pytest.approx((10 + 10 + 12 + 13 * 11) / 40, abs=1e-3)


# ---- the report ----

OURS_64 = [0.62, 0.63, 0.61, 0.64] * 4
EQUAL_64 = [0.60, 0.62, 0.60, 0.61] * 4
OURS_256 = [0.61, 0.60, 0.62, 0.63] * 4
EQUAL_256 = [0.61, 0.61, 0.61, 0.62] * 4


def judged_runs(tower: str) -> list[dict[str, Any]]:
    """All planned runs of a tower; ours names one more drawing of two in "a", none in "b"."""
    values = {
        (OURS, 64): OURS_64,
        (EQUAL_TIME, 64): EQUAL_64,
        (OURS, 256): OURS_256,
        (EQUAL_TIME, 256): EQUAL_256,
    }
    return [
        scored(Task("main", tower, row, 100 + i, 1e-3, 4.0, batch, 60_000), value)
        | {"named": {"a": [2, 1 + (row == OURS)], "b": [2, 1]}}
        for (row, batch), of_seeds in values.items()
        for i, value in enumerate(of_seeds[: small_batches_report.SEEDS[tower]])
    ]


def planned_of(found: list[dict[str, Any]]) -> dict[Any, tuple[Difference, float]]:
    return small_batches_report.planned(
        {tower: small_batches_report.runs_of(found, tower) for tower in (MLP, CNN)}
    )


def test_sets_are_counted_over_the_seeds_that_both_rows_have() -> None:
    ours, equal = (small_batches_report.name(row, 64) for row in (OURS, EQUAL_TIME))
    runs: Any = {
        ours: {seed: {"named": {"a": [9, 5]}} for seed in (100, 101)},
        equal: {seed: {"named": {"a": [9, 4]}} for seed in (100, 101, 103)},
    }
    runs[ours][102] = {}  # it diverged
    runs[equal][102] = {"named": {"a": [9, 8]}}
    expected = "at 64 more drawings in 1 of 1 sets, fewer in 0"
    assert small_batches_report.by_set(runs, 64) == expected


def test_there_is_no_answer_before_the_last_planned_run() -> None:
    found = judged_runs(MLP)[:-1]
    assert not planned_of(found)
    text = small_batches_report.section([run | ORIGIN for run in found], protocol.FLOORS)
    assert text.startswith("**No answer yet**")
    assert "63 of 64 (MLP over HOG and pixels) and 0 of 32 (default CNN)" in text
    assert "+0." not in text and "svg" not in text  # no result in the making


def test_a_diverged_run_leaves_out_its_pair_and_too_many_are_no_answer() -> None:
    found = judged_runs(MLP)
    of_256 = [run for run in found if (run["row"], run["batch"]) == (OURS, 256)]
    of_256[0]["metrics"] = {}
    tests = planned_of(found)
    assert tests[MLP, "AMI", small_batches_report.GAIN][0].seeds == 16
    assert tests[MLP, "AMI", small_batches_report.MORE][0].seeds == 15
    for run in of_256[:5]:
        run["metrics"] = {}
    assert {test for _, _, test in planned_of(found)} == {small_batches_report.GAIN}
    text = small_batches_report.section([run | ORIGIN for run in found], protocol.FLOORS)
    assert "n = 16 |" in text and "no answer: too many runs diverged" in text


def test_a_row_with_runs_of_two_lengths_is_an_error() -> None:
    found = judged_runs(MLP)
    found[3]["epochs"] = 4.5
    with pytest.raises(ValueError, match=r"one learning rate and length, got 0.001, 4 epochs and"):
        planned_of(found)


ORIGIN = {"machine": "M", "commit": "abc", "torch": "2.13"}


def test_the_planned_tests_are_paired_and_corrected_for_all_twelve() -> None:
    found = planned_of(judged_runs(MLP))
    assert len(found) == 6
    gain = stats.ttest_rel(OURS_64, EQUAL_64)
    more = stats.ttest_rel(
        np.subtract(OURS_64, EQUAL_64).round(6), np.subtract(OURS_256, EQUAL_256).round(6)
    )
    delta, p = found[MLP, "AMI", small_batches_report.GAIN]
    assert delta.mean == pytest.approx(0.0175)
    assert delta.p == pytest.approx(gain.pvalue)
    lowest = min(p for _, p in found.values())
    assert lowest == pytest.approx(12 * min(gain.pvalue, more.pvalue))
    delta, p = found[MLP, "probe", small_batches_report.MORE]
    assert delta.p == pytest.approx(more.pvalue)
    assert p >= delta.p * 7  # the other tower's six count, though they are missing


def test_the_page_has_the_planned_table_and_the_rest_says_that_it_is_exploratory() -> None:
    found = [run | ORIGIN for run in judged_runs(MLP)]
    text = small_batches_report.section(found, protocol.FLOORS)
    assert text.startswith("| a teacher's prototypes")
    assert "at 64 more drawings in 1 of 2 sets, fewer in 0" in text
    (line,) = [
        line for line in text.splitlines() if line.startswith("| MLP over HOG and pixels: A")
    ]
    assert "+0.018" in line and "(p " in line
    assert "Exploratory, not corrected" in text
    assert "](small-batches.svg)" in text


@pytest.mark.parametrize("tower", [MLP, CNN])
def test_differences_by_rate_are_of_the_same_seeds(tower: str) -> None:
    runs = judged_runs(tower)
    for run in runs:
        if (run["row"], run["batch"]) == (OURS, 256):
            run["lr"] = 2e-3
    swapped = [
        scored(Task("rate", tower, row, 100 + i, lr, 4.0, 256, 60_000), value)
        for row, lr, of_seeds in ((OURS, 1e-3, [0.5] * 8), (EQUAL_TIME, 2e-3, [0.6] * 8))
        for i, value in enumerate(of_seeds)
    ]
    text = small_batches_report.section([run | ORIGIN for run in (*runs, *swapped)], ())
    lines = [line for line in text.splitlines() if line.startswith("| batch 256: ")]
    expected = {
        "0.001, CLIP 0.001": np.subtract([0.5] * 8, EQUAL_256[:8]),
        "0.001, CLIP 0.002": np.subtract([0.5] * 8, [0.6] * 8),
        "0.002, CLIP 0.001": np.subtract(OURS_256[:8], EQUAL_256[:8]),
        "0.002, CLIP 0.002": np.subtract(OURS_256[:8], [0.6] * 8),
    }
    for line, (rates, gained) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"| batch 256: {rates} | 8 |")
        assert f"{gained.mean():+.3f}" in line


def test_a_rate_at_the_edge_of_what_was_tried_is_not_called_the_best() -> None:
    tried = [
        scored(Task("tune", MLP, OURS, 1000, lr, 4.0, 64, 60_000), value)
        for lr, value in ((5e-4, 0.5), (1e-3, 0.6), (2e-3, 0.7))
    ]
    assert "**" not in small_batches_report.tuning_table(tried)
    assert "**0.001: 0.6000** (1)" in small_batches_report.tuning_table(
        [*tried[:2], scored(Task("tune", MLP, OURS, 1000, 2e-3, 4.0, 64, 60_000), 0.55)]
    )


def gained_of(found: list[dict[str, Any]]) -> tuple[small_batches_report.Gained, ...]:
    by_tower = {tower: small_batches_report.runs_of(found, tower) for tower in (MLP, CNN)}
    return (
        small_batches_report.gained_by_batch(by_tower),
        small_batches_report.gained_at_one_rate(found, by_tower),
    )


def test_the_picture_has_a_point_and_its_number_for_each_tower_and_batch() -> None:
    gained = gained_of([*judged_runs(MLP), *judged_runs(CNN)[:-1]])
    svg = pictures.draw_small_batches(*gained)
    assert svg.count("<circle") == 2 * len(PRIMARY)
    assert svg.count(">+.018</text>") == len(PRIMARY)
    assert small_batches_report.picture_title(*gained) in svg
    assert "CNN" not in svg  # a run is missing
    gained = gained_of([*judged_runs(MLP), *judged_runs(CNN)])
    svg = pictures.draw_small_batches(*gained)
    assert svg.count("<circle") == 4 * len(PRIMARY)
    assert "opacity" not in svg
    assert ">CNN: 8 seeds at 64, 256</text>" in svg
    assert "default CNN (8 seeds at 64, 256): zero-shot: +0.018 ± " in svg


def test_a_ring_is_the_gain_if_clip_has_the_rate_that_tuning_gave_to_ours() -> None:
    planned = judged_runs(MLP)
    at_other_rates = [
        scored(Task("rate", MLP, EQUAL_TIME, 100 + i, lr, 4.0, 64, 60_000), value)
        for lr, value in ((1e-3, 0.615), (5e-4, 0.5))
        for i in range(8)
    ]
    gained, at_one_rate = gained_of([*planned, *at_other_rates])
    assert at_one_rate.keys() == {MLP} and at_one_rate[MLP]["AMI"].keys() == {64}
    assert at_one_rate[MLP]["AMI"][64].mean == pytest.approx(np.mean(OURS_64[:8]) - 0.615)
    svg = pictures.draw_small_batches(gained, at_one_rate)
    assert svg.count('stroke="currentColor"') == len(PRIMARY)
    assert "If CLIP has their learning rate: zero-shot: +0.010 ± " in svg


def test_few_seeds_are_pale_and_batches_are_also_compared_in_the_seeds_of_all() -> None:
    planned = judged_runs(MLP)
    axis = [
        scored(Task("main", MLP, row, 100 + i, 1e-3, 4.0, 512, 60_000), value)
        for row, of_seeds in ((OURS, (0.61, 0.62, 0.65)), (EQUAL_TIME, (0.60, 0.60, 0.60)))
        for i, value in enumerate(of_seeds)
    ]
    gained = gained_of([*planned, *axis])
    assert "(16 seeds at 64, 256; 3 at 512):" in small_batches_report.picture_title(*gained)
    svg = pictures.draw_small_batches(*gained)
    assert svg.count('class="ours" opacity') == 2 * len(PRIMARY)
    found = [run | ORIGIN for run in (*planned, *axis)]
    text = small_batches_report.section(found, ())
    table = text.partition("| gain by batch, in the same 3 seeds |")[2].partition("\n\n")[0]
    lines = dict(line[2:].split(" | ", 1) for line in table.splitlines()[2:])
    assert lines.keys() == {"64", "256", "512"}
    assert lines["64"].startswith(f"+{np.subtract(OURS_64, EQUAL_64)[:3].mean():.3f} ")
    assert lines["512"].startswith("+0.027 ")


def test_each_at_its_best_batch_says_what_it_was_and_counts_runs_with_scores() -> None:
    best = [
        scored(Task("best", MLP, row, 100 + i, 2e-3, epochs, 512, 60_000), value)
        | {"cpu_seconds": seconds}
        for row, epochs, of_seeds, seconds in (
            (OURS, 5.5, (0.61, 0.62, 0.65), 110.0),
            (EQUAL_TIME, 7.077, (0.60, 0.60, 0.60), 113.0),
        )
        for i, value in enumerate(of_seeds)
    ]
    best[0]["metrics"] = {}
    best += [
        scored(Task("best by own seconds", MLP, EQUAL_TIME, 100 + i, 2e-3, 7.5, 512, 60_000), 0.615)
        for i in range(3)
    ]
    table = small_batches_report.best_table(best, MLP)
    assert f"| {OURS}, batch 512 | 2 of 3 | 0.002, 5.5 | 110 | 0.635 |" in table
    assert f"| {EQUAL_TIME}, batch 512 | 3 | 0.002, 7.077 | 113 | 0.600 |" in table
    assert f"| {EQUAL_TIME}, batch 512, by own seconds | 3 | 0.002, 7.5 |" in table
    assert f"| {OURS} minus {EQUAL_TIME}, batch 512 | 2 |  |  | +0.035 " in table
    assert f"| {OURS} minus {EQUAL_TIME}, batch 512, by own seconds | 2 |  |  | +0.020 " in table


def test_the_page_is_that_of_the_records() -> None:
    path = small_batches.RESULTS / "runs.jsonl"
    found = [*protocol.finished(path, Task).values()]
    page = small_batches_report.PAGE.read_text(encoding="utf-8")
    assert small_batches_report.section(found, protocol.FLOORS) in page, "make small-batches-report"
