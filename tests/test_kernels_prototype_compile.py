"""The prototype kernels compile for each architecture without a GPU: every row of the launch table
spills nothing, uses the tensor core and fits the card. Runs this file in a fresh process, since
kernels of the interpreter do not compile."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# capability, shared memory of a program, instruction of a half-precision product
CARDS = {
    "sm_80": (80, 99 << 10, "mma.sync"),
    "sm_90": (90, 227 << 10, "wgmma"),
    "sm_100": (100, 227 << 10, "tcgen05.mma"),
}
REGISTERS = 65536


@pytest.mark.parametrize("name", CARDS)
def test_every_row_of_the_table(name):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, __file__, name], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) >= 10
    _, shared, instruction = CARDS[name]
    for row in rows:
        assert row["stack"] == 0, row
        assert row["shared"] <= shared, row
        assert row["registers"] * 32 * row["warps"] <= REGISTERS, row
        if row["half"]:
            assert row["instructions"] == [instruction], row
            assert row["async_copy"], row


def _compile(kernel, capability, tensors, constants, options, label, half):
    """tensors: name -> type or tuple of types (a name ending in "s" holds one per bank)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constexprs, attributes = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        kinds = tensors.get(name, "constexpr")
        signature[name] = kinds
        for path, kind in (
            [((at, b), kind) for b, kind in enumerate(kinds)]
            if isinstance(kinds, tuple)
            else [((at,), kinds)]
        ):
            if kind == "constexpr":
                constexprs[path] = constants[name]
            elif kind[0] == "*" or name in ("d", "dv") or "stride" in name:
                attributes[path] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()
    ptx = compiled.asm["ptx"]
    used = {word for _, _, word in CARDS.values() if re.search(rf"\b{re.escape(word)}", ptx)}
    row = {
        "kernel": label,
        "half": half,
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        "warps": options["num_warps"],
        "instructions": sorted(used),
        "async_copy": "cp.async" in ptx,
    }
    print(json.dumps(row), flush=True)


def _types(kernel, dtype, banks):
    """The launch's types: contiguous rows of ``dtype``, fp32 statistics, int64 labels."""
    types = {}
    for name in kernel.arg_names:
        if name.isupper():
            continue
        kind = "i32"
        if name.endswith(("_ptr", "_ptrs")):
            stem = name.rsplit("_", 1)[0]
            kind = "*" + {"labels": "i64", "best": "i64", "nearest": "i64"}.get(
                stem, dtype if stem in ("q", "k", "v", "target", "a", "b") else "fp32"
            )
        elif name.startswith("stride") and name.endswith("_d"):
            kind = "constexpr"
        per_bank = name.endswith("ptrs") or name.startswith("strides") or name == "counts"
        types[name] = (kind,) * banks if per_bank else kind
    return types


def _report(name):
    from protoclip.kernels.attention import attention_kernel
    from protoclip.kernels.probabilities import product_kernel, weights_kernel
    from protoclip.kernels.prototype_finish import finish_kernel
    from protoclip.kernels.prototype_tiles import ATTENTION, CHUNKED

    capability = CARDS[name][0]
    strides = {f"stride{s}_{x}_d": 1 for s in ("", "s") for x in "qkvtb"}

    def compile_(kernel, dtype, banks, options, label, half, **constants):
        types = _types(kernel, dtype, banks)
        if kernel is weights_kernel:
            types["out_ptr"] = "*" + dtype
        _compile(kernel, capability, types, strides | constants, options, label, half)

    def attention(tile, dtype, values, banks, hard, **more):
        label = f"attention {dtype} {values} {tile}"
        compile_(
            attention_kernel, dtype, banks, tile.options, label, dtype != "fp32",
            BANKS=banks, HARD=hard, BLOCK_N=tile.n, BLOCK_K=tile.k, BLOCK_D=tile.d,
            VALUES=values, BEST=values != "own", EXPECT=values != "own" and dtype != "fp32",
            **more,
        )  # fmt: skip

    for tile in ATTENTION[name].values():
        for even in (True, False):
            attention(tile, "bf16", "keys", 2, 1, BLOCK_DV=tile.d, WHOLE_D=True, EVEN_D=even)
        attention(tile, "fp16", "own", 1, 0, BLOCK_DV=tile.d, WHOLE_D=True, EVEN_D=False)
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        tile = CHUNKED[name][size]
        attention(tile, dtype, "none", 2, 1, BLOCK_DV=16, WHOLE_D=False, EVEN_D=False)
        compile_(
            weights_kernel, dtype, 1, tile.options, f"weights {dtype} {tile}", size == 2,
            UNIT=4096.0, BLOCK_N=tile.n, BLOCK_K=tile.k, BLOCK_D=tile.d, GRADIENT=True, HARD=True,
        )  # fmt: skip
    small = {"num_warps": 4, "num_stages": 2}
    compile_(product_kernel, "fp32", 1, small, "product", False, BLOCK_M=64, BLOCK_D=64, BLOCK_K=16)
    compile_(
        finish_kernel, "bf16", 2, small, "finish", False,
        BANKS=2, HARD=1, BLOCK_N=32, BLOCK_D=64, STATISTICS=True, LOSS=True, GRADIENT=True,
        TARGET=True, BEST=True, EXPECT=True, DSCALE=True,
    )  # fmt: skip


if __name__ == "__main__":
    _report(sys.argv[1])
