"""csrc/kmeans_assign.cu, run on the CPU by the emulation, against brute force in fp64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from budget import assert_same_bits
from cuda_host import (
    SM_80,
    SM_86,
    SM_90,
    Assignment,
    Device,
    kmeans_assign,
    kmeans_encode,
    library,
    segment_mean,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import protoclip
from protoclip.ops.dispatch import TABLE

FP32 = torch.float32
BF16 = torch.bfloat16
FP16 = torch.float16


def squared_distances(points: Tensor, centroids: Tensor) -> Tensor:
    direct = "donot_use_mm_for_euclid_dist"  # sums of (x - c)^2
    return torch.cdist(points.double(), centroids.double(), compute_mode=direct).square()


def assert_nearest(
    points: Tensor, centroids: Tensor, *, rescored: float = 0.05, device: Device = SM_90
) -> Assignment:
    """Each label's distance is the least in fp64; few rows need rescore_kernel, which would hide
    wrong scores of the tile kernel."""
    result = kmeans_assign(points, centroids, device=device)
    assert result.plan.rescored <= rescored * len(points)
    truth = squared_distances(points, centroids)
    best = truth.amin(dim=1)
    assert result.labels.min() >= 0 and result.labels.max() < len(centroids)
    chosen = truth.gather(1, result.labels[:, None])[:, 0]
    # rescore_kernel and this test add the same squares in fp64, in another order
    assert (chosen <= best * (1 + 1e-13)).all()
    torch.testing.assert_close(result.distances, best.float(), rtol=2e-7, atol=0)
    return result


class Problem(NamedTuple):
    points: Tensor  # [N, D]
    centroids: Tensor  # [K, D]


def random(n: int, k: int, d: int, generator: torch.Generator) -> Problem:
    points = torch.randn(n, d, generator=generator)
    return Problem(points, torch.randn(k, d, generator=generator))


def clustered(n: int, k: int, d: int, spread: float, generator: torch.Generator) -> Problem:
    centroids = torch.randn(k, d, generator=generator)
    nearest = torch.randint(k, (n,), generator=generator)
    points = centroids[nearest] + spread * torch.randn(n, d, generator=generator)
    return Problem(points, centroids)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# N and K: below, at and past one tile of 128, several tiles with a split of K; D: under a 16-byte
# chunk, odd, at and past a block of 32, several blocks, past what stays resident.
SHAPES = [(1, 1, 1), (127, 129, 7), (128, 128, 32), (130, 640, 33), (260, 300, 100), (9, 40, 700)]
SHAPES += [(5, 3, 0)]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("n, k, d", SHAPES)
def test_labels_are_right_across_every_tile_edge(
    n: int, k: int, d: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    points, centroids = random(n, k, d, generator)
    plan = assert_nearest(points.to(dtype), centroids.to(dtype), rescored=0.05 if d else 1).plan
    assert plan.parts == (2 if dtype == FP32 else 1)
    assert plan.pack_points == (dtype == FP32 or d % 8 != 0 or d == 0)


@pytest.mark.parametrize(
    "device, dtype, d, resident",
    [
        (SM_80, BF16, 128, True),
        (SM_80, BF16, 256, False),
        (SM_80, FP32, 160, False),
        (SM_86, FP16, 64, True),
        (SM_86, BF16, 264, False),
        (SM_90, BF16, 256, True),
        (SM_90, FP32, 128, True),
        (SM_90, FP32, 300, False),
    ],
)
def test_labels_of_resident_and_of_streamed_points_are_right(
    device: Device, dtype: torch.dtype, d: int, resident: bool, generator: torch.Generator
) -> None:
    points, centroids = random(140, 270, d, generator)
    plan = assert_nearest(points.to(dtype), centroids.to(dtype), device=device).plan
    assert plan.resident == resident


def test_splits_of_k_do_not_change_the_result(generator: torch.Generator) -> None:
    points, centroids = random(100, 1500, 16, generator)
    first, *repeated = [
        assert_nearest(points, centroids, device=SM_90._replace(multiprocessors=processors))
        for processors in (1, 3, 64)
    ]
    assert [result.plan.splits for result in (first, *repeated)] == [2, 6, 12]
    assert all(torch.equal(result.labels, first.labels) for result in repeated)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_near_ties_of_any_norm_are_right(
    dtype: torch.dtype, size: float, generator: torch.Generator
) -> None:
    """Points beside the middle of two centroids, off it by 2^-20 ... 2^-8 of the distance, and
    centroids that come in pairs a rounding apart: tensor-core scores alone get these wrong."""
    base = torch.randn(80, 64, generator=generator, dtype=torch.float64)
    centroids = (torch.cat([base, base * (1 + 2.0**-9)]) * size).to(dtype)
    left, right = centroids[torch.randint(160, (2, 400), generator=generator)].double()
    offset = 2.0 ** -torch.randint(8, 21, (400, 1), generator=generator).double()
    points = (left + (right - left) * (0.5 + offset)).to(dtype)
    assert_nearest(points, centroids, rescored=0.5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_many_candidates_within_rounding_are_right(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    """All centroids within 2^-7 of each other, far from the origin: rescore_kernel decides."""
    centroids = (1000 + torch.randn(300, 40, generator=generator)).to(dtype)
    points = (1000 + torch.randn(150, 40, generator=generator)).to(dtype)
    # Centring takes the common 1000 out of the bound of fp32 rows.
    plan = assert_nearest(points, centroids, rescored=1 if dtype == BF16 else 0.05).plan
    assert dtype == FP32 or plan.rescored > 0


@pytest.mark.parametrize("spread, share_left", [(0.1, 0), (1.5, 0.3), (30.0, 0.9)])
def test_fp32_points_take_one_term_where_that_decides(
    spread: float, share_left: float, generator: torch.Generator
) -> None:
    """Rows that hi.hi cannot decide, several tiles of them, take all three terms."""
    points, centroids = clustered(1200, 300, 64, spread, generator)
    plan = assert_nearest(points, centroids).plan
    assert plan.screened <= share_left * 1200
    assert (plan.screened > 128) == (share_left == 0.9)
    assert kmeans_assign(points.bfloat16(), centroids.bfloat16()).plan.screened == 0


def test_ties_go_to_the_lowest_index(generator: torch.Generator) -> None:
    four_times = torch.randn(50, 24, generator=generator).repeat(4, 1)
    points = four_times[torch.randint(200, (300,), generator=generator)] + 0.01
    result = assert_nearest(points, four_times, rescored=1)
    assert result.labels.max() < 50 and result.plan.rescored == 300
    twice = four_times[:100]  # two candidates need no full pass
    assert assert_nearest(points, twice).labels.max() < 50


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_rows_that_are_not_finite_have_no_label_and_spoil_no_other(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    points, centroids = (t.to(dtype) for t in random(200, 140, 40, generator))
    expected = kmeans_assign(points, centroids).labels
    points[3, 0] = math.nan
    points[150, 39] = math.nan
    points[199, 20] = math.inf
    expected[[3, 150, 199]] = -1
    for packed in (None, kmeans_encode(points)):
        result = kmeans_assign(points, centroids, packed)
        assert torch.equal(result.labels, expected)
        assert torch.equal(result.distances.isfinite(), expected >= 0)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_after_a_centroid_of_nan_no_distance_is_known(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    """As in the reference."""
    points, centroids = (t.to(dtype) for t in random(200, 140, 40, generator))
    centroids[100, 7] = math.nan
    result = kmeans_assign(points, centroids)
    assert (result.labels == -1).all() and result.distances.isnan().all()


def test_large_fp16_norms_are_right(generator: torch.Generator) -> None:
    points = (torch.randn(150, 64, generator=generator) * 2e4).clamp(-6e4, 6e4).half()
    assert_nearest(points, points[:37] * 0.5)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e18, 1e30])
def test_points_whose_squares_leave_fp32_are_right(size: float, generator: torch.Generator) -> None:
    points = torch.randn(60, 20, generator=generator) * size
    labels = kmeans_assign(points, points[:30]).labels
    truth = squared_distances(points, points[:30])
    chosen = truth.gather(1, labels[:, None])[:, 0]
    assert (chosen <= truth.amin(dim=1) * (1 + 1e-13)).all()


def test_strides_do_not_matter(generator: torch.Generator) -> None:
    """Rows of 16-byte alignment are read where they are, others are packed."""
    wide = torch.randn(300, 160, generator=generator).bfloat16()
    centroids = torch.randn(90, 64, generator=generator).bfloat16()
    columns_first = torch.randn(64, 100, generator=generator).bfloat16().T
    for points, packed in [
        (wide[:, 8:72], False),
        (wide[:, 3:67], True),
        (wide[:, ::2][:, :64], True),
        (wide[::3, :64], False),
        (columns_first, True),
        (wide[:1, :64].expand(70, 64), False),
    ]:
        assert assert_nearest(points, centroids).plan.pack_points == packed
    assert_nearest(wide[:, :90].T.float(), torch.randn(300, 70, generator=generator).T)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_points_that_were_packed_before_have_the_same_bits(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Packed around their own centre, against centroids near and far."""
    points, centroids = clustered(150, 140, 33, 1.5, generator)
    points[3] = centroids[5]
    points = points.to(dtype)
    centroids = centroids.to(dtype)
    packed = kmeans_encode(points)
    other_strides = centroids.T.contiguous().T * 2
    far = centroids[:20] * 1e10
    near = centroids[:1] - 1e-3
    for moved in (centroids, other_strides, far, near):
        got = kmeans_assign(points, moved, packed)
        expected = kmeans_assign(points, moved)
        assert_same_bits(got.labels, expected.labels)
        assert_same_bits(got.distances, expected.distances)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend "cuda", run by the emulation."""

    def assign(
        points: Tensor, centroids: Tensor, codes: tuple[Tensor, ...] = (None,)
    ) -> tuple[Tensor, Tensor]:
        result = kmeans_assign(points, centroids, codes[0])
        return result.labels, result.distances

    functions = {
        "kmeans_assign": assign,
        "kmeans_assign_coded": assign,
        "kmeans_encode": lambda points: (kmeans_encode(points),),
        "segment_mean": lambda values, labels, num_segments: segment_mean(
            values, labels, num_segments
        ),
    }
    row = replace(
        TABLE["kmeans_assign"]["cuda"],
        function=functions.__getitem__,
        device_types=("cpu",),
        why_not=lambda: None,
    )
    monkeypatch.setitem(TABLE["kmeans_assign"], "cuda", row)


class Conversions(TorchDispatchMode):
    """Counts the tensors of a shape that are made bfloat16."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == BF16:
            self.count += args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_kmeans_packs_its_points_once(
    backend: str, emulated: None, generator: torch.Generator
) -> None:
    row = TABLE["kmeans_assign"][backend]
    if "cpu" not in row.device_types or row.why_not():
        pytest.skip(row.why_not() or f"here {backend} takes CUDA tensors only")
    x = clustered(150, 9, 24, 1.0, generator).points
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
