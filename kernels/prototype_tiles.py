"""Launch configurations of the prototype kernels: one frozen table, no search at run time.

Each row compiles without spills for its architecture with Triton 3.6 and 3.9 (a test asserts it);
none has been timed on a card yet. sm_80 stands for every card with mma.sync (8.x, 12.x: 99 KiB of
shared memory), sm_90 for Hopper, sm_100 for datacenter Blackwell.
"""

from dataclasses import dataclass

import torch

INTERPRETED_CORES = 8  # stands for the number of multiprocessors where there is no card


@dataclass(frozen=True)
class Tile:
    """Rows, keys and columns of D of a program; warps and pipeline stages."""

    n: int
    k: int
    d: int
    warps: int
    stages: int

    @property
    def options(self) -> dict:
        return {"num_warps": self.warps, "num_stages": self.stages}


FLOAT = Tile(64, 64, 16, 4, 2)

# Values in the pass, 16-bit inputs, D padded to the key.
ATTENTION = {
    "sm_80": {
        64: Tile(128, 64, 64, 8, 2),
        128: Tile(128, 32, 128, 8, 2),
        256: Tile(64, 32, 256, 8, 2),
    },
    "sm_90": {
        64: Tile(128, 128, 64, 8, 3),
        128: Tile(128, 64, 128, 8, 2),
        256: Tile(64, 64, 256, 8, 2),
    },
    "sm_100": {
        64: Tile(128, 64, 64, 8, 2),
        128: Tile(128, 64, 128, 8, 2),
        256: Tile(64, 64, 256, 8, 2),
    },
    "interpreter": {width: Tile(32, 32, width, 4, 1) for width in (64, 128, 256)},
}

# Logits by chunks of D: statistics alone, and tiles of weights. By size of an element.
CHUNKED = {
    "sm_80": {2: Tile(128, 64, 64, 8, 3), 4: FLOAT},
    "sm_90": {2: Tile(128, 128, 64, 8, 3), 4: FLOAT},
    "sm_100": {2: Tile(128, 64, 64, 8, 3), 4: FLOAT},
    "interpreter": {2: Tile(32, 32, 64, 4, 1), 4: Tile(32, 32, 64, 4, 1)},
}

WIDEST_ATTENTION = 256


def architecture(device: torch.device) -> str:
    """The table's row for a device."""
    if device.type != "cuda":
        return "interpreter"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


def attention_tile(device: torch.device, d: int) -> Tile:
    """The tile of the one-pass form for rows of ``d`` <= WIDEST_ATTENTION columns."""
    rows = ATTENTION[architecture(device)]
    return rows[min(width for width in rows if width >= d)]


def chunked_tile(device: torch.device, dtype: torch.dtype) -> Tile:
    """The tile of kernels that walk over D."""
    return CHUNKED[architecture(device)][dtype.itemsize]


def cores(device: torch.device) -> int:
    """Multiprocessors of the device."""
    if device.type != "cuda":
        return INTERPRETED_CORES
    return torch.cuda.get_device_properties(device).multi_processor_count


def key_slices(row_tiles: int, key_tiles: int, cores: int) -> int:
    """Into how many slices the keys are cut so that the programs fill the card.

    A slice has at least four tiles of keys; the first count whose last wave is nearly full wins.
    """
    longest = max(1, min(key_tiles // 4, max(8, cores // max(1, row_tiles))))
    counts = range(1, longest + 1)

    def fullness(slices: int) -> float:
        programs = row_tiles * slices
        return programs / (-(-programs // cores) * cores)

    return next((c for c in counts if fullness(c) >= 0.85), max(counts, key=fullness))
