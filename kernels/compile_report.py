"""Compile every kernel of every launch row without a GPU, and print what each costs.

    python -m protoclip.kernels.compile_report [--json] [--arch 90] [--kernel forward]

Registers and spills come from the cubin, shared memory from the compiler, the tensor-core
instruction from the PTX. ``problems`` names what breaks the row's promise.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from protoclip.kernels import info_nce_backward, info_nce_forward, launch, siglip, wave_finish

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KERNELS = {
    "forward": info_nce_forward.forward_kernel,
    "gradient": info_nce_backward.gradient_kernel,
    "stashing": info_nce_forward.forward_kernel,
    "stashed": info_nce_backward.gradient_kernel,
    "sigmoid": siglip.sigmoid_kernel,
}
HELPERS = {
    "merge": info_nce_forward.merge_kernel,
    "merge_all": info_nce_forward.merge_kernel,
    "lost": wave_finish.lost_kernel,
    "finish": wave_finish.finish_kernel,
}
HELPER_ROW = launch.Launch(16, 64, 128, warps=4, stages=3, ctas_per_sm=2)
MERGES = {"merge": info_nce_forward.MERGE, "merge_all": info_nce_forward.MERGE_ALL}
FLOATS = ("pair_weight", "log2_m")
FEATURES = ("x", "y", "x_ptr", "y_ptr", "g_ptr", "dx_ptr", "dy_ptr")


@dataclass(frozen=True)
class Case:
    """One specialisation: ``operands`` says how the features are read ("ragged": any D, any
    alignment)."""

    kernel: str
    arch: int
    dtype: str
    operands: str
    row: launch.Launch
    whole: bool = True  # with the columns of InfoNCE, the gradients of the sigmoid loss


@dataclass(frozen=True)
class Cost:
    """What a case takes; ``local_bytes`` is stack and spills a thread."""

    case: Case
    registers: int
    local_bytes: int
    shared_bytes: int
    instruction: str
    ctas_per_sm: int
    problems: list[str]


def cases() -> Iterator[Case]:
    """Every kernel of every launch row with every way to read the features."""
    for kernel, arch, dtype, operands, row in launch.rows():
        yield Case(kernel, arch, NAMES[dtype], operands, row)
        if arch == 90:
            yield Case(kernel, arch, NAMES[dtype], operands, row, whole=False)
    for arch in launch.CARDS:
        for kernel in HELPERS:
            warps = MERGES[kernel][2] if kernel in MERGES else HELPER_ROW.warps
            yield Case(kernel, arch, "bf16", "ragged", replace(HELPER_ROW, warps=warps))


def cost(case: Case) -> Cost:
    """Compile one case."""
    compiled = _compile(case)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    registers, local = found["REG"], found["STACK"] + found["LOCAL"]
    shared = compiled.metadata.shared
    pattern = r"tcgen05\.mma|wgmma|mma\.sync"
    instruction = next(iter(re.findall(pattern, compiled.asm["ptx"])), "fma")
    ctas = _occupancy(case, compiled.metadata.num_warps, registers, shared)
    return Cost(
        case, registers, local, shared, instruction, ctas,
        _problems(case, local, shared, instruction, ctas),
    )  # fmt: skip


def _compile(case: Case) -> Any:
    kernel, row = (KERNELS | HELPERS)[case.kernel], case.row
    block, depth, _ = MERGES.get(case.kernel, (64, None, None))
    constants = {
        "BLOCK_N": row.block_n,
        "BLOCK_M": row.block_m,
        "BLOCK_D": row.block_d,
        "STRIP": row.strip,
        "EVEN_D": case.operands != "ragged",
        "DESCRIPTORS": case.operands == "descriptors",
        "WIDEN": False,
        "COLUMNS": case.whole,
        "GRADIENTS": case.whole,
        "LIFTED": 1.0,
        "STASH": case.kernel in ("stashing", "stashed"),
        "HALF": case.dtype != "fp32",
        "LIFT": case.dtype == "fp16",
        "BLOCK": block,
        "DEPTH": depth,
    }
    constants |= dict.fromkeys(("HAS_BEFORE", "IS_LAST", "ADD_ROWS", "ADD_COLUMNS"), True)
    constants |= dict.fromkeys(("stride_x_d", "stride_y_d"), 1)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: _type(name, case) for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = [name for name, kind in signature.items() if kind.startswith("*")]
    if case.operands != "ragged":
        aligned += ["d", "stride_x_n", "stride_y_m"]
    aligned = [name for name in aligned + ["stride_g"] if name in kernel.arg_names]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": row.warps, "num_stages": row.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)


def _type(name: str, case: Case) -> str:
    if name in ("x", "y") and case.operands == "descriptors":
        block = case.row.block_n if name == "x" else case.row.block_m
        return f"tensordesc<{case.dtype}[{block},{case.row.block_d}]>"
    if name in FEATURES:
        return f"*{case.dtype}"
    if name == "codes_ptr":
        return "*i16"
    if name in FLOATS:
        return "fp32"
    return "*fp32" if name.endswith("_ptr") else "i32"


def _occupancy(case: Case, warps: int, registers: int, shared: int) -> int:
    card = launch.CARDS[case.arch]
    allocated = -(-registers * 32 // 256) * 256 * warps  # registers are given to warps by 256
    return min(card.registers // allocated, card.shared_bytes // (shared + 1024))


def _problems(case: Case, local: int, shared: int, instruction: str, ctas: int) -> list[str]:
    card, problems = launch.CARDS[case.arch], []
    if local:
        problems.append(f"{local} bytes of local memory a thread")
    if shared > card.shared_bytes_per_cta:
        problems.append(
            f"{shared} bytes of shared memory, the card has {card.shared_bytes_per_cta}"
        )
    wanted = "fma" if case.dtype == "fp32" else card.tensor_core
    if instruction != wanted and case.kernel in KERNELS:
        problems.append(f"{instruction} where {wanted} was expected")
    if ctas < case.row.ctas_per_sm:
        problems.append(f"{ctas} CTAs an SM, the row promises {case.row.ctas_per_sm}")
    return problems


def main() -> int:
    """Print the table; the exit status says whether every row keeps its promise."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    parser.add_argument("--arch", type=int, action="append", help="only this one, e.g. 90")
    parser.add_argument(
        "--kernel", choices=sorted(KERNELS | HELPERS), action="append", help="only this one"
    )
    args = parser.parse_args()
    archs, kernels = args.arch or launch.CARDS, args.kernel or KERNELS | HELPERS
    chosen = [case for case in cases() if case.arch in archs and case.kernel in kernels]
    with ProcessPoolExecutor() as pool:
        costs = list(pool.map(cost, chosen))
    if args.json:
        print(json.dumps([asdict(c) for c in costs]))
    else:
        print(
            "arch   kernel    dtype operands     tile         warps stages regs local shared CTAs"
        )
        for c in costs:
            row = c.case.row
            print(
                f"sm_{c.case.arch:<4}{c.case.kernel:<10}{c.case.dtype:<6}{c.case.operands:<13}"
                f"{f'{row.block_n}x{row.block_m}x{row.block_d}':<13}{row.warps:<6}{row.stages:<7}"
                f"{c.registers:<5}{c.local_bytes:<6}{c.shared_bytes:<7}{c.ctas_per_sm:<5}"
                f"{c.instruction} {'; '.join(c.problems)}"
            )
    return int(any(c.problems for c in costs))


if __name__ == "__main__":
    sys.exit(main())
