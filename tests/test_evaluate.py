"""Evaluation sets, their scores, the command, the table people read and the JSON programs read."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from protoclip import checkpoint
from protoclip.config import ModelConfig
from protoclip.data import Labels, Subset
from protoclip.data.images import hog
from protoclip.evaluate import metrics
from protoclip.evaluate.__main__ import main
from protoclip.evaluate.datasets import class_prompts, open_layout
from protoclip.evaluate.results import (
    Outcome,
    SetResults,
    format_table,
    read_results,
    write_results,
)
from protoclip.evaluate.tasks import Encoder, EvalSet, encode_sets, evaluate_features, floors, take
from protoclip.model import build_model

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(ModelConfig())


def test_scores_are_those_of_the_metrics():
    g = torch.Generator().manual_seed(0)
    centre = 3 * torch.randn(6, 8, generator=g)
    ids = torch.randint(0, 6, (120,), generator=g)
    labels = {"group": Labels(ids, tuple("abcdef"))}
    image = centre[ids] + 0.3 * torch.randn(120, 8, generator=g)
    text = image + torch.randn(120, 8, generator=g)
    rows = torch.arange(120)
    one = EvalSet(image, text, rows, labels, {"group": centre})
    train = take(one, range(119, -1, -1))
    unfit = frozenset({("group", "linear_probe"), ("group", "knn"), ("group", "grouping")})
    seen = EvalSet(image, text, rows, labels, {"group": centre}, skip=unfit, title="Seen")
    results = evaluate_features({"A": one, "B": seen}, train)
    got = results["A"].metrics
    for name, hits in metrics.recalls(metrics.retrieval(image, text)).items():
        assert got[name] == pytest.approx(float(hits.mean()))
    guesses = metrics.zero_shot_logits(image, centre).argmax(1)
    assert got["group/acc1"] == pytest.approx(float((guesses == ids).double().mean()))
    assert got["group/lp_acc1"] == got["group/knn_acc1"] == got["group/nn_acc1"] == 1
    assert got["group/ami"] > 0.9  # three k-means, one start each: not always the best one
    assert got["modality_gap"] == metrics.modality_gap(image, text)
    low, high = results["A"].intervals["text_retrieval_recall@5"]
    assert low < got["text_retrieval_recall@5"] < high
    left_out = ("lp_", "nn_", "ami")
    assert not [name for name in results["B"].metrics if any(x in name for x in left_out)]
    assert "group/acc1" in results["B"].metrics
    assert results["B"].title == "Seen"


def test_a_class_that_is_not_known_is_not_judged():
    """-1 is no class: neither a wrong answer nor a neighbour, and no group of its own."""
    g = torch.Generator().manual_seed(0)
    ids = torch.arange(40) % 4
    image = torch.eye(4)[ids] + 0.01 * torch.randn(40, 4, generator=g)
    unknown = torch.cat([ids, torch.full((40,), -1)])
    both = torch.cat([image, torch.randn(40, 4, generator=g)])
    parts = []
    for rows, known in ((image, ids), (both, unknown)):
        labels = {"kind": Labels(known, tuple("abcd"))}
        one = EvalSet(rows, rows[:0], labels=labels, class_vectors={"kind": torch.eye(4)})
        metrics_of = evaluate_features({"A": one}, one)["A"].metrics
        parts.append({k: v for k, v in metrics_of.items() if k.startswith("kind/")})
    assert parts[0] == pytest.approx(parts[1], nan_ok=True)
    assert parts[0]["kind/acc1"] == parts[0]["kind/nn_acc1"] == 1


def test_zero_shot_among_the_classes_of_the_set():
    ids, vectors = torch.tensor([5, 2, 5]), torch.eye(3)[:2]
    one = EvalSet(
        torch.eye(3)[[1, 0, 0]], torch.empty(0, 3), labels={"kind": Labels(ids, tuple("abcdef"))},
        class_vectors={"kind": vectors}, choices={"kind": torch.tensor([2, 5])},
    )  # fmt: skip
    rows, judged = one.among("kind")
    assert rows.tolist() == [0, 1, 2] and judged.ids.tolist() == [1, 0, 1]
    assert judged.names == ("c", "f")
    got = evaluate_features({"A": one}, tasks=("zeroshot",))["A"].metrics
    assert got["kind/acc1"] == pytest.approx(2 / 3)


def test_class_prompts_are_readable():
    groups = class_prompts("group", ["red-star", "flags"], ("a picture of {}", "{}"))
    assert groups[0] == ["a picture of red star", "red star"]
    assert groups[1] == ["a picture of flags", "flags"]
    assert class_prompts("class", ["red-star"], ("{}",)) == [["red-star"]]


def test_icon_sets_are_parts_of_the_held_out_icons(model):
    """NEW: an unseen family draws concepts that were trained on; HO: concepts that were not."""
    layout = open_layout("builtin:icons")
    train, held = layout.train, set(layout.test.keys)
    trained = set(train.labels["concept"].ids.tolist())
    drawn = {key: part.test for key, part in layout.parts.items()}
    assert all(key in held for part in drawn.values() for key in part.keys)
    assert all(key.startswith("lucide/") for key in drawn["NEW"].keys)
    assert set(drawn["NEW"].labels["concept"].ids.tolist()) <= trained
    concepts = drawn["HO"].labels["concept"].ids.tolist()
    assert not set(concepts) & trained
    families = {}
    for concept, key in zip(concepts, drawn["HO"].keys, strict=True):
        families.setdefault(concept, set()).add(key.partition("/")[0])
    assert min(map(len, families.values())) == 2 and len(families) > 50
    assert len(drawn["NEW"]) > 400

    few = {  # enough to see that each is encoded
        key: dataclasses.replace(part, test=Subset(part.test, range(0, len(part.test), 9)))
        for key, part in layout.parts.items()
    }
    few_train = Subset(train, range(0, len(train), 99))
    layout = dataclasses.replace(layout, train=few_train, parts=few)
    encoder = Encoder(model, CPU)
    sets, probe_train = encode_sets(encoder, layout)
    for key, one in sets.items():
        dataset = few[key].test
        torch.testing.assert_close(one.image, encoder.images(dataset))
        texts = [dataset.captions(i)[0] for i in range(len(dataset))]
        if key == "NEW":  # drawings of new concepts share their captions: no retrieval
            torch.testing.assert_close(one.text, encoder.texts(texts))
        else:
            assert len(one.text) == 0
        present = dataset.labels["concept"].ids.unique()
        assert torch.equal(one.choices["concept"], present)
        assert len(one.class_vectors["concept"]) == len(present)
    torch.testing.assert_close(probe_train.image, encoder.images(few_train))
    found = {key: set(one.metrics) for key, one in evaluate_features(sets, probe_train).items()}
    assert {"concept/acc1", "concept/nn_acc1", "category/knn_acc1"} <= found["NEW"]
    assert "concept/ami" not in found["NEW"] and "concept/ami" in found["HO"]
    assert "concept/nn_acc1" not in found["HO"] and "category/ami" in found["HO"]
    assert not [name for names in found.values() for name in names if "lp_" in name]


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a run's folder."""
    return shutil.copytree(trained, tmp_path / "run")


def test_command_gives_the_numbers_of_the_stored_model(run, nano, capsys):
    assert main([str(run), "--data", "builtin:shapes:100", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "Held-out pairs (HO)" in printed and "image -> text R@5" in printed
    outcome = read_results(run / "results-builtin_shapes_100.json")
    model = build_model(ModelConfig(model=str(nano)))
    model.load_state(checkpoint.load_newest(run)[1])
    sets, train = encode_sets(Encoder(model, CPU), open_layout("builtin:shapes:100"))
    want = evaluate_features(sets, train)["HO"].metrics["text_retrieval_recall@5"]
    assert outcome.trained["HO"].metrics["text_retrieval_recall@5"] == want
    assert outcome.untrained is None


def test_command_renews_what_training_left(run, capsys):
    sets = {"HO": SetResults("Held-out pairs", 1, 1, {"text_retrieval_recall@5": 0.25})}
    data, path = "builtin:shapes:100", run / "results.json"
    write_results(path, Outcome(data, "tiny", "old.pt", sets, sets, {"training": 60.0}, 2**30))
    assert main([str(run), "--data", data, "--output", str(path), "--device", "cpu"]) == 0
    printed, outcome = capsys.readouterr().out, read_results(path)
    assert "untrained" in printed and "training 60.0 s" in printed and "1,024 MiB" in printed
    assert outcome.trained["HO"].samples == 12 and outcome.untrained == sets
    assert outcome.pretrained.endswith(checkpoint.LATEST)


def test_command_asks_for_data_where_the_run_has_none(run, capsys):
    path, payload = checkpoint.load_newest(run)
    payload["protoclip"]["config"]["data"]["train_data"] = "pairs.csv"
    checkpoint.save(path, payload)
    assert main([str(run)]) == 2
    assert "give --data" in capsys.readouterr().err


# Results


def outcome(recall=0.25, rank=120.0, untrained=None, **more):
    values = {
        "text_retrieval_recall@5": recall,
        "image_retrieval_recall@5": math.nan,
        "text_retrieval_median_rank": rank,
        "group/acc1": 0.5,
        "group/acc5": math.nan,
        "group/lp_acc1": 0.75,
        "group/lp_weight_decay": 0.1,
        "group/lp_epochs": 100.0,
        "group/ami": 0.125,
        "modality_gap": 1.0,
    }
    bounds = {"text_retrieval_recall@5": (recall - 0.1, recall + 0.1)}
    sets = {"HO": SetResults("Held-out", 1190, 1190, values, bounds)}
    return Outcome("builtin:icons", "tiny", "x.pt", sets, untrained, **more)


def test_table_has_a_row_per_metric_and_the_change():
    timing = {f"phase {i}": 10.0 * i for i in range(9)}
    before = outcome(0.01, 900).trained
    text = format_table(
        outcome(untrained=before, seconds=timing, peak_memory_bytes=3 * 2**30)
    ).splitlines()
    assert max(map(len, text)) <= 100
    assert text[0] == "Held-out (HO): 1,190 images, 1,190 captions"
    assert text[1].split() == ["untrained", "trained", "95", "%", "interval", "change"]
    row = next(line for line in text if "image -> text R@5" in line)
    assert row.split()[-6:] == ["0.010", "0.250", "0.150", "..", "0.350", "+0.240"]
    assert len({len(line) for line in text[1:6]}) == 1  # aligned
    row = next(line for line in text if "median rank" in line)
    assert row.split()[-3:] == ["900.0", "120.0", "-780.0"]
    row = next(line for line in text if "text -> image R@5" in line)
    assert row.split()[-3:] == ["-", "-", "-"]
    assert any("linear probe group" in line for line in text)
    assert text[-1] == "Peak memory: 3,072 MiB"
    assert "together 360.0 s" in " ".join(text)


def test_the_table_against_several_seeds_of_clip():
    """Floor, untrained and CLIP side by side; what one more CLIP run may give is in brackets."""
    ours, clip = outcome(0.3), outcome(0.25, seeds=5)
    floor = {"HO": dataclasses.replace(clip.trained["HO"], metrics={"group/ami": 0.11})}
    bounds = {"text_retrieval_recall@5": (0.15, 0.35), "group/ami": (0.12, 0.13)}
    wide = dataclasses.replace(clip.trained["HO"], intervals=bounds)
    ours = dataclasses.replace(ours, floors={"HOG": floor}, untrained=outcome(0.01).trained)
    ours.trained["HO"].metrics["group/ami"] = 0.2
    text = format_table(ours, dataclasses.replace(clip, trained={"HO": wide})).splitlines()
    assert max(map(len, text)) <= 100 and "mean of 5 seeds" in " ".join(text)
    assert " ".join(text[1].split()) == "HOG untrained CLIP trained 95 % interval to CLIP"
    row = next(line for line in text if "AMI" in line)
    assert row.split()[3:] == ["0.110", "0.125", "0.125", "0.200", "+0.075"]
    assert text.index(row) == 3  # after zero-shot
    row = next(line for line in text if "image -> text R@5" in line)
    assert row.split()[-6:] == ["0.250", "0.300", "0.200", "..", "0.400", "(+0.050)"]


def test_floors_need_no_training():
    layout = open_layout("builtin:shapes:400")
    found = floors(Encoder(build_model(ModelConfig()), CPU), layout)
    assert list(found) == ["chance", "frequent", "pixels", "HOG"]
    values = {name: sets["HO"].metrics for name, sets in found.items()}
    ids = layout.test.labels["group"].ids
    assert values["chance"]["group/acc1"] == pytest.approx(1 / 12)
    assert values["frequent"]["group/acc1"] == pytest.approx(float(ids.bincount().max()) / len(ids))
    usual = (ids == layout.train.labels["group"].ids.bincount().argmax()).double().mean()
    assert values["frequent"]["group/knn_acc1"] == pytest.approx(float(usual))
    assert values["chance"]["text_retrieval_recall@5"] == pytest.approx(5 / len(layout.test))
    # The outline tells shapes apart: gradients see it better than chance does.
    assert values["HOG"]["group/knn_acc1"] > 2 * values["chance"]["group/knn_acc1"]
    assert 0 < values["pixels"]["group/ami"] < 1


def test_gradients_of_an_edge_fall_into_its_direction():
    picture = np.zeros((24, 24), dtype=np.uint8)
    picture[:, 12:] = 255
    features = hog(Image.fromarray(picture)).reshape(2, 2, 4, 9)
    # Gradients point along the row: angle 0, halfway between the last bin and the first.
    assert features[..., 0] == pytest.approx(features[..., 8]) and not features[..., 1:8].any()
    left, right = features[0, 0], features[0, 1]  # the edge is in the middle column of cells
    assert left[[1, 3], 0] == pytest.approx([0.5, 0.5]) and not left[[0, 2]].any()
    assert right[[0, 2], 0] == pytest.approx([0.5, 0.5]) and not right[[1, 3]].any()
    assert not hog(Image.new("RGB", (24, 24), "red")).any()
    # Turned by a quarter, the angle is 90 degrees: the bin in the middle.
    turned = hog(Image.fromarray(picture.T.copy())).reshape(2, 2, 4, 9)
    assert turned[..., 4].max() > 0.5 and not np.delete(turned, 4, axis=-1).any()


def test_json_round_trip(tmp_path):
    path = tmp_path / "results.json"
    before = outcome(0.01).trained
    written = outcome(
        untrained=before, seconds={"training": 1.5}, peak_memory_bytes=7, floors={"pixels": before}
    )
    write_results(path, written)
    raw = json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert raw["trained"]["HO"]["metrics"]["group/acc5"] is None
    content = read_results(path)
    assert content.seconds == {"training": 1.5} and content.peak_memory_bytes == 7
    for old in (content.untrained, content.floors["pixels"]):
        assert old["HO"].metrics["text_retrieval_recall@5"] == 0.01
    assert math.isnan(content.trained["HO"].metrics["group/acc5"])
    assert format_table(content) == format_table(written)
    assert [path] == list(tmp_path.iterdir())
    raw["floor"] = raw.pop("floors")["pixels"]  # as older versions wrote it
    path.write_text(json.dumps(raw))
    assert format_table(read_results(path)) == format_table(written)


@pytest.mark.parametrize("text", ["", "[]", '{"trained": 3}', '{"trained": null}'])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected a results.json of protoclip"):
        read_results(path)
