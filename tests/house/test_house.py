"""Imports point one way, in the order of docs/design.md's table, without cycles."""

import ast
import functools
import re
from pathlib import Path

import pytest

import protoclip
from protoclip import losses, ops

pytestmark = pytest.mark.smoke

ROOT = Path(protoclip.__file__).parent

# A module imports from itself and from those before it. The order is the data flow.
ROOMS = [
    "common", "heads", "features", "settings", "distributed", "ops", "data", "model", "lloyd",
    "estimator", "episodes", "losses", "runs", "cached_gradients", "evaluate", "encode", "report",
    "cluster", "curate", "training", "train", "compare", "openclip", "export", "plan",
    "sentence_transformers", "__main__",
]  # fmt: skip
FLOOR = {room: number for number, room in enumerate(ROOMS)}
SOURCES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def module_of(path: Path) -> str:
    """protoclip.data.types of protoclip/data/types.py; a package for its __init__.py."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path):
    """Every module or name that a file imports, wherever in it: late and TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import; write protoclip.…"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = {module_of(path): path for path in SOURCES}


@functools.cache
def own_modules(path: Path) -> set[str]:
    """The files of protoclip that a file imports, by module."""
    modules = set()
    for name in imported(path):
        module = name if name in MODULES else name.rpartition(".")[0]
        if module in MODULES and module != module_of(path):
            modules.add(module)
    return modules


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    here = module_of(path).split(".")[1]
    assert here in FLOOR, f"{here} has no place in the order; give it one in ROOMS"
    for module in own_modules(path):
        room = module.split(".")[1]
        assert FLOOR[room] <= FLOOR[here], f"{here} imports {room}, which comes later"


def test_the_page_on_design_has_the_modules_in_order():
    page = (ROOT.parent / "docs" / "design.md").read_text(encoding="utf-8")
    table = page.partition("| Module |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == ROOMS


def test_there_is_no_circle():
    rest = {name: own_modules(path) for name, path in MODULES.items()}
    while free := [name for name, needs in rest.items() if not needs & rest.keys()]:
        for name in free:
            del rest[name]
    assert not rest, f"these import each other: {sorted(rest)}"


def test_no_public_name_hides_a_module():
    """An import of the module would replace the function ``protoclip.name``."""
    for package in (protoclip, ops, losses):
        folder = Path(package.__file__).parent
        for name in package.__all__:
            assert not (folder / f"{name}.py").exists() and not (folder / name).is_dir(), name


def test_only_ops_reach_the_kernels():
    for path in SOURCES:
        if module_of(path).split(".")[1] != "ops":
            for name in imported(path):
                assert not name.startswith(("protoclip.kernels", "protoclip.csrc")), path


def test_kernels_know_only_torch_and_triton():
    allowed = {"torch", "triton", "math", "os", "dataclasses", "typing", "__future__"}
    allowed |= {"collections", "pathlib", "shutil", "sysconfig"}
    for path in (ROOT.parent / "kernels").rglob("*.py"):
        for name in imported(path):
            first = name.split(".")[0]
            assert first in allowed or name.startswith("protoclip.kernels"), f"{path.name}: {name}"


def untyped_functions(path: Path) -> list[str]:
    """Functions with a parameter or result without a type; Triton's own (@jit) have none."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef):
            continue
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        parameters = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        untyped = [p.arg for p in parameters if p.annotation is None and p.arg != "self"]
        if untyped or node.returns is None:
            names.append(f"{path.name}:{node.lineno} {node.name}")
    return names


def test_launchers_of_kernels_are_typed():
    """mypy's disallow_untyped_defs, which cannot leave out @jit functions."""
    kernels = (ROOT.parent / "kernels").rglob("*.py")
    assert not [function for path in kernels for function in untyped_functions(path)]
