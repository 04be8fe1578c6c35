"""builtin:icons and builtin:shapes: what is in them, how they are split, how they look."""

import numpy as np
import pytest
import torch
from PIL import ImageColor

from protoclip.data import DataError, icons, open_dataset
from protoclip.data.icons import Icon, concepts_of, is_brand, load_icons
from protoclip.data.shapes import POSITIONS, ShapesDataset


@pytest.fixture(scope="module")
def everything():
    return open_dataset("builtin:icons")


def test_icons_have_a_picture_a_name_and_facts(everything):
    assert len(everything) == len(set(everything.keys)) > 10_000
    families = np.bincount(everything.families.ids, minlength=4)
    assert set(everything.families.names) == set(icons.FAMILIES) and families.min() > 1_000
    assert set(everything.labels) == {"concept", "category"}
    concept, category = everything.labels["concept"], everything.labels["category"]
    assert concept.ids.min() == 0 and category.ids.min() == -1
    for i in range(0, len(everything), 50):
        captions = everything.captions(i)
        assert captions[0] == concept.names[concept.ids[i]]
        assert len(captions) == len(set(captions))
        assert all(caption == caption.strip() != "" for caption in captions)
    anchor = everything.keys.index("phosphor/regular/anchor-simple")
    assert everything.captions(anchor)[:2] == ("anchor simple", "anchor simple, nautical")
    assert category.names[category.ids[anchor]] == "maps & travel"
    # What one family knows of a concept is true of all.
    other = everything.keys.index("font-awesome/solid/anchor")
    known = everything.keys.index("phosphor/fill/anchor")
    assert everything.captions(other) == everything.captions(known)
    assert category.ids[other] == category.ids[known] >= 0


def test_icons_are_black_on_white(everything):
    for key in ("phosphor/bold/anchor", "font-awesome/solid/anchor", "lucide/anchor"):
        picture = everything.image(everything.keys.index(key))
        assert (picture.mode, picture.size) == ("RGB", (48, 48))
        pixels = np.asarray(picture)
        assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[0] == 255).mean() > 0.5
        assert 0.02 < (pixels < 128).mean() < 0.5
        assert pixels[24, 22:26, 0].min() < 128  # the stem, down the middle


def test_icons_hold_out_a_family_and_a_tenth_of_the_concepts(everything):
    train, heldout = (open_dataset("builtin:icons", split) for split in ("train", "heldout"))
    assert set(train.keys) | set(heldout.keys) == set(everything.keys)
    assert not set(train.keys) & set(heldout.keys)
    assert list(heldout.keys) == list(open_dataset("builtin:icons", "heldout", seed=1).keys)
    assert not any(key.startswith("lucide/") for key in train.keys)
    trained = train.labels["concept"].ids.unique()
    others = [i for i, key in enumerate(heldout.keys) if not key.startswith("lucide/")]
    new = heldout.labels["concept"].ids[others].unique()
    assert not torch.isin(new, trained).any()
    assert 0.09 < len(new) / (len(new) + len(trained)) < 0.11
    # The family's other concepts are trained by other families.
    assert torch.isin(heldout.labels["concept"].ids, trained).sum() > 400
    assert heldout.labels["concept"].names == everything.labels["concept"].names


def test_brands_duplicates_and_a_fifth_weight_are_left_out(everything):
    names = {key.rpartition("/")[2] for key in everything.keys}
    assert {"apple", "github-logo", "github", "git", "microsoft-word"} & names == {"apple"}
    assert is_brand("language-python") and not is_brand("language")
    pictures = {everything.pictures[row].tobytes() for row in everything.rows}
    assert len(pictures) == len(everything)
    concept, family = everything.labels["concept"].ids, everything.families.ids
    _, times = torch.stack([concept, family]).unique(dim=1, return_counts=True)
    assert times.max() == 4


def test_a_name_without_style_words_is_the_concept():
    names = "trash trash-2 dice-1 dice-2 dice star-outline outline account-alt-outline bars-3"
    got = concepts_of([Icon("f", "", name, "") for name in names.split()])
    assert got == [
        "trash", "trash", "dice 1", "dice 2", "dice", "star", "outline", "account", "bars 3",
    ]  # fmt: skip
    # In another family "trash-2" may be the only one.
    assert concepts_of([Icon("a", "", "trash", ""), Icon("b", "", "trash-2", "")])[1] == "trash 2"


BAND = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} 10"><path d="M0 0h{}v10H0z"/></svg>'


def test_other_icons_are_drawn_once_and_read_from_the_cache(own_cache):
    asked = []

    def read():
        asked.append(1)
        half = BAND.format(20, 10)
        return [
            Icon("a", "bold", "red-star", half, ("sun", "red star"), "shapes"),
            Icon("b", "", "red-star", BAND.format(40, 10)),
            Icon("b", "", "again", half),  # the same picture as the first
            Icon("b", "", "torn", "<svg"),
            Icon("b", "", "full", BAND.format(10, 10)),  # one colour
            *(Icon("c", str(k), "wide", BAND.format(20, k)) for k in range(1, 7)),
        ]

    for state in ("1", "1", "2"):
        dataset = load_icons("some:icons", state, read)
        assert list(dataset.keys) == ["a/bold/red-star", "b/red-star"] + [
            f"c/{k}/wide" for k in range(1, 5)
        ]
        assert dataset.captions(1) == ("red star", "red star, sun", "sun", "red star, shapes")
        assert dataset.captions(2) == ("wide",)
        assert dataset.labels["category"].ids.tolist() == [0, 0, -1, -1, -1, -1]
        assert dataset.families.names == ("a", "b", "c")
        pixels = np.asarray(dataset.image(0))[..., 0]  # the left half of a band across the middle
        assert pixels.shape == (48, 48) and (pixels[[5, 42]] == 255).all()
        assert (pixels[24, :24] == 0).all() and (pixels[24, 24:] == 255).all()
    assert len(asked) == 2  # a new state is drawn again
    assert isinstance(dataset.pictures, np.memmap)


def test_a_missing_family_says_what_to_install(monkeypatch):
    monkeypatch.setitem(icons.PACKAGES, "no_such_icons", "no-such-icons")
    monkeypatch.setattr("protoclip.data.builtin_icons", icons.builtin_icons.__wrapped__)
    with pytest.raises(DataError, match="pip install no-such-icons"):
        open_dataset("builtin:icons")


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
