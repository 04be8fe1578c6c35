"""A driver of Triton's that runs every launch in the emulator."""

from __future__ import annotations

import dataclasses
import struct
import time
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver

from protoclip.kernels import launch
from protoclip.ops import dispatch
from tests.ptx.hopper import tensor_map
from tests.ptx.launch import Launch
from tests.ptx.program import Kernel

# KiB of shared memory that a CTA may ask for.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
FORMATS = {"i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u32": "<I", "u64": "<Q"}
FORMATS |= {"fp32": "<f", "f32": "<f", "fp64": "<d"}


class Launched(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]
    launch: Launch
    seconds: float

    @property
    def ctas(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


launches: list[Launched] = []  # since it was last cleared
mutate = None  # PTX -> PTX, to see that errors are noticed
parsed: dict[Any, Kernel] = {}


def kernel_of(ptx: str, name: str | None = None) -> Kernel:
    if mutate is not None:
        ptx = mutate(ptx)
    if (ptx, name) not in parsed:
        parsed[ptx, name] = Kernel(ptx, name)
    return parsed[ptx, name]


def flatten(types, args):
    for type_, arg in zip(types, args, strict=True):
        if isinstance(type_, tuple):
            yield from flatten(type_, arg)
        elif type_ != "constexpr":
            yield type_, arg


def storage_range(tensor: torch.Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


class Launcher:
    """What Triton calls to launch a compiled kernel."""

    launch_pdl = False

    def __init__(self, source, metadata):
        self.name, self.metadata = source.fn.__name__, metadata
        self.types = tuple(source.signature.values())
        self.ptx = ""

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
        assert getattr(self.metadata, "num_ctas", 1) == 1
        params, ranges = [], []
        descriptors = iter(self.metadata.tensordesc_meta or [])
        for type_, arg in flatten(self.types, args):
            if type_.startswith("*"):
                params.append(struct.pack("<Q", arg.data_ptr()))
                ranges.append(storage_range(arg))
            elif type_.startswith("tensordesc"):
                ranges.append(storage_range(arg.base))
                params += tensor_map(arg, next(descriptors))
            else:
                params.append(struct.pack(FORMATS[type_], arg))
        begin = time.perf_counter()
        threads = 32 * self.metadata.num_warps
        shared = self.metadata.shared
        executed = kernel_of(self.ptx).launch((x, y, z), threads, params, ranges, shared)
        seconds = time.perf_counter() - begin
        launches.append(Launched(self.name, (x, y, z), executed, seconds))


def install(capability: int, num_sms: int = 132) -> None:
    """Make it Triton's driver, for the rest of the process."""
    properties = {
        "max_shared_mem": SHARED[capability] * 1024,
        "multiprocessor_count": num_sms,
        "max_num_regs": 65536,
        "warpSize": 32,
    }
    utils = SimpleNamespace(
        get_device_properties=lambda device: properties,
        load_binary=lambda name, kernel, shared, device: (1, 1, 0, 0, 1024),
        unload_module=lambda module: None,
    )
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: capability,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_active_torch_device=lambda: torch.device("cpu"),
            utils=utils,
            launcher_cls=Launcher,
            map_python_to_cpp_type=lambda name: name,
        )
    )
    init_handles = CompiledKernel._init_handles

    def with_ptx(self):
        init_handles(self)
        launcher = vars(self)["_run" if hasattr(self, "_run") else "run"]  # Triton 3.4: run
        launcher.ptx = self.asm["ptx"]

    CompiledKernel._init_handles = with_ptx


def serve_protoclip(capability: int, num_sms: int = 132) -> None:
    """Let protoclip's Triton backends take CPU tensors, as on a GPU of so many multiprocessors."""
    launch.compiling_for = launch.served_as(capability)
    launch.num_sms = lambda device: num_sms
    for backends in dispatch.TABLE.values():
        if "triton" in backends:
            backends["triton"] = dataclasses.replace(
                backends["triton"], device_types=("cpu", "cuda"), why_not=lambda: None
            )
