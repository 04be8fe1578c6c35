"""Ops on shapes, dtypes, strides and numbers nobody meant: right, or refused in words."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_contrastive import Problem, computed, written_out

import protoclip
from protoclip.ops.contrastive_losses import sigmoid_loss

quick = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
both = pytest.mark.parametrize("backend", ["reference", "auto"])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
layouts = st.sampled_from(["plain", "transposed", "strided", "expanded"])
dims, seeds = st.integers(1, 6), st.integers(0, 99)


def unit(count, dim, dtype, layout, random):
    """Unit rows, laid out in one of four ways; "expanded": all the same one."""
    plain = F.normalize(torch.randn(count, dim, generator=random), dim=1).to(dtype)
    if layout == "transposed":
        return plain.t().contiguous().t()
    if layout == "strided":
        return torch.stack([plain, plain * 0], dim=2)[..., 0]
    return plain[:1].expand(count, dim) if layout == "expanded" and count else plain


@both
@quick
@given(
    st.integers(0, 9), st.integers(0, 9), st.integers(-1, 9), dims, dtypes, layouts,
    st.floats(-20, 100), st.floats(-20, 20), seeds,
)  # fmt: skip
@example(1, 3, 0, 1, torch.float32, "plain", 69.0, 20.0, 0)  # a logit of 89: fp32's exp overflows
def test_the_sigmoid_loss(backend, rows, columns, offset, dim, dtype, layout, scale, bias, seed):
    """Sums of n m terms: loss and gradients within fp32 of them, gradients rounded to the dtype."""
    random = torch.Generator().manual_seed(seed)
    leaves = [unit(count, dim, dtype, layout, random) for count in (rows, columns)]
    leaves += [torch.tensor(scale), torch.tensor(bias)]
    exact = [t.double().requires_grad_() for t in leaves]
    leaves = [t.requires_grad_() for t in leaves]
    if offset < 0 or offset + rows > columns:
        with pytest.raises(ValueError, match="offset"):
            sigmoid_loss(*leaves, offset=offset, backend=backend)
        return
    loss = sigmoid_loss(*leaves, offset=offset, backend=backend)
    z = 2 * torch.eye(rows, columns + rows, dtype=torch.float64) - 1
    logits = exact[2] * exact[0] @ exact[1].t() + exact[3]
    truth = F.softplus(-z.roll(offset, 1)[:, :columns] * logits).sum()
    size = 1 + (abs(scale) + abs(bias)) * rows * columns
    assert abs(loss - truth) <= 1e-5 * size
    got, want = (torch.autograd.grad(x, t) for x, t in ((loss, leaves), (truth, exact)))
    for ours, right in zip(got, want, strict=True):
        error = (ours - right).abs().max() if right.numel() else 0
        assert ours.shape == right.shape and error <= (1e-5 + torch.finfo(ours.dtype).eps) * size


@both
@quick
@given(
    st.integers(1, 9), st.integers(1, 9), dims, dtypes, layouts, st.floats(-20, 100),
    st.sampled_from(["exclude", "positive"]), st.integers(1, 2),
    st.sets(st.sampled_from(["query_ids", "key_ids", "exclude", "key_bias"])), seeds,
)  # fmt: skip
def test_contrastive(backend, n, m, dim, dtype, layout, scale, same_id, columns, names, seed):
    """Few ids, so that many are alike. Within fp32 of the terms, gradients rounded to the dtype."""
    random = torch.Generator().manual_seed(seed)

    def drawn(low, high, *shape):
        return torch.randint(low, high, shape, generator=random)

    told = {
        "query_ids": drawn(0, 4, n, columns),
        "key_ids": drawn(0, 4, m, columns),
        "exclude": drawn(-2, m, n),
        "key_bias": torch.randn(m, generator=random).where(drawn(0, 4, m) > 0, -torch.inf),
    }
    told = {name: value for name, value in told.items() if name in names}
    own = drawn(-1, m, n)
    told["positives"] = own.where(own >= 0, -100)
    features = (unit(count, dim, dtype, layout, random) for count in (n, m))
    one = Problem(*features, scale, same_id=same_id, **told)
    if "query_ids" in names and "key_ids" not in names:
        with pytest.raises(ValueError, match="expected key_ids with query_ids"):
            protoclip.contrastive(one.queries, one.keys, scale, **one.options, backend=backend)
        return
    weights = torch.tensor([float(len(positive) > 0) for positive, _ in one.sets()]), torch.ones(n)
    got, truth = computed(one, weights, backend), written_out(one, torch.float64, weights)
    for name, value in got.items():
        apart = (value - truth[name]).where(value != truth[name], 0).abs().max()  # or both -inf
        assert apart <= (1e-5 + torch.finfo(value.dtype).eps) * (1 + abs(scale)) * n * m


@both
@quick
@given(
    st.integers(0, 40), st.integers(0, 1), dims, dims, dtypes, layouts,
    st.one_of(st.floats(-1, 10), st.sampled_from([0.0, 1e-30, 1e-4, 1e30])),
    st.sampled_from([1.0, 0.0, 30.0, 200.0]), seeds,
)  # fmt: skip
@example(3, 0, 2, 2, torch.float32, "plain", 1e-95, 1.0, 0)  # no fp32 number
def test_soft_targets(backend, k, more, wide, dim, dtype, layout, temperature, norm, seed):
    """Means of prototypes, whatever the logits; the right ones where fp32 can tell."""
    random = torch.Generator().manual_seed(seed)
    source = norm * unit(k, wide, dtype, layout, random)
    prototypes = unit(k + more, dim, dtype, layout, random)
    if more:
        with pytest.raises(ValueError, match="one prototype per source centroid"):
            protoclip.soft_targets(source, prototypes, temperature, backend=backend)
        return
    got = protoclip.soft_targets(source, prototypes, temperature, backend=backend).double()
    assert got.shape == (k, dim)
    if not k:
        return
    exact = prototypes.double()
    assert (got >= exact.min(0).values - 1e-5).all() and (got <= exact.max(0).values + 1e-5).all()
    if temperature <= 0:
        assert torch.equal(got, exact)
    elif (size := norm**2 / temperature) < 1e4:
        logits = source.double() @ source.double().t() / temperature
        assert (got - logits.softmax(1) @ exact).abs().max() <= 1e-5 + 1e-6 * size


@both
@quick
@given(
    st.integers(0, 60), st.integers(-1, 12), dims, dtypes, layouts,
    st.sampled_from(["random", "k-means++", "warm", "narrow", "nonsense"]),
    st.sampled_from([-1, 0, 1, 2, 5, 30]), st.integers(0, 3), st.booleans(),
    st.sampled_from([0.0, 1.0, 1e-30, 1e4, float("nan"), float("inf")]), seeds,
)  # fmt: skip
def test_kmeans(
    backend, n, k, dim, dtype, layout, init, iterations, restarts, spherical, norm, seed
):
    random = torch.Generator().manual_seed(seed)
    points = norm * unit(n, dim, dtype, layout, random)
    start = {"warm": torch.randn(max(k, 0), dim, generator=random)}
    start |= {"narrow": torch.randn(max(k, 0), dim + 1, generator=random)}

    def run():
        return protoclip.kmeans(
            points, k, num_iters=iterations, num_restarts=restarts, init=start.get(init, init),
            seed=seed, spherical=spherical, backend=backend,
        )  # fmt: skip

    right = 1 <= k <= n and iterations >= 0 and restarts >= 1 and init not in ("narrow", "nonsense")
    right = right and (restarts == 1 or init != "warm")
    if not right or not points.isfinite().all():
        with pytest.raises(ValueError, match="kmeans: expected"):
            run()
        return
    found = run()
    assert found.centroids.shape == (k, dim) and found.centroids.isfinite().all()
    assert torch.equal(found.counts, torch.bincount(found.labels, minlength=k))
    apart = torch.cdist(
        points.double(), found.centroids.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()  # fmt: skip
    chosen = apart.gather(1, found.labels[:, None])[:, 0]
    noise = 1e-37 + 1e-5 * (norm**2 + found.centroids.double().square().sum(1).max())
    assert (chosen - apart.min(1).values).max() <= noise
    assert found.inertia == pytest.approx(float(chosen.sum()), rel=1e-5, abs=float(n * noise))
    again = run()
    assert torch.equal(again.centroids, found.centroids) and again.history == found.history
    assert min(1, iterations) <= found.num_iters <= iterations
    assert len(found.history) == found.num_iters + 1 and found.history[-1] == found.inertia
    if found.num_iters < iterations and not spherical:  # whose start is made of unit length again
        still = protoclip.kmeans(points, k, num_iters=1, init=found.centroids, backend=backend)
        assert torch.equal(still.centroids, found.centroids)
        assert torch.equal(still.labels, found.labels) and still.inertia == found.inertia
