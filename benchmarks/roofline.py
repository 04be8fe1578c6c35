"""What each op has to do, counted by hand.

A GEMM-equivalent is one N x M x D product, 2 N M D FLOPs. Counts are the *useful* work of a form
that stores no logits; every variant of a case is rated against the same count, so rates compare as
times do. Bytes are the least traffic: each input read once, each result written once.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Work:
    """FLOPs of the products, bytes to and from memory, and which of the two is the ceiling."""

    flop: float
    bytes: float
    bound: str = "gemm"  # "gemm" | "copy"

    @property
    def rate_numerator(self) -> float:
        """What a rate counts, so that it is TFLOP/s, or GB/s of a copy, over milliseconds."""
        return self.flop * 1e-9 if self.bound == "gemm" else self.bytes * 1e-6


def info_nce(n: int, d: int, dtype: str, phase: str = "both") -> Work:
    """Backward recomputes S and multiplies twice: 1 + 3 GEMM-eq. The sigmoid loss is the same."""
    products = {"forward": 1, "backward": 3, "both": 4}[phase]
    arrays = {"forward": 2, "backward": 4, "both": 4}[phase]
    return Work(2.0 * products * n * n * d, float(arrays * n * d * BYTES[dtype]))


def prototype_cross_entropy(n: int, k: int, d: int, dtype: str) -> Work:
    """Prototypes frozen, loss and gradient of the features: an attention pass, 2 GEMM-eq."""
    return Work(4.0 * n * k * d, float((3 * n * d + k * d) * BYTES[dtype]))


def soft_targets(k: int, d_source: int, d: int) -> Work:
    """softmax(Q Q^T / t) C: one product in the source's space, one in the student's."""
    return Work(2.0 * k * k * (d_source + d), 4.0 * k * (d_source + 2 * d))


def kmeans_assign(n: int, k: int, d: int, dtype: str) -> Work:
    """One GEMM-eq; label (8 bytes) and distance (4) of each point are written."""
    return Work(2.0 * n * k * d, float((n + k) * d * BYTES[dtype] + 12 * n))


def segment_mean(n: int, k: int, d: int, dtype: str) -> Work:
    """One addition an element: a read of the values, bound by memory."""
    return Work(float(n * d), float(n * d * BYTES[dtype] + 8 * n + 4 * k * d), "copy")


def kmeans(n: int, k: int, d: int, iterations: int) -> Work:
    """Assignment and update, ``iterations`` times, and the last assignment."""
    assignment = kmeans_assign(n, k, d, "fp32")
    update = segment_mean(n, k, d, "fp32")
    return Work(
        flop=(iterations + 1) * assignment.flop + iterations * update.flop,
        bytes=(iterations + 1) * assignment.bytes + iterations * update.bytes,
    )
