"""Text towers without the padding.

OpenCLIP pads every caption to the whole context, 77 tokens for a dozen words, and runs the tower
over all of it. Under a causal mask nothing behind a caption's end reaches its feature, so those
positions can be left out: the same feature up to rounding, at a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

STEP = 8  # lengths are multiples of it, so that kernels and memory see few shapes


def can_shorten(clip: nn.Module) -> bool:
    """Whether ``clip``'s text feature depends on nothing behind the caption's end."""
    return (
        type(clip) is open_clip.CLIP
        and isinstance(clip.attn_mask, Tensor)  # causal: OpenCLIP has no other there
        and (clip.text_pool_type == "argmax" or _end_id(clip) is not None)
    )


def _end_id(clip: Any) -> int | None:
    """The token whose place gives the feature; None: the largest token's does."""
    return getattr(clip, "text_eos_id", None) if clip.text_pool_type == "eos" else None


def _ends(tokens: Tensor, end_id: int | None) -> Tensor:
    """The place of each caption's feature, int64 [B]."""
    return (tokens if end_id is None else torch.eq(tokens, end_id).int()).argmax(dim=1)


@dataclass(frozen=True)
class ShortTokenizer:
    """OpenCLIP's tokenizer, less the padding that all captions of a call share.

    Picklable, for loaders with workers.
    """

    tokenizer: Callable[[list[str]], Tensor]
    end_id: int | None

    def __call__(self, texts: list[str]) -> Tensor:
        """-> int64 [B, L], L a multiple of ``STEP`` or the whole context."""
        tokens = self.tokenizer(texts)
        if not len(tokens):
            return tokens
        length = int(_ends(tokens, self.end_id).max()) + 1
        return tokens[:, : -(-length // STEP) * STEP]


def short_tokenizer(clip: Any, tokenizer: Callable) -> Callable[[list[str]], Tensor]:
    """A tokenizer for ``encode_text`` below: shorter where the tower allows, else the one given."""
    return ShortTokenizer(tokenizer, _end_id(clip)) if can_shorten(clip) else tokenizer


def encode_text(clip: Any, tokens: Tensor) -> Tensor:
    """``clip.encode_text`` of captions of any length up to the context: int64 [B, L] -> [B, D].

    On the CPU, where lengths cost nothing to read, few long captions do not make all others long:
    they are encoded apart.
    """
    if not can_shorten(clip):
        return clip.encode_text(tokens)
    if not len(tokens) or not _readable(tokens):
        return _encode(clip, tokens)
    lengths = (_ends(tokens, _end_id(clip)) // STEP + 1) * STEP
    order = lengths.argsort(stable=True)
    few = _split(lengths[order])
    parts = [
        _encode(clip, tokens[rows, : int(lengths[rows].max())])
        for rows in (order[:few], order[few:])
        if len(rows)
    ]
    if len(parts) == 1 and bool((lengths == lengths[0]).all()):
        return parts[0]
    return torch.cat(parts)[order.argsort()]


def _readable(tokens: Tensor) -> bool:
    """Whether values can be looked at for free: on the CPU, not while torch traces shapes."""
    return (
        type(tokens) is Tensor and tokens.device.type == "cpu" and not torch.compiler.is_compiling()
    )


def _split(lengths: Tensor) -> int:
    """How many of the shortest captions (ascending ``lengths``) to encode apart; 0 for none.

    The cheapest cut in token positions, if it saves a tenth of them.
    """
    count, longest = len(lengths), int(lengths[-1])
    first = torch.arange(1, count + 1)
    positions = first * lengths + (count - first) * longest
    best = int(positions.argmin())
    return best + 1 if int(positions[best]) < 0.9 * count * longest else 0


def _encode(clip: Any, tokens: Tensor) -> Tensor:
    """OpenCLIP 3's ``CLIP.encode_text``, with as many positions as there are tokens."""
    length = tokens.shape[1]
    if length == clip.positional_embedding.shape[0]:
        return clip.encode_text(tokens)
    dtype = clip.transformer.get_cast_dtype()
    x = clip.token_embedding(tokens).to(dtype) + clip.positional_embedding[:length].to(dtype)
    x = clip.transformer(x, attn_mask=clip.attn_mask[:length, :length])
    x = clip.ln_final(x)
    x = x[torch.arange(len(x), device=x.device), _ends(tokens, _end_id(clip))]
    if clip.text_projection is None:
        return x
    if isinstance(clip.text_projection, nn.Linear):
        return clip.text_projection(x)
    return x @ clip.text_projection
