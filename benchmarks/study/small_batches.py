"""Do a teacher's prototypes help at equal time, and does a small batch matter?

``make small-batches``, resumable at any point. The rules are in docs/small-batches.md and were
written before the first run and last changed before the first judged one. Data, towers, metrics and
judging are the study's (``protocol.py``); the sets that are judged, the rows and what is compared
are its own. ``--pairs`` does only the runs that are timed, which must have nothing beside them.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import protoclip
from benchmarks.report import write_between
from benchmarks.study import protocol as study
from benchmarks.study.data import IconPairs, Icons
from benchmarks.study.protocol import (
    CNN,
    CONCEPT,
    FLOORS,
    MLP,
    PLAIN,
    QUICK,
    TUNING_SEED,
    Data,
    Done,
    Towers,
    labelled,
)
from benchmarks.study.report import CLIP, EQUAL_TIME, INTERNAL_ONLY, score
from benchmarks.study.small_batches_report import (
    BEGIN,
    END,
    OURS,
    PAGE,
    SEEDS,
    Cost,
    costs,
    section,
)
from benchmarks.study.split import Rules, Split, by_lot
from protoclip.common.seeds import generator
from protoclip.episodes.teacher import load_teacher, minilm
from protoclip.evaluate.metrics import zero_shot_logits
from protoclip.evaluate.tasks import Encoder
from protoclip.losses.objective import Losses, ProtoLoss
from protoclip.settings.config import LossConfig, TrainConfig

RESULTS = Path(__file__).parents[1] / "results" / "small_batches"

# Never judged before, nor any set of their families; drawn by lot before the first run.
TEST_SETS = (
    "at-icons", "bi", "charm", "eva", "fe", "garden", "griddy-icons", "heroicons", "ion", "lsicon",
    "meteor-icons", "mingcute", "nrk", "oui", "prime", "proicons", "qlementine-icons", "raphael",
    "stash", "uiw",
)  # fmt: skip
FIRST_SEED = 100  # lower ones have been judged

BAR = tqdm(disable=True)

WITH_TEACHER = "CLIP, time of the teacher too"
QUEUES = {"queue of 3 steps": 3, "queue of 15 steps": 15}
LATE_QUEUES = {f"{row} from the second pass": steps for row, steps in QUEUES.items()}
JUDGED_QUEUE = "queue of 3 steps from the second pass"  # the others failed in tuning
SHUFFLED = "shuffled teacher"
BY_NAME = "teacher shuffled by name"
DISTILLED = "distillation"
# The same work; that of a late queue is a bit less.
TIMED_AS = {SHUFFLED: OURS, BY_NAME: OURS, **dict(zip(LATE_QUEUES, QUEUES, strict=True))}
CONTROLS = (SHUFFLED, INTERNAL_ONLY, DISTILLED)
ROWS: dict[str, tuple[str, ...]] = {
    CLIP: PLAIN,
    EQUAL_TIME: PLAIN,
    WITH_TEACHER: PLAIN,
    OURS: study.OTHERS[OURS],
    **dict.fromkeys(QUEUES | LATE_QUEUES, PLAIN),
    SHUFFLED: study.OTHERS[OURS],
    BY_NAME: study.OTHERS[OURS],
    INTERNAL_ONLY: study.OTHERS[INTERNAL_ONLY],
    DISTILLED: ("--w-distill", "1", "--w-proto", "0", "--w-proto-external", "0"),
}


@dataclass(frozen=True)
class Size(study.Size):
    """How much is done; the defaults are the protocol."""

    rules: Rules = Rules(TEST_SETS)
    epochs: float = 4.0  # of the rows that do not train for another row's time
    batches: tuple[int, int] = (64, 256)  # of the planned comparisons
    axis: tuple[int, ...] = (32, 128, 512, 1024)
    amounts: tuple[int, ...] = (15_000, 100_000)  # icons, at the small batch
    planned_seeds: Mapping[str, int] = field(default_factory=lambda: dict(SEEDS))
    seeds: int = 8  # of the other judged rows
    few_seeds: int = 3  # of the axis, and of tuning
    pairs: int = 5  # timed, a batch and tower
    few_pairs: int = 2  # at the other batches


FULL = Size()
TINY = Size(
    icons=QUICK.icons,
    episode=QUICK.episode,
    rules=QUICK.rules,
    toy=True,
    epochs=3.0,
    batches=(16, 32),
    axis=(64,),
    amounts=(200,),
    planned_seeds={MLP: 2, CNN: 2},
    seeds=2,
    few_seeds=1,
    pairs=2,
    few_pairs=1,
)


@dataclass(frozen=True)
class Task(study.Task):
    """A run; its stage is "tune", "floor", "main", "rate" or "best", or "pairs" or "teacher" if
    timed."""

    batch: int = 0
    icons: int = 0


# One run


class QueueLoss(ProtoLoss):
    """InfoNCE whose negatives are the batch and, without a gradient, the last steps' features; in
    the first ``alone`` steps the batch only."""

    def __init__(self, config: LossConfig, steps: int, alone: int = 0) -> None:
        super().__init__(config)
        self.queue: deque[tuple[Tensor, Tensor]] = deque(maxlen=steps)
        self.alone = alone

    def forward(self, encoded: Any, projected: Any, index: Tensor, **others: Any) -> Losses:
        logit_scale = others["logit_scale"]
        images, texts = (F.normalize(rows, dim=1) for rows in (encoded.image, encoded.text))
        used = () if self.alone > 0 else self.queue
        self.alone -= 1
        older_images = [image for image, _ in used]
        older_texts = [text for _, text in used]
        by_image = protoclip.contrastive(images, torch.cat([texts, *older_texts]), logit_scale)
        by_text = protoclip.contrastive(texts, torch.cat([images, *older_images]), logit_scale)
        self.queue.append((images.detach(), texts.detach()))
        loss = (by_image + by_text) / 2
        return Losses(loss, {"contrastive_loss": loss}, {})


class Run(study.Run):
    """A row's trainer with the batch and the number of icons of its task."""

    rows = ROWS

    def __init__(self, task: Task, size: Size, data: Data, towers: Towers) -> None:
        super().__init__(task, replace(size, batch=task.batch, icons=task.icons), data, towers)
        if steps := (QUEUES | LATE_QUEUES).get(task.row):
            stepper = self.trainer.stepper
            first_pass = task.icons // size.episode * (size.episode // task.batch)
            alone = first_pass if task.row in LATE_QUEUES else 0
            stepper.loss = QueueLoss(stepper.loss.config, steps, alone)

    def open_teacher(self, config: TrainConfig, pairs: IconPairs) -> Tensor | None:
        """The teacher's features; for the controls those of other samples, the same in every
        episode, so that clusters have the same sizes and cost, or of other names, the same for all
        samples of a name."""
        teacher = super().open_teacher(config, pairs)
        if teacher is None or self.task.row not in (SHUFFLED, BY_NAME):
            return teacher
        random = generator(self.task.seed, 4)
        if self.task.row == SHUFFLED:
            return teacher[torch.randperm(len(teacher), generator=random)]
        words = pairs.icons.words[pairs.chosen]
        _, first, name = np.unique(words, return_index=True, return_inverse=True)
        other = torch.randperm(len(first), generator=random)[name]
        return teacher[torch.from_numpy(first)[other]]

    def finish(self) -> dict[str, Any]:
        """Train to the end and judge; also how many drawings of each set were named."""
        record = super().finish()
        return record | {"named": named_by_set(self.encoder(), self.split, self.data.icons)}


def named_by_set(encoder: Encoder, split: Split, icons: Icons) -> dict[str, list[int]]:
    """By set, how many drawings of seen concepts there are and how many zero-shot names right."""
    pairs = labelled(icons, split.judged_seen, split.seen, "seen")
    named = zero_shot_logits(encoder.images(pairs), encoder.texts(list(split.seen))).argmax(1)
    right = (named == pairs.labels[CONCEPT].ids).numpy()
    sets = icons.set[split.judged_seen]
    return {
        name: [int((sets == name).sum()), int(right[sets == name].sum())]
        for name in np.unique(sets).tolist()
    }


def time_teacher(task: Task, size: Size, data: Data) -> dict[str, Any]:
    """CPU seconds from nothing to a run's teacher: its names' features and their components."""
    rows = np.sort(by_lot(data.tuning.pool, 3, task.seed)[: task.icons])
    pairs = IconPairs(data.icons, rows, "")
    texts = np.unique(data.icons.words[rows]).tolist()
    began = time.process_time()
    if not size.toy:
        minilm("cpu").encode(texts)
    load_teacher(str(data.icons.folder / "teacher.npz"), pairs)
    seconds = time.process_time() - began
    return {"metrics": {}, "cpu_seconds": round(seconds, 2), "texts": len(texts)}


# Many runs


def centre(batch: int) -> float:
    """The middle of the first three learning rates that are tried: 2e-3 at a batch of 256, in
    proportion to the root of the batch, in powers of two."""
    return 2e-3 * 2 ** round(math.log2(batch / 256) / 2)


Tasks = Generator[Task, None, Any]


@dataclass(frozen=True)
class Order:
    """The runs in the order of their importance, as far as what is done allows."""

    size: Size
    done: Done

    def timed(self) -> Iterator[Task]:
        """The runs that are timed."""
        size = self.size
        small = size.batches[0]
        for tower in (MLP, CNN):
            for batch in size.batches:
                yield from self.pairs(tower, OURS, batch)
            yield self.teacher(tower)
            if tower == MLP:
                for batch in size.axis:
                    yield from self.pairs(tower, OURS, batch)
                for row in (*QUEUES, INTERNAL_ONLY, DISTILLED):
                    yield from self.pairs(tower, row, small)

    def pairs(self, tower: str, row: str, batch: int) -> list[Task]:
        """CLIP and a row in alternation, until prototypes were clustered twice: a teacher's begin
        in the third episode, internal ones in the second pass over the data."""
        size = self.size
        episodes = 2 + size.icons // size.episode if row == INTERNAL_ONLY else 4
        count = size.pairs if batch in size.batches else size.few_pairs
        epochs = episodes * size.episode / size.icons
        seeds = range(TUNING_SEED, TUNING_SEED + count)
        lr = centre(batch)
        return [Task("pairs", tower, row, seed, lr, epochs, batch, size.icons) for seed in seeds]

    def teacher(self, tower: str) -> Task:
        """The teacher, in the same sitting as a tower's pairs."""
        return Task("teacher", tower, OURS, TUNING_SEED, icons=self.size.icons)

    def costs(self, tower: str, row: str, batch: int) -> tuple[Cost, Cost] | None:
        """CLIP's and a row's; None until they have been timed."""
        row = TIMED_AS.get(row, row)
        records = [self.done.get(task.key) for task in self.pairs(tower, row, batch)]
        found = [record for record in records if record is not None]
        return costs(found, row) if len(found) == len(records) else None

    def ratio(self, tower: str, row: str, batch: int, icons: int) -> float | None:
        """CPU time of a row beside CLIP's for as many samples; None until it has been timed."""
        pair = self.costs(tower, row, batch)
        episodes = self.size.epochs * icons / self.size.episode
        return None if pair is None else pair[1].seconds(episodes) / pair[0].seconds(episodes)

    def epochs(self, tower: str, row: str, batch: int, icons: int) -> float | None:
        """How long a row trains; None until what it takes has been timed."""
        epochs = self.size.epochs
        if row in (CLIP, OURS, SHUFFLED, BY_NAME):
            return epochs
        ratio = self.ratio(tower, OURS, batch, icons)
        if ratio is None:
            return None
        if row == WITH_TEACHER:
            teacher = self.done.get(self.teacher(tower).key)
            clip = self.costs(tower, OURS, batch)
            if teacher is None or clip is None:
                return None
            ratio += teacher["cpu_seconds"] / clip[0].seconds(epochs * icons / self.size.episode)
        elif row != EQUAL_TIME:
            rival = self.ratio(tower, row, batch, icons)
            if rival is None:
                return None
            ratio /= rival
        return round(epochs * ratio, 3)

    def tune(
        self, tower: str, row: str, batch: int, epochs: float, icons: int, seeds: int
    ) -> Tasks:
        """The runs that find a learning rate, which is returned, or None until they are done; it is
        never the lowest or the highest that was tried."""
        lrs = [centre(batch) * factor for factor in (0.5, 1, 2)]
        while True:
            scores = {}
            for lr in lrs:
                tasks = [
                    Task("tune", tower, row, TUNING_SEED + i, lr, epochs, batch, icons)
                    for i in range(seeds)
                ]
                yield from tasks
                if all(task.key in self.done for task in tasks):
                    scores[lr] = statistics.fmean(score(self.done[task.key]) for task in tasks)
            if len(scores) < len(lrs):
                return None
            best = max(scores, key=lambda lr: scores[lr])
            if best == min(lrs):
                lrs.insert(0, best / 2)
            elif best == max(lrs):
                lrs.append(best * 2)
            else:
                return best

    def rows(
        self,
        tower: str,
        rows: Sequence[str],
        batches: Sequence[int],
        *,
        icons: int = 0,
        seeds: int = 0,
        tuning_seeds: int = 0,
    ) -> Tasks:
        """Some rows' tuning, then their judged runs, seed by seed."""
        size = self.size
        icons = icons or size.icons
        chosen = []
        for batch in batches:
            for row in rows:
                # With the CNN the three rows of CLIP differ by little in length.
                like = EQUAL_TIME if tower == CNN and row in (CLIP, WITH_TEACHER) else row
                epochs = self.epochs(tower, row, batch, icons)
                tuned = self.epochs(tower, like, batch, icons)
                if epochs is None or tuned is None:
                    continue
                of_tuning = tuning_seeds or size.few_seeds
                lr = yield from self.tune(tower, like, batch, tuned, icons, of_tuning)
                if lr is not None:
                    chosen.append((row, lr, epochs, batch))
        for seed in range(FIRST_SEED, FIRST_SEED + (seeds or size.seeds)):
            for row, lr, epochs, batch in chosen:
                yield Task("main", tower, row, seed, lr, epochs, batch, icons)

    def planned(self, tower: str) -> Tasks:
        """The rows of the planned comparisons."""
        size = self.size
        seeds = size.planned_seeds[tower]
        yield from self.rows(tower, (EQUAL_TIME, OURS), size.batches, seeds=seeds)

    def tried(self, tower: str, row: str, batch: int) -> dict[float, float]:
        """The tuning scores of a planned row by learning rate."""
        found: dict[float, list[float]] = {}
        length = self.epochs(tower, row, batch, self.size.icons)
        for run in self.done.values():
            of_row = (run["tower"], run["row"], run["batch"], run["icons"], run["epochs"])
            if run["stage"] == "tune" and of_row == (tower, row, batch, self.size.icons, length):
                found.setdefault(run["lr"], []).append(score(run))
        return {lr: statistics.fmean(scores) for lr, scores in found.items()}

    def at_one_rate(self, tower: str, batches: Sequence[int]) -> Tasks:
        """The planned rows at the two learning rates that were the best for ours, as far as they
        have not been judged at them."""
        size = self.size
        for batch in batches:
            scores = {row: self.tried(tower, row, batch) for row in (EQUAL_TIME, OURS)}
            if not all(scores.values()):  # until the planned runs are tuned
                continue
            ranked = {row: sorted(of_row, key=of_row.__getitem__) for row, of_row in scores.items()}
            for seed in range(FIRST_SEED, FIRST_SEED + size.seeds):
                for row, rates in ranked.items():
                    epochs = self.epochs(tower, row, batch, size.icons)
                    assert epochs is not None
                    for lr in ranked[OURS][-2:]:
                        if lr != rates[-1]:
                            yield Task("rate", tower, row, seed, lr, epochs, batch, size.icons)

    def by_name(self, batch: int) -> Tasks:
        """The control that is not tuned: it has the learning rate of ours."""
        size = self.size
        lr = yield from self.tune(MLP, OURS, batch, size.epochs, size.icons, size.few_seeds)
        for seed in range(FIRST_SEED, FIRST_SEED + size.seeds) if lr is not None else ():
            yield Task("main", MLP, BY_NAME, seed, lr, size.epochs, batch, size.icons)

    def best(self) -> Tasks:
        """CLIP and ours at their best batches, for the time of ours at the small one."""
        size = self.size
        budget = self.costs(MLP, OURS, size.batches[0])
        if budget is None:
            return
        seconds = budget[1].seconds(size.epochs * size.icons / size.episode)
        chosen = []
        for place, row in enumerate((EQUAL_TIME, OURS)):
            tried: dict[Task, float] = {}
            batches = sorted((*size.batches, *size.axis))
            for batch in batches:
                pair = self.costs(MLP, OURS, batch)
                if pair is None:
                    continue
                epochs = round(pair[place].episodes(seconds) * size.episode / size.icons, 3)
                lr = yield from self.tune(MLP, row, batch, epochs, size.icons, seeds=1)
                if lr is not None:
                    task = Task("tune", MLP, row, TUNING_SEED, lr, epochs, batch, size.icons)
                    tried[task] = score(self.done[task.key])
            if len(tried) == len(batches):
                chosen.append(max(tried, key=lambda task: tried[task]))
        for seed in range(FIRST_SEED, FIRST_SEED + size.seeds):
            for task in chosen:
                yield replace(task, stage="best", seed=seed)

    def all(self) -> Iterator[Task]:
        """Every run that is not timed."""
        size = self.size
        small = size.batches[:1]
        yield from (Task("floor", "", name, 0) for name in FLOORS)
        yield from self.planned(MLP)
        yield from self.rows(MLP, (CLIP, WITH_TEACHER), size.batches)
        yield from self.at_one_rate(MLP, size.batches)
        yield from self.rows(MLP, (SHUFFLED, DISTILLED), small)
        yield from self.rows(MLP, (INTERNAL_ONLY, JUDGED_QUEUE), small)
        yield from self.planned(CNN)
        yield from self.at_one_rate(CNN, small)  # at the large batch tuning gave both one rate
        yield from self.best()
        few = {"seeds": size.few_seeds, "tuning_seeds": 1}
        yield from self.rows(MLP, (EQUAL_TIME, OURS), size.axis, **few)
        for icons in size.amounts:
            yield from self.rows(MLP, (EQUAL_TIME, OURS), small, icons=icons, **few)
        yield from self.rows(CNN, (CLIP, WITH_TEACHER), size.batches)
        yield from self.by_name(size.batches[0])


@dataclass(frozen=True)
class SmallBatches(study.Study):
    """The protocol of docs/small-batches.md."""

    size: Size = FULL
    timed: bool = False  # only the runs that are timed
    kind: ClassVar[type[study.Task]] = Task
    results: ClassVar[Path] = RESULTS

    def tasks(self, done: Done) -> Iterator[Task]:
        order = Order(self.size, done)
        return order.timed() if self.timed else order.all()

    def run(self, task: study.Task, data: Data, towers: Towers, done: Done) -> dict[str, Any]:
        assert isinstance(task, Task)
        gc.collect()  # the trainer of the run before is a circle of references
        if task.stage == "floor":
            return study.floor(task, data, towers)
        if task.stage == "teacher":
            return time_teacher(task, self.size, data)
        if task.stage == "pairs":
            runs = {
                row: Run(replace(task, row=row), self.size, data, towers)
                for row in (CLIP, task.row)
            }
            if task.tower == CNN:  # a first convolution sets up what the others find
                Run(replace(task, row=CLIP), self.size, data, towers).trainer.run_episode(0, BAR)
            return {"metrics": {}, "seconds_by_episode": study.alternate(runs)}
        record = Run(task, self.size, data, towers).finish()
        for of_episodes in ("episodes", "entropies"):
            record[of_episodes] = record[of_episodes][-1:]
        return record | {"data": data.digest}

    def report(self, done: Done, out: Path, folder: Path) -> None:
        text = section([*done.values()], FLOORS)
        print(text)
        untimed = sum(task.key not in done for task in Order(self.size, done).timed())
        if untimed and not self.timed:
            print(f"\n{untimed} timed runs are missing (--pairs); rows of equal time wait for them")
        if out == self.results:
            write_between(PAGE, BEGIN, END, text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = study.command_line("python -m benchmarks.study.small_batches", __doc__)
    parser.add_argument("--pairs", action="store_true", help="only the runs that are timed")
    args = parser.parse_args(argv)
    size = TINY if args.quick else FULL
    return study.command(SmallBatches(size, args.pairs), parser, args)


if __name__ == "__main__":
    sys.exit(main())
