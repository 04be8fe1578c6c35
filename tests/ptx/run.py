"""Executes cases in the emulator and prints a line for each, then what was executed and counted.

    python -m tests.ptx.run 80 ["part of a name" …] [--ci] [--count] [--noise] [--shard 0/2]

A case is compared with the reference backend in fp64 on the same rounded inputs, by the budget of
tests/budget.py, whose base is the reference backend in the inputs' dtype. A number is the error, in
units of the base's own or of half an ulp of the largest value, whichever is larger. Fresh tensors
are full of NaN, so that a read of what no kernel wrote shows too.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from protoclip.kernels import contrastive, prototype_cross_entropy, waves
from tests.budget import assert_within_budget
from tests.ptx import cases, cuda_driver, known, triton_driver
from tests.ptx.arithmetic import EmulatorError, options
from tests.ptx.cases import Case
from tests.ptx.launch import Access

Results = dict[str, Tensor]


def results(case: Case, capability: int | None, dtype: torch.dtype | None = None) -> Results:
    """Loss and gradients, or results by name, on an architecture; None: of the reference backend,
    in ``dtype``."""
    leaves = {name: leaf.detach() for name, leaf in case.leaves.items()}
    if dtype is not None:
        leaves = {
            name: leaf.to(dtype) if leaf.is_floating_point() else leaf
            for name, leaf in leaves.items()
        }
    if case.on_cuda is not None and capability is not None:
        return case.on_cuda(capability, **leaves)
    backend = "reference" if capability is None else "triton"
    if not case.has_gradients:
        return case.run(backend, **leaves)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    loss = case.run(backend, **leaves)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    gradients = torch.autograd.grad(loss, list(leaves.values()), upstream, allow_unused=True)
    by_name = {
        f"d{name}": gradient
        for name, gradient in zip(leaves, gradients, strict=True)
        if gradient is not None
    }
    return {"loss": loss.detach()} | by_name


class Judgement(NamedTuple):
    text: str
    problems: list[str]


def judge(case: Case, got: Results, truth: Results, base: Results) -> Judgement:
    """Each result against the budget."""
    texts: list[str] = []
    problems: list[str] = []
    # Gradients of scalars are sums that cancel; of the terms' absolute values, at least those of
    # whole rows.
    terms = 0.0
    for name in ("dx", "dy"):
        if name in truth:
            by_row = (case.leaves[name[1:]].double() * truth[name]).sum(-1)
            terms += by_row.abs().sum().item() / max(case.scale, 1)
    # lg2.approx may err by 2^-22 of log2(N), also where all logits are 0.
    scale = max(case.scale, 1.0) if options.approximate_ulps else case.scale
    for name, exact in truth.items():
        value = got[name]
        if not value.dtype.is_floating_point:
            wrong = value != exact
            texts.append(f"{name} {int(wrong.sum())} differ")
            if name == "labels":
                wrong &= ~is_nearest(value, truth["distances"], case.leaves["p"], case.leaves["c"])
            if wrong.any():
                problems.append(f"{name}: {int(wrong.sum())} are wrong")
        elif name == "distances":
            close = torch.isclose(value.double(), exact.double(), rtol=1e-6, atol=0, equal_nan=True)
            texts.append(f"{name} {int((~close).sum())} differ")
            if not close.all():
                problems.append(f"{name}: {int((~close).sum())} are not the least")
        else:
            size = exact.double().abs().max().item()
            error = (value.double() - exact).abs().max().item()
            base_error = (base[name].double() - exact).abs().max().item()
            unit = max(base_error, torch.finfo(value.dtype).eps / 2 * size, 1e-300)
            texts.append(f"{name} {error / unit:.2g}")
            magnitude = max(size, terms) if exact.ndim == 0 and name != "loss" else size
            try:
                assert_within_budget(
                    value, exact, base[name], name, magnitude=magnitude, logit_scale=scale
                )
            except AssertionError as over:
                problems.append(str(over))
    return Judgement(", ".join(texts), problems)


def is_nearest(labels: Tensor, least: Tensor, p: Tensor, c: Tensor) -> Tensor:
    """Which labels are those of a nearest centroid, to fp32 rounding."""
    inside = (labels >= 0) & (labels < len(c))
    chosen = c.double()[labels.clamp(0, len(c) - 1)]
    distances = (p.double() - chosen).square().sum(1)
    return inside & torch.isclose(distances, least.double(), rtol=1e-6, atol=0)


BOUNDS = [
    (waves, "GRADIENT_BYTES", 1 << 15),
    (waves, "SIDE", 256),
    (prototype_cross_entropy, "PROTOTYPE_BYTES", 1 << 15),
    (contrastive, "PARTIAL_BYTES", 1 << 15),
]


@contextmanager
def bounds_of(case: Case) -> Iterator[None]:
    """Chunks as small as the case says, and extremes looked for where it says so."""
    changes: list[tuple[Any, str, int]] = []
    if case.small_chunks:
        changes += BOUNDS
    if case.small_chunks or case.extremes:
        changes.append((contrastive, "FEW", 0))
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@dataclass
class Tally:
    """Of one kernel, over all launches."""

    launches: int = 0
    seconds: float = 0.0
    blocks: dict[Any, Any] = field(default_factory=dict)  # compiled variant -> runs of its blocks
    instructions: collections.Counter[str] = field(default_factory=collections.Counter)
    accesses: dict[tuple[str, str], Access] = field(default_factory=dict)  # by space and line

    def add(self, launched: triton_driver.Launched) -> None:
        launch = launched.launch
        self.launches += 1
        self.seconds += launched.seconds
        executed = self.blocks.get(launch.kernel, 0)
        self.blocks[launch.kernel] = executed + launch.block_counts
        self.instructions += launch.kernel.opcode_counts(launch)
        for (line, space), access in launch.accesses.items():
            place = space, launch.kernel.source_of(line)
            self.accesses.setdefault(place, Access()).add(access)

    def coverage(self) -> tuple[int, int, set[str]]:
        """Instructions executed, of all variants' instructions, and source lines of which no
        variant's instruction was."""
        executed = total = 0
        seen: set[str] = set()
        lines: set[str] = set()
        for kernel, counts in self.blocks.items():
            total += len(kernel.instructions)
            for (start, end), count in zip(kernel.block_range, counts, strict=True):
                places = {i.place[1].split(" < ")[0] for i in kernel.instructions[start:end]}
                own = {p for p in places if "standard.py" not in p and not p.endswith(":0")}
                lines |= own
                if count:
                    executed += end - start
                    seen |= own
        return executed, total, lines - seen


def execute(case: Case, capability: int) -> Judgement:
    """One case. Launches are in ``triton_driver.launches`` afterwards."""
    triton_driver.serve_protoclip(capability, case.num_sms)
    triton_driver.launches.clear()
    with bounds_of(case):
        try:
            got = results(case, capability)
            return judge(case, got, results(case, None, torch.float64), results(case, None))
        except EmulatorError as error:
            return Judgement("", [str(error)])
        except Exception as error:
            traceback.print_exc()
            return Judgement("", [f"{type(error).__name__}: {error}"])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.run")
    parser.add_argument("capability", type=int, help="80, 86, 89, 90, 100 or 120")
    parser.add_argument("names", nargs="*", help="only cases whose names contain one of these")
    parser.add_argument("--ci", action="store_true", help="only the cases that CI runs")
    parser.add_argument("--shard", default="0/1", help="I/K: every K-th case from I on")
    parser.add_argument("--count", action="store_true", help="bank conflicts and sectors by line")
    parser.add_argument("--facts", type=Path, help="a file for what was counted, as JSON")
    parser.add_argument("--record", action="store_true", help="counts of CI's cases to record.json")
    parser.add_argument("--noise", action="store_true", help="approximate instructions 2 ulp off")
    parser.add_argument("--nearest", action="store_true", help="tensor cores round correctly")
    parser.add_argument("--cut", action="store_true", help="tensor cores truncate each product")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    asked = arguments(argv)
    triton_driver.install(asked.capability)
    options.count = asked.count or asked.facts is not None
    asked.ci |= asked.record
    if asked.record and "nvcc" not in compilers():
        raise SystemExit("a record needs nvcc, for the CUDA kernels")
    options.product_sums = "nearest" if asked.nearest else "cut" if asked.cut else "truncated"
    options.approximate_ulps = 2 if asked.noise else 0
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors are full of NaN
    torch.set_num_threads(1)
    first, step = map(int, asked.shard.split("/"))
    chosen = [
        case
        for case in cases.ALL[first::step]
        if not asked.names or any(name in case.name for name in asked.names)
    ]
    if asked.ci:
        chosen = [case for case in chosen if asked.capability in case.ci]
    tallies: dict[str, Tally] = collections.defaultdict(Tally)
    facts: dict[str, dict[str, Facts]] = {}
    counts = collections.Counter(passed=0, failed=0, skipped=0)
    begin = time.time()
    for case in chosen:
        outcome = run_case(case, asked.capability, tallies)
        counts[outcome] += 1
        if outcome != "skipped":
            facts[case.name] = facts_of(triton_driver.launches)
    seconds = time.time() - begin
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    print(f"sm_{asked.capability}: {summary}, {seconds:.0f} s")
    print_tallies(tallies, asked.count)
    if asked.record:
        write_record(asked.capability, facts)
    if asked.facts is not None:
        cases_facts = {
            name: {kernel: counted._asdict() for kernel, counted in by_kernel.items()}
            for name, by_kernel in facts.items()
        }
        recorded = {"compilers": compilers(), f"sm_{asked.capability}": cases_facts}
        recorded["modules"] = known.modules_loaded()
        asked.facts.write_text(json.dumps(recorded, indent=1) + "\n")
    return int(counts["failed"] > 0 or not chosen)


class Facts(NamedTuple):
    """What a profiler would count of a kernel in one case."""

    instructions: int  # of warps
    shared: int  # wavefronts
    least_shared: int  # without a bank conflict
    sectors: int  # of 32 bytes of global memory
    least_sectors: int


def facts_of(launches: list[triton_driver.Launched]) -> dict[str, Facts]:
    """By kernel."""
    facts: dict[str, Facts] = {}
    for launched in launches:
        launch = launched.launch
        spaces = {"shared": Access(), "global": Access()}
        for (_, space), access in launch.accesses.items():
            spaces[space.rsplit(".")[-1]].add(access)
        counted = Facts(
            instructions=launch.kernel.opcode_counts(launch).total(),
            shared=spaces["shared"].done,
            least_shared=spaces["shared"].least,
            sectors=spaces["global"].done,
            least_sectors=spaces["global"].least,
        )
        before = facts.get(launched.kernel, Facts(0, 0, 0, 0, 0))
        facts[launched.kernel] = Facts(*(a + b for a, b in zip(before, counted, strict=True)))
    return facts


RECORD = Path(__file__).parent / "record.json"


def write_record(capability: int, facts: dict[str, dict[str, Facts]]) -> None:
    """For each kernel the instructions of one case, the first one of bf16 if there is one."""
    chosen: dict[str, dict[str, Any]] = {}
    for case in sorted(facts, key=lambda name: not name.endswith("bf16")):
        for kernel, counted in facts[case].items():
            one = {"case": case, "instructions": counted.instructions}
            chosen.setdefault(kernel, one)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if record.get("compilers") != compilers():
        record = {"compilers": compilers()}
    record[f"sm_{capability}"] = dict(sorted(chosen.items()))
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def compilers() -> dict[str, str]:
    """Their versions, without the last number."""
    versions = {"triton": ".".join(triton.__version__.split(".")[:2])}
    if nvcc := shutil.which("nvcc"):
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        if found := re.search(r"release (\d+\.\d+)", told):
            versions["nvcc"] = found[1]
    return versions


def run_case(case: Case, capability: int, tallies: dict[str, Tally]) -> str:
    """Prints a case's line. -> passed, failed or skipped"""
    label = f"sm_{capability}"
    if case.on_cuda is not None and (reason := cuda_driver.missing(capability)):
        print(f"{label} skipped {case.name}: {reason}", flush=True)
        return "skipped"
    begin = time.time()
    judgement = execute(case, capability)
    seconds = time.time() - begin
    for launched in triton_driver.launches:
        tallies[launched.kernel].add(launched)
    note = ""
    if judgement.problems and capability in case.truncated and options.product_sums != "nearest":
        usual = options.product_sums
        options.product_sums = "nearest"
        note = f"; over the budget by truncated sums alone: {'; '.join(judgement.problems)}"
        judgement = execute(case, capability)
        options.product_sums = usual
    launches = triton_driver.launches
    ctas = sum(launched.ctas for launched in launches)
    size = f"[{len(launches)} launches, {ctas} CTAs, {seconds:.1f} s]"
    verdict = "failed" if judgement.problems else "passed"
    problems = "".join(f"\n    {problem}" for problem in judgement.problems)
    text = f"{label} {verdict} {case.name}: {judgement.text} {size}{note}{problems}"
    print(text, flush=True)
    return verdict


def print_tallies(tallies: dict[str, Tally], count: bool) -> None:
    print("\nkernel: launches, seconds, variants, PTX instructions executed at least once")
    unseen: dict[str, set[str]] = {}
    for kernel, tally in sorted(tallies.items()):
        executed, total, unseen[kernel] = tally.coverage()
        share = 100 * executed // total
        print(
            f"  {kernel}: {tally.launches}, {tally.seconds:.0f} s, {len(tally.blocks)} variants, "
            f"{executed} of {total} ({share} %)"
        )
    print("\nsource lines of which no variant's instruction was executed")
    for kernel, lines in unseen.items():
        if lines:
            print(f"  {kernel}: {', '.join(sorted(lines))}")
    if not count:
        return
    print("\nwarp instructions")
    for kernel, tally in sorted(tallies.items()):
        common = ", ".join(f"{op} {number}" for op, number in tally.instructions.most_common(12))
        print(f"  {kernel}: {tally.instructions.total()}: {common}")
    print("\naccesses by line: requests, wavefronts or sectors, and the fewest possible")
    rows = [
        (access.done - access.least, f"  {kernel} {space} {line}: {access.requests}, "
         f"{access.done} of {access.least} ({access.done / max(1, access.least):.2f} x)")
        for kernel, tally in tallies.items()
        for (space, line), access in tally.accesses.items()
    ]  # fmt: skip
    for excess, row in sorted(rows, reverse=True):
        if excess > 0:
            print(row)


if __name__ == "__main__":
    sys.exit(main())
