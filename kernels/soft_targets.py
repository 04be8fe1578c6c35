"""Soft targets on a GPU: m = softmax(S S^T / tau) C. A pass for the statistics, then weights in
waves and a GEMM. Once an episode, and what students are trained on: all in fp32, whatever the
input. Never K x K in memory."""

import torch
from torch import Tensor

from protoclip.kernels.probabilities import weighted_values
from protoclip.kernels.prototype_cross_entropy import Parts, addressable, attend, finish


def soft_targets(source_centroids: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """[K, Ds], [K, D], tau > 0 -> fp32 [K, D]."""
    k, d = prototypes.shape
    out = prototypes.new_empty((k, d), dtype=torch.float32)
    if not out.numel():
        return out
    source, values = (addressable(t.float()) for t in (source_centroids, prototypes))
    scale = torch.full((), 1 / temperature, dtype=torch.float32, device=out.device)
    labels = [torch.empty(0, dtype=torch.int64, device=out.device)]  # there are none
    row_max, row_sum = out.new_empty(k), out.new_empty(k)
    none = out.new_empty(0)
    results = (row_max, out, labels[0], row_max, row_sum, none)
    parts = attend(source, [source], None, labels, scale)
    finish(source, scale, [values], labels, parts, results, statistics=True, targeted=False)
    weighted_values(source, source, values, scale, row_max, out)
    joined = row_max[None, None], row_sum[None, None]
    parts = Parts(*joined, labels[0], none, row_max, out[None, None])
    finish(source, scale, [values], labels, parts, results, gradient=True, targeted=False)
    return out
