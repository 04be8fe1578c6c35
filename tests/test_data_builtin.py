"""builtin:emoji and builtin:shapes: what is in them, how they are split, how they look."""

import numpy as np
import pytest
import torch
from PIL import ImageColor

from protoclip.data import DataError, noto_available, open_dataset
from protoclip.data import emoji as module
from protoclip.data.emoji import twemoji_files
from protoclip.data.shapes import POSITIONS, ShapesDataset
from protoclip.data.types import heldout_mask

needs_font = pytest.mark.skipif(not noto_available(), reason="needs fonts-noto-color-emoji")


def test_emoji_has_a_picture_and_captions_for_every_row():
    dataset = open_dataset("builtin:emoji")
    assert len(dataset) == len(set(dataset.keys)) == 1914
    assert len(set(twemoji_files().values())) == 1914  # no file serves two concepts
    sizes = {name: len(label.names) for name, label in dataset.labels.items()}
    assert sizes == {"group": 9, "subgroup": 98}
    for i in range(len(dataset)):
        captions = dataset.captions(i)
        assert len(captions) == len(set(captions)) >= 3
        assert all(caption == caption.strip() != "" for caption in captions)
    captions = dataset.captions(dataset.keys.index("1F600"))
    assert captions[:2] == ("grinning face", "grinning face, cheerful")
    assert any(caption.startswith("cheerful, cheery, face") for caption in captions)
    assert {"grinsendes Gesicht", "cara sonriendo", "visage rieur"} <= set(captions)


def test_emoji_pictures_are_rgb_on_white():
    dataset = open_dataset("builtin:emoji")
    for key in ("1F600", "00A9", "0023-FE0F-20E3", "2764-FE0F-200D-1F525"):
        picture = dataset.image(dataset.keys.index(key))
        assert (picture.mode, picture.size) == ("RGB", (72, 72))
    # The face is a disc: white in the corners, yellow between the eyes.
    face = np.asarray(dataset.image(0)).astype(int)
    assert (face[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    red, green, blue = face[20, 36]
    assert red > 200 and green > 150 and blue < 120


def test_split_is_stratified_disjoint_and_repeatable():
    everything = open_dataset("builtin:emoji")
    train, heldout = (open_dataset("builtin:emoji", split) for split in ("train", "heldout"))
    assert set(train.keys) | set(heldout.keys) == set(everything.keys)
    assert not set(train.keys) & set(heldout.keys)
    assert list(heldout.keys) == list(open_dataset("builtin:emoji", "heldout").keys)
    assert list(heldout.keys) != list(open_dataset("builtin:emoji", "heldout", seed=1).keys)
    counts = [torch.bincount(d.labels["group"].ids, minlength=9) for d in (everything, heldout)]
    assert (counts[1] - counts[0] / 10).abs().max() <= 0.5
    # The names, and so the ids, are those of the whole set.
    there = everything.keys.index(heldout.keys[5])
    for label in ("group", "subgroup"):
        assert heldout.labels[label].names == everything.labels[label].names
        assert heldout.labels[label].ids[5] == everything.labels[label].ids[there]


def test_heldout_mask_gives_small_groups_one_and_singles_none():
    groups = np.array([0] * 100 + [1] * 2 + [2])
    mask = heldout_mask(103, groups, seed=3)
    assert [int(mask[groups == g].sum()) for g in range(3)] == [10, 1, 0]
    assert heldout_mask(0, None, seed=0).shape == (0,)


@needs_font
def test_noto_draws_the_same_concepts_in_another_style():
    twemoji, noto = open_dataset("builtin:emoji"), open_dataset("builtin:emoji", "noto")
    assert len(noto) > 1200  # older fonts and Pillow without raqm know fewer
    assert set(noto.keys) <= set(twemoji.keys)
    heldout = set(open_dataset("builtin:emoji", "heldout").keys)
    both = open_dataset("builtin:emoji", "noto-heldout").keys
    assert set(both) == heldout & set(noto.keys)
    position = noto.keys.index("1F600")
    picture = noto.image(position)
    assert (picture.mode, picture.size) == ("RGB", (72, 72))
    face, other = np.asarray(picture).astype(int), np.asarray(twemoji.image(0)).astype(int)
    assert face[24, 36, 0] > 200 and face[24, 36, 2] < 120  # yellow too,
    assert np.abs(face - other).mean() > 3  # but not the same drawing
    assert noto.captions(position) == twemoji.captions(0)


@pytest.mark.parametrize("content", [b"not a font", None])
def test_noto_without_the_font_says_what_to_install(monkeypatch, tmp_path, content):
    (tmp_path / "fonts").mkdir()
    if content:
        (tmp_path / "fonts" / "NotoColorEmoji.ttf").write_bytes(content)
    for name in ("XDG_DATA_HOME", "XDG_DATA_DIRS"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in ("_noto_font", "noto_pictures"):  # as in a new process
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    assert not noto_available()
    with pytest.raises(DataError, match="apt-get install fonts-noto-color-emoji"):
        open_dataset("builtin:emoji", "noto")


def test_shapes_are_lazy_deterministic_and_labelled():
    large, small = open_dataset("builtin:shapes:100000"), open_dataset("builtin:shapes:10")
    assert len(large) == 100_000 and large.keys[99_999] == "shape-99999"
    for i in range(10):  # a pair does not depend on how many there are
        assert large.captions(i) == small.captions(i)
        assert large.image(i).tobytes() == small.image(i).tobytes()
    assert len({large.image(i).tobytes() for i in range(300)}) == 300
    for label, classes in (("group", 12), ("subgroup", 96)):
        counts = torch.bincount(large.labels[label].ids, minlength=classes)
        assert len(counts) == len(large.labels[label].names) == classes
        assert counts.min() > 0.8 * 100_000 / classes
    for i in range(50):
        group, pair = (large.labels[n].names[large.labels[n].ids[i]] for n in ("group", "subgroup"))
        assert pair.endswith(group) and pair in large.captions(i)[0]
    with pytest.raises(IndexError):
        small.captions(10)


def test_shapes_show_what_the_caption_says():
    dataset = ShapesDataset(300, image_size=48)
    seen = set()
    for i in range(len(dataset)):
        shape, colour, _, place, ground = dataset.captions(i)[-1].split(", ")
        pixels = np.asarray(dataset.image(i)).astype(int)
        assert pixels.shape == (48, 48, 3)
        near_border = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert np.abs(near_border - ImageColor.getrgb(ground)).max() <= 12
        drawn = (np.abs(pixels - ImageColor.getrgb(colour)).max(-1) <= 12).nonzero()
        column, row = 48 * np.array(POSITIONS[place])
        assert abs(drawn[0].mean() - row) < 6 and abs(drawn[1].mean() - column) < 6
        seen.add(shape)
    assert len(seen) == 12
