"""Digits as an ImageFolder, and the command that evaluates them."""

import io
import json
import tarfile

import pytest
from PIL import Image

from protoclip.evaluate import __main__ as command

WORDS = "zero one two three four five six seven eight nine"
NAMES = [f"the digit {word}" for word in WORDS.split(" ")]
MODEL = ["protoclip-tiny", "--pretrained", "random", "--device", "cpu"]


def digits(count):
    """scikit-learn's digits, as grey pictures and classes."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    pictures = (data.images[:count] * 15.9).astype("uint8")
    return [Image.fromarray(p) for p in pictures], data.target[:count].tolist()


def png(picture):
    stream = io.BytesIO()
    picture.save(stream, "png")
    return stream.getvalue()


def image_folder(root, count=120, parts=("train", "test")):
    pictures, ids = digits(count)
    for i, (picture, label) in enumerate(zip(pictures, ids, strict=True)):
        folder = root / (parts[i % len(parts)] if parts else "") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{i:04}.png")
    return root


def shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def evaluate(tmp_path, *argv):
    output = tmp_path / "out" / "results.json"
    code = command.main([*MODEL, "--output", str(output), *map(str, argv)])
    return code, json.loads(output.read_text()) if output.exists() else None
