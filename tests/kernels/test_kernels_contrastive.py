"""Triton's contrastive loss against the sets written out, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from budget import leaf, loss_and_gradients
from kernel_features import DEVICE, features
from op_table import (
    Draw,
    Relation,
    Size,
    assert_as_formula,
    contrastive,
    make_contrastive,
    make_contrastive_parts,
    make_info_nce,
    weighted,
)

import protoclip

REASON = protoclip.backends("contrastive")["triton"]
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's, of inf and NaN
]


@pytest.mark.parametrize(
    "kind, dtype, with_bias",
    [
        ("cones", torch.float16, False),
        ("outcasts", torch.float32, False),
        ("outcasts", torch.float16, False),
        ("buried", torch.float32, False),
        ("buried", torch.bfloat16, True),
        ("shallow", torch.bfloat16, False),
    ],
)
def test_references_of_a_sample_serve_any_tile(
    kind: str, dtype: torch.dtype, with_bias: bool
) -> None:
    """Most tiles hold no pair. The columns that one looks at are 280 binary orders below the
    others, or 50, which its sums still bridge."""
    x, y = features(160, 20, "alike" if kind == "shallow" else kind, dtype)
    x, y = x.cpu(), y.cpu()
    position = torch.arange(160)
    if kind == "shallow":
        y[position % 64 < 8] *= 0.6
    bias = torch.where(position % 3 == 0, -2.0, 1.5) if with_bias else None
    ids = position // 2
    relation = Relation(query_ids=ids, key_ids=ids, key_bias=bias)
    assert_as_formula(contrastive(x, y, 100.0, relation), "triton", DEVICE)


def test_large_weights_of_small_sums_do_not_overflow() -> None:
    """A row 58 binary orders below the others of its warp, and these as far below the rest of the
    tile: the gradient divides by the one, multiplies by the other, and a scaled loss may be large.
    """
    torch.manual_seed(0)
    x = F.normalize(4 + torch.randn(160, 20), dim=1)
    y = x.to(DEVICE)
    x = x * torch.where(torch.arange(160) % 32 < 16, 0.6, 1.0)[:, None]
    x[3] /= 3
    call = weighted(contrastive(x, y.cpu(), 100.0), 2.0**24)
    assert_as_formula(call, "triton", DEVICE)


def test_a_positive_that_leads_counts_exactly_one() -> None:
    """Also where its warp's reference, of another row, is far above it: the loss is then no
    difference of large numbers, and never negative."""
    torch.manual_seed(0)
    y = F.normalize(0.5 + torch.randn(160, 64), dim=1)
    y[64] = F.normalize(y[5] + 0.02 * torch.randn(64), dim=0)  # in a column that is sampled
    x = y.clone()
    x[[1, 7, 11]] *= torch.tensor([0.9, 0.8, 0.93])[:, None]  # of the same warp as row 5
    losses = protoclip.contrastive(
        x.to(DEVICE), y.to(DEVICE), 43.0, positives=torch.arange(160, device=DEVICE),
        reduction="none", backend="triton",
    )  # fmt: skip
    assert (losses >= 0).all()
    assert (losses[[1, 7, 11]] == 0).all()  # exactly: below 1e-8


def test_many_waves_and_chunks_are_within_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds so small that few rows take several of each."""
    from protoclip.kernels import contrastive as kernels
    from protoclip.kernels import waves

    monkeypatch.setattr(kernels, "PARTIAL_BYTES", 1)
    monkeypatch.setattr(waves, "GRADIENT_BYTES", 64 * 128 * 4)
    groups = make_contrastive_parts(Size(100, 150, 12), torch.float32, relation="groups")
    assert_as_formula(groups, "triton", DEVICE)
    ids = make_info_nce(Size(100, 100, 20), torch.bfloat16, id_columns=2, reduction="mean")
    assert_as_formula(weighted(ids, 3.0), "triton", DEVICE)


@pytest.mark.parametrize("m", [150, 8193])
def test_codes_tell_ids_apart(m: int) -> None:
    """That differ in the upper half only, that are negative, that no key has; of few keys by
    comparing them all, of many by a sort."""
    from protoclip.ops import id_codes

    torch.manual_seed(0)
    key_ids = torch.randint(-20, 20, (m, 2), device=DEVICE) * 2**32 + 7
    query_ids = torch.randint(-25, 25, (90, 2), device=DEVICE) * 2**32 + 7
    equal = (query_ids[:, None] == key_ids[None]).permute(2, 0, 1)
    alike = (key_ids[:200, None] == key_ids[None]).permute(2, 0, 1)
    codes = id_codes.coder_of("triton")(query_ids, key_ids)
    assert codes.query.dtype == codes.key.dtype == torch.int32
    assert torch.equal(codes.query[:, :, None] == codes.key[:, None], equal)
    assert torch.equal(codes.key[:, :200, None] == codes.key[:, None], alike)
    assert torch.equal(codes.query == -1, ~equal.any(dim=2))
    assert codes.key.min() >= 0 and codes.key.max() < m


def test_fp16_keeps_small_weights() -> None:
    call = make_contrastive(
        Size(40, 70, 16), torch.float16, relation="own, same ids", logit_scale=30.0
    )
    assert_as_formula(weighted(call, 1e-6), "triton", DEVICE)


def test_a_pair_whose_id_all_others_share_costs_exactly_nothing() -> None:
    image, text = (x.to(DEVICE) for x in Draw(0).pairs(Size(70, 70, 20), "cone"))
    leaves = {"image": leaf(image), "text": leaf(text)}
    ids = torch.zeros(70, 2, dtype=torch.int64, device=DEVICE)
    loss = protoclip.info_nce(leaves["image"], leaves["text"], 100.0, ids=ids, backend="triton")
    results = loss_and_gradients(loss, **leaves)
    assert all((value == 0).all() for value in results.values())
