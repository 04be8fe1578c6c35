"""Launch configurations as data: one frozen row per kernel, architecture and operand width.

There is no autotuner: a search would time kernels inside the user's first steps, and its choice
would change the bits of a result between runs. ``make kernels`` shows what every row costs.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from torch import Tensor

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Launch:
    """Tile BLOCK_N x BLOCK_M of the logits, the features read BLOCK_D at a time; a size that a
    kernel has no use for is 0."""

    block_n: int
    block_m: int
    block_d: int
    warps: int
    stages: int
    ctas_per_sm: int = 1  # promised: registers and shared memory must leave room for so many
    slice_m: int = 64  # columns at a time in tiles on the edge or the diagonal
    descriptors: bool = False  # load by TMA where base and row stride are multiples of 16 bytes
    part: int = 16  # consecutive rows of a product that are one warp's
    max_registers: int | None = None  # asked of the assembler, so that ``ctas_per_sm`` fit
    fuses: bool = True  # a multiply with an add, which then rounds once

    @property
    def options(self) -> dict[str, int | bool]:
        """What Triton itself takes; its own default for fusing changes in 3.10."""
        options = {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": self.fuses,
        }
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


ARCHITECTURES = (80, 89, 90, 100, 120)  # with rows of their own
# Other cards -> those with the same instructions and no more shared memory; unknown and newer ones
# take 89's: mma.sync, the least shared memory.
SERVED_AS = {80: 80, 90: 90, 100: 100, 103: 100, 110: 100, 120: 120, 121: 120}

_MMA = Launch(64, 128, 32, warps=4, stages=4, ctas_per_sm=2, slice_m=32)
_PLAIN = Launch(64, 64, 32, warps=4, stages=2, ctas_per_sm=2)
_SMALL = Launch(64, 64, 32, warps=4, stages=4, ctas_per_sm=2)
_SMALL_SLICES = replace(_SMALL, slice_m=16)
_HOPPER = Launch(128, 128, 64, warps=4, stages=3, ctas_per_sm=2, slice_m=32, descriptors=True)
_HOPPER_SLICES = replace(_HOPPER, slice_m=16)  # what wider slices need of pairs spills
_HOPPER_FEW = replace(_HOPPER, block_n=64, block_m=64)
_NARROW = Launch(128, 64, 64, warps=8, stages=3, slice_m=32, descriptors=True)

# Kernel -> architecture -> row, for half precision and rows that are aligned to whole BLOCK_D.
HALF: dict[str, dict[int, Launch]] = {
    "info_nce_forward": {
        80: _MMA,
        89: _MMA,
        90: _HOPPER,
        100: replace(_HOPPER, part=32),
        120: _MMA,
    },
    "info_nce_gradient": {
        80: _MMA,
        89: _MMA,
        90: _HOPPER,
        100: replace(_HOPPER, warps=8, ctas_per_sm=1),
        120: _MMA,
    },
    # Loss and gradient at once: larger tiles spill. Two CTAs of 128 registers are 55 % busy by the
    # model, one of 170 is 29 %.
    "sigmoid_loss": {
        80: _SMALL,
        89: _SMALL,
        90: replace(_NARROW, ctas_per_sm=2, max_registers=128),
        100: _NARROW,
        120: _SMALL,
    },
    # Few pairs: most tiles hold some to tell apart and go slice by slice, a small one in less time.
    "contrastive_forward": {80: _SMALL, 89: _SMALL, 90: _HOPPER_FEW, 100: _SMALL, 120: _SMALL},
    "contrastive_forward_with_biases": {
        80: _SMALL,
        89: _SMALL,
        90: replace(_HOPPER_FEW, slice_m=16),  # wider slices spill
        100: _SMALL_SLICES,
        120: _SMALL_SLICES,
    },
    "contrastive_gradient": {
        80: _SMALL_SLICES,
        89: _SMALL_SLICES,
        90: _HOPPER_FEW,
        100: _SMALL_SLICES,
        120: _SMALL_SLICES,
    },
    "contrastive_gradient_with_biases": {
        80: _SMALL_SLICES,
        89: _SMALL_SLICES,
        90: _HOPPER_FEW,
        100: replace(_SMALL, slice_m=32),  # slices of 16 spill
        120: _SMALL_SLICES,
    },
}
# These rows apply where the logits fill at least LARGE_TILES whole tiles per SM; with fewer, SMs
# would idle.
LARGE_TILES = 2
HALF_LARGE: dict[str, dict[int, Launch]] = {
    # From LEAST_DEPTH on, the products of a tile take so long that one CTA hides the rest, and a
    # larger tile is better: L2 delivers 8 TB/s, which feed 56 % of an H100 at the 64 FLOPs per byte
    # of 128 x 128 and 74 % at the 85 of 128 x 256. sm_100 has no such row: its products accumulate
    # in tensor memory, which the model does not know, and no public figure to calibrate it on was
    # found; the sweep times the row there.
    "info_nce_gradient": {
        90: Launch(128, 256, 64, warps=8, stages=3, slice_m=32, descriptors=True)
    },
    "contrastive_forward": {
        80: _MMA,
        89: _MMA,
        90: _HOPPER_SLICES,
        100: replace(_HOPPER_SLICES, part=32),
        120: _MMA,
    },
    "contrastive_forward_with_biases": {
        80: _MMA,
        89: _MMA,
        90: _HOPPER_SLICES,
        100: replace(_HOPPER_SLICES, part=32),
        120: _MMA,
    },
    "contrastive_gradient": {90: _HOPPER},
    "contrastive_gradient_with_biases": {90: replace(_HOPPER_SLICES, block_m=64)},
}
LEAST_DEPTH = {"info_nce_forward": 512, "info_nce_gradient": 512}  # the sweep may add a forward row
# Any card, any D, any strides.
HALF_ANY: dict[str, Launch] = {
    "info_nce_forward": _PLAIN,
    "contrastive_forward": _PLAIN,
    "contrastive_forward_with_biases": _PLAIN,
    "contrastive_gradient": Launch(64, 32, 32, warps=4, stages=2, ctas_per_sm=2, slice_m=32),
    "contrastive_gradient_with_biases": Launch(
        64, 32, 32, warps=4, stages=2, ctas_per_sm=2, slice_m=32
    ),
    "info_nce_gradient": Launch(64, 32, 32, warps=4, stages=2, ctas_per_sm=2, slice_m=32),
    "sigmoid_loss": Launch(64, 32, 32, warps=4, stages=2, ctas_per_sm=2, slice_m=32),
}
# fp32 runs as three products of TF32 (``tiles.dot``). On FMA units y would be read with 8-way bank
# conflicts: 77,000 wavefronts for 128 x 128 pairs of 64 features on sm_80, 4,600 this way.
FLOAT_ANY = Launch(64, 64, 16, warps=4, stages=2, ctas_per_sm=2)
FLOAT_CONTRASTIVE = replace(FLOAT_ANY, block_m=32, slice_m=32)  # 64 columns spill in loops
INTERPRETER = Launch(32, 64, 32, warps=4, stages=1, slice_m=32)

# Prototypes, values in the pass: 16-bit rows by width, BLOCK_D columns of them at once. On Hopper
# two CTAs of four warps share an SM, so that the softmax of one runs under the products of the
# other: 83 % of the tensor cores' time by the model at D = 128, 45 % as one CTA of eight.
_MMA_ATTENTION = {
    64: Launch(128, 64, 64, warps=8, stages=2),
    128: Launch(64, 64, 128, warps=4, stages=2),
    256: Launch(64, 32, 256, warps=8, stages=2),
}
ATTENTION: dict[int, dict[int, Launch]] = {
    80: _MMA_ATTENTION,
    89: _MMA_ATTENTION,
    90: {
        64: Launch(64, 128, 64, warps=4, stages=2, ctas_per_sm=2),
        128: Launch(64, 128, 128, warps=4, stages=2, ctas_per_sm=2),
        256: Launch(64, 64, 256, warps=4, stages=2, ctas_per_sm=2),
    },
    100: {
        64: Launch(128, 64, 64, warps=8, stages=2),
        128: Launch(128, 64, 128, warps=8, stages=2),
        256: Launch(64, 64, 256, warps=8, stages=2),
    },
    120: _MMA_ATTENTION,
}
# With the nearest prototype and the gradient of the scale the larger tile does not fit.
ATTENTION_FULL = {
    (90, 128): Launch(64, 64, 128, warps=4, stages=3, ctas_per_sm=2),
    (90, 256): Launch(64, 32, 256, warps=4, stages=3, ctas_per_sm=2),
}
WIDEST_ATTENTION = 256
# Logits by chunks of D: statistics alone, and tiles of weights.
_CHUNKED = Launch(128, 64, 64, warps=8, stages=3)
CHUNKED = {
    80: _CHUNKED,
    89: _CHUNKED,
    # Triton 3.6 takes 241 registers for the weights of 128 x 128: one CTA, 42 to 51 % busy by the
    # model; of 128 x 64 it takes 122, and two are at most 76 to 91 %.
    90: _CHUNKED if TRITON < (3, 7) else replace(_CHUNKED, block_m=128),
    100: _CHUNKED,
    120: _CHUNKED,
}
CHUNKED_FLOAT = Launch(64, 64, 16, warps=4, stages=2, ctas_per_sm=2)

# k-means, by row width: one-term products, and three-term products of fp32 rows (ASSIGN_OPEN).
# Rows up to that width are loaded once, wider ones for each tile of centroids. ASSIGN_EXACT then
# computes |x - c|^2 of undecided rows.
ASSIGN = {
    64: Launch(64, 64, 64, warps=4, stages=3, ctas_per_sm=2),
    128: Launch(64, 64, 128, warps=4, stages=3, ctas_per_sm=2),
    256: Launch(64, 32, 256, warps=4, stages=2),
}
ASSIGN_WIDE = Launch(128, 64, 64, warps=8, stages=3)
_OPEN = Launch(64, 64, 64, warps=4, stages=2)
_OPEN_DEEP = replace(_OPEN, block_m=32, block_d=128)
ASSIGN_OPEN = {
    80: {64: _OPEN, 128: _OPEN_DEEP},
    89: {64: _OPEN, 128: _OPEN_DEEP},
    90: {64: _OPEN, 128: replace(_OPEN, block_d=128)},
    100: {64: _OPEN, 128: replace(_OPEN, block_d=128)},
    # Wider tiles of three terms need more than 255 registers on sm_120.
    120: {64: replace(_OPEN, block_m=32), 128: _OPEN_DEEP},
}
ASSIGN_OPEN_WIDE = replace(_OPEN, block_m=32)
_EXACT_TILE = (128, 256) if INTERPRETED else (32, 64)  # there a program costs more than products
ASSIGN_EXACT = Launch(*_EXACT_TILE, 8, warps=8, stages=1)
SEGMENT_MEAN = Launch(32, 0, 128, warps=4, stages=1)

# Small kernels that merge the tiles' partial results. MERGE: pairs per program, partials per load.
# MERGE_ALL: one program; with 8 warps its threads would spill.
# Older Triton lets several lanes store a merged sum, which has to be the same in all of them.
_FUSES = TRITON >= (3, 7)
MERGE = Launch(64, 8, 0, warps=4, stages=3, fuses=_FUSES)
MERGE_ALL = Launch(256, 8, 0, warps=16, stages=3, fuses=_FUSES)
EXTREMES = Launch(0, 0, 0, warps=1, stages=3)  # its blocks are the gradient's
# Gradients and prototypes' losses: rows and columns of D.
SCALE = Launch(4096, 0, 0, warps=4, stages=1)
ID_CODES = Launch(64, 128, 0, warps=4, stages=1)
FINISH = Launch(16, 0, 128, warps=4, stages=1)
REDUCE = Launch(1024, 0, 0, warps=4, stages=1)
# Lanes that reduce the same row would round its last sum differently if it were fused with a
# product, and the result would depend on which of them stores it.
JOIN_SLICES = Launch(32, 0, 64, warps=4, stages=1, fuses=False)

# An architecture for tensors on any device: to compile, not to run.
compiling_for: int | None = None


def architecture(device: torch.device) -> int | None:
    """The architecture whose rows serve a device; None for the interpreter's.

    Raises:
        ValueError: a card that is too old, beside a current one that is not.
    """
    if compiling_for or device.type != "cuda":
        return compiling_for
    major, minor = torch.cuda.get_device_capability(device)
    arch = served_as(10 * major + minor)
    if arch is None:
        raise ValueError(
            f"the Triton kernels need compute capability 8.0, {device} has {major}.{minor}; pass "
            "backend='reference' for its tensors"
        )
    return arch


def cdiv(length: int, block: int) -> int:
    """How many blocks a length takes. Triton's takes a microsecond on the host."""
    return -(-length // block)


def num_sms(device: torch.device) -> int:
    """How many multiprocessors a device has; without a card an H100's."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def served_as(capability: int) -> int | None:
    """The architecture in the tables for a capability such as 86; None before 80."""
    return None if capability < 80 else SERVED_AS.get(capability, 89)


def why_not(capability: tuple[int, int] | None = None, hip: str | None = None) -> str | None:
    """Why these kernels cannot run on the current card, in words; None where they can."""
    hip = hip or torch.version.hip
    if hip:
        return f"the Triton kernels have no launch rows for AMD GPUs (ROCm {hip})"
    major, minor = capability or torch.cuda.get_device_capability()
    if served_as(10 * major + minor) is None:
        return f"the Triton kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return _no_driver()


def _no_driver() -> str | None:
    """What is missing to build Triton's driver, which it does at its first launch."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which(compiler) is None:
        return "Triton needs a C compiler at its first launch; install gcc, or set CC"
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":  # Debian's; its headers lie where posix_prefix says
        scheme = "posix_prefix"
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    if not header.exists():
        return f"Triton needs Python's headers; install python3-dev ({header} is missing)"
    return None


def choose(kernel: str, x: Tensor, y: Tensor) -> Launch:
    """The configuration for a kernel, the features' device, width and alignment."""
    arch = architecture(x.device)
    if arch is None:
        return INTERPRETER
    if x.dtype == torch.float32:
        return FLOAT_CONTRASTIVE if kernel.startswith("contrastive") else FLOAT_ANY
    config = HALF[kernel][arch]
    large = HALF_LARGE.get(kernel, {}).get(arch)
    if large is not None and x.shape[1] >= LEAST_DEPTH.get(kernel, 0):
        whole_tiles = (len(x) // large.block_n) * (len(y) // large.block_m)
        fits = x.shape[1] % large.block_d == 0
        config = large if fits and whole_tiles >= LARGE_TILES * num_sms(x.device) else config
    if x.shape[1] % config.block_d == 0 and aligned(x) and aligned(y):
        return config
    return HALF_ANY[kernel]


def prototype_config(x: Tensor, *, full: bool = False, values: bool = False) -> Launch:
    """The configuration for x [N, D] against keys: of the one-pass form with ``values``, where D is
    at most WIDEST_ATTENTION, ``full`` with the nearest key and the gradient of the scale."""
    arch = architecture(x.device)
    width = min(w for w in ATTENTION[80] if w >= x.shape[1]) if values else 64
    if arch is None:
        return Launch(32, 32, width, warps=4, stages=1)
    if values:
        config = ATTENTION[arch][width]
        return ATTENTION_FULL.get((arch, width), config) if full else config
    return CHUNKED_FLOAT if x.dtype == torch.float32 else CHUNKED[arch]


def assign_config(x: Tensor) -> Launch:
    """The configuration for points x [N, D] against centroids: in one term, or of fp32 points in
    three."""
    configs = ASSIGN
    wide = ASSIGN_WIDE
    if x.dtype == torch.float32:
        configs = ASSIGN_OPEN[architecture(x.device) or 90]
        wide = ASSIGN_OPEN_WIDE
    return next((config for width, config in configs.items() if x.shape[1] <= width), wide)


def aligned(x: Tensor) -> bool:
    """Whether every row starts on 16 bytes and is contiguous: wide loads, or a TMA descriptor."""
    starts = x.data_ptr() | x.stride(0) * x.element_size()
    return x.stride(1) == 1 and starts % 16 == 0 and x.stride(0) >= x.shape[1] > 0
