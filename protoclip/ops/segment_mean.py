"""Mean of the rows of each segment: contract and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from protoclip.ops import checks
from protoclip.ops.backends import implementation, resolve, without_autocast
from protoclip.ops.info_nce import accumulator

_lib = torch.library.Library("protoclip", "FRAGMENT")
_lib.define(
    "segment_mean(Tensor values, Tensor labels, int num_segments, str backend) -> (Tensor, Tensor)"
)


def _mean(values: Tensor, labels: Tensor, num_segments: int, backend: str):
    run = implementation("segment_mean", backend, "segment_mean")
    return run(values, labels, num_segments)


def _fake(values, labels, num_segments, backend):
    means = values.new_empty((num_segments, values.shape[1]), dtype=accumulator(values))
    return means, values.new_empty(num_segments, dtype=torch.int64)


_lib.impl("segment_mean", _mean, "CompositeExplicitAutograd")
torch.library.register_fake("protoclip::segment_mean", _fake, lib=_lib)


@torch.no_grad()
def segment_mean(
    values: Tensor, labels: Tensor, num_segments: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Mean of the rows that share a label: the k-means update and back translation (PBT).

    Deterministic: rows are summed in a fixed order, without atomics.

    Args:
        values: [N, D]; float32, bfloat16, float16 (float64: reference), any strides.
        labels: int64 [N] in [0, num_segments); negative labels are left out.
        num_segments: K >= 0.
        backend: "auto" or a row of ``protoclip.backends("segment_mean")``.
    Returns:
        means fp32 [K, D] (fp64 for fp64 values; zeros where empty) and counts int64 [K].
    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree, a label is >= num_segments
            (checked on the CPU; a precondition on a GPU), or the named backend cannot run.
    """
    op = "segment_mean"
    checks.matrix(op, "values", values, "[N, D]")
    checks.labels(op, labels, "values", values)
    if not isinstance(num_segments, int) or num_segments < 0:
        raise ValueError(f"{op}: expected num_segments as an int >= 0, got {num_segments!r}")
    name = resolve(op, backend, values.device.type, values.dtype)
    with without_autocast(values.device.type):
        return torch.ops.protoclip.segment_mean(values, labels, num_segments, name)
