"""The instructions of a compiled kernel by basic block, and the registers and memory it takes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import NamedTuple

import triton


class Instruction(NamedTuple):
    name: str
    text: str


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
    """The same from the text of ``nvdisasm -c -hex``; the second line of an instruction, the upper
    half of its code, is left out."""
    block: Block = []
    by_label = {"entry": block}
    for line in sass.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            block = by_label.setdefault(label[1], [])
        elif first := re.match(r"\s+/\*[0-9a-f]{4,6}\*/\s+(.*?);?\s+/\* 0x[0-9a-f]{16} \*/", line):
            name = re.match(r"(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", first[1])
            block.append(Instruction(name[1] if name else "", first[1]))
    return by_label


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
