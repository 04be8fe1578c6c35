"""Photographs a second of our loader beside OpenCLIP's, from the same shards.

``python -m benchmarks.loader FOLDER``: the first call makes the shards, of JPEGs of 500 x 375 that
have about as many bytes as photographs; the next ones read them with 1 and 2 workers. Rounds of the
two loaders alternate. Both crop to 224, tokenise, and stack batches; nothing trains beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image

from benchmarks import machine
from protoclip.data import Draws, EpochOrder, build_transform, open_dataset
from protoclip.data.loader import Loader
from protoclip.model import ShortTokenizer
from protoclip.openclip import repaired

SIZE = (500, 375)
SIDE = 224
PHOTOGRAPHS = 2048
SHARDS = 4
BATCH = 32
MEAN = open_clip.OPENAI_DATASET_MEAN
STD = open_clip.OPENAI_DATASET_STD


def make_shards(folder: Path) -> None:
    """Coarse shapes with fine grain, in JPEG's quality 90."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard, PHOTOGRAPHS, SHARDS):
                coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8))
                pixels = np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC), np.float32)
                grain = random.normal(0, 9, (*pixels.shape[:2], 1))
                picture = Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
                jpeg = io.BytesIO()
                picture.save(jpeg, "JPEG", quality=90)
                caption = f"a photograph of thing {number % 97} beside thing {number % 89}"
                for ending, data in (("jpg", jpeg.getvalue()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def our_batches(folder: Path, workers: int, batches: int) -> Iterator[Any]:
    dataset = open_dataset(str(folder))
    tokenizer = ShortTokenizer(open_clip.get_tokenizer("ViT-B-32"), None)
    transform = build_transform(SIDE, MEAN, STD, "clip")
    loader = Loader(dataset, BATCH, transform, tokenizer, workers=workers)
    random = torch.Generator().manual_seed(0)
    positions = EpochOrder(dataset).permutation(random)[: batches * BATCH]
    with contextlib.closing(loader):
        yield from loader.batches(Draws(positions, seed=0))


def open_clips_batches(folder: Path, workers: int, batches: int) -> Iterator[Any]:
    from open_clip_train.data import get_wds_dataset

    arguments = SimpleNamespace(
        train_data=f"{folder}/{{00000..{SHARDS - 1:05d}}}.tar",
        train_num_samples=batches * BATCH,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=BATCH,
        workers=workers,
        world_size=1,
    )
    transform = open_clip.image_transform(SIDE, is_train=True, mean=MEAN, std=STD)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    with repaired():
        info = get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer)
        yield from info.dataloader


def photographs_per_second(stream: Iterator[Any]) -> float:
    """From the first batch on, so that starting workers does not count."""
    next(stream)
    began = time.perf_counter()
    count = sum(1 for _ in stream)
    return count * BATCH / (time.perf_counter() - began)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the shards, made if they are not there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=24, help="of 32 photographs, in a round")
    arguments = parser.parse_args(argv)
    if not arguments.folder.exists():
        make_shards(arguments.folder)
        print(f"made {arguments.folder}; call again to read it", file=sys.stderr)
        return 0
    total = sum(path.stat().st_size for path in arguments.folder.glob("*.tar"))
    print(f"{machine.name()}; {total / PHOTOGRAPHS / 1024:.0f} KiB a pair")
    print("| workers | protoclip, photographs/s | OpenCLIP | ratio |")
    print("|---|---|---|---|")
    for workers in (1, 2):
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(arguments.rounds):
            for load, rates in ((our_batches, ours), (open_clips_batches, theirs)):
                stream = load(arguments.folder, workers, arguments.batches)
                rates.append(photographs_per_second(stream))
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        print(
            f"| {workers} | {statistics.median(ours):.0f} ({min(ours):.0f} to {max(ours):.0f}) "
            f"| {statistics.median(theirs):.0f} ({min(theirs):.0f} to {max(theirs):.0f}) "
            f"| {ratio:.2f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
