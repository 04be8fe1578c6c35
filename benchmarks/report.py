"""Records into pages.

    python -m benchmarks.report RESULTS.json …            print the performance section
    python -m benchmarks.report RESULTS.json … --write    update README, roofline page and plots
    python -m benchmarks.report --compare OLD.json NEW.json

Of each machine the newest record counts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import records, tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {ROOT / "README.md": tables.section, ROOT / "benchmarks" / "README.md": tables.roofline}
BEGIN = "<!-- record: begin (python -m benchmarks.report writes this) -->"
END = "<!-- record: end -->"


def between(text: str, path: Path) -> tuple[str, str, str]:
    """What stands before, between and after the markers of a page.

    Raises:
        ValueError: the markers are not there once each.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path}: expected the lines {BEGIN!r} and {END!r} once each")
    before, rest = text.split(BEGIN)
    middle, after = rest.split(END)
    return before, middle.strip(), after


def stale(found: list[dict]) -> list[Path]:
    """The pages that do not say what the records say."""
    return [
        path
        for path, render in PAGES.items()
        if between(path.read_text(), path)[1] != render(found).strip()
    ]


def write(found: list[dict]) -> None:
    """Put tables into the pages and the plots beside the records."""
    for path, render in PAGES.items():
        before, _, after = between(path.read_text(), path)
        path.write_text(f"{before}{BEGIN}\n{render(found).strip()}\n{END}{after}")
    from benchmarks import plots

    for record in tables.newest_per_machine(found):
        plots.draw(record, RESULTS)


def compare(old: dict, new: dict, tolerance: float) -> list[str]:
    """One line for each case that both records have, the most slowed first."""
    before = {records.identity(row): row for row in old["rows"]}
    changes = []
    for row in new["rows"]:
        if (past := before.get(records.identity(row))) is not None:
            changes.append((row["median_ms"] / past["median_ms"], past, row))
    lines = []
    for factor, past, row in sorted(changes, key=lambda change: -change[0]):
        verdict = "as before"
        if abs(factor - 1) > tolerance:
            verdict = "slower" if factor > 1 else "faster"
        case = f"{tables.label(row)} {tables.sizes(row)} {row['dtype']} {row['variant']}"
        times = [tables.digits(r["median_ms"]) for r in (past, row)]
        lines.append(f"{verdict:9s} {factor:5.2f}x  {case}: {' -> '.join(times)} ms")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("results", nargs="*", type=Path, help="records written by --record")
    parser.add_argument("--write", action="store_true", help="update README, roofline and plots")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    parser.add_argument("--tolerance", type=float, default=0.1, help="a change this small is noise")
    options = parser.parse_args(arguments)
    if not options.compare and not options.results:
        parser.error("expected records, e.g. benchmarks/results/*.json, or --compare OLD NEW")
    try:
        if options.compare:
            old, new = map(records.load, options.compare)
            machines = [record["runs"][-1]["machine"] for record in (old, new)]
            if machines[0] != machines[1]:
                print(f"different machines: {machines[0]} and {machines[1]}")
            print("\n".join(compare(old, new, options.tolerance)) or "no case in common")
            return 0
        found = [records.load(path) for path in options.results]
        if options.write:
            write(found)
        else:
            print(tables.section(found))
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
