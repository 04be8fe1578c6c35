"""What an op returns follows from its inputs, not from torch.set_default_dtype."""

import pytest
import torch
import torch.nn.functional as F
from budget import usable

import protoclip
from protoclip import losses, ops

N, K, D = 12, 5, 8


def results(backend, dtype):
    """What each function gives for features of ``dtype``, and the gradient of the first ones."""
    draw = torch.Generator().manual_seed(0)

    def features(rows):
        return F.normalize(torch.randn(rows, D, generator=draw, dtype=torch.float64)).to(dtype)

    x, y, prototypes = features(N).requires_grad_(), features(N), features(K)
    ids = torch.randint(K, (N,), generator=draw)
    weights = torch.rand(N, generator=draw, dtype=torch.float32)
    bias = torch.randn(N, generator=draw, dtype=torch.float32)
    own, other = torch.arange(N), torch.arange(N).roll(1)
    some = {"positives": own, "exclude": other, "key_bias": bias}
    how = {"backend": backend}
    found = {
        "info_nce": protoclip.info_nce(x, y, 14.3, **how),
        "info_nce, ids": protoclip.info_nce(x, y, 14.3, ids=ids, **how),
        "info_nce, rows": protoclip.info_nce(x, y, 14.3, reduction="none", **how),
        "contrastive": protoclip.contrastive(x, y, 14.3, **how),
        "weights": protoclip.contrastive(x, y, 14.3, weights=weights, **how),
        "positions": protoclip.contrastive(x, y, 14.3, **some, **how),
        "lse": protoclip.contrastive_parts(x, y, 14.3, **some, **how)[0],
        "mean": protoclip.contrastive_parts(x, y, 14.3, **some, **how)[1],
        "info_nce, smoothed": protoclip.info_nce(
            x, y, 14.3, weights=weights, label_smoothing=0.1, **how
        ),
        "several": protoclip.contrastive(
            x,
            y,
            14.3,
            positives=torch.stack([own, other], dim=1),
            key_ids=ids,
            negatives=torch.stack([y, y.flip(0)], dim=1),
            label_smoothing=0.1,
            **how,
        ),
        "prototypes, smoothed": protoclip.prototype_cross_entropy(
            x, prototypes, ids, 14.3, weights=weights, label_smoothing=0.1, **how
        ),
        "nt_xent, ids": protoclip.nt_xent(x, y, 14.3, ids=ids, **how),
        "nt_xent": protoclip.nt_xent(x, y, 14.3, **how),
        "sup_con": protoclip.sup_con(x, ids, 14.3, **how),
        "sigmoid_loss": ops.sigmoid_loss(x, y, 14.3, -9.7, **how),
        "global_contrastive": losses.global_contrastive(x, y, 14.3, weights=weights, **how),
        "prototypes": protoclip.prototype_cross_entropy(x, prototypes, ids, 14.3, **how),
    }
    gradients = {
        f"gradient of {name}": torch.autograd.grad(value.sum(), x)[0]
        for name, value in found.items()
    }
    points = x.detach()
    found |= {
        "soft_targets": protoclip.soft_targets(prototypes, prototypes, 0.07, **how),
        "kmeans_assign": protoclip.kmeans_assign(points, prototypes, **how)[1],
        "segment_mean": protoclip.segment_mean(points, ids, K, **how)[0],
        "kmeans": protoclip.kmeans(points, 3, tol=1e-3, weights=weights, **how).centroids,
        "k-means++": protoclip.kmeans(points, 3, init="k-means++", **how).centroids,
    }
    return found | gradients


CASES = [(name, torch.float32) for name in usable("contrastive") if name != "triton"]


@pytest.fixture
def restored():
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend, dtype", [*CASES, ("reference", torch.float64)])
def test_same_dtypes_and_bits_under_any_default(restored, backend, dtype, default):
    want = results(backend, dtype)
    torch.set_default_dtype(default)
    got = results(backend, dtype)
    for name, value in want.items():
        expected = torch.float32 if name == "kmeans_assign" else dtype  # distances are fp32
        assert got[name].dtype == value.dtype == expected, name
        assert torch.equal(got[name], value), name
