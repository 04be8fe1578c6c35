"""One run of the study: a split of the concepts, training, evaluation; and what a step costs.

The concepts are cut three ways. A fifth is for selection: every setting is chosen by its scores
there. Of the rest, an eighth is held out, another one for each seed; the table's numbers come from
these and from the Noto drawings of all concepts but the selection's.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.study_rows import BASE
from protoclip.config import TrainConfig, build_parser, parse
from protoclip.data import Subset, build_transform, open_dataset
from protoclip.data.types import heldout_mask
from protoclip.evaluate import Encoder, ProbeTrain, evaluate_features
from protoclip.evaluate.datasets import EMOJI_TEMPLATES
from protoclip.evaluate.tasks import encode_set, take
from protoclip.model import ProtoModel, build_model
from protoclip.teacher import MINILM, load_teacher, pca
from protoclip.training.inputs import uses_teacher
from protoclip.training.loop import Trainer
from protoclip.training.phases import Phases
from protoclip.training.plan import make_plan
from protoclip.training.run_folder import RunFolder

DATA = "builtin:emoji"
SELECTION_PERCENT, SELECTION_SEED = 20, 20261125
CPU = torch.device("cpu")
STEP_PHASES, EPISODE_PHASES = ("data", "forward", "backward"), ("features", "clusters")


def split_concepts(stage: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of concepts: trained on, judged in Twemoji's style, judged in Noto's style."""
    everything = open_dataset(DATA, "all")
    groups = everything.labels["group"].ids.numpy()
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


def config_of(flags: list[str], seed: int, epochs: float) -> TrainConfig:
    argv = [*BASE, "--seed", str(seed), "--epochs", str(epochs), *flags]
    return parse(build_parser("benchmarks.study", ""), argv)


def train(
    config: TrainConfig, concepts: np.ndarray, folder: Path
) -> tuple[ProtoModel, dict[str, float]]:
    """Train on some concepts; the model, and the seconds by phase."""
    dataset = Subset(open_dataset(DATA, "all"), concepts)
    torch.manual_seed(config.run.seed)
    model = build_model(config.model)
    teacher = None
    if uses_teacher(config) and config.episode.external_teacher != "none":
        rows = load_teacher(MINILM, open_dataset(DATA, "all"), dim=0)[torch.from_numpy(concepts)]
        teacher = pca(rows, config.episode.external_teacher_dim)
    transform = build_transform(model.image_size, model.mean, model.std, config.data.augmentation)
    phases, run_folder = Phases(CPU), RunFolder(folder, config)
    plan = make_plan(config, len(dataset))
    trainer = Trainer(
        config,
        plan,
        model,
        dataset,
        transform,
        teacher,
        run_folder,
        phases,
        device=CPU,
        precision="fp32",
    )
    try:
        trainer.run()
    finally:
        run_folder.close()
    return model, phases.seconds()


def judge(
    model: ProtoModel, trained: np.ndarray, twemoji: np.ndarray, noto: np.ndarray
) -> dict[str, dict[str, float]]:
    """Metrics of the concepts ``twemoji`` (set HO) and of ``noto`` in that style (set NOTO)."""
    everything, other_style = open_dataset(DATA, "all"), open_dataset(DATA, "noto")
    encoder = Encoder(model, CPU)
    whole = encode_set(encoder, everything, EMOJI_TEMPLATES)
    place = {key: i for i, key in enumerate(other_style.keys)}
    drawn = [int(i) for i in noto if everything.keys[i] in place]
    picture_rows = [place[everything.keys[i]] for i in drawn]
    pictures = encoder.images(Subset(other_style, picture_rows))
    sets = {
        "HO": take(whole, twemoji.tolist()),
        "NOTO": dataclasses.replace(take(whole, drawn), image=pictures),
    }
    own = take(whole, trained.tolist())
    return evaluate_features(sets, ProbeTrain(own.image, own.labels)).metrics


def run(task: Mapping[str, Any]) -> dict[str, Any]:
    """One finished run, ready for JSON; ``task``: stage, row, seed, epochs, flags."""
    config = config_of(task["flags"], task["seed"], task["epochs"])
    trained, twemoji, noto = split_concepts(task["stage"], task["seed"])
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        model, seconds = train(config, trained, Path(folder) / "run")
        cpu = time.process_time() - began
    metrics = judge(model, trained, twemoji, noto)
    return {**task, "metrics": metrics, "seconds": seconds, "training_cpu_seconds": cpu}


def episode_seconds(flags: list[str], episodes: int = 2) -> dict[str, list[float]]:
    """Seconds of each step (data, forward, backward) and each episode (features, clusters).

    The episodes are epochs with prototypes, after one without.
    """
    config = config_of([*flags, "--infonce-warmup-epoch", "1"], 0, 1 + episodes)
    with tempfile.TemporaryDirectory() as folder:
        trained, _, _ = split_concepts("main", 0)
        plan = make_plan(config, len(trained))
        train(config, trained, Path(folder) / "run")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines][plan.steps_per_epoch - 1 :]
    samples: dict[str, list[float]] = {}
    for before, after in itertools.pairwise(records):
        for phase in (*STEP_PHASES, *EPISODE_PHASES):
            spent = after.get(f"seconds_{phase}", 0.0) - before.get(f"seconds_{phase}", 0.0)
            if spent > 0:
                samples.setdefault(phase, []).append(spent)
    return samples


def epoch_seconds(rounds: list[dict[str, list[float]]], steps: int) -> dict[str, float]:
    """Seconds of an epoch by phase, from the fastest steps: other work on the machine only adds."""
    totals = {}
    for phase in (*STEP_PHASES, *EPISODE_PHASES):
        samples = [value for one in rounds for value in one.get(phase, [])]
        if samples:
            totals[phase] = min(samples) * (steps if phase in STEP_PHASES else 1)
    return totals
