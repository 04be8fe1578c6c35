"""Compile every kernel without a GPU and read from its machine code what it costs.

    python -m protoclip.kernels.compile_report [--json] ["sm_90 info_nce 512" ...]

The launchers themselves are called, on small CPU tensors, with a driver that compiles for an
architecture and launches nothing: what is shown is what a card would run. Issue times of the hot
path on Hopper come from the stall counts and scoreboards that the assembler wrote into the code. A
bound, good to 30 %: docs/kernels.md has the model and how far off it is.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from protoclip.kernels import clusters, info_nce, launch, matched, siglip, tiles
from protoclip.kernels import prototype_cross_entropy as prototypes

NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TILED = {
    f"{name}_kernel"
    for name in (
        *("forward", "gradient", "sigmoid", "attention", "weights"),
        *("matched_forward", "matched_gradient", "screen"),
    )
}


class Case(NamedTuple):
    """One call of a launcher: ``form`` says which; ``depth`` is D, 43 one that no tile fits."""

    arch: int
    op: str
    form: str
    dtype: str
    depth: int

    def features(self, *sizes: int) -> list[torch.Tensor]:
        return [torch.zeros(n, self.depth, dtype=NAMES[self.dtype]) for n in sizes]

    def __str__(self) -> str:
        return f"sm_{' '.join(map(str, self))}"


def cases() -> Iterator[Case]:
    """Calls that lead to every row of the launch table; more forms of them on Hopper."""
    for arch in launch.ARCHITECTURES:
        for dtype, depth in (("bf16", 128), ("bf16", 512), ("fp32", 512), ("fp16", 43)):
            yield Case(arch, "info_nce", "large", dtype, depth)
            yield Case(arch, "sigmoid", "gradients", dtype, depth)
        yield Case(arch, "sigmoid", "ids", "bf16", 512)
        for form, dtype, depth in (
            *(("ids", "bf16", 512), ("all", "bf16", 512)),
            *(("all", "fp32", 512), ("own", "fp16", 43)),
        ):
            yield Case(arch, "matched", form, dtype, depth)
        for depth in (64, 128, 256, 512):
            yield Case(arch, "prototypes", "soft", "bf16", depth)
        for dtype, depth in (("bf16", 64), ("fp16", 128), ("bf16", 256), ("fp32", 512)):
            yield Case(arch, "prototypes", "banks", dtype, depth)
        yield Case(arch, "soft_targets", "own", "fp32", 512)
        for dtype, depth in (
            ("bf16", 512),
            ("fp32", 64),
            ("fp32", 128),
            ("fp32", 256),
            ("fp32", 512),
        ):
            yield Case(arch, "clusters", "own", dtype, depth)
    for op, form in (("info_nce", "small"), ("info_nce", "rows"), ("sigmoid", "loss")):
        yield Case(90, op, form, "bf16", 512)
    yield Case(90, "info_nce", "large", "fp16", 128)
    yield Case(90, "prototypes", "hard", "bf16", 128)
    for form in MEASURED:
        yield Case(90, "gemm", form, "bf16", 8192)


def call(case: Case) -> None:
    """The launchers as the trainer calls them, forward and backward."""
    op, form, one = case.op, case.form, torch.ones(())
    if op == "info_nce":
        n = 512 if form == "small" else 2048
        x, y = case.features(n, n)
        weight, columns = one.expand(n), form != "rows"
        loss = info_nce.contrastive(x, y, one, 0, columns, 1.0, True)
        info_nce.contrastive_bwd(
            x,
            y,
            one,
            loss.row_max,
            loss.row_sum,
            loss.column_max,
            loss.column_sum,
            weight,
            weight[: n * columns],
            0,
        )
    elif op == "matched":  # own columns; those and ids as info_nce has them; all there is to say
        x, y = case.features(512, 512)
        vector, ids = torch.zeros(512, dtype=torch.int32), torch.zeros(2, 512, dtype=torch.int32)
        relation: tuple[Any, ...] = vector, None, None, None, None, False
        if form == "ids":
            relation = vector, None, ids, ids, None, False
        elif form == "all":
            relation = vector, vector, ids, ids, torch.zeros(512), True
        rows, columns = matched.matched_fwd(x, y, one, *relation, form != "own")
        weights = torch.ones(2, rows.shape[1]), torch.ones(2, columns.shape[1])
        matched.matched_bwd(x, y, one, *relation, rows, columns, *weights)
    elif op == "sigmoid":
        ids = [torch.zeros(2, 512, dtype=torch.int32)] * 2 if form == "ids" else []
        siglip.sigmoid_loss(*case.features(512, 512), one, one, 0, form != "loss", *ids)
    elif op == "prototypes":  # one bank; or two with all that can be asked for
        h, c, m = case.features(256, 2048, 2048)
        labels, two = torch.zeros(256, dtype=torch.int64), form == "banks"
        targets = [m[:0] if form == "hard" else m] + [m[:0]] * two
        banks = [c] * (1 + two), targets, [labels] * (1 + two)
        loss, *_, row_max, row_sum, _ = prototypes.prototype_ce_fwd_banks(
            h, *banks, one, True, two, two
        )
        if not two:
            prototypes.prototype_ce_bwd_prototypes(
                h, c, labels, one, row_max[0], row_sum[0], loss[0], form == "hard"
            )
    elif op == "soft_targets":
        prototypes.soft_targets(*case.features(2048, 2048), 0.1)
    elif op == "clusters":
        x, c = case.features(512, 256)
        clusters.segment_mean(x, clusters.kmeans_assign(x, c)[0], len(c))
    else:
        x, y = case.features(512, 512)
        row = launch.Launch(128, int(form), 64, warps=8, stages=3, descriptors=True)
        features, options = tiles.operands(x, y, row, x.new_empty(512, 512))
        gemm_kernel[(1, 1)](*features[:2], features[4], 512, 512, case.depth, **options)


@triton.jit
def gemm_kernel(
    x, y, out, n, m, d,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """A plain product x y^T, to check the model against public measurements."""
    row0, col0 = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_M
    acc = tiles.products(x, y, row0, col0, n, m, d, 0, BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D)
    out.store([row0, col0], acc.to(out.dtype))


@contextmanager
def recording(arch: int | None = None) -> Iterator[list[tuple[str, Any, dict, launch.Launch]]]:
    """Compile the kernels that are launched inside, launch none of them; for an architecture, or,
    with None, for the card that is here. -> name, compiled code, keywords and row of each."""
    found: list[tuple[str, Any, dict, launch.Launch]] = []
    run, options, row = JITFunction.run, launch.Launch.options, launch.INTERPRETER

    def compile_only(kernel, *args, grid, warmup, **keywords):
        compiled = run(kernel, *args, grid=grid, warmup=True, **keywords)
        found.append((kernel.__name__, compiled, keywords, row))
        return compiled

    def remembered(asked: launch.Launch) -> dict[str, Any]:
        nonlocal row
        row = asked
        return options.fget(asked)  # type: ignore[attr-defined]

    if arch is not None:
        target = GPUTarget("cuda", arch, 32)
        compiler = SimpleNamespace(
            get_current_device=lambda: arch,  # each has its own compiled kernels
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
        driver.set_active(compiler)  # type: ignore[arg-type]
    JITFunction.run, launch.Launch.options = compile_only, property(remembered)
    launch.compiling_for = arch
    try:
        yield found
    finally:
        JITFunction.run, launch.Launch.options, launch.compiling_for = run, options, None


# The model of one H100. Latencies and widths are from public micro-benchmarks.
SMS, CLOCK, L2_RATE = 132, 1.70e9, 8e12  # clock under load in Hz, bytes a second
LATENCY = {"LDG": 550, "LDS": 30, "LDSM": 33, "SHFL": 25, "MUFU": 22, "F2F": 22, "I2F": 22}
LATENCY |= {"F2I": 22, "STS": 10, "STG": 10, "S2R": 25, "LDC": 40, "ATOM": 600}  # others 12
XU = {"MUFU", "F2F", "F2I", "I2F"}  # 16 lanes a clk and SM: 8 clk a warp and scheduler
MIO = {"SHFL", "LDS", "STS", "LDSM", "STSM", "LDG", "STG", "RED", "ATOM"}  # shared port: 4 clk
ALU = {"FMNMX", "ISETP", "FSETP", "LOP3", "SHF", "SEL", "FSEL", "PRMT", "IADD3", "LEA", "VIADD"}
ALU |= {"VIMNMX", "PLOP3", "P2R", "R2P", "F2FP"}  # 16 lanes a scheduler: 2 clk
PIPES = {n: (p, c) for p, c, s in (("XU", 8, XU), ("MIO", 4, MIO), ("ALU", 2, ALU)) for n in s}
BARRIER = 30  # clk from the last warp's arrival to the first one's next issue
COUNTED = ("MUFU", "F2F", "SHFL", "LDS", "STS", "LDG", "STG", "BAR", "LDL", "STL")
MEASURED = {"128": (423, 498), "256": (631, 704)}  # TFLOP/s of public H100 products by tile
# The same of attention kernels whose warps are not specialised, D = 128 (public pull requests 205,
# 206 and 829 of facebookexperimental/triton; specialised ones reach 462 to 608).
MEASURED_ATTENTION = (407, 487)
OVERLAP = 0.2  # of its own time that a second CTA hides on an SM, so that the model meets them
REGISTERS = 65536  # of an SM
SHARED = {80: 164 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10}  # 1 KiB a CTA is reserved
TENSOR_CORE = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
SHAPES = {  # of the GPU table: op, depth -> rows, columns
    ("info_nce", 128): (32_768, 32_768),
    ("info_nce", 512): (32_768, 32_768),
    ("matched", 512): (32_768, 32_768),
    ("sigmoid", 512): (32_768, 32_768),
    ("prototypes", 128): (4_096, 20_000),
    ("clusters", 128): (1_600_000, 20_000),
    ("gemm", 8192): (8_192, 8_192),
}


class Instruction(NamedTuple):
    """``wait`` is a mask of scoreboards; ``write`` and ``read`` are those that its result and its
    operands set, 7: none."""

    name: str
    text: str
    stall: int
    wait: int
    write: int
    read: int


def blocks(sass: str) -> dict[str, list[Instruction]]:
    """Label -> instructions of each basic block, from ``nvdisasm -c -hex``."""
    here: list[Instruction] = []
    found, low = {"entry": here}, None
    for line in sass.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            here = found.setdefault(label[1], [])
        elif first := re.match(
            r"\s+/\*[0-9a-f]{4,6}\*/\s+(.*?);?\s+/\* 0x([0-9a-f]{16}) \*/", line
        ):
            low = first[1], int(first[2], 16)
        elif low and (second := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", line)):
            word = int(second[1], 16) << 64 | low[1]
            fields = word >> 105 & 15, word >> 116 & 63, word >> 110 & 7, word >> 113 & 7
            name = re.match(r"(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", low[0])
            here.append(Instruction(name[1] if name else "", low[0], *fields))
            low = None
    return found


def issue_clk(instructions: list[Instruction], warps: int) -> int:
    """Clk until ``warps`` warps of one scheduler, in step, have issued a block."""
    clk, last, steps = 0, 0, len(instructions)
    ready, at, waiting = [0] * warps, [0] * warps, set[int]()
    boards = [[0] * 8 for _ in range(warps)]
    free: dict[str, int] = collections.defaultdict(int)
    while any(step < steps for step in at):
        for w in ((last + 1 + turn) % warps for turn in range(warps)):
            if at[w] >= steps or w in waiting or ready[w] > clk:
                continue
            i = instructions[at[w]]
            pipe, busy = PIPES.get(i.name, ("", 0))
            if free[pipe] > clk or any(i.wait >> b & 1 and boards[w][b] > clk for b in range(6)):
                continue
            last = w
            if i.name == "BAR":
                waiting.add(w)
                if all(other in waiting or at[other] >= steps for other in range(warps)):
                    for other in waiting:
                        at[other], ready[other] = at[other] + 1, clk + BARRIER
                    waiting.clear()
                break
            free[pipe] = clk + busy
            latency = LATENCY.get(i.name, 12)
            for board, wait in ((i.write, latency), (i.read, min(latency, 20))):
                boards[w][board] = max(boards[w][board], clk + wait)
            ready[w], at[w] = clk + max(i.stall, 1), at[w] + 1
            break
        clk += 1
    return clk


def _local_in_loops(code: dict[str, list[Instruction]]) -> int:
    """Loads and stores of local memory between a branch back and its target."""
    labels, listed, looping = list(code), list(code.values()), set[int]()
    for index, block in enumerate(listed):
        for target in re.findall(r"`\((\.L_x_\d+)\)", " ".join(i.text for i in block)):
            looping.update(range(labels.index(target), index + 1))
    return sum(i.name in ("LDL", "STL") for index in looping for i in listed[index])


def costs(case: Case) -> list[dict[str, Any]]:
    """Compile the kernels of one case: what each takes, and what its hot path costs."""
    with recording(case.arch) as launched:
        call(case)
    unique = {id(compiled[1]): compiled for compiled in launched}
    return [_cost(case, *compiled) for compiled in unique.values()]


def _read(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _cost(case: Case, name: str, code: Any, options: dict, row: launch.Launch) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        found = re.search(r"tcgen05\.mma|wgmma(?=\.mma)|mma\.sync", code.asm["ptx"])
        instruction = found[0] if found else "fma"
        usage = _read(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        local, sass = used["STACK"] + used["LOCAL"], ""
        if local or instruction == "wgmma":  # half a second each
            sass = _read(triton.knobs.nvidia.nvdisasm.path, "-c", "-hex", file.name)
    warps, shared = code.metadata.num_warps, code.metadata.shared
    allocated = -(-used["REG"] * 32 // 256) * 256 * warps  # registers are given to warps by 256
    ctas = min(REGISTERS // allocated, SHARED[case.arch] // (shared + 1024))
    tile = options.get("BLOCK_N", 0), options.get("BLOCK_M", options.get("BLOCK_K", 0))
    body = blocks(sass)
    in_loops = _local_in_loops(body)
    problems = [f"{local} bytes of local memory a thread"] if in_loops else []
    if ctas < 1:
        problems.append(f"{shared} bytes of shared memory, more than the card has")
    if name in TILED:
        multiplied = "bf16" if name == "screen_kernel" else case.dtype
        wanted = "fma" if multiplied == "fp32" else TENSOR_CORE[case.arch]
        if instruction != wanted:
            problems.append(f"{instruction} where {wanted} was expected")
        if ctas < row.ctas_per_sm:
            problems.append(f"{ctas} CTAs an SM, the row promises {row.ctas_per_sm}")
    # Of the path of whole tiles on Hopper: clk of issue before and after the products, of the
    # tensor cores, and the instructions of a warp after the products.
    prologue, epilogue, products, counts = _hot_path(list(body.values()), warps, case, options)
    busy = bound = None
    if products:
        taken = prologue + products * 1.05 + epilogue
        # Share of the tensor cores' time where CTAs overlap without loss: no kernel does better.
        busy = products / max(products * 1.03, taken / max(1, ctas))
        bound = _bound(case, name, tile, max(1, ctas), products, prologue + epilogue)
    return case._asdict() | {
        "kernel": name.removesuffix("_kernel"),
        "tile": tile,
        "warps": warps,
        "registers": used["REG"],
        "local_bytes": local,
        "local_in_loops": in_loops,
        "shared_bytes": shared,
        "ctas_per_sm": ctas,
        "instruction": instruction,
        "problems": problems,
        "clk": (prologue, products, epilogue),
        "counts": counts,
        "busy": busy,
        "bound": bound,
    }


def _bound(
    case: Case, name: str, tile: tuple[int, int], ctas: int, products: int, around: int
) -> Any:
    """-> predicted ms, TFLOP/s and what bounds them, where the GPU table has a shape.

    ``products``: clk of the tensor cores for a tile; ``around``: clk of issue before and after. A
    CTA alone on its SM loads only while it multiplies; several hide OVERLAP of each other."""
    if (case.op, case.depth) not in SHAPES:
        return None
    (n, m), (block_n, block_m), depth = SHAPES[case.op, case.depth], tile, case.depth
    count = -(-n // block_n) * -(-m // block_m)
    attention = name == "attention_kernel"  # keys stream past the rows
    read = 2 * depth * (block_m if attention else block_n + block_m)
    written = 2 * block_n * block_m if name.endswith("gradient_kernel") else 0
    multiplying = products * 1.05
    if ctas == 1:
        multiplying = max(multiplying, read * SMS * CLOCK / L2_RATE)
    taken = max(products * 1.03, (multiplying + around) / (1 + OVERLAP * (ctas - 1)))
    issue = -(-count // (SMS * ctas)) * ctas * taken / CLOCK
    traffic = count * (read + written) / L2_RATE
    seconds = max(issue, traffic)
    tflops = 2 * (1 + attention) * n * m * depth / seconds / 1e12
    return seconds * 1e3, tflops, "issue" if issue >= traffic else "L2"


def _hot_path(
    listed: list[list[Instruction]], warps: int, case: Case, options: dict[str, Any]
) -> tuple[int, int, int, dict[str, int]]:
    """The path of whole tiles, by the order of the blocks: what leads to the one with the most
    products, its steps, and what follows up to the most exponentials.

    Where a block holds both (attention), or the products of rows that are held and their maxima
    (k-means), it is the whole path, and one step counts."""
    texts = ("\n".join(i.text for i in block) for block in listed)
    # m64 nN k16 of 16-bit operands takes the SM's tensor cores N / 2 clk.
    widths = (re.findall(r"HGMMA\.64x(\d+)x16", text) for text in texts)
    products = [sum(int(n) // 2 for n in found) * warps // 4 for found in widths]
    exponentials = [sum(i.name == "MUFU" for i in block) for block in listed]
    product = max(products)
    hot = products.index(product)
    if not product:
        return 0, 0, 0, {}
    if exponentials[hot] > 16 or options.get("HELD"):
        before, after = [], [listed[hot]]
    else:
        product *= -(-case.depth // options["BLOCK_D"])
        start = hot  # other paths that are listed first end in products or exponentials
        while start > 1 and not products[start - 1] and exponentials[start - 1] <= 16:
            start -= 1
        before = [listed[0], *listed[max(start, 1) : hot]]
        end = max(range(hot + 1, len(listed)), key=exponentials.__getitem__, default=hot)
        after = listed[hot + 1 : end + 1]
    counts = collections.Counter(i.name for block in after for i in block)
    prologue, epilogue = (
        sum(issue_clk(block, max(1, warps // 4)) for block in part) for part in (before, after)
    )
    return prologue, epilogue, product, {k: counts[k] for k in COUNTED}


def _line(cost: dict[str, Any]) -> str:
    text = (
        "sm_{arch} {op} {form} {dtype} {depth} {kernel}: tile {tile}, {warps} warps, {registers} "
        "registers, {local_bytes} B local, {shared_bytes} B shared, {ctas_per_sm} CTAs, "
        "{instruction}"
    ).format(**cost)
    if cost["busy"]:
        text += "\n      clk {} + {} + {}, busy at most {:.0%};".format(*cost["clk"], cost["busy"])
        text += "".join(f" {k} {v}" for k, v in cost["counts"].items() if v)
    if cost["bound"]:
        n, m = SHAPES[cost["op"], cost["depth"]]
        text += "\n      {} x {}: {:.2f} ms, {:.0f} TFLOP/s by {}".format(n, m, *cost["bound"])
    measured = MEASURED.get(cost["form"]) if cost["op"] == "gemm" else None
    if (cost["kernel"], cost["depth"], cost["arch"]) == ("attention", 128, 90):
        measured = MEASURED_ATTENTION
    if measured:
        text += " (measured by others: {} to {})".format(*measured)
    return "".join([text, *(f"\n      PROBLEM: {problem}" for problem in cost["problems"])])


def main() -> int:
    """Print the table; the exit status says whether every row keeps its promise."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    parser.add_argument("only", nargs="*", help='cases with all of these words, e.g. "sm_90 bf16"')
    args = parser.parse_args()
    groups = [set(words.split()) for words in args.only] or [set()]
    chosen = [case for case in cases() if any(g <= set(str(case).split()) for g in groups)]
    with ProcessPoolExecutor() as pool:
        found = [cost for costs_of in pool.map(costs, chosen) for cost in costs_of]
    if args.json:
        print(json.dumps(found))
    else:
        print("predicted bound from machine code, not measured:")
        print("\n".join(map(_line, found)))
    return int(any(cost["problems"] for cost in found))


if __name__ == "__main__":
    sys.exit(main())
