"""``python -m protoclip.evaluate MODEL``: any CLIP on any data, as a table and as JSON."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from protoclip import heartbeat
from protoclip.commands import on_all_ranks, quietly
from protoclip.config import PRECISIONS, Parser, TrainConfig, check_saved, output_file
from protoclip.device import choose_device, choose_precision
from protoclip.distributed import is_main, world_size
from protoclip.evaluate.models import Loaded, load_model
from protoclip.evaluate.results import Results, format_table, read_results, write_results
from protoclip.evaluate.run import Settings, evaluate_loaded
from protoclip.evaluate.scores import peak_memory_bytes
from protoclip.evaluate.tasks import PROTOCOLS, TASKS, parse_tasks
from protoclip.launchers import find_place

PROG = "python -m protoclip.evaluate"
DESCRIPTION = """Evaluate a CLIP; prints a table, writes results.json and, per data set and task,
the JSON that CLIP_benchmark writes."""
TIMEOUT = 3600.0  # seconds a rank waits for the slowest slice, or for a sign of life
LAYOUTS = """data: builtin:emoji | builtin:shapes[:N] | a folder of class folders (ImageFolder),
also below train/ and test/ | a CLIP_benchmark folder (test/0.tar, classnames.txt,
zeroshot_classification_templates.txt, dataset_type.txt) | a .csv or .tsv | webdataset shards with
captions. Without a train split, probes learn from 80 % of the pictures and are judged on 20 %."""


def build_parser() -> Parser:
    parser = Parser(PROG, description=DESCRIPTION, epilog=LAYOUTS)
    add = parser.add_argument
    add("model", metavar="MODEL", help="run folder, checkpoint, OpenCLIP name or local-dir:PATH")
    add("--pretrained", default="", metavar="TEXT",
        help="weights of an OpenCLIP name: a tag, a file, or random")  # fmt: skip
    add("--data", default="", metavar="TEXT",
        help="see below (default: what the run was evaluated on)")  # fmt: skip
    add("--tasks", default="", metavar="LIST",
        help=f"some of {','.join(TASKS)}, or all (default: what the data allows)")  # fmt: skip
    add("--split", default="auto", metavar="NAME",
        help="folder of the split to judge (default: test or val if there)")  # fmt: skip
    add("--train-split", default="train", metavar="NAME", help="probes learn from it (%(default)s)")
    add("--classnames", default="", metavar="FILE",
        help="class names, one a line; imagenet: OpenCLIP's")  # fmt: skip
    add("--templates", default="auto", metavar="NAME",
        help="openai (80), simple (7), a file, or auto: the data's, else openai")  # fmt: skip
    add("--protocol", default="heldout", choices=PROTOCOLS,
        help="linear probe: L-BFGS with lambda chosen on held-out training samples, or the "
        "authors' (SGD, unshuffled, best test epoch)")  # fmt: skip
    add("--captions", default="auto", choices=("auto", "first", "all"),
        help="of several per picture (auto: the first on built-in data, else all)")  # fmt: skip
    add("--csv-label-key", default="", metavar="NAME", help="column of the class in a table")
    for name, meta in (("separator", "C"), ("img-key", "NAME"), ("caption-key", "NAME")):
        add(f"--csv-{name}", default=None, metavar=meta, help="as in training")
    add("--encoding", dest="csv_encoding", default=None, metavar="NAME", help="as in training")
    add("--output", default="", metavar="PATH",
        help="where the numbers go (default: results.json in the run folder, a name that tells "
        "for other data; for an OpenCLIP name in the working folder)")  # fmt: skip
    add("--no-cache", action="store_true", help="encode again what has been encoded before")
    add("--device", default="auto", help="cpu, cuda, ... (default: %(default)s)")
    add("--precision", default="fp32", choices=PRECISIONS, help="of encoding (%(default)s)")
    add("--seed", type=int, default=None, metavar="N", help="of splits (default: the run's, or 0)")
    add("--batch-size", type=int, default=256, metavar="N")
    add("--workers", type=int, default=0, metavar="N", help="processes that read pictures")
    return parser


def run(args: argparse.Namespace) -> str:
    """What the command line asks for; returns the text to print (on rank 0)."""
    started = time.perf_counter()
    tasks = parse_tasks(args.tasks) if args.tasks else None
    output = output_file(args.output or _output(args, args.data), "--output")
    loaded = load_model(args.model, args.pretrained)
    data = args.data or _own_data(loaded.config, args.model)
    settings = Settings(
        data=data,
        tasks=tasks,
        split=args.split,
        captions=_captions(args.captions, data),
        protocol=args.protocol,
        seed=args.seed if args.seed is not None else loaded.config.run.seed if loaded.config else 0,
        batch_size=args.batch_size,
        workers=args.workers,
        cached=not args.no_cache,
        csv=_csv_columns(args, loaded.config),
        layout={
            "train_split": args.train_split,
            "classnames": args.classnames,
            "templates": args.templates,
            "csv_label_key": args.csv_label_key,
        },
    )
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    loaded.model.to(device)
    took = time.perf_counter() - started
    heartbeat.enter("evaluation")
    shown = None if is_main() else True  # None: where stderr is a terminal
    with tqdm(desc="evaluating", unit=" rows", file=sys.stderr, leave=False, disable=shown) as bar:
        after, notes = evaluate_loaded(loaded, settings, device, precision, bar)
        bar.refresh()  # the last updates may have come too fast to be drawn
    if not is_main():
        return ""
    return _written(args, output, loaded, data, after, notes, took, str(device))


def _written(
    args: argparse.Namespace,
    output: Path,
    loaded: Loaded,
    data: str,
    after: Results,
    notes: Sequence[str],
    took: float,
    device: str,
) -> str:
    """Write the files; returns the table and where they are."""
    # What training left there, for the same data, is part of the same table.
    earlier = {} if args.tasks else _earlier(output, data)
    before = earlier.get("untrained")
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
        record_folder=output.parent / "clip_benchmark",
    )
    table = format_table(before, after, timing, peak_memory_bytes=peak)
    ranks = f" on {world_size()} ranks" if world_size() > 1 else ""
    lines = [table, *notes]
    lines += [f"Evaluated in {after.seconds:.1f} s{ranks}, written to {output}"]
    lines += [f"CLIP_benchmark's JSON: {output.parent / 'clip_benchmark'}"]
    return "\n".join(lines)


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


def _captions(asked: str, data: str) -> str:
    """Built-in captions differ in language and kind; those of a file are equals."""
    if asked != "auto":
        return asked
    return "first" if data.startswith("builtin:") else "all"


def _csv_columns(args: argparse.Namespace, config: TrainConfig | None) -> dict[str, Any]:
    names = ("csv_separator", "csv_img_key", "csv_caption_key", "csv_encoding")
    run = (config or TrainConfig()).data
    given = {name: getattr(args, name) for name in names}
    return {name: getattr(run, name) if value is None else value for name, value in given.items()}


def _output(args: argparse.Namespace, other_data: str) -> Path:
    """results.json of the run for its own evaluation, a name that tells for any other."""
    path = Path(args.model)
    there = path.exists()
    stem = path.stem if path.is_file() else "" if there else args.model + "-" + args.pretrained
    parts = [_slug(stem), "results", _slug(other_data)]
    parts += ["all_captions" if args.captions == "all" else ""]
    if args.tasks and there:
        parts += [_slug(args.tasks)]
    parts += [args.protocol if args.protocol != "heldout" else ""]
    folder = (path.parent if path.is_file() else path) if there else Path(".")
    return folder / ("-".join(part for part in parts if part) + ".json")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[-60:]


def _earlier(output: Path, data: str) -> dict[str, Any]:
    """An earlier results.json at the same place, if it is about the same data; else {}."""
    if not output.is_file():
        return {}
    content = read_results(output)
    return content if content.get("data") == data else {}


def show(args: argparse.Namespace) -> None:
    """Run, and print on rank 0."""
    if text := run(args):
        print(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake ends it with one line and status 2."""
    try:
        place = find_place()
        with quietly(place):
            args = build_parser().parse_args(argv)
        if place.world_size > 1:
            where = place, args.device, TIMEOUT, "auto"
            return on_all_ranks(lambda: show(args), *where, PROG, "start it again")
        show(args)
    except (ValueError, OSError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
