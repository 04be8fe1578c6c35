"""Pictures, tables, shards and batches for the tests of the data layer."""

import io
import tarfile

import numpy as np
import torch
import webdataset
from PIL import Image

from protoclip.data import Draws, batches, build_transform
from protoclip.data.__main__ import main as data_command

TEXTS = ("ein Mädchen läuft", "女の子が走る", "drapeau\u202f: Chine 🇨🇳", 'says "hi", twice')


MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def picture(number: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (12, 10, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def same(got: Image.Image, expected: Image.Image) -> bool:
    return got.mode == "RGB" and got.tobytes() == expected.tobytes()


def write_table(folder, rows, header=("filepath", "title"), separator="\t", name="pairs.tsv"):
    lines = [separator.join(header)] + [separator.join(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def write_shards(folder, shards=2, per_shard=3):
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"{shard:03d}.tar")) as writer:
            for j in range(per_shard):
                number = shard * per_shard + j
                writer.write(
                    {
                        "__key__": f"sample{number}",
                        ("png", "webp")[j % 2]: encoded(picture(number), ("PNG", "WEBP")[j % 2]),
                        "txt": f"{TEXTS[number % 4]}\n\n  second line {number} \n",
                    }
                )
    return str(folder / f"{{000..{shards - 1:03d}}}.tar")


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def spoil(path, member, byte=b"?", skip=8):
    """Overwrite a member's data but its first bytes."""
    with tarfile.open(path) as tar:
        info = tar.getmember(member)
    with open(path, "r+b") as shard:
        shard.seek(info.offset_data + skip)
        shard.write(byte * (info.size - skip))


def refused(spec, capsys):
    """What the data command says of data that it does not take: one line, no traceback."""
    assert data_command(["--check", spec]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def tokenize(texts: list[str]) -> torch.Tensor:
    """Eight bytes of each text: enough to tell captions apart."""
    rows = [list(text.encode()[-8:].rjust(8)) for text in texts]
    return torch.tensor(rows, dtype=torch.int64)


def load(dataset, draws, **options):
    options = {"seed": 5, "batch_size": 8, **options}
    transform = options.pop("transform", None) or build_transform(32, MEAN, STD, "paper")
    batch_size = options.pop("batch_size")
    own = {name: options.pop(name) for name in ("seed", "start", "numbers") if name in options}
    return list(batches(dataset, Draws(draws, **own), batch_size, transform, tokenize, **options))


def assert_equal(got, expected):
    assert [len(batch) for batch in got] == [len(batch) for batch in expected]
    for one, other in zip(got, expected, strict=True):
        for name in ("index", "image", "tokens"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
