"""``python -m protoclip.evaluate MODEL``: any CLIP on any data, as a table and as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from tqdm import tqdm

from protoclip import checkpoint
from protoclip.config import (
    PRECISIONS,
    ModelConfig,
    Parser,
    TrainConfig,
    check_saved,
    from_dict,
    output_file,
)
from protoclip.distributed import (
    find_rank,
    is_main,
    quiet_beside_main,
    run_command,
    start,
    world_size,
)
from protoclip.evaluate.datasets import Layout, open_layout
from protoclip.evaluate.results import (
    Results,
    format_table,
    read_results,
    records,
    write_records,
    write_results,
)
from protoclip.evaluate.tasks import (
    PROTOCOLS,
    TASKS,
    Encoder,
    FeatureCache,
    evaluate_model,
    impossible,
    peak_memory_bytes,
)
from protoclip.model import (
    ProtoModel,
    autocast_for,
    build_model,
    check_model,
    choose_device,
    choose_precision,
)

PROG = "python -m protoclip.evaluate"
DESCRIPTION = """Evaluate a CLIP; prints a table, writes results.json and, per data set and task,
the JSON that CLIP_benchmark writes."""
DATA = """data: builtin:emoji | builtin:shapes[:N] | a folder of class folders (ImageFolder), also
below train/ and test/ | a .csv or .tsv | webdataset shards with captions. Without a train split,
probes learn from 80 % of the pictures and are judged on 20 %."""
TIMEOUT = 3600.0  # seconds that a rank waits for the slowest slice
RANDOM = "random"
WEIGHTS = ("local-dir:", "hf-hub:")  # names that bring their weights
COLUMNS = ("csv_separator", "csv_img_key", "csv_caption_key", "csv_encoding")
TEXTS = (
    ("--model", "", "what a checkpoint of OpenCLIP's trainer is of: a name or a config .json"),
    ("--pretrained", "", "weights of an OpenCLIP name: a tag, a file, or random"),
    ("--data", "", "see below (default: what the run was evaluated on)"),
    ("--tasks", "", f"some of {','.join(TASKS)}, or all (default: what the data allows)"),
    ("--split", "auto", "folder of the split to judge (default: test or val if there)"),
    ("--train-split", "train", "folder that probes learn from (default: %(default)s)"),
    ("--classnames", "", "file of class names, one a line; imagenet: OpenCLIP's"),
    ("--templates", "openai", "prompts: openai (80, the default), simple (7), or a file of them"),
    ("--csv-label-key", "", "column of the class in a table"),
    ("--output", "", "where the numbers go (default: results.json in the run folder, with the "
     "data's name for other data; for an OpenCLIP name in the working folder)"),
    ("--device", "auto", "cpu, cuda, ... (default: %(default)s)"),
)  # fmt: skip
CHOICES = (
    ("--protocol", PROTOCOLS, "linear probe: L-BFGS with lambda chosen on held-out training "
     "samples, or the authors' (SGD, unshuffled, best test epoch); default %(default)s"),
    ("--captions", ("auto", "first", "all"),
     "of several per picture (auto: the first on built-in data, else all)"),
    ("--precision", ("fp32", *(p for p in PRECISIONS if p != "fp32")), "of encoding (%(default)s)"),
)  # fmt: skip
NUMBERS = (
    ("--seed", None, "of splits (default: the run's, or 0)"),
    ("--batch-size", 256, "pictures or texts encoded at once (%(default)s)"),
    ("--workers", 0, "processes that read pictures (%(default)s)"),
)


def build_parser() -> Parser:
    parser = Parser(PROG, description=DESCRIPTION, epilog=DATA)
    add = parser.add_argument
    add("what", metavar="MODEL", help="run folder, checkpoint, OpenCLIP name or local-dir:PATH")
    for flag, text, words in TEXTS:
        add(flag, default=text, metavar="TEXT", help=words)
    for flag, choices, words in CHOICES:
        add(flag, default=choices[0], choices=choices, help=words)
    for flag, number, words in NUMBERS:
        add(flag, type=int, default=number, metavar="N", help=words)
    for name in COLUMNS:  # None: as the run was trained
        flag = "--encoding" if name == "csv_encoding" else "--" + name.replace("_", "-")
        add(flag, dest=name, default=None, metavar="TEXT", help="as in training")
    add("--no-cache", action="store_true", help="encode again what has been encoded before")
    return parser


def parse_tasks(text: str) -> tuple[str, ...]:
    """ "zeroshot,knn" -> those tasks in order; "" and "all" -> all of them."""
    wanted = {name.strip() for name in text.split(",") if name.strip()} - {"all"}
    if unknown := sorted(wanted - set(TASKS)):
        raise ValueError(
            f"--tasks: expected all, or some of {','.join(TASKS)}; got {text!r}, of which "
            f"{unknown[0]!r} is unknown"
        )
    return tuple(name for name in TASKS if name in wanted or not wanted)


@dataclass(frozen=True)
class Loaded:
    """A model to evaluate, on the CPU, and where it came from."""

    model: ProtoModel
    name: str  # OpenCLIP's model name
    pretrained: str  # checkpoint or tag
    config: TrainConfig | None = None  # of the run that trained it


def load_model(what: str, pretrained: str = "", model: str = "") -> Loaded:
    """Load what the command line calls MODEL.

    Args:
        what: a run folder or a checkpoint, an OpenCLIP name ("ViT-B-32", or "ViT-B-32,TAG" as in
            CLIP_benchmark), a model config .json, "local-dir:PATH" or "hf-hub:ID".
        pretrained: OpenCLIP's tag or weights file for a name; "random": as initialised.
        model: the OpenCLIP name of a checkpoint, where it does not know its own or is not trusted.
    Raises:
        ValueError: no such model or weights; the message says what is known.
    """
    name, _, tag = what.partition(",")
    if name.startswith(WEIGHTS) or name.endswith(".json"):
        return _by_name(name, pretrained or tag)
    if not os.path.exists(what) and os.sep not in what:
        try:
            check_model(ModelConfig(model=name))
        except ValueError as error:
            reason = str(error).removeprefix("--model: ")
            raise ValueError(f"{what}: found no run and no checkpoint there; {reason}") from error
        return _by_name(name, pretrained or tag)
    path = checkpoint.find(what)
    payload = checkpoint.load(path)
    stored = payload.get("protoclip", {}).get("config")
    if stored is None:
        if not model:
            raise ValueError(
                f"{path}: expected a checkpoint of protoclip.train, got another one, which does "
                "not say what model it is of; give its OpenCLIP name or config file as --model"
            )
        return dataclasses.replace(_by_name(model, str(path)), pretrained=str(path))
    config = from_dict(TrainConfig, stored)
    # Its weights come from the checkpoint; what it once started from need not be there any more.
    if not model:
        check_saved({"--model": config.model.model}, str(path))
    architecture = model or config.model.model
    built = build_model(dataclasses.replace(config.model, model=architecture, pretrained=""))
    built.load_state(payload)
    return Loaded(built, config.model.model, str(path), config)


def _by_name(name: str, pretrained: str) -> Loaded:
    if not pretrained and not name.startswith(WEIGHTS):
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(
            f"{name}: --pretrained is missing: a weights file, {RANDOM} for none, or a tag "
            f"({', '.join(tags) if tags else 'this model has none'})"
        )
    if pretrained == RANDOM:
        torch.manual_seed(0)
    weights = "" if pretrained == RANDOM or name.startswith(WEIGHTS) else pretrained
    model = build_model(ModelConfig(model=name, pretrained=weights, add_projection_head=False))
    return Loaded(model, name, pretrained or name)


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks for; rank 0 writes the files and prints the table."""
    started = time.perf_counter()
    tasks = parse_tasks(args.tasks)
    output = output_file(args.output or _output(args), "--output")
    loaded = load_model(args.what, args.pretrained, args.model)
    data = args.data or _own_data(loaded.config, args.what)
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    loaded.model.to(device)
    took = time.perf_counter() - started
    cache = None
    if not args.no_cache:
        cache = FeatureCache(loaded.model.clip, f"{precision} {loaded.model.preprocess()}")
    opened, options, notes = _open(args, data, tasks, loaded.config or TrainConfig())
    shown = None if is_main() else True  # None: where stderr is a terminal
    with tqdm(desc="evaluating", unit=" rows", file=sys.stderr, leave=False, disable=shown) as bar:
        encoder = Encoder(
            loaded.model,
            device,
            args.batch_size,
            args.workers,
            autocast_for(precision, device),
            bar,
            cache,
            sharded=world_size() > 1,
        )
        after = evaluate_model(
            loaded.model, opened, encoder=encoder, tasks=tasks, protocol=args.protocol, **options
        )
        bar.refresh()  # the last updates may have come too fast to be drawn
    if not is_main():
        return
    if cache is not None and cache.rows_found:
        notes.append(f"{cache.rows_found:,} rows of features came from {cache.folder}.")
    # What training left there, for the same data, is part of the same table.
    earlier = read_results(output) if output.is_file() and not args.tasks else {}
    if earlier.get("data") != data:
        earlier = {}
    before: Results | None = earlier.get("untrained")
    timing = earlier.get("seconds") or {"loading": took, "evaluation": after.seconds}
    peak = earlier.get("peak_memory_bytes") or peak_memory_bytes(device)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_results(
        output,
        after,
        before,
        data=data,
        model=loaded.name,
        pretrained=loaded.pretrained,
        timing=timing,
        peak_memory_bytes=peak,
    )
    folder = output.parent / "clip_benchmark"
    write_records(folder, records(after, data, loaded.name, loaded.pretrained))
    table = format_table(before, after, timing, peak_memory_bytes=peak)
    ranks = f" on {world_size()} ranks" if world_size() > 1 else ""
    notes.append(f"Evaluated in {after.seconds:.1f} s{ranks}, written to {output}")
    print(table, *notes, f"CLIP_benchmark's JSON: {folder}", sep="\n")


def _open(
    args: argparse.Namespace, data: str, tasks: Sequence[str], config: TrainConfig
) -> tuple[str | Layout, dict[str, Any], list[str]]:
    """The data, further arguments of ``evaluate_model``, and notes on tasks left out."""
    columns = {
        name: getattr(config.data if getattr(args, name) is None else args, name)
        for name in COLUMNS
    }
    builtin = data.startswith("builtin:")  # its captions differ in language and kind
    options = {
        "split": args.split,
        "seed": config.run.seed if args.seed is None else args.seed,
        "captions": args.captions,
        "open_kwargs": columns,
    }
    if args.captions == "auto":
        options["captions"] = "first" if builtin else "all"
    if builtin:
        return data, options, []
    words = ("split", "train_split", "classnames", "templates", "csv_label_key")
    opened = open_layout(data, **{name: getattr(args, name) for name in words}, **columns)
    notes = []
    for task, reason in impossible(tasks, opened).items():
        if args.tasks not in ("", "all"):
            raise ValueError(f"--tasks {task}: {reason} ({data}); leave that task out")
        notes.append(f"Without {task}: {reason}.")
    return opened, options, notes


def _own_data(config: TrainConfig | None, where: str) -> str:
    """What the run was evaluated on when it was trained."""
    if config is None:
        raise ValueError("--data is missing: what to evaluate the model on; see --help")
    data = config.data
    check_saved({"--data": data.val_data or data.train_data}, where)
    if data.val_data or data.train_data.startswith("builtin:"):
        return data.val_data or data.train_data
    raise ValueError(
        f"the run was trained on all of {data.train_data}, without --val-data; "
        "give --data, the pairs to evaluate on"
    )


def _output(args: argparse.Namespace) -> Path:
    """results.json of the run for its own evaluation, a longer name for any other."""
    path = Path(args.what)
    parts = ["", "results", args.data]
    if path.is_file():
        parts[0] = path.stem
    elif not path.exists():
        parts[0] = args.what + "-" + args.pretrained
    parts += ["all_captions"] if args.captions == "all" else []
    parts += [args.tasks] if path.exists() else []
    parts += [args.protocol] if args.protocol != "heldout" else []
    slugs = [re.sub(r"[^A-Za-z0-9]+", "_", part).strip("_")[-60:] for part in parts]
    folder = path.parent if path.is_file() else path if path.exists() else Path(".")
    return folder / ("-".join(filter(None, slugs)) + ".json")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake ends it with one line and status 2."""

    def work() -> None:
        info = find_rank()
        with quiet_beside_main(info):
            args = build_parser().parse_args(argv)
        start(info, choose_device(args.device), TIMEOUT)
        run(args)

    return run_command(work, PROG)


if __name__ == "__main__":
    sys.exit(main())
