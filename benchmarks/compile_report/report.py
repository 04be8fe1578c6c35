"""The table of ``make kernels``: what each kernel takes, what it should take by its row, and a
predicted bound, never a measured time."""

from __future__ import annotations

import argparse
import json
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace

from benchmarks.compile_report import model
from benchmarks.compile_report.disassembly import (
    Block,
    disassemble,
    local_accesses_in_loops,
    resources,
)
from benchmarks.compile_report.launches import Case, Compiled, call, cases, recording

# Kernels over tiles of products, whose row of the launch table makes promises.
TILED = {
    "info_nce_forward",
    "sigmoid_loss",
    "contrastive_forward",
    "softmax_gradient",
    "attention",
    "weights",
    "screen",
}
TENSOR_CORE = dict.fromkeys((80, 86, 89, 120, 121), "mma.sync") | {90: "wgmma"}
TENSOR_CORE |= dict.fromkeys((100, 103, 110), "tcgen05.mma")
SHAPES = {  # of the GPU table: op, depth -> rows, columns
    ("info_nce", 128): (32_768, 32_768),
    ("info_nce", 512): (32_768, 32_768),
    ("contrastive", 512): (32_768, 32_768),
    ("sigmoid_loss", 512): (32_768, 32_768),
    ("prototypes", 128): (4_096, 20_000),
    ("clusters", 128): (1_600_000, 20_000),
    ("gemm", 8192): (8_192, 8_192),
}


@dataclass(frozen=True)
class Cost:
    """What a kernel takes, and on Hopper what its hot path costs. The first five: its case."""

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
    clk: model.Clk
    counts: dict[str, int]  # instructions of a warp after the products
    masked: int  # clk around the products of a tile that holds positives or crosses the edge
    slice: model.Slice | None  # of tiles that go slice by slice
    slices: int  # of such a tile
    busy: float | None  # without products on wgmma: None
    bound: model.Bound | None


def costs(case: Case) -> list[Cost]:
    """Compile the kernels of one case: what each takes, and what its hot path costs."""
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
    if used.local_bytes or instruction == "wgmma":  # half a second each
        code = disassemble(cubin)
    in_loops = local_accesses_in_loops(code)
    ctas = model.ctas_per_sm(case.arch, used.registers, metadata.num_warps, metadata.shared)
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
    path = model.hot_path(
        code,
        metadata.num_warps,
        depth=case.depth,
        block_d=constants.get("BLOCK_D", case.depth),
        products_are_held=bool(constants.get("HELD")),
    )
    busy = None
    if path.clk.products:
        busy = model.busy_share(path.clk, max(1, ctas))
    cost = Cost(
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
        clk=path.clk,
        counts=path.counts,
        masked=path.masked,
        slice=path.slice,
        slices=tile[1] // constants.get("SLICE_M", tile[1] or 1),
        busy=busy,
        bound=None,
    )
    shape = SHAPES.get((case.op, case.depth))
    if path.clk.products and shape is not None:
        return replace(cost, bound=bound(cost, shape))
    return cost


def bound(cost: Cost, shape: tuple[int, int]) -> model.Bound:
    """The prediction for a kernel over tiles and so many rows and columns."""
    return model.bound(
        cost.clk,
        max(1, cost.ctas_per_sm),
        shape=shape,
        tile=cost.tile,
        depth=cost.depth,
        keys_stream=cost.kernel == "attention",
        writes_tile=cost.kernel.endswith("gradient"),
    )


def _measured_by_others(cost: Cost) -> tuple[int, int] | None:
    """TFLOP/s, where the kernel is of a class that others have measured."""
    if cost.op == "gemm":
        return model.MEASURED_PRODUCTS[cost.form]
    if (cost.kernel, cost.depth, cost.arch) == ("attention", 128, 90):
        return model.MEASURED_ATTENTION
    return None


def _lines(cost: Cost) -> str:
    n, m = cost.tile
    lines = [
        f"sm_{cost.arch} {cost.op} {cost.form} {cost.dtype} {cost.depth} {cost.kernel}: "
        f"tile {n} x {m}, {cost.warps} warps, {cost.registers} registers, "
        f"{cost.local_bytes} B local, {cost.shared_bytes} B shared, {cost.ctas_per_sm} CTAs, "
        f"{cost.instruction}"
    ]
    if cost.busy is not None:
        clk = cost.clk
        counts = "".join(f" {name} {count}" for name, count in cost.counts.items() if count)
        lines.append(
            f"clk {clk.before} + {clk.products} + {clk.after}, "
            f"busy at most {cost.busy:.0%};{counts}"
        )
        if cost.masked > clk.before + clk.after:
            lines.append(f"with masks {cost.masked} clk around the products")
        if cost.slice is not None:
            lines.append(f"a slice {cost.slice.clk} clk, LDG {cost.slice.loads}")
    if cost.bound is not None:
        n, m = SHAPES[cost.op, cost.depth]
        line = f"{n} x {m}: {cost.bound.ms:.2f} ms, {cost.bound.tflops:.0f} TFLOP/s by "
        line += cost.bound.limit
        if measured := _measured_by_others(cost):
            low, high = measured
            line += f" (measured by others: {low} to {high})"
        lines.append(line)
    lines += [f"PROBLEM: {problem}" for problem in cost.problems]
    return "\n      ".join(lines)


def main() -> int:
    """Print the table; the exit status says whether every row keeps its promise."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_report",
        description="Compile every kernel without a GPU and read from its machine code what it "
        "costs.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    parser.add_argument("only", nargs="*", help='cases with all of these words, e.g. "sm_90 bf16"')
    args = parser.parse_args()
    groups = [set(words.split()) for words in args.only] or [set()]
    chosen = [case for case in cases() if any(group <= set(str(case).split()) for group in groups)]
    kernels: list[Cost] = []
    if not args.json:
        print("predicted bound from machine code, not measured:")
    with ProcessPoolExecutor() as pool:
        for of_case in pool.map(costs, chosen):
            kernels += of_case
            if not args.json:
                print("\n".join(map(_lines, of_case)), flush=True)
    if args.json:
        print(json.dumps([asdict(cost) for cost in kernels]))
    return int(any(cost.problems for cost in kernels))
