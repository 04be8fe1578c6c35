"""Records as Markdown: the README's performance section and the roofline page's tables."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.records import Row, case_of
from benchmarks.roofline import MACHINES, Work, floor_ms, large

Record = dict[str, Any]
OURS = "protoclip"


def newest_per_machine(records: Iterable[Record]) -> list[Record]:
    """Of each machine the record whose last run is the latest; machines by name."""
    newest: dict[str, Record] = {}
    for record in sorted(records, key=_date):
        newest[record["runs"][-1]["machine"]] = record
    return [newest[name] for name in sorted(newest)]


def _date(record: Record) -> str:
    return max(run["date"] for run in record["runs"])


def cases(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows by case, the fastest of our backends first, peers from fast to slow."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(case_of(row), []).append(row)
    return [sorted(g, key=lambda r: (not is_ours(r), r["median_ms"])) for g in groups.values()]


def is_ours(row: Row) -> bool:
    return row["variant"].startswith(OURS)


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


# -- the README's section


def section(records: Iterable[Record]) -> str:
    """Everything between the README's markers."""
    parts = [_machine(record) for record in newest_per_machine(records)]
    return "\n\n".join(parts) if parts else "No record yet."


def _machine(record: Record) -> str:
    rows = record["rows"]
    plain = [group for group in cases(r for r in rows if r["sweep"] is None) if is_ours(group[0])]
    table = [
        "| op | shape | dtype | ours, median [p20, p80] | rate (share of ceiling) | extra memory |"
        " peers: time as a multiple of ours, extra memory |",
        "|---|---|---|---|---|---|---|",
        *(_case_row(group) for group in plain if group[0]["phase"] not in ("forward", "backward")),
    ]
    parts = [_head(record), "\n".join(table), _slower(cases(rows)), _growth(rows), _plots(record)]
    return "\n\n".join(filter(None, parts))


def _head(record: Record) -> str:
    run = record["runs"][-1]
    versions = run["versions"]
    named = [f"{name} {versions[name]}" for name in ("torch", "triton") if versions.get(name)]
    days = sorted({r["date"][:10] for r in record["runs"]})
    commits = list(dict.fromkeys(r["commit"] or "unknown" for r in record["runs"]))
    ceilings = ", ".join(
        f"{name} GEMM {digits(rate)} TFLOP/s" for name, rate in run["ceilings"].items()
        if name != "copy"
    )  # fmt: skip
    notes = list(dict.fromkeys(r["note"] for r in record["runs"] if r.get("note")))
    return (
        f"**{run['machine']}**, {run['threads']} threads, {', '.join(named)}; recorded "
        f"{' and '.join(days)} at {', '.join(commits)}. Ceilings of the same run: {ceilings}, copy "
        f"{digits(run['ceilings']['copy'])} GB/s." + "".join(f" **{note}**" for note in notes)
    )


def _case_row(group: list[Row]) -> str:
    ours = group[0]
    unit = "TFLOP/s" if ours["bound"] == "gemm" else "GB/s"
    peers = [
        f"{r['variant']} {digits(r['ratio'])}× ({mib(r)})" for r in group if r["ratio"] is not None
    ]
    return (
        f"| `{label(ours)}` ({ours['variant'].removeprefix(OURS + '-')}) | {sizes(ours)} | "
        f"{ours['dtype']} | {digits(ours['median_ms'])} ms [{digits(ours['p20_ms'])}, "
        f"{digits(ours['p80_ms'])}] | {digits(ours['rate'])} {unit} ({ours['share']:.0%}) | "
        f"{mib(ours)} | {', '.join(peers) or '–'} |"
    )


def slower_cases(groups: Iterable[list[Row]]) -> list[str]:
    """Where a peer took less time than we did, in words."""
    lines = []
    for row in (row for group in groups for row in group):
        if row["ratio"] is not None and row["ratio"] < 1:
            case = f"`{label(row)}` {sizes(row)} {row['dtype']}"
            note = f" ({row['note']})" if row["note"] else ""
            lines.append(
                f"{case}: {row['variant']} takes {digits(row['ratio'], 2)} of our time{note}"
            )
    return lines


def _slower(groups: Iterable[list[Row]]) -> str:
    found = slower_cases(groups)
    if not found:
        return "Slower than a peer: nowhere in this record."
    return "Slower than a peer:\n\n" + "\n".join(f"- {text}" for text in found)


# -- growth


def exponent(x: Iterable[float], y: Iterable[float]) -> float:
    """Slope of log y over log x, by least squares."""
    return float(np.polyfit(np.log(list(x)), np.log(list(y)), 1)[0])


def sweeps(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """(op, letter, variant) -> its points in order of size."""
    lines: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["sweep"] is not None:
            lines.setdefault((row["op"], row["sweep"], row["variant"]), []).append(row)
    for (_, letter, _), points in lines.items():
        points.sort(key=lambda r, letter=letter: r["shape"][letter])
    return lines


def _growth(rows: list[Row]) -> str:
    """Fitted on the upper half of each sweep: below, fixed costs hide the growth."""
    table = [
        "| growth | from, to | time grows as | flop count | extra memory grows as | at the top |",
        "|---|---|---|---|---|---|",
    ]
    for (op, letter, variant), points in sweeps(rows).items():
        upper = points[len(points) // 2 - (len(points) == 3) :]
        if len(points) < 3:
            continue
        x = [row["shape"][letter] for row in upper]
        time = exponent(x, [row["min_ms"] for row in upper])
        flop = exponent(x, [row["flop"] for row in upper])
        memory = [row["peak_mib"] for row in upper]
        grown = "under 1 MiB"
        if all(m is not None and m > 1 for m in memory):
            grown = f"{letter}^{exponent(x, memory):.2f}"
        top = points[-1]
        table.append(
            f"| `{op}` in {letter}, {variant} | {points[0]['shape'][letter]}, {x[-1]} | "
            f"{letter}^{time:.2f} | {letter}^{flop:.2f} | {grown} | {digits(top['median_ms'])} ms, "
            f"{mib(top)} |"
        )
    return "\n".join(table) if len(table) > 2 else ""


def plot_names(record: Record) -> list[str]:
    """File names of the plots that a record has the rows for."""
    have = {(op, letter) for op, letter, _ in sweeps(record["rows"])}
    slug = record["runs"][-1].get("slug", "record")
    named = {("info_nce", "N"): "info-nce", ("kmeans_assign", "K"): "kmeans"}
    return [f"{slug}-{name}.svg" for key, name in named.items() if key in have]


def _plots(record: Record) -> str:
    return "\n".join(f"![{name[:-4]}](benchmarks/results/{name})" for name in plot_names(record))


# -- the roofline page


def roofline(records: Iterable[Record]) -> str:
    """Floors of every recorded case on the machines of ``roofline.MACHINES``, and our share."""
    records = newest_per_machine(records)
    head = ["op", "shape", "dtype", "Gflop", "GEMM-eq", "MB", "flop/byte"]
    head += [f"floor {machine.name}" for machine in MACHINES]
    head += [f"reached: {record['runs'][-1]['machine']}" for record in records]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    seen: dict[str, dict[int, Row]] = {}
    for index, record in enumerate(records):
        for group in cases(r for r in record["rows"] if r["sweep"] is None):
            if is_ours(group[0]):
                seen.setdefault(case_of(group[0]), {})[index] = group[0]
    phases = {"info_nce": "both", "prototype_cross_entropy": "soft"}
    for op, shape, dtype, work in large():
        row = {"op": op, "phase": phases.get(op, ""), "shape": shape, "dtype": dtype, "sweep": None}
        key = case_of(row)
        seen.setdefault(key, {-1: row | asdict(work)})
    for reached in seen.values():
        row = next(iter(reached.values()))
        cells = [f"`{label(row)}`", sizes(row), row["dtype"], digits(row["flop"] * 1e-9)]
        cells += [_products(row), digits(row["bytes"] * 1e-6), digits(row["flop"] / row["bytes"])]
        work = Work(row["flop"], row["bytes"], row["bound"])
        cells += [f"{digits(floor_ms(work, row['dtype'], machine))} ms" for machine in MACHINES]
        cells += [
            f"{reached[i]['share']:.0%} of {'copy' if row['bound'] == 'copy' else 'GEMM'}"
            if i in reached
            else "not measured"
            for i in range(len(records))
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _products(row: Row) -> str:
    """How many N x M x D products the useful work is."""
    shape = row["shape"]
    if row["bound"] == "copy" or row["op"] == "soft_targets":
        return "–"
    other = shape.get("K", shape["N"])
    return digits(row["flop"] / (2.0 * shape["N"] * other * shape["D"]), 2)
