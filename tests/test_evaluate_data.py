"""Folders, tables and shards of pictures, end to end."""

import io
import json
import re

import pytest
import torch
from evaluation_data import NAMES, digits, evaluate, image_folder, png, shard
from PIL import Image
from safetensors.torch import load_file, save_file

from protoclip.evaluate import open_layout
from protoclip.evaluate.__main__ import load_model
from protoclip.evaluate.datasets import read_templates
from protoclip.evaluate.tasks import dataset_hash, model_hash


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("protoclip.evaluate.tasks.cache_dir", lambda: tmp_path / "cache")


def test_image_folder_of_digits(tmp_path, capsys):
    root = image_folder(tmp_path / "digits")
    code, content = evaluate(tmp_path, "--data", root, "--templates", "simple")
    assert code == 0
    got = content["trained"]["sets"]["ALL"]
    values = got["metrics"]
    assert got["samples"] == 60 and not [name for name in values if "retrieval" in name]
    assert values["class/lp_acc1"] > 0.4 and values["class/knn_acc1"] > 0.2  # chance: 0.1
    low, high = got["intervals"]["class/lp_acc1"]
    assert low < values["class/lp_acc1"] < high
    for prefix in ("", "lp_", "knn_"):
        for name in ("acc1", "acc5", "mean_per_class_recall"):
            low, high = got["intervals"][f"class/{prefix}{name}"]
            assert low <= values[f"class/{prefix}{name}"] <= high
    assert {"class/ari", "class/ami", "class/nmi", "class/acc5"} <= set(values)
    printed = capsys.readouterr().out
    assert "linear probe class" in printed and "Without retrieval: the data has no" in printed


def test_folder_without_splits_teaches_probes_on_four_fifths(tmp_path):
    root = image_folder(tmp_path / "digits", parts=())
    code, content = evaluate(tmp_path, "--data", root, "--tasks", "knn,zeroshot")
    assert code == 0
    assert content["trained"]["sets"]["ALL"]["samples"] == 120
    layout = open_layout(str(root))
    assert layout.train is None and layout.test.labels["class"].names == tuple("0123456789")


def test_paper_protocol_reports_its_best_test_epoch(tmp_path):
    root = image_folder(tmp_path / "digits")
    flags = ["--tasks", "linear_probe", "--protocol", "paper"]
    code, content = evaluate(tmp_path, "--data", root, *flags)
    values = content["trained"]["sets"]["ALL"]["metrics"]
    assert (
        code == 0 and 1 <= values["class/lp_best_epoch"] <= 100 and values["class/lp_acc1"] > 0.15
    )


def test_records_of_clip_benchmark_stand_beside_the_results(tmp_path):
    root = image_folder(tmp_path / "digits", 60)
    (root / "classnames.txt").write_text("\n".join(NAMES))
    (tmp_path / "words.txt").write_text("a photo of {c}.\n{c}\n")
    tasks = ["--tasks", "zeroshot,linear_probe", "--templates", tmp_path / "words.txt"]
    code, content = evaluate(tmp_path, "--data", root, *tasks)
    folder = tmp_path / "out" / "clip_benchmark"
    record = json.loads(next(folder.glob("*_zeroshot_classification.json")).read_text())
    assert code == 0 and record in content["clip_benchmark"]
    assert list(record) == ["dataset", "model", "pretrained", "task", "metrics", "language"]
    assert record["dataset"] == str(root) and record["language"] == "en"
    assert set(record["metrics"]) == {"acc1", "acc5", "mean_per_class_recall"}
    probe = json.loads(next(folder.glob("*_linear_probe.json")).read_text())["metrics"]
    assert {"lp_acc1", "lp_acc5", "weight_decay", "fewshot_k", "normalized"} <= set(probe)


def test_retrieval_shards_with_several_captions(tmp_path):
    pictures, ids = digits(30)
    members = []
    for i, (picture, label) in enumerate(zip(pictures, ids, strict=True)):
        captions = f"{NAMES[label]}\na drawing of {label}, number {i}\n"
        members += [(f"s{i:07}.png", png(picture)), (f"s{i:07}.txt", captions.encode())]
    root = tmp_path / "wds"
    shard(root / "0.tar", members)
    code, content = evaluate(tmp_path, "--data", root)
    got = content["trained"]["sets"]["ALL"]
    assert code == 0 and (got["samples"], got["captions"]) == (30, 60)
    records = [r["task"] for r in content["clip_benchmark"]]
    assert records == ["zeroshot_retrieval"]
    code, _ = evaluate(tmp_path, "--data", root, "--tasks", "zeroshot")
    assert code == 2


def test_table_with_a_label_column(tmp_path):
    pictures, ids = digits(40)
    lines = ["filepath,title,digit"]
    for i, (picture, label) in enumerate(zip(pictures, ids, strict=True)):
        picture.save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{NAMES[label]},{label}")
    table = tmp_path / "pairs.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-16")
    flags = ["--csv-separator", ",", "--csv-label-key", "digit", "--tasks", "zeroshot,retrieval"]
    flags += ["--encoding", "utf-16"]
    code, content = evaluate(tmp_path, "--data", table, *flags)
    values = content["trained"]["sets"]["ALL"]["metrics"]
    assert code == 0 and "class/acc1" in values and "text_retrieval_recall@5" in values


def test_grey_transparent_and_one_pixel_pictures(tmp_path):
    for mode, size in (("L", (9, 7)), ("RGBA", (5, 5)), ("RGB", (1, 1)), ("P", (1, 3))):
        folder = tmp_path / "odd" / mode
        folder.mkdir(parents=True)
        Image.new(mode, size).save(folder / "a.png")
        Image.new(mode, size, 3).save(folder / "b.png")
    code, content = evaluate(tmp_path, "--data", tmp_path / "odd", "--tasks", "zeroshot,geometry")
    assert code == 0 and content["trained"]["sets"]["ALL"]["samples"] == 8


def test_local_dir_is_the_model_that_was_saved(tmp_path):
    model = load_model("protoclip-tiny", "random").model
    config = {
        "model_cfg": json.loads(_tiny_config().read_text()),
        "preprocess_cfg": {"mean": list(model.mean), "std": list(model.std)},
    }
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(model.clip.state_dict(), tmp_path / "m" / "open_clip_pytorch_model.bin")
    again = load_model(f"local-dir:{tmp_path / 'm'}").model
    assert model_hash(again.clip) == model_hash(model.clip)


def _tiny_config():
    from protoclip.model import CONFIG_FOLDER

    return CONFIG_FOLDER / "protoclip-tiny.json"


def test_features_are_cached_by_model_and_data(tmp_path, capsys):
    root = image_folder(tmp_path / "digits", 30)
    flags = ["--data", root, "--tasks", "zeroshot,knn"]
    first = evaluate(tmp_path, *flags)[1]["trained"]["sets"]["ALL"]["metrics"]
    assert "rows of features came from" not in capsys.readouterr().out
    again = evaluate(tmp_path, *flags)[1]["trained"]["sets"]["ALL"]["metrics"]
    assert first == again and "rows of features came from" in capsys.readouterr().out
    evaluate(tmp_path, *flags, "--no-cache")
    assert "rows of features came from" not in capsys.readouterr().out
    for path in tmp_path.glob("cache/features/*"):
        path.write_bytes(b"damaged")
    assert evaluate(tmp_path, *flags)[1]["trained"]["sets"]["ALL"]["metrics"] == first


def test_cached_features_of_other_data_are_refused_by_name(tmp_path, capsys):
    root = image_folder(tmp_path / "digits", 30)
    flags = ["--data", root, "--tasks", "zeroshot"]
    evaluate(tmp_path, *flags)
    path = max(tmp_path.glob("cache/features/image-*"))
    save_file({"features": load_file(path)["features"][1:]}, path)
    (tmp_path / "out" / "results.json").unlink()
    code, content = evaluate(tmp_path, *flags)
    message = capsys.readouterr().err
    assert code == 2 and content is None
    assert path.name in message and "15 rows" in message and "got 14" in message
    assert evaluate(tmp_path, *flags, "--no-cache")[0] == 0


class Terminal(io.StringIO):
    """A stderr that says it is a screen."""

    def isatty(self):
        return True


@pytest.mark.parametrize("cached", [False, True])
def test_the_bar_ends_at_its_total_and_is_drawn_on_terminals_only(
    tmp_path, monkeypatch, capsys, cached
):
    root = image_folder(tmp_path / "digits", 30)
    flags = ["--data", root, "--tasks", "zeroshot,knn"]
    if cached:
        evaluate(tmp_path, *flags)
        assert capsys.readouterr().err == ""
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    assert evaluate(tmp_path, *flags)[0] == 0
    shares = re.findall(r"(\d+)%\|", screen.getvalue())
    counts = re.findall(r"(\d+)/(\d+) \[", screen.getvalue())
    assert shares[-1] == "100" and counts[-1][0] == counts[-1][1] and int(counts[-1][0]) > 30


def test_hashes_tell_models_and_data_apart(tmp_path):
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    b.load_state_dict(a.state_dict())
    assert model_hash(a) == model_hash(b)
    with torch.no_grad():
        b.bias[0] += 1e-6
    assert model_hash(a) != model_hash(b)
    root = image_folder(tmp_path / "digits", 20, parts=())
    before = dataset_hash(open_layout(str(root)).test)
    assert before == dataset_hash(open_layout(str(root)).test)
    next(root.rglob("*.png")).write_bytes(png(Image.new("L", (4, 4))))
    assert before != dataset_hash(open_layout(str(root)).test)


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
