"""info_nce: every back end against the reference in fp64 within its error budget, and its edges."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from budget import assert_draws_within_budget, assert_within_budget
from room import run_in_room

import protoclip
from protoclip.ops import reference

CPU_BACKENDS = [
    name for name in protoclip.backends("info_nce") if name in ("reference", "cpu")
]  # triton has its own tests
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _backend(name: str) -> str:
    reason = protoclip.backends("info_nce")[name]
    if reason is not None:
        pytest.skip(reason)
    return name


def clustered(n: int, d: int, dtype=torch.float32, seed: int = 0, noise: float = 0.25):
    """Unit rows as CLIP trains them: one modality's rows share a direction (cosine about 0.94),
    pairs are alike."""
    torch.manual_seed(seed)
    shared = torch.randn(n, d)
    centers = torch.randn(2, 1, d) / noise
    x, y = (F.normalize(c + shared + 0.3 * torch.randn(n, d), dim=-1) for c in centers)
    return x.to(dtype), y.to(dtype)


def run(x, y, scale, weights, *, dtype, backend):
    """Losses of the pairs and the gradients of sum(weights * losses)."""
    x, y = (t.to(dtype).detach().requires_grad_() for t in (x, y))
    s = torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    loss = protoclip.info_nce(x, y, s, reduction="none", backend=backend)
    (loss * weights).sum().backward()
    return {"loss": loss.detach(), "dx": x.grad, "dy": y.grad, "dscale": s.grad}


def check(pairs, scale, backend, weights=None, *, terms=0.0, each=()):
    """``terms``: the size of what a row's gradient sums, where it counts, not the gradient's.
    ``each``: the results of which every draw must pass by itself too."""
    got, truth, base = [], [], []
    for x, y in pairs:
        w = torch.ones(len(x)) if weights is None else weights
        got.append(run(x, y, scale, w, dtype=x.dtype, backend=backend))
        wide = run(x, y, scale, w.double(), dtype=torch.float64, backend="reference")
        truth.append(wide)
        base.append(run(x, y, scale, w, dtype=x.dtype, backend="reference"))
    assert_draws_within_budget(got, truth, base, {"dx": terms, "dy": terms})
    for draws in zip(got, truth, base, strict=True):
        for name in each:
            assert_within_budget(*(draw[name] for draw in draws), name)


# 1 and 2: the smallest; 63: one short of a vector multiple; 252: two ragged tiles; 1000: many.
# D 1, 17, 123: odd, so that bf16 pairs need a zero; 64, 512, 768: as users have them.
# Up to 16 pairs every draw must pass by itself; beyond, the gradient of the scale, one number whose
# terms cancel, now and then comes out better in the reference than its errors are on the whole.
DRAWS = {63: 16, 252: 8, 1000: 4, 4096: 3}
FAST = [*itertools.product([63, 252], [1, 17, 64, 123, 512, 768]), (1000, 512)]


def draw(n, d, dtype, draws=None):
    return [clustered(n, d, dtype, seed) for seed in range(draws or DRAWS[n])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_draw_of_few_pairs_is_within_budget(dtype):
    backend = _backend("cpu")
    for n, d in itertools.product([1, 2, 16], [1, 17, 64, 123, 512, 768]):
        for scale, seed in itertools.product([1.0, 14.3, 100.0], range(3)):
            pair = clustered(n, d, dtype, seed)
            check([pair], scale, backend)
            check([pair], scale, backend, weights=torch.rand(n) + 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_values_and_gradients_are_within_budget(scale, dtype):
    backend = _backend("cpu")
    for n, d in FAST:
        check(draw(n, d, dtype), scale, backend, weights=torch.rand(n) + 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n, d", [(1000, 1), (1000, 123), (1000, 768), (4096, 17), (4096, 512)])
def test_large_shapes_are_within_budget(n, d, dtype):
    backend = _backend("cpu")
    for scale in [100.0] if n == 4096 else [1.0, 14.3, 100.0]:
        weights = torch.rand(n) + 0.5
        check(draw(n, d, dtype), scale, backend, weights, each=("loss", "dx", "dy"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_cosines(dtype):
    """cos +1 and -1 at scale 100: losses near zero, and logits 289 powers of two apart.

    Where all rows are alike too, a gradient is a sum of equal terms that cancel: bf16 products
    round each by 2^-9, so there alone the size of the terms counts."""
    backend = _backend("cpu")
    pairs: list = [[] for _ in range(6)]
    for seed in range(8):
        torch.manual_seed(seed)
        x = F.normalize(torch.randn(150, 32), dim=-1).to(dtype)
        same = x[:1].expand(150, 32)
        half = torch.cat([same[:75], -same[:75]])
        kinds = ((x, x), (x, -x), (same, same), (same, -same), (half, x), (half, half.flip(0)))
        for group, pair in zip(pairs, kinds, strict=True):
            group.append(pair)
    for k, group in enumerate(pairs):
        alike = k >= 2 and dtype == torch.bfloat16
        check(group, 100.0, backend, terms=2 * 100.0 * x.abs().max().item() if alike else 0.0)


def test_a_loss_near_zero_keeps_its_digits():
    """The positive's own weight is exactly one: no 1e-7 of a rounded reference remains."""
    backend = _backend("cpu")
    x = torch.eye(256)
    for scale in (14.0, 100.0):
        loss = protoclip.info_nce(x, x, scale, reduction="none", backend=backend)
        want = reference.info_nce(x.double(), x.double(), torch.tensor(scale).double())
        assert (loss.double() - want).abs().max() <= 2**-21
        assert scale < 100 or (loss == 0).all()  # the truth is 1e-41


@pytest.mark.parametrize("arithmetic", ["float", "split"])
def test_other_arithmetics_of_the_cpu(arithmetic, monkeypatch):
    """What "auto" picks on other machines: fp32 for bf16 features, split bf16 for fp32 ones."""
    _backend("cpu")
    from protoclip.ops import native_info_nce

    monkeypatch.setattr(native_info_nce, "ARITHMETIC", arithmetic)
    if arithmetic == "float":
        return check(draw(300, 65, torch.bfloat16, 6), 100.0, "cpu")
    x, y = clustered(300, 65)
    try:
        got = run(x, y, 100.0, torch.ones(300), dtype=x.dtype, backend="cpu")
    except RuntimeError as error:
        assert "AVX-512 with bf16" in str(error)
        pytest.skip("this CPU has no bf16 products")
    truth = run(x, y, 100.0, torch.ones(300), dtype=torch.float64, backend="reference")
    # A product loses lo * lo and the rounding of lo, 2^-16 of it, in the positive and in the sum.
    assert (got["loss"] - truth["loss"]).abs().max() <= 2 * 2**-16 * 100.0
    for name in ("dx", "dy"):
        assert (got[name] - truth[name]).abs().max() <= 2**-9 * truth[name].abs().max(), name


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rectangles(columns, dtype):
    """Rows of one rank against the columns of all, as local_loss asks for."""
    _backend("cpu")
    x, y = clustered(700, 48, dtype)
    x, offset = x[300:431], 300
    w, v = torch.rand(131), torch.rand(700) if columns else torch.empty(0)
    f, g = torch.ops.protoclip.contrastive_fwd, torch.ops.protoclip.contrastive_bwd
    results = []
    for wide, backend in ((dtype, "cpu"), (dtype, "reference"), (torch.float64, "reference")):
        s = torch.tensor(40.0).to(torch.promote_types(wide, torch.float32))
        inputs = x.to(wide), y.to(wide), s
        stats = f(*inputs, offset, columns, backend)
        lse = [stats[k + 1].log2() + stats[k] for k in ((0, 2) if columns else (0,))]
        weights = w.to(s.dtype), v.to(s.dtype)
        results.append([*lse, stats[4], *g(*inputs, *stats[:4], *weights, offset, backend)])
    for got, base, truth in zip(*results, strict=True):
        magnitude = 2 * (w.sum() + v.sum()).item() if truth.ndim == 0 else None
        assert_within_budget(got, truth, base, magnitude=magnitude)


def test_same_bits_twice_and_on_any_number_of_threads():
    backend = _backend("cpu")
    threads = torch.get_num_threads()
    for dtype in DTYPES:
        x, y = clustered(777, 96, dtype)
        first = run(x, y, 20.0, torch.ones(777), dtype=dtype, backend=backend)
        try:
            for count in (threads, 1, 3):
                torch.set_num_threads(count)
                again = run(x, y, 20.0, torch.ones(777), dtype=dtype, backend=backend)
                assert all(torch.equal(first[k], again[k]) for k in first), count
        finally:
            torch.set_num_threads(threads)


def test_strides_and_offsets_do_not_matter():
    backend = _backend("cpu")
    for dtype in DTYPES:
        x, y = clustered(70, 34, dtype)
        want = run(x, y, 20.0, torch.ones(70), dtype=dtype, backend=backend)
        wide = torch.full((70, 73), 9.0, dtype=dtype)
        wide[:, 5:39] = x
        for view in (wide[:, 5:39], x.T.contiguous().T, x.repeat_interleave(2, 0)[::2]):
            got = protoclip.info_nce(view, y, 20.0, reduction="none", backend=backend)
            assert torch.equal(got, want["loss"])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_empty_and_single(backend):
    backend = _backend(backend)
    for n, d in ((0, 8), (1, 8), (3, 0), (1, 0), (0, 0)):
        x, y = (torch.ones(n, d, requires_grad=True) for _ in range(2))
        scale = torch.tensor(5.0, requires_grad=True)
        loss = protoclip.info_nce(x, y, scale, backend=backend)
        assert loss.item() == pytest.approx(torch.tensor(float(max(n, 1))).log().item())
        loss.backward()
        assert x.grad.shape == x.shape and (x.grad == 0).all() and scale.grad == 0


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_gives_a_non_finite_loss(backend, bad):
    backend = _backend(backend)
    for dtype in DTYPES:
        for row in (0, 150, 299):
            x, y = clustered(300, 20, dtype)
            x[row, 3] = bad
            assert not protoclip.info_nce(x, y, 10.0, backend=backend).isfinite()
            assert not protoclip.info_nce(y, x, 10.0, backend=backend).isfinite()
    x, y = clustered(30, 20)
    assert not protoclip.info_nce(x, y, bad, backend=backend).isfinite()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_reductions_and_upstream_gradients(backend):
    backend = _backend(backend)
    x, y = clustered(40, 16)
    rows = protoclip.info_nce(x, y, 9.0, reduction="none", backend=backend)
    assert rows.shape == (40,) and rows.dtype == torch.float32
    total = protoclip.info_nce(x, y, 9.0, reduction="sum", backend=backend)
    mean = protoclip.info_nce(x, y, 9.0, backend=backend)
    assert torch.allclose(total, rows.sum()) and torch.allclose(mean, rows.mean())
    x.requires_grad_()
    for factor in (1.0, -3.5):
        (g,) = torch.autograd.grad(factor * protoclip.info_nce(x, y, 9.0, backend=backend), x)
        want = (
            factor * torch.autograd.grad(reference.info_nce(x, y, torch.tensor(9.0)).mean(), x)[0]
        )
        assert torch.allclose(g, want, rtol=1e-4, atol=1e-7)


def test_torch_library_opcheck():
    _backend("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        x, y = (t.requires_grad_() for t in clustered(12, 6, dtype))
        scale = torch.tensor(5.0, requires_grad=True)
        for arguments in (
            (x, y, scale, 0, True, "mean", "cpu"),
            (x[:5], y, scale, 3, False, "none", "cpu"),
        ):
            torch.library.opcheck(torch.ops.protoclip.contrastive, arguments)


def test_compiles_into_one_graph():
    backend = _backend("cpu")
    x, y = clustered(24, 10)
    x.requires_grad_()
    scale = torch.tensor([5.0], requires_grad=True)

    def loss(x, y, scale):
        return 2 * protoclip.info_nce(x, y, scale, backend=backend)

    want = torch.autograd.grad(loss(x, y, scale), (x, scale))
    got = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y, scale), (x, scale)
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_autocast_keeps_the_features_dtype(backend):
    backend = _backend(backend)
    x, y = clustered(24, 10)
    want = protoclip.info_nce(x, y, 5.0, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = protoclip.info_nce(x, y, 5.0, backend=backend)
    assert got.dtype == torch.float32 and torch.equal(got, want)


def test_double_backward_raises():
    backend = _backend("cpu")
    x, y = (t.requires_grad_() for t in clustered(8, 4))
    loss = protoclip.info_nce(x, y, 5.0, backend=backend)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="info_nce: its fused backends have no second"):
        g.sum().backward()


@pytest.mark.slow
def test_more_than_two_to_the_31_logits():
    """50,000 rows of five kinds: the truth follows from a 5 x 5 table."""
    backend = _backend("cpu")
    n, kinds = 50_000, 5
    a, b = (t.double() for t in clustered(kinds, 4, noise=1.0))
    s = torch.tensor(10.0, dtype=torch.float64)
    logits = s * a @ b.T
    count = n / kinds
    rows, columns = (torch.softmax(logits, dim=k) / count for k in (1, 0))
    lse = sum(torch.logsumexp(logits, dim=k) for k in (1, 0)) + 2 * torch.tensor(count).log()
    want = lse / 2 - logits.diagonal()
    da = s * ((rows + columns) / 2 * count @ b - b)  # of the sum over pairs, for one row of a kind
    kind = torch.arange(n) % kinds
    x, y = a.float()[kind].requires_grad_(), b.float()[kind]
    loss = protoclip.info_nce(x, y, 10.0, reduction="none", backend=backend)
    loss.sum().backward()
    assert (loss.detach() - want[kind]).abs().max() < 1e-5
    assert (x.grad - da[kind]).abs().max() < 1e-4 * da.abs().max()


MEMORY = """
import pytest, torch, protoclip
n, d = 16384, 512
x = torch.nn.functional.normalize(torch.randn(n, d), dim=-1).{dtype}().requires_grad_()
y = x.detach().roll(1, 0).requires_grad_()
grads = 2 * x.nbytes // 2**20  # of x and y
small = x[:256].detach().requires_grad_()
protoclip.info_nce(small, small, 10.0, backend="cpu").backward()  # libraries, JIT
allow(72 + grads)
protoclip.info_nce(x, y, 10.0, backend="cpu").backward()
with pytest.raises(RuntimeError, match="memory"):
    protoclip.info_nce(x, y, 10.0, backend="reference")
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float", "bfloat16"])
def test_memory_does_not_grow_with_the_square(dtype):
    """64 MiB beside the gradients hold it, and 8 of mere addresses: blocks are whole huge pages.

    A matrix of fp32 logits would be 1,024."""
    _backend("cpu")
    run_in_room(MEMORY.replace("{dtype}", dtype))
