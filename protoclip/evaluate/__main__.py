"""``protoclip evaluate MODEL``: evaluate any CLIP on any data; prints a table, writes JSON."""

from __future__ import annotations

import sys

from protoclip.settings.commands import show_help

if __name__ == "__main__":  # answered before the imports below, which take seconds
    show_help("evaluate", sys.argv[1:])

import argparse
import dataclasses
import os
import re
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

from protoclip import distributed
from protoclip.common.files import short_name
from protoclip.common.paths import output_file
from protoclip.data import data_kind
from protoclip.data.settings import open_run_data
from protoclip.evaluate import results, tasks
from protoclip.evaluate.datasets import Layout, open_layout
from protoclip.evaluate.during import evaluation_data, own_layout
from protoclip.evaluate.load import Loaded, load_model, open_encoder
from protoclip.model import choose_device
from protoclip.runs import checkpoint
from protoclip.settings.commands import PROTOCOLS, TASKS, evaluate_parser
from protoclip.settings.config import TABLE, TrainConfig

PROG = "protoclip evaluate"
TIMEOUT = 3600.0  # seconds that a rank waits for the slowest slice
OF_DATA = ("split", "templates", "csv_label_key", "labels", "class_features")
# What else a file's name says of an evaluation, where it is not at its default.
NAMED = (
    *OF_DATA,
    *("csv_img_key", "csv_caption_key", "csv_separator", "csv_encoding", "class_template"),
    *("val_seed", "precision"),
)


def parse_tasks(text: str) -> tuple[str, ...]:
    """ "zeroshot,knn" -> those tasks in order; "" and "all" -> all of them."""
    wanted = {name.strip() for name in text.split(",") if name.strip()} - {"all"}
    if unknown := sorted(wanted - set(TASKS)):
        raise ValueError(f"--tasks: expected all or some of {','.join(TASKS)}, got {unknown[0]!r}")
    return tuple(name for name in TASKS if name in wanted or not wanted)


def run(args: argparse.Namespace) -> None:
    """Run the command; rank 0 writes the files and prints the table."""
    started = time.perf_counter()
    wanted = parse_tasks(args.tasks)
    output = output_file(args.out or _name_of_flags(args), "--out")
    earlier = results.read_results(output) if output.is_file() else None
    loaded = load_model(args.what, args.pretrained, args.model)
    config = loaded.config or TrainConfig()
    own_held_out = None if args.data else _own_held_out(loaded)
    data = own_held_out.test.name if own_held_out else args.data or _own_data(loaded.config)
    columns = {name: vars(args).get(name, getattr(config.data, name)) for name in TABLE}
    columns["seed"] = config.data.val_seed if args.val_seed is None else args.val_seed
    columns |= {name: getattr(args, name) for name in OF_DATA}
    if data_kind(data) == "features":
        columns["class_features"] = args.class_features or config.data.class_features
    if own_held_out and any(getattr(args, name) for name in OF_DATA if name != "templates"):
        raise ValueError(
            "--split, --csv-label-key, --labels, --class-features: expected --data with them, got "
            "the run's own held-out pairs; leave the flag out, or give --data"
        )
    _check_fits(loaded, data)
    layout = own_held_out or open_layout(data, **columns)
    if distributed.is_main():
        for line in layout.left_out:
            print(line, file=sys.stderr)
    notes = []
    for task, reason in tasks.impossible(wanted, layout).items():
        if args.tasks not in ("", "all"):
            raise ValueError(f"--tasks {task}: {reason} ({data}); leave that task out")
        notes.append(f"Without {task}: {reason}.")
    loaded_at = time.perf_counter()
    with open_encoder(loaded.model, args, "evaluating") as encoder:
        sets, train = tasks.encode_sets(encoder, layout, wanted)
        trained = tasks.evaluate_features(sets, train, tasks=wanted, protocol=args.protocol)
    if not distributed.is_main():
        return
    took = time.perf_counter() - loaded_at
    outcome = results.Outcome(
        data=data,
        model=loaded.name,
        pretrained=loaded.pretrained,
        trained=trained,
        seconds={"loading": loaded_at - started, "evaluation": took},
        steps=loaded.steps,
        peak_memory_bytes=tasks.peak_memory_bytes(encoder.device),
    )
    if earlier:
        output, outcome, remarks = _beside_earlier(args, output, earlier, outcome)
        notes += remarks
    print(results.format_table(outcome))
    output.parent.mkdir(parents=True, exist_ok=True)
    results.write_results(output, outcome)
    folder = output.parent / "clip_benchmark"
    results.write_records(folder, outcome)
    ranks = distributed.world_size()
    on_ranks = f" on {ranks} ranks" if ranks > 1 else ""
    notes.append(f"Evaluated in {took:.1f} s{on_ranks} ({args.precision}), written to {output}")
    notes.append(f"CLIP_benchmark's JSON: {folder}")
    print("\n".join(notes))


def _check_fits(loaded: Loaded, data: str) -> None:
    """ValueError for a model of pictures and data of rows, or the other way round."""
    takes_pictures = loaded.model.image_size > 0
    if takes_pictures and data_kind(data) == "features":
        raise ValueError(
            f"--data {data}: expected pictures for {loaded.name}, got stored features; give the "
            "pictures, or a run that trained heads on features"
        )
    if not takes_pictures and data_kind(data) != "features":
        raise ValueError(
            f"--data {data}: expected stored features for {loaded.name}, got pictures; encode them "
            "with protoclip encode"
        )


def _beside_earlier(
    args: argparse.Namespace, output: Path, earlier: results.Outcome, outcome: results.Outcome
) -> tuple[Path, results.Outcome, list[str]]:
    """Where results go whose file exists, what is written there, and remarks. Those from training,
    on the same pictures, belong in the same table; others stay, unless --out names their file."""
    weights = "" if Path(args.what).is_dir() else outcome.pretrained  # a run's are its newest
    names = (outcome.data, outcome.model, weights)
    difference = ""  # what the name has to tell from the file that is there
    if not args.out and names != (earlier.data, earlier.model, weights and earlier.pretrained):
        difference = "\0".join(names)  # which differ in signs that no file's name keeps
    elif not args.tasks and earlier.data == outcome.data:
        other = [
            scores.fingerprint
            for key, scores in outcome.trained.items()
            if not tasks.is_same_set(earlier.trained.get(key), scores.samples, scores.fingerprint)
        ]
        if not other and earlier.trained.keys() == outcome.trained.keys():
            remarks = []
            if any(checkpoint.is_of_before(sets.fingerprint) for sets in earlier.trained.values()):
                remark = "was made before version 0.2: its sets are compared by size"
                remarks.append(f"{output} {remark}")
            outcome = dataclasses.replace(
                earlier,
                trained=outcome.trained,
                model=outcome.model,
                pretrained=outcome.pretrained,
                steps=outcome.steps or earlier.steps,
            )
            return output, outcome, remarks
        if earlier.floors and not args.out:
            sizes = sorted((key, scores.samples) for key, scores in outcome.trained.items())
            difference = repr([*sizes, *other])
    if difference:
        checksum = zlib.crc32(os.fsencode(difference))
        output = output.with_name(f"{output.stem}-{checksum:08x}.json")
    return output, outcome, []


def _own_held_out(loaded: Loaded) -> Layout | None:
    """The pairs that --val-fraction kept out of the run's training, if it has any."""
    if loaded.config is None or not loaded.config.data.val_fraction:
        return None
    run_data = open_run_data(loaded.config)
    name = loaded.config.data.train_data
    if loaded.training_data and not checkpoint.is_beginning(
        loaded.training_data, run_data.training
    ):
        raise ValueError(
            f"{name} has changed since the run was trained, so its held-out pictures are unknown; "
            "restore the data (rows may be added at the end), or give --data"
        )
    layout = own_layout(run_data)
    if layout is None or run_data.held_out is None:
        raise ValueError(f"{name}: fewer than two held-out pictures can be read; give --data")
    left_out = [*run_data.held_out.facts.left_out, *layout.left_out]
    return dataclasses.replace(layout, left_out=left_out)


def _own_data(config: TrainConfig | None) -> str:
    """The evaluation data of the run's training."""
    if config is None:
        raise ValueError("--data: expected data to evaluate the model on, got none; see --help")
    if data := evaluation_data(config):
        return data
    raise ValueError(
        f"the run was trained on all of {config.data.train_data}; give --data to evaluate on"
    )


def _name_of_flags(args: argparse.Namespace) -> Path:
    """results.json of the run for its own evaluation, a longer name for any other one."""
    path = Path(args.what)
    folder = path
    protocol = args.protocol.replace(PROTOCOLS[0], "")
    defaults = vars(evaluate_parser().parse_args([args.what]))
    flags = [
        f"{name}_{value}" for name in NAMED if (value := vars(args).get(name)) != defaults.get(name)
    ]
    parts = ["results", args.data, args.tasks, protocol, *flags]
    if not path.is_dir():
        folder = path.parent if path.is_file() else Path(".")
        parts = [path.stem if path.is_file() else f"{args.what}-{args.pretrained}", *parts]
    slugs = [
        re.sub(r"\W+", "_", part).strip("_")[-60:] or f"{zlib.crc32(os.fsencode(part)):08x}"
        for part in parts
        if part
    ]
    return folder / f"{short_name('-'.join(slugs))}.json"


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
