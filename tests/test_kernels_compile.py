"""Facts of the compiled kernels, without a GPU: rows of the launch table keep their promise (every
row: ``make kernels``), and the hot paths on Hopper spend their time as it says."""

from __future__ import annotations

import heapq
import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from benchmarks.compile_report import model  # noqa: E402
from benchmarks.compile_report.model import Bound, Clk, Slice  # noqa: E402
from benchmarks.compile_report.report import Cost  # noqa: E402
from protoclip.kernels import launch  # noqa: E402

CARDS = (80, 86, 89, 90, 100, 120)  # all with rows of their own, and one that takes another's
# In fresh processes: kernels of the interpreter do not compile.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
REPORT = "benchmarks.compile_report"
counts_of_triton_3_9 = pytest.mark.xfail(
    not triton.__version__.startswith("3.9"),
    reason=f"the bounds were measured with Triton 3.9, this is {triton.__version__}",
    strict=False,  # another release may keep them
)


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
    forms = ("large", "small", "gradients", "ids", "few ids", "rows", "all", "few all")
    forms += ("soft", "own", "128", "256")
    chosen = [f"sm_90 bf16 {form}" for form in forms]
    chosen += [f"sm_{arch} sigmoid_loss ids" for arch in (80, 89, 100)]
    chosen += ["sm_100 contrastive all bf16", "sm_90 clusters fp32 128"]
    chosen += ["sm_86 prototypes soft 256", "sm_120 clusters fp32 64", "sm_120 info_nce bf16 512"]
    chosen += ["sm_80 contrastive all bf16"]
    return [from_json(line) for line in json.loads(python("-m", REPORT, "--json", *chosen))]


def from_json(line: dict[str, Any]) -> Cost:
    line["clk"] = Clk(*line["clk"])
    line["tile"] = tuple(line["tile"])
    if line["slice"] is not None:
        line["slice"] = Slice(*line["slice"])
    if line["bound"] is not None:
        line["bound"] = Bound(*line["bound"])
    return Cost(**line)


def matching(costs: list[Cost], **facts: object) -> list[Cost]:
    """The kernels that have these facts."""
    return [cost for cost in costs if facts.items() <= vars(cost).items()]


def only(costs: list[Cost], **facts: object) -> Cost:
    """The one kernel that has them."""
    matches = matching(costs, **facts)
    assert len(matches) == 1, f"{facts}: {len(matches)} kernels"
    return matches[0]


SPILL_NOTHING = {
    "info_nce_forward",
    "softmax_gradient",
    "sigmoid_loss",
    "contrastive_forward",
}
MAY_SPILL = {  # but not in a loop
    "attention",
    "weights",
    "info_nce_merge",
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
    assert [cost for cost in costs if cost.problems] == []
    spilled = {cost.kernel for cost in costs if cost.local_bytes}
    assert spilled <= MAY_SPILL


@dataclass(frozen=True)
class HotPath:
    """Of a kernel on Hopper in bf16: what its path of whole tiles may take."""

    kernel: str
    form: str
    depth: int
    exponentials: int  # of a thread
    least_busy: float = 0.0  # share of the tensor cores' time, if CTAs overlap without loss
    most_shared_time: float | None = None  # shared memory and shuffles, share of the products'


HOT_PATHS = [
    HotPath("info_nce_forward", "large", 512, 128, least_busy=0.95, most_shared_time=0.25),
    HotPath("softmax_gradient", "large", 512, 128, least_busy=0.60, most_shared_time=0.25),
    HotPath("info_nce_forward", "large", 128, 128),
    HotPath("softmax_gradient", "large", 128, 128),
    # Two of them rescale its rows.
    HotPath("attention", "soft", 128, 66, least_busy=0.80, most_shared_time=0.25),
    HotPath("attention", "soft", 256, 34, least_busy=0.90, most_shared_time=0.25),
]
MOST_BARRIERS = 8


def assert_one_exponential_an_element(cost: Cost, exponentials: int) -> None:
    assert exponentials <= cost.counts["MUFU"] <= 1.05 * exponentials


@counts_of_triton_3_9
@pytest.mark.parametrize("path", HOT_PATHS, ids=lambda path: f"{path.kernel}, {path.depth}")
def test_hot_paths_on_hopper_leave_the_time_to_the_products(
    costs: list[Cost], path: HotPath
) -> None:
    cost = only(costs, kernel=path.kernel, form=path.form, depth=path.depth, arch=90, dtype="bf16")
    counts = cost.counts
    assert_one_exponential_an_element(cost, path.exponentials)
    assert counts["LDG"] == 0 and counts["F2F"] == 0 and cost.local_in_loops == 0
    assert counts["BAR"] <= MOST_BARRIERS
    assert cost.busy is not None and cost.busy >= path.least_busy
    if path.most_shared_time is not None:
        port_clk = 4 * (counts["SHFL"] + counts["LDS"] + counts["STS"]) * cost.warps / 4
        assert port_clk <= path.most_shared_time * cost.clk.products


SLICED = ["info_nce_forward", "contrastive_forward", "softmax_gradient"]


@counts_of_triton_3_9
@pytest.mark.parametrize("kernel", SLICED)
def test_a_slice_loads_before_its_products(costs: list[Cost], kernel: str) -> None:
    """Once an element: 24 loads a thread after the products took 34 us of a tile."""
    chosen = matching(costs, kernel=kernel, arch=90, dtype="bf16")
    assert chosen
    for cost in chosen:
        assert cost.slice is not None and cost.slice.loads <= 4


def tile_clk(cost: Cost, masked: bool) -> float:
    """Of one tile on an SM of its own."""
    around = cost.masked if masked else cost.clk.before + cost.clk.after
    return 1.05 * cost.clk.products + around


@counts_of_triton_3_9
@pytest.mark.parametrize("depth", [128, 512])
@pytest.mark.parametrize("kernel", ["info_nce_forward", "softmax_gradient"])
def test_a_tile_of_the_diagonal_costs_little_more_than_others(
    costs: list[Cost], kernel: str, depth: int
) -> None:
    cost = only(costs, kernel=kernel, form="large", depth=depth, arch=90, dtype="bf16")
    assert tile_clk(cost, masked=True) <= 2 * tile_clk(cost, masked=False)


def span_us(cost: Cost, n: int) -> float:
    """Until the last of n x n pairs' tiles is done, each given to the SM that is free first, in the
    order of the grid (kernels/tiles.py)."""
    height, width = cost.tile
    groups = -(-n // (8 * height))
    tiles = [
        (8 * group + row, column)
        for group in range(groups)
        for column in range(-(-n // width))
        for row in range(min(8, -(-n // height) - 8 * group))
    ]
    free = [0.0] * model.SMS
    for row, column in tiles:
        begin, end = row * height, (row + 1) * height
        masked = begin < (column + 1) * width and column * width < end
        heapq.heapreplace(free, free[0] + tile_clk(cost, masked))
    return max(free) / model.CLOCK * 1e6


@counts_of_triton_3_9
@pytest.mark.parametrize(
    "n, form, most_us", [(1024, "small", 15), (4096, "large", 45), (8192, "large", 140)]
)
def test_the_gradient_of_few_pairs_fills_the_card(
    costs: list[Cost], n: int, form: str, most_us: float
) -> None:
    """34, 68 and 168 us where a tile of the diagonal went slice by slice."""
    cost = only(costs, kernel="softmax_gradient", form=form, depth=512, arch=90, dtype="bf16")
    assert span_us(cost, n) <= most_us


def test_a_wide_tile_is_for_those_who_fill_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "compiling_for", 90)
    rows = [torch.empty(n, 512, dtype=torch.bfloat16) for n in (1024, 8192)]
    assert [launch.choose("info_nce_gradient", x, x).block_m for x in rows] == [128, 256]


@counts_of_triton_3_9
def test_few_pairs_with_ids_wait_for_no_long_tile(costs: list[Cost]) -> None:
    """All tiles of the diagonal go slice by slice; of 128 x 128, four of 9,000 clk."""
    for kernel in ("contrastive_forward", "softmax_gradient"):
        cost = only(costs, kernel=kernel, form="few ids", arch=90)
        assert cost.slice is not None
        assert cost.slices * cost.slice.clk <= 16_000


@dataclass(frozen=True)
class PathWithIds:
    """Of a kernel on Hopper that compares ids, where a tile holds no equal pair."""

    kernel: str
    exponentials: int  # and divisions
    most_barriers: int  # after the products
    least_ctas: int = 2


PATHS_WITH_IDS = [
    PathWithIds("contrastive_forward", exponentials=128, most_barriers=12),
    PathWithIds("softmax_gradient", exponentials=128, most_barriers=8),
    PathWithIds("sigmoid_loss", exponentials=96, most_barriers=9),  # three sums
]


@counts_of_triton_3_9
@pytest.mark.parametrize("path", PATHS_WITH_IDS, ids=lambda path: path.kernel)
def test_ids_cost_no_masks_where_a_tile_has_no_pair(costs: list[Cost], path: PathWithIds) -> None:
    cost = only(costs, kernel=path.kernel, form="ids", arch=90)
    assert_one_exponential_an_element(cost, path.exponentials)
    assert cost.counts["LDG"] == 0 and cost.counts["BAR"] <= path.most_barriers
    assert cost.ctas_per_sm >= path.least_ctas


def predicted_ms(costs: list[Cost], op: str, form: str) -> float:
    """By the model at N = 32,768, D = 512, with the products that all share, at 660 TFLOP/s."""
    bounds = [cost.bound for cost in matching(costs, op=op, form=form, depth=512, arch=90)]
    ms = [bound.ms for bound in bounds if bound is not None]
    assert ms
    return sum(ms) + 4 * 32_768**2 * 512 / 660e9


def test_ids_cost_a_sixth_more_at_most(costs: list[Cost]) -> None:
    without_ids = predicted_ms(costs, "info_nce", "large")
    assert predicted_ms(costs, "contrastive", "ids") <= 1.15 * without_ids
    without_ids = predicted_ms(costs, "sigmoid_loss", "gradients")
    assert predicted_ms(costs, "sigmoid_loss", "ids") <= 1.2 * without_ids


def test_a_tile_of_centroids_costs_no_reduction(costs: list[Cost]) -> None:
    """Both passes of k-means in fp32: no shuffle, and the barriers of the products alone."""
    passes = matching(costs, kernel="screen", dtype="fp32", arch=90)
    assert [cost.instruction for cost in passes] == ["wgmma", "wgmma"]
    for cost in passes:
        assert cost.ctas_per_sm >= 2
        assert cost.counts["SHFL"] == 0 and cost.counts["BAR"] <= MOST_BARRIERS


# Columns of a tile -> the best of public measurements, TFLOP/s; of 128 x 128, L2 is the bound.
@pytest.mark.parametrize("columns, measured", [("128", 498), ("256", 704)])
def test_the_model_meets_public_measurements_of_plain_products(
    costs: list[Cost], columns: str, measured: float
) -> None:
    cost = only(costs, kernel="gemm", form=columns)
    assert cost.clk.before + cost.clk.after < 0.05 * cost.clk.products
    assert cost.bound is not None
    assert abs(cost.bound.tflops / measured - 1) < 0.3


def test_the_model_meets_public_measurements_of_attention(costs: list[Cost]) -> None:
    """Of kernels without specialised warps, the class that ours is in."""
    cost = only(costs, kernel="attention", depth=128, form="soft")
    assert cost.bound is not None
    assert 407 <= cost.bound.tflops <= 487


def test_a_row_that_breaks_its_promise_is_named() -> None:
    """A tile of 256 x 128 on four warps cannot hold two CTAs, nor avoid spills."""
    code = (
        f"from {REPORT}.report import Case, costs\n"
        "from protoclip.kernels import launch\n"
        "row = launch.Launch(256, 128, 64, warps=4, stages=3, ctas_per_sm=2)\n"
        "launch.HALF['sigmoid_loss'][90] = row\n"
        "print([c.problems for c in costs(Case(90, 'sigmoid_loss', 'loss', 'bf16', 128))])"
    )
    problems = python("-c", code)
    assert "bytes of local memory a thread" in problems
    assert "the row promises 2" in problems


def test_cards_without_rows_of_their_own_are_served_by_a_relative() -> None:
    relatives = {86: 89, 87: 89, 103: 100, 120: 120, 121: 120, 90: 90, 70: None, 75: None}
    assert {arch: launch.served_as(arch) for arch in relatives} == relatives
    for table in (*launch.HALF.values(), launch.ATTENTION, launch.CHUNKED):
        assert set(table) == set(launch.ARCHITECTURES)


def test_cards_that_cannot_run_the_kernels_are_refused_in_words() -> None:
    assert launch.why_not((8, 6)) is None
    assert "compute capability 8.0, this card has 7.5" in str(launch.why_not((7, 5)))
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


@dataclass(frozen=True)
class Asked:
    """Of one form of a launcher's calls on a card: kernel -> variants it is compiled for."""

    form: tuple[str, str, str, int]
    arch: int
    first: dict[str, int]  # by a whole batch
    again: dict[str, int]  # and by shorter ones


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    """N - 1, N - 4 and N - 37 are divisible by other powers of two. Nothing is compiled."""
    code = (
        "import json\n"
        f"from {REPORT}.launches import Case, call, variants\n"
        "forms = [('info_nce', 'large', 'bf16', 512), ('contrastive', 'ids', 'bf16', 512),\n"
        "    ('contrastive', 'all', 'fp16', 128), ('sigmoid_loss', 'ids', 'bf16', 512),\n"
        "    ('sigmoid_loss', 'gradients', 'fp16', 128), ('prototypes', 'soft', 'bf16', 128),\n"
        "    ('prototypes', 'hard', 'bf16', 512), ('clusters', 'own', 'fp32', 128),\n"
        "    ('clusters', 'own', 'bf16', 64)]\n"
        f"for arch in {CARDS}:\n"
        "    for form in forms:\n"
        "        with variants(arch) as asked:\n"
        "            call(Case(arch, *form), 512)\n"
        "            first = {kernel: len(keys) for kernel, keys in asked.items()}\n"
        "            for n in (511, 508, 475):\n"
        "                call(Case(arch, *form), n)\n"
        "        again = {kernel: len(keys) for kernel, keys in asked.items()}\n"
        "        print(json.dumps(dict(form=form, arch=arch, first=first, again=again)))"
    )
    return [Asked(**json.loads(line)) for line in python("-c", code).splitlines()]


def test_a_last_batch_compiles_nothing_again(asked: list[Asked]) -> None:
    assert len(asked) == 9 * len(CARDS) and all(call.first for call in asked)
    assert [call for call in asked if call.again != call.first] == []


def test_every_card_launches_the_same_kernels(asked: list[Asked]) -> None:
    on_hopper = {tuple(call.form): call.first for call in asked if call.arch == 90}
    assert [call for call in asked if call.first != on_hopper[tuple(call.form)]] == []


def test_no_slice_compiles_again() -> None:
    """Another alignment of a vector, another first tile or chunk: the same compiled kernel."""
    code = (
        "import json, torch\n"
        f"from {REPORT}.launches import recording\n"
        "from protoclip.kernels import info_nce, waves\n"
        "from protoclip.kernels import prototype_cross_entropy as prototypes\n"
        "waves.SIDE, waves.GRADIENT_BYTES = 256, 256 * 256 * 2\n"
        "n, x = 1027, torch.zeros(1031, 64, dtype=torch.bfloat16)\n"
        "w, y = torch.ones(1031), torch.zeros(1027, dtype=torch.int64)\n"
        "with recording(90) as recorded:\n"
        "    for offset in (0, 3):\n"
        "        info_nce.info_nce_bwd(\n"
        "            x[:n], x, w[0], w[1:1028], w[:n], w, w, w[:n], w, offset, 1.0)\n"
        "    for _ in range(3):\n"
        "        prototypes.prototype_cross_entropy_fwd(\n"
        "            x[:n], x, x, y, w[0], True, False, False, 'mean')\n"
        "print(json.dumps([[kernel.name, id(kernel.code)] for kernel in recorded]))"
    )
    codes: dict[str, list[int]] = {}
    for kernel, compiled_code in json.loads(python("-c", code)):
        codes.setdefault(kernel, []).append(compiled_code)
    gradients = codes["softmax_gradient_kernel"]
    assert len(gradients) > 20 and len(set(gradients)) == 1
    attention = codes["attention_kernel"]
    assert len(attention) == 3 and len(set(attention)) == 1
