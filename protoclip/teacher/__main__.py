"""``python -m protoclip.teacher``: features of a frozen model, for ``--external-teacher``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from protoclip.config import DataConfig, Parser, check_above
from protoclip.data import open_dataset
from protoclip.teacher.encoders import MINILM, MODALITIES, build_encoder
from protoclip.teacher.extract import extract_features

PROG = "python -m protoclip.teacher"


def build_parser() -> Parser:
    parser = Parser(
        PROG,
        description="Write a frozen model's features of all pairs, by key, to a .npz that "
        "protoclip.train --external-teacher takes. A stopped run goes on where it was.",
    )
    data = DataConfig()
    add = parser.add_argument
    add("--data", default=data.train_data, metavar="TEXT", help="as protoclip.train --train-data")
    add(
        "--model",
        default=MINILM,
        metavar="TEXT",
        help=f"{MINILM}, a model that OpenCLIP lists, or a text model of Hugging Face such as "
        "roberta-large, by name or folder (default: %(default)s)",
    )
    add("--pretrained", default="", metavar="TEXT", help="weights of an OpenCLIP model")
    add("--modality", default="text", choices=MODALITIES, help="default: %(default)s")
    add("--out", required=True, metavar="PATH", help="the .npz to write")
    add("--dim", type=int, default=0, metavar="N", help="principal components to keep; 0: all")
    add("--batch-size", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--device", default="auto", metavar="TEXT", help="cpu, cuda, ...; auto: cuda if there")
    add("--csv-separator", default=data.csv_separator, metavar="TEXT")
    add("--csv-img-key", default=data.csv_img_key, metavar="TEXT")
    add("--csv-caption-key", default=data.csv_caption_key, metavar="TEXT")
    add("--encoding", default=data.csv_encoding, metavar="TEXT", help="of a table")
    return parser


def run(args: argparse.Namespace) -> str:
    """What the command line asks for; returns the text to print."""
    out = Path(args.out)
    check_above(out, "--out")
    if out.exists():
        raise ValueError(f"--out: {out} exists; choose another name or remove it")
    if args.dim < 0 or args.batch_size < 1:
        raise ValueError(
            "expected --dim of at least 0 and --batch-size of at least 1, got "
            f"{args.dim} and {args.batch_size}"
        )
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset = open_dataset(
        args.data,
        "all",
        csv_separator=args.csv_separator,
        csv_img_key=args.csv_img_key,
        csv_caption_key=args.csv_caption_key,
        csv_encoding=args.encoding,
    )
    encoder = build_encoder(args.model, args.pretrained, args.modality, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(
        total=len(dataset), desc=args.model, unit=" samples", leave=False, disable=None
    ) as bar:
        rows, columns = extract_features(
            encoder,
            dataset,
            out,
            teacher=f"{args.model} {args.pretrained} {args.modality}",
            dim=args.dim,
            batch_size=args.batch_size,
            device=device,
            progress=bar.update,
        )
    return f"{out}: {rows:,} samples of {dataset.name}, {columns} columns, by key"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake ends it with one line and status 2."""
    args = build_parser().parse_args(argv)
    try:
        print(run(args))
    except (ValueError, OSError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
