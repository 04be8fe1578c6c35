"""The record: pages say what the newest record says."""

import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.autograd import profiler_util as profiler

from benchmarks import gpu, report, test_contrastive

FOUND = [json.loads(path.read_text()) for path in sorted(report.RESULTS.glob("*.json"))]


def test_the_page_shows_the_newest_records():
    assert FOUND, "no record under benchmarks/results"
    assert not report.stale(FOUND), "python -m benchmarks.report benchmarks/results/*.json --write"
    changed = copy.deepcopy(FOUND)
    for one in changed[-1]["rows"]:
        one |= {"median_ms": 3 * one["median_ms"], "ratio": one["ratio"] and 0.5}
    assert report.stale(changed) and " takes 0.50 of our time" in report.section(changed)


def test_the_figure_shows_the_newest_record(tmp_path):
    report.draw_headlines(report.newest_cpu(FOUND), tmp_path / "fresh.svg")
    words = [
        re.findall(r"<text[^>]*>([^<]+)<", path.read_text(encoding="utf-8"))
        for path in (report.FIGURE, tmp_path / "fresh.svg")
    ]
    assert words[0] == words[1] and any("open_clip" in word for word in words[0])


class _WithFault(torch.autograd.Function):
    """A loss whose gradients are off by those given."""

    @staticmethod
    def forward(ctx, loss, x, y, dx, dy):
        ctx.faults = dx, dy
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream, *ctx.faults, None, None


@pytest.mark.parametrize("case", test_contrastive.CASES)
def test_nothing_is_timed_whose_other_logits_are_wrong(case):
    """The gradient of the logits that are not positives: 0, twice, or five times what it is."""
    shape = test_contrastive.Shape(n=256, d=64)
    batch = test_contrastive.make_batch(case, shape, torch.bfloat16, cone=True)
    form, truth, _ = test_contrastive.written_out(case, shape, torch.bfloat16)
    others = truth.logits.masked_fill(form.taken_out, 0)
    queries, keys = form.sides(batch.x.double(), batch.y.double())
    logits = batch.scale.detach() * queries @ keys.T
    dx, dy = torch.autograd.grad(logits, (batch.x, batch.y), others)

    def assert_parity(factor):
        def faulty(batch):
            loss = test_contrastive.CASES[case].ours(batch)
            return _WithFault.apply(loss, batch.x, batch.y, (factor - 1) * dx, (factor - 1) * dy)

        test_contrastive.assert_parity(faulty, case, shape, torch.bfloat16, "protoclip-auto")

    assert_parity(1)
    for factor in (0, 2, 5):
        with pytest.raises(AssertionError, match="over the budget .* of G's share"):
            assert_parity(factor)


@pytest.mark.parametrize("script", ["benchmarks/gpu.sh", "Makefile"])
def test_scripts_name_files_that_are_there(script):
    named = set(re.findall(r"(?:tests|benchmarks)/\w+\.py", (report.ROOT / script).read_text()))
    assert named and [name for name in named if not (report.ROOT / name).is_file()] == []


def test_a_card_is_asked_for_kernels_graphs_and_rows():
    pytest.importorskip("triton")
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--seconds", "1"], cwd=report.ROOT,
        env=os.environ | {"PROTOCLIP_REHEARSE": "1", "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "info_nce" in told and "protoclip::info_nce_bwd" in told
    assert "expected a CUDA device, got none" in told
    assert "1 candidates compiled in" in told
    assert re.search(r"INTERPRETER: paste\n.*Launch\(block_n=.*ms before, fastest of 1 rows", told)


def _event(number, name, start, end, device, **options):
    times = {"start_us": start, "end_us": end}
    return profiler.FunctionEvent(
        number, name, thread=1, **times, device_type=device, stack=[], use_device="cuda", **options
    )


def test_the_time_of_a_kernel_counts_once():
    """As the profiler has it: an op of the CPU with its kernel, the kernel by itself, and a range
    that the user named."""
    device = torch.autograd.DeviceType
    op = _event(1, "addmm", 0, 10, device.CPU)
    op.append_kernel("gemm_kernel", 0, 700)
    kernel = _event(2, "gemm_kernel", 20, 720, device.CUDA)
    named = _event(3, "a step", 10, 730, device.CUDA, is_user_annotation=True)
    found = profiler.EventList([op, kernel, named])
    found._build_tree()
    assert gpu.time_by_kernel(found.key_averages()) == [(0.7, 1, "gemm_kernel")]
    alone = profiler.EventList([_event(1, "addmm", 0, 10, device.CPU)])
    alone._build_tree()
    assert gpu.time_by_kernel(alone.key_averages()) == [(0.01, 1, "addmm")]


def test_a_sweep_without_a_candidate_says_so(capsys):
    """None compiled, or none with the right gradients; the table is as it was."""
    from protoclip.kernels import launch

    def wrong():
        raise AssertionError("dx: wrong")

    swept = gpu.Swept(
        path=("INTERPRETER",),
        kernel="sigmoid",
        launched=gpu.Launched("sigmoid", "gradients", "bf16", 128),
        step=lambda: list,
        assert_right=wrong,
    )
    before = launch.INTERPRETER
    for rows in ([], [before, replace(before, warps=8)]):
        gpu.sweep_row(swept, rows, 0.0)
        told = capsys.readouterr()
        assert f"no candidate of {len(rows)} compiled" in told.out and "paste" not in told.out
        assert launch.INTERPRETER is before
    assert "dx: wrong" in told.err


@pytest.mark.parametrize("kernel", ["info_nce_forward", "info_nce_gradient", "sigmoid"])
def test_a_larger_tile_of_the_sweep_asks_for_one_cta_an_sm(monkeypatch, kernel):
    """Two would not fit, and the candidate would be dropped before it is timed."""
    from protoclip.kernels import launch

    monkeypatch.setattr(gpu, "REHEARSAL", False)
    row = launch.HALF[kernel][90]
    size = row.block_n * row.block_m
    larger = [near for near in gpu._candidates(row) if near.block_n * near.block_m > size]
    assert larger
    assert all(near.ctas_per_sm == 1 and near.max_registers is None for near in larger)


def test_candidates_that_spill_are_not_timed():
    """In a process without the interpreter, as the sweep's pool has them."""
    swept = gpu.Swept(
        path=("HALF", "sigmoid", 90),
        kernel="sigmoid",
        launched=gpu.Launched("sigmoid", "gradients", "bf16", 512),
        step=list,
        assert_right=list,
    )
    wide = replace(swept.row, block_n=256, block_m=128, warps=4)
    candidates = [gpu.Candidate(swept, row) for row in (swept.row, wide)]
    of_the_row, of_wide = gpu.compile_all(candidates, 90)
    assert of_the_row == [] and any("local memory" in problem for problem in of_wide)
    *_, last = gpu.compile_all(20 * candidates[:1], 90, seconds=0)  # more than there are processes
    assert last == ["no time to compile it"]
