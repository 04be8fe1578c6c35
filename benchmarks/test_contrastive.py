"""InfoNCE, SigLIP and contrastive losses with ids beside what people train with today.

Parity with fp64 is asserted before a variant is timed (benchmarks/parity.py). Rates count four
products for every variant (the useful work of a loss that stores no logits), so they compare as
times do. InfoNCE's phases are timed apart too. Each peer is asked for what it can:
sentence-transformers' loss has no ids (one positive, in-batch negatives), pytorch-metric-learning's
two have labels; ``info_nce`` with and without ids shows what ids cost.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from protoclip.ops import sigmoid_loss


class Shape(NamedTuple):
    n: int
    d: int


SIZES = {
    "cpu": {
        "tiny": [Shape(48, 16)],
        "quick": [Shape(256, 512), Shape(4096, 512)],
        "full": [
            Shape(256, 512),
            Shape(1024, 512),
            Shape(4096, 128),
            Shape(4096, 512),
            Shape(4096, 1024),
            Shape(16384, 512),
        ],
    },
    "cuda": {
        "tiny": [Shape(512, 64)],
        "quick": [Shape(8192, 512), Shape(32768, 512)],
        "full": [
            *(Shape(n, 512) for n in (256, 1024, 2048, 8192)),
            *(Shape(32768, d) for d in (256, 512, 768, 1024)),
        ],
    },
}[DEVICE]
APART = {"tiny": SIZES["tiny"][0], "quick": SIZES["quick"][-1], "full": SIZES["quick"][-1]}
# Where CLIP and SigLIP start.
SCALE = 14.3
BIAS = -10.0
# The truth stores N x N doubles several times: beyond, parity is shown on so many rows. Other
# libraries' losses with ids store N x N booleans or N^3.
PARITY_ROWS = {"info_nce": 4096, "siglip": 4096}
FEWER_PARITY_ROWS = 384


@dataclass(frozen=True)
class Batch:
    """N pairs, and what a loss takes beside them."""

    x: Tensor  # [N, D]
    y: Tensor  # [N, D]
    scale: Tensor  # []
    bias: Tensor  # []
    ids: Tensor  # int64 [N], of which some are equal

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """What gradients are taken for."""
        return self.x, self.y, self.scale

    @property
    def first_half(self) -> slice:
        """Of the pairs: as many samples of two views have N rows."""
        return slice(0, len(self.x) // 2)

    @property
    def stacked(self) -> Tensor:
        """The two views of these samples, one below the other, as pytorch-metric-learning takes
        them; row i and row N / 2 + i are of one sample."""
        return torch.cat([self.x[self.first_half], self.y[self.first_half]])

    @property
    def stacked_labels(self) -> Tensor:
        return torch.arange(len(self.x) // 2, device=self.x.device).repeat(2)


LossOf = Callable[[Batch], Tensor]
OneWay = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, label of each query -> loss


# -- peers


def _autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def open_clip_info_nce(batch: Batch) -> Tensor:
    loss = peers.optional("open_clip.loss", "ClipLoss")()
    with _autocast(batch.x.dtype):
        return loss(batch.x, batch.y, batch.scale)


def open_clip_siglip(batch: Batch) -> Tensor:
    """Times N: its mean is over the rows, ours a sum."""
    loss = peers.optional("open_clip.loss", "SigLipLoss")()
    with _autocast(batch.x.dtype):
        return loss(batch.x, batch.y, batch.scale, batch.bias) * len(batch.x)


def one_matmul(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The strongest form for torch.compile: one matmul, logsumexp over both axes."""
    logits = (scale.to(x.dtype) * x @ y.T).float()
    rows = torch.logsumexp(logits, 1)
    columns = torch.logsumexp(logits, 0)
    return ((rows + columns) / 2 - logits.diagonal()).mean()


def compiled(batch: Batch) -> Tensor:
    return peers.compiled(one_matmul)(batch.x, batch.y, batch.scale)


def _both_ways(one_way: OneWay) -> LossOf:
    def loss(batch: Batch) -> Tensor:
        labels = torch.arange(len(batch.x), device=batch.x.device)
        scale = batch.scale.to(batch.x.dtype)
        forward = one_way(batch.x * scale, batch.y, labels)
        return (forward + one_way(batch.y * scale, batch.x, labels)) / 2

    return loss


def linear_cross_entropy(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    options = peers.optional("torch.nn", "LinearCrossEntropyOptions")
    return F.linear_cross_entropy(x, y, labels, options=options())


def cut_cross_entropy(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    run = peers.optional("cut_cross_entropy", "linear_cross_entropy")
    impl = "cce" if DEVICE == "cuda" else "torch_compile"
    return run(x, y, labels, filter_eps=None, impl=impl)  # the default drops the gradient


def liger(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    module = "liger_kernel.transformers"
    return peers.on_a_gpu(module, "LigerFusedLinearCrossEntropyLoss")()(y, x, labels)


def memeff(batch: Batch) -> Tensor:
    loss = peers.on_a_gpu("memeff", "MemoryEfficientCLIPLoss")
    return loss(temperature=1 / SCALE, normalized_inputs=True)(batch.x, batch.y)


def fused_siglip(batch: Batch) -> Tensor:
    """Of the package siglip-kernel; times N, as OpenCLIP's."""
    loss = peers.on_a_gpu("siglip_kernel", "fused_siglip_loss")
    return loss(batch.x, batch.y, batch.scale.log(), batch.bias) * len(batch.x)


def metric_learning_nt_xent(batch: Batch) -> Tensor:
    loss = peers.optional("pytorch_metric_learning.losses", "NTXentLoss")(temperature=1 / SCALE)
    rows = len(batch.stacked)
    if rows**3 > 2**32:  # bytes of its mask
        pytest.skip(f"NTXentLoss holds N^3 bytes: {rows**3 / 2**30:.0f} GiB at N = {rows}")
    return loss(batch.stacked, batch.stacked_labels)


def metric_learning_sup_con(batch: Batch) -> Tensor:
    loss = peers.optional("pytorch_metric_learning.losses", "SupConLoss")(temperature=1 / SCALE)
    return loss(batch.stacked, batch.stacked_labels)


def sentence_transformers(batch: Batch) -> Tensor:
    module = "sentence_transformers.sentence_transformer.losses"
    loss = peers.optional(module, "MultipleNegativesRankingLoss")(torch.nn.Identity(), scale=SCALE)
    return loss.compute_loss_from_embeddings([batch.x, batch.y], None)


# -- ours


def info_nce(batch: Batch, **options: str) -> Tensor:
    return protoclip.info_nce(batch.x, batch.y, batch.scale, **options)


def info_nce_with_ids(same_id: str, batch: Batch, **options: str) -> Tensor:
    return info_nce(batch, ids=batch.ids, same_id=same_id, **options)


def siglip(batch: Batch, **options: str) -> Tensor:
    return sigmoid_loss(batch.x, batch.y, batch.scale, batch.bias, reduction="sum", **options)


def siglip_with_ids(batch: Batch, **options: str) -> Tensor:
    """A mean over the rows, without a bias."""
    no_bias = 0 * batch.scale.detach()
    return sigmoid_loss(batch.x, batch.y, batch.scale, no_bias, ids=batch.ids, **options)


def one_way(batch: Batch, **options: str) -> Tensor:
    return protoclip.contrastive(batch.x, batch.y, batch.scale, **options)


def nt_xent(batch: Batch, **options: str) -> Tensor:
    half = batch.first_half
    return protoclip.nt_xent(batch.x[half], batch.y[half], batch.scale, **options)


def sup_con(batch: Batch, **options: str) -> Tensor:
    return protoclip.sup_con(batch.stacked, batch.stacked_labels, batch.scale, **options)


# -- the losses written out on their logits


def _diagonal(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.bool, device=DEVICE)


def _two_ways_form(batch: Batch, same_id: str | None = None) -> parity.Form:
    diagonal = _diagonal(len(batch.ids))
    same = batch.ids[:, None] == batch.ids[None]
    positive = diagonal
    seen = torch.ones_like(diagonal)
    if same_id == "positive":
        positive = diagonal | same
    elif same_id == "exclude":
        seen = diagonal | ~same
    weight = torch.full((len(batch.ids),), 0.5 / len(batch.ids), device=DEVICE)
    return parity.softmax_form(positive, seen, weight, weight, rounds_positives=same_id is not None)


def _one_way_form(batch: Batch) -> parity.Form:
    diagonal = _diagonal(len(batch.ids))
    weight = torch.full((len(batch.ids),), 1 / len(batch.ids), device=DEVICE)
    return parity.softmax_form(diagonal, torch.ones_like(diagonal), weight)


def _views_form(batch: Batch) -> parity.Form:
    """Of N / 2 samples of two views: each view against all others."""
    rows = len(batch.ids) // 2 * 2
    diagonal = _diagonal(rows)
    weight = torch.full((rows,), 1 / rows, device=DEVICE)

    def sides(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        views = replace(batch, x=x, y=y).stacked
        return views, views

    return parity.softmax_form(
        diagonal.roll(rows // 2, 0), ~diagonal, weight, rounds_positives=True, sides=sides
    )


def _siglip_form(batch: Batch) -> parity.Form:
    diagonal = _diagonal(len(batch.ids))
    return parity.sigmoid_form(diagonal, diagonal, torch.ones_like(diagonal), batch.bias)


def _siglip_with_ids_form(batch: Batch) -> parity.Form:
    diagonal = _diagonal(len(batch.ids))
    positive = diagonal | (batch.ids[:, None] == batch.ids[None])
    total = parity.sigmoid_form(diagonal, positive, torch.ones_like(diagonal), 0.0)
    return replace(total, loss=lambda logits: total.loss(logits) / len(batch.ids))


@dataclass(frozen=True)
class Loss:
    """One loss: ours, the same written out, and its row in the table of backends."""

    ours: Callable[..., Tensor]  # (batch, backend=...)
    form: Callable[[Batch], parity.Form]
    table: str = "contrastive"
    peers: dict[str, LossOf] = field(default_factory=dict)
    roundings: float = 16  # of the value


CASES = {
    "info_nce": Loss(
        info_nce,
        _two_ways_form,
        table="info_nce",
        peers={
            "open_clip": open_clip_info_nce,
            "torch.compile": compiled,
            "linear_cross_entropy": _both_ways(linear_cross_entropy),
            "cut_cross_entropy": _both_ways(cut_cross_entropy),
            "liger": _both_ways(liger),
            "memeff": memeff,
        },
        roundings=8,
    ),
    "siglip": Loss(
        siglip,
        _siglip_form,
        table="sigmoid_loss",
        peers={"open_clip": open_clip_siglip, "siglip-kernel": fused_siglip},
        roundings=32,
    ),
    "contrastive, one way": Loss(
        one_way,
        _one_way_form,
        table="info_nce",
        peers={"sentence-transformers": sentence_transformers},
    ),
    "contrastive, nt_xent": Loss(
        nt_xent, _views_form, peers={"metric-learning": metric_learning_nt_xent}
    ),
    "contrastive, sup_con": Loss(
        sup_con, _views_form, peers={"metric-learning": metric_learning_sup_con}
    ),
    "contrastive, two ways, ids excluded": Loss(
        partial(info_nce_with_ids, "exclude"), partial(_two_ways_form, same_id="exclude")
    ),
    "contrastive, two ways, ids positive": Loss(
        partial(info_nce_with_ids, "positive"), partial(_two_ways_form, same_id="positive")
    ),
    "contrastive, sigmoid, ids": Loss(siglip_with_ids, _siglip_with_ids_form, table="sigmoid_loss"),
}
ONE_PASS = {"linear_cross_entropy", "liger"}  # their forward makes the gradients
# Peers whose gradients are outside the budget are not timed: (variant, dtype, D) -> why.
INEXACT = {("linear_cross_entropy", "bf16", 128): "dx is off by 2.8e-5, allowed are 2.3e-5"}


@cache
def make_batch(case: str, shape: Shape, dtype: torch.dtype, cone: bool = False) -> Batch:
    """Features in a cone for parity (``parity.cone``), all over the sphere for time."""
    torch.manual_seed(0)
    n, d = shape
    if cone:
        x, y = parity.cone(n, n, d)
        x = x.to(DEVICE)
        y = y.to(DEVICE)
    else:
        x = F.normalize(torch.randn(n, d, device=DEVICE), dim=-1)
        y = F.normalize(x + torch.randn(n, d, device=DEVICE) / d**0.5, dim=-1)
    scale = -BIAS if case == "siglip" else SCALE
    return Batch(
        x=x.to(dtype).requires_grad_(),
        y=y.to(dtype).requires_grad_(),
        scale=torch.tensor(scale, device=DEVICE, requires_grad=True),
        bias=torch.tensor(BIAS, device=DEVICE),
        ids=torch.randint(max(1, n // 2), (n,), device=DEVICE),
    )


class WrittenOut(NamedTuple):
    form: parity.Form
    truth: parity.Gradients  # in fp64
    base: parity.Gradients  # in the dtype of the features


@cache
def written_out(case: str, shape: Shape, dtype: torch.dtype) -> WrittenOut:
    batch = make_batch(case, shape, dtype, cone=True)
    form = CASES[case].form(batch)
    return WrittenOut(
        form=form,
        truth=parity.gradients(form, batch.x, batch.y, batch.scale, torch.float64),
        base=parity.gradients(form, batch.x, batch.y, batch.scale, dtype),
    )


def assert_parity(loss: LossOf, case: str, shape: Shape, dtype: torch.dtype, variant: str) -> None:
    """The value within some roundings, the gradients within the budget of G's share. A peer may
    have none for the scale, rounds the positives' entries as the others, and, if it normalises by
    itself, has none along a row: there it does not count."""
    rows = min(shape.n, PARITY_ROWS.get(case, FEWER_PARITY_ROWS))
    shape = Shape(rows, shape.d)
    batch = make_batch(case, shape, dtype, cone=True)
    form, truth, base = written_out(case, shape, dtype)
    value = loss(batch)
    eps = torch.finfo(dtype).eps
    assert abs(value - truth.loss) <= CASES[case].roundings * eps * max(1, abs(truth.loss))
    is_ours = peers.is_ours(variant)
    dx, dy, dscale = torch.autograd.grad(value, batch.leaves, allow_unused=not is_ours)
    assert dscale is not None or "contrastive" in case or variant == "memeff"
    if not is_ours:
        form = replace(form, rounds_positives=True)
        if "contrastive" in case:
            truth = _all_across(truth, batch)
            base = _all_across(base, batch)
            dx = _across(dx, batch.x)
            dy = _across(dy, batch.y)
    parity.assert_gradients(dx, dy, form, truth, base, batch.scale.item())
    if dscale is not None:
        allowed = 2 * abs(base.dscale - truth.dscale) + eps * truth.dscale_terms
        assert abs(dscale - truth.dscale) <= allowed


def _across(gradient: Tensor, rows: Tensor) -> Tensor:
    """What of a gradient is not along the rows themselves."""
    unit = rows.detach().double()
    return gradient.double() - (gradient.double() * unit).sum(1, keepdim=True) * unit


def _all_across(gradients: parity.Gradients, batch: Batch) -> parity.Gradients:
    dtype = gradients.dx.dtype
    return replace(
        gradients,
        dx=_across(gradients.dx, batch.x).to(dtype),
        dy=_across(gradients.dy, batch.y).to(dtype),
        share_x=_across(gradients.share_x, batch.x).to(dtype),
        share_y=_across(gradients.share_y, batch.y).to(dtype),
    )


@dataclass
class Step:
    """One phase of a loss; the graph of "backward" is made by ``prepare``, off the clock."""

    loss: LossOf
    batch: Batch
    phase: str
    value: Tensor | None = None

    def prepare(self) -> None:
        if self.phase == "backward":
            self.value = self.loss(self.batch)

    def run(self) -> None:
        value = self.value if self.phase == "backward" else self.loss(self.batch)
        if self.phase != "forward":
            self.value = None  # a graph serves once
            torch.autograd.grad(value, self.batch.leaves, allow_unused=True)


class _Row(NamedTuple):
    """What one test times."""

    case: str
    phase: str
    shape: Shape
    dtype: str
    variant: str

    def __str__(self) -> str:
        n, d = self.shape
        return f"{self.case}-{self.phase}-N{n}-D{d}-{self.dtype}-{self.variant}".replace(" ", "_")


def _rows(sizes: str) -> list[_Row]:
    rows = [
        _Row("info_nce", phase, shape, dtype, variant)
        for shape in SIZES[sizes]
        for phase in ("both", "forward", "backward")
        if phase == "both" or (shape == APART[sizes] and sizes != "quick")
        for dtype in ("fp32", "bf16")
        for variant in (*peers.ours("info_nce"), *CASES["info_nce"].peers)
        if phase == "both" or variant not in ONE_PASS
    ]
    rows += [
        _Row(case, "both", APART[sizes], dtype, variant)
        for case, loss in CASES.items()
        if case != "info_nce"
        for dtype in (("bf16",) if sizes == "quick" else ("fp32", "bf16"))
        for variant in (*peers.ours(loss.table), *loss.peers)
    ]
    return rows


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rows = _rows(metafunc.config.getoption("--sizes"))
    metafunc.parametrize(_Row._fields, rows, ids=[str(row) for row in rows])


def test_contrastive(
    bench: Bench, case: str, phase: str, shape: Shape, dtype: str, variant: str
) -> None:
    if reason := INEXACT.get((variant, dtype, shape.d)):
        pytest.skip(f"{variant}: {reason}")
    ours = CASES[case].ours
    if peers.is_ours(variant):
        loss = partial(ours, backend=peers.backend(CASES[case].table, variant))
    else:
        loss = CASES[case].peers[variant]
    assert_parity(loss, case, shape, DTYPES[dtype], variant)
    batch = make_batch(case, shape, DTYPES[dtype])
    step = Step(loss, batch, phase)
    rival = None
    if not peers.is_ours(variant) and phase != "backward":  # its forward would be on the clock
        rival = Step(ours, batch, phase).run
    work = roofline.info_nce(shape.n, shape.d, dtype, phase)
    timed = Case(case, {"N": shape.n, "D": shape.d}, dtype, work, phase)
    bench.time(timed, variant, step.run, prepare=step.prepare, rival=rival)
