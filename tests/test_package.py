"""What holds for the package as a whole: import cost, public names, installed contents."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import protoclip
from protoclip.common.paths import cache_dir

ROOT = Path(protoclip.__file__).parent


def _fresh(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_import_is_light() -> None:
    """It takes a few modules of its own and no other package that torch has not loaded."""
    loaded = _fresh(
        "import sys, torch\nbefore = set(sys.modules)\nimport protoclip\n"
        "print(*{sys.modules[name].__name__ for name in set(sys.modules) - before})"
    ).split()
    packages = [name.split(".")[0] for name in loaded]
    assert packages.count("protoclip") <= 40, loaded  # of which eight are packages
    assert set(packages) <= {"protoclip", *sys.stdlib_module_names}, loaded


def test_public_names_exist_and_are_documented() -> None:
    assert not [name for name in protoclip.__all__ if not getattr(protoclip, name).__doc__]


def test_functions_are_also_imported_from_where_they_used_to_live() -> None:
    """``protoclip.kmeans`` stays the function, whoever imports the module of that name."""
    said = _fresh(
        "import importlib, protoclip\n"
        "from protoclip.kmeans import Clusters, choose_num_clusters, kmeans\n"
        "from protoclip.grad_cache import grad_cache\n"
        "importlib.import_module('protoclip.kmeans')\n"
        "importlib.import_module('protoclip.grad_cache')\n"
        "print(protoclip.kmeans is kmeans, protoclip.grad_cache is grad_cache)\n"
        "print(protoclip.Clusters is Clusters)"
    )
    assert said.split() == ["True"] * 3


def test_a_wheel_holds_everything_and_works_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    makers = ("setuptools.command.bdist_wheel", "wheel")  # the first since setuptools 70
    if not any(importlib.util.find_spec(name) for name in makers):
        pytest.skip(f"none of {', '.join(makers)} is installed")
    source = ROOT.parent
    out = tmp_path / "out"
    command = f"egg_info --egg-base {tmp_path} build --build-base {tmp_path / 'b'} bdist_wheel"
    command += f" --bdist-dir {tmp_path / 'w'} -d {out}"
    subprocess.run([sys.executable, "setup.py", "-q", *command.split()], cwd=source, check=True)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
        file.extractall(tmp_path / "site")
    for folder, place in (("protoclip", ""), ("kernels", "protoclip/"), ("csrc", "protoclip/")):
        for path in (source / folder).rglob("*.*"):
            if "__pycache__" not in path.parts and path.is_file():
                assert place + path.relative_to(source).as_posix() in held, path
    code = "import protoclip, protoclip.kernels as k; print(protoclip.__file__, k.__file__)"
    code += "; from protoclip.ops import native; print(native.csrc())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert all(path.startswith(f"{tmp_path}/site/") for path in done.stdout.split())


def test_without_a_home_folder_the_cache_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PROTOCLIP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def expanduser(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", expanduser)
    with pytest.raises(OSError, match="set PROTOCLIP_CACHE"):
        cache_dir()
