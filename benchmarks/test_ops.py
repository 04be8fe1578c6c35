"""The ops without a file of their own: the sigmoid loss and the soft targets."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import protoclip
from benchmarks import peers, roofline
from benchmarks.harness import Case
from benchmarks.machine import DEVICE, DTYPES
from protoclip.ops.contrastive import sigmoid_loss


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, device=DEVICE), dim=1)


def _open_clip_siglip(x, y, scale, bias):
    loss = peers.optional("open_clip.loss", "SigLipLoss")()
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        return loss(x, y, scale, bias) * len(x)  # it is a mean over the pairs, ours a sum


def _siglip_kernel(x, y, scale, bias):
    if DEVICE == "cpu":
        pytest.skip("siglip-kernel runs on GPUs only")
    loss = peers.optional("siglip_kernel", "fused_siglip_loss")
    return loss(x, y, scale.log(), bias) * len(x)


SIGLIP_PEERS = {"open_clip": _open_clip_siglip, "siglip-kernel": _siglip_kernel}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", [*peers.ours("siglip"), *SIGLIP_PEERS])
def test_siglip(bench, dtype, variant):
    n, d = {"tiny": (48, 16)}.get(bench.sizes, (4096, 512) if DEVICE == "cpu" else (16384, 512))
    torch.manual_seed(0)
    x, y = (unit(n, d).to(DTYPES[dtype]).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(v, device=DEVICE, requires_grad=True) for v in (10.0, -10.0))
    leaves = (x, y, scale, bias)
    loss = SIGLIP_PEERS.get(variant)
    if peers.is_ours(variant):
        loss = partial(sigmoid_loss, backend=peers.backend("siglip", variant))

    def run(loss=loss):
        value = loss(*leaves)
        return value.detach(), torch.autograd.grad(value, leaves)

    want, wanted = run(partial(sigmoid_loss, backend="reference"))
    value, gradients = run()
    eps = 32 * torch.finfo(DTYPES[dtype]).eps
    assert abs(value - want) <= eps * max(1, abs(want))
    for got, truth in zip(gradients[:2], wanted[:2], strict=True):
        assert (got - truth).abs().max() <= 4 * eps * truth.abs().max()
    case = Case("siglip", {"N": n, "D": d}, dtype, roofline.info_nce(n, d, dtype), "both")
    rival = None if peers.is_ours(variant) else partial(run, sigmoid_loss)
    bench.time(case, variant, run, rival=rival)


def _softmax_product(source, prototypes, temperature):
    return torch.softmax(source @ source.T / temperature, dim=1) @ prototypes


@pytest.mark.parametrize("variant", [*peers.ours("soft_targets"), "softmax"])
def test_soft_targets(bench, variant):
    k, source_d, d = {"tiny": (64, 24, 16)}.get(bench.sizes, (2000, 384, 128))
    torch.manual_seed(0)
    source, prototypes = unit(k, source_d), unit(k, d)
    run = _softmax_product
    if peers.is_ours(variant):
        run = partial(protoclip.soft_targets, backend=peers.backend("soft_targets", variant))
    truth = _softmax_product(source.double(), prototypes.double(), 0.01).float()
    torch.testing.assert_close(run(source, prototypes, 0.01), truth, rtol=1e-3, atol=1e-4)
    work = roofline.soft_targets(k, source_d, d)
    case = Case("soft_targets", {"K": k, "D'": source_d, "D": d}, "fp32", work)
    rival = None
    if not peers.is_ours(variant):
        rival = partial(protoclip.soft_targets, source, prototypes, 0.01)
    bench.time(case, variant, lambda: run(source, prototypes, 0.01), rival=rival)
