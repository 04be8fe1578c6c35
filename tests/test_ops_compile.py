"""One compiled graph serves all batch sizes: torch.compile and torch.export of every op."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from budget import assert_same_bits, usable
from torch import Tensor, nn

import protoclip
from protoclip.ops import sigmoid_loss

CPU = protoclip.backends("info_nce")["cpu"]
pytestmark = pytest.mark.skipif(CPU is not None, reason=str(CPU))

D = 8
K = 6
SIZES = (24, 40, 56)
Tensors = dict[str, Tensor]


def features(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, D, generator=generator), dim=1).requires_grad_()


def scalar(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def labels_of(n: int) -> Tensor:
    return torch.arange(n) % K


def ids_of(n: int) -> Tensor:
    return torch.arange(n) // 2


class Module(nn.Module):
    """A call of an op by keyword, and its tensors for a batch of n."""

    def __init__(self, call: Callable[..., Tensor], tensors_of: Callable[[int], Tensors]) -> None:
        super().__init__()
        self.call = call
        self.tensors_of = tensors_of
        self.names = list(tensors_of(SIZES[0]))

    def forward(self, *tensors: Tensor) -> Tensor:
        """By position, as torch.export takes several."""
        return self.call(**dict(zip(self.names, tensors, strict=True)))


def pairs(n: int, **more: Tensor) -> Tensors:
    return {
        "image_features": features(n),
        "text_features": features(n, 1),
        "logit_scale": scalar(10.0),
    } | more


def queries_and_keys(n: int, **more: Tensor) -> Tensors:
    """Two keys of each query."""
    return {
        "queries": features(n),
        "keys": features(2 * n, 1),
        "logit_scale": scalar(10.0),
    } | more


def views(n: int, **more: Tensor) -> Tensors:
    return {
        "views_a": features(n),
        "views_b": features(n, 1),
        "logit_scale": scalar(10.0),
    } | more


def prototypes(n: int, **more: Tensor) -> Tensors:
    return {
        "features": features(n),
        "prototypes": features(K, 1),
        "labels": labels_of(n),
        "logit_scale": scalar(10.0),
    } | more


def weights_of(n: int) -> Tensor:
    return torch.linspace(0, 1, n)


def key_bias_of(n: int) -> Tensor:
    return torch.linspace(-1, 1, 2 * n).requires_grad_()


def everything(n: int) -> Tensors:
    """All that can be said of queries and keys, with one positive each."""
    positives = torch.arange(n).flip(0)
    return queries_and_keys(
        n,
        positives=positives,
        key_ids=ids_of(2 * n),
        exclude=positives.roll(1),
        key_bias=key_bias_of(n),
        weights=torch.rand(n),
    )


def several_positives(n: int) -> Tensors:
    """Three, and three own negatives."""
    positives = torch.stack([torch.arange(n).roll(k) for k in (0, 3, 1)], dim=1)
    return queries_and_keys(
        n,
        positives=positives,
        key_ids=ids_of(2 * n),
        exclude=positives[:, 1],
        key_bias=key_bias_of(n),
        negatives=features(3 * n, 2).detach().view(n, 3, D).requires_grad_(),
    )


def smoothed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda **tensors: function(**tensors, label_smoothing=0.1)


def hard_and_soft_losses(
    features: Tensor, prototypes: Tensor, labels: Tensor, logit_scale: Tensor
) -> Tensor:
    hard = protoclip.Bank(prototypes, labels)
    soft = protoclip.Bank(prototypes, labels, prototypes.detach().flip(0))
    return protoclip.prototype_losses(features, [hard, soft], logit_scale).loss.sum()


def sum_of_parts(**tensors: Tensor) -> Tensor:
    level, mean = protoclip.contrastive_parts(**tensors)
    return level.sum() + mean.sum()


def squared_distances(points: Tensor, centroids: Tensor) -> Tensor:
    _, squared = protoclip.kmeans_assign(points, centroids)
    return squared


def means_of_segments(values: Tensor, labels: Tensor) -> Tensor:
    means, _ = protoclip.segment_mean(values, labels, K)
    return means


MODULES = {
    "info_nce": Module(protoclip.info_nce, pairs),
    "info_nce of each pair": Module(
        lambda **tensors: protoclip.info_nce(**tensors, reduction="none"), pairs
    ),
    "info_nce with ids": Module(protoclip.info_nce, lambda n: pairs(n, ids=ids_of(n))),
    "info_nce with options": Module(
        smoothed(protoclip.info_nce), lambda n: pairs(n, weights=weights_of(n))
    ),
    "info_nce with ids and options": Module(
        smoothed(protoclip.info_nce),
        lambda n: pairs(
            n,
            ids=torch.stack([ids_of(n), torch.arange(n) // 3], dim=1),
            weights=weights_of(n),
        ),
    ),
    "ClipLoss": Module(protoclip.ClipLoss(), pairs),
    "SigLipLoss": Module(protoclip.SigLipLoss(), lambda n: pairs(n, logit_bias=scalar(-5.0))),
    "sigmoid_loss": Module(sigmoid_loss, lambda n: pairs(n, logit_bias=scalar(-5.0))),
    "contrastive": Module(protoclip.contrastive, queries_and_keys),
    "contrastive smoothed": Module(smoothed(protoclip.contrastive), queries_and_keys),
    "contrastive with everything": Module(protoclip.contrastive, everything),
    "contrastive with several positives and own negatives": Module(
        smoothed(protoclip.contrastive), several_positives
    ),
    "contrastive_parts": Module(sum_of_parts, queries_and_keys),
    "nt_xent": Module(protoclip.nt_xent, views),
    "nt_xent with ids": Module(protoclip.nt_xent, lambda n: views(n, ids=ids_of(n))),
    "sup_con": Module(
        protoclip.sup_con,
        lambda n: {
            "features": features(n),
            "labels": labels_of(n),
            "logit_scale": scalar(10.0),
        },
    ),
    "nt_xent decoupled": Module(
        smoothed(partial(protoclip.nt_xent, decoupled=True)),
        lambda n: views(n, weights=weights_of(n)),
    ),
    "sup_con of views": Module(
        protoclip.sup_con,
        lambda n: {
            "features": features(2 * n).detach().reshape(n, 2, -1).requires_grad_(),
            "labels": labels_of(n),
            "logit_scale": scalar(10.0),
            "weights": weights_of(n),
        },
    ),
    "SigLipLoss with weights": Module(
        smoothed(protoclip.SigLipLoss()),
        lambda n: pairs(n, logit_bias=scalar(-5.0), weights=weights_of(n), ids=ids_of(n)),
    ),
    "prototype_cross_entropy": Module(protoclip.prototype_cross_entropy, prototypes),
    "prototype_cross_entropy smoothed": Module(
        smoothed(protoclip.prototype_cross_entropy),
        lambda n: prototypes(n, prototypes=features(K, 1).detach(), weights=weights_of(n)),
    ),
    "prototype_cross_entropy smoothed, trained": Module(
        smoothed(protoclip.prototype_cross_entropy), prototypes
    ),
    "prototype_losses": Module(hard_and_soft_losses, prototypes),
    "kmeans_assign": Module(
        squared_distances,
        lambda n: {"points": features(n).detach(), "centroids": features(K, 1).detach()},
    ),
    "segment_mean": Module(
        means_of_segments,
        lambda n: {"values": features(n).detach(), "labels": labels_of(n)},
    ),
}


class Counter:
    """A torch.compile backend that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager_default_partitioner

        self.graphs += 1
        return aot_eager_default_partitioner(graph, inputs)


def results(call: Callable[..., Tensor], tensors: Tensors) -> list[Tensor]:
    """The value and the gradients of the tensors that have one."""
    value = call(**tensors)
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    if not leaves:
        return [value]
    upstream = torch.linspace(0.5, 1.5, value.numel()).reshape(value.shape)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


# For the second way to compile, and to export: one of each op.
SOME = [
    "info_nce",
    "ClipLoss",
    "contrastive with everything",
    "contrastive_parts",
    "SigLipLoss with weights",
    "prototype_losses",
    "kmeans_assign",
    "segment_mean",
]
# Their ops, with the same gradients, are part of a case with more options; an export has all.
PART_OF_ANOTHER = {
    "info_nce with ids",  # of "info_nce with ids and options"
    "SigLipLoss",  # of "SigLipLoss with weights"
    "contrastive",  # of "contrastive with everything"
    "contrastive smoothed",  # of "contrastive with several positives and own negatives"
    "nt_xent",  # of "nt_xent decoupled"
    "nt_xent with ids",  # of "sup_con of views"
    "sup_con",  # of "sup_con of views"
    "prototype_cross_entropy",  # of "prototype_losses"
}
SYMBOLIC = [name for name in MODULES if name not in PART_OF_ANOTHER]


# The second size makes the sizes symbols, unless they are from the start.
@pytest.mark.parametrize(
    "name, dynamic, graphs",
    [*((name, True, 1) for name in SYMBOLIC), *((name, None, 2) for name in SOME)],
)
def test_one_graph_serves_all_batch_sizes(name: str, dynamic: bool | None, graphs: int) -> None:
    torch._dynamo.reset()
    module = MODULES[name]
    counter = Counter()
    compiled = torch.compile(module.call, fullgraph=True, backend=counter, dynamic=dynamic)
    for n in SIZES:
        tensors = module.tensors_of(n)
        assert_same_bits(results(compiled, tensors), results(module.call, tensors))
    assert counter.graphs == graphs


@pytest.mark.parametrize(
    "name, strict", [*((name, False) for name in MODULES), *((name, True) for name in SOME)]
)
def test_an_exported_program_takes_any_batch(name: str, strict: bool) -> None:
    torch._dynamo.reset()
    module = MODULES[name]
    first_size, other_size = SIZES[:2]
    batch = torch.export.Dim("batch", min=2)
    dim_of_size = {first_size: batch, 2 * first_size: 2 * batch}
    example = module.tensors_of(first_size)
    shapes = tuple(
        {0: dim_of_size[tensor.shape[0]]} if tensor.ndim and len(tensor) != K else {}
        for tensor in example.values()
    )
    program = torch.export.export(
        module, tuple(example.values()), dynamic_shapes={"tensors": shapes}, strict=strict
    )
    tensors = module.tensors_of(other_size)
    assert torch.equal(program.module()(*tensors.values()), module.call(**tensors))


@pytest.mark.parametrize("backend", usable("segment_mean"))
def test_one_graph_serves_all_numbers_of_segments(backend: str) -> None:
    torch._dynamo.reset()
    counter = Counter()

    def segment_mean(values: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return protoclip.segment_mean(values, labels, k, backend=backend)

    compiled = torch.compile(segment_mean, fullgraph=True, backend=counter, dynamic=True)
    for k in (K, K + 3, K + 5):
        means, counts = compiled(features(20).detach(), labels_of(20), k)
        assert means.shape == (k, D) and counts.sum() == 20
    assert counter.graphs == 1
