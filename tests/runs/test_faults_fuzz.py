"""Inputs nobody meant: every one gives a result or an error in words, never anything else."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pairs import encoded, picture, write_tar

from protoclip.data import DataError
from protoclip.data.shards import ShardDataset
from protoclip.settings.config import TrainConfig, check, from_dict, to_dict

quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file in place of the cache, so that no index is stored: each example is read again."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "file"))


def good_tar() -> bytes:
    members = []
    for i in range(3):
        members.append((f"{i}.png", encoded(picture(i))))
        members.append((f"{i}.json", json.dumps({"captions": [f"number {i}", "two"]}).encode()))
        members.append((f"{i}.txt", b"one\ntwo"))
    with tempfile.TemporaryDirectory() as folder:
        return Path(write_tar(Path(folder) / "s.tar", members)).read_bytes()


TAR = good_tar()
with tarfile.open(fileobj=io.BytesIO(TAR)) as _opened:
    SECOND = _opened.getmembers()[3].offset  # of the second sample
    END = _opened.offset  # of its members
# Where in the file, and what is written there.
edits = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=40)), max_size=6
)


def damaged(data: bytes, edits: list[tuple[float, bytes]], length: float) -> bytes:
    """With the edits, then cut to a share of its length."""
    result = bytearray(data)
    for position, new in edits:
        start = int(position * len(data))
        result[start : start + len(new)] = new
    return bytes(result[: int(length * len(result))])


@pytest.mark.usefixtures("no_index")
@quick
@example(edits=[], length=1.0)
@given(edits=edits, length=st.one_of(st.just(1.0), st.floats(0, 1)))
def test_a_damaged_tar_gives_samples_or_an_error_in_words(
    edits: list[tuple[float, bytes]], length: float
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.tar"
        path.write_bytes(damaged(TAR, edits, length))
        try:
            dataset = ShardDataset(str(path))
        except DataError as error:
            assert str(path) in str(error)
            return
        assert len(dataset) == len(set(dataset.keys)) <= 9
        images = 0
        for i in range(len(dataset)):
            assert dataset.captions(i)
            try:
                assert dataset.image(i).mode == "RGB"
                images += 1
            except DataError as error:
                assert str(path) in str(error)
        if not edits and length == 1.0:
            assert images == len(dataset) == 3


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, data: bytes = b"") -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    info.type = kind
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def extended_header(record: bytes) -> bytes:
    return header("pax", len(record), tarfile.XHDTYPE, record) + header("9.png", 0)


KINDS = (b"0", b"L", b"S", b"x", b"Z")
HEADERS = {  # what sends Python's tarfile in circles or into its own errors
    "negative size": header("9.png", SECOND - END - 512),
    "negative size of an unknown type": header("9.png", SECOND - END - 512, b"Z"),
    "negative size in an extended header": extended_header(b"14 size=%d\n" % (SECOND - END - 1536)),
    "negative size of a long name": header("x", -512, tarfile.GNUTYPE_LONGNAME),
    "exabytes in an extended header": extended_header(b"28 size=4611686018427387904\n"),
    "a yottabyte": header("9.png", 2**80),
    **{f"exabytes of type {kind!r}": header("9.png", 2**62, kind) for kind in KINDS},
    "a thousand long names": header("x", 0, tarfile.GNUTYPE_LONGNAME) * 3000,
    "not a map": extended_header(b"24 GNU.sparse.map=a,b,c\n"),
}


@pytest.fixture
def shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "s.tar"


SAMPLES = TAR[:END]
END_OF_TAR = bytes(1024)


@pytest.mark.parametrize("kind", HEADERS)
def test_a_tar_that_begins_with_a_nonsense_header_is_refused(shard: Path, kind: str) -> None:
    shard.write_bytes(HEADERS[kind] + SAMPLES + END_OF_TAR)
    with pytest.raises(DataError, match=r"not an uncompressed tar|damaged at byte \d+"):
        ShardDataset(str(shard))


@pytest.mark.parametrize("kind", HEADERS)
def test_a_nonsense_header_after_good_samples_is_named(shard: Path, kind: str) -> None:
    shard.write_bytes(SAMPLES + HEADERS[kind] + END_OF_TAR)
    dataset = ShardDataset(str(shard))
    assert len(dataset) == 3
    _, _, reason = dataset.facts.skipped[-1]
    assert "damaged" in reason


def test_a_harmless_header_costs_no_sample(shard: Path) -> None:
    exabytes_of_a_folder = header("9.png", 2**62, tarfile.DIRTYPE)
    for content in (exabytes_of_a_folder + SAMPLES, SAMPLES + exabytes_of_a_folder):
        shard.write_bytes(content + END_OF_TAR)
        assert len(ShardDataset(str(shard))) == 3


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


FIELDS = [
    (section, name)
    for section, fields in to_dict(TrainConfig()).items()
    if section != "method"
    for name in fields
]


@quick
@given(field=st.sampled_from(FIELDS), value=json_values)
def test_a_config_with_any_value_is_taken_or_refused_in_words(
    field: tuple[str, str], value: Any
) -> None:
    section, name = field
    values = to_dict(TrainConfig())
    values[section][name] = value
    try:
        check(from_dict(TrainConfig, json.loads(json.dumps(values))))
    except ValueError as error:
        assert name in str(error) or "--" in str(error)
