"""``protoclip cluster`` on folders as people have them: odd names, links, pipes, equal pictures."""

from __future__ import annotations

import base64
import errno
import io
import json
import math
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from html_page import Element, in_browser, needs_browser, pictures_in, read_page
from pairs import HEIC, draw, table
from PIL import Image
from sklearn.metrics import silhouette_score
from torch import Tensor

import protoclip
from protoclip.cluster.__main__ import main as cluster
from protoclip.common.files import DataError
from protoclip.data import images
from protoclip.data.folders import ImageFolder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """An empty folder for pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the command writes."""
    return tmp_path / "out"


def known_features(folder: Path, rows: np.ndarray | None = None) -> list[str]:
    """Flags that give the pictures of a folder these features, so that no model is needed."""
    keys = ImageFolder(folder).keys
    if rows is None:
        rows = np.random.default_rng(0).standard_normal((len(keys), 8))
    path = folder.parent / "x.npz"
    np.savez(path, features=rows.astype(np.float32), keys=np.array(list(keys)))
    return ["--features", str(path)]


def draw_pictures(folder: Path, count: int, name: str = "{}.png") -> None:
    """Pictures of the numbers below ``count``, which their names have."""
    for number in range(count):
        draw(folder / name.format(number), number)


def group(photos: Path, out: Path, k: int = 2, rows: np.ndarray | None = None) -> Element:
    """Run the command on pictures with known features; the page that it writes."""
    flags = [*known_features(photos, rows), "--k", str(k), "--out", str(out)]
    assert cluster([str(photos), *flags]) == 0
    return read_page(out / "report.html")


def group_by_a_model(photos: Path, out: Path, nano: Path) -> None:
    flags = ["--model", str(nano), "--pretrained", "random", "--k", "2", "--out", str(out)]
    assert cluster([str(photos), *flags]) == 0


def group_cards(page: Element) -> list[dict[str, Any]]:
    script = page.section("prototypes").one("script", type="application/json")
    cards: list[dict[str, Any]] = json.loads(script.source)
    return cards


def names_on_the_map(page: Element) -> list[str]:
    script = page.section("map").one("script", type="application/json")
    return list(json.loads(script.source)["by"]["cluster (k-means)"]["names"])


def groups_of(out: Path) -> dict[int, set[str]]:
    """The files of each group, by its number."""
    groups: dict[int, set[str]] = {}
    for row in table(out):
        groups.setdefault(int(row["cluster"]), set()).add(row["file"])
    return groups


# ---- which files are read ----


def test_a_name_that_is_not_utf8_is_written_so_that_it_can_be_read(
    photos: Path, out: Path, nano: Path
) -> None:
    latin_1 = os.fsdecode(b"caf\xe9.png")
    names = [latin_1, "a.png", "b.png"]
    for number, name in enumerate(names):
        draw(photos / name, number)
    group_by_a_model(photos, out, nano)
    files = [row["file"] for row in table(out)]
    assert sorted(files) == sorted(names)
    assert all((photos / file).is_file() for file in files)
    assert b"caf\xe9.png" in (out / "clusters.csv").read_bytes()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert r"caf\\xe9.png" in page and "udce9" not in page  # in JSON
    again = ["--features", str(out / "features"), "--k", "2"]
    assert cluster([str(photos), *again, "--out", f"{out}-again"]) == 0


def test_each_real_file_is_read_once(
    photos: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(["a/1.png", "a/2.png", "z/3.png"]):
        draw(photos / name, number)
    elsewhere = photos.parent / "elsewhere"
    draw(elsewhere / "4.png", 4)
    (photos / "a" / "back").symlink_to("..")
    (photos / "a" / "again.png").symlink_to("1.png")
    (photos / "A-link-that-sorts-first").symlink_to("z")
    (photos / "linked").symlink_to(elsewhere)
    (photos / "linked-again").symlink_to(elsewhere)
    (photos / "itself").symlink_to("itself")
    dataset = ImageFolder(photos)
    assert list(dataset.keys) == ["a/1.png", "a/2.png", "linked/4.png", "z/3.png"]
    assert dataset.odd == {"repeated path": 4, "broken link": 1}
    group(photos, out)
    assert "left out 4 repeated paths, 1 broken link" in capsys.readouterr().err


def test_a_picture_is_known_by_its_content_where_its_ending_says_nothing(
    photos: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(["a.png", "b", "c.2024", "d.picture", "e.x.y", ".face"]):
        draw(photos / name, number)
    for name in ("words", "notes.txt", "table.2024", "empty", ".hid", ".DS_Store", ".old.txt"):
        (photos / name).write_text("" if name == "empty" else "no picture\n" * 99)
    (photos / "paper.pdf").write_bytes(b"%PDF-1.4")
    group(photos, out)
    assert len(table(out)) == 6
    said = capsys.readouterr().err
    counts = "4 without an ending, 2 .txt, 1 .2024, 1 .pdf"
    assert sorted(said.partition("cannot open: ")[2].partition("\n")[0].split(", ")) == sorted(
        counts.split(", ")
    )


@pytest.mark.usefixtures("no_heif")
def test_a_telephones_pictures_are_named_with_what_opens_them(
    photos: Path, out: Path, error_of: Callable[..., str]
) -> None:
    for name in ("IMG_1.HEIC", "IMG_2.heic"):
        (photos / name).write_bytes(HEIC)
    error = error_of(cluster, [photos, "--k", "2", "--out", out])
    assert "none among 2 files, 2 of them HEIC: pip install pillow-heif" in error
    with pytest.raises(DataError, match=r"x.jpg: .* \(HEIC: pip install pillow-heif\)"):
        images.decode(HEIC, "x.jpg")


def test_a_telephones_pictures_are_read_where_pillow_heif_is(photos: Path) -> None:
    pytest.importorskip("pillow_heif")
    assert images.can_open_heic()
    for name in ("a.heic", "b.HEIF", "c"):
        Image.new("RGB", (64, 48), "red").save(str(photos / name), "HEIF")
    dataset = ImageFolder(photos)
    assert len(dataset) == 3 and dataset.image(0).size == (64, 48)


def test_names_do_nothing_to_the_terminal(
    photos: Path, out: Path, nano: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(["a.png", "b.png", "c.png", "d\x1b[31m\a.png"]):
        draw(photos / name, number)
    (photos / "torn\x1b]0;title\a\nprotoclip: all is well.png").write_bytes(b"no picture")
    group_by_a_model(photos, out, nano)
    shown = "".join(capfd.readouterr())
    assert r"torn\x1b]0;title\x07\nprotoclip: all is well.png: the picture" in shown
    assert not {"\x1b", "\a"} & set(shown + (out / "report.html").read_text())
    assert len(table(out)) == 4
    (photos.parent / "bad\x1b\a").mkdir()
    assert cluster([str(photos.parent / "bad\x1b\a"), "--k", "2", "--out", f"{out}2"]) == 2
    assert r"bad\x1b\x07: expected pictures" in capfd.readouterr().err


def test_pipes_and_sockets_are_counted_not_opened(
    photos: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_pictures(photos, 3)
    os.mkfifo(photos / "x.jpg")
    os.mkfifo(photos / "y.jpg")
    monkeypatch.chdir(photos)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("z.png")
        group(photos, out)
    assert "left out 3 special files: regular files are read" in capsys.readouterr().err
    assert len(table(out)) == 3


def test_a_person_with_a_folder_never_reads_of_pairs(
    photos: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "torn.jpg").write_bytes(b"no picture")
    (photos / "notes.txt").write_text("words")
    draw(photos / "one.png", 1)
    flags = ["--model", "protoclip-tiny", "--pretrained", "random", "--k", "2", "--out", str(out)]
    assert cluster([str(photos), *flags]) == 2  # one picture that can be read
    empty = photos / "empty"
    empty.mkdir()
    assert cluster([str(empty), *flags]) == 2
    (empty / "x.txt").write_text("words")
    assert cluster([str(empty), *flags]) == 2
    error = capsys.readouterr().err
    assert "torn.jpg: the picture does not decode" in error
    assert "among 1 file\n" in error
    assert "pair" not in error


def test_torn_pictures_are_left_out(
    photos: Path, out: Path, nano: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twelve are more than the terminal names."""
    draw_pictures(photos, 4)
    torn = [f"torn-{number:03}.jpg" for number in range(12)]
    for name in torn:
        (photos / name).write_bytes(b"no picture")
    group_by_a_model(photos, out, nano)
    error = capsys.readouterr().err
    assert "left out 12 of 16 pictures" in error and error.count("does not decode") == 10
    assert "and 2 more; left_out.csv lists them all" in error
    names = {line["file"] for line in table(out)}
    assert names == {f"{number}.png" for number in range(4)}
    left_out = table(out, "left_out.csv")
    assert [line["file"] for line in left_out] == torn
    assert all("does not decode" in line["reason"] for line in left_out)


@pytest.mark.parametrize(
    "pictures, decoded",
    [
        (60, 60),  # up to 400 the map shows them all
        (450, 3 * 24),  # of more, the page has those nearest to the groups' means
    ],
)
def test_only_pictures_that_are_shown_are_decoded(
    photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch, pictures: int, decoded: int
) -> None:
    draw_pictures(photos, pictures)
    opened: list[int] = []
    image = ImageFolder.image

    def counted(self: ImageFolder, i: int) -> Image.Image:
        opened.append(i)
        return image(self, i)

    monkeypatch.setattr(ImageFolder, "image", counted)
    group(photos, out, 3)
    assert len(opened) == len(set(opened)) == decoded


def test_a_very_large_picture_is_named_in_one_sentence(
    photos: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    draw_pictures(photos, 20)
    group(photos, out)
    messages = [record.getMessage() for record in caplog.records]
    assert sorted(message.partition(": ")[0] for message in messages) == sorted(
        str(path) for path in photos.iterdir()
    )
    assert all("32 x 32 pixels" in message for message in messages)
    bombs = [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]
    assert bombs == []


# ---- what is said of the groups ----


def test_equal_pictures_are_said_to_be_equal(
    photos: Path, out: Path, nano: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(20):
        draw(photos / f"{number}.png", 0)
    group_by_a_model(photos, out, nano)
    error = capsys.readouterr().err
    assert "note: 1 of 2 groups has members; the others are empty" in error
    page = read_page(out / "report.html")
    answer = page.one("p", class_="answer").text
    assert "20 pictures of" in answer and "in 1 group;" in answer
    summary = page.section("summary").text
    assert "no variance to account for" in summary and "1 of 2 groups has members" in summary
    assert "%" not in answer + summary
    assert "1 cluster of 20 pictures" in page.section("prototypes").text


@pytest.mark.parametrize("weighted", [False, True])
def test_the_share_of_the_variance(tmp_path: Path, out: Path, weighted: bool) -> None:
    """Four rows far from the rest: with weight 0 they are in no variance."""
    torch.manual_seed(0)
    rows = torch.randn(200, 4, dtype=torch.float64) + 5 * torch.arange(200)[:, None].fmod(2)
    rows[:4] = 1000
    np.save(tmp_path / "x.npy", rows.float().numpy())
    weights = torch.ones(200, dtype=torch.float64)
    flags = [str(tmp_path / "x.npy"), "--k", "2", "--out", str(out)]
    if weighted:
        weights[:4] = 0
        np.savetxt(tmp_path / "w.txt", weights)
        flags += ["--weights", str(tmp_path / "w.txt")]
    assert cluster(flags) == 0
    clusters = protoclip.Clusters.load(out / "centroids.safetensors")
    within = (rows - clusters.centroids[clusters.labels].double()).square().sum(1) @ weights
    mean = weights @ rows / weights.sum()
    share = 1 - within / ((rows - mean).square().sum(1) @ weights)
    assert 0.5 < share < 1
    summary = read_page(out / "report.html").section("summary").text
    assert f"account for {100 * share:.0f} % of the variance" in summary


def test_the_page_lists_every_member_from_the_nearest_on(photos: Path, out: Path) -> None:
    draw_pictures(photos, 50, "number {}.png")
    cards = group_cards(group(photos, out, 3))
    members = {card["cluster"]: set(card["members"]) for card in cards}
    assert members == groups_of(out)
    rank = {row["file"]: int(row["rank"]) for row in table(out)}
    for card in cards:
        assert [rank[name] for name in card["members"]] == list(range(1, card["samples"] + 1))
        names = [image["caption"] for image in card["images"]]
        assert names == card["members"]  # all as pictures


def nearest_files(out: Path) -> dict[int, str]:
    """The file nearest to each group's centroid, without folders, by the group's number."""
    rows = [row for row in table(out) if row["rank"] == "1"]
    return {int(row["cluster"]): Path(row["file"]).name for row in rows}


def test_groups_have_the_words_of_their_files_as_names(photos: Path, out: Path) -> None:
    for number in range(20):
        draw(photos / f"all/trips/IMG_BeachDay_{number:03}.png", number)
        draw(photos / f"all/scans/{number:03} copy.png", 100 + number)
    rows = np.random.default_rng(0).standard_normal((40, 8))
    rows += [[10 * ("Beach" in key)] for key in ImageFolder(photos).keys]
    page = group(photos, out, rows=rows)
    words = {tuple(sorted(card["words"].split(", "))) for card in group_cards(page)}
    assert words == {("beach", "day", "trips"), ("scans",)}  # not: all, IMG, copy
    assert "from file names" in page.section("prototypes").text
    assert sorted(names_on_the_map(page)) == sorted(card["words"] for card in group_cards(page))


@pytest.mark.parametrize(
    "folders, expected",
    [
        (  # "actions" and "gnome" tell three groups from the others, but not from each other
            ["actions/gnome/mail", "actions/gnome/zoom", "actions/gnome/gimp", "apps", "places",
             "emblems", "panel"],
            ["mail, actions, gnome", "zoom, actions, gnome", "gimp, actions, gnome", "apps",
             "places", "emblems", "panel"],
        ),
        (  # the same words, and no others
            ["trips/1", "trips/2", "scans", "cats", "dogs"],
            ["trips #0", "trips #1", "scans", "cats", "dogs"],
        ),
        (["trips/1", "trips/2", "scans"], ["like", "like", "scans"]),  # most have "trips"
        (["all/trips", "all/scans", "all/dogs"], ["trips", "scans", "dogs"]),
    ],
)  # fmt: skip
def test_the_name_of_a_group_tells_it_from_the_others(
    photos: Path, out: Path, folders: list[str], expected: list[str]
) -> None:
    """Each folder is a group."""
    for number in range(8 * len(folders)):
        draw(photos / folders[number % len(folders)] / f"{number:03}.png", number)
    keys = ImageFolder(photos).keys
    kinds = [int(Path(key).stem) % len(folders) for key in keys]
    page = group(photos, out, len(folders), 10 * np.eye(len(folders), 8)[kinds])
    names = names_on_the_map(page)
    group_of = {row["file"]: int(row["cluster"]) for row in table(out)}
    nearest = nearest_files(out)
    found = {kind: group_of[key] for key, kind in zip(keys, kinds, strict=True)}
    for kind, name in enumerate(expected):
        # A number in a name is the group's, whichever it became.
        number = found[kind]
        words = f"like {nearest[number]}" if name == "like" else name
        assert names[number] == words.replace(f"#{kind}", f"#{number}")
    titles = {card["cluster"]: card["words"] for card in group_cards(page)}
    assert all(titles[group] in (name, "") for group, name in enumerate(names))


def test_groups_without_words_are_called_after_their_most_typical_file(
    photos: Path, out: Path
) -> None:
    draw_pictures(photos, 20, "DSC_{:04}.png")
    page = group(photos, out)
    assert [card["words"] for card in group_cards(page)] == ["", ""]
    nearest = nearest_files(out)
    for card in group_cards(page):
        assert card["like"] == f"like {nearest[card['cluster']]}"
    text = page.section("prototypes").text
    assert "the words that distinguish" not in text and "is called after the nearest" in text


def test_groups_of_rows_without_keys_are_called_after_their_most_typical_row(
    tmp_path: Path, out: Path
) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((2000, 3)))
    assert cluster([str(tmp_path / "x.npy"), "--k", "2", "--out", str(out)]) == 0
    page = read_page(out / "report.html")
    lines = table(out)
    rows = {f"like row {int(row['position']):,}" for row in lines if row["rank"] == "1"}
    assert {card["like"] for card in group_cards(page)} == rows


def test_near_duplicates_are_marked_and_others_are_not(photos: Path, out: Path) -> None:
    draw_pictures(photos, 12)
    original = Image.open(photos / "3.png")
    original.resize((80, 80)).save(photos / "larger.jpg", quality=85)
    original.point(lambda value: min(255, value + 8)).save(photos / "lighter.png")
    original.rotate(90).save(photos / "turned.png")
    page = group(photos, out)
    marked = {}
    for card in group_cards(page):
        for place, first in card["duplicates"].items():
            marked[card["members"][int(place)]] = card["members"][first]
    in_table = {row["file"]: row["duplicate_of"] for row in table(out)}
    assert {file: first for file, first in in_table.items() if first} == marked
    alike = {"3.png", "larger.jpg", "lighter.png"}
    together = [alike & set(card["members"]) for card in group_cards(page)]
    assert len(marked) == sum(max(0, len(names) - 1) for names in together) >= 1
    assert set(marked) | set(marked.values()) <= alike
    words = "1 picture marked ≈ looks" if len(marked) == 1 else "2 pictures marked ≈ look"
    assert words in page.section("summary").text


def test_the_page_names_paths_in_its_command_only(photos: Path, out: Path) -> None:
    draw_pictures(photos, 20)
    page = group(photos, out)
    assert "20 pictures of photos in 2 groups" in page.text
    assert "the rows of x.npz" in page.section("summary").text
    for section in ("summary", "prototypes", "map"):
        assert str(photos.parent) not in page.section(section).text
    assert str(photos.parent) not in page.one("h1").text + page.one("p", class_="answer").text


@pytest.mark.parametrize("sharp, side", [(20, 96), (19, 64)])
def test_pictures_of_any_shape_fill_their_frame(
    photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch, sharp: int, side: int
) -> None:
    """Of many pictures the page has smaller ones."""
    monkeypatch.setattr("protoclip.cluster.page.SHARP", sharp)
    for number in range(20):
        size = [(300, 100), (100, 250), (40, 30)][number % 3]
        draw(photos / f"{number}.png", number)
        Image.open(photos / f"{number}.png").resize(size).save(photos / f"{number}.png")
    pictures = pictures_in(group(photos, out))
    sizes = {Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in pictures}
    assert sizes == {(side, side), (30, 30)}


OPEN_ALL = """<script>
addEventListener("load", () => setTimeout(() => {
  const out = document.createElement("pre"), card = document.querySelector(".proto");
  const button = card.querySelector("button");
  const seen = () => [card.querySelectorAll("img").length, button.getAttribute("aria-expanded")];
  const states = [seen()];
  button.focus();
  for (let i = 0; i < 2; i++) { button.click(); states.push(seen()); }
  out.id = "state";
  out.textContent = JSON.stringify({
    states, focus: document.activeElement === button,
    marks: [...document.querySelectorAll(".proto figure b")].length,
    wide: document.scrollingElement.scrollWidth - innerWidth,
    square: [...card.querySelectorAll("img")].every(i => Math.abs(i.width - i.height) <= 1),
  });
  document.body.append(out);
}, 500));
</script>"""


@needs_browser
def test_a_group_opens_and_closes_by_its_button(photos: Path, out: Path, tmp_path: Path) -> None:
    for number in range(30):
        draw(photos / f"holiday {number}.png", number % 6)  # copies, more than one in a group
    largest = group_cards(group(photos, out))[0]
    state = in_browser(out / "report.html", OPEN_ALL, tmp_path)
    assert state["states"] == [[8, "false"], [largest["samples"], "true"], [8, "false"]]
    assert state["focus"] and state["square"] and state["wide"] <= 0 and state["marks"] > 0


# ---- groups as folders ----


@pytest.mark.parametrize("flag", ["--link-to", "--copy-to"])
def test_groups_as_folders(
    photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    """Names that differ in their case only would be one file on the disk of a camera."""
    names = [f"{folder}/{name}" for folder in "abc" for name in ("x.png", "X.PNG", "x (2).png")]
    names += [f"{number}.png" for number in range(20)]
    for number, name in enumerate(names):
        draw(photos / name, number)
        os.utime(photos / name, (1e9, 1e9))
    of_two_kinds = np.repeat(np.arange(len(names))[:, None] % 2, 2, axis=1)
    flags = known_features(photos, of_two_kinds)
    folder = photos.parent / "new" / "folders"
    monkeypatch.chdir(photos.parent)  # a relative DATA: links must still lead there
    assert cluster(["photos", *flags, "--k", "2", "--out", str(out), flag, str(folder)]) == 0
    groups = groups_of(out)
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1"]
    for number, files in groups.items():
        inside = list((folder / str(number)).iterdir())
        assert len({path.name.casefold() for path in inside}) == len(inside) == len(files)
        originals = {photos / file for file in files}
        contents = sorted(path.read_bytes() for path in originals)
        assert sorted(path.read_bytes() for path in inside) == contents
        if flag == "--link-to":
            assert all(path.is_symlink() for path in inside)
            assert {path.resolve() for path in inside} == originals
        else:
            assert not any(path.is_symlink() for path in inside)
            assert {path.stat().st_mtime for path in inside} == {1e9}


@pytest.fixture
def six_pictures(photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: photos, with features in x.npz and x.npy, and a folder in use."""
    folder = photos.parent
    draw_pictures(photos, 6)
    known_features(photos)
    np.save(folder / "x.npy", np.eye(6))
    (folder / "full").mkdir()
    (folder / "full" / "mine").write_text("mine")
    monkeypatch.chdir(folder)
    return folder


def test_the_rows_of_a_picture_in_a_table_are_one_picture(photos: Path, out: Path) -> None:
    lines = ["filepath,title"]
    for i in range(8):
        draw(photos / f"{i}.png", i)
        lines += [f"{i}.png,{view} of {i}" for view in ("the front", "the back", "a side")]
    (photos / "pairs.csv").write_text("\n".join(lines))
    keys = [f"{i}.png{row}" for i in range(8) for row in ("", "#2", "#3")]
    features = np.random.default_rng(0).standard_normal((24, 8))
    np.savez(photos / "x.npz", features=features, keys=np.array(keys))
    folder = out.parent / "linked"
    flags = ["--features", str(photos / "x.npz"), "--k", "2", "--out", str(out)]
    assert cluster([str(photos / "pairs.csv"), *flags, "--link-to", str(folder)]) == 0
    names = [row["file"] for row in table(out)]
    assert names == [f"{i}.png" for i in range(8)]
    assert sorted(path.name for path in folder.glob("*/*")) == names


PHOTOS = ["photos", "--features", "x.npz"]


@pytest.mark.parametrize("flag", ["--link-to", "--copy-to"])
@pytest.mark.parametrize(
    "data, target, words",
    [
        (PHOTOS, "full", "expected a new or empty folder, but full is in use"),
        (PHOTOS, "full/mine", "expected a new or empty folder"),
        (PHOTOS, "full/mine/x", "but full/mine is a file"),
        (PHOTOS, "/proc/x", "/proc/x cannot be created"),
        (["x.npy"], "new", "expected a folder of pictures or a table of files as DATA"),
        (["builtin:shapes:9"], "new", "expected a folder of pictures or a table of files"),
    ],
)
def test_groups_as_folders_are_refused_before_any_work(
    six_pictures: Path,
    error_of: Callable[..., str],
    flag: str,
    data: list[str],
    target: str,
    words: str,
) -> None:
    error = error_of(cluster, [*data, "--k", "2", flag, target])
    assert f"error: {flag}: " in error and words in error
    assert (six_pictures / "full" / "mine").read_text() == "mine"
    assert not (six_pictures / "new").exists()
    assert not (six_pictures / "groups" / "clusters.csv").exists()


def test_groups_are_linked_or_copied_not_both(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cluster(["photos", "--link-to", "a", "--copy-to", "b"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_disk_without_links_is_told_to_copy(
    six_pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a disk needs rights to mount; its answer is the system's EPERM."""

    def refuse(path: Path, target: str) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    flags = [*PHOTOS, "--k", "2", "--out", "out", "--link-to", "new"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", refuse)
        assert cluster(flags) == 2
    assert "cannot hold links (Operation not permitted); use --copy-to" in capsys.readouterr().err
    assert cluster(flags) == 0  # the folder is still empty


# ---- choose_num_clusters ----


@pytest.fixture
def seven_groups() -> Tensor:
    """700 points around 7 centres."""
    torch.manual_seed(0)
    centres = 5 * torch.randn(7, 8)
    return centres[torch.arange(700) % 7] + 0.3 * torch.randn(700, 8)


def test_the_number_of_groups_has_the_largest_silhouette(seven_groups: Tensor) -> None:
    progress: list[tuple[int, float]] = []
    num_clusters, silhouettes = protoclip.choose_num_clusters(
        seven_groups,
        max_clusters=20,
        progress=lambda number, silhouette: progress.append((number, silhouette)),
    )
    assert num_clusters == 7 == max(silhouettes, key=lambda number: silhouettes[number])
    assert list(silhouettes) == [*range(2, 17), 19]
    assert progress == list(silhouettes.items())


def test_silhouettes_are_scikit_learns(seven_groups: Tensor) -> None:
    _, silhouettes = protoclip.choose_num_clusters(seven_groups, max_clusters=9)
    clusters = protoclip.kmeans(seven_groups, 7, num_iters=10, num_restarts=3, init="k-means++")
    expected = silhouette_score(seven_groups.numpy(), clusters.labels.numpy())
    assert silhouettes[7] == pytest.approx(expected, abs=1e-6)


def test_a_sample_of_the_points_gives_the_same_number_every_time(seven_groups: Tensor) -> None:
    def choose(points: Any) -> tuple[int, dict[int, float]]:
        return protoclip.choose_num_clusters(points, max_clusters=9, max_points=100, seed=3)

    first = choose(seven_groups)
    assert first == choose(seven_groups) == choose(seven_groups.numpy())
    assert first[0] == 7


def test_two_different_points_are_two_groups() -> None:
    points = torch.arange(40)[:, None].fmod(2).expand(-1, 3).float()
    num_clusters, _ = protoclip.choose_num_clusters(points)
    assert num_clusters == 2


WITH_NAN = torch.randn(50, 2).index_fill_(0, torch.tensor(3), math.nan)


@pytest.mark.parametrize(
    "points, most, words",
    [
        (torch.randn(5, 2), 9, "expected at least 6 points, got 5"),
        (torch.ones(50, 2), 9, "expected points that differ"),
        (torch.randn(50), 9, "points"),
        (WITH_NAN, 9, "1 rows with NaN or inf in a sample of 50; the first is row 3"),
        (torch.randn(50, 2), 1, "max_clusters >= 2"),
    ],
    ids=["too few", "all equal", "no matrix", "NaN", "one group"],
)
def test_points_without_groups_are_refused(points: Tensor, most: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        protoclip.choose_num_clusters(points, max_clusters=most)
