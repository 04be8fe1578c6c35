"""What is answered before torch is imported: help, unknown flags, missing files, bad numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from protoclip.distributed import LAUNCHERS
from protoclip.settings.command_line import PROCESS_COUNTS, check_command_line

# The words of a command line, and what its error says.
REFUSED = {
    "trian": "'trian' is not a command; did you mean train?",
    "train --lrr 1": "--lrr: no such flag; did you mean --lr?",
    "train --epochs -3": "--epochs: expected at least 0, got -3.0",
    "train --epochs many": "--epochs: invalid float value: 'many'",
    "train --preset none.json": "--preset: expected one of default, paper,",
    "train --train-data none.csv": "--train-data: the file none.csv does not exist; check the path",
    "train --val-data none/": "--val-data: the folder none/ does not exist",
    "train --resume logs/none": "--resume: logs/none does not exist; check the path, or use --res",
    "train --external-teacher a/b.npz": "--external-teacher: the file a/b.npz does not exist",
    "plan --ranks 0": "--ranks: expected a whole number of at least 1, got 0",
    "plan --samples nan": "--samples: expected a whole number of at least 1, got nan",
    "cluster none/": "DATA: the folder none/ does not exist; check the path",
    "cluster none.npy": "DATA: the file none.npy does not exist",
    "cluster . --k some": "--k: expected auto or 2 to N groups, got some",
    "cluster . --k 1": "--k: expected auto or 2 to N groups, got 1",
    "cluster . --iters -1": "--iters: expected a whole number of at least 0, got -1",
    "cluster . --run none": "--run: none does not exist",
    "cluster . --features none.npz": "--features: the file none.npz does not exist",
    "evaluate logs/none": "MODEL: logs/none does not exist",
    "evaluate ViT-B-32 --data none": "--data: none does not exist",
    "evaluate ViT-B-32 --batch-size 0": "--batch-size: expected a whole number of at least 1, got",
    "report logs/none": "RUN: logs/none does not exist",
    "export none --out new": "RUN_OR_CHECKPOINT: none does not exist",
    "data --check none.csv": "--check: the file none.csv does not exist",
    "data --check . --per-shard 0": "--per-shard: expected a whole number of at least 1, got 0",
    "encode d --batch-size -1 --out x": "--batch-size: expected a whole number of at least 0",
    "encode none --out new": "DATA: none does not exist",
    "compare --seeds 0": "--seeds: expected at least one seed, got none",
    "compare --seeds two": "--seeds: expected a number of seeds, or seeds such as 0,3,7, got two",
    "compare --train-data none.csv": "--train-data: the file none.csv does not exist",
    "compare --seed 3": "--seed: protoclip compare gives each run its own",
    "compare --name a": "--name: protoclip compare gives each run its own",
    "compare --method clip": "--method: the rows CLIP and ProtoCLIP set it; leave it out, or",
    "compare --row A": "--row: expected 'NAME: flags of protoclip train', got 'A'",
    "compare --row A:": "--row: expected a baseline and at least one other row, got 1",
    "compare --row A: --row B:--kk=3": "--row B: --kk: no such flag; did you mean --k?",
    "compare --row A: --row B:--logs=x": "--row B: --logs: protoclip compare gives",
    "compare --row A: --row A:--k=3": "--row: 'A' is named twice; rename one",
    "compare --row A/1: --row A.1:--k=3 --row A-1:": "--row: 'A-1' and 'A/1' would have the same f",
    "compare --row A: --row B:--val-seed=1": "--row B: expected the data and device of A",
    "openclip --proto-k -1": "--proto-k: expected at least 0, got -1",
}
RUN = """
import contextlib, io, json, sys
from protoclip.__main__ import main

for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = main(words.split())
    heavy = sorted({"torch", "numpy", "open_clip", "triton"} & set(sys.modules))
    print(json.dumps([words, code, stderr.getvalue(), heavy]))
"""


@pytest.mark.smoke
def test_mistakes_are_answered_before_torch_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [by_size for _, by_size, _ in LAUNCHERS] == list(PROCESS_COUNTS)
    for variable in PROCESS_COUNTS:
        monkeypatch.delenv(variable, raising=False)
    command = [sys.executable, "-c", RUN, json.dumps(list(REFUSED))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [words for words, *_ in answers] == list(REFUSED)
    for words, code, stderr, heavy in answers:
        assert code == 2 and REFUSED[words] in stderr and stderr.count("\n") == 1, stderr
        assert not heavy, words
    assert not list(tmp_path.iterdir())


def test_names_that_are_no_paths_are_not_looked_up(tmp_path: Path) -> None:
    """Data with a scheme, a pattern, or several sources; the names of models."""
    for data in ("builtin:icons", "https://x.org/a.tar", "d/{0..9}.tar", "d/*.parquet", "a::b"):
        check_command_line("train", ["--train-data", data])
    for model in ("ViT-B-32", "hf-hub:org/name", "local-dir:none"):
        check_command_line("evaluate", [model])
    for resume in ("auto", "latest"):
        check_command_line("train", ["--resume", resume])
    check_command_line("train", ["--external-teacher", "builtin:minilm"])


def test_under_a_launcher_the_command_itself_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two processes the second is silent, and the first says it once."""
    from protoclip.__main__ import main

    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        main(["train", "--epochs", "-3"])
    assert end.value.code == 2 and capsys.readouterr().err == ""
