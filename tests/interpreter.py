"""Makes Triton's interpreter several times faster: what follows from a type is derived once, and a
check that must pass is skipped. Kernels compute the same."""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.language import core, semantic
from triton.runtime import interpreter


def speed_up() -> None:
    patch_each_module_once()
    derive_from_each_type_once()
    skip_checks_that_pass()


def patch_each_module_once() -> None:
    """The interpreter patches triton.language at every call of a device function, tl.sum's too;
    once for each module and launch is enough."""
    patch = interpreter._patch_lang
    launch = interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None
        patched.add(module)
        return patch(function)

    def launch_afresh(executor: Any, *arguments: Any, **options: Any) -> None:
        patched.clear()
        launch(executor, *arguments, **options)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh


def derive_from_each_type_once() -> None:
    """The shape of a tensor, the size of a block and the dtype of its array."""
    init_tensor = core.tensor.__init__
    init_block_type = core.block_type.__init__
    get_np_dtype = interpreter._get_np_dtype
    tensors: dict[str, dict[str, Any]] = {}  # attributes by the name of the type
    block_types: dict[tuple[Any, ...], dict[str, Any]] = {}
    np_dtypes: dict[str, np.dtype] = {}
    shapes: dict[tuple[int, ...], Any] = {}

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            init_tensor(self, handle, type)
            sizes = tuple(size.value for size in self.shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            tensors[type.name] = vars(self) | {"handle": None}
        vars(self).update(tensors[type.name], handle=handle, type=type)

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = [size.value if isinstance(size, core.constexpr) else size for size in shape]
        key = (element_ty.name, *sizes)
        if key not in block_types:
            init_block_type(self, element_ty, shape)
            block_types[key] = dict(vars(self))
        vars(self).update(block_types[key])

    def np_dtype(type: Any) -> np.dtype:
        if type.name not in np_dtypes:
            np_dtypes[type.name] = get_np_dtype(type)
        return np_dtypes[type.name]

    core.tensor.__init__ = tensor
    core.block_type.__init__ = block_type
    interpreter._get_np_dtype = np_dtype


def skip_checks_that_pass() -> None:
    """Of shapes that are one and the same, and for an overflow: each sum, difference and product of
    int32 is computed in int64 too, for an assertion that only ``debug`` makes."""
    semantics = semantic.TritonSemantic
    broadcast = semantics.broadcast_impl_value
    check_overflow = semantics.binary_op_sanitize_overflow_impl

    def broadcast_others(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    def check_in_debug(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        if self.builder.options.debug:
            check_overflow(self, lhs, rhs, binary_op)

    semantics.broadcast_impl_value = broadcast_others
    semantics.binary_op_sanitize_overflow_impl = check_in_debug
