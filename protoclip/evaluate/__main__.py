"""``protoclip evaluate MODEL``: evaluate any CLIP on any data; prints a table, writes JSON."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from tqdm import tqdm

from protoclip import checkpoint, distributed
from protoclip.commands import PROTOCOLS, TASKS, evaluate_parser
from protoclip.config import TABLE, ModelConfig, TrainConfig, from_dict, output_file
from protoclip.evaluate import results, tasks
from protoclip.evaluate.datasets import open_layout
from protoclip.evaluate.tasks import Encoder
from protoclip.model import (
    ProtoModel,
    autocast_for,
    build_model,
    check_model,
    choose_device,
    choose_precision,
    put_channels_last,
)

PROG = "protoclip evaluate"
TIMEOUT = 3600.0  # seconds that a rank waits for the slowest slice
RANDOM = "random"
WEIGHTS = ("local-dir:", "hf-hub:")  # prefixes of names that include weights


def parse_tasks(text: str) -> tuple[str, ...]:
    """ "zeroshot,knn" -> those tasks in order; "" and "all" -> all of them."""
    wanted = {name.strip() for name in text.split(",") if name.strip()} - {"all"}
    if unknown := sorted(wanted - set(TASKS)):
        raise ValueError(f"--tasks: expected all or some of {','.join(TASKS)}, got {unknown[0]!r}")
    return tuple(name for name in TASKS if name in wanted or not wanted)


@dataclass(frozen=True)
class Loaded:
    """A model to evaluate, on the CPU, and where it came from."""

    model: ProtoModel
    name: str  # OpenCLIP's model name
    pretrained: str  # checkpoint or tag
    config: TrainConfig | None = None  # of the run that trained it


def load_model(what: str, pretrained: str = "", model: str = "") -> Loaded:
    """Load the MODEL of the command line.

    Args:
        what: a run folder or a checkpoint, an OpenCLIP name, a model config .json,
            "local-dir:PATH" or "hf-hub:ID".
        pretrained: OpenCLIP's tag or a weights file for a name; "random": as initialised.
        model: the OpenCLIP name for a checkpoint that does not hold its own.
    """
    if what.startswith(WEIGHTS) or what.endswith(".json"):
        return _by_name(what, pretrained)
    if not os.path.exists(what) and os.sep not in what:
        try:
            check_model(ModelConfig(model=what))
        except ValueError as error:
            reason = str(error).removeprefix("--model: ")
            raise ValueError(f"{what}: found no run and no checkpoint there; {reason}") from error
        return _by_name(what, pretrained)
    path, payload = checkpoint.load_newest(what)
    stored = payload.get("protoclip", {}).get("config")
    if stored is None:
        if not model:
            raise ValueError(
                f"{path}: expected a checkpoint of protoclip.train, got another one; give the "
                "OpenCLIP name or config file of its model as --model"
            )
        return dataclasses.replace(_by_name(model, str(path)), pretrained=str(path))
    config = from_dict(TrainConfig, stored)
    # The weights come from the checkpoint; those that training started from may be gone.
    architecture = model or config.model.model
    built = build_model(dataclasses.replace(config.model, model=architecture, pretrained=""))
    built.load_state(payload)
    return Loaded(built, config.model.model, str(path), config)


def _by_name(name: str, pretrained: str) -> Loaded:
    weights = "" if pretrained == RANDOM or name.startswith(WEIGHTS) else pretrained
    if not pretrained and not name.startswith(WEIGHTS):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "this model has none"
        raise ValueError(
            f"{name}: --pretrained is missing: a weights file, {RANDOM} for none, or a tag ({tags})"
        )
    if pretrained == RANDOM:
        torch.manual_seed(0)
    model = build_model(ModelConfig(model=name, pretrained=weights, add_projection_head=False))
    return Loaded(model, name, pretrained or name)


@contextmanager
def open_encoder(model: ProtoModel, args: argparse.Namespace, what: str) -> Iterator[Encoder]:
    """An encoder with a progress bar, from --device, --precision, --batch-size and --workers."""
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    autocast = autocast_for(precision, device)
    shown = None if distributed.is_main() else True  # None: where stderr is a terminal
    model.to(device)
    put_channels_last(model, device)
    with tqdm(desc=what, unit=" rows", leave=False, disable=shown) as bar:
        yield Encoder(model, device, args.batch_size, args.workers, autocast, bar)
        bar.refresh()  # the last updates may have come too fast to show


def run(args: argparse.Namespace) -> None:
    """Run the command; rank 0 writes the files and prints the table."""
    started = time.perf_counter()
    wanted = parse_tasks(args.tasks)
    output = output_file(args.output or _output(args), "--output")
    loaded = load_model(args.what, args.pretrained, args.model)
    config = loaded.config or TrainConfig()
    data = args.data or _own_data(loaded.config)
    columns = {name: vars(args).get(name, getattr(config.data, name)) for name in TABLE}
    columns["seed"] = config.run.seed if args.seed is None else args.seed
    columns |= {name: getattr(args, name) for name in ("split", "templates", "csv_label_key")}
    layout = open_layout(data, **columns)
    notes = []
    for task, reason in tasks.impossible(wanted, layout).items():
        if args.tasks not in ("", "all"):
            raise ValueError(f"--tasks {task}: {reason} ({data}); leave that task out")
        notes.append(f"Without {task}: {reason}.")
    seconds, started = {"loading": time.perf_counter() - started}, time.perf_counter()
    with open_encoder(loaded.model, args, "evaluating") as encoder:
        sets, train = tasks.encode_sets(encoder, layout, wanted)
        found = tasks.evaluate_features(sets, train, tasks=wanted, protocol=args.protocol)
    if not distributed.is_main():
        return
    seconds["evaluation"] = took = time.perf_counter() - started
    peak = tasks.peak_memory_bytes(encoder.device)
    outcome = results.Outcome(data, loaded.name, loaded.pretrained, found, None, seconds, peak)
    if output.is_file() and not args.tasks:
        earlier = results.read_results(output)
        if earlier.data == data and earlier.untrained is not None:
            # The values from training belong in the same table.
            outcome = dataclasses.replace(
                earlier, trained=found, model=loaded.name, pretrained=loaded.pretrained
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    results.write_results(output, outcome)
    folder = output.parent / "clip_benchmark"
    results.write_records(folder, outcome)
    ranks = distributed.world_size()
    words = f" on {ranks} ranks" if ranks > 1 else ""
    notes.append(f"Evaluated in {took:.1f} s{words}, written to {output}")
    print(results.format_table(outcome), *notes, f"CLIP_benchmark's JSON: {folder}", sep="\n")


def _own_data(config: TrainConfig | None) -> str:
    """The evaluation data of the run's training."""
    if config is None:
        raise ValueError("--data: expected data to evaluate the model on, got none; see --help")
    data = config.data
    if data.val_data or data.train_data.startswith("builtin:"):
        return data.val_data or data.train_data
    raise ValueError(f"the run was trained on all of {data.train_data}; give --data to evaluate on")


def _output(args: argparse.Namespace) -> Path:
    """results.json of the run for its own evaluation, a longer name for any other one."""
    path, protocol = Path(args.what), args.protocol.replace(PROTOCOLS[0], "")
    parts, folder = ["results", args.data, args.tasks, protocol], path
    if not path.is_dir():
        folder = path.parent if path.is_file() else Path(".")
        parts = [path.stem if path.is_file() else f"{args.what}-{args.pretrained}", *parts]
    slugs = [re.sub(r"[^A-Za-z0-9]+", "_", part).strip("_")[-60:] for part in parts]
    return folder / ("-".join(filter(None, slugs)) + ".json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake prints one line and gives status 2."""

    def work() -> None:
        info = distributed.find_rank()
        with distributed.quiet_beside_main(info):
            args = evaluate_parser().parse_args(argv)
        distributed.start(info, choose_device(args.device), TIMEOUT)
        run(args)

    return distributed.run_command(work, PROG)


if __name__ == "__main__":
    sys.exit(main())
