"""Compile csrc/ at first use and load it; its ops are those of torch.ops.protoclip_native.

There are two libraries, so that one works if the other does not build: ``cpu`` (csrc/*.cpp) and
``cuda`` (csrc/*.cu and csrc/cuda_*.cpp, if torch has CUDA and nvcc is installed). Each is built in
its own folder, which is then renamed to a hash of everything that goes into the library. The
library's seal, its size and SHA-256, is next to it. A library that does not match its seal, such as
one that a full disk cut short, is built again and never loaded: loading it could kill the process
with SIGBUS. One process builds, under a file lock; others wait.

Environment: PROTOCLIP_DISABLE_JIT=1, PROTOCLIP_BUILD_VERBOSE=1, PROTOCLIP_CACHE; torch's MAX_JOBS
and TORCH_CUDA_ARCH_LIST are honoured.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import importlib.resources
import json
import logging
import os
import platform
import re
import shlex
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from protoclip.common.paths import cache_dir
from protoclip.common.waits import Wait, speaking

CPUINFO = Path("/proc/cpuinfo")
OLDEST_CARD = (8, 0)  # that has bf16 in its tensor cores, and copies to shared memory during work
TOO_OLD = re.compile(r"[1-7]\.|Kepler|Maxwell|Pascal|Volta|Turing")  # in TORCH_CUDA_ARCH_LIST
CAUSE = re.compile(r"error:|undefined reference|cannot find|not found|killed|no space left", re.I)
REMEDIES = {  # by what a failed build says
    "Python.h": "install Python's headers: apt install python3-dev, dnf install python3-devel",
    "Killed": "the compiler ran out of memory: set MAX_JOBS=1, which compiles one file at a time",
    "No space left": "PROTOCLIP_CACHE names another folder",
}


@dataclass(frozen=True)
class Recipe:
    """What is compiled, and how."""

    device_type: str  # "cpu" | "cuda"
    sources: tuple[Path, ...]
    flags: tuple[str, ...]  # of the C++ compiler, or of nvcc
    parameters: dict[str, str]

    @property
    def name(self) -> str:
        digest = hashlib.sha256(json.dumps(self.parameters, sort_keys=True).encode())
        digest.update(" ".join(self.flags).encode())
        for path in sorted(csrc().glob("*")):
            if path.suffix in (".h", ".cuh") or path in self.sources:
                digest.update(path.name.encode() + path.read_bytes())
        return f"protoclip_{self.device_type}_{digest.hexdigest()[:16]}"


def csrc() -> Path:
    """The folder of the C++ and CUDA sources, in a checkout as in an installed wheel."""
    return Path(str(importlib.resources.files("protoclip.csrc")))


def cpu_ops() -> Any:
    """The ops that csrc/bindings.cpp registers; builds and loads the library if necessary.

    Raises:
        RuntimeError: the library is not available here; the message says why.
    """
    _require("cpu")
    return torch.ops.protoclip_native


def cuda_ops() -> Any:
    """The ops that csrc/cuda_bindings.cpp registers, as ``cpu_ops``."""
    _require("cuda")
    return torch.ops.protoclip_native


def _require(device_type: str) -> None:
    if reason := why_not(device_type):
        raise RuntimeError(f"protoclip's {device_type} library is not available: {reason}")


@cache
def why_not(device_type: str) -> str | None:
    """None if the native library works here (building it if necessary), else the reason."""
    if os.environ.get("PROTOCLIP_DISABLE_JIT") == "1":
        return "PROTOCLIP_DISABLE_JIT=1 is set"
    if device_type == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device, or this torch was built without CUDA"
        from torch.utils.cpp_extension import CUDA_HOME  # warns where there is no device

        if CUDA_HOME is None:
            return "nvcc was not found; install the CUDA toolkit or set CUDA_HOME"
        if not any(card >= OLDEST_CARD for card in _cards()):
            return "the CUDA kernels need compute capability 8.0, which no GPU here has"
    if _compiler() is None:
        reason = f"no C++ compiler was found (looked for {', '.join(_compilers())})"
        remedy = "apt install g++, dnf install gcc-c++, or conda install cxx-compiler"
        _warn(f"{reason}. Install one ({remedy}) or set CXX", device_type)
        return reason
    try:
        torch.ops.load_library(_library(device_type))
        if device_type == "cpu":
            _host_utilities()  # now: later its file may be gone
        return None
    except Exception as error:  # whatever the toolchain throws: the reference still works
        cause = _cause(error)
        advice = "PROTOCLIP_BUILD_VERBOSE=1 shows all of the compiler's output"
        if isinstance(error, OSError):
            advice = "PROTOCLIP_CACHE names another folder"
        for words, remedy in REMEDIES.items():
            if any(words in line for line in cause):
                advice = remedy
        lines = "\n".join(cause)
        _warn(f"no native library: {lines}\n{advice}", device_type)
        return f"no native library: {cause[0]}"


def _cause(error: Exception) -> list[str]:
    """The lines that say why a build failed. Most of torch's message are commands of a kB each, and
    the first error comes after some of them."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    errors = [line for line in lines[1:] if CAUSE.search(line)] or [lines[0], *lines[1:][-4:]]
    return [line[:500] for line in errors[:5]]


def _compilers() -> list[str]:
    """The programs that may compile C++: CXX, or else the usual ones. torch takes one program
    alone: of "ccache g++" this is g++."""
    named = os.environ.get("CXX", "")
    if not named.strip():
        return ["c++", "g++", "clang++"]
    return list(dict.fromkeys([named, *reversed(named.split())]))


def _compiler() -> str | None:
    return next((each for each in _compilers() if shutil.which(each)), None)


def _warn(problem: str, device_type: str) -> None:
    consequence = (
        "the reference backends run instead: several times slower, and their losses hold all "
        "logits in memory"
    )
    if device_type == "cuda":  # losses on a GPU are Triton's
        consequence = "k-means runs on Triton or in plain torch instead, slower; losses are as fast"
    message = f"protoclip: {problem}. Until then {consequence}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def cpu_features() -> list[str]:
    """The processor's units that the CPU library was compiled for, such as "avx512_bf16"."""
    features = _host_utilities().protoclip_cpu_features
    features.restype = ctypes.c_char_p
    return features().decode().split()


@cache
def stash_tile() -> tuple[int, int]:
    """Rows and columns of a tile of the CPU library's stash (stash.py)."""
    utilities = _host_utilities()
    return utilities.protoclip_stash_rows(), utilities.protoclip_stash_columns()


@cache
def _host_utilities() -> ctypes.CDLL:
    """What csrc/bindings.cpp has beside the ops."""
    return ctypes.CDLL(str(_library("cpu")))


@cache
def _library(device_type: str) -> Path:
    """Built once a process: a second copy, of another cache, would register its ops again."""
    return build(_recipe(device_type))


def _recipe(device_type: str) -> Recipe:
    folder = csrc()
    parameters = {"torch": torch.__version__, "cxx11": str(torch._C._GLIBCXX_USE_CXX11_ABI)}
    parameters |= {"python": platform.python_version(), "machine": platform.machine()}
    if device_type == "cpu":
        sources = [p for p in sorted(folder.glob("*.cpp")) if not p.name.startswith("cuda_")]
        capability = torch.backends.cpu.get_cpu_capability()
        parameters |= {"capability": capability, "cpu": _cpu_flags()}
        flags = "-O3 -march=native -fopenmp -fno-math-errno -Wno-unknown-pragmas"
        if capability in ("AVX2", "AVX512"):
            flags += f" -DCPU_CAPABILITY={capability} -DCPU_CAPABILITY_{capability}"
        return Recipe(device_type, tuple(sources), tuple(flags.split()), parameters)
    sources = [*sorted(folder.glob("*.cu")), *sorted(folder.glob("cuda_*.cpp"))]
    parameters |= {"cuda": str(torch.version.cuda), "arch": cuda_architectures()}
    return Recipe(device_type, tuple(sources), ("-O3", "--use_fast_math"), parameters)


def cuda_architectures() -> str:
    """Those of TORCH_CUDA_ARCH_LIST, which a container may have set for other GPUs, and of all
    GPUs in this machine, except those that are too old: "8.0;9.0"."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").split(";")
    architectures = [name for name in named if name and not TOO_OLD.match(name)]
    numbers = {name.removesuffix("+PTX").rstrip("af") for name in architectures}
    for major, minor in sorted(_cards()):
        if (major, minor) >= OLDEST_CARD and f"{major}.{minor}" not in numbers:
            architectures.append(f"{major}.{minor}")
    return ";".join(architectures)


def _cards() -> set[tuple[int, int]]:
    """The compute capabilities of the GPUs in this machine."""
    return {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}


def _cpu_flags() -> str:
    """The processor's features: -march=native depends on them, and several machines may share the
    cache folder."""
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            if line.startswith(("flags", "Features")):  # x86, ARM
                return line
    return platform.processor()


def build(recipe: Recipe) -> Path:
    """The path of the library, which is compiled unless an intact one exists; where the cache
    cannot be written, in a folder that only this user can."""
    cache = cache_dir() / "native"
    library = cache / recipe.name / f"{recipe.name}.so"
    if is_whole(library):
        return library
    try:
        lock = _locked(library, recipe.device_type)
    except OSError as error:
        private = _private_folder()
        _say(
            f"{cache} cannot be written ({error.strerror}), so {private} holds the kernels; "
            "PROTOCLIP_CACHE names another folder\n"
        )
        library = private / recipe.name / library.name
        lock = _locked(library, recipe.device_type)
    folder = library.parent
    with lock:
        if not is_whole(library):
            if library.exists():
                _say(f"{library} is damaged and will be built again\n")
            partial = folder.with_suffix(".partial")
            for leftover in (partial, folder):  # of a build that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir()
            try:
                _compile(recipe, partial)
            except Exception as error:
                with contextlib.suppress(OSError):  # the disk may be full, which error says
                    _failure(library).write_text(str(error))
                raise
            built = partial / library.name
            _seal_path(built).write_text(_seal(built))
            partial.rename(folder)
            _failure(library).unlink(missing_ok=True)
    return library


def _failure(library: Path) -> Path:
    """The file that tells those who wait for a build why it failed."""
    return library.parent.with_suffix(".failed")


def _locked(library: Path, device_type: str) -> Any:
    """The held lock of a library's build, to be released; other processes wait for it.

    Raises:
        RuntimeError: the build that this process waited for failed; here it would fail again.
    """
    from filelock import FileLock, Timeout

    folder = library.parent
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        _say(f"waiting for another process that compiles the {device_type} kernels ...\n")
    earlier = _failure(library).stat().st_mtime_ns if _failure(library).exists() else 0
    with speaking("protoclip"), Wait("another process compiles"):
        held = lock.acquire()
    with contextlib.suppress(FileNotFoundError):
        if _failure(library).stat().st_mtime_ns > earlier:
            lock.release()
            raise RuntimeError(_failure(library).read_text())
    return held


def _private_folder() -> Path:
    """A folder for temporary files in which nobody else can put a library."""
    folder = Path(tempfile.gettempdir()) / f"protoclip-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or not stat.S_ISDIR(status.st_mode):
        raise PermissionError(errno.EPERM, "expected a folder of this user alone", str(folder))
    return folder


def is_whole(library: Path) -> bool:
    """Whether the library matches its seal. Reads all of it: a millisecond per MB."""
    try:
        return _seal_path(library).read_text() == _seal(library)
    except (OSError, UnicodeDecodeError):
        return False


def _seal_path(library: Path) -> Path:
    return library.with_suffix(".seal")


def _seal(library: Path) -> str:
    """The size and hash of a library, as its seal holds them."""
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    return f"{library.stat().st_size} bytes, SHA-256 {digest}\n"


def _say(text: str) -> None:
    print(f"protoclip: {text}", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process, and put them back."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _errors_only(logger_name: str) -> Iterator[None]:
    """Keep warnings of this logger from the terminal: its first import warns if nvcc is there and
    no GPU, which does not matter to the CPU's library."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _quoted_libraries(cpp_extension: Any) -> Iterator[None]:
    """Quote torch's folder of libraries for the linker: torch 2.13 quotes only those of headers."""
    folder = cpp_extension.TORCH_LIB_PATH
    cpp_extension.TORCH_LIB_PATH = shlex.quote(folder)
    try:
        yield
    finally:
        cpp_extension.TORCH_LIB_PATH = folder


def _compile(recipe: Recipe, folder: Path) -> None:
    cpu = recipe.device_type == "cpu"
    with _errors_only("torch.utils.cpp_extension") if cpu else contextlib.nullcontext():
        from torch.utils import cpp_extension

    _say(f"compiling the {recipe.device_type} kernels, once (about half a minute)\n")
    start = time.perf_counter()
    path = os.environ.get("PATH", "")
    with contextlib.suppress(ImportError):  # pip's ninja need not be on PATH
        path = f"{importlib.import_module('ninja').BIN_DIR}{os.pathsep}{path}"
    variables = {"PATH": path, "CXX": _compiler() or "c++"}  # torch knows only CXX and c++
    if not cpu:
        variables["TORCH_CUDA_ARCH_LIST"] = recipe.parameters["arch"]
    # torch builds a name once a process, even if that was interrupted.
    cpp_extension.JIT_EXTENSION_VERSIONER.entries.pop(recipe.name, None)
    try:
        with (
            speaking("protoclip"),
            Wait(f"compiling the {recipe.device_type} kernels"),
            _environment(variables),
            _quoted_libraries(cpp_extension),
        ):
            cpp_extension.load(
                name=recipe.name,
                sources=[str(p) for p in recipe.sources],
                extra_cflags=list(recipe.flags) if cpu else ["-O3"],
                extra_cuda_cflags=list(recipe.flags),
                extra_ldflags=["-fopenmp"] if cpu else [],
                build_directory=str(folder),
                is_python_module=False,
                verbose=os.environ.get("PROTOCLIP_BUILD_VERBOSE") == "1",
            )
    except BaseException:
        _say("the kernels were not compiled\n")
        raise
    _say(f"compiled in {time.perf_counter() - start:.0f} s\n")
