"""Changes one thing at a time: does a test notice it?

    python -m tests.mutants [--out FILE] [--only "a family, or part of a name"]

A mutant of mutants.txt is planted in a copy of the working tree with a cache of compiled code of
its own, and the tests of its family run until the first one fails, once they have all passed in a
copy without it. Each outcome is written when it is known, and a later call does those that are
missing. A survivor is a missing test, an equivalent change or code that nobody needs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_suffix(".txt")
LIMIT = 3600  # seconds for the tests of a mutant
# The files of tests that reach a family of code, in the order in which they run: those that notice
# most first, Triton's interpreter last.
TESTS = {
    "contrastive": "ops contrastive info_nce backends default_dtype stash ops_compile "
    "contrastive_peers faults_fuzz_ops distributed_losses kernels_contrastive kernels_info_nce",
    "prototypes": "ops prototype_cross_entropy prototype_cpu backends default_dtype ops_compile "
    "faults_fuzz_ops kernels_prototype",
    "clusters": "ops segment_mean kmeans_assign kmeans backends kmeans_quality faults_fuzz_ops "
    "estimator",
    "kmeans": "kmeans kmeans_quality estimator kmeans_on_disk kmeans_sklearn distributed_losses",
    "bounds": "kmeans_bounds",
    "ranks": "distributed_losses clip_loss openclip_proto_loss",
    "training": "train_plan step checkpoint loop",
    "runs": "checkpoint run_folder resume",
    "model": "model step",
    "heads": "heads",
    "data": "selection data_files data_folders data_batches",
    "encode": "encode",
    "cluster": "cluster cluster_pictures",
    "curate": "curate curate_command",
    "evaluate": "metrics evaluate_data evaluate",
    "report": "compare_statistics compare",
    "compare": "compare",
    "export": "openclip_export",
}
# Words in the names of a family's tests: those that ask these ops come first in their file.
OPS = {
    "contrastive": ("info_nce", "contrastive", "nt_xent", "sup_con", "sigmoid_loss"),
    "prototypes": ("prototype", "soft_targets"),
    "clusters": ("kmeans", "segment_mean"),
}

# Once, before the process forks.
IMPORTED = (
    "torch", "triton", "hypothesis", "open_clip", "sentence_transformers", "sklearn.cluster",
    "pytorch_metric_learning.losses", "faiss", "torch._dynamo",
)  # fmt: skip


class Mutant(NamedTuple):
    """A row of mutants.txt."""

    name: str
    family: str  # of TESTS
    path: str
    old: str  # once in the file
    new: str
    first: str  # the file, and a word of their names, of the tests that are likely to notice it

    def tests(self) -> list[str]:
        """The files of tests, in order."""
        first = self.first.partition("::")[0]
        names = dict.fromkeys(filter(None, [first, *TESTS[self.family].split()]))
        paths = [next((ROOT / "tests").rglob(f"test_{name}.py")) for name in names]
        if self.path.startswith("csrc/"):  # which Triton does not call
            paths = [path for path in paths if not path.name.startswith("test_kernels_")]
        return [str(path.relative_to(ROOT)) for path in paths]

    def words(self) -> tuple[str, ...]:
        """Words in the names of the tests that come first in their file."""
        word = self.first.partition("::")[2]
        return (word,) if word else OPS.get(self.family, ())

    def fits(self, tree: Path) -> bool:
        """Whether what it changes is in the tree."""
        path = tree / self.path
        return path.is_file() and path.read_text().count(self.old) == 1


def read_table() -> list[Mutant]:
    """The mutants of mutants.txt, whose head says what a row is."""
    mutants = []
    _, *rows = TABLE.read_text(encoding="utf-8").split("\n\n")
    for row in rows:
        lines = row.splitlines()
        if lines[0].startswith("== "):
            family, path = lines.pop(0).removeprefix("== ").split(": ")
        name, _, first = lines[0].removesuffix("]").partition("  [")
        old, new = (
            "\n".join(line[2:] for line in lines[1:] if line.startswith(sign)) for sign in "-+"
        )
        mutants.append(Mutant(name, family, path, old, new, first))
    return mutants


MUTANTS = read_table()


def copy_of_the_tree(folder: Path) -> None:
    """The files that git knows, and those that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for package in ("kernels", "csrc"):  # else an editable install has those of the original
        (folder / "protoclip" / package).symlink_to(folder / package)


def compile_once(arguments: list[str]) -> int:
    """g++, with objects kept by what they are made of: most mutants change one of eight."""
    if "-c" not in arguments:
        return subprocess.run(["g++", *arguments]).returncode
    source = next(Path(word) for word in arguments if word.endswith(".cpp"))
    target = Path(arguments[arguments.index("-o") + 1])
    parts = [source]
    for part in parts:
        for name in re.findall(r'#include "(\w+\.h)"', part.read_text()):
            if (header := source.with_name(name)).exists() and header not in parts:
                parts.append(header)
    made_of = [part.read_bytes() for part in parts]
    if b"TORCH_EXTENSION_NAME" in made_of[0]:  # the library's, in which the hash of all sources is
        made_of += [word.encode() for word in arguments if "TORCH_EXTENSION_NAME" in word]
    digest = hashlib.sha256(b"".join(made_of)).hexdigest()
    kept = Path(os.environ["PROTOCLIP_CACHE"], "objects", f"{source.stem}-{digest}.o")
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        if code := subprocess.run(["g++", *arguments]).returncode:
            return code
        shutil.copy2(target, kept)
    shutil.copyfile(kept, target)
    return 0


class Outcome(NamedTuple):
    verdict: str  # "dies", "survives" or what is wrong with the mutant
    noticed_by: str = ""


def outcome(mutant: Mutant, tree: Path, cache: Path) -> Outcome:
    if not mutant.fits(tree):
        return Outcome("not once in its file")
    path = tree / mutant.path
    original = path.read_text()
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        return run(tree, cache, mutant.tests(), mutant.words())
    finally:
        path.write_text(original)


def run(tree: Path, cache: Path, files: Sequence[str], words: Sequence[str] = ()) -> Outcome:
    """Whether a test in one of the files fails, and which: in a fork, which has torch already."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiver)
        os.setsid()
        os.environ.update(CXX=str(cache / "g++"), PROTOCLIP_CACHE=str(cache), OMP_NUM_THREADS="1")
        os.chdir(tree)
        sys.path[:0] = [str(tree), str(tree / "tests")]
        os.environ["PYTHONPATH"] = f"{tree}:{tree / 'tests'}"  # of processes that tests start
        sys.dont_write_bytecode = True  # two versions of a file may have one size and second
        for descriptor in (1, 2):
            os.dup2(os.open(cache / "log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
        os.write(sender, json.dumps(outcome_of(files, words)).encode())
        os._exit(0)
    os.close(sender)
    ready, _, _ = select.select([receiver], [], [], LIMIT)
    answer = os.read(receiver, 2**16) if ready else b'["dies", "hangs"]'
    os.close(receiver)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # also the ranks that it has started
    os.waitpid(child, 0)
    return Outcome(*json.loads(answer or b'["dies", "a crash"]'))


def outcome_of(files: Sequence[str], words: Sequence[str]) -> Outcome:
    """What the tests say; those with one of the words come first in their file, Triton's
    interpreter comes last."""
    import protoclip

    if reason := protoclip.backends("info_nce")["cpu"]:
        return Outcome("is no mutant", reason)
    first = FirstFailure(words)
    code = pytest.main(["-x", "--tb=short", *files], plugins=[first])
    return Outcome("dies", first.name or f"exit code {int(code)}") if code else Outcome("survives")


class FirstFailure:
    """A plugin of pytest that notes the name of the first test that fails."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words
        self.name = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        files = list(dict.fromkeys(item.path for item in items))

        def place(item: pytest.Item) -> tuple[int, bool, bool]:
            is_likely = any(word in item.name for word in self.words)
            return files.index(item.path), not is_likely, "triton" in item.name

        items.sort(key=place)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid.removeprefix("tests/")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.name:
            self.name = f"{report.nodeid} cannot be imported"


def rows_of(table: Path) -> dict[str, str]:
    """Name of a mutant -> the row that says what became of it."""
    rows = table.read_text().splitlines()[2:] if table.exists() else []
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows}


def write_row(table: Path, name: str, outcome: Outcome, started: float) -> None:
    noticed_by = outcome.noticed_by.replace("|", "/").replace("\n", " ")
    seconds = time.monotonic() - started
    with table.open("a") as rows:
        rows.write(f"| {name} | {outcome.verdict} | {noticed_by} | {seconds:.0f} |\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutants.md")
    parser.add_argument("--only", default="", help="a family, or part of a mutant's name")
    asked = parser.parse_args(argv)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    if not asked.out.exists():
        asked.out.write_text("| Mutant | Verdict | Noticed by | Seconds |\n|---|---|---|---|\n")
    wanted = [m for m in MUTANTS if asked.only == m.family or asked.only in m.name]
    os.environ.setdefault("TRITON_INTERPRET", "1")
    for module in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        cache = asked.out.parent.resolve() / "mutants-cache"  # compiles each mutant of C++ once
        copy_of_the_tree(tree)
        cache.mkdir(exist_ok=True)
        compiler = cache / "g++"
        compiler.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} compile "$@"\n')
        compiler.chmod(0o755)
        for mutant in wanted:
            if mutant.name in rows_of(asked.out):
                continue
            for file in mutant.tests():
                if (unchanged := f"nothing, {file}") not in rows_of(asked.out):
                    started = time.monotonic()
                    passed, failed = run(tree, cache, [file])
                    if passed != "survives":
                        sys.exit(f"without a mutant {failed} fails, see {cache / 'log'}")
                    write_row(asked.out, unchanged, Outcome("passes"), started)
            started = time.monotonic()
            write_row(asked.out, mutant.name, outcome(mutant, tree, cache), started)
    rows = [rows_of(asked.out)[mutant.name] for mutant in wanted]
    alive = [row for row in rows if " | dies | " not in row]
    print(*alive, f"{len(rows)} mutants, {len(alive)} alive: {asked.out}", sep="\n")
    return int(bool(alive))


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"]:
        sys.exit(compile_once(sys.argv[2:]))
    sys.exit(main())
