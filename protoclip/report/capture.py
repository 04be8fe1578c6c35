"""What a run leaves for its page at the end: clusters.csv and report.json."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from protoclip.common.files import write_csv
from protoclip.data import PairDataset, Subset
from protoclip.data.loader import Faults
from protoclip.episodes.prototypes import Episode
from protoclip.evaluate.tasks import Encoder, EvalSet
from protoclip.model import Encoded
from protoclip.report import snapshot

PICTURED = 4096  # training samples from which the report's pictures are chosen


@torch.no_grad()
def draw_plots(
    folder: Path,
    dataset: PairDataset,
    episode: Episode | None,
    encoder: Encoder,
    held_out: tuple[PairDataset, EvalSet] | None,
    memory_bytes: dict[str, int],
) -> None:
    """Write clusters.csv and report.json, from which the report is made.

    Args:
        dataset: the training data.
        episode: the last one, whose labels are the clusters; None: the run had no prototypes.
        held_out: the evaluation data on which the page shows queries, with its features.
        memory_bytes: the most bytes in use at the end of each phase.
    """
    clusters = {} if episode is None else episode.labels_by_position(len(dataset))
    pictured = torch.arange(len(dataset))
    if clusters:
        columns = [
            ["" if label < 0 else label for label in labels.tolist()]
            for labels in clusters.values()
        ]
        rows = zip(dataset.keys, *columns, strict=True)
        write_csv(folder / "clusters.csv", ("key", *clusters), rows)
        last = list(clusters.values())[-1]  # the teacher's, if there is one
        pictured = (last >= 0).nonzero().flatten()
    samples = None
    if dataset.facts.has_pictures:
        samples = _encode_samples(dataset, snapshot.every(pictured, PICTURED), clusters, encoder)
    facts = {"memory_bytes": memory_bytes}
    snapshot.save_snapshot(folder, snapshot.take_snapshot(samples, held_out, facts=facts))


def _encode_samples(
    dataset: PairDataset,
    positions: Tensor,
    clusters: dict[str, Tensor],
    encoder: Encoder,
) -> snapshot.Samples:
    """The samples at these positions as they are evaluated; a bad one is replaced."""
    model = encoder.model.eval()
    device = encoder.device
    indices: list[Tensor] = []
    encoded: list[Encoded] = []
    projected: list[Encoded] = []
    for batch in encoder.batches(dataset, positions, Faults(dataset, 1.0, lambda _: None)):
        with encoder.autocast():
            u, h = model(batch.image.to(device), batch.tokens.to(device))
        indices.append(batch.index)
        encoded.append(u)
        projected.append(h)
    shown = torch.cat(indices)
    return snapshot.Samples(
        Subset(dataset, shown),
        _joined(encoded),
        _joined(projected),
        {source: labels[shown] for source, labels in clusters.items()},
        clusters,
        dataset.labels,
    )


def _joined(parts: list[Encoded]) -> Encoded:
    return Encoded(
        torch.cat([part.image for part in parts]), torch.cat([part.text for part in parts])
    )
