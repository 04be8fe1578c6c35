"""Pictures, tables, shards and batches for the tests of the data layer."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor

from protoclip.data import Batch, Draws, batches, build_transform, open_dataset

TEXTS = ("ein Mädchen läuft", "女の子が走る", "drapeau\u202f: Chine 🇨🇳", 'says "hi", twice')
MEAN = (0.48, 0.46, 0.41)
STD = (0.27, 0.26, 0.28)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"  # the beginning of a telephone's picture


def picture(number: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (12, 10, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def encoded(image: Image.Image, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


def same(got: Image.Image, expected: Image.Image) -> bool:
    return got.mode == "RGB" and got.tobytes() == expected.tobytes()


def write_table(
    folder: Path,
    rows: Iterable[Sequence[str]],
    header: Sequence[str] = ("filepath", "title"),
    separator: str = "\t",
    name: str = "pairs.tsv",
) -> str:
    lines = [separator.join(row) for row in (header, *rows)]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def table(folder: Path, name: str = "clusters.csv") -> list[dict[str, str]]:
    """The rows of a table that a command wrote, read as docs/cluster.md says."""
    with open(folder / name, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def write_drawings(folder: Path, count: int, name: str = "{}.png") -> Path:
    """A table of pictures with captions; every fifth picture has a second row at the end."""
    shapes = open_dataset(f"builtin:shapes:{count}")
    rows = [(name.format(i), shapes.captions(i)[0]) for i in range(count)]
    for i, (file, _) in enumerate(rows):
        shapes.image(i).save(folder / file)
    rows += [(file, f"also {text}") for file, text in rows[::5]]
    with open(folder / "pairs.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *rows])
    return folder / "pairs.csv"


def write_shards(folder: Path, shards: int = 2, per_shard: int = 3) -> str:
    """PNG and WebP in turn, with captions of several lines."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"{shard:03d}.tar")) as writer:
            for row in range(per_shard):
                number = shard * per_shard + row
                image_format = ("PNG", "WEBP")[row % 2]
                writer.write(
                    {
                        "__key__": f"sample{number}",
                        image_format.lower(): encoded(picture(number), image_format),
                        "txt": f"{TEXTS[number % 4]}\n\n  second line {number} \n",
                    }
                )
    return str(folder / f"{{000..{shards - 1:03d}}}.tar")


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def spoil(path: Path, member: str, byte: bytes = b"?", skip: int = 8) -> None:
    """Overwrite a member's data but its first bytes."""
    with tarfile.open(path) as tar:
        info = tar.getmember(member)
    with open(path, "r+b") as shard:
        shard.seek(info.offset_data + skip)
        shard.write(byte * (info.size - skip))


def tokenize(texts: list[str]) -> Tensor:
    """Eight bytes of each text: enough to tell captions apart."""
    rows = [list(text.encode()[-8:].rjust(8)) for text in texts]
    return torch.tensor(rows, dtype=torch.int64)


def load(
    dataset: Any,
    positions: Tensor,
    *,
    seed: int = 5,
    start: int = 0,
    batch_size: int = 8,
    transform: Callable[[Image.Image], Tensor] | None = None,
    **options: Any,
) -> list[Batch]:
    if transform is None:
        transform = build_transform(32, MEAN, STD, "paper")
    draws = Draws(positions, seed=seed, start=start)
    return list(batches(dataset, draws, batch_size, transform, tokenize, **options))


def assert_equal(got: list[Batch], expected: list[Batch]) -> None:
    assert [len(batch) for batch in got] == [len(batch) for batch in expected]
    for got_batch, expected_batch in zip(got, expected, strict=True):
        for name in ("index", "image", "tokens"):
            assert torch.equal(getattr(got_batch, name), getattr(expected_batch, name)), name


def write_parquet(folder: Path, files: int = 2, rows: int = 6, per_group: int = 2) -> str:
    """Files as the datasets library writes them: two captions a picture, and its class."""
    import datasets  # slow

    datasets.disable_progress_bars()
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features(
        image=datasets.Image(),
        caption=datasets.List(datasets.Value("string")),
        label=datasets.ClassLabel(names=["cat", "dog", "owl"]),
    )
    for file in range(files):
        numbers = range(file * rows, (file + 1) * rows)
        content = {
            "image": [picture(number) for number in numbers],
            "caption": [[TEXTS[number % 4], f" number {number}"] for number in numbers],
            "label": [number % 3 for number in numbers],
        }
        path = folder / f"train-{file:05d}-of-{files:05d}.parquet"
        data = datasets.Dataset.from_dict(content, features=features)
        data.to_parquet(path, batch_size=per_group)
    return str(folder)


def draw(path: Path | io.BytesIO, number: int) -> None:
    """A picture that differs from those of other numbers."""
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((32, 32)).save(path, "png")


def write_shard(path: Path, order: range, captions: int = 1) -> None:
    members = []
    for number, picture in enumerate(order):
        buffer = io.BytesIO()
        draw(buffer, picture)
        texts = "\n".join(f"caption {number} {j}" for j in range(captions))
        members += [(f"{number:04}.png", buffer.getvalue()), (f"{number:04}.txt", texts.encode())]
    write_tar(path, members)
