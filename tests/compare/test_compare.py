"""``protoclip compare``: which runs it starts, what it keeps, and what it says of them.

Most runs are of fake_train.py, which writes a run's files without training.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.run as torchrun
from html_page import in_browser, needs_browser, read_page
from ranks import exit_codes, logs_of, start_command

from protoclip import compare as command
from protoclip.common.files import LOCK, sole_writer
from protoclip.data import open_dataset
from protoclip.data.settings import open_run_data
from protoclip.evaluate.results import Outcome, SetResults, read_results, write_results
from protoclip.report.__main__ import main as report
from protoclip.report.comparison import primary_of
from protoclip.report.figures import differences_svg
from protoclip.runs.checkpoint import fingerprint
from protoclip.settings.comparison import FILE
from protoclip.train import make_config

FAKE = [sys.executable, str(Path(__file__).with_name("fake_train.py"))]
DATA = ["--train-data", "pairs.csv", "--val-fraction", "0.25", "--max-steps", "40"]
DATA += ["--device", "cpu", "--seeds", "3"]
OUT = Path("logs/compare")
RECALL = "text_retrieval_recall@1"  # in which fake ProtoCLIP is better
PROTOCLIP = f"""#!{sys.executable}
import sys
from protoclip import compare
compare.train_command = lambda processes: {FAKE}
sys.exit(compare.main(sys.argv[2:]))
"""
Compare = Callable[..., int]


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compare:
    """``compare(*flags)`` with fake runs of 40 steps; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "train_command", lambda processes: FAKE)
    write_table(tmp_path)
    return lambda *flags: command.main([*DATA, *flags])


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
    return json.loads((OUT / FILE).read_text())


def order(monkeypatch: pytest.MonkeyPatch, orders: dict[str, str]) -> None:
    monkeypatch.setenv("FAKE_TRAIN", json.dumps(orders))


def stars() -> list[tuple[str, str]]:
    """The rows and scores that are called significant."""
    return [
        (contrast["row"], score["metric"])
        for contrast in content()["result"]["contrasts"]
        for score in contrast["scores"]
        if score["significant"]
    ]


def proposed() -> list[str]:
    return [contrast["command"] for contrast in content()["result"]["contrasts"]]


def opening() -> str:
    """The first sentences of the page."""
    answers = read_page(OUT / "report.html").all(class_="answer")
    return " ".join(answer.text for answer in answers)


@pytest.mark.smoke
def test_rows_are_compared_on_every_seed(
    compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare() == 0
    runs = [line.split() for line in calls()]
    assert [run[:3] for run in runs] == [
        [f"{row}/seed-{seed}", row.lower(), "40"]
        for seed in range(3)
        for row in ("CLIP", "ProtoCLIP")
    ]
    assert {run[4] for run in runs} == {"passive"}
    out = capsys.readouterr().out
    assert re.search(r"training time \(s\) +40.0 +60.0   1.50 times \(± 0 %\)", out)
    assert re.search(r"teacher, not in this time \(s\) +10.0", out)
    (contrast,) = content()["result"]["contrasts"]
    text, image = (score for score in contrast["scores"] if score["primary"])
    assert text["significant"] and abs(text["difference"] - 0.1) < 0.01
    assert not image["significant"] and stars() == [("ProtoCLIP", RECALL)]
    sentence = r"In image → text R@1, ProtoCLIP minus CLIP is \+0\.\d+ ± 0\.\d+, significant\."
    assert re.match(sentence, opening())
    sentence = r"In text → image R@1, ProtoCLIP minus CLIP is .0\.\d+ ± 0\.\d+, not significant "
    sentence += r"\((\d+|more than 50) seeds would show it with 80 % power\)\."
    assert re.search(sentence, opening())
    assert "intervals (t, 3 seeds, paired, Holm over 2 tests) cover" in opening()
    took = "ProtoCLIP (40 steps) took 1.50 times (± 0 %) the training time of CLIP (40 steps)."
    assert took in opening()
    page = read_page(OUT / "report.html")
    assert page.sections == ["primary", "table", "time", "settings", "runs"]
    assert len(page.section("primary").all("svg")) == 2
    links = [link.attributes["href"] for link in page.section("runs").all("a")]
    assert len(links) == 6 and all((OUT / link).exists() for link in links)
    assert "method" in page.section("settings").text
    assert len(page.section("table").all("b")) == 1
    for region in page.all(class_="scroll"):
        assert region.attributes["tabindex"] == "0" and region.attributes["aria-label"]
    folders = sorted(map(str, OUT.glob("*/seed-*")))
    assert report([*folders, "--out", "report.html"]) == 0
    table = out.partition("\n\n")[2].partition("\n\npage: ")[0]
    assert table in capsys.readouterr().err
    assert read_page(Path("report.html")).section("table").text == page.section("table").text


def test_the_printed_command_trains_a_longer_baseline_and_nothing_else(
    compare: Compare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run in a shell, as it is pasted."""
    assert compare("--warmup", "10", "--out", "a 'b'") == 0
    lines = capsys.readouterr().out.splitlines()
    line = lines[lines.index("To compare ProtoCLIP with CLIP at equal time:") + 1]
    assert shlex.split(line) == [
        "protoclip", "compare",
        "--row", "CLIP, 60 steps: --method clip --epochs 42 --max-steps 60 --warmup 15",
        "--row", "ProtoCLIP:", "--seeds", "0,1,2", *DATA[:-2], "--warmup", "10", "--out", "a 'b'",
    ]  # fmt: skip
    assert read_page(Path("a 'b'", "report.html")).one("pre").text == line
    first = json.loads(Path("a 'b'", FILE).read_text())["result"]["contrasts"][0]["scores"][0]
    Path("bin").mkdir()
    Path("bin/protoclip").write_text(PROTOCLIP)
    Path("bin/protoclip").chmod(0o755)
    monkeypatch.setenv("PATH", "bin", prepend=os.pathsep)
    calls()
    shell = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert shell.returncode == 0, shell.stderr
    assert [run.split()[:3] for run in calls()] == [
        [f"CLIP-60-steps/seed-{seed}", "clip", "60"] for seed in range(3)
    ]
    assert "ProtoCLIP against CLIP, 60 steps" in shell.stdout and "1.00 times" in shell.stdout
    assert "ProtoCLIP against CLIP\n" not in shell.stdout and "equal time" not in shell.stdout
    shutil.move("a 'b'", OUT)
    assert proposed() == [""] and stars() == [("ProtoCLIP", RECALL)]
    assert "not tested, as it was not significant against the first baseline" in opening()
    # Both tables are counted, also when the first is shown again.
    assert content()["result"]["tests"] == 4
    shown = [(row, baseline) for row, baseline, _ in content()["shown"]]
    assert shown == [("ProtoCLIP", "CLIP"), ("ProtoCLIP", "CLIP, 60 steps")]
    assert compare("--warmup", "10") == 0 and started() == []
    assert content()["result"]["tests"] == 4 and "Holm over 4 tests" in opening()
    again = content()["result"]["contrasts"][0]["scores"][0]
    assert first["primary"] and again["p"] == pytest.approx(2 * first["p"])
    assert first["seeds_needed"] <= again["seeds_needed"]


@pytest.mark.parametrize(
    ("factors", "jobs", "says"),
    [
        ([0.5, 0.7, 0.9, 0.6], 1, "took 0.99 times (± 49 %)"),
        ([0.699] * 4, 1, "took 1.05 times (± 0 %)"),  # 5 % or less is not worth a command
        ([1.0] * 4, 2, "is not known, as their runs shared the machine"),
    ],
)
def test_where_no_other_time_is_proved_no_command_is_proposed(
    compare: Compare, monkeypatch: pytest.MonkeyPatch, factors: list[float], jobs: int, says: str
) -> None:
    order(
        monkeypatch, {f"ProtoCLIP/seed-{s}": f"time {factor}" for s, factor in enumerate(factors)}
    )
    assert compare("--seeds", "4", "--jobs", str(jobs)) == 0
    assert says in opening() and proposed() == [""]
    assert read_results(OUT / "CLIP/seed-0/results.json").shared_machine is (jobs > 1)


def test_each_row_of_another_time_gets_a_command(compare: Compare) -> None:
    rows = ["--row", "A: --method clip", "--row", "B: --k 3", "--row", "C: --method clip --k 3"]
    assert compare(*rows, "--row", "D: --k 4 --max-steps 80") == 0
    names = [shlex.split(line)[3].partition(":")[0] if line else "" for line in proposed()]
    assert names == ["A, 60 steps", "", "A, 120 steps"]


def use_fake_runs(orders: dict[str, str]) -> None:
    command.train_command = lambda processes: FAKE
    os.environ["FAKE_TRAIN"] = json.dumps(orders)


def test_killed_twice_and_continued_it_is_as_if_it_was_not(
    compare: Compare, tmp_path: Path
) -> None:
    """Killed as its second and its fourth run have begun: those are resumed, others are kept."""
    assert compare("--out", "whole") == 0
    expected = started()
    for run in (expected[1], expected[3]):
        fault = partial(use_fake_runs, {run: "kill"})
        processes = start_command(tmp_path, DATA, 1, fault=fault, command="protoclip.compare")
        assert exit_codes(processes) == [-signal.SIGKILL], logs_of(tmp_path)
        assert not content()["shown"]
    assert started() == [*expected[:2], *expected[1:4]]
    before = (OUT / "CLIP/seed-0/results.json").stat().st_mtime_ns
    assert compare() == 0 and started() == expected[3:]
    assert (OUT / "CLIP/seed-0/results.json").stat().st_mtime_ns == before
    whole = json.loads(Path("whole", FILE).read_text())
    for of_one in (whole, content()):
        del of_one["words"]
    whole["result"]["contrasts"][0]["command"] = content()["result"]["contrasts"][0]["command"]
    assert {**whole, "words": content()["words"]} == content()


@pytest.mark.usefixtures("compare")
def test_a_command_that_is_stopped_stops_its_run(tmp_path: Path) -> None:
    fault = partial(use_fake_runs, {"ProtoCLIP/seed-0": "stop compare"})
    processes = start_command(tmp_path, DATA, 1, fault=fault, command="protoclip.compare")
    assert exit_codes(processes) == [143], logs_of(tmp_path)
    assert (tmp_path / "stopped").exists()
    said = logs_of(tmp_path)
    assert "stopped by SIGTERM after 1 runs; the same command" in said and "Traceback" not in said
    assert started() == ["CLIP/seed-0", "ProtoCLIP/seed-0"]


def test_seeds_added_after_a_look_star_nothing(compare: Compare) -> None:
    assert compare() == 0 and calls() and compare() == 0 and started() == []
    for added, words in (([3], "Seed 3 was"), ([3, 4], "Seeds 3, 4 were")):
        assert compare("--seeds", str(3 + len(added))) == 0
        assert content()["result"]["added"] == added and stars() == []
        sentence = (
            f"{words} added after a result was shown, so no difference is called significant."
        )
        assert opening().startswith(sentence) and "ProtoCLIP minus CLIP is +0." in opening()
    assert started() == [f"{row}/seed-{seed}" for seed in added for row in ("CLIP", "ProtoCLIP")]
    # A seed that was shown stays, and another row has the same seeds.
    rows = ["--row", "CLIP: --method clip", "--row", "K 3: --k 3"]
    assert compare("--seeds", "0,1", *rows) == 0
    assert started() == [f"K-3/seed-{seed}" for seed in range(5)]
    assert [contrast["row"] for contrast in content()["result"]["contrasts"]] == ["K 3"]


def test_few_seeds_are_not_tested(
    compare: Compare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare("--seeds", "2") == 0 and "±" not in capsys.readouterr().out
    assert opening().startswith("With 2 seeds no difference is tested for significance")
    order(monkeypatch, {"K-3/seed-0": "fail", "K-3/seed-1": "fail"})
    assert compare("--seeds", "2", "--row", "CLIP: --method clip", "--row", "K 3: --k 3") == 1
    assert "No seed has finished in all rows" in opening()


@pytest.mark.parametrize(
    ("orders", "reason"),
    [("fail", "training: loss was not finite"), ("stop", "stopped by SIGTERM after step 3")],
)
def test_a_failed_run_leaves_its_seed_out_of_all_rows(
    compare: Compare, monkeypatch: pytest.MonkeyPatch, orders: str, reason: str
) -> None:
    order(monkeypatch, {"ProtoCLIP/seed-1": orders})
    assert compare("--seeds", "4") == 1
    assert f"ProtoCLIP, seed 1 failed: {reason}" in opening()
    assert "The seeds of failed runs are left out of all rows." in content()["result"]["text"]
    assert content()["result"]["seeds"] == [0, 2, 3]
    monkeypatch.delenv("FAKE_TRAIN")
    calls()
    assert compare("--seeds", "4") == 0 and started() == ["ProtoCLIP/seed-1"]


def test_what_training_refuses_ends_the_command_before_other_runs(
    compare: Compare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order(monkeypatch, {"CLIP/seed-0": "refuse"})
    assert compare() == 2 and started() == ["CLIP/seed-0"]
    assert "error: row CLIP: --model: no such model" in capsys.readouterr().err
    monkeypatch.delenv("FAKE_TRAIN")
    assert compare("--lr", "0.5") == 0


def test_a_dry_run_says_what_would_be_done(
    compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["--row", "plain: --method clip", "--row", "K 4: --k 4", "--row", "K 8: --k 8"]
    assert compare("--dry-run", *rows, "--seeds", "0,7") == 0
    out = capsys.readouterr().out
    assert "rows: plain; K 4; K 8 (the baseline is plain)" in out
    assert "primary scores: image -> text R@1 (HO), text -> image R@1 (HO)" in out
    assert "runs: 6, 3 for each of the seeds 0, 7; 0 finished" in out
    assert compare("--print-config") == 0
    assert list(json.loads(capsys.readouterr().out)) == ["CLIP", "ProtoCLIP"]
    assert not Path("logs").exists() and not calls()


def test_what_is_not_of_this_comparison_is_refused(
    compare: Compare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other").mkdir()
    Path("other/file").touch()
    assert compare("--seeds", "1") == 0 and len(started()) == 2
    (OUT / "CLIP/seed-0/report.html").unlink()  # a page is not what makes a run finished
    for flags, words in (
        (["--out", "other"], "--out: expected a new folder or that of a comparison"),
        (["--lr", "0.5"], "the row CLIP has optim.lr 0.003, got 0.5"),
        (["--nproc-per-run", "2"], "--nproc-per-run: the comparison in logs/compare has 1, got 2"),
        (["--equal-steps"], "--equal-steps: rows are always compared at equal steps"),
        (["--count-teacher"], "--count-teacher: the table has the teacher's time"),
    ):
        capsys.readouterr()
        assert compare(*flags) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("error:") == 1 and message.count("\n") == 1
    with sole_writer(OUT / LOCK, "--out"):
        assert compare("--seeds", "2") == 2
    message = capsys.readouterr().err
    assert "error: --out: logs/compare is in use by another process; stop it" in message
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert compare() == 2
    assert "use --nproc-per-run N, which starts torchrun" in capsys.readouterr().err
    assert started() == [] and content()["seeds"] == [0]


def test_a_finished_run_of_other_data_is_refused_before_anything_trains(
    compare: Compare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare("--seeds", "1") == 0
    note = "note: 2 finished runs of an older version: whether the data is still the same was not"
    assert compare("--seeds", "1") == 0 and note in capsys.readouterr().out
    config = make_config(train_data="pairs.csv", val_fraction=0.25)
    monkeypatch.setenv("FAKE_DATA", fingerprint(open_run_data(config).training))
    assert compare("--seeds", "2") == 0 and compare("--seeds", "2") == 0
    assert "note: 2 finished runs of an older" in capsys.readouterr().out
    rows = Path("pairs.csv").read_text().splitlines(keepends=True)
    Path("pairs.csv").write_text("".join(rows[:50]))
    calls()
    assert compare("--seeds", "3") == 2 and started() == []
    words = "logs/compare/CLIP/seed-1 was trained on other data than pairs.csv is now; restore the"
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:500],
        lambda text: text.replace('"shown": [', '"shown": "all", "other": ['),
        lambda text: text.replace('"words"', '"equal_steps"'),  # as older versions wrote it
    ],
)
def test_a_damaged_file_is_an_error_and_without_it_the_runs_are_found_again(
    compare: Compare, capsys: pytest.CaptureFixture[str], damage: Callable[[str], str]
) -> None:
    assert compare() == 0 and len(started()) == 6
    file = OUT / FILE
    before = content()
    file.write_text(damage(file.read_text()))
    for main in (compare, partial(report, [*map(str, OUT.glob("*/seed-*")), "--out", "p.html"])):
        capsys.readouterr()
        assert main() == 2
        assert f"{file} is damaged or of an older version (" in capsys.readouterr().err
    file.unlink()
    assert compare() == 0 and started() == [] and content() == before
    file.unlink()
    assert compare("--seeds", "4") == 0 and content()["result"]["added"] == [3]
    file.unlink()
    (OUT / "report.html").unlink()  # nothing was shown
    assert compare("--seeds", "4") == 0 and stars() == [("ProtoCLIP", RECALL)]


def test_a_run_without_scores_has_not_finished(tmp_path: Path) -> None:
    scores = {"ALL": SetResults("All", 30, 30, {"text_retrieval_recall@5": 0.25})}
    for trained in ({}, scores):
        write_results(tmp_path / "results.json", Outcome("val.csv", "run", "", trained))
        assert (command.finished(tmp_path) is None) == (not trained)


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


def test_report_groups_runs_that_differ_only_in_the_seed(
    compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without comparison.json: the first row of plain CLIP is the baseline."""
    rows = ["--row", "K 3: --k 3", "--row", "plain: --method clip"]
    assert compare(*rows) == 0
    shutil.move(OUT, "runs")
    Path("runs", FILE).unlink()
    capsys.readouterr()
    assert report([*sorted(map(str, Path("runs").glob("*/seed-*"))), "--out", "page.html"]) == 0
    err = " ".join(capsys.readouterr().err.split())  # lines are wrapped
    assert "K-3 against plain" in err and "plain against" not in err
    assert re.search(
        r"In image -> text R@1, K-3 minus plain is \+0\.\d+ ± 0\.\d+, significant", err
    )
    assert "took 1.50 times (± 0 %) the training time of plain" in err


def test_runs_that_were_judged_on_different_pictures_show_no_difference(
    compare: Compare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order(monkeypatch, {"ProtoCLIP/seed-2": "other pictures"})
    assert compare() == 0
    assert "ProtoCLIP and CLIP were judged on different pictures" in capsys.readouterr().out
    assert not any(contrast["scores"] for contrast in content()["result"]["contrasts"])
    pair = ["logs/compare/CLIP/seed-2", "logs/compare/ProtoCLIP/seed-2"]
    folders = [shutil.copytree(folder, name) for folder, name in zip(pair, "ab", strict=True)]
    assert report([*map(str, folders), "--out", "two.html"]) == 0
    assert "b and a were judged on different pictures (20 and 20)" in capsys.readouterr().err
    assert not read_page(Path("two.html")).all("span", class_="difference")


def test_the_primary_scores_follow_from_the_data() -> None:
    recalls = ["text_retrieval_recall@1", "image_retrieval_recall@1"]
    assert primary_of({"HO": [*recalls, "modality_gap"]}) == [("HO", name) for name in recalls]
    icons = command.expected_metrics(make_config(device="cpu"))
    assert primary_of(icons) == [
        ("NEW", "concept/acc1"),
        ("NEW", "concept/nn_acc1"),
        ("HO", "concept/ami"),
    ]


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
        OUT / "report.html",
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
    comparison = command.compare(config, seeds=[3], out="both")
    (contrast,) = comparison.contrasts
    assert comparison.seeds == (3,) and not comparison.failed
    assert math.isfinite(contrast.times.log_ratio) and math.isinf(contrast.times.half)
    recall = next(score for score in contrast.cells if score.metric == RECALL)
    runs = [read_results(Path("both", row, "seed-3/results.json")) for row in ("CLIP", "ProtoCLIP")]
    values = [run.trained["HO"].metrics[RECALL] for run in runs]
    assert contrast.cells[recall].differences == (values[1] - values[0],)
    assert {run.training_data for run in runs} == {fingerprint(open_run_data(config).training)}
    saved = json.loads(Path("both/CLIP/seed-3/config.json").read_text())
    assert saved["run"]["seed"] == 3 and saved["method"] == "clip"
