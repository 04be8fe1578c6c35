"""README, CONTRIBUTING and docs/: snippets run, commands know their flags, links lead somewhere."""

import ast
import contextlib
import inspect
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

import protoclip
from benchmarks.report import digits, newest_cpu
from protoclip import plan
from protoclip.__main__ import main
from protoclip.model import register_configs
from protoclip.ops.dispatch import TABLE
from protoclip.settings.commands import PARSERS

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
ALL = (README, CONTRIBUTING, *DOCS)
INDEX = ROOT / "docs" / "README.md"
PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in ALL}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
    return [block for kind, block in FENCED.findall(text) if kind == language]


def joined(block: str) -> list[str]:
    """Lines of a shell, those that end in a backslash with the next one."""
    return block.replace("\\\n", " ").splitlines()


def shown(text: str) -> list[tuple[str, list[str]]]:
    """(NAME, the words after it) of each "-m protoclip.NAME ..." or "protoclip NAME ..."."""
    lines = [line for block in blocks(text, "bash") for line in joined(block)]
    lines += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", FENCED.sub("", text))]
    command = r"(?:-m (?:-- )?protoclip\.(?!kernels)|(?:^|&& )protoclip )(\w+)(.*)"
    found = (re.search(command, line) for line in lines)
    return [(match[1], shlex.split(match[2], comments=True)) for match in found if match]


RECORDS = [json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("*.json")]

SHOWN = [use for text in PAGES.values() for use in shown(text)]


# Whole programs, and models to download: test_own_loop, test_own_loss, test_compare, test_heads.
RUN_ELSEWHERE = {"docs/own-loop.md", "docs/own-loss.md", "docs/compare.md", "docs/frozen.md"}
SNIPPETS = [name for name, text in PAGES.items() if "```python" in text]


@pytest.mark.parametrize("page", sorted(set(SNIPPETS) - RUN_ELSEWHERE))
def test_python_examples_run(page, tmp_path, monkeypatch):
    """A page's snippets run one after the other; where one makes a loss, it has a gradient."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    name = register_configs("protoclip-tiny")
    scope = {  # the loop that README's first snippet stands in
        "protoclip": protoclip,
        "model": open_clip.create_model(name, output_dict=True),
        "images": torch.randn(2, 3, 48, 48),
        "texts": open_clip.get_tokenizer(name)(["a cat", "two dogs"]),
    }
    for snippet in blocks(PAGES[page], "python"):
        scope.pop("loss", None)
        exec(compile(snippet, page, "exec"), scope)
        if isinstance(loss := scope.get("loss"), torch.Tensor):
            loss.backward()
            assert loss.isfinite() and loss > 0
    assert page != "README.md" or scope["total"].isfinite()


@pytest.mark.smoke
@pytest.mark.parametrize("name", sorted(PARSERS))
def test_flags_exist(name):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([name, "--help" if name == "openclip" else "--help-all"])
    known = set(re.findall(r"--[\w-]+", printed.getvalue()))
    uses = [words for command, words in SHOWN if command == name]
    assert uses, f"no page shows protoclip {name}"
    for words in uses:
        flags = {word.split("=")[0] for word in words if word.startswith("--")}
        assert flags <= known, f"protoclip {name} has no {sorted(flags - known)}"


def test_commands_and_make_targets_exist():
    assert {name for name, _ in SHOWN} <= set(PARSERS)
    rules = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([\w-]+)", "\n".join(PAGES.values()), re.MULTILINE):
        assert re.search(rf"^{target}:", rules, re.MULTILINE), target


def anchors(text: str) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.smoke
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for link in re.findall(r"\]\(([^)]+)\)", FENCED.sub("", PAGES[page])):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_front_page_and_docs_stay_short():
    words = {page.name: len(page.read_text(encoding="utf-8").split()) for page in DOCS}
    assert len(PAGES["README.md"].splitlines()) <= 120
    assert sum(words.values()) <= 14_000 and max(words.values()) <= 1200


def test_readme_and_the_index_lead_to_every_page():
    assert "](docs/README.md)" in PAGES["README.md"] and "](CONTRIBUTING.md)" in PAGES["README.md"]
    others = [page.name for page in DOCS if page != INDEX]
    assert [name for name in others if f"]({name}): " not in PAGES["docs/README.md"]] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_read_in_an_editor_and_on_the_site(page):
    """Lines of at most 120 characters, but for tables, pictures and what a command writes; comments
    of code in their line: in a window of 1,400 pixels, 116 are in one of docs/_static/site.css."""
    text = re.sub(r"<!-- \w+: begin.*?<!-- \w+: end -->", "", PAGES[page], flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "!["))]
    code = [line for _, block in FENCED.findall(PAGES[page]) for line in block.splitlines()]
    assert [line for line in lines if len(line) > 120 or "@@" in line] == []
    assert [line for line in code if " # " in line and len(line) > 116] == []


@pytest.mark.parametrize("page", sorted({*PAGES} - {"README.md"}))
def test_a_page_says_first_what_it_is_for(page):
    lines = PAGES[page].splitlines()
    assert lines[0].startswith("# ") and not lines[1] and lines[2]
    first_paragraph = PAGES[page].split("\n\n")[1]
    assert len(first_paragraph.split()) <= 40
    text = FENCED.sub("", PAGES[page]).splitlines()
    crowded = [
        line for line, after in zip(text, text[1:], strict=False) if line[:1] == "#" and after
    ]
    assert crowded == []


# What this project used to say -> what PyTorch's and scikit-learn's docs would say.
DIALECT = {
    r"\bcards?\b": "GPU",
    r"\bbeside\b": "next to, compared with",
    r"\bstands?\b": "is",
    r"\brooms?\b": "module; memory, space",
    r"\bbut for\b": "except",
    r"\b(not|never) seen to\b": "did not",
    r"\banew\b": "again",
    r"\bmend(s|ed)?\b": "fix",
    r"\bnames? (more|fewer)\b": "zero-shot accuracy is higher, lower",
    r"\bnot surely\b": "is not significant",
    r"\bnot counted\b": "not counting",
}
MODEL_CARD = re.compile(r"\bmodel cards?\b")


def helps() -> dict[str, str]:
    """What --help-all prints, by command."""
    return {name: parser().format_help() for name, parser in PARSERS.items() if name != "openclip"}


def templates() -> dict[str, str]:
    """What the pages of protoclip say, without the names in their code."""
    files = (ROOT / "protoclip" / "report").glob("*.j2")
    code = re.compile(r"\{[{%].*?[}%]\}", re.DOTALL)
    return {file.name: code.sub("", file.read_text(encoding="utf-8")) for file in files}


def messages() -> str:
    """What protoclip may print: its strings of several words, without docstrings."""
    strings = []
    for file in sorted([*(ROOT / "protoclip").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        docstrings = [node.value for node in nodes if isinstance(node, ast.Expr)]
        strings += [
            node.value
            for node in nodes
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
            if node not in docstrings
        ]
    return "\n".join(strings)


def public_docstrings() -> str:
    """The API pages."""
    names = [getattr(protoclip, name) for name in protoclip.__all__]
    return "\n".join(inspect.getdoc(value) or "" for value in names)


WORDS = PAGES | helps() | templates()
WORDS |= {"messages": messages(), "API": public_docstrings()}
WORDS |= {name: (ROOT / name).read_text() for name in ("Makefile", "CHANGELOG.md")}


@pytest.mark.smoke
@pytest.mark.parametrize("text", sorted(WORDS))
def test_no_dialect(text):
    prose = MODEL_CARD.sub("", FENCED.sub("", WORDS[text]))
    found = {
        match[0]: instead
        for pattern, instead in DIALECT.items()
        for match in re.finditer(pattern, prose, re.IGNORECASE)
    }
    assert found == {}


@pytest.mark.parametrize("text", sorted(WORDS))
def test_one_style_of_per_cent(text):
    """5 %, as most pages have it; format specifications of code would write 5%."""
    assert re.findall(r".*\d%.*", FENCED.sub("", WORDS[text])) == []


def test_no_code_writes_another_style_of_per_cent():
    files = [
        path
        for folder in ("protoclip", "kernels", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".j2")
    ]
    assert [path.name for path in files if re.search(r":[.,\d]*%\}", path.read_text())] == []


def test_readme_says_which_backends_an_op_has():
    lines = [line for line in PAGES["README.md"].splitlines() if line.startswith("| `")]
    rows = [cells for line in lines if len(cells := line.split("|")[1:-1]) == 5]
    ops = {"SigLipLoss": "sigmoid_loss"} | {op: op for op in TABLE if op != "sigmoid_loss"}
    told = {
        ops[name]: {
            b for b, cell in zip(("cpu", "triton", "cuda"), row[2:], strict=True) if cell.strip()
        }
        for row in rows
        for name in re.findall(r"`(\w+)`", row[0])
        if name in ops
    }
    assert told == {op: set(TABLE[op]) - {"reference"} for op in ops.values()}


def kept_mib(criterion, n: int) -> float:
    """What autograd keeps of a loss of n pairs of 512 fp32 features for its backward pass."""
    image, text = (torch.nn.functional.normalize(torch.randn(n, 512), dim=1) for _ in range(2))
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    scale = torch.tensor(14.3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        criterion(image.requires_grad_(), text.requires_grad_(), scale)
    return sum(kept.values()) / 2**20


FIRST_SCREEN = " ".join(" ".join(PAGES["README.md"].splitlines()[:25]).split())
NEWEST = newest_cpu(RECORDS)


def recorded(op: str, phase: str, shape: dict[str, int], dtype: str) -> dict[str, Any]:
    """Rows of a case in the newest record of a CPU, by variant."""
    return {
        row["variant"]: row
        for row in NEWEST["rows"]
        if (row["op"], row["phase"], row["dtype"]) == (op, phase, dtype) and row["shape"] == shape
    }


def test_readme_begins_with_what_a_loss_keeps():
    """By default, as users have it."""
    if reason := protoclip.backends("info_nce")["cpu"]:
        pytest.skip(reason)
    assert "`criterion = protoclip.ClipLoss() # was: open_clip.loss.ClipLoss()`" in FIRST_SCREEN
    pattern = (
        r"keeps (\d+) MiB for the backward pass of ([\d,]+) pairs of 512 fp32 features, OpenCLIP's "
        r"(\d+), at the same values.*? At ([\d,]+) pairs a CPU.*? keeps (\d+) MiB, OpenCLIP (\d+) "
    )
    ours, n, theirs, *half = re.search(pattern, FIRST_SCREEN).groups()
    for size, us, them in ((n, ours, theirs), half):
        pairs = int(size.replace(",", ""))
        assert round(kept_mib(protoclip.ClipLoss(), pairs)) == int(us)
        assert round(kept_mib(open_clip.loss.ClipLoss(), pairs)) == int(them)


def test_readme_begins_with_k_means_of_rows_on_disk():
    """The newest record, which names the machine."""
    shape = {"N": 2_000_000, "K": 1000, "D": 256}
    rows = recorded("kmeans", "5 iterations, fp16 rows on disk", shape, "fp32")
    ours = rows["protoclip-auto"]
    mib = {name: f"{row['peak_mib']:,.0f}" for name, row in rows.items()}
    assert '`protoclip.kmeans("features/", 1000)`' in FIRST_SCREEN
    assert (
        f"2,000,000 rows of 256 numbers take {mib['protoclip-auto']} MiB of memory (in memory: "
        f"{mib['protoclip-auto, in memory']}; faiss: {mib['faiss.Kmeans, in memory']}), and five "
        f"iterations {ours['median_ms'] / 1000:.1f} s (`init=`, `num_iters=5, tol=0`;"
    ) in FIRST_SCREEN
    maker = NEWEST["runs"][ours["run"]]["machine"].partition(" (")[0]
    assert f"`num_iters=5, tol=0`; {maker}, 2 cores)" in FIRST_SCREEN


def test_readme_begins_with_how_to_install_and_what_is_missing():
    assert "pip install -e ." in FIRST_SCREEN and "No GPU has been timed yet" in FIRST_SCREEN


def test_readme_says_at_which_size_torch_compile_is_slower():
    """On the machine of the chart, as the tables of the records round it."""
    large, small = (recorded("info_nce", "both", {"N": n, "D": 512}, "bf16") for n in (4096, 256))
    compiled = digits(large["torch.compile"]["ratio"], 2)
    assert (
        f"On this machine, 4,096 pairs of bf16 features take `torch.compile` {compiled} times as "
        f"long (InfoNCE and gradient), OpenCLIP {digits(large['open_clip']['ratio'], 2)} times; "
        f"256 pairs take `torch.compile` {digits(small['torch.compile']['ratio'], 2)} times."
    ) in " ".join(PAGES["README.md"].split())


def test_the_page_of_many_gpus_says_what_plan_says(capsys):
    page = PAGES["docs/many-gpus.md"]
    (command,) = (words for name, words in shown(page) if name == "plan" and words)
    rows = re.findall(r"^\|((?: [\d.,]+ \|){6})$", page, re.MULTILINE)
    assert len(rows) == 4
    for row in rows:
        gpus, batch, k, steps, *gib = (
            cell.strip().replace(",", "") for cell in row.split("|")[:-1]
        )
        size = int(steps) * int(batch)
        own = ["--ranks", gpus, "--k", k, "--episode-size", str(size), "--json"]
        assert plan.main([*command, *own]) == 0
        planned = json.loads(capsys.readouterr().out)
        memory = planned["memory_bytes"]
        loss = memory["gathered features"] + memory["InfoNCE scratch"]
        assert planned["global_batch"] == int(batch)
        assert [f"{sum(memory.values()) / 2**30:.1f}", f"{loss / 2**30:.2f}"] == gib
