"""What each design of ProtoCLIP is worth on the built-in pairs, over seeds: ``make study``.

Four stages, each resumable; a finished run is one line of ``runs.jsonl``:
select    settings of ProtoCLIP and of the control, judged on concepts of their own
overhead  cost of a ProtoCLIP epoch beside a CLIP epoch, by phase, in one process
main      every row of the table, seed by seed
report    table.md, summary.json and plot.png from whatever is finished, and the README's section
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import study_rows

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "study"
SELECTION_SEEDS = (1000, 1001)
SCORED = ("group/lp_acc1", "subgroup/lp_acc1", "group/ami", "subgroup/ami")
SCORED += ("text_retrieval_recall@5", "image_retrieval_recall@5")
STAGES = ("select", "overhead", "main", "report")
# Flags and threads: the study's model and chosen settings as in its runs, and the built-in run
# as shipped, with all cores.
OVERHEAD = {"study": ([], 1), "protoclip-tiny": (["--model", "protoclip-tiny"], 0)}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument(
        "--seeds", type=int, default=5,
        help="of each row, and twice as many of the rows that the verdict rests on (default: "
        "%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument(
        "--quick", action="store_true", help="four rows, two seeds, four epochs: a minute or two"
    )
    return parser


def task(stage: str, row: str, seed: int, epochs: float, flags: Sequence[str]) -> dict[str, Any]:
    """A run to be done, and the key under which it is known when it is done."""
    return {"stage": stage, "row": row, "seed": seed, "epochs": epochs, "flags": list(flags)}


def finished(path: Path) -> list[dict[str, Any]]:
    """The runs of a runs.jsonl; a line torn by a crash is left out."""
    runs = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            runs.append(json.loads(line))
        except ValueError:
            continue
    return runs


def key_of(run: Mapping[str, Any]) -> str:
    names = ("stage", "row", "seed", "epochs", "flags")
    return json.dumps([run[name] for name in names])


def _start_worker() -> None:
    os.environ.update(TQDM_DISABLE="1")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    import torch

    torch.set_num_threads(1)


def _do(one: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.study_runs import run

    try:
        return run(one)
    except Exception as error:
        return {**one, "error": f"{type(error).__name__}: {error}"}


def do_all(tasks: Sequence[dict[str, Any]], out: Path, jobs: int) -> list[dict[str, Any]]:
    """Do what is not done yet; returns all runs of ``tasks`` that are finished."""
    path = out / "runs.jsonl"
    done = {key_of(run): run for run in finished(path)}
    missing = [one for one in tasks if key_of(one) not in done]
    started = time.monotonic()
    print(f"{len(tasks)} runs, {len(tasks) - len(missing)} already there", flush=True)
    if missing:
        os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(jobs, len(missing)), initializer=_start_worker) as pool:
            for number, run in enumerate(pool.imap_unordered(_do, missing), start=1):
                label = f"{run['stage']}: {run['row']}, seed {run['seed']}"
                if "error" in run:
                    print(f"FAILED {label}: {run['error']}", flush=True)
                    continue
                with path.open("a") as file:
                    file.write(json.dumps(run) + "\n")
                done[key_of(run)] = run
                left = (time.monotonic() - started) / number * (len(missing) - number)
                print(
                    f"[{number}/{len(missing)}, about {left / 60:.0f} min left] {label}: "
                    f"{run['training_cpu_seconds']:.0f} s of CPU",
                    flush=True,
                )
    return [done[key_of(one)] for one in tasks if key_of(one) in done]


def score(run: Mapping[str, Any]) -> float:
    """What settings are chosen by: the mean of probe, AMI and R@5 on the selection concepts."""
    sets = run["metrics"].values()
    return statistics.fmean(one[name] for one in sets for name in SCORED)


def select(out: Path, jobs: int, epochs: float, seeds: Sequence[int]) -> dict[str, Any]:
    """Try the candidates; write selection.json with every score and the two choices."""
    families = {
        "ProtoCLIP": study_rows.PROTOCLIP_CANDIDATES,
        "distillation": study_rows.DISTILL_CANDIDATES,
    }
    tasks = [
        task("select", f"{family}: {name}", seed, epochs, flags)
        for seed in seeds
        for family, candidates in families.items()
        for name, flags in candidates.items()
    ]
    runs = do_all(tasks, out, jobs)
    record: dict[str, Any] = {"seeds": list(seeds), "epochs": epochs, "scored": SCORED}
    for family, candidates in families.items():
        scores = {
            name: [score(run) for run in runs if run["row"] == f"{family}: {name}"]
            for name in candidates
        }
        means = {name: statistics.fmean(values) for name, values in scores.items() if values}
        best = max(means, key=lambda name: means[name])
        record[family] = {"scores": scores, "chosen": best, "flags": candidates[best]}
        print(f"{family}: chose '{best}'; " + ", ".join(f"{k} {v:.4f}" for k, v in means.items()))
    _write(out / "selection.json", record)
    return record


def measure_overhead(
    out: Path, chosen: Sequence[str], model: str, repeats: int = 3
) -> dict[str, Any]:
    """Cost of an epoch by phase, variants interleaved, fastest steps; adds to overhead.json."""
    import torch

    from benchmarks.study_runs import episode_seconds, epoch_seconds

    flags, threads = OVERHEAD[model]
    torch.set_num_threads(threads or os.cpu_count() or 1)
    variants = {
        "CLIP": study_rows.CLIP,
        "extract": [*chosen, "--episode-features", "extract"],
        "reuse": [*chosen, "--episode-features", "reuse"],
    }
    rounds: dict[str, list[dict[str, list[float]]]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, own in variants.items():
            rounds[name].append(episode_seconds([*flags, *own]))
    steps = max(len(one["forward"]) for one in rounds["CLIP"]) // 2
    phases = {name: epoch_seconds(measured, steps) for name, measured in rounds.items()}
    totals = {name: sum(values.values()) for name, values in phases.items()}
    ratios = {name: total / totals["CLIP"] for name, total in totals.items()}
    for name, values in phases.items():
        shown = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in values.items())
        print(f"{model} {name}: {totals[name]:.2f} s an epoch, {ratios[name]:.3f}x ({shown})")
    path = out / "overhead.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    record[model] = {
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "seconds": phases,
        "total": totals,
        "ratio": ratios,
    }
    _write(path, record)
    return record


def machine() -> dict[str, str]:
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []:
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    got = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    return {
        "cpu": model,
        "simd": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "commit": got.stdout.strip(),
    }


def main_tasks(
    out: Path, seeds: Sequence[int], epochs: float, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Seed by seed, so that whatever is finished can be compared in pairs."""
    selection = json.loads((out / "selection.json").read_text())
    chosen, distill = (selection[name]["flags"] for name in ("ProtoCLIP", "distillation"))
    rows = study_rows.main_rows(chosen, distill)
    longer = _equal_time(out, chosen, epochs)
    if longer is None:
        print(f"'{study_rows.EQUAL_TIME}' waits for --stage overhead", flush=True)
        del rows[study_rows.EQUAL_TIME]
    return [
        task("main", row, seed, (longer if row == study_rows.EQUAL_TIME else 0) or epochs, flags)
        for seed in seeds
        for row, flags in rows.items()
        if not only or row in only
    ]


def _equal_time(out: Path, chosen: Sequence[str], epochs: float) -> float | None:
    """Epochs of CLIP that take as long as ProtoCLIP's; None: the cost has not been measured.

    Settled at the first asking, so that measuring again does not ask for other runs.
    """
    path = out / "overhead.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    if "equal_time" not in record:
        if "study" not in record:
            return None
        ratio = record["study"]["ratio"]["extract" if "extract" in chosen else "reuse"]
        _write(path, {"equal_time": {"ratio": ratio}, **record})
    else:
        ratio = record["equal_time"]["ratio"]
    # The first two episodes have no prototypes, so a run costs less than the ratio says.
    return round(epochs + (epochs - 2) * (ratio - 1), 2)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    out = args.out / "quick" if args.quick else args.out
    out.mkdir(parents=True, exist_ok=True)
    epochs = study_rows.QUICK_EPOCHS if args.quick else study_rows.EPOCHS
    stages = STAGES if args.stage == "all" else (args.stage,)
    seeds = range(2 if args.quick else args.seeds)
    for name in ("selection.json", "overhead.json") if args.quick else ():
        # The quick form spends its time on runs; settings and costs are the whole study's.
        (out / name).write_text((RESULTS / name).read_text())
    if "select" in stages and not args.quick:
        select(out, args.jobs, epochs, SELECTION_SEEDS)
    if "overhead" in stages and not args.quick:
        flags = json.loads((out / "selection.json").read_text())["ProtoCLIP"]["flags"]
        path = out / "overhead.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        for model in OVERHEAD:
            if args.stage == "overhead" or model not in known:
                measure_overhead(out, flags if model == "study" else [], model)
    tasks = main_tasks(out, seeds, epochs, study_rows.QUICK_ROWS if args.quick else ())
    if not args.quick:
        more = range(args.seeds, 2 * args.seeds)
        tasks += main_tasks(out, more, epochs, study_rows.VERDICT_ROWS)
    if "main" in stages:
        do_all(tasks, out, args.jobs)
    if "report" in stages:
        from benchmarks.study_report import write_report

        done = {key_of(run): run for run in finished(out / "runs.jsonl")}
        runs = [done[key_of(one)] for one in tasks if key_of(one) in done]
        write_report(runs, list(dict.fromkeys(one["row"] for one in tasks)), out, args.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
