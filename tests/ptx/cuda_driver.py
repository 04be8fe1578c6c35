"""csrc/*.cu as nvcc compiles them: their host code runs as it is, against a CUDA runtime
(``cuda_runtime.cpp``) whose launches run in the emulator."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.ptx.triton_driver import Launched, kernel_of, launches

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    *[ctypes.c_uint] * 5,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Device(NamedTuple):
    """So few processors that splits of K and full waves both occur at test sizes."""

    multiprocessors: int
    bytes_of_multiprocessor: int  # of shared memory
    bytes_of_block: int


SM_80 = Device(2, 164 << 10, 163 << 10)
SM_86 = Device(1, 100 << 10, 99 << 10)
SM_90 = Device(4, 228 << 10, 227 << 10)
DEVICES = {80: SM_80, 86: SM_86, 89: SM_86, 90: SM_90, 100: SM_90}
DEVICES[120] = Device(2, SM_86.bytes_of_multiprocessor, SM_86.bytes_of_block)
OPTIONS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC", "-cudart", "none", "-shared"]
OPTIONS += ["-Xlinker", "-Bsymbolic"]  # our runtime, not that of a CUDA build of torch


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


def missing(capability: int) -> str | None:
    """Why these kernels cannot run here; None where they can."""
    if capability not in DEVICES:
        return f"no sizes of shared memory are listed for sm_{capability}"
    return None if shutil.which("nvcc") else "nvcc was not found"


class Library(NamedTuple):
    functions: ctypes.CDLL
    ranges: list[tuple[int, int]]  # addresses and sizes that kernels may access
    failures: list[BaseException]  # which must not cross C


@cache
def library(op: str, capability: int) -> Library:
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *OPTIONS, f"-arch=sm_{capability}", f"-I{CSRC}", "--keep", "--keep-dir"]
        command += [folder, str(HERE / f"{op}_host.cu"), str(HERE / "cuda_runtime.cpp")]
        subprocess.run([*command, "-o", f"{folder}/library.so"], check=True)
        text = Path(folder, f"{op}_host.ptx").read_text()
        functions = ctypes.CDLL(f"{folder}/library.so")
    native = Library(functions, [], [])

    def launched(name, grid_x, grid_y, grid_z, threads_x, threads_y, args, shared):
        try:
            assert threads_y == 1, "one-dimensional blocks only"
            kernel = kernel_of(text, name.decode())
            params = [ctypes.string_at(args[i], size) for i, size in enumerate(kernel.param_sizes)]
            begin = time.perf_counter()
            grid = (grid_x, grid_y, grid_z)
            launch = kernel.launch(grid, threads_x, params, native.ranges, shared)
            seconds = time.perf_counter() - begin
            launches.append(Launched(short_name(kernel.name), grid, launch, seconds))
        except BaseException as error:
            native.failures.append(error)
            return 1
        return 0

    functions.callback = CALLBACK(launched)  # kept alive with the library
    functions.set_callback(functions.callback)
    return native


def short_name(mangled: str) -> str:
    """_ZN9protoclip11pack_kernelI… -> pack_kernel (CUDA)"""
    known = ("centre", "pack", "assign", "decide", "rescore", "runs", "segments")
    name = next((f"{known_name}_kernel" for known_name in known if known_name in mangled), mangled)
    return f"{name} (CUDA)"


def call(native: Library, name: str, *args: Any) -> None:
    native.failures.clear()
    error = getattr(native.functions, name)(*args)
    if native.failures:
        raise native.failures[0]
    assert error == 0, f"{name} failed with {error}"


def aligned(size: int) -> Tensor:
    """``size`` bytes of 0xff, 256-byte aligned."""
    memory = torch.full((size + 512,), 255, dtype=torch.uint8)
    start = -memory.data_ptr() % 256
    return memory[start : start + size]


def exactly(x: Tensor) -> tuple[int, int]:
    """The bytes of a tensor, to the end of its storage where it has strides of its own."""
    size = x.numel() * x.element_size()
    if not x.is_contiguous():
        size = x.untyped_storage().nbytes() - x.storage_offset() * x.element_size()
    return x.data_ptr(), size


class Plan(NamedTuple):
    """What the launcher chose, and counts of rows."""

    resident: int
    splits: int
    rescored: int
    screened: int


def kmeans_assign(
    points: Tensor, centroids: Tensor, capability: int
) -> tuple[Tensor, Tensor, Plan]:
    """Labels and distances, which start as garbage."""
    native = library("kmeans_assign", capability)
    native.functions.packed_bytes.restype = ctypes.c_int64
    native.functions.set_device(*DEVICES[capability])
    packed = aligned(native.functions.packed_bytes(kmeans_call(points, points, None)))
    native.ranges[:] = [exactly(points), exactly(packed)]
    call(native, "encode", kmeans_call(points, points, packed))
    job = kmeans_call(points, centroids, packed)
    plan = (ctypes.c_int64 * 3)()
    call(native, "plan", job, plan)
    scratch = aligned(plan[0])
    labels = torch.full((len(points),), -7)
    distances = torch.full((len(points),), -7.0)
    tensors = (points, centroids, packed, scratch, labels, distances)
    native.ranges[:] = [exactly(tensor) for tensor in tensors]
    counts = (ctypes.c_int64 * 2)()
    call(native, "assign", job, pointer(scratch), pointer(labels), pointer(distances), counts)
    return labels, distances, Plan(plan[1], plan[2], counts[0], counts[1])


def segment_mean(values: Tensor, labels: Tensor, k: int, capability: int) -> tuple[Tensor, Tensor]:
    """Means [K, D] and counts [K]."""
    native = library("segment_mean", capability)
    n, d = values.shape
    means = torch.full((k, d), float("nan"))
    counts = torch.full((k,), -7)
    used = (labels >= 0) & (labels < k)  # as csrc/cuda_bindings.cpp
    keys, rows = torch.where(used, labels, k).int().sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(k + 1, dtype=torch.int32), out_int32=True)
    pieces = max(1, -(-n // 128))
    heads = torch.full((pieces, d), float("nan"))
    tails = torch.full((pieces, d), float("nan"))
    tensors = (values, keys, rows, starts, heads, tails, means, counts)
    native.ranges[:] = [exactly(tensor) for tensor in tensors]
    call(
        native,
        "segment_mean",
        pointer(values),
        strides_of(values),
        *(pointer(tensor) for tensor in (keys, rows, starts, heads, tails)),
        ctypes.c_int64(n),
        k,
        d,
        DTYPES[values.dtype],
        pointer(means),
        pointer(counts),
    )
    return means, counts
