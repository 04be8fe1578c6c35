"""Training ends with its report, and looks at zero-shot on the way."""

import json

import pytest

from protoclip.report import load_snapshot
from protoclip.train import main

TINY = ["--train-data", "builtin:shapes:80", "--batch-size", "16", "--report-to", "none"]
TINY += ["--infonce-warmup-epoch", "0", "--k", "6"]


def test_a_run_ends_with_its_report_and_its_path(tmp_path, capsys):
    flags = ["--logs", str(tmp_path), "--name", "run", "--max-steps", "4"]
    flags += ["--imagenet-val", "builtin:shapes:40", "--zeroshot-frequency", "0.4"]
    assert main([*TINY, *flags]) == 0
    page = tmp_path / "run" / "report.html"
    assert f"report: {page}" in capsys.readouterr().err
    text = page.read_text()
    assert "Held-out pairs" in text and "6 prototypes" in text
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = [x["step"] for x in lines if "val_zeroshot_group/acc1" in x]
    assert seen == [2, 4]
    snapshot = load_snapshot(tmp_path / "run")
    assert {"image", "text"} <= set(snapshot.clusters) and snapshot.judged_key == "HO"
    assert snapshot.facts["memory_bytes"]["forward"] > 2**20


@pytest.mark.parametrize(
    ("spec", "words"), [("nowhere", "nowhere"), ("builtin:cats", "no built-in data")]
)
def test_bad_zero_shot_data_is_refused_before_training(tmp_path, capsys, spec, words):
    flags = ["--logs", str(tmp_path), "--name", "run", "--max-steps", "2", "--imagenet-val", spec]
    assert main([*TINY, *flags]) == 2
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message
