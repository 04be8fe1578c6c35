"""``protoclip cluster`` on folders as people have them: odd names, links, pipes, equal pictures."""

import csv
import errno
import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import silhouette_score

import protoclip
from protoclip.cluster import main as cluster
from protoclip.evaluate.datasets import ImageFolder


def draw(path, number):
    """A picture that differs from those of other numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((32, 32)).save(str(path), "png")


def known_features(folder, path, rows=None):
    """A features.npz of the pictures in a folder, so that no model is needed."""
    keys = ImageFolder(folder, [""], ()).keys
    rows = np.random.default_rng(0).standard_normal((len(keys), 8)) if rows is None else rows
    np.savez(path, features=rows.astype(np.float32), keys=np.array(list(keys)))
    return ["--features", str(path)]


def rows_of(table):
    """The rows of a clusters.csv, read as docs/evaluation.md says."""
    with open(table, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def test_a_name_that_is_not_utf8_is_written_so_that_it_can_be_read(tmp_path, nano):
    folder = tmp_path / "photos"
    name = os.fsdecode(b"caf\xe9.png")
    for number, file in enumerate([name, "a.png", "b.png"]):
        draw(folder / file, number)
    flags = ["--model", str(nano), "--pretrained", "random", "--k", "2"]
    assert cluster([str(folder), *flags, "--out", str(tmp_path / "out")]) == 0
    files = [row["file"] for row in rows_of(tmp_path / "out" / "clusters.csv")]
    assert sorted(files) == sorted([name, "a.png", "b.png"])
    assert all((folder / file).is_file() for file in files)
    assert b"caf\xe9.png" in (tmp_path / "out" / "clusters.csv").read_bytes()
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert r"caf\\xe9.png" in page and "udce9" not in page  # in JSON
    again = ["--features", str(tmp_path / "out" / "features.npz"), "--k", "2"]
    assert cluster([str(folder), *again, "--out", str(tmp_path / "again")]) == 0


def test_each_real_file_is_read_once(tmp_path, capsys):
    folder = tmp_path / "photos"
    for number, file in enumerate(["a/1.png", "a/2.png", "z/3.png"]):
        draw(folder / file, number)
    draw(tmp_path / "elsewhere" / "4.png", 4)
    (folder / "a" / "back").symlink_to("..")
    (folder / "a" / "again.png").symlink_to("1.png")
    (folder / "A-link-that-sorts-first").symlink_to("z")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "linked-again").symlink_to(tmp_path / "elsewhere")
    (folder / "itself").symlink_to("itself")
    dataset = ImageFolder(folder, [""], ())
    assert dataset.keys == ["a/1.png", "a/2.png", "linked/4.png", "z/3.png"]
    assert dataset.odd == {"repeated path": 4, "broken link": 1}
    flags = known_features(folder, tmp_path / "x.npz")
    assert cluster([str(folder), *flags, "--k", "2", "--out", str(tmp_path / "out")]) == 0
    assert "left out 4 repeated paths, 1 broken link" in capsys.readouterr().err


def test_a_picture_may_belong_to_two_classes(tmp_path):
    draw(tmp_path / "cat" / "1.png", 1)
    (tmp_path / "pet").symlink_to("cat")
    assert ImageFolder(tmp_path, ["cat", "pet"], ["cat", "pet"]).keys == ["cat/1.png", "pet/1.png"]


def test_pipes_and_sockets_are_counted_not_opened(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "photos"
    for number in range(3):
        draw(folder / f"{number}.png", number)
    os.mkfifo(folder / "x.jpg")
    os.mkfifo(folder / "y.jpg")
    monkeypatch.chdir(folder)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("z.png")
        flags = known_features(folder, tmp_path / "x.npz")
        assert cluster([str(folder), *flags, "--k", "2", "--out", str(tmp_path / "out")]) == 0
    assert "left out 3 special files: regular files are read" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "out" / "clusters.csv")) == 3


def test_equal_pictures_are_said_to_be_equal(tmp_path, nano, capsys):
    folder = tmp_path / "photos"
    for number in range(20):
        draw(folder / f"{number}.png", 0)
    flags = ["--model", str(nano), "--pretrained", "random", "--k", "2"]
    assert cluster([str(folder), *flags, "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert "note: 1 of 2 groups has members; the others stayed empty" in told
    page = (tmp_path / "out" / "report.html").read_text()
    text = page.partition("<h1>")[2].partition("</section>")[0]
    assert "20 pictures of" in text and "in 1 group;" in text and "%" not in text
    assert "no variance to account for" in text and "1 of 2 groups has members" in text
    assert "1 cluster of 20 pictures" in page


@pytest.mark.parametrize("weighted", [False, True])
def test_the_share_of_the_variance(tmp_path, weighted):
    """Four rows far from the rest: with weight 0 they are in no variance."""
    torch.manual_seed(0)
    rows = torch.randn(200, 4, dtype=torch.float64) + 5 * torch.arange(200)[:, None].fmod(2)
    rows[:4] = 1000
    np.save(tmp_path / "x.npy", rows.float().numpy())
    weights = torch.ones(200, dtype=torch.float64)
    flags = [str(tmp_path / "x.npy"), "--k", "2", "--out", str(tmp_path / "out")]
    if weighted:
        weights[:4] = 0
        np.savetxt(tmp_path / "w.txt", weights)
        flags += ["--weights", str(tmp_path / "w.txt")]
    assert cluster(flags) == 0
    found = protoclip.Clusters.load(tmp_path / "out" / "centroids.safetensors")
    within = (rows - found.centroids[found.labels].double()).square().sum(1) @ weights
    mean = weights @ rows / weights.sum()
    share = 1 - within / ((rows - mean).square().sum(1) @ weights)
    page = (tmp_path / "out" / "report.html").read_text()
    assert 0.5 < share < 1 and f"account for {share:.0%} of the variance" in page


def test_a_person_with_a_folder_never_reads_of_pairs(tmp_path, capsys):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    (folder / "torn.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("words")
    draw(folder / "one.png", 1)
    model = ["--model", "protoclip-tiny", "--pretrained", "random"]
    assert cluster([str(folder), *model, "--k", "2", "--out", str(tmp_path / "out")]) == 2
    assert cluster([str(folder / "sub"), *model, "--out", str(tmp_path / "out")]) == 2
    (folder / "sub" / "x.txt").write_text("words")
    assert cluster([str(folder / "sub"), *model, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "torn.jpg: the picture does not decode" in told and "among 1 file\n" in told
    assert "pair" not in told


@pytest.mark.parametrize("total", [60, 450])
def test_only_pictures_that_are_shown_are_decoded(tmp_path, monkeypatch, total):
    """Up to 400 the map shows them all; of more, the page has those of the groups."""
    for number in range(total):
        draw(tmp_path / "photos" / f"{number}.png", number)
    flags = known_features(tmp_path / "photos", tmp_path / "x.npz")
    read = []
    image = ImageFolder.image
    monkeypatch.setattr(ImageFolder, "image", lambda self, i: read.append(i) or image(self, i))
    flags += ["--k", "3", "--out", str(tmp_path / "out")]
    assert cluster([str(tmp_path / "photos"), *flags]) == 0
    assert len(read) == len(set(read)) == (60 if total == 60 else 3 * 8)


def test_a_very_large_picture_is_named_in_one_sentence(tmp_path, monkeypatch, recwarn, caplog):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    for number in range(20):
        draw(tmp_path / "photos" / f"{number}.png", number)
    flags = known_features(tmp_path / "photos", tmp_path / "x.npz")
    flags += ["--k", "2", "--out", str(tmp_path / "out")]
    assert cluster([str(tmp_path / "photos"), *flags]) == 0
    names = sorted(record.getMessage().partition(": ")[0] for record in caplog.records)
    assert names == sorted(f"{tmp_path}/photos/{number}.png" for number in range(20))
    assert all("32 x 32 pixels" in record.getMessage() for record in caplog.records)
    assert not [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]


def folders_of(table):
    """The files of each group, by its number."""
    groups = {}
    for row in rows_of(table):
        groups.setdefault(int(row["cluster"]), set()).add(row["file"])
    return groups


@pytest.mark.parametrize("flag", ["--link-to", "--copy-to"])
def test_groups_as_folders(tmp_path, monkeypatch, flag):
    """Names that differ in their case only would be one file on the disk of a camera."""
    names = [f"{folder}/{name}" for folder in "abc" for name in ("x.png", "X.PNG", "x (2).png")]
    names += [f"{number}.png" for number in range(20)]
    for number, name in enumerate(names):
        draw(tmp_path / "photos" / name, number)
    rows = np.repeat(np.arange(len(names))[:, None] % 2, 2, axis=1)
    flags = known_features(tmp_path / "photos", tmp_path / "x.npz", rows)
    out, folder = tmp_path / "out", tmp_path / "new" / "folders"
    flags += ["--k", "2", "--out", str(out), flag, str(folder)]
    monkeypatch.chdir(tmp_path)
    assert cluster(["photos", *flags]) == 0  # a relative DATA: links must still lead there
    groups = folders_of(out / "clusters.csv")
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1"]
    for number, files in groups.items():
        inside = list((folder / str(number)).iterdir())
        assert len({path.name.casefold() for path in inside}) == len(inside) == len(files)
        assert all(path.is_symlink() == (flag == "--link-to") for path in inside)
        contents = sorted((tmp_path / "photos" / file).read_bytes() for file in files)
        assert sorted(path.read_bytes() for path in inside) == contents
        if flag == "--link-to":
            assert {path.resolve() for path in inside} == {tmp_path / "photos" / f for f in files}
        else:
            assert all(path.stat().st_mtime < time.time() for path in inside)


@pytest.mark.parametrize("flag", ["--link-to", "--copy-to"])
def test_groups_as_folders_are_refused_before_any_work(tmp_path, capsys, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        draw(tmp_path / "photos" / f"{number}.png", number)
    flags = known_features(tmp_path / "photos", tmp_path / "x.npz")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    np.save(tmp_path / "x.npy", np.eye(6))
    cases = [
        (["photos", *flags, flag, "full"], "expected a new or empty folder, but full is in use"),
        (["photos", *flags, flag, "full/mine"], "expected a new or empty folder"),
        (["photos", *flags, flag, "full/mine/x"], "but full/mine is a file"),
        (["photos", *flags, flag, "/proc/x"], "/proc/x cannot be created"),
        (["x.npy", flag, "new"], "expected a folder of pictures or a table of files as DATA"),
        (["builtin:shapes:9", flag, "new"], "expected a folder of pictures or a table of files"),
    ]
    for argv, words in cases:
        assert cluster([*argv, "--k", "2"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"error: {flag}: " in said and words in said
    assert (tmp_path / "full" / "mine").read_text() == "mine"
    assert not (tmp_path / "new").exists() and not (tmp_path / "groups" / "clusters.csv").exists()
    with pytest.raises(SystemExit):
        cluster(["photos", "--link-to", "a", "--copy-to", "b"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_disk_without_links_is_told_to_copy(tmp_path, capsys, monkeypatch):
    """Such a disk needs rights to mount; its answer is the system's EPERM."""

    def refuse(path, target):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    for number in range(6):
        draw(tmp_path / "photos" / f"{number}.png", number)
    flags = known_features(tmp_path / "photos", tmp_path / "x.npz") + ["--k", "2"]
    flags += ["--out", str(tmp_path / "out"), "--link-to", str(tmp_path / "new")]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", refuse)
        assert cluster([str(tmp_path / "photos"), *flags]) == 2
    assert "cannot hold links (Operation not permitted); use --copy-to" in capsys.readouterr().err
    assert cluster([str(tmp_path / "photos"), *flags]) == 0  # the folder is still empty


def test_the_page_lists_every_member(tmp_path):
    for number in range(50):
        draw(tmp_path / "photos" / f"number {number}.png", number)
    flags = known_features(tmp_path / "photos", tmp_path / "x.npz")
    assert (
        cluster([str(tmp_path / "photos"), *flags, "--k", "3", "--out", str(tmp_path / "o")]) == 0
    )
    page = (tmp_path / "o" / "report.html").read_text()
    cards = json.loads(page.split('<script type="application/json">')[1].split("</script>")[0])
    assert {card["cluster"]: set(card["members"]) for card in cards} == folders_of(
        tmp_path / "o" / "clusters.csv"
    )
    rank = {row["file"]: int(row["rank"]) for row in rows_of(tmp_path / "o" / "clusters.csv")}
    for card in cards:
        assert [rank[name] for name in card["members"]] == list(range(1, card["samples"] + 1))
        assert len(card["images"]) == 8


def test_choose_num_clusters():
    torch.manual_seed(0)
    points = 5 * torch.randn(7, 8)[torch.arange(700) % 7] + 0.3 * torch.randn(700, 8)
    calls = []
    k, silhouettes = protoclip.choose_num_clusters(
        points, max_clusters=20, progress=lambda *call: calls.append(call)
    )
    assert k == 7 == max(silhouettes, key=silhouettes.get) and calls == list(silhouettes.items())
    assert list(silhouettes) == [*range(2, 17), 19]
    found = protoclip.kmeans(points, 7, num_iters=10, num_restarts=3, init="k-means++")
    truth = silhouette_score(points.numpy(), found.labels.numpy())
    assert silhouettes[7] == pytest.approx(truth, abs=1e-6)
    first, again = (
        protoclip.choose_num_clusters(points, max_clusters=9, max_points=100, seed=3)
        for _ in range(2)
    )
    assert first == again and first[0] == 7
    two = torch.arange(40)[:, None].fmod(2).expand(-1, 3)  # two different points: K = 2 fits
    assert protoclip.choose_num_clusters(two.float())[0] == 2
    for wrong, words in (
        (torch.randn(5, 2), "expected at least 6 points, got 5"),
        (torch.ones(50, 2), "expected points that differ"),
        (torch.randn(50), "points"),
    ):
        with pytest.raises(ValueError, match=words):
            protoclip.choose_num_clusters(wrong)
    with pytest.raises(ValueError, match="max_clusters >= 2"):
        protoclip.choose_num_clusters(points, max_clusters=1)
