"""Bad data, urls, workers that die: each ends in its stated outcome."""

import json
import os
import tarfile

import numpy as np
import pytest
import torch
from fault_runs import prepare
from PIL import Image
from test_data_batches import MEAN, STD, assert_equal, tokenize
from test_data_csv import encoded, picture, same
from test_data_shards import write_shards, write_tar

from protoclip.data import DataError, batches, build_transform, open_dataset
from protoclip.data.__main__ import main as data_command
from protoclip.data.faults import Faults
from protoclip.data.tar_index import MAX_CAPTION
from protoclip.train import main


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PROTOCLIP_BACKEND", "reference")  # the cache has no compiled library
    monkeypatch.setattr("protoclip.train.draw_plots", lambda *_: None)


def load(dataset, **options):
    transform = build_transform(32, MEAN, STD, "paper")
    draws = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return list(batches(dataset, draws, 4, transform, tokenize, seed=3, **options))


def test_training_on_urls_resumes_exactly(tmp_path):
    flags = [*prepare(tmp_path), "--max-steps", "6", "--k", "4", "--shuffle-buffer", "20"]
    flags += ["--train-data", f"file://{tmp_path}/shards/{{00000..00003}}.tar"]
    assert main([*flags, "--name", "whole"]) == 0
    run = tmp_path / "logs"
    assert main([*flags, "--name", "cut", "--save-every", "5steps"]) == 0
    checkpoints = run / "cut" / "checkpoints"
    os.replace(checkpoints / "epoch_previous.pt", checkpoints / "epoch_latest.pt")
    for copy in (tmp_path / "cache" / "remote").glob("*/*"):
        copy.unlink()  # as after somebody has made room
    assert main([*flags, "--resume", str(run / "cut"), "--workers", "1"]) == 0
    assert "after step 5" in (run / "cut" / "out.log").read_text()
    losses = [
        [json.loads(line)["loss"] for line in (run / n / "metrics.jsonl").open()]
        for n in ("whole", "cut")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def overwrite(path, member, byte):
    """Other data of the same size."""
    with tarfile.open(path) as tar:
        info = tar.getmember(member)
    with open(path, "r+b") as shard:
        shard.seek(info.offset_data)
        shard.write(byte * info.size)


def spoil(path, member):
    """Overwrite the middle of a member's data."""
    with tarfile.open(path) as tar:
        info = tar.getmember(member)
    with open(path, "r+b") as shard:
        shard.seek(info.offset_data + 8)
        shard.write(os.urandom(info.size - 8))


class TestBadSamples:
    def test_they_are_replaced_counted_and_named_once(self, tmp_path):
        spec = write_shards(tmp_path / "data", shards=2, per_shard=6)
        good = load(open_dataset(spec))
        spoil(tmp_path / "data" / "000.tar", "sample2.png")
        said = []
        dataset = open_dataset(spec)
        faults = Faults("data", 12, 0.5, report=said.append)
        results = [load(dataset, faults=faults, workers=workers) for workers in (0, 1)]
        assert_equal(*results)
        assert faults.positions == {2} and len(said) == 1
        assert "000.tar/sample2" in said[0] and "does not decode" in said[0]
        got = torch.cat([batch.index for batch in results[0]]).tolist()
        expected = torch.cat([batch.index for batch in good]).tolist()
        changed = [(a, b) for a, b in zip(expected, got, strict=True) if a != b]
        assert len(changed) == 1 and changed[0][0] == 2
        assert all(len(batch.index.unique()) == 4 for batch in results[0])
        with pytest.raises(DataError, match="sample2"):
            load(dataset)  # without a ledger a bad sample is an error

    @pytest.mark.parametrize(("new", "words"), [(b"\xff", "utf-8"), (b" ", "no caption is there")])
    def test_captions_that_change_while_in_use_are_named(self, tmp_path, new, words):
        spec = write_shards(tmp_path / "data", shards=1)
        dataset = open_dataset(spec)
        overwrite(tmp_path / "data" / "000.tar", "sample1.txt", new)
        with pytest.raises(DataError, match=f"000.tar.*sample1.*changed while in use .*{words}"):
            load(dataset, workers=1)

    def test_a_shard_that_is_deleted_while_in_use_stops_the_run(self, tmp_path):
        """All of its samples are bad: more than the share that is allowed."""
        dataset = open_dataset(write_shards(tmp_path / "data", shards=2, per_shard=6))
        (tmp_path / "data" / "001.tar").unlink()
        with pytest.raises(DataError, match=r"max-bad-fraction 0.25; .*001.tar: No such"):
            load(dataset, faults=Faults("data", 12, 0.25, report=lambda text: None))

    def test_too_many_stop_the_run_with_a_clear_word(self, tmp_path, capsys):
        flags = [*prepare(tmp_path), "--max-steps", "8", "--method", "clip"]
        for i in range(40, 49):
            spoil(tmp_path / "shards" / "00001.tar", _name(tmp_path, i))
        assert main([*flags, "--name", "stops"]) == 2
        message = capsys.readouterr().err
        assert "8 of 150 samples cannot be used, more than --max-bad-fraction 0.05" in message
        assert "00001.tar" in message and "Traceback" not in message
        assert main([*flags, "--name", "goes-on", "--max-bad-fraction", "0.1"]) == 0
        lines = (tmp_path / "logs" / "goes-on" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["bad_samples"] > 0

    def test_check_data_reads_all_and_lists_what_is_wrong(self, tmp_path, capsys):
        spec = write_shards(tmp_path / "data", shards=2, per_shard=6)
        assert data_command(["--check", spec]) == 0
        assert "12 of 12 samples are good" in capsys.readouterr().out
        spoil(tmp_path / "data" / "000.tar", "sample2.png")
        with tarfile.open(tmp_path / "data" / "001.tar", "a") as tar:
            tar.addfile(tarfile.TarInfo("hollow.png"))
        assert data_command(["--check", spec, "--workers", "2"]) == 1
        said = capsys.readouterr().out
        assert "sample2" in said and "'hollow'" in said and "11 of 13 samples are good" in said
        with pytest.raises(SystemExit) as end:
            main(["--train-data", spec, "--check-data", "--logs", str(tmp_path / "logs")])
        assert end.value.code == 1 and not (tmp_path / "logs").exists()

    def test_a_worker_that_dies_is_replaced(self, tmp_path, caplog):
        dataset = open_dataset(write_shards(tmp_path / "data", shards=2, per_shard=6))
        expected = load(dataset)
        mortal = _Mortal(dataset, tmp_path / "deaths", times=2)
        assert_equal(load(mortal, workers=2), expected)
        assert "a data worker died" in caplog.text
        (tmp_path / "deaths").unlink()
        with pytest.raises(DataError, match="died 3 times at the same batch.*samples: "):
            load(_Mortal(dataset, tmp_path / "deaths", times=99), workers=2)


def _name(folder, i):
    with tarfile.open(folder / "shards" / "00001.tar") as tar:
        return [name for name in tar.getnames() if name.endswith(".png")][i - 40]


class _Mortal:
    """A data set that kills its reader at one sample, a number of times."""

    def __init__(self, dataset, deaths, times):
        self.dataset, self.deaths, self.times = dataset, deaths, times
        self.name, self.keys, self.labels = dataset.name, dataset.keys, dataset.labels

    def __len__(self):
        return len(self.dataset)

    def captions(self, i):
        return self.dataset.captions(i)

    def image(self, i):
        if i == 7:
            with open(self.deaths, "a") as file:
                file.write("x")
            if self.deaths.stat().st_size <= self.times:
                os.kill(os.getpid(), 9)
        return self.dataset.image(i)


class TestHostileInput:
    def test_image_bombs_are_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
        path = write_tar(tmp_path / "b.tar", [("k.png", encoded(picture(0))), ("k.txt", b"a")])
        with pytest.raises(DataError, match=r"b.tar/k.*decompression bomb.*MAX_IMAGE_PIXELS"):
            open_dataset(path).image(0)

    def test_captions_of_megabytes_are_cut_or_left_out(self, tmp_path):
        png = encoded(picture(0))
        members = [("a.png", png), ("a.txt", b"word " * 200_000)]
        members += [("b.png", png), ("b.txt", b"x" * 5_000_000)]
        deep = b'{"caption": ' + b"[" * 100_000
        members += [("c.png", png), ("c.json", deep)]
        dataset = open_dataset(write_tar(tmp_path / "t.tar", members))
        assert list(dataset.keys) == ["t.tar/a"]
        assert len(dataset.captions(0)[0]) == MAX_CAPTION
        reasons = " ".join(reason for _, _, reason in dataset.skipped)
        assert "5,000,000 bytes" in reasons and "nested" in reasons

    def test_long_captions_of_a_table(self, tmp_path):
        (tmp_path / "a.png").write_bytes(encoded(picture(0)))
        table = tmp_path / "t.csv"
        table.write_text("filepath\ttitle\na.png\t" + "word " * 20_000)
        assert len(open_dataset(str(table)).captions(0)[0]) == MAX_CAPTION
        table.write_text("filepath\ttitle\na.png\t" + "word " * 200_000)
        with pytest.raises(DataError, match="line 2: field larger than"):
            open_dataset(str(table))

    def test_escaping_paths_and_links_touch_nothing(self, tmp_path):
        (tmp_path / "secret.png").write_bytes(encoded(picture(1)))
        png = encoded(picture(0))
        path = write_tar(
            tmp_path / "e.tar",
            [("../../x.png", png), ("../../x.txt", b"up"), ("/abs.png", png), ("/abs.txt", b"a")],
        )
        with tarfile.open(path, "a") as tar:
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                link = tarfile.TarInfo(f"link{kind.decode()}.png")
                link.type, link.linkname = kind, str(tmp_path / "secret.png")
                tar.addfile(link)
        before = sorted(tmp_path.rglob("*.png"))
        dataset = open_dataset(path)
        assert len(dataset) == 2 and all(same(dataset.image(i), picture(0)) for i in range(2))
        assert sorted(tmp_path.rglob("*.png")) == before

    def test_what_img2dataset_writes_is_read(self, tmp_path):
        """jpg, txt and json of one key, parquet beside the tars, a sizes.json that says more."""
        photo = encoded(picture(3), "JPEG")
        about = {"caption": "a photo", "url": "http://x", "status": "success", "width": 10}
        members = []
        for key in ("000000000", "000000001"):
            members += [(f"{key}.jpg", photo), (f"{key}.json", json.dumps(about).encode())]
            members += [(f"{key}.txt", b"a photo")]
        (tmp_path / "d").mkdir()
        write_tar(tmp_path / "d" / "00000.tar", members)
        (tmp_path / "d" / "00000.parquet").write_bytes(b"PAR1")
        (tmp_path / "d" / "sizes.json").write_text('{"00000.tar": 3}')
        dataset = open_dataset(str(tmp_path / "d"))
        assert len(dataset) == 2 and dataset.captions(1) == ("a photo",)


def test_a_shorter_shard_than_promised_is_said(tmp_path, caplog):
    write_shards(tmp_path / "d", shards=1)
    (tmp_path / "d" / "sizes.json").write_text('{"000.tar": 5}')
    open_dataset(str(tmp_path / "d"))
    assert "sizes.json promises 5 samples, 3 are there" in caplog.text


def test_a_total_beside_the_shards_counts_for_all_of_them(tmp_path, caplog):
    """webdataset's __len__ says one number for the folder."""
    write_shards(tmp_path / "d", shards=2)
    (tmp_path / "d" / "__len__").write_text("9\n")
    open_dataset(str(tmp_path / "d" / "000.tar"))  # one of two: nothing can be said
    (tmp_path / "d" / "__len__").write_text("many")
    open_dataset(str(tmp_path / "d"))
    assert "promises" not in caplog.text
    (tmp_path / "d" / "__len__").write_text("9\n")
    open_dataset(str(tmp_path / "d"))
    assert "__len__ promises 9 samples, 6 are there" in caplog.text


def test_the_ledger_survives_a_checkpoint():
    faults = Faults("data", 10, 0.2, known=1, report=lambda text: None)
    faults.add(4, "bad")
    again = Faults("data", 10, 0.2, known=1)
    again.load_state_dict(faults.state_dict())
    again.add(4, "bad")
    assert again.count == 2
    with pytest.raises(DataError, match="3 of 10 .*the last one: worse"):
        again.add(np.int64(5), "worse")
