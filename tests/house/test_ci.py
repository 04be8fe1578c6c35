"""CI, the hooks of a commit and make do the same things, and CI stops where an install fails."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Stands in for every tool that CI starts: writes down the call, and fails at the chosen one.
TOOL = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
if [ "$2" = venv ]; then
  mkdir "$3/bin"
  for tool in pip make python; do cp "$0" "$3/bin/$tool"; done
fi
[ "$(wc -l < "$CALLS")" != "$FAILS_AT" ]
"""


def calls_of_ci(folder: Path, fails_at: int = 0, root: bool = True) -> tuple[int, list[str]]:
    """The exit code of .ci/run and the calls that it made; call number ``fails_at`` fails."""
    tools = folder / "tools"
    calls = folder / "calls"
    tools.mkdir()
    for name in ("apt-get", "python3"):
        (tools / name).write_text(TOOL)
        (tools / name).chmod(0o755)
    (tools / "id").write_text(f"#!/bin/bash\necho {0 if root else 1000}\n")
    (tools / "id").chmod(0o755)
    variables = {"PATH": f"{tools}:/usr/bin:/bin", "CALLS": str(calls), "FAILS_AT": str(fails_at)}
    done = subprocess.run([ROOT / ".ci" / "run"], env=os.environ | variables, capture_output=True)
    return done.returncode, calls.read_text().splitlines()


def test_ci_installs_as_the_readme_says_and_runs_its_test_command(tmp_path):
    code, calls = calls_of_ci(tmp_path)
    assert code == 0 and calls[-3] == "make -j2 --output-sync lint docs"
    assert calls[-1] == "make parity SIZES=tiny"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ours = re.search(r"&& (python -m pytest [^#\n]*)", readme)
    assert ours is not None and calls[-2].startswith(ours[1].strip())
    assert [call for call in calls if call.startswith("pip")][1].endswith("-e .[dev]")


@pytest.mark.parametrize("number", range(1, 12))
def test_ci_stops_where_anything_fails(tmp_path, number):
    """Of eleven: two of apt-get, the environment, five of pip, lint and docs, tests, parity."""
    code, calls = calls_of_ci(tmp_path, fails_at=number)
    assert code != 0 and len(calls) == number


def test_ci_without_root_installs_no_system_packages(tmp_path):
    code, calls = calls_of_ci(tmp_path, root=False)
    assert code == 0 and len(calls) == 9 and calls[0].startswith("python3 -m venv")


def test_the_workflow_only_calls_ci():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert re.findall(r"run: (.*)", workflow) == [".ci/run"]


def made(*arguments: str) -> str:
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_the_hooks_run_what_make_lint_runs():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    entries = re.findall(r"entry: (.*)", hooks)
    commands = [line for line in made("-n", "lint").splitlines() if line]
    assert [line.startswith(entry) for entry, line in zip(entries, commands, strict=True)] == (
        [True] * len(entries)
    )


def test_make_help_lists_every_target():
    targets = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert re.findall(r"^make (\S+) +\S", made("help"), re.MULTILINE) == targets[0].split()


def test_every_folder_of_tests_is_in_the_first_look():
    files = list((ROOT / "tests").rglob("test_*.py"))
    marked = {file.parent for file in files if "pytest.mark.smoke" in file.read_text("utf-8")}
    assert marked == {file.parent for file in files}
