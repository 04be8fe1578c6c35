"""A model of the time that a kernel takes on an H100, from its instructions: good to 30 %.

docs/kernels.md has its equations and how far off it is where others have measured. Latencies and
widths are from public micro-benchmarks; stall counts and scoreboards are the assembler's own.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.compile_report.disassembly import Block, Instruction

SMS = 132
CLOCK = 1.70e9  # Hz, under load
L2_RATE = 8e12  # bytes a second
REGISTERS = 65536  # of an SM
SHARED = dict.fromkeys((86, 89, 120, 121), 100 << 10)  # of an SM; 1 KiB a CTA is reserved
SHARED |= dict.fromkeys((90, 100, 103, 110), 228 << 10) | {80: 164 << 10}
LATENCY = {"LDG": 550, "LDS": 30, "LDSM": 33, "SHFL": 25, "MUFU": 22, "F2F": 22, "I2F": 22}
LATENCY |= {"F2I": 22, "STS": 10, "STG": 10, "S2R": 25, "LDC": 40, "ATOM": 600}  # others 12
XU = {"MUFU", "F2F", "F2I", "I2F"}  # 16 lanes a clk and SM
MIO = {"SHFL", "LDS", "STS", "LDSM", "STSM", "LDG", "STG", "RED", "ATOM"}  # the shared port
ALU = {"FMNMX", "ISETP", "FSETP", "LOP3", "SHF", "SEL", "FSEL", "PRMT", "IADD3", "LEA", "VIADD"}
ALU |= {"VIMNMX", "PLOP3", "P2R", "R2P", "F2FP"}  # 16 lanes a scheduler
PIPE = dict.fromkeys(XU, "XU") | dict.fromkeys(MIO, "MIO") | dict.fromkeys(ALU, "ALU")
BUSY = {"XU": 8, "MIO": 4, "ALU": 2}  # clk that an instruction of a warp keeps a pipe
BARRIER = 30  # clk from the last warp's arrival to the first one's next issue
COUNTED = ("MUFU", "F2F", "SHFL", "LDS", "STS", "LDG", "STG", "BAR", "LDL", "STL")
OVERLAP = 0.2  # of its own time that a second CTA hides: so the model meets MEASURED_ATTENTION
MEASURED_PRODUCTS = {"128": (423, 498), "256": (631, 704)}  # TFLOP/s of public kernels by tile
# The same of attention kernels whose warps are not specialised, D = 128 (public pull requests 205,
# 206 and 829 of facebookexperimental/triton; specialised ones reach 462 to 608).
MEASURED_ATTENTION = (407, 487)


def ctas_per_sm(arch: int, registers: int, warps: int, shared_bytes: int) -> int:
    """How many CTAs an SM has room for; registers are given to warps by 256."""
    allocated = -(-registers * 32 // 256) * 256 * warps
    return min(REGISTERS // allocated, SHARED[arch] // (shared_bytes + 1024))


def issue_clk(instructions: Block, warps: int) -> int:
    """Clk until ``warps`` warps of one scheduler, in step, have issued a block."""
    steps = len(instructions)
    clk = last = 0
    ready = [0] * warps  # from when each can issue
    position = [0] * warps
    at_barrier: set[int] = set()
    boards = [[0] * 8 for _ in range(warps)]
    free: dict[str, int] = collections.defaultdict(int)  # pipe -> from when
    while any(step < steps for step in position):
        for warp in ((last + 1 + turn) % warps for turn in range(warps)):
            if position[warp] >= steps or warp in at_barrier or ready[warp] > clk:
                continue
            instruction = instructions[position[warp]]
            pipe = PIPE.get(instruction.name, "")
            if free[pipe] > clk or any(
                instruction.waits_for >> board & 1 and boards[warp][board] > clk
                for board in range(6)
            ):
                continue
            last = warp
            if instruction.name == "BAR":
                at_barrier.add(warp)
                if all(w in at_barrier or position[w] >= steps for w in range(warps)):
                    for arrived in at_barrier:
                        position[arrived] += 1
                        ready[arrived] = clk + BARRIER
                    at_barrier.clear()
                break
            free[pipe] = clk + BUSY.get(pipe, 0)
            latency = LATENCY.get(instruction.name, 12)
            for board, wait in (
                (instruction.result_board, latency),
                (instruction.operand_board, min(latency, 20)),
            ):
                boards[warp][board] = max(boards[warp][board], clk + wait)
            ready[warp] = clk + max(instruction.stall, 1)
            position[warp] += 1
            break
        clk += 1
    return clk


class Clk(NamedTuple):
    """Of the path of whole tiles on Hopper: issue before and after the products, and what the
    tensor cores take for them; 0 where there are none."""

    before: int
    products: int
    after: int


class Slice(NamedTuple):
    """Of a tile that goes slice by slice."""

    clk: int  # issue, with its products
    loads: int  # LDG of a warp after the products


class HotPath(NamedTuple):
    clk: Clk
    counts: dict[str, int]  # instructions of a warp after the products, by name
    masked: int  # clk around the products of a tile that holds positives or crosses the edge
    slice: Slice | None


def hot_path(
    code: dict[str, Block], warps: int, depth: int, block_d: int, products_are_held: bool
) -> HotPath:
    """The path of whole tiles: what leads to the block with the most products, by the order of the
    blocks, its steps over ``depth`` of ``block_d`` each, and what is run after it.

    Where a block holds both products and exponentials (attention), or the products of rows that are
    held and their maxima (k-means), it is the whole path, and one step counts."""
    blocks = list(code.values())
    texts = ("\n".join(instruction.text for instruction in block) for block in blocks)
    # m64 nN k16 of 16-bit operands takes the SM's tensor cores N / 2 clk.
    widths = (re.findall(r"HGMMA\.64x(\d+)x16", text) for text in texts)
    products = [sum(int(n) // 2 for n in of_block) * warps // 4 for of_block in widths]
    exponentials = [sum(i.name == "MUFU" for i in block) for block in blocks]
    product_clk = max(products)
    if not product_clk:
        return HotPath(Clk(before=0, products=0, after=0), {}, masked=0, slice=None)
    hot = products.index(product_clk)
    steps = -(-depth // block_d)
    per_scheduler = max(1, warps // 4)

    def clk(blocks: list[Block]) -> int:
        return sum(issue_clk(block, per_scheduler) for block in blocks)

    if exponentials[hot] > 16 or products_are_held:
        before: list[Block] = []
        after = masked = [blocks[hot]]
        of_slice = None
    else:
        product_clk *= steps

        def leading_to(loop: int) -> list[Block]:
            start = loop  # other paths that are listed first end in products or exponentials
            while start > 1 and not products[start - 1] and exponentials[start - 1] <= 16:
                start -= 1
            return [blocks[0], *blocks[max(start, 1) : loop]]

        before = leading_to(hot)
        after = _followed(code, hot + 1, masked=False)
        # The last one with as many products: masks may have a path of their own.
        with_masks = len(products) - 1 - products[::-1].index(products[hot])
        masked = leading_to(with_masks) + _followed(code, with_masks + 1, masked=True)
        of_slice = _slice(code, products, steps, clk)
    counts = collections.Counter(i.name for block in after for i in block)
    return HotPath(
        Clk(before=clk(before), products=product_clk, after=clk(after)),
        {name: counts[name] for name in COUNTED},
        masked=clk(masked),
        slice=of_slice,
    )


def _target(instruction: Instruction) -> str | None:
    """The label that a branch leads to."""
    label = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction.text)
    return label[1] if label else None


def _followed(code: dict[str, Block], first: int, masked: bool) -> list[Block]:
    """What is run from a block to the end of the kernel. Branches forward under a condition are
    taken, so that masks are skipped; with ``masked`` only those that skip products."""
    labels = list(code)
    blocks = list(code.values())
    followed: list[Block] = []
    index = first
    while index < len(blocks):
        following = index + 1
        run: Block = []
        for instruction in blocks[index]:
            run.append(instruction)
            if instruction.name == "EXIT":  # where a condition is on it, slices follow
                return [*followed, run]
            label = _target(instruction)
            if label is None or labels.index(label) <= index:
                continue
            skipped = blocks[index + 1 : labels.index(label)]
            if (
                not instruction.text.startswith("@")
                or not masked
                or any(i.name == "HGMMA" for block in skipped for i in block)
            ):
                following = labels.index(label)
                break
        followed.append(run)
        index = following
    return followed


def _slice(
    code: dict[str, Block],
    products: list[int],
    steps: int,
    clk: Callable[[list[Block]], int],
) -> Slice | None:
    """The loop over slices: around the loop over their products."""
    labels = list(code)
    blocks = list(code.values())
    for inner, product_clk in enumerate(products):
        if not 0 < product_clk < max(products):
            continue
        for last in range(inner + 1, len(blocks)):
            targets = [_target(instruction) for instruction in blocks[last]]
            first = min((labels.index(label) for label in targets if label), default=inner)
            if first < inner:
                around = blocks[first:inner] + blocks[inner + 1 : last + 1]
                after = blocks[inner + 1 : last + 1]
                loads = sum(i.name == "LDG" for block in after for i in block)
                taken = max(product_clk, clk([blocks[inner]]))
                return Slice(clk=clk(around) + steps * taken, loads=loads)
    return None


def busy_share(clk: Clk, ctas: int) -> float:
    """Of the tensor cores' time, where CTAs overlap without loss: no kernel does better."""
    taken = clk.before + clk.products * 1.05 + clk.after
    return clk.products / max(clk.products * 1.03, taken / ctas)


class Bound(NamedTuple):
    """A prediction, never a measurement."""

    ms: float
    tflops: float
    limit: str  # "issue" or "L2"


def bound(
    clk: Clk,
    ctas: int,
    *,
    shape: tuple[int, int],
    tile: tuple[int, int],
    depth: int,
    keys_stream: bool,
    writes_tile: bool,
) -> Bound:
    """Of a kernel that goes over the tiles of ``shape`` and multiplies ``depth`` deep.

    A CTA alone on its SM loads only while it multiplies; several hide OVERLAP of each other. With
    ``keys_stream`` (attention) a tile's rows stay, and its values are multiplied too."""
    n, m = shape
    block_n, block_m = tile
    tiles = -(-n // block_n) * -(-m // block_m)
    bytes_read = 2 * depth * (block_m if keys_stream else block_n + block_m)
    bytes_written = 2 * block_n * block_m if writes_tile else 0
    multiplying = clk.products * 1.05
    if ctas == 1:
        multiplying = max(multiplying, bytes_read * SMS * CLOCK / L2_RATE)
    around = clk.before + clk.after
    taken = max(clk.products * 1.03, (multiplying + around) / (1 + OVERLAP * (ctas - 1)))
    issue = -(-tiles // (SMS * ctas)) * ctas * taken / CLOCK
    traffic = tiles * (bytes_read + bytes_written) / L2_RATE
    seconds = max(issue, traffic)
    flop = 2 * (1 + keys_stream) * n * m * depth
    return Bound(
        ms=seconds * 1e3,
        tflops=flop / seconds / 1e12,
        limit="issue" if issue >= traffic else "L2",
    )
