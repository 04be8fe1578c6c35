"""The flags of every command, kept apart from the commands so that --help loads quickly."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

from protoclip.settings.config import PRECISIONS, TABLE, DataConfig, ProtoConfig
from protoclip.settings.flags import (
    Parser,
    add_flag,
    add_options,
    build_parser,
    group_number,
    levels_of,
    number_from,
    open_clips_help,
    seeds_of,
)

EVERYDAY = """
    --preset --method --train-data --val-data --val-fraction --csv-img-key --csv-caption-key
    --image-features --text-features --head --embed-dim
    --workers --model --pretrained --k --external-teacher --epochs --max-steps --batch-size
    --accum-freq --lr --warmup --name --resume --save-every --seed --device --precision
"""
PLANNED = """
    --ranks --samples --json --model --train-data --head --embed-dim --grad-checkpointing --k
    --episode-size --external-teacher --batch-size --accum-freq --device --precision
"""
COMPARED = """
    --row --seeds --out --jobs --nproc-per-run --dry-run --train-data
    --val-data --val-fraction --csv-img-key --csv-caption-key --model --pretrained --k
    --external-teacher --epochs --batch-size --lr --device --precision
"""
MINILM = "builtin:minilm"
TASKS = ("zeroshot", "retrieval", "linear_probe", "knn", "grouping", "geometry")
PROTOCOLS = ("heldout", "paper")
DTYPES = {"fp16": "float16", "fp32": "float32"}  # of stored features


def train_parser() -> Parser:
    """Flags of ``protoclip train``."""
    return build_parser(
        "protoclip train",
        "Train ProtoCLIP (or CLIP) on image-text pairs. Without flags: ProtoCLIP on the built-in "
        "icons, a few minutes on two CPU cores. The defaults are for icons; for photographs set "
        "--model and --epochs.",
        EVERYDAY.split(),
        "protoclip train --train-data pairs.csv --csv-img-key file --csv-caption-key text\n"
        "         protoclip train --train-data 'shards/{00000..00099}.tar' --model ViT-B-32",
    )


def compare_parser() -> Parser:
    """Flags of ``protoclip compare``: those of train, and some of its own."""
    parser = build_parser(
        "protoclip compare",
        "Train ProtoCLIP and CLIP on several seeds and report which scores differ, as a table, a "
        "page and comparison.json. Takes the flags of protoclip train, for all rows. Where a row "
        "takes another time than CLIP, it ends with the command that compares at equal time. The "
        "same command continues an interrupted comparison.",
        COMPARED.split(),
        "protoclip compare --train-data pairs.csv --val-fraction 0.2 --model ViT-B-32 --epochs 30\n"
        "         protoclip compare --row 'CLIP: --method clip' --row 'K 100: --k 100'",
    )
    for action in parser._actions:
        if not {"--name", "--logs", "--resume", "--seed"}.isdisjoint(action.option_strings):
            action.help = argparse.SUPPRESS  # each run has its own
    group = parser.add_argument_group("Comparison")
    group.add_argument(
        "--row",
        action="append",
        default=[],
        metavar="'NAME: FLAGS'",
        help="a row of the comparison: a name and flags of protoclip train; may be repeated; the "
        "first row is the baseline (default: CLIP, and ProtoCLIP as the other flags say)",
    )
    group.add_argument(
        "--seeds",
        type=seeds_of,
        default=seeds_of("5"),
        metavar="N|A,B,...",
        help="number of training seeds, or a list of them (default: 5)",
    )
    add_flag(group, "--out", "logs/compare", "output folder; runs are in OUT/ROW/seed-N")
    words = "parallel runs, whose times are not compared; on GPUs each run has its own"
    add_flag(group, "--jobs", 1, words, low=1)
    words = "processes per run, started by torchrun; on GPUs each has its own"
    add_flag(group, "--nproc-per-run", 1, words, low=1)
    words = "print the rows, the primary scores and the number of runs, and exit"
    group.add_argument("--dry-run", action="store_true", help=words)
    parser._action_groups.insert(2, parser._action_groups.pop())  # shown before those of train
    return parser


def plan_parser() -> Parser:
    """Flags of ``protoclip plan``: those of train, and some of its own."""
    parser = build_parser(
        "protoclip plan",
        "Estimate the memory of each process of a run, by part, to see whether the run fits. "
        "Takes the flags of protoclip train. --device cpu is for CPUs, anything else for GPUs.",
        PLANNED.split(),
        "protoclip plan --model ViT-B-32 --batch-size 256 --ranks 64 --samples 30000000 --k 20000",
    )
    group = parser.add_argument_group("Plan")
    add_flag(group, "--ranks", 1, "processes, one GPU each", low=1)
    add_flag(group, "--samples", 3_000_000, "pairs in the dataset", low=1)
    group.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def cluster_parser() -> Parser:
    """Flags of ``protoclip cluster``."""
    parser = Parser(
        "protoclip cluster",
        usage="%(prog)s DATA [options]",
        description="Group pictures, or stored features, by k-means. Writes clusters.csv, "
        "left_out.csv, centroids.safetensors, report.html and, for pictures, their features. The "
        "same command continues an interrupted run.",
        example="protoclip cluster photos/ --k 50 --out groups/",
    )
    words = (
        "a folder of pictures, a .csv or .tsv, webdataset shards, parquet files, built-in data, "
        "or stored features: a folder of protoclip encode, numbered parts, .npy, .npz or "
        ".safetensors"
    )
    parser.add_argument("data", metavar="DATA", help=words)
    words = (
        "number of groups; auto tries 2 to 16, then steps of a fifth up to 300, and takes the best "
        "mean silhouette on a sample of 3,000 rows; if that is below 0.2, it takes the square "
        "root of N/2, at most 300 (default: auto)"
    )
    parser.add_argument("--k", default="auto", type=group_number, metavar="N|auto", help=words)
    for flag, default, words in (
        ("--run", "", "encode the pictures with this run or checkpoint of protoclip train"),
        ("--model", "", "encode the pictures with this OpenCLIP model (default: ViT-B-32)"),
        ("--pretrained", "", "weights of --model: a file or an OpenCLIP tag"),
        ("--features", "", "stored features of the pictures, by key, to skip the encoding"),
        ("--captions", "", "file with one caption per line for the rows of stored features"),
        ("--weights", "",
         "file with one weight per line for each picture or row; pictures of a folder are sorted "
         "by folder and name, unreadable ones included"),
        ("--out", "groups", "folder to write to"),
        ("--device", "auto", "cpu, cuda, ..."),
    ):  # fmt: skip
        add_flag(parser, flag, default, words)
    add_flag(parser, "--iters", 300, "maximum number of k-means iterations", low=0)
    add_flag(parser, "--seed", 0, "seed of k-means")
    words = "pictures encoded at once; 0: 32 on a CPU, 256 on a GPU"
    add_flag(parser, "--batch-size", 0, words, low=0)
    add_flag(parser, "--workers", 0, "processes that read pictures", low=0)
    words = (
        "replace the files of an earlier run in --out; its features are used again if model and "
        "pictures are the same"
    )
    parser.add_argument("--overwrite", action="store_true", help=words)
    folders = parser.add_mutually_exclusive_group()
    words = "create this folder, and in it a folder for each group with links to its pictures"
    add_flag(folders, "--link-to", "", words)
    add_flag(folders, "--copy-to", "", "like --link-to, but with copies")
    words = "normalise the rows of stored features to length 1"
    parser.add_argument("--normalize", action="store_true", help=words)
    words = "of a folder with pictures and texts (default: images, each picture once)"
    parser.add_argument("--side", default="", choices=("image", "text"), help=words)
    add_flag(parser, "--precision", "fp32", "precision of encoding", choices=PRECISIONS)
    add_options(parser, DataConfig(), only=TABLE)
    return parser


def encode_parser() -> Parser:
    """Flags of ``protoclip encode``."""
    parser = Parser(
        "protoclip encode",
        usage="%(prog)s DATA --out DIR [options]",
        description="Encode pictures and captions, and write their features to a folder in "
        "clip-retrieval's layout: numbered .npy parts of both sides and a table for each. A "
        "picture with several captions has a row for each. The same command continues an "
        "interrupted run, and encodes only what is missing or has changed. Under torchrun, ranks "
        "share the parts.",
        example="protoclip encode 'shards/{00000..00099}.tar' --out features/\n"
        "         protoclip encode pairs.csv --image-model my_models:dino --text-model "
        f"{MINILM} --out features/",
    )
    words = (
        "a folder of pictures or of class folders, a .csv or .tsv, webdataset shards, parquet "
        "files, or built-in data"
    )
    parser.add_argument("data", metavar="DATA", nargs="?", default="", help=words)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    for flag, default, words in (
        ("--model", "", "OpenCLIP model for both sides (default: ViT-B-32); rows of length 1"),
        ("--pretrained", "", "weights of --model: a file or an OpenCLIP tag"),
        ("--run", "", "run or checkpoint of protoclip train, for both sides; rows of length 1"),
        ("--image-model", "",
         "MODULE:FUNCTION, which returns an encoder (a module, pictures -> [B, D]) and its "
         "transform (a picture -> a tensor); rows as returned"),
        ("--text-model", "",
         f"{MINILM}, a text model of Hugging Face by name or folder, or MODULE:FUNCTION, which "
         "returns a callable, texts -> [N, D]; rows as returned"),
        ("--heads", "",
         "folder of protoclip export: write the embeddings of these heads, of length 1, in place "
         "of the encoders' rows"),
        ("--classes", "", "instead of DATA: a file with a class name per line, for zero-shot"),
        ("--template", "a photo of a {}.",
         "prompts of --classes: a text with {}, openai (80), simple (7), or a file; a row each"),
        ("--device", "auto", "cpu, cuda, ..."),
    ):  # fmt: skip
        add_flag(parser, flag, default, words)
    words = "average 77 tokens of --text-model, padding included, as the authors did"
    parser.add_argument("--paper", action="store_true", help=words)
    parser.add_argument(
        "--only", default="", choices=("images", "texts"), help="encode one side (default: both)"
    )
    words = "one row per pair, of its first and its longest other caption, as the teacher reads"
    parser.add_argument("--one-text", action="store_true", help=words)
    words = "of the stored features (default: fp16; with --one-text fp32)"
    parser.add_argument("--dtype", default="", choices=tuple(DTYPES), help=words)
    words = "pictures encoded at once; 0: 32 on a CPU, 256 on a GPU"
    add_flag(parser, "--batch-size", 0, words, low=0)
    add_flag(parser, "--workers", 0, "processes that read pictures", low=0)
    words = "replace features in --out by another model or of other data"
    parser.add_argument("--overwrite", action="store_true", help=words)
    add_flag(parser, "--precision", "fp32", "precision of encoding", choices=PRECISIONS)
    add_options(parser, DataConfig(), only=TABLE)
    return parser


def curate_parser() -> Parser:
    """Flags of ``protoclip curate``."""
    parser = Parser(
        "protoclip curate",
        usage="%(prog)s FEATURES --levels N,N,... --target N [options]",
        description="Choose a balanced subset of rows of features: hierarchical k-means with "
        "resampling, then equal shares of its clusters from the highest level down (Vo et al. "
        "2024). Writes selected.csv, left_out.csv, hierarchy.safetensors and report.html. The "
        "same command continues an interrupted run.",
        example="protoclip curate features/ --levels 10000,1000,100 --target 50000 --out curated/\n"
        "         protoclip train --train-data pairs.csv --rows curated/selected.csv",
    )
    words = (
        "rows of features [N, D]: a folder of protoclip encode or clip-retrieval, a .npy, .npz or "
        ".safetensors file, or numbered .npy parts"
    )
    parser.add_argument("data", metavar="DATA", help=words)
    parser.add_argument(
        "--levels",
        required=True,
        type=levels_of,
        metavar="N,N,...",
        help="numbers of clusters from the lowest level to the highest; they fall",
    )
    parser.add_argument(
        "--target",
        required=True,
        type=partial(number_from, int, 1),
        metavar="N",
        help="number of rows to choose",
    )
    add_flag(parser, "--out", "curated", "folder to write to")
    words = "how often a level's rows are sampled from its clusters and clustered again"
    add_flag(parser, "--resamplings", 10, words, low=0)
    words = "rows of a lowest cluster: random ones, or the closest to its centroid"
    add_flag(parser, "--choose", "random", words, choices=("random", "closest"))
    words = (
        "a row nearer than this to another chosen one of its lowest cluster is replaced by another "
        "of the cluster; 0: no row is"
    )
    add_flag(parser, "--without-duplicates", 0.0, words, low=0)
    words = "normalise the rows to length 1"
    parser.add_argument("--normalize", action="store_true", help=words)
    add_flag(parser, "--iters", 50, "maximum number of iterations of each k-means", low=0)
    add_flag(parser, "--seed", 0, "seed of k-means, resampling and choice")
    words = (
        "replace the files of an earlier run in --out; its clusters are used again if rows, "
        "levels, resamplings, iterations and seed are the same"
    )
    parser.add_argument("--overwrite", action="store_true", help=words)
    words = "print levels, passes over the rows, bytes and an estimate of the time, and stop"
    parser.add_argument("--dry-run", action="store_true", help=words)
    return parser


def evaluate_parser() -> Parser:
    """Flags of ``protoclip evaluate``."""
    parser = Parser(
        "protoclip evaluate",
        usage="%(prog)s MODEL [options]",
        description="Evaluate a CLIP model. Prints a table and writes results.json and, for each "
        "data set and task, a JSON file in CLIP_benchmark's format.",
        epilog="data: builtin:icons | builtin:shapes[:N] | class folders (ImageFolder), also in "
        "train/ and test/ | a .csv or .tsv | webdataset shards or parquet files with captions | "
        "stored features, for a run of heads: a folder, or features:IMAGES.npy::TEXTS.npy. "
        "Without a train split, probes train on 80 % of the pictures and are tested on 20 %.",
        example="protoclip evaluate ViT-B-32 --pretrained laion2b_s34b_b79k --data imagenet/",
    )
    parser.add_argument(
        "what",
        metavar="MODEL",
        help="run folder, checkpoint, OpenCLIP name, its config .json, local-dir:PATH or hf-hub:ID",
    )
    for flag, default, help_text in (
        ("--data", "",
         "what to evaluate on: class folders, a table, shards, parquet files or builtin:... "
         "(details below; default: the held-out pairs of the run)"),
        ("--tasks", "", f"some of {','.join(TASKS)}, or all (default: what the data allows)"),
        ("--model", "", "for a checkpoint of OpenCLIP's trainer: its model name or config .json"),
        ("--pretrained", "", "weights of an OpenCLIP name: a tag, a file, or random"),
        ("--split", "", "split folder to evaluate (default: test, val or validation)"),
        ("--templates", "openai", "prompts: openai (80), simple (7), a text with {}, or a file"),
        ("--csv-label-key", "", "column of the class in a table"),
        ("--labels", "", "file with the class of each row of stored features"),
        ("--class-features", "", "rows of class names for stored features (default: the run's)"),
        ("--out --output", "", "file for the results (default: results.json in the run folder, or "
         "in the working folder for an OpenCLIP name; other data and flags add their names)"),
        ("--device", "auto", "cpu, cuda, ..."),
    ):  # fmt: skip
        add_flag(parser, flag, default, help_text)
    add_flag(parser, "--batch-size", 256, "pictures or texts encoded at once", low=1)
    add_flag(parser, "--workers", 0, "processes that read pictures", low=0)
    parser.add_argument(
        "--val-seed",
        "--seed",
        type=int,
        metavar="N",
        help="chooses the held-out part of built-in data (default: the run's, or 0)",
    )
    add_flag(
        parser,
        "--protocol",
        PROTOCOLS[0],
        "linear probe: L-BFGS with lambda chosen on held-out training samples, or the authors' "
        "(SGD, unshuffled, best test epoch)",
        choices=PROTOCOLS,
    )
    add_flag(parser, "--precision", "fp32", "precision of encoding", choices=PRECISIONS)
    words = "how tables are read (same flags as for training; default: as in the run)"
    group = parser.add_argument_group("Tables", words)
    add_options(group, DataConfig(), only=TABLE)
    return parser


def report_parser() -> Parser:
    """Flags of ``protoclip report``."""
    parser = Parser(
        "protoclip report",
        description="Write one self-contained HTML page about runs: scores, curves, prototypes, "
        "a map, examples, cost and settings. Several runs are shown side by side, with "
        "the differences to the first run of --method clip, or else to the first run. Runs that "
        "differ only in the seed become one row, with intervals, as in protoclip compare.",
        example="protoclip report logs/A logs/B",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder of protoclip train")
    words = (
        "file to write (default: report.html in the run folder; for several runs, "
        "report-with-NAMES.html in the last folder)"
    )
    add_flag(parser, "--out --output", "", words)
    return parser


def export_parser() -> Parser:
    """Flags of ``protoclip export``."""
    parser = Parser(
        "protoclip export",
        description="Write a trained model as a folder that OpenCLIP loads: local-dir:DIR. Heads "
        "on stored features become a folder for protoclip.load_heads and protoclip encode --heads.",
        example="protoclip export logs/RUN --out my-clip",
    )
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT", help="run folder or a checkpoint")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    add_flag(
        parser,
        "--model",
        "",
        "for a checkpoint of OpenCLIP's trainer: its model name or config file",
    )
    return parser


def data_parser() -> Parser:
    """Flags of ``protoclip data``."""
    parser = Parser(
        "protoclip data",
        description="Check pairs, or write them as webdataset shards. DATA is what --train-data of "
        "protoclip train takes.",
        example="protoclip data --check pairs.csv",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--export", metavar="DATA", help="data to write as shards")
    what.add_argument("--check", metavar="DATA", help="data to read once, to list what is wrong")
    parser.add_argument("--out", metavar="DIR", help="a new or empty folder for the shards")
    add_flag(parser, "--image-format", "png", "format of the pictures", choices=("png", "jpg"))
    add_flag(parser, "--per-shard", 1000, "pairs per shard", low=1)
    add_flag(parser, "--split", "all", "all, train or heldout")
    add_flag(parser, "--val-seed --seed", 0, "chooses the pairs that are held out")
    add_options(parser, DataConfig(), only=TABLE)
    return parser


def openclip_parser() -> Parser:
    """Our own flags of ``protoclip openclip``; its help has those of open_clip_train too."""
    parser = Parser(
        "protoclip openclip",
        usage="%(prog)s <open_clip_train flags> [--dedup caption] [--proto-* flags]",
        description="OpenCLIP's own training (open_clip_train) with protoclip's losses. Every flag "
        "of open_clip_train works as it does there; without a --proto-* flag the losses are the "
        "same, in less memory. Runs under torchrun as OpenCLIP does.",
        example="protoclip openclip --train-data 'd/{000..099}.tar' --model ViT-B-32 --proto-k 500",
    )
    add_flag(
        parser.add_argument_group("Loss"),
        "--dedup",
        "off",
        "caption: pairs of a batch with the same caption are not negatives of each other",
        choices=("off", "caption"),
    )
    add_options(parser.add_argument_group(str(ProtoConfig.__doc__)), ProtoConfig())
    parser.example = f"\n{open_clips_help()}\n{parser.example}"
    return parser


HELP_FLAGS = ("-h", "--help", "--help-all")


def show_help(command: str, words: Sequence[str]) -> None:
    """Print the command's help and exit, if the words ask for it; before torch is imported."""
    if asked := [word for word in words if word in HELP_FLAGS]:
        PARSERS[command]().parse_args(asked)


PARSERS: dict[str, Callable[[], Parser]] = {
    "train": train_parser,
    "compare": compare_parser,
    "plan": plan_parser,
    "encode": encode_parser,
    "cluster": cluster_parser,
    "curate": curate_parser,
    "evaluate": evaluate_parser,
    "report": report_parser,
    "export": export_parser,
    "data": data_parser,
    "openclip": openclip_parser,
}
