"""``python -m protoclip.data --export``: the same pairs come back from the shards."""

import json
import tarfile

import pytest
import torch
from test_data_csv import same

from protoclip.data import Subset, open_dataset
from protoclip.data.__main__ import export_shards, main


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))


def test_emoji_come_back_from_their_shards(tmp_path):
    emoji = Subset(open_dataset("builtin:emoji"), torch.arange(25))
    export_shards(emoji, tmp_path / "out", per_shard=10)
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {
        "00000.tar": 10, "00001.tar": 10, "00002.tar": 5,
    }  # fmt: skip
    back = open_dataset(str(tmp_path / "out" / "{00000..00002}.tar"))
    assert len(back) == 25
    for i in (0, 9, 10, 24):
        assert back.captions(i) == emoji.captions(i)
        assert same(back.image(i), emoji.image(i))
        assert back.keys[i].endswith("/" + emoji.keys[i])


def test_the_command_writes_and_refuses(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--export", "builtin:shapes:5", "--out", str(out), "--image-format", "jpg"]
    assert main(command) == 0
    assert "--train-data" in capsys.readouterr().out
    with tarfile.open(out / "00000.tar") as tar:
        assert len([name for name in tar.getnames() if name.endswith(".jpg")]) == 5
    first = (out / "00000.tar").read_bytes()
    assert main([*command[:3], str(tmp_path / "again"), *command[4:]]) == 0
    assert (tmp_path / "again" / "00000.tar").read_bytes() == first
    assert main(command) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["--export", "builtin:shapes:5"]) == 2
    assert "--out" in capsys.readouterr().err
