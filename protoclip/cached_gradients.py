"""Cached gradients: a contrastive loss over a batch whose activations do not fit in memory.

The encoders run chunk by chunk and store no activations (torch's checkpoint). The backward pass
runs each chunk again, with its first run's random state and autocast (GradCache, Gao et al. 2021).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

Split = Callable[[Any, int], Iterable[Any]]


def grad_cache(
    encoders: Sequence[Callable[..., Any]],
    inputs: Sequence[Any],
    chunk_size: int | Sequence[int],
    *,
    split: Split | None = None,
    ddp: Sequence[DistributedDataParallel] = (),
) -> list[Any]:
    """Features of whole batches with the memory of one chunk, ready for ``loss.backward()``.

    Gradients equal those of the same chunks in one graph, dropout included; each chunk runs twice.
    Batch norm in an encoder normalises by one chunk at a time and counts each chunk once (twice in
    a compiled function: compile the module or its method). Under DDP each module reduces its
    gradients once for all chunks of all encoders; an enclosing ``no_sync`` is respected.

    Args:
        encoders: all encoders of the loss; list a shared one twice. Each returns a tensor, a tuple
            or a dict, with one row of features per row of its chunk.
        inputs: one batch per encoder: a tensor is one argument, a tuple several, a dict
            keywords. Tensors are cut along their first dimension; 0-dim tensors and other values
            in a tuple or dict are passed through.
        chunk_size: rows per chunk: one number, or one for each encoder.
        split: ``split(batch, chunk_size)`` returns or yields the chunks of any other kind of batch.
        ddp: DDP modules that an encoder function calls; encoders that are modules need no entry.
    Returns:
        Each encoder's output for its whole batch; no graph under ``torch.no_grad()``. None,
        numbers and 0-dim tensors, such as a logit scale, come from the last chunk, which also
        receives the gradient of a 0-dim tensor.
    Raises:
        ValueError: arguments that disagree, or an output whose rows do not match its chunk.
        RuntimeError: by ``backward()``, if a parameter that an encoder trains or a tensor of its
            batch was changed in place since: the second pass would give other features.
    Source:
        Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup.

    Example:
        >>> encoder = torch.nn.Linear(16, 8)
        >>> x, y = protoclip.grad_cache([encoder, encoder], [torch.randn(32, 16)] * 2, chunk_size=8)
        >>> protoclip.info_nce(x, y, 1.0).backward()
        >>> encoder.weight.grad.shape
        torch.Size([8, 16])
    """
    if not isinstance(encoders, Sized) or not isinstance(inputs, Sized):
        raise ValueError(
            "grad_cache: expected a list of encoders and a list of their batches, got "
            f"{type(encoders).__name__} and {type(inputs).__name__}; put even one in a list"
        )
    sizes = list(chunk_size) if isinstance(chunk_size, Sequence) else [chunk_size] * len(encoders)
    if not len(encoders) == len(inputs) == len(sizes) > 0:
        raise ValueError(
            f"grad_cache: expected a batch and a chunk_size for each of {len(encoders)} encoders, "
            f"got {len(inputs)} batches and {len(sizes)} sizes; list a shared encoder twice"
        )
    if not all(isinstance(size, Integral) and size >= 1 for size in sizes):
        raise ValueError(f"grad_cache: expected a whole chunk_size >= 1, in rows, got {chunk_size}")
    # A bound method such as model.encode_image belongs to its model, compiled or not.
    owners = [getattr(inspect.unwrap(encoder), "__self__", encoder) for encoder in encoders]
    known = [owner for owner in (*owners, *ddp) if isinstance(owner, nn.Module)]
    modules = [module for owner in known for module in owner.modules()]
    with_functions = len(known) < len(owners) + len(ddp)
    replicas = [m for m in modules if isinstance(m, DistributedDataParallel)]
    replicas = list(dict.fromkeys(replicas))
    # FSDP2 computes with gathered copies, so the graph does not know the shards that are trained.
    shards = {p for m in modules for p in m.parameters(recurse=False) if hasattr(p, "device_mesh")}

    def run(encoder: Callable[..., Any], chunk: Any, versions: _Versions) -> Any:
        versions.check()
        cached = torch.is_autocast_cache_enabled()
        with contextlib.ExitStack() as stack:
            # A cached cast of the weights, shared by all chunks, would sum gradients in 16 bits.
            torch.set_autocast_cache_enabled(False)
            stack.callback(torch.set_autocast_cache_enabled, cached)
            for replica in replicas:  # its own forward pass is already open
                vars(replica)["forward"] = replica.module
                stack.callback(vars(replica).pop, "forward")
            if isinstance(chunk, Mapping):
                return encoder(**chunk)
            return encoder(*chunk) if isinstance(chunk, tuple) else encoder(chunk)

    def contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        return contextlib.nullcontext(), _statistics_kept(known, with_functions)

    def join(*parts: Any) -> Any:
        return torch.cat(parts) if _has_rows(parts[-1]) else parts[-1]

    _count_fused_steps()
    # DDP sees all chunks of all encoders as one forward pass with one reduction.
    for replica in replicas:
        replica._pre_forward(torch.empty(0))
    outputs = []
    for encoder, batch, size in zip(encoders, inputs, sizes, strict=True):
        parts = []
        for chunk in (split or _split)(batch, size):
            versions = _Versions(chunk, shards)
            output = checkpoint(
                run, encoder, chunk, versions, use_reentrant=False, context_fn=contexts
            )
            parts.append(output)
            versions.note_parameters(parts[-1])
            _check_rows(pytree.tree_leaves(parts[-1]), set() if split else _lengths(chunk))
        if not parts:
            raise ValueError("grad_cache: expected at least one chunk from split=, got none")
        outputs.append(pytree.tree_map(join, *parts))
    for replica in replicas:
        outputs = replica._post_forward(outputs)
    return outputs


@functools.cache
def _count_fused_steps() -> None:
    """Let fused optimizers count their changes in place as all others do (torch 2.13 does not)."""

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = [] if torch.compiler.is_compiling() else optimizer.param_groups
        fused = [p for group in groups if group.get("fused") for p in group["params"]]
        torch.autograd.graph.increment_version(fused)

    register_optimizer_step_post_hook(count)


@contextlib.contextmanager
def _statistics_kept(modules: Iterable[nn.Module], with_functions: bool) -> Iterator[None]:
    """Put back, in the end, the statistics of batch norms: in ``modules``, and ``with_functions``
    in all modules that are called, for nobody knows those of a function before."""
    before: dict[Tensor, Tensor] = {}

    def note(module: nn.Module, *_: Any) -> None:
        for part in module.modules():  # compiled modules do not call their parts
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training:
                for buffer in part.buffers():
                    before.setdefault(buffer, buffer.clone())

    def put_back() -> None:
        for buffer, values in before.items():
            buffer.data.copy_(values)  # without a new version, which the graph would refuse

    with contextlib.ExitStack() as stack:
        stack.callback(put_back)
        for module in modules:
            note(module)
        if with_functions:
            stack.callback(nn.modules.module.register_module_forward_pre_hook(note).remove)
        yield


class _Versions:
    """What a chunk's features depend on, with torch's count of each tensor's changes in place."""

    def __init__(self, chunk: Any, shards: Iterable[Tensor]) -> None:
        leaves = (leaf for leaf in pytree.tree_leaves(chunk) if isinstance(leaf, Tensor))
        # Inference tensors are not counted.
        self.inputs = [(leaf, leaf._version) for leaf in leaves if not leaf.is_inference()]
        self.parameters = [(p, p._version) for p in shards if p.requires_grad]

    def note_parameters(self, output: Any) -> None:
        """Remember the leaves that the graph of the first pass ends in. An encoder may be any
        function, so only its graph knows its parameters."""
        inputs = {leaf.grad_fn for leaf, _ in self.inputs if leaf.grad_fn is not None}
        outputs = (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
        nodes = [leaf.grad_fn for leaf in outputs if leaf.grad_fn is not None]
        seen = {*inputs, *nodes}
        while nodes:
            node = nodes.pop()
            if node.name() == "torch::autograd::AccumulateGrad":
                leaf: Tensor = node.variable  # type: ignore[attr-defined]
                self.parameters.append((leaf, leaf._version))
            inputs_of_node = {before for before, _ in node.next_functions if before is not None}
            nodes += inputs_of_node - seen
            seen |= inputs_of_node

    def check(self) -> None:
        """Raise if a tensor was changed since it was noted."""
        for role, noted in (("parameter", self.parameters), ("tensor in a batch", self.inputs)):
            for tensor, version in noted:
                if tensor._version != version:
                    raise RuntimeError(
                        "grad_cache: expected backward() before anything is changed in place, got "
                        f"a {role} of shape {list(tensor.shape)} changed since the first pass; "
                        "call optimizer.step() after backward(), and change copies of a batch"
                    )


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
    plain = all(x is None or isinstance(x, (Tensor, bool, int, float, str)) for x in leaves)
    if not plain or not lengths or len(lengths | expected) > 1:
        shown = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in leaves]
        raise ValueError(
            "grad_cache: expected a tensor, tuple or dict from an encoder, with the rows of its "
            f"chunk{sorted(expected) or ''}, got {shown}; return one row of features per row"
        )
