"""What nvcc and the host compiler say about csrc/*.cu and its bindings, without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")


def _compile(source: str, arch: int, target: Path) -> str:
    command = [NVCC, "-std=c++17", "-O3", "--use_fast_math", "-Xptxas", "-v", "-cubin"]
    command += [f"-arch=sm_{arch}", str(CSRC / source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("source", ["kmeans_assign.cu", "segment_mean.cu"])
def test_compiles_without_spills_and_uses_tensor_cores(source, arch, tmp_path: Path) -> None:
    cubin = tmp_path / "kernels.cubin"
    report = _compile(source, arch, cubin)
    assert "warning" not in report
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    assert spills and set(spills) == {("0", "0")}
    kernels = re.findall(r"entry function '(\S+)'.*?Used (\d+) registers", report, re.DOTALL)
    assert len(kernels) == len(spills)
    for name, registers in kernels:  # what the kernels' comments count on
        assert int(registers) <= (255 if "assign_kernel" in name else 64), name
    if source == "kmeans_assign.cu":
        cuobjdump = pytest.importorskip("triton").knobs.nvidia.cuobjdump.path
        sass = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True)
        assert sass.returncode == 0, sass.stderr
        wanted = ("HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "LDGSTS", "LDSM")
        assert all(instruction in sass.stdout for instruction in wanted)


@needs_nvcc
def test_bindings_compile_beside_this_torch(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ was not found")
    stub = Path(__file__).parent / "cuda_stub"
    toolkit = [Path(NVCC).resolve().parents[1] / "include"]
    dryrun = subprocess.run([NVCC, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True)
    toolkit += [Path(p) for p in re.findall(r'INCLUDES="-I(\S+?)"', dryrun.stderr.decode())]
    paths = [*map(str, toolkit), *include_paths(), sysconfig.get_paths()["include"]]
    command = [compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-DTORCH_EXTENSION_NAME=check"]
    command += [f"-I{stub}", *(f"-isystem{p}" for p in paths if Path(p).is_dir())]
    done = subprocess.run(
        [*command, str(CSRC / "cuda_bindings.cpp")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
