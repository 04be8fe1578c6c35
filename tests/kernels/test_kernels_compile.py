"""Facts of the compiled kernels, without a GPU: rows of the launch table keep their promise (every
row: ``make kernels``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from benchmarks.compile_report.report import Cost  # noqa: E402
from protoclip.kernels import launch  # noqa: E402

CARDS = (80, 86, 89, 90, 100, 120)  # all with rows of their own, and one that takes another's
# In fresh processes: kernels of the interpreter do not compile.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
REPORT = "benchmarks.compile_report"


def python(*arguments: str) -> str:
    """What a fresh process prints."""
    run = subprocess.run(
        [sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert run.stdout, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def costs() -> list[Cost]:
    """What ``make kernels`` finds of every kernel on Hopper in bf16, and of some on the others, on
    cards of 100 KiB those that take most; all forms and types take minutes."""
    forms = ("512 large", "small", "512 gradients", "ids", "rows", "all", "soft", "own")
    chosen = [f"sm_90 bf16 {form}" for form in forms]
    chosen += [f"sm_{arch} sigmoid_loss ids" for arch in (80, 89, 100)]
    chosen += ["sm_100 contrastive all bf16", "sm_90 clusters fp32 128"]
    chosen += ["sm_86 prototypes soft 256", "sm_120 clusters fp32 64", "sm_120 info_nce bf16 512"]
    chosen += ["sm_80 contrastive all bf16"]
    return [from_json(line) for line in json.loads(python("-m", REPORT, "--json", *chosen))]


def from_json(line: dict[str, Any]) -> Cost:
    return Cost(**line | {"tile": tuple(line["tile"])})


def matching(costs: list[Cost], **facts: object) -> list[Cost]:
    """The kernels that have these facts."""
    return [cost for cost in costs if facts.items() <= vars(cost).items()]


SPILL_NOTHING = {
    "info_nce_forward",
    "info_nce_gradient",
    "contrastive_gradient",
    "sigmoid_loss",
    "contrastive_forward",
}
MAY_SPILL = {  # but not in a loop
    "attention",
    "weights",
    "merge",
    "reference_extremes",
    "finish",
    "join_slices",
    "screen",
    "exact",
    "sum",
}


def test_every_kernel_and_architecture_is_compiled(costs: list[Cost]) -> None:
    assert {cost.kernel for cost in costs} >= SPILL_NOTHING | MAY_SPILL
    assert {cost.arch for cost in costs} == set(CARDS)


def test_rows_keep_their_promise(costs: list[Cost]) -> None:
    """No spills, the tensor core, shared memory and registers for the CTAs it counts on."""
    broken = [cost for cost in costs if cost.problems]
    if broken and launch.TRITON < (3, 9):
        assert all("local memory" in problem for cost in broken for problem in cost.problems)
        pytest.skip(f"rows are chosen for Triton 3.9; here {len(broken)} spill")
    assert broken == []
    spilled = {cost.kernel for cost in costs if cost.local_bytes}
    assert spilled <= MAY_SPILL


def test_a_wide_tile_is_for_those_who_fill_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "compiling_for", 90)
    rows = [torch.empty(n, 512, dtype=torch.bfloat16) for n in (1024, 8192)]
    assert [launch.choose("info_nce_gradient", x, x).block_m for x in rows] == [128, 256]


def test_two_ctas_compare_ids_or_centroids(costs: list[Cost]) -> None:
    """One CTA's other work runs while the other multiplies."""
    for kernel in ("contrastive_forward", "contrastive_gradient", "sigmoid_loss"):
        (cost,) = matching(costs, kernel=kernel, form="ids", arch=90)
        assert cost.ctas_per_sm >= 2
    passes = matching(costs, kernel="screen", dtype="fp32", arch=90)
    assert [cost.instruction for cost in passes] == ["wgmma", "wgmma"]
    assert all(cost.ctas_per_sm >= 2 for cost in passes)


def test_a_row_that_breaks_its_promise_is_named(answers: dict[str, Any]) -> None:
    """A tile of 256 x 128 on four warps cannot hold two CTAs, nor avoid spills."""
    problems = " ".join(answers["problems"])
    assert "bytes of local memory a thread" in problems
    assert "the row promises 2" in problems


def test_cards_without_rows_of_their_own_are_served_by_a_relative() -> None:
    relatives = {86: 89, 87: 89, 103: 100, 120: 120, 121: 120, 90: 90, 70: None, 75: None}
    assert {arch: launch.served_as(arch) for arch in relatives} == relatives
    for table in (*launch.HALF.values(), launch.ATTENTION, launch.CHUNKED):
        assert set(table) == set(launch.ARCHITECTURES)


def test_cards_that_cannot_run_the_kernels_are_refused_in_words() -> None:
    assert launch.why_not((8, 6)) is None
    assert "compute capability 8.0, this GPU has 7.5" in str(launch.why_not((7, 5)))
    assert "AMD" in str(launch.why_not((9, 4), hip="6.4"))


def test_a_card_that_is_too_old_beside_a_newer_one_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The backend was chosen for the current card."""
    monkeypatch.setattr(launch, "compiling_for", None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="cuda:1 has 7.5; pass backend='reference'"):
        launch.architecture(torch.device("cuda:1"))


def test_without_a_compiler_triton_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It builds its driver at the first launch, and the first loss would die there."""
    monkeypatch.delenv("CC", raising=False)
    assert launch.why_not((9, 0)) is None
    with monkeypatch.context() as patch:
        patch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
        assert "install python3-dev" in str(launch.why_not((9, 0)))
    headers = sysconfig.get_paths("posix_prefix")
    with monkeypatch.context() as patch:  # Debian's own Pythons
        patch.setattr(sysconfig, "get_default_scheme", lambda: "posix_local")
        patch.setattr(sysconfig, "get_paths", {"posix_prefix": headers}.__getitem__)
        assert launch.why_not((9, 0)) is None
    monkeypatch.setenv("PATH", "")
    assert "install gcc, or set CC" in str(launch.why_not((9, 0)))


def test_backends_say_so_where_path_is_empty() -> None:
    """On a machine whose card is claimed, in a process of its own: answers are kept."""
    code = (
        "import torch, protoclip\n"
        "torch.cuda.is_available = lambda: True\n"
        "torch.cuda.get_device_capability = lambda device=None: (9, 0)\n"
        "print(protoclip.backends('info_nce')['triton'])"
    )
    bare = {"PATH": "", "PROTOCLIP_DISABLE_JIT": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True)
    assert "C compiler" in run.stdout, run.stderr


ANSWERS = f"""
import json, torch
from {REPORT}.launches import Case, call, recording, variants
from {REPORT}.report import costs
from protoclip.kernels import contrastive, launch, waves
from protoclip.kernels import prototype_cross_entropy as prototypes

forms = [('info_nce', 'large', 'bf16', 512), ('contrastive', 'ids', 'bf16', 512),
    ('contrastive', 'all', 'fp16', 128), ('sigmoid_loss', 'ids', 'bf16', 512),
    ('sigmoid_loss', 'gradients', 'fp16', 128), ('prototypes', 'soft', 'bf16', 128),
    ('prototypes', 'hard', 'bf16', 512), ('clusters', 'own', 'fp32', 128),
    ('clusters', 'own', 'bf16', 64)]
calls = []
for arch in {CARDS}:
    for form in forms:
        with variants(arch) as asked:
            call(Case(arch, *form), 512)
            first = {{kernel: len(keys) for kernel, keys in asked.items()}}
            for n in (511, 508, 475):
                call(Case(arch, *form), n)
        again = {{kernel: len(keys) for kernel, keys in asked.items()}}
        calls.append(dict(form=form, arch=arch, first=first, again=again))

waves.SIDE, waves.GRADIENT_BYTES = 256, 256 * 256 * 2
n, x = 1027, torch.zeros(1031, 64, dtype=torch.bfloat16)
w, y = torch.ones(1031), torch.zeros(1027, dtype=torch.int64)
statistics = torch.ones(4, 1031)
with recording(90) as recorded:
    for offset in (0, 3):
        contrastive.contrastive_bwd(
            x[:n], x, w[0], offset, None, None, False, *3 * [None],
            row_statistics=statistics[:, :n], column_statistics=statistics,
            query_weight=w[:n], positive_mean_weight=None, key_weight=w, pair_weight=1.0)
    for _ in range(3):
        prototypes.prototype_cross_entropy_fwd(
            x[:n], x, x, y, w[0], True, False, False, 'mean')
codes = [(kernel.name, id(kernel.code)) for kernel in recorded]

row = launch.Launch(256, 128, 64, warps=4, stages=3, ctas_per_sm=2)  # last: it stays
launch.HALF['sigmoid_loss'][90] = row
spilling = costs(Case(90, 'sigmoid_loss', 'loss', 'bf16', 128))
problems = [problem for cost in spilling for problem in cost.problems]
print(json.dumps(dict(problems=problems, calls=calls, codes=codes)))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """Of one process, as importing Triton takes longer than most of them."""
    return json.loads(python("-c", ANSWERS))


def test_a_last_batch_compiles_nothing_again(answers: dict[str, Any]) -> None:
    """N - 1, N - 4 and N - 37 are divisible by other powers of two. Nothing is compiled: of each
    form of a launcher's calls, the numbers of variants by kernel, of a whole batch and after."""
    calls = answers["calls"]
    assert len(calls) == 9 * len(CARDS) and all(call["first"] for call in calls)
    assert [call for call in calls if call["again"] != call["first"]] == []


def test_every_card_launches_the_same_kernels(answers: dict[str, Any]) -> None:
    calls = answers["calls"]
    on_hopper = {tuple(call["form"]): call["first"] for call in calls if call["arch"] == 90}
    assert [call for call in calls if call["first"] != on_hopper[tuple(call["form"])]] == []


def test_no_slice_compiles_again(answers: dict[str, Any]) -> None:
    """Another alignment of a vector, another first tile or chunk: the same compiled kernel."""
    codes: dict[str, list[int]] = {}
    for kernel, compiled_code in answers["codes"]:
        codes.setdefault(kernel, []).append(compiled_code)
    gradients = codes["info_nce_gradient_kernel"]
    assert len(gradients) > 20 and len(set(gradients)) == 1
    attention = codes["attention_kernel"]
    assert len(attention) == 3 and len(set(attention)) == 1
