"""Evaluate a model on pairs: retrieval, zero-shot, probes, grouping, geometry.

``python -m protoclip.evaluate RUN`` prints the table of a finished run again, from its checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from protoclip import checkpoint, metrics
from protoclip.config import TrainConfig, from_dict
from protoclip.evalsets import Autocast, Encoder, EvalSet, ProbeTrain, encode_sets
from protoclip.kmeans import kmeans
from protoclip.model import ProtoModel, build_model
from protoclip.results import (
    Results,
    SetResults,
    format_table,
    interval,
    read_results,
    write_results,
)

__all__ = [
    "Encoder",
    "EvalSet",
    "ProbeTrain",
    "Results",
    "evaluate_features",
    "evaluate_model",
    "format_table",
    "main",
    "peak_memory_bytes",
    "write_results",
]

RECALL_AT = (1, 5, 10)


def evaluate_features(
    sets: Mapping[str, EvalSet],
    probe_train: ProbeTrain | None = None,
    *,
    recall_at: Sequence[int] = RECALL_AT,
    grouping: bool = True,
) -> Results:
    """All metrics of all sets.

    Args:
        sets: by short name.
        probe_train: None: no linear probe and no nearest neighbours.
        recall_at: the K of the recalls.
        grouping: whether to cluster the image features and compare with the labels.
    Returns:
        ``Results``; ``.metrics`` is set -> metric -> value.
    """
    started = time.perf_counter()
    heads: dict[str, metrics.LinearProbe] = {}
    if probe_train is not None and any(one.probes for one in sets.values()):
        heads = {
            label: metrics.fit_linear_probe(probe_train.image, known.ids, len(known.names))
            for label, known in probe_train.labels.items()
            if len(known.ids) >= 2
        }
    done = {}
    for key, one in sets.items():
        values, hits = _pairs(one, recall_at)
        for label, known in one.labels.items():
            scores = _classifiers(one, label, probe_train, heads.get(label))
            for prefix, logits in scores.items():
                got = metrics.accuracy(logits, known.ids)
                values[f"{label}/{prefix}acc1"] = got.acc1
                values[f"{label}/{prefix}acc5"] = got.acc5
                values[f"{label}/{prefix}mean_per_class_recall"] = got.mean_per_class_recall
                hits[f"{label}/{prefix}acc1"] = got.hits.cpu()
            if grouping and len(known.ids) > 1:
                cluster = partial(kmeans, init="k-means++", num_restarts=2)
                for name, value in metrics.group_scores(one.image, known.ids, cluster).items():
                    values[f"{label}/{name}"] = value
        bounds = {name: interval(values) for name, values in hits.items()}
        done[key] = SetResults(
            one.title or key, len(one.image), len(one.text), values, bounds, hits
        )
    return Results(done, time.perf_counter() - started)


def _pairs(one: EvalSet, recall_at: Sequence[int]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Retrieval and geometry: values, and the hits behind the recalls."""
    ranks = metrics.retrieval(one.image, one.text, one.caption_image)
    values = ranks.summary(tuple(recall_at))
    hits = {}
    for k in recall_at:
        to_text, to_image = ranks.hits(k)
        hits[f"text_retrieval_recall@{k}"] = to_text.cpu()
        hits[f"image_retrieval_recall@{k}"] = to_image.cpu()
    matching = one.image if one.caption_image is None else one.image[one.caption_image]
    values["modality_gap"] = metrics.modality_gap(one.image, one.text)
    values["alignment"] = metrics.alignment(matching, one.text)
    values["image_uniformity"] = metrics.uniformity(one.image)
    values["text_uniformity"] = metrics.uniformity(one.text)
    return values, hits


def _classifiers(
    one: EvalSet, label: str, probe_train: ProbeTrain | None, head: metrics.LinearProbe | None
) -> dict[str, Tensor]:
    """Logits [N, C] of each classifier there is for the label, by metric prefix."""
    scores = {}
    if label in one.class_vectors:
        scores[""] = metrics.zero_shot_logits(one.image, one.class_vectors[label])
    if one.probes and probe_train is not None and head is not None:
        scores["lp_"] = head.logits(one.image)
        known = probe_train.labels[label]
        scores["knn_"] = metrics.knn_logits(
            probe_train.image, known.ids, one.image, len(known.names)
        )
    return scores


def evaluate_model(
    model: ProtoModel,
    data: str = "builtin:emoji",
    *,
    split: str = "auto",
    seed: int = 0,
    captions: str = "first",
    device: torch.device | None = None,
    batch_size: int = 256,
    workers: int = 0,
    autocast: Autocast = nullcontext,
    progress: Callable[[int], None] | None = None,
    open_kwargs: Mapping[str, Any] | None = None,
) -> Results:
    """Encode the evaluation sets of ``data`` and score them.

    builtin:emoji has HO (held-out concepts), TW (all, in Twemoji style) and, with the font, NHO
    and NOTO (the held-out ones and all in Noto style). Other data has one set: HO (its held-out
    part) or ALL. Probes learn from the train split, so they need the held-out one.

    Args:
        model: stays as it is, where it is.
        device: where the model is; None: look.
        data: what ``protoclip.data.open_dataset`` takes.
        split: of other data than builtin:emoji: "heldout", "all", or "auto" (built-in: held out,
            files: all).
        seed: of the split into train and held out, the one of the training run.
        captions: "first" (one per image, the canonical one) or "all".
        batch_size, workers: of encoding.
        autocast: makes the context of each forward pass.
        progress: told the number of rows (images or texts) after each batch.
        open_kwargs: further arguments of ``open_dataset``, such as the CSV columns.
    """
    started = time.perf_counter()
    place = device or next(model.parameters()).device
    encoder = Encoder(model, place, batch_size, workers, autocast, progress)
    sets, train = encode_sets(
        encoder, data, split=split, seed=seed, captions=captions, open_kwargs=open_kwargs
    )
    results = evaluate_features(sets, train)
    return Results(results.sets, time.perf_counter() - started)


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Most memory in use so far: of the card on a GPU, of the process elsewhere."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m protoclip.evaluate",
        description="Evaluate a trained model; prints a table and writes results.json.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="RUN_OR_CHECKPOINT", help="run folder or a checkpoint")
    parser.add_argument(
        "--data",
        default="",
        metavar="TEXT",
        help="builtin:emoji, builtin:shapes[:N], a .csv/.tsv file or webdataset shards "
        "(default: what the run was evaluated on)",
    )
    parser.add_argument(
        "--captions",
        default="first",
        choices=("first", "all"),
        help="one caption per image, or all of them (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        default="",
        metavar="PATH",
        help="where the numbers go (default: results.json in the run folder; with --data or "
        "--captions all, or for a single checkpoint, a name of its own)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N")
    parser.add_argument("--workers", type=int, default=0, metavar="N")
    return parser


def run(args: argparse.Namespace) -> str:
    """What the command line asks for; returns the text to print."""
    started = time.perf_counter()
    stored, payload = checkpoint.load_run(args.model)
    config = from_dict(TrainConfig, stored)
    # Its weights come from the checkpoint; what it once started from need not be there any more.
    model = build_model(dataclasses.replace(config.model, pretrained=""))
    model.load_state(payload)
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(name)
    data = args.data or _own_data(config)
    loaded = time.perf_counter() - started
    with tqdm(desc="evaluating", unit=" rows", file=sys.stderr, leave=False) as bar:
        after = evaluate_model(
            model,
            data,
            seed=config.run.seed,
            captions=args.captions,
            batch_size=args.batch_size,
            workers=args.workers,
            progress=bar.update,
            open_kwargs=_csv_columns(config),
        )
    output = Path(args.output) if args.output else _output(args, data if args.data else "")
    # What training left there, for the same data, is part of the same table.
    earlier = _earlier(output, data)
    before = earlier.get("untrained")
    timing = earlier.get("seconds") or {"loading": loaded, "evaluation": after.seconds}
    peak = earlier.get("peak_memory_bytes") or peak_memory_bytes(name)
    write_results(
        output,
        after,
        before,
        data=data,
        model=config.model.model,
        pretrained=str(checkpoint.find(args.model)),
        timing=timing,
        peak_memory_bytes=peak,
    )
    table = format_table(before, after, timing, peak_memory_bytes=peak)
    return f"{table}\nEvaluated in {after.seconds:.1f} s, written to {output}"


def _own_data(config: TrainConfig) -> str:
    """What the run was evaluated on when it was trained."""
    data = config.data
    if data.val_data or data.train_data.startswith("builtin:"):
        return data.val_data or data.train_data
    raise ValueError(
        f"the run was trained on all of {data.train_data}, without --val-data; "
        "give --data, the pairs to evaluate on"
    )


def _csv_columns(config: TrainConfig) -> dict[str, str]:
    names = ("csv_separator", "csv_img_key", "csv_caption_key")
    return {name: getattr(config.data, name) for name in names}


def _output(args: argparse.Namespace, other_data: str) -> Path:
    """results.json of the run for its own evaluation, a name that tells for any other."""
    path = Path(args.model)
    parts = [path.stem if path.is_file() else "", "results"]
    parts += [re.sub(r"[^A-Za-z0-9]+", "_", other_data).strip("_")[-60:]]
    parts += ["all_captions" if args.captions == "all" else ""]
    folder = path.parent if path.is_file() else path
    return folder / ("-".join(part for part in parts if part) + ".json")


def _earlier(output: Path, data: str) -> dict[str, Any]:
    """An earlier results.json at the same place, if it is about the same data; else {}."""
    if not output.is_file():
        return {}
    content = read_results(output)
    return content if content.get("data") == data else {}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake ends it with one line and status 1."""
    args = build_parser().parse_args(argv)
    try:
        print(run(args))
    except (ValueError, OSError) as error:
        print(f"protoclip.evaluate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
