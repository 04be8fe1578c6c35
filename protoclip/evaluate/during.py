"""The evaluations of a training run: full tables before and after, quick recalls in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from protoclip.config import TrainConfig
from protoclip.data import PairDataset, open_dataset
from protoclip.data.settings import open_arguments
from protoclip.distributed import is_main, progress_hidden
from protoclip.evaluate import results, tasks
from protoclip.evaluate.datasets import open_layout
from protoclip.evaluate.metrics import recalls, retrieval
from protoclip.evaluate.results import Outcome, Results
from protoclip.model import ProtoModel, autocast_for
from protoclip.phases import Phases

Evaluate = Callable[[ProtoModel], Mapping[str, float]]


class Evaluation:
    """The evaluation data of a run, and the scores of its model on it.

    Attributes:
        during: pairs of a function, model -> scalars by name, and its interval in epochs.
        sets: the encoded sets of the last full evaluation, by name.
    """

    def __init__(
        self, config: TrainConfig, device: torch.device, precision: str, phases: Phases
    ) -> None:
        self.device = device
        self.phases = phases
        self.autocast = autocast_for(precision, device)
        self.workers = config.data.workers
        self.arguments = open_arguments(config)
        builtin = config.data.train_data.startswith("builtin:")
        self.data = config.data.val_data or (config.data.train_data if builtin else "")
        self.quick_sets: dict[str, PairDataset] = {}
        self.sets: dict[str, tasks.EvalSet] = {}
        if self.data:
            if self.data == "builtin:icons":
                parts = open_layout(self.data, **self.arguments).parts
                self.quick_sets = {key: part.test for key, part in parts.items() if part.captions}
            else:
                split = "heldout" if self.data.startswith("builtin:") else "all"
                self.quick_sets["HO"] = open_dataset(self.data, split, **self.arguments)
        epochs = config.run.val_frequency
        self.during: list[tuple[Evaluate, float]] = []
        if self.quick_sets and epochs:
            self.during.append((self.quick, epochs))

    def encoder(self, model: ProtoModel) -> tasks.Encoder:
        """An encoder that uses the current weights, on all ranks."""
        return tasks.Encoder(model, self.device, workers=self.workers, autocast=self.autocast)

    def untrained(self, folder: Path, model: ProtoModel, resumed: bool) -> Results | None:
        """The evaluation before training; a resumed run reads the one from its start."""
        path = folder / "untrained.json"
        if resumed:
            if not is_main() or not path.exists():
                return None
            return results.read_results(path).trained
        before = self.full(model, "evaluating the untrained model")
        if before is not None and is_main():
            results.write_results(path, Outcome(self.data, "untrained", "", before))
        return before

    def full(self, model: ProtoModel, what: str) -> Results | None:
        """All metrics of all evaluation sets; None if there is no evaluation data."""
        if not self.data:
            return None
        with (
            self.phases.measure("evaluation", on_host=True),
            tqdm(
                desc=what, unit=" rows", unit_scale=True, leave=False, disable=progress_hidden()
            ) as bar,
        ):
            layout = open_layout(self.data, **self.arguments)
            encoder = replace(self.encoder(model), bar=bar)
            self.sets, probe_train = tasks.encode_sets(encoder, layout)
            return tasks.evaluate_features(self.sets, probe_train)

    def floors(self, model: ProtoModel) -> dict[str, Results]:
        """The scores that need no training, for built-in data; other data may be too large."""
        if not self.data.startswith("builtin:"):
            return {}
        with self.phases.measure("evaluation", on_host=True):
            layout = open_layout(self.data, **self.arguments)
            return tasks.floors(self.encoder(model), layout)

    def quick(self, model: ProtoModel) -> dict[str, float]:
        """Recalls on the small sets, for the curves."""
        encoder = self.encoder(model)
        scalars: dict[str, float] = {}
        for name, dataset in self.quick_sets.items():
            texts = [dataset.captions(i)[0] for i in range(len(dataset))]
            ranks = retrieval(encoder.images(dataset), encoder.texts(texts))
            hits_by_recall = recalls(ranks, (1, 5))
            for recall, hits in hits_by_recall.items():
                scalars[f"val_{name}_{recall}"] = float(hits.mean())
        return scalars
