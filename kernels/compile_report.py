"""Compile every kernel without a GPU and read from its machine code what it costs.

    python -m protoclip.kernels.compile_report [--json] [--arch 90] [--op info_nce] [--depth 512]

The launchers themselves are called, on small CPU tensors, with a driver that compiles for an
architecture and launches nothing: what is shown is what a card would run. Registers and local
memory come from the cubin, shared memory from the compiler, the tensor-core instruction from the
PTX; issue times of the hot path on Hopper from the stall counts and scoreboards that the assembler
wrote into the code. Memory is assumed to hit there, and clocks to hold: a bound, good to 30 %.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from protoclip.kernels import (
    clusters,
    info_nce,
    launch,
    prototype_cross_entropy,
    siglip,
    soft_targets,
)
from protoclip.kernels.tiles import products

NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADING = "predicted bound from machine code, not measured"
# One H100: SMs, clock under load (Hz), bytes a second from L2; flop a clk of an SM's tensor cores.
SMS, CLOCK, L2_RATE, FLOP_PER_CLK = 132, 1.70e9, 8e12, 4096


@dataclass(frozen=True)
class Case:
    """One call of a launcher: ``form`` says which, "ragged" rows are those of any alignment."""

    op: str
    form: str
    arch: int
    dtype: str
    depth: int


@dataclass(frozen=True)
class Path:
    """The hot path of a kernel, for one tile (or one step of its loop) and CTA."""

    prologue_clk: int  # issue time
    epilogue_clk: int  # after the products
    product_clk: int  # of the tensor cores
    counts: dict[str, int]  # instructions a warp of the epilogue
    local_in_loops: int  # loads and stores of local memory


@dataclass(frozen=True)
class Cost:
    """What a kernel takes; ``local_bytes`` is stack and spills a thread."""

    case: Case
    kernel: str
    tile: tuple[int, int] | None
    warps: int
    registers: int
    local_bytes: int
    shared_bytes: int
    instruction: str
    ctas_per_sm: int
    promised_ctas: int
    path: Path

    @property
    def busy(self) -> float | None:
        """Share of the time that the tensor cores work, by the model."""
        if not self.path.product_clk:
            return None
        p = self.path
        tile = p.prologue_clk + p.product_clk * 1.05 + p.epilogue_clk
        return p.product_clk / max(p.product_clk * 1.03, tile / self.ctas_per_sm)

    @property
    def problems(self) -> list[str]:
        """What breaks the promise of a row of the launch table."""
        card, found = launch.CARDS[self.case.arch], []
        if self.path.local_in_loops:
            found.append(f"{self.local_bytes} bytes of local memory a thread")
        if self.shared_bytes > card.shared_bytes_per_cta:
            have = card.shared_bytes_per_cta
            found.append(f"{self.shared_bytes} bytes of shared memory, the card has {have}")
        wanted = "fma" if self.case.dtype == "fp32" else card.tensor_core
        if self.tile and self.instruction != wanted:
            found.append(f"{self.instruction} where {wanted} was expected")
        if self.ctas_per_sm < self.promised_ctas:
            promised = self.promised_ctas
            found.append(f"{self.ctas_per_sm} CTAs an SM, the row promises {promised}")
        return found


def cases() -> Iterator[Case]:
    """Calls that lead to every row of the launch table; more forms of them on Hopper."""
    for arch in launch.CARDS:
        for dtype, depth in (("bf16", 128), ("bf16", 512), ("fp32", 512), ("fp16", 43)):
            yield Case("info_nce", "large", arch, dtype, depth)
            yield Case("sigmoid", "gradients", arch, dtype, depth)
        for dtype, depth in (("bf16", 64), ("bf16", 128), ("bf16", 256), ("bf16", 512)):
            yield Case("prototypes", "soft", arch, dtype, depth)
        for dtype, depth in (("bf16", 64), ("fp16", 128), ("bf16", 256), ("fp32", 512)):
            yield Case("prototypes", "banks", arch, dtype, depth)
        yield Case("soft_targets", "own", arch, "fp32", 512)
        for dtype in ("bf16", "fp32"):
            yield Case("clusters", "own", arch, dtype, 512)
    for op, form in (("info_nce", "small"), ("info_nce", "rows"), ("sigmoid", "loss")):
        yield Case(op, form, 90, "bf16", 512)
    yield Case("prototypes", "hard", 90, "bf16", 128)
    for form in MEASURED:
        yield Case("gemm", form, 90, "bf16", 8192)


def _features(case: Case, *sizes: int) -> list[torch.Tensor]:
    return [torch.zeros(n, case.depth, dtype=NAMES[case.dtype]) for n in sizes]


def _info_nce(case: Case) -> None:
    n = 512 if case.form == "small" else 2048
    x, y = _features(case, n, n)
    columns, weight = case.form != "rows", torch.ones(()).expand(n)
    scale = torch.ones(())
    found = info_nce.contrastive(x, y, scale, 0, columns, 1.0, True)[1:]
    column_weight = weight if columns else weight[:0]
    info_nce.contrastive_bwd(x, y, scale, *found, weight, column_weight, 0)


def _sigmoid(case: Case) -> None:
    x, y = _features(case, 512, 512)
    siglip.sigmoid_loss(x, y, torch.ones(()), torch.ones(()), 0, case.form == "gradients")


def _prototypes(case: Case) -> None:
    """One bank as the trainer calls it; two of them with all that can be asked for."""
    h, c, m = _features(case, 256, 2048, 2048)
    labels, scale, two = torch.zeros(256, dtype=torch.int64), torch.ones(()), case.form == "banks"
    targets = [m[:0] if case.form == "hard" else m] + [m[:0]] * two
    banks = [c] * (1 + two), targets, [labels] * (1 + two)
    found = prototype_cross_entropy.prototype_ce_fwd_banks(h, *banks, scale, True, two, two)
    if not two:
        prototype_cross_entropy.prototype_ce_bwd_prototypes(
            h, c, labels, scale, *(t[0] for t in found[3:5]), found[0][0], case.form == "hard"
        )


def _soft_targets(case: Case) -> None:
    source, c = _features(case, 2048, 2048)
    soft_targets.soft_targets(source, c, 0.1)


def _clusters(case: Case) -> None:
    x, c = _features(case, 512, 256)
    labels, _ = clusters.kmeans_assign(x, c)
    clusters.segment_mean(x, labels, len(c))


OPS: dict[str, dict[str, Callable[[Case], None]]] = {
    "info_nce": dict.fromkeys(("large", "small", "rows"), _info_nce),
    "sigmoid": dict.fromkeys(("gradients", "loss"), _sigmoid),
    "prototypes": dict.fromkeys(("soft", "hard", "banks"), _prototypes),
    "soft_targets": {"own": _soft_targets},
    "clusters": {"own": _clusters},
}


class _Compiler:
    """A driver that has an architecture and no device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def recording(arch: int) -> Iterator[list[tuple[str, Any, dict[str, Any]]]]:
    """Compile the kernels that are launched inside for an architecture, launch none of them.

    -> (name, compiled kernel, keyword arguments) of each."""
    found: list[tuple[str, Any, dict[str, Any]]] = []
    run = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        found.append((kernel.__name__, compiled, options))
        return compiled

    driver.set_active(_Compiler(arch))  # type: ignore[arg-type]
    JITFunction.run = compile_only
    try:
        with launch.compiling_for(arch):
            yield found
    finally:
        JITFunction.run = run


def costs(case: Case) -> list[Cost]:
    """Compile the kernels of one case."""
    with recording(case.arch) as launched:
        OPS[case.op][case.form](case)
    unique = {id(compiled): (name, compiled, options) for name, compiled, options in launched}
    return [_cost(case, *found) for found in unique.values()]


def _cost(case: Case, name: str, compiled: Any, options: dict[str, Any]) -> Cost:
    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(tools.cuobjdump.path, "-res-usage", file.name)
        sass = _output(tools.nvdisasm.path, "-c", "-hex", file.name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    instruction = re.search(r"tcgen05\.mma|wgmma(?=\.mma)|mma\.sync", compiled.asm["ptx"])
    row, tile = _row(case, name), None
    if row or case.op == "gemm":
        tile = options["BLOCK_N"], options.get("BLOCK_M", options.get("BLOCK_K"))
    card = launch.CARDS[case.arch]
    allocated = -(-found["REG"] * 32 // 256) * 256 * warps  # registers are given to warps by 256
    ctas = min(card.registers // allocated, card.shared_bytes // (shared + 1024))
    path = hot_path(blocks(sass), warps, case.depth, options)
    return Cost(
        case, name, tile, warps, found["REG"], found["STACK"] + found["LOCAL"], shared,
        instruction[0] if instruction else "fma", ctas, row.ctas_per_sm if row else 1, path,
    )  # fmt: skip


def _row(case: Case, kernel: str) -> launch.Launch | None:
    """The row of the launch table that a kernel over tiles was given."""
    (x,) = _features(case, 1)
    with launch.compiling_for(case.arch):
        if kernel in ("forward_kernel", "gradient_kernel", "sigmoid_kernel"):
            return launch.choose(kernel.removesuffix("_kernel"), x, x)
        wide = x.dtype == torch.float32 or case.depth > launch.WIDEST_ATTENTION
        if kernel == "attention_kernel" and not wide and case.op == "prototypes":
            return launch.attention_row(x.device, case.depth, case.form == "banks")
        if kernel in ("attention_kernel", "weights_kernel") and case.op == "prototypes":
            return launch.chunked_row(x.device, x.dtype)
    return None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# The model of one Hopper SM. Latencies and widths are from public micro-benchmarks.
LATENCY = {"LDG": 550, "LDS": 30, "LDSM": 33, "SHFL": 25, "MUFU": 22, "F2F": 22, "I2F": 22}
LATENCY |= {"F2I": 22, "STS": 10, "STG": 10, "S2R": 25, "LDC": 40, "ATOM": 600}  # others 12
XU = {"MUFU", "F2F", "F2I", "I2F"}  # 16 lanes a clk and SM: 8 clk a warp and scheduler
MIO = {"SHFL", "LDS", "STS", "LDSM", "STSM", "LDG", "STG", "RED", "ATOM"}  # shared port: 4 clk
ALU = {"FMNMX", "ISETP", "FSETP", "LOP3", "SHF", "SEL", "FSEL", "PRMT", "IADD3", "LEA", "VIADD"}
ALU |= {"VIMNMX", "PLOP3", "P2R", "R2P", "F2FP"}  # 16 lanes a scheduler: 2 clk
PIPES = {n: (p, c) for p, c, s in (("XU", 8, XU), ("MIO", 4, MIO), ("ALU", 2, ALU)) for n in s}
BARRIER = 30  # clk from the last warp's arrival to the first one's next issue
COUNTED = ("MUFU", "F2F", "SHFL", "LDS", "STS", "LDG", "STG", "BAR", "LDL", "STL")


@dataclass(frozen=True)
class Instruction:
    text: str
    stall: int
    wait: int  # mask of scoreboards
    write: int  # scoreboard that its result sets, 7: none
    read: int  # scoreboard that its operands set, 7: none

    @property
    def name(self) -> str:
        found = re.match(r"(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", self.text)
        return found[1] if found else self.text


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
            here.append(Instruction(low[0], *fields))
            low = None
    return found


def looping(code: dict[str, list[Instruction]]) -> list[str]:
    """Labels of the blocks that control can come back to: those of every loop."""
    leads: dict[str, set[str]] = {}
    for (label, block), following in zip(code.items(), [*list(code)[1:], ""], strict=True):
        leads[label] = {to for i in block for to in re.findall(r"`\((\.L_x_\d+)\)", i.text)}
        if not block or not re.match(r"BRA(\.\w+)* `|EXIT$|RET\b|BRX\b", block[-1].text):
            leads[label].add(following)

    def comes_back(label: str) -> bool:
        seen: set[str] = set()
        todo = [label]
        while todo:
            new = leads.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return label in seen

    return [label for label in code if comes_back(label)]


def issue_clk(instructions: list[Instruction], warps: int) -> int:
    """Clk until ``warps`` warps of one scheduler, in step, have issued a block."""
    clk, last, steps = 0, 0, len(instructions)
    ready, at, waiting = [0] * warps, [0] * warps, set[int]()
    boards = [[0] * 8 for _ in range(warps)]
    free: dict[str, int] = collections.defaultdict(int)
    named = [(i, i.name, *PIPES.get(i.name, ("", 0))) for i in instructions]
    while any(step < steps for step in at):
        for turn in range(warps):
            w = (last + 1 + turn) % warps
            if at[w] >= steps or w in waiting or ready[w] > clk:
                continue
            i, name, pipe, busy = named[at[w]]
            blocked = any(i.wait >> b & 1 and boards[w][b] > clk for b in range(6))
            if blocked or (pipe and free[pipe] > clk):
                continue
            last = w
            if name == "BAR":
                waiting.add(w)
                if all(other in waiting or at[other] >= steps for other in range(warps)):
                    for other in waiting:
                        at[other], ready[other] = at[other] + 1, clk + BARRIER
                    waiting.clear()
                break
            free[pipe] = clk + busy
            latency = LATENCY.get(name, 12)
            boards[w][i.write] = max(boards[w][i.write], clk + latency) if i.write < 6 else 0
            boards[w][i.read] = max(boards[w][i.read], clk + min(latency, 20)) if i.read < 6 else 0
            ready[w], at[w] = clk + max(i.stall, 1), at[w] + 1
            break
        clk += 1
    return clk


def _mma_clk(instructions: list[Instruction], warps: int) -> int:
    """Clk of the SM's tensor cores: m64 nN k16 of 16-bit operands takes N / 2."""
    found = (re.search(r"HGMMA\.64x(\d+)x16", i.text) for i in instructions)
    return sum(int(m[1]) // 2 for m in found if m) * warps // 4


def hot_path(
    code: dict[str, list[Instruction]], warps: int, depth: int, options: dict[str, Any]
) -> Path:
    """The path of whole tiles, by the order of the blocks: what leads to the one with the most
    products, its steps, and what follows up to the most exponentials.

    Where a block holds both (attention) it is the whole path, and one step counts."""
    listed = list(code.values())
    products = [_mma_clk(block, warps) for block in listed]
    exponentials = [sum(i.name == "MUFU" for i in block) for block in listed]
    local = sum(i.name in ("LDL", "STL") for label in looping(code) for i in code[label])
    hot = products.index(max(products))
    if not products[hot]:
        return Path(0, 0, 0, {}, local)
    product = products[hot]
    if exponentials[hot] > 16:
        before, after = [], [listed[hot]]
    else:
        product *= -(-depth // options.get("BLOCK_D", depth))
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
    return Path(prologue, epilogue, product, {k: counts[k] for k in COUNTED}, local)


@triton.jit
def gemm_kernel(
    x, y, out, n, m, d,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A plain product x y^T, to check the model against public measurements."""
    row0, col0 = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_M
    acc = products(
        x, y, row0, col0, n, m, d, 0, 0, 0, 0, BLOCK_N, BLOCK_M, BLOCK_D, True, True, False
    )
    out.store([row0, col0], acc.to(out.dtype))


def _gemm(case: Case) -> None:
    x, y = _features(case, 512, 512)
    row = launch.Launch(128, int(case.form), 64, warps=8, stages=3)
    out = TensorDescriptor.from_tensor(x.new_empty(512, 512), [row.block_n, row.block_m])
    x, y = (TensorDescriptor.from_tensor(t, [b, 64]) for t, b in ((x, 128), (y, row.block_m)))
    gemm_kernel[(1, 1)](
        x, y, out, 512, 512, case.depth,
        BLOCK_N=row.block_n, BLOCK_M=row.block_m, BLOCK_D=row.block_d, **row.options,
    )  # fmt: skip


OPS["gemm"] = dict.fromkeys(("128", "256"), _gemm)
MEASURED = {"128": (423, 498), "256": (631, 704)}  # TFLOP/s of public H100 products by tile


@dataclass(frozen=True)
class Bound:
    """What the model allows n x m logits of a kernel."""

    milliseconds: float
    tflops: float
    by: str


def bound(cost: Cost, n: int, m: int, depth: int) -> Bound | None:
    """The predicted bound of one pass over n x m logits, from whole waves of tiles."""
    if cost.busy is None or cost.tile is None:
        return None
    block_n, block_m = cost.tile
    tiles = -(-n // block_n) * -(-m // block_m)
    per_tile = cost.path.product_clk / cost.busy
    slots = SMS * cost.ctas_per_sm
    issue = -(-tiles // slots) * cost.ctas_per_sm * per_tile / CLOCK
    attention, gradient = cost.kernel == "attention_kernel", cost.kernel == "gradient_kernel"
    read = 2 * depth * (block_m if attention else block_n + block_m)  # keys stream past the rows
    written = 2 * block_n * block_m if gradient else 0
    traffic = tiles * (read + written) / L2_RATE
    seconds = max(issue, traffic)
    tflops = 2 * (1 + attention) * n * m * depth / seconds / 1e12
    return Bound(seconds * 1e3, tflops, "issue" if issue >= traffic else "L2")


SHAPES = {  # of the GPU table: op, depth -> rows, columns
    ("info_nce", 128): (32_768, 32_768),
    ("info_nce", 512): (32_768, 32_768),
    ("prototypes", 128): (4_096, 20_000),
    ("gemm", 8192): (8_192, 8_192),
}


def _line(cost: Cost) -> str:
    case, tile = cost.case, "x".join(map(str, cost.tile or ()))
    words = [
        f"sm_{case.arch:<4}{case.op:<13}{case.form:<10}{case.dtype:<5}{case.depth:<5}"
        f"{cost.kernel.removesuffix('_kernel'):<10}{tile:<8}{cost.warps:<6}{cost.registers:<5}"
        f"{cost.local_bytes:<6}{cost.shared_bytes:<7}{cost.ctas_per_sm:<5}{cost.instruction}"
    ]
    if cost.busy is not None:
        path = cost.path
        counts = " ".join(f"{k} {v}" for k, v in path.counts.items() if v)
        words.append(
            f"\n      clk {path.prologue_clk} + {path.product_clk} + {path.epilogue_clk}, "
            f"busy {cost.busy:.0%}; {counts}"
        )
    shape = SHAPES.get((case.op, case.depth))
    found = bound(cost, *shape, case.depth) if shape and cost.case.arch == 90 else None
    if found and shape:
        words.append(
            f"\n      {shape[0]} x {shape[1]} x {case.depth}: {found.milliseconds:.2f} ms, "
            f"{found.tflops:.0f} TFLOP/s, bound by {found.by}"
        )
        if case.op == "gemm":
            low, high = MEASURED[case.form]
            words.append(
                f" (measured by others: {low} to {high}, so off by {found.tflops / high - 1:+.0%} "
                f"to {found.tflops / low - 1:+.0%})"
            )
    return "".join(words + [f"  {problem}" for problem in cost.problems])


def main() -> int:
    """Print the table; the exit status says whether every row keeps its promise."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    parser.add_argument("--arch", type=int, action="append", help="only this one, e.g. 90")
    parser.add_argument("--op", choices=sorted(OPS), action="append", help="only this one")
    parser.add_argument("--depth", type=int, help="only this one")
    args = parser.parse_args()
    archs, ops = args.arch or launch.CARDS, args.op or OPS
    chosen = [case for case in cases() if case.arch in archs and case.op in ops]
    chosen = [case for case in chosen if args.depth in (None, case.depth)]
    with ProcessPoolExecutor() as pool:
        found = [cost for costs_of in pool.map(costs, chosen) for cost in costs_of]
    if args.json:
        extra = [{"busy": c.busy, "problems": c.problems} for c in found]
        print(json.dumps([asdict(c) | more for c, more in zip(found, extra, strict=True)]))
    else:
        print(f"clk, busy and TFLOP/s: {HEADING} (one H100, {CLOCK / 1e9} GHz)")
        print(
            "arch   op           form      dtype depth kernel  tile    warps regs local shared CTAs"
        )
        print("\n".join(map(_line, found)))
    return int(any(c.problems for c in found))


if __name__ == "__main__":
    sys.exit(main())
