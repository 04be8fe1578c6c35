"""What holds for the package as a whole: layers, import cost, installed contents."""

import ast
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import protoclip

ROOT = Path(protoclip.__file__).parent

# A module imports from its own row or rows above it. The order is the data flow.
LAYERS = [
    ["ops"],
    ["config", "distributed", "checkpoint"],
    ["kmeans"],
    ["data"],
    ["model", "openclip_runs"],
    ["prototypes", "teacher"],
    ["losses"],
    ["step"],
    ["evaluate"],
    ["report"],
    ["run_folder"],
    ["schedule"],
    ["train", "openclip", "export", "plan"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def _imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import; write protoclip.…"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


SOURCES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    here = _module(path)
    assert here in LEVEL, f"{here} has no layer; give it a row in LAYERS"
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] != "protoclip" or len(parts) < 2 or parts[1] not in LEVEL:
            continue
        assert LEVEL[parts[1]] <= LEVEL[here], f"{here} imports {parts[1]}, to its right"


def test_only_ops_reach_the_kernels():
    for path in SOURCES:
        if _module(path) == "ops":
            continue
        for name in _imports(path):
            assert not name.startswith(("protoclip.kernels", "protoclip.csrc")), path
            assert "_native" not in name or _module(path) == "train", path


def test_kernels_know_only_torch_and_triton():
    allowed = {"torch", "triton", "math", "os", "dataclasses", "functools", "typing"}
    allowed |= {"__future__", "collections", "argparse", "sys", "re", "subprocess", "tempfile"}
    allowed |= {"concurrent", "pathlib", "contextlib", "itertools", "json", "shutil", "types"}
    for path in (ROOT.parent / "kernels").glob("*.py"):
        for name in _imports(path):
            first = name.split(".")[0]
            assert first in allowed or name.startswith("protoclip.kernels"), f"{path.name}: {name}"


def _fresh(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_import_is_light():
    """It takes a few modules of its own and no other package that torch has not loaded."""
    loaded = _fresh(
        "import sys, torch\nbefore = set(sys.modules)\nimport protoclip\n"
        "print(*(set(sys.modules) - before))"
    ).split()
    own = [name for name in loaded if name.split(".")[0] == "protoclip"]
    others = {name.split(".")[0] for name in loaded} - {"protoclip"}
    assert others <= set(sys.stdlib_module_names) and len(own) < 30, loaded


def test_import_costs_little():
    """Beside that of torch: 0.03 of it on an idle core. CPU time; the best of three processes."""
    code = (
        "import time\nclock = time.process_time\nbegan = clock()\nimport torch\nthen = clock()\n"
        "import protoclip\nprint((clock() - then) / (then - began))"
    )
    shares = sorted(float(_fresh(code)) for _ in range(3))
    assert shares[0] < 0.3, shares


def test_public_names_exist_and_are_documented():
    for name in protoclip.__all__:
        assert getattr(protoclip, name).__doc__, name


def test_every_package_is_shipped():
    shipped = (ROOT.parent / "setup.py").read_text()
    for init in ROOT.rglob("__init__.py"):
        name = ".".join(["protoclip", *init.relative_to(ROOT).parts[:-1]])
        assert f'"{name}"' in shipped, f"setup.py does not list {name}"


def test_a_wheel_holds_everything_and_works_elsewhere(tmp_path):
    pytest.importorskip("setuptools")
    makers = ("setuptools.command.bdist_wheel", "wheel")  # the first since setuptools 70
    if not any(importlib.util.find_spec(name) for name in makers):
        pytest.skip(f"none of {', '.join(makers)} is installed")
    source, out = ROOT.parent, tmp_path / "out"
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
