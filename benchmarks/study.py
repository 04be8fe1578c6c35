"""What each design of ProtoCLIP is worth on the built-in pairs, over seeds: ``make study``.

Three stages; a finished run is one line of ``runs.jsonl`` and is not done again:
select  settings of ProtoCLIP and of the control, judged on concepts of their own
main    every row of the table, seed by seed
report  summary.json, plot.png and docs/evidence.md from whatever is finished

The concepts are cut three ways. A fifth is for selection: every setting is chosen by its scores
there. Of the rest, an eighth is held out, another one for each seed; the table's numbers come from
these and from the Noto drawings of all concepts but the selection's. A row is a set of flags of
``python -m protoclip.train``, which does the training.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import run_command
from benchmarks.study_report import BASELINE, EQUAL_TIME, write_report
from protoclip.config import ModelConfig
from protoclip.data import Subset, open_dataset
from protoclip.data.types import heldout_mask
from protoclip.evaluate.datasets import EMOJI_TEMPLATES, Layout
from protoclip.evaluate.tasks import Encoder, encode_set, evaluate_features, take
from protoclip.model import build_model

RESULTS = Path(__file__).parent / "results" / "study"
DATA = "builtin:emoji"
SELECTION_PERCENT, SELECTION_SEED = 20, 20261125
SELECTION_SEEDS = (1000, 1001)
EPOCHS, QUICK_EPOCHS = 12, 4
COST = 1.11  # CPU time of ProtoCLIP's training beside CLIP's: ten seeds, Zen 4, 2026-11-25
SCORED = ("group/lp_acc1", "subgroup/lp_acc1", "group/ami", "subgroup/ami")
SCORED += ("text_retrieval_recall@5", "image_retrieval_recall@5")

# The same for all rows: model, data, augmentation, captions, optimiser, number of samples.
MODEL = Path(__file__).with_name("study_model.json")
BASE = ["--model", str(MODEL), "--batch-size", "128", "--augmentation", "clip"]
BASE += ["--external-teacher", "builtin:minilm", "--val-frequency", "0", "--report-to", "none"]
BASE += ["--log-every-n-steps", "1", "--device", "cpu", "--precision", "fp32"]
BASE += ["--csv-separator", ","]
INTERNAL = ["--w-proto-external", "0", "--external-teacher", "none"]
DISTILL = ["--w-proto", "0", "--w-proto-external", "0", "--w-distill"]
CLIP = ["--method", "clip"]
# Settings of ProtoCLIP, and of the control, that are tried on the selection concepts. The best
# mean score there becomes the row "ProtoCLIP" (or "CLIP + distilled similarities").
CANDIDATES: dict[str, dict[str, list[str]]] = {
    "ProtoCLIP": {
        "shipped default": [],
        "K 50": ["--k", "50"],
        "K 500": ["--k", "500"],
        "tau 0.1": ["--target-temperature", "0.1"],
        "external weight 2": ["--w-proto-external", "2"],
    },
    "distillation": {
        "tau 0.1": [*DISTILL, "1", "--distill-temperature", "0.1"],
        "tau 0.05": [*DISTILL, "1", "--distill-temperature", "0.05"],
        "tau 0.1, weight 3": [*DISTILL, "3", "--distill-temperature", "0.1"],
    },
}
# One change each to the chosen settings; one that they have already is left out.
ABLATIONS = {
    "external only": ["--w-proto", "0"],
    "internal only": INTERNAL,
    "internal only, no PBT": [*INTERNAL, "--no-PBT"],
    "internal targets hard": ["--target-temperature", "0"],
    "K = 50": ["--k", "50"],
    "K = 172": ["--k", "172"],
    "K = 500": ["--k", "500"],
    "no heads": ["--no-add-projection-head"],
    "fresh k-means": ["--kmeans-init", "random"],
}
VERDICT_ROWS = (BASELINE, "ProtoCLIP", EQUAL_TIME)  # the verdict rests on these: twice the seeds
QUICK_ROWS = (BASELINE, "ProtoCLIP", "CLIP + distilled similarities", "external only")


def main_rows(chosen: list[str], distill: list[str]) -> dict[str, list[str]]:
    """Rows of the table, in order."""
    rows = {
        BASELINE: CLIP,
        "ProtoCLIP": chosen,
        "ProtoCLIP, features extracted": [*chosen, "--episode-features", "extract"],
        EQUAL_TIME: CLIP,
        "CLIP + distilled similarities": distill,
    }
    return rows | {
        name: [*chosen, *change] for name, change in ABLATIONS.items() if change != chosen
    }


# One run


def split_concepts(stage: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of concepts: trained on, judged in Twemoji's style, judged in Noto's style."""
    groups = open_dataset(DATA, "all").labels["group"].ids.numpy()
    selection = heldout_mask(len(groups), groups, SELECTION_SEED, SELECTION_PERCENT)
    rest = np.flatnonzero(~selection)
    if stage == "select":
        judged = np.flatnonzero(selection)
        return rest, judged, judged
    # Half of a quarter: heldout_mask takes whole percents.
    quarter = np.flatnonzero(heldout_mask(len(rest), groups[rest], seed, 25))
    half = heldout_mask(len(quarter), groups[rest][quarter], seed + 1, 50)
    heldout = rest[quarter[half]]
    return np.setdiff1d(np.arange(len(groups)), heldout), heldout, rest


def arguments(flags: Sequence[str], seed: int, epochs: float) -> list[str]:
    """The row's words for ``protoclip.train``, but for the data and the folder."""
    return [*BASE, "--seed", str(seed), "--epochs", str(epochs), *flags]


def train(words: Sequence[str], concepts: np.ndarray, folder: Path) -> float:
    """Train on some concepts, written as a table; CPU seconds of the command."""
    everything = open_dataset(DATA, "all")
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("filepath", "title"))
        for i in concepts.tolist():
            everything.image(i).save(folder / f"{i}.png")
            table.writerow((f"{i}.png", everything.captions(i)[0]))
    command = [sys.executable, "-m", "protoclip.train", *words, "--logs", str(folder)]
    command += ["--train-data", str(folder / "pairs.csv"), "--name", "run"]
    settings = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    usage = run_command(command, folder / "train.log", **settings)
    return usage.ru_utime + usage.ru_stime


def judge(
    checkpoint: Path, trained: np.ndarray, twemoji: np.ndarray, noto: np.ndarray
) -> dict[str, dict[str, float]]:
    """Metrics of the concepts ``twemoji`` (set HO) and of ``noto`` in that style (set NOTO)."""
    settings = ModelConfig(model=str(MODEL), pretrained=str(checkpoint), add_projection_head=False)
    encoder = Encoder(build_model(settings), torch.device("cpu"))
    everything, other_style = open_dataset(DATA, "all"), open_dataset(f"{DATA}:noto")
    whole = encode_set(encoder, Layout(everything, None, EMOJI_TEMPLATES, captions=1))
    place = {key: i for i, key in enumerate(other_style.keys)}
    drawn = [int(i) for i in noto if everything.keys[i] in place]
    pictures = encoder.images(Subset(other_style, [place[everything.keys[i]] for i in drawn]))
    sets = {
        "HO": take(whole, twemoji.tolist()),
        "NOTO": dataclasses.replace(take(whole, drawn), image=pictures),
    }
    found = evaluate_features(sets, take(whole, trained.tolist()))
    return {key: dict(one.metrics) for key, one in found.items()}


def run(task: Mapping[str, Any]) -> dict[str, Any]:
    """One finished run, ready for JSON; ``task``: stage, row, seed, epochs, flags."""
    trained, twemoji, noto = split_concepts(task["stage"], task["seed"])
    with tempfile.TemporaryDirectory() as folder:
        words = arguments(task["flags"], task["seed"], task["epochs"])
        seconds = train(words, trained, Path(folder))
        checkpoint = Path(folder) / "run" / "checkpoints" / "epoch_latest.pt"
        metrics = judge(checkpoint, trained, twemoji, noto)
    return {**task, "metrics": metrics, "cpu_seconds": seconds}


# Many runs


def task(stage: str, row: str, seed: int, epochs: float, flags: Sequence[str]) -> dict[str, Any]:
    """A run to be done; these five are the key under which it is known when it is done."""
    return {"stage": stage, "row": row, "seed": seed, "epochs": epochs, "flags": list(flags)}


def key_of(run: Mapping[str, Any]) -> str:
    return json.dumps([run[name] for name in ("stage", "row", "seed", "epochs", "flags")])


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """The runs of a runs.jsonl by key; a line torn by a crash is left out."""
    runs = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            one = json.loads(line)
            runs[key_of(one)] = one
    return runs


def do_all(tasks: Sequence[dict[str, Any]], out: Path, jobs: int) -> list[dict[str, Any]]:
    """Do what is not done yet; returns all runs of ``tasks`` that are finished."""

    def attempt(one: dict[str, Any]) -> dict[str, Any]:
        try:
            return run(one)
        except (RuntimeError, ValueError, OSError) as error:
            return {**one, "error": str(error)}

    path = out / "runs.jsonl"
    done = finished(path)
    missing = [one for one in tasks if key_of(one) not in done]
    print(f"{len(tasks)} runs, {len(tasks) - len(missing)} already there", flush=True)
    with ThreadPool(jobs) as pool:
        for number, one in enumerate(pool.imap_unordered(attempt, missing), start=1):
            label = f"[{number}/{len(missing)}] {one['stage']}: {one['row']}, seed {one['seed']}"
            if "error" in one:
                print(f"FAILED {label}: {one['error']}", flush=True)
                continue
            with path.open("a") as file:
                file.write(json.dumps(one) + "\n")
            done[key_of(one)] = one
            print(f"{label}: {one['cpu_seconds']:.0f} s of CPU", flush=True)
    return [done[key_of(one)] for one in tasks if key_of(one) in done]


def select(out: Path, jobs: int) -> None:
    """Try the candidates; write selection.json with every score and the two choices.

    A score is the mean of probe, AMI and R@5 on the selection concepts.
    """
    tasks = [
        task("select", f"{family}: {name}", seed, EPOCHS, flags)
        for seed in SELECTION_SEEDS
        for family, candidates in CANDIDATES.items()
        for name, flags in candidates.items()
    ]
    scores: dict[str, list[float]] = {}
    for one in do_all(tasks, out, jobs):
        values = [found[name] for found in one["metrics"].values() for name in SCORED]
        scores.setdefault(one["row"], []).append(statistics.fmean(values))
    record: dict[str, Any] = {"seeds": SELECTION_SEEDS, "epochs": EPOCHS, "scored": SCORED}
    for family, candidates in CANDIDATES.items():
        own = {name: scores.get(f"{family}: {name}", []) for name in candidates}
        best = max(own, key=lambda name: statistics.fmean(own[name] or [0.0]))
        record[family] = {"scores": own, "chosen": best, "flags": candidates[best]}
        print(f"{family}: chose '{best}' of {own}")
    _write(out / "selection.json", record)


def main_tasks(
    out: Path, seeds: Sequence[int], epochs: float, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Seed by seed, so that whatever is finished can be compared in pairs."""
    selection = _read(out / "selection.json")
    chosen, distill = (selection[name]["flags"] for name in CANDIDATES)
    longer = round(epochs * COST, 2)
    return [
        task("main", row, seed, longer if row == EQUAL_TIME else epochs, flags)
        for seed in seeds
        for row, flags in main_rows(chosen, distill).items()
        if not only or row in only
    ]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    more = "of each row, and twice as many of the rows that the verdict rests on (default: 5)"
    parser.add_argument("--report", action="store_true", help="only report what is finished")
    parser.add_argument("--seeds", type=int, default=5, help=more)
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="four rows, two seeds, four epochs")
    args = parser.parse_args(argv)
    out = args.out / "quick" if args.quick else args.out
    out.mkdir(parents=True, exist_ok=True)

    def tasks() -> list[dict[str, Any]]:
        if args.quick:
            return main_tasks(out, range(2), QUICK_EPOCHS, QUICK_ROWS)
        more = range(args.seeds, 2 * args.seeds)
        few = main_tasks(out, range(args.seeds), EPOCHS)
        return few + main_tasks(out, more, EPOCHS, VERDICT_ROWS)

    if args.quick:  # its time goes into runs; the settings are the whole study's
        (out / "selection.json").write_text((RESULTS / "selection.json").read_text())
    elif not args.report:
        select(out, args.jobs)
    if not args.report:
        do_all(tasks(), out, args.jobs)
    done = finished(out / "runs.jsonl")
    runs = [done[key_of(one)] for one in tasks() if key_of(one) in done]
    write_report(runs, list(dict.fromkeys(one["row"] for one in tasks())), out, args.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
