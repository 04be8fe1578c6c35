"""How a function becomes an op of ``torch.ops.protoclip``, and what every op asks of its tensors.

An op is registered with ``torch.library`` itself, not with ``custom_op``, whose calls cost 16 us
more.
"""

from __future__ import annotations

import functools
import inspect
from collections import namedtuple
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, ParamSpec, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.autograd import forward_ad

from protoclip.ops.columns import LOCAL, Local

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ANY_FLOAT = (*FLOATS, torch.float64)
_LIBRARY = torch.library.Library("protoclip", "FRAGMENT")

Parameters = ParamSpec("Parameters")
Named = TypeVar("Named")
Result = TypeVar("Result")


class _Registered(NamedTuple):
    op: Any  # torch.ops.protoclip.<name>.default
    arguments: Any  # a named tuple of them
    results: Callable[..., Any]  # names them


_REGISTERED: dict[Callable[..., Any], _Registered] = {}  # function of ``operator`` -> its op


def operator(
    name: str,
    shapes: Callable[[Any], Tensor | tuple[Tensor, ...]],
    results: Callable[..., Named],
) -> Callable[[Callable[Parameters, Any]], Callable[Parameters, Named]]:
    """Make a function the body of the op ``torch.ops.protoclip.<name>``, which it then calls.

    Its annotations are the op's schema: tensors, optional tensors, numbers and strings in; a tensor
    or a tuple of tensors out. Parameters have no defaults. One may be a dataclass: the op has its
    fields, the function takes it, or a subclass.

    Args:
        shapes: the results for given arguments (by name), as empty tensors. Under torch.compile
            sizes are symbols there, so take them from ``.shape``: ``len`` would fix them.
        results: the named tuple of the results, which the function returns; ``single`` for one
            tensor.
    """

    def register(body: Callable[Parameters, Any]) -> Callable[Parameters, Named]:
        record, flat = _flattened(body)
        _LIBRARY.define(torch.library.infer_schema(flat, op_name=name, mutates_args=()))
        _LIBRARY.impl(name, flat, "CompositeExplicitAutograd")
        op = getattr(torch.ops.protoclip, name).default
        arguments = _arguments_of(op)
        torch.library.register_fake(
            f"protoclip::{name}", lambda *values: shapes(arguments._make(values)), lib=_LIBRARY
        )

        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Named:
            values: dict[str, Any] = kwargs
            if record.name in values:
                value = values.pop(record.name)
                for field in record.fields:
                    values[field] = getattr(value, field)
            tensors = op(*args, **values)
            return results(*tensors) if isinstance(tensors, tuple) else results(tensors)

        call.__name__ = body.__name__
        call.__doc__ = body.__doc__
        _REGISTERED[call] = _Registered(op, arguments, results)
        return call

    return register


class _Record(NamedTuple):
    """The parameter of a function that is a dataclass."""

    name: str = ""
    fields: tuple[str, ...] = ()


def _flattened(body: Callable[..., Any]) -> tuple[_Record, Callable[..., Any]]:
    """A function whose parameter is a dataclass, as one that takes the fields in its place."""
    types = get_type_hints(body)
    name = next((name for name, of_name in types.items() if is_dataclass(of_name)), "")
    if not name:
        return _Record(), body
    cls = types[name]
    record = _Record(name, tuple(field.name for field in fields(cls)))
    begin = list(types).index(name)
    end = begin + len(record.fields)

    def flat(*values: Any) -> Any:
        value = object.__new__(cls)  # the constructor of a frozen class sets each field by a call
        vars(value).update(zip(record.fields, values[begin:end], strict=True))
        return body(*values[:begin], value, *values[end:])

    types |= get_type_hints(cls)
    names = list(inspect.signature(body).parameters)
    names[begin : begin + 1] = record.fields
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(each, kind, annotation=types[each]) for each in names]
    signature = inspect.Signature(parameters, return_annotation=types["return"])
    flat.__signature__ = signature  # type: ignore[attr-defined]
    return record, flat


def single(tensor: Tensor) -> Tensor:
    """``results`` of an op that returns one tensor."""
    return tensor


def define_gradient(
    function: Callable[..., Any],
    save: Callable[[Any, Any, Any], None],
    backward: Callable[[Any, Any], dict[str, Any]],
) -> None:
    """Give the op of a function its gradient.

    Args:
        save: (ctx, arguments, results) -> None, both by name; keeps what ``backward`` needs, such
            as ``saving(...)``.
        backward: (ctx, gradients of the results, by name) -> gradients of arguments, by name; an
            argument without an entry has none. ``wanted_gradients`` says which are wanted.
    """
    registered = _REGISTERED[function]
    arguments = registered.arguments

    def keep(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        ctx.set_materialize_grads(False)  # results without a gradient have None
        tensors = output if isinstance(output, tuple) else (output,)
        save(ctx, arguments._make(inputs), registered.results(*tensors))

    def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        by_name = backward(ctx, registered.results(*grads))
        return tuple(map(by_name.get, arguments._fields))

    _register_autograd(registered.op, gradients, keep)


# Of torch._C; torch's own register_autograd is made of them in 2.8 to 2.15.
PRIVATE = ("_AutoDispatchBelowAutograd", "_after_autograd_keyset", "_any_requires_grad")


def _register_autograd(
    op: Any,
    backward: Callable[..., tuple[Any, ...]],
    setup_context: Callable[[Any, Sequence[Any], Any], None],
) -> None:
    """``torch.library.register_autograd`` for ops without defaults, whose calls cost 18 to 30 us
    less (torch 2.13, Zen 5: 190 instead of 213 for info_nce of 64 pairs, forward and backward,
    3 to 7 % of 256 pairs'), and that itself where torch has lost a private name."""
    if not all(hasattr(torch._C, name) for name in PRIVATE):
        name = op._schema.name
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_LIBRARY)
        return

    def below(keyset: Any, inputs: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = below(inputs[-1], inputs[:-1])
            setup_context(ctx, inputs[:-1], output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            return (*backward(ctx, *grads), None)

    def call(keyset: Any, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Gradient.apply(*inputs, keyset)
        return below(keyset, inputs)

    _LIBRARY.impl(op._schema.name, call, "Autograd", with_keyset=True)


def save(ctx: Any, **values: Any) -> None:
    """Keep values for the backward pass, which ``saved_values`` finds by name."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for name, value in values.items():
        kept = tensors if isinstance(value, Tensor) else others
        kept[name] = value
    ctx.names_of_tensors = tuple(tensors)
    ctx.save_for_backward(*tensors.values())
    ctx.other_values = others


def saving(results: Sequence[str], without: Sequence[str] = ()) -> Callable[[Any, Any, Any], None]:
    """``save`` of ``define_gradient`` that keeps the results of these names, and the arguments that
    are not named in ``without``."""

    def keep(ctx: Any, arguments: Any, output: Any) -> None:
        values = dict(zip(arguments._fields, arguments, strict=True))
        for name in results:
            values[name] = getattr(output, name)
        for name in without:
            del values[name]
        save(ctx, **values)

    return keep


def saved_values(ctx: Any) -> Any:
    """What ``save`` has kept, by name."""
    tensors = dict(zip(ctx.names_of_tensors, ctx.saved_tensors, strict=True))
    return SimpleNamespace(**tensors, **ctx.other_values)


def call_saved(function: Callable[..., Named], saved: Any, **given: Any) -> Named:
    """Call an op with the arguments ``given``; the others are saved values of the same names."""
    values = vars(saved) | given
    arguments: dict[str, Any] = {}
    for name in _REGISTERED[function].arguments._fields:
        arguments[name] = values[name]
    return function(**arguments)


def refuse_gradient(function: Callable[..., Any], public: str) -> None:
    """Asking for a gradient of the function's op, a second derivative of ``public``, raises."""

    def refuse(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        raise RuntimeError(
            f"{public}: its fused backends have no second derivative; use backend='reference' for "
            "it"
        )

    _register_autograd(_REGISTERED[function].op, refuse, lambda ctx, inputs, output: None)


def wanted_gradients(ctx: Any, function: Callable[..., Any]) -> Any:
    """Whether each argument of the function wants a gradient from the running backward pass."""
    arguments = _REGISTERED[function].arguments
    return arguments._make(ctx.needs_input_grad[: len(arguments._fields)])


def _arguments_of(op: Any) -> Any:
    """A named tuple of the op's arguments."""
    return namedtuple("Arguments", [argument.name for argument in op._schema.arguments])


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype of sums and losses: fp32, or fp64 for fp64 input (reference only)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty(x: Tensor, *shape: int) -> Tensor:
    """An empty tensor for sums of x."""
    return x.new_empty(shape, dtype=accumulator(x))


def gradient_like(gradient: Tensor, scalar: Tensor) -> Tensor:
    """The gradient of a scalar, [] or [1], in its dtype and shape."""
    if gradient.dtype == scalar.dtype and gradient.ndim == scalar.ndim:
        return gradient
    return gradient.to(scalar.dtype).reshape(scalar.shape)


def direction_weight(both_directions: bool, reduction: str, n: int) -> float:
    """What the loss of one direction counts in the result: 1/2 where a pair's loss is half the sum
    of both directions, 1/N of that for the mean."""
    weight = 0.5 if both_directions else 1.0
    return weight / max(n, 1) if reduction == "mean" else weight


def reduce(losses: Tensor, reduction: str, count: int | Tensor) -> Tensor:
    """Mean (0 for no rows), sum, or the rows themselves."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))


def reduce_weighted(
    losses: Tensor,
    counted: Tensor,
    weights: Tensor | None,
    reduction: str,
    columns: Local = LOCAL,
) -> Tensor:
    """Weighted losses [N]: their mean, over the total weight of the rows that are ``counted`` (1: a
    row has a loss, 0: it has none) averaged over the ranks of ``columns``, their sum, or
    themselves."""
    row_weights = counted
    if weights is not None:
        weights = weights.to(losses.dtype)
        losses = losses * weights
        row_weights = counted * weights
    if reduction != "mean":
        return losses.sum() if reduction == "sum" else losses
    total = columns.mean(row_weights.sum())
    return losses.sum() / total.where(total > 0, 1)


# Asked here, as torch 2.8 cannot trace the question. "meta" has no autocast.
AUTOCAST_DEVICES = [d for d in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(d)]


def without_autocast(device_type: str) -> AbstractContextManager:
    """Turn autocast off, on devices that have it."""
    if device_type in AUTOCAST_DEVICES:
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def untraced(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Keep a function out of ``torch.compile``'s graphs, with all that it calls.

    ``torch.compiler.disable`` imports dynamo at once and ``torch._disable_dynamo`` in the first
    call, for 0.7 to 1.9 s; here it is imported only by who compiles.
    """
    disabled = torch._disable_dynamo(function)

    @functools.wraps(function)
    def plain(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        # While dynamo traces, and while code that it has compiled calls this.
        if torch.compiler.is_compiling() or get_eval_frame_callback():
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return plain


def in_transform() -> bool:
    """Whether torch.func's grad, vmap or jvp, or forward-mode differentiation, is active."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def wants_gradient(*inputs: Tensor) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
