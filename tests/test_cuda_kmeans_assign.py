"""csrc/kmeans_assign.cu, run on the CPU by the emulation, against brute force in fp64."""

import math

import pytest
import torch
from cuda_host import SM_80, SM_86, SM_90, kmeans_assign, kmeans_encode, library, segment_mean
from torch.utils._python_dispatch import TorchDispatchMode

import protoclip
from protoclip.ops.dispatch import FLOATS, TABLE, Backend, ClusterFunctions

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def squared_distances(x, c):
    return torch.cdist(x.double(), c.double(), compute_mode="donot_use_mm_for_euclid_dist").square()


def assert_nearest(x, c, *, rescored=0.05, **options):
    """Each label's distance is the least in fp64; few rows need rescore_kernel, which would hide
    wrong scores of the tile kernel."""
    labels, distances, report = kmeans_assign(x, c, **options)
    assert report["rescored"] <= rescored * len(x)
    truth = squared_distances(x, c)
    best = truth.amin(dim=1)
    assert labels.min() >= 0 and labels.max() < len(c)
    chosen = truth.gather(1, labels[:, None])[:, 0]
    # rescore_kernel and this test add the same squares in fp64, in another order
    assert (chosen <= best * (1 + 1e-13)).all()
    torch.testing.assert_close(distances, best.float(), rtol=2e-7, atol=0)
    return labels, report


def clustered(n, k, d, spread, generator):
    centroids = torch.randn(k, d, generator=generator)
    picks = torch.randint(k, (n,), generator=generator)
    return centroids[picks] + spread * torch.randn(n, d, generator=generator), centroids


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


# N and K: below, at and past one tile of 128, several tiles with a split of K; D: under a 16-byte
# chunk, odd, at and past a block of 32, several blocks, past what stays resident.
SHAPES = [(1, 1, 1), (127, 129, 7), (128, 128, 32), (130, 640, 33), (260, 300, 100), (9, 40, 700)]
SHAPES += [(5, 3, 0)]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("n, k, d", SHAPES)
def test_shapes_cross_every_tile_edge(n, k, d, dtype, generator):
    x = torch.randn(n, d, generator=generator).to(dtype)
    c = torch.randn(k, d, generator=generator).to(dtype)
    _, report = assert_nearest(x, c, rescored=0.05 if d else 1)
    assert report["parts"] == (2 if dtype == FP32 else 1)
    assert report["pack_points"] == (dtype == FP32 or d % 8 != 0 or d == 0)


@pytest.mark.parametrize(
    "device, dtype, d, resident",
    [(SM_80, BF16, 128, 1), (SM_80, BF16, 256, 0), (SM_80, FP32, 160, 0), (SM_86, FP16, 64, 1)]
    + [(SM_86, BF16, 264, 0), (SM_90, BF16, 256, 1), (SM_90, FP32, 128, 1), (SM_90, FP32, 300, 0)],
)
def test_resident_and_streamed_points(device, dtype, d, resident, generator):
    x = torch.randn(140, d, generator=generator).to(dtype)
    c = torch.randn(270, d, generator=generator).to(dtype)
    _, report = assert_nearest(x, c, device=device)
    assert report["resident"] == resident


def test_splits_of_k_do_not_change_the_result(generator):
    x, c = torch.randn(100, 16, generator=generator), torch.randn(1500, 16, generator=generator)
    results = []
    for processors in (1, 3, 64):
        labels, report = assert_nearest(x, c, device=(processors, *SM_90[1:]))
        results.append((labels, report["splits"]))
    assert [splits for _, splits in results] == [2, 6, 12]
    assert all(torch.equal(labels, results[0][0]) for labels, _ in results)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_near_ties_at_any_norm(dtype, scale, generator):
    # Points beside the middle of two centroids, off it by 2^-20 ... 2^-8 of the distance, and
    # centroids that come in pairs a rounding apart: tensor-core scores alone get these wrong.
    base = torch.randn(80, 64, generator=generator, dtype=torch.float64)
    c = (torch.cat([base, base * (1 + 2.0**-9)]) * scale).to(dtype)
    a, b = c[torch.randint(160, (2, 400), generator=generator)].double()
    offset = 2.0 ** -torch.randint(8, 21, (400, 1), generator=generator).double()
    x = (a + (b - a) * (0.5 + offset)).to(dtype)
    assert_nearest(x, c, rescored=0.5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_many_candidates_within_rounding(dtype, generator):
    # All centroids within 2^-7 of each other, far from the origin: rescore_kernel decides.
    c = (1000 + torch.randn(300, 40, generator=generator)).to(dtype)
    x = (1000 + torch.randn(150, 40, generator=generator)).to(dtype)
    # Centring takes the common 1000 out of the bound of fp32 rows.
    _, report = assert_nearest(x, c, rescored=1 if dtype == BF16 else 0.05)
    assert dtype == FP32 or report["rescored"] > 0


@pytest.mark.parametrize("spread, left", [(0.1, 0), (1.5, 0.3), (30.0, 0.9)])
def test_fp32_points_take_one_term_where_that_decides(spread, left, generator):
    """Rows that hi.hi cannot decide, several tiles of them, take all three terms."""
    x, c = clustered(1200, 300, 64, spread, generator)
    _, report = assert_nearest(x, c)
    assert report["screened"] <= left * 1200 and (report["screened"] > 128) == (left == 0.9)
    assert kmeans_assign(x.bfloat16(), c.bfloat16())[2]["screened"] == 0


def test_ties_go_to_the_lowest_index(generator):
    c = torch.randn(50, 24, generator=generator).repeat(4, 1)  # every centroid four times
    x = c[torch.randint(200, (300,), generator=generator)] + 0.01
    labels, report = assert_nearest(x, c, rescored=1)
    assert labels.max() < 50 and report["rescored"] == 300
    pairs = c[:100]
    labels, _ = assert_nearest(x, pairs)  # two candidates need no full pass
    assert labels.max() < 50


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_rows_that_are_not_finite(dtype, generator):
    x = torch.randn(200, 40, generator=generator).to(dtype)
    c = torch.randn(140, 40, generator=generator).to(dtype)
    want = kmeans_assign(x, c)[0]
    x[3, 0], x[150, 39], x[199, 20] = math.nan, math.nan, math.inf
    want[[3, 150, 199]] = -1
    for packed in (None, kmeans_encode(x)):
        labels, distances, _ = kmeans_assign(x, c, packed)
        assert torch.equal(labels, want) and torch.equal(distances.isfinite(), want >= 0)
    c[100, 7] = math.nan  # as in the reference: no distance is known any more
    labels, distances, _ = kmeans_assign(x, c)
    assert (labels == -1).all() and distances.isnan().all()


def test_large_fp16_norms_and_extremes_of_fp32(generator):
    x = (torch.randn(150, 64, generator=generator) * 2e4).clamp(-6e4, 6e4).half()
    assert_nearest(x, x[:37] * 0.5)
    for scale in (1e-30, 1e-20, 1e18, 1e30):  # squares under- and overflow fp32
        x = torch.randn(60, 20, generator=generator) * scale
        labels, _, _ = kmeans_assign(x, x[:30])
        truth = squared_distances(x, x[:30])
        chosen = truth.gather(1, labels[:, None])[:, 0]
        assert (chosen <= truth.amin(dim=1) * (1 + 1e-13)).all()


def test_strides(generator):
    wide = torch.randn(300, 160, generator=generator).bfloat16()
    c = torch.randn(90, 64, generator=generator).bfloat16()
    for x, packed in [
        (wide[:, 8:72], 0),  # rows of 16-byte alignment are read where they are
        (wide[:, 3:67], 1),
        (wide[:, ::2][:, :64], 1),
        (wide[::3, :64], 0),
        (torch.randn(64, 100, generator=generator).bfloat16().T, 1),
        (wide[:1, :64].expand(70, 64), 0),
    ]:
        _, report = assert_nearest(x, c)
        assert report["pack_points"] == packed
    assert_nearest(wide[:, :90].T.float(), torch.randn(300, 70, generator=generator).T)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_kept_points_change_no_bit(dtype, generator):
    """Points packed around their own centre, against centroids near and far."""
    x, c = clustered(150, 140, 33, 1.5, generator)
    x[3] = c[5]
    x, c = x.to(dtype), c.to(dtype)
    packed = kmeans_encode(x)
    for centroids in (c, c.T.contiguous().T * 2, c[:20] * 1e10, c[:1] - 1e-3):
        want, got = kmeans_assign(x, centroids), kmeans_assign(x, centroids, packed)
        torch.testing.assert_close(got[:2], want[:2], rtol=0, atol=0)


@pytest.fixture
def emulated(monkeypatch):
    """The backend "cuda", run by the emulation."""
    functions = ClusterFunctions(
        assign=lambda points, centroids: kmeans_assign(points, centroids)[:2],
        segment_mean=lambda values, labels, num_segments: segment_mean(
            values, labels, num_segments
        ),
        encode=lambda points: [kmeans_encode(points)],
        assign_coded=lambda points, centroids, packed: kmeans_assign(points, centroids, packed)[:2],
    )
    row = Backend(lambda: functions, ("cpu",), FLOATS, lambda: None)
    monkeypatch.setitem(TABLE["kmeans_assign"], "cuda", row)


class Conversions(TorchDispatchMode):
    """Counts the tensors of a shape that are made bfloat16."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == BF16:
            self.count += args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_kmeans_packs_its_points_once(backend, emulated, generator):
    row = TABLE["kmeans_assign"][backend]
    if "cpu" not in row.device_types or row.why_not():
        pytest.skip(row.why_not() or f"here {backend} takes CUDA tensors only")
    x, _ = clustered(150, 9, 24, 1.0, generator)
    launches = library("kmeans_assign").launches_of_pack
    before = launches()
    with Conversions(x.shape) as conversions:
        clusters = protoclip.kmeans(x, 9, num_iters=3, num_restarts=2, backend=backend)
    assignments = 2 * (3 + 1)  # each packs its centroids
    assert launches() - before == (1 + assignments if backend == "cuda" else 0)
    assert conversions.count == (1 if backend == "triton" else 0)
    labels, squared = protoclip.kmeans_assign(x, clusters.centroids, backend=backend)
    assert torch.equal(labels, clusters.labels)
    assert clusters.inertia == squared.double().sum().item()
