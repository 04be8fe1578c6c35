"""The options of the losses: weights, label smoothing, ids, several positives and own negatives.

Each is held against a formula over boolean masks of positives and keys seen, [N, M], in fp64. The
options are composed of sums over sets, so mistakes in these sums are planted and must be noticed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from budget import (
    PlainResults,
    Results,
    assert_results_within_budget,
    assert_same_bits,
    leaf,
    loss_and_gradients,
    on_threads,
    usable,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import protoclip
from protoclip.ops import siglip_loss, sums

BACKENDS = [name for name in usable("contrastive") if name != "triton"]
FUSED = [name for name in BACKENDS if name != "reference"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_fused = pytest.mark.parametrize("backend", FUSED)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
N = 60  # queries
M = 90  # keys
D = 24


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator), dim=-1).to(dtype)


def dtypes_of(backend: str) -> list[torch.dtype]:
    return DTYPES if backend != "reference" else [torch.float64, torch.float32]


# ---- the formulas ----


class Masks(NamedTuple):
    positive: Tensor  # bool [N, M]
    seen: Tensor  # bool [N, M]


@dataclass(frozen=True)
class Relation:
    """What is said of queries and keys, as ``contrastive`` takes it."""

    positives: Tensor | None = None  # positions of own keys, [N] or [N, P]; -100: none
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    same_id: str = "exclude"
    exclude: Tensor | None = None
    key_bias: Tensor | None = None

    @property
    def options(self) -> dict[str, Any]:
        return dict(vars(self))

    def masks(self, n: int, m: int) -> Masks:
        if self.positives is not None:
            positions = self.positives.reshape(n, -1)
        elif self.same_id == "positive":  # by id alone
            positions = torch.full((n, 1), -100)
        else:
            positions = torch.arange(n)[:, None]
        keys = torch.arange(m)
        positive = (positions[:, :, None] == keys).any(dim=1)
        seen = torch.ones(n, m, dtype=torch.bool)
        if self.query_ids is not None and self.key_ids is not None:
            query_columns = self.query_ids.reshape(n, -1)
            key_columns = self.key_ids.reshape(m, -1)
            same = (query_columns[:, None] == key_columns).any(dim=2)
            if self.same_id == "positive":
                positive = positive | same
            else:
                seen = positive | ~same
        if self.exclude is not None:
            seen = seen & (keys != self.exclude[:, None])
        if self.key_bias is not None:
            seen = seen & (self.key_bias != -torch.inf)
        if self.positives is not None:  # a query without a position has no loss
            positive = positive & (positions != -100).any(dim=1)[:, None]
        return Masks(positive & seen, seen)


def cross_entropies(
    logits: Tensor,
    masks: Masks,
    label_smoothing: float = 0.0,
    negative_logits: Tensor | None = None,
) -> Tensor:
    """Losses of the rows: cross-entropy with 1 - epsilon of the target on the mean of the
    positives and epsilon on the mean of all keys seen; 0 without a positive."""
    num_seen = masks.seen.sum(dim=1)
    total = logits.where(masks.seen, 0).sum(dim=1)
    visible = logits.where(masks.seen, -torch.inf)
    if negative_logits is not None:
        num_seen = num_seen + negative_logits.shape[1]
        total = total + negative_logits.sum(dim=1)
        visible = torch.cat([visible, negative_logits], dim=1)
    num_positives = masks.positive.sum(dim=1)
    mean = logits.where(masks.positive, 0).sum(dim=1) / num_positives.clamp_min(1)
    target = (1 - label_smoothing) * mean + label_smoothing * total / num_seen.clamp_min(1)
    counted = num_positives > 0
    level = visible.where(counted[:, None], 0).logsumexp(dim=1)
    return level.where(counted, target) - target


def scaled_products(logit_scale: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The logits as under autocast: products in the inputs' dtype."""
    return (logit_scale.to(x.dtype) * (x @ y.T)).to(torch.promote_types(x.dtype, torch.float32))


class LargestResult(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


class RowLosses(NamedTuple):
    losses: Tensor  # [rows]
    logits: list[Tensor]  # all that the losses are made of


def assert_as_formula(
    call: Callable[..., Tensor],
    formula: Callable[..., RowLosses],
    leaves: dict[str, Tensor],
    logit_scale: float,
    weights: Tensor,
) -> None:
    """``call(**leaves, logit_scale=...)`` -> losses [rows] is within the budget of the formula with
    the same arguments, value and gradients of the weighted sum."""
    dtype = next(iter(leaves.values())).dtype

    def leaves_in(dtype: torch.dtype) -> dict[str, Tensor]:
        at_least_fp32 = torch.promote_types(dtype, torch.float32)
        wide = {"logit_scale", "finite_bias", "logit_bias"}
        return {
            name: leaf(value, at_least_fp32 if name in wide else dtype)
            for name, value in (leaves | {"logit_scale": torch.tensor(logit_scale)}).items()
        }

    def plain(dtype: torch.dtype) -> PlainResults:
        copies = leaves_in(dtype)
        losses, logits = formula(**copies)
        with_logits = {f"logits {number}": values for number, values in enumerate(logits)}
        results = loss_and_gradients(losses, weights, **copies, **with_logits)
        terms = sum(
            (results[f"dlogits {number}"] * values).abs().sum().item()
            for number, values in enumerate(logits)
        )
        return PlainResults(results, terms / abs(logit_scale) + 2**-29 * weights.sum().item())

    arguments = leaves_in(dtype)
    truth = plain(torch.float64)
    bias_terms = sum(
        value.abs().sum().item()
        for name, value in truth.values.items()
        if name.startswith("dlogits")
    )
    assert_results_within_budget(
        loss_and_gradients(call(**arguments), weights, **arguments),
        truth=truth,
        base=plain(dtype),
        logit_scale=logit_scale,
        magnitudes={
            "loss": max(1.0, truth.values["loss"].abs().max().item()),
            "dlogit_bias": bias_terms,
        },
    )


# ---- info_nce ----

IDS = torch.randint(20, (N,), generator=torch.Generator().manual_seed(1))
# Equal in one column, in the other, and in both.
TWO_IDS = torch.stack([IDS, torch.arange(N) // 4 + 10**12], dim=1)
INFO_NCE = {
    "plain": Relation(),
    "exclude": Relation(query_ids=IDS, key_ids=IDS),
    "two ids": Relation(query_ids=TWO_IDS, key_ids=TWO_IDS),
    "positive": Relation(query_ids=IDS, key_ids=IDS, same_id="positive"),
    "two positive": Relation(query_ids=TWO_IDS, key_ids=TWO_IDS, same_id="positive"),
}


def assert_info_nce_as_formula(
    kind: str,
    backend: str,
    dtype: torch.dtype = torch.float32,
    logit_scale: float = 30.0,
    label_smoothing: float = 0.2,
) -> None:
    relation = INFO_NCE[kind]

    def call(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        return protoclip.info_nce(
            image,
            text,
            logit_scale,
            ids=relation.key_ids,
            same_id=relation.same_id,
            label_smoothing=label_smoothing,
            reduction="none",
            backend=backend,
        )

    def formula(image: Tensor, text: Tensor, logit_scale: Tensor) -> RowLosses:
        masks = relation.masks(N, N)
        by_image = scaled_products(logit_scale, image, text)
        by_text = scaled_products(logit_scale, text, image)
        of_images = cross_entropies(by_image, masks, label_smoothing)
        of_texts = cross_entropies(by_text, masks, label_smoothing)
        return RowLosses((of_images + of_texts) / 2, [by_image, by_text])

    leaves = {"image": unit(N, D, dtype=dtype), "text": unit(N, D, seed=1, dtype=dtype)}
    assert_as_formula(call, formula, leaves, logit_scale, weights=torch.rand(N))


@each_backend
@pytest.mark.parametrize("kind", INFO_NCE)
def test_info_nce_with_label_smoothing_is_its_formula(kind: str, backend: str) -> None:
    for dtype, logit_scale in itertools.product(dtypes_of(backend), (14.3, 100.0)):
        assert_info_nce_as_formula(kind, backend, dtype, logit_scale)
    assert_info_nce_as_formula(kind, backend, label_smoothing=1.0)


@each_backend
def test_info_nce_with_label_smoothing_is_torchs(backend: str) -> None:
    leaves = {"image": leaf(unit(N, D)), "text": leaf(unit(N, D, seed=1))}
    logits = 20.0 * leaves["image"] @ leaves["text"].T
    labels = torch.arange(N)
    of_images = F.cross_entropy(logits, labels, label_smoothing=0.1)
    of_texts = F.cross_entropy(logits.T, labels, label_smoothing=0.1)
    loss = protoclip.info_nce(
        leaves["image"], leaves["text"], 20.0, label_smoothing=0.1, backend=backend
    )
    got = loss_and_gradients(loss, **leaves)
    expected = loss_and_gradients((of_images + of_texts) / 2, **leaves)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@each_backend
@pytest.mark.parametrize("kind", ["plain", "two ids"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_weights_of_info_nce_multiply_the_losses_and_divide_the_mean(
    kind: str, label_smoothing: float, backend: str
) -> None:
    def loss(weights: Tensor | None, reduction: str = "mean") -> Tensor:
        return protoclip.info_nce(
            unit(N, D),
            unit(N, D, seed=1),
            20.0,
            ids=INFO_NCE[kind].key_ids,
            weights=weights,
            label_smoothing=label_smoothing,
            reduction=reduction,
            backend=backend,
        )

    rows = loss(weights=None, reduction="none")
    some_zero = torch.rand(N)
    some_zero[::3] = 0
    for weights in (some_zero, torch.zeros(N), some_zero.bfloat16()):
        factors = weights.float()
        expected = rows * factors
        mean = expected.sum() / factors.sum().clamp_min(1e-9)
        torch.testing.assert_close(loss(weights, "none"), expected)
        torch.testing.assert_close(loss(weights, "sum"), expected.sum())
        torch.testing.assert_close(loss(weights, "mean"), mean)
    torch.testing.assert_close(loss(weights=torch.ones(N)), loss(weights=None))


# ---- prototype_cross_entropy ----

K = 11
LABELS = torch.randint(K, (N,), generator=torch.Generator().manual_seed(3))
LABELS[::7] = -100
PROTOTYPE_BACKENDS = [name for name in usable("prototype_cross_entropy") if name != "triton"]
each_prototype_backend = pytest.mark.parametrize("backend", PROTOTYPE_BACKENDS)


def prototype_row_losses(
    features: Tensor,
    prototypes: Tensor,
    logit_scale: Tensor,
    targets: Tensor | None,
    label_smoothing: float,
) -> RowLosses:
    used = LABELS != -100
    logits = scaled_products(logit_scale, features, prototypes)
    if targets is None:
        positive = (LABELS[:, None] == torch.arange(K)) & used[:, None]
        masks = Masks(positive, torch.ones_like(positive))
        return RowLosses(cross_entropies(logits, masks, label_smoothing), [logits])
    # Targets are constants, so the prototypes have a gradient by the log-sum-exp alone.
    looked_up = targets.to(features.dtype)[LABELS.where(used, 0)]
    soft = logit_scale.to(features.dtype) * (features * looked_up).sum(dim=1)
    soft = soft.to(logits.dtype)
    mean = scaled_products(logit_scale, features, prototypes.detach()).mean(dim=1)
    target = (1 - label_smoothing) * soft + label_smoothing * mean
    losses = (logits.logsumexp(dim=1) - target).where(used, 0)
    return RowLosses(losses, [logits, soft, mean])


@each_prototype_backend
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_prototypes_with_label_smoothing_are_their_formula(
    soft: bool, trained: bool, backend: str
) -> None:
    for dtype, logit_scale in itertools.product(dtypes_of(backend), (14.3, 100.0)):
        constant_prototypes = unit(K, D, seed=1, dtype=dtype)
        targets = (0.5 * unit(K, D, seed=2)).to(dtype) if soft else None

        def call(
            features: Tensor,
            logit_scale: Tensor,
            prototypes: Tensor = constant_prototypes,
            targets: Tensor | None = targets,
        ) -> Tensor:
            return protoclip.prototype_cross_entropy(
                features,
                prototypes,
                LABELS,
                logit_scale,
                targets=targets,
                label_smoothing=0.2,
                reduction="none",
                backend=backend,
            )

        def formula(
            features: Tensor,
            logit_scale: Tensor,
            prototypes: Tensor = constant_prototypes,
            targets: Tensor | None = targets,
        ) -> RowLosses:
            prototypes = prototypes.to(features.dtype)
            return prototype_row_losses(features, prototypes, logit_scale, targets, 0.2)

        leaves = {"features": unit(N, D, dtype=dtype)}
        if trained:
            leaves["prototypes"] = constant_prototypes
        assert_as_formula(call, formula, leaves, logit_scale, weights=torch.rand(N))


@each_prototype_backend
@pytest.mark.parametrize("trained", [False, True])
def test_prototypes_with_label_smoothing_are_torchs(trained: bool, backend: str) -> None:
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


@each_prototype_backend
def test_weights_by_class_are_torchs_weight(backend: str) -> None:
    features = unit(N, D)
    prototypes = unit(K, D, seed=1)
    of_class = torch.rand(K)
    weights = of_class[LABELS.clamp_min(0)]
    got = protoclip.prototype_cross_entropy(
        features, prototypes, LABELS, 20.0, weights=weights, backend=backend
    )
    expected = F.cross_entropy(20.0 * features @ prototypes.T, LABELS, weight=of_class)
    torch.testing.assert_close(got, expected)


@each_prototype_backend
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_weights_of_prototype_losses_multiply_them_and_divide_the_mean(
    label_smoothing: float, backend: str
) -> None:
    def loss(weights: Tensor | None = None, reduction: str = "mean") -> Tensor:
        return protoclip.prototype_cross_entropy(
            unit(N, D),
            unit(K, D, seed=1),
            LABELS,
            20.0,
            weights=weights,
            label_smoothing=label_smoothing,
            reduction=reduction,
            backend=backend,
        )

    rows = loss(reduction="none")
    used = LABELS != -100
    assert (rows[~used] == 0).all() and (rows[used] != 0).all()
    weights = torch.rand(N)
    expected = rows * weights
    torch.testing.assert_close(loss(weights, "none"), expected)
    torch.testing.assert_close(loss(weights, "sum"), expected.sum())
    torch.testing.assert_close(loss(weights, "mean"), expected.sum() / weights[used].sum())
    torch.testing.assert_close(loss(), loss(torch.ones(N)))
    assert loss(torch.zeros(N)) == 0


def test_label_smoothing_keeps_the_digits_of_fp32_features() -> None:
    """Beside bf16 prototypes."""
    prototypes = unit(K, D, seed=1).bfloat16()

    def loss(prototypes: Tensor) -> Tensor:
        features = leaf(unit(N, D))
        return protoclip.prototype_cross_entropy(
            features, prototypes, LABELS, 20.0, label_smoothing=0.1
        )

    assert torch.equal(loss(prototypes), loss(prototypes.float()))


# ---- nt_xent ----


@each_backend
@pytest.mark.parametrize("same_id", ["exclude", "positive"])
@pytest.mark.parametrize("ids", [IDS, TWO_IDS], ids=["one", "two"])
def test_nt_xent_with_ids_is_its_formula(ids: Tensor, same_id: str, backend: str) -> None:
    views = torch.arange(2 * N)
    ids_of_views = torch.cat([ids, ids])
    relation = Relation(
        positives=views.roll(N),
        query_ids=ids_of_views,
        key_ids=ids_of_views,
        same_id=same_id,
        exclude=views,
    )

    def call(first: Tensor, second: Tensor, logit_scale: Tensor) -> Tensor:
        return protoclip.nt_xent(
            first,
            second,
            logit_scale,
            ids=ids,
            same_id=same_id,
            reduction="none",
            backend=backend,
        )

    def formula(first: Tensor, second: Tensor, logit_scale: Tensor) -> RowLosses:
        both_views = torch.cat([first, second])
        logits = scaled_products(logit_scale, both_views, both_views)
        return RowLosses(cross_entropies(logits, relation.masks(2 * N, 2 * N)), [logits])

    for dtype, logit_scale in itertools.product(dtypes_of(backend), (14.3, 100.0)):
        leaves = {"first": unit(N, D, dtype=dtype), "second": unit(N, D, seed=1, dtype=dtype)}
        assert_as_formula(call, formula, leaves, logit_scale, weights=torch.rand(2 * N))


@each_backend
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("kind", ["plain", "exclude", "two positive"])
def test_nt_xent_with_weights_and_smoothing_is_its_formula(
    kind: str, decoupled: bool, backend: str
) -> None:
    views = torch.arange(2 * N)
    ids = INFO_NCE[kind].key_ids
    same_id = INFO_NCE[kind].same_id
    ids_of_views = None if ids is None else torch.cat([ids, ids])
    relation = Relation(views.roll(N), ids_of_views, ids_of_views, same_id, exclude=views)
    masks = relation.masks(2 * N, 2 * N)
    if decoupled:
        masks = masks._replace(seen=masks.seen & ~masks.positive)
    weights = torch.rand(N)
    weights[::3] = 0

    def call(first: Tensor, second: Tensor, logit_scale: Tensor) -> Tensor:
        return protoclip.nt_xent(
            first,
            second,
            logit_scale,
            ids=ids,
            same_id=same_id,
            decoupled=decoupled,
            weights=weights,
            label_smoothing=0.2,
            reduction="none",
            backend=backend,
        )

    def formula(first: Tensor, second: Tensor, logit_scale: Tensor) -> RowLosses:
        both_views = torch.cat([first, second])
        logits = scaled_products(logit_scale, both_views, both_views)
        losses = cross_entropies(logits, masks, label_smoothing=0.2)
        return RowLosses(losses * torch.cat([weights, weights]), [logits])

    for dtype, logit_scale in itertools.product(dtypes_of(backend), (14.3, 100.0)):
        leaves = {"first": unit(N, D, dtype=dtype), "second": unit(N, D, seed=1, dtype=dtype)}
        assert_as_formula(call, formula, leaves, logit_scale, weights=torch.rand(2 * N))


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


# ---- sup_con ----


@each_backend
@pytest.mark.parametrize("num_views", [None, 3])
def test_sup_con_with_options_is_its_formula(num_views: int | None, backend: str) -> None:
    labels = torch.randint(9, (N,), generator=torch.Generator().manual_seed(4))
    labels[::7] = -100
    weights = torch.rand(N)
    weights[1::5] = 0
    repeats = num_views or 1
    rows = torch.arange(N * repeats)
    row_labels = labels.repeat_interleave(repeats)
    row_labels = row_labels.where(row_labels >= 0, -1 - rows)
    row_weights = weights.repeat_interleave(repeats)
    relation = Relation(query_ids=row_labels, key_ids=row_labels, same_id="positive", exclude=rows)
    shape = (N, D) if num_views is None else (N, num_views, D)

    def call(features: Tensor, logit_scale: Tensor) -> Tensor:
        losses = protoclip.sup_con(
            features,
            labels,
            logit_scale,
            weights=weights,
            label_smoothing=0.2,
            reduction="none",
            backend=backend,
        )
        assert losses.shape == shape[:-1]
        return losses.flatten()

    def formula(features: Tensor, logit_scale: Tensor) -> RowLosses:
        flat = features.reshape(-1, D)
        logits = scaled_products(logit_scale, flat, flat)
        masks = relation.masks(len(flat), len(flat))
        losses = cross_entropies(logits, masks, label_smoothing=0.2)
        return RowLosses(losses * row_weights, [logits])

    upstream = torch.rand(N * repeats)
    for dtype, logit_scale in itertools.product(dtypes_of(backend), (14.3, 100.0)):
        leaves = {"features": unit(*shape, dtype=dtype)}
        assert_as_formula(call, formula, leaves, logit_scale, weights=upstream)


@each_backend
def test_means_of_sup_con_and_nt_xent_divide_by_the_weight_of_what_counts(backend: str) -> None:
    labels = torch.arange(N) // 2
    labels[0] = -100  # so that two samples have no loss
    weights = torch.rand(N)

    def sup_con(**options: Any) -> Tensor:
        return protoclip.sup_con(unit(N, D), labels, 10.0, backend=backend, **options)

    rows = sup_con(reduction="none")
    assert (rows == 0).nonzero().flatten().tolist() == [0, 1]
    expected = (rows * weights).sum() / weights[2:].sum()
    torch.testing.assert_close(sup_con(weights=weights), expected)

    def nt_xent(**options: Any) -> Tensor:
        return protoclip.nt_xent(unit(N, D), unit(N, D, seed=1), 10.0, backend=backend, **options)

    for decoupled in (False, True):
        rows = nt_xent(decoupled=decoupled, reduction="none")
        expected = (rows * torch.cat([weights, weights])).sum() / (2 * weights.sum())
        torch.testing.assert_close(nt_xent(decoupled=decoupled, weights=weights), expected)


# ---- SigLIP ----


# weighted, label_smoothing, reduction, same_id: every pair of two options' values.
SIGMOID_OPTIONS = [
    (False, 0.0, "none", "positive"),
    (False, 0.0, "mean", None),
    (False, 0.2, "sum", "exclude"),
    (False, 0.2, "none", None),
    (False, 0.2, "mean", "positive"),
    (True, 0.0, "none", "exclude"),
    (True, 0.0, "sum", "positive"),
    (True, 0.2, "sum", None),
    (True, 0.2, "mean", "exclude"),
]


@pytest.mark.parametrize("backend", [name for name in usable("sigmoid_loss") if name != "triton"])
@pytest.mark.parametrize("weighted, label_smoothing, reduction, same_id", SIGMOID_OPTIONS)
def test_the_sigmoid_loss_with_options_is_its_formula(
    weighted: bool,
    label_smoothing: float,
    reduction: str,
    same_id: str | None,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(siglip_loss, "STRIP_LOGITS", 7 * M)  # several strips of rows
    ids = TWO_IDS.repeat(2, 1)[:M]
    weights = torch.rand(N) if weighted else None
    same = (ids[:N, None] == ids).any(dim=2)
    own = torch.eye(N, M, dtype=torch.bool)
    positive = own | same if same_id == "positive" else own
    seen = own | ~same if same_id == "exclude" else torch.ones_like(own)
    target = torch.where(positive, 1 - label_smoothing / 2, label_smoothing / 2)

    def call(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        return protoclip.sigmoid_loss(
            image,
            text,
            logit_scale,
            logit_bias,
            ids=None if same_id is None else ids,
            same_id=same_id or "positive",
            weights=weights,
            label_smoothing=label_smoothing,
            reduction=reduction,
            backend=backend,
        )

    def formula(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> RowLosses:
        logits = scaled_products(logit_scale, image, text)
        biased = logits + logit_bias.to(image.dtype).to(logits.dtype)
        terms = F.binary_cross_entropy_with_logits(
            biased, target.to(biased.dtype), reduction="none"
        )
        losses = terms.where(seen, 0).sum(dim=1)
        factors = torch.ones(N) if weights is None else weights
        losses = losses * factors.to(losses.dtype)
        if reduction != "none":
            losses = losses.sum()
        return RowLosses(losses / factors.sum() if reduction == "mean" else losses, [logits])

    upstream = torch.rand(N) if reduction == "none" else torch.tensor(0.7)
    for dtype, logit_scale in itertools.product(dtypes_of(backend), (14.3, 100.0)):
        leaves = {
            "image": unit(N, D, dtype=dtype),
            "text": unit(M, D, seed=1, dtype=dtype),
            "logit_bias": torch.tensor(-8.0),
        }
        assert_as_formula(call, formula, leaves, logit_scale, weights=upstream)


def test_options_of_siglip_form_no_matrix_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 700
    monkeypatch.setattr(siglip_loss, "STRIP_LOGITS", 10 * n)
    image = leaf(unit(n, D))
    text = leaf(unit(n, D, seed=1))
    arguments = {"weights": torch.rand(n), "label_smoothing": 0.1, "ids": torch.arange(n) // 2}
    with LargestResult() as largest:
        protoclip.SigLipLoss()(image, text, 10.0, torch.tensor(-5.0), **arguments).backward()
    assert 10 * n <= largest.numel < n * n // 10


@pytest.mark.parametrize(
    "options, words",
    [
        ({"weights": torch.ones(3)}, "expected weights of shape"),
        ({"weights": -torch.ones(4)}, "expected weights >= 0"),
        ({"label_smoothing": 1.5}, r"label_smoothing in \[0, 1\]"),
        ({"reduction": "median"}, "expected reduction in"),
    ],
)
@pytest.mark.parametrize("name", ["nt_xent", "decoupled", "sup_con", "views", "sigmoid_loss"])
def test_bad_options_of_named_losses_are_refused(
    name: str, options: dict[str, Any], words: str
) -> None:
    x = unit(4, 8)
    calls: dict[str, Callable[..., Tensor]] = {
        "nt_xent": partial(protoclip.nt_xent, x, x, 3.0),
        "decoupled": partial(protoclip.nt_xent, x, x, 3.0, decoupled=True),
        "sup_con": partial(protoclip.sup_con, x, torch.arange(4), 3.0),
        "views": partial(protoclip.sup_con, unit(4, 2, 8), torch.arange(4), 3.0),
        "sigmoid_loss": partial(protoclip.sigmoid_loss, x, x, 3.0, -1.0),
    }
    with pytest.raises(ValueError, match=words):
        calls[name](**options)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"ids": torch.ones(8).long()}, ValueError, "expected ids"),
        ({"ids": torch.ones(4)}, TypeError, "expected ids"),
        ({"same_id": "both"}, ValueError, "expected same_id in"),
    ],
)
def test_bad_ids_of_nt_xent_are_refused(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    x = unit(4, 8)
    with pytest.raises(error, match=f"nt_xent: {words}"):
        protoclip.nt_xent(x, x, 3.0, **options)


# ---- contrastive ----


def several_positions(draw: torch.Generator) -> Tensor:
    """[N, 4]"""
    positions = torch.randint(M, (N, 4), generator=draw)
    positions[torch.rand(N, 4, generator=draw) < 0.3] = -100
    positions[::9] = -100  # no own key
    positions[1::9, 2] = positions[1::9, 0]  # twice the same
    positions[2::9, 0] = -100  # the first is not in the first column
    return positions


def relations() -> dict[str, Relation]:
    """Of N queries and M keys."""
    draw = torch.Generator().manual_seed(2)
    key_ids = torch.randint(25, (M,), generator=draw)
    two_ids = torch.stack([key_ids, torch.randint(30, (M,), generator=draw)], dim=1)
    own_key = torch.randint(M, (N,), generator=draw)
    own_key[::9] = -100
    several = several_positions(draw)
    key_bias = torch.randn(M, generator=draw)
    key_bias[::5] = -torch.inf
    other_key = torch.randint(-1, M, (N,), generator=draw)
    some_positive = other_key.where(torch.arange(N) % 4 > 0, several[:, 1].clamp_min(-1))
    query_ids = torch.randint(27, (N,), generator=draw)
    with_two_ids = Relation(
        query_ids=two_ids[own_key.clamp_min(0)], key_ids=two_ids, key_bias=key_bias
    )
    with_ids = Relation(query_ids=query_ids, key_ids=key_ids)
    two_ids_of_one = replace(with_two_ids, positives=own_key, exclude=other_key)
    two_ids_of_several = replace(with_two_ids, positives=several, exclude=some_positive)
    return {
        "plain": Relation(),
        "bias": Relation(key_bias=key_bias),
        "own": Relation(positives=own_key, exclude=other_key),
        "two ids": two_ids_of_one,
        "two positive": replace(two_ids_of_one, same_id="positive"),
        "excluded positive": replace(
            with_ids,
            positives=own_key,
            exclude=own_key.where(torch.arange(N) % 2 > 0, other_key),
            same_id="positive",
        ),
        "groups": replace(with_ids, same_id="positive", exclude=other_key),
        "several": Relation(positives=several),
        "several, excluded": Relation(positives=several, exclude=some_positive, key_bias=key_bias),
        "several, ids": replace(with_ids, positives=several),
        "several, two ids": two_ids_of_several,
        "several positive": replace(two_ids_of_several, same_id="positive"),
    }


RELATIONS = relations()


def assert_contrastive_as_formula(
    kind: str,
    backend: str,
    dtype: torch.dtype = torch.float32,
    logit_scale: float = 30.0,
    label_smoothing: float = 0.2,
    num_negatives: int = 0,
) -> None:
    relation = RELATIONS[kind]
    masks = relation.masks(N, M)
    assert masks.positive.any()
    leaves = {
        "queries": unit(N, D, dtype=dtype),
        "keys": unit(M, D, seed=1, dtype=dtype),
    }
    present = torch.ones(M, dtype=torch.bool)
    if relation.key_bias is not None:
        present = relation.key_bias.isfinite()
        leaves["finite_bias"] = relation.key_bias[present]
    if num_negatives:
        leaves["negatives"] = unit(N, num_negatives, D, seed=2, dtype=dtype)

    def full_bias(finite_bias: Tensor, absent: float) -> Tensor:
        bias = torch.full((M,), absent, dtype=finite_bias.dtype)
        return bias.masked_scatter(present, finite_bias)

    def call(
        queries: Tensor,
        keys: Tensor,
        logit_scale: Tensor,
        finite_bias: Tensor | None = None,
        negatives: Tensor | None = None,
    ) -> Tensor:
        options = relation.options
        if finite_bias is not None:
            options = options | {"key_bias": full_bias(finite_bias, absent=-torch.inf)}
        return protoclip.contrastive(
            queries,
            keys,
            logit_scale,
            **options,
            negatives=negatives,
            label_smoothing=label_smoothing,
            reduction="none",
            backend=backend,
        )

    def formula(
        queries: Tensor,
        keys: Tensor,
        logit_scale: Tensor,
        finite_bias: Tensor | None = None,
        negatives: Tensor | None = None,
    ) -> RowLosses:
        logits = scaled_products(logit_scale, queries, keys)
        if finite_bias is not None:
            logits = logits + full_bias(finite_bias, absent=0.0)  # others are not seen
        if negatives is None:
            return RowLosses(cross_entropies(logits, masks, label_smoothing), [logits])
        dots = torch.einsum("nd,nhd->nh", queries, negatives)
        negative_logits = (logit_scale.to(queries.dtype) * dots).to(logits.dtype)
        losses = cross_entropies(logits, masks, label_smoothing, negative_logits)
        return RowLosses(losses, [logits, negative_logits])

    assert_as_formula(call, formula, leaves, logit_scale, weights=torch.rand(N))


@each_backend
@pytest.mark.parametrize("kind", RELATIONS)
def test_contrastive_with_label_smoothing_is_its_formula(kind: str, backend: str) -> None:
    for dtype, logit_scale in itertools.product(dtypes_of(backend), (14.3, 100.0)):
        assert_contrastive_as_formula(kind, backend, dtype, logit_scale)


@each_backend
@pytest.mark.parametrize("kind", [name for name in RELATIONS if name.startswith("several")])
def test_several_positives_are_their_formula(kind: str, backend: str) -> None:
    for dtype, logit_scale in itertools.product(dtypes_of(backend), (14.3, 100.0)):
        assert_contrastive_as_formula(kind, backend, dtype, logit_scale, label_smoothing=0.0)


@each_backend
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", RELATIONS)
def test_negatives_of_each_query_are_their_formula(
    kind: str, label_smoothing: float, backend: str
) -> None:
    for dtype, logit_scale in itertools.product(dtypes_of(backend), (14.3, 100.0)):
        assert_contrastive_as_formula(
            kind, backend, dtype, logit_scale, label_smoothing, num_negatives=3
        )


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
def test_several_positives_are_the_parts_of_any_loss(backend: str) -> None:
    relation = RELATIONS["several, two ids"]
    arguments = {"queries": unit(N, D), "keys": unit(M, D, seed=1), "logit_scale": 20.0}
    arguments |= relation.options | {"backend": backend}
    level, mean = protoclip.contrastive_parts(**arguments)
    rows = protoclip.contrastive(**arguments, reduction="none")
    counted = rows != 0
    assert counted.sum() == relation.masks(N, M).positive.any(dim=1).sum() < N
    torch.testing.assert_close((level - mean)[counted], rows[counted], rtol=1e-5, atol=1e-5)
    # The mean is over the queries with a positive, weighted or not.
    weights = torch.rand(N)
    weighted = protoclip.contrastive(**arguments, weights=weights)
    torch.testing.assert_close(weighted, (rows * weights).sum() / weights[counted].sum())


@each_backend
def test_one_positive_among_several_columns_is_as_one_alone(backend: str) -> None:
    def loss(positives: Tensor) -> Tensor:
        return protoclip.contrastive(
            unit(N, D), unit(M, D, seed=1), 20.0, positives=positives, backend=backend
        )

    own_key = torch.randint(M, (N,))
    padding = torch.full((N,), -100)
    expected = loss(own_key)
    for columns in ([own_key], [own_key, own_key], [padding, own_key]):
        torch.testing.assert_close(loss(torch.stack(columns, dim=1)), expected)


@dataclass(frozen=True)
class Sizes:
    queries: int
    keys: int
    negatives: int
    all_keys_absent: bool = False


@each_backend
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(queries=0, keys=5, negatives=2, all_keys_absent=True),
        Sizes(queries=5, keys=0, negatives=2, all_keys_absent=True),
        Sizes(queries=5, keys=7, negatives=0),
        Sizes(queries=0, keys=0, negatives=0),
        Sizes(queries=5, keys=7, negatives=2, all_keys_absent=True),
    ],
    ids=str,
)
def test_options_where_there_is_nothing_give_no_nan(sizes: Sizes, backend: str) -> None:
    """Also of the gradient."""
    bias = -torch.inf if sizes.all_keys_absent else 0.0
    leaves = {
        "queries": leaf(unit(sizes.queries, 4)),
        "keys": leaf(unit(sizes.keys, 4)),
        "negatives": leaf(unit(sizes.queries, sizes.negatives, 4)),
        "key_bias": leaf(torch.full((sizes.keys,), bias)),
    }
    positions = [1] if sizes.keys else [-100]
    if sizes.all_keys_absent:
        positions.append(-100)
    for position in positions:
        loss = protoclip.contrastive(
            **leaves,
            logit_scale=3.0,
            positives=torch.full((sizes.queries, 2), position),
            query_ids=torch.arange(sizes.queries),
            key_ids=torch.arange(sizes.keys),
            label_smoothing=0.1,
            backend=backend,
        )
        has_loss = sizes.queries > 0 and not sizes.all_keys_absent
        assert loss.isfinite() and (loss != 0) == has_loss
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
@pytest.mark.parametrize("function", [protoclip.info_nce, protoclip.nt_xent])
def test_no_pairs_with_ids_have_a_loss_of_zero(
    function: Callable[..., Tensor], backend: str
) -> None:
    no_ids = torch.empty(0, dtype=torch.int64)
    assert function(unit(0, 4), unit(0, 4), 3.0, ids=no_ids, backend=backend) == 0


@each_backend
def test_no_pairs_with_weights_have_a_loss_of_zero(backend: str) -> None:
    loss = protoclip.info_nce(
        unit(0, 4), unit(0, 4), 3.0, label_smoothing=0.1, weights=torch.ones(0), backend=backend
    )
    assert loss == 0


@each_backend
@pytest.mark.parametrize("position", [6, -7])
def test_positions_out_of_range_among_several_are_refused(position: int, backend: str) -> None:
    positives = torch.tensor([[0, 1], [2, position], [-100, -100]])
    with pytest.raises(ValueError, match=r"positives in \[0, 6\) or -100.*at query 1"):
        protoclip.contrastive(
            unit(3, 8), unit(6, 8, seed=1), 3.0, positives=positives, backend=backend
        )


BAD_CONTRASTIVE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a matrix": (dict(negatives=unit(4, 8)), ValueError, r"negatives of shape \[N, H, D\], got"),
    "rows": (dict(negatives=unit(3, 2, 8)), ValueError, r"shape \[4, 2, 8\], got \[3, 2, 8\]"),
    "width": (dict(negatives=unit(4, 2, 7)), ValueError, r"shape \[4, 2, 8\], got \[4, 2, 7\]"),
    "integers": (dict(negatives=unit(4, 2, 8).long()), TypeError, r"negatives.float\(\)"),
    "a list": (dict(negatives=[1.0]), TypeError, "negatives as a Tensor, got list"),
    "no positions": (
        dict(positives=torch.empty(4, 0, dtype=torch.int64)),
        ValueError,
        r"positives of shape \[4\] or \[4, 1\], got \[4, 0\]",
    ),
    "positions of others": (
        dict(positives=torch.zeros(3, 2, dtype=torch.int64)),
        ValueError,
        r"positives of shape \[4\] or \[4, 2\], got \[3, 2\]",
    ),
}


@pytest.mark.parametrize("case", BAD_CONTRASTIVE)
def test_bad_options_of_contrastive_are_refused_in_words(case: str) -> None:
    options, error, words = BAD_CONTRASTIVE[case]
    with pytest.raises(error, match=f"contrastive: .*{words}"):
        protoclip.contrastive(unit(4, 8), unit(6, 8), 3.0, **options)


SIX_LABELS = torch.tensor([0, 0, 1, 2, 2, 3])
NEGATIVES_OF_SIX = unit(6, 2, 4, seed=2, dtype=torch.float64)


def smoothed_info_nce(x: Tensor, y: Tensor, logit_scale: float, weights: Tensor) -> Tensor:
    return protoclip.info_nce(
        x, y, logit_scale, ids=SIX_LABELS, label_smoothing=0.1, weights=weights
    )


def smoothed_contrastive(x: Tensor, y: Tensor, logit_scale: float, weights: Tensor) -> Tensor:
    rows = torch.arange(6)
    return protoclip.contrastive(
        x,
        y,
        logit_scale,
        positives=torch.stack([rows, rows.roll(1)], dim=1),
        key_ids=SIX_LABELS,
        negatives=NEGATIVES_OF_SIX,
        label_smoothing=0.1,
        weights=weights,
    )


def smoothed_prototypes(x: Tensor, y: Tensor, logit_scale: float, weights: Tensor) -> Tensor:
    return protoclip.prototype_cross_entropy(
        y, x, SIX_LABELS, logit_scale, label_smoothing=0.1, weights=weights
    )


@pytest.mark.parametrize("function", [smoothed_info_nce, smoothed_contrastive, smoothed_prototypes])
def test_the_reference_works_in_transforms_and_has_second_derivatives(
    function: Callable[..., Tensor],
) -> None:
    """At a scale too where logits are hundreds of nats apart."""
    x = unit(6, 4, dtype=torch.float64)
    y = unit(6, 4, seed=1, dtype=torch.float64)
    weights = torch.rand(6)

    def loss(x: Tensor, logit_scale: float = 3.0) -> Tensor:
        return function(x, y, logit_scale, weights)

    def loss_of_logits_far_apart(x: Tensor) -> Tensor:
        return loss(x, logit_scale=3000.0)

    gradient = torch.func.grad(loss)(x)
    direction = unit(6, 4, seed=4, dtype=torch.float64)
    _, derivative = torch.func.jvp(loss, (x,), (direction,))
    torch.testing.assert_close(derivative, (gradient * direction).sum())
    assert torch.autograd.gradgradcheck(loss, (x.clone().requires_grad_(),))
    assert torch.func.hessian(loss_of_logits_far_apart)(x).isfinite().all()


# ---- what all share ----


class Ops(TorchDispatchMode):
    """Records the names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@each_fused
@pytest.mark.parametrize("function", [protoclip.info_nce, protoclip.contrastive])
def test_an_option_that_is_not_used_costs_nothing(
    function: Callable[..., Tensor], backend: str
) -> None:
    x = unit(N, D)
    y = unit(N, D, seed=1)
    logit_scale = torch.tensor(20.0)
    with Ops() as ops:
        function(x, y, logit_scale, backend=backend)
    names = [n for n in ops.names if n != "aten._local_scalar_dense.default"]  # reads the scale
    assert names == ["protoclip.info_nce.default"]


@each_fused
def test_an_option_of_prototypes_that_is_not_used_costs_nothing(backend: str) -> None:
    x = unit(N, D)
    y = unit(N, D, seed=1)
    labels = torch.arange(N)
    logit_scale = torch.tensor(20.0)
    with Ops() as ops:
        protoclip.prototype_cross_entropy(x, y, labels, logit_scale, backend=backend)
    assert ops.names.count("protoclip.prototype_cross_entropy.default") == 1
    assert not any("double" in name or "_to_copy" in name for name in ops.names)


ORIGINAL_INIT = sums.KeySums.__init__


def plant(monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    """A mistake in the sums."""
    if mistake == "keys of both ids count twice":
        monkeypatch.setattr(
            sums,
            "_codes_of",
            lambda query, key: (torch.full_like(query, -1), key.argsort().argsort()),
        )
    elif mistake == "the own key is forgotten":
        monkeypatch.setattr(
            sums,
            "of_same_id",
            lambda pairs, positions: torch.zeros_like(positions, dtype=torch.bool),
        )
    elif mistake == "ids have no keys":
        monkeypatch.setattr(sums.KeySums, "_same", lambda self: 0 * self._rows[:1])
    elif mistake == "what is excluded counts":
        monkeypatch.setattr(
            sums.KeySums,
            "__init__",
            lambda self, queries, keys, pairs: ORIGINAL_INIT(
                self, queries, keys, replace(pairs, exclude=None)
            ),
        )
    else:
        raise ValueError(mistake)


@pytest.mark.parametrize(
    "kind, mistake",
    [
        ("two ids", "keys of both ids count twice"),
        ("two ids", "the own key is forgotten"),
        ("two ids", "ids have no keys"),
        ("two positive", "keys of both ids count twice"),
        ("two positive", "ids have no keys"),
    ],
)
def test_a_wrong_sum_in_info_nce_is_noticed(
    kind: str, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_info_nce_as_formula(kind, BACKENDS[0])
    plant(monkeypatch, mistake)
    with pytest.raises(AssertionError, match="over the budget"):
        assert_info_nce_as_formula(kind, BACKENDS[0])


@pytest.mark.parametrize(
    "kind, mistake",
    [
        ("two ids", "keys of both ids count twice"),
        ("two ids", "the own key is forgotten"),
        ("two ids", "what is excluded counts"),
        ("two positive", "ids have no keys"),
        ("two positive", "the own key is forgotten"),
        ("several, two ids", "the own key is forgotten"),
        ("excluded positive", "what is excluded counts"),
        ("several, two ids", "what is excluded counts"),
        ("several positive", "what is excluded counts"),
    ],
)
def test_a_wrong_sum_in_contrastive_is_noticed(
    kind: str, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_contrastive_as_formula(kind, BACKENDS[0])
    plant(monkeypatch, mistake)
    with pytest.raises(AssertionError, match="over the budget"):
        assert_contrastive_as_formula(kind, BACKENDS[0])


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a tensor": (dict(label_smoothing=torch.tensor(0.1)), TypeError, "as a Python number"),
    "a word": (dict(label_smoothing="0.1"), TypeError, "as a Python number"),
    "too much": (dict(label_smoothing=1.1), ValueError, r"in \[0, 1\], got 1.1"),
    "not a number": (dict(label_smoothing=float("nan")), ValueError, r"in \[0, 1\], got nan"),
    "negative weights": (dict(weights=-torch.ones(4)), ValueError, "weights >= 0, got -1"),
    "other weights": (dict(weights=torch.ones(5)), ValueError, r"weights of shape \[4\]"),
    "their gradient": (dict(weights=torch.ones(4).requires_grad_()), ValueError, "detach"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused_in_words(case: str) -> None:
    options, error, words = BAD[case]
    for ids in (None, torch.arange(4)):
        with pytest.raises(error, match=f"info_nce: .*{words}"):
            protoclip.info_nce(unit(4, 8), unit(4, 8), 3.0, ids=ids, **options)
    with pytest.raises(error, match=f"contrastive: .*{words}"):
        protoclip.contrastive(unit(4, 8), unit(4, 8), 3.0, **options)
    with pytest.raises(error, match=f"prototype_cross_entropy: .*{words}"):
        protoclip.prototype_cross_entropy(unit(4, 8), unit(4, 8), torch.arange(4), 3.0, **options)


@each_fused
def test_the_number_of_threads_changes_no_bit(backend: str) -> None:
    image = leaf(unit(3000, 64))
    text = leaf(unit(3000, 64, seed=1))
    ids = torch.randint(900, (3000, 2))

    def run() -> Results:
        loss = protoclip.info_nce(image, text, 20.0, ids=ids, label_smoothing=0.1, backend=backend)
        return loss_and_gradients(loss, image=image, text=text)

    first, *repeated = on_threads(run, (1, 2, 2))
    for again in repeated:
        assert_same_bits(again, first)


# ---- masks and scales in other forms ----


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


@each_backend
def test_a_scale_of_one_element_in_fp64_is_a_scale(backend: str) -> None:
    x = torch.eye(3)
    scale = torch.tensor([10.0], dtype=torch.float64)
    labels = torch.arange(3)
    for loss in (protoclip.info_nce, protoclip.contrastive):
        assert torch.equal(
            loss(x, x, scale, backend=backend), loss(x, x, torch.tensor(10.0), backend=backend)
        )
    assert torch.equal(
        protoclip.prototype_cross_entropy(x, x, labels, scale, backend=backend),
        protoclip.prototype_cross_entropy(x, x, labels, torch.tensor(10.0), backend=backend),
    )


@each_fused
def test_many_positives_take_no_row_of_features_each(backend: str) -> None:
    n, d, p = 64, 256, 60
    x, y = leaf(unit(n, d, seed=1)), unit(80, d, seed=2)
    order = torch.rand(n, 80, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    with LargestResult() as largest:
        loss = protoclip.contrastive(x, y, 10.0, positives=order[:, :p], backend=backend)
        loss.backward()
    expected = protoclip.contrastive(x, y, 10.0, positives=order[:, :p], backend="reference")
    assert torch.allclose(loss, expected, atol=1e-5)
    assert largest.numel < n * p * d // 4
