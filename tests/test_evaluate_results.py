"""The table people read and the JSON that programs read."""

import json
import math

import pytest
import torch

from protoclip.evaluate import (
    Results,
    SetResults,
    format_table,
    read_results,
    records,
    write_results,
)


def results(recall=0.25, rank=120.0):
    values = {
        "text_retrieval_recall@5": recall,
        "image_retrieval_recall@5": math.nan,
        "text_retrieval_median_rank": rank,
        "group/acc1": 0.5,
        "group/acc5": math.nan,
        "group/lp_acc1": 0.75,
        "group/ami": 0.125,
        "modality_gap": 1.0,
    }
    hits = {"text_retrieval_recall@5": torch.ones(4)}
    bounds = {"text_retrieval_recall@5": (recall - 0.1, recall + 0.1)}
    return Results({"HO": SetResults("Held-out", 1190, 1190, values, bounds, hits)}, 3.5)


def test_table_has_a_row_per_metric_and_the_change():
    timing = {f"phase {i}": 10.0 * i for i in range(9)}
    text = format_table(
        results(0.01, 900), results(), timing, peak_memory_bytes=3 * 2**30
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


def test_table_without_the_untrained_model():
    text = format_table(None, results())
    assert "untrained" not in text and "change" not in text and "0.150 .. 0.350" in text
    other = Results({"XX": results().sets["HO"]})  # a set that only one of the two has
    assert "0.250" in format_table(results(), other)


def test_json_round_trip(tmp_path):
    path = tmp_path / "results.json"
    write_results(
        path, results(), results(0.01), data="builtin:emoji", model="tiny", pretrained="x.pt",
        timing={"training": 1.5}, peak_memory_bytes=7,
    )  # fmt: skip
    assert not list(tmp_path.glob("*.tmp"))
    raw = json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert raw["trained"]["sets"]["HO"]["metrics"]["group/acc5"] is None
    content = read_results(path)
    assert content["seconds"] == {"training": 1.5} and content["peak_memory_bytes"] == 7
    assert content["untrained"].metrics["HO"]["text_retrieval_recall@5"] == 0.01
    assert math.isnan(content["trained"].metrics["HO"]["group/acc5"])
    again = format_table(content["untrained"], content["trained"])
    assert again == format_table(results(0.01), results())


@pytest.mark.parametrize("text", ["", "[]", '{"trained": 3}', '{"trained": null}'])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected a results.json of protoclip"):
        read_results(path)


def test_records_are_clip_benchmarks():
    got = records(results(), "builtin:emoji", "tiny", "x.pt")
    assert [(r["dataset"], r["task"]) for r in got] == [
        ("builtin:emoji/HO", "zeroshot_retrieval"),
        ("builtin:emoji/HO/group", "zeroshot_classification"),
        ("builtin:emoji/HO/group", "linear_probe"),
    ]
    assert got[1]["metrics"]["acc1"] == 0.5 and math.isnan(got[1]["metrics"]["acc5"])
    assert got[2]["metrics"]["lp_acc1"] == 0.75
    assert set(got[0]) == {"dataset", "model", "pretrained", "task", "metrics", "language"}
