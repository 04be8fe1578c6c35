"""How a run is looked at: tables before and after, recalls in between, pictures at the end."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from protoclip.config import TrainConfig
from protoclip.data import DataError, PairDataset, Subset, noto_available, open_dataset
from protoclip.distributed import is_distributed, is_main
from protoclip.evaluate import (
    Encoder,
    EvalSet,
    Layout,
    Results,
    encode_sets,
    evaluate_features,
    evaluate_model,
    open_layout,
)
from protoclip.evaluate.metrics import retrieval
from protoclip.evaluate.tasks import impossible
from protoclip.model import Encoded, ProtoModel, autocast_for
from protoclip.report import (
    Samples,
    plot_curves,
    plot_prototypes,
    save_snapshot,
    take_snapshot,
)
from protoclip.training.inputs import open_arguments
from protoclip.training.loop import Trainer
from protoclip.training.phases import Phases
from protoclip.training.run_folder import RunFolder

PICTURED = 4096  # samples among which prototypes.png looks for neighbours


class Evaluation:
    """The evaluations of a run: full tables before and after, quick recalls in between."""

    def __init__(
        self, config: TrainConfig, phases: Phases, device: torch.device, precision: str
    ) -> None:
        self.config, self.phases, self.device = config, phases, device
        self.autocast = autocast_for(precision, device)
        data = config.data
        builtin = data.train_data.startswith("builtin:")
        self.data = data.val_data or (data.train_data if builtin else "")
        self.quick_sets: dict[str, PairDataset] = {}
        self.kept: dict[str, EvalSet] = {}  # of the last full evaluation
        self.zeroshot_data = _zeroshot_data(data.imagenet_val, config.run.seed)
        if not self.data:
            return
        arguments = open_arguments(config)
        self.quick_sets["HO"] = open_dataset(
            self.data, "heldout" if self.data.startswith("builtin:") else "all", **arguments
        )
        if self.data == "builtin:emoji" and noto_available():
            self.quick_sets["NHO"] = open_dataset(self.data, "noto-heldout", **arguments)

    def full(self, model: ProtoModel, what: str) -> Results | None:
        """All metrics of all evaluation sets; None where there is nothing to evaluate on."""
        if not self.data:
            return None
        arguments = open_arguments(self.config)
        with (
            self.phases.measure("evaluation", on_host=True),
            tqdm(
                desc=what,
                unit=" rows",
                unit_scale=True,
                leave=False,
                disable=None if is_main() else True,
            ) as bar,
        ):
            return evaluate_model(
                model,
                self.data,
                seed=arguments.pop("seed"),
                captions="first" if self.data.startswith("builtin:") else "all",
                device=self.device,
                workers=self.config.data.workers,
                autocast=self.autocast,
                progress=bar.update,
                open_kwargs=arguments,
                keep=self.kept,
            )

    def quick(self, model: ProtoModel) -> dict[str, float]:
        """Recalls on the small sets, for the curves."""
        encoder = self._encoder(model)
        scalars: dict[str, float] = {}
        for name, dataset in self.quick_sets.items():
            texts = [dataset.captions(i)[0] for i in range(len(dataset))]
            ranks = retrieval(encoder.images(dataset), encoder.texts(texts), None)
            scalars |= {f"val_{name}_{key}": value for key, value in ranks.summary((1, 5)).items()}
        return scalars

    def _encoder(self, model: ProtoModel) -> Encoder:
        return Encoder(
            model,
            self.device,
            workers=self.config.data.workers,
            autocast=self.autocast,
            sharded=is_distributed(),
        )

    def zeroshot(self, model: ProtoModel) -> dict[str, float]:
        """Zero-shot accuracies on --imagenet-val."""
        assert self.zeroshot_data is not None
        encoder = self._encoder(model)
        sets, _ = encode_sets(encoder, self.zeroshot_data, tasks=("zeroshot",))
        results = evaluate_features(sets, tasks=("zeroshot",))
        values = next(iter(results.sets.values())).metrics
        return {f"val_zeroshot_{name}": value for name, value in values.items()}


def _zeroshot_data(spec: str, seed: int) -> Layout | None:
    """What --imagenet-val names, opened before training starts.

    Raises:
        ValueError: it cannot be opened, or has no class names.
    """
    if not spec:
        return None
    layout = open_layout(spec, seed=seed)
    reasons = impossible(("zeroshot",), layout)
    if reasons:
        raise ValueError(f"--imagenet-val {spec}: {reasons['zeroshot']}")
    return replace(layout, captioned=False, train=None)


def _readable(dataset: PairDataset, chosen: Tensor) -> Tensor:
    """Those of the positions whose pictures can be read; all of them if none can."""
    good = []
    for position in chosen.tolist():
        with suppress(DataError):
            dataset.image(position)
            good.append(position)
    return torch.tensor(good) if good else chosen


def draw_plots(
    folder: RunFolder,
    config: TrainConfig,
    trainer: Trainer,
    dataset: PairDataset,
    evaluation: Evaluation,
    after: Results | None = None,
) -> None:
    """curves.png, prototypes.png where there are prototypes, and what the report needs."""
    plot_curves(folder.path / "metrics.jsonl", folder.path / "curves.png")
    clusterings = trainer.episode.clusterings if trainer.episode else {}
    clusters = {name: one.labels.cpu() for name, one in clusterings.items()}
    chosen = torch.arange(len(dataset))
    if clusters:  # the last is the teacher's, if there is one
        chosen = (list(clusters.values())[-1] >= 0).nonzero().flatten()
    # Spread over the data, which may be sorted.
    chosen = chosen[torch.linspace(0, len(chosen) - 1, min(PICTURED, len(chosen))).long()]
    bad = torch.tensor(sorted(trainer.faults.positions), dtype=torch.int64)
    chosen = chosen[~torch.isin(chosen, bad)]
    encoder = Encoder(
        trainer.model,
        trainer.device,
        workers=config.data.workers,
        autocast=trainer.autocast,
    )
    try:
        images = encoder.images(Subset(dataset, chosen))
    except DataError:  # a bad sample that training has not met
        chosen = _readable(dataset, chosen)
        images = encoder.images(Subset(dataset, chosen))
    texts = [dataset.captions(i)[0] for i in chosen.tolist()]
    encoded = Encoded(images, encoder.texts(texts))
    samples = Samples(
        Subset(dataset, chosen),
        encoded,
        encoder.project(encoded),
        {name: labels[chosen] for name, labels in clusters.items()},
    )
    judged = next(iter(evaluation.kept.values()), None)
    snapshot = take_snapshot(
        samples,
        None if judged is None else (evaluation.quick_sets["HO"], judged),
        after=after,
        facts={"memory_bytes": evaluation.phases.memory()},
    )
    save_snapshot(folder.path, snapshot)
    if snapshot.clusters:
        plot_prototypes(snapshot, folder.path / "prototypes.png")
