"""Ops on shapes, dtypes, strides and numbers nobody meant: right, or refused in words."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from budget import leaf, loss_and_gradients
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from op_table import Relation, contrastive_parts
from torch import Tensor

import protoclip
from protoclip.ops import sigmoid_loss

quick = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
each_backend = pytest.mark.parametrize("backend", ["reference", "auto"])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
layouts = st.sampled_from(["plain", "transposed", "strided", "expanded"])
dims = st.integers(1, 6)
seeds = st.integers(0, 99)


def unit(n: int, d: int, dtype: torch.dtype, layout: str, random: torch.Generator) -> Tensor:
    """Unit rows, laid out in one of four ways; "expanded": all the same one."""
    rows = F.normalize(torch.randn(n, d, generator=random), dim=1).to(dtype)
    if layout == "transposed":
        return rows.t().contiguous().t()
    if layout == "strided":
        return torch.stack([rows, rows * 0], dim=2)[..., 0]
    if layout == "expanded" and n:
        return rows[:1].expand(n, d)
    return rows


@each_backend
@quick
@given(
    n=st.integers(0, 9),
    m=st.integers(0, 9),
    offset=st.integers(-1, 9),
    d=dims,
    dtype=dtypes,
    layout=layouts,
    logit_scale=st.floats(0, 100),
    logit_bias=st.floats(-20, 20),
    seed=seeds,
)
@example(  # a logit of 89: fp32's exp overflows
    n=1,
    m=3,
    offset=0,
    d=1,
    dtype=torch.float32,
    layout="plain",
    logit_scale=69.0,
    logit_bias=20.0,
    seed=0,
)
def test_the_sigmoid_loss_is_right_or_refused(
    backend: str,
    n: int,
    m: int,
    offset: int,
    d: int,
    dtype: torch.dtype,
    layout: str,
    logit_scale: float,
    logit_bias: float,
    seed: int,
) -> None:
    """Sums of n m terms: loss and gradients within fp32 of them, gradients rounded to the dtype."""
    random = torch.Generator().manual_seed(seed)
    leaves = {
        "x": leaf(unit(n, d, dtype, layout, random)),
        "y": leaf(unit(m, d, dtype, layout, random)),
        "logit_scale": leaf(logit_scale),
        "logit_bias": leaf(logit_bias),
    }

    def loss() -> Tensor:
        return sigmoid_loss(
            leaves["x"],
            leaves["y"],
            leaves["logit_scale"],
            leaves["logit_bias"],
            offset=offset,
            reduction="sum",
            backend=backend,
        )

    if offset < 0 or offset + n > m:
        with pytest.raises(ValueError, match="offset"):
            loss()
        return
    exact = {name: leaf(value, torch.float64) for name, value in leaves.items()}
    signs = (2 * torch.eye(n, m + n, dtype=torch.float64) - 1).roll(offset, 1)[:, :m]
    logits = exact["logit_scale"] * exact["x"] @ exact["y"].t() + exact["logit_bias"]
    truth = loss_and_gradients(F.softplus(-signs * logits).sum(), **exact)
    size = 1 + (abs(logit_scale) + abs(logit_bias)) * n * m
    for name, value in loss_and_gradients(loss(), **leaves).items():
        assert value.shape == truth[name].shape
        rounding = 0.0 if name == "loss" else torch.finfo(value.dtype).eps
        if value.numel():
            assert (value - truth[name]).abs().max() <= (1e-5 + rounding) * size, name


@each_backend
@quick
@given(
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    d=dims,
    dtype=dtypes,
    layout=layouts,
    logit_scale=st.floats(0, 100),
    same_id=st.sampled_from(["exclude", "positive"]),
    num_ids=st.integers(1, 2),
    names=st.sets(st.sampled_from(["query_ids", "key_ids", "exclude", "key_bias"])),
    seed=seeds,
)
def test_contrastive_is_right_or_refused(
    backend: str,
    n: int,
    m: int,
    d: int,
    dtype: torch.dtype,
    layout: str,
    logit_scale: float,
    same_id: str,
    num_ids: int,
    names: set[str],
    seed: int,
) -> None:
    """Few ids, so that many are alike. Within fp32 of the terms, gradients rounded to the dtype."""
    random = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=random)

    options = {
        "query_ids": draw(0, 4, n, num_ids),
        "key_ids": draw(0, 4, m, num_ids),
        "exclude": draw(-2, m, n),
        "key_bias": torch.randn(m, generator=random).where(draw(0, 4, m) > 0, -torch.inf),
    }
    positions = draw(-1, m, n)
    relation = Relation(
        positives=positions.where(positions >= 0, -100),
        same_id=same_id,
        **{name: value for name, value in options.items() if name in names},
    )
    queries, keys = unit(n, d, dtype, layout, random), unit(m, d, dtype, layout, random)
    if "query_ids" in names and "key_ids" not in names:
        with pytest.raises(ValueError, match="expected key_ids with query_ids"):
            protoclip.contrastive(queries, keys, logit_scale, **vars(relation), backend=backend)
        return
    call = contrastive_parts(queries, keys, logit_scale, relation)
    truth = call.plain(torch.float64).values
    for name, value in call.results(backend).items():
        exact = truth[name]
        error = (value - exact).where(value != exact, 0).abs().max()  # or both are -inf
        rounding = 1e-5 + torch.finfo(value.dtype).eps
        assert error <= rounding * (1 + abs(logit_scale)) * n * m, name


@each_backend
@quick
@given(
    k=st.integers(0, 40),
    num_extra_prototypes=st.integers(0, 1),
    d_source=dims,
    d=dims,
    dtype=dtypes,
    layout=layouts,
    temperature=st.one_of(st.floats(-1, 10), st.sampled_from([0.0, 1e-30, 1e-4, 1e30])),
    norm=st.sampled_from([1.0, 0.0, 30.0, 200.0]),
    seed=seeds,
)
@example(
    k=3,
    num_extra_prototypes=0,
    d_source=2,
    d=2,
    dtype=torch.float32,
    layout="plain",
    temperature=1e-95,  # no fp32 number
    norm=1.0,
    seed=0,
)
def test_soft_targets_are_right_or_refused(
    backend: str,
    k: int,
    num_extra_prototypes: int,
    d_source: int,
    d: int,
    dtype: torch.dtype,
    layout: str,
    temperature: float,
    norm: float,
    seed: int,
) -> None:
    """Means of prototypes, whatever the logits; the right ones where fp32 can tell."""
    random = torch.Generator().manual_seed(seed)
    source = norm * unit(k, d_source, dtype, layout, random)
    prototypes = unit(k + num_extra_prototypes, d, dtype, layout, random)
    if num_extra_prototypes:
        with pytest.raises(ValueError, match="one prototype per source centroid"):
            protoclip.soft_targets(source, prototypes, temperature, backend=backend)
        return
    targets = protoclip.soft_targets(source, prototypes, temperature, backend=backend).double()
    assert targets.shape == (k, d)
    if not k:
        return
    exact = prototypes.double()
    assert (targets >= exact.min(0).values - 1e-5).all()
    assert (targets <= exact.max(0).values + 1e-5).all()
    if temperature <= 0:
        assert torch.equal(targets, exact)
        return
    size = norm**2 / temperature
    if size < 1e4:
        logits = source.double() @ source.double().t() / temperature
        assert (targets - logits.softmax(1) @ exact).abs().max() <= 1e-5 + 1e-6 * size


@each_backend
@quick
@given(
    n=st.integers(0, 60),
    k=st.integers(-1, 12),
    d=dims,
    dtype=dtypes,
    layout=layouts,
    init=st.sampled_from(["random", "k-means++", "warm", "narrow", "nonsense"]),
    num_iters=st.sampled_from([-1, 0, 1, 2, 5, 30]),
    num_restarts=st.integers(0, 3),
    spherical=st.booleans(),
    norm=st.sampled_from([0.0, 1.0, 1e-30, 1e4, float("nan"), float("inf")]),
    seed=seeds,
)
def test_kmeans_is_right_or_refused(
    backend: str,
    n: int,
    k: int,
    d: int,
    dtype: torch.dtype,
    layout: str,
    init: str,
    num_iters: int,
    num_restarts: int,
    spherical: bool,
    norm: float,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    points = norm * unit(n, d, dtype, layout, random)
    starts = {
        "warm": torch.randn(max(k, 0), d, generator=random),
        "narrow": torch.randn(max(k, 0), d + 1, generator=random),
    }

    def run() -> protoclip.Clusters:
        return protoclip.kmeans(
            points,
            k,
            num_iters=num_iters,
            num_restarts=num_restarts,
            init=starts.get(init, init),
            seed=seed,
            spherical=spherical,
            backend=backend,
        )

    sizes_are_right = 1 <= k <= n and num_iters >= 0 and num_restarts >= 1
    start_is_right = init in ("random", "k-means++") or (init == "warm" and num_restarts == 1)
    if not (sizes_are_right and start_is_right and points.isfinite().all()):
        with pytest.raises(ValueError, match="kmeans: expected"):
            run()
        return
    clusters = run()
    assert clusters.centroids.shape == (k, d) and clusters.centroids.isfinite().all()
    assert torch.equal(clusters.counts, torch.bincount(clusters.labels, minlength=k))
    direct = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(points.double(), clusters.centroids.double(), compute_mode=direct)
    squared = distances.square()
    chosen = squared.gather(1, clusters.labels[:, None])[:, 0]
    largest_centroid = clusters.centroids.double().square().sum(1).max()
    noise = 1e-37 + 1e-5 * (norm**2 + largest_centroid)
    assert (chosen - squared.min(1).values).max() <= noise
    assert clusters.inertia == pytest.approx(float(chosen.sum()), rel=1e-5, abs=float(n * noise))
    again = run()
    assert torch.equal(again.centroids, clusters.centroids) and again.history == clusters.history
    assert min(1, num_iters) <= clusters.num_iters <= num_iters
    assert len(clusters.history) == clusters.num_iters + 1
    assert clusters.history[-1] == clusters.inertia
    at_rest = clusters.num_iters < num_iters
    if at_rest and not spherical:  # whose start is made of unit length again
        still = protoclip.kmeans(points, k, num_iters=1, init=clusters.centroids, backend=backend)
        assert torch.equal(still.centroids, clusters.centroids)
        assert torch.equal(still.labels, clusters.labels) and still.inertia == clusters.inertia
