"""Slips and strangers' data: each ends in a sentence or, where it can, in the right pixels."""

import functools
import http.server
import json
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from test_data_csv import encoded, picture, write_table
from test_data_shards import write_shards, write_tar

from protoclip.data import DataError, open_dataset
from protoclip.data.__main__ import main as data_command
from protoclip.train import main as train_command


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def serve(tmp_path):
    """Starts a web server on a folder; ``serve(folder, length)`` is its address."""
    servers = []

    def start(folder, length=None):
        class Handler(http.server.SimpleHTTPRequestHandler):
            def send_header(self, name, value):
                super().send_header(name, (length or value) if name == "Content-Length" else value)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()


def refused(spec, capsys):
    """What the command says of data that it does not take: one line, no traceback."""
    assert data_command(["--check", spec]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


class TestUrls:
    @pytest.mark.parametrize("protocol", ["http", "file"])
    def test_they_give_what_files_give_and_come_once(self, tmp_path, serve, protocol):
        local = open_dataset(write_shards(tmp_path / "data"))
        base = serve(tmp_path / "data") if protocol == "http" else f"file://{tmp_path}/data"
        spec = f"{base}/{{000..001}}.tar"
        for _ in range(2):  # the second start needs neither the server nor the files
            remote = open_dataset(spec)
            assert [key.split("/")[1] for key in remote.keys] == [f"sample{i}" for i in range(6)]
            for i in range(6):
                assert remote.captions(i) == local.captions(i)
                assert remote.image(i).tobytes() == local.image(i).tobytes()
            for path in (tmp_path / "data").glob("*.tar"):
                path.unlink()
            local = remote

    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            ("http://127.0.0.1:9/a.tar", "http://127.0.0.1:9/a.tar: cannot be copied"),
            ("file:///no/such/a.tar", "FileNotFoundError.*check the address"),
            ("ssh://host/a.tar", "expected a url of http, https, s3, gs, hf, file, got ssh"),
            ("pipe:touch ran; cat a.tar", "python -m protoclip.openclip"),
            ("x.tar::pipe:touch ran # .tar", "would run a shell command"),
        ],
    )
    def test_what_cannot_or_must_not_be_read_is_named(self, tmp_path, capsys, spec, words):
        write_tar(tmp_path / "x.tar", [("k.png", encoded(picture(0))), ("k.txt", b"a")])
        with pytest.raises(DataError, match=words):
            open_dataset(spec)
        assert spec.split("::")[-1][:20] in refused(spec, capsys)
        assert train_command(["--train-data", spec]) == 2
        assert "Traceback" not in capsys.readouterr().err
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("length", ["abc", "999999"])
    def test_a_length_that_is_wrong(self, tmp_path, serve, capsys, length):
        write_shards(tmp_path / "data", shards=1)
        url = f"{serve(tmp_path / 'data', length)}/000.tar"
        assert f"{url}: cannot be copied" in refused(url, capsys)
        # Nothing of the half copy is taken for the shard.
        with pytest.raises(DataError, match="cannot be copied"):
            open_dataset(url)

    def test_the_retired_room_of_copies_is_a_sentence(self, capsys):
        with pytest.raises(SystemExit) as end:
            train_command(["--spool-gb", "50"])
        assert end.value.code == 2 and "set PROTOCLIP_CACHE to move it" in capsys.readouterr().err


def test_ranges_of_millions_are_refused_before_they_are_expanded(capsys):
    for spec in (
        "x{0..99999999}.tar",
        "{00..99}/{0000..9999}/{a,b}.tar",
        "http://h/{0..9999999}.tar",
    ):
        assert "expected at most 1,000,000 shards" in refused(spec, capsys)
    assert "no shard 'x0.tar'" in refused("x{0..99999..3}.tar", capsys)


def _header(size, kind=tarfile.REGTYPE, name="b.png", data=b""):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def _pax(record):
    return _header(len(record), tarfile.XHDTYPE, data=record) + _header(0)


@pytest.mark.parametrize("where", ["first", "later"])
@pytest.mark.parametrize(
    "header",
    [
        *(_header(2**62, kind) for kind in (b"0", b"L", b"S", b"x", b"5", b"Z")),
        _header(2**70),
        _pax(b"28 size=4611686018427387904\n"),
    ],
    ids=["file", "long-name", "sparse", "pax", "folder", "unknown", "2^70", "pax-size"],
)
def test_a_tar_header_that_claims_exabytes_is_damage(tmp_path, header, where):
    path = tmp_path / "s.tar"
    write_tar(path, [("k.png", encoded(picture(0))), ("k.txt", b"a")])
    with tarfile.open(path) as tar:
        tar.getmembers()
        whole = path.read_bytes()[: tar.offset]
    path.write_bytes((whole if where == "later" else b"") + header + bytes(2048))
    if where == "later":
        dataset = open_dataset(str(path))
        assert list(dataset.keys) == ["s.tar/k"] and "damaged at byte" in dataset.skipped[-1][2]
    else:
        with pytest.raises(DataError, match="not an uncompressed tar|damaged at byte 0"):
            open_dataset(str(path))


class TestPictures:
    def opened(self, tmp_path, image, kind="PNG", **options):
        (tmp_path / "a.bin").unlink(missing_ok=True)
        image.save(tmp_path / "a.bin", kind, **options)
        return open_dataset(write_table(tmp_path, [("a.bin", "x")])).image(0)

    def test_16_bits_are_scaled_not_clipped(self, tmp_path):
        ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
        got = np.asarray(self.opened(tmp_path, Image.fromarray(ramp)))
        assert got.shape == (4, 256, 3)
        assert np.abs(got[0, :, 0].astype(int) - np.arange(256)).max() <= 1
        dark = self.opened(tmp_path, Image.fromarray((ramp // 256).astype(np.uint16)))
        assert np.asarray(dark).max() <= 1  # 255 of 65,535 is nearly black

    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    def test_a_camera_held_sideways(self, tmp_path, kind):
        pixels = np.zeros((16, 32, 3), dtype=np.uint8)
        pixels[:, :16] = 255  # the left half is white
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
        got = self.opened(tmp_path, Image.fromarray(pixels), kind, exif=exif)
        assert got.size == (16, 32)
        got = np.asarray(got).astype(int)
        assert got[:16].min() > 200 and got[16:].max() < 50  # now the upper half

    def test_damaged_exif_does_not_cost_the_picture(self, tmp_path):
        got = self.opened(tmp_path, picture(0), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
        assert got.size == (10, 12)


class TestCheck:
    def test_all_that_is_wrong_with_a_table_is_listed(self, tmp_path, capsys):
        picture(0).save(tmp_path / "0.png")
        (tmp_path / "1.png").write_bytes(b"<html>")
        rows = [
            ("0.png", "good"),
            ("0.png", " "),
            ("9.png", "missing"),
            ("1.png", "web"),
            ("0.png",),
        ]
        table = write_table(tmp_path, [*rows, ("8.png", "missing too")])
        assert data_command(["--check", table]) == 1
        said = capsys.readouterr().out
        for words in (
            "line 3: the caption (column 'title') is empty",
            "line 4: no picture at '9.png'",
            "line 6: 1 columns where the header has 2",
            "line 7: no picture at '8.png'",
            "1.png: the picture does not decode",
            "1 of 6 samples are good, 5 are not",
        ):
            assert words in said
        with pytest.raises(SystemExit) as end:
            train_command(["--train-data", table, "--check-data"])
        assert end.value.code == 1 and "5 are not" in capsys.readouterr().out
        with pytest.raises(DataError, match="line 3"):  # training itself stops at the first
            open_dataset(table)

    def test_a_table_without_a_good_row(self, tmp_path, capsys):
        assert data_command(["--check", write_table(tmp_path, [("9.png", "a")] * 3)]) == 1
        assert "0 of 3 samples are good" in capsys.readouterr().out


class TestEncoding:
    @pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "UTF8", "cp1252"])
    def test_a_table_in_any_encoding(self, tmp_path, capsys, encoding):
        picture(0).save(tmp_path / "0.png")
        table = tmp_path / "t.tsv"
        table.write_bytes("filepath\ttitle\n0.png\tein Mädchen läuft\n".encode(encoding))
        assert data_command(["--check", str(table), "--encoding", encoding]) == 0
        assert "1 of 1 samples are good" in capsys.readouterr().out
        shards = str(tmp_path / "out")
        export = ["--export", str(table), "--encoding", encoding, "--out", shards]
        assert data_command(export) == 0
        assert open_dataset(shards).captions(0) == ("ein Mädchen läuft",)

    def test_the_remedy_is_named(self, tmp_path, capsys):
        picture(0).save(tmp_path / "0.png")
        table = tmp_path / "t.tsv"
        table.write_bytes("filepath\ttitle\n0.png\tMädchen\n".encode("latin-1"))
        assert "--encoding, such as latin-1" in refused(str(table), capsys)
        assert train_command(["--train-data", str(table)]) == 2
        assert "--encoding, such as latin-1" in capsys.readouterr().err
        assert data_command(["--check", str(table), "--encoding", "klingon"]) == 2
        assert "--encoding: expected one that Python knows" in capsys.readouterr().err

    def test_training_reads_such_a_table(self, tmp_path, capsys):
        picture(0).save(tmp_path / "0.png")
        table = tmp_path / "t.tsv"
        rows = "".join(f"0.png\tMädchen {i}\n" for i in range(4))
        table.write_bytes(f"filepath\ttitle\n{rows}".encode("latin-1"))
        arguments = ["--train-data", str(table), "--encoding", "latin-1", "--check-data"]
        with pytest.raises(SystemExit) as end:
            train_command(arguments)
        assert end.value.code == 0 and "4 of 4 samples are good" in capsys.readouterr().out


def test_a_cached_index_with_another_number_of_captions_is_read_again(tmp_path):
    spec = write_shards(tmp_path / "data", shards=1)
    expected = [open_dataset(spec).captions(i) for i in range(3)]
    (index,) = (tmp_path / "cache" / "shards").iterdir()
    content = json.loads(index.read_text())
    columns = [key for key, value in content.items() if isinstance(value, list) and len(value) == 3]
    assert columns
    for column in columns:
        damaged = {**content, column: content[column][:2]}
        index.write_text(json.dumps(damaged))
        dataset = open_dataset(spec)
        assert [dataset.captions(i) for i in range(len(dataset))] == expected


def test_cached_teacher_features_of_another_size_are_not_used(tmp_path):
    from protoclip import checkpoint
    from protoclip.teacher import load_teacher, minilm_missing

    if reason := minilm_missing():
        pytest.skip(reason)
    dataset = open_dataset("builtin:shapes:6")
    expected = load_teacher("builtin:minilm", dataset, dim=0)
    (path,) = (tmp_path / "cache").glob("minilm-*.pt")
    checkpoint.save(path, {"features": expected[:5]})
    assert torch.equal(load_teacher("builtin:minilm", dataset, dim=0), expected)
