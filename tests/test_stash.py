"""Logits are kept for the backward pass where that is faster; no bit depends on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from protoclip.ops import stash
from protoclip.ops.stash import CACHED_BYTES, STASH_BYTES, stash_bytes

FP32 = torch.float32
BF16 = torch.bfloat16


class Measured(NamedTuple):
    """A case of the table in docs/speed.md, and which form was faster."""

    n: int
    d: int
    dtype: torch.dtype
    kept_is_faster: bool


def measured_cases() -> list[Measured]:
    page = Path(__file__).parents[1] / "docs" / "speed.md"
    cases = []
    for row in re.findall(r"^\| N = ([\d,]+), D = (\d+) \|(.*)\|$", page.read_text(), re.MULTILINE):
        n = int(row[0].replace(",", ""))
        d = int(row[1])
        bf16_kept, _, fp32_kept, _ = row[2].split("|")
        cases.append(Measured(n, d, BF16, "**" in bf16_kept))
        cases.append(Measured(n, d, FP32, "**" in fp32_kept))
    assert len(cases) == 10
    return cases


@pytest.mark.parametrize("case", measured_cases(), ids=str)
def test_the_faster_form_is_taken(case: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stash, "has_amx", lambda: False)
    assert bool(stash_bytes(case.n, case.n, case.d, case.dtype)) == case.kept_is_faster


def test_with_amx_short_products_of_bf16_are_formed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stash, "has_amx", lambda: True)
    assert stash_bytes(4096, 4096, 512, FP32) == STASH_BYTES
    assert stash_bytes(4096, 4096, 512, BF16) == 0
    assert stash_bytes(4096, 4096, 768, BF16) == STASH_BYTES


def test_logits_that_stay_in_the_caches_are_always_kept() -> None:
    assert stash_bytes(1024, 2048, 1, BF16) == CACHED_BYTES
    assert stash_bytes(1024, 2049, 1, BF16) == 0


def test_there_is_a_most() -> None:
    assert stash_bytes(4096, 4097, 4096, FP32) == 0


def test_a_stash_holds_whole_tiles() -> None:
    assert stash_bytes(129, 257, 64, FP32, tile=(128, 256)) == 4 * 256 * 512
