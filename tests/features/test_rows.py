"""What stored rows are of: positions, parts, pictures, and whether they are still the same."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_folders import write_folder, write_layout

from protoclip.common import digest
from protoclip.common.digest import digest_of
from protoclip.common.files import DataError
from protoclip.features import as_positions, open_features, open_folder

ROWS = np.random.default_rng(0).standard_normal((23, 5)).astype(np.float16)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    np.save(tmp_path / "rows.npy", ROWS)
    return tmp_path / "rows.npy"


# Positions


@pytest.mark.parametrize("method", ["take", "select"])
def test_a_mask_selects(file: Path, method: str) -> None:
    rows = open_features(file)
    mask = np.zeros(23, bool)
    mask[[3, 20]] = True

    def chosen(positions: object) -> np.ndarray:
        result = getattr(rows, method)(positions)
        return result if method == "take" else result.rows(0, len(result))

    np.testing.assert_array_equal(chosen(mask), ROWS[[3, 20]])
    np.testing.assert_array_equal(chosen(mask.tolist()), ROWS[[3, 20]])
    assert len(chosen([])) == 0
    with pytest.raises(IndexError, match=r"expected a mask \[23\], .* got \[22\]"):
        chosen(mask[:-1])
    with pytest.raises(TypeError, match="expected positions as integers, or a mask, got float64"):
        chosen([0.0, 1.0])
    for outside in ([-1], [23]):
        with pytest.raises(IndexError, match="expected positions from 0 to 22"):
            chosen(outside)
    assert len(rows.select(mask).take(np.array([True, False]))) == 1


@pytest.mark.smoke
def test_positions_are_of_any_integers() -> None:
    assert as_positions(np.array([2, 0], np.uint8), 3).dtype == np.int64
    assert as_positions(range(2), 3).tolist() == [0, 1]


# Parts


def write_parts(folder: Path, *names: str) -> Path:
    """A file of one row for each name, with its number in the order of the names."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.full((1, 2), number))
    return folder


def order_of(folder: Path | str) -> list[int]:
    rows = open_features(folder)
    return rows.rows(0, len(rows))[:, 0].tolist()


REFUSED = {
    "part-00000-of-00003.npy part-00002-of-00003.npy": "expected 3 parts by its name, found 2|"
    "number 1 is missing before it",
    "part-00000-of-00003.npy part-00001-of-00003.npy": "expected 3 parts by its name, found 2",
    "img_emb_0.npy img_emb_1.npy labels.npy": r"labels\.npy: expected a number in its name, as "
    r'img_emb_0.npy has; .*choose the parts by a pattern, such as "img_emb_\*\.npy"',
    "a_1.npy a_3.npy": "a_3.npy: number 2 is missing before it",
    "a_1.npy a_01.npy": "its number occurs twice",
}


@pytest.mark.parametrize("names", REFUSED)
def test_parts_that_are_not_all_there_are_refused(tmp_path: Path, names: str) -> None:
    write_parts(tmp_path, *names.split())
    with pytest.raises(DataError, match=REFUSED[names]):
        open_features(tmp_path)


ORDERED = [
    "2024-01-30.npy 2024-01-31.npy 2024-02-01.npy",
    "cats.npy dogs.npy",
    "x2_0.npy x2_1.npy x10_0.npy x10_1.npy",
    "part-00000-of-00002.npy part-00001-of-00002.npy",
    "a_2.npy a_3.npy a_4.npy",
    " ".join(f"x{number}.npy" for number in range(12)),
]


@pytest.mark.parametrize("names", ORDERED)
def test_parts_are_in_the_order_of_all_their_numbers(tmp_path: Path, names: str) -> None:
    write_parts(tmp_path, *names.split())
    assert order_of(tmp_path) == list(range(len(names.split())))


def test_dotfiles_are_no_parts_and_a_pattern_chooses(tmp_path: Path) -> None:
    write_parts(tmp_path, "a_0.npy", "a_1.npy")
    (tmp_path / ".a_2.npy").write_bytes(b"half a download")
    assert order_of(tmp_path) == [0, 1]
    write_parts(tmp_path / "b", "a_0.npy", "a_1.npy", "labels.npy")
    assert order_of(f"{tmp_path}/b/a_*.npy") == [0, 1]
    write_parts(tmp_path / "c", "part-00000-of-00003.npy", "part-00001-of-00003.npy")
    assert order_of(f"{tmp_path}/c/part-0000[01]*.npy") == [0, 1]


def test_one_file_without_a_number_is_a_side(tmp_path: Path) -> None:
    assert order_of(write_parts(tmp_path / "a", "img_emb/rows.npy")) == [0]
    write_parts(tmp_path / "a", "text_emb/captions.npy")
    folder = open_folder(tmp_path / "a")
    assert folder.images is not None and folder.texts is not None
    write_parts(tmp_path / "b", "img_emb/rows.npy", "text_emb/text_emb_0.npy")
    with pytest.raises(DataError, match="expected parts of the same numbers in text_emb"):
        open_folder(tmp_path / "b")


def test_parts_of_two_sides_have_the_same_numbers(tmp_path: Path) -> None:
    write_parts(
        tmp_path,
        *(f"img_emb/part-0000{i}-of-00003.npy" for i in (0, 2)),
        *(f"text_emb/part-0000{i}-of-00003.npy" for i in (1, 2)),
    )
    with pytest.raises(DataError):
        open_folder(tmp_path)
    names = [f"{side}/2024-0{month}-01.npy" for side, month in
             (("img_emb", 1), ("img_emb", 3), ("text_emb", 2), ("text_emb", 3))]  # fmt: skip
    write_parts(tmp_path / "days", *[name.replace("-03-01", "-03-02") for name in names])
    with pytest.raises(DataError, match="expected parts of the same numbers in text_emb"):
        open_folder(tmp_path / "days")


# Pictures


def test_a_row_without_a_key_is_a_picture_of_its_own(tmp_path: Path) -> None:
    keys = [f"k{i // 2}" if i % 3 else "" for i in range(23)]
    rows = np.repeat(np.eye(12, 5), 2, axis=0)[:23]
    identity = open_folder(write_folder(tmp_path / "f", rows, keys)).images.identity
    expected: dict[str, int] = {}
    numbers = [expected.setdefault(key or f"row {i}", len(expected)) for i, key in enumerate(keys)]
    assert identity.picture.tolist() == numbers
    assert identity.picture[identity.first_rows].tolist() == list(range(len(expected)))
    assert list(identity.names()) == [key or f"row {i}" for i, key in enumerate(keys)]
    assert identity.find(["k1", "", "no"]).tolist() == [2, -1, -1]
    chosen = identity.select(np.array([22, 21, 3]))
    assert list(chosen.names()) == ["k11", "row 21", "row 3"]
    assert chosen.column("caption")[0] == 'a "k11",\nsecond line'


def test_rows_of_one_key_are_of_one_picture(tmp_path: Path) -> None:
    """As in tables whose image_path begins again with each part."""
    folder = write_folder(tmp_path / "f", ROWS, [f"{i % 16}" for i in range(23)])
    expected = "expected one picture for each key, got rows 0 and 16 with the key '0' and different"
    with pytest.raises(DataError, match=expected):
        open_features(folder).not_finite()
    assert len(open_features(folder, "texts").not_finite()) == 0  # captions of one picture differ


def test_the_column_of_clip_retrieval_is_named(tmp_path: Path) -> None:
    """Its tables call the key image_path where there is no key; a null is no key."""
    columns = {"image_path": [None, "000.jpg"] * 2}
    folder = write_layout(tmp_path / "f", {"img_emb": np.eye(4)}, columns, [2, 2], "parquet")
    rows = open_features(folder)
    assert rows.identity.picture.tolist() == [0, 1, 2, 1]
    with pytest.raises(DataError, match="one picture for each image_path, got rows 1 and 3"):
        rows.not_finite()


@pytest.mark.parametrize("noise", [0, 0.001])
def test_image_rows_may_differ_in_their_last_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: float
) -> None:
    monkeypatch.setattr("protoclip.features.rows.BLOCK_BYTES", 80)  # rows of a picture lie far
    random = np.random.default_rng(0)
    rows = np.tile(random.standard_normal((8, 5)), (3, 1))[:23]
    rows += noise * random.standard_normal((23, 5))
    folder = write_folder(tmp_path / "f", rows, [f"{i % 8}" for i in range(23)])
    assert len(open_features(folder).not_finite()) == 0


# The same rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_blocks_and_strides_do_not_matter(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.arange(35).reshape(7, 5).to(dtype)
    whole = digest_of(rows)
    monkeypatch.setattr(digest, "BLOCK_BYTES", 2 * rows[:1].nbytes)
    assert digest_of(rows) == whole
    assert digest_of(rows.repeat(1, 2)[:, :5]) == whole  # strided
    changed = rows.clone()
    changed[3, 2] += 1
    assert digest_of(changed) != whole
    assert digest_of(rows.flip(0)) != whole


def test_digests_of_arrays_and_tensors_agree() -> None:
    assert digest_of(ROWS) == digest_of(torch.from_numpy(ROWS))
    one_by_one = digest.Digest()
    for row in ROWS:
        one_by_one.update(row[None])
    assert one_by_one.hexdigest() == digest_of(ROWS)
    assert one_by_one.rows == 23
    assert digest_of(torch.empty(0, 4)) == digest_of(np.empty((0, 9)))


def test_the_digest_is_of_all_bytes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protoclip.features.rows.BLOCK_BYTES", 35)
    rows = open_features(file)
    assert rows.digest() == digest_of(ROWS) and rows.digest(7) == digest_of(ROWS[:7])
    changed = ROWS.copy()
    changed[11, 3] += 1
    np.save(file, changed)
    assert open_features(file).digest() != rows.digest()
    assert open_features(file).digest(11) == digest_of(ROWS[:11])
    selected = open_features(file).select([3, 5])
    assert selected.digest() != open_features(file).select([5, 3]).digest()


def test_a_pass_over_the_rows_knows_their_digest(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = open_features(file)
    rows.not_finite()

    def fail(*_: object) -> None:
        raise AssertionError("the rows were read again")

    monkeypatch.setattr(rows, "rows", fail)
    assert rows.digest() == digest_of(ROWS)
    assert re.fullmatch("[0-9a-f]{32}", rows.digest())


def test_the_state_of_files_changes_with_them(file: Path) -> None:
    state = open_features(file).state
    assert open_features(file).state == state
    np.save(file, ROWS[:-1])
    assert open_features(file).state != state
