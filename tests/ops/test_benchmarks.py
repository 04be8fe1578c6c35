"""The benchmarks: pages say what the newest record says, and only what is right is timed."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import profiler_util as profiler

import protoclip
from benchmarks import frozen, gpu, loader, machine, report, test_contrastive

RECORDS = [json.loads(path.read_text()) for path in sorted(report.RESULTS.glob("*.json"))]


# ---- records and the pages that show them ----


def test_the_page_shows_the_newest_records() -> None:
    assert RECORDS, "no record under benchmarks/results"
    assert not report.stale(RECORDS), (
        "python -m benchmarks.report benchmarks/results/*.json --write"
    )


def test_a_page_is_stale_after_a_new_record_and_says_which_peers_are_faster() -> None:
    changed = copy.deepcopy(RECORDS)
    for row in changed[-1]["rows"]:
        row["median_ms"] *= 3
        if row["ratio"]:
            row["ratio"] = 0.5
    assert report.stale(changed)
    assert " takes 0.50 of our time" in report.page(changed)


def test_a_later_record_of_a_few_other_cases_leaves_the_picture_alone() -> None:
    newest = report.newest_cpu(RECORDS)
    assert newest is not None
    later = copy.deepcopy(newest)
    later["runs"] = [later["runs"][-1] | {"date": "2999-01-01 00:00", "machine": "another"}]
    assert report.newest_cpu([*RECORDS, later]) is later
    later["rows"] = [row for row in later["rows"] if row["op"] == "segment_mean"]
    assert later["rows"] and report.newest_cpu([*RECORDS, later]) is newest


@pytest.mark.parametrize("script", ["benchmarks/gpu.sh", "Makefile"])
def test_scripts_name_files_that_are_there(script: str) -> None:
    text = (report.ROOT / script).read_text()
    named = set(re.findall(r"(?:tests|benchmarks)/[\w/]+\.py", text))
    assert named
    assert [name for name in named if not (report.ROOT / name).is_file()] == []


# ---- nothing wrong is timed ----


class _WithFault(torch.autograd.Function):
    """A loss whose gradients are off by those given."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, x: Tensor, y: Tensor, dx_fault: Tensor, dy_fault: Tensor
    ) -> Tensor:
        ctx.dx_fault = dx_fault
        ctx.dy_fault = dy_fault
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return upstream, ctx.dx_fault, ctx.dy_fault, None, None


@pytest.mark.parametrize("case", test_contrastive.CASES)
def test_nothing_is_timed_whose_other_logits_are_wrong(case: str) -> None:
    """The gradient of the logits that are not positives: 0, twice, or five times what it is."""
    shape = test_contrastive.Shape(n=256, d=64)
    batch = test_contrastive.make_batch(case, shape, torch.bfloat16, cone=True)
    written_out = test_contrastive.written_out(case, shape, torch.bfloat16)
    form = written_out.form
    kept_logits = written_out.truth.logits.masked_fill(form.taken_out, 0)
    queries, keys = form.sides(batch.x.double(), batch.y.double())
    logits = batch.scale.detach() * queries @ keys.T
    dx, dy = torch.autograd.grad(logits, (batch.x, batch.y), kept_logits)

    def assert_parity(factor: float) -> None:
        def faulty(batch: test_contrastive.Batch) -> Tensor:
            loss = test_contrastive.CASES[case].ours(batch)
            return _WithFault.apply(loss, batch.x, batch.y, (factor - 1) * dx, (factor - 1) * dy)

        test_contrastive.assert_parity(faulty, case, shape, torch.bfloat16, "protoclip-auto")

    assert_parity(1)
    for factor in (0, 2, 5):
        with pytest.raises(AssertionError, match="over the budget .* of G's share"):
            assert_parity(factor)


# ---- what a card is asked for ----


@pytest.fixture
def needs_triton() -> None:
    if reason := protoclip.backends("sigmoid_loss")["triton"]:
        pytest.skip(reason)


@pytest.fixture
def rows_fit(needs_triton: None) -> None:
    from protoclip.kernels import launch

    if launch.TRITON < (3, 9):
        pytest.skip("rows are chosen for Triton 3.9")


@pytest.mark.usefixtures("rows_fit")
def test_a_card_is_asked_for_kernels_graphs_and_rows() -> None:
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--seconds", "1"],
        cwd=report.ROOT,
        env=os.environ | {"PROTOCLIP_REHEARSE": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "info_nce" in output and "protoclip::contrastive_bwd" in output
    assert "expected a CUDA device, got none" in output
    assert "candidates compiled: 1" in output
    assert "INTERPRETER: of a rehearsal, not to paste\n" in output
    assert re.search(r"Launch\(block_n=.*ms before, fastest of 1 rows", output)


def test_the_card_that_is_used_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_VISIBLE_DEVICES may hide card 0."""
    commands: list[str] = []

    def output(*command: str) -> str:
        commands.extend(command)
        return "1700 MHz, 600 W, 50, none"

    monkeypatch.setattr(machine, "DEVICE", "cuda")
    monkeypatch.setattr(machine, "_output", output)
    properties = SimpleNamespace(uuid="11-22")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    assert machine.card_state()["sm_clock"] == "1700 MHz"
    assert "--id=GPU-11-22" in commands


# ---- one kernel that crashes ----

CRASHING = """
import os
from triton.runtime.interpreter import GridExecutor

launch = GridExecutor.__call__

def launch_or_crash(executor, *arguments, **keywords):
    if executor.fn.__name__ == "sigmoid_loss_kernel":
        os.abort()
    return launch(executor, *arguments, **keywords)

GridExecutor.__call__ = launch_or_crash
"""


@pytest.fixture
def crashing_kernel(needs_triton: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file of tests whose kernel takes the process with it, in every process started later."""
    (tmp_path / "sitecustomize.py").write_text(CRASHING)
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--bare', action='store_true')\n"
    )
    test = tmp_path / "test_that_crashes.py"
    test.write_text(
        "from benchmarks import gpu\n\n\ndef test_siglip():\n    gpu.run_canary('siglip')\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(report.ROOT)]), os.pathsep)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PROTOCLIP_REHEARSE", "1")
    return test


def never_right() -> None:
    raise AssertionError("dx over the budget")


def test_a_canary_that_dies_leaves_the_others(
    crashing_kernel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(report.ROOT)
    monkeypatch.setattr(gpu, "CANARIES", dict.fromkeys(("siglip", "soft targets"), list))
    assert not gpu.canary(seconds=100)
    assert capsys.readouterr().out == "siglip: crashed, SIGABRT\nsoft targets: ran\n"


@pytest.mark.usefixtures("needs_triton")
def test_a_canary_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu.CANARIES, "siglip", never_right)
    assert gpu.run_canary("siglip") == gpu.WRONG
    assert capsys.readouterr().out == "wrong, dx over the budget\n"


def test_make_gpu_goes_on_after_a_crash(crashing_kernel: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        ["benchmarks/gpu.sh", "tests"],
        cwd=report.ROOT,
        env=os.environ
        | {
            "PROTOCLIP_REHEARSE_TEST": str(crashing_kernel),
            "PYTHON": sys.executable,
            "OUT": str(tmp_path / "out"),
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    summary = (tmp_path / "out" / "gpu-summary.log").read_text()
    assert "tests-test_that_crashes: exit 134" in summary
    assert "tests-test_prototype_cross_entropy: exit 0" in summary
    assert f"runs {crashing_kernel} tests/ops/test_prototype_cross_entropy.py only" in summary
    assert f"all logs are in {tmp_path / 'out'}" in run.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_make_gpu_without_a_card_says_how_to_rehearse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROTOCLIP_REHEARSE", raising=False)
    run = subprocess.run(
        ["benchmarks/gpu.sh"],
        cwd=report.ROOT,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and run.stdout == ""
    assert "PROTOCLIP_REHEARSE=1 make gpu rehearses without a card" in run.stderr


CPU = torch.autograd.DeviceType.CPU
CUDA = torch.autograd.DeviceType.CUDA


def event(
    number: int,
    name: str,
    start_us: int,
    end_us: int,
    device: torch.autograd.DeviceType,
    is_user_annotation: bool = False,
) -> profiler.FunctionEvent:
    return profiler.FunctionEvent(
        number,
        name,
        thread=1,
        start_us=start_us,
        end_us=end_us,
        device_type=device,
        stack=[],
        use_device="cuda",
        is_user_annotation=is_user_annotation,
    )


def times_of(*events: profiler.FunctionEvent) -> list[gpu.KernelTime]:
    recorded = profiler.EventList(events)
    recorded._build_tree()
    return gpu.time_by_kernel(recorded.key_averages())


def test_the_time_of_a_kernel_counts_once() -> None:
    """As the profiler has it: an op of the CPU with its kernel, the kernel by itself, and a range
    that the user named."""
    op = event(1, "addmm", 0, 10, CPU)
    op.append_kernel("gemm_kernel", 0, 700)
    kernel = event(2, "gemm_kernel", 20, 720, CUDA)
    named = event(3, "a step", 10, 730, CUDA, is_user_annotation=True)
    assert times_of(op, kernel, named) == [gpu.KernelTime(ms=0.7, calls=1, name="gemm_kernel")]
    without_kernels = times_of(event(1, "addmm", 0, 10, CPU))
    assert without_kernels == [gpu.KernelTime(ms=0.01, calls=1, name="addmm")]


# ---- the sweep over launch rows ----


def swept_interpreter(assert_right: Callable[[], None]) -> gpu.Swept:
    return gpu.Swept(
        path=("INTERPRETER",),
        kernel="sigmoid_loss",
        launched=gpu.Launched("sigmoid_loss", "gradients", "bf16", 128),
        step=lambda: list,
        assert_right=assert_right,
    )


def test_a_sweep_of_which_nothing_is_right_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    """And leaves the table as it was."""
    from protoclip.kernels import launch

    before = launch.INTERPRETER
    for candidates in ([], [replace(before, warps=8)]):
        gpu.sweep_row(swept_interpreter(never_right), candidates, 0.0)
        output = capsys.readouterr()
        assert f"no candidate of {len(candidates)} compiled" in output.out
        assert "paste" not in output.out
    assert "dx over the budget" in output.err
    assert launch.INTERPRETER is before


def test_a_row_of_large_batches_is_checked_with_few_pairs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from protoclip.kernels import launch

    def needs_a_large_batch() -> None:
        assert launch.LARGE_TILES == 0

    monkeypatch.setattr(gpu, "REHEARSAL", True)  # timed once
    gpu.sweep_row(swept_interpreter(needs_a_large_batch), [launch.INTERPRETER], 0.0)
    assert "fastest of 1 rows timed" in capsys.readouterr().out
    assert launch.LARGE_TILES > 0


@pytest.mark.parametrize("kernel", ["info_nce_forward", "info_nce_gradient", "sigmoid_loss"])
def test_a_larger_tile_of_the_sweep_asks_for_one_cta_an_sm(
    monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """Two would not fit, and the candidate would be dropped before it is timed."""
    from protoclip.kernels import launch

    monkeypatch.setattr(gpu, "REHEARSAL", False)
    row = launch.HALF[kernel][90]
    size = row.block_n * row.block_m
    larger = [near for near in gpu._candidates(row) if near.block_n * near.block_m > size]
    assert larger
    assert all(near.ctas_per_sm == 1 and near.max_registers is None for near in larger)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_what_the_sweep_times_is_the_row_that_it_changes(
    monkeypatch: pytest.MonkeyPatch, arch: int
) -> None:
    from protoclip.kernels import launch

    monkeypatch.setattr(gpu, "REHEARSAL", False)
    monkeypatch.setattr(launch, "compiling_for", arch)
    for name in ("HALF", "HALF_LARGE"):
        monkeypatch.setattr(launch, name, {k: dict(t) for k, t in vars(launch)[name].items()})
    losses = [swept for swept in gpu._swept() if swept.path[0] in ("HALF", "HALF_LARGE")]
    assert len(losses) == 5
    for swept in losses:
        table, kernel, _ = swept.path
        marked = replace(swept.row, stages=9)
        monkeypatch.setitem(vars(launch)[table][kernel], arch, marked)
        x = torch.empty(16_384, swept.launched.depth, dtype=torch.bfloat16)
        assert launch.choose(kernel, x, x) is marked, swept.path


@pytest.fixture
def swept_sigmoid(monkeypatch: pytest.MonkeyPatch) -> gpu.Swept:
    """In a process without the interpreter, as the sweep's pool has them: one, as each imports
    torch."""
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 1)
    return gpu.Swept(
        path=("HALF", "sigmoid_loss", 90),
        kernel="sigmoid_loss",
        launched=gpu.Launched("sigmoid_loss", "gradients", "bf16", 512),
        step=list,
        assert_right=list,
    )


@pytest.mark.usefixtures("rows_fit")
def test_candidates_that_spill_are_not_timed(swept_sigmoid: gpu.Swept) -> None:
    row = swept_sigmoid.row
    wide = replace(row, block_n=256, block_m=128, warps=4)
    candidates = [gpu.Candidate(swept_sigmoid, row), gpu.Candidate(swept_sigmoid, wide)]
    problems_of_row, problems_of_wide = gpu.compile_all(candidates, 90)
    assert problems_of_row == []
    assert any("local memory" in problem for problem in problems_of_wide)


def test_candidates_that_no_process_began_in_time_are_not_timed(swept_sigmoid: gpu.Swept) -> None:
    candidate = gpu.Candidate(swept_sigmoid, swept_sigmoid.row)
    more_than_processes = [candidate] * 20
    problems = gpu.compile_all(more_than_processes, 90, seconds=0)
    assert problems[-1] == ["no time to compile it"]


def test_both_loaders_read_the_photographs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "PHOTOGRAPHS", 96)
    folder = tmp_path / "shards"
    assert loader.main([str(folder)]) == 0
    (ours,) = loader.our_batches(folder, workers=1, batches=1)
    images, texts = next(loader.open_clips_batches(folder, workers=1, batches=3))
    assert images.shape == ours.image.shape == (32, 3, 224, 224)
    assert texts.shape[1] == 77 and ours.tokens.shape[1] < 77
    assert abs(images.mean() - ours.image.mean()) < 0.1
    assert abs(images.std() - ours.image.std()) < 0.1
    assert loader.main([str(folder), "--rounds", "1", "--batches", "3"]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = [row.split("|") for row in printed if row.startswith(("| 1 ", "| 2 "))]
    assert len(rows) == 2 and all(float(row[4]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("stem", "author", "words"),
    [
        ("moon_dan_gerhards_01", "Dan Gerhards", "moon"),
        ("pesca_architetto_frances_01", "Architetto Francesco Rollandin", "pesca"),
        ("pansement_jean_victor_ba_", "Jean-Victor Balin", "pansement"),
        ("people_juliane_krug_04c", "Juliane Krug", "people"),
        ("police_man_ganson", "Gerald G.", "police man"),
        ("contour_cheetah", "Nicu Buculei", "contour cheetah"),
        ("home1", "", "home"),
    ],
)
def test_a_drawing_is_named_without_its_author(stem: str, author: str, words: str) -> None:
    assert " ".join(frozen.name_words(stem, author)) == words
