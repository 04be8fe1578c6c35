"""What prototypes are worth on icons: ``make study``, resumable at any point.

Said before any run:

Data: npm's @iconify/json (``data.py``), one picture of each name and set, no brands, flags or
emoji. Twenty sets of different looks are held out with everything of their families, and 70
concepts with every name that contains their words; near-duplicates of held-out drawings do not
train (``split.py``). A run trains on 60,000 of the other icons, drawn by its seed, for 4
epochs in batches of 256 with one thread; episodes of N = 15,000 samples, K = N / 10 = 1,500.
Tuning: every row on the same four learning rates and epochs (``GRID``), one seed, MLP tower, on
twelve other sets and 70 other concepts, with the test families out as well (drawings of the test
concepts from other families stay in). The highest mean of the primary metrics counts, for both
towers.
Towers, in fp32: ``cnn``, the default model of ``protoclip train``; ``mlp``, two layers over fixed
features (HOG and 12 x 12 pixels), for many seeds. Both have tokens renumbered to those that occur.
Rows: ``ROWS``. All have the same flags but for what the row says.
Primary metrics, all on sets never trained on, over seen concepts: zero-shot accuracy, linear probe,
AMI of k-means. Secondary: nearest neighbours, R@5 (pictures to words), nearest neighbours and AMI
of new concepts.
Comparisons: paired by seed, 95 % t intervals. First family: ProtoCLIP against CLIP at ProtoCLIP's
CPU time, three metrics and two towers, Holm over the six. Second family: every row against CLIP at
equal samples, Holm over all of them, by tower. The secondary metrics are not corrected.
Equal time: the ratio of CPU time a sample comes from one pair of runs for each tower whose episodes
alternate; the teacher's features are computed once for all runs and not counted (their cost is
on the page).
Seeds: 8 with the MLP and 5 with the CNN for CLIP, CLIP at equal time and ProtoCLIP; 3 with the MLP
for the other rows. Floors: chance, most frequent, pixels, HOG, untrained towers.

A finished run is one line of ``runs.jsonl`` and is not done again; with ``--workers`` each process
takes the next run that no other has.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import machine
from benchmarks.study.data import HOG, IconPairs, Icons, default_folder, read, toy_icons
from benchmarks.study.report import CLIP, EQUAL_TIME, PAGE, PROTO, score, write_report
from benchmarks.study.split import Rules, Split, by_lot, make_split
from protoclip.common.paths import cache_dir
from protoclip.data import Batch, DataError, Draws, EpochOrder, Labels
from protoclip.data.loader import Loader
from protoclip.episodes.prototypes import INTERNAL
from protoclip.episodes.teacher import open_teacher
from protoclip.evaluate.during import PeriodicEvaluation
from protoclip.evaluate.tasks import Encoder, EvalSet, evaluate_features
from protoclip.model import (
    CONFIG_FOLDER,
    ProtoModel,
    ShortTokenizer,
    build_model,
    put_channels_last,
)
from protoclip.runs.run_folder import NullRunFolder
from protoclip.settings.commands import train_parser
from protoclip.settings.config import ModelConfig, TrainConfig
from protoclip.settings.flags import parse
from protoclip.training.schedule import make_plan
from protoclip.training.step import seed_everything
from protoclip.training.stops import Stopped
from protoclip.training.trainer import Setup, Trainer

RESULTS = Path(__file__).parents[1] / "results" / "study"
CPU = torch.device("cpu")
MLP, CNN = "mlp", "cnn"
HIDDEN = 512  # of the MLP tower
CONCEPT = "concept"
TUNING_SEED = 1000

PLAIN = ("--method", "clip")
BOTH = ("--w-proto", "1", "--w-proto-external", "1")
STORED = ("--episode-features", "reuse", *BOTH)
MAIN: dict[str, tuple[str, ...]] = {CLIP: PLAIN, EQUAL_TIME: PLAIN, PROTO: STORED}
OTHERS: dict[str, tuple[str, ...]] = {
    "features extracted": ("--episode-features", "extract", *BOTH),
    "external only": (*STORED, "--w-proto", "0"),
    "internal only": (*STORED, "--w-proto-external", "0"),
    "K = N / 20": (*STORED, "--k", "{episode/20}"),
    "K = N / 100": (*STORED, "--k", "{episode/100}"),
    "temperature 0.03": (*STORED, "--target-temperature", "0.03"),
    "temperature 0.1": (*STORED, "--target-temperature", "0.1"),
    "SigLIP": (*PLAIN, "--siglip"),
    "SigLIP and prototypes": (*STORED, "--siglip"),
}
ROWS = MAIN | OTHERS
GRID = ((1e-3, 4.0), (2e-3, 4.0), (4e-3, 4.0), (2e-3, 2.0))  # learning rate, epochs
FLOORS = ("chance", "most frequent", "12 × 12 pixels", "HOG", "untrained MLP", "untrained CNN")


@dataclass(frozen=True)
class Size:
    """How much is done; the defaults are the protocol."""

    icons: int = 60_000
    episode: int = 15_000
    batch: int = 256
    grid: tuple[tuple[float, float], ...] = GRID
    main_seeds: Mapping[str, int] = field(default_factory=lambda: {MLP: 8, CNN: 5})
    other_seeds: int = 3
    rules: Rules = Rules()
    toy: bool = False  # drawings made up here, for tests


FULL = Size()
QUICK = Size(
    icons=400,
    episode=128,
    batch=32,
    grid=((1e-3, 2.0), (2e-3, 2.0)),
    main_seeds={MLP: 2, CNN: 1},
    other_seeds=1,
    rules=Rules(("test-0", "test-1"), ("tune-0", "tune-1"), 2, 2, 2, 6, 100, 2, 6, 40),
    toy=True,
)


@dataclass(frozen=True)
class Task:
    """A run to be done; the fields are the key under which it is known when it is done."""

    stage: str  # "tune" | "pairs" | "floor" | "main"
    tower: str
    row: str
    seed: int
    lr: float = 0.0
    epochs: float = 0.0

    @property
    def key(self) -> str:
        return json.dumps(vars(self))  # asdict copies, and orders of many runs ask often


Done = dict[str, dict[str, Any]]  # finished runs by key


# Data and towers


@dataclass(frozen=True)
class Data:
    """The icons, and what every run needs of them."""

    icons: Icons
    rules: Rules

    @cached_property
    def test(self) -> Split:
        return make_split(self.icons, self.rules, tuning=False)

    @cached_property
    def tuning(self) -> Split:
        return make_split(self.icons, self.rules, tuning=True)

    @cached_property
    def features(self) -> Tensor:
        """HOG and pixels of every icon, each column at mean 0, and at deviation 1 on average."""
        rows = torch.from_numpy(self.icons.features.astype(np.float32))
        rows -= rows.mean(0)
        rows[:, :HOG] /= rows[:, :HOG].std(0).mean()
        rows[:, HOG:] /= rows[:, HOG:].std(0).mean()
        return rows

    @cached_property
    def digest(self) -> str:
        """Tells the icons apart from those of another package or drawn in another way."""
        names = "\n".join(self.icons.keys).encode()
        return hashlib.sha256(names + self.icons.hashes.tobytes()).hexdigest()[:12]

    def split(self, task: Task) -> Split:
        return self.tuning if task.stage in ("tune", "pairs") else self.test


class WordTokens:
    """OpenCLIP's tokens of all captions, computed once and renumbered to those that occur.

    AdamW's pass over a table of 49,408 tokens costs as much as the rest of a step.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        parts = [tokenizer(list(texts[i : i + 4096])) for i in range(0, len(texts), 4096)]
        tokens = torch.cat(parts)
        token_ids, place = tokens.unique(return_inverse=True)  # ascending: 0 pads, the largest ends
        self.size = len(token_ids)
        self.table = place  # int64 [texts, context]
        self.row = {text: i for i, text in enumerate(texts)}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self.table[torch.tensor([self.row[text] for text in texts])]


class FeatureTower(nn.Sequential):
    """The image tower over fixed features: [B, F] -> [B, D]."""

    image_size = 48
    image_mean = image_std = (0.5, 0.5, 0.5)

    def __init__(self, width: int, out: int) -> None:
        super().__init__(
            *(nn.Linear(width, HIDDEN), nn.LayerNorm(HIDDEN), nn.GELU()),
            *(nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN), nn.GELU()),
            nn.Linear(HIDDEN, out),
        )
        self.output_dim = out


MLP_CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 48, "layers": 1, "width": 32, "head_width": 32, "patch_size": 48},
    "text_cfg": {"context_length": 16, "width": 128, "heads": 4, "layers": 1},
}


@dataclass(frozen=True)
class Towers:
    """Builds the models; a tower's captions are tokenised once."""

    data: Data
    tokens: dict[str, WordTokens] = field(default_factory=dict)

    def config(self, tower: str) -> dict[str, Any]:
        """OpenCLIP's config of a tower, but for the number of tokens."""
        if tower == MLP:
            return MLP_CONFIG
        return json.loads((CONFIG_FOLDER / "protoclip-icons.json").read_text())

    def build(self, tower: str, model: ModelConfig) -> ProtoModel:
        """A model with new weights by torch's generator."""
        config = self.config(tower)
        if tower not in self.tokens:
            import open_clip

            length = config["text_cfg"]["context_length"]
            tokenizer = open_clip.SimpleTokenizer(context_length=length)
            self.tokens[tower] = WordTokens(tokenizer, np.unique(self.data.icons.words).tolist())
        words = self.tokens[tower]
        config = {**config, "text_cfg": {**config["text_cfg"], "vocab_size": words.size}}
        digest = hashlib.sha256(json.dumps(config).encode()).hexdigest()[:12]
        path = cache_dir() / f"study-{tower}-{digest}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config))
        built = build_model(replace(model, model=str(path)))
        if tower == MLP:
            width = self.data.icons.features.shape[1]
            built.clip.visual = FeatureTower(width, config["embed_dim"])
        put_channels_last(built, CPU)
        built.tokenizer = words
        built.short_tokenizer = ShortTokenizer(words, None)
        return built


class FeatureLoader(Loader):
    """Loads the fixed features of pairs [pairs, F], by position, in the place of pictures."""

    def __init__(
        self, features: Tensor, dataset: IconPairs, batch_size: int, tokenizer: ShortTokenizer
    ) -> None:
        super().__init__(dataset, batch_size, lambda picture: picture, tokenizer)
        self.features = features
        self.dataset = dataset
        self.batch_size = batch_size
        self.tokenizer = tokenizer

    def batches(self, draws: Draws) -> Iterator[Batch]:
        for first in range(draws.start, len(draws.positions), self.batch_size):
            index = draws.positions[first : first + self.batch_size]
            texts = [self.dataset.captions(i)[0] for i in index.tolist()]
            yield Batch(index, self.features[index], self.tokenizer(texts))


@dataclass(frozen=True)
class FeatureEncoder(Encoder):
    """Encodes fixed features in the place of pictures."""

    features: Tensor = field(default_factory=lambda: torch.empty(0))  # of all icons, [N, F]

    @torch.no_grad()
    def images(self, dataset: Any) -> Tensor:
        rows = self.features[torch.from_numpy(dataset.chosen)]
        return self._rows(self.model.clip.encode_image, rows.split(self.batch_size))


@dataclass(frozen=True)
class FixedFeatures(Encoder):
    """Uses no model: some columns of the fixed features."""

    columns: slice = field(default_factory=lambda: slice(None))

    def images(self, dataset: Any) -> Tensor:
        rows = dataset.icons.features[dataset.chosen, self.columns]
        return torch.from_numpy(rows.astype(np.float32))


# One run


class Recorder(NullRunFolder):
    """Keeps what the trainer logs, in the place of a run folder."""

    def __init__(self) -> None:
        super().__init__(Path())
        self.records: list[dict[str, float]] = []

    def metrics(self, step: int, samples: int, scalars: Mapping[str, float]) -> None:
        if scalars:
            self.records.append(dict(scalars))

    def by_episode(self) -> list[dict[str, float]]:
        """Prototype accuracy (means), loss (last) and the clusters' inertia and sizes."""
        records_by_episode: dict[int, list[dict[str, float]]] = {}
        for record in self.records:
            if "episode" in record:
                records_by_episode.setdefault(int(record["episode"]), []).append(record)
        out = []
        for number, records in sorted(records_by_episode.items()):
            values = {"episode": float(number), "loss": records[-1]["loss"]}
            for name in records[-1]:
                if "accuracy" in name:
                    values[name] = statistics.fmean(
                        record[name] for record in records if name in record
                    )
            for name, value in records[0].items():
                own_metric = not name.startswith("seconds_")
                if own_metric and name.endswith(("_inertia", "_clusters", "_size_max", "_churn")):
                    values[name] = value
            out.append({name: round(value, 5) for name, value in values.items()})
        return out


def configure(
    task: Task, size: Size, teacher: Path, rows: Mapping[str, Sequence[str]] = ROWS
) -> TrainConfig:
    """The settings of ``protoclip.train`` with the row's flags."""
    words = ["--batch-size", str(size.batch), "--episode-size", str(size.episode)]
    words += ["--k", str(size.episode // 10), "--target-temperature", "0.01"]
    words += ["--external-teacher", str(teacher), "--seed", str(task.seed), "--precision", "fp32"]
    words += ["--lr", str(task.lr), "--epochs", str(task.epochs)]
    for word in rows[task.row]:
        share = word.removeprefix("{episode/").removesuffix("}")
        words.append(str(size.episode // int(share)) if share != word else word)
    return parse(train_parser(), words)


class Run:
    """A row's trainer on its data, ready to go."""

    rows: Mapping[str, Sequence[str]] = ROWS

    def __init__(self, task: Task, size: Size, data: Data, towers: Towers) -> None:
        self.task, self.data, self.split = task, data, data.split(task)
        config = configure(task, size, data.icons.folder / "teacher.npz", self.rows)
        rows = np.sort(by_lot(self.split.pool, 3, task.seed)[: size.icons])
        pairs = IconPairs(data.icons, rows, f"{len(rows):,} icons")
        seed_everything(task.seed)
        self.model = towers.build(task.tower, config.model)
        teacher = self.open_teacher(config, pairs)
        order = EpochOrder(pairs)
        plan = make_plan(config, order.size)
        setup = Setup(config, plan, pairs, order, CPU, "fp32", teacher)
        self.folder, self.entropies = Recorder(), []
        self.outside = 0.0  # CPU seconds of measuring
        interval_epochs = plan.steps_per_episode / plan.steps_per_epoch
        evaluations = [PeriodicEvaluation(self._measure, interval_epochs)]
        self.trainer = Trainer(setup, self.model, self.folder, evaluations=evaluations)
        if task.tower == MLP:
            self.trainer.loader = FeatureLoader(
                data.features[torch.from_numpy(rows)],
                pairs,
                config.optim.batch_size,
                self.model.short_tokenizer,
            )

    def open_teacher(self, config: TrainConfig, pairs: IconPairs) -> Tensor | None:
        """The teacher's features of the pairs, [pairs, d]."""
        return open_teacher(config, pairs, CPU)[0]

    def _measure(self, model: Any) -> dict[str, float]:
        """The entropy of an episode's soft targets, after it and off the clock."""
        began = time.process_time()
        if self.trainer.episode is not None:
            self.entropies.append(entropy(self.trainer))
        self.outside += time.process_time() - began
        return {}

    def encoder(self) -> Encoder:
        if self.task.tower == MLP:
            return FeatureEncoder(self.model, CPU, features=self.data.features)
        return Encoder(self.model, CPU)

    def finish(self) -> dict[str, Any]:
        """Train to the end and judge."""
        began = time.process_time()
        self.trainer.run()
        seconds = time.process_time() - began - self.outside
        judging = time.process_time()
        scores = judge(self.encoder(), self.split, self.data.icons)
        return {
            "metrics": scores,
            "cpu_seconds": round(seconds, 2),
            "judging_seconds": round(time.process_time() - judging, 1),
            "samples": self.trainer.plan.total_steps * self.trainer.plan.global_batch_size,
            "pairs": len(self.trainer.dataset),
            "parameters": sum(parameter.numel() for parameter in self.model.clip.parameters()),
            "episodes": self.folder.by_episode(),
            "entropies": self.entropies,
        }


def entropy(trainer: Trainer) -> dict[str, float]:
    """Mean entropy of the internal soft targets by source, and the most it can be, in nats."""
    entropies: dict[str, float] = {}
    episode = trainer.episode
    assert episode is not None
    for prototypes in episode.sets:
        if prototypes.source in INTERNAL and prototypes.targets is not None:
            centroids = episode.centroids[prototypes.source]
            temperature = trainer.config.episode.target_temperature
            logs = (centroids @ centroids.T / temperature).log_softmax(1)
            entropies[prototypes.source] = round(float(-(logs.exp() * logs).sum(1).mean()), 4)
            entropies["most"] = round(float(np.log(len(centroids))), 4)
    return entropies


def labelled(icons: Icons, rows: np.ndarray, names: Sequence[str], title: str) -> IconPairs:
    """Icons of some concepts, with their number as the label."""
    number = {name: i for i, name in enumerate(names)}
    pairs = IconPairs(icons, rows, title)
    ids = torch.tensor([number[str(word)] for word in icons.words[rows]], dtype=torch.int64)
    pairs.labels = {CONCEPT: Labels(ids, tuple(names))}
    return pairs


def judge(encoder: Encoder, split: Split, icons: Icons, *, texts: bool = True) -> dict[str, float]:
    """All metrics by name; ``texts`` False: features that have no words."""
    words = lambda names: encoder.texts(list(names)) if texts else torch.empty(0, 1)  # noqa: E731

    def features(rows: np.ndarray, names: Sequence[str], title: str) -> EvalSet:
        pairs = labelled(icons, rows, names, title)
        image = encoder.images(pairs)
        vectors = {CONCEPT: words(names)} if texts else {}
        return EvalSet(image, image[:0], labels=pairs.labels, class_vectors=vectors, title=title)

    seen = features(split.judged_seen, split.seen, "seen")
    labelled_set = features(split.labelled_seen, split.seen, "known")
    tasks = ("zeroshot", "linear_probe", "knn", "grouping")
    metrics = dict(evaluate_features({"seen": seen}, labelled_set, tasks=tasks)["seen"].metrics)
    scores = {
        "zero-shot": metrics.get(f"{CONCEPT}/acc1"),
        "zero-shot top 5": metrics.get(f"{CONCEPT}/acc5"),
        "probe": metrics[f"{CONCEPT}/lp_acc1"],
        "AMI": metrics[f"{CONCEPT}/ami"],
        "k-NN": metrics[f"{CONCEPT}/knn_acc1"],
    }
    new = features(split.judged_new, split.new, "new")
    labelled_set = features(split.labelled_new, split.new, "known")
    metrics = dict(
        evaluate_features({"new": new}, labelled_set, tasks=("knn", "grouping"))["new"].metrics
    )
    scores["k-NN, new"] = metrics[f"{CONCEPT}/knn_acc1"]
    scores["AMI, new"] = metrics[f"{CONCEPT}/ami"]
    if texts:
        pairs = IconPairs(icons, split.queries, "queries")
        image, text = encoder.images(pairs), words(icons.words[split.queries].tolist())
        asked = EvalSet(image, text, torch.arange(len(image)))
        metrics = dict(evaluate_features({"q": asked}, tasks=("retrieval",))["q"].metrics)
        scores["R@5"] = metrics["text_retrieval_recall@5"]
    return {name: round(value, 5) for name, value in scores.items() if value is not None}


def floor(task: Task, data: Data, towers: Towers) -> dict[str, Any]:
    """Scores without training."""
    if task.row in ("chance", "most frequent"):
        return {"metrics": constant_scores(task.row, data.test, data.icons)}
    return {"metrics": untrained_scores(task, data, towers)}


def constant_scores(row: str, split: Split, icons: Icons) -> dict[str, float]:
    """Of guessing by "chance", or of always naming the "most frequent" concept."""
    if row == "chance":
        seen = 1 / len(split.seen)
        new = 1 / len(split.new)
    else:
        seen = largest_share(icons, split.judged_seen, split.seen)
        new = largest_share(icons, split.judged_new, split.new)
    scores = {"zero-shot": seen, "probe": seen, "AMI": 0.0, "k-NN": seen}
    scores |= {"k-NN, new": new, "AMI, new": 0.0}
    if row == "chance":
        scores["R@5"] = 5 / len(split.queries)
    return {name: round(value, 5) for name, value in scores.items()}


def largest_share(icons: Icons, rows: np.ndarray, names: Sequence[str]) -> float:
    """Of the most frequent of the concepts among these icons."""
    ids = labelled(icons, rows, names, "").labels[CONCEPT].ids
    return float(ids.bincount().max()) / len(ids)


def untrained_scores(task: Task, data: Data, towers: Towers) -> dict[str, float]:
    """Of fixed features, or of a tower before training."""
    seed_everything(task.seed)
    tower = CNN if task.row.endswith("CNN") else MLP
    model = towers.build(tower, ModelConfig())
    kinds: dict[str, Encoder] = {
        "12 × 12 pixels": FixedFeatures(model, CPU, columns=slice(HOG, None)),
        "HOG": FixedFeatures(model, CPU, columns=slice(HOG)),
        "untrained MLP": FeatureEncoder(model, CPU, features=data.features),
        "untrained CNN": Encoder(model, CPU),
    }
    return judge(kinds[task.row], data.test, data.icons, texts="untrained" in task.row)


def measure_pair(task: Task, size: Size, data: Data, towers: Towers, lrs: Sequence[float]) -> Any:
    """CPU seconds of CLIP's and ProtoCLIP's episodes, alternated in one process."""
    seconds = alternate(
        {
            row: Run(replace(task, row=row, lr=lr), size, data, towers)
            for row, lr in zip((CLIP, PROTO), lrs, strict=True)
        }
    )
    ratio = sum(seconds[PROTO]) / sum(seconds[CLIP])
    return {"metrics": {}, "seconds_by_episode": seconds, "ratio": round(ratio, 4)}


def alternate(runs: Mapping[str, Run]) -> dict[str, list[float]]:
    """CPU seconds of the runs' episodes by row; they take turns, in an order that alternates."""
    seconds: dict[str, list[float]] = {row: [] for row in runs}
    bar = tqdm(disable=True)
    pairs = list(runs.items())
    for number in range(pairs[0][1].trainer.plan.episodes):
        for row, run in pairs if number % 2 else reversed(pairs):
            began, outside = time.process_time(), run.outside
            run.trainer.run_episode(number, bar)
            spent = time.process_time() - began - (run.outside - outside)
            seconds[row].append(round(spent, 3))
    return seconds


# Many runs


def tuning(row: str, size: Size) -> list[Task]:
    """A row's runs on the sets and concepts for tuning."""
    return [Task("tune", MLP, row, TUNING_SEED, *setting) for setting in size.grid]


def chosen(row: str, size: Size, done: Done) -> tuple[float, float]:
    """Learning rate and epochs of a row, once its tuning is done."""
    best = max(tuning(row, size), key=lambda task: score(done[task.key]))
    return best.lr, best.epochs


def pair_of(tower: str, size: Size, done: Done) -> Task:
    """The measurement of ProtoCLIP's time, at the settings found."""
    return Task("pairs", tower, PROTO, TUNING_SEED, *chosen(PROTO, size, done))


def settings(row: str, tower: str, size: Size, done: Done) -> tuple[float, float]:
    """Learning rate and epochs of a row's main runs."""
    if row != EQUAL_TIME:
        return chosen(row, size, done)
    (lr, _), (_, epochs) = chosen(CLIP, size, done), chosen(PROTO, size, done)
    return lr, round(epochs * done[pair_of(tower, size, done).key]["ratio"], 3)


def tasks(size: Size, done: Done) -> Iterator[Task]:
    """All runs in order, up to the first whose settings depend on unfinished ones."""
    rows = [row for row in ROWS if row != EQUAL_TIME]
    lists = {row: tuning(row, size) for row in rows}
    for alike in zip(*(lists[row] for row in (CLIP, PROTO)), strict=True):
        yield from alike
    for row in OTHERS:
        yield from lists[row]
    yield from (Task("floor", "", name, 0) for name in FLOORS)
    if any(task.key not in done for tasks in lists.values() for task in tasks):
        return
    for tower in (MLP, CNN):
        yield pair_of(tower, size, done)
        if pair_of(tower, size, done).key not in done:
            continue
        for seed in range(size.main_seeds[tower]):
            for row in MAIN:
                yield Task("main", tower, row, seed, *settings(row, tower, size, done))
        if tower == MLP:
            for seed in range(size.other_seeds):
                for row in OTHERS:
                    yield Task("main", tower, row, seed, *settings(row, tower, size, done))


def run(task: Task, size: Size, data: Data, towers: Towers, done: Done) -> dict[str, Any]:
    """One finished run, ready for JSON."""
    gc.collect()  # the trainer of the run before is a circle of references
    if task.stage == "floor":
        return floor(task, data, towers)
    if task.stage == "pairs":
        lrs = [chosen(row, size, done)[0] for row in (CLIP, PROTO)]
        return measure_pair(task, size, data, towers, lrs)
    return Run(task, size, data, towers).finish()


def finished(path: Path, kind: type[Task] = Task) -> Done:
    """The runs of a runs.jsonl by key; torn lines are left out."""
    done: Done = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            done[kind(**{name: record[name] for name in kind.__dataclass_fields__}).key] = record
    return done


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line in one write, after a torn one if need be."""
    torn = path.is_file() and not path.read_text().endswith("\n")
    line = json.dumps(record) + "\n"
    if torn:
        line = "\n" + line
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Study:
    """A protocol: which runs there are, how one is done, and what is reported."""

    size: Size = FULL
    kind: ClassVar[type[Task]] = Task
    results: ClassVar[Path] = RESULTS

    def tasks(self, done: Done) -> Iterator[Task]:
        """All runs in order, up to the first whose settings depend on unfinished ones."""
        return tasks(self.size, done)

    def run(self, task: Task, data: Data, towers: Towers, done: Done) -> dict[str, Any]:
        """One finished run, ready for JSON."""
        return run(task, self.size, data, towers, done)

    def report(self, done: Done, out: Path, folder: Path) -> None:
        """Print what is finished; the protocol's own records also change the pages."""
        facts: dict[str, Any] = {}
        with contextlib.suppress(DataError):
            data = Data(read(folder), self.size.rules)
            facts = {"seen": len(data.test.seen), "new": data.test.new, **data.test.counts}
            facts["judged"] = len(data.test.judged_seen)
            teacher = folder / "teacher.json"
            if teacher.is_file():
                spent = json.loads(teacher.read_text())
                facts |= {"teacher_seconds": spent["cpu_seconds"], "teacher_texts": spent["texts"]}
        page = PAGE if out == self.results else None
        write_report([*done.values()], wanted(self.size), FLOORS, facts, page)


def work(study: Study, out: Path, hours: float, folder: Path) -> None:
    """Run the tasks that no process has finished or started, until none is left or ``hours`` have
    passed."""
    torch.set_num_threads(1)
    path, began, about = out / "runs.jsonl", time.monotonic(), machine.describe()
    size = study.size
    data = Data(toy_icons(folder) if size.toy else read(folder), size.rules)
    towers = Towers(data)
    while True:
        done = finished(path, study.kind)
        ahead = [task for task in study.tasks(done) if task.key not in done]
        if not ahead:
            return
        for task in ahead:
            if time.monotonic() - began > 3600 * hours:
                print(f"{hours:g} hours are over; run it again to go on")
                return
            lock = cache_dir() / f"study-{hashlib.sha256(task.key.encode()).hexdigest()[:16]}.lock"
            try:
                with FileLock(lock, timeout=0):
                    done = finished(path, study.kind)
                    if task.key not in done:
                        one_run(study, task, data, towers, path, done, about)
            except Timeout:  # another process does it
                continue
            break  # what is next may depend on it
        else:
            time.sleep(1 if size.toy else 10)


def one_run(
    study: Study,
    task: Task,
    data: Data,
    towers: Towers,
    path: Path,
    done: Done,
    about: Mapping[str, Any],
) -> None:
    """Do a run and write its line."""
    start = time.monotonic()
    try:
        record = study.run(task, data, towers, done)
    except ValueError as error:
        if not str(error).startswith(("training:", "episode:", "prototypes:")):
            raise
        record = {"metrics": {}, "error": str(error)}  # it diverged: no scores
    record = asdict(task) | record
    record |= {name: about[name] for name in ("machine", "commit", "date")}
    record |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    record["seconds"] = round(time.monotonic() - start, 1)
    append(path, record)
    primary = {name: record["metrics"].get(name) for name in ("zero-shot", "probe", "AMI")}
    fields = ", ".join(str(value) for value in asdict(task).values())
    print(
        f"{fields}: {record['seconds']:.0f} s, CPU {record.get('cpu_seconds')} s, {primary}",
        flush=True,
    )


def wanted(size: Size) -> dict[str, dict[str, int]]:
    """Seeds of each row by tower."""
    main = {tower: dict.fromkeys(MAIN, count) for tower, count in size.main_seeds.items()}
    main[MLP] |= dict.fromkeys(OTHERS, size.other_seeds)
    return main


def main(argv: Sequence[str] | None = None, size: Size | None = None) -> int:
    parser = command_line("python -m benchmarks.study", __doc__)
    args = parser.parse_args(argv)
    return command(Study(size or (QUICK if args.quick else FULL)), parser, args)


def command_line(prog: str, words: str | None) -> argparse.ArgumentParser:
    """The arguments of a study's command."""
    parser = argparse.ArgumentParser(
        prog, description=words, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=1e9, help="start no run after so long")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--report", action="store_true", help="only report what is finished")
    parser.add_argument("--quick", action="store_true", help="every step, tiny, on toy drawings")
    parser.add_argument("--out", type=Path, help="where the records are")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="the icons")
    return parser


def command(study: Study, parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Do the runs that the arguments ask for, then report; the exit code."""
    out = args.out or study.results
    out = out / "quick" if args.quick else out
    folder = out / "icons" if study.size.toy else args.folder
    out.mkdir(parents=True, exist_ok=True)
    code = 0
    try:
        if study.size.toy:
            toy_icons(folder)
        arguments = (study, out, args.hours, folder)
        if not args.report and args.workers > 1:
            context = multiprocessing.get_context("spawn")
            processes = [context.Process(target=work, args=arguments) for _ in range(args.workers)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            code = max(abs(process.exitcode or 0) for process in processes)
        elif not args.report:
            work(*arguments)
    except (Stopped, KeyboardInterrupt):
        print("stopped; only the run that was going on is lost, run it again to go on")
        code = 130
    except DataError as error:
        parser.error(str(error))
    study.report(finished(out / "runs.jsonl", study.kind), out, folder)
    return code


if __name__ == "__main__":
    sys.exit(main())
