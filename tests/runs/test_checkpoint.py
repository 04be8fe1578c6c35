"""Checkpoints: whole or not at all, told from torn ones, read without running their code."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

from protoclip.common import sealed
from protoclip.runs import checkpoint


@pytest.mark.smoke
@pytest.mark.parametrize("damage", ["cut", "bit", "comment", "empty", "text"])
def test_a_torn_checkpoint_is_told_from_a_whole_one(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"a": torch.arange(1000), "n": 3})
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        {
            "cut": data[:middle],
            "bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
            "comment": data[:-1] + b"?",
            "empty": b"",
            "text": b"not a checkpoint at all\n" * 50,
        }[damage]
    )
    with pytest.raises(ValueError, match="torn or not a checkpoint"):
        checkpoint.load(path)


def test_torch_and_open_clip_read_a_sealed_file(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"state_dict": {"w": torch.ones(2)}})
    for options in ({}, {"mmap": True}):
        assert torch.equal(torch.load(path, **options)["state_dict"]["w"], torch.ones(2))
    torch.save({"w": torch.ones(2)}, tmp_path / "plain.pt")  # no seal: OpenCLIP's
    assert torch.equal(checkpoint.load(tmp_path / "plain.pt")["w"], torch.ones(2))


def test_the_tenth_epoch_is_newer_than_the_ninth(tmp_path: Path) -> None:
    for epoch in (9, 10):
        checkpoint.save(tmp_path / f"epoch_{epoch}.pt", {"epoch": epoch})
    assert checkpoint.load_newest(tmp_path)[1] == {"epoch": 10}


def test_who_reads_the_old_file_reads_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"a": 1})
    before = path.read_bytes()
    with path.open("rb") as reader:
        checkpoint.save(path, {"a": torch.arange(1000)})
        assert reader.read() == before


def test_another_format_is_refused_in_words(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c.pt", {"epoch": 1, "protoclip": {"format": 1}})
    with pytest.raises(ValueError, match="expected format 3 in .*, got 1"):
        checkpoint.load(tmp_path / "c.pt")


def test_a_failed_write_leaves_the_old_file_and_a_missing_one_is_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "x.pt", {"a": 1})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoint.save(tmp_path / "x.pt", {"a": lambda: 0})
    assert checkpoint.load(tmp_path / "x.pt") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]
    with pytest.raises(ValueError, match="y.pt"):
        checkpoint.load(tmp_path / "y.pt")


def saved_folder(folder: Path) -> Path:
    """Steps 1 to 3: the latest, the previous and a kept one."""
    folder.mkdir(parents=True)
    latest = folder / checkpoint.LATEST
    for step in (1, 2, 3):
        checkpoint.save(latest, {"step": step}, previous=folder / checkpoint.PREVIOUS)
        if step == 1:
            checkpoint.link(latest, folder / "epoch_1.pt")
    return folder


def steps(folder: Path) -> list[int]:
    """Of the latest and the previous one."""
    names = (checkpoint.LATEST, checkpoint.PREVIOUS)
    return [checkpoint.load(folder / name)["step"] for name in names]


def test_going_on_from_an_older_checkpoint_keeps_the_newest(tmp_path: Path) -> None:
    folder = saved_folder(tmp_path / "a")
    checkpoint.make_latest(folder / checkpoint.LATEST, folder)
    assert steps(folder) == [3, 2]
    checkpoint.make_latest(folder / checkpoint.PREVIOUS, folder)  # they change places
    assert steps(folder) == [2, 3]
    checkpoint.make_latest(folder / "epoch_1.pt", folder)
    assert steps(folder) == [1, 2]


def test_going_on_from_a_link_needs_it_no_longer(tmp_path: Path) -> None:
    saved_folder(tmp_path / "store")
    folder = tmp_path / "x" / "checkpoints"
    folder.mkdir(parents=True)
    best = tmp_path / "x" / "best.pt"
    best.symlink_to("../store/epoch_1.pt")
    checkpoint.make_latest(best, folder)
    best.unlink()
    assert checkpoint.load_newest(folder)[1] == {"step": 1}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_whole_checkpoint_that_cannot_be_read_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """As written by another user, or on a network disk that is away."""
    folder = saved_folder(tmp_path / "a")

    def unreadable(path: Path, must_be_sealed: bool) -> None:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(sealed, "_check_seal", unreadable)
        with pytest.raises(OSError, match=f"cannot read: {os.strerror(number)}.*epoch_latest.pt"):
            checkpoint.load_newest(folder)
    assert steps(folder) == [3, 2]
