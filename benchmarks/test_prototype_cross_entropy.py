"""Prototype cross-entropy, forward and backward with frozen prototypes, beside what people use.

Parity with fp64 is asserted before a variant is timed, ours by benchmarks/parity.py too. Rates
count two products for every variant (the useful work of a pass that gives loss and gradient), so
they compare as times do. Targets are soft, of temperature 0.01, or hard. The table of soft targets
itself stands below.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import protoclip
from benchmarks import parity, peers, roofline
from benchmarks.harness import Bench, Case
from benchmarks.machine import DEVICE, DTYPES


class Shape(NamedTuple):
    n: int
    k: int
    d: int


TAU = 0.01
SCALE = 14.3
SIZES = {
    "tiny": [Shape(48, 300, 16)],
    "quick": [Shape(4096, 20_000, 128)],
    "full": [
        Shape(256, 1000, 128),
        *(Shape(n, 20_000, d) for n in (512, 4096, 16384) for d in (64, 128, 256)),
    ],
}
LARGE = Shape(256 if DEVICE == "cpu" else 4096, 1_000_000, 128)  # no peer holds its logits
STORED = "matmul+cross_entropy"
# The truth stores their doubles several times.
PARITY_ROWS = 64
PARITY_KEYS = 500
SHARE_ROWS = 384  # of ours, so that a card's tiles of keys are whole


@dataclass(frozen=True)
class Batch:
    """Rows, frozen prototypes, and soft targets or hard ones."""

    features: Tensor  # [N, D]
    prototypes: Tensor  # [K, D]
    labels: Tensor  # int64 [N]
    scale: Tensor  # []
    source: Tensor | None  # [K, D], centroids of the teacher's space, where targets are soft
    targets: Tensor | None  # [K, D], what the ops make of them


class Step(NamedTuple):
    """The value of a loss and its gradients to features and scale."""

    loss: Tensor
    dfeatures: Tensor
    dscale: Tensor


LossOf = Callable[[Batch], Tensor]


def authors(batch: Batch) -> Tensor:
    """Two matmuls, a teacher softmax, cross-entropy with probabilities: [N, K] several times."""
    return _authors(batch.features, batch.scale, batch.prototypes, batch.labels, batch.source)


def _authors(h: Tensor, scale: Tensor, c: Tensor, labels: Tensor, source: Tensor) -> Tensor:
    return F.cross_entropy(scale.to(h.dtype) * h @ c.T, _soft_labels(labels, source))


def _soft_labels(labels: Tensor, source: Tensor) -> Tensor:
    """As the authors store them, [N, K]."""
    return torch.softmax(source[labels] @ source.T / TAU, dim=1)


def authors_compiled(batch: Batch) -> Tensor:
    return peers.compiled(_authors)(
        batch.features, batch.scale, batch.prototypes, batch.labels, batch.source
    )


def linear_cross_entropy(batch: Batch) -> Tensor:
    """With probabilities torch 2.13 takes its own unchunked form, as its warning says."""
    loss = peers.optional("torch.nn.functional", "linear_cross_entropy")
    scaled = batch.features * batch.scale.to(batch.features.dtype)
    return loss(scaled, batch.prototypes, _soft_labels(batch.labels, batch.source))


def stored_logits(batch: Batch) -> Tensor:
    return F.cross_entropy(batch.scale * batch.features @ batch.prototypes.T, batch.labels)


def ours(batch: Batch, backend: str = "auto") -> Tensor:
    return protoclip.prototype_cross_entropy(
        batch.features,
        batch.prototypes,
        batch.labels,
        batch.scale,
        targets=batch.targets,
        backend=backend,
    )


def by_autograd(loss: LossOf, batch: Batch) -> Step:
    value = loss(batch)
    dfeatures, dscale = torch.autograd.grad(value, (batch.features, batch.scale))
    return Step(value.detach(), dfeatures, dscale)


@torch.no_grad()
def attention_and_gather(batch: Batch) -> Step:
    """torch's flash attention gives sum_k p_k C_k and the LSE; the rest is a gather of targets."""
    h = batch.features
    n = len(h)
    name = "flash_attention_for_cpu" if DEVICE == "cpu" else "flash_attention"
    flash = getattr(torch.ops.aten, f"_scaled_dot_product_{name}", None)
    if flash is None or (DEVICE == "cuda" and h.dtype == torch.float32):
        pytest.skip(f"torch has no {name} with an LSE for {h.dtype} here")
    target = batch.targets[batch.labels].float()  # [N, D]
    query = h[None, None]
    keys = batch.prototypes[None, None]
    out, lse = flash(query, keys, keys, scale=batch.scale.item())[:2]
    weighted = (out[0, 0].float() - target) / n
    positive = batch.scale * (h.float() * target).sum(dim=1)
    return Step(
        loss=(lse.reshape(-1)[:n] - positive).mean(),
        dfeatures=(batch.scale * weighted).to(h.dtype),
        dscale=(h.float() * weighted).sum(),
    )


PEERS: dict[str, Callable[[Batch], Step]] = {
    "authors": partial(by_autograd, authors),
    "authors, compiled": partial(by_autograd, authors_compiled),
    "linear_cross_entropy": partial(by_autograd, linear_cross_entropy),
    "attention+gather": attention_and_gather,
    STORED: partial(by_autograd, stored_logits),
}
OURS = peers.ours("prototype_cross_entropy")


def _variant(name: str) -> Callable[[Batch], Step]:
    if peers.is_ours(name):
        backend = peers.backend("prototype_cross_entropy", name)
        return partial(by_autograd, partial(ours, backend=backend))
    return PEERS[name]


def make_batch(shape: Shape, dtype: torch.dtype, soft: bool) -> Batch:
    torch.manual_seed(0)
    n, k, d = shape

    def unit_rows(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, d, device=DEVICE), dim=-1).to(dtype)

    features = unit_rows(n)
    prototypes = unit_rows(k)
    source = unit_rows(k) if soft else None
    labels = torch.randint(0, k, (n,), device=DEVICE)
    targets = None
    if source is not None:
        targets = protoclip.soft_targets(source, prototypes, TAU).to(dtype)
    return Batch(
        features=features.requires_grad_(),
        prototypes=prototypes,
        labels=labels,
        scale=torch.tensor(SCALE, device=DEVICE, requires_grad=True),
        source=source,
        targets=targets,
    )


@cache
def _truth(shape: Shape, dtype: torch.dtype, soft: bool) -> Step:
    rounded = make_batch(shape, dtype, soft)
    exact = replace(
        rounded,
        features=rounded.features.detach().double().requires_grad_(),
        prototypes=rounded.prototypes.double(),
        scale=rounded.scale.detach().double().requires_grad_(),
    )
    if rounded.source is not None:
        targets = protoclip.soft_targets(rounded.source.double(), exact.prototypes, TAU)
        exact = replace(exact, targets=targets)
    return by_autograd(partial(ours, backend="reference"), exact)


def _assert_parity(
    run: Callable[[Batch], Step], shape: Shape, dtype: torch.dtype, soft: bool
) -> None:
    """Some roundings of the dtype, in the loss and in both gradients."""
    shape = Shape(min(shape.n, PARITY_ROWS), min(shape.k, PARITY_KEYS), shape.d)
    eps = 16 * torch.finfo(dtype).eps
    results = run(make_batch(shape, dtype, soft))
    for result, truth in zip(results, _truth(shape, dtype, soft), strict=True):
        assert (result - truth).abs().max() <= eps * truth.abs().max().clamp_min(0.1)


def _assert_share(
    run: Callable[[Batch], Step], shape: Shape, dtype: torch.dtype, soft: bool
) -> None:
    """Of our gradient, what the softmax over the prototypes adds to it."""
    n = min(shape.n, SHARE_ROWS)
    k = min(shape.k, SHARE_ROWS)
    features, prototypes = parity.cone(n, k, shape.d)
    features = features.to(DEVICE, dtype)
    prototypes = prototypes.to(DEVICE, dtype)
    labels = torch.arange(n, device=DEVICE).roll(31) % k
    targets = None
    keys = prototypes
    if soft:
        targets = (0.5 * (prototypes + prototypes.roll(1, 0).float())).to(dtype)
        keys = torch.cat([prototypes, targets])
    weight = torch.full((n,), 1 / n, device=DEVICE)
    form = parity.prototype_form(labels, k, weight, soft)
    truth = parity.gradients(form, features, keys, SCALE, torch.float64)
    base = parity.gradients(form, features, keys, SCALE, dtype)
    batch = Batch(
        features=features.requires_grad_(),
        prototypes=prototypes,
        labels=labels,
        scale=torch.tensor(SCALE, device=DEVICE, requires_grad=True),
        source=None,
        targets=targets,
    )
    parity.assert_gradients(run(batch).dfeatures, None, form, truth, base, SCALE)


class _Row(NamedTuple):
    """What one test times."""

    shape: Shape
    dtype: str
    variant: str
    soft: bool  # targets

    def __str__(self) -> str:
        n, k, d = self.shape
        targets = "soft" if self.soft else "hard"
        return f"N{n}-K{k}-D{d}-{self.dtype}-{self.variant}-{targets}"


def _rows(sizes: str) -> list[_Row]:
    rows = []
    for shape in SIZES[sizes]:
        for dtype in ("bf16",) if sizes == "quick" else ("fp32", "bf16"):
            for variant in (*OURS, *PEERS):
                if variant != STORED:
                    rows.append(_Row(shape, dtype, variant, soft=True))
            for variant in (*OURS, STORED):
                rows.append(_Row(shape, dtype, variant, soft=False))
    if sizes == "full":
        rows += [_Row(LARGE, "fp32", variant, soft=False) for variant in OURS]
    return rows


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is test_prototype_cross_entropy:
        rows = _rows(metafunc.config.getoption("--sizes"))
        metafunc.parametrize(_Row._fields, rows, ids=[str(row) for row in rows])


def test_prototype_cross_entropy(
    bench: Bench, shape: Shape, dtype: str, variant: str, soft: bool
) -> None:
    run = _variant(variant)
    _assert_parity(run, shape, DTYPES[dtype], soft)
    if peers.is_ours(variant):
        _assert_share(run, shape, DTYPES[dtype], soft)
    batch = make_batch(shape, DTYPES[dtype], soft)
    n, k, d = shape
    case = Case(
        "prototype_cross_entropy",
        {"N": n, "K": k, "D": d},
        dtype,
        roofline.prototype_cross_entropy(n, k, d, dtype),
        phase="soft" if soft else "hard",
    )
    rival = None if peers.is_ours(variant) else partial(by_autograd, ours, batch)
    bench.time(case, variant, partial(run, batch), rival=rival)


def _softmax_product(source: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    return torch.softmax(source @ source.T / temperature, dim=1) @ prototypes


@pytest.mark.parametrize("variant", [*peers.ours("soft_targets"), "softmax"])
def test_soft_targets(bench: Bench, variant: str) -> None:
    k, source_d, d = {"tiny": (64, 24, 16)}.get(bench.sizes, (2000, 384, 128))
    torch.manual_seed(0)
    source = F.normalize(torch.randn(k, source_d, device=DEVICE), dim=1)
    prototypes = F.normalize(torch.randn(k, d, device=DEVICE), dim=1)
    op = _softmax_product
    rival = None
    if peers.is_ours(variant):
        op = partial(protoclip.soft_targets, backend=peers.backend("soft_targets", variant))
    else:
        rival = partial(protoclip.soft_targets, source, prototypes, TAU)
    run = partial(op, source, prototypes, TAU)
    truth = _softmax_product(source.double(), prototypes.double(), TAU).float()
    torch.testing.assert_close(run(), truth, rtol=1e-3, atol=1e-4)
    work = roofline.soft_targets(k, source_d, d)
    case = Case("soft_targets", {"K": k, "D'": source_d, "D": d}, "fp32", work)
    bench.time(case, variant, run, rival=rival)
