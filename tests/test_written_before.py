"""Files that protoclip wrote at 19733eb, before its modules moved: they still load.

The checkpoint is of twelve steps on builtin:shapes:48; its token embedding is zero, to be small.
"""

from __future__ import annotations

import lzma
import shutil
from pathlib import Path

import pytest
import torch
from ranks import losses

import protoclip
from protoclip.train import main

FILES = Path(__file__).parent / "written_before"


def test_a_run_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_page: None
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "logs" / "run"
    (run / "checkpoints").mkdir(parents=True)
    packed = (FILES / "epoch_latest.pt.xz").read_bytes()
    (run / "checkpoints" / "epoch_latest.pt").write_bytes(lzma.decompress(packed))
    shutil.copy(FILES / "config.json", run)
    shutil.copy(FILES / "small.json", tmp_path)
    assert main(["--resume", "logs/run", "--max-steps", "14"]) == 0
    assert [step for step, _ in losses(run)] == [13, 14]


def test_clusters_load_from_their_file() -> None:
    saved = protoclip.Clusters.load(FILES / "clusters.safetensors")
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    assert saved.num_iters == 5
    assert torch.equal(saved.predict(points), saved.labels)
