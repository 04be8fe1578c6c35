"""The compiled library: built once, loaded only as it was built, its absence said in words."""

import ctypes
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

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
def build(tmp_path, monkeypatch):
    """A small library to build in a cache of its own."""
    (tmp_path / "module.cpp").write_text(SOURCE)
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    flags = ("-O1", "-DANSWER=42")
    return native.Build("cpu", (tmp_path / "module.cpp",), flags, {"test": str(tmp_path)})


@pytest.fixture
def built(build):
    assert _answer(build) == 42
    (library,) = native.cache_dir().rglob("*.so")
    return library


def _answer(build):
    """What the library says, loaded as by a new process: torch builds a name once in each."""
    cpp_extension.JIT_EXTENSION_VERSIONER = ExtensionVersioner()
    return ctypes.CDLL(str(native.build(build))).answer()


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda library: os.truncate(library, library.stat().st_size // 2),
    "empty": lambda library: library.write_bytes(b""),
    "missing": lambda library: library.unlink(),
    "another byte": _flip_a_byte,
    "writable by all": lambda library: library.chmod(0o666),
    "in a folder writable by all": lambda library: library.parent.chmod(0o777),
    "no stamp": lambda library: (library.parent / "built.json").unlink(),
    "a torn stamp": lambda library: (library.parent / "built.json").write_text('{"size": '),
    "an old stamp": lambda library: (library.parent / "built.json").write_text("{}"),
}


@needs_compiler
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_library_that_is_not_as_it_was_built_is_built_again(damage, build, built):
    copy = built.with_name("copy")
    shutil.copy2(built, copy)
    copy.replace(built)  # this process has the library mapped: its own file stays whole
    before = built.stat().st_mtime_ns
    assert _answer(build) == 42 and built.stat().st_mtime_ns == before  # as it was built
    DAMAGE[damage](built)
    started = time.time_ns()
    assert _answer(build) == 42
    assert built.stat().st_mtime_ns >= started
    for path in (built, built.parent, built.parent.parent):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@needs_compiler
@pytest.mark.parametrize("folder", ["cache", "cache/native"])
def test_nothing_of_another_user_is_loaded(folder, build, built, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(tmp_path / folder, 65534, 65534)
    with pytest.raises(RuntimeError, match="belongs to another user.*set PROTOCLIP_CACHE"):
        native.build(build)


@needs_compiler
def test_a_cache_that_all_can_write_is_refused_unless_sticky(build, built, tmp_path):
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(RuntimeError, match=r"writable by all; run chmod o-w .* PROTOCLIP_CACHE"):
        native.build(build)
    (tmp_path / "cache").chmod(0o1777)
    assert _answer(build) == 42


@needs_compiler
def test_the_one_who_waits_for_another_build_says_so(build, built):
    (built.parent / "built.json").unlink()
    code = "import pickle; from protoclip.ops import native; native.build(pickle.loads("
    code += f"{pickle.dumps(build)!r}))"
    with FileLock(built.parent / native.LOCK):
        waiting = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        assert "waiting for another process that compiles the cpu" in waiting.stderr.readline()
    assert "compiling the cpu kernels" in waiting.communicate()[1] and waiting.returncode == 0
    assert json.loads((built.parent / "built.json").read_text())["size"]


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


def test_no_compiler_is_said_once_with_the_remedy(tmp_path):
    place = {"PATH": str(tmp_path), "PROTOCLIP_CACHE": str(tmp_path), "CXX": "c++"}
    subprocess.run([sys.executable, "-c", NO_COMPILER], env=os.environ | place, check=True)


def test_one_cache_folder_for_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PROTOCLIP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert native.cache_dir() == tmp_path / "home/.cache/protoclip"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert native.cache_dir() == tmp_path / "xdg/protoclip"
    monkeypatch.setenv("PROTOCLIP_CACHE", "~/mine")
    assert native.cache_dir() == tmp_path / "home/mine"
