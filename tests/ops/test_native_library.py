"""The compiled library: built once, whole or not at all, its absence said in words."""

from __future__ import annotations

import ctypes
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from torch.utils import cpp_extension
from torch.utils._cpp_extension_versioner import ExtensionVersioner

from protoclip.ops import native

# A library without torch's headers compiles in a second.
SOURCE = 'extern "C" int answer() { return ANSWER; }'
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler"
)


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> native.Recipe:
    """A small library to build in a cache of its own."""
    (tmp_path / "module.cpp").write_text(SOURCE)
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    flags = ("-O1", "-DANSWER=42")
    return native.Recipe("cpu", (tmp_path / "module.cpp",), flags, {"test": str(tmp_path)})


@pytest.fixture
def built(build: native.Recipe) -> Path:
    assert _answer(build) == 42
    (library,) = native.cache_dir().rglob("*.so")
    return library


def _answer(build: native.Recipe) -> int:
    """What the library says, loaded as by a new process: torch builds a name once in each."""
    cpp_extension.JIT_EXTENSION_VERSIONER = ExtensionVersioner()
    return ctypes.CDLL(str(native.build(build))).answer()


@needs_compiler
def test_a_library_is_built_once_and_again_where_it_is_missing(
    build: native.Recipe, built: Path
) -> None:
    before = built.stat().st_mtime_ns
    assert _answer(build) == 42 and built.stat().st_mtime_ns == before
    replace_by_a_copy(built)
    built.unlink()
    assert _answer(build) == 42 and built.stat().st_mtime_ns > before


def _killed(recipe: native.Recipe, folder: Path) -> None:
    (folder / f"{recipe.name}.so").write_bytes(b"torn")
    raise KeyboardInterrupt


def _interrupted(*arguments: Any, **options: Any) -> None:
    raise KeyboardInterrupt


@needs_compiler
@pytest.mark.parametrize(
    "module, name, end",
    [
        (native, "_compile", _killed),
        # torch has noted by then that it built the name.
        (cpp_extension, "_write_ninja_file_and_build_library", _interrupted),
    ],
)
def test_a_build_that_did_not_end_begins_again_and_leaves_nothing_that_is_loaded(
    build: native.Recipe, module: Any, name: str, end: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, name, end)
        with pytest.raises(KeyboardInterrupt):
            native.build(build)
    assert ctypes.CDLL(str(native.build(build))).answer() == 42


def _cut_in_half(library: Path) -> None:
    os.truncate(library, library.stat().st_size // 2)


def _one_bit(library: Path) -> None:
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


DAMAGE = {
    "cut short": _cut_in_half,  # mapped, its missing pages are a SIGBUS
    "empty": lambda library: os.truncate(library, 0),
    "one bit": _one_bit,
    "no seal": lambda library: library.with_suffix(".seal").unlink(),
    "another's seal": lambda library: library.with_suffix(".seal").write_bytes(b"\xff\x00"),
    "a folder": lambda library: (library.unlink(), library.mkdir()),
}


def replace_by_a_copy(library: Path) -> None:
    """This process has the library mapped: what it maps stays whole, or it dies of SIGBUS."""
    copy = library.with_name("copy")
    shutil.copy2(library, copy)
    copy.replace(library)


@needs_compiler
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_built_again_and_never_loaded(
    build: native.Recipe, built: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    replace_by_a_copy(built)
    DAMAGE[damage](built)
    capfd.readouterr()
    assert not native.is_whole(built)
    assert _answer(build) == 42 and native.is_whole(built)
    message = capfd.readouterr().err
    assert f"{built} is damaged and will be built again" in message and "compiling" in message
    assert _answer(build) == 42 and "compiling" not in capfd.readouterr().err


@needs_compiler
def test_a_cache_that_cannot_be_written_to_gives_no_damaged_library(
    build: native.Recipe, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_by_a_copy(built)
    os.truncate(built, 0)

    def refused(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(native.Path, "mkdir", refused)  # root may write anywhere
    with pytest.raises(PermissionError):
        native.build(build)


@needs_compiler
def test_a_cache_that_cannot_be_written_to_is_replaced_by_a_private_folder(
    build: native.Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PROTOCLIP_CACHE", "/proc/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert _answer(build) == 42
    private = tmp_path / f"protoclip-{os.getuid()}"
    message = capfd.readouterr().err
    assert f"so {private} holds the kernels; PROTOCLIP_CACHE names another folder" in message
    assert _answer(build) == 42 and "compiling" not in capfd.readouterr().err
    private.chmod(0o777)  # then others could put a library there
    with pytest.raises(PermissionError, match="a folder of this user alone"):
        native.build(build)


def test_the_warning_says_what_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verbose build shows nothing where the folder is at fault; a card's losses need no nvcc."""

    def fails(half: str) -> Path:
        raise OSError(30, "Read-only file system", "/cache")

    monkeypatch.setattr(native, "_library", fails)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/cuda")
    monkeypatch.setattr(native, "_cards", lambda: {(9, 0)})
    for half, words, absent in (
        ("cpu", "losses hold all logits in memory", "k-means"),
        ("cuda", "k-means runs on Triton", "logits"),
    ):
        with pytest.warns(RuntimeWarning, match="PROTOCLIP_CACHE names another folder") as caught:
            assert "Read-only" in str(native.why_not.__wrapped__(half))
        (warning,) = (str(each.message) for each in caught)
        assert words in warning and absent not in warning and "VERBOSE" not in warning


def start_to_build(build: native.Recipe, **environment: str) -> subprocess.Popen[str]:
    """In another process."""
    code = "import pickle; from protoclip.ops import native; native.build(pickle.loads("
    command = [sys.executable, "-c", code + f"{pickle.dumps(build)!r}))"]
    place = os.environ | environment
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=place)


@needs_compiler
def test_the_one_who_waits_for_another_build_says_so(build: native.Recipe, built: Path) -> None:
    shutil.rmtree(built.parent)
    with FileLock(built.parent.with_suffix(".lock")):
        waiting = start_to_build(build)
        assert "waiting for another process that compiles the cpu" in waiting.stderr.readline()
    assert "compiling the cpu kernels" in waiting.communicate()[1] and waiting.returncode == 0
    assert built.is_file()


@needs_compiler
@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ('#include "Python.h.absent"', "Python.h.absent: No such file or directory"),
        ("int answer() { return question; }", "'question' was not declared"),
        ("int question(); int answer() { return question() }", "expected ';'"),
    ],
)
def test_a_failed_build_says_the_compilers_error_and_not_its_commands(
    source: str, cause: str, build: native.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    build.sources[0].write_text(source)
    cpp_extension.JIT_EXTENSION_VERSIONER = ExtensionVersioner()
    with pytest.raises(RuntimeError) as raised:
        native.build(build)
    first, *others = native._cause(raised.value)
    assert cause in first and "error:" in first and len(first) < 300 and len(others) < 5


@needs_compiler
def test_a_missing_header_of_python_is_said_with_the_remedy(
    build: native.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiles(device_type: str) -> Path:
        build.sources[0].write_text('#include "absent/Python.h"')
        cpp_extension.JIT_EXTENSION_VERSIONER = ExtensionVersioner()
        return native.build(build)

    monkeypatch.setattr(native, "_library", compiles)
    with pytest.warns(RuntimeWarning, match="apt install python3-dev"):
        reason = str(native.why_not.__wrapped__("cpu"))
    assert "absent/Python.h: No such file" in reason and "\n" not in reason


@needs_compiler
def test_the_one_who_waits_for_a_build_that_fails_does_not_try_again(
    build: native.Recipe, built: Path, tmp_path: Path
) -> None:
    """Eight ranks would try one after another; a later process, after a remedy, does try."""
    shutil.rmtree(built.parent)
    fails = f"while [ ! -e {tmp_path}/end ]; do sleep 0.1; done; echo error: x; exit 1"
    check = '[ "$1" = -v ] || [ "$1" = -dumpfullversion ] && exit 0'  # torch's, of the version
    (tmp_path / "c++").write_text(f"#!/bin/sh\n{check}\n{fails}\n")
    (tmp_path / "c++").chmod(0o700)
    one = start_to_build(build, CXX=str(tmp_path / "c++"))
    assert one.stderr.read(20) == "protoclip: compiling"
    two = start_to_build(build, CXX=str(tmp_path / "c++"))
    assert "waiting for another process" in two.stderr.readline()
    (tmp_path / "end").touch()
    errors = [process.communicate()[1] for process in (one, two)]
    assert one.returncode == two.returncode == 1
    assert "compiling" not in errors[1]
    assert all("error: x" in text for text in errors)
    assert _answer(build) == 42


@needs_compiler
@pytest.mark.parametrize("named", [False, True])
def test_the_compiler_is_the_one_that_was_found(
    named: bool, build: native.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without CXX torch tries c++ alone; it takes no launcher before the compiler."""
    real = shutil.which("c++") or shutil.which("g++")
    path = tmp_path / "programs"
    path.mkdir()
    for name in ("sh", "ld", "as"):
        if found := shutil.which(name):
            (path / name).symlink_to(found)
    (path / "g++").write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    (path / "g++").chmod(0o700)
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.delenv("CXX", raising=False)
    if named:
        monkeypatch.setenv("CXX", "ccache g++ -m64")
    assert native._compiler() == "g++"
    assert _answer(build) == 42


@needs_compiler
def test_a_folder_with_a_space_does_not_end_the_build(
    build: native.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaced = tmp_path / "my environment"
    spaced.mkdir()
    (spaced / "lib").symlink_to(cpp_extension.TORCH_LIB_PATH)
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", str(spaced / "lib"))
    monkeypatch.setenv("PROTOCLIP_CACHE", str(spaced / "cache"))
    assert _answer(build) == 42


NO_COMPILER = """
import torch, warnings, protoclip
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.eye(3)
    loss = protoclip.info_nce(x, x, 1.0)
    protoclip.kmeans_assign(x, x)
    assert "no C++ compiler" in protoclip.backends("info_nce")["cpu"]
(warning,) = [str(w.message) for w in caught if "protoclip" in str(w.message)]
assert "apt install g++" in warning and "several times slower" in warning
"""


def test_no_compiler_is_said_once_with_the_remedy(tmp_path: Path) -> None:
    place = {"PATH": str(tmp_path), "PROTOCLIP_CACHE": str(tmp_path), "CXX": "c++"}
    subprocess.run([sys.executable, "-c", NO_COMPILER], env=os.environ | place, check=True)


@pytest.mark.parametrize("name", ["flags\t\t", "Features\t"])  # of x86, of ARM
def test_processors_that_differ_have_libraries_of_their_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "CPUINFO", tmp_path / "cpuinfo")
    names = set()
    for feature in ("", " sve"):
        native.CPUINFO.write_text(f"processor\t: 0\n{name}: fp asimd{feature}\n")
        names.add(native._recipe("cpu").name)
    assert len(names) == 2


def test_one_cache_folder_for_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PROTOCLIP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert native.cache_dir() == tmp_path / "home/.cache/protoclip"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert native.cache_dir() == tmp_path / "xdg/protoclip"
    monkeypatch.setenv("PROTOCLIP_CACHE", "~/mine")
    assert native.cache_dir() == tmp_path / "home/mine"
    monkeypatch.setenv("PROTOCLIP_CACHE", "mine")  # the library is opened again after a chdir
    monkeypatch.chdir(tmp_path)
    assert native.cache_dir() == tmp_path / "mine"


def test_the_cuda_half_is_built_for_every_card_that_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cards = [(9, 0), (8, 0), (9, 0), (10, 0)]
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(cards))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda i: cards[i])
    assert native.cuda_architectures() == "8.0;9.0;10.0"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0;9.0+PTX")  # of a container
    assert native.cuda_architectures() == "8.0;9.0+PTX;10.0"  # csrc/ needs 8.0
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Volta+PTX;Turing;Ampere")
    cards[:] = [(7, 5), (8, 9)]
    assert native.cuda_architectures() == "Ampere;8.9"


def test_the_cuda_half_is_not_tried_where_every_card_is_too_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", "/usr/local/cuda")
    monkeypatch.setattr(native, "_cards", lambda: {(7, 5)})
    monkeypatch.setattr(native, "_library", lambda device_type: pytest.fail("it was compiled"))
    assert "8.0, which no GPU here has" in str(native.why_not.__wrapped__("cuda"))


@pytest.mark.parametrize("before", [None, "8.6"])
def test_a_build_leaves_the_list_of_architectures_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before
) -> None:
    """Other extensions of the process read it too."""
    if before is None:
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    else:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", before)
    seen = []

    def compiler(**arguments):
        seen.append(os.environ["TORCH_CUDA_ARCH_LIST"])
        raise OSError("no nvcc")

    monkeypatch.setattr(cpp_extension, "load", compiler)
    build = native.Recipe("cuda", (), (), {"arch": "9.0a"})
    with pytest.raises(OSError, match="no nvcc"):
        native._compile(build, tmp_path)
    assert seen == ["9.0a"] and os.environ.get("TORCH_CUDA_ARCH_LIST") == before
