"""Features of many samples under a frozen model: what an episode clusters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from protoclip.data import PairDataset, batches
from protoclip.model import Encoded, ProtoModel


@dataclass(frozen=True)
class Features:
    """Rows of N distinct samples, fp32, on the model's device."""

    index: Tensor  # int64 [N], position in the dataset
    image: Tensor  # [N, D], not normalised
    text: Tensor  # [N, D], not normalised
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
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """One forward pass over ``indices``: eval mode, no gradient, one view of each sample.

    Args:
        model: left in the mode it was in.
        dataset, transform, workers, captions: as in ``protoclip.data.batches``.
        indices: int64 [N], distinct positions.
        batch_size: rows per forward pass; the result depends on it in the last bits only.
        device: where the model is and the features stay, 2 x N x (D + Dh) x 4 bytes.
        seed: of captions and augmentation.
        autocast: makes the context of each forward pass.
        progress: told the number of rows after each batch.
    """
    was_training = model.training
    model.eval()
    parts: list[tuple[Tensor, Encoded, Encoded]] = []
    try:
        for batch in batches(
            dataset,
            indices,
            batch_size,
            transform,
            model.tokenizer,
            seed=seed,
            workers=workers,
            captions=captions,
        ):
            image = batch.image.to(device, non_blocking=True)
            tokens = batch.tokens.to(device, non_blocking=True)
            with autocast():
                encoded, projected = model(image, tokens)
            parts.append((batch.index, encoded, projected))
            if progress is not None:
                progress(len(batch.index))
    finally:
        model.train(was_training)
    return Features(
        index=torch.cat([index for index, _, _ in parts]).to(device),
        image=torch.cat([u.image.float() for _, u, _ in parts]),
        text=torch.cat([u.text.float() for _, u, _ in parts]),
        image_h=torch.cat([h.image for _, _, h in parts]),
        text_h=torch.cat([h.text for _, _, h in parts]),
    )
