"""Features of many samples under a frozen model: what an episode clusters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from protoclip.data import PairDataset, batches
from protoclip.data.loader import Faults
from protoclip.distributed import (
    exchange_rows,
    gather_rows,
    is_distributed,
    own_slice,
    rank,
    world_size,
)
from protoclip.model import Encoded, ProtoModel


@dataclass(frozen=True)
class Features:
    """Rows of N distinct samples, fp32, on the model's device."""

    index: Tensor  # int64 [N], position in the dataset
    image_h: Tensor  # [N, Dh], unit rows
    text_h: Tensor  # [N, Dh], unit rows


@torch.no_grad()
def extract(
    model: ProtoModel,
    dataset: PairDataset,
    indices: Tensor,
    *,
    transform: Callable[[Any], Tensor],
    batch_size: int,
    device: torch.device,
    seed: int,
    workers: int = 0,
    captions: str = "random",
    numbers: Tensor | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    progress: Callable[[int], None] | None = None,
    faults: Faults | None = None,
) -> Features:
    """One forward pass over ``indices``: eval mode, no gradient, one view of each sample.

    Args:
        model: left in the mode it was in.
        dataset, transform, workers, captions, numbers, faults: as in
            ``protoclip.data.batches``.
        indices: int64 [N], distinct positions.
        batch_size: rows per forward pass; the result depends on it in the last bits only.
        device: where the model is and the features stay, 2 x N x Dh x 4 bytes.
        seed: of captions and augmentation.
        autocast: makes the context of each forward pass.
        progress: told the number of rows after each batch.
    """
    was_training = model.training
    model.eval()
    parts: list[tuple[Tensor, Encoded]] = []
    try:
        for batch in batches(
            dataset,
            indices,
            batch_size,
            transform,
            model.short_tokenizer,
            seed=seed,
            workers=workers,
            captions=captions,
            numbers=numbers,
            faults=faults,
        ):
            image = batch.image.to(device, non_blocking=True)
            tokens = batch.tokens.to(device, non_blocking=True)
            with autocast():
                _, projected = model(image, tokens)
            parts.append((batch.index, projected))
            if progress is not None:
                progress(len(batch.index))
    finally:
        model.train(was_training)
    return Features(
        index=torch.cat([index for index, _ in parts]).to(device),
        image_h=torch.cat([h.image for _, h in parts]),
        text_h=torch.cat([h.text for _, h in parts]),
    )


class FeatureStore:
    """The projections of one pass of training, kept for the next episode: no forward pass extra.

    Rows are in the order of training; a rank keeps what it computed.

    Args:
        rows: most samples of a pass (of this rank).
        device: where they stay, 2 x rows x Dh x 4 bytes.
        share: rows of a step, the same on every rank; None: only one rank trains.
    """

    def __init__(self, rows: int, device: torch.device, share: int | None = None) -> None:
        self.share = share or rows
        self.index = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.image_h = torch.empty(0, device=device)  # [rows, Dh] fp32 once Dh is known
        self.text_h = torch.empty(0, device=device)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been put: the same on every rank."""
        return self.image_h.dim() == 1

    @torch.no_grad()
    def put(self, start: int, index: Tensor, projected: Encoded) -> None:
        """Keep the projections, [B, Dh] each, of the samples ``index`` from row ``start`` on."""
        if self.image_h.dim() == 1:
            shape = (len(self.index), projected.image.shape[1])
            self.image_h, self.text_h = self.image_h.new_zeros(shape), self.text_h.new_zeros(shape)
        rows = slice(start, start + len(index))
        self.index[rows] = index
        self.image_h[rows] = projected.image
        self.text_h[rows] = projected.text

    def features(self) -> Features:
        """What all ranks have, each sample once, by its newest row; a collective call.

        Each rank gets a slice of it in the order of the dataset: what one rank alone would have.

        Raises:
            ValueError: nothing has been put.
        """
        index, order = self._in_training_order().sort(stable=True)
        last = torch.ones_like(index, dtype=torch.bool)
        last[:-1] = index[1:] != index[:-1]
        last &= index >= 0
        index, order = index[last], order[last]
        if not len(order):
            raise ValueError(
                "FeatureStore: expected the features of a training step, got no row yet: all "
                "steps so far were skipped, as their loss or gradient was not finite; lower --lr, "
                "use --precision fp32, or look at the weights training began with"
            )
        if not is_distributed():
            return Features(index, self.image_h[order], self.text_h[order])
        step, place = order // (self.share * world_size()), order % (self.share * world_size())
        owner, row = place // self.share, step * self.share + place % self.share
        slices = [own_slice(len(order), number) for number in range(world_size())]
        wanted = [row[part][owner[part] == rank()] for part in slices]
        own = slices[rank()]
        arrived = owner[own].argsort(stable=True)  # rank by rank, each in order
        image_h, text_h = (
            torch.empty_like(got).index_copy_(0, arrived, got)
            for got in (exchange_rows(rows, wanted) for rows in (self.image_h, self.text_h))
        )
        return Features(index[own], image_h, text_h)

    def _in_training_order(self) -> Tensor:
        """The positions that all ranks have trained on: int64 [rows * W], step by step."""
        if not is_distributed():
            return self.index
        return gather_rows(self.index).view(world_size(), -1, self.share).transpose(0, 1).flatten()

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors, for a checkpoint."""
        return {"index": self.index, "image_h": self.image_h, "text_h": self.text_h}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the rows of ``state_dict``; the numbers of rows must agree."""
        if state["index"].shape != self.index.shape:
            raise ValueError(
                f"FeatureStore: expected {len(self.index)} rows, got {len(state['index'])}; the "
                "checkpoint is of a run with another --episode-size, --batch-size or data"
            )
        device = self.index.device
        self.index = state["index"].to(device)
        self.image_h, self.text_h = state["image_h"].to(device), state["text_h"].to(device)
