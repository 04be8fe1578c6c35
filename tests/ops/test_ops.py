"""The questions that every op is asked: rows are in ``op_table.py``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from budget import assert_same_bits, leaf, on_threads, said
from graphs import SIZES, compiled_once, exported_once, flat, weighted_sum
from op_table import (
    BF16,
    BY_NAME,
    FP16,
    FP32,
    FP64,
    FUSED_DTYPES,
    OF_ARGUMENT,
    OPS,
    Call,
    Draw,
    Op,
    Size,
    assert_as_formula,
    pairwise,
)
from torch import Tensor
from torch._C._profiler import _EventType
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import protoclip
from protoclip.ops.dispatch import ROW_OF, TABLE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of inf
GPU = torch.cuda.is_available()


def backends_of(op: Op) -> list[str]:
    """Those that run here."""
    reasons = protoclip.backends(op.name)
    return [name for name in reasons if reasons[name] is None]


def fused_of(op: Op) -> list[str]:
    return [name for name in backends_of(op) if name != "reference"]


def device_of(op: Op, backend: str) -> str:
    of_backend = TABLE[ROW_OF.get(op.name, op.name)][backend].device_types
    return "cuda" if GPU and of_backend is not None and "cuda" in of_backend else "cpu"


EACH_OP = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
EACH_LOSS = pytest.mark.parametrize(
    "op", [op for op in OPS if op.make(Size(4, 6, 8), FP32).has_gradient], ids=lambda op: op.name
)
OP_AND_BACKEND = [
    pytest.param(op, backend, id=f"{op.name}-{backend}")
    for op in OPS
    for backend in backends_of(op)
]
OP_AND_FUSED = [
    pytest.param(op, backend, id=f"{op.name}-{backend}") for op in OPS for backend in fused_of(op)
]
OP_BACKEND_DTYPE = [
    pytest.param(
        *(op, backend, dtype),
        id=f"{op.name}-{backend}-{str(dtype)[6:]}",
        marks=[pytest.mark.smoke] if backend != "triton" or dtype == FP32 else [],
    )
    for op in OPS
    for backend in backends_of(op)
    for dtype in ((FP64, FP32, BF16) if backend == "reference" else FUSED_DTYPES)
]
SMALL = Size(12, 18, 8)


def test_every_two_values_of_two_options_meet() -> None:
    rows = pairwise({"a": (0, 1, 2), "b": (0, 1), "c": "xyz"})
    assert {(row["a"], row["c"]) for row in rows} == {(a, c) for a in range(3) for c in "xyz"}
    assert {(row["b"], row["c"]) for row in rows} == {(b, c) for b in range(2) for c in "xyz"}
    assert len(rows) < 18


# ---- numbers ----


def has_parts(row: dict[str, Any]) -> bool:
    """Whether torch adds something to the fused op's loss."""
    several = str(row.get("relation", "")).startswith("several")
    return bool(several or row.get("label_smoothing") or row.get("num_negatives"))


@pytest.mark.parametrize("op, backend, dtype", OP_BACKEND_DTYPE)
def test_values_and_gradients_are_within_budget(op: Op, backend: str, dtype: torch.dtype) -> None:
    rows = pairwise(op.options)
    if backend == "triton":  # whose masks and reductions do not know of dtypes
        rows = pairwise(op.few)[:: {FP32: 1, BF16: 2, FP16: 3}[dtype]]
    for row in rows:
        if dtype in (BF16, FP16) and has_parts(row) and row["size"].n < 16:
            continue  # the parts' gradients are rounded each, and the plain formula's luck is small
        with said(row):
            assert_as_formula(op.make(dtype=dtype, **row), backend, device_of(op, backend))


@pytest.mark.parametrize("op, backend", OP_AND_BACKEND)
def test_a_mean_and_a_sum_with_one_option_or_none_are_within_budget(op: Op, backend: str) -> None:
    """Which a fused op reduces itself where no option prevents it."""
    one_each = [{name: value} for name, value in op.all_options.items() if backend != "triton"]
    for options in ({}, *one_each) if "reduction" in op.options else ():
        for reduction in ("mean", "sum"):
            with said((options, reduction)):
                call = op.make(Size(24, 40, 12), FP32, reduction=reduction, **options)
                assert_as_formula(call, backend, device_of(op, backend))


@pytest.mark.parametrize("op, backend", OP_AND_BACKEND)
def test_no_rows_and_no_features_have_a_result(op: Op, backend: str) -> None:
    for size in op.empty:
        with said(size):
            of_no_key = {"relation": "own"} if "keys" in op.matrices and not size.m else {}
            call = op.make(size, FP32, **of_no_key)
            got = call.results(backend, device_of(op, backend))
            expected = {name: call.plain(FP64).values[name].to(got[name]) for name in got}
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def transposed(x: Tensor) -> Tensor:
    """The columns of a matrix, one after the other."""
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim else x


def every_other(x: Tensor) -> Tensor:
    """With other numbers between."""
    other = torch.full_like(x, torch.nan if x.is_floating_point() else -7)
    return torch.stack([x, other], dim=-1)[..., 0] if x.ndim else x


@pytest.mark.parametrize("op, backend", OP_AND_BACKEND)
def test_strides_do_not_matter(op: Op, backend: str) -> None:
    size = Size(24, 40, 12)
    for dtype in (FP32,) if backend == "triton" else (FP32, BF16):
        for change in (transposed, every_other):
            with said(change.__name__):
                call = op.full(size, dtype).with_tensors(change)
                assert_as_formula(call, backend, device_of(op, backend))


@pytest.mark.parametrize("op, backend", OP_AND_BACKEND)
def test_what_is_not_finite_gives_a_result_that_is_not(op: Op, backend: str) -> None:
    call = op.plain(SMALL)
    for name in call.leaves:
        for bad in (torch.nan, torch.inf, -torch.inf):
            values = call.leaves[name].clone()
            values.view(len(values) if values.ndim else 1, -1)[-2:, 0] = bad  # of the last rows
            with said((name, bad)):
                spoiled = replace(call, leaves={**call.leaves, name: values})
                results = spoiled.run(backend, {**spoiled.leaves})
                assert not all(tensor.isfinite().all() for tensor in flat(results))


@pytest.mark.parametrize("op, backend", OP_AND_FUSED)
def test_the_number_of_threads_and_a_stash_change_no_bit(op: Op, backend: str) -> None:
    if backend == "triton":
        if not GPU:
            pytest.skip("the interpreter has one thread")
        call = op.full(Size(40, 60, 12))
        first, again = (call.results(backend, device_of(op, backend)) for _ in range(2))
        assert_same_bits(again, first)
        return
    for dtype in FUSED_DTYPES:
        options = op.all_options
        if op.name == "sigmoid_loss":  # losses of each row are torch's
            options = {"id_columns": 2, "label_smoothing": 0.2}
        for call in (op.plain(op.large, dtype), op.make(op.large, dtype, **options)):
            stashes: Any = iter(({}, {}, {}))
            if op.name in ("info_nce", "contrastive", "contrastive_parts"):
                stashes = iter(({"stash": True}, {}, {"stash": False}))

            def run(call: Call = call, stashes: Any = stashes) -> Any:
                return call.results(backend, **next(stashes))

            first, *repeated = on_threads(run, (1, 2, 3))
            for again in repeated:
                assert_same_bits(again, first)
    assert_as_formula(op.plain(op.large), backend)


# ---- memory ----


def largest_allocation(run: Callable[[], Any]) -> int:
    """Bytes of the largest tensor that is made, also inside of an op."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = list(recorded.profiler.kineto_results.experimental_event_tree())
    largest = 0
    for event in events:
        events += event.children
        if event.tag == _EventType.Allocation:
            largest = max(largest, event.typed[1].alloc_size)
    return largest


@EACH_LOSS
@pytest.mark.parametrize("form", ["plain", "full"])
def test_no_backend_but_the_reference_forms_the_logits(op: Op, form: str) -> None:
    """Forward and backward. SigLIP's options take strips of 4 MiB, less than half of them here."""
    size = Size(1500, 2000, 16)
    half_of_the_logits = 2 * size.n**2  # bytes, of fp32
    call = op.plain(size) if form == "plain" else op.full(size)

    def run(backend: str, **more: Any) -> None:
        leaves = {name: leaf(value) for name, value in call.leaves.items()}
        sum(x.sum() for x in flat(call.run(backend, leaves, **more))).backward()

    if form == "plain":
        assert largest_allocation(partial(run, "reference")) >= half_of_the_logits
    keeps_none = {"stash": False} if "stash" in inspect.signature(call.function).parameters else {}
    for backend in fused_of(op):
        if backend != "triton":  # whose interpreter makes tensors of its own
            assert largest_allocation(partial(run, backend, **keeps_none)) < half_of_the_logits


# ---- arguments ----


@EACH_OP
def test_mixed_dtypes_are_promoted(op: Op) -> None:
    """As torch does it for operands; gradients come back in the dtype of each tensor."""
    call = op.plain(SMALL)
    floating = [name for name in op.matrices if name in call.leaves]
    for number, name in enumerate(floating if len(op.matrices) > 1 else []):
        half = {name: call.leaves[name].to((BF16, FP16)[number])}
        widened = {name: half[name].float()}
        for backend in ("auto", "reference"):
            mixed = replace(call, leaves={**call.leaves, **half}).results(backend)
            wide = replace(call, leaves={**call.leaves, **widened}).results(backend)
            for key in mixed:
                expected = wide[key].to(half[name].dtype) if key == f"d{name}" else wide[key]
                assert_same_bits(mixed[key], expected)


@EACH_OP
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_other_integers_are_as_good_as_int64(op: Op, dtype: torch.dtype) -> None:
    least = 0 if dtype == torch.uint8 else -100

    def narrowed(x: Tensor) -> Tensor:
        return x if x.is_floating_point() else x.clamp(least, 99).to(dtype)

    def as_int64(x: Tensor) -> Tensor:
        return x if x.is_floating_point() else narrowed(x).long()

    call = op.full(SMALL)
    got = call.with_tensors(narrowed).results("auto")
    assert_same_bits(got, call.with_tensors(as_int64).results("auto"))


ANY_NUMBER = [10, np.float32(10), np.int64(10), np.array(10), np.array([10.0]), torch.tensor(10)]
ANY_NUMBER += [torch.tensor([10.0]), torch.tensor(10.0, dtype=FP64), 0, 0.0]


@pytest.mark.parametrize("number", ANY_NUMBER, ids=repr)
def test_a_scale_is_any_number(number: Any) -> None:
    for op in OPS:
        call = op.plain(SMALL)
        if "logit_scale" in call.leaves:
            for backend in ("auto", "reference"):
                leaves = call.leaves | {"logit_scale": torch.as_tensor(number).float().reshape(())}
                got = call.observe(call.run(backend, logit_scale=number), **leaves)
                assert_same_bits(list(got), list(call.observe(call.run(backend, leaves), **leaves)))


@EACH_LOSS
def test_a_scale_of_one_element_has_a_gradient_of_one(op: Op) -> None:
    for backend in ("auto", "reference"):
        scale = torch.tensor([10.0], dtype=FP64, requires_grad=True)
        call = op.plain(SMALL)
        results = call.observe(call.run(backend, logit_scale=scale), **call.leaves)
        (gradient,) = torch.autograd.grad(sum(result.sum() for result in results), scale)
        assert gradient.shape == (1,) and gradient.dtype == FP64


@EACH_OP
def test_meta_tensors_give_shapes(op: Op) -> None:
    call = op.plain(SMALL)
    there = call.with_tensors(lambda x: x.to("meta"))
    results = there.run("auto")
    for got, expected in zip(flat(results), flat(call.run("auto")), strict=True):
        assert got.is_meta and got.shape == expected.shape and got.dtype == expected.dtype


# ---- torch ----


@pytest.mark.parametrize("op, backend", OP_AND_BACKEND)
def test_autocast_and_the_default_dtype_change_no_bit(op: Op, backend: str) -> None:
    if backend == "triton":
        pytest.skip("the same Python as of the other backends")
    for call in (op.plain(SMALL), op.full(SMALL)):
        expected = call.results(backend)
        with torch.autocast("cpu", dtype=BF16):
            in_autocast = call.run(backend)
        assert_same_bits(
            {f"result {i}": x for i, x in enumerate(call.observe(in_autocast, **call.leaves))},
            {name: value for name, value in expected.items() if name.startswith("result")},
        )
        for default in (FP64, BF16):
            torch.set_default_dtype(default)
            try:
                got = call.results(backend)
            finally:
                torch.set_default_dtype(FP32)
            assert_same_bits(got, expected)


class Dispatched(TorchDispatchMode):
    """The calls of ops of protoclip that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(function))
        if function.namespace == "protoclip":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("op, backend", OP_AND_FUSED)
def test_opcheck_accepts_the_ops(op: Op, backend: str) -> None:
    """Those that a forward and a backward pass call, with their gradients."""
    size = Size(5, 9, 8)
    if backend == "cpu":
        size = Size(256, 256, 6)  # whole tiles: the room around ragged ones is not written
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
    for call in (op.plain(size), op.full(size)):
        with Dispatched() as forward:
            call.run(backend)
        with Dispatched() as both:
            call.results(backend, device_of(op, backend))
        for number, (function, args, kwargs) in enumerate(both.calls):
            has_gradient = number < len(forward.calls) and call.has_gradient

            def argument(x: Any, has_gradient: bool = has_gradient) -> Any:
                if not isinstance(x, Tensor):
                    return x
                return x.detach().clone().requires_grad_(has_gradient and x.is_floating_point())

            values = {
                schema.name: argument(value)
                for schema, value in zip(function._schema.arguments, args, strict=False)
            }
            values |= {name: argument(value) for name, value in kwargs.items()}
            more = ["test_aot_dispatch_dynamic"] if has_gradient and backend == "cpu" else []
            torch.library.opcheck(function, (), values, test_utils=(*utilities, *more))


needs_cpu = pytest.mark.skipif(
    protoclip.backends("info_nce")["cpu"] is not None, reason="no native library"
)
KEYS_ARE_FEW = {"prototype_cross_entropy", "prototype_losses", "kmeans_assign", "segment_mean"}
# Each op with all options that it has; the two that take another way without any, also so.
COMPILED = [
    pytest.param(op, form, id=f"{op.name}-{form}")
    for op in OPS
    for form in ("plain", "full")
    if op.name != "soft_targets"
    and (form == "full") == bool(op.all_options)
    or (op.name in ("info_nce", "contrastive") and form == "plain")
]


def batch_of(op: Op, form: str, n: int) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """The function of the tensors for a batch, and the tensors."""
    size = Size(n, 6 if op.name in KEYS_ARE_FEW else 2 * n, 8)
    call = op.plain(size) if form == "plain" else op.full(size)
    leaves = {name: x.clone().requires_grad_(call.has_gradient) for name, x in call.leaves.items()}
    constants = {name: x for name, x in call.constants.items() if isinstance(x, Tensor)}
    others = {name: x for name, x in call.constants.items() if name not in constants}
    if op.name == "prototype_losses":  # banks are no tensors
        constants = {"prototypes": Draw(0).unit(6, 8), "labels": torch.arange(n) % 6}
        return loss_of_a_bank, leaves | constants
    return partial(call.function, **others, backend="cpu"), leaves | constants


def loss_of_a_bank(
    features: Tensor, logit_scale: Tensor, prototypes: Tensor, labels: Tensor
) -> Tensor:
    banks = [protoclip.Bank(prototypes, labels), protoclip.Bank(prototypes, labels, prototypes)]
    return protoclip.prototype_losses(features, banks, logit_scale).loss


GRAPHS = [  # the second size makes the sizes symbols, unless they are from the start
    *(pytest.param(*case.values, True, 1, id=f"{case.id}-dynamic") for case in COMPILED),
    pytest.param(BY_NAME["kmeans_assign"], "plain", None, 2, id="kmeans_assign-plain-auto"),
]


@needs_cpu
@pytest.mark.parametrize("op, form, dynamic, graphs", GRAPHS)
def test_one_graph_serves_all_batch_sizes(
    op: Op, form: str, dynamic: bool | None, graphs: int
) -> None:
    function, _ = batch_of(op, form, SIZES[0])
    batches = [batch_of(op, form, n)[1] for n in SIZES]
    assert compiled_once(function, batches, dynamic) == graphs


@needs_cpu
@pytest.mark.parametrize("op, form", COMPILED)
def test_an_exported_program_takes_any_batch(op: Op, form: str) -> None:
    function, example = batch_of(op, form, SIZES[0])
    for strict in (False, True) if (op.name, form) == ("contrastive", "plain") else (False,):
        exported_once(function, example, batch_of(op, form, SIZES[1])[1], strict)


def of_first(op: Op, backend: str) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """The sum of the results as a function of the first argument, that argument, and another."""
    call = op.plain(SMALL)
    name = next(iter(call.leaves))

    def function(x: Tensor) -> Tensor:
        results = call.run(backend, {**call.leaves, name: x})
        results = flat(results)
        return weighted_sum(results)

    x = call.leaves[name]
    return function, x, op.make(Size(*SMALL), FP32).leaves[name].flip(0)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Any]] = {
    "grad": lambda f, x, y: grad(f)(x),
    "jacrev": lambda f, x, y: jacrev(f)(x),
    "vmap": lambda f, x, y: vmap(f)(torch.stack([x, y])),
    "vmap of grad": lambda f, x, y: vmap(grad(f))(torch.stack([x, y])),
    "grad of vmap": lambda f, x, y: grad(lambda z: vmap(f)(z).sum())(torch.stack([x, y])),
    "jvp": lambda f, x, y: jvp(f, (x,), (y,)),
    "dual numbers": lambda f, x, y: derivative_by_dual_numbers(f, x, y),
}


def derivative_by_dual_numbers(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, y))).tangent


@EACH_LOSS
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_take_the_reference_or_are_refused(transform: str, op: Op) -> None:
    run = TRANSFORMS[transform]
    auto, x, y = of_first(op, "auto")
    by_reference, _, _ = of_first(op, "reference")
    torch.testing.assert_close(run(auto, x, y), run(by_reference, x, y))
    if transform in ("jvp", "dual numbers"):
        tangent = run(auto, x, y)
        tangent = tangent[1] if transform == "jvp" else tangent
        expected = (grad(by_reference)(x) * y).sum()
        torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-4)
    for backend in fused_of(op):
        fused, _, _ = of_first(op, backend)
        with pytest.raises(ValueError, match="transforms and forward-mode .*backend='auto'"):
            run(fused, x, y)


@pytest.mark.parametrize("op, backend", OP_AND_FUSED)
def test_a_second_derivative_is_refused_by_name(op: Op, backend: str) -> None:
    function, x, _ = of_first(op, backend)
    if not op.plain(SMALL).has_gradient:
        pytest.skip("no gradient")
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        torch.autograd.grad(first.sum(), x)


@EACH_LOSS
def test_gradients_of_the_reference_are_those_of_differences(op: Op) -> None:
    for call in (op.plain(Size(4, 6, 3), FP64), op.full(Size(4, 6, 3), FP64)):
        constant = {"key_bias", "prototypes"}  # some are -inf; smoothing takes them for constants
        names = [name for name in call.leaves if name not in constant]

        def results(*leaves: Tensor, names: list[str] = names, call: Call = call) -> Any:
            got = call.run("reference", {**call.leaves, **dict(zip(names, leaves, strict=True))})
            return tuple(call.observe(got, **call.leaves))

        leaves = [call.leaves[name].clone().requires_grad_() for name in names]
        assert torch.autograd.gradcheck(results, leaves)
        assert torch.autograd.gradgradcheck(results, leaves)


# ---- what is refused ----


def test_an_option_that_is_not_used_costs_nothing() -> None:
    """Of torch's ops, beside the one that computes."""
    for name, most in (("info_nce", 1), ("contrastive", 1), ("prototype_cross_entropy", 2)):
        call = BY_NAME[name].make(SMALL, FP32, reduction="mean")
        with Dispatched() as dispatched:
            call.run("auto")
        reads = "aten._local_scalar_dense.default"  # the scale
        assert len([op for op in dispatched.names if op != reads]) <= most, dispatched.names


def refusals(op: Op) -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    call = op.plain(Size(4, 6, 8))
    for name in op.matrices:
        x = call.leaves[name]
        said_name = f"({name}|image_features|text_features)"  # nt_xent's views
        yield {name: x[0]}, ValueError, rf"{said_name} of shape \["
        yield {name: x.long()}, TypeError, "cast it"
        yield {name: [1.0]}, TypeError, f"{said_name} as a Tensor, got list"
        yield {name: x.to_sparse()}, TypeError, rf"{said_name} as a dense .*to_dense"
        if len(op.matrices) > 1:
            yield {name: x.to("meta")}, ValueError, "on one device|on meta"
            if op.name != "soft_targets":
                yield {name: x[:, :3]}, ValueError, "share D"
    parameters = re.findall(r"\w+", str(inspect.signature(call.function)))
    for name, cases in OF_ARGUMENT.items():
        if name in parameters or name in call.leaves:
            for value, error, words in cases:
                yield {name: value}, error, words
    yield from op.refused


@EACH_OP
def test_bad_input_is_refused_in_words(op: Op) -> None:
    call = op.plain(Size(4, 6, 8))
    name = {"prototype_losses": "prototype_cross_entropy"}.get(op.name, op.name)
    for backend in ("auto", "reference"):
        for arguments, error, words in refusals(op):
            with said(arguments), pytest.raises(error, match=rf"(?s){name}: .*({words})"):
                call.run(backend, **arguments)


@EACH_OP
def test_a_named_backend_runs_or_says_why_not(op: Op) -> None:
    reasons = protoclip.backends(op.name)
    assert reasons["reference"] is None
    call = op.plain(Size(4, 6, 8))
    for name in reasons:
        if reasons[name] is not None:
            with pytest.raises(ValueError, match=f"backend '{name}' cannot run: .{{10}}"):
                call.run(name)
    with pytest.raises(ValueError, match="backend 'fastest' cannot run: .* has only cpu, .*"):
        call.run("fastest")
    with pytest.raises(ValueError, match="it runs on cpu, the tensors are on meta"):
        call.with_tensors(lambda x: x.to("meta")).run("cpu")
    with pytest.raises(ValueError, match="it takes float32, .*, the tensors are float64"):
        op.plain(Size(4, 6, 8), FP64).run("cpu")


@EACH_OP
def test_the_environment_stands_in_for_auto(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    call = op.plain(Size(4, 6, 8))
    expected = call.results("reference")
    monkeypatch.setenv("PROTOCLIP_BACKEND", "reference")
    assert_same_bits(call.results("auto"), expected)
    monkeypatch.setenv("PROTOCLIP_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        call.run("auto")
