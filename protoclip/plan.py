"""Plan a run before paying for it: ``python -m protoclip.plan --model RN50 --ranks 8 --card h100``.

Memory per rank, bytes on the wire, flop and predicted seconds, each by part.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from protoclip.config import ModelConfig, Parser
from protoclip.cost import CARDS, Card, Run, Shape, flop, measure_shape, memory, seconds, wire

PROG = "python -m protoclip.plan"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 2 for a user's mistake (one message on stderr)."""
    arguments = build_parser().parse_args(argv)
    try:
        run = _run(arguments)
        config = ModelConfig(
            model=arguments.model,
            projection_hidden_dim=arguments.projection_hidden_dim,
            projection_dim=arguments.projection_dim,
        )
        shape = measure_shape(config, run.amp)
    except ValueError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    card = CARDS[arguments.card]
    if arguments.json:
        print(json.dumps(plan(shape, run, card), indent=1))
    else:
        print(text(arguments.model, shape, run, card))
    return 0


def build_parser() -> Parser:
    parser = Parser(PROG, description=__doc__)
    for flag, default, words in (
        ("--batch-size", 256, "pairs per forward pass of a rank"),
        ("--accum-freq", 1, "forward passes a step"),
        ("--ranks", 1, "processes, a GPU each"),
        ("--k", 0, "prototypes per source; 0: a tenth of the episode"),
        ("--episode-size", 200_000, "samples per episode"),
        ("--samples", 3_000_000, "pairs in the dataset"),
        ("--teachers", 1, "external teachers; 0: internal prototypes only"),
        ("--external-teacher-dim", 64, "of a teacher's features"),
        ("--kmeans-max-iter", 20, "iterations of k-means"),
        ("--kmeans-nredo", 1, "restarts of k-means"),
        ("--projection-hidden-dim", 2048, "width of the projection heads"),
        ("--projection-dim", 128, "output of the projection heads"),
    ):
        parser.add_argument(
            flag,
            *(["--batch"] if flag == "--batch-size" else []),
            *(["--episode"] if flag == "--episode-size" else []),
            type=int,
            default=default,
            metavar="N",
            help=f"{words} (default: {default:,})",
        )
    for flag, word, choices, words in (
        ("--model", "RN50", None, "an OpenCLIP name or a config .json"),
        ("--method", "protoclip", ("protoclip", "clip"), "clip: InfoNCE alone"),
        ("--precision", "amp_bf16", ("amp_bf16", "fp32"), "of the forward pass"),
        ("--episode-features", "reuse", ("extract", "reuse"), "extract: a forward pass for them"),
        ("--card", "h100", sorted(CARDS), "whose speeds are assumed"),
    ):
        words += " (default: %(default)s)"
        parser.add_argument(flag, default=word, choices=choices, help=words)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _run(arguments: argparse.Namespace) -> Run:
    values = vars(arguments)
    low = [name for name, value in values.items() if isinstance(value, int) and value < 0]
    zero = [name for name in ("batch_size", "accum_freq", "ranks") if not values[name]]
    if low or zero:
        flag = (low or zero)[0]
        raise ValueError(
            f"--{flag.replace('_', '-')}: expected at least {1 if zero else 0}, got {values[flag]}"
        )
    episode = arguments.episode_size or arguments.samples
    run = Run(
        batch_size=arguments.batch_size,
        accum_freq=arguments.accum_freq,
        ranks=arguments.ranks,
        samples=arguments.samples,
        episode=episode,
        clusters=arguments.k or max(1, episode // 10),
        sources=0 if arguments.method == "clip" else 2 + arguments.teachers,
        teacher_dim=arguments.external_teacher_dim,
        iterations=arguments.kmeans_max_iter,
        restarts=arguments.kmeans_nredo,
        amp=arguments.precision == "amp_bf16",
        reuse=arguments.episode_features == "reuse",
    )
    if run.sources and run.clusters > run.episode:
        raise ValueError(f"--k: expected at most --episode-size {run.episode}, got {run.clusters}")
    return run


def plan(shape: Shape, run: Run, card: Card) -> dict[str, Any]:
    """Everything the command says, as numbers: bytes, flop, seconds."""
    step_wire, episode_wire = wire(shape, run)
    step_flop, episode_flop = flop(shape, run)
    return {
        "run": {**dataclasses.asdict(run), "global_batch": run.global_batch, "steps": run.steps},
        "card": dataclasses.asdict(card),
        "weights": shape.weights,
        "memory_bytes": memory(shape, run, card),
        "wire_bytes_step": step_wire,
        "wire_bytes_episode": episode_wire,
        "flop_step": step_flop,
        "flop_episode": episode_flop,
        "seconds_episode": seconds(shape, run, card),
    }


def text(model: str, shape: Shape, run: Run, card: Card) -> str:
    """The same, for people."""
    numbers = plan(shape, run, card)
    total = sum(numbers["memory_bytes"].values())
    spent = sum(numbers["seconds_episode"].values())
    epoch = run.samples / run.episode * spent
    fits = total < card.memory_bytes
    full = "" if fits else f" - MORE than the card's {_bytes(card.memory_bytes)}"
    blocks = [
        f"{model}, {shape.weights / 1e6:,.1f} M weights; {run.ranks:,} ranks of {card.name}; batch "
        f"{run.global_batch:,}\n= {run.batch_size:,} x {run.accum_freq} passes x {run.ranks:,} "
        f"ranks; {run.steps:,} steps an episode of {run.episode:,}",
        _block("Memory per rank at the peak of a step" + full, numbers["memory_bytes"], _bytes),
    ]
    for title, key in (
        ("Bytes a rank sends in a step", "wire_bytes_step"),
        ("Bytes a rank sends in an episode, beside its steps", "wire_bytes_episode"),
    ):
        if numbers[key]:
            blocks.append(_block(title, numbers[key], _bytes))
    for title, key in (
        ("Flop of a rank in a step", "flop_step"),
        ("Flop of a rank in an episode, beside its steps", "flop_episode"),
    ):
        if numbers[key]:
            blocks.append(_block(title, numbers[key], lambda f: f"{f / 1e12:,.3f} T"))
    blocks.append(
        _block(
            "Predicted seconds of an episode", numbers["seconds_episode"], lambda s: f"{s:,.2f} s"
        )
        + f"\n  {run.episode / spent:,.0f} samples a second; {epoch:,.0f} s a pass over "
        f"{run.samples:,} samples, if reading data keeps up"
    )
    blocks.append(
        f"Assumptions: {card.source}. The all-reduce of gradients hides behind the backward pass; "
        "nothing else overlaps. Predictions, not measurements: expect more, not less; memory is "
        "checked by a test on CPUs."
    )
    return "\n\n".join(blocks)


def _block(title: str, parts: Mapping[str, float], show: Any) -> str:
    lines = [f"{title}: {show(sum(parts.values()))}"]
    lines += [f"  {name:<42}{show(value):>14}" for name, value in parts.items()]
    return "\n".join(lines)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"


if __name__ == "__main__":
    sys.exit(main())
