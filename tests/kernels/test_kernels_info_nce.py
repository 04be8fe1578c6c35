"""Triton InfoNCE and sigmoid loss against the plain formulas, on a GPU or in the interpreter; and
how often they launch: below a few thousand pairs that is what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from budget import (
    Results,
    assert_results_within_budget,
    assert_same_bits,
    leaf,
    strip_gradients,
)
from kernel_features import DEVICE, features
from op_table import assert_as_formula, info_nce, weighted
from op_table import sigmoid_loss as sigmoid_loss_call
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import protoclip
from protoclip.kernels.results import PairStatistics
from protoclip.ops import sigmoid_loss
from protoclip.ops.sums import LN2

pytestmark = [
    pytest.mark.skipif(
        protoclip.backends("info_nce")["triton"] is not None,
        reason=str(protoclip.backends("info_nce")["triton"]),
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's, of inf and NaN
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_info_nce_within_budget(
    x: Tensor, y: Tensor, *, logit_scale: float, weight: float = 1.0, reduction: str = "none"
) -> None:
    """``weight``: of the results."""
    call = info_nce(x.cpu(), y.cpu(), logit_scale, reduction)
    assert_as_formula(weighted(call, weight), "triton", DEVICE)


# Tiles of the interpreter are 32 x 64, strips of 32 columns, features 32 at a time.
SHAPES = {
    "one pair: the loss is exactly 0": (1, 17),
    "no features: every pair alike": (3, 0),
    "two pairs, one feature": (2, 1),
    "one short of a tile": (63, 64),
    "tiles off the diagonal, all sizes ragged": (161, 43),
}
KINDS = ("alike", "cones", "opposite", "outcasts", "buried")
# Every kind of features in bf16 where there are several tiles (fp16: the kind whose sums overflow
# first), and of one tile with a diagonal in fp32; every other shape in every dtype, with one kind
# of features for each dtype.
SEVERAL_TILES = "tiles off the diagonal, all sizes ragged"
CASES = [
    pytest.param(*SHAPES[name], dtype, kind, id=f"{name}-{dtype}-{kind}")
    for name in SHAPES
    for dtype, first_kind in zip(DTYPES, ("cones", "outcasts", "buried"), strict=True)
    for kind in KINDS
    if kind == first_kind
    or (name == SEVERAL_TILES and dtype == torch.bfloat16)
    or (name == "one short of a tile" and dtype == torch.float32)
]


@pytest.mark.parametrize("n, d, dtype, kind", CASES)
def test_losses_and_gradients_are_within_budget(
    n: int, d: int, dtype: torch.dtype, kind: str
) -> None:
    x, y = features(n, d, kind, dtype)
    logit_scale = 14.3 if n == 63 else 100.0
    assert_info_nce_within_budget(x, y, logit_scale=logit_scale, weight=1 / n)


@pytest.mark.parametrize("logit_scale", [1.0, 0.0])
def test_any_scale_and_negative_weights_are_within_budget(logit_scale: float) -> None:
    x, y = features(100, 20, "alike", torch.float32)
    assert_info_nce_within_budget(x, y, logit_scale=logit_scale, weight=-0.5)


def test_the_weights_of_a_batch_of_a_million_are_within_budget_in_fp16() -> None:
    """G would be below fp16's smallest number."""
    x, y = features(100, 20, "cones", torch.float16)
    assert_info_nce_within_budget(x, y, logit_scale=240.0, weight=1e-6)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_loss_near_zero_keeps_its_gradient(dtype: torch.dtype) -> None:
    """The positive's entry is 1e-4 of its weight: rounded inside G it would be lost. What is left
    is the rounding of the other entries and of the result."""
    x = F.normalize(torch.eye(100) + 0.03 * torch.rand(100, 100)).to(dtype)
    got = info_nce(x, x, 15.0).results("triton", DEVICE)
    truth = info_nce(x.double(), x.double(), 15.0).results("reference")
    assert truth["result 0"].max() < 1e-3
    for name in ("dimage_features", "dtext_features"):
        error = (got[name].double() - truth[name]).abs().max() / truth[name].abs().max()
        assert error <= 2 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize(
    "reduction, few, dtype",
    [
        ("mean", 64, torch.bfloat16),
        ("mean", 1024, torch.float16),
        ("sum", 64, torch.float32),
        ("sum", 1024, torch.float16),
    ],
)
def test_mean_and_sum_are_within_budget(
    monkeypatch: pytest.MonkeyPatch, reduction: str, few: int, dtype: torch.dtype
) -> None:
    """The sum of the losses from one program or several, whose gradient looks for the extremes of
    its references first; one upstream gradient for all pairs."""
    from protoclip.kernels import contrastive as kernels

    monkeypatch.setattr(kernels, "ONE_PROGRAM", few)
    monkeypatch.setattr(kernels, "FEW", few)
    x, y = features(100, 24, "cones", dtype)
    assert_info_nce_within_budget(x, y, logit_scale=14.3, weight=-2.5, reduction=reduction)


def computed_strip(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: float,
    offset: int,
    columns: bool,
    row_weight: Tensor,
    column_weight: Tensor,
) -> Results:
    from protoclip.kernels import contrastive as kernels

    scale = torch.tensor(logit_scale, device=DEVICE)
    names = ("own_key", "exclude", "query_ids", "key_ids", "key_bias")
    pairs: dict[str, Any] = dict.fromkeys(names) | {"offset": offset, "same_positive": False}
    strip = kernels.contrastive_fwd(
        x, y, scale, **pairs, both_directions=columns, pair_weight=1.0, summed=False
    )
    gradients = kernels.contrastive_bwd(
        x,
        y,
        scale,
        **pairs,
        row_statistics=strip.row_statistics,
        column_statistics=strip.column_statistics,
        query_weight=row_weight,
        positive_mean_weight=None,
        key_weight=column_weight,
        pair_weight=1.0,
    )
    rows = PairStatistics._make(strip.row_statistics[:, : len(x)])
    by_column = PairStatistics._make(strip.column_statistics[:, : len(y)])
    return {
        "row level": LN2 * (rows.reference + rows.sum.log2()),
        "column level": LN2 * (by_column.reference + by_column.sum.log2()),
        "positive": LN2 * rows.positive_sum,
        "dx": gradients.dx,
        "dy": gradients.dy,
        "dlogit_scale": gradients.dlogit_scale,
    }


@pytest.mark.parametrize(
    "n, m, offset, dtype, columns",
    [
        (37, 165, 101, torch.float32, True),
        (37, 165, 101, torch.bfloat16, False),
        (70, 70, 0, torch.bfloat16, True),
        (5, 64, 59, torch.float32, False),
        (5, 64, 59, torch.bfloat16, True),
    ],
)
def test_rows_of_one_rank_against_the_columns_of_all_are_within_budget(
    n: int, m: int, offset: int, dtype: torch.dtype, columns: bool
) -> None:
    """Columns may lack a positive."""
    x, y = features(max(n, m), 24, "cones", dtype)
    strip = {
        "x": x[:n],
        "y": y[:m],
        "logit_scale": 12.0,
        "offset": offset,
        "row_weight": (torch.rand(n) / (n + 1)).to(DEVICE),
        "column_weight": (torch.rand(m if columns else 0) / m).to(DEVICE),
    }
    assert_results_within_budget(
        computed_strip(**strip, columns=columns),
        truth=strip_gradients(**strip, dtype=torch.float64),
        base=strip_gradients(**strip, dtype=dtype),
        logit_scale=12.0,
    )


@pytest.mark.parametrize("m", [5, 0])
def test_a_strip_without_rows_has_gradients_of_zero(m: int) -> None:
    y = torch.ones(m, 8, device=DEVICE)
    got = computed_strip(
        torch.zeros(0, 8, device=DEVICE),
        y,
        logit_scale=12.0,
        offset=0,
        columns=True,
        row_weight=torch.zeros(0, device=DEVICE),
        column_weight=torch.ones(m, device=DEVICE),
    )
    assert got["dx"].shape == (0, 8) and torch.equal(got["dy"], torch.zeros_like(y))
    assert (got["column level"] == -torch.inf).all() and got["dlogit_scale"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_waves_and_chunks_are_within_budget(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Bounds so small that the forward takes several waves, merged by several programs, and the
    backward 3 x 2 chunks."""
    from protoclip.kernels import contrastive as kernels
    from protoclip.kernels import waves

    monkeypatch.setattr(kernels, "ONE_PROGRAM", 64)
    monkeypatch.setattr(kernels, "FEW", 64)
    monkeypatch.setattr(kernels, "PARTIAL_BYTES", 2 * (8 * 32 * 3 + 12 * 161))
    monkeypatch.setattr(waves, "SIDE", 64)
    monkeypatch.setattr(waves, "GRADIENT_BYTES", 64 * 128 * dtype.itemsize)
    x, y = features(161, 20, "cones", dtype)
    assert_info_nce_within_budget(x, y, logit_scale=14.3, weight=1 / 161)


@pytest.mark.skipif(DEVICE == "cuda", reason="a card's own rows choose")
def test_descriptors_read_and_write_what_pointers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from protoclip.kernels import launch

    pairs = features(100, 48, "alike", torch.float16)
    calls = (info_nce(*pairs, 20.0), sigmoid_loss_call(*pairs, 10.0, -3.0))

    def run(descriptors: bool) -> list[Results]:
        row = replace(launch.INTERPRETER, descriptors=descriptors)
        monkeypatch.setattr(launch, "INTERPRETER", row)
        return [call.results("triton") for call in calls]

    assert_same_bits(run(descriptors=True), run(descriptors=False))


# No launch. A scale is read on a CPU only, see test_backends.
ROOM = ("empty", "empty_strided", "new_empty", "empty_like", "promote_types")
ROOM += ("_local_scalar_dense",) if DEVICE == "cpu" else ()


class Launches(TorchDispatchMode):
    """Names of what reaches the device, in order: Triton kernels, and torch's ops but for those
    that only look at a tensor or make room for one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, computes: bool = True) -> None:
        super().__init__()
        self.names: list[str] = []
        self.computes = computes
        from protoclip.kernels import prototype_cross_entropy, waves
        from protoclip.kernels.info_nce import info_nce_forward_kernel

        def product(
            a: Tensor, b: Tensor, out: Tensor | None = None, *, accumulate: bool = False
        ) -> Tensor | None:
            self.names.append("product")
            return out

        if not computes:
            monkeypatch.setattr(waves, "multiply", product)
            monkeypatch.setattr(prototype_cross_entropy, "multiply", product)
        jit_function = type(info_nce_forward_kernel)
        launcher = jit_function.__getitem__

        def run(kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> Any:
            self.names.append(kernel.__name__)
            if not computes:
                return None
            with _disable_current_modes():  # the interpreter itself computes with torch
                return launcher(kernel, grid)(*args, **kwargs)

        def getitem(kernel: Any, grid: Any) -> Callable[..., Any]:
            return partial(run, kernel, grid)

        monkeypatch.setattr(jit_function, "__getitem__", getitem)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "protoclip":
            with self:  # look into the op
                key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, DEVICE.upper()))
                return func.redispatch(key, *args, **(kwargs or {}))
        # Without a card there is no product of half precision into fp32: the operands are widened.
        widened = name == "_to_copy" and DEVICE == "cpu" and self.computes
        if not (func.is_view or name in ROOM or widened):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_forward_and_backward_of_a_small_batch_are_six_launches(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Of OpenCLIP's loss."""
    monkeypatch.setenv("PROTOCLIP_BACKEND", "triton")
    x, y = features(252, 64, "alike", dtype)
    image = leaf(x)
    text = leaf(y)
    scale = leaf(20.0, device=DEVICE)
    loss = protoclip.ClipLoss()
    upstream = torch.rand((), device=DEVICE)
    loss(image, text, scale)
    with Launches(monkeypatch) as launches:
        torch.autograd.grad(loss(image, text, scale), [image, text, scale], upstream)
    forward = ["info_nce_forward_kernel", "merge_kernel"]
    backward = ["info_nce_gradient_kernel", "addmm", "addmm", "finish_kernel"]
    assert launches.names == forward + backward


def count_of_a_step(
    monkeypatch: pytest.MonkeyPatch, loss: Callable[[], Tensor], leaves: list[Tensor]
) -> int:
    """How many kernels a forward and backward pass asks of a device; none is run."""
    upstream = torch.rand((), device=DEVICE)
    with Launches(monkeypatch, computes=False) as launches:
        torch.autograd.grad(loss(), leaves, upstream)
    return len(launches.names)


@pytest.mark.parametrize(
    "form, most",
    [
        ("info_nce", 7),
        ("ids", 8),
        ("two columns of ids", 8),
        ("siglip", 5),
        ("siglip with ids", 6),
        ("prototypes", 4),
    ],
)
def test_a_step_of_1024_pairs_is_few_kernels(
    monkeypatch: pytest.MonkeyPatch, form: str, most: int
) -> None:
    """Triton's, torch's and the products together."""
    x, y = features(1024, 64, "alike", torch.bfloat16)
    image = leaf(x)
    text = leaf(y)
    scale = leaf(14.3, device=DEVICE)
    labels = torch.arange(1024, device=DEVICE)
    constant_scale = torch.tensor(14.3, device=DEVICE)
    bias = torch.tensor(-10.0, device=DEVICE)
    halves = labels // 2
    two_columns = labels[:, None] // torch.tensor([2, 3], device=DEVICE)
    of_pairs = partial(protoclip.info_nce, image, text, scale, backend="triton")
    siglip = partial(sigmoid_loss, image, text, scale, bias, reduction="sum", backend="triton")
    losses: dict[str, Callable[[], Tensor]] = {
        "info_nce": of_pairs,
        "ids": lambda: of_pairs(ids=halves),
        "two columns of ids": lambda: of_pairs(ids=two_columns),
        "siglip": siglip,
        "siglip with ids": lambda: siglip(ids=two_columns),
        "prototypes": lambda: protoclip.prototype_cross_entropy(
            image, y, labels, constant_scale, backend="triton"
        ),
    }
    leaves = [image] if form == "prototypes" else [image, text, scale]
    assert count_of_a_step(monkeypatch, losses[form], leaves) <= most


def results_of_every_op(x: Tensor, y: Tensor) -> list[Tensor]:
    """Gradients too."""
    image, text = leaf(x), leaf(y)
    scale = torch.tensor(14.3, device=DEVICE)
    labels = torch.arange(len(x), device=DEVICE) // 2
    on = {"backend": "triton"}
    results: list[Tensor] = []
    for loss in (
        protoclip.info_nce(image, text, scale, **on),
        protoclip.info_nce(image, text, scale, ids=labels, **on),
        sigmoid_loss(image, text, scale, -scale, **on),
        protoclip.prototype_cross_entropy(image, text, labels, scale, **on),
    ):
        results += [loss.detach(), *torch.autograd.grad(loss, [image, text])]
    for rows, others in ((x, y), (x.float(), y.float())):
        results += protoclip.kmeans_assign(rows, others, **on)
    results += protoclip.segment_mean(x, labels, len(x), **on)
    return [*results, protoclip.soft_targets(x, y, 0.1, **on)]


def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On cuda:0 the tensors of cuda:1 would be an illegal access. No kernel is run."""
    from protoclip.kernels.info_nce import info_nce_forward_kernel

    guards = 0
    launched: list[str] = []
    unguarded: list[str] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        nonlocal guards
        guards += 1
        yield
        guards -= 1

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        (launched if guards else unguarded).append(kernel.__name__)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    jit_function = type(info_nce_forward_kernel)
    monkeypatch.setattr(jit_function, "__getitem__", lambda kernel, grid: partial(run, kernel))
    results_of_every_op(*features(40, 64, "alike", torch.bfloat16))
    assert len(set(launched)) >= 13 and unguarded == []


@pytest.mark.skipif(DEVICE == "cuda", reason="the file is the CPU's")
@pytest.mark.parametrize("strides", [((1 << 31) + 8, 1), (1, 1 << 28)], ids=["rows", "columns"])
def test_rows_and_columns_further_apart_than_two_to_the_31_are_right(
    tmp_path: Path, strides: tuple[int, int]
) -> None:
    """In a file without the bytes between."""
    size = 2 * strides[0] + 15 * strides[1] + 1
    file = tmp_path / "sparse"
    with file.open("wb") as empty:
        empty.truncate(2 * size)
    flat = torch.from_file(str(file), shared=True, size=size, dtype=torch.bfloat16)
    x, y = features(3, 16, "alike", torch.bfloat16)
    apart = flat.as_strided((3, 16), strides).copy_(x)
    assert_same_bits(results_of_every_op(apart, y), results_of_every_op(x, y))


def training_step() -> Callable[[], tuple[Tensor, ...]]:
    """The loss of 300 pairs and its gradients."""
    x, y = features(300, 64, "alike", torch.bfloat16)
    image = leaf(x)
    text = leaf(y)
    scale = leaf(20.0, device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        loss = protoclip.info_nce(image, text, scale, backend="triton")
        return loss, *torch.autograd.grad(loss, [image, text, scale])

    return step


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_a_step_does_not_wait_for_the_gpu() -> None:
    step = training_step()
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_a_cuda_graph_of_a_step_has_the_same_bits() -> None:
    step = training_step()
    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert_same_bits(captured, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_more_than_two_to_the_31_pairs_are_right() -> None:
    n = 50_000
    x = F.normalize(torch.randn(n, 64, device=DEVICE), dim=1).bfloat16()
    y = F.normalize(torch.randn(n, 64, device=DEVICE), dim=1).bfloat16()
    losses = protoclip.info_nce(x, y, torch.tensor(20.0, device=DEVICE), reduction="none")
    last = torch.arange(n - 8, n, device=DEVICE)
    by_image = 20 * x[last].double() @ y.double().T
    by_text = 20 * y[last].double() @ x.double().T
    of_images = F.cross_entropy(by_image, last, reduction="none")
    of_texts = F.cross_entropy(by_text, last, reduction="none")
    expected = (of_images + of_texts) / 2
    torch.testing.assert_close(losses[last].double(), expected, rtol=1e-5, atol=1e-5)
