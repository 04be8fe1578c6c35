"""The house as docs/design.md draws it: rooms in one order, no circles, few parameters."""

import ast
from pathlib import Path

import pytest

import protoclip

ROOT = Path(protoclip.__file__).parent

# A room imports from itself and from the rooms before it. The order is the data flow.
ROOMS = [
    "ops", "distributed", "config", "commands", "data", "model", "kmeans", "feature_store",
    "prototypes", "losses",
    "teacher", "checkpoint", "grad_cache", "step", "evaluate", "report", "cluster", "run_folder",
    "schedule", "train", "openclip", "export", "plan", "sentence_transformers", "__main__",
]  # fmt: skip
FLOOR = {room: number for number, room in enumerate(ROOMS)}
SOURCES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")
MOST_PARAMETERS = 8


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


def own_modules(path: Path) -> set[str]:
    """The files of protoclip that a file imports, by module."""
    found = set()
    for name in imported(path):
        module = name if name in MODULES else name.rpartition(".")[0]
        if module in MODULES and module != module_of(path):
            found.add(module)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    here = module_of(path).split(".")[1]
    assert here in FLOOR, f"{here} has no place in the house; give it one in ROOMS"
    for module in own_modules(path):
        room = module.split(".")[1]
        assert FLOOR[room] <= FLOOR[here], f"{here} imports {room}, which stands behind it"


def test_there_is_no_circle():
    rest = {name: own_modules(path) for name, path in MODULES.items()}
    while free := [name for name, needs in rest.items() if not needs & rest.keys()]:
        for name in free:
            del rest[name]
    assert not rest, f"these import each other: {sorted(rest)}"


def test_only_ops_reach_the_kernels():
    for path in SOURCES:
        if module_of(path).split(".")[1] != "ops":
            for name in imported(path):
                assert not name.startswith(("protoclip.kernels", "protoclip.csrc")), path


def test_kernels_know_only_torch_and_triton():
    allowed = {"torch", "triton", "math", "os", "dataclasses", "functools", "typing"}
    allowed |= {"__future__", "collections", "argparse", "sys", "re", "subprocess", "tempfile"}
    allowed |= {"concurrent", "pathlib", "contextlib", "itertools", "json", "shutil", "types"}
    for path in (ROOT.parent / "kernels").glob("*.py"):
        for name in imported(path):
            first = name.split(".")[0]
            assert first in allowed or name.startswith("protoclip.kernels"), f"{path.name}: {name}"


def many_parameters(path: Path) -> list[str]:
    """Functions with more parameters than a reader keeps apart. The public API may have them, and
    what runs an operator of torch.library, whose schema knows no dataclass."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found, public = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name in protoclip.__all__:
            public |= set(node.body)
        if isinstance(node, ast.FunctionDef) and node.name not in protoclip.__all__:
            parameters = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            names = {one.arg for one in parameters} - {"self", "cls", "ctx"}
            if len(names) > MOST_PARAMETERS and node not in public:
                found.append(f"{path.name}:{node.lineno} {node.name} has {len(names)}")
    return found


def test_functions_have_few_parameters():
    """Values that belong together are a frozen dataclass."""
    rooms = [path for path in SOURCES if module_of(path).split(".")[1] != "ops"]
    assert not [found for path in rooms for found in many_parameters(path)]
