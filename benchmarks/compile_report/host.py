"""What a step costs on the host, where launches are what a small batch costs: no GPU needed.

    python -m benchmarks.compile_report.host [N ...]

A forward and backward pass goes through the whole Python path with a driver that launches nothing
(``launches.py``); torch's own kernels around it run on the CPU. Memory is not given back to the
system, as a GPU's is not. Beside it the plain formula in eager torch on two tiny rows: dispatch
alone. Neither has the driver's launch (about 3 us a kernel) nor the library's products: compare
them with each other. And what the device is predicted to work on it, an H100 by the model.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import protoclip
from benchmarks.compile_report import model, report
from benchmarks.compile_report.launches import Case, without_a_card

Step = Callable[[], object]
LABELS = torch.arange(1 << 15)


def _leaves(n: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.zeros(n, d, dtype=torch.bfloat16, requires_grad=True)
    y = torch.zeros(n, d, dtype=torch.bfloat16, requires_grad=True)
    return x, y, torch.tensor(14.3, requires_grad=True), torch.tensor(-10.0, requires_grad=True)


def _step(loss: Callable[[], Tensor], *leaves: Tensor) -> Step:
    return lambda: torch.autograd.grad(loss(), leaves)


def ours(n: int) -> dict[str, Step]:
    x, y, scale, bias = _leaves(n, 512)
    features = torch.zeros(n, 128, dtype=torch.bfloat16, requires_grad=True)
    prototypes = torch.zeros(PROTOTYPES, 128, dtype=torch.bfloat16)
    info_nce = partial(protoclip.info_nce, x, y, scale, backend="triton")
    siglip = partial(protoclip.ops.sigmoid_loss, x, y, scale, bias, backend="triton")
    cross_entropy = partial(
        protoclip.prototype_cross_entropy,
        features,
        prototypes,
        LABELS[:n] % PROTOTYPES,
        scale.detach(),
        backend="triton",
    )
    return {
        "InfoNCE": _step(info_nce, x, y, scale),
        "InfoNCE with ids": _step(partial(info_nce, ids=LABELS[:n] // 2), x, y, scale),
        "SigLIP": _step(siglip, x, y, scale, bias),
        "prototypes": _step(cross_entropy, features),
    }


def eager() -> dict[str, Step]:
    """The plain formulas, as users write them."""
    x, y, scale, bias = _leaves(2, 8)
    labels = LABELS[:2]
    seen = torch.eye(2, dtype=torch.bool)

    def info_nce() -> Tensor:
        logits = scale * (x @ y.T).float()
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    def with_ids() -> Tensor:
        ids = labels // 2
        hidden = (ids[:, None] == ids) & ~seen
        logits = (scale * (x @ y.T).float()).masked_fill(hidden, -torch.inf)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    def siglip() -> Tensor:
        logits = scale * (x @ y.T).float() + bias
        return -F.logsigmoid((2 * seen.float() - 1) * logits).sum()

    def cross_entropy() -> Tensor:
        return F.cross_entropy(scale.detach() * (x @ y.detach().T).float(), labels)

    return {
        "InfoNCE": _step(info_nce, x, y, scale),
        "InfoNCE with ids": _step(with_ids, x, y, scale),
        "SigLIP": _step(siglip, x, y, scale, bias),
        "prototypes": _step(cross_entropy, x),
    }


PROTOTYPES = 5000
SMALL_US = 3.0  # of a kernel without products (6,300 clk merge 1,024 pairs), and of any product
PRODUCT_RATE = 660e12  # of the library's products
CASES = {  # up to FEW pairs and beyond
    "InfoNCE": ("info_nce", "small", "large"),
    "InfoNCE with ids": ("contrastive", "few ids", "ids"),
    "SigLIP": ("sigmoid_loss", "gradients", "gradients"),
    "prototypes": ("prototypes", "soft", "soft"),
}
FEW = 2048


def device_us(costs: list[report.Cost], n: int, launched: list[str], num_products: int) -> float:
    """Of a step's kernels on an H100: those over tiles by the model, the products by their FLOPs,
    the others as long as a small one takes."""
    names = [name.removesuffix("_kernel") for name in launched]
    tiled = [cost for cost in costs if cost.clk.products and cost.kernel in names]
    us = SMALL_US * sum(name not in {cost.kernel for cost in tiled} for name in names)
    us += num_products * max(SMALL_US, 2e6 * n * n * 512 / PRODUCT_RATE)
    for cost in tiled:
        m = PROTOTYPES if cost.kernel == "attention" else n
        diagonal = 0.0 if cost.slice is None else cost.slices * cost.slice.clk
        if cost.op == "info_nce":  # goes slice by slice where fp32 cannot bridge references only
            diagonal = 1.05 * cost.clk.products + cost.masked
        us += max(1e3 * report.bound(cost, (n, m)).ms, 1e6 * diagonal / model.CLOCK)
    return us


def keep_memory() -> None:
    """Let the C library keep what it was given back: mapping it again would be measured."""
    m_mmap_max = -4
    m_trim_threshold = -1
    library = ctypes.CDLL(None)
    library.mallopt(m_mmap_max, 0)
    library.mallopt(m_trim_threshold, 1 << 30)


def least_us(step: Step) -> float:
    """Of at least twenty runs in 0.3 s, after one that compiles."""
    step()
    times: list[float] = []
    while len(times) < 20 or sum(times) < 0.3:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e6 * min(times)


def main() -> None:
    torch.set_num_threads(1)
    keep_memory()
    sizes = [int(n) for n in sys.argv[1:]] or [256, 1024, 4096, 32_768]
    plain = {op: least_us(step) for op, step in eager().items()}
    costs: dict[tuple[str, str], list[report.Cost]] = {}
    for kernels, small, large in CASES.values():
        for form in {small, large}:
            depth = 128 if kernels == "prototypes" else 512
            costs[kernels, form] = report.costs(Case(90, kernels, form, "bf16", depth))
    with without_a_card(90) as launched:
        for n in sizes:
            for op, step in ours(n).items():
                step()
                launched.clear()
                step()
                num_launched = len(launched)
                kernels, small, large = CASES[op]
                device = device_us(
                    costs[kernels, large if n > FEW else small],
                    n,
                    launched,
                    num_products=0 if op == "prototypes" else 2,
                )
                print(
                    f"{op} N={n}: {least_us(step):.0f} us, {num_launched} Triton kernels; eager "
                    f"torch {plain[op]:.0f} us; device {device:.0f} us",
                    flush=True,
                )


if __name__ == "__main__":
    main()
