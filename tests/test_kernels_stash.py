"""The stash of InfoNCE's Triton backend: what 16-bit logits cost the gradients, no more."""

import pytest
import torch
from budget import assert_within_budget
from test_kernels_info_nce import DEVICE, _features
from test_kernels_info_nce import pytestmark as needs_triton

import protoclip
from protoclip.ops.contrastive import LN2

pytestmark = needs_triton
LOGIT_ERROR = 2**-10  # base 2, as info_nce's docstring promises: a probability by 0.07 %


def _run(x, y, scale, weights, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (x, y)]
    wide = torch.promote_types(x.dtype, torch.float32)
    leaves.append(torch.tensor(scale, dtype=wide, device=DEVICE, requires_grad=True))
    rows = protoclip.info_nce(*leaves, reduction="none", **options)
    return rows.detach(), *torch.autograd.grad((rows * weights.to(rows)).sum(), leaves)


def _allowances(x, y, scale, weights):
    """The largest change of dx, dy and dscale where each negative's probability, and so its weight
    in the gradient, is off by LN2 * LOGIT_ERROR of itself."""
    dots = x.double() @ y.double().T
    g = (scale * dots).softmax(1) * weights[:, None] + (scale * dots).softmax(0) * weights
    g = LN2 * LOGIT_ERROR / 2 * g.fill_diagonal_(0)
    terms = abs(scale) * (g @ y.double().abs()), abs(scale) * (g.T @ x.double().abs())
    spread = dots.max() - dots.min()
    return *(t.max().item() for t in terms), (g.sum() * spread).item()


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0, -20.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["cones", "outcasts"])
def test_gradients_within_the_stated_bound(kind, dtype, scale):
    x, y = _features(140, 20, kind, dtype)
    weights = torch.rand(140, device=DEVICE, dtype=torch.float64) / 140
    got = _run(x, y, scale, weights, backend="triton", stash=True)
    assert torch.equal(got[0], _run(x, y, scale, weights, backend="triton")[0])
    base = _run(x, y, scale, weights, backend="reference")
    truth = _run(x.double(), y.double(), scale, weights, backend="reference")
    terms = (x.double() * truth[1]).abs().sum() / abs(scale) if scale else weights.sum()
    sizes = *(t.abs().max().item() for t in truth[1:3]), terms.item()
    eps = torch.finfo(torch.float32).eps
    for name, g, t, b, size, more in zip(
        ("dx", "dy", "dscale"), got[1:], truth[1:], base[1:], sizes,
        _allowances(x, y, scale, weights), strict=True,
    ):  # fmt: skip
        rounded = torch.finfo(g.dtype).eps
        assert_within_budget(g, t, b, name, magnitude=size + (1 + eps) * more / rounded)


def test_far_better_than_bf16_logits():
    """At scale 100, against gradients whose logits were rounded to bf16 and nothing else."""
    x, y = _features(140, 20, "cones", torch.float32)
    weights = torch.full((140,), 1 / 140, dtype=torch.float64, device=DEVICE)
    got = _run(x, y, 100.0, weights, backend="triton", stash=True)[1].double()
    dots = 100 * x.double() @ y.double().T
    rounded = (
        dots.float().bfloat16().double().where(~torch.eye(140, dtype=bool, device=DEVICE), dots)
    )
    rows, columns = dots.logsumexp(1, keepdim=True), dots.logsumexp(0, keepdim=True)
    eye = torch.eye(140, dtype=torch.float64, device=DEVICE)

    def gradient(logits):
        g = (logits - rows).exp() + (logits - columns).exp() - 2 * eye
        return 100 / 280 * g @ y.double()

    truth, bf16 = gradient(dots), gradient(rounded)
    assert (got - truth).abs().max() < (bf16 - truth).abs().max() / 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_waves_chunks_and_odd_strides_read_what_was_written(monkeypatch, dtype):
    """Three waves wrote the tiles, 3 x 2 chunks read them: the same as in one piece."""
    from protoclip.kernels import info_nce_forward, stash, waves

    x, y = _features(161, 20, "cones", dtype)
    weights = torch.rand(161)
    whole = _run(x, y, 14.3, weights, backend="triton", stash=True)
    monkeypatch.setattr(info_nce_forward, "PARTIAL_BYTES", 8 * (32 * 3 + 161) * 2)
    monkeypatch.setattr(waves, "SIDE", 64)
    monkeypatch.setattr(waves, "SCRATCH_BYTES", 64 * 128 * dtype.itemsize)
    parts = _run(x.T.contiguous().T, y, 14.3, weights, backend="triton", stash=True)
    for a, b in zip(parts, whole, strict=True):  # sums in another order
        tolerance = 4 * torch.finfo(b.dtype).eps * b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    monkeypatch.setattr(stash, "STASH_BYTES", 2 * 256 * 256 - 1)  # does not fit: nothing is kept
    full = _run(x, y, 14.3, weights, backend="triton")
    assert all(
        torch.equal(a, b)
        for a, b in zip(_run(x, y, 14.3, weights, backend="triton", stash=True), full, strict=True)
    )


def test_the_backward_pass_reads_the_stash_and_little_else():
    """Tiles off the diagonal come from the stash: other codes there, other gradients."""
    x, y = _features(140, 20, "cones", torch.float32)
    scale, op = torch.tensor(9.0, device=DEVICE), torch.ops.protoclip
    *_, a, b, c, d, kept = op.contrastive(x, y, scale, 0, True, "none", "triton", True)
    w = torch.ones(140, device=DEVICE)
    dx, *_ = op.contrastive_bwd(x, y, scale, a, b, c, d, w, w, 0, "triton", kept)
    changed, *_ = op.contrastive_bwd(
        x, y, scale, a, b, c, d, w, w, 0, "triton", kept.clone().fill_(7)
    )
    assert not torch.allclose(dx, changed, rtol=1e-2)


def test_sizes_and_tiles():
    from protoclip.kernels import launch, stash

    assert 2 * 32768**2 <= 2 * stash.size(32768, 32768) < 1.01 * 2 * 32768**2
    assert stash.size(32769, 32769) == stash.size(0, 5) == 0
    tables = launch.HALF["stashing"], launch.HALF["stashed"]
    pairs = [(tables[0][arch], tables[1][arch]) for arch in launch.CARDS]
    for writes, reads in [*pairs, (launch.HALF_ANY["stashing"], launch.HALF_ANY["stashed"])]:
        tile = writes.block_n, writes.block_m
        # The same D sends both passes to the same table.
        assert tile == (reads.block_n, reads.block_m) and writes.block_d == reads.block_d
        assert all(stash.LARGEST_TILE % side == 0 and side >= stash.SMALLEST_TILE for side in tile)


def test_opcheck_and_one_graph():
    x, y = (t.requires_grad_() for t in _features(70, 8, "alike", torch.float32))
    scale = torch.tensor(20.0, device=DEVICE, requires_grad=True)
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    op = torch.ops.protoclip.contrastive
    torch.library.opcheck(op, (x, y, scale, 0, True, "mean", "triton", True), test_utils=checks)

    def loss(x, y, scale):
        return protoclip.info_nce(x, y, scale, backend="triton", stash=True)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(x, y, scale), (x, y, scale)),
        torch.autograd.grad(loss(x, y, scale), (x, y, scale)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("grad", [True, False])
def test_others_keep_nothing(grad):
    """Nor does a loss without gradients."""
    x, y = (t.requires_grad_(grad) for t in _features(70, 8, "alike", torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for backend in ["reference"] if grad else ["reference", "triton"]:
            a, b = (
                protoclip.info_nce(x, y, 9.0, backend=backend, stash=stash)
                for stash in (True, False)
            )
            assert torch.equal(a, b)
    assert not any(t.dtype == torch.int16 and t.numel() for t in kept)
    protoclip.ClipLoss(stash=True)(x, y, torch.tensor(9.0, device=DEVICE))
