"""Functions of tensors compiled once, or exported once, for batches of several sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from budget import assert_same_bits
from torch import Tensor

SIZES = (24, 40, 56)


def flat(results: Any) -> list[Tensor]:
    """All results that are tensors, or the loss."""
    results = getattr(results, "loss", results)
    return [results] if isinstance(results, Tensor) else list(results)


class Counter:
    """A torch.compile backend that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager_default_partitioner

        self.graphs += 1
        return aot_eager_default_partitioner(graph, inputs)


class Module(torch.nn.Module):
    """A call of tensors by position, as torch.export takes several."""

    def __init__(self, function: Callable[..., Any], names: Sequence[str]) -> None:
        super().__init__()
        self.function = function
        self.names = list(names)

    def forward(self, *tensors: Tensor) -> Any:
        results = self.function(**dict(zip(self.names, tensors, strict=True)))
        return tuple(flat(results))


def compiled_once(
    function: Callable[..., Any], batches: Sequence[dict[str, Tensor]], dynamic: bool | None
) -> int:
    """The number of graphs that serve the batches, whose results and gradients keep their bits."""
    torch._dynamo.reset()
    counter = Counter()
    module = Module(function, list(batches[0]))
    compiled = torch.compile(module.forward, fullgraph=True, backend=counter, dynamic=dynamic)
    for batch in batches:
        tensors = list(batch.values())
        expected = with_gradients(module(*tensors), tensors)
        assert_same_bits(with_gradients(compiled(*tensors), tensors), expected)
    return counter.graphs


def exported_once(
    function: Callable[..., Any], example: dict[str, Tensor], other: dict[str, Tensor], strict: bool
) -> None:
    """A program of a batch of ``SIZES[0]`` gives another batch's results."""
    torch._dynamo.reset()
    module = Module(function, list(example))
    batch = torch.export.Dim("batch", min=2)
    dim_of_size = {SIZES[0]: batch, 2 * SIZES[0]: 2 * batch}
    shapes = tuple(
        {0: dim_of_size[x.shape[0]]} if x.ndim and x.shape[0] in dim_of_size else {}
        for x in example.values()
    )
    program = torch.export.export(
        module, tuple(example.values()), dynamic_shapes={"tensors": shapes}, strict=strict
    )
    got = program.module()(*other.values())
    assert_same_bits(list(got), list(module(*other.values())))


def weighted_sum(results: Sequence[Tensor]) -> Tensor:
    return sum((x.flatten() * torch.linspace(0.5, 1.5, x.numel())).sum() for x in results)


def with_gradients(results: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x for x in tensors if x.requires_grad]
    if not leaves:
        return list(results)
    gradients = torch.autograd.grad(
        weighted_sum(results), leaves, allow_unused=True, materialize_grads=True
    )
    return [*(result.detach() for result in results), *gradients]
