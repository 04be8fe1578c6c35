"""How the two modalities lie on the sphere."""

import math

import torch
from torch import Tensor

from protoclip.metrics._common import check_matrix, rows_per_block, unit


def modality_gap(image: Tensor, text: Tensor) -> float:
    """Distance between the mean unit image [N, D] and the mean unit text [M, D]; 0 .. 2."""
    check_matrix("modality_gap: image", image)
    check_matrix("modality_gap: text", text, cols=image.shape[1])
    return float((unit(image).double().mean(0) - unit(text).double().mean(0)).norm())


def alignment(image: Tensor, text: Tensor) -> float:
    """Mean squared distance of the unit vectors of matching rows, [N, D] each; 0 .. 4."""
    check_matrix("alignment: image", image)
    check_matrix("alignment: text", text, rows=image.shape[0], cols=image.shape[1])
    return float((unit(image) - unit(text)).double().square().sum(1).mean())


def uniformity(features: Tensor, t: float = 2.0) -> float:
    """log of the mean of exp(-t |x - y|^2) over pairs of different rows [N, D], in nats.

    0 when all rows are one point; lower is more spread out. Fewer than two rows: NaN.
    Source: Wang & Isola 2020, equation 3.
    """
    check_matrix("uniformity: features", features)
    n = features.shape[0]
    if n < 2:
        return math.nan
    z = unit(features)
    step = rows_per_block(n)
    total = torch.zeros((), dtype=torch.float64, device=z.device)
    for start in range(0, n, step):
        squared = (2 - 2 * z[start : start + step] @ z.T).clamp_min_(0)  # [b, N]
        squared[:, start : start + step].fill_diagonal_(torch.inf)  # a row is no pair with itself
        total += torch.exp(-t * squared).sum(dtype=torch.float64)
    return float(torch.log(total / (n * (n - 1))))
