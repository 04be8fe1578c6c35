"""Unit rows that are hard for the kernels of contrastive losses."""

import torch
import torch.nn.functional as F
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def features(n: int, d: int, kind: str, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit rows: image and text of a pair alike; each modality in a narrow cone; all +-1 alike;
    some images opposite to every text, 290 binary orders below the rest of their tile; the columns
    that a tile looks at first 280 below the others."""
    torch.manual_seed(seed)
    x = torch.randn(n, d)
    y = x + 0.5 * torch.randn(n, d)
    if kind in ("cones", "buried"):
        x = torch.randn(d) * 4 + x
        y = torch.randn(d) * 4 + y
    if kind == "opposite":
        x = x[:1] * (1.0 - 2.0 * (torch.arange(n) % 2))[:, None]
        y = x
    if kind == "outcasts":
        x = 4 + x
        y = 4 + y
        x[::7] *= -1
    if kind == "buried":
        y[torch.arange(n) % 64 < 8] *= -1
    return F.normalize(x, dim=1).to(DEVICE, dtype), F.normalize(y, dim=1).to(DEVICE, dtype)
