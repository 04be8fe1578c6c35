"""Heads on the rows of frozen encoders: two small networks that answer as an OpenCLIP model does.

``protoclip train`` trains them on stored features, ``protoclip export`` writes them to a folder,
and ``load_heads`` reads that folder. ``build_model`` in ``protoclip.model`` makes them part of a
model with projection heads.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoclip.common.json_text import parse_json

# Of an exported folder.
CONFIG_FILE = "heads.json"
WEIGHTS_FILE = "heads.safetensors"
EXPANSION = 4  # of a residual block's hidden layer, FuseMix's


class ResidualBlock(nn.Module):
    """x + MLP(LayerNorm(x)): [N, width] -> [N, width], FuseMix's block (arXiv 2312.10144)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, EXPANSION * width)
        self.narrow = nn.Linear(EXPANSION * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.gelu(self.widen(self.norm(x))))


class Head(nn.Module):
    """Centres rows, scales them to unit length, and maps them to embeddings: [N, width] -> [N, D].

    Args:
        width: columns of the rows.
        embed_dim: D.
        kind: "linear", or "mlp": ``depth`` residual blocks, a LayerNorm, a linear layer.
    Attributes:
        mean: subtracted from each row, fp32 [width]; that of the training rows.
    """

    mean: Tensor
    # What OpenCLIP's image towers have; 0: this one takes no pictures.
    image_size = 0
    image_mean = image_std = None

    def __init__(self, width: int, embed_dim: int, kind: str = "linear", depth: int = 1) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("mean", torch.zeros(width))
        layers: list[nn.Module] = []
        if kind == "mlp":
            layers += [ResidualBlock(width) for _ in range(depth)]
            layers.append(nn.LayerNorm(width))
        self.layers = nn.Sequential(*layers, nn.Linear(width, embed_dim))

    def forward(self, rows: Tensor | np.ndarray) -> Tensor:
        rows = torch.as_tensor(rows, device=self.mean.device)
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(
                f"heads: expected rows [N, {self.width}], got {list(rows.shape)}; use the rows of "
                "the encoder that the heads were trained on"
            )
        return self.layers(F.normalize(rows.float() - self.mean, dim=1))


class Heads(nn.Module):
    """An image head and a text head with CLIP's scale, and with SigLIP's bias if ``siglip``.

    Called as OpenCLIP's models are, with rows of features in place of pictures and tokens.

    Args:
        image_width: columns of the image rows.
        text_width: columns of the text rows.
        embed_dim: columns of the embeddings.
        kind: "linear" or "mlp"; see :class:`Head`.
        depth: residual blocks of each "mlp" head.
        siglip: whether the loss is SigLIP's, whose scale starts lower, with a bias.
    """

    def __init__(
        self,
        image_width: int,
        text_width: int,
        embed_dim: int = 512,
        kind: str = "linear",
        depth: int = 1,
        siglip: bool = False,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "image_width": image_width,
            "text_width": text_width,
            "embed_dim": embed_dim,
            "kind": kind,
            "depth": depth,
            "siglip": siglip,
        }
        self.visual = Head(image_width, embed_dim, kind, depth)
        self.text = Head(text_width, embed_dim, kind, depth)
        log_scale = math.log(10) if siglip else math.log(1 / 0.07)
        self.logit_scale = nn.Parameter(torch.tensor(log_scale))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if siglip else None

    def encode_image(self, image: Tensor | np.ndarray, normalize: bool = False) -> Tensor:
        """Embeddings of image rows: [N, image_width] -> [N, D]."""
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor | np.ndarray, normalize: bool = False) -> Tensor:
        """Embeddings of text rows: [N, text_width] -> [N, D]."""
        features = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """What an OpenCLIP model with ``output_dict=True`` returns: unit rows and the scale."""
        output = {
            "image_features": self.encode_image(image, normalize=True),
            "text_features": self.encode_text(text, normalize=True),
            "logit_scale": self.logit_scale.exp(),
        }
        if self.logit_bias is not None:
            output["logit_bias"] = self.logit_bias
        return output


def load_heads(folder: str | os.PathLike[str]) -> Heads:
    """Load the heads that ``protoclip export`` wrote to a folder, in eval mode on the CPU.

    Args:
        folder: holds heads.json and heads.safetensors.
    Returns:
        A module whose ``encode_image`` and ``encode_text`` map rows of the encoders that the heads
        were trained on, tensors or NumPy arrays, to a common space; ``normalize=True`` gives unit
        rows. Rows of another width are refused.
    Raises:
        ValueError: the folder lacks a file, or they do not fit together.

    Example:
        >>> import json, os, tempfile
        >>> from safetensors.torch import save_file
        >>> folder = tempfile.mkdtemp()  # like what protoclip export RUN --out DIR writes
        >>> heads = protoclip.heads.Heads(image_width=768, text_width=384, embed_dim=256)
        >>> with open(os.path.join(folder, "heads.json"), "w") as file:
        ...     json.dump(heads.settings, file)
        >>> save_file(heads.state_dict(), os.path.join(folder, "heads.safetensors"))
        >>> heads = protoclip.load_heads(folder)
        >>> images = heads.encode_image(torch.randn(4, 768), normalize=True)
        >>> texts = heads.encode_text(torch.randn(9, 384), normalize=True)
        >>> (images @ texts.T).shape
        torch.Size([4, 9])
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        settings = parse_json((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        heads = Heads(**settings)
        heads.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except Exception as error:  # safetensors and torch raise their own
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"load_heads: expected {CONFIG_FILE} and {WEIGHTS_FILE} of protoclip export in "
            f"{folder}: {reason}"
        ) from error
    return heads.eval()
