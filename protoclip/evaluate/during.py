"""The evaluations of a training run: full tables before and after, quick recalls in between.

A run is evaluated on --val-data, else on the held-out part of built-in data or of --val-fraction,
else on a sample of its training pairs, which says whether it has learnt them and nothing more.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from protoclip.common.files import plural
from protoclip.common.phases import Phases
from protoclip.common.seeds import evenly_spaced
from protoclip.common.waits import Wait
from protoclip.data import PairDataset, Subset, readable
from protoclip.data.feature_pairs import check_finite, feature_pairs
from protoclip.data.settings import RunData, open_arguments
from protoclip.distributed import from_main, is_main, wait_for_main
from protoclip.evaluate import results, tasks
from protoclip.evaluate.datasets import Layout, open_layout
from protoclip.evaluate.metrics import recalls, retrieval
from protoclip.evaluate.results import Outcome, Results
from protoclip.model import ProtoModel, autocast_for
from protoclip.settings.config import TrainConfig

TRAINED = 1000  # training pairs that stand in for evaluation data


class Evaluation:
    """The evaluation data of a run, and the scores of its model on it.

    Attributes:
        remarks: lines for the log about the data.
        sets: the encoded sets of the last full evaluation, by name.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_data: RunData,
        device: torch.device,
        precision: str,
        phases: Phases,
        workers: int,
    ) -> None:
        self.device = device
        self.phases = phases
        self.autocast = autocast_for(precision, device)
        self.workers = workers
        self.config = config
        self.data = evaluation_data(config)
        self._training_layout: Layout | None = None  # pairs of the training data
        self.quick_sets: dict[str, Layout] = {}
        self.sets: dict[str, tasks.EvalSet] = {}
        self._probe_train: tasks.EvalSet | None = None
        self.remarks: list[str] = []
        if not self.data:
            with phases.measure("evaluation", on_host=True):
                layout = own_layout(run_data)
            self._training_layout = layout
            if layout is not None:
                self.data = layout.test.name
                self.quick_sets[layout.key] = layout
                self.remarks = [_remark(run_data, len(layout.test)), *layout.left_out]
        else:
            layout = open_run_layout(self.config, self.data)
            if feature_pairs(layout.test) is not None:  # refused now rather than after some steps
                from_main(partial(check_finite, layout.test))
            self.remarks = list(layout.left_out)
            if layout.captions == 0:  # captions are made from the class: one of its names
                layout = replace(layout, captions=1)
            self.quick_sets = {
                key: of_set for key, of_set in layout.sets.items() if of_set.captions != 0
            }

    def encoder(self, model: ProtoModel) -> tasks.Encoder:
        """An encoder that uses the current weights, on all ranks."""
        return tasks.Encoder(model, self.device, workers=self.workers, autocast=self.autocast)

    def untrained(self, folder: Path, model: ProtoModel, resumed: bool) -> Results | None:
        """The evaluation before training; a resumed run reads the one from its start, if that
        was on the same data."""
        path = folder / "untrained.json"
        if resumed:
            if not is_main() or not path.exists():
                return None
            saved = results.read_results(path)
            if saved.data != self.data:
                return None
            for key, of_set in self._layout().sets.items():
                now = tasks.fingerprint(of_set.test, of_set.captions)
                if not tasks.is_same_set(saved.trained.get(key), len(of_set.test), now):
                    return None
            return saved.trained
        before = self.full(model, "evaluating the untrained model")
        wait_for_main()  # which alone has the probes to fit
        if before is not None and is_main():
            results.write_results(path, Outcome(self.data, "untrained", "", before))
        return before

    def full(self, model: ProtoModel, what: str) -> Results | None:
        """All metrics of all evaluation sets; None if there is no evaluation data."""
        if not self.data:
            return None
        with (
            self.phases.measure("evaluation", on_host=True),
            Wait(what, unit="rows") as wait,
        ):
            encoder = replace(self.encoder(model), wait=wait)
            self.sets, self._probe_train = tasks.encode_sets(encoder, self._layout())
            return tasks.evaluate_features(self.sets, self._probe_train)

    def _layout(self) -> Layout:
        return self._training_layout or open_run_layout(self.config, self.data)

    def floors(self, model: ProtoModel) -> dict[str, Results]:
        """The scores that need no training: of guesses, and for built-in data also of simple
        features, which would take long on other data. After ``full``."""
        if not self.data.startswith("builtin:"):
            return tasks.guesses(self.sets, self._probe_train)
        with self.phases.measure("evaluation", on_host=True):
            return tasks.floors(self.encoder(model), self._layout())

    def is_due(self, step: int, steps_per_epoch: int, total_steps: int) -> bool:
        """Whether training repeats ``quick`` after ``step``; if at all, then after the last too."""
        interval_epochs = self.config.run.val_frequency
        interval_steps = max(1, round(interval_epochs * steps_per_epoch))
        is_due = step == total_steps or step % interval_steps == 0
        return is_due and bool(self.quick_sets and interval_epochs)

    def quick(self, model: ProtoModel) -> dict[str, float]:
        """Recalls on the small sets, for the curves: those of the full evaluation."""
        encoder = self.encoder(model)
        scalars: dict[str, float] = {}
        for name, layout in self.quick_sets.items():
            pairs = tasks.encode_set(encoder, layout, prompts=False)
            places = retrieval(pairs.image, pairs.text, pairs.owner, pairs.caption_ids)
            hits_by_recall = recalls(places, (1, 5))
            for recall, hits in hits_by_recall.items():
                scalars[f"val_{name}_{recall}"] = float(hits.mean())
        return scalars


def evaluation_data(config: TrainConfig) -> str:
    """What a run is evaluated on by name: --val-data, else built-in training data."""
    builtin = config.data.train_data.startswith("builtin:")
    return config.data.val_data or (config.data.train_data if builtin else "")


def open_run_layout(config: TrainConfig, data: str) -> Layout:
    """The evaluation sets of ``data``, opened with the settings of a run."""
    class_features = config.data.class_features
    return open_layout(data, class_features=class_features, **open_arguments(config))


def own_layout(run_data: RunData) -> Layout | None:
    """The held-out pairs of --val-fraction, or a sample of the training pairs; None if fewer than
    two of them can be read. A collective call."""
    training = run_data.training
    held_out = run_data.held_out
    pairs, faults = readable(_training_sample(training) if held_out is None else held_out)
    if len(pairs) < 2:
        return None
    left_out = []
    if faults:
        count = plural(len(faults), "unreadable pair")
        left_out = [f"evaluation: left out {count}, first {next(iter(faults.values()))}"]
    layout = Layout(pairs, left_out=left_out, class_rows=run_data.class_rows)
    if held_out is not None:
        return replace(layout, key="HO", title="Held-out pairs")
    few = f"{len(pairs):,} of the" if len(pairs) < len(training) else f"All {len(pairs):,}"
    title = f"{few} pairs that it was trained on"
    return replace(layout, captions=1, key=results.TRAIN, title=title)


def _training_sample(training: PairDataset) -> Subset:
    # A picture with several captions is asked for once, so that no caption has two right answers.
    rows = torch.from_numpy(np.sort(np.unique(training.picture_numbers(), return_index=True)[1]))
    count = min(TRAINED, len(rows))
    chosen = torch.arange(count)
    if not training.facts.remote:  # the first rows need the fewest shards
        chosen = evenly_spaced(len(rows), count)
    return Subset(training, rows[chosen], training.name)


def _remark(run_data: RunData, count: int) -> str:
    if run_data.held_out is not None:
        return f"evaluation: {plural(count, 'pair')} held out by --val-fraction"
    return (
        f"evaluation: on {plural(count, 'pair')} of the training data, so the scores do not say "
        "how well the model generalises (use --val-fraction 0.1 or --val-data FILE)"
    )
