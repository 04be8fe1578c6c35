"""``protoclip cluster`` that is stopped: it keeps what it has encoded, and the same command goes
on."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pairs import draw, write_shard
from torch import Tensor

from protoclip.cluster.__main__ import main as cluster
from protoclip.common.files import sole_writer
from protoclip.encode import encoders
from protoclip.features import open_features
from protoclip.features.layout import IMAGES

PICTURES = 40
TORN = "0007-torn.png"
BATCH = 8


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """40 pictures, and a torn one among the first ten."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(PICTURES):
        draw(folder / f"{number:04}.png", number)
    (folder / TORN).write_bytes(b"no picture")
    return folder


@pytest.fixture
def flags(nano: Path) -> list[str]:
    return ["--model", str(nano), "--pretrained", "random", "--device", "cpu", "--k", "3",
            "--batch-size", str(BATCH)]  # fmt: skip


class Counted:
    """How many pictures are encoded at once, one number for each batch, and a signal in one."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.stop_in = 0  # number of the batch
        self.signal = signal.SIGTERM

    def clip_encoders(self, args: object) -> dict[str, encoders.Encoder]:
        images = clip_encoders(args)[IMAGES]  # type: ignore[arg-type]

        def encode(pictures: Tensor) -> Tensor:
            self.sizes.append(len(pictures))
            if len(self.sizes) == self.stop_in:
                os.kill(os.getpid(), self.signal)
            return images.encode(pictures)

        return {IMAGES: replace(images, encode=encode)}


clip_encoders = encoders.clip_encoders


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted()
    monkeypatch.setattr(encoders, "clip_encoders", counted.clip_encoders)
    return counted


def assert_same_result(out: Path, whole: Path) -> None:
    for name in ("clusters.csv", "left_out.csv", "centroids.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = open_features(out / "features"), open_features(whole / "features")
    assert list(ours.keys or ()) == list(theirs.keys or ())
    assert np.array_equal(ours.rows(0, len(ours)), theirs.rows(0, len(theirs)))


@pytest.mark.parametrize(
    ("sent", "exit_code", "name"),
    [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")],
)
def test_a_run_that_was_stopped_at_half_encodes_only_the_rest(
    photos: Path,
    flags: list[str],
    tmp_path: Path,
    counted: Counted,
    capfd: pytest.CaptureFixture[str],
    sent: signal.Signals,
    exit_code: int,
    name: str,
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert cluster([str(photos), *flags, "--out", str(whole)]) == 0
    assert sum(counted.sizes) == PICTURES
    capfd.readouterr()
    counted.sizes.clear()
    counted.stop_in, counted.signal = 3, sent
    command = [str(photos), *flags, "--out", str(out)]
    assert cluster(command) == exit_code
    expected = f"stopped by {name} after 24 of 41 pictures; the same command continues"
    assert expected in capfd.readouterr().err
    assert not (out / "clusters.csv").exists()
    counted.sizes.clear()
    counted.stop_in = 0
    assert cluster(command) == 0
    assert counted.sizes == [BATCH, BATCH, 1]
    assert_same_result(out, whole)


def test_a_run_that_was_stopped_in_k_means_keeps_the_features(
    photos: Path,
    flags: list[str],
    tmp_path: Path,
    counted: Counted,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    command = [str(photos), *flags, "--out", str(out)]
    with monkeypatch.context() as patch:
        send = lambda *_: os.kill(os.getpid(), signal.SIGTERM) or 3  # noqa: E731
        patch.setattr("protoclip.cluster.groups.check_k", send)
        assert cluster(command) == 143
    expected = "stopped by SIGTERM before its end; the features are kept, and the same command"
    assert expected in capsys.readouterr().err
    assert not (out / "clusters.csv").exists()
    counted.sizes.clear()
    assert cluster(command) == 0
    assert counted.sizes == [] and (out / "clusters.csv").exists()


def test_only_pictures_that_changed_are_encoded_again(
    photos: Path, flags: list[str], tmp_path: Path, counted: Counted
) -> None:
    out = tmp_path / "out"
    command = [str(photos), *flags, "--out", str(out)]
    assert cluster(command) == 0
    draw(photos / TORN, 99)  # it is whole now
    draw(photos / "0003.png", 98)
    os.utime(photos / "0003.png", (1e9, 1e9))
    (photos / "0004.png").unlink()
    counted.sizes.clear()
    assert cluster([*command, "--overwrite"]) == 0
    assert counted.sizes == [2]
    assert (out / "left_out.csv").read_text().splitlines() == ["file,reason"]
    with (out / "clusters.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == PICTURES


def test_a_shard_that_was_rewritten_is_clustered_as_it_is_now(
    flags: list[str], tmp_path: Path
) -> None:
    """Same keys, the pictures reversed: each must have its own features, not another's."""
    shard = tmp_path / "s.tar"
    write_shard(shard, range(20))
    command = [str(shard), *flags, "--out", str(tmp_path / "out")]
    assert cluster(command) == 0
    before = open_features(tmp_path / "out" / "features").rows(0, 20).astype(np.float32)
    write_shard(shard, range(19, -1, -1))
    os.utime(shard, (1e9, 1e9))
    assert cluster([*command, "--overwrite"]) == 0
    after = open_features(tmp_path / "out" / "features").rows(0, 20).astype(np.float32)
    np.testing.assert_allclose(after, before[::-1], atol=2e-3)
    assert np.abs(after - before).max() > 0.01


def test_features_by_another_model_are_not_mixed(
    photos: Path,
    nano: Path,
    flags: list[str],
    tmp_path: Path,
    error_of: Callable[..., str],
    counted: Counted,
) -> None:
    out = tmp_path / "out"
    counted.stop_in = 3
    assert cluster([str(photos), *flags, "--out", str(out)]) == 143
    counted.stop_in = 0
    other = tmp_path / "other.json"
    other.write_text(nano.read_text())
    by_another = [str(photos), "--model", str(other), *flags[2:], "--out", str(out)]
    error = error_of(cluster, by_another)
    assert f"holds features of {photos} (images by {nano}" in error and "--overwrite" in error
    counted.sizes.clear()
    assert cluster([*by_another, "--overwrite"]) == 0
    assert sum(counted.sizes) == PICTURES


def test_a_second_run_into_the_folder_is_refused(
    photos: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command = [str(photos), *flags, "--out", str(out)]
    with sole_writer(out / ".lock", "--out"):
        assert cluster(command) == 2
    error = capsys.readouterr().err
    assert f"--out: {out} is in use by another process" in error
    assert not (out / "clusters.csv").exists()
    assert cluster(command) == 0
