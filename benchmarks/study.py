"""What ProtoCLIP is worth on the built-in pictures: ``make study``, resumable at any point.

Fixed before the runs:

Model and settings are those of ``protoclip train``; a row is a set of its flags, or of rivals.py.
Data: builtin:emoji in three styles, without flags, the only family of their group. Families of
concepts are cut in three: 15 % for development, always the same; of the rest 40 % to test, others
for each seed; what is left trains. Each seed leaves a style out too, in turn. A model trains on two
styles of its training families, about 1,700 pictures, and is judged on the test families in the
style left out ("new", about 560 pictures) and in the other two ("seen", about 1,120).
Tuning: learning rate and epochs of every row on ``GRID``, two seeds each (rivals one), by the mean
of the primary metrics over both sets of the *development* families.
Primary metrics: k-nearest-neighbour accuracy and AMI of k-means, both for 8 groups, set "new".
Secondary: those for 98 subgroups and on "seen", linear probe, zero-shot of 98 subgroups, R@5.
Differences to CLIP are paired by seed on one processor, with 95 % t intervals; Holm's correction of
a data set's primary metrics, for ProtoCLIP's two comparisons by themselves, and for all other rows
together. Rows run on another processor than the main ones have a CLIP of their own beside them.
"CLIP, time of ProtoCLIP" trains for as many epochs as fill ProtoCLIP's CPU time with its teacher.
A second data set, builtin:openclipart if installed, repeats the main rows with the settings found.

Order: main rows, controls, rivals, clip art. A finished run is one line of ``runs.jsonl``, with
commit, processor and torch's version, and is not done again. On two cores ``OMP_NUM_THREADS=1``
and two copies side by side, one of ``--seeds even`` and one of ``odd``, do a third more.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.rivals import RIVALS
from benchmarks.study_report import CLIP, EQUAL_TIME, PAGE, PROTO, score, write_report
from protoclip import train
from protoclip.commands import TASKS, train_parser
from protoclip.config import TrainConfig
from protoclip.data import DataError, EpochOrder, PairDataset, Subset, open_dataset
from protoclip.data.types import heldout_mask
from protoclip.evaluate.datasets import EMOJI_TEMPLATES, Layout
from protoclip.evaluate.tasks import Encoder, EvalSet, PixelEncoder, encode_set, evaluate_features
from protoclip.flags import parse
from protoclip.model import build_model
from protoclip.prototypes import INTERNAL
from protoclip.run_folder import NullRunFolder
from protoclip.schedule import Stopped, make_plan
from protoclip.step import seed_everything
from protoclip.teacher import MINILM, load_teacher

RESULTS = Path(__file__).parent / "results" / "study"
EMOJI, CLIP_ART = "builtin:emoji", "builtin:openclipart"
STYLES = ("twemoji", "noto", "openmoji")
DEVELOPMENT_PERCENT, DEVELOPMENT_SEED, TEST_PERCENT = 15, 20261126, 40
TRAIN, TEST, DEVELOPMENT, NOWHERE = range(4)
CPU = torch.device("cpu")

# What each row of the table changes in the default run.
PLAIN = ("--method", "clip")
DISTILL = ("--w-proto", "0", "--w-proto-external", "0", "--w-distill", "1")
MAIN: dict[str, tuple[str, ...]] = {CLIP: PLAIN, PROTO: (), EQUAL_TIME: PLAIN}
CONTROLS = {
    "features extracted": ("--episode-features", "extract"),
    "internal only": ("--w-proto-external", "0", "--external-teacher", "none"),
    "external only": ("--w-proto", "0"),
    "distilled similarities": (*DISTILL, "--distill-temperature", "0.05"),
    "SigLIP": (*PLAIN, "--siglip"),
}
EXPERIMENTS = {name: PLAIN if name == "token classification" else () for name in RIVALS}
ROWS = MAIN | CONTROLS | EXPERIMENTS
PARTNERS = CLIP, PROTO  # what the rows of CONTROLS and EXPERIMENTS are shown beside
GRID = ((1e-3, 33), (5e-4, 33), (2e-3, 33), (1e-3, 66))  # learning rate, epochs
FLOORS = ("most frequent class", "12 × 12 pixels", "untrained", "the teacher itself")


@dataclass(frozen=True)
class Size:
    """How much is done; the fields of ``FULL`` are the protocol."""

    grid: tuple[tuple[float, float], ...] = GRID
    tuning_seeds: tuple[int, ...] = (1000, 1001)
    main_seeds: int = 10
    other_seeds: int = 5
    rival_seeds: int = 3
    points: int = 6  # of a curve
    pictures: int = 0  # of each set at most; 0: all
    flags: tuple[str, ...] = ()


FULL = Size()
QUICK = Size(((1e-3, 3), (2e-3, 3)), (1000,), 2, 2, 2, 2, 600, ("--batch-size", "128"))


@dataclass(frozen=True)
class Task:
    """A run to be done; the fields are the key under which it is known when it is done."""

    stage: str  # "tune" | "floor" | "main"
    data: str
    row: str
    seed: int
    lr: float = 0.0
    epochs: float = 0.0
    machine: str = ""  # where it runs, to be paired; "": anywhere

    @property
    def key(self) -> str:
        return json.dumps(asdict(self))


Done = dict[str, dict[str, Any]]  # finished runs by key


# Data


@dataclass(frozen=True)
class Split:
    """What a seed trains on and is judged on."""

    train: PairDataset
    judged: Mapping[str, PairDataset]  # "new", and "seen" where there are several styles


def parts(dataset: PairDataset, seed: int) -> dict[str, int]:
    """Which part each key is in, whole families alike."""
    groups = dataset.labels["group"].ids.numpy()
    families = getattr(dataset, "families", None)
    family = np.arange(len(groups)) if families is None else families.ids.numpy()
    known, first, place = np.unique(family, return_index=True, return_inverse=True)
    part, groups = np.full(len(known), TRAIN), groups[first]
    part[np.bincount(groups)[groups] == 1] = NOWHERE  # cannot be both learned and judged
    away = heldout_mask(len(known), groups, DEVELOPMENT_SEED, DEVELOPMENT_PERCENT)
    rest = np.flatnonzero(~away)
    part[away] = DEVELOPMENT
    part[rest[heldout_mask(len(rest), groups[rest], seed, TEST_PERCENT)]] = TEST
    return dict(zip(dataset.keys, part[place].tolist(), strict=True))


def open_split(data: str, seed: int, *, tuning: bool = False, pictures: int = 0) -> Split:
    """The split of a seed, judged on the test families, or those of development.

    Raises:
        DataError: a style of the emoji that is not installed.
    """
    part_of = parts(open_dataset(data), seed)

    def subset(spec: str, part: int) -> Subset:
        whole = open_dataset(spec)
        own = [key.rpartition("/")[2] if data == EMOJI else key for key in whole.keys]
        rows = [i for i, key in enumerate(own) if part_of[key] == part]
        return Subset(whole, rows[:: max(1, len(rows) // pictures)] if pictures else rows)

    judged = DEVELOPMENT if tuning else TEST
    if data != EMOJI:
        return Split(subset(data, TRAIN), {"new": subset(data, judged)})
    new = STYLES[seed % len(STYLES)]
    seen = f"{EMOJI}:{'+'.join(style for style in STYLES if style != new)}"
    judged_sets = {"new": subset(f"{EMOJI}:{new}", judged), "seen": subset(seen, judged)}
    return Split(subset(seen, TRAIN), judged_sets)


# One run


class TeacherEncoder(PixelEncoder):
    """The teacher's features in the place of the pictures'."""

    def images(self, dataset: PairDataset) -> Tensor:
        return load_teacher(MINILM, dataset, dim=0)


def judge(encoder: Encoder, split: Split, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """The metrics by set."""
    prompts = "zeroshot" in tasks
    sets = {
        name: encode_set(encoder, Layout(judged, None, EMOJI_TEMPLATES, 1), prompts=prompts)
        for name, judged in split.judged.items()
    }
    image = encoder.images(split.train)
    learned = EvalSet(image, image[:0], labels=split.train.labels)
    found = evaluate_features(sets, learned, tasks=tasks)
    return {
        key: {name: round(value, 5) for name, value in one.metrics.items()}
        for key, one in found.items()
    }


def configure(task: Task, size: Size) -> TrainConfig:
    """The settings of ``protoclip.train`` with the row's flags."""
    words = [*size.flags, *ROWS[task.row], "--seed", str(task.seed)]
    words += ["--lr", str(task.lr), "--epochs", str(task.epochs)]
    return parse(train_parser(), words)


def run(task: Task, size: Size) -> dict[str, Any]:
    """One finished run, ready for JSON."""
    split = open_split(task.data, task.seed, tuning=task.stage == "tune", pictures=size.pictures)
    counts = {"train": len(split.train)} | {name: len(one) for name, one in split.judged.items()}
    if task.stage == "floor":
        return asdict(task) | {"metrics": floor(task, split)} | counts
    return asdict(task) | trained(task, size, split) | counts


def floor(task: Task, split: Split) -> dict[str, Any]:
    """Scores without training."""
    if task.row == "most frequent class":
        return {
            name: {"group/knn_acc1": int(ids.bincount().max()) / len(ids), "group/ami": 0.0}
            for name, one in split.judged.items()
            for ids in (one.labels["group"].ids,)
        }
    seed_everything(task.seed)
    kind = {"untrained": Encoder, "12 × 12 pixels": PixelEncoder}.get(task.row, TeacherEncoder)
    tasks = TASKS if kind is Encoder else ("knn", "grouping", "linear_probe")
    return judge(kind(build_model(TrainConfig().model), CPU), split, tasks)


def trained(task: Task, size: Size, split: Split) -> dict[str, Any]:
    """Train a row as ``protoclip.train`` does; its scores, costs, curve and clusters."""
    config = configure(task, size)
    gc.collect()  # the trainer of the run before is a circle of references
    seed_everything(task.seed)
    model = build_model(config.model)
    began = time.process_time()
    teacher, _ = train.open_teacher(config, split.train, CPU)
    teacher_seconds = time.process_time() - began  # about 0 where the cache has it
    order = EpochOrder(split.train)
    plan = make_plan(config, order.size)
    setup = train.Setup(config, plan, split.train, order, CPU, "fp32", teacher)
    only_new, curve = Split(split.train, {"new": split.judged["new"]}), []

    def measure(model: Any) -> dict[str, float]:
        """One point of the curve, between steps and off the clock."""
        nonlocal began
        now = time.process_time()
        scores = judge(Encoder(model, CPU), only_new, ("knn", "grouping"))["new"]
        point = [trainer.step * plan.batch_size, round(now - began, 2)]
        curve.append([*point, scores["group/knn_acc1"], scores["group/ami"]])
        began += time.process_time() - now
        return {}

    points = size.points if task.stage == "main" and task.row in MAIN else 1
    frequency = config.optim.epochs / points
    trainer = train.Trainer(setup, model, NullRunFolder(Path()), evaluations=[(measure, frequency)])
    if task.row in RIVALS:
        trainer.stepper.loss = RIVALS[task.row](trainer)
    began = time.process_time()
    trainer.run()
    return {
        "metrics": judge(Encoder(model, CPU), split, TASKS),
        "curve": curve,
        "cpu_seconds": curve[-1][1],
        "teacher_seconds": round(teacher_seconds, 2),
        "clusters": clusters(trainer),
    }


def clusters(trainer: train.Trainer) -> dict[str, float]:
    """Purity of the last episode's clusters by source, and the entropy of its soft targets."""
    episode, tau = trainer.episode, trainer.config.episode.target_temperature
    if episode is None:
        return {}
    found = {k: v for k, v in episode.metrics.items() if k.endswith("purity_group")}
    entropies = []
    for one in (one for one in episode.sets if one.source in INTERNAL and one.targets is not None):
        centroids = one.clustering.centroids
        logs = (centroids @ centroids.T / tau).log_softmax(1)
        entropies.append(float(-(logs.exp() * logs).sum(1).mean()))
        found["most_nats"] = float(np.log(len(centroids)))
    if entropies:
        found["target_nats"] = statistics.fmean(entropies)
    return {name: round(value, 4) for name, value in found.items()}


# Many runs


def tuning(row: str, size: Size) -> list[Task]:
    """A row's runs on the development families; a rival's are those of the first seed."""
    known = size.tuning_seeds[:1] if row in EXPERIMENTS else size.tuning_seeds
    settings = [(seed, *setting) for seed in known for setting in size.grid]
    return [Task("tune", EMOJI, row, *setting) for setting in settings]


def chosen(row: str, size: Size, done: Done) -> tuple[float, float]:
    """Learning rate and epochs of a row, once its tuning is done."""
    if row == EQUAL_TIME:
        (lr, _), (_, epochs) = chosen(CLIP, size, done), chosen(PROTO, size, done)
        return lr, round(epochs * time_ratio(size, done), 1)
    scores = {
        setting: statistics.fmean(
            score(done[one.key]) for one in tuning(row, size) if (one.lr, one.epochs) == setting
        )
        for setting in size.grid
    }
    return max(scores, key=lambda setting: scores[setting])


def time_ratio(size: Size, done: Done) -> float:
    """CPU time of ProtoCLIP, its teacher's features counted once, beside CLIP's, in tuning."""
    own, plain = ([done[one.key] for one in tuning(row, size)] for row in (PROTO, CLIP))
    teacher = max(one["teacher_seconds"] for one in own)
    total = sum(one["cpu_seconds"] + teacher for one in own)
    return total / sum(one["cpu_seconds"] for one in plain)


def tasks(size: Size, done: Done, here: str) -> Iterator[Task]:
    """Every run in order; later ones follow from what ``done`` says of the earlier."""
    counts = size.main_seeds, size.other_seeds, size.rival_seeds
    for rows, count in zip((MAIN, CONTROLS, EXPERIMENTS), counts, strict=True):
        lists = [tuning(row, size) for row in rows if row != EQUAL_TIME]
        yield from (one for alike in zip(*lists, strict=True) for one in alike)
        if any(one.key not in done for own in lists for one in own):
            print("the other process is still tuning; run it again to go on")
            return
        yield from seeds(EMOJI, rows, count, size, done, here)
    try:
        open_dataset(CLIP_ART)
    except DataError as error:
        print(f"no second data set: {error}")
    else:
        yield from seeds(CLIP_ART, MAIN, size.other_seeds, size, done, here)


def seeds(
    data: str, rows: Mapping, count: int, size: Size, done: Done, here: str
) -> Iterator[Task]:
    """Seed by seed, each on one processor, so that what is finished can be compared in pairs."""
    names = rows if rows is MAIN else (*PARTNERS, *rows)
    settings = {name: chosen(name, size, done) for name in names}
    for seed in range(count):
        if rows is MAIN:
            yield from (Task("floor", data, name, seed) for name in FLOORS)
        own = [Task("main", data, name, seed, *settings[name]) for name in names]
        began = [done[one.key]["machine"] for one in own if one.row in rows and one.key in done]
        own = [replace(one, machine=[*began, here][0]) for one in own]
        if own[0].machine == here:
            yield from own
        elif any(one.key not in done for one in own):
            print(f"seed {seed} is left to the processor where it began: {began[0]}")


def finished(path: Path) -> Done:
    """The runs of a runs.jsonl by key, with and without the processor; torn lines are left out."""
    done: Done = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            one = json.loads(line)
        except ValueError:
            continue
        task = Task(**{name: one[name] for name in Task.__dataclass_fields__})
        done.setdefault(replace(task, machine="").key, one)
        done[task.key] = one
    return done


def work(size: Size, path: Path, hours: float, seeds: str = "all") -> Done:
    """Do what is not done yet until the time is up; all finished runs."""
    done, began, about = finished(path), time.monotonic(), machine.describe()
    if path.is_file() and not path.read_text().endswith("\n"):  # a torn line
        path.write_text(path.read_text() + "\n")
    for task in tasks(size, done, str(about["machine"])):
        done |= finished(path)  # by another process
        if task.key in done or seeds not in ("all", ("even", "odd")[task.seed % 2]):
            continue
        if time.monotonic() - began > 3600 * hours:
            print(f"{hours:g} hours are over; run it again to go on")
            break
        start = time.monotonic()
        try:
            found = run(task, size)
        except ValueError as error:
            if not str(error).startswith(("training:", "episode:")):
                raise
            # It diverged: no scores.
            found = asdict(task) | {"metrics": {}, "error": str(error)}
        found |= {name: about[name] for name in ("machine", "threads", "commit", "date")}
        found |= {"torch": torch.__version__, "seconds": round(time.monotonic() - start, 1)}
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        done[task.key] = found
        print(f"{task.stage} {task.row}, seed {task.seed}: {found['seconds']:.0f} s", flush=True)
    return done


def main(argv: Sequence[str] | None = None, size: Size | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.study", description=__doc__)
    parser.add_argument("--hours", type=float, default=1e9, help="start no run after so long")
    parser.add_argument("--seeds", choices=("all", "even", "odd"), default="all")
    parser.add_argument("--report", action="store_true", help="only report what is finished")
    parser.add_argument("--quick", action="store_true", help="every step, tiny: a few minutes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args(argv)
    size = size or (QUICK if args.quick else FULL)
    out = args.out / "quick" if args.quick else args.out
    out.mkdir(parents=True, exist_ok=True)
    code = 0
    try:
        done = work(size, out / "runs.jsonl", 0 if args.report else args.hours, args.seeds)
    except (Stopped, KeyboardInterrupt):
        print("stopped; only the run that was going on is lost, run it again to go on")
        done, code = finished(out / "runs.jsonl"), 130
    except DataError as error:
        parser.error(str(error))
    others = dict.fromkeys((*PARTNERS, *CONTROLS), size.other_seeds)
    others |= dict.fromkeys(EXPERIMENTS, size.rival_seeds)
    wanted = {
        EMOJI: [dict.fromkeys(MAIN, size.main_seeds), others],
        CLIP_ART: [dict.fromkeys(MAIN, size.other_seeds)],
    }
    found = {id(one): one for one in done.values()}  # each may be there by two keys
    write_report([*found.values()], wanted, FLOORS, out, PAGE if out == RESULTS else None)
    return code


if __name__ == "__main__":
    sys.exit(main())
