"""Every op and backend beside what people use instead: parity first, then time.

``pytest benchmarks/ --benchmark-only``; quick sizes for two cores. A backend not usable here
is a skipped row with its reason.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import protoclip
from protoclip.ops.backends import TABLE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def unit(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(*shape, device=DEVICE), dim=1).to(dtype)


def openclip_loss(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """OpenCLIP's ClipLoss, or a skip where it is not installed."""
    loss = pytest.importorskip("open_clip.loss").ClipLoss()
    with torch.autocast(DEVICE, dtype=x.dtype, enabled=x.dtype != torch.float32):
        return loss(x, y, s)


def authors_prototype_loss(h: Tensor, c: Tensor, labels: Tensor, s: Tensor, source: Tensor):
    """Two matmuls, a teacher softmax, cross-entropy with probabilities: [N, K] several times."""
    target = torch.softmax(source[labels] @ source.T / 0.01, dim=1)
    return F.cross_entropy(s * h @ c.T, target)


@dataclass(frozen=True)
class Case:
    op: str
    inputs: Callable[[], tuple]
    ours: Callable[..., object]  # (backend, *inputs)
    peers: dict[str, Callable[..., object]]
    flop: float
    backward: bool = False


N, D, K = (4096, 512, 4096) if DEVICE == "cuda" else (2048, 512, 2048)


def _info_nce_inputs(dtype: torch.dtype) -> tuple:
    x, y = (unit(N, D, dtype=dtype).requires_grad_() for _ in range(2))
    return x, y, torch.tensor(14.3, device=DEVICE, requires_grad=True)


def _prototype_inputs() -> tuple:
    torch.manual_seed(0)
    h, c, source = unit(N, 128).requires_grad_(), unit(K, 128), unit(K, 128)
    labels = torch.randint(0, K, (N,), device=DEVICE)
    scale = torch.tensor(14.3, device=DEVICE, requires_grad=True)
    return h, c, labels, scale, source, protoclip.soft_targets(source, c, 0.01)


def _labels_inputs() -> tuple:
    torch.manual_seed(0)
    return torch.randn(50_000, 128, device=DEVICE), torch.randint(0, 5000, (50_000,), device=DEVICE)


CASES = {
    f"info_nce-{str(dtype)[6:]}": Case(
        "info_nce",
        lambda dtype=dtype: _info_nce_inputs(dtype),
        lambda backend, *a: protoclip.info_nce(*a, backend=backend),
        {"open_clip": openclip_loss},
        flop=8.0 * N * N * D,
        backward=True,
    )
    for dtype in (torch.float32, torch.bfloat16)
} | {
    "prototype_cross_entropy": Case(
        "prototype_cross_entropy",
        _prototype_inputs,
        lambda backend, h, c, labels, s, source, m: protoclip.prototype_cross_entropy(
            h, c, labels, s, targets=m, backend=backend
        ),
        {
            "authors": lambda h, c, labels, s, source, m: authors_prototype_loss(
                h, c, labels, s, source
            )
        },
        flop=4.0 * N * K * 128,
        backward=True,
    ),
    "kmeans_assign": Case(
        "kmeans_assign",
        lambda: (torch.randn(16384, 128, device=DEVICE), torch.randn(1024, 128, device=DEVICE)),
        lambda backend, x, c: protoclip.kmeans_assign(x, c, backend=backend)[1].sum(),
        {"cdist": lambda x, c: torch.cdist(x, c).min(dim=1).values.square().sum()},
        flop=2.0 * 16384 * 1024 * 128,
    ),
    "segment_mean": Case(
        "segment_mean",
        _labels_inputs,
        lambda backend, v, y: protoclip.segment_mean(v, y, 5000, backend=backend)[0].sum(),
        {
            # With the counts and the division that a mean needs; the bare sum takes less.
            "index_add+bincount": lambda v, y: (
                torch.zeros(5000, 128, device=DEVICE).index_add_(0, y, v)
                / torch.bincount(y, minlength=5000).clamp_min(1)[:, None]
            ).sum()
        },
        flop=50_000.0 * 128,
    ),
}


def rows() -> list:
    return [
        pytest.param(name, row, id=f"{name}-{row}")
        for name, case in CASES.items()
        for row in (*TABLE[case.op], *case.peers)
    ]


@pytest.mark.parametrize(("name", "row"), rows())
def test_op(benchmark, name: str, row: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    inputs = case.inputs()
    if row in case.peers:
        forward = case.peers[row]
    else:
        reason = protoclip.backends(case.op)[row]
        if reason is not None or DEVICE not in (TABLE[case.op][row].device_types or (DEVICE,)):
            pytest.skip(reason or f"not for {DEVICE} tensors")

        def forward(*a: object) -> object:
            return case.ours(row, *a)

    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]

    def step() -> float:
        out = forward(*inputs)
        if case.backward:
            torch.autograd.grad(out, leaves)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return out

    # bf16 peers round the logits themselves; ours is held to the tighter bound by the tests.
    want = case.ours("reference", *inputs)
    torch.testing.assert_close(step().float(), want.float(), rtol=2e-2, atol=1e-3)
    benchmark.group = name
    benchmark.pedantic(step, rounds=7, warmup_rounds=2)
    best = benchmark.stats.stats.min if benchmark.stats else None
    if best:
        benchmark.extra_info["gflop_per_s"] = round(case.flop / best / 1e9, 1)
    benchmark.extra_info["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
