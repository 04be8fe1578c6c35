"""The record: pages say what the newest record says; counts and exponents by hand."""

import copy
import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks import report, roofline
from benchmarks.harness import Record

FOUND = [json.loads(path.read_text()) for path in sorted(report.RESULTS.glob("*.json"))]


def row(variant="protoclip-cpu", n=1024, ms=1.0, memory=2.0, ratio=None):
    work = roofline.info_nce(n, 128, "fp32")
    return {
        "op": "info_nce", "phase": "both", "variant": variant, "shape": {"N": n, "D": 128},
        "dtype": "fp32", "rounds": 5, "note": "", "median_ms": ms, "p20_ms": ms,
        "p80_ms": ms, "min_ms": ms, "flop": work.flop, "bytes": work.bytes, "bound": work.bound,
        "rate": work.flop * 1e-9 / ms, "share": 0.5, "peak_mib": memory, "ratio": ratio,
    }  # fmt: skip


def run(date="2026-01-02 03:04", machine="M"):
    versions = {"torch": "2.11", "triton": None}
    return {
        "machine": machine, "slug": "m", "threads": 2, "versions": versions, "date": date,
        "commit": "abc", "note": "", "ceilings": {"fp32": 0.1, "copy": 9.0},
    }  # fmt: skip


def record(*rows, **keys):
    return {"runs": [run(**keys)], "rows": list(rows)}


def test_the_page_shows_the_newest_records():
    assert FOUND, "no record under benchmarks/results"
    assert not report.stale(FOUND), "python -m benchmarks.report benchmarks/results/*.json --write"
    changed = copy.deepcopy(FOUND)
    for one in changed[-1]["rows"]:
        one["median_ms"] *= 3
    assert report.stale(changed)


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


def _rehearse(*arguments):
    environment = os.environ | {"PROTOCLIP_REHEARSE": "1", "TRITON_INTERPRET": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=report.ROOT, capture_output=True,
        text=True, check=True,
    ).stdout  # fmt: skip


def test_one_headline_of_each_op_comes_first():
    told = _rehearse("-m", "pytest", "benchmarks", "--collect-only", "--sizes", "tiny")
    found = [line for line in told.splitlines() if "::" in line]
    first = "".join(found[: next(i for i, name in enumerate(found) if "liger" in name)])
    for op in ("[info_nce", "[siglip", "[contrastive", "test_prototype_cross_entropy"):
        assert op in first
    for op in ("test_assign", "test_update", "test_lloyd", "test_soft_targets"):
        assert op in first
    kept = _rehearse(*("-m", "pytest", "benchmarks", "--collect-only", "--headline"))
    assert "memeff" in kept and "siglip-kernel" in kept and "info_nce-forward" not in kept


def test_a_card_is_asked_for_kernels_graphs_and_rows():
    pytest.importorskip("triton")
    told = _rehearse("-m", "benchmarks.gpu", "--seconds", "1")
    assert "info_nce" in told and "protoclip::contrastive_bwd" in told
    assert "expected a CUDA device, got none" in told
    assert re.search(r"INTERPRETER: paste\n.*Launch\(block_n=.*ms before, of \d+ rows", told)


def test_the_newest_record_of_a_machine_counts():
    old, new = record(row(ms=7.0)), record(row(ms=5.0), date="2026-01-03 00:00")
    text = report.section([new, old, record(row(ms=3.0), machine="Other")])
    assert "5.00 ms" in text and "3.00 ms" in text and "7.00 ms" not in text


def test_a_faster_peer_is_named():
    text = report.section([record(row(), row("open_clip", ms=0.5, ratio=0.5))])
    assert "open_clip takes 0.50 of our time" in text
    text = report.section([record(row(), row("open_clip", ms=3.0, ratio=3.0))])
    assert "Slower than a peer: nowhere" in text and "open_clip 3.00×" in text


def test_work_by_hand():
    assert roofline.info_nce(3, 5, "fp32").flop == 4 * 2 * 3 * 3 * 5
    assert roofline.info_nce(3, 5, "bf16", "forward").bytes == 2 * 3 * 5 * 2
    assert roofline.kmeans_assign(7, 3, 2, "fp32").flop == 2 * 7 * 3 * 2


def test_a_record_is_whole_after_every_row_and_pieces_add_up(tmp_path):
    path = tmp_path / "deep" / "r.json"
    first = Record(path, run())
    first.add(row(ms=1.0))
    assert [r["median_ms"] for r in json.loads(path.read_text())["rows"]] == [1.0]
    first.add(row(n=2048, ms=4.0))
    second = Record(path, run(date="2026-01-03 00:00"))
    second.add(row(ms=2.0))  # measured again
    found = json.loads(path.read_text())
    assert [(r["median_ms"], r["run"]) for r in found["rows"]] == [(4.0, 0), (2.0, 1)]
    assert len(found["runs"]) == 2
    third = Record(path, run())
    third.add(row(n=2048, ms=3.0))  # the first run has no row left
    assert len(json.loads(path.read_text())["runs"]) == 2
    assert not list(path.parent.glob("*.partial"))
