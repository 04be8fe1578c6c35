"""Logits are kept for the backward pass where that is faster; no bit depends on it."""

import pytest
import torch

import protoclip
from protoclip.ops import rates
from protoclip.ops.dispatch import INFO_NCE

needs_cpu = pytest.mark.skipif(
    protoclip.backends("info_nce")["cpu"] is not None, reason="the C++ backend is not here"
)
MiB = 1 << 20


@pytest.fixture
def no_decisions(monkeypatch):
    monkeypatch.setattr(rates, "_decisions", {})


def decision(
    monkeypatch: pytest.MonkeyPatch, product: float, traffic: float, stash_bytes: int
) -> bool:
    """What is decided with these seconds for a logit's product and for writing and reading it."""
    monkeypatch.setattr(rates, "seconds_of_a_product", lambda forward, dtype, width: product)
    monkeypatch.setattr(rates, "seconds_of_traffic", lambda: traffic)
    stash = torch.empty(stash_bytes, dtype=torch.uint8)
    return rates.stash_pays(lambda: None, torch.empty(4, 16), stash)


def test_logits_are_kept_where_products_take_longer_than_memory(monkeypatch, no_decisions):
    assert decision(monkeypatch, product=2e-9, traffic=1e-9, stash_bytes=64 * MiB)


def test_logits_are_formed_again_where_products_are_short(monkeypatch, no_decisions):
    assert not decision(monkeypatch, product=1e-9, traffic=1e-9, stash_bytes=64 * MiB)


def test_a_stash_within_the_caches_is_always_used(monkeypatch, no_decisions):
    assert decision(monkeypatch, product=1e-9, traffic=1e-9, stash_bytes=8 * MiB)


def test_a_process_decides_once_so_backward_reads_what_forward_wrote(monkeypatch, no_decisions):
    assert not decision(monkeypatch, product=1e-9, traffic=1e-9, stash_bytes=64 * MiB)
    assert not decision(monkeypatch, product=9e-9, traffic=1e-9, stash_bytes=32 * MiB)


@needs_cpu
def test_the_machine_is_measured(no_decisions):
    forward = INFO_NCE["cpu"].implementation.statistics
    product = rates.seconds_of_a_product(forward, torch.float32, 512)
    assert product >= 0  # a busy machine may measure no difference
    assert rates.seconds_of_traffic() > 0


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", ["info_nce", "contrastive"])
def test_bits_are_the_same_with_either_decision(monkeypatch, no_decisions, dtype, loss):
    monkeypatch.setattr(rates, "ALWAYS_USED_BYTES", 0)
    x, y = (torch.randn(300, 24).to(dtype).requires_grad_() for _ in range(2))

    def gradients(keeps: bool) -> tuple[torch.Tensor, ...]:
        monkeypatch.setattr(rates, "_decisions", {(dtype, 24): keeps})
        value = getattr(protoclip, loss)(x, y, 9.0, backend="cpu")
        return value, *torch.autograd.grad(value, (x, y))

    for stashed, formed_again in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(stashed, formed_again)


@needs_cpu
def test_rows_without_columns_are_measured_too(no_decisions):
    forward = INFO_NCE["cpu"].implementation.statistics
    assert rates.seconds_of_a_product(forward, torch.float32, 0) == 0
