"""``protoclip cluster`` that is stopped: it keeps what it has encoded, and the same command goes
on."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from protoclip.cluster import encoded
from protoclip.cluster.__main__ import main as cluster
from protoclip.common.files import sole_writer
from protoclip.evaluate.tasks import Encoder

PICTURES = 40
TORN = "0007-torn.png"
BATCH = 8


def draw(path: Path, number: int) -> None:
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((32, 32)).save(path)


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
def command(photos: Path, nano: Path) -> list[str]:
    """The command line without --out."""
    flags = ["--model", str(nano), "--pretrained", "random", "--device", "cpu", "--k", "3"]
    return [str(photos), *flags, "--batch-size", str(BATCH)]


@pytest.fixture
def pictures_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures are encoded at once, one number for each batch."""
    sizes: list[int] = []
    encode = Encoder._encode

    def counted(self: Encoder, function: Callable[[Tensor], Tensor], part: Tensor) -> Tensor:
        sizes.append(len(part))
        return encode(self, function, part)

    monkeypatch.setattr(Encoder, "_encode", counted)
    return sizes


def stop_in_batch(monkeypatch: pytest.MonkeyPatch, number: int, sent: signal.Signals) -> None:
    """Send this process a signal while it encodes its ``number``-th batch."""
    encode = Encoder._encode
    batches: list[int] = []

    def encode_and_signal(
        self: Encoder, function: Callable[[Tensor], Tensor], part: Tensor
    ) -> Tensor:
        batches.append(len(part))
        if len(batches) == number:
            os.kill(os.getpid(), sent)
        return encode(self, function, part)

    monkeypatch.setattr(Encoder, "_encode", encode_and_signal)


def assert_same_result(out: Path, whole: Path) -> None:
    for name in ("clusters.csv", "left_out.csv", "centroids.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    with np.load(out / "features.npz") as ours, np.load(whole / "features.npz") as theirs:
        assert ours["keys"].tolist() == theirs["keys"].tolist()
        assert np.array_equal(ours["features"], theirs["features"])
    assert not (out / "features.parts").exists()


@pytest.mark.parametrize(
    ("sent", "exit_code", "name"),
    [
        (signal.SIGTERM, 0, "SIGTERM"),
        (signal.SIGUSR1, 0, "SIGUSR1"),
        (signal.SIGINT, 130, "Ctrl-C"),
    ],
)
def test_a_run_that_was_stopped_at_half_encodes_only_the_rest(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    pictures_encoded: list[int],
    sent: signal.Signals,
    exit_code: int,
    name: str,
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert cluster([*command, "--out", str(whole)]) == 0
    assert sum(pictures_encoded) == PICTURES + 1
    capfd.readouterr()
    with monkeypatch.context() as patch:
        stop_in_batch(patch, 3, sent)
        assert cluster([*command, "--out", str(out)]) == exit_code
    expected = f"stopped by {name} after 24 of 41 pictures; the same command continues"
    assert expected in capfd.readouterr().err
    assert not (out / "clusters.csv").exists()
    pictures_encoded.clear()
    assert cluster([*command, "--out", str(out)]) == 0
    assert pictures_encoded == [BATCH, BATCH, 1]
    assert_same_result(out, whole)


KILLED = """
import os, signal, sys
from protoclip.cluster import encoded
from protoclip.cluster.__main__ import main
from protoclip.evaluate.tasks import Encoder

encoded.PART_SECONDS = 0
encode, sizes = Encoder._encode, []
def killed(*arguments):
    sizes.append(1)
    if len(sizes) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*arguments)
Encoder._encode = killed
main(sys.argv[1:])
"""


def test_a_run_that_was_killed_encodes_only_what_is_in_no_part(
    command: list[str], tmp_path: Path, pictures_encoded: list[int]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run = subprocess.run([sys.executable, "-c", KILLED, *command, "--out", str(out)])
    assert run.returncode == -signal.SIGKILL
    assert len(list((out / "features.parts").glob("*.npz"))) == 3
    assert cluster([*command, "--out", str(out)]) == 0
    assert pictures_encoded == [BATCH, BATCH, 1]
    assert cluster([*command, "--out", str(whole)]) == 0
    assert_same_result(out, whole)


def test_where_most_pictures_are_torn_a_stopped_run_continues_too(
    photos: Path,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pictures_encoded: list[int],
) -> None:
    """Of 200 torn pictures no batch is full: they are looked for, and the others are encoded."""
    for number in range(200):
        (photos / f"0000-{number}.jpg").write_bytes(b"no picture")
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert cluster([*command, "--out", str(whole)]) == 0
    assert pictures_encoded[-5:] == [BATCH] * 5
    monkeypatch.setattr(encoded, "PART_SECONDS", 0)
    with monkeypatch.context() as patch:
        stop_in_batch(patch, 3, signal.SIGTERM)
        assert cluster([*command, "--out", str(out)]) == 0
    pictures_encoded.clear()
    assert cluster([*command, "--out", str(out)]) == 0
    assert pictures_encoded == [BATCH] * 2
    assert_same_result(out, whole)
    with (out / "left_out.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 201


def test_a_run_that_was_stopped_in_k_means_keeps_the_features(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pictures_encoded: list[int],
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        send = lambda *_: os.kill(os.getpid(), signal.SIGTERM) or 3  # noqa: E731
        patch.setattr("protoclip.cluster.groups.check_k", send)
        assert cluster([*command, "--out", str(out)]) == 0
    expected = "stopped by SIGTERM before its end; the features are kept, and the same command"
    assert expected in capsys.readouterr().err
    assert not (out / "clusters.csv").exists()
    pictures_encoded.clear()
    assert cluster([*command, "--out", str(out)]) == 0
    assert pictures_encoded == [] and (out / "clusters.csv").exists()


def test_only_pictures_that_changed_are_encoded_again(
    photos: Path, command: list[str], tmp_path: Path, pictures_encoded: list[int]
) -> None:
    out = tmp_path / "out"
    assert cluster([*command, "--out", str(out)]) == 0
    draw(photos / TORN, 99)  # it is whole now
    draw(photos / "0003.png", 98)
    os.utime(photos / "0003.png", (1e9, 1e9))
    (photos / "0004.png").unlink()
    pictures_encoded.clear()
    assert cluster([*command, "--out", str(out), "--overwrite"]) == 0
    assert pictures_encoded == [2]
    assert (out / "left_out.csv").read_text().splitlines() == ["file,reason"]
    with (out / "clusters.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == PICTURES


def test_features_by_another_model_are_not_mixed(
    photos: Path,
    nano: Path,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error_of: Callable[..., str],
    pictures_encoded: list[int],
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_in_batch(patch, 3, signal.SIGTERM)
        assert cluster([*command, "--out", str(out)]) == 0
    other = tmp_path / "other.json"
    other.write_text(nano.read_text())
    by_another = [str(other) if word == str(nano) else word for word in command]
    error = error_of(cluster, [*by_another, "--out", out])
    assert f"features of an unfinished run with {nano}" in error and "--overwrite" in error
    pictures_encoded.clear()
    assert cluster([*by_another, "--out", str(out), "--overwrite"]) == 0
    assert sum(pictures_encoded) == PICTURES + 1


def test_a_second_run_into_the_folder_is_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with sole_writer(out / ".lock", "--out"):
        assert cluster([*command, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert (
        f"--out: {out} is in use by another process" in error
        and not (out / "clusters.csv").exists()
    )
    assert cluster([*command, "--out", str(out)]) == 0
