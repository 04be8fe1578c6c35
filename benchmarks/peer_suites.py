"""Peers' own test suites with our losses in place of theirs: what passes, and whose fault it is.

Run from the root of this repository, for checkouts of the peers:

    python -m benchmarks.peer_suites open_clip=PATH lightly=PATH sentence_transformers=PATH --write

Each suite runs twice, as it is and with our classes in place before its tests are imported. A test
that fails both times is the peer's or the environment's (no network, another version); one that
fails only with ours is ours, unless it asks for what we keep private or refuse. ``--write`` puts
these rows into benchmarks/results/peer_suites.md. lightly's tests need requests and pytest-mock.
sentence-transformers' tests load models from a hub; both runs give them one of random weights.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import protoclip

PAGE = Path(__file__).parent / "results" / "peer_suites.md"
SUITE = "PROTOCLIP_PEER"  # in the tests' process: the suite that runs
OURS = "PROTOCLIP_PEER_OURS"  # in the tests' process: whether its classes are replaced


def replace_open_clip() -> None:
    import open_clip
    from open_clip import factory, loss

    for name in ("ClipLoss", "SigLipLoss", "CoCaLoss", "DistillClipLoss"):
        for module in (open_clip, factory, loss):
            if hasattr(module, name):
                setattr(module, name, getattr(protoclip.losses, name))


def replace_lightly() -> None:
    import lightly.loss
    from lightly.loss import dcl_loss, ntx_ent_loss

    class NTXentLoss(ntx_ent_loss.NTXentLoss):
        def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
            x, y = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
            scale = 1 / self.temperature
            y, queue = self.memory_bank.forward(y, update=out0.requires_grad)
            if queue is None:
                return protoclip.nt_xent(x, y, scale)
            positive = scale * (x * y).sum(dim=1)
            left_out = torch.full((len(x),), -100, device=x.device)
            keys = queue.T.to(x.device)
            level, _ = protoclip.contrastive_parts(x, keys, scale, positives=left_out)
            return (torch.logaddexp(level, positive) - positive).mean()

    class DCLLoss(dcl_loss.DCLLoss):
        def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
            if self.weight_fn is not None:  # DCLW
                return super().forward(out0, out1)
            x, y = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
            return protoclip.nt_xent(x, y, 1 / self.temperature, decoupled=True)

    for module in (lightly.loss, ntx_ent_loss):
        module.NTXentLoss = NTXentLoss
    for module in (lightly.loss, dcl_loss):
        module.DCLLoss = DCLLoss


def replace_pytorch_metric_learning() -> None:
    from pytorch_metric_learning import distances, losses, reducers

    def is_special(loss: Any, labels: Any, indices_tuple: Any, reducer: type) -> bool:
        is_plain = type(loss.distance) is distances.CosineSimilarity
        is_plain = is_plain and type(loss.reducer) is reducer
        return labels is None or indices_tuple is not None or not is_plain

    def pairs_of(emb: Tensor, labels: Tensor, ref_emb: Any, ref_labels: Any) -> dict[str, Any]:
        itself = torch.arange(len(emb), device=emb.device)
        x = F.normalize(emb, dim=1)
        keys = x if ref_emb is None else F.normalize(ref_emb, dim=1)
        return {
            "queries": x,
            "keys": keys,
            "query_ids": labels.to(x.device),
            "key_ids": (labels if ref_emb is None else ref_labels).to(x.device),
            "exclude": itself if ref_emb is None else None,
        }

    class SupConLoss(losses.SupConLoss):
        def forward(
            self, embeddings: Tensor, labels: Any = None, indices_tuple: Any = None,
            ref_emb: Any = None, ref_labels: Any = None,
        ) -> Tensor:  # fmt: skip
            if is_special(self, labels, indices_tuple, reducers.AvgNonZeroReducer):
                return super().forward(embeddings, labels, indices_tuple, ref_emb, ref_labels)
            pairs = pairs_of(embeddings, labels, ref_emb, ref_labels)
            if bool((pairs["query_ids"][:, None] == pairs["key_ids"]).all()):
                return 0 * embeddings.sum()  # its rule: without a negative there is no loss
            rows = protoclip.contrastive(
                **pairs, logit_scale=1 / self.temperature, same_id="positive", reduction="none"
            )
            return (rows.sum() / (rows > 0).sum().clamp_min(1)).to(embeddings.dtype)

    class NTXentLoss(losses.NTXentLoss):
        def forward(
            self, embeddings: Tensor, labels: Any = None, indices_tuple: Any = None,
            ref_emb: Any = None, ref_labels: Any = None,
        ) -> Tensor:  # fmt: skip
            if is_special(self, labels, indices_tuple, reducers.MeanReducer):
                return super().forward(embeddings, labels, indices_tuple, ref_emb, ref_labels)
            pairs = pairs_of(embeddings, labels, ref_emb, ref_labels)
            scale = 1 / self.temperature
            left_out = torch.full((len(embeddings),), -100, device=embeddings.device)
            level, _ = protoclip.contrastive_parts(**pairs, logit_scale=scale, positives=left_out)
            same = pairs["query_ids"][:, None] == pairs["key_ids"]
            if ref_emb is None:
                same.fill_diagonal_(False)
            query, key = same.nonzero(as_tuple=True)
            positive = scale * (pairs["queries"][query] * pairs["keys"][key]).sum(dim=1)
            positive = positive.to(level.dtype)
            losses_of_pairs = torch.logaddexp(level[query], positive) - positive
            total = losses_of_pairs.sum() / max(len(query), 1)
            return (total + 0 * embeddings.sum()).to(embeddings.dtype)

    losses.SupConLoss = losses.supcon_loss.SupConLoss = SupConLoss
    losses.NTXentLoss = losses.ntxent_loss.NTXentLoss = NTXentLoss


def replace_sentence_transformers() -> None:
    from sentence_transformers.sentence_transformer import losses

    for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        setattr(losses, name, getattr(protoclip.sentence_transformers, name))


def use_a_small_model() -> None:
    """A BERT of random weights in place of every model that sentence-transformers' tests load."""
    from sentence_transformers import SentenceTransformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = Path(tempfile.mkdtemp())
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=512,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    original = SentenceTransformer.__init__

    def from_the_folder(self: Any, name: str | None = None, *args: Any, **options: Any) -> None:
        original(self, name if name is None else str(folder), *args, **options)

    SentenceTransformer.__init__ = from_the_folder


@dataclass(frozen=True)
class Suite:
    """Some tests of a peer; ``source``: where its package is in the checkout."""

    tests: tuple[str, ...]
    replace: Callable[[], None]
    source: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] | None = None  # before both runs
    # Part of a test's name or message -> what it asks for, which we do not give.
    excused: Mapping[str, str] = field(default_factory=dict)


SUITES = {
    "open_clip": Suite(
        tests=(
            "tests/test_loss.py",
            "tests/test_siglip_chunked_loss.py",
            "tests/test_clap_task.py",
            "tests/test_factory_task.py",
            "tests/test_task_base_unit.py",
            "tests/test_task_specific_unit.py",
        ),
        replace=replace_open_clip,
        source="src",
        excused={
            "'SigLipLoss' object has no attribute '_loss'": (
                "OpenCLIP's private `SigLipLoss._loss`, to compare it with and without chunks"
            ),
        },
    ),
    "pytorch_metric_learning": Suite(
        tests=("tests/losses/test_ntxent_loss.py", "tests/losses/test_losses_without_labels.py"),
        replace=replace_pytorch_metric_learning,
        source="src",
        environment={"TEST_DEVICE": "cpu"},
    ),
    "lightly": Suite(
        tests=("tests/loss/test_ntx_ent_loss.py", "tests/loss/test_dcl_loss.py"),
        replace=replace_lightly,
        excused={"of at least 0, got -1;": "a negative temperature, which we refuse"},
    ),
    "sentence_transformers": Suite(
        tests=(
            "tests/sentence_transformer/losses/test_cmnrl.py",
            "tests/sentence_transformer/losses/test_gradcache.py",
            "tests/sentence_transformer/losses/test_merged_forward.py",
            "tests/sentence_transformer/losses/test_adaptive_layer.py",
        ),
        replace=replace_sentence_transformers,
        prepare=use_a_small_model,
        excused={"the test premise requires reduced-precision": "a loss in bf16; ours is in fp32"},
    ),
}


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin of the peer's tests."""
    if name := os.environ.get(SUITE):
        suite = SUITES[name]
        if suite.prepare is not None:
            suite.prepare()
        if os.environ[OURS] == "yes":
            suite.replace()


class Outcomes(NamedTuple):
    """Of one run of a suite."""

    passed: set[str]
    skipped: set[str]
    failed: dict[str, str]  # test -> its message


def run(name: str, checkout: Path, with_ours: bool) -> Outcomes:
    """Run the tests of a suite that the checkout has."""
    suite = SUITES[name]
    tests = [test for test in suite.tests if (checkout / test).exists()]
    if not tests:
        raise SystemExit(f"{name}: expected a checkout with {suite.tests[0]}, got {checkout}")
    paths = [str(checkout / suite.source), str(PAGE.parent.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    environment |= {SUITE: name, OURS: "yes" if with_ours else "no", **suite.environment}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.peer_suites"]
        command += ["-p", "no:cacheprovider", "-o", "addopts=", f"--junitxml={report}", *tests]
        subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL)
        if not report.exists():
            raise SystemExit(f"{name}: pytest could not start; its message is above")
        cases = ElementTree.parse(report).getroot().iter("testcase")
        outcomes = Outcomes(set(), set(), {})
        for case in cases:
            test = f"{case.get('classname')}.{case.get('name')}"
            faults = [fault for tag in ("failure", "error") for fault in case.findall(tag)]
            if faults:
                outcomes.failed[test] = f"{faults[0].get('message')} {faults[0].text}"
            elif case.find("skipped") is not None:
                outcomes.skipped.add(test)
            else:
                outcomes.passed.add(test)
    return outcomes


class Result(NamedTuple):
    """A row of the table."""

    name: str
    commit: str
    ours: Outcomes
    failed_alone: list[str]
    excused: dict[str, list[str]]  # reason -> tests
    faults: list[str]  # ours


def compare(name: str, checkout: Path) -> Result:
    """Run a suite without and with our classes."""
    git = ["git", "-C", str(checkout), "rev-parse", "--short=7", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    alone = run(name, checkout, with_ours=False)
    ours = run(name, checkout, with_ours=True)
    excused: dict[str, list[str]] = {}
    faults = []
    for test, message in ours.failed.items():
        reasons = [why for words, why in SUITES[name].excused.items() if words in test + message]
        if test in alone.failed:
            continue
        if reasons:
            excused.setdefault(reasons[0], []).append(test)
        else:
            faults.append(test)
    failed_alone = sorted(ours.failed.keys() & alone.failed.keys())
    return Result(name, commit, ours, failed_alone, excused, faults)


INTRODUCTION = """# Peers' own test suites with our losses

Written by `make peers`.

"""
HEAD = (
    "| Suite | Commit | Passed | Skipped | Failed | Also fails without protoclip | Needs "
    "unsupported internals | protoclip bug |",
    "|---|---|---|---|---|---|---|---|",
)


def lines_of(result: Result) -> list[str]:
    """The row of a suite, and a note for each test that fails with ours, or for many of a kind."""
    excused = sum(map(len, result.excused.values()))
    lines = [
        f"| {result.name} | {result.commit} | {len(result.ours.passed)} | "
        f"{len(result.ours.skipped)} | {len(result.ours.failed)} | {len(result.failed_alone)} "
        f"| {excused} | {len(result.faults)} |"
    ]
    for reason, tests in result.excused.items():
        ask = "tests ask" if len(tests) > 1 else "test asks"
        lines.append(f"- {result.name}: {len(tests)} {ask} for {reason}.")
    lines += [f"- {result.name}, also without protoclip: `{test}`" for test in result.failed_alone]
    lines += [f"- {result.name}, ours: `{test}`" for test in result.faults]
    return lines


def suite_of(line: str) -> str:
    """The suite of a row or a note; "" for any other line."""
    match = re.match(r"(?:\| (\w+) \||- (\w+)[:,])", line)
    name = (match[1] or match[2]) if match else ""
    return name if name in SUITES else ""


def table(lines: list[str]) -> str:
    """The page's table and its notes, from those of the suites in any order."""
    names = list(SUITES)
    lines = sorted(lines, key=lambda line: names.index(suite_of(line)))
    rows = [line for line in lines if line.startswith("|")]
    notes = [line for line in lines if line.startswith("-")]
    return "\n".join([*HEAD, *rows, "", *notes]).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("suites", nargs="+", metavar="NAME=CHECKOUT", help=", ".join(SUITES))
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    args = parser.parse_args()
    checkouts = {}
    for word in args.suites:
        name, _, path = word.partition("=")
        if name not in SUITES or not Path(path).is_dir():
            parser.error(f"expected NAME=CHECKOUT with a name of {', '.join(SUITES)}, got {word}")
        checkouts[name] = Path(path).resolve()
    lines = []
    for name, checkout in checkouts.items():
        lines += lines_of(compare(name, checkout))
    print(table(lines))
    if args.write:
        old = PAGE.read_text(encoding="utf-8").splitlines()
        lines += [line for line in old if suite_of(line) not in ("", *checkouts)]
        PAGE.write_text(INTRODUCTION + table(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
