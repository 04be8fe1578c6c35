"""Images a second of the data loader alone, beside OpenCLIP's own pipeline.

The same shards (img2dataset's layout: jpg, txt and json of one key), workers, transform and
tokenizer: crops of two photos that come with scikit-learn, 320 to 426 pixels a side, to 224 pixels.
OpenCLIP's training loader needs webdataset 0.2.86; with 1.x its row is skipped. An epoch is timed
with the start of its workers. ``pytest benchmarks/test_loader.py --benchmark-only``.
"""

import io
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("PIL")
from protoclip.data import Draws, batches, build_transform, open_dataset

SHARDS, BATCH, SIDE, WORKERS = 6, 64, 224, 2


@pytest.fixture(scope="module")
def count(sizes):
    return 2 * BATCH if sizes == "tiny" else 1536


@pytest.fixture(scope="module")
def shards(tmp_path_factory, count):
    datasets = pytest.importorskip("sklearn.datasets")
    from PIL import Image
    from webdataset import TarWriter

    photos = [
        Image.fromarray(datasets.load_sample_image(name)) for name in ("china.jpg", "flower.jpg")
    ]
    folder = tmp_path_factory.mktemp("shards")
    random = torch.Generator().manual_seed(0)
    for shard in range(SHARDS):
        with TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
            for i in range(shard, count, SHARDS):
                width, height = torch.randint(320, 427, (2,), generator=random).tolist()
                x = int(torch.randint(640 - width + 1, (), generator=random))
                y = int(torch.randint(427 - height + 1, (), generator=random))
                jpg = io.BytesIO()
                photos[i % 2].crop((x, y, x + width, y + height)).save(jpg, "JPEG", quality=90)
                text = f"crop {i} of {('a temple', 'a flower')[i % 2]}"
                about = {"caption": text, "key": f"{i:09d}", "status": "success"}
                tar.write(
                    {"__key__": f"{i:09d}", "jpg": jpg.getvalue(), "txt": text, "json": about}
                )
    return f"{folder}/{{00000..{SHARDS - 1:05d}}}.tar"


def _protoclip(spec, count, open_clip):
    model = dict(mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD)
    dataset = open_dataset(spec)
    transform = build_transform(SIDE, augmentation="clip", **model)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")

    def epoch():
        draws = Draws(torch.randperm(len(dataset)), seed=0)
        loaded = batches(dataset, draws, BATCH, transform, tokenizer, workers=WORKERS)
        return sum(len(batch.image) for batch in loaded)

    return epoch


def _open_clip(spec, count, open_clip):
    import webdataset

    if webdataset.__version__.split(".")[0] != "0":
        pytest.skip("OpenCLIP's training loader needs webdataset 0.2.86: KeyError 'fname' with 1.x")
    data = pytest.importorskip("open_clip_train.data")
    args = SimpleNamespace(
        train_data=spec, train_num_samples=count, train_data_upsampling_factors=None,
        dataset_resampled=False, seed=0, workers=WORKERS, world_size=1, batch_size=BATCH,
    )  # fmt: skip
    transform = open_clip.transform.image_transform(SIDE, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")

    def epoch():
        # A new one, as its workers persist: each timed epoch starts them, like ours.
        loader = data.get_wds_dataset(args, transform, is_train=True, tokenizer=tokenizer)
        return sum(len(image) for image, _ in loader.dataloader)

    return epoch


@pytest.mark.parametrize("name", ["protoclip", "open_clip"])
def test_epoch(bench, shards, count, name):
    open_clip = pytest.importorskip("open_clip")
    epoch = {"protoclip": _protoclip, "open_clip": _open_clip}[name](shards, count, open_clip)
    assert epoch() == count
    bench.benchmark.pedantic(epoch, rounds=3, iterations=1)
    if bench.benchmark.enabled:
        rate = count / bench.benchmark.stats.stats.min
        bench.session.say(
            f"loader {name:10s} {WORKERS} workers, {SIDE} px | {rate:7.0f} images/s (best of 3)"
        )
