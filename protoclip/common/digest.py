"""One checksum of rows: the answer to "are these the same bytes?"."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 64 << 20  # of a GPU's tensor, copied to the host at a time


class Digest:
    """xxh3 (128 bits) of rows that are handed in in order, in blocks of any size."""

    def __init__(self) -> None:
        import xxhash  # late: most calls of the library need none

        self._hash = xxhash.xxh3_128()
        self.rows = 0

    def update(self, rows: np.ndarray | Tensor) -> None:
        """Add the next rows, [n, ...]: their bytes as they are stored, not their values."""
        step = max(1, BLOCK_BYTES // max(1, rows[:1].nbytes))
        for start in range(0, len(rows) if rows.nbytes else 0, step):
            block = rows[start : start + step]
            if isinstance(block, Tensor):
                block = block.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            self._hash.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        self.rows += len(rows)

    def hexdigest(self) -> str:
        """The checksum of the rows so far."""
        return self._hash.hexdigest()


def digest_of(rows: np.ndarray | Tensor) -> str:
    """The checksum of rows in memory or on a GPU, equal to a :class:`Digest` of their blocks."""
    digest = Digest()
    digest.update(rows)
    return digest.hexdigest()
