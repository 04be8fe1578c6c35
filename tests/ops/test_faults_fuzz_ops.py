"""Ops on shapes, dtypes, strides and numbers nobody meant: right, or refused in words."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_table import Call, Relation, contrastive_parts, sigmoid_loss
from torch import Tensor

import protoclip

quick = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
each_backend = pytest.mark.parametrize("backend", ["reference", "auto"])
dims = st.integers(1, 6)
few = st.integers(0, 9)
scales = st.floats(0, 100)


def generator(data: st.DataObject) -> torch.Generator:
    return torch.Generator().manual_seed(data.draw(st.integers(0, 99)))


def some_unit_rows(
    data: st.DataObject, random: torch.Generator, *shapes: tuple[int, int]
) -> list[Tensor]:
    """Of one dtype, laid out in one of four ways; "expanded": all the same one."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    layout = data.draw(st.sampled_from(["plain", "transposed", "strided", "expanded"]))

    def unit(n: int, d: int) -> Tensor:
        rows = F.normalize(torch.randn(n, d, generator=random), dim=1).to(dtype)
        if layout == "transposed":
            return rows.t().contiguous().t()
        if layout == "strided":
            return torch.stack([rows, rows * 0], dim=2)[..., 0]
        if layout == "expanded" and n:
            return rows[:1].expand(n, d)
        return rows

    return [unit(*shape) for shape in shapes]


def assert_right(call: Call, backend: str, size: float) -> None:
    """Loss and gradients are within fp32 of their terms, gradients rounded to the dtype."""
    truth = call.plain(torch.float64).values
    for name, value in call.results(backend).items():
        exact = truth[name]
        assert value.shape == exact.shape
        if value.numel():
            error = (value - exact).where(value != exact, 0).abs().max()  # or both are -inf
            assert error <= (1e-5 + torch.finfo(value.dtype).eps) * size, name


@each_backend
@quick
@given(st.data())
def test_the_sigmoid_loss_is_right_or_refused(backend: str, data: st.DataObject) -> None:
    n, m, d = data.draw(few), data.draw(few), data.draw(dims)
    offset = data.draw(st.integers(-1, 9))
    scale, bias = data.draw(scales), data.draw(st.floats(-20, 20))
    image, text = some_unit_rows(data, generator(data), (n, d), (m, d))
    if offset < 0 or offset + n > m:
        with pytest.raises(ValueError, match="offset"):
            protoclip.sigmoid_loss(image, text, scale, bias, offset=offset, backend=backend)
        return
    call = sigmoid_loss(image, text, scale, bias, offset=offset)
    assert_right(call, backend, 1 + (abs(scale) + abs(bias)) * n * m)


@each_backend
@quick
@given(st.data())
def test_contrastive_is_right_or_refused(backend: str, data: st.DataObject) -> None:
    """Few ids, so that many are alike."""
    n, m = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    d, num_ids = data.draw(dims), data.draw(st.integers(1, 2))
    scale = data.draw(scales)
    names = data.draw(st.sets(st.sampled_from(["query_ids", "key_ids", "exclude", "key_bias"])))
    random = generator(data)

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
        same_id=data.draw(st.sampled_from(["exclude", "positive"])),
        **{name: value for name, value in options.items() if name in names},
    )
    queries, keys = some_unit_rows(data, random, (n, d), (m, d))
    if "query_ids" in names and "key_ids" not in names:
        with pytest.raises(ValueError, match="expected key_ids with query_ids"):
            protoclip.contrastive(queries, keys, scale, **vars(relation), backend=backend)
        return
    call = contrastive_parts(queries, keys, scale, relation)
    assert_right(call, backend, (1 + abs(scale)) * n * m)


def test_the_temperature_of_soft_targets_may_be_no_number_of_fp32() -> None:
    centroids = F.normalize(torch.randn(3, 2), dim=1)
    for backend in ("reference", "auto"):
        targets = protoclip.soft_targets(centroids, centroids, 1e-95, backend=backend)
        torch.testing.assert_close(targets, centroids)


@each_backend
@quick
@given(st.data())
def test_soft_targets_are_right_or_refused(backend: str, data: st.DataObject) -> None:
    """Means of prototypes, whatever the logits; the right ones where fp32 can tell."""
    k, extra = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 1))
    temperature = data.draw(st.floats(-1, 10) | st.sampled_from([0.0, 1e-30, 1e-4, 1e30]))
    norm = data.draw(st.sampled_from([1.0, 0.0, 30.0, 200.0]))
    shapes = (k, data.draw(dims)), (k + extra, data.draw(dims))
    source, prototypes = some_unit_rows(data, generator(data), *shapes)
    source = norm * source
    if extra:
        with pytest.raises(ValueError, match="one prototype per source centroid"):
            protoclip.soft_targets(source, prototypes, temperature, backend=backend)
        return
    targets = protoclip.soft_targets(source, prototypes, temperature, backend=backend).double()
    assert targets.shape == prototypes.shape
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
@given(st.data())
def test_kmeans_is_right_or_refused(backend: str, data: st.DataObject) -> None:
    n, k, d = data.draw(st.integers(0, 60)), data.draw(st.integers(-1, 12)), data.draw(dims)
    init = data.draw(st.sampled_from(["random", "k-means++", "warm", "narrow", "nonsense"]))
    num_iters = data.draw(st.sampled_from([-1, 0, 1, 2, 5, 30]))
    num_restarts = data.draw(st.integers(0, 3))
    spherical = data.draw(st.booleans())
    norm = data.draw(st.sampled_from([0.0, 1.0, 1e-30, 1e4, float("nan"), float("inf")]))
    random = generator(data)
    points = norm * some_unit_rows(data, random, (n, d))[0]
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
