"""Cached gradients: a contrastive loss over a batch whose activations do not fit in memory.

The encoders run chunk by chunk, and keep nothing of it (torch's checkpoint): the backward pass runs
each chunk again, with the random state and autocast of its first run (GradCache, Gao et al. 2021).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence, Sized
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

Split = Callable[[Any, int], Sequence[Any]]


def grad_cache(
    encoders: Sequence[Callable[..., Any]],
    inputs: Sequence[Any],
    chunk_size: int | Sequence[int],
    *,
    split: Split | None = None,
    ddp: Sequence[DistributedDataParallel] = (),
) -> list[Any]:
    """Features of whole batches for the memory of one chunk; ``loss.backward()`` does the rest.

    Gradients are those of the same chunks in one graph, dropout included; each chunk runs twice.
    Batch norm in an encoder is inexact: it sees one chunk at a time and updates its statistics
    twice. Under DDP each module reduces its gradients once, with its last chunk over all encoders;
    a ``no_sync`` around it all is respected.

    Args:
        encoders: all of the loss, in one call; a shared one twice. They return a tensor, a tuple
            or a dict, with a row of features for each row of their chunk.
        inputs: a batch for each encoder: a tensor is one argument, a tuple several, a dict
            keywords. Tensors are cut along their first dimension; 0-dim tensors and other values
            in a tuple or dict are passed through.
        chunk_size: rows of a chunk: one number, or one for each encoder.
        split: ``split(batch, chunk_size)`` returns the chunks of any other kind of batch.
        ddp: DDP modules called inside functions; those that are encoders themselves are found.
    Returns:
        What each encoder returns, for its whole batch; no graph under ``torch.no_grad()``. None,
        numbers and 0-dim tensors, such as a logit scale, are those of the last chunk, which also
        takes the gradient of a 0-dim tensor.
    Raises:
        ValueError: arguments that do not fit together, or outputs with another number of rows.
    Source:
        Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup.
    """
    if not isinstance(encoders, Sized) or not isinstance(inputs, Sized):
        raise ValueError(
            "grad_cache: expected a list of encoders and a list of their batches, got "
            f"{type(encoders).__name__} and {type(inputs).__name__}; put even one into a list"
        )
    sizes = list(chunk_size) if isinstance(chunk_size, Sequence) else [chunk_size] * len(encoders)
    if not len(encoders) == len(inputs) == len(sizes) or not all(
        isinstance(size, Integral) and size >= 1 for size in sizes or [0]
    ):
        raise ValueError(
            f"grad_cache: expected a batch and a whole chunk_size >= 1 for each of {len(encoders)} "
            f"encoders, got {len(inputs)} batches and sizes {sizes}; list a shared encoder twice"
        )
    # A bound method such as model.encode_image belongs to its model.
    owners = [getattr(encoder, "__self__", encoder) for encoder in encoders]
    modules = [m for owner in owners if isinstance(owner, nn.Module) for m in owner.modules()]
    replicas = [*ddp, *(m for m in modules if isinstance(m, DistributedDataParallel))]
    replicas = list(dict.fromkeys(replicas))

    def run(encoder: Callable[..., Any], chunk: Any) -> Any:
        cached = torch.is_autocast_cache_enabled()
        with contextlib.ExitStack() as stack:
            # A cast of the weights that all chunks share would sum their gradients in 16 bits.
            torch.set_autocast_cache_enabled(False)
            stack.callback(torch.set_autocast_cache_enabled, cached)
            for replica in replicas:  # its own forward pass has begun, and does not end here
                vars(replica)["forward"] = replica.module
                stack.callback(vars(replica).pop, "forward")
            if isinstance(chunk, Mapping):
                return encoder(**chunk)
            return encoder(*chunk) if isinstance(chunk, tuple) else encoder(chunk)

    # For DDP all chunks of all encoders are one forward pass, of one reduction.
    for replica in replicas:
        replica._pre_forward(torch.empty(0))
    outputs = []
    for encoder, batch, size in zip(encoders, inputs, sizes, strict=True):
        parts, chunks = [], (split or _split)(batch, size)
        if not len(chunks):
            raise ValueError("grad_cache: expected at least one chunk of split=, got none")
        for chunk in chunks:
            parts.append(checkpoint(run, encoder, chunk, use_reentrant=False))
            _check_rows(pytree.tree_leaves(parts[-1]), set() if split else _lengths(chunk))
        outputs.append(pytree.tree_map(_whole, *parts))
    for replica in replicas:
        outputs = replica._post_forward(outputs)
    return outputs


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _lengths(batch: Any) -> set[int]:
    return {len(value) for value in pytree.tree_leaves(batch) if _has_rows(value)}


def _split(batch: Any, size: int) -> list[Any]:
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    if len(lengths := _lengths(batch)) != 1:
        raise ValueError(
            f"grad_cache: expected tensors of one length in a batch, got {type(batch).__name__} "
            f"with lengths {sorted(lengths)}; cut other batches with split="
        )

    def cut(start: int) -> Any:
        rows = slice(start, start + size)
        return pytree.tree_map(lambda x: x[rows] if _has_rows(x) else x, batch)

    return [cut(start) for start in range(0, max(*lengths, 1), size)]


def _check_rows(leaves: Sequence[Any], expected: set[int]) -> None:
    lengths = _lengths(leaves)
    known = all(x is None or isinstance(x, (Tensor, bool, int, float, str)) for x in leaves)
    if not known or not lengths or len(lengths | expected) > 1:
        shown = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in leaves]
        raise ValueError(
            "grad_cache: expected a tensor, tuple or dict from an encoder, with the rows of its "
            f"chunk{sorted(expected) or ''}, got {shown}; return a row of features for each"
        )


def _whole(*parts: Any) -> Any:
    """An output for the whole batch, from those for its chunks."""
    return torch.cat(parts) if _has_rows(parts[-1]) else parts[-1]
