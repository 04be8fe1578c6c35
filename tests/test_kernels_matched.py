"""Triton's matched strip against the sets written out, on a card or in the interpreter."""

from dataclasses import fields, replace

import pytest
import test_contrastive
import torch
from test_contrastive import DTYPES, KINDS, Problem, check, check_strides, computed

import protoclip

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = protoclip.backends("contrastive")["triton"]
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's, of inf and NaN
]


def problem(*arguments) -> Problem:
    """On the device of the kernels."""
    one = test_contrastive.problem(*arguments)
    tensors = {f.name: getattr(one, f.name) for f in fields(one)}
    tensors = {k: v.to(DEVICE) for k, v in tensors.items() if isinstance(v, torch.Tensor)}
    return replace(one, **tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_those_of_the_sets(dtype, kind):
    """Tiles are 32 x 64: one pair, less than a tile, ragged tiles."""
    for n, m, d, scale in ((1, 1, 1, 14.3), (17, 33, 20, 100.0), (70, 150, 17, 100.0)):
        torch.manual_seed(n)
        check(problem(kind, n, m, d, dtype, scale), "triton")


def test_waves_and_chunks_are_the_whole(monkeypatch):
    from protoclip.kernels import matched, waves

    one = problem("groups", 100, 150, 12)
    weights = torch.rand(100, device=DEVICE), torch.rand(100, device=DEVICE)
    whole = computed(one, weights, "triton")
    monkeypatch.setattr(matched, "PARTIAL_BYTES", 1)
    monkeypatch.setattr(waves, "SCRATCH_BYTES", 64 * 128 * 4)
    for name, value in computed(one, weights, "triton").items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5)


def test_fp16_keeps_small_weights():
    one = problem("positive", 40, 70, 16, torch.float16, 30.0)
    counted = torch.tensor([float(len(p) > 0) for p, _ in one.sets()])
    check(one, "triton", (1e-6 * torch.rand(40) * counted, torch.zeros(40)))


@pytest.mark.parametrize("same_id", ["exclude", "positive"])
def test_both_directions_and_a_query_alone_with_its_key(same_id):
    one = problem("own", 70, 70, 20)
    x, y = (t.requires_grad_() for t in (one.queries, one.keys))
    ids = torch.arange(70, device=DEVICE)[:, None] // torch.tensor([2, 9], device=DEVICE)
    found = []
    for backend in ("triton", "reference"):
        loss = protoclip.info_nce(x, y, 20.0, ids=ids, same_id=same_id, backend=backend)
        found.append([loss, *torch.autograd.grad(loss, (x, y))])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-6)
    loss = protoclip.info_nce(x, y, 100.0, ids=0 * ids, backend="triton")
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (x, y)))


@pytest.mark.skipif(DEVICE == "cuda", reason="its tensors are the CPU's")
def test_arguments_of_any_stride():
    check_strides("triton")


def test_no_features_rows_or_keys():
    for n, m, d in ((0, 5, 4), (5, 0, 4), (3, 7, 0)):
        bias = torch.zeros(m, device=DEVICE, requires_grad=True)
        x, y = (torch.randn(k, d, device=DEVICE, requires_grad=True) for k in (n, m))
        own = torch.full((n,), 0 if m else -100, device=DEVICE)
        given = {"positives": own, "key_bias": bias}
        found = []
        for backend in ("triton", "reference"):
            loss = protoclip.contrastive(x, y, 3.0, **given, backend=backend)
            found.append([loss, *torch.autograd.grad(loss, (x, y, bias))])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want)
