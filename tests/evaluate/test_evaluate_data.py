"""Folders, tables and shards of pictures, end to end; what is wrong with them is said in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pairs import encoded, write_tar
from PIL import Image
from sklearn.datasets import load_digits

from protoclip.common.waits import Wait
from protoclip.evaluate import __main__ as command
from protoclip.evaluate.datasets import open_layout, read_templates
from protoclip.model import build_model
from protoclip.settings.config import ModelConfig

WORDS = "zero one two three four five six seven eight nine"
NAMES = [f"the digit {word}" for word in WORDS.split(" ")]
MODEL = ["protoclip-tiny", "--pretrained", "random", "--device", "cpu"]

pytestmark = pytest.mark.usefixtures("own_cache")


class Digit(NamedTuple):
    picture: Image.Image  # grey
    label: int


def digits(count: int) -> list[Digit]:
    """scikit-learn's."""
    data = load_digits()
    pictures = (data.images[:count] * 15.9).astype("uint8")
    labels = data.target[:count].tolist()
    return [
        Digit(Image.fromarray(pixels), label)
        for pixels, label in zip(pictures, labels, strict=True)
    ]


def image_folder(root: Path, count: int = 120, parts: tuple[str, ...] = ("train", "test")) -> Path:
    """Pictures in PART/CLASS or, without parts, in CLASS."""
    for i, digit in enumerate(digits(count)):
        part = root / parts[i % len(parts)] if parts else root
        folder = part / str(digit.label)
        folder.mkdir(parents=True, exist_ok=True)
        digit.picture.save(folder / f"{i:04}.png")
    return root


class Evaluation(NamedTuple):
    code: int
    results: dict[str, Any]  # of the one set; empty if nothing was written


def evaluate(output_folder: Path, data: Path, *flags: str) -> Evaluation:
    output = output_folder / "out" / "results.json"
    code = command.main([*MODEL, "--output", str(output), "--data", str(data), *flags])
    if not output.exists():
        return Evaluation(code, {})
    return Evaluation(code, json.loads(output.read_text())["trained"]["ALL"])


def test_an_image_folder_is_classified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = image_folder(tmp_path / "digits")
    code, results = evaluate(tmp_path, root, "--templates", "simple")
    assert code == 0 and results["samples"] == 60
    values = results["metrics"]
    assert values["class/lp_acc1"] > 0.4 and values["class/knn_acc1"] > 0.2  # chance: 0.1
    assert {"class/ari", "class/ami", "class/nmi", "class/acc5"} <= set(values)
    assert not [name for name in values if "retrieval" in name]
    low, high = results["intervals"]["class/lp_acc1"]
    assert low < values["class/lp_acc1"] < high
    for prefix in ("", "lp_", "knn_"):
        assert f"class/{prefix}mean_per_class_recall" in values
        for metric in ("acc1", "acc5"):
            name = f"class/{prefix}{metric}"
            low, high = results["intervals"][name]
            assert low <= values[name] <= high
    printed = capsys.readouterr().out
    assert "linear probe class" in printed and "Without retrieval: the data has no" in printed


def test_a_folder_without_splits_teaches_probes_on_four_fifths(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "digits", parts=())
    code, results = evaluate(tmp_path, root, "--tasks", "knn,zeroshot")
    assert code == 0 and results["samples"] == 120
    layout = open_layout(str(root))
    assert layout.train is None and layout.test.labels["class"].names == tuple("0123456789")


def test_records_of_clip_benchmark_stand_beside_the_results(tmp_path: Path) -> None:
    """And the paper's probe names its best test epoch."""
    root = image_folder(tmp_path / "digits")
    (root / "classnames.txt").write_text("\n".join(NAMES))
    templates = tmp_path / "words.txt"
    templates.write_text("a photo of {c}.\n{c}\n")
    code, results = evaluate(
        tmp_path, root, "--tasks", "zeroshot,linear_probe", "--templates", str(templates),
        "--protocol", "paper",
    )  # fmt: skip
    values = results["metrics"]
    assert code == 0
    assert 1 <= values["class/lp_best_epoch"] <= 100 and values["class/lp_acc1"] > 0.15
    folder = tmp_path / "out" / "clip_benchmark"
    record = json.loads(next(folder.glob("*_zeroshot_classification.json")).read_text())
    assert list(record) == ["dataset", "model", "pretrained", "task", "metrics", "language"]
    assert record["dataset"] == str(root) and record["language"] == "en"
    names = ("acc1", "acc5", "mean_per_class_recall")
    assert record["metrics"] == {name: values[f"class/{name}"] for name in names}
    probe = json.loads(next(folder.glob("*_linear_probe.json")).read_text())["metrics"]
    assert {"lp_acc1", "lp_acc5", "weight_decay", "fewshot_k", "normalized"} <= set(probe)


@pytest.fixture
def captioned_shard(tmp_path: Path) -> Path:
    """The folder of a shard of thirty pictures with two captions each, and no classes."""
    members = []
    for i, digit in enumerate(digits(30)):
        captions = f"{NAMES[digit.label]}\na drawing of {digit.label}, number {i}\n"
        members.append((f"s{i:07}.png", encoded(digit.picture)))
        members.append((f"s{i:07}.txt", captions.encode()))
    root = tmp_path / "wds"
    root.mkdir()
    write_tar(root / "0.tar", members)
    return root


def test_a_shard_with_several_captions_has_retrieval(tmp_path: Path, captioned_shard: Path) -> None:
    code, results = evaluate(tmp_path, captioned_shard)
    assert code == 0 and results["samples"] == 30 and results["captions"] == 60
    (record,) = (tmp_path / "out" / "clip_benchmark").iterdir()
    assert json.loads(record.read_text())["task"] == "zeroshot_retrieval"


def test_a_shard_without_classes_has_no_zero_shot(tmp_path: Path, captioned_shard: Path) -> None:
    assert evaluate(tmp_path, captioned_shard, "--tasks", "zeroshot").code == 2


def test_a_table_with_a_label_column_has_both(tmp_path: Path) -> None:
    lines = ["filepath,title,digit"]
    for i, digit in enumerate(digits(40)):
        digit.picture.save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{NAMES[digit.label]},{digit.label}")
    table = tmp_path / "pairs.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-16")
    code, results = evaluate(
        tmp_path, table, "--csv-separator", ",", "--csv-label-key", "digit",
        "--tasks", "zeroshot,retrieval", "--encoding", "utf-16",
    )  # fmt: skip
    assert code == 0
    assert {"class/acc1", "text_retrieval_recall@5"} <= set(results["metrics"])


def test_rows_without_a_class_are_of_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["filepath,title,digit"]
    for i, digit in enumerate(digits(40)):
        digit.picture.save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{NAMES[digit.label]},{digit.label if i % 2 else ' '}")
    table = tmp_path / "pairs.csv"
    table.write_text("\n".join(lines))
    labels = open_layout(str(table), csv_label_key="digit").test.labels["class"]
    assert "" not in labels.names and labels.ids[::2].tolist() == [-1] * 20
    assert [labels.names[i] for i in labels.ids[1::2]] == [
        str(digit.label) for digit in digits(40)[1::2]
    ]
    code, results = evaluate(tmp_path, table, "--csv-label-key", "digit", "--tasks", "zeroshot,knn")
    assert code == 0 and 0 <= results["metrics"]["class/nn_acc1"] <= 1
    without = [f"{line.rpartition(',')[0]}," for line in lines[1:]]
    table.write_text("\n".join([lines[0], *without]))
    assert evaluate(tmp_path, table, "--csv-label-key", "digit").code == 2
    assert "'digit', but it is empty in every row" in capsys.readouterr().err


def test_no_evaluation_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["a/b", "a_b", "写真", "画像", f"{'d' * 120}/{'e' * 120}"]
    for name in names:
        image_folder(Path(name), 12, parts=("val", "test"))
    calls = [["--data", name] for name in names]
    calls += [["--data", "a_b", *flags] for flags in (["--split", "val"], ["--split", "test"])]
    calls += [["--data", "a_b", "--templates", "this is {}"], ["--data", "a_b/val/.."]]
    for number, flags in enumerate(calls, 1):
        for _ in range(2 if number < 3 else 1):  # the same one again replaces its own
            assert command.main([*MODEL, "--tasks", "zeroshot", "--templates", "{}", *flags]) == 0
        written = {json.loads(path.read_text())["data"] for path in tmp_path.glob("*.json")}
        assert len(list(tmp_path.glob("*.json"))) == number, flags
    assert written == {*names, "a_b/val/.."}


def test_weights_of_a_config_are_told_apart(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(nano, "mine.json")
    image_folder(Path("digits"), 12, parts=())
    model = build_model(ModelConfig(model="mine.json", add_projection_head=False))
    for name in ("w1.pt", "w2.pt"):
        torch.save(model.clip.state_dict(), name)
    for name in ("w1.pt", "w2.pt", "w1.pt"):
        flags = ["mine.json", "--pretrained", name, "--data", "digits", "--tasks", "zeroshot"]
        assert command.main(flags) == 0
    written = [json.loads(path.read_text()) for path in tmp_path.glob("mine-results-*.json")]
    assert sorted(results["pretrained"] for results in written) == ["w1.pt", "w2.pt"]


def test_data_without_a_letter_leaves_the_runs_own_results(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    before = (run / "results.json").read_bytes()
    monkeypatch.chdir(image_folder(tmp_path / "digits", 12, parts=()))
    assert command.main([str(run), "--data", ".", "--device", "cpu"]) == 0
    assert (run / "results.json").read_bytes() == before
    assert len(list(run.glob("results-*.json"))) == 1


def test_every_part_of_the_wait_is_counted_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no bar is drawn in a redirected stderr."""
    parts: list[tuple[str, int, int | None]] = []
    original_restart, original_exit = Wait.restart, Wait.__exit__

    def note(wait: Wait) -> None:
        if wait.note in ("pictures", "texts"):
            parts.append((wait.note, wait.done, wait.total))

    def restart(wait: Wait, total: int, what: str) -> None:
        note(wait)
        original_restart(wait, total, what)

    def end(wait: Wait, *error: object) -> None:
        note(wait)
        original_exit(wait, *error)

    monkeypatch.setattr(Wait, "restart", restart)
    monkeypatch.setattr(Wait, "__exit__", end)
    root = image_folder(tmp_path / "digits", 30)
    assert evaluate(tmp_path, root, "--tasks", "zeroshot,knn").code == 0
    assert {what for what, *_ in parts} == {"pictures", "texts"}
    assert all(done == total for _, done, total in parts)
    assert parts[-1] == ("pictures", 15, 15)
    assert capsys.readouterr().err == ""


def test_named_templates_are_open_clips() -> None:
    assert len(read_templates("openai")) == 80 and len(read_templates("simple")) == 7
    assert "a bad photo of a {}." in read_templates("openai")


def test_a_template_without_a_place_is_refused(tmp_path: Path) -> None:
    templates = tmp_path / "t.txt"
    templates.write_text("a {c}\nno place for it\n")
    with pytest.raises(ValueError, match="one template a line"):
        read_templates(str(templates))


def test_a_thousand_folders_of_imagenet_have_their_names(tmp_path: Path) -> None:
    for i in range(1000):
        (tmp_path / "imagenet" / f"n{i:08}").mkdir(parents=True)
    Image.new("L", (2, 2)).save(tmp_path / "imagenet" / "n00000001" / "a.png")
    names = open_layout(str(tmp_path / "imagenet")).test.labels["class"].names
    assert names[:2] == ("tench", "goldfish")


def test_a_probe_is_not_trained_on_the_pictures_that_it_is_tested_on(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "digits", 40)
    assert len(open_layout(str(root), split="test").train) == 20
    assert open_layout(str(root), split="train").train is None


# What is refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--templates", "nowhere.txt"], "--templates: expected openai, simple or a file"),
        (["--split", "holdout"], "--split holdout: no folder"),
        (["--data", "builtin:shapes:64", "--split", "val"], "--split: expected a folder of pict"),
        (["--csv-label-key", "class"], "--csv-label-key: expected a table, got"),
        (["--tasks", "zeroshot,cooking"], "got 'cooking'"),
        (["--tasks", "retrieval"], "no captions"),
        (["--device", "cuda:9"], "got cuda:9; use --device auto"),
        (["--data", "none.csv"], "none.csv"),
        (["ViT-B-23"], "did you mean"),
        (["ViT-B-32"], "--pretrained is missing"),
        (["ViT-B-32", "--pretrained", "nothing"], "a tag of ViT-B-32"),
        (["no/such/run"], "found nothing"),
    ],
)
def test_mistakes_are_refused_in_words(
    tmp_path: Path, error_of: Callable[..., str], flags: list[str], words: str
) -> None:
    flags = [*MODEL, *flags] if flags[0].startswith("--") else flags
    data = ["--data", str(image_folder(tmp_path / "digits", 20))]
    assert words in error_of(command.main, [*data, *flags, "--output", tmp_path / "results.json"])
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("flags", [[], ["--tasks", "knn"]], ids=["all", "some"])
def test_a_file_that_is_no_results_is_kept(
    tmp_path: Path, error_of: Callable[..., str], flags: list[str]
) -> None:
    data = image_folder(tmp_path / "digits", 20)
    notes = tmp_path / "notes.json"
    notes.write_text('{"milk": 2}')
    error = error_of(command.main, [*MODEL, "--data", data, "--output", notes, *flags])
    assert "choose another --out" in error
    assert notes.read_text() == '{"milk": 2}'


def assert_refused(error_of: Callable[..., str], root: Path, out: Path, words: str) -> None:
    assert words in error_of(command.main, [*MODEL, "--data", root, "--output", out / "r.json"])


def test_a_class_without_pictures_is_refused(tmp_path: Path, error_of: Callable[..., str]) -> None:
    (tmp_path / "data" / "test" / "cat").mkdir(parents=True)
    assert_refused(error_of, tmp_path / "data", tmp_path, "as CLASS/picture")


def test_a_folder_without_classes_is_refused(tmp_path: Path, error_of: Callable[..., str]) -> None:
    (tmp_path / "data").mkdir()
    assert_refused(error_of, tmp_path / "data", tmp_path, "no class folders")


def test_too_few_class_names_are_refused(tmp_path: Path, error_of: Callable[..., str]) -> None:
    root = image_folder(tmp_path / "data", 20)
    (root / "classnames.txt").write_text("zero\none\n")
    assert_refused(error_of, root, tmp_path, "the 10 class")


def test_a_torn_picture_is_named(tmp_path: Path, error_of: Callable[..., str]) -> None:
    root = image_folder(tmp_path / "data", 20)
    (root / "test" / "1" / "torn.png").write_bytes(b"no picture")
    assert_refused(error_of, root, tmp_path, "torn.png")
