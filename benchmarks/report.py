"""Tables of the newest record of each machine.

python -m benchmarks.report RESULTS.json …            print the tables
python -m benchmarks.report RESULTS.json … --write    write them to benchmarks/results/speed.md, and
                                                      the list of lost comparisons to docs/speed.md
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Record = dict[str, Any]  # what harness.Record writes
IDENTITY = ("op", "phase", "variant", "shape", "dtype", "sweep")  # the last in older records
OURS = "protoclip"
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = RESULTS / "speed.md"
LOST = ROOT / "docs" / "speed.md"  # the page with the list of lost comparisons
LOST_BEGIN, LOST_END = "<!-- slower: begin -->\n", "<!-- slower: end -->\n"
INTRODUCTION = """# Records of speed

Written by `python -m benchmarks.report benchmarks/results/*.json --write` from the newest record
of each machine. [docs/speed.md](../../docs/speed.md) says how they are measured, and where
protoclip is slower and why. In a label, "both" is forward and backward. `authors` is the prototype
loss as the ProtoCLIP authors write it, `attention+gather` the same loss written with PyTorch's
attention.

"""
HEADLINES = {  # the cases of the front page's picture: a name, and which case it is
    "InfoNCE and gradient, bf16": "info_nce both bf16 N=4096 D=512",
    "InfoNCE and gradient, fp32": "info_nce both fp32 N=4096 D=512",
    "SigLIP and gradient, bf16": "siglip both bf16 N=4096 D=512",
    "prototype loss and gradient, bf16": "prototype_cross_entropy soft bf16 N=4096 K=20000 D=128",
    "nearest centroid, fp32": "kmeans_assign fp32 N=32768 K=1024 D=256",
    "k-means, 10 iterations, fp32": "kmeans 10 iterations fp32 N=20000 K=1000 D=128",
    "k-means, 20 iterations, fp32": "kmeans 20 iterations fp32 N=20000 K=1000 D=128",  # older ones
    "training step of heads, bf16": "align, linear heads step bf16 N=16384 D=512",
}
SCREENED = ("kmeans_assign", "kmeans")
BASELINES = ("no loss", "share of a step")  # beside which our number is set, but no peers


def identity(row: Row) -> str:
    """What makes two rows the same case and variant."""
    return json.dumps([row.get(key) for key in IDENTITY])


def newest_per_machine(records: Iterable[Record]) -> list[Record]:
    """Of each machine the record whose last run is the latest; machines by name."""
    dated = sorted(records, key=lambda record: max(run["date"] for run in record["runs"]))
    newest = {record["runs"][-1]["machine"]: record for record in dated}
    return [newest[name] for name in sorted(newest)]


def cases(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows by case, the fastest of our backends first, peers from fast to slow."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(identity(row | {"variant": None}), []).append(row)
    return [
        sorted(group, key=lambda row: (not is_ours(row), row["median_ms"]))
        for group in groups.values()
    ]


def is_ours(row: Row) -> bool:
    return row["variant"].startswith(OURS)


def share_in_words(row: Row) -> str:
    """A row's rate beside the ceiling of its run: copying, or torch's product of two matrices of
    2,048 x 2,048 in the row's dtype. Ops that screen in 8 bits or skip have no share of it."""
    if row["op"] in SCREENED:
        return f"{digits(row['share'], 2)} times torch's {row['dtype']} product"
    return f"{100 * row['share']:.0f} % of {'GEMM' if row['bound'] == 'gemm' else 'copy'}"


def label(row: Row) -> str:
    return " ".join(filter(None, (row["op"], row["phase"])))


def sizes(row: Row) -> str:
    return " ".join(f"{letter}={size}" for letter, size in row["shape"].items())


def digits(value: float, significant: int = 3) -> str:
    """``value`` to a few significant digits, never in scientific notation."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = significant - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(decimals, 0)}f}"


def mib(row: Row) -> str:
    return "?" if row["peak_mib"] is None else f"{digits(row['peak_mib'], 2)} MiB"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(records: Iterable[Record]) -> str:
    """The whole page."""
    machines = [_machine(record) for record in newest_per_machine(records)]
    return INTRODUCTION + ("\n\n".join(machines) if machines else "No record yet.") + "\n"


def newest_cpu(records: Iterable[Record]) -> Record | None:
    """The latest record of a CPU, whichever machine it is of, that has cases of the picture."""
    of_cpus = [
        record
        for record in records
        if record["runs"][-1].get("device", "cpu") == "cpu" and headline_cases(record)
    ]
    return max(of_cpus, key=lambda record: max(run["date"] for run in record["runs"]), default=None)


def case_name(row: Row) -> str:
    return f"{label(row)} {row['dtype']} {sizes(row)}"


def headline_cases(record: Record) -> dict[str, list[Row]]:
    """The picture's cases by name; those that the record lacks are left out."""
    by_case = {
        case_name(group[0]): group
        for group in cases(row for row in record["rows"] if not row.get("sweep"))
        if is_ours(group[0])
    }
    return {name: by_case[case] for name, case in HEADLINES.items() if case in by_case}


def lost_cases(record: Record) -> list[Row]:
    """The fastest peer of each case in which it took less time than we did, by its ratio."""
    lost = [faster[0] for group in cases(record["rows"]) if (faster := _faster(group))]
    return sorted(lost, key=lambda row: row["ratio"])


def summary(rows: Iterable[Row]) -> str:
    """The rows of a run as a table for a terminal: ours, and the best of the others."""
    lines = [["op", "size", "dtype", "ours, ms", "best peer", "its time", "memory, ours", "peer"]]
    for group in cases(rows):
        ours = group[0]
        if not is_ours(ours) or ours["phase"] in ("forward", "backward"):
            continue
        peer = next(iter(others(group)), None)
        lines.append(
            [
                label(ours),
                sizes(ours),
                ours["dtype"],
                digits(ours["median_ms"]),
                peer["variant"] if peer else "–",
                f"{digits(peer['ratio'], 2)}×" if peer else "–",
                mib(ours),
                mib(peer) if peer else "–",
            ]
        )
    if len(lines) == 1:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join(text)


def _machine(record: Record) -> str:
    head = [
        "op",
        "shape",
        "dtype",
        "ours, median [p20, p80]",
        "rate, beside the ceiling",
        "extra memory",
        "peers: time as a multiple of ours, extra memory",
    ]
    groups = cases(row for row in record["rows"] if not row.get("sweep"))
    lines = [
        _case(group)
        for group in groups
        if is_ours(group[0])
        and group[0]["phase"] not in ("forward", "backward")
        and "inertia" not in group[0]
    ]
    parts = [_head(record), table(head, lines), *_clusterings(groups)]
    return "\n\n".join([*parts, _slower(cases(record["rows"]))])


def _clusterings(groups: Iterable[list[Row]]) -> list[str]:
    """The table of k-means: time and inertia beside those of others."""
    groups = [group for group in groups if is_ours(group[0]) and "inertia" in group[0]]
    if not groups:
        return []
    head = ["k-means", "N, K, D", "ours, median [p20, p80]", "inertia"]
    head.append("peers: time and inertia as multiples of ours")
    lines = []
    for group in groups:
        ours = group[0]
        low, middle, high = (digits(ours[key]) for key in ("p20_ms", "median_ms", "p80_ms"))
        peers = [
            f"{row['variant']} {digits(row['ratio'])}× time, "
            f"{row['inertia'] / ours['inertia']:.4f}× inertia"
            for row in _compared(group)
        ]
        shape = ", ".join(f"{size:,}" for size in ours["shape"].values())
        time = f"{middle} ms [{low}, {high}]"
        lines.append([ours["phase"], shape, time, f"{ours['inertia']:.5g}", "; ".join(peers)])
    return [table(head, lines)]


def _head(record: Record) -> str:
    runs = record["runs"]
    newest = runs[-1]
    versions = [
        f"{package} {newest['versions'][package]}"
        for package in ("torch", "triton")
        if newest["versions"].get(package)
    ]
    days = sorted({run["date"][:10] for run in runs})
    commits = ", ".join(dict.fromkeys(run["commit"] or "unknown" for run in runs))
    if "," in commits:
        commits = f"different commits, some cases at each: {commits}"
    ceilings = [
        f"{dtype} GEMM {digits(rate)} TFLOP/s"
        for dtype, rate in newest["ceilings"].items()
        if dtype != "copy"
    ]
    notes = dict.fromkeys(run["note"] for run in runs if run.get("note"))
    return (
        f"**{newest['machine']}**, {newest['threads']} threads, {', '.join(versions)}; recorded "
        f"{' and '.join(days)} at {commits}. Ceilings of the same run: "
        f"{', '.join(ceilings)}, copy {digits(newest['ceilings']['copy'])} GB/s."
    ) + "".join(f" **{note}**" for note in notes)


def _case(group: list[Row]) -> list[str]:
    ours = group[0]
    unit = "TFLOP/s" if ours["bound"] == "gemm" else "GB/s"
    low, middle, high = (digits(ours[key]) for key in ("p20_ms", "median_ms", "p80_ms"))
    return [
        f"`{label(ours)}` ({ours['variant'].removeprefix(OURS + '-')})",
        sizes(ours),
        ours["dtype"],
        f"{middle} ms [{low}, {high}]",
        f"{digits(ours['rate'])} {unit} ({share_in_words(ours)})",
        mib(ours),
        _peers(group) or "–",
    ]


def _compared(group: list[Row]) -> list[Row]:
    """A case's rows that have a ratio, from fast to slow."""
    return sorted((r for r in group if r["ratio"] is not None), key=lambda r: r["ratio"])


def others(group: list[Row]) -> list[Row]:
    """A case's rows of others, from fast to slow."""
    return [row for row in _compared(group) if not is_ours(row) and row["variant"] not in BASELINES]


def _faster(group: list[Row]) -> list[Row]:
    """Peers that took less time than we did."""
    return [row for row in others(group) if row["ratio"] < 1]


def _peers(group: list[Row]) -> str:
    return ", ".join(f"{r['variant']} {digits(r['ratio'])}× ({mib(r)})" for r in _compared(group))


def _slower(groups: Iterable[list[Row]]) -> str:
    """Where a peer took less time than we did, in words."""
    lines = [
        f"- `{label(row)}` {sizes(row)} {row['dtype']}: {row['variant']} takes "
        f"{digits(row['ratio'], 2)} of our time" + (f" ({row['note']})" if row["note"] else "")
        for group in groups
        for row in _faster(group)
    ]
    if not lines:
        return "Slower than a peer: nowhere in this record."
    return "Slower than a peer:\n\n" + "\n".join(lines)


def lost_comparisons(record: Record) -> str:
    """Each case of a record in which a peer took less time than we did, by the median, as a table
    under the name of the machine."""
    rows = []
    for group in cases(record["rows"]):
        if faster := _faster(group):
            case = f"`{label(faster[0])}` {sizes(faster[0])} {faster[0]['dtype']}"
            rows.append([case, "; ".join(f"{r['variant']}: {r['ratio']:.2f}" for r in faster)])
    run = record["runs"][-1]
    head = ["Case", "Faster peers: their median time as a share of ours"]
    return f"{run['machine']}, {run['date'][:10]}:\n\n{table(head, rows)}\n"


def with_lost_comparisons(text: str, records: Iterable[Record]) -> str:
    """docs/speed.md with the list of the newest record of a CPU."""
    newest = newest_cpu(records)
    if newest is None:
        return text
    before, _, rest = text.partition(LOST_BEGIN)
    after = rest.partition(LOST_END)[2]
    return f"{before}{LOST_BEGIN}{lost_comparisons(newest)}{LOST_END}{after}"


def stale(records: list[Record]) -> bool:
    """Whether a page says something else than the records."""
    lost = LOST.read_text(encoding="utf-8")
    changed = lost != with_lost_comparisons(lost, records)
    return changed or PAGE.read_text(encoding="utf-8") != page(records)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("results", nargs="+", type=Path, help="records written by --record")
    parser.add_argument("--write", action="store_true", help="write the pages")
    options = parser.parse_args(arguments)
    records = [json.loads(path.read_text()) for path in options.results]
    if options.write:
        PAGE.write_text(page(records), encoding="utf-8")
        lost = with_lost_comparisons(LOST.read_text(encoding="utf-8"), records)
        LOST.write_text(lost, encoding="utf-8")
    else:
        print(page(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
