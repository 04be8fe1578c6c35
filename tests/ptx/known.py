"""What the executions of PTX depend on, and whether they passed with just that.

    make ptx-record     # executes everything; if all of it passed, record.json says so

The result of an execution follows from sources, compilers and settings. Their digest is in the
record, one for each architecture, and tests/kernels/test_ptx.py skips what has passed with it.
``PROTOCLIP_PTX=1`` executes it all the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import torch
import triton

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent.relative_to(ROOT)
RECORD = HERE / "record.json"
TEST = "tests/kernels/test_ptx.py"
FOLDERS = ("kernels", "csrc", str(HERE))
SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h"}
OTHERS = (TEST, "tests/conftest.py", "tests/budget.py")
# Of the environment what changes generated code; not paths, of which CI has its own.
SETTINGS = ("PROTOCLIP_BACKEND", "TORCH_CUDA_ARCH_LIST", "CC", "CXX")
SETTINGS += ("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS")
NO_SETTINGS = ("TRITON_INTERPRET", "TRITON_HOME", "TRITON_CACHE_DIR")

# Architecture -> the files of protoclip that its executions of this process have loaded.
loaded: dict[str, list[str]] = {}


def modules_loaded() -> list[str]:
    """The files of protoclip that this process has imported, below the root."""
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    paths = [Path(file).resolve() for file in files if file]
    package = ROOT / "protoclip"
    return sorted(str(path.relative_to(ROOT)) for path in paths if path.is_relative_to(package))


def sources(modules: Iterable[str], root: Path = ROOT) -> list[str]:
    """The files that the executions depend on, below the root; ``modules`` are those of protoclip
    that they load."""
    in_folders = [
        str(path.relative_to(root))
        for folder in FOLDERS
        for path in (root / folder).rglob("*")
        if path.suffix in SUFFIXES
    ]
    return sorted({*in_folders, *OTHERS, *modules})


def versions() -> dict[str, str]:
    """Of what compiles and executes the kernels, whole."""
    told = {"python": sys.version, "machine": platform.machine()}
    told |= {module.__name__: module.__version__ for module in (numpy, torch, triton)}
    for name in ("nvcc", os.environ.get("CC", "gcc"), os.environ.get("CXX", "g++")):
        if path := shutil.which(name):
            run = subprocess.run([path, "--version"], capture_output=True, text=True)
            told[name] = run.stdout
    return told


def settings() -> dict[str, str]:
    """The environment variables that change generated code."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in SETTINGS or name.startswith("TRITON_") and name not in NO_SETTINGS
    }


def read_record(root: Path = ROOT) -> dict[str, Any]:
    return json.loads((root / RECORD).read_text())


def digest(modules: Iterable[str], root: Path = ROOT) -> str:
    """Of paths and contents of the sources, of versions, settings and the recorded counts."""
    counts = {key: value for key, value in read_record(root).items() if key != "passed"}
    facts = json.dumps([versions(), settings(), counts], sort_keys=True)
    sha256 = hashlib.sha256(facts.encode())
    for name in sources(modules, root):
        path = root / name
        content = path.read_bytes() if path.exists() else b"missing"
        sha256.update(f"\0{name}\0{len(content)}\0".encode() + content)
    return sha256.hexdigest()


def has_passed(architecture: str, root: Path = ROOT) -> bool:
    """Whether everything passed on it with the sources, versions and settings of now."""
    passed = read_record(root).get("passed", {}).get(architecture)
    return passed is not None and passed["digest"] == digest(passed["modules"], root)


def write(passed: dict[str, list[str]], root: Path = ROOT) -> None:
    """Record that everything passed on these architectures, whose executions loaded these files,
    and on no other."""
    record = read_record(root)
    record["passed"] = {
        architecture: {"digest": digest(modules, root), "modules": modules}
        for architecture, modules in sorted(passed.items())
    }
    (root / RECORD).write_text(json.dumps(record, indent=1) + "\n")


class Outcomes:
    """A plugin of pytest: the outcomes of the tests of each architecture, the first word of their
    parameters."""

    def __init__(self) -> None:
        self.by_architecture: dict[str, set[str]] = defaultdict(set)

    def pytest_runtest_logreport(self, report: Any) -> None:
        words = report.nodeid.partition("[")[2].rstrip("]").split("-")
        if words[0].startswith("sm_"):
            self.by_architecture[words[0]].add(report.outcome)


def main() -> int:
    """Executes everything and records the architectures on which all of it passed."""
    import pytest

    os.environ["PROTOCLIP_PTX"] = "1"
    package = [str(path.relative_to(ROOT)) for path in (ROOT / "protoclip").rglob("*.py")]
    before = digest(package)
    outcomes = Outcomes()
    code = pytest.main([str(ROOT / TEST)], plugins=[outcomes])
    if code or not outcomes.by_architecture:
        sys.exit("nothing is recorded: not everything passed")
    if digest(package) != before:
        sys.exit("nothing is recorded: sources changed meanwhile")
    passed = {
        architecture: loaded[architecture]
        for architecture, found in outcomes.by_architecture.items()
        if found == {"passed"}
    }
    write(passed)
    skipped = sorted(outcomes.by_architecture.keys() - passed.keys())
    print(f"recorded: {', '.join(sorted(passed))}; not, as something was skipped: {skipped}")
    return int(bool(skipped))
