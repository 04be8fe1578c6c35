"""A disk that is full, or a folder that is missing: one sentence, an OSError, no torn file."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import bare_run, full_disk, losses

import protoclip
from protoclip import export
from protoclip.cluster.__main__ import main as cluster
from protoclip.train import main as train


def test_clusters_are_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    clusters = protoclip.kmeans(torch.randn(500, 8), 4)
    with pytest.raises(FileNotFoundError, match="missing/x.safetensors"):
        clusters.save(tmp_path / "missing" / "x.safetensors")
    clusters.save(tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    with full_disk(1000), pytest.raises(OSError, match=r"cannot write: .*x.safetensors") as raised:
        clusters.save(tmp_path / "x.safetensors")
    assert raised.value.errno == errno.EFBIG
    assert (tmp_path / "x.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o644


def test_an_export_leaves_nothing_behind(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with full_disk(50_000):
        assert export.main([str(trained), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot write: File too large" in said
    assert f"{out}/open_clip_model.safetensors: " in said and not out.exists()
    out.mkdir()
    with full_disk(50_000):
        assert export.main([str(trained), "--out", str(out)]) == 2
    assert list(out.iterdir()) == []  # it was there before
    assert export.main([str(trained), "--out", str(out)]) == 0


@pytest.mark.parametrize("room", [200, 8000])
def test_groups_of_pictures_on_a_full_disk(
    tmp_path: Path, nano: Path, capsys: pytest.CaptureFixture[str], room
) -> None:
    """First the record of the features does not fit, then the page, without which there is no
    table either."""
    (tmp_path / "photos").mkdir()
    for i in range(20):
        picture = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(picture).save(str(tmp_path / "photos" / f"{i}.png"))
    flags = ["--model", str(nano), "--pretrained", "random", "--k", "2"]
    with full_disk(room):
        code = cluster([str(tmp_path / "photos"), *flags, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    name = "features/encode.json" if room == 200 else "report.html"
    assert code == 2 and said.count("error: ") == 1 and "Traceback" not in said
    assert f"{tmp_path}/out/{name}: cannot write: File too large; free some space" in said
    left = {path.name for path in tmp_path.glob("out/*")} - {".protoclip-cluster", ".lock"}
    state = {"kmeans.state", ".kmeans.state.lock"}
    assert left == ({"features"} | state if room == 8000 else set())
    assert (tmp_path / "out").exists() == bool(left)
    if left:
        flags = ["--features", str(tmp_path / "out" / "features"), "--k", "2"]
    assert cluster([str(tmp_path / "photos"), *flags, "--out", str(tmp_path / "out")]) == 0


def test_a_run_folder_without_settings_can_be_begun_again(
    workdir: Path, capsys: pytest.CaptureFixture[str], error_of: Callable[..., str]
) -> None:
    """By the same line, once there is space."""
    flags = bare_run(workdir, "--max-steps", "2", "--method", "clip", "--resume", "auto")
    with full_disk(100):
        assert train(flags) == 2
    assert "config.json: cannot write" in capsys.readouterr().err
    error = error_of(train, [*flags, "--resume", ""])
    assert "run exists; start it again with --resume auto, choose" in error
    (workdir / "logs" / "file").touch()
    assert "file exists; " in error_of(train, [*flags, "--name", "file"])
    assert train(flags) == 0
    assert [step for step, _ in losses(workdir / "logs" / "run")] == [1, 2]
