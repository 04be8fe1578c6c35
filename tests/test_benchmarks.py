"""The record: pages say what the newest record says."""

import copy
import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks import report

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
    assert "info_nce" in told and "protoclip::contrastive_bwd" in told
    assert "expected a CUDA device, got none" in told
    assert re.search(r"INTERPRETER: paste\n.*Launch\(block_n=.*ms before, of \d+ rows", told)
