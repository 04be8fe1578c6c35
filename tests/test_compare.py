"""``protoclip compare``: which runs it starts, what it keeps, and what it says of them.

Most runs are of fake_train.py, which writes a run's files without training.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.run as torchrun
from html_page import in_browser, needs_browser, read_page
from ranks import exit_codes, logs_of, start_command

from protoclip import compare as command
from protoclip.common.files import sole_writer
from protoclip.data import open_dataset
from protoclip.evaluate.results import Outcome, SetResults, read_results
from protoclip.report.__main__ import main as report
from protoclip.report.comparison import (
    Comparison,
    Pair,
    Row,
    compare_rows,
    format_comparison,
    paragraph,
    primary_of,
)
from protoclip.report.figures import differences_svg
from protoclip.settings.comparison import FILE, LOCK, Cost
from protoclip.train import make_config

FAKE = [sys.executable, str(Path(__file__).with_name("fake_train.py"))]
ROWS = ["CLIP", "ProtoCLIP", "CLIP-time-of-ProtoCLIP"]
Compare = Callable[..., int]


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compare:
    """``compare(*flags)`` with fake runs of 40 steps; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "train_command", lambda processes: FAKE)
    write_table(tmp_path)

    def start(*flags: str) -> int:
        data = ["--train-data", "pairs.csv", "--val-fraction", "0.25", "--max-steps", "40"]
        return command.main([*data, "--device", "cpu", "--seeds", "3", *flags])

    return start


def write_table(folder: Path) -> None:
    """Pictures with three captions each."""
    shapes = open_dataset("builtin:shapes:32")
    rows = []
    for i in range(len(shapes)):
        shapes.image(i).save(folder / f"{i}.png")
        rows += [(f"{i}.png", f"{word} {shapes.captions(i)[0]}") for word in ("a", "the", "one")]
    with open(folder / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *rows])


def calls() -> list[str]:
    """The runs that were started, since the last call."""
    file = Path("calls.txt")
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def started() -> list[str]:
    return [line.split()[0] for line in calls()]


def content() -> dict[str, Any]:
    return json.loads(Path("logs/compare", FILE).read_text())


def order(monkeypatch: pytest.MonkeyPatch, orders: dict[str, str]) -> None:
    monkeypatch.setenv("FAKE_TRAIN", json.dumps(orders))


def times(row: str, factors: list[float]) -> dict[str, str]:
    """Orders: what the runs of a row take, by seed, as a factor."""
    return {f"{row}/seed-{seed}": f"time {factor}" for seed, factor in enumerate(factors)}


def stars() -> list[tuple[str, str]]:
    """The rows and scores that are called significant."""
    return [
        (contrast["row"], score["metric"])
        for contrast in content()["result"]["contrasts"]
        for score in contrast["scores"]
        if score["significant"]
    ]


def opening() -> str:
    """The first sentences of the page."""
    answers = read_page(Path("logs/compare/report.html")).all(class_="answer")
    return " ".join(answer.text for answer in answers)


def test_the_times_of_all_seeds_say_how_long_the_baseline_trains(compare: Compare) -> None:
    assert compare() == 0
    runs = [line.split() for line in calls()]
    assert [run[0] for run in runs] == [
        *(f"{row}/seed-{seed}" for seed in range(3) for row in ROWS[:2]),
        *(f"{ROWS[2]}/seed-{seed}" for seed in range(3)),
    ]
    steps = {(run[0].split("/")[0], run[1], run[2]) for run in runs}
    assert steps == {
        ("CLIP", "clip", "40"),
        ("ProtoCLIP", "protoclip", "40"),
        ("CLIP-time-of-ProtoCLIP", "clip", "60"),
    }
    assert {run[4] for run in runs} == {"passive"}
    assert content()["ratios"] == {"ProtoCLIP": pytest.approx(1.5)}
    (equal_time, equal_steps) = content()["result"]["contrasts"]
    assert equal_time["equal"] == "time" and equal_steps["equal"] == ""
    assert equal_time["cost"]["log_ratio"] == pytest.approx(0)
    assert equal_steps["cost"]["log_ratio"] == pytest.approx(math.log(1.5))
    text, image = (score for score in equal_time["scores"] if score["primary"])
    assert text["significant"] and abs(text["difference"] - 0.1) < 0.01
    assert not image["significant"]
    assert stars() == [("ProtoCLIP", "text_retrieval_recall@1")]


def test_a_noisy_clock_claims_no_equal_time(
    compare: Compare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The factors of four comparisons of rows that were equal in all but name."""
    order(monkeypatch, times("ProtoCLIP", [0.838, 1.023, 1.344, 1.134]))
    assert compare("--seeds", "4") == 0
    assert not any(run.startswith(ROWS[2]) for run in started())
    assert content()["ratios"] == {} and stars() == []
    first = "ProtoCLIP took 1.60 times (± 37 %) the training time of CLIP: not known within 5 %"
    assert opening().startswith(first) and "is not compared at equal time" in opening()
    for remedy in ("longer runs", "--equal-steps", "more seeds, in a new --out"):
        assert remedy in opening()
    out = capsys.readouterr().out
    assert "the same time" not in out and "(not tested)" in out


def test_a_row_of_equal_cost_is_tested_against_the_baseline_itself(
    compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    order(monkeypatch, times("ProtoCLIP", [0.66, 0.67, 0.673]))  # of 1.5
    assert compare() == 0
    assert len(started()) == 6 and content()["ratios"] == {}
    (contrast,) = content()["result"]["contrasts"]
    assert (contrast["baseline"], contrast["equal"]) == ("CLIP", "time")
    assert stars() == [("ProtoCLIP", "text_retrieval_recall@1")]
    assert "compared with CLIP trained for the same time, improves" in opening()


def test_a_baseline_that_missed_its_time_is_not_called_equally_long(
    compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    order(monkeypatch, times(ROWS[2], [1.07, 1.06, 1.05]))
    assert compare() == 0
    assert len(started()) == 9 and stars() == []
    page = read_page(Path("logs/compare/report.html")).text
    first = "ProtoCLIP took 0.94 times (± 2.4 %) the training time of CLIP, time of ProtoCLIP, so"
    assert opening().startswith(first) and "the same time" not in page


def test_what_was_decided_on_the_timed_seeds_stays(
    compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other seeds, and for rows that are added."""
    assert compare("--jobs", "2", "--seeds", "4") == 0
    assert content()["timed"] == [0, 1, 2]
    # The runs of the timed seeds are alone, so their order is known.
    assert started()[:9] == [
        *(f"{row}/seed-{seed}" for seed in range(3) for row in ROWS[:2]),
        *(f"{ROWS[2]}/seed-{seed}" for seed in range(3)),
    ]
    before = content()
    order(monkeypatch, times("CLIP", [1, 1, 1, 1, 9.0]) | times("K-3", [2.0] * 5))
    rows = ["--row", "CLIP: --method clip", "--row", "K 3: --k 3"]
    assert compare("--seeds", "5", *rows) == 0
    after = content()
    assert after["timed"] == [0, 1, 2]
    assert after["ratios"] == before["ratios"] | {"K 3": pytest.approx(3)}
    assert [cost for cost in after["costs"] if cost["row"] == "ProtoCLIP"] == before["costs"]
    assert started()[:6] == [
        *(f"K-3/seed-{seed}" for seed in range(3)),
        *(f"CLIP-time-of-K-3/seed-{seed}" for seed in range(3)),
    ]


def test_equal_steps_is_a_comparison_of_its_own(compare: Compare) -> None:
    assert compare("--equal-steps") == 0
    assert len(started()) == 6
    (contrast,) = content()["result"]["contrasts"]
    assert contrast["equal"] == "steps" and stars() == [("ProtoCLIP", "text_retrieval_recall@1")]
    assert "compared with CLIP trained for the same number of steps, improves" in opening()
    assert "It took 1.50 times (± 0 %) the training time of CLIP." in opening()
    assert "at equal steps" in read_page(Path("logs/compare/report.html")).section("table").text


def test_rows_of_other_lengths_are_not_said_to_be_at_equal_steps(compare: Compare) -> None:
    rows = ["--row", "A: --method clip", "--row", "B: --method clip --max-steps 20"]
    assert compare("--equal-steps", *rows) == 0
    assert "compared with A trained for 40 steps (B: 20), " in opening()
    assert "same number" not in opening()


def test_the_teacher_counts_where_it_is_asked_for(compare: Compare) -> None:
    assert compare("--count-teacher") == 0
    assert content()["ratios"] == {"ProtoCLIP": pytest.approx((60 + 10) / 40)}
    assert "CLIP-time-of-ProtoCLIP/seed-0 clip 70" in " ".join(calls())


def use_fake_runs(orders: str) -> None:
    command.train_command = lambda processes: FAKE
    os.environ["FAKE_TRAIN"] = orders


def test_a_killed_command_continues_and_a_new_seed_adds_only_its_runs(
    compare: Compare, tmp_path: Path
) -> None:
    """Killed as its fourth run has begun: that run is resumed, and finished ones are kept."""
    flags = ["--train-data", "pairs.csv", "--val-fraction", "0.25", "--max-steps", "40"]
    flags += ["--device", "cpu", "--seeds", "3"]
    fault = partial(use_fake_runs, json.dumps({"ProtoCLIP/seed-1": "kill"}))
    processes = start_command(tmp_path, flags, 1, fault=fault, command="protoclip.compare")
    assert exit_codes(processes) == [-signal.SIGKILL], logs_of(tmp_path)
    first = started()
    assert len(first) == 4 and first[-1] == "ProtoCLIP/seed-1" and not content()["shown"]
    before = Path("logs/compare/CLIP/seed-0/results.json").stat().st_mtime_ns
    assert compare() == 0
    again = started()
    assert again[0] == first[-1] and len(again) == 9 - 3
    assert Path("logs/compare/CLIP/seed-0/results.json").stat().st_mtime_ns == before
    assert compare() == 0 and started() == []
    assert compare("--seeds", "4") == 0
    assert sorted(started()) == sorted(f"{row}/seed-3" for row in ROWS)
    assert content()["result"]["added"] == [3]
    assert stars() == []
    sentence = "Seed 3 was added after a result was shown, so no difference is called significant."
    assert content()["result"]["text"].startswith(sentence)
    assert re.search(r"the difference of ProtoCLIP from CLIP .* is \+0\.\d", opening())


@pytest.mark.usefixtures("compare")
def test_a_command_that_is_stopped_stops_its_run(tmp_path: Path) -> None:
    flags = ["--train-data", "pairs.csv", "--val-fraction", "0.25", "--max-steps", "40"]
    fault = partial(use_fake_runs, json.dumps({"ProtoCLIP/seed-0": "stop compare"}))
    processes = start_command(tmp_path, flags, 1, fault=fault, command="protoclip.compare")
    assert exit_codes(processes) == [143], logs_of(tmp_path)
    assert (tmp_path / "stopped").exists()
    said = logs_of(tmp_path)
    assert "protoclip compare: interrupted by SIGTERM" in said and "Traceback" not in said
    assert started() == ["CLIP/seed-0", "ProtoCLIP/seed-0"]


@pytest.mark.parametrize(
    ("orders", "reason"),
    [("fail", "training: loss was not finite"), ("stop", "stopped by SIGTERM after step 3")],
)
def test_a_failed_run_leaves_its_seed_out_of_all_rows(
    compare: Compare,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    orders: str,
    reason: str,
) -> None:
    monkeypatch.setenv("FAKE_TRAIN", json.dumps({"ProtoCLIP/seed-1": orders}))
    assert compare("--seeds", "4") == 1
    out = capsys.readouterr().out
    assert f"ProtoCLIP, seed 1 failed: {reason}" in out
    assert content()["result"]["seeds"] == [0, 2, 3]
    page = read_page(Path("logs/compare/report.html")).text
    assert "ProtoCLIP, seed 1 failed" in page
    monkeypatch.delenv("FAKE_TRAIN")
    calls()
    assert compare("--seeds", "4") == 0 and started() == ["ProtoCLIP/seed-1"]


def test_what_training_refuses_ends_the_command_before_other_runs(
    compare: Compare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "train_command", lambda processes: [sys.executable, "-c",
        "import sys; print('protoclip train: error: no such model', file=sys.stderr); sys.exit(2)"
    ])  # fmt: skip
    assert compare() == 2
    assert "error: row CLIP: no such model" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_done(
    compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["--row", "plain: --method clip", "--row", "K 4: --k 4", "--row", "K 8: --k 8"]
    assert compare("--dry-run", *rows, "--seeds", "0,7") == 0
    out = capsys.readouterr().out
    assert "rows: plain; K 4; K 8 (the baseline is plain)" in out
    assert "then plain for as long as each row that takes another time" in out
    assert "primary scores: image -> text R@1 (HO), text -> image R@1 (HO)" in out
    assert "runs: 6, 3 for each of the seeds 0, 7; 0 finished" in out
    assert not Path("logs").exists() and not calls()


def test_a_folder_is_of_one_comparison(
    compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other").mkdir()
    Path("other/file").touch()
    assert compare("--out", "other") == 2
    assert "--out: expected a new folder or that of a comparison" in capsys.readouterr().err
    assert compare("--seeds", "1", "--equal-steps") == 0
    for flags, words in (
        (["--equal-steps", "--lr", "0.5"], "the row CLIP has optim.lr 0.003, got 0.5"),
        ([], "--equal-steps: the comparison in logs/compare has True, got False"),
        (["--equal-steps", "--row", "A: --method clip", "--row", "B: --k 3"], "the baseline in"),
    ):
        capsys.readouterr()
        assert compare(*flags) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("error:") == 1 and message.count("\n") == 1
    calls()
    # A new row is trained on the seeds that are there, and the others stay in the result.
    row = ["--row", "CLIP: --method clip", "--row", "K 3: --k 3"]
    assert compare("--seeds", "1", "--equal-steps", *row) == 0
    assert started() == ["K-3/seed-0"]
    assert [c["row"] for c in content()["result"]["contrasts"]] == ["ProtoCLIP", "K 3"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:500],
        lambda text: re.sub(r'("ratios": \{\s*"ProtoCLIP": )[\d.]+', r"\g<1>50000", text),
        lambda text: re.sub(r'("log_ratio": )[\d.]+', r"\1NaN", text),
        lambda text: text.replace('"shown": [', '"shown": "all", "other": ['),
    ],
)
def test_a_damaged_file_is_rebuilt_from_the_runs(
    compare: Compare, capsys: pytest.CaptureFixture[str], damage: Callable[[str], str]
) -> None:
    assert compare() == 0
    calls()
    file = Path("logs/compare", FILE)
    before = content()
    damaged = damage(file.read_text())
    assert damaged != file.read_text()
    file.write_text(damaged)
    assert report([*map(str, Path("logs/compare").glob("*/seed-*")), "--out", "p.html"]) == 2
    assert "comparison.json is damaged (" in capsys.readouterr().err
    assert compare() == 0 and started() == []
    assert f"{file} was damaged; it was rebuilt from the runs in" in capsys.readouterr().out
    assert content() == before | {"rebuilt": True}
    assert "was damaged and has been rebuilt" in read_page(Path("logs/compare/report.html")).text
    assert compare("--seeds", "4") == 0
    assert opening().startswith("Seed 3 was added")


def test_runs_of_no_row_are_not_forgotten_by_a_rebuilt_file(
    compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["--row", "CLIP: --method clip", "--row", "K 3: --k 3", "--row", "K 4: --k 4"]
    assert compare("--seeds", "1", *rows) == 0
    Path("logs/compare", FILE).write_text("{")
    for flags, words in (
        (rows[:4], "logs/compare/K-4 is of no row of this command; give all flags of before"),
        ([*rows[:5], "K 4: --k 5"], "the row K 4 has episode.num_clusters 4, got 5"),
    ):
        assert compare("--seeds", "1", *flags) == 2
        assert words in capsys.readouterr().err


def test_two_commands_do_not_write_to_one_folder(
    compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare("--seeds", "1") == 0
    calls()
    with sole_writer(Path("logs/compare", LOCK), "--out"):
        assert compare("--seeds", "2") == 2
    message = capsys.readouterr().err
    assert "error: --out: logs/compare is in use by another process; stop it" in message
    assert started() == [] and content()["seeds"] == [0]


def test_a_ratio_of_times_beyond_reach_is_refused(
    compare: Compare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order(monkeypatch, times("ProtoCLIP", [4000.0] * 3))
    for _ in range(2):
        assert compare() == 2
        message = capsys.readouterr().err
        assert "row ProtoCLIP: expected a training time of at most 1,000 times" in message


def test_it_is_not_started_by_torchrun(
    compare: Compare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert compare() == 2
    assert "use --nproc-per-run N, which starts torchrun" in capsys.readouterr().err


def test_a_run_of_several_processes_is_started_by_torchrun() -> None:
    """Which leaves the flags of the run to the run."""
    start = command.train_command(2)
    assert start[1:3] == ["-m", "torch.distributed.run"]
    parsed = torchrun.parse_args([*start[3:], "--logs", "elsewhere"])
    assert parsed.module and parsed.nproc_per_node == "2"
    assert parsed.training_script == "protoclip"
    assert parsed.training_script_args == ["train", "--logs", "elsewhere"]


def test_jobs_share_the_visible_gpus(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    record, _ = command.parse_record(["--train-data", "pairs.csv", "--nproc-per-run", "2"])
    runs = command.Runs(record, jobs=2)
    gpus = [runs._share(slot, "cuda")["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)]
    assert gpus == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,3,5")
    assert runs._share(0, "cuda")["CUDA_VISIBLE_DEVICES"] == "7,3"
    with pytest.raises(ValueError, match="expected 4 GPUs, found 3"):
        runs._share(1, "cuda")
    assert "CUDA_VISIBLE_DEVICES" not in command.Runs(record, jobs=1)._share(0, "cuda")


def test_the_rows_can_be_printed(compare: Compare, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("--print-config") == 0
    assert list(json.loads(capsys.readouterr().out)) == ROWS[:2]
    assert started() == []


def test_report_shows_the_same_table(compare: Compare, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare() == 0
    table = capsys.readouterr().out.partition("\n\n")[2].partition("\npage: ")[0]
    assert "ProtoCLIP against CLIP, time of ProtoCLIP (trained for the same time)" in table
    runs = sorted(map(str, Path("logs/compare").glob("*/seed-*")))
    assert report([*runs, "--out", "report.html"]) == 0
    assert table in capsys.readouterr().err
    pages = [read_page(Path(name)) for name in ("report.html", "logs/compare/report.html")]
    tables = [page.section("table").text for page in pages]
    assert tables[0] == tables[1]


def test_report_groups_runs_that_differ_only_in_the_seed(
    compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without comparison.json: the row of plain CLIP that took as long is the baseline."""
    assert compare() == 0
    shutil.move("logs/compare", "runs")
    Path("runs", FILE).unlink()
    capsys.readouterr()
    assert report([*sorted(map(str, Path("runs").glob("*/seed-*"))), "--out", "page.html"]) == 0
    err = " ".join(capsys.readouterr().err.split())  # lines are wrapped
    assert "ProtoCLIP against CLIP-time-of-ProtoCLIP (trained for the same time)" in err
    assert "improves image -> text R@1 (+0." in err


def test_runs_that_were_judged_on_different_pictures_show_no_difference(
    compare: Compare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_TRAIN", json.dumps({"ProtoCLIP/seed-2": "other pictures"}))
    assert compare() == 0
    assert "ProtoCLIP and CLIP were judged on different pictures" in capsys.readouterr().out
    assert not any(contrast["scores"] for contrast in content()["result"]["contrasts"])
    pair = ["logs/compare/CLIP/seed-2", "logs/compare/ProtoCLIP/seed-2"]
    folders = [shutil.copytree(folder, name) for folder, name in zip(pair, "ab", strict=True)]
    assert report([*map(str, folders), "--out", "two.html"]) == 0
    assert "b and a were judged on different pictures (20 and 20)" in capsys.readouterr().err
    assert not read_page(Path("two.html")).all("span", class_="difference")


def outcome(seed: int, gain: float) -> Outcome:
    noise = np.random.default_rng(seed).normal(0, 0.01, size=2)
    metrics = {"class/acc1": 0.5 + gain + noise[0], "class/ami": 0.5 + noise[1]}
    judged = SetResults("All", 100, 100, metrics, fingerprint="f")
    return Outcome("d", "m", "p", {"ALL": judged})


def made(seeds: int, gain: float, **more: Any) -> Comparison:
    rows = [
        Row("CLIP", {seed: outcome(seed, 0.0) for seed in range(seeds)}, {}),
        Row("P", {seed: outcome(100 + seed, gain) for seed in range(seeds)}, {}),
    ]
    primary = [("ALL", "class/acc1"), ("ALL", "class/ami")]
    pairs = [Pair("P", "CLIP", "time")]
    return compare_rows(rows, pairs, primary, {("P", "CLIP"): Cost(0.0, 0.01)}, **more)


def test_the_paragraph_says_what_can_be_claimed() -> None:
    text = paragraph(made(5, 0.1))
    assert re.match(
        r"Over 5 seeds, P, compared with CLIP trained for the same time, improves zero-shot class "
        r"\(\+0\.\d{3} ± 0\.\d{3}\) and does not differ significantly in k-means AMI class \(",
        text,
    )
    assert re.search(r"would need (\d+|more than 50) seeds", text)
    assert "(t, paired by seed, Holm over 2 tests) cover the randomness of training" in text
    assert "worsens zero-shot class (-0." in paragraph(made(5, -0.1))


def test_what_is_not_claimed() -> None:
    two = made(2, 0.1)
    assert "With 2 seeds no difference is tested for significance" in paragraph(two)
    cells = two.contrasts[0].cells.values()
    assert not any(cell.significant for cell in cells) and "±" not in format_comparison(two)
    added = made(5, 0.1, added=[3, 4])
    assert not any(cell.significant for cell in added.contrasts[0].cells.values())
    assert paragraph(added).startswith("Seeds 3 and 4 were added after a result was shown, so no")
    assert "No seed has finished in all rows" in paragraph(made(0, 0.1))


def test_the_primary_scores_follow_from_the_data() -> None:
    recalls = ["text_retrieval_recall@1", "image_retrieval_recall@1"]
    assert primary_of({"HO": [*recalls, "modality_gap"]}) == [("HO", name) for name in recalls]
    icons = command.expected_metrics(make_config(device="cpu"))
    assert primary_of(icons) == [
        ("NEW", "concept/acc1"),
        ("NEW", "concept/nn_acc1"),
        ("HO", "concept/ami"),
    ]


def test_the_page_is_whole(compare: Compare) -> None:
    assert compare() == 0
    page = read_page(Path("logs/compare/report.html"))
    assert page.sections == ["primary", "table", "time", "settings", "runs"]
    assert len(page.section("primary").all("svg")) == 2
    links = [link.attributes["href"] for link in page.section("runs").all("a")]
    assert len(links) == 9 and all(Path("logs/compare", link).exists() for link in links)
    assert "optim.max_steps" in page.section("settings").text
    assert len(page.section("table").all("b")) == 1
    for region in page.all(class_="scroll"):
        assert region.attributes["tabindex"] == "0" and region.attributes["aria-label"]


def test_seeds_at_one_place_are_counted() -> None:
    """Scores of few pictures repeat."""
    apart, together = (
        differences_svg([(seeds, 0.3, 0.1)]) for seeds in ([0.2, 0.3, 0.4], [0.2, 0.2, 0.4])
    )
    assert ">2</text>" in together and ">2</text>" not in apart


@needs_browser
def test_the_page_fits_a_narrow_dark_window(compare: Compare, tmp_path: Path) -> None:
    assert compare() == 0
    state = in_browser(
        Path("logs/compare/report.html"),
        "<pre id=state></pre><script>state.textContent = JSON.stringify({"
        "wide: document.documentElement.scrollWidth > innerWidth,"
        "background: getComputedStyle(document.body).backgroundColor})</script>",
        tmp_path,
    )
    assert state == {"wide": False, "background": "rgb(20, 24, 29)"}


def test_real_runs_are_compared_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nano: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path)
    config = make_config(
        train_data="pairs.csv", val_fraction=0.25, model=str(nano), batch_size=16, max_steps=2,
        k=4, infonce_warmup_epoch=0, device="cpu", report_to="none",
    )  # fmt: skip
    comparison = command.compare(config, seeds=[3], out="both", equal_steps=True)
    (contrast,) = comparison.contrasts
    assert comparison.seeds == (3,) and not comparison.failed
    assert contrast.pair == Pair("ProtoCLIP", "CLIP", "steps")
    assert math.isfinite(contrast.cost.log_ratio) and math.isinf(contrast.cost.half)
    recall = next(score for score in contrast.cells if score.metric == "text_retrieval_recall@1")
    runs = [read_results(Path("both", row, "seed-3", "results.json")) for row in ROWS[:2]]
    values = [run.trained["HO"].metrics[recall.metric] for run in runs]
    assert contrast.cells[recall].differences == (values[1] - values[0],)
    saved = json.loads(Path("both/CLIP/seed-3/config.json").read_text())
    assert saved["run"]["seed"] == 3 and saved["method"] == "clip"
