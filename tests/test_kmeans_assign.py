"""Nearest centroid: no label may cost more than the best one, up to the rounding of fp32 itself.

Ties are legal, so what a label achieves is compared, not the label: the fp64 distance to its
centroid against the fp64 brute force on the same (rounded) inputs.
"""

import ctypes
import itertools
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from budget import on_threads, usable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import protoclip
from protoclip.ops.clusters import assignment

NATIVE_MISSING = protoclip.backends("kmeans_assign").get("cpu")
native = pytest.mark.skipif(NATIVE_MISSING is not None, reason=str(NATIVE_MISSING))
ROUNDING = 8 * torch.finfo(torch.float32).eps  # relative, of an fp32 sum of (x - c)^2, D <= 1024


backends = pytest.mark.parametrize("backend", usable("kmeans_assign"))


def log_uniform(n):
    return 10 ** torch.empty(n, 1).uniform_(-3, 3)


def random(n, k, d):
    return torch.randn(n, d), torch.randn(k, d)


def norms(n, k, d):
    """Of points and of centroids, from 1e-3 to 1e3."""
    return torch.randn(n, d) * log_uniform(n), torch.randn(k, d) * log_uniform(k)


def far_from_zero(n, k, d):
    """A shared mean that is far larger than the spread."""
    return 300 + torch.randn(n, d), 300 + torch.randn(k, d)


def near_ties(n, k, d):
    """All centroids within 1e-4 of one point."""
    return torch.randn(n, d), torch.randn(1, d) + 1e-4 * torch.randn(k, d)


def on_the_border(n, k, d):
    """Points halfway between two centroids, up to 1e-6."""
    c = torch.randn(k, d)
    i, j = torch.randint(k, (2, n))
    return (c[i] + c[j]) / 2 + 1e-6 * torch.randn(n, d), c


def sparse(n, k, d):
    """Three coordinates of each row: what 8-bit codes like least."""
    x = torch.zeros(n, d).scatter_(1, torch.randint(d, (n, 3)), torch.randn(n, 3))
    return x, x[:k] + 0.01 * torch.randn(k, d)


def outlying_dimensions(n, k, d):
    scale = torch.ones(d)
    scale[:2] = 50
    return torch.randn(n, d) * scale, torch.randn(k, d) * scale


def integers(n, k, d):
    """Exact ties in abundance."""
    return torch.randint(-3, 4, (n, d)).float(), torch.randint(-3, 4, (k, d)).float()


KINDS = [
    random, norms, far_from_zero, near_ties, on_the_border, sparse, outlying_dimensions, integers,
]  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__)


def squared_distances(x, c):
    direct = "donot_use_mm_for_euclid_dist"  # sums of (x - c)^2
    return torch.cdist(x.double(), c.double(), compute_mode=direct).square()


def assert_nearest(x, c, labels, squared):
    cancelled = 1e-14 * x.double().square().sum(dim=1).amax().item() if len(x) else 0  # reference
    for part in range(0, len(x), 1 << 14):
        rows = slice(part, part + (1 << 14))
        truth = squared_distances(x[rows], c)
        best = truth.amin(dim=1)
        achieved = truth.gather(1, labels[rows, None])[:, 0]
        assert (achieved <= best * (1 + ROUNDING) + cancelled).all()
        torch.testing.assert_close(squared[rows].double(), achieved, rtol=ROUNDING, atol=cancelled)


# D: below and past a vector and a transform, the widths of the models; K: a panel, chunks of panels
SHAPES = [(70, 600, 3), (300, 49, 128), (130, 1300, 97), (65, 130, 768), (100_000, 67, 24)]


CASES = [(b, kind, s) for b in usable("kmeans_assign") for kind in KINDS for s in SHAPES
         if b == "cpu" or s[1] < 100 or kind not in (norms, far_from_zero, sparse)]  # fmt: skip


@pytest.mark.parametrize("backend, kind, shape", CASES)
def test_shapes(backend, kind, shape):
    torch.manual_seed(1)
    n, k, d = shape
    n = n if backend == "cpu" else min(n, 140)
    x, c = kind(max(n, k), k, d)
    assert_nearest(x[:n], c, *protoclip.kmeans_assign(x[:n], c, backend=backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@backends
def test_half_precision_with_large_norms(backend, dtype):
    torch.manual_seed(2)
    x, c = (2000 * z.to(dtype) for z in random(500, 90, 200))
    assert_nearest(x, c, *protoclip.kmeans_assign(x, c, backend=backend))


@backends
@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    n=st.integers(0, 150), k=st.integers(1, 120), d=st.integers(1, 70), seed=st.integers(0, 1 << 30)
)
def test_any_shape_and_stride(backend, n, k, d, seed):
    torch.manual_seed(seed)
    x, c = torch.randn(d, 2 * n).T[::2], torch.randn(d, k).T
    assert_nearest(x, c, *protoclip.kmeans_assign(x, c, backend=backend))


@backends
def test_equal_centroids_give_the_lowest_index(backend):
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    centroids = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    labels, squared = protoclip.kmeans_assign(points, centroids, backend=backend)
    assert labels.tolist() == [1, 0, 0] and squared.tolist() == [0.0, 17.0, 1.0]
    x, c = torch.randn(200, 40), torch.randn(7, 40)
    labels, _ = protoclip.kmeans_assign(x, c.repeat(30, 1), backend=backend)
    assert torch.equal(labels, protoclip.kmeans_assign(x, c, backend="reference")[0])


@backends
@pytest.mark.parametrize("size", [1e-25, 1e18, 1e25])
def test_sizes_whose_squares_leave_fp32(backend, size):
    torch.manual_seed(3)
    x, c = random(40, 9, 16)
    want, _ = protoclip.kmeans_assign(x, c, backend="reference")
    labels, squared = protoclip.kmeans_assign(x * size, c * size, backend=backend)
    assert torch.equal(labels, want)
    assert (squared == (0 if size < 1 else math.inf)).all() or size == 1e18


@backends
def test_a_bad_row_spoils_no_other(backend):
    torch.manual_seed(4)
    x, c = random(50, 20, 30)
    clean, _ = protoclip.kmeans_assign(x, c, backend=backend)
    x[7, 3], x[21] = math.nan, math.nan
    labels, squared = protoclip.kmeans_assign(x, c, backend=backend)
    bad = torch.zeros(50, dtype=torch.bool)
    bad[[7, 21]] = True
    assert (labels[bad] == -1).all() and squared[bad].isnan().all()
    assert torch.equal(labels[~bad], clean[~bad]) and squared[~bad].isfinite().all()


@native
def test_same_bits_with_one_thread_and_two_and_alone():
    torch.manual_seed(5)
    x, c = near_ties(3000, 500, 64)
    runs = on_threads(lambda: protoclip.kmeans_assign(x, c, backend="cpu"))
    runs.append(protoclip.kmeans_assign(x[1001:2000], c, backend="cpu"))
    runs[-1] = tuple(torch.cat([a[:1001], b, a[2000:]]) for a, b in zip(*runs[::3], strict=True))
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=0)


@native
@pytest.mark.parametrize("shape", [(300, 49, 128), (130, 97, 7), (200, 150, 130)])
@kinds
def test_kept_codes_change_no_bit(kind, shape):
    """Codes around the points' centre, of points that meet centroids near and far."""
    torch.manual_seed(6)
    n, k, d = shape
    x, c = kind(n, k, d)
    x[3] = c[5]
    assign = assignment(x.T.contiguous().T, k, "auto")
    for centroids in (c, c.T.contiguous().T * 2, c * 1e10, c[:1] - 1e-3):
        want = protoclip.kmeans_assign(x, centroids, backend="cpu")
        torch.testing.assert_close(assign(centroids), want, rtol=0, atol=0)
    c[0, 0] = math.nan
    assert (assign(c)[0] == -1).all()


@backends
def test_operator_contract(backend):
    x, c = torch.randn(9, 5), torch.randn(4, 5)
    torch.library.opcheck(torch.ops.protoclip.kmeans_assign.default, (x, c, backend))
    compiled = torch.compile(
        lambda a, b: protoclip.kmeans_assign(a, b, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(
        compiled(x, c), protoclip.kmeans_assign(x, c, backend=backend), rtol=0, atol=0
    )


VECTORS = {  # flags of the compiler, what the CPU needs, lanes of a vector
    "avx512": (["-march=native", "-DCPU_CAPABILITY_AVX512"], "avx512_vnni", 16),
    "avx2": (["-mavx2", "-mfma", "-DCPU_CAPABILITY_AVX2"], "avx2", 8),
    "plain": ([], "", 8),
}


def address(x):
    return ctypes.c_void_p(x.data_ptr())


@pytest.mark.parametrize("vectors", VECTORS)
def test_tiles_of_every_vector_width(vectors, tmp_path):
    """csrc/int8_tile.h; the op's own tests see the machine's width only."""
    flags, needs, width = VECTORS[vectors]
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if shutil.which("g++") is None or needs not in cpu:
        pytest.skip(f"needs g++ and a CPU with {needs or 'anything'}")
    command = ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", *flags, "-o", f"{tmp_path}/tile.so"]
    subprocess.run([*command, Path(__file__).with_name("int8_tile_check.cpp")], check=True)
    native = ctypes.CDLL(f"{tmp_path}/tile.so")
    lanes, rows, columns, most = (ctypes.c_int * 4).in_dll(native, "SIZES")
    assert lanes == width
    # The largest codes too: with them a saturating instruction would show.
    for depth, extreme in itertools.product((4, 12, 256, 1024), (False, True)):
        left = torch.randint(most if extreme else -most, most + 1, (rows, depth)) + most + 1
        right = torch.randint(127 if extreme else -127, 128, (depth, columns))
        start, got = torch.randint(-127_000, 127_000, (columns,)), torch.empty(rows, columns)
        panel = right.reshape(-1, 4, columns).transpose(1, 2).contiguous()  # [D / 4, columns, 4]
        codes = left.to(torch.uint8), panel.to(torch.int8), start.int()
        native.tile(
            address(codes[0]), ctypes.c_int64(depth), *map(address, codes[1:]), address(got)
        )
        assert torch.equal(got, (start + left @ right).float())
    x, y, found = torch.randn(lanes), torch.randn(lanes), torch.empty(2)
    y[::3] = x[::3]
    mask = native.lanes(address(x), address(y), address(found))
    assert mask == sum(1 << i for i in range(lanes) if x[i] >= y[i])
    assert found[0] == x.max() and (found[1] - x.sum()).abs() < 1e-4
