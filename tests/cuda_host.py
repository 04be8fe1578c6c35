"""The CUDA kernels on the CPU: csrc/*.cu compiled with tests/cuda_emulation.h, called by ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

TESTS = Path(__file__).parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Device(NamedTuple):
    """So few processors that splits of K and full waves both occur at test sizes."""

    multiprocessors: int
    bytes_of_multiprocessor: int  # of shared memory
    bytes_of_block: int


SM_80 = Device(2, 164 << 10, 163 << 10)
SM_86 = Device(1, 100 << 10, 99 << 10)
SM_90 = Device(4, 228 << 10, 227 << 10)


@cache
def library(op: str) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ was not found")
    command = [compiler, "-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-shared"]
    command += ["-fPIC", "-Wno-unknown-pragmas", f"-I{TESTS}", f"{TESTS}/cuda_{op}_on_host.cpp"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command, "-o", f"{folder}/library.so"], check=True)
        return ctypes.CDLL(f"{folder}/library.so")


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def strides_of(x: Tensor) -> Any:
    return (ctypes.c_int64 * 2)(*x.stride())


class _KmeansAssign(ctypes.Structure):  # as csrc/launchers.h
    _fields_ = [
        ("points", ctypes.c_void_p),
        ("point_strides", ctypes.c_int64 * 2),
        ("centroids", ctypes.c_void_p),
        ("centroid_strides", ctypes.c_int64 * 2),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int),
        ("d", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("packed", ctypes.c_void_p),
    ]


def kmeans_call(points: Tensor, centroids: Tensor, packed: Tensor | None) -> Any:
    k, d = centroids.shape
    return ctypes.byref(
        _KmeansAssign(
            points=points.data_ptr(),
            point_strides=strides_of(points),
            centroids=centroids.data_ptr(),
            centroid_strides=strides_of(centroids),
            n=len(points),
            k=k,
            d=d,
            dtype=DTYPES[points.dtype],
            packed=None if packed is None else packed.data_ptr(),
        )
    )


def kmeans_encode(points: Tensor, centroids: Tensor | None = None) -> Tensor:
    """The packed points (bytes); as csrc/cuda_bindings.cpp, their own mean stands in for that of
    the centroids."""
    if centroids is None:
        centroids = points
    native = library("kmeans_assign")
    size = native.packed_bytes(kmeans_call(points, centroids, None))
    memory = torch.full((size + 512,), 255, dtype=torch.uint8)
    packed = memory[-memory.data_ptr() % 256 :]
    error = native.encode(kmeans_call(points, centroids, packed))
    assert error == 0 and (packed[size:] == 255).all(), f"launch failed with {error}"
    return packed


class Plan(NamedTuple):
    """What the launcher chose, and counts of rows."""

    parts: int
    pack_points: int
    resident: int
    splits: int
    rescored: int
    screened: int


class Assignment(NamedTuple):
    labels: Tensor  # int64 [N]
    distances: Tensor  # fp32 [N]
    plan: Plan


def kmeans_assign(
    points: Tensor, centroids: Tensor, packed: Tensor | None = None, *, device: Device = SM_90
) -> Assignment:
    """Outputs start as garbage, to see all written."""
    labels = torch.full((len(points),), -7)
    distances = torch.full((len(points),), -7.0)
    report = (ctypes.c_int64 * len(Plan._fields))()
    native = library("kmeans_assign")
    native.set_device(*device)
    if packed is None:
        packed = kmeans_encode(points, centroids)
    call = kmeans_call(points, centroids, packed)
    error = native.kmeans_assign(call, pointer(labels), pointer(distances), report)
    assert error == 0, f"launch failed with {error}"
    return Assignment(labels, distances, Plan._make(report))


def segment_mean(values: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Means [K, D] and counts [K]."""
    n, d = values.shape
    means = torch.full((k, d), float("nan"))
    counts = torch.full((k,), -7)
    used = (labels >= 0) & (labels < k)  # as csrc/cuda_bindings.cpp
    keys, rows = torch.where(used, labels, k).int().sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(k + 1, dtype=torch.int32), out_int32=True)
    pieces = torch.full((2 * -(-n // 128) + 1, d), float("nan"))  # one more than there are
    error = library("segment_mean").segment_mean(
        pointer(values),
        strides_of(values),
        pointer(keys),
        pointer(rows),
        pointer(starts),
        pointer(pieces),
        ctypes.c_int64(n),
        k,
        d,
        DTYPES[values.dtype],
        pointer(means),
        pointer(counts),
    )
    assert error == 0 and pieces[-1].isnan().all(), f"launch failed with {error}"
    return means, counts
