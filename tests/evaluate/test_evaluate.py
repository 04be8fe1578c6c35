"""Evaluation sets, their scores, the command, the table people read and the JSON programs read."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from protoclip.data import Labels, Subset, open_dataset
from protoclip.data.images import hog
from protoclip.evaluate import metrics, tasks
from protoclip.evaluate.__main__ import main
from protoclip.evaluate.datasets import Layout, class_prompts, open_layout
from protoclip.evaluate.during import Evaluation
from protoclip.evaluate.results import (
    Outcome,
    SetResults,
    format_table,
    read_results,
    write_results,
)
from protoclip.evaluate.tasks import (
    Encoder,
    EvalSet,
    by_picture,
    encode_sets,
    evaluate_features,
    floors,
    guesses,
    take,
)
from protoclip.model import build_model
from protoclip.report import page
from protoclip.runs import checkpoint
from protoclip.settings.config import ModelConfig

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return build_model(ModelConfig())


class Groups(NamedTuple):
    """Pairs around the centres of six groups."""

    pairs: EvalSet
    centres: Tensor  # [6, 8]
    ids: Tensor  # [120]


@pytest.fixture
def groups() -> Groups:
    draw = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(6, 8, generator=draw)
    ids = torch.randint(0, 6, (120,), generator=draw)
    image = centres[ids] + 0.3 * torch.randn(120, 8, generator=draw)
    text = image + torch.randn(120, 8, generator=draw)
    labels = {"group": Labels(ids, tuple("abcdef"))}
    pairs = EvalSet(image, text, torch.arange(120), labels, {"group": centres})
    return Groups(pairs, centres, ids)


def reversed_rows(pairs: EvalSet) -> EvalSet:
    return take(pairs, range(len(pairs.image) - 1, -1, -1))


@pytest.mark.smoke
def test_scores_are_those_of_the_metrics(groups: Groups) -> None:
    image = groups.pairs.image
    text = groups.pairs.text
    results = evaluate_features({"A": groups.pairs}, reversed_rows(groups.pairs))["A"]
    scores = results.metrics
    for name, hits in metrics.recalls(metrics.retrieval(image, text)).items():
        assert scores[name] == pytest.approx(float(hits.mean()))
    guesses = metrics.zero_shot_logits(image, groups.centres).argmax(1)
    assert scores["group/acc1"] == pytest.approx(float((guesses == groups.ids).double().mean()))
    assert scores["group/lp_acc1"] == scores["group/knn_acc1"] == scores["group/nn_acc1"] == 1
    assert scores["group/ami"] > 0.9  # three k-means, one start each: not always the best one
    assert scores["modality_gap"] == metrics.modality_gap(image, text)
    low, high = results.intervals["text_retrieval_recall@5"]
    assert low < scores["text_retrieval_recall@5"] < high


def test_scores_that_a_set_is_unfit_for_are_left_out(groups: Groups) -> None:
    unfit = frozenset({("group", "linear_probe"), ("group", "knn"), ("group", "grouping")})
    seen = dataclasses.replace(groups.pairs, skip=unfit, title="Seen")
    results = evaluate_features({"B": seen}, reversed_rows(groups.pairs))["B"]
    assert results.title == "Seen"
    assert "group/acc1" in results.metrics
    for part_of_name in ("lp_", "nn_", "ami"):
        assert not [name for name in results.metrics if part_of_name in name]


def test_a_class_that_is_not_known_is_not_judged() -> None:
    """-1 is no class: neither a wrong answer nor a neighbour, and no group of its own."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.arange(40) % 4
    image = torch.eye(4)[ids] + 0.01 * torch.randn(40, 4, generator=draw)
    unknown = torch.full((40,), -1)
    of_unknown = torch.randn(40, 4, generator=draw)

    def scores(image: Tensor, ids: Tensor) -> dict[str, float]:
        pairs = EvalSet(
            image,
            image[:0],
            labels={"kind": Labels(ids, tuple("abcd"))},
            class_vectors={"kind": torch.eye(4)},
        )
        results = evaluate_features({"A": pairs}, pairs)["A"].metrics
        return {name: value for name, value in results.items() if name.startswith("kind/")}

    without_unknown = scores(image, ids)
    with_unknown = scores(torch.cat([image, of_unknown]), torch.cat([ids, unknown]))
    assert with_unknown == pytest.approx(without_unknown, nan_ok=True)
    assert without_unknown["kind/acc1"] == without_unknown["kind/nn_acc1"] == 1


def test_zero_shot_is_among_the_classes_of_the_set() -> None:
    pairs = EvalSet(
        torch.eye(3)[[1, 0, 0]],
        torch.empty(0, 3),
        labels={"kind": Labels(torch.tensor([5, 2, 5]), tuple("abcdef"))},
        class_vectors={"kind": torch.eye(3)[:2]},
        choices={"kind": torch.tensor([2, 5])},
    )
    rows, classes = pairs.among("kind")
    assert rows.tolist() == [0, 1, 2] and classes.ids.tolist() == [1, 0, 1]
    assert classes.names == ("c", "f")
    scores = evaluate_features({"A": pairs}, tasks=("zeroshot",))["A"].metrics
    assert scores["kind/acc1"] == pytest.approx(2 / 3)


class WordEncoder(Encoder):
    """Sees the first caption of a picture, and knows every text by heart."""

    def images(self, dataset: Any) -> Tensor:
        return self.texts([dataset.captions(i)[0] for i in range(len(dataset))])

    def texts(self, texts: Any) -> Tensor:
        return torch.eye(9)[[int(text[0]) for text in texts]]


def test_equal_captions_are_right_answers_of_each_other(model: Any) -> None:
    """Five pictures share each caption: a perfect model is seen to be perfect, as the run trains
    and afterwards, and chance is that of picking one of the right ones."""
    captions = [(str(i // 5),) for i in range(45)]

    class Pairs:
        name = "pairs"
        keys = [str(i) for i in range(45)]
        labels: Mapping[str, Labels] = {}

        def __len__(self) -> int:
            return len(captions)

        def captions(self, i: int) -> tuple[str, ...]:
            return captions[i]

    dataset: Any = Pairs()
    encoder = WordEncoder(model, CPU)
    sets, _ = encode_sets(encoder, Layout(dataset))
    scores = evaluate_features(sets)["ALL"].metrics
    assert [scores[f"{name}_retrieval_recall@1"] for name in ("text", "image")] == [1, 1]
    assert scores["text_retrieval_median_rank"] == 1
    chance = guesses(sets, None)["chance"]["ALL"].metrics
    assert chance["text_retrieval_recall@1"] == pytest.approx(5 / 45)
    quick_sets = {"HO": Layout(dataset)}
    during = SimpleNamespace(encoder=lambda model: encoder, quick_sets=quick_sets)
    assert set(Evaluation.quick(during, model).values()) == {1}  # type: ignore[arg-type]
    reversed_set = take(sets["ALL"], range(44, -1, -1))
    assert evaluate_features({"ALL": reversed_set})["ALL"].metrics == pytest.approx(scores)


class FeatureEncoder(Encoder):
    """Random features of each picture and each text, the same every time."""

    def images(self, dataset: Any) -> Tensor:
        return self.texts(list(dataset.keys))

    def texts(self, texts: Any) -> Tensor:
        rows = [torch.Generator().manual_seed(zlib.crc32(text.encode())) for text in texts]
        return torch.stack([F.normalize(torch.randn(4, generator=row), dim=0) for row in rows])


@pytest.mark.parametrize("captions", [None, 1])
def test_the_curve_ends_where_the_table_begins(model: Any, captions: int | None) -> None:
    """Also where a picture has several captions."""
    dataset = FewCaptions(open_dataset("builtin:shapes:30"))
    encoder = FeatureEncoder(model, CPU)
    layout = Layout(dataset, captions=captions)
    sets, _ = encode_sets(encoder, layout)
    table = evaluate_features(sets)["ALL"].metrics
    during = SimpleNamespace(encoder=lambda model: encoder, quick_sets={"ALL": layout})
    curve = Evaluation.quick(during, model)  # type: ignore[arg-type]
    assert len(curve) == 4
    assert curve == {f"val_ALL_{name[8:]}": table[name[8:]] for name in curve}


class FewCaptions:
    """A data set in which picture i has i % 4 + 1 captions."""

    labels: Mapping[str, Labels] = {}
    name = "few"

    def __init__(self, dataset: Any) -> None:
        self.keys = dataset.keys

    def __len__(self) -> int:
        return len(self.keys)

    def captions(self, i: int) -> tuple[str, ...]:
        return tuple(f"{number} of {i}" for number in range(i % 4 + 1))


@pytest.mark.parametrize(
    "before", ["same", "other captions", "fewer", "no fingerprint", "other data"]
)
def test_scores_from_before_a_run_are_of_the_same_pictures(tmp_path: Path, before: str) -> None:
    data: Any = FewCaptions(open_dataset("builtin:shapes:30"))
    fingerprints = {
        "same": tasks.fingerprint(data, None),
        "other captions": tasks.fingerprint(data, 1),
        "fewer": tasks.fingerprint(data, None),
        "no fingerprint": "",
        "other data": "",
    }
    count = 29 if before == "fewer" else 30
    metrics = {"text_retrieval_recall@5": 0.25}
    sets = {"ALL": SetResults("All", count, 75, metrics, fingerprint=fingerprints[before])}
    write_results(tmp_path / "untrained.json", Outcome("val.csv", "untrained", "", sets))
    now = "b.csv" if before == "other data" else "val.csv"
    run: Any = SimpleNamespace(data=now, _layout=lambda: Layout(data))
    read = Evaluation.untrained(run, tmp_path, None, True)  # type: ignore[arg-type]
    assert read == (sets if before in ("same", "no fingerprint") else None)


def test_intervals_of_captions_draw_pictures() -> None:
    """All captions of a picture are found or none: there are as many facts as pictures."""
    found = torch.tensor([1.0, 0.0] * 20)
    owner = torch.arange(40).repeat_interleave(5)
    of_captions = found.repeat_interleave(5)
    assert torch.equal(by_picture(of_captions, owner), found.double())
    order = torch.randperm(200)
    assert torch.equal(by_picture(of_captions[order], owner[order]), found.double())
    low, high = metrics.bootstrap_intervals({"a": by_picture(of_captions, owner)})["a"]
    assert 0.25 < high - low < 0.35  # 1.96 * 2 * sqrt(0.25 / 40) = 0.31; of captions 0.14
    # With unequal numbers the mean is that of captions, and pictures with more weigh more.
    owner = torch.tensor([0, 0, 0, 1])
    values = by_picture(torch.tensor([1.0, 1.0, 0.0, 0.0]), owner)
    assert float(values.mean()) == 0.5 and values.tolist() == [0.75, 0.25]


def test_labels_that_no_picture_has_are_no_task(model: Any) -> None:
    """As in the test splits of some parquet data sets, whose classes are all -1."""
    dataset: Any = FewCaptions(open_dataset("builtin:shapes:30"))
    dataset.labels = {"class": Labels(torch.full((30,), -1), ("cat", "dog"))}
    sets, train = encode_sets(FeatureEncoder(model, CPU), Layout(dataset))
    names = evaluate_features(sets, train)["ALL"].metrics
    assert "text_retrieval_recall@1" in names and "modality_gap" in names
    assert not [name for name in names if name.startswith("class/")]


@pytest.mark.parametrize("classes", [1, 12])
def test_groups_that_any_clusters_find_are_not_judged(classes: int) -> None:
    image = F.normalize(torch.randn(12, 4), dim=1)
    names = tuple(map(str, range(classes)))
    labels = {"kind": Labels(torch.arange(12) % classes, names)}
    pairs = EvalSet(image, torch.empty(0, 4), labels=labels)
    assert "kind/ami" not in evaluate_features({"A": pairs}, tasks=("grouping",))["A"].metrics


def test_the_rows_of_a_picture_are_its_captions(model: Any, tmp_path: Path) -> None:
    """As in COCO's and Flickr's tables: a perfect model is seen to be perfect, and a picture is
    counted once, also for its class."""
    lines = ["filepath,title,kind"]
    for i in range(9):
        Image.new("L", (2, 2)).save(tmp_path / f"{i}.png")
        lines += [f"{i}.png,{i} {view},kind {i % 2}" for view in ("in front", "above", "below")]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    layout = open_layout(str(tmp_path / "pairs.csv"), csv_label_key="kind")
    assert layout.test.labels["class"].ids.tolist() == [0, 1] * 4 + [0]
    sets, _ = encode_sets(WordEncoder(model, CPU), layout, ("retrieval",))
    scores = evaluate_features(sets, tasks=("retrieval",))["ALL"]
    assert (scores.samples, scores.captions) == (9, 27)
    assert [scores.metrics[f"{name}_retrieval_recall@1"] for name in ("text", "image")] == [1, 1]


def test_class_prompts_are_readable() -> None:
    of_groups = class_prompts("group", ["red-star", "flags"], ("a picture of {}", "{}"))
    assert of_groups == [
        ["a picture of red star", "red star"],
        ["a picture of flags", "flags"],
    ]
    assert class_prompts("class", ["red-star"], ("{}",)) == [["red-star"]]


def concepts_of(dataset: Any) -> list[int]:
    return dataset.labels["concept"].ids.tolist()


def test_new_icons_are_an_unseen_family_of_concepts_that_were_trained_on() -> None:
    layout = open_layout("builtin:icons")
    new = layout.parts["NEW"].test
    assert set(new.keys) <= set(layout.test.keys)
    assert len(new) > 400
    assert all(key.startswith("lucide/") for key in new.keys)
    assert set(concepts_of(new)) <= set(concepts_of(layout.train))


def test_held_out_icons_are_of_concepts_that_were_not_trained_on() -> None:
    layout = open_layout("builtin:icons")
    held_out = layout.parts["HO"].test
    assert set(held_out.keys) <= set(layout.test.keys)
    assert not set(concepts_of(held_out)) & set(concepts_of(layout.train))
    families = defaultdict(set)
    for concept, key in zip(concepts_of(held_out), held_out.keys, strict=True):
        families[concept].add(key.partition("/")[0])
    assert min(map(len, families.values())) == 2 and len(families) > 50


def test_each_set_of_icons_is_encoded_and_scored(model: Any) -> None:
    whole = open_layout("builtin:icons")
    few = {
        key: dataclasses.replace(part, test=Subset(part.test, range(0, len(part.test), 9)))
        for key, part in whole.parts.items()
    }
    few_train = Subset(whole.train, range(0, len(whole.train), 99))
    layout = dataclasses.replace(whole, train=few_train, parts=few)
    encoder = Encoder(model, CPU)
    sets, probe_train = encode_sets(encoder, layout)
    for key, encoded in sets.items():
        dataset = few[key].test
        torch.testing.assert_close(encoded.image, encoder.images(dataset))
        if key == "NEW":
            texts = [dataset.captions(i)[0] for i in range(len(dataset))]
            torch.testing.assert_close(encoded.text, encoder.texts(texts))
        else:  # drawings of new concepts share their captions: no retrieval
            assert len(encoded.text) == 0
        present = dataset.labels["concept"].ids.unique()
        assert torch.equal(encoded.choices["concept"], present)
        assert len(encoded.class_vectors["concept"]) == len(present)
    torch.testing.assert_close(probe_train.image, encoder.images(few_train))
    results = evaluate_features(sets, probe_train)
    new = set(results["NEW"].metrics)
    held_out = set(results["HO"].metrics)
    assert {"concept/acc1", "concept/nn_acc1", "category/knn_acc1"} <= new
    assert "concept/ami" not in new and "concept/ami" in held_out
    assert "concept/nn_acc1" not in held_out and "category/ami" in held_out
    assert not [name for name in new | held_out if "lp_" in name]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of a run's folder."""
    return shutil.copytree(trained, tmp_path / "run")


def test_the_command_gives_the_numbers_of_the_stored_model(
    run: Path, nano: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--data", "builtin:shapes:100", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "Held-out pairs (HO)" in printed and "image -> text R@5" in printed
    outcome = read_results(run / "results-builtin_shapes_100.json")
    model = build_model(ModelConfig(model=str(nano)))
    model.load_state(checkpoint.load_newest(run)[1])
    sets, train = encode_sets(Encoder(model, CPU), open_layout("builtin:shapes:100"))
    expected = evaluate_features(sets, train)["HO"].metrics
    name = "text_retrieval_recall@5"
    assert outcome.trained["HO"].metrics[name] == expected[name]
    assert outcome.untrained is None


def test_the_command_renews_what_training_left(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {"HO": SetResults("Held-out pairs", 12, 12, {"text_retrieval_recall@5": 0.25})}
    data = "builtin:shapes:100"
    path = run / "results.json"
    write_results(
        path,
        Outcome(data, "tiny", "old.pt", sets, sets, {"training": 60.0}, peak_memory_bytes=2**30),
    )
    assert main([str(run), "--data", data, "--output", str(path), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    outcome = read_results(path)
    assert "untrained" in printed and "training 60.0 s" in printed and "1,024 MiB" in printed
    assert outcome.trained["HO"].samples == 12 and outcome.untrained == sets
    assert outcome.pretrained.endswith(checkpoint.LATEST)


def test_the_command_asks_for_data_where_the_run_has_none(
    run: Path, error_of: Callable[..., str]
) -> None:
    path, payload = checkpoint.load_newest(run)
    payload["protoclip"]["config"]["data"]["train_data"] = "pairs.csv"
    checkpoint.save(path, payload)
    assert "give --data" in error_of(main, [run])


# Results


def outcome_of(
    recall: float = 0.25,
    rank: float = 120.0,
    untrained: dict[str, SetResults] | None = None,
    **more: Any,
) -> Outcome:
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


def row_of(table: list[str], title: str) -> list[str]:
    """The words of the row with this title."""
    return next(line for line in table if title in line).split()


def test_the_table_has_a_row_per_metric_and_the_change() -> None:
    results = outcome_of(untrained=outcome_of(0.01, 900).trained)
    table = format_table(results).splitlines()
    assert max(map(len, table)) <= 100
    assert table[0] == "Held-out (HO): 1,190 images, 1,190 captions"
    assert table[1].split() == ["untrained", "trained", "95", "%", "interval", "change"]
    recall = row_of(table, "image -> text R@5")
    assert recall[-6:] == ["0.010", "0.250", "0.150", "..", "0.350", "+0.240"]
    assert row_of(table, "median rank")[-3:] == ["900.0", "120.0", "-780.0"]
    assert row_of(table, "text -> image R@5")[-3:] == ["-", "-", "-"]
    assert row_of(table, "linear probe group")
    assert len({len(line) for line in table[1:6]}) == 1  # aligned


def test_a_set_without_captions_has_none_in_its_heading() -> None:
    sets = {"HO": SetResults("Held-out", 389, 0, {"concept/acc1": 0.3})}
    table = format_table(Outcome("builtin:icons", "tiny", "x.pt", sets)).splitlines()
    assert table[0] == "Held-out (HO): 389 images"


def test_equal_captions_are_counted_once_in_words() -> None:
    features = torch.eye(40)
    captions = torch.arange(40) // 4
    sets = {"HO": EvalSet(features, features, torch.arange(40), caption_ids=captions)}
    trained = evaluate_features(sets, tasks={"retrieval"})
    results = Outcome("pairs.csv", "tiny", "x.pt", trained)
    assert "40 images, 10 different captions" in format_table(results)
    answer = page.answer(page.Run("run", Path("run"), {}, results))
    assert "among 10 different captions (guessing: 10 %)." in answer


@pytest.mark.parametrize("chance, words", [(3 / 31, "10"), (0.094, "9"), (0.0096, "1")])
def test_a_chance_is_a_plain_number(chance: float, words: str) -> None:
    metric = "text_retrieval_recall@1"
    scores = SetResults("Held-out", 31, 31, {metric: 0.5})
    floors = {"chance": {"HO": dataclasses.replace(scores, metrics={metric: chance})}}
    results = Outcome("pairs.csv", "tiny", "x.pt", {"HO": scores}, floors=floors)
    assert f"(guessing: {words} %)" in page.answer(page.Run("run", Path("run"), {}, results))


def test_the_table_ends_with_times_and_memory() -> None:
    seconds = {f"phase {i}": 10.0 * i for i in range(9)}
    results = outcome_of(seconds=seconds, peak_memory_bytes=3 * 2**30)
    table = format_table(results).splitlines()
    assert max(map(len, table)) <= 100
    assert table[-1] == "Peak memory: 3,072 MiB"
    assert "together 360.0 s" in " ".join(table)


def test_the_table_shows_floors_next_to_the_scores() -> None:
    untrained = outcome_of(0.01).trained
    floor = dataclasses.replace(untrained["HO"], metrics={"group/ami": 0.11})
    ours = outcome_of(0.3, untrained=untrained, floors={"HOG": {"HO": floor}})
    ours.trained["HO"].metrics["group/ami"] = 0.2
    table = format_table(ours).splitlines()
    assert max(map(len, table)) <= 100
    assert " ".join(table[1].split()) == "HOG untrained trained 95 % interval change"
    assert row_of(table, "AMI")[3:] == ["0.110", "0.125", "0.200", "+0.075"]
    assert "AMI" in table[3]  # after zero-shot
    recall = row_of(table, "image -> text R@5")
    assert recall[-6:] == ["0.010", "0.300", "0.200", "..", "0.400", "+0.290"]


def test_floors_need_no_training(model: Any) -> None:
    layout = open_layout("builtin:shapes:400")
    sets_of_floors = floors(Encoder(model, CPU), layout)
    assert list(sets_of_floors) == ["chance", "frequent", "pixels", "HOG"]
    values = {name: sets["HO"].metrics for name, sets in sets_of_floors.items()}
    ids = layout.test.labels["group"].ids
    assert values["chance"]["group/acc1"] == pytest.approx(1 / 12)
    assert values["frequent"]["group/acc1"] == pytest.approx(float(ids.bincount().max()) / len(ids))
    usual_group = layout.train.labels["group"].ids.bincount().argmax()
    share_of_usual = (ids == usual_group).double().mean()
    assert values["frequent"]["group/knn_acc1"] == pytest.approx(float(share_of_usual))
    assert values["chance"]["text_retrieval_recall@5"] == pytest.approx(5 / len(layout.test))
    # The outline tells shapes apart: gradients see it better than chance does.
    assert values["HOG"]["group/knn_acc1"] > 2 * values["chance"]["group/knn_acc1"]
    assert 0 < values["pixels"]["group/ami"] < 1


def test_gradients_of_an_edge_fall_into_its_direction() -> None:
    picture = np.zeros((24, 24), dtype=np.uint8)
    picture[:, 12:] = 255
    features = hog(Image.fromarray(picture)).reshape(2, 2, 4, 9)
    # Gradients point along the row: angle 0, halfway between the last bin and the first.
    assert features[..., 0] == pytest.approx(features[..., 8]) and not features[..., 1:8].any()
    left, right = features[0]  # the edge is in the middle column of cells
    assert left[[1, 3], 0] == pytest.approx([0.5, 0.5]) and not left[[0, 2]].any()
    assert right[[0, 2], 0] == pytest.approx([0.5, 0.5]) and not right[[1, 3]].any()
    assert not hog(Image.new("RGB", (24, 24), "red")).any()
    # Turned by a quarter, the angle is 90 degrees: the bin in the middle.
    turned = hog(Image.fromarray(picture.T.copy())).reshape(2, 2, 4, 9)
    assert turned[..., 4].max() > 0.5 and not np.delete(turned, 4, axis=-1).any()


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    """In JSON, which has no NaN."""
    untrained = outcome_of(0.01).trained
    every_part = outcome_of(
        untrained=untrained,
        seconds={"training": 1.5},
        peak_memory_bytes=7,
        floors={"pixels": untrained},
    )
    path = tmp_path / "results.json"
    write_results(path, every_part)
    assert [path] == list(tmp_path.iterdir())
    content = read_results(path)
    assert content.seconds == {"training": 1.5} and content.peak_memory_bytes == 7
    for sets in (content.untrained, content.floors["pixels"]):
        assert sets["HO"].metrics["text_retrieval_recall@5"] == 0.01
    assert math.isnan(content.trained["HO"].metrics["group/acc5"])
    assert format_table(content) == format_table(every_part)
    raw = json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert raw["trained"]["HO"]["metrics"]["group/acc5"] is None


@pytest.mark.parametrize("text", ["", "[]", '{"trained": 3}', '{"trained": null}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected a results.json of protoclip"):
        read_results(path)
