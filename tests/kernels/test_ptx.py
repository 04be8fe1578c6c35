"""The compiled kernels, executed instruction by instruction (tests/ptx)."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import source_from_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from torch.torch_version import TorchVersion

pytest.importorskip("triton")

import triton

from tests.ptx import known
from tests.ptx.arithmetic import EmulatorError, accumulate, float_max, options
from tests.ptx.program import Kernel

# In fresh processes: kernels of the interpreter do not compile.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
OLD_TRITON = TorchVersion(triton.__version__) < "3.7"
EVERYTHING = bool(os.environ.get("PROTOCLIP_PTX"))


def started(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the emulator, ended."""
    words = [sys.executable, "-m", module, *arguments]
    return subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True)


def command(module: str, *arguments: str) -> str:
    """What a command of the emulator prints; a failure shows it."""
    run = started(module, *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


class Counted(NamedTuple):
    """Of a kernel in a case."""

    case: str
    kernel: str
    facts: dict[str, int]  # ``Facts`` of tests/ptx/run.py


class Run(NamedTuple):
    architecture: str
    failed: bool
    printed: str
    compilers: dict[str, str]
    kernels: list[Counted]
    modules: list[str]  # of protoclip, loaded


def skip_known(architecture: str) -> None:
    """Nothing is executed that passed with the same sources, or cannot pass."""
    if architecture != "sm_80" and OLD_TRITON:
        pytest.skip("Triton 3.4 and 3.6 set no fence.proxy.async between a store and an mma")
    if not EVERYTHING and known.has_passed(architecture):
        pytest.skip(f"{architecture} passed with these sources; PROTOCLIP_PTX=1 executes it again")


def run_of(architecture: str, *arguments: str) -> Run:
    """Cases executed on an architecture."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "facts.json")
        number = architecture.removeprefix("sm_")
        done = started("tests.ptx.run", number, *arguments, "--facts", str(path))
        assert path.exists(), done.stdout + done.stderr
        record = json.loads(path.read_text())
    known.loaded[architecture] = record["modules"]
    kernels = [
        Counted(case, kernel, facts)
        for case, by_kernel in record[architecture].items()
        for kernel, facts in by_kernel.items()
    ]
    failed = done.returncode != 0
    return Run(architecture, failed, done.stdout, record["compilers"], kernels, record["modules"])


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def run(request: pytest.FixtureRequest) -> Run:
    """CI's cases on an architecture."""
    skip_known(request.param)
    return run_of(request.param, "--ci")


@pytest.mark.slow
def test_each_kernel_computes_what_the_reference_does(run: Run) -> None:
    """Within the budget, without a bad access, a race or a deadlock."""
    assert not run.failed, run.printed


@pytest.mark.slow
def test_cuda_kernels_are_executed_too(run: Run) -> None:
    if reasons := [line for line in run.printed.splitlines() if " skipped " in line]:
        pytest.skip(reasons[0])
    assert any("CUDA" in counted.kernel for counted in run.kernels)


@pytest.mark.slow
def test_cases_execute_each_source_line(run: Run) -> None:
    """Of all kernels; compilers other than the recorded ones may place instructions elsewhere."""
    if not run.compilers.items() <= known.read_record()["compilers"].items():
        pytest.skip(f"not for {run.compilers}")
    _, heading, unseen = run.printed.partition("instruction was executed\n")
    assert heading and unseen == ""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_100"])
def test_lanes_of_tcgen05_add_the_same_column_sums(architecture: str) -> None:
    """Each has one row: a product fused into a sum of two lanes would differ in both."""
    skip_known(architecture)
    assert " 1 passed" in run_of(architecture, "bias, all seen").printed


@pytest.mark.slow
def test_16_bit_kernels_have_no_bank_conflict(run: Run) -> None:
    kernels = [kernel for kernel in run.kernels if kernel.case.endswith(("bf16", "fp16"))]
    assert kernels
    conflicts = [k for k in kernels if k.facts["shared"] > k.facts["least_shared"]]
    if conflicts and TorchVersion(triton.__version__) < "3.9":
        print(*conflicts, sep="\n")
        pytest.skip(f"with Triton {triton.__version__} {len(conflicts)} kernels have some")
    assert conflicts == []


# Kernels that request more than 1.1 times the fewest sectors.
MORE_SECTORS = {
    "scale_gradients_kernel": "the mask of the last block; 1.0 in whole blocks",
    "exact_kernel": "a thread sums eight features, four by each load; the second hits the L1 cache",
    "weights_kernel": "stores rows of 77 weights, which begin anywhere",
    "assign_kernel (CUDA)": "partial results of slices",
    "runs_kernel (CUDA)": "labels before and after a piece",
}


@pytest.mark.slow
def test_16_bit_kernels_read_and_write_whole_sectors(run: Run) -> None:
    kernels = [k for k in run.kernels if k.case.endswith("bf16") and "any D" not in k.case]
    assert {kernel.kernel for kernel in kernels} > {"info_nce_forward_kernel", "attention_kernel"}
    more = {k.kernel for k in kernels if k.facts["sectors"] > 1.1 * k.facts["least_sectors"]}
    if OLD_TRITON and not more <= MORE_SECTORS.keys():
        pytest.skip(f"with Triton {triton.__version__} {', '.join(more)} request more")
    assert more <= MORE_SECTORS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["triton", "nvcc"])
def test_kernels_execute_as_many_instructions_as_recorded(run: Run, compiler: str) -> None:
    """By the compilers that the record names; ``python -m tests.ptx.run 80 --record`` renews it."""
    record = known.read_record()
    is_cuda = compiler == "nvcc"
    recorded = {k: r for k, r in record[run.architecture].items() if ("CUDA" in k) == is_cuda}
    executed = {
        (k.kernel, k.case): k.facts["instructions"]
        for k in run.kernels
        if ("CUDA" in k.kernel) == is_cuda
    }
    found = {kernel: executed.get((kernel, r["case"]), 0) for kernel, r in recorded.items()}
    if run.compilers.get(compiler) != record["compilers"][compiler]:
        print(*found.items(), sep="\n")
        pytest.skip(f"recorded with {record['compilers']}, not {run.compilers.get(compiler)}")
    assert {kernel for kernel, _ in executed} == recorded.keys()
    for kernel, instructions in found.items():
        ratio = instructions / recorded[kernel]["instructions"]
        assert abs(ratio - 1) <= 0.03, (kernel, instructions)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_broken_kernels_are_noticed(architecture: str) -> None:
    """A barrier, a store out of bounds, a wrong value; on sm_90 what asynchronous copies need."""
    skip_known(architecture)
    printed = command("tests.ptx.mutants", architecture.removeprefix("sm_"), "--ci")
    assert printed.count(": caught: ") + printed.count(": wrong result ") == 3


# ---- what has passed is not executed again ----

OPENED = """
import importlib.util, json, sys
opened = set()
def note(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        opened.add(arguments[0])
sys.addaudithook(note)
from tests.ptx import known, run
assert run.main(["80", "segment_mean 1000x3x1"]) == 0
print(json.dumps([known.modules_loaded(), sorted(opened)]))
"""


def test_the_digest_has_every_source_that_an_execution_opens() -> None:
    """Compiled before or not."""
    words = [sys.executable, "-c", OPENED]
    done = subprocess.run(words, env=ENVIRONMENT, cwd=known.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    modules, opened = json.loads(done.stdout.splitlines()[-1])
    files = {Path(source_from_cache(name) if name.endswith(".pyc") else name) for name in opened}
    paths = {file.resolve() for file in files if file.suffix in known.SUFFIXES}
    own = {str(path.relative_to(known.ROOT)) for path in paths if known.ROOT in path.parents}
    assert len(own) > 20 and own <= {*known.sources(modules)}


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A copy of the sources whose executions have passed."""
    for name in known.sources(["protoclip/ops/reference.py"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(known.ROOT / name, tmp_path / name)
    shutil.copy2(known.ROOT / known.RECORD, tmp_path / known.RECORD)
    known.write({"sm_80": ["protoclip/ops/reference.py"]}, tmp_path)
    assert known.has_passed("sm_80", tmp_path) and not known.has_passed("sm_90", tmp_path)
    return tmp_path


def append(line: str, path: Path) -> None:
    with path.open("a") as file:
        file.write(line)


CHANGES: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "a comment in a kernel": lambda root, _: append("# a comment\n", root / "kernels/waves.py"),
    "a module of the ops": lambda root, _: append("\n", root / "protoclip/ops/reference.py"),
    "a new file": lambda root, _: (root / "csrc/new.cuh").touch(),
    "a renamed file": lambda root, _: (root / "csrc/launchers.h").rename(root / "csrc/launch.h"),
    "another Triton": lambda _, patch: patch.setattr(triton, "__version__", "3.9.0.post1"),
    "another option of Triton": lambda _, patch: patch.setenv("TRITON_DEFAULT_FP_FUSION", "0"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_an_execution_has_it_run_again(
    change: str, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CHANGES[change](recorded, monkeypatch)
    assert not known.has_passed("sm_80", recorded)


def test_a_cache_of_its_own_executes_nothing_again(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(recorded / "cache"))
    monkeypatch.setenv("PROTOCLIP_CACHE", str(recorded / "cache"))
    assert known.has_passed("sm_80", recorded)


# ---- the emulator ----


def executed(body: str, lanes: int = 64, size: int = 256) -> np.ndarray:
    """The 4-byte words of a tensor after a kernel of one CTA, whose pointer is %a and whose lane,
    times 4, is %t."""
    text = f"""
.visible .entry kernel(.param .u64 .ptr pointer, .param .u32 number)
{{
    .reg .pred %p<4>;
    .reg .b32 %r<32>;
    .reg .b32 %t;
    .reg .b64 %a;
    .reg .b64 %b;
    ld.param.b64 %a, [pointer];
    mov.u32 %r0, %tid.x;
    shl.b32 %t, %r0, 2;
    cvt.u64.u32 %b, %t;
    add.s64 %b, %a, %b;
{body}
    ret;
}}
.extern .shared .align 16 .b8 buffer[];
"""
    tensor = np.zeros(size, "u1")
    address = tensor.ctypes.data
    params = [struct.pack("<Q", address), struct.pack("<I", 0)]
    Kernel(text).launch((1, 1, 1), lanes, params, [(address, size)], 256)
    return tensor.view("u4")


def test_lanes_that_diverge_meet_again() -> None:
    words = executed("""
    setp.lt.u32 %p0, %r0, 5;
    @%p0 bra few;
    mov.u32 %r1, 7;
    bra.uni done;
few:
    mov.u32 %r1, 1;
done:
    shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
    st.global.b32 [%b], %r2;
""")
    assert words.tolist() == [1, 1, 1, 1, 7, 1] + [7] * 58


WRONG = {
    "outside every tensor": "st.global.b32 [%b+4], %r0;",
    "misaligned global access": "st.global.b32 [%b+2], %r0;",
    "outside the 256 bytes of shared memory": "st.shared.b32 [%t+8], %r0;",
    "reads uninitialised shared memory": "ld.shared.b32 %r1, [%t];",
    "race: reads what another warp wrote": """
    xor.b32 %r1, %t, 128;
    st.shared.b32 [%t], %r0;
    ld.shared.b32 %r2, [%r1];""",
    "race: reads what another lane of the warp wrote": """
    xor.b32 %r1, %t, 4;
    st.shared.b32 [%t], %r0;
    ld.shared.b32 %r2, [%r1];""",
    "race: lanes write different values": "st.global.b32 [%a], %r0;",
    "deadlock": """
    setp.lt.u32 %p0, %r0, 32;
    @%p0 bar.sync 1, 64;
    @!%p0 bar.sync 2, 64;""",
    "a warp collective names lanes that are elsewhere": """
    setp.lt.u32 %p0, %r0, 5;
    @%p0 bra few;
    bra.uni done;
few:
    shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;
done:
    mov.u32 %r3, 0;""",
    "bytes that cp.async has not delivered": """
    cvt.u64.u32 %b, %t;
    add.s64 %b, %a, %b;
    cp.async.ca.shared.global [%t], [%b], 4;
    cp.async.commit_group;
    ld.shared.b32 %r2, [%t];""",
    "not modelled": "mul.rz.f32 %r2, %r0, %r1;",
}


@pytest.mark.smoke
@pytest.mark.parametrize("error", WRONG)
def test_what_a_kernel_must_not_do_is_an_error(error: str) -> None:
    with pytest.raises(EmulatorError, match=error):
        executed(WRONG[error])


def test_a_barrier_between_them_makes_an_exchange_right() -> None:
    words = executed("""
    xor.b32 %r1, %t, 128;
    st.shared.b32 [%t], %r0;
    bar.sync 0;
    ld.shared.b32 %r2, [%r1];
    st.global.b32 [%b], %r2;
""")
    assert words.tolist() == [lane ^ 32 for lane in range(64)]


def test_tensor_cores_truncate_their_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 + 2^-24 + 2^-24: correctly rounded 1 + 2^-23 in one sum; truncated in two parts, 1."""
    ones = np.ones((1, 1, 16))
    tiny = np.full((1, 16, 1), 0.0)
    tiny[0, [0, 8]] = 2.0**-24
    one = np.ones((1, 1, 1), "f4")
    sums = {}
    for model in ("truncated", "cut", "nearest"):
        monkeypatch.setattr(options, "product_sums", model)
        sums[model] = accumulate(one, ones, tiny, 8).item()
    assert sums == {"truncated": 1.0, "cut": 1.0, "nearest": 1 + 2.0**-23}


def test_minus_zero_is_less_than_zero() -> None:
    """As in PTX, whichever comes first: lanes that reduce the same numbers agree."""
    minus = np.array([-0.0, 0.0], "f4")
    plus = np.array([0.0, -0.0], "f4")
    for nan in (False, True):
        assert not np.signbit(float_max(minus, plus, False, nan)).any()
        assert np.signbit(float_max(minus, plus, True, nan)).all()
