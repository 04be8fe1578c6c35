"""What a command imports: seconds, which nobody needs who waits for something else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from html_page import read_page

from protoclip.settings.commands import PARSERS

WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["protoclip", "--help"]
runpy.run_module(sys.orig_argv[-1], run_name="__main__", alter_sys=True)
"""
MODULES = """
import sys
from protoclip.__main__ import main
code = main(sys.argv[1:])
heavy = ("torch._dynamo", "sklearn", "scipy", "pandas", "open_clip", "torchvision")
print("imported:", *[name for name in heavy if name in sys.modules])
sys.exit(code)
"""


def run(*words: str) -> str:
    ended = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("command", PARSERS)
def test_help_of_a_module_needs_no_torch(command: str) -> None:
    said = run("-c", WITHOUT_TORCH, f"protoclip.{command}")
    assert f"usage: protoclip {command}" in said


def test_groups_of_numbered_rows_need_torch_alone(tmp_path: Path) -> None:
    """dynamo, scikit-learn and its pandas took 4 of 6 CPU seconds; k-means a quarter."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(5000, 16)).astype("f4"))
    said = run("-c", MODULES, "cluster", f"{tmp_path}/x.npy", "--k", "20", "--out", f"{tmp_path}/o")
    assert said.splitlines()[-1].split() == ["imported:"]
    assert "map" in read_page(tmp_path / "o" / "report.html").sections
