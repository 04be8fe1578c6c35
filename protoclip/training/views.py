"""How a run is looked at: tables before and after, recalls in between, pictures at the end."""

from __future__ import annotations

import torch
from tqdm import tqdm

from protoclip.config import TrainConfig
from protoclip.data import PairDataset, build_transform, noto_available, open_dataset
from protoclip.distributed import is_main
from protoclip.evaluate import Encoder, Results, evaluate_model
from protoclip.features import extract
from protoclip.metrics import retrieval
from protoclip.model import ProtoModel
from protoclip.report import plot_curves, plot_prototypes
from protoclip.training.engine import autocast_for
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
                desc=what, unit=" rows", unit_scale=True, leave=False, disable=not is_main()
            ) as bar,
        ):
            return evaluate_model(
                model,
                self.data,
                seed=arguments.pop("seed"),
                device=self.device,
                workers=self.config.data.workers,
                autocast=self.autocast,
                progress=bar.update,
                open_kwargs=arguments,
            )

    def quick(self, model: ProtoModel) -> dict[str, float]:
        """Recalls on the small sets, for the curves."""
        encoder = Encoder(
            model, self.device, workers=self.config.data.workers, autocast=self.autocast
        )
        scalars: dict[str, float] = {}
        for name, dataset in self.quick_sets.items():
            texts = [dataset.captions(i)[0] for i in range(len(dataset))]
            ranks = retrieval(encoder.images(dataset), encoder.texts(texts), None)
            scalars |= {f"val_{name}_{key}": value for key, value in ranks.summary((1, 5)).items()}
        return scalars


def draw_plots(
    folder: RunFolder, config: TrainConfig, trainer: Trainer, dataset: PairDataset
) -> None:
    """curves.png, and prototypes.png where there are prototypes."""
    plot_curves(folder.path / "metrics.jsonl", folder.path / "curves.png")
    if trainer.episode is None:
        return
    source = list(trainer.episode.clusterings)[-1]  # the teacher, if there is one
    labels = trainer.episode.clusterings[source].labels.cpu()
    chosen = (labels >= 0).nonzero().flatten()[:PICTURED]
    model = trainer.model
    features = extract(
        model,
        dataset,
        chosen,
        transform=build_transform(model.image_size, model.mean, model.std, "none"),
        batch_size=256,
        device=trainer.device,
        seed=config.run.seed,
        workers=config.data.workers,
        autocast=trainer.autocast,
    )
    plot_prototypes(
        folder.path / "prototypes.png",
        dataset,
        features.image_h,
        features.text_h,
        labels[features.index.cpu()],
        index=features.index,
        classes=dataset.labels.get("group"),
        title=f"Prototypes of the {source} clusters",
    )
