"""Nearest centroid: no label may cost more than the best one, up to the rounding of fp32 itself.

Ties are legal, so what a label achieves is compared, not the label: the fp64 distance to its
centroid against the fp64 brute force on the same (rounded) inputs.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from budget import assert_same_bits, usable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import protoclip
from protoclip.ops.clusters import SAMPLED, BlockAssignment, assignment

NATIVE_MISSING = protoclip.backends("kmeans_assign").get("cpu")
native = pytest.mark.skipif(NATIVE_MISSING is not None, reason=str(NATIVE_MISSING))
each_backend = pytest.mark.parametrize("backend", usable("kmeans_assign"))
ROUNDING = 8 * torch.finfo(torch.float32).eps  # relative, of an fp32 sum of (x - c)^2, D <= 1024


class Problem(NamedTuple):
    points: Tensor  # [N, D]
    centroids: Tensor  # [K, D]


def log_uniform(n: int) -> Tensor:
    return 10 ** torch.empty(n, 1).uniform_(-3, 3)


def random(n: int, k: int, d: int) -> Problem:
    return Problem(torch.randn(n, d), torch.randn(k, d))


def norms(n: int, k: int, d: int) -> Problem:
    """Of points and of centroids, from 1e-3 to 1e3."""
    return Problem(torch.randn(n, d) * log_uniform(n), torch.randn(k, d) * log_uniform(k))


def far_from_zero(n: int, k: int, d: int) -> Problem:
    """A shared mean that is far larger than the spread."""
    return Problem(300 + torch.randn(n, d), 300 + torch.randn(k, d))


def near_ties(n: int, k: int, d: int) -> Problem:
    """All centroids within 1e-4 of one point."""
    return Problem(torch.randn(n, d), torch.randn(1, d) + 1e-4 * torch.randn(k, d))


def on_the_border(n: int, k: int, d: int) -> Problem:
    """Points halfway between two centroids, up to 1e-6."""
    centroids = torch.randn(k, d)
    first, second = torch.randint(k, (2, n))
    halfway = (centroids[first] + centroids[second]) / 2
    return Problem(halfway + 1e-6 * torch.randn(n, d), centroids)


def sparse(n: int, k: int, d: int) -> Problem:
    """Three coordinates of each row: what 8-bit codes like least."""
    points = torch.zeros(n, d).scatter_(1, torch.randint(d, (n, 3)), torch.randn(n, 3))
    return Problem(points, points[:k] + 0.01 * torch.randn(k, d))


def outlying_dimensions(n: int, k: int, d: int) -> Problem:
    size = torch.ones(d)
    size[:2] = 50
    return Problem(torch.randn(n, d) * size, torch.randn(k, d) * size)


def integers(n: int, k: int, d: int) -> Problem:
    """Exact ties in abundance."""
    points = torch.randint(-3, 4, (n, d)).float()
    return Problem(points, torch.randint(-3, 4, (k, d)).float())


Kind = Callable[[int, int, int], Problem]
KINDS: list[Kind] = [
    random, norms, far_from_zero, near_ties, on_the_border, sparse, outlying_dimensions, integers,
]  # fmt: skip


def squared_distances(points: Tensor, centroids: Tensor) -> Tensor:
    direct = "donot_use_mm_for_euclid_dist"  # sums of (x - c)^2
    return torch.cdist(points.double(), centroids.double(), compute_mode=direct).square()


def assert_assigned_to_the_nearest(points: Tensor, centroids: Tensor, backend: str) -> None:
    labels, squared = protoclip.kmeans_assign(points, centroids, backend=backend)
    cancelled = 0.0  # by the reference
    if len(points):
        cancelled = 1e-14 * points.double().square().sum(dim=1).amax().item()
    for first in range(0, len(points), 1 << 14):
        rows = slice(first, first + (1 << 14))
        truth = squared_distances(points[rows], centroids)
        best = truth.amin(dim=1)
        achieved = truth.gather(1, labels[rows, None])[:, 0]
        assert (achieved <= best * (1 + ROUNDING) + cancelled).all()
        torch.testing.assert_close(squared[rows].double(), achieved, rtol=ROUNDING, atol=cancelled)


# D: below and past a vector and a transform, the widths of the models; K: a panel, chunks of panels
SHAPES = [(70, 600, 3), (300, 49, 128), (130, 1300, 97), (65, 130, 768), (100_000, 67, 24)]
# Every kind of data on each backend, and every shape on the CPU; there, as the screen rounds to 8
# bits, the kinds that it likes least also at the shapes they did not get.
KINDS_AND_SHAPES = list(zip(KINDS, itertools.cycle(SHAPES), strict=False))
MORE_OF_THE_SCREEN = [
    (near_ties, SHAPES[1]), (on_the_border, SHAPES[2]), (norms, SHAPES[3]), (sparse, SHAPES[4]),
]  # fmt: skip


def shape_on(backend: str, kind: Kind, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The interpreter takes seconds for 1,300 centroids: one kind of data there."""
    is_slow = backend != "cpu" and shape[1] > 1000 and kind is not integers
    return (130, 130, 97) if is_slow else shape


CASES = [
    (backend, kind, *shape_on(backend, kind, shape))
    for backend in usable("kmeans_assign")
    for kind, shape in KINDS_AND_SHAPES + (MORE_OF_THE_SCREEN if backend == "cpu" else [])
]


@pytest.mark.parametrize("backend, kind, n, k, d", CASES)
def test_points_go_to_the_nearest_centroid(
    backend: str, kind: Kind, n: int, k: int, d: int
) -> None:
    torch.manual_seed(1)
    n = n if backend == "cpu" else min(n, 140)
    problem = kind(max(n, k), k, d)
    assert_assigned_to_the_nearest(problem.points[:n], problem.centroids, backend)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k, d", [(90, 200), (20, 67)])  # in C++: by a screen, directly
def test_points_of_half_precision_and_large_norms_go_to_the_nearest_centroid(
    k: int, d: int, dtype: torch.dtype, backend: str
) -> None:
    torch.manual_seed(2)
    problem = random(500, k, d)
    points = 2000 * problem.points.to(dtype)
    centroids = 2000 * problem.centroids.to(dtype)
    assert_assigned_to_the_nearest(points, centroids, backend)


@each_backend
@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    n=st.integers(0, 150), k=st.integers(1, 120), d=st.integers(1, 70), seed=st.integers(0, 1 << 30)
)
def test_points_of_any_shape_and_stride_go_to_the_nearest_centroid(
    backend: str, n: int, k: int, d: int, seed: int
) -> None:
    torch.manual_seed(seed)
    points = torch.randn(d, 2 * n).T[::2]
    centroids = torch.randn(d, k).T
    assert_assigned_to_the_nearest(points, centroids, backend)


@each_backend
def test_three_points_by_hand(backend: str) -> None:
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    centroids = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    labels, squared = protoclip.kmeans_assign(points, centroids, backend=backend)
    assert labels.tolist() == [1, 0, 0]
    assert squared.tolist() == [0.0, 17.0, 1.0]


@each_backend
def test_of_equal_centroids_the_lowest_index_wins(backend: str) -> None:
    points = torch.randn(200, 40)
    centroids = torch.randn(7, 40)
    among_copies, _ = protoclip.kmeans_assign(points, centroids.repeat(30, 1), backend=backend)
    among_the_first, _ = protoclip.kmeans_assign(points, centroids, backend="reference")
    assert torch.equal(among_copies, among_the_first)


@each_backend
@pytest.mark.parametrize("size", [1e-25, 1e18, 1e25])
def test_sizes_whose_squares_leave_fp32_have_the_same_labels(backend: str, size: float) -> None:
    torch.manual_seed(3)
    problem = random(40, 9, 16)
    expected, _ = protoclip.kmeans_assign(problem.points, problem.centroids, backend="reference")
    labels, squared = protoclip.kmeans_assign(
        problem.points * size, problem.centroids * size, backend=backend
    )
    assert torch.equal(labels, expected)
    if size < 1:
        assert (squared == 0).all()
    elif size > 1e18:
        assert squared.isinf().all()


@each_backend
def test_very_wide_rows_go_to_the_nearest_centroid(backend: str) -> None:
    """Rows of +-1, whose codes are the largest: sums of their products leave int32."""
    if backend not in ("cpu", "reference"):
        pytest.skip("sums of the other backends are fp32; they take minutes when emulated")
    torch.manual_seed(0)
    rows = torch.randn(140_000).sign().repeat(4, 1)
    flipped = torch.rand(140_000) < 0.1
    first_half = flipped & (torch.rand(140_000) < 0.5)
    rows[1, flipped] *= -1
    rows[2, ~first_half] *= -1
    rows[3, flipped & ~first_half] *= -1
    labels, squared = protoclip.kmeans_assign(rows, rows, backend=backend)
    assert labels.tolist() == [0, 1, 2, 3] and squared.tolist() == [0, 0, 0, 0]


@each_backend
def test_a_bad_row_spoils_no_other(backend: str) -> None:
    torch.manual_seed(4)
    points, centroids = random(50, 20, 30)
    clean, _ = protoclip.kmeans_assign(points, centroids, backend=backend)
    points[7, 3] = math.nan
    points[21] = math.nan
    labels, squared = protoclip.kmeans_assign(points, centroids, backend=backend)
    bad = torch.zeros(50, dtype=torch.bool)
    bad[[7, 21]] = True
    assert (labels[bad] == -1).all() and squared[bad].isnan().all()
    assert torch.equal(labels[~bad], clean[~bad]) and squared[~bad].isfinite().all()


@native
def test_points_without_the_others_have_the_same_bits() -> None:
    torch.manual_seed(5)
    points, centroids = near_ties(3000, 500, 64)
    labels, squared = protoclip.kmeans_assign(points, centroids, backend="cpu")
    rows = slice(1001, 2000)
    got = protoclip.kmeans_assign(points[rows], centroids, backend="cpu")
    assert_same_bits(got, (labels[rows], squared[rows]))


# Past one panel; below a transform; wide; more centroids than are coded.
@native
@pytest.mark.parametrize(
    "n, k, d", [(300, 49, 128), (130, 97, 7), (200, 150, 130), (1100, 1030, 40)]
)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_points_or_centroids_that_are_prepared_once_change_no_bit(
    kind: Kind, n: int, k: int, d: int
) -> None:
    """Codes around the points' centre, of points that meet centroids near and far, all at once and
    in blocks."""
    torch.manual_seed(6)
    points, centroids = kind(n, k, d)
    points[3] = centroids[5]
    assign = assignment(points.T.contiguous().T, k, "auto")
    blocks = BlockAssignment(points[:: max(1, n // SAMPLED)], k, "cpu")
    parts = [slice(first, first + 37) for first in range(0, n, 37)]
    other_strides = centroids.T.contiguous().T * 2
    for moved in (centroids, other_strides, centroids * 1e10, centroids[:1] - 1e-3):
        expected = tuple(protoclip.kmeans_assign(points, moved, backend="cpu"))
        assert_same_bits(tuple(assign(moved)), expected)
        nearest = blocks.to(moved)
        labels, squared = zip(*(nearest(points[part], part) for part in parts), strict=True)
        assert_same_bits((torch.cat(labels), torch.cat(squared)), expected)
    centroids[0, 0] = math.nan
    for labels, squared in (assign(centroids), blocks.to(centroids)(points, slice(n))):
        assert (labels == -1).all() and squared.isnan().all()


@dataclass(frozen=True)
class Vectors:
    compiler_flags: list[str]
    cpu_feature: str
    lanes: int


VECTORS = {
    "avx512": Vectors(["-march=native", "-DCPU_CAPABILITY_AVX512"], "avx512_vnni", 16),
    "avx2": Vectors(["-mavx2", "-mfma", "-DCPU_CAPABILITY_AVX2"], "avx2", 8),
    "plain": Vectors([], "", 8),
}


def address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


class Tile(NamedTuple):
    library: ctypes.CDLL
    lanes: int


@pytest.fixture(scope="module", params=VECTORS)
def tile(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tile:
    """csrc/int8_tile.h; the op's own tests see the machine's width only."""
    vectors = VECTORS[request.param]
    path = tmp_path_factory.mktemp("tile") / "tile.so"
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if shutil.which("g++") is None or vectors.cpu_feature not in cpu:
        pytest.skip(f"needs g++ and a CPU with {vectors.cpu_feature or 'anything'}")
    source = Path(__file__).with_name("int8_tile_check.cpp")
    compiler = ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", *vectors.compiler_flags]
    subprocess.run([*compiler, "-o", path, source], check=True)
    return Tile(ctypes.CDLL(str(path)), vectors.lanes)


def test_tiles_of_every_vector_width_are_exact(tile: Tile) -> None:
    lanes, rows, columns, most = (ctypes.c_int * 4).in_dll(tile.library, "SIZES")
    assert lanes == tile.lanes
    # The largest codes too: with them a saturating instruction would show.
    for depth, extreme in itertools.product((4, 12, 256, 1024), (False, True)):
        left = torch.randint(most if extreme else -most, most + 1, (rows, depth)) + most + 1
        right = torch.randint(127 if extreme else -127, 128, (depth, columns))
        start = torch.randint(-127_000, 127_000, (columns,))
        panel = right.reshape(-1, 4, columns).transpose(1, 2).contiguous()  # [D / 4, columns, 4]
        left_codes = left.to(torch.uint8)
        right_codes = panel.to(torch.int8)
        start_codes = start.int()
        got = torch.empty(rows, columns)
        tile.library.tile(
            address(left_codes),
            ctypes.c_int64(depth),
            address(right_codes),
            address(start_codes),
            address(got),
        )
        assert torch.equal(got, (start + left @ right).float())


def test_lanes_of_every_vector_width_compare_and_sum(tile: Tile) -> None:
    x = torch.randn(tile.lanes)
    y = torch.randn(tile.lanes)
    y[::3] = x[::3]
    largest_and_sum = torch.empty(2)
    mask = tile.library.lanes(address(x), address(y), address(largest_and_sum))
    assert mask == sum(1 << lane for lane in range(tile.lanes) if x[lane] >= y[lane])
    largest, total = largest_and_sum
    assert largest == x.max() and (total - x.sum()).abs() < 1e-4
