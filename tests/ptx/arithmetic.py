"""Arithmetic of PTX that NumPy has no name for, on arrays over lanes.

u4, i4, f4, …: NumPy's types of so many bytes. bf16 and tf32 are kept as their bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

u1, u2, u4, u8 = (np.dtype(f"u{size}") for size in (1, 2, 4, 8))
i1, i2, i4, i8 = (np.dtype(f"i{size}") for size in (1, 2, 4, 8))
f2, f4, f8 = (np.dtype(f"f{size}") for size in (2, 4, 8))
# Type of PTX -> name of NumPy's, and bytes.
NUMPY = {f"b{8 * size}": f"u{size}" for size in (1, 2, 4, 8)}
NUMPY |= {f"u{8 * size}": f"u{size}" for size in (1, 2, 4, 8)}
NUMPY |= {f"s{8 * size}": f"i{size}" for size in (1, 2, 4, 8)}
NUMPY |= {"f16": "f2", "f32": "f4", "f64": "f8", "bf16": "u2", "tf32": "u4"}
NUMPY |= {"f16x2": "u4", "bf16x2": "u4", "f32x2": "u8"}
SIZE = {name: int(numpy_name[1]) for name, numpy_name in NUMPY.items()}
where = np.where


@dataclass
class Options:
    """How a GPU is modelled where models differ, and what is looked for; one set for a process."""

    product_sums: Literal["truncated", "cut", "nearest"] = "truncated"  # of tensor cores
    approximate_ulps: float = 0.0  # noise of approximate instructions, units in the last place
    check: bool = True  # races and uninitialised bytes
    count: bool = False  # bank conflicts and sectors of each instruction
    lanes_together: int = 2048


options = Options()


class EmulatorError(Exception):
    """What a GPU would do wrong, or what the emulator does not know."""


def flush(x):
    return where(np.abs(x) < f4.type(2.0**-126), np.copysign(f4.type(0), x), x)


def bf16_up(x):
    return (np.asarray(x, u2).astype(u4) << u4.type(16)).view(f4)


def bf16_down(x):
    """To nearest even; a NaN becomes 0x7fff."""
    b = np.asarray(x, f4).view(u4)
    r = ((b + u4.type(0x7FFF) + ((b >> u4.type(16)) & u4.type(1))) >> u4.type(16)).astype(u2)
    return where(np.isnan(x), u2.type(0x7FFF), r)


def truncated(x):
    """fp64 to fp32 towards zero."""
    y = x.astype(f4)
    return where(np.abs(y.astype(f8)) > np.abs(x), np.nextafter(y, f4.type(0)), y)


def approx(x, absolute=0.0):
    """The result of an approximate instruction from its exact one. ``absolute``: the error is that
    of a number at least as large."""
    y = np.asarray(x).astype(f4)
    if options.approximate_ulps:
        # The same for equal values; results that need no rounding, as 2^0, are exact on a GPU.
        hashed = (y.view(u4) * u4.type(2654435761)) >> u4.type(8)
        noise = hashed.astype(f4) * f4.type(2.0**-23) - 1
        error = noise * f4.type(options.approximate_ulps * 2.0**-23)
        size = np.maximum(np.abs(y), f4.type(absolute)) * np.sign(y)
        y = where(y == x, y, y + size * error)
    return y


def halves(x):
    """The low and the high 16 bits."""
    x = np.asarray(x, u4)
    return x.astype(u2), (x >> u4.type(16)).astype(u2)


def joined(low, high):
    return np.asarray(low, u2).astype(u4) | np.asarray(high, u2).astype(u4) << u4.type(16)


def packed(kind, f, *operands):
    """f on the two halves of f16x2 or bf16x2 operands, in fp64, rounded once."""
    parts = zip(*(halves(x) for x in operands), strict=True)
    if kind == "bf16x2":
        wide = ((bf16_up(x).astype(f8) for x in part) for part in parts)
        return joined(*(bf16_down(f(*part).astype(f4)) for part in wide))
    wide = ((x.view(f2).astype(f8) for x in part) for part in parts)
    return joined(*(f(*part).astype(f2).view(u2) for part in wide))


def shift(a, by, left):
    bits = a.dtype.itemsize * 8
    by = np.asarray(by).astype(a.dtype)
    over = by.astype(u8) >= bits
    inside = where(over, a.dtype.type(bits - 1), by).astype(a.dtype)
    if left:
        return where(over, a.dtype.type(0), a << inside)
    return a >> inside if a.dtype.kind == "i" else where(over, a.dtype.type(0), a >> inside)


def funnel(low, high, by, left, wrap):
    by = np.asarray(by).astype(u8)
    by = by & u8.type(31) if wrap else np.minimum(by, u8.type(32))
    both = np.asarray(low).astype(u8) | np.asarray(high).astype(u8) << u8.type(32)
    return ((both << by) >> u8.type(32) if left else both >> by).astype(u4)


def bfe(a, pos, length):
    bits = a.dtype.itemsize * 8
    pos, length = int(pos) & 255, int(length) & 255  # immediates in all that compilers write
    if length == 0:
        return a & a.dtype.type(0)
    if a.dtype.kind == "u":
        return (a >> a.dtype.type(pos)) & a.dtype.type(min((1 << length) - 1, (1 << bits) - 1))
    up = max(0, bits - pos - length)
    return (a << a.dtype.type(up)) >> a.dtype.type(up + pos)


def bfi(a, b, pos, length):
    pos, length = int(pos) & 255, int(length) & 255
    mask = b.dtype.type((((1 << length) - 1) << pos) & ((1 << b.dtype.itemsize * 8) - 1))
    return (b & ~mask) | ((a << b.dtype.type(pos)) & mask)


def prmt(a, b, selector):
    a, b, selector = (np.asarray(x, u4) for x in (a, b, selector))
    both = a.astype(u8) | b.astype(u8) << u8.type(32)
    result = np.zeros(np.broadcast(a, b, selector).shape, u4)
    for i in range(4):
        pick = (selector >> u4.type(4 * i)) & u4.type(15)
        byte = (both >> ((pick & u4.type(7)).astype(u8) * u8.type(8))).astype(u4) & u4.type(255)
        byte = where(pick & u4.type(8), where(byte & u4.type(128), u4.type(255), u4.type(0)), byte)
        result = result | byte << u4.type(8 * i)
    return result


def lop3(a, b, c, table):
    result = a & u4.type(0)
    for i in range(8):
        if int(table) >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


def mul_hi(a, b):
    if a.dtype.itemsize == 4:
        wide = a.dtype.kind + "8"
        return (
            np.asarray(a).astype(wide) * np.asarray(b).astype(wide) >> np.dtype(wide).type(32)
        ).astype(a.dtype)
    product = np.asarray(a).astype(object) * np.asarray(b).astype(object)
    return np.array(product // (1 << 64)).astype(a.dtype)


def int_div(a, b, rest=False):
    a, b = np.broadcast_arrays(a, b)
    safe = where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        q = a // safe
    else:
        sign = np.sign(a.astype(i8)) * np.sign(safe.astype(i8))
        q = (np.abs(a.astype(i8)) // np.abs(safe.astype(i8)) * sign).astype(a.dtype)
    return a - q * safe if rest else q


INTEGERS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_int(x, kind, mode):
    """A float to an integer type: rounded, saturated, NaN becomes 0."""
    x = np.asarray(x).astype(f8)
    x = INTEGERS[mode](x)
    info = np.iinfo(kind)
    clipped = np.clip(where(np.isnan(x), 0, x), float(info.min), float(info.max))
    top = clipped >= float(info.max)
    return where(top, info.max, where(top, 0, clipped).astype(kind)).astype(kind)


def float_max(a, b, least, nan):
    if nan:
        result = np.minimum(a, b) if least else np.maximum(a, b)
    else:
        result = np.fmin(a, b) if least else np.fmax(a, b)
    # PTX: -0 < +0. NumPy returns either, so that lanes that reduce the same numbers would differ.
    return where(a == b, where(np.signbit(a) != least, b, a), result)


# ---- matrix fragments: lane = 4 * group + thread ----


def halves_of(regs, kind):
    """[regs, lanes] of two elements each -> fp64 [regs, warps, 8, 4, 2]; of tf32 one each."""
    raw = np.stack(regs)
    if kind == "tf32":
        return tf32_value(raw).reshape(len(regs), -1, 8, 4, 1)
    return value_of(raw.view(u2), kind).reshape(len(regs), -1, 8, 4, 2)


def tf32_value(raw):
    """Tensor cores ignore the low 13 bits of fp32."""
    return (raw & u4.type(0xFFFFE000)).view(f4).astype(f8)


def value_of(raw, kind):
    """16 bits as bf16 or f16, in fp64; 32 bits as tf32."""
    if kind == "tf32":
        return tf32_value(np.ascontiguousarray(raw))
    return (bf16_up(raw) if kind == "bf16" else np.ascontiguousarray(raw).view(f2)).astype(f8)


def accumulate(acc, a, b, depth=8):
    """acc [w, m, n] fp32 + a [w, m, k] b [w, k, n], cut to fp32 after every ``depth`` products."""
    if options.product_sums == "nearest":
        return (acc.astype(f8) + a @ b).astype(f4)
    for k in range(0, a.shape[-1], depth):
        if options.product_sums == "cut":
            columns = b[..., k : k + depth, :].swapaxes(-1, -2)
            terms = a[..., :, None, k : k + depth] * columns[..., None, :, :]
            terms = np.concatenate([acc[..., None].astype(f8), terms], -1)
            unit = np.ldexp(1.0, np.frexp(np.abs(terms).max(-1, keepdims=True))[1] - 24)
            acc = truncated((np.trunc(terms / unit) * unit).sum(-1))
            continue
        acc = truncated(acc.astype(f8) + a[..., k : k + depth] @ b[..., k : k + depth, :])
    return acc


def mma(shape, kind, a, b, c):
    """Registers of the fragments of m16n8kK -> those of the result."""
    integers = kind in ("s8", "u8")
    if integers:
        dtype = i1 if kind == "s8" else u1
        parts = [np.stack(r).view(dtype).astype(i8).reshape(len(r), -1, 8, 4, 4) for r in (a, b)]
    else:
        parts = [halves_of(r, kind) for r in (a, b)]
    a, b = parts
    elements = a.shape[-1]  # of a register
    warps = a.shape[1]
    a = a.reshape(-1, 2, warps, 8, 4, elements).transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, -1)
    b = b.transpose(1, 0, 3, 4, 2).reshape(warps, -1, 8)
    acc = np.stack(c).view(i4 if integers else f4)
    acc = acc.reshape(2, 2, warps, 8, 4).transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
    depth = 4 if kind == "tf32" else 8
    d = (acc + a @ b).astype(i4) if integers else accumulate(acc, a, b, depth)
    d = d.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
    return [np.ascontiguousarray(x).view(u4) for x in d]
