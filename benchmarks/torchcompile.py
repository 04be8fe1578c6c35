"""What ``--torchcompile`` gives on this machine, compile time counted.

``python -m benchmarks.torchcompile [--model NAME]``: steps of InfoNCE with heads and a teacher's
prototypes, eager and compiled in turn, on random pictures; the first compiled step compiles.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch._inductor.config

from benchmarks import machine
from benchmarks.step_table import episode_of, weights_of
from protoclip.data import Batch
from protoclip.losses import ProtoLoss
from protoclip.model import build_model, choose_precision, put_channels_last
from protoclip.settings.config import ModelConfig, OptimConfig
from protoclip.training.step import Stepper

CASE = "ProtoCLIP, a teacher's prototypes"


def timed_step(
    model_name: str, pairs: int, device: torch.device, compiled: bool
) -> Callable[[], float]:
    """A function that takes a step and returns its milliseconds."""
    config = ModelConfig(model=model_name, torchcompile=compiled)
    torch.manual_seed(0)
    model = build_model(config).to(device)
    put_channels_last(model, device)
    with device:
        episode = episode_of(CASE, pairs, model.projection_dim)
    stepper = Stepper(
        model,
        ProtoLoss(weights_of(CASE)),
        OptimConfig(),
        choose_precision("auto", device),
        compiled=compiled,
    )
    pixels = torch.randn(pairs, 3, model.image_size, model.image_size)
    texts = [" ".join(["red"] * (1 + number % 8)) for number in range(pairs)]
    batch = Batch(torch.arange(pairs), pixels, model.short_tokenizer(texts))

    def take() -> float:
        began = time.perf_counter()
        stepper.step(0, [batch], episode, project=True, lr=1e-4)
        machine.sync()
        return 1e3 * (time.perf_counter() - began)

    return take


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="protoclip-icons")
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12, help="of each kind")
    arguments = parser.parse_args(argv)
    device = torch.device(machine.DEVICE)
    torch._inductor.config.force_disable_caches = True  # nothing compiled earlier helps
    eager = timed_step(arguments.model, arguments.pairs, device, compiled=False)
    compiled = timed_step(arguments.model, arguments.pairs, device, compiled=True)
    eager()
    compiling_ms = compiled()
    eager_ms: list[float] = []
    compiled_ms: list[float] = []
    for _ in range(arguments.steps):
        eager_ms.append(eager())
        compiled_ms.append(compiled())
    slow = statistics.median(eager_ms)
    fast = statistics.median(compiled_ms)
    gain = "never" if fast >= slow else f"after {compiling_ms / (slow - fast):,.0f} steps"
    print(
        f"{machine.name()}, {torch.get_num_threads()} threads; {arguments.model}, "
        f"{arguments.pairs} pairs: eager {slow:.0f} ms, compiled {fast:.0f} ms "
        f"({slow / fast:.2f} times), first step {compiling_ms / 1e3:.0f} s, won back {gain}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
