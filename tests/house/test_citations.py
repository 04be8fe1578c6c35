"""Files and sections that code and pages cite are there, and the code that mutants change."""

import ast
import functools
import io
import re
import tokenize
from pathlib import Path

import pytest
from mutants import MUTANTS

ROOT = Path(__file__).parents[2]
FOLDERS = ("protoclip", "kernels", "csrc", "benchmarks", "tests", "docs", ".ci", ".github")
CODE = {".py", ".cpp", ".h", ".cu", ".cuh"}
TEXT = {".md", ".sh", ".yml", ".yaml", ".toml", ""}
IN_FOLDERS = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
FILES = [
    path
    for path in (*sorted(ROOT.glob("*")), *IN_FOLDERS)
    if path.is_file() and "__pycache__" not in path.parts
]
CITING = [path for path in FILES if path.suffix in CODE | TEXT and "results" not in path.parts]
NAMES = [path.name for path in FILES]
SUFFIX = r"\.(?:md|py|cpp|cuh?|h|sh|ya?ml)"
CITED = re.compile(rf"(?<![\w/.*<>{{}}$-])((?:[\w.-]+/)*[\w.-]+{SUFFIX})\b(?!/)")
SECTION = re.compile(r"(?:([\w./-]+\.md)\)?,? )?§(\d+(?:\.\d+)?)(?:-(\d+))?")
ELSEWHERE = ("evaluations/", "torch/", "ATen/", "c10/")  # the authors' repository, and torch
HISTORY = re.compile(r"\bcommit [0-9a-f]{7}")  # a line that names a commit may name what it held


@functools.cache
def prose(path: Path, text: str) -> str:
    """Comments and docstrings of code, all of any other file."""
    if path.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
        described = [node for node in ast.walk(ast.parse(text)) if isinstance(node, nodes)]
        return "\n".join([*comments, *(ast.get_docstring(node) or "" for node in described)])
    if path.suffix in CODE:
        return "\n".join(re.findall(r"//(.*)", text))
    return text


def find(path: Path, name: str) -> Path | None:
    """The file that ``path`` means by ``name``: from the root, beside it, or inside the package; of
    code also a bare name that only one file has."""
    for folder in (ROOT, path.parent, ROOT / "protoclip"):
        if (folder / name).is_file():
            return folder / name
    if not name.endswith(".md") and "/" not in name and NAMES.count(name) == 1:
        return next(file for file in FILES if file.name == name)
    return None


def sections(page: Path) -> set[str]:
    """The numbers of a page's headings: "## 2. Losses", "### 2.1 InfoNCE"."""
    numbered = r"^#+ (\d+(?:\.\d+)?)\.? "
    return set(re.findall(numbered, page.read_text(encoding="utf-8"), re.MULTILINE))


def broken_citations(path: Path, text: str) -> list[str]:
    """What ``text``, the content of ``path``, cites and is not there."""
    lines = [line for line in prose(path, text).splitlines() if not HISTORY.search(line)]
    broken = []
    for line in lines:
        for name in CITED.findall(line):
            ours = Path(name).stem != "NAME" and not name.startswith(("__", *ELSEWHERE))
            if ours and find(path, name) is None:
                broken.append(f"{name}: {line.strip()}")
        for name, first, last in SECTION.findall(line):
            page = find(path, name) if name else path
            if page is not None and page.suffix == ".md":
                broken += [f"{name} §{n}" for n in (first, last) if n and n not in sections(page)]
    return broken


def test_what_is_cited_is_there():
    broken = {
        str(path.relative_to(ROOT)): broken_citations(path, path.read_text(encoding="utf-8"))
        for path in CITING
    }
    assert {path: names for path, names in broken.items() if names} == {}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("protoclip/x.py", '"""As in algorithm.md."""'),
        ("protoclip/x.py", "x = 1  # docs/algorithm.md §99"),
        ("kernels/x.py", '"""What ops/nothing.py calls."""'),
        ("csrc/x.h", "// Contract: ops/nothing.py."),
        ("docs/algorithm.md", "as in §2.77"),
        ("docs/x.md", "see [algorithm.md](algorithm.md), §1-99"),
        ("Makefile", "\tpython tests/test_nothing.py"),
    ],
)
def test_a_citation_of_nothing_is_found(name: str, text: str) -> None:
    assert len(broken_citations(ROOT / name, text)) == 1


def test_code_cites_sections_of_the_mathematics():
    cited_pages = [
        page
        for path in CITING
        for page, _, _ in SECTION.findall(prose(path, path.read_text(encoding="utf-8")))
    ]
    assert cited_pages.count("docs/algorithm.md") >= 5


def test_what_each_mutant_changes_is_there():
    """``make mutants`` takes an hour: code that moves would lose its mutants until the next run."""
    assert [mutant.name for mutant in MUTANTS if not mutant.fits(ROOT)] == []
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)  # the table's rows are by name
    files = {file for mutant in MUTANTS for file in mutant.tests()}
    assert [file for file in files if not (ROOT / file).is_file()] == []
