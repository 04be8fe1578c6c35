"""Logits are kept for the backward pass where that is faster; no bit depends on it."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from protoclip.ops import stash
from protoclip.ops.stash import CACHED_BYTES, STASH_BYTES, stash_bytes

FP32 = torch.float32
BF16 = torch.bfloat16


class Measured(NamedTuple):
    """InfoNCE forward and backward on two Zen 4 cores (2026-11-28): ms with the logits kept, and
    with a fourth product in their place."""

    n: int
    d: int
    dtype: torch.dtype
    kept: float
    again: float


MEASURED = [
    Measured(4096, 64, BF16, 46.0, 41.8),
    Measured(4096, 64, FP32, 61.5, 65.4),
    Measured(4096, 128, BF16, 52.9, 58.7),
    Measured(4096, 128, FP32, 84.9, 101.5),
    Measured(4096, 256, BF16, 95.8, 111.8),
    Measured(4096, 256, FP32, 155.5, 197.4),
    Measured(4096, 512, BF16, 187.6, 226.3),
    Measured(4096, 512, FP32, 298.7, 386.2),
    Measured(2048, 512, BF16, 52.2, 62.2),
    Measured(2048, 512, FP32, 73.6, 93.2),
]


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_the_faster_form_is_taken(case: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stash, "has_amx", lambda: False)
    assert bool(stash_bytes(case.n, case.n, case.d, case.dtype)) == (case.kept < case.again)


def test_with_amx_short_products_of_bf16_are_formed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stash, "has_amx", lambda: True)
    assert stash_bytes(4096, 4096, 512, FP32) == STASH_BYTES
    assert stash_bytes(4096, 4096, 512, BF16) == 0
    assert stash_bytes(4096, 4096, 768, BF16) == STASH_BYTES


def test_logits_that_stay_in_the_caches_are_always_kept_and_there_is_a_most() -> None:
    assert stash_bytes(1024, 2048, 1, BF16) == CACHED_BYTES
    assert stash_bytes(1024, 2049, 1, BF16) == 0
    assert stash_bytes(4096, 4097, 4096, FP32) == 0


def test_a_stash_holds_whole_tiles() -> None:
    assert stash_bytes(129, 257, 64, FP32, tile=(128, 256)) == 4 * 256 * 512
