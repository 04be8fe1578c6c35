"""What holds for the package as a whole: import cost, public names, installed contents."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import pickle
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


def test_import_loads_nothing_else() -> None:
    loaded = _fresh("import sys, protoclip\nprint(*sys.modules)").split()
    assert {name for name in loaded if name.startswith("protoclip")} == {"protoclip"}
    assert not {"torch", "numpy", "triton", "open_clip"} & set(loaded)


def test_the_ops_load_no_package_that_torch_has_not_loaded() -> None:
    """They take a few modules of protoclip."""
    loaded = _fresh(
        "import sys, torch\nbefore = set(sys.modules)\nimport protoclip\n"
        "protoclip.info_nce, protoclip.kmeans, protoclip.ClipLoss\n"
        "print(*{sys.modules[name].__name__ for name in set(sys.modules) - before})"
    ).split()
    packages = [name.split(".")[0] for name in loaded]
    assert packages.count("protoclip") <= 40, loaded
    assert set(packages) <= {"protoclip", *sys.stdlib_module_names}, loaded


def test_dir_and_star_import_give_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from protoclip import *", names)
    assert sorted(names.keys() - {"__builtins__"}) == sorted(protoclip.__all__)
    assert sorted(dir(protoclip)) == sorted([*protoclip.__all__, "__version__"])
    with pytest.raises(AttributeError, match="module 'protoclip' has no attribute 'kmean'"):
        protoclip.kmean  # noqa: B018


def test_type_checkers_see_every_public_name() -> None:
    """The imports for type checkers are the names that are imported at first use."""
    (block,) = (
        node
        for node in ast.parse(Path(protoclip.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.If)
    )
    where = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(where) == sorted(protoclip.__all__)
    for name, module in where.items():
        expected = getattr(importlib.import_module(str(module)), name)
        assert getattr(protoclip, name) is expected


def test_pickles_name_the_package() -> None:
    config = protoclip.ProtoConfig(queue=64)
    pickled = pickle.dumps(config)
    assert b"protoclip.settings" not in pickled
    assert pickle.loads(pickled) == config
    code = f"import pickle; print(pickle.loads({pickled!r}).queue)"
    assert _fresh(code).split() == ["64"]


def test_public_names_exist_and_are_documented() -> None:
    assert not [name for name in protoclip.__all__ if not getattr(protoclip, name).__doc__]


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
