"""Breaks one executed PTX instruction at a time: does a check or the result show it?

    python -m tests.ptx.mutants 80 [--seed 0] [--each 3] [--only "part of a mutation's name"]
    python -m tests.ptx.mutants 80 --ci

A mutant that nothing notices is looked at by hand: most are equivalent, such as a second barrier in
a row, or a guard of a load whose value is not used.
"""

from __future__ import annotations

import argparse
import collections
import random
import re
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from tests.ptx import cases, triton_driver
from tests.ptx.arithmetic import EmulatorError
from tests.ptx.cases import Case
from tests.ptx.program import Kernel
from tests.ptx.run import Results, results


class Mutation(NamedTuple):
    lines: str  # which lines of PTX
    change: Callable[[str], str]


def dropped(line: str) -> str:
    return ""


def number(pattern: str, change: Callable[[int], int]) -> Callable[[str], str]:
    """Changes the first number that a pattern's group finds."""

    def changed(line: str) -> str:
        found = re.search(pattern, line)
        if found is None:
            return line
        return line[: found.start(1)] + str(change(int(found[1]))) + line[found.end(1) :]

    return changed


def further(size: int) -> Callable[[str], str]:
    """The address, so many bytes further."""

    def changed(line: str) -> str:
        address = r"\[\s*(%\w+)(?:\s*\+\s*(\d+))?"
        return re.sub(address, lambda m: f"[{m[1]}+{int(m[2] or 0) + size}", line, count=1)

    return changed


def without_guard(line: str) -> str:
    return re.sub(r"@%p\d+ ", "", line)


MUTATIONS = {
    "barrier dropped": Mutation(r"\tbar\.sync", dropped),
    "wait_group dropped": Mutation(r"(cp\.async|wgmma)\.wait_group", dropped),
    "wait_group one less": Mutation(
        r"(cp\.async|wgmma)\.wait_group", number(r"(\d+);", lambda n: n + 1)
    ),
    "commit_group dropped": Mutation(r"(cp\.async|wgmma)\.commit_group", dropped),
    "operands of mma swapped": Mutation(
        r"\tmma\.sync",
        lambda line: re.sub(r"\{ (%r\d+), (%r\d+) \}", r"{ \2, \1 }", line, count=1),
    ),
    "ldmatrix 16 B further": Mutation(r"\tldmatrix", further(16)),
    "st.shared 4 B further": Mutation(r"st\.shared\.[bf]32", further(4)),
    "st.shared 16 B further": Mutation(r"st\.shared\.v4", further(16)),
    "ld.shared 16 B further": Mutation(r"ld\.shared\.v4", further(16)),
    "st.global 1 MiB further": Mutation(r"st\.global", further(1 << 20)),
    "guard of ld.global dropped": Mutation(r"@%p\d+ ld\.global", without_guard),
    "ld.global 2 B further": Mutation(r"ld\.global\.(b32|v4)", further(2)),
    "distance of a shuffle": Mutation(
        r"shfl\.sync\.bfly", number(r", (\d+), 31", lambda n: n * 2 % 31)
    ),
    "size of cp.async": Mutation(r"cp\.async\.cg", lambda line: re.sub(r", %r\d+;", ", 16;", line)),
    "descriptor of wgmma 16 B further": Mutation(
        r"add\.s32 \t%r\d+, %r\d+, [246];", number(r"(\d+);", lambda n: n + 1)
    ),
    "wait of mbarrier dropped": Mutation(
        r"mbarrier\.try_wait", lambda line: "\tmov.pred complete, -1;"
    ),
    "expected bytes of mbarrier": Mutation(r"expect_tx", number(r", (\d+);", lambda n: n // 2)),
    "fence.proxy.async dropped": Mutation(r"fence\.proxy\.async", dropped),
    "tensor copy of another box": Mutation(
        r"cp\.async\.bulk\.tensor",
        lambda line: re.sub(r"\{(%r\d+), (%r\d+)\}", r"{\2, \1}", line),
    ),
}
KERNELS = {
    "info_nce 150x64 bf16": (
        "info_nce_forward_kernel",
        "merge_kernel",
        "info_nce_gradient_kernel",
        "finish_kernel",
    ),
    "prototypes 150x300x128 bf16": ("attention_kernel", "join_slices_kernel"),
}
CI = {
    80: [  # a barrier, a guard and a wrong value
        ("info_nce_forward_kernel", "barrier dropped"),
        ("merge_kernel", "st.global 1 MiB further"),
        ("info_nce_gradient_kernel", "operands of mma swapped"),
    ],
    90: [  # what only asynchronous copies and products need
        ("info_nce_forward_kernel", "wait of mbarrier dropped"),
        ("info_nce_gradient_kernel", "wait_group dropped"),
        ("attention_kernel", "fence.proxy.async dropped"),
    ],
}


class Mutant(NamedTuple):
    case: Case
    kernel: Kernel
    name: str
    mutation: str
    line: int

    def text(self, ptx: str) -> str:
        if ptx != "\n".join(self.kernel.lines):
            return ptx
        lines = list(self.kernel.lines)
        lines[self.line - 1] = MUTATIONS[self.mutation].change(lines[self.line - 1])
        return "\n".join(lines)


def distances(got: Results, truth: Results) -> dict[str, float]:
    return {
        name: ((got[name].double() - exact).norm() / exact.norm()).item()
        for name, exact in truth.items()
    }


def executed_lines(kernel: Kernel, counts) -> list[int]:
    """Lines of PTX that ran."""
    ran = {
        instruction.place[0]
        for (start, end), count in zip(kernel.block_range, counts, strict=True)
        if count
        for instruction in kernel.instructions[start:end]
    }
    return sorted(ran)


def mutants(
    case: Case, each: int, only: str, wanted: list[tuple[str, str]] | None
) -> Iterator[Mutant]:
    """Of the kernels that the last run of a case launched."""
    for launched in list(triton_driver.launches):
        kernel = launched.launch.kernel
        if launched.kernel not in KERNELS[case.name]:
            continue
        lines = executed_lines(kernel, launched.launch.block_counts)
        has_wgmma = any("wgmma" in line for line in kernel.lines)
        for name, (pattern, change) in MUTATIONS.items():
            if only not in name or ("wgmma" in name and not has_wgmma):
                continue
            if wanted is not None and (launched.kernel, name) not in wanted:
                continue
            found = [
                number
                for number in lines
                if re.search(pattern, kernel.lines[number - 1])
                and change(kernel.lines[number - 1]) != kernel.lines[number - 1]
            ]
            for line in random.sample(found, min(each, len(found))):
                yield Mutant(case, kernel, launched.kernel, name, line)


def verdict(mutant: Mutant, capability: int, truth: Results, base: dict[str, float]) -> str:
    """-> what noticed it; "unnoticed" if nothing did."""
    triton_driver.mutate = mutant.text
    try:
        got = distances(results(mutant.case, capability), truth)
    except EmulatorError as error:
        return f"caught: {str(error).split(': ', 1)[1][:100]}"
    except Exception as error:
        return f"broke the emulator: {type(error).__name__}: {error}"[:100]
    finally:
        triton_driver.mutate = None
    if any(not error <= 3 * base[name] + 1e-6 for name, error in got.items()):
        return "wrong result"
    return "unnoticed" + (", the same bits" if got == base else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.mutants")
    parser.add_argument("capability", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=3, help="of each mutation of each kernel")
    parser.add_argument("--only", default="", help="part of a mutation's name")
    parser.add_argument("--ci", action="store_true", help="three that must be noticed (80, 90)")
    asked = parser.parse_args(argv)
    random.seed(asked.seed)
    triton_driver.install(asked.capability)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(1)
    score: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for case in cases.ALL:
        kernels = KERNELS.get(case.name)
        wanted = CI[asked.capability] if asked.ci else None
        if kernels is None or (wanted and not any(kernel in kernels for kernel, _ in wanted)):
            continue
        triton_driver.serve_protoclip(asked.capability, case.num_sms)
        triton_driver.launches.clear()
        truth = results(case, None, torch.float64)
        base = distances(results(case, asked.capability), truth)
        for mutant in list(mutants(case, asked.each, asked.only, wanted)):
            noticed = score[mutant.mutation]["caught"] + score[mutant.mutation]["wrong result"]
            if asked.ci and noticed:  # the first ones may have been equivalent
                continue
            outcome = verdict(mutant, asked.capability, truth, base)
            score[mutant.mutation][outcome.split(":")[0].split(",")[0]] += 1
            line = mutant.kernel.lines[mutant.line - 1].strip()[:60]
            print(
                f"sm_{asked.capability} {mutant.name}, {mutant.mutation}, line {mutant.line}: "
                f"{outcome}   | {line}",
                flush=True,
            )
    outcomes = ("caught", "wrong result", "broke the emulator", "unnoticed")
    print(f"\nmutation: {', '.join(outcomes)}")
    for name, counts in score.items():
        print(f"  {name}: {', '.join(str(counts[outcome]) for outcome in outcomes)}")
    unnoticed = sum(counts["unnoticed"] for counts in score.values())
    total = sum(counts.total() for counts in score.values())
    print(f"sm_{asked.capability}: {total} mutants, {unnoticed} unnoticed")
    noticed = sum(counts["caught"] + counts["wrong result"] for counts in score.values())
    return int(asked.ci and noticed != len(CI[asked.capability]))


if __name__ == "__main__":
    sys.exit(main())
