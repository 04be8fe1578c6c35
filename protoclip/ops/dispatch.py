"""Choose the implementation that runs: one literal table, one rule.

A backend named by the caller never falls back. ``auto`` (which ``PROTOCLIP_BACKEND`` overrides)
takes the first backend of ``AUTO_ORDER`` that is usable on the tensors' device.

Functions such as ``cpu_info_nce`` and ``triton_info_nce`` import the functions of one backend, at
its first use. C++ functions have the names of ``csrc/bindings.cpp``, CUDA's of
``csrc/cuda_bindings.cpp``. All backends of an op take the same arguments, by keyword; the contracts
are in the files that define the ops.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, Generic, TypeVar

import numpy
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from protoclip.kernels.results import LossAndStatistics
from protoclip.ops import native, reference
from protoclip.ops.operators import ANY_FLOAT, FLOATS, in_transform
from protoclip.ops.rates import stash_bytes
from protoclip.ops.stash import StashFunctions

Implementation = TypeVar("Implementation")
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Backend(Generic[Implementation]):
    """One implementation of an op, and which tensors and machines it supports."""

    load: Callable[[], Implementation]  # imports or compiles it
    device_types: tuple[str, ...] | None  # None: any
    dtypes: tuple[torch.dtype, ...]
    why_not: Callable[[], str | None]  # None: usable on this machine

    @cached_property
    def implementation(self) -> Implementation:
        """The result of ``load``, which is called once."""
        return self.load()


# What the fused backends of each family implement.
@dataclass(frozen=True)
class InfoNceFunctions:
    """InfoNCE (ops/info_nce_loss.py)."""

    statistics: Callable[..., tuple[Tensor, ...]]
    gradients: Callable[..., tuple[Tensor, Tensor, Tensor]]
    # The statistics and the weighted loss at once, where a backend has kernels for that.
    loss: Callable[..., LossAndStatistics] | None = None
    takes_pair_weight: bool = False  # whether ``gradients`` multiply the weights by pair_weight
    stashing: StashFunctions | None = None  # None: products are formed again


@dataclass(frozen=True)
class ContrastiveFunctions:
    """The contrastive loss (ops/query_losses.py)."""

    statistics: Callable[..., Pair]
    gradients: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    stashing: StashFunctions | None = None  # None: products are formed again


@dataclass(frozen=True)
class PrototypeCrossEntropyFunctions:
    """Prototype cross-entropy (ops/prototypes.py)."""

    losses: Callable[..., tuple[Tensor, ...]]
    prototype_gradient: Callable[..., Tensor]


@dataclass(frozen=True)
class ClusterFunctions:
    """Nearest centroids and segment means (ops/clusters.py)."""

    assign: Callable[..., Pair]
    segment_mean: Callable[..., Pair]
    # Points -> ``assign`` of them to any centroids, if the backend codes points; that is worth it
    # for up to so many centroids (None: any number).
    coded_assignment: Callable[[Tensor], Callable[[Tensor], Pair]] | None = None
    most_coded_clusters: int | None = None


def cpu_stashing() -> StashFunctions:
    ops = native.cpu_ops()
    return StashFunctions(
        num_bytes=stash_bytes,
        empty=ops.empty_stash.default,
        timed_forward=ops.info_nce_fwd.default,
    )


def cpu_info_nce() -> InfoNceFunctions:
    ops = native.cpu_ops()
    return InfoNceFunctions(
        statistics=ops.info_nce_fwd.default,
        gradients=ops.info_nce_bwd.default,
        stashing=cpu_stashing(),
    )


def triton_info_nce() -> InfoNceFunctions:
    from protoclip.kernels import info_nce

    return InfoNceFunctions(
        statistics=info_nce.info_nce_fwd,
        gradients=info_nce.info_nce_bwd,
        loss=info_nce.info_nce_loss,
        takes_pair_weight=True,
    )


def cpu_contrastive() -> ContrastiveFunctions:
    ops = native.cpu_ops()
    return ContrastiveFunctions(
        statistics=ops.contrastive_fwd.default,
        gradients=ops.contrastive_bwd.default,
        stashing=cpu_stashing(),
    )


def triton_contrastive() -> ContrastiveFunctions:
    from protoclip.kernels import contrastive

    return ContrastiveFunctions(
        statistics=contrastive.contrastive_fwd, gradients=contrastive.contrastive_bwd
    )


def cpu_sigmoid_loss() -> Callable[..., tuple[Tensor, ...]]:
    return native.cpu_ops().sigmoid_loss.default


def triton_sigmoid_loss() -> Callable[..., tuple[Tensor, ...]]:
    from protoclip.kernels import sigmoid_loss

    return sigmoid_loss.sigmoid_loss


def cpu_prototype_cross_entropy() -> PrototypeCrossEntropyFunctions:
    ops = native.cpu_ops()
    return PrototypeCrossEntropyFunctions(
        losses=ops.prototype_cross_entropy_fwd.default,
        prototype_gradient=ops.prototype_cross_entropy_bwd.default,
    )


def triton_prototype_cross_entropy() -> PrototypeCrossEntropyFunctions:
    from protoclip.kernels import prototype_cross_entropy

    return PrototypeCrossEntropyFunctions(
        losses=prototype_cross_entropy.prototype_cross_entropy_fwd,
        prototype_gradient=prototype_cross_entropy.prototype_cross_entropy_bwd,
    )


def cpu_soft_targets() -> Callable[..., Tensor]:
    return native.cpu_ops().soft_targets.default


def triton_soft_targets() -> Callable[..., Tensor]:
    from protoclip.kernels import prototype_cross_entropy

    return prototype_cross_entropy.soft_targets


def cpu_clusters() -> ClusterFunctions:
    ops = native.cpu_ops()

    def coded_assignment(points: Tensor) -> Callable[[Tensor], Pair]:
        points = points.contiguous()
        codes, code_bounds, centre, rotated = ops.kmeans_encode.default(points)
        return lambda centroids: ops.kmeans_assign_coded.default(
            points=points,
            centroids=centroids,
            codes=codes,
            code_bounds=code_bounds,
            centre=centre,
            rotated=rotated,
        )

    return ClusterFunctions(
        assign=ops.kmeans_assign.default,
        segment_mean=ops.segment_mean.default,
        coded_assignment=coded_assignment,
        most_coded_clusters=1024,  # beyond, coding is less than 4 % of an assignment
    )


def cuda_clusters() -> ClusterFunctions:
    ops = native.cuda_ops()

    def coded_assignment(points: Tensor) -> Callable[[Tensor], Pair]:
        packed = ops.kmeans_encode_cuda.default(points)
        return lambda centroids: ops.kmeans_assign_coded_cuda.default(
            points=points, centroids=centroids, packed=packed
        )

    return ClusterFunctions(
        assign=ops.kmeans_assign_cuda.default,
        segment_mean=ops.segment_mean_cuda.default,
        coded_assignment=coded_assignment,
    )


def triton_clusters() -> ClusterFunctions:
    from protoclip.kernels import clusters

    def coded_assignment(points: Tensor) -> Callable[[Tensor], Pair]:
        half, norms = clusters.kmeans_encode(points)
        return lambda centroids: clusters.kmeans_assign_coded(
            points=points, centroids=centroids, half=half, norms=norms
        )

    return ClusterFunctions(
        assign=clusters.kmeans_assign,
        segment_mean=clusters.segment_mean,
        coded_assignment=coded_assignment,
    )


def reference_clusters() -> ClusterFunctions:
    return ClusterFunctions(assign=reference.kmeans_assign, segment_mean=reference.segment_mean)


@cache
def _no_triton() -> str | None:
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels slowly on the CPU)"
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if torch.cuda.is_available():
        from protoclip.kernels import launch

        return launch.why_not()
    # Older Triton calls int() on arrays of one element, which numpy 2.4 refuses.
    old = TorchVersion(triton.__version__) < "3.7" and TorchVersion(numpy.__version__) >= "2.4"
    return "the interpreter of triton < 3.7 needs numpy < 2.4 (a GPU does not)" if old else None


def _cpu(load: Callable[[], Implementation]) -> Backend[Implementation]:
    return Backend(load, ("cpu",), FLOATS, partial(native.why_not, "cpu"))


def _cuda(load: Callable[[], Implementation]) -> Backend[Implementation]:
    return Backend(load, ("cuda",), FLOATS, partial(native.why_not, "cuda"))


def _triton(load: Callable[[], Implementation]) -> Backend[Implementation]:
    # CPU tensors are for Triton's interpreter only.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    devices = ("cuda", "cpu") if interpreted else ("cuda",)
    return Backend(load, devices, FLOATS, _no_triton)


def _reference(load: Callable[[], Implementation]) -> Backend[Implementation]:
    return Backend(load, None, ANY_FLOAT, lambda: None)


def _called_directly() -> Any:
    raise NotImplementedError("the public op calls ops/reference.py: its autograd is torch's own")


INFO_NCE: dict[str, Backend[InfoNceFunctions]] = {
    "cpu": _cpu(cpu_info_nce),
    "triton": _triton(triton_info_nce),
    "reference": _reference(_called_directly),
}
CONTRASTIVE: dict[str, Backend[ContrastiveFunctions]] = {
    "cpu": _cpu(cpu_contrastive),
    "triton": _triton(triton_contrastive),
    "reference": _reference(_called_directly),
}
SIGMOID_LOSS: dict[str, Backend[Callable[..., tuple[Tensor, ...]]]] = {
    "cpu": _cpu(cpu_sigmoid_loss),
    "triton": _triton(triton_sigmoid_loss),
    "reference": _reference(_called_directly),
}
PROTOTYPE_CROSS_ENTROPY: dict[str, Backend[PrototypeCrossEntropyFunctions]] = {
    "cpu": _cpu(cpu_prototype_cross_entropy),
    "triton": _triton(triton_prototype_cross_entropy),
    "reference": _reference(_called_directly),
}
SOFT_TARGETS: dict[str, Backend[Callable[..., Tensor]]] = {
    "cpu": _cpu(cpu_soft_targets),
    "triton": _triton(triton_soft_targets),
    "reference": _reference(lambda: reference.soft_targets),
}
CLUSTERS: dict[str, Backend[ClusterFunctions]] = {
    "cpu": _cpu(cpu_clusters),
    "cuda": _cuda(cuda_clusters),
    "triton": _triton(triton_clusters),
    "reference": _reference(reference_clusters),
}
TABLE: dict[str, dict[str, Backend[Any]]] = {
    "info_nce": INFO_NCE,
    "contrastive": CONTRASTIVE,
    "sigmoid_loss": SIGMOID_LOSS,
    "prototype_cross_entropy": PROTOTYPE_CROSS_ENTROPY,
    "soft_targets": SOFT_TARGETS,
    "kmeans_assign": CLUSTERS,
    "segment_mean": CLUSTERS,
}
PUBLIC = {  # ops that use the table row of another op, and another name of one
    "nt_xent": "contrastive",
    "sup_con": "contrastive",
    "contrastive_parts": "contrastive",
    "siglip": "sigmoid_loss",
    "prototype_losses": "prototype_cross_entropy",
}
AUTO_ORDER = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}  # then the reference


def backends(op: str) -> dict[str, str | None]:
    """Say which backends of an op work on this machine.

    Args:
        op: a public op's name, e.g. ``"info_nce"``.
    Returns:
        backend name -> None if it is usable here, else the reason in words. The call may compile
        the native library (once).
    Raises:
        ValueError: no such op.
    """
    if (row := PUBLIC.get(op, op)) not in TABLE:
        raise ValueError(f"backends: expected one of {sorted({*TABLE, *PUBLIC})}, got {op!r}")
    return {name: backend.why_not() for name, backend in TABLE[row].items()}


def why_not(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run an op on such tensors, in words; None if it can."""
    row = TABLE[op].get(backend)
    if row is None:
        return f"{op} has only {', '.join(sorted(TABLE[op]))}"
    if backend != "reference" and in_transform():
        return "torch.func's transforms and forward-mode differentiation need the reference"
    if row.device_types is not None and device_type not in row.device_types:
        return f"it runs on {' or '.join(row.device_types)}, the tensors are on {device_type}"
    if dtype not in row.dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in row.dtypes)
        return f"it takes {names}, the tensors are {str(dtype).removeprefix('torch.')}"
    return row.why_not()


def resolve(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str:
    """Name the backend that will run ``op``; a constant to torch.compile.

    Raises:
        ValueError: no such backend, or the named one cannot run here (the message says why).
    """
    if backend == "auto":
        backend = os.environ.get("PROTOCLIP_BACKEND") or "auto"
    if backend != "auto":
        if reason := why_not(op, backend, device_type, dtype):
            raise ValueError(
                f"{op}: backend {backend!r} cannot run: {reason}. Use backend='auto' to let "
                f"protoclip choose; protoclip.backends({op!r}) lists what works here"
            )
        return backend
    if in_transform():
        return "reference"
    for name in AUTO_ORDER.get(device_type, ()):
        if name in TABLE[op] and why_not(op, name, device_type, dtype) is None:
            return name
    if device_type in ("cuda", "xpu", "mps") and dtype in FLOATS:
        _warn_slow(op, device_type)
    return "reference"


@cache  # once for each op
def _warn_slow(op: str, device_type: str) -> None:
    reasons = f"none runs on {device_type}"
    if device_type == "cuda":
        reasons = "; ".join(f"{name}: {reason}" for name, reason in backends(op).items() if reason)
    warnings.warn(
        f"{op}: expected a fast backend on this GPU, got none ({reasons}), so plain torch runs, "
        "many times slower; install what is missing, or pass backend='reference' to accept it",
        stacklevel=4,
    )


# Same as torch.compiler.assume_constant_result, which would load dynamo and triton (1.8 s).
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
