"""The products that InfoNCE's CPU backend keeps for its backward pass: no bit of the result."""

import pytest
import torch
from test_info_nce import DTYPES, clustered

import protoclip

REASON = protoclip.backends("info_nce")["cpu"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def _leaves(n, d, dtype):
    return *(t.requires_grad_() for t in clustered(n, d, dtype)), torch.tensor(
        30.0, requires_grad=True
    )


def _run(inputs, weights, stash):
    rows = protoclip.info_nce(*inputs, reduction="none", backend="cpu", stash=stash)
    return rows.detach(), *torch.autograd.grad((rows * weights).sum(), inputs)


def _kept(inputs, **options):
    """Bytes of logits that the loss saves: its only int16 tensor."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        protoclip.info_nce(*inputs, **options)
    return sum(t.nbytes for t in saved if t.dtype == torch.int16)


def _arithmetics(dtype):
    return {torch.float32: ["auto", "split"], torch.bfloat16: ["auto", "float"]}.get(
        dtype, ["auto"]
    )


# 1: one lane; 130 and 300: ragged tiles in both directions; 777: several tasks; D odd and even.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, d", [(1, 1), (2, 3), (130, 17), (300, 64), (777, 96)])
def test_same_bits_with_and_without_on_any_number_of_threads(n, d, dtype, monkeypatch):
    from protoclip.ops import native_info_nce

    inputs, weights = _leaves(n, d, dtype), torch.rand(n)
    threads = torch.get_num_threads()
    for arithmetic in _arithmetics(dtype):
        monkeypatch.setattr(native_info_nce, "ARITHMETIC", arithmetic)
        try:
            plain = _run(inputs, weights, False)
        except RuntimeError as error:
            assert "AVX-512 with bf16" in str(error)
            continue
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                for stash in (None, True):
                    got = _run(inputs, weights, stash)
                    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True)), count
        finally:
            torch.set_num_threads(threads)


def test_the_backward_pass_reads_the_stash():
    x, y, scale = _leaves(300, 20, torch.float32)
    op, w = torch.ops.protoclip, torch.ones(300)
    *_, a, b, c, d, kept = op.contrastive(x, y, scale, 0, True, "none", "cpu", True)
    assert kept.nbytes == 4 * 384 * 512  # whole tiles of 128 x 256
    rest = (x, y, scale, a, b, c, d, w, w, 0, "cpu")
    dx, *_ = op.contrastive_bwd(*rest, kept)
    again, *_ = op.contrastive_bwd(*rest, kept)
    other, *_ = op.contrastive_bwd(*rest, torch.zeros_like(kept))
    assert torch.equal(dx, again) and not torch.allclose(dx, other, rtol=1e-2)
    with pytest.raises(RuntimeError, match="expected a stash of 196608 floats, got 8 bytes"):
        op.contrastive_bwd(*rest, kept[:4])


def test_only_for_a_gradient_and_within_the_budget(monkeypatch):
    from protoclip.ops import native_info_nce

    inputs = _leaves(300, 20, torch.float32)
    size = 4 * 384 * 512
    assert _kept(inputs, backend="cpu") == _kept(inputs, backend="cpu", stash=True) == size
    assert _kept(inputs, backend="cpu", stash=False) == 0
    frozen = [t.detach() for t in inputs]
    keep = native_info_nce.stash_size
    monkeypatch.setattr(native_info_nce, "STASH_BYTES", size - 1)
    assert keep(300, 300) == _kept(inputs, backend="cpu") == 0
    monkeypatch.undo()
    calls = []
    fwd = torch.ops.protoclip_native.contrastive_fwd

    def watch(*arguments):
        calls.append(arguments[-1])
        return fwd(*arguments)

    monkeypatch.setattr(torch.ops.protoclip_native, "contrastive_fwd", watch)
    protoclip.info_nce(*frozen, backend="cpu")
    with torch.no_grad():
        protoclip.info_nce(*inputs, backend="cpu")
    assert calls == [None, None]
    assert 2 * keep(4096, 4096) == native_info_nce.STASH_BYTES == 64 << 20
    assert keep(4097, 4096) == keep(16384, 16384) == keep(0, 0) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_rectangles_and_one_graph(dtype):
    x, y, scale = _leaves(256, 6, dtype)  # whole tiles: the room around ragged ones is not written
    op = torch.ops.protoclip.contrastive
    torch.library.opcheck(op, (x, y, scale, 0, True, "mean", "cpu", True))
    torch.library.opcheck(op, (x[:128], y, scale, 3, False, "none", "cpu", True))

    def loss(x, y, scale):
        return protoclip.info_nce(x, y, scale, backend="cpu")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (256, 230):
        got, want = (
            torch.autograd.grad(f(x[:n], y[:n], scale), (x, y, scale)) for f in (compiled, loss)
        )
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_memory_of_a_step_is_the_next_steps():
    """Blocks are handed out once at a time, come back when their tensor dies, and can be let go."""
    ops = torch.ops.protoclip_native
    size = 3 << 20
    one, two = ops.pooled(size), ops.pooled(size)
    assert one.shape == (size,) and one.dtype == torch.int16
    one.fill_(1), two.fill_(2)
    assert (one == 1).all() and (two == 2).all()
    places = {one.data_ptr(), two.data_ptr()}
    del one, two
    again = ops.pooled(size), ops.pooled(size)
    assert {t.data_ptr() for t in again} == places
    ops.release_memory()  # what is in use stays
    again[0].fill_(3)
    assert (again[0] == 3).all()


def test_freed_memory_is_kept_up_to_a_limit():
    ops = torch.ops.protoclip_native
    ops.release_memory()
    assert ops.kept_memory() == 0
    blocks = [ops.pooled(32 << 20) for _ in range(6)]  # 64 MiB each
    assert ops.kept_memory() == 0  # in use is not kept
    del blocks
    assert ops.kept_memory() == 128 << 20
    again = ops.pooled(32 << 20)
    assert ops.kept_memory() == 64 << 20
    del again
    ops.release_memory()
    assert ops.kept_memory() == 0
