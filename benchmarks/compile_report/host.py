"""What a step costs on the host, where launches are what a small batch costs: no GPU needed.

    python -m benchmarks.compile_report.host [N ...]

A forward and backward pass goes through the whole Python path with a driver that launches nothing
(``launches.py``); torch's own kernels around it run on the CPU, where they take longer than a
launch. Beside it the plain formula in eager torch on two tiny rows: dispatch alone. Neither has the
driver's launch (about 3 us a kernel) nor the library's products: compare them with each other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import protoclip
from benchmarks.compile_report.launches import without_a_card

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
    prototypes = torch.zeros(5000, 128, dtype=torch.bfloat16)
    info_nce = partial(protoclip.info_nce, x, y, scale, backend="triton")
    siglip = partial(protoclip.ops.sigmoid_loss, x, y, scale, bias, backend="triton")
    cross_entropy = partial(
        protoclip.prototype_cross_entropy,
        features,
        prototypes,
        LABELS[:n] % 5000,
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
    sizes = [int(n) for n in sys.argv[1:]] or [256, 1024, 4096, 32_768]
    plain = {op: least_us(step) for op, step in eager().items()}
    with without_a_card(90) as launched:
        for n in sizes:
            for op, step in ours(n).items():
                step()
                launched.clear()
                step()
                kernels = len(launched)
                print(
                    f"{op} N={n}: {least_us(step):.0f} us, {kernels} Triton kernels; eager torch "
                    f"{plain[op]:.0f} us",
                    flush=True,
                )


if __name__ == "__main__":
    main()
