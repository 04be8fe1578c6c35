"""Every row of the launch table compiles without a GPU and keeps its promise: no spills, the
tensor core, shared memory and registers for the CTAs it counts on."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def _report(*arguments):
    # In a fresh process: kernels of the interpreter do not compile.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "protoclip.kernels.compile_report", "--json", *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.stdout, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("kernel", ["forward", "gradient", "stashing", "stashed", "sigmoid"])
def test_every_row_keeps_its_promise(kernel):
    from protoclip.kernels import launch

    costs = _report("--kernel", kernel)
    assert {c["case"]["arch"] for c in costs} == set(launch.CARDS)
    assert sum(c["case"]["whole"] for c in costs) == sum(row[0] == kernel for row in launch.rows())
    assert [c for c in costs if c["problems"]] == []
    for c in costs:
        assert c["local_bytes"] == 0 and c["registers"] <= 255
        half = c["case"]["dtype"] != "fp32"
        assert c["instruction"] == (launch.CARDS[c["case"]["arch"]].tensor_core if half else "fma")


def test_the_small_kernels_compile():
    names = "merge", "merge_all", "lost", "finish"
    costs = _report(*(word for name in names for word in ("--kernel", name)))
    assert len(costs) == 4 * 4
    assert [c for c in costs if c["problems"]] == []


def test_a_row_that_breaks_its_promise_is_named():
    """A forward tile of 256 x 128 on four warps cannot hold two CTAs, nor avoid spills."""
    code = (
        "from protoclip.kernels import compile_report as r, launch\n"
        "row = launch.Launch(256, 128, 64, warps=4, stages=3, ctas_per_sm=2)\n"
        "print('; '.join(r.cost(r.Case('forward', 90, 'bf16', 'pointers', row)).problems))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "bytes of local memory a thread" in run.stdout, run.stderr
    assert "the row promises 2" in run.stdout
