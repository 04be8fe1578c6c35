"""The contrastive losses, beyond what every op is asked: cases by hand, torch's own formulas, edges
of the sets, and what takes no memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from budget import leaf, loss_and_gradients, usable
from op_table import Draw, Size
from room import Made
from torch import Tensor

import protoclip

BACKENDS = [name for name in usable("contrastive") if name != "triton"]
FUSED = [name for name in BACKENDS if name != "reference"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_fused = pytest.mark.parametrize("backend", FUSED)
N = 60  # queries
M = 90  # keys
D = 24


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return Draw(seed).unit(*shape).to(dtype)


def features(n: int, m: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Queries and keys that are alike for i = j, all in a cone as CLIP's are."""
    queries, keys = Draw(0).pairs(Size(n, m, d), "cone")
    return queries.to(dtype), keys.to(dtype)


# ---- by hand, and by torch ----


@each_backend
@pytest.mark.parametrize(
    "same_id, expected",
    [
        ("exclude", math.log(1 + math.e) - 1),  # of keys 0 and 1
        ("positive", math.log(1 + math.e + math.exp(2)) - 1.5),
    ],
)
def test_one_query_and_four_keys_by_hand(backend: str, same_id: str, expected: float) -> None:
    """Logits 0, 1, 2, 3; key 1 is its own, key 2 the same thing, key 3 is never seen."""
    loss = protoclip.contrastive(
        torch.ones(1, 1),
        torch.arange(4.0)[:, None],
        1.0,
        positives=torch.tensor([1]),
        key_ids=torch.tensor([0, 1, 1, 3]),
        same_id=same_id,
        exclude=torch.tensor([3]),
        backend=backend,
    )
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@each_backend
def test_two_positives_and_an_own_negative_by_hand(backend: str) -> None:
    """Logits 0, 1, 2, 3 of the keys and 4 of the own negative; keys 1 and 3 are positives."""
    negatives = torch.full((1, 1, 1), 4.0)

    def loss(**options: Any) -> float:
        return protoclip.contrastive(
            torch.ones(1, 1),
            torch.arange(4.0)[:, None],
            1.0,
            positives=torch.tensor([[1, -100, 3]]),
            backend=backend,
            **options,
        ).item()

    def level(*logits: float) -> float:
        return math.log(sum(map(math.exp, logits)))

    assert loss() == pytest.approx(level(0, 1, 2, 3) - 2, rel=1e-6)
    assert loss(negatives=negatives) == pytest.approx(level(0, 1, 2, 3, 4) - 2, rel=1e-6)
    smoothed = level(0, 1, 2, 3, 4) - 0.9 * 2 - 0.1 * 10 / 5
    assert loss(negatives=negatives, label_smoothing=0.1) == pytest.approx(smoothed, rel=1e-6)
    # Key 2 has the query's id; so has key 3, but it is a positive.
    key_ids = torch.tensor([0, 1, 7, 7])
    same_id_left_out = loss(query_ids=torch.tensor([7]), key_ids=key_ids)
    assert same_id_left_out == pytest.approx(level(0, 1, 3) - 2, rel=1e-6)
    # One positive of two is not seen.
    assert loss(exclude=torch.tensor([3])) == pytest.approx(level(0, 1, 2) - 1, rel=1e-6)


@each_backend
def test_decoupled_nt_xent_by_hand(backend: str) -> None:
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    second = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    views = torch.cat([first, second])
    dots = views @ views.T
    keys_seen = {0: (1, 3), 1: (0, 2), 2: (1, 3), 3: (0, 2)}
    expected = [
        torch.logsumexp(5 * dots[i, list(keys)], dim=0) - 5 * dots[i, (i + 2) % 4]
        for i, keys in keys_seen.items()
    ]
    options = {"decoupled": True, "backend": backend}
    losses = protoclip.nt_xent(first, second, 5.0, reduction="none", **options)
    torch.testing.assert_close(losses, torch.stack(expected))
    # Ids leave no negatives: no loss, no gradient.
    leaves = {"views_a": leaf(first), "views_b": leaf(second)}
    loss = protoclip.nt_xent(**leaves, logit_scale=5.0, ids=torch.zeros(2).long(), **options)
    results = loss_and_gradients(loss, **leaves)
    assert all(not value.any() for value in results.values())


@each_backend
def test_contrastive_with_label_smoothing_is_torchs(backend: str) -> None:
    leaves = {"queries": leaf(unit(N, D)), "keys": leaf(unit(M, D, seed=1))}
    logits = 20.0 * leaves["queries"] @ leaves["keys"].T

    def loss(positives: Tensor | None) -> Tensor:
        return protoclip.contrastive(
            **leaves, logit_scale=20.0, positives=positives, label_smoothing=0.1, backend=backend
        )

    positives = torch.randint(M, (N,))
    positives[::7] = -100
    got = loss_and_gradients(loss(positives), **leaves)
    of_torch = F.cross_entropy(logits, positives, label_smoothing=0.1)
    expected = loss_and_gradients(of_torch, **leaves)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    # Without positives another op computes it.
    of_torch = F.cross_entropy(logits, torch.arange(N), label_smoothing=0.1)
    torch.testing.assert_close(loss(positives=None), of_torch)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pair_whose_id_all_others_share_costs_exactly_nothing(
    dtype: torch.dtype, backend: str
) -> None:
    for loss, keys, name in (
        (protoclip.contrastive, 300, "key_ids"),
        (protoclip.info_nce, 150, "ids"),
    ):
        x, y = (leaf(rows) for rows in features(150, keys, 20, dtype))
        alike = {name: torch.zeros(keys, dtype=torch.int64)}
        losses = loss(x, y, 100.0, **alike, reduction="none", backend=backend)
        results = loss_and_gradients(losses, x=x, y=y)
        assert all((value == 0).all() for value in results.values())


# ---- what is left out, missing or out of range ----


@each_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["query", "key"])
def test_what_is_left_out_must_be_finite(where: str, bad: float, backend: str) -> None:
    """A query without a positive and a key that no query sees show in the loss or a gradient."""
    queries = F.normalize(torch.randn(6, 8), dim=1)
    keys = F.normalize(torch.randn(7, 8), dim=1)
    positives = torch.tensor([0, 1, -100, 3, 4, 5])
    key_bias = torch.tensor([0.0, 0, 0, 0, 0, 0, -math.inf])

    def is_finite() -> bool:
        x, y = leaf(queries), leaf(keys)
        loss = protoclip.contrastive(
            x, y, 10.0, positives=positives, key_bias=key_bias, backend=backend
        )
        results = loss_and_gradients(loss, x=x, y=y)
        return all(result.isfinite().all() for result in results.values())

    assert is_finite()
    if where == "query":
        queries[2, 3] = bad
    else:
        keys[6, 3] = bad
    assert not is_finite()


@each_backend
def test_keys_that_are_all_absent_have_a_loss_of_zero(backend: str) -> None:
    queries, keys = features(5, 300, 4)
    absent = torch.full((300,), -torch.inf)
    leaves = {"queries": leaf(queries), "keys": leaf(keys), "key_bias": leaf(absent)}
    level, mean = protoclip.contrastive_parts(**leaves, logit_scale=3.0, backend=backend)
    assert (level == -torch.inf).all() and (mean == 0).all()
    loss = protoclip.contrastive(**leaves, logit_scale=3.0, backend=backend)
    results = loss_and_gradients(loss, **leaves)
    assert all((value == 0).all() for value in results.values())


@each_backend
@pytest.mark.parametrize(
    "queries, keys, negatives, bias, positions",
    [  # a bias of -inf: all keys are absent
        (0, 5, 2, -torch.inf, (1, -100)),
        (5, 0, 2, -torch.inf, (-100,)),
        (5, 7, 0, 0.0, (1,)),
        (0, 0, 0, 0.0, (-100,)),
        (5, 7, 2, -torch.inf, (1, -100)),
    ],
)
def test_options_where_there_is_nothing_give_no_nan(
    queries: int, keys: int, negatives: int, bias: float, positions: Sequence[int], backend: str
) -> None:
    """Also of the gradient."""
    leaves = {
        "queries": leaf(unit(queries, 4)),
        "keys": leaf(unit(keys, 4)),
        "negatives": leaf(unit(queries, negatives, 4)),
        "key_bias": leaf(torch.full((keys,), bias)),
    }
    for position in positions:
        loss = protoclip.contrastive(
            **leaves,
            logit_scale=3.0,
            positives=torch.full((queries, 2), position),
            query_ids=torch.arange(queries),
            key_ids=torch.arange(keys),
            label_smoothing=0.1,
            backend=backend,
        )
        assert loss.isfinite() and (loss != 0) == (queries > 0 and bias == 0)
        for gradient in torch.autograd.grad(loss, list(leaves.values()), allow_unused=True):
            assert gradient is None or gradient.isfinite().all()


@each_backend
def test_queries_without_keys_have_a_gradient_of_zero_whatever_memory_held(backend: str) -> None:
    queries = leaf(unit(5, 4))
    for _ in range(50):
        freed = [
            torch.full((size,), torch.nan) for size in (4, 8, 16, 20, 24, 32) for _ in range(8)
        ]
        del freed  # the next small blocks of memory hold these numbers
        positives = torch.full((5,), -100)
        loss = protoclip.contrastive(queries, unit(0, 4), 3.0, positives=positives, backend=backend)
        (gradient,) = torch.autograd.grad(loss, queries)
        assert torch.equal(gradient, torch.zeros(5, 4))


@each_backend
@pytest.mark.parametrize("least", [-1e30, torch.finfo(torch.float32).min])
def test_a_finite_bias_removes_no_key(backend: str, least: float) -> None:
    """Such numbers are usual masks."""
    x, y = unit(6, D, seed=1), unit(6, D, seed=2)
    bias = torch.full((6,), least, requires_grad=True)
    losses = protoclip.contrastive(x, y, 10.0, key_bias=bias, reduction="none", backend=backend)
    assert torch.allclose(losses, torch.full((6,), math.log(6)))
    alone = protoclip.contrastive(
        x, y, 10.0, query_ids=torch.zeros(6).long(), key_ids=torch.zeros(6).long(),
        key_bias=bias, reduction="none", backend=backend,
    )  # fmt: skip
    assert alone.tolist() == [0] * 6  # a query sees its own key alone
    masked = torch.zeros(6).index_fill_(0, torch.tensor(2), least)
    losses = protoclip.contrastive(x, y, 10.0, key_bias=masked, reduction="none", backend=backend)
    assert losses[2] > 1e29 and losses.isfinite().all()


OUT_OF_RANGE = [
    {"positives": torch.tensor([0, 6, 1, 2])},
    {"positives": torch.tensor([0, -7, 1, 2])},
    {"positives": torch.arange(4), "exclude": torch.tensor([5, -1, 7, -1])},
]


@each_fused
@pytest.mark.parametrize("relation", OUT_OF_RANGE)
def test_positions_out_of_range_are_nan_in_compiled_code(
    backend: str, relation: dict[str, Tensor]
) -> None:
    """Which may not read values, as on a GPU."""
    queries, keys = features(4, 6, 8)

    def loss(queries: Tensor, reduction: str) -> Tensor:
        return protoclip.contrastive(
            queries, keys, 3.0, **relation, backend=backend, reduction=reduction
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert compiled(queries, "mean").isnan()
    queries = leaf(queries)
    rows = compiled(queries, "none")
    assert rows.isnan().sum() == 1
    (gradient,) = torch.autograd.grad(rows.sum(), queries)
    assert (gradient.isnan().any(dim=1) == rows.isnan()).all()


# ---- several positives ----


@each_fused
def test_many_positives_take_no_row_of_features_each(backend: str) -> None:
    n, d, p = 64, 256, 60
    x, y = leaf(unit(n, d, seed=1)), unit(80, d, seed=2)
    order = torch.rand(n, 80, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    with Made() as made:
        loss = protoclip.contrastive(x, y, 10.0, positives=order[:, :p], backend=backend)
        loss.backward()
    expected = protoclip.contrastive(x, y, 10.0, positives=order[:, :p], backend="reference")
    assert torch.allclose(loss, expected, atol=1e-5)
    assert max(shape.numel() for shape in made.shapes) < n * p * d // 4


# ---- prototypes and SigLIP ----


K = 11
LABELS = torch.randint(K, (N,), generator=torch.Generator().manual_seed(3))
LABELS[::7] = -100


@each_backend
@pytest.mark.parametrize("trained", [False, True])
def test_prototypes_with_smoothing_or_weights_are_torchs(trained: bool, backend: str) -> None:
    features = leaf(unit(N, D))
    prototypes = unit(K, D, seed=1).requires_grad_(trained)
    leaves = {"features": features}
    if trained:
        leaves["prototypes"] = prototypes
    loss = protoclip.prototype_cross_entropy(
        features, prototypes, LABELS, 20.0, label_smoothing=0.1, backend=backend
    )
    of_torch = F.cross_entropy(20.0 * features @ prototypes.T, LABELS, label_smoothing=0.1)
    got = loss_and_gradients(loss, **leaves)
    expected = loss_and_gradients(of_torch, **leaves)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    of_class = torch.rand(K)  # torch's weight
    weighted = protoclip.prototype_cross_entropy(
        features, prototypes, LABELS, 20.0, weights=of_class[LABELS.clamp_min(0)], backend=backend
    )
    of_torch = F.cross_entropy(20.0 * features @ prototypes.T, LABELS, weight=of_class)
    torch.testing.assert_close(weighted, of_torch)


def test_label_smoothing_keeps_the_digits_of_fp32_features() -> None:
    """Beside bf16 prototypes."""
    prototypes = unit(K, D, seed=1).bfloat16()

    def loss(prototypes: Tensor) -> Tensor:
        features = leaf(unit(N, D))
        return protoclip.prototype_cross_entropy(
            features, prototypes, LABELS, 20.0, label_smoothing=0.1
        )

    assert torch.equal(loss(prototypes), loss(prototypes.float()))


# ---- of all ----


def test_second_derivatives_of_logits_far_apart_are_finite() -> None:
    """Hundreds of nats: where several positives and own negatives are added to a loss."""
    x = unit(6, 4, dtype=torch.float64)
    y = unit(6, 4, seed=1, dtype=torch.float64)
    negatives = unit(6, 2, 4, seed=2, dtype=torch.float64)
    rows = torch.arange(6)

    def loss(x: Tensor) -> Tensor:
        return protoclip.contrastive(
            x,
            y,
            3000.0,
            positives=torch.stack([rows, rows.roll(1)], dim=1),
            key_ids=torch.tensor([0, 0, 1, 2, 2, 3]),
            negatives=negatives,
            label_smoothing=0.1,
        )

    assert torch.func.hessian(loss)(x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint32])
def test_losses_of_modules_take_other_integers(dtype: torch.dtype) -> None:
    """Ids and the samples' index."""
    x, y = unit(12, 8), unit(12, 8, seed=1)
    labels = torch.arange(12) % 4
    index = torch.arange(12).flip(0)

    def losses(cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
        proto = protoclip.ProtoClipLoss(proto=protoclip.ProtoConfig(queue=12, k=3))
        of_steps = [proto(x, y, torch.tensor(9.0), index=cast(index)) for _ in range(3)]
        return [protoclip.ClipLoss()(x, y, torch.tensor(9.0), ids=cast(labels)), *of_steps]

    for got, expected in zip(losses(lambda x: x.to(dtype)), losses(lambda x: x), strict=True):
        assert torch.equal(got, expected)
