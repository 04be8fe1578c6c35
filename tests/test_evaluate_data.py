"""Folders, tables and shards of pictures, end to end; what is wrong with them is said in words."""

import io
import json
import re
import tarfile

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from protoclip.evaluate import __main__ as command
from protoclip.evaluate.datasets import open_layout, read_templates

WORDS = "zero one two three four five six seven eight nine"
NAMES = [f"the digit {word}" for word in WORDS.split(" ")]
MODEL = ["protoclip-tiny", "--pretrained", "random", "--device", "cpu"]

pytestmark = pytest.mark.usefixtures("own_cache")


def digits(count):
    """scikit-learn's digits, as grey pictures and classes."""
    data = load_digits()
    pictures = (data.images[:count] * 15.9).astype("uint8")
    return list(zip(map(Image.fromarray, pictures), data.target[:count].tolist(), strict=True))


def image_folder(root, count=120, parts=("train", "test")):
    for i, (picture, label) in enumerate(digits(count)):
        folder = root / (parts[i % len(parts)] if parts else "") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{i:04}.png")
    return root


def evaluate(tmp_path, *argv):
    """The exit code, and what was written to results.json."""
    output = tmp_path / "out" / "results.json"
    code = command.main([*MODEL, "--output", str(output), *map(str, argv)])
    return code, json.loads(output.read_text()) if output.exists() else None


def evaluated(tmp_path, *argv):
    """The results of a command that works, of its one set."""
    code, content = evaluate(tmp_path, *argv)
    assert code == 0
    return content["trained"]["ALL"]


def test_image_folder_of_digits(tmp_path, capsys):
    got = evaluated(tmp_path, "--data", image_folder(tmp_path / "digits"), "--templates", "simple")
    values = got["metrics"]
    assert got["samples"] == 60 and not [name for name in values if "retrieval" in name]
    assert values["class/lp_acc1"] > 0.4 and values["class/knn_acc1"] > 0.2  # chance: 0.1
    low, high = got["intervals"]["class/lp_acc1"]
    assert low < values["class/lp_acc1"] < high
    for prefix in ("", "lp_", "knn_"):
        assert f"class/{prefix}mean_per_class_recall" in values
        for name in ("acc1", "acc5"):
            low, high = got["intervals"][f"class/{prefix}{name}"]
            assert low <= values[f"class/{prefix}{name}"] <= high
    assert {"class/ari", "class/ami", "class/nmi", "class/acc5"} <= set(values)
    printed = capsys.readouterr().out
    assert "linear probe class" in printed and "Without retrieval: the data has no" in printed


def test_folder_without_splits_teaches_probes_on_four_fifths(tmp_path):
    root = image_folder(tmp_path / "digits", parts=())
    assert evaluated(tmp_path, "--data", root, "--tasks", "knn,zeroshot")["samples"] == 120
    layout = open_layout(str(root))
    assert layout.train is None and layout.test.labels["class"].names == tuple("0123456789")


def test_records_of_clip_benchmark_stand_beside_the_results(tmp_path):
    """And the paper's probe names its best test epoch."""
    root = image_folder(tmp_path / "digits")
    (root / "classnames.txt").write_text("\n".join(NAMES))
    (tmp_path / "words.txt").write_text("a photo of {c}.\n{c}\n")
    flags = ["--tasks", "zeroshot,linear_probe", "--templates", tmp_path / "words.txt"]
    values = evaluated(tmp_path, "--data", root, *flags, "--protocol", "paper")["metrics"]
    assert 1 <= values["class/lp_best_epoch"] <= 100 and values["class/lp_acc1"] > 0.15
    folder = tmp_path / "out" / "clip_benchmark"
    record = json.loads(next(folder.glob("*_zeroshot_classification.json")).read_text())
    assert list(record) == ["dataset", "model", "pretrained", "task", "metrics", "language"]
    assert record["dataset"] == str(root) and record["language"] == "en"
    names = ("acc1", "acc5", "mean_per_class_recall")
    assert record["metrics"] == {name: values[f"class/{name}"] for name in names}
    probe = json.loads(next(folder.glob("*_linear_probe.json")).read_text())["metrics"]
    assert {"lp_acc1", "lp_acc5", "weight_decay", "fewshot_k", "normalized"} <= set(probe)


def test_retrieval_shards_with_several_captions(tmp_path):
    root = tmp_path / "wds"
    root.mkdir()
    with tarfile.open(root / "0.tar", "w") as tar:
        for i, (picture, label) in enumerate(digits(30)):
            stream = io.BytesIO()
            picture.save(stream, "png")
            captions = f"{NAMES[label]}\na drawing of {label}, number {i}\n"
            for ending, data in (("png", stream.getvalue()), ("txt", captions.encode())):
                info = tarfile.TarInfo(f"s{i:07}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    code, content = evaluate(tmp_path, "--data", root)
    got = content["trained"]["ALL"]
    assert code == 0 and (got["samples"], got["captions"]) == (30, 60)
    (record,) = (tmp_path / "out" / "clip_benchmark").iterdir()
    assert json.loads(record.read_text())["task"] == "zeroshot_retrieval"
    assert evaluate(tmp_path, "--data", root, "--tasks", "zeroshot")[0] == 2


def test_table_with_a_label_column(tmp_path):
    lines = ["filepath,title,digit"]
    for i, (picture, label) in enumerate(digits(40)):
        picture.save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{NAMES[label]},{label}")
    table = tmp_path / "pairs.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-16")
    flags = ["--csv-separator", ",", "--csv-label-key", "digit", "--tasks", "zeroshot,retrieval"]
    values = evaluated(tmp_path, "--data", table, *flags, "--encoding", "utf-16")["metrics"]
    assert "class/acc1" in values and "text_retrieval_recall@5" in values


def test_the_bar_ends_at_its_total_and_is_drawn_on_terminals_only(tmp_path, monkeypatch, capsys):
    flags = ["--data", image_folder(tmp_path / "digits", 30), "--tasks", "zeroshot,knn"]
    assert evaluate(tmp_path, *flags)[0] == 0 and capsys.readouterr().err == ""
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    assert evaluate(tmp_path, *flags)[0] == 0
    shares = re.findall(r"(\d+)%\|", screen.getvalue())
    counts = re.findall(r"(\d+)/(\d+) \[", screen.getvalue())
    assert shares[-1] == "100" and counts[-1][0] == counts[-1][1] and int(counts[-1][0]) > 30


def test_templates_and_imagenet_names(tmp_path):
    assert len(read_templates("openai")) == 80 and len(read_templates("simple")) == 7
    assert "a bad photo of a {}." in read_templates("openai")
    (tmp_path / "t.txt").write_text("a {c}\nno place for it\n")
    with pytest.raises(ValueError, match="one template a line"):
        read_templates(str(tmp_path / "t.txt"))
    for i in range(1000):
        (tmp_path / "imagenet" / f"n{i:08}").mkdir(parents=True)
    Image.new("L", (2, 2)).save(tmp_path / "imagenet" / "n00000001" / "a.png")
    names = open_layout(str(tmp_path / "imagenet")).test.labels["class"].names
    assert names[:2] == ("tench", "goldfish")


# What is refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--templates", "nowhere.txt"], "--templates: expected openai, simple or a file"),
        (["--split", "holdout"], "--split holdout: no folder"),
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
def test_mistakes_are_refused_in_words(tmp_path, capsys, flags, words):
    flags = [*MODEL, *flags] if flags[0].startswith("--") else flags
    data = ["--data", str(image_folder(tmp_path / "digits", 20))]
    code = command.main([*data, *flags, "--output", str(tmp_path / "results.json")])
    message = capsys.readouterr().err
    assert code == 2 and words in message and "Traceback" not in message
    assert not (tmp_path / "results.json").exists()


def test_folders_are_refused_in_words(tmp_path, capsys):
    (tmp_path / "empty" / "test" / "cat").mkdir(parents=True)
    (tmp_path / "flat").mkdir()
    names = image_folder(tmp_path / "ten", 20) / "classnames.txt"
    names.write_text("zero\none\n")
    cases = {"empty": "as CLASS/picture", "flat": "no class folders", "ten": "the 10 class"}
    for name, words in cases.items():
        assert evaluate(tmp_path, "--data", tmp_path / name)[0] == 2
        assert words in capsys.readouterr().err
    names.unlink()
    (tmp_path / "ten" / "test" / "1" / "torn.png").write_bytes(b"no picture")
    assert evaluate(tmp_path, "--data", tmp_path / "ten")[0] == 2
    assert "torn.png" in capsys.readouterr().err
