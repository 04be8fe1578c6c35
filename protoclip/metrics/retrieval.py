"""Image-text retrieval with several captions per image."""

from dataclasses import dataclass

import torch
from torch import Tensor

from protoclip.metrics._common import check_labels, check_matrix, rows_per_block, unit


@dataclass(frozen=True)
class Retrieval:
    """Ranks of the best positive, from 1; a negative with the same score counts one half."""

    image_to_text: Tensor  # float32 [N], one query per image: text retrieval
    text_to_image: Tensor  # float32 [M], one query per caption: image retrieval

    def hits(self, k: int) -> tuple[Tensor, Tensor]:
        """1.0 where a positive is among the first ``k``: image->text [N], text->image [M]."""
        return (self.image_to_text <= k).float(), (self.text_to_image <= k).float()

    def summary(self, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
        """CLIP_benchmark's ``text_retrieval_recall@K`` (image -> text) and
        ``image_retrieval_recall@K`` (text -> image), with mean and median ranks. Empty: NaN."""
        out: dict[str, float] = {}
        for name, ranks in (("text", self.image_to_text), ("image", self.text_to_image)):
            for k in ks:
                out[f"{name}_retrieval_recall@{k}"] = float((ranks <= k).double().mean())
            out[f"{name}_retrieval_mean_rank"] = float(ranks.double().mean())
            median = ranks.double().quantile(0.5) if ranks.numel() else float("nan")
            out[f"{name}_retrieval_median_rank"] = float(median)
        return out


def retrieval(image: Tensor, text: Tensor, caption_image: Tensor | None = None) -> Retrieval:
    """Ranks of the best positive by cosine, both ways, a block of queries at a time.

    Ties cost half a place each, so that a model which maps everything to one point scores at
    chance and not at 100 %.

    Args:
        image: features [N, D], any length.
        text: features [M, D], any length.
        caption_image: int64 [M], the image row each caption belongs to; None: caption i to image i.
    Returns:
        Ranks on the features' device. An image without a caption gets rank infinity.
    Raises:
        ValueError: shapes disagree, or ``caption_image`` points outside the images.
    """
    check_matrix("retrieval: image", image)
    check_matrix("retrieval: text", text, cols=image.shape[1])
    if caption_image is None:
        if image.shape[0] != text.shape[0]:
            raise ValueError(
                f"retrieval: {image.shape[0]} images and {text.shape[0]} captions; "
                "pass caption_image to say which caption belongs to which image"
            )
        caption_image = torch.arange(image.shape[0], device=image.device)
    check_labels("retrieval: caption_image", caption_image, text.shape[0])
    caption_image = caption_image.to(image.device)
    if caption_image.numel():
        low, high = int(caption_image.min()), int(caption_image.max())
        if low < 0 or high >= image.shape[0]:
            raise ValueError(
                f"retrieval: caption_image must lie in 0..{image.shape[0] - 1}, found {low}..{high}"
            )
    z_image, z_text = unit(image), unit(text)
    images = torch.arange(image.shape[0], device=image.device)
    return Retrieval(
        image_to_text=_ranks(z_image, z_text, images, caption_image),
        text_to_image=_ranks(z_text, z_image, caption_image, images),
    )


def _ranks(queries: Tensor, items: Tensor, query_id: Tensor, item_id: Tensor) -> Tensor:
    """Rank of the best item with the query's id; queries [Q, D], items [P, D] -> float32 [Q]."""
    ranks = queries.new_full((queries.shape[0],), torch.inf, dtype=torch.float32)
    if items.shape[0] == 0:
        return ranks
    step = rows_per_block(items.shape[0])
    for start in range(0, queries.shape[0], step):
        scores = queries[start : start + step] @ items.T  # [b, P]
        positive = query_id[start : start + step, None] == item_id  # [b, P]
        best = scores.masked_fill(~positive, -torch.inf).amax(1)
        scores.masked_fill_(positive, torch.nan)  # a positive never stands before a positive
        ahead = (scores > best[:, None]).sum(1) + 0.5 * (scores == best[:, None]).sum(1)
        ranks[start : start + step] = torch.where(best.isinf() | best.isnan(), torch.inf, ahead + 1)
    return ranks
