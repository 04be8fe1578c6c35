"""Cached gradients: a contrastive loss over a batch whose activations do not fit in memory.

The encoders run chunk by chunk without a graph. The backward pass runs each chunk again, with the
random state and autocast of its first run, and passes the gradient of its features down (GradCache,
Gao et al. 2021).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

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
            keywords. Tensors are cut along their first dimension and may not require gradients;
            0-dim tensors and other values in a tuple or dict are passed through.
        chunk_size: rows of a chunk: one number, or one for each encoder.
        split: ``split(batch, chunk_size)`` returns the chunks of any other kind of batch.
        ddp: DDP modules called inside functions; those that are encoders themselves are found.
    Returns:
        What each encoder returns, for its whole batch; no graph under ``torch.no_grad()``. None,
        numbers and 0-dim tensors, such as a logit scale, are those of the last chunk, which also
        takes the gradient of a 0-dim tensor.
    Raises:
        ValueError: arguments that do not fit together, or outputs with another number of rows.
        RuntimeError: ``torch.autograd.grad``, or ``backward(inputs=...)``.
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
    if any(isinstance(x, Tensor) and x.requires_grad for x in pytree.tree_leaves(inputs)):
        raise ValueError(
            "grad_cache: expected inputs without gradients, got a tensor that requires one; move "
            "what computes it into the encoder"
        )
    # A bound method such as model.encode_image belongs to its model.
    owners = [getattr(encoder, "__self__", encoder) for encoder in encoders]
    modules = [m for owner in owners if isinstance(owner, nn.Module) for m in owner.modules()]
    replay = _Replay([*ddp, *(m for m in modules if isinstance(m, DistributedDataParallel))])
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for replica in replay.last:
            mark = replica.register_forward_pre_hook(
                lambda replica, _: replay.last.update({replica: len(replay.chunks)})
            )
            stack.callback(mark.remove)
        outputs = [
            replay.encode(encoder, (split or _split)(batch, size), exact=split is None)
            for encoder, batch, size in zip(encoders, inputs, sizes, strict=True)
        ]
    if torch.is_grad_enabled():
        # With an edge to the parameters autograd.grad reaches the node, which can then refuse.
        # Their hooks would be called without a gradient there, so those with hooks have no edge.
        trained = {p: None for m in modules for p in m.parameters(recurse=False)}
        edges = [p for p in trained if not (p._backward_hooks or p._post_accumulate_grad_hooks)]
        trigger = torch.zeros((), requires_grad=True)
        leaves, spec = pytree.tree_flatten(outputs)
        features = [leaf.clone() for leaf in leaves if _differentiable(leaf)]
        cached = iter(_Features.apply(features, replay, trigger, *edges))
        leaves = [next(cached) if _differentiable(leaf) else leaf for leaf in leaves]
        outputs = pytree.tree_unflatten(leaves, spec)
    return [pytree.tree_map(_whole, *parts) for parts in outputs]


class _Features(torch.autograd.Function):
    """Gives the features of the first run a backward pass: the second run."""

    @staticmethod
    def forward(ctx: Any, features: list[Tensor], replay: _Replay, *edges: Tensor):
        ctx.replay, ctx.edges = replay, len(edges)
        ctx.set_materialize_grads(False)
        return tuple(features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None):
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "grad_cache: expected loss.backward(), got torch.autograd.grad or "
                "backward(inputs=...); call loss.backward() and read the parameters' .grad"
            )
        # At the end of the backward pass, when parameters that the loss uses directly have their
        # gradients too: DDP would otherwise reduce them too early.
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(partial(ctx.replay.run, grads))
        return None, None, *(None,) * ctx.edges


class _Replay:
    """The chunks of all encoders, and the state in which they ran."""

    def __init__(self, replicas: Sequence[DistributedDataParallel]) -> None:
        if any(replica.static_graph for replica in replicas):
            raise ValueError("grad_cache: expected DDP without static_graph, got it; leave it out")
        # For each chunk the call, the random states before it (CPU, then each GPU), and how many
        # features it returned.
        self.chunks: list[tuple[Callable[[], Any], list[Tensor], int]] = []
        self.last = dict.fromkeys(replicas, -1)  # the number of the last chunk that calls it
        self.syncs = {replica: replica.require_backward_grad_sync for replica in replicas}
        # No cache: casts made without gradients would be found by later code that wants them.
        self.autocast = [
            torch.autocast(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d), False)
            for d in ("cpu", "cuda")
        ]

    def encode(self, encoder: Callable[..., Any], chunks: Sequence[Any], *, exact: bool) -> list:
        """Its output for each chunk. ``exact``: a row for each row of the chunk's tensors."""
        outputs = []
        if not len(chunks):
            raise ValueError("grad_cache: expected at least one chunk of split=, got none")
        for chunk in chunks:
            cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
            call, random = partial(_call, encoder, chunk), [torch.get_rng_state(), *cuda]
            with self.autocast[0], self.autocast[1]:
                outputs.append(call())
            leaves = pytree.tree_leaves(outputs[-1])
            _check_rows(leaves, _lengths(chunk) if exact else set())
            self.chunks.append((call, random, sum(map(_differentiable, leaves))))
        return outputs

    def run(self, grads: Sequence[Tensor | None]) -> None:
        """Run every chunk again and pass the gradients of its features down."""
        waiting = iter(grads)
        for number, (call, (cpu, *cuda), count) in enumerate(self.chunks):
            own = list(itertools.islice(waiting, count))
            ends = (number, number - len(self.chunks))
            syncing = [m for m, last in self.last.items() if last in ends and self.syncs[m]]
            if not syncing and all(grad is None for grad in own):
                continue
            with torch.enable_grad(), contextlib.ExitStack() as stack:
                for replica in self.last.keys() - syncing:
                    stack.enter_context(replica.no_sync())
                stack.enter_context(torch.random.fork_rng(range(len(cuda)), device_type="cuda"))
                torch.set_rng_state(cpu)
                torch.cuda.set_rng_state_all(cuda)
                with self.autocast[0], self.autocast[1]:
                    leaves = list(filter(_differentiable, pytree.tree_leaves(call())))
            pairs = [(x, g) for x, g in zip(leaves, own, strict=True) if g is not None]
            for replica in syncing:  # DDP waits for every parameter
                pairs += [(leaf, torch.zeros_like(leaf)) for leaf in leaves]
                if not replica.find_unused_parameters:
                    reached = reached_leaves(leaves)
                    rest = [p for p in replica.parameters() if id(p) not in reached]
                    pairs += [(p, p.new_zeros(()).expand_as(p)) for p in rest]
            pairs = [(x, g) for x, g in pairs if x.requires_grad]
            if pairs:
                torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])


def reached_leaves(roots: Sequence[Tensor]) -> set[int]:
    """The ids of the leaves that a backward pass from ``roots`` gives a gradient."""
    seen, leaves = set(), set()
    waiting = [root.grad_fn for root in roots if root.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions if following is not None]
    return leaves


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


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


def _call(encoder: Callable[..., Any], chunk: Any) -> Any:
    if isinstance(chunk, Mapping):
        return encoder(**chunk)
    return encoder(*chunk) if isinstance(chunk, tuple) else encoder(chunk)


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
