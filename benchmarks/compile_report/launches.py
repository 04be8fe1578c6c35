"""Calls of every launcher, compiled for an architecture and not run.

The launchers themselves are called, on small CPU tensors, with a driver that compiles and launches
nothing: what is compiled is what a card would run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from protoclip.kernels import clusters, contrastive, launch, sigmoid_loss
from protoclip.kernels import prototype_cross_entropy as prototypes

SMS = 132
REGISTERS = 65536  # of an SM
SHARED = dict.fromkeys((86, 89, 120, 121), 100 << 10)  # of an SM; 1 KiB a CTA is reserved
SHARED |= dict.fromkeys((90, 100, 103, 110), 228 << 10) | {80: 164 << 10}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


RELATIVES = (86, 103, 110, 121)  # cards that take the rows of another architecture


class Case(NamedTuple):
    """One call of a launcher: ``form`` says which; ``depth`` is D, 43 one that no tile fits."""

    arch: int
    op: str
    form: str
    dtype: str
    depth: int

    def features(self, rows: int) -> torch.Tensor:
        return torch.zeros(rows, self.depth, dtype=DTYPES[self.dtype])

    def __str__(self) -> str:
        return f"sm_{' '.join(map(str, self))}"


def cases() -> Iterator[Case]:
    """Calls that lead to every row of the launch table; more forms of them on Hopper."""
    for arch in (*launch.ARCHITECTURES, *RELATIVES):
        for dtype, depth in (("bf16", 128), ("bf16", 512), ("fp32", 512), ("fp16", 43)):
            yield Case(arch, "info_nce", "large", dtype, depth)
            yield Case(arch, "sigmoid_loss", "gradients", dtype, depth)
        yield Case(arch, "sigmoid_loss", "ids", "bf16", 512)
        for form in ("ids", "all", "few ids", "few all"):
            yield Case(arch, "contrastive", form, "bf16", 512)
        yield Case(arch, "contrastive", "all", "fp32", 512)
        yield Case(arch, "contrastive", "own", "fp16", 43)
        for depth in (64, 128, 256, 512):
            yield Case(arch, "prototypes", "soft", "bf16", depth)
        for dtype, depth in (("bf16", 64), ("fp16", 128), ("bf16", 256), ("fp32", 512)):
            yield Case(arch, "prototypes", "all", dtype, depth)
        yield Case(arch, "soft_targets", "own", "fp32", 512)
        yield Case(arch, "clusters", "own", "bf16", 512)
        for depth in (64, 128, 256, 512):
            yield Case(arch, "clusters", "own", "fp32", depth)
    yield Case(90, "info_nce", "small", "bf16", 512)
    yield Case(90, "info_nce", "rows", "bf16", 512)
    yield Case(90, "sigmoid_loss", "loss", "bf16", 512)
    yield Case(90, "info_nce", "large", "fp16", 128)
    yield Case(90, "prototypes", "hard", "bf16", 128)


LARGE = {("info_nce", "large"), ("contrastive", "ids"), ("contrastive", "all")}


def call(case: Case, rows: int | None = None) -> None:
    """The launchers as the trainer calls them, forward and backward, on so many rows."""
    if rows is None:  # so many that the losses take their rows of large batches
        rows = 3072 if (case.op, case.form) in LARGE else 512
    CALLS[case.op](case, rows, torch.ones(()))


def _softmax(case: Case, n: int, logit_scale: torch.Tensor) -> None:
    """InfoNCE; or the contrastive loss of queries alone, with ids, as InfoNCE has them, and with
    all that can be said about pairs."""
    form = case.form.removeprefix("few ")
    position = torch.zeros(n, dtype=torch.int32)
    ids = None
    if form in ("ids", "all"):
        ids = contrastive.id_codes(None, torch.zeros(n, 2, dtype=torch.int64)).key
    pairs: dict[str, Any] = {
        "own_key": position if form in ("own", "all") else None,
        "offset": 0,
        "exclude": position if form == "all" else None,
        "query_ids": ids,
        "key_ids": ids,
        "key_bias": torch.zeros(n) if form == "all" else None,
        "same_positive": form == "all",
    }
    x = case.features(n)
    y = case.features(n)
    forward = contrastive.contrastive_fwd(
        x,
        y,
        logit_scale,
        **pairs,
        both_directions=form not in ("own", "rows"),
        pair_weight=1.0,
        summed=form not in ("own", "all"),
    )
    weight = torch.ones(()).expand(n) if case.op == "info_nce" else torch.ones(n)
    contrastive.contrastive_bwd(
        x,
        y,
        logit_scale,
        **pairs,
        row_statistics=forward.row_statistics,
        column_statistics=forward.column_statistics,
        query_weight=weight,
        positive_mean_weight=weight if form == "all" else None,
        key_weight=weight[: forward.column_statistics.shape[1]],
        pair_weight=1.0,
    )


def _sigmoid_loss(case: Case, n: int, logit_scale: torch.Tensor) -> None:
    ids = torch.zeros(2, n, dtype=torch.int32) if case.form == "ids" else None
    results = sigmoid_loss.sigmoid_loss(
        case.features(n),
        case.features(n),
        logit_scale,
        logit_bias=logit_scale,
        offset=0,
        gradients=case.form != "loss",
        query_ids=ids,
        key_ids=ids,
        same_positive=True,
    )
    sigmoid_loss.sigmoid_loss_bwd(
        logit_scale, results.dx, results.dy, results.dlogit_scale, results.dlogit_bias
    )


def _prototypes(case: Case, n: int, logit_scale: torch.Tensor) -> None:
    """Both kinds of targets with all that can be asked for; or one kind and trained prototypes."""
    features = case.features(n)
    keys = case.features(2048)
    hard = case.features(0)
    soft = case.features(2048)
    labels = torch.zeros(n, dtype=torch.int64)
    if case.form == "all":
        for targets in (soft, hard):
            prototypes.prototype_cross_entropy_fwd(
                features, keys, targets, labels, logit_scale,
                need_grad=True, need_nearest=True, need_scale_gradient=True, reduction="none",
            )  # fmt: skip
        return
    forward = prototypes.prototype_cross_entropy_fwd(
        features, keys, hard if case.form == "hard" else soft, labels, logit_scale,
        need_grad=True, need_nearest=False, need_scale_gradient=False, reduction="mean",
    )  # fmt: skip
    prototypes.prototype_cross_entropy_scale(
        logit_scale,
        forward.divisor,
        logit_scale,
        forward.gradient,
        forward.scale_gradient,
        features,
    )
    prototypes.prototype_cross_entropy_bwd(
        features,
        keys,
        labels,
        logit_scale,
        forward.row_max,
        forward.row_sum,
        weight=forward.row_sum,
        hard=case.form == "hard",
    )


def _soft_targets(case: Case, n: int, logit_scale: torch.Tensor) -> None:
    prototypes.soft_targets(case.features(2048), case.features(2048), temperature=0.1)


def _clusters(case: Case, n: int, logit_scale: torch.Tensor) -> None:
    points = case.features(n)
    centroids = case.features(256)
    labels, _ = clusters.kmeans_assign(points, centroids)
    clusters.segment_mean(points, labels, len(centroids))


CALLS: dict[str, Callable[[Case, int, torch.Tensor], None]] = {
    "info_nce": _softmax,
    "contrastive": _softmax,
    "sigmoid_loss": _sigmoid_loss,
    "prototypes": _prototypes,
    "soft_targets": _soft_targets,
    "clusters": _clusters,
}


class Compiled(NamedTuple):
    """A kernel that was asked for."""

    name: str
    code: Any  # Triton's
    constants: dict[str, int]  # sizes and switches, but no tensors: a session of tests keeps these
    config: launch.Launch


def driver_for(arch: int) -> SimpleNamespace:
    """A driver of Triton's that compiles for a GPU and launches nothing."""

    class Launcher:
        launch_pdl = False

        def __init__(self, source: Any, metadata: Any) -> None:
            pass

        def __call__(self, *_: Any) -> None:
            pass

    class Utils:
        get_device_properties = staticmethod(
            lambda device: {
                "max_shared_mem": SHARED[arch] - 1024,
                "multiprocessor_count": SMS,
                "max_num_regs": REGISTERS,
                "warpSize": 32,
            }
        )
        load_binary = staticmethod(lambda name, kernel, shared, device: (1, 1, 0, 0, 1024))
        unload_module = staticmethod(lambda module: None)

    target = GPUTarget("cuda", arch, 32)
    return SimpleNamespace(
        get_current_device=lambda: arch,  # each has its own compiled kernels
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
        get_active_torch_device=lambda: torch.device("cpu"),
        utils=Utils,
        launcher_cls=Launcher,
        map_python_to_cpp_type=lambda name: name,
    )


@contextmanager
def variants(arch: int) -> Iterator[dict[str, set[str]]]:
    """For each kernel that is launched inside, what Triton would compile it for: more than one
    means that a run waits for the compiler again. Nothing is compiled."""
    asked: dict[str, set[str]] = {}

    def ask(*, key: str, fn: Any, **_: Any) -> bool:
        asked.setdefault(fn.name.rsplit(".")[-1], set()).add(str(key))
        return True  # leave it

    hook = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = ask
    try:
        with recording(arch):
            yield asked
    finally:
        triton.knobs.runtime.jit_cache_hook = hook


@contextmanager
def recording(arch: int | None = None) -> Iterator[list[Compiled]]:
    """Compile the kernels that are launched inside, launch none of them; for an architecture, or,
    with None, for the card that is here."""
    compiled: list[Compiled] = []
    run = JITFunction.run
    options = launch.Launch.options
    config = launch.INTERPRETER

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        code = run(kernel, *arguments, grid=grid, warmup=True, **keywords)
        constants = {name: value for name, value in keywords.items() if isinstance(value, int)}
        compiled.append(Compiled(kernel.__name__, code, constants, config))
        return code

    def remembered(chosen: launch.Launch) -> dict[str, Any]:
        nonlocal config
        config = chosen
        return options.__get__(chosen)

    if arch is not None:
        driver.set_active(driver_for(arch))
    JITFunction.run = compile_only
    launch.Launch.options = property(remembered)
    launch.compiling_for = None if arch is None else launch.served_as(arch)
    try:
        yield compiled
    finally:
        JITFunction.run = run
        launch.Launch.options = options
        launch.compiling_for = None
