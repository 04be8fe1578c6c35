"""Digits as an ImageFolder and as CLIP_benchmark's shards, and the command that evaluates them."""

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


def clip_benchmark(root, count=120):
    """CLIP_benchmark's layout: two test shards and a train shard of digits."""
    pictures, ids = digits(count)
    parts = {"test/0.tar": [], "test/1.tar": [], "train/0.tar": []}
    for i, (picture, label) in enumerate(zip(pictures, ids, strict=True)):
        members = parts[list(parts)[i % 3]]
        members += [(f"s{i:07}.png", png(picture)), (f"s{i:07}.cls", str(label).encode())]
    for name, members in parts.items():
        shard(root / name, members)
    (root / "test" / "nshards.txt").write_text("2\n")
    (root / "train" / "nshards.txt").write_text("1\n")
    (root / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n{c}\n")
    (root / "dataset_type.txt").write_text("classification\n")
    return root


def evaluate(tmp_path, *argv):
    output = tmp_path / "out" / "results.json"
    code = command.main([*MODEL, "--output", str(output), *map(str, argv)])
    return code, json.loads(output.read_text()) if output.exists() else None
