"""The stash: dot products that the forward pass leaves to the backward pass, which else forms them
again.

It is bytes, an integer dtype, so that autograd takes it for no result with a gradient. An op
returns tensors only: where nothing is stashed it is [0].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from protoclip.ops.operators import wants_gradient
from protoclip.ops.rates import stash_pays


@dataclass(frozen=True)
class StashFunctions:
    """How a backend leaves the dot products of its forward pass to its backward pass."""

    num_bytes: Callable[[int, int], int]  # for N rows and M columns; 0: they are not stashed
    empty: Callable[[int], Tensor]  # allocates uint8 [num_bytes]
    timed_forward: Callable[..., object]  # tells ops/rates.py what a product costs here


def keeps_stash(stash: bool | None, *inputs: Tensor) -> bool:
    """Whether a call leaves its dot products to its backward pass.

    An exported graph does not: it would hold only for batches whose products fit."""
    wanted = stash is not False and wants_gradient(*inputs)
    return wanted and not torch.compiler.is_exporting()


def no_stash(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.uint8)


def _stash_bytes(x: Tensor, y: Tensor, stashing: StashFunctions | None, keep_stash: bool) -> int:
    if stashing is None or not keep_stash:
        return 0
    return stashing.num_bytes(x.shape[0], y.shape[0])


def empty_stash(x: Tensor, y: Tensor, stashing: StashFunctions | None, keep_stash: bool) -> Tensor:
    """A stash to fill, if the products of x and y are to go there."""
    num_bytes = _stash_bytes(x, y, stashing, keep_stash)
    if stashing is None or not num_bytes:
        return no_stash(x)
    return stashing.empty(num_bytes)


def fake_stash(x: Tensor, y: Tensor, stashing: StashFunctions | None, keep_stash: bool) -> Tensor:
    return x.new_empty(_stash_bytes(x, y, stashing, keep_stash), dtype=torch.uint8)


def with_stash(
    function: Callable[..., Any], stashing: StashFunctions | None, stash: Tensor, x: Tensor
) -> Callable[..., Any]:
    """The function with the stash as an argument, if there is one and using it takes less time."""
    if stashing is None or not stash.numel():
        return function
    if not stash_pays(stashing.timed_forward, x, stash):
        return function
    return partial(function, stash=stash)
