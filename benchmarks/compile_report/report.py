"""The table of ``make kernels``: what each kernel takes, and whether its row keeps its promise."""

from __future__ import annotations

import argparse
import json
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

from benchmarks.compile_report.disassembly import (
    Block,
    disassemble,
    local_accesses_in_loops,
    resources,
)
from benchmarks.compile_report.launches import (
    REGISTERS,
    SHARED,
    Case,
    Compiled,
    call,
    cases,
    recording,
)

# Kernels over tiles of products, whose row of the launch table makes promises.
TILED = {
    "info_nce_forward",
    "sigmoid_loss",
    "contrastive_forward",
    "info_nce_gradient",
    "contrastive_gradient",
    "attention",
    "weights",
    "screen",
}
TENSOR_CORE = dict.fromkeys((80, 86, 89, 120, 121), "mma.sync") | {90: "wgmma"}
TENSOR_CORE |= dict.fromkeys((100, 103, 110), "tcgen05.mma")


@dataclass(frozen=True)
class Cost:
    """What a kernel takes. The first five: its case."""

    arch: int
    op: str
    form: str
    dtype: str
    depth: int
    kernel: str
    tile: tuple[int, int]
    warps: int
    registers: int
    local_bytes: int
    local_in_loops: int
    shared_bytes: int
    ctas_per_sm: int
    instruction: str  # that multiplies
    problems: list[str]  # promises that the row does not keep


def costs(case: Case) -> list[Cost]:
    """Compile the kernels of one case: what each takes."""
    with recording(case.arch) as launched:
        call(case)
    unique = {id(compiled.code): compiled for compiled in launched}
    return [_cost(case, compiled) for compiled in unique.values()]


def _cost(case: Case, compiled: Compiled) -> Cost:
    kernel = compiled.name.removesuffix("_kernel")
    metadata = compiled.code.metadata
    constants = compiled.constants
    tile = (constants.get("BLOCK_N", 0), constants.get("BLOCK_M", 0))
    multiplies = re.search(r"tcgen05\.mma|wgmma(?=\.mma)|mma\.sync", compiled.code.asm["ptx"])
    instruction = multiplies[0] if multiplies else "fma"
    cubin = compiled.code.asm["cubin"]
    used = resources(cubin)
    code: dict[str, Block] = {"entry": []}
    if used.local_bytes:  # half a second each
        code = disassemble(cubin)
    in_loops = local_accesses_in_loops(code)
    ctas = ctas_per_sm(case.arch, used.registers, metadata.num_warps, metadata.shared)
    problems = []
    if in_loops:
        problems.append(f"{used.local_bytes} bytes of local memory a thread")
    if ctas < 1:
        problems.append(f"{metadata.shared} bytes of shared memory, more than the card has")
    if kernel in TILED:
        expected = TENSOR_CORE[case.arch]
        if instruction != expected:
            problems.append(f"{instruction} where {expected} was expected")
        promised = compiled.config.ctas_per_sm
        if ctas < promised:
            problems.append(f"{ctas} CTAs an SM, the row promises {promised}")
    return Cost(
        **case._asdict(),
        kernel=kernel,
        tile=tile,
        warps=metadata.num_warps,
        registers=used.registers,
        local_bytes=used.local_bytes,
        local_in_loops=in_loops,
        shared_bytes=metadata.shared,
        ctas_per_sm=ctas,
        instruction=instruction,
        problems=problems,
    )


def ctas_per_sm(arch: int, registers: int, warps: int, shared_bytes: int) -> int:
    """How many CTAs an SM has room for; registers are given to warps by 256."""
    allocated = -(-registers * 32 // 256) * 256 * warps
    return min(REGISTERS // allocated, SHARED[arch] // (shared_bytes + 1024))


def _lines(cost: Cost) -> str:
    n, m = cost.tile
    lines = [
        f"sm_{cost.arch} {cost.op} {cost.form} {cost.dtype} {cost.depth} {cost.kernel}: "
        f"tile {n} x {m}, {cost.warps} warps, {cost.registers} registers, "
        f"{cost.local_bytes} B local, {cost.shared_bytes} B shared, {cost.ctas_per_sm} CTAs, "
        f"{cost.instruction}"
    ]
    lines += [f"PROBLEM: {problem}" for problem in cost.problems]
    return "\n      ".join(lines)


def main() -> int:
    """Print the table; the exit status says whether every row keeps its promise."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_report",
        description="Compile every kernel without a GPU and read from its machine code what it "
        "takes.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    parser.add_argument("only", nargs="*", help='cases with all of these words, e.g. "sm_90 bf16"')
    args = parser.parse_args()
    groups = [set(words.split()) for words in args.only] or [set()]
    chosen = [case for case in cases() if any(group <= set(str(case).split()) for group in groups)]
    kernels: list[Cost] = []
    with ProcessPoolExecutor() as pool:
        for of_case in pool.map(costs, chosen):
            kernels += of_case
            if not args.json:
                print("\n".join(map(_lines, of_case)), flush=True)
    if args.json:
        print(json.dumps([asdict(cost) for cost in kernels]))
    return int(any(cost.problems for cost in kernels))
