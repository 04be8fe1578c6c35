"""Inputs nobody meant: every one gives a result or an error in words, never anything else."""

import contextlib
import io
import json
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairs import encoded, picture, write_tar

from protoclip.config import TrainConfig, check, from_dict, to_dict
from protoclip.data import DataError
from protoclip.data.shards import ShardDataset

quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture
def no_index(monkeypatch, tmp_path):
    """A file in place of the cache, so that no index is kept: each example is read anew."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "file"))


def _tar() -> bytes:
    members = []
    for i in range(3):
        members.append((f"{i}.png", encoded(picture(i))))
        members.append((f"{i}.json", json.dumps({"captions": [f"number {i}", "two"]}).encode()))
        members.append((f"{i}.txt", b"one\ntwo"))
    with tempfile.TemporaryDirectory() as folder:
        return Path(write_tar(f"{folder}/s.tar", members)).read_bytes()


TAR = _tar()
with tarfile.open(fileobj=io.BytesIO(TAR)) as _opened:
    SECOND = _opened.getmembers()[3].offset  # of the second sample
    END = _opened.offset  # of its members
changes = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=40)), max_size=6
)


def _damaged(data: bytes, edits, keep: float) -> bytes:
    result = bytearray(data)
    for where, new in edits:
        start = int(where * len(data))
        result[start : start + len(new)] = new
    return bytes(result[: int(keep * len(result))])


@pytest.mark.usefixtures("no_index")
@quick
@given(changes, st.one_of(st.just(1.0), st.floats(0, 1)))
def test_the_tar_reader(edits, keep):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.tar"
        path.write_bytes(_damaged(TAR, edits, keep))
        with contextlib.suppress(DataError):
            dataset = ShardDataset(str(path))
            assert len(dataset) == len(set(dataset.keys)) <= 9
            for i in range(len(dataset)):
                assert dataset.captions(i)
                with contextlib.suppress(DataError):
                    assert dataset.image(i).mode == "RGB"


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE, data: bytes = b"") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def _extended(record: bytes) -> bytes:
    return _header("pax", len(record), tarfile.XHDTYPE, record) + _header("9.png", 0)


KINDS = (b"0", b"L", b"S", b"x", b"Z")
HEADERS = {  # what sends Python's tarfile in circles or into its own errors
    "negative size": _header("9.png", SECOND - END - 512),
    "negative size of an unknown type": _header("9.png", SECOND - END - 512, b"Z"),
    "negative size in an extended header": _extended(b"14 size=%d\n" % (SECOND - END - 1536)),
    "negative size of a long name": _header("x", -512, tarfile.GNUTYPE_LONGNAME),
    "exabytes in an extended header": _extended(b"28 size=4611686018427387904\n"),
    "a yottabyte": _header("9.png", 2**80),
    **{f"exabytes of type {kind!r}": _header("9.png", 2**62, kind) for kind in KINDS},
    "a thousand long names": _header("x", 0, tarfile.GNUTYPE_LONGNAME) * 3000,
    "not a map": _extended(b"24 GNU.sparse.map=a,b,c\n"),
}
HARMLESS = {"exabytes of a folder": _header("9.png", 2**62, tarfile.DIRTYPE)}


@pytest.mark.parametrize("where", ["first", "later"])
@pytest.mark.parametrize("kind", [*HEADERS, *HARMLESS])
def test_headers_of_nonsense_are_damage_or_nothing(tmp_path, monkeypatch, kind, where):
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    path, header = tmp_path / "s.tar", (HEADERS | HARMLESS)[kind]
    whole, end = TAR[:END], bytes(1024)
    path.write_bytes(header + whole + end if where == "first" else whole + header + end)
    if kind in HEADERS and where == "first":
        with pytest.raises(DataError, match=r"not an uncompressed tar|damaged at byte \d+"):
            ShardDataset(str(path))
        return
    dataset = ShardDataset(str(path))
    assert len(dataset) == 3
    assert kind in HARMLESS or "damaged" in dataset.skipped[-1][2]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


FIELDS = [(s, k) for s, own in to_dict(TrainConfig()).items() if s != "method" for k in own]


@quick
@given(st.sampled_from(FIELDS), json_values)
def test_the_config(field, value):
    values = to_dict(TrainConfig())
    values[field[0]][field[1]] = value
    with contextlib.suppress(ValueError):
        check(from_dict(TrainConfig, json.loads(json.dumps(values))))
