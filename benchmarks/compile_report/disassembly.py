"""The instructions of a compiled kernel by basic block, and the registers and memory it takes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import NamedTuple

import triton


class Instruction(NamedTuple):
    """Scoreboards, of which a warp has six, are set by an instruction that others wait for."""

    name: str
    text: str
    stall: int  # clk until the next instruction of the warp
    waits_for: int  # a mask of scoreboards
    result_board: int  # set until the result is there; 7: none
    operand_board: int  # set until the operands have been read; 7: none


Block = list[Instruction]


class Resources(NamedTuple):
    """What each thread takes."""

    registers: int
    local_bytes: int


def resources(cubin: bytes) -> Resources:
    text = _tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin=cubin)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(registers=used["REG"], local_bytes=used["STACK"] + used["LOCAL"])


def disassemble(cubin: bytes) -> dict[str, Block]:
    """Label -> instructions of each basic block, in order; takes half a second."""
    return blocks(_tool(triton.knobs.nvidia.nvdisasm.path, "-c", "-hex", cubin=cubin))


def _tool(*command: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([*command, file.name], capture_output=True, text=True, check=True)
    return run.stdout


def blocks(sass: str) -> dict[str, Block]:
    """The same from the text of ``nvdisasm -c -hex``: an instruction is two lines, its text beside
    the lower half of its code, and the upper half, where the assembler's schedule is."""
    block: Block = []
    by_label = {"entry": block}
    text = ""
    low: int | None = None
    for line in sass.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            block = by_label.setdefault(label[1], [])
        elif first := re.match(
            r"\s+/\*[0-9a-f]{4,6}\*/\s+(.*?);?\s+/\* 0x([0-9a-f]{16}) \*/", line
        ):
            text = first[1]
            low = int(first[2], 16)
        elif low is not None and (second := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", line)):
            block.append(_decoded(text, int(second[1], 16) << 64 | low))
            low = None
    return by_label


def _decoded(text: str, code: int) -> Instruction:
    name = re.match(r"(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", text)
    return Instruction(
        name=name[1] if name else "",
        text=text,
        stall=code >> 105 & 15,
        waits_for=code >> 116 & 63,
        result_board=code >> 110 & 7,
        operand_board=code >> 113 & 7,
    )


def local_accesses_in_loops(code: dict[str, Block]) -> int:
    """Loads and stores of local memory between a branch back and its target."""
    labels = list(code)
    looping: set[int] = set()
    for index, block in enumerate(code.values()):
        text = " ".join(instruction.text for instruction in block)
        for target in re.findall(r"`\((\.L_x_\d+)\)", text):
            looping.update(range(labels.index(target), index + 1))
    return sum(
        instruction.name in ("LDL", "STL")
        for index, block in enumerate(code.values())
        if index in looping
        for instruction in block
    )
