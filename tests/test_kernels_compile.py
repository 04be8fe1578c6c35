"""Facts of the compiled kernels, without a GPU: rows of the launch table keep their promise (every
row: ``make kernels``), and the hot paths on Hopper spend their time as it says."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
# In fresh processes: kernels of the interpreter do not compile.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
REPORT = "protoclip.kernels.compile_report"


def _python(*arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert run.stdout, run.stderr
    return run.stdout


K_MEANS = "sm_90 clusters fp32 128"
SPILL_NOTHING = {
    "info_nce_forward",
    "info_nce_gradient",
    "sigmoid",
    "contrastive_forward",
    "contrastive_gradient",
}


@pytest.fixture(scope="module")
def costs():
    """What ``make kernels`` finds of every kernel on Hopper in bf16, and of some on the others; all
    forms and types take minutes."""
    forms = "large", "gradients", "ids", "all", "soft", "own", "128", "256"
    others = [*(f"sm_{arch} sigmoid ids" for arch in (80, 89, 100)), "sm_100 contrastive all bf16"]
    return json.loads(
        _python("-m", REPORT, "--json", *(f"sm_90 bf16 {f}" for f in forms), *others, K_MEANS)
    )


def test_rows_keep_their_promise(costs):
    """No spills, the tensor core, shared memory and registers for the CTAs it counts on."""
    others = {
        "attention",
        "weights",
        "info_nce_merge",
        "info_nce_extremes",
        "finish",
        "join_slices",
    }
    others |= {"screen", "exact", "sum"}
    assert {c["kernel"] for c in costs} >= SPILL_NOTHING | others
    assert {c["arch"] for c in costs} == {80, 89, 90, 100}
    assert [c for c in costs if c["problems"]] == []
    for c in costs:
        assert c["local_bytes"] == 0 or c["kernel"] in others, c  # of which none is in a loop


# Hopper. depth, kernel -> form, exponentials a thread, least busy share of the tensor cores where
# CTAs overlap without loss, most shared memory and shuffle time as a share of the products'.
HOT = {
    (512, "info_nce_forward"): ("large", 128, 0.95, 0.25),
    (512, "info_nce_gradient"): ("large", 128, 0.60, 0.25),
    (128, "info_nce_forward"): ("large", 128, 0, None),
    (128, "info_nce_gradient"): ("large", 128, 0, None),
    (128, "attention"): ("soft", 66, 0.80, 0.25),  # two to rescale its rows
    (256, "attention"): ("soft", 34, 0.90, 0.25),
}
BARRIERS = 8
# Kernels of ids -> form, exponentials (and divisions), most barriers after the products, CTAs.
SLOWER = {
    "contrastive_forward": ("ids", 128, 41, 2),
    "contrastive_gradient": ("ids", 128, 8, 2),
    "sigmoid": ("ids", 96, 9, 2),  # three sums
}


@pytest.mark.parametrize("depth, kernel", HOT)
def test_hot_paths_on_hopper(costs, depth, kernel):
    import triton

    if not triton.__version__.startswith("3.9"):
        pytest.skip(f"the counts are those of Triton 3.9, this is {triton.__version__}")
    form, exponentials, busy, shared = HOT[depth, kernel]
    case = {"form": form, "arch": 90, "dtype": "bf16", "depth": depth}
    (cost,) = (c for c in costs if c["kernel"] == kernel and case.items() <= c.items())
    counts = cost["counts"]
    assert exponentials <= counts["MUFU"] <= 1.05 * exponentials
    assert counts["LDG"] == 0 and counts["F2F"] == 0 and cost["local_in_loops"] == 0
    assert counts["BAR"] <= BARRIERS
    assert cost["busy"] >= busy
    if shared is not None:
        port_clk = 4 * (counts["SHFL"] + counts["LDS"] + counts["STS"]) * cost["warps"] / 4
        assert port_clk <= shared * cost["clk"][1]


@pytest.mark.parametrize("kernel", SLOWER)
def test_ids_cost_no_masks_where_a_tile_has_no_pair(costs, kernel):
    import triton

    if not triton.__version__.startswith("3.9"):
        pytest.skip(f"the counts are those of Triton 3.9, this is {triton.__version__}")
    form, exponentials, barriers, ctas = SLOWER[kernel]
    (cost,) = (c for c in costs if c["kernel"] == kernel and (c["arch"], c["form"]) == (90, form))
    counts = cost["counts"]
    assert exponentials <= counts["MUFU"] <= 1.05 * exponentials
    assert counts["LDG"] == 0 and counts["BAR"] <= barriers and cost["ctas_per_sm"] >= ctas


def test_ids_cost_at_most_half_as_much_again(costs):
    """By the model at N = 32,768, D = 512, with the products that both share, at 660 TFLOP/s."""

    def predicted_ms(op, form):
        case = {"op": op, "form": form, "depth": 512, "arch": 90}
        bounds = [c["bound"] for c in costs if case.items() <= c.items() and c["bound"]]
        assert bounds
        return sum(ms for ms, *_ in bounds) + 4 * 32_768**2 * 512 / 660e9

    assert predicted_ms("contrastive", "ids") <= 1.5 * predicted_ms("info_nce", "large")
    assert predicted_ms("sigmoid", "ids") <= 1.5 * predicted_ms("sigmoid", "gradients")


def test_a_tile_of_centroids_costs_no_reduction(costs):
    """Both passes of k-means in fp32: no shuffle, and the barriers of the products alone."""
    passes = [c for c in costs if c["kernel"] == "screen" and c["dtype"] == "fp32"]
    assert [c["instruction"] for c in passes] == ["wgmma", "wgmma"]
    for cost in passes:
        assert cost["ctas_per_sm"] >= 2 and cost["counts"]["SHFL"] == 0
        assert cost["counts"]["BAR"] <= BARRIERS


def test_the_model_meets_public_measurements(costs):
    """Plain products: 498 TFLOP/s at 128 x 128, where L2 is the bound, 704 at 128 x 256; and
    attention without specialised warps."""
    tiles = {c["form"]: c for c in costs if c["kernel"] == "gemm"}
    for form, best in (("128", 498), ("256", 704)):
        cost = tiles[form]
        before, products, after = cost["clk"]
        assert before + after < 0.05 * products
        assert abs(cost["bound"][1] / best - 1) < 0.3
    (attention,) = (
        c for c in costs if (c["kernel"], c["depth"], c["form"]) == ("attention", 128, "soft")
    )
    assert 407 <= attention["bound"][1] <= 487  # of the class that it is in


def test_a_row_that_breaks_its_promise_is_named():
    """A tile of 256 x 128 on four warps cannot hold two CTAs, nor avoid spills."""
    code = (
        f"from {REPORT}.report import Case, costs\n"
        "from protoclip.kernels import launch\n"
        "row = launch.Launch(256, 128, 64, warps=4, stages=3, ctas_per_sm=2)\n"
        "launch.HALF['sigmoid'][90] = row\n"
        "print([c.problems for c in costs(Case(90, 'sigmoid', 'loss', 'bf16', 128))])"
    )
    found = _python("-c", code)
    assert "bytes of local memory a thread" in found and "the row promises 2" in found


def test_cards_without_rows_of_their_own():
    """Relatives' rows serve them; what cannot run is refused in words."""
    from protoclip.kernels import launch

    relatives = {86: 89, 87: 89, 103: 100, 120: 89, 121: 89, 90: 90, 70: None, 75: None}
    assert {arch: launch.served_as(arch) for arch in relatives} == relatives
    assert launch.why_not((8, 6)) is None
    assert "compute capability 8.0, this card has 7.5" in launch.why_not((7, 5))
    assert "AMD" in launch.why_not((9, 4), hip="6.4")
    for table in (*launch.HALF.values(), launch.ATTENTION, launch.CHUNKED):
        assert set(table) == set(launch.ARCHITECTURES)


def test_no_slice_compiles_again():
    """Another alignment of a vector, another first tile or chunk: the same compiled kernel."""
    code = (
        "import torch\n"
        f"from {REPORT}.launches import recording\n"
        "from protoclip.kernels import info_nce, waves\n"
        "from protoclip.kernels import prototype_cross_entropy as prototypes\n"
        "waves.SIDE, waves.SCRATCH_BYTES = 256, 256 * 256 * 2\n"
        "n, x = 1027, torch.zeros(1031, 64, dtype=torch.bfloat16)\n"
        "w, y = torch.ones(1031), torch.zeros(1027, dtype=torch.int64)\n"
        "with recording(90) as found:\n"
        "    for offset in (0, 3):\n"
        "        info_nce.info_nce_bwd(\n"
        "            x[:n], x, w[0], w[1:1028], w[:n], w, w, w[:n], w, offset)\n"
        "    prototypes.prototype_ce_fwd_banks(\n"
        "        x[:n], [x] * 3, [x] * 3, [y] * 3, w[0], True, False, False)\n"
        "for kernel in ('info_nce_gradient_kernel', 'attention_kernel'):\n"
        "    launched = [c.code for c in found if c.name == kernel]\n"
        "    print(len(launched), len({id(code) for code in launched}))"
    )
    launches, compiled, banks, compiled_banks = map(int, _python("-c", code).split())
    assert launches > 20 and banks == 3 and compiled == compiled_banks == 1
