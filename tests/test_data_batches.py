"""Transforms and batches: same seed, same bits, whatever the workers and wherever it starts."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from protoclip.data import (
    AUGMENTATIONS,
    DataError,
    Subset,
    batches,
    build_transform,
    open_dataset,
)
from protoclip.data.types import mix

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def tokenize(texts: list[str]) -> torch.Tensor:
    """Eight bytes of each text: enough to tell captions apart."""
    rows = [list(text.encode()[-8:].rjust(8)) for text in texts]
    return torch.tensor(rows, dtype=torch.int64)


def load(dataset, draws, **options):
    options = {"seed": 5, "batch_size": 8, **options}
    transform = options.pop("transform", None) or build_transform(32, MEAN, STD, "paper")
    batch_size = options.pop("batch_size")
    return list(batches(dataset, draws, batch_size, transform, tokenize, **options))


def assert_equal(got, expected):
    assert [len(batch) for batch in got] == [len(batch) for batch in expected]
    for one, other in zip(got, expected, strict=True):
        for name in ("index", "image", "tokens"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.fixture(scope="module")
def emoji():
    return open_dataset("builtin:emoji", "train")


@pytest.fixture(scope="module")
def draws():
    return torch.randperm(1700, generator=torch.Generator().manual_seed(0))[:37]


def test_batches_have_the_promised_shapes(emoji, draws):
    got = load(emoji, draws)
    assert [len(batch) for batch in got] == [8, 8, 8, 8, 5]
    assert torch.equal(torch.cat([batch.index for batch in got]), draws)
    for batch in got:
        assert batch.image.shape == (len(batch), 3, 32, 32)
        assert (batch.image.dtype, batch.tokens.dtype) == (torch.float32, torch.int64)
    assert load(emoji, draws[:0]) == []
    assert got[0].to("cpu").tokens is got[0].tokens


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_batches(emoji, draws, workers):
    assert_equal(load(emoji, draws, workers=workers), load(emoji, draws))


@pytest.mark.parametrize("workers", [0, 2])
def test_start_resumes_exactly(emoji, draws, workers):
    assert_equal(load(emoji, draws, start=16, workers=workers), load(emoji, draws)[2:])


def test_a_draw_depends_on_seed_and_place_not_on_its_batch(emoji, draws):
    parts = [load(emoji, draws, batch_size=size) for size in (8, 37)]
    whole = [torch.cat([batch.image for batch in part]) for part in parts]
    assert torch.equal(*whole)
    other = torch.cat([batch.image for batch in load(emoji, draws, seed=6)])
    assert (other != whole[0]).flatten(1).any(1).all()


def test_the_same_picture_twice_gives_two_views_and_all_captions(emoji):
    many = torch.zeros(400, dtype=torch.int64)
    got = load(emoji, many, batch_size=400)[0]
    assert len({view.numpy().tobytes() for view in got.image}) > 390
    expected = {tuple(row) for row in tokenize(list(emoji.captions(0))).tolist()}
    counts = torch.unique(got.tokens, dim=0, return_counts=True)
    assert {tuple(row) for row in counts[0].tolist()} == expected
    first = load(emoji, many[:9], captions="first")[0].tokens
    assert torch.equal(first, tokenize([emoji.captions(0)[0]] * 8))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_callers_random_state_is_untouched(emoji, draws, workers):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    got = []
    for number, _ in enumerate(
        batches(
            emoji, draws, 16, build_transform(32, MEAN, STD, "paper"), tokenize,
            seed=0, workers=workers,
        )
    ):  # fmt: skip
        got.append(torch.rand(1))
        assert number < 3
    assert torch.equal(torch.cat(got), expected)


class Broken:
    """The emoji, one of which does not decode."""

    def __init__(self, dataset):
        self.name, self.keys, self.labels = dataset.name, dataset.keys, dataset.labels
        self.dataset, self.captions = dataset, dataset.captions

    def __len__(self):
        return len(self.dataset)

    def image(self, i):
        if i == 3:
            raise DataError("shard 7: 'x': the picture does not decode")
        return self.dataset.image(i)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_arrives_as_one_clear_message(emoji, workers):
    before = torch.random.get_rng_state()
    with pytest.raises(DataError) as caught:
        load(Broken(emoji), torch.arange(16), workers=workers)
    assert str(caught.value) == "shard 7: 'x': the picture does not decode"
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"draws": torch.tensor([0, 10**6])}, r"positions in 0 \.\.\. 1721"),
        ({"draws": torch.tensor([-1])}, "positions in"),
        ({"draws": torch.rand(3)}, "int64"),
        ({"draws": torch.zeros(2, 2, dtype=torch.int64)}, r"\(2, 2\)"),
        ({"batch_size": 0}, "batch_size"),
        ({"captions": "longest"}, "random, canonical, first"),
    ],
)
def test_wrong_arguments_are_refused_at_once(emoji, draws, change, words):
    arguments = {"draws": draws, "batch_size": 4, "captions": "random", **change}
    with pytest.raises(ValueError, match=words):
        batches(
            emoji, arguments["draws"], arguments["batch_size"], torch.zeros, tokenize,
            seed=0, captions=arguments["captions"],
        )  # fmt: skip


def test_subset_keeps_what_belongs_together(emoji):
    part = Subset(emoji, torch.tensor([30, 2, 700]), "three")
    assert (part.name, len(part)) == ("three", 3)
    assert list(part.keys) == [emoji.keys[i] for i in (30, 2, 700)]
    assert part.keys[1:][0] == emoji.keys[2]
    assert part.captions(2) == emoji.captions(700)
    assert part.image(0).tobytes() == emoji.image(30).tobytes()
    assert part.labels["group"].ids[2] == emoji.labels["group"].ids[700]
    with pytest.raises(ValueError, match="indices must lie"):
        Subset(emoji, [0, len(emoji)])


def gradient_picture(width=90, height=60):
    red = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(red[None, :, None], (height, width, 3)).copy())


def test_none_is_resize_and_centre_crop_normalised():
    transform = build_transform(30, MEAN, STD, "none")
    got = transform(gradient_picture())
    assert got.shape == (3, 30, 30)
    assert torch.equal(got, transform(gradient_picture()))
    pixels = got * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    # 90 x 60 becomes 45 x 30, of which the columns 7 ... 37 remain.
    assert abs(pixels[0, 15, 0].item() - 8 / 45) < 0.02
    assert abs(pixels[0, 15, -1].item() - 37 / 45) < 0.02


def test_normalisation_equals_torchvisions():
    from torchvision import transforms

    transform = build_transform(24, MEAN, STD, "none")
    cubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(24, cubic), transforms.CenterCrop(24), transforms.ToTensor()]
    steps.append(transforms.Normalize(MEAN, STD))
    expected = transforms.Compose(steps)(gradient_picture())
    torch.testing.assert_close(transform(gradient_picture()), expected, atol=1e-6, rtol=1e-6)


def test_augmentations_differ_in_strength():
    picture = gradient_picture(60, 60)
    spread = {}
    for name in AUGMENTATIONS:
        transform = build_transform(24, MEAN, STD, name)
        torch.manual_seed(0)
        spread[name] = torch.stack([transform(picture) for _ in range(60)]).std(0).mean().item()
    assert spread["none"] == 0 < spread["clip"] < 0.5 * spread["paper"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((32, MEAN, STD, "strong"), "paper, clip, none"),
        ((0, MEAN, STD, "none"), "image_size"),
        ((32, MEAN, (1.0, 0.0, 1.0), "none"), "std above 0"),
    ],
)
def test_transform_arguments_are_checked(arguments, words):
    with pytest.raises(ValueError, match=words):
        build_transform(*arguments)


def test_draws_are_the_same_on_every_machine():
    """Recorded: a resumed run must draw the same."""
    assert mix(0, np.arange(3)).tolist() == [
        5156922822541503845, 2060580281967432337, 7733574454845426431,
    ]  # fmt: skip
    assert mix(1, 2) != mix(2, 1)


def test_importing_the_data_layer_is_light():
    code = (
        "import sys, protoclip.data; heavy = {'torchvision', 'open_clip', 'webdataset', "
        "'matplotlib', 'triton'} & set(sys.modules); print(sorted(heavy))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


def test_worker_processes_can_be_spawned(draws):
    """Everything a worker needs survives pickling: macOS, and Python 3.14's default."""
    import pickle

    from protoclip.data.loader import _Source

    dataset = open_dataset("builtin:emoji", "heldout")
    transform = build_transform(32, MEAN, STD, "paper")
    source = _Source(
        dataset, np.arange(8), np.arange(8), 4, transform, tokenize, 0, "random", False
    )
    buffer = io.BytesIO(pickle.dumps(source))
    assert len(buffer.getvalue()) < 2_000_000  # no decoded pictures in it
    assert_equal([pickle.load(buffer)[4]], [source.load(4)])
