"""builtin:icons and builtin:shapes: what is in them, how they are split, how they look."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageColor

from protoclip.data import BadSample, DataError, Facts, Subset, icons, open_dataset
from protoclip.data.icons import Icon, concepts_of, is_brand, load_icons
from protoclip.data.shapes import POSITIONS, ShapesDataset


@pytest.fixture(scope="module")
def every_icon() -> Any:
    return open_dataset("builtin:icons")


def test_there_are_thousands_of_icons_of_each_family(every_icon: Any) -> None:
    assert len(every_icon) == len(set(every_icon.keys)) > 10_000
    sizes = np.bincount(every_icon.families.ids, minlength=4)
    assert set(every_icon.families.names) == set(icons.FAMILIES) and sizes.min() > 1_000


def test_icons_have_captions_that_begin_with_their_concept(every_icon: Any) -> None:
    assert set(every_icon.labels) == {"concept", "category"}
    concept = every_icon.labels["concept"]
    assert concept.ids.min() == 0 and every_icon.labels["category"].ids.min() == -1
    for i in range(0, len(every_icon), 50):
        captions = every_icon.captions(i)
        assert captions[0] == concept.names[concept.ids[i]]
        assert len(captions) == len(set(captions))
        assert all(caption == caption.strip() != "" for caption in captions)


def test_what_one_family_knows_of_a_concept_is_true_of_all(every_icon: Any) -> None:
    category = every_icon.labels["category"]
    simple = every_icon.keys.index("phosphor/regular/anchor-simple")
    assert every_icon.captions(simple)[:2] == ("anchor simple", "anchor simple, nautical")
    assert category.names[category.ids[simple]] == "maps & travel"
    without_facts = every_icon.keys.index("font-awesome/solid/anchor")
    with_facts = every_icon.keys.index("phosphor/fill/anchor")
    assert every_icon.captions(without_facts) == every_icon.captions(with_facts)
    assert category.ids[without_facts] == category.ids[with_facts] >= 0


@pytest.mark.parametrize(
    "key", ["phosphor/bold/anchor", "font-awesome/solid/anchor", "lucide/anchor"]
)
def test_icons_are_black_on_white(every_icon: Any, key: str) -> None:
    picture = every_icon.image(every_icon.keys.index(key))
    assert (picture.mode, picture.size) == ("RGB", (48, 48))
    pixels = np.asarray(picture)
    assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[0] == 255).mean() > 0.5
    assert 0.02 < (pixels < 128).mean() < 0.5
    assert pixels[24, 22:26, 0].min() < 128  # the stem, down the middle


def test_icons_are_split_in_two_by_concept_whatever_the_seed(every_icon: Any) -> None:
    train = set(open_dataset("builtin:icons", "train").keys)
    heldout = open_dataset("builtin:icons", "heldout")
    assert train | set(heldout.keys) == set(every_icon.keys)
    assert not train & set(heldout.keys)
    assert list(heldout.keys) == list(open_dataset("builtin:icons", "heldout", seed=1).keys)
    assert heldout.labels["concept"].names == every_icon.labels["concept"].names


def test_icons_hold_out_a_family_and_a_tenth_of_the_concepts() -> None:
    train = open_dataset("builtin:icons", "train")
    heldout = open_dataset("builtin:icons", "heldout")
    assert not any(key.startswith("lucide/") for key in train.keys)
    heldout_ids = heldout.labels["concept"].ids
    trained = train.labels["concept"].ids.unique()
    of_other_families = [i for i, key in enumerate(heldout.keys) if not key.startswith("lucide/")]
    new = heldout_ids[of_other_families].unique()
    assert not torch.isin(new, trained).any()
    assert 0.09 < len(new) / (len(new) + len(trained)) < 0.11
    # The family's other concepts are trained by other families.
    assert torch.isin(heldout_ids, trained).sum() > 400


def test_brands_duplicates_and_a_fifth_weight_are_left_out(every_icon: Any) -> None:
    names = {key.rpartition("/")[2] for key in every_icon.keys}
    assert {"apple", "github-logo", "github", "git", "microsoft-word"} & names == {"apple"}
    assert is_brand("language-python") and not is_brand("language")
    pictures = {every_icon.pictures[row].tobytes() for row in every_icon.rows}
    assert len(pictures) == len(every_icon)
    of_family = torch.stack([every_icon.labels["concept"].ids, every_icon.families.ids])
    _, num_weights = of_family.unique(dim=1, return_counts=True)
    assert num_weights.max() == 4


def test_a_name_without_style_words_is_the_concept() -> None:
    names = "trash trash-2 dice-1 dice-2 dice star-outline outline account-alt-outline bars-3"
    concepts = concepts_of([Icon("f", "", name, "") for name in names.split()])
    assert concepts == [
        "trash", "trash", "dice 1", "dice 2", "dice", "star", "outline", "account", "bars 3",
    ]  # fmt: skip


def test_in_another_family_a_number_may_be_the_only_one() -> None:
    concepts = concepts_of([Icon("a", "", "trash", ""), Icon("b", "", "trash-2", "")])
    assert concepts == ["trash", "trash 2"]


BAND = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} 10"><path d="M0 0h{}v10H0z"/></svg>'


def test_other_icons_are_drawn_once_and_read_from_the_cache(own_cache: None) -> None:
    num_reads = 0

    def read() -> list[Icon]:
        nonlocal num_reads
        num_reads += 1
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
    assert num_reads == 2  # a new state is drawn again
    assert isinstance(dataset.pictures, np.memmap)


def test_a_missing_family_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(icons.PACKAGES, "no_such_icons", "no-such-icons")
    monkeypatch.setattr("protoclip.data.opening.builtin_icons", icons.builtin_icons.__wrapped__)
    with pytest.raises(DataError, match="pip install no-such-icons"):
        open_dataset("builtin:icons")


@pytest.mark.smoke
def test_a_pair_of_shapes_does_not_depend_on_how_many_there_are() -> None:
    large = open_dataset("builtin:shapes:100000")
    small = open_dataset("builtin:shapes:10")
    for i in range(10):
        assert large.captions(i) == small.captions(i)
        assert large.image(i).tobytes() == small.image(i).tobytes()
    with pytest.raises(IndexError):
        small.captions(10)


def test_shapes_are_as_many_and_as_different_as_asked_for() -> None:
    dataset = open_dataset("builtin:shapes:100000")
    assert len(dataset) == 100_000 and dataset.keys[99_999] == "shape-99999"
    assert len({dataset.image(i).tobytes() for i in range(300)}) == 300


@pytest.mark.parametrize("label, num_classes", [("group", 12), ("subgroup", 96)])
def test_shapes_are_labelled_evenly(label: str, num_classes: int) -> None:
    labels = open_dataset("builtin:shapes:100000").labels[label]
    counts = torch.bincount(labels.ids, minlength=num_classes)
    assert len(counts) == len(labels.names) == num_classes
    assert counts.min() > 0.8 * 100_000 / num_classes


def test_captions_of_shapes_name_their_subgroup_and_group() -> None:
    dataset = open_dataset("builtin:shapes:50")

    def name_of(label: str, i: int) -> str:
        labels = dataset.labels[label]
        return labels.names[labels.ids[i]]

    for i in range(50):
        subgroup = name_of("subgroup", i)
        assert subgroup.endswith(name_of("group", i)) and subgroup in dataset.captions(i)[0]


def test_shapes_show_what_the_caption_says() -> None:
    dataset = ShapesDataset(300, image_size=48)
    shapes = set()
    for i in range(len(dataset)):
        shape, colour, _, place, ground = dataset.captions(i)[-1].split(", ")
        pixels = np.asarray(dataset.image(i)).astype(int)
        assert pixels.shape == (48, 48, 3)
        corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert np.abs(corners - ImageColor.getrgb(ground)).max() <= 12
        has_colour = np.abs(pixels - ImageColor.getrgb(colour)).max(-1) <= 12
        rows, columns = has_colour.nonzero()
        column, row = 48 * np.array(POSITIONS[place])
        assert abs(rows.mean() - row) < 6 and abs(columns.mean() - column) < 6
        shapes.add(shape)
    assert len(shapes) == 12


def test_what_a_data_set_says_of_itself_is_declared() -> None:
    """A subset says the same of its own pairs; no icon shares a picture with another."""
    drawings = open_dataset("builtin:icons")
    assert np.array_equal(drawings.picture_numbers(), np.arange(len(drawings)))
    shards = ShapesDataset(6)
    skipped = [BadSample("0.tar", "a", "no caption"), BadSample("1.tar", "b", "no picture")]
    shards.facts = Facts(remote=True, skipped=skipped, shard_of=np.array([0, 0, 0, 1, 1, 1]))
    half = Subset(Subset(shards, [5, 4, 3, 2, 1]), [0, 2, 4])
    assert half.facts.remote and half.facts.skipped == skipped and half.facts.num_skipped == 1
    assert half.facts.shard_of is not None and half.facts.shard_of.tolist() == [1, 1, 0]
    assert half.picture_numbers().tolist() == [5, 3, 1] and half.path(0) == ""
