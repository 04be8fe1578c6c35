"""PTX as text -> Python functions, one for each basic block, that ``machine.Run`` executes.

An instruction becomes one line over arrays of lanes, by the tables below: a row is a template whose
{0}, {1}, … are the source operands. What is more than arithmetic has a method, ``do_mov`` for mov.
"""

from __future__ import annotations

import collections
import re
from typing import Any, NamedTuple

import numpy as np

from tests.ptx import arithmetic
from tests.ptx.arithmetic import NUMPY, SIZE, EmulatorError, f4, f8, u4, u8
from tests.ptx.launch import Launch


class Instruction(NamedTuple):
    guard: tuple[str, bool] | None  # predicate, and the value that does not execute
    op: str
    args: list[str]
    place: tuple[int, str]  # line of the PTX, line of the source


class Block(NamedTuple):
    run: Any  # a function of the run, its registers and the mask
    end: tuple[str, Any, Any]  # "next", "bra", "ret" or "bar"; guard; where to, or which barrier
    place: tuple[int, str]


COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARE |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}

# Integers, of the type of the instruction.
INTEGER = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "mad": "{0} * {1} + {2}",
    "div": "int_div({0}, {1}, False)",
    "rem": "int_div({0}, {1}, True)",
    "min": "np.minimum({0}, {1})",
    "max": "np.maximum({0}, {1})",
    "abs": "np.abs({0})",
    "neg": "-{0}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "not": "~{0}",
}
# 32 bits, whatever the instruction calls them.
WORD = {
    "prmt": "prmt({0}, {1}, {2})",
    "popc": "np.bitwise_count({0}).astype(u4)",
}
# Rounded as NumPy rounds.
FLOAT = {
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
    "abs": "np.abs({0})",
    "neg": "-{0}",
    "sqrt": "np.sqrt({0})",
    "rcp": "(1 / {0})",
}
# In fp64, then rounded as ``arithmetic.approx`` says.
APPROXIMATE = {
    "div": "{0} / {1}",
    "ex2": "np.exp2({0})",
    "lg2": "np.log2({0})",
    "rcp": "1 / {0}",
    "rsqrt": "1 / np.sqrt({0})",
    "tanh": "np.tanh({0})",
    "sin": "np.sin({0})",
    "cos": "np.cos({0})",
}
# On both halves of f16x2 and bf16x2.
PACKED = {
    "add": "np.add",
    "sub": "np.subtract",
    "mul": "np.multiply",
    "fma": "(lambda a, b, c: a * b + c)",
    "min": "np.fmin",
    "max": "np.fmax",
    "neg": "np.negative",
    "abs": "np.abs",
}
# On both of f32x2, sm_120.
TWO_FLOATS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "fma": "({0}.astype(f8) * {1} + {2}).astype(f4)",
}
MODIFIERS = {"rn", "ftz", "approx", "full", "NaN", "sat", "lo", "hi", "wide", "relu"}
# Order among CTAs and hints, which are not modelled.
NOTHING = {
    "membar",
    "fence",
    "griddepcontrol",
    "nanosleep",
    "prefetch",
    "discard",
    "applypriority",
}
INTEGER_ROUNDINGS = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}
ROUNDINGS = ("rn", "rz", "rm", "rp", "rna", *INTEGER_ROUNDINGS)


SPACE = re.compile(r"\s*")
# A label, a brace, or a statement.
TOKEN = re.compile(r"\s*(?:([\w$]+):(?!:)|([{}])|((?:[^;{}]|\{[^{};]*\})*);)", re.DOTALL)
LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:.*inlined_at\s+(\d+)\s+(\d+))?")


def split_args(text):
    """At commas outside of braces and brackets."""
    args, depth, last = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            args.append(text[last:i].strip())
            last = i + 1
    args.append(text[last:].strip())
    return [a for a in args if a]


def unknown_modifiers(base, mods):
    """Modifiers of arithmetic that no table accounts for."""
    t = mods[-1]
    known = set(MODIFIERS)
    if t in ("f16", "bf16"):
        known.add("f32")
    if t[0] in "su":
        known -= {"sat"} if base in ("min", "max") and t == "s32" else {"sat", "relu"}
    else:
        known.discard("relu")
    return set(mods[:-1]) - known


class Kernel:
    """A kernel of a PTX module: the only one, or the one so named."""

    def __init__(self, text, name=None):
        self.lines = text.split("\n")
        named_files = re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)
        files = {int(number): path.rsplit("/", 1)[-1] for number, path in named_files}
        code = re.sub(r"//[^\n]*", "", text)
        entries = [m for m in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", code)]
        entry = next(m for m in entries if name is None or m[1] == name)
        self.name = entry[1]
        self.params, self.param_sizes = [], []
        for param in filter(str.strip, entry[2].split(",")):
            symbol, _, array = param.split()[-1].partition("[")
            self.params.append(symbol)
            if array:
                self.param_sizes.append(int(array.rstrip("] \n")))
            else:
                self.param_sizes.append(SIZE[re.search(r"\.([busf]\d+)\b", param)[1]])
        depth, end = 1, entry.end()
        while depth:
            depth += (code[end] == "{") - (code[end] == "}")
            end += 1
        self.symbols, self.dynamic_offset, dynamic = {}, 0, []
        body = code[entry.end() : end - 1]
        shared = r"(\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.b(\d+)\s+([\w$]+)\[(\d*)\]"
        for extern, align, size, symbol, count in re.findall(shared, code):
            if extern:
                dynamic.append(symbol)
            elif re.search(re.escape(symbol) + r"\b", body):
                offset = -(-self.dynamic_offset // int(align)) * int(align)
                self.symbols[symbol] = offset
                self.dynamic_offset = offset + int(size) // 8 * int(count)
        if self.dynamic_offset:
            self.dynamic_offset = -(-self.dynamic_offset // 128) * 128
        self.symbols |= dict.fromkeys(dynamic, self.dynamic_offset)
        self.instructions, self.labels = [], {}
        self.regs, self.reg_kinds, self.prefixes = {}, [], {}
        self.parse(body, code[: entry.end()].count("\n") + 1, files)
        widths = [w for i in self.instructions if (w := self.shared_width(i))]
        self.shared_grain = min([4, *widths])
        self.has_tensor_memory = any(i.op.startswith("tcgen05") for i in self.instructions)
        self.constants, self.unmodelled = {}, []
        self.blocks = self.compile()

    def parse(self, body, line, files):
        source, scopes, at, unique, counted = "?", [{}], 0, 0, 0
        while (start := SPACE.match(body, at).end()) < len(body):
            rest = body[start : max(start, body.find("\n", start))]  # .loc ends with its line
            found = TOKEN.match(body, start)
            if loc := LOCATION.match(rest):
                source = f"{files.get(int(loc[1]), loc[1])}:{loc[2]}"
                if loc[3]:
                    source += f" < {files.get(int(loc[3]), loc[3])}:{loc[4]}"
                at = start + len(rest)
                continue
            if found is None:
                raise EmulatorError(f"cannot parse {rest!r}")
            at = found.end()
            if found[1]:
                inner = (scope[found[1]] for scope in reversed(scopes) if found[1] in scope)
                label = next(inner, found[1])
                self.labels[label] = len(self.instructions)
            elif found[2] == "{":
                scopes.append({})
                end, depth = at, 1
                while depth:
                    depth += (body[end] == "{") - (body[end] == "}")
                    end += 1
                if end - at < 2000:  # labels of inline assembly
                    for label in re.findall(r"(?m)^\s*([A-Za-z_][\w$]*):(?!:)", body[at:end]):
                        unique += 1
                        scopes[-1][label] = f"{label}@{unique}"
            elif found[2] == "}":
                scopes.pop()
            else:
                text = " ".join(found[3].split())
                if not text or text.startswith((".pragma", ".branchtargets")):
                    continue
                if text.startswith(".reg"):
                    _, kind, names = text.split(None, 2)
                    for one in names.split(","):
                        one = one.strip()
                        if "<" in one:
                            self.prefixes[one.split("<")[0]] = kind[1:]
                        elif len(scopes) > 1:
                            unique += 1
                            scopes[-1][one] = f"{one}@{unique}"
                            self.prefixes[f"{one}@{unique}"] = kind[1:]
                        else:
                            self.prefixes[one] = kind[1:]
                    continue
                if text.startswith((".shared", ".local", ".param")):
                    if text.startswith(".local"):
                        raise EmulatorError("local memory is not modelled")
                    continue
                for scope in scopes[1:]:
                    for old, new in scope.items():
                        text = re.sub(r"(?<![\w%$@])" + re.escape(old) + r"(?![\w$@])", new, text)
                guard = re.match(r"@(!?)([%\w$@]+)\s+", text)
                if guard:
                    text = text[guard.end() :]
                op, _, args = text.partition(" ")
                line += body.count("\n", counted, start)
                counted = start
                predicate = (guard[2], bool(guard[1])) if guard else None
                place = line, source
                self.instructions.append(Instruction(predicate, op, split_args(args), place))

    def shared_width(self, i):
        parts = i.op.split(".")
        if parts[0] in ("ld", "st") and "shared" in [p.split("::")[0] for p in parts]:
            return SIZE.get(parts[-1])
        return None

    # -- operands --

    def kind_of(self, name):
        declared = self.prefixes.get(name) or self.prefixes[name.rstrip("0123456789")]
        return "?" if declared == "pred" else f"u{SIZE[declared]}"

    def reg(self, name):
        if name == "_":
            return None
        if name not in self.regs:
            self.regs[name] = len(self.reg_kinds)
            self.reg_kinds.append(self.kind_of(name))
        return self.regs[name]

    def constant(self, value):
        name = f"k{len(self.constants)}"
        self.constants[name] = value
        return name

    def is_reg(self, text):
        return text in self.prefixes or text.rstrip("0123456789") in self.prefixes

    def operand(self, text, kind):
        """Python for a source operand as an array (or scalar) of ``kind``, a NumPy name or '?'."""
        if text.startswith("!"):
            return f"~{self.operand(text[1:], kind)}"
        if text.startswith("-") and self.is_reg(text[1:]):
            return f"-{self.operand(text[1:], kind)}"
        if self.is_reg(text):
            have, index = self.kind_of(text), self.reg(text)
            if have == kind or kind == "?":
                return f"R[{index}]"
            if have[1] == kind[1]:
                return f"R[{index}].view({kind})"
            if int(have[1]) > int(kind[1]) and kind[0] != "f":
                return f"R[{index}].astype(u{kind[1]}).view({kind})"
            raise EmulatorError(f"register {text} as {kind}")
        if text.startswith("%") or text == "WARP_SZ":
            if text == "WARP_SZ":
                return self.constant(u4.type(32))
            value = f"E.special[{text!r}]"
            return value if kind == "u4" else f"{value}.astype({kind})"
        symbol, _, offset = text.partition("+")
        if symbol in self.symbols:
            return self.constant(np.dtype(kind).type(self.symbols[symbol] + int(offset or 0)))
        if text in self.params:  # only its tensor map is read there
            return self.constant(np.dtype(kind).type(4096 * (self.params.index(text) + 1)))
        if match := re.match(r"0[fF]([0-9a-fA-F]{8})$", text):
            bits = np.array(int(match[1], 16), u4).view(f4)[()]
            return self.constant(bits.view(kind if kind != "f8" else f4))
        if match := re.match(r"0[dD]([0-9a-fA-F]{16})$", text):
            return self.constant(np.array(int(match[1], 16), u8).view(f8)[()].view(kind))
        if text in ("true", "false"):
            return self.constant(np.bool_(text == "true"))
        value = int(text.rstrip("U"), 0)
        if kind == "?":
            return self.constant(np.bool_(value))
        size = kind[1]
        return self.constant(
            np.array(value & ((1 << 8 * int(size)) - 1), f"u{size}").view(kind)[()]
        )

    def address(self, text, kind):
        inside = text.strip()[1:-1].strip()
        base, _, offset = inside.partition("+") if "+" in inside else (inside, "", "0")
        base, offset = base.strip(), int(offset.strip() or 0, 0)
        if self.is_reg(base):
            have = self.kind_of(base)
            code = f"R[{self.reg(base)}]"
            if not offset:
                return code
            distance = np.array(offset & ((1 << 8 * int(have[1])) - 1), have)[()]
            return f"({code} + {self.constant(distance)})"
        if base in self.symbols:
            return self.constant(u4.type(self.symbols[base] + offset))
        return self.constant(np.array(int(base, 0) + offset, kind)[()])

    def result(self, text, code, kind):
        """Python that writes a value of ``kind`` to a register, extended if that is wider."""
        if text == "_":
            return f"{code}"
        have = self.kind_of(text)
        if have != kind:
            if have == "?" or kind == "?":
                raise EmulatorError(f"{kind} to {text}")
            if have[1] == kind[1]:
                code = f"({code}).view({have})"
            elif kind[0] == "i":
                code = f"({code}).astype(i{have[1]}).view({have})"
            else:
                code = f"({code}).view(u{kind[1]}).astype({have})"
        return f"E.write({self.reg(text)}, {code}, m)"

    def names(self, text):
        text = text.strip()
        return [self.reg(a) for a in split_args(text[1:-1])] if text[0] == "{" else [self.reg(text)]

    # -- code --

    def compile(self):
        starts = {0, *self.labels.values()}
        for i, ins in enumerate(self.instructions):
            if self.ends_block(ins):
                starts.add(i + 1)
        starts = sorted(s for s in starts if s < len(self.instructions))
        index = {s: n for n, s in enumerate(starts)}
        index[len(self.instructions)] = len(starts)
        ends_before = [*starts[1:], len(self.instructions)]
        self.block_range = list(zip(starts, ends_before, strict=True))
        source, ends = [], []
        for n, (s, e) in enumerate(self.block_range):
            lines, last = [], self.instructions[e - 1]
            end = ("next", None, None)
            if self.ends_block(last):
                guard = (self.reg(last.guard[0]), last.guard[1]) if last.guard else None
                op = last.op.split(".")[0]
                if op == "bra":
                    end = ("bra", guard, index[self.labels[last.args[0]]])
                elif op in ("ret", "exit"):
                    end = ("ret", guard, None)
                else:
                    if "arrive" in last.op:
                        raise EmulatorError(f"{self.name}: bar.arrive is not modelled")
                    ids = [("reg", self.reg(a)) if self.is_reg(a) else int(a, 0) for a in last.args]
                    end = ("bar", guard, (ids[0], ids[1] if len(ids) > 1 else None))
                e -= 1
            for ins in self.instructions[s:e]:
                try:
                    code = self.emit(ins)
                except (KeyError, ValueError, StopIteration, EmulatorError) as error:
                    message = f"{self.name}: not modelled: {ins.op} {', '.join(ins.args)} "
                    message += f"(PTX line {ins.place[0]}, {error!r})"
                    code = f"raise EmulatorError({message!r})"
                    self.unmodelled.append(message)
                if ins.guard:
                    p = f"{'~' if ins.guard[1] else ''}R[{self.reg(ins.guard[0])}]"
                    lines.append(f"m0 = m; m = {p} if m is None else m & {p}")
                    lines.append(f"if m.any(): {code}")
                    lines.append("m = m0")
                else:
                    lines.append(code)
            statements = "".join(f"    {line}\n" for line in lines or ["pass"])
            source.append(f"def block{n}(E, R, m):\n{statements}")
            ends.append((end, last.place))
        space = vars(arithmetic) | self.constants
        exec(compile("\n".join(source), f"<{self.name}>", "exec"), space)
        return [Block(space[f"block{n}"], end, place) for n, (end, place) in enumerate(ends)]

    @staticmethod
    def ends_block(ins):
        parts = ins.op.split(".")
        if parts[0] in ("bar", "barrier"):
            return "warp" not in parts and "cluster" not in parts
        return parts[0] in ("bra", "ret", "exit")

    def emit(self, ins):
        """The line of Python for an instruction that does not end a block."""
        args = ins.args
        base, *mods = ins.op.split(".")
        t = mods[-1] if mods else base
        k = NUMPY.get(t, "?" if t == "pred" else None)
        place = self.constant(ins.place)
        if special := getattr(self, f"do_{base}", None):
            return special(mods, args, place)
        if base == "fence" and mods[:2] == ["proxy", "async"]:
            return "E.fence(m)"
        if base in NOTHING:
            return "pass"
        if base == "trap":
            return f"raise E.error({place}, 0, 'trap')"
        if base in WORD:
            return self.result(args[0], self.filled(WORD[base], args[1:], "u4"), "u4")
        if k is None or unknown_modifiers(base, mods):
            raise EmulatorError(f"{ins.op} is not known")
        if t in ("f16", "bf16") and "f32" in mods:
            return self.mixed(base, t, args)
        if t == "f32x2":
            return self.two_floats(base, mods, args)
        if t in ("f16x2", "bf16x2"):
            operands = ", ".join(self.operand(a, "u4") for a in args[1:])
            return self.result(args[0], f"packed({t!r}, {PACKED[base]}, {operands})", "u4")
        if t[0] == "f" or t == "bf16":
            return self.float_op(base, mods, t, args)
        if "wide" in mods or "hi" in mods:
            return self.long_product(base, mods, k, args)
        code = self.filled(INTEGER[base], args[1:], k)
        return self.result(args[0], f"np.maximum({code}, 0)" if "relu" in mods else code, k)

    def filled(self, template, args, kind):
        return template.format(*(self.operand(a, kind) for a in args))

    def mixed(self, base, t, args):
        """sm_100: narrow factors, fp32 terms."""
        narrow = [
            f"bf16_up({self.operand(x, 'u2')})"
            if t == "bf16"
            else f"{self.operand(x, 'f2')}.astype(f4)"
            for x in (args[1:3] if base == "fma" else args[1:2])
        ]
        last = self.operand(args[-1], "f4")
        if base == "fma":
            code = f"({narrow[0]}.astype(f8) * {narrow[1]} + {last}).astype(f4)"
        else:
            code = f"({narrow[0]} {'+-'[('add', 'sub').index(base)]} {last})"
        return self.result(args[0], code, "f4")

    def two_floats(self, base, mods, args):
        if mods[:-1] not in ([], ["rn"]):
            raise EmulatorError("f32x2 with other rounding")
        operands = [
            f"np.broadcast_to({self.operand(x, 'u8')}, E.lanes).copy().view(f4)" for x in args[1:]
        ]
        code = TWO_FLOATS[base].format(*operands)
        return self.result(args[0], f"({code}).view(u8)", "u8")

    def long_product(self, base, mods, k, args):
        wide = f"{k[0]}{2 * int(k[1])}" if "wide" in mods else k
        if "wide" in mods:
            code = self.filled(f"{{0}}.astype({wide}) * {{1}}.astype({wide})", args[1:3], k)
        else:
            code = self.filled("mul_hi({0}, {1})", args[1:3], k)
        if base == "mad":
            code += f" + {self.operand(args[3], wide)}"
        return self.result(args[0], code, wide)

    def float_op(self, base, mods, t, args):
        k = NUMPY[t]
        ftz = "ftz" in mods and t == "f32"
        if t == "bf16":
            a = [f"bf16_up({self.operand(x, 'u2')})" for x in args[1:]]
        else:
            a = [self.operand(x, k) for x in args[1:]]
        if ftz:
            a = [f"flush({x})" for x in a]
        if base in ("fma", "mad"):
            wide = "np.longdouble" if t == "f64" else "f8"
            code = f"({a[0]}.astype({wide}) * {a[1]}.astype({wide}) + {a[2]}.astype({wide}))"
            code += f".astype({'f4' if t == 'bf16' else k})"
        elif base in ("min", "max"):
            how = f"{base == 'min'}, {'NaN' in mods}"
            code = f"float_max({a[0]}, {a[1]}, {how})"
            if len(a) == 3:
                code = f"float_max({code}, {a[2]}, {how})"
        elif base in APPROXIMATE and "rn" not in mods:
            exact = APPROXIMATE[base].format(*(f"{x}.astype(f8)" for x in a))
            code = f"approx({exact}, {float(base == 'lg2')})"  # lg2: 2^-22 near 1
        else:
            code = FLOAT[base].format(*a)
        if "sat" in mods:
            code = f"np.clip(where(np.isnan({code}), 0, {code}), 0, 1).astype({k})"
        if ftz:
            code = f"flush({code})"
        if t == "bf16":
            code, k = f"bf16_down({code})", "u2"
        return self.result(args[0], code, k)

    def do_shl(self, mods, args, place, left=True):
        k = NUMPY[mods[-1]]
        a = self.operand(args[1], k)
        if re.match(r"[\dx]", args[2]) and int(args[2], 0) < 8 * int(k[1]):
            sign = "<<" if left else ">>"
            return self.result(args[0], f"{a} {sign} {self.operand(args[2], k)}", k)
        return self.result(args[0], f"shift({a}, {self.operand(args[2], 'u4')}, {left})", k)

    def do_shr(self, mods, args, place):
        return self.do_shl(mods, args, place, left=False)

    def do_shf(self, mods, args, place):
        how = f"{'l' in mods}, {'wrap' in mods}"
        code = self.filled(f"funnel({{0}}, {{1}}, {{2}}, {how})", args[1:], "u4")
        return self.result(args[0], code, "u4")

    def do_bfe(self, mods, args, place):
        k = NUMPY[mods[-1]]
        code = f"bfe({self.operand(args[1], k)}, {int(args[2], 0)}, {int(args[3], 0)})"
        return self.result(args[0], code, k)

    def do_bfi(self, mods, args, place):
        k = NUMPY[mods[-1]]
        a, b = (self.operand(x, k) for x in args[1:3])
        return self.result(args[0], f"bfi({a}, {b}, {int(args[3], 0)}, {int(args[4], 0)})", k)

    def do_lop3(self, mods, args, place):
        code = self.filled(f"lop3({{0}}, {{1}}, {{2}}, {args[4]})", args[1:4], "u4")
        return self.result(args[0], code, "u4")

    def do_clz(self, mods, args, place):
        k = NUMPY[mods[-1]]
        code = f"({8 * int(k[1])} - np.frexp({self.operand(args[1], k)}.astype(f8))[1]).astype(u4)"
        return self.result(args[0], code, "u4")

    def do_selp(self, mods, args, place):
        k = NUMPY[mods[-1]]
        a, b = (self.operand(x, k) for x in args[1:3])
        return self.result(args[0], f"where({self.operand(args[3], '?')}, {a}, {b})", k)

    def do_cvta(self, mods, args, place):
        k = NUMPY[mods[-1]]
        mark = " | u8.type(1 << 62)" if "param" in mods else ""
        return self.result(args[0], self.operand(args[1], k) + mark, k)

    def do_mov(self, mods, args, place):
        k = NUMPY.get(mods[-1], "?")
        target, source = args
        if target.startswith("{") or source.startswith("{"):
            names = split_args((target if target.startswith("{") else source)[1:-1])
            part = f"u{int(k[1]) // len(names)}"
            whole = f"u{k[1]}"
            shifts = [f"{whole}.type({8 * int(part[1]) * i})" for i in range(len(names))]
        if target.startswith("{"):
            value = self.operand(source, whole)
            return "; ".join(
                self.result(name, f"({value} >> {shift}).astype({part})", part)
                for name, shift in zip(names, shifts, strict=True)
                if name != "_"
            )
        if source.startswith("{"):
            parts = (
                f"np.asarray({self.operand(name, part)}).astype({whole}) << {shift}"
                for name, shift in zip(names, shifts, strict=True)
            )
            return self.result(target, f"np.asarray({' | '.join(parts)})", whole)
        k = k if k == "?" else f"u{k[1]}"
        return self.result(target, self.operand(source, k), k)

    def do_setp(self, mods, args, place):
        t, comparison = mods[-1], mods[0]
        k = NUMPY[t]
        dst = args[0].split("|")
        a, b = (self.operand(x, k) for x in args[1:3])
        if t == "bf16":
            a, b = f"bf16_up({a})", f"bf16_up({b})"
        if "ftz" in mods:
            a, b = f"flush({a})", f"flush({b})"
        if comparison in ("num", "nan"):
            code = f"(np.isnan({a}) | np.isnan({b}))"
            code = code if comparison == "nan" else f"~{code}"
        elif (k[0] == "f" or t == "bf16") and comparison == "ne":  # ordered
            code = f"(({a} < {b}) | ({a} > {b}))"
        elif (k[0] == "f" or t == "bf16") and comparison[:-1] in COMPARE and comparison[-1] == "u":
            code = f"(({a} {COMPARE[comparison[:-1]]} {b}) | np.isnan({a}) | np.isnan({b}))"
        else:
            code = f"({a} {COMPARE[comparison]} {b})"
        if len(args) == 4:
            logic = {"and": "&", "or": "|", "xor": "^"}[mods[1]]
            if len(dst) == 2:
                raise EmulatorError("setp with two results and a third operand")
            code = f"{code} {logic} {self.operand(args[3], '?')}"
        lines = [self.result(dst[0], code, "?")]
        if len(dst) == 2:
            lines.append(self.result(dst[1], f"~{code}", "?"))
        return "; ".join(lines)

    def do_cvt(self, mods, args, place):
        get, put = self.operand, self.result
        to, from_ = [x for x in mods if x in NUMPY][-2:]
        mode = mods[0] if mods[0] in ROUNDINGS else None
        if "relu" in mods:
            raise EmulatorError("relu")
        if to in ("bf16x2", "f16x2"):
            high, low = (get(a, "f4") for a in args[1:3])
            if mode != "rn":
                raise EmulatorError("rounding mode")
            if to == "bf16x2":
                return put(args[0], f"joined(bf16_down({low}), bf16_down({high}))", "u4")
            code = f"joined({low}.astype(f2).view(u2), {high}.astype(f2).view(u2))"
            return put(args[0], code, "u4")
        if to == "tf32":
            a = get(args[1], "u4")
            half = "0x1000" if mode == "rna" else f"0xFFF + (({a} >> u4.type(13)) & u4.type(1))"
            return put(args[0], f"(({a} + u4.type({half})) & u4.type(0xFFFFE000))", "u4")
        k = NUMPY[to]
        a = get(args[1], NUMPY[from_])
        if from_ == "bf16":
            a = f"bf16_up({a})"
        if "ftz" in mods and from_ == "f32":
            a = f"flush({a})"
        if from_[0] != "f" and from_ != "bf16":  # integers
            if "sat" in mods:
                raise EmulatorError("saturation")
            if to == "bf16":
                return put(args[0], f"bf16_down({a}.astype(f4))", "u2")
            return put(args[0], f"{a}.astype({k})", k)
        if to[0] != "f" and to != "bf16":
            return put(args[0], f"to_int({a}, {k}, {mode!r})", k)
        if mode in INTEGER_ROUNDINGS and to != "bf16":
            return put(args[0], f"{INTEGER_ROUNDINGS[mode]}({a}).astype({k})", k)
        if mode not in ("rn", None):
            raise EmulatorError("rounding mode")
        if to == "bf16":
            return put(args[0], f"bf16_down({a})", "u2")
        code = f"{a}.astype({k})"
        if "sat" in mods:
            code = f"np.clip({code}, 0, 1)"
        return put(args[0], f"flush({code})" if "ftz" in mods and to == "f32" else code, k)

    @staticmethod
    def space(mods):
        space = next(
            (m for m in ("shared", "global") if m in [x.split("::")[0] for x in mods]), None
        )
        if space is None:
            raise EmulatorError("generic or local memory")
        return space

    def do_ld(self, mods, args, place):
        t = mods[-1]
        k, size = NUMPY[t], SIZE[t]
        targets = split_args(args[0][1:-1]) if args[0].startswith("{") else [args[0]]
        if "param" in mods:
            base, _, offset = args[1][1:-1].partition("+")
            lines = []
            for i, target in enumerate(targets):
                code = f"E.param({base.strip()!r}, {int(offset or 0) + i * size}, {k})"
                if target != "_":
                    lines.append(self.result(target, code, k))
            return "; ".join(lines)
        space = self.space(mods)
        kinds = [f"u{size}" if n == "_" else self.kind_of(n) for n in targets]
        address = self.address(args[1], "u4" if space == "shared" else "u8")
        regs = [self.reg(n) for n in targets]
        how = f"{regs}, {kinds}, {address}, {size}, {k[0] == 'i'}"
        return f"E.load({space!r}, {how}, m, {place})"

    def do_st(self, mods, args, place):
        t = mods[-1]
        space = self.space(mods)
        sources = split_args(args[1][1:-1]) if args[1].startswith("{") else [args[1]]
        values = ", ".join(self.operand(s, f"u{SIZE[t]}") for s in sources)
        address = self.address(args[0], "u4")
        return f"E.store({space!r}, [{values}], {address}, {SIZE[t]}, m, {place})"

    def do_atom(self, mods, args, place):
        t = mods[-1]
        op = next(m for m in mods if m in ("add", "max", "min", "and", "or", "exch", "cas"))
        values = ", ".join(self.operand(a, NUMPY[t]) for a in args[2:])
        address = self.address(args[1], "u8")
        reg = self.reg(args[0])
        return f"E.atomic({op!r}, {reg}, {address}, [{values}], {NUMPY[t]}, m, {place})"

    def do_red(self, mods, args, place):
        return self.do_atom(mods, ["_", *args], place)

    def do_cp(self, mods, args, place):
        if mods[:2] == ["async", "commit_group"]:
            return "E.commit(m)"
        if mods[:2] == ["async", "wait_group"]:
            return f"E.wait_group({int(args[0], 0)}, m)"
        if mods[:2] == ["async", "wait_all"]:
            return "E.commit(m); E.wait_group(0, m)"
        if mods[:2] in (["async", "cg"], ["async", "ca"]):
            valid = self.operand(args[3], "u4") if len(args) > 3 else None
            to, from_ = self.address(args[0], "u4"), self.address(args[1], "u8")
            return f"E.copy_async({to}, {from_}, {int(args[2], 0)}, {valid}, m, {place})"
        if mods[:4] == ["async", "bulk", "tensor", "2d"] and "multicast::cluster" not in mods:
            load = mods[5] == "global"
            tensor, shared = (args[1], args[0]) if load else (args[0], args[1])
            map_, coordinates = split_args(tensor[1:-1])
            inner, outer = (self.operand(c, "u4") for c in split_args(coordinates[1:-1]))
            barrier = self.address(args[2], "u4") if load else 0
            where_to = f"{self.address(shared, 'u4')}, {self.operand(map_, 'u8')}"
            return f"E.tensor_copy({load}, {where_to}, {inner}, {outer}, {barrier}, m, {place})"
        if mods[:3] == ["async", "bulk", "commit_group"]:
            return "E.commit_reads('bulk', m)"
        if mods[:3] == ["async", "bulk", "wait_group"]:
            return f"E.wait_reads('bulk', {int(args[0], 0)}, m, {place})"
        raise EmulatorError("copy")

    def do_elect(self, mods, args, place):
        regs = [self.reg(n) for n in args[0].split("|")]
        return f"E.elect({regs}, {self.operand(args[1], 'u4')}, m, {place})"

    def do_mbarrier(self, mods, args, place):
        if mods[0] in ("init", "inval"):
            count = self.operand(args[1], "u4") if mods[0] == "init" else None
            return f"E.barrier_init({self.address(args[0], 'u4')}, {count}, m, {place})"
        if mods[0] == "arrive":
            expected = self.operand(args[2], "u4") if "expect_tx" in mods else 0
            return f"E.barrier_arrive({self.address(args[1], 'u4')}, {expected}, m, {place})"
        if mods[:2] in (["try_wait", "parity"], ["test_wait", "parity"]):
            address, parity = self.address(args[1], "u4"), self.operand(args[2], "u4")
            return f"E.barrier_test({self.reg(args[0])}, {address}, {parity}, m, {place})"
        raise EmulatorError("mbarrier")

    def do_wgmma(self, mods, args, place):
        if mods[0] == "fence":
            return "pass"
        if mods[0] == "commit_group":
            return "E.commit_reads('wgmma', m)"
        if mods[0] == "wait_group":
            return f"E.wait_reads('wgmma', {int(args[0], 0)}, m, {place})"
        n, depth = map(int, re.match(r"m64n(\d+)k(\d+)$", mods[3]).groups())
        kind = mods[5]
        if mods[4] != "f32" or (kind, depth) not in (("bf16", 16), ("f16", 16), ("tf32", 8)):
            raise EmulatorError("wgmma")
        regs = [self.reg(r) for r in split_args(args[0][1:-1])]
        from_regs = args[1].startswith("{")
        if from_regs:
            left = ", ".join(self.operand(r, "u4") for r in split_args(args[1][1:-1]))
            a = f"[{left}]"
        else:
            a = self.operand(args[1], "u8")
        b = self.operand(args[2], "u8")
        scale = self.operand(args[3], "?") if self.is_reg(args[3]) else bool(int(args[3]))
        signs, transposed = [int(x) for x in args[4:6]], [int(x) for x in args[6:]]
        # Of a and b, where they lie in shared memory and have 16 bits.
        transposed = [0] * (2 - len(transposed)) + transposed
        how = f"{n}, {kind!r}, {regs}, {a}, {b}, {scale}, {signs}, {transposed}"
        return f"E.wgmma({how}, m, {place})"

    def do_tcgen05(self, mods, args, place):
        what = mods[0].split("::")[0]
        if what in ("wait", "fence", "relinquish_alloc_permit"):
            return "pass"
        if what == "alloc":
            return f"E.tensor_alloc({self.address(args[0], 'u4')}, {int(args[1], 0)}, m, {place})"
        if what == "dealloc":
            return f"E.tensor_dealloc({int(args[1], 0)}, m, {place})"
        if what in ("ld", "st"):
            cells, values = (args[1], args[0]) if what == "ld" else (args[0], args[-1])
            shape = next(x for x in mods if x in ("32x32b", "16x32bx2"))
            split = None
            if shape == "16x32bx2":
                split = int(args[2] if what == "ld" else args[1], 0)
            if "pack::16b" in mods or "unpack::16b" in mods:
                raise EmulatorError("packed tensor memory")
            names = split_args(values[1:-1])
            if what == "ld":
                regs = [self.reg(x) for x in names]
                return f"E.tensor_load({regs}, {self.address(cells, 'u4')}, {split}, m, {place})"
            stored = ", ".join(self.operand(x, "u4") for x in names)
            return f"E.tensor_store([{stored}], {self.address(cells, 'u4')}, {split}, m, {place})"
        kinds = (["cta_group::1", "kind::f16"], ["cta_group::1", "kind::tf32"])
        if what == "mma" and mods[1:] in kinds:
            in_tensor = args[1].startswith("[")
            a = self.address(args[1], "u4") if in_tensor else self.operand(args[1], "u8")
            d, b = self.address(args[0], "u4"), self.operand(args[2], "u8")
            instruction, accumulates = self.operand(args[3], "u4"), self.operand(args[4], "?")
            kind = mods[2].removeprefix("kind::")
            how = f"{kind!r}, {d}, {a}, {b}, {instruction}, {accumulates}, {in_tensor}"
            return f"E.tensor_mma({how}, m, {place})"
        if what == "commit" and "cta_group::1" in mods and "multicast::cluster" not in mods:
            return f"E.tensor_commit({self.address(args[0], 'u4')}, m, {place})"
        raise EmulatorError("tcgen05")

    def do_ldmatrix(self, mods, args, place):
        regs, address = self.names(args[0]), self.address(args[1], "u4")
        return f"E.load_matrix({regs}, {address}, {'trans' in mods}, m, {place})"

    def do_stmatrix(self, mods, args, place):
        values = ", ".join(self.operand(a, "u4") for a in split_args(args[1].strip()[1:-1]))
        address = self.address(args[0], "u4")
        return f"E.store_matrix([{values}], {address}, {'trans' in mods}, m, {place})"

    def do_mma(self, mods, args, place):
        shape = next(m for m in mods if re.match(r"m\d+n\d+k\d+$", m))
        kind = mods[mods.index(shape) + 4]
        if not shape.startswith("m16n8k") or "satfinite" in mods or mods[-1] not in ("f32", "s32"):
            raise EmulatorError(f"mma {shape}")
        d, *abc = ([x.strip() for x in split_args(a.strip()[1:-1])] for a in args)
        a, b, c = (f"[{', '.join(self.operand(x, 'u4') for x in part)}]" for part in abc)
        writes = "; ".join(f"E.write({self.reg(x)}, d[{i}], m)" for i, x in enumerate(d))
        product = f"d = mma({shape!r}, {kind!r}, {a}, {b}, {c})"
        return f"E.converged(m, 0xFFFFFFFF, {place}); {product}; {writes}"

    def do_shfl(self, mods, args, place):
        regs = [self.reg(n) for n in args[0].split("|")]
        a, b, c, member = (self.operand(x, "u4") for x in args[1:])
        return f"E.shuffle({mods[1]!r}, {regs}, {a}, {b}, {c}, {member}, m, {place})"

    def do_vote(self, mods, args, place):
        k = "u4" if "ballot" in mods else "?"
        p, member = self.operand(args[1], "?"), self.operand(args[2], "u4")
        return self.result(args[0], f"E.vote({mods[1]!r}, {p}, {member}, m, {place})", k)

    def do_redux(self, mods, args, place):
        if {"NaN", "abs"} & set(mods):
            raise EmulatorError("redux of NaN or absolute values")
        k = NUMPY[mods[-1]]
        a, member = self.operand(args[1], k), self.operand(args[2], "u4")
        return self.result(args[0], f"E.redux({mods[1]!r}, {a}, {member}, m, {place})", k)

    def do_activemask(self, mods, args, place):
        return self.result(args[0], "E.active_mask(m)", "u4")

    def do_bar(self, mods, args, place):
        if "warp" in mods:
            return f"E.warp_sync({self.operand(args[0], 'u4')}, m, {place})"
        raise EmulatorError("barrier")

    # -- use --

    def launch(self, grid, threads, params, ranges, dynamic_shared=0):
        return Launch(self, grid, threads, params, ranges, dynamic_shared).execute()

    def opcode_counts(self, launch):
        """Warp instructions executed, by opcode."""
        counts = collections.Counter()
        for (s, e), n in zip(self.block_range, launch.block_counts, strict=True):
            for ins in self.instructions[s:e]:
                counts[".".join(ins.op.split(".")[:2])] += int(n)
        return counts

    def source_of(self, ptx_line):
        return next((i.place[1] for i in self.instructions if i.place[0] == ptx_line), "?")
