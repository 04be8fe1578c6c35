"""The flags of every command, so that --help loads none of what a command works with."""

from __future__ import annotations

from collections.abc import Callable

from protoclip.config import PRECISIONS, DataConfig, Parser

CLUSTER = "protoclip cluster"


def cluster_parser() -> Parser:
    """Flags of ``protoclip cluster``."""
    parser = Parser(
        CLUSTER,
        description="Put pictures, or rows of features, into groups by k-means. Writes "
        "clusters.csv, centroids.safetensors and report.html, a page that shows every group.",
        epilog="example: protoclip cluster photos/ --k 50 --out groups/",
    )
    add = parser.add_argument
    add(
        "data",
        metavar="DATA",
        help="a folder of pictures, a .csv or .tsv, webdataset shards, builtin:emoji, or features "
        "[N, D]: .npy, .npz (with keys) or .safetensors",
    )
    add("--k", default="auto", metavar="N", help="groups, 2 to 10^6; auto (default): the K with "
        "the largest mean silhouette on at most 3,000 rows, of 2 ... 300")  # fmt: skip
    add("--out", default="groups", metavar="DIR", help="where to write (default: %(default)s)")
    add("--model", default="", metavar="TEXT", help="an OpenCLIP model that sees the pictures "
        "(default: ViT-B-32)")  # fmt: skip
    add("--pretrained", default="", metavar="TEXT", help="its weights: OpenCLIP's tag or a file")
    add("--run", default="", metavar="PATH", help="a run or checkpoint of protoclip train instead")
    add(
        "--captions", default="", metavar="FILE", help="texts of a features file's rows, one a line"
    )
    add("--weights", default="", metavar="FILE", help="weight of each picture or row: .npy, or "
        "text with one a line")  # fmt: skip
    add("--normalize", action="store_true", help="scale a features file's rows to length 1, as "
        "those of pictures are")  # fmt: skip
    for flag, number, words in (
        ("--iters", 20, "iterations of k-means (%(default)s)"),
        ("--seed", 0, "the same seed, the same groups (%(default)s)"),
        ("--batch-size", 256, "pictures encoded at once (%(default)s)"),
        ("--workers", 0, "processes that read pictures (%(default)s)"),
    ):
        add(flag, type=int, default=number, metavar="N", help=words)
    add("--device", default="auto", metavar="TEXT", help="cpu, cuda, ... (default: %(default)s)")
    add("--precision", default="auto", choices=PRECISIONS, help="of encoding (%(default)s)")
    add_table_flags(parser)
    return parser


def add_table_flags(parser: Parser) -> None:
    """The columns of a .csv or .tsv."""
    data = DataConfig()
    for name, words in (
        ("csv_separator", "of a table (default: a tab)"),
        ("csv_img_key", "column of the pictures' paths (%(default)s)"),
        ("csv_caption_key", "column of the captions (%(default)s)"),
        ("csv_encoding", "of a table (%(default)s)"),
    ):
        flag = "--encoding" if name == "csv_encoding" else "--" + name.replace("_", "-")
        default = getattr(data, name)
        parser.add_argument(flag, dest=name, default=default, metavar="TEXT", help=words)


PARSERS: dict[str, Callable[[], Parser]] = {"cluster": cluster_parser}
