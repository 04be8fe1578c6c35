"""One compiled graph serves all batch sizes: torch.compile and torch.export of every op."""

import pytest
import torch
import torch.nn.functional as F
from budget import usable

import protoclip
from protoclip.ops import sigmoid_loss

CPU = protoclip.backends("info_nce")["cpu"]
pytestmark = pytest.mark.skipif(CPU is not None, reason=str(CPU))

D, K = 8, 6
SIZES = (24, 40, 56)


def features(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, D, generator=generator), dim=1).requires_grad_()


def scalar(value):
    return torch.tensor(value, requires_grad=True)


def labels_of(n):
    return torch.arange(n) % K


def ids_of(n):
    return torch.arange(n) // 2


# name -> the call, and its tensors for a batch of n
CALLS = {
    "info_nce": (protoclip.info_nce, lambda n: (features(n), features(n, 1), scalar(10.0))),
    "info_nce of each pair": (
        lambda x, y, logit_scale: protoclip.info_nce(x, y, logit_scale, reduction="none"),
        lambda n: (features(n), features(n, 1), scalar(10.0)),
    ),
    "info_nce with ids": (
        lambda x, y, logit_scale, ids: protoclip.info_nce(x, y, logit_scale, ids=ids),
        lambda n: (features(n), features(n, 1), scalar(10.0), ids_of(n)),
    ),
    "info_nce with options": (
        lambda x, y, logit_scale, weights: protoclip.info_nce(
            x, y, logit_scale, weights=weights, label_smoothing=0.1
        ),
        lambda n: (features(n), features(n, 1), scalar(10.0), torch.linspace(0, 1, n)),
    ),
    "info_nce with ids and options": (
        lambda x, y, logit_scale, ids, weights: protoclip.info_nce(
            x, y, logit_scale, ids=ids, weights=weights, label_smoothing=0.1
        ),
        lambda n: (
            features(n),
            features(n, 1),
            scalar(10.0),
            torch.stack([ids_of(n), torch.arange(n) // 3], dim=1),
            torch.linspace(0, 1, n),
        ),
    ),
    "contrastive smoothed": (
        lambda x, y, logit_scale: protoclip.contrastive(x, y, logit_scale, label_smoothing=0.1),
        lambda n: (features(n), features(2 * n, 1), scalar(10.0)),
    ),
    "contrastive with several positives and own negatives": (
        lambda queries, keys, logit_scale, positives, key_ids, key_bias, negatives: (
            protoclip.contrastive(
                queries,
                keys,
                logit_scale,
                positives=positives,
                key_ids=key_ids,
                exclude=positives[:, 1],
                key_bias=key_bias,
                negatives=negatives,
                label_smoothing=0.1,
            )
        ),
        lambda n: (
            features(n),
            features(2 * n, 1),
            scalar(10.0),
            torch.stack([torch.arange(n).roll(k) for k in (0, 3, 1)], dim=1),
            ids_of(2 * n),
            torch.linspace(-1, 1, 2 * n).requires_grad_(),
            features(3 * n, 2).detach().view(n, 3, D).requires_grad_(),
        ),
    ),
    "nt_xent with ids": (
        lambda x, y, logit_scale, ids: protoclip.nt_xent(x, y, logit_scale, ids=ids),
        lambda n: (features(n), features(n, 1), scalar(10.0), ids_of(n)),
    ),
    "prototype_cross_entropy smoothed": (
        lambda x, prototypes, labels, logit_scale, weights: protoclip.prototype_cross_entropy(
            x, prototypes, labels, logit_scale, weights=weights, label_smoothing=0.1
        ),
        lambda n: (
            features(n),
            features(K, 1).detach(),
            labels_of(n),
            scalar(10.0),
            torch.linspace(0, 1, n),
        ),
    ),
    "prototype_cross_entropy smoothed, trained": (
        lambda x, prototypes, labels, logit_scale: protoclip.prototype_cross_entropy(
            x, prototypes, labels, logit_scale, label_smoothing=0.1
        ),
        lambda n: (features(n), features(K, 1), labels_of(n), scalar(10.0)),
    ),
    "contrastive": (
        protoclip.contrastive,
        lambda n: (features(n), features(2 * n, 1), scalar(10.0)),
    ),
    "contrastive with everything": (
        lambda queries, keys, logit_scale, positives, key_ids, key_bias, weights: (
            protoclip.contrastive(
                queries,
                keys,
                logit_scale,
                positives=positives,
                key_ids=key_ids,
                exclude=positives.roll(1),
                key_bias=key_bias,
                weights=weights,
            )
        ),
        lambda n: (
            features(n),
            features(2 * n, 1),
            scalar(10.0),
            torch.arange(n).flip(0),
            ids_of(2 * n),
            torch.linspace(-1, 1, 2 * n).requires_grad_(),
            torch.rand(n),
        ),
    ),
    "contrastive_parts": (
        lambda x, y, logit_scale: torch.stack(protoclip.contrastive_parts(x, y, logit_scale)).sum(),
        lambda n: (features(n), features(2 * n, 1), scalar(10.0)),
    ),
    "nt_xent": (protoclip.nt_xent, lambda n: (features(n), features(n, 1), scalar(10.0))),
    "sup_con": (protoclip.sup_con, lambda n: (features(n), labels_of(n), scalar(10.0))),
    "sigmoid_loss": (
        sigmoid_loss,
        lambda n: (features(n), features(n, 1), scalar(10.0), scalar(-5.0)),
    ),
    "SigLipLoss": (
        protoclip.SigLipLoss(),
        lambda n: (features(n), features(n, 1), scalar(10.0), scalar(-5.0)),
    ),
    "ClipLoss": (protoclip.ClipLoss(), lambda n: (features(n), features(n, 1), scalar(10.0))),
    "prototype_cross_entropy": (
        protoclip.prototype_cross_entropy,
        lambda n: (features(n), features(K, 1), labels_of(n), scalar(10.0)),
    ),
    "prototype_losses": (
        lambda x, prototypes, labels, logit_scale: protoclip.prototype_losses(
            x,
            [
                protoclip.Bank(prototypes, labels),
                protoclip.Bank(prototypes, labels, prototypes.detach().flip(0)),
            ],
            logit_scale,
        ).loss.sum(),
        lambda n: (features(n), features(K, 1), labels_of(n), scalar(10.0)),
    ),
    "kmeans_assign": (
        lambda points, centroids: protoclip.kmeans_assign(points, centroids)[1],
        lambda n: (features(n).detach(), features(K, 1).detach()),
    ),
    "segment_mean": (
        lambda values, labels: protoclip.segment_mean(values, labels, K)[0],
        lambda n: (features(n).detach(), labels_of(n)),
    ),
}


class Counter:
    """A torch.compile backend that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, inputs)


def results(call, tensors):
    """The value and the gradients of the tensors that have one."""
    value = call(*tensors)
    leaves = [t for t in tensors if t.requires_grad]
    if not leaves:
        return [value]
    upstream = torch.linspace(0.5, 1.5, value.numel()).reshape(value.shape)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


# The second size makes the sizes symbols, unless they are from the start.
@pytest.mark.parametrize("dynamic, graphs", [(True, 1), (None, 2)], ids=["dynamic", "automatic"])
@pytest.mark.parametrize("name", CALLS)
def test_one_graph_for_all_batch_sizes(name, dynamic, graphs):
    torch._dynamo.reset()
    call, tensors_of = CALLS[name]
    counter = Counter()
    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=dynamic)
    for n in SIZES:
        tensors = tensors_of(n)
        got, want = results(compiled, tensors), results(call, tensors)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert counter.graphs == graphs


class Module(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *tensors):
        return self.call(*tensors)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_export_with_a_dynamic_batch(name, strict):
    torch._dynamo.reset()
    call, tensors_of = CALLS[name]
    batch = torch.export.Dim("batch", min=2)
    example, other = tensors_of(SIZES[0]), tensors_of(SIZES[1])
    sizes = {SIZES[0]: batch, 2 * SIZES[0]: 2 * batch}
    shapes = tuple({0: sizes[t.shape[0]]} if t.ndim and t.shape[0] != K else {} for t in example)
    program = torch.export.export(
        Module(call), example, dynamic_shapes={"tensors": shapes}, strict=strict
    )
    assert torch.equal(program.module()(*other), call(*other))


@pytest.mark.parametrize("backend", usable("segment_mean"))
def test_one_graph_for_all_numbers_of_segments(backend):
    torch._dynamo.reset()
    counter = Counter()
    compiled = torch.compile(
        lambda values, labels, k: protoclip.segment_mean(values, labels, k, backend=backend),
        fullgraph=True,
        backend=counter,
        dynamic=True,
    )
    for k in (K, K + 3, K + 5):
        means, counts = compiled(features(20).detach(), labels_of(20), k)
        assert means.shape == (k, D) and counts.sum() == 20
    assert counter.graphs == 1
