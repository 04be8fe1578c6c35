"""Executes a kernel for some CTAs at once: an array holds a register of all their lanes.

Each lane has its own program counter. The block at the smallest counter among the lanes that do not
wait runs next, under a mask, so that lanes which diverged meet again by themselves. A mask of None
is all lanes.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.arithmetic import (
    EmulatorError,
    f4,
    i4,
    i8,
    options,
    u1,
    u2,
    u4,
    where,
)
from tests.ptx.blackwell import TensorMemory
from tests.ptx.hopper import AsynchronousProxy
from tests.ptx.shadow import Shadow, conflicts, distinct

EVERYONE = 0xFFFFFFFF
ATOMICS = {
    "add": np.add,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "exch": lambda old, new: new,
}
REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


class Run(AsynchronousProxy, TensorMemory):
    """One batch of CTAs of a launch."""

    def __init__(self, launch, first_cta, ctas):
        self.launch, self.kernel = launch, launch.kernel
        self.threads = launch.threads
        self.ctas = ctas
        self.lanes = n = ctas * self.threads
        self.first_lane = first_cta * self.threads
        cta = first_cta + np.arange(n) // self.threads
        gx, gy, gz = launch.grid
        tid = (np.arange(n) % self.threads).astype(u4)
        self.special = {
            "%tid.x": tid,
            "%tid.y": np.zeros(n, u4),
            "%tid.z": np.zeros(n, u4),
            "%laneid": tid % u4.type(32),
            "%warpid": tid // u4.type(32),
            "%ctaid.x": (cta % gx).astype(u4),
            "%ctaid.y": (cta // gx % gy).astype(u4),
            "%ctaid.z": (cta // (gx * gy)).astype(u4),
            "%cluster_ctarank": np.zeros(n, u4),
        }
        for axis, threads, blocks in zip("xyz", (self.threads, 1, 1), launch.grid, strict=True):
            self.special[f"%ntid.{axis}"] = np.full(n, threads, u4)
            self.special[f"%nctaid.{axis}"] = np.full(n, blocks, u4)
        self.size = -(-max(launch.shared_bytes, 16) // 1024) * 1024
        self.shared = np.zeros(ctas * self.size, u1)
        self.shared_views = {s: self.shared.view(f"u{s}") for s in (1, 2, 4, 8)}
        self.base = (np.arange(n) // self.threads * self.size).astype(i8)
        self.epoch = np.zeros(n, i4)
        self.warp_epoch = np.zeros(n, i4)
        grain = self.kernel.shared_grain
        self.shadow = None
        if options.check:
            self.shadow = Shadow(ctas * self.size // grain, grain, self, True)
        self.commits = np.zeros(n, i4)  # groups of cp.async that a lane has committed
        self.copies = []  # that have not landed
        self.zeros = {k: np.zeros(n, k) for k in ("?", "u2", "u4", "u8")}
        self.R = [self.zeros[k] for k in self.kernel.reg_kinds]
        self.start_asynchronous_proxy()
        if self.kernel.has_tensor_memory:
            self.start_tensor_memory()

    # -- control --

    def execute(self):
        kernel, n, R = self.kernel, self.lanes, self.R
        blocks, counts = kernel.blocks, self.launch.block_counts
        pc = np.zeros(n, i4)
        DONE = len(blocks)
        waiting = np.zeros(n, bool)
        bar_id, bar_count = np.zeros(n, i4), np.zeros(n, i4)
        uniform, at = True, 0
        while True:
            if not uniform:
                live = pc < DONE
                ready = live & ~waiting
                if not ready.any():
                    if not live.any():
                        return
                    lane = int(np.flatnonzero(live)[0])
                    place = kernel.blocks[pc[lane] - 1].place
                    raise self.error(
                        place, lane, "deadlock: lanes wait at a barrier that cannot complete"
                    )
                at = int(pc[ready].min())
                m = ready & (pc == at)
                if m.all():
                    uniform, m = True, None
            else:
                if at == DONE:
                    return
                m = None
            block = blocks[at]
            counts[at] += self.lanes // 32 if m is None else int(m.reshape(-1, 32).any(1).sum())
            block.run(self, R, m)
            kind, guard, data = block.end
            taken = None  # all
            if guard is not None:
                p = R[guard[0]] != guard[1]
                taken = p if m is None else p & m
            if kind == "bra" or kind == "ret":
                target = DONE if kind == "ret" else data
                if taken is None or (m is None and taken.all()):
                    if uniform:
                        at = target
                    else:
                        pc[m] = target
                elif m is None and not taken.any():
                    at += 1
                else:
                    if uniform:
                        uniform = False
                        pc[:] = at
                    pc[ready & (pc == at) if m is not None else slice(None)] = at + 1
                    pc[taken] = target
            elif kind == "bar":
                everyone = uniform and taken is None and data[1] is None
                if everyone:
                    at += 1
                    self.epoch += 1
                    self.warp_epoch += 1
                    continue
                if uniform:
                    uniform = False
                    pc[:] = at
                    m = np.ones(n, bool)
                pc[m] = at + 1
                stop = m if taken is None else taken
                ident, count = ((R[x[1]] if isinstance(x, tuple) else x) for x in data[:2])
                bar_id[stop] = ident[stop] if isinstance(ident, np.ndarray) else ident
                count = self.threads if count is None else count
                bar_count[stop] = count[stop] if isinstance(count, np.ndarray) else count
                waiting[stop] = True
                self.release(waiting, bar_id, bar_count, pc < DONE)
            else:
                if uniform:
                    at += 1
                else:
                    pc[m] = at + 1
            if not uniform and kind == "ret":
                self.release(waiting, bar_id, bar_count, pc < DONE)

    def release(self, waiting, bar_id, bar_count, live):
        for cta in range(self.ctas):
            s = slice(cta * self.threads, (cta + 1) * self.threads)
            if not waiting[s].any():
                continue
            for ident in np.unique(bar_id[s][waiting[s]]):
                mine = waiting[s] & (bar_id[s] == ident)
                need = int(bar_count[s][mine].max())
                gone = int((~live[s]).sum()) if need == self.threads else 0
                if mine.sum() + gone >= need:
                    waiting[s] &= ~mine
                    # Of the CTA, also where the barrier is for some of its warps.
                    self.epoch[s] += 1
                    self.warp_epoch[s][mine] += 1

    # -- errors --

    def error(self, place, lane, text):
        lane = int(lane)
        cta = (self.first_lane + lane) // self.threads
        line, source = place
        return EmulatorError(
            f"{self.kernel.name}: {text}; CTA {cta}, warp {lane % self.threads // 32}, "
            f"lane {lane % 32}, "
            f"PTX line {line} ({self.kernel.lines[line - 1].strip()[:90]}), {source}"
        )

    def check(self, fine, lanes, place, text, writer=None):
        if fine.all():
            return
        bad = np.argwhere(~fine)[0]
        if writer is not None:
            lane = int(np.broadcast_to(writer, fine.shape)[tuple(bad)]) % self.threads
            text += f" (by lane {lane} of the CTA)"
        raise self.error(place, lanes[bad[0]], text)

    def converged(self, m, member, place):
        """An error unless all lanes that a collective names are here."""
        if isinstance(member, np.ndarray) and member.ndim:
            member = member.reshape(-1, 32)
        named = (np.asarray(member, u4)[..., None] >> np.arange(32, dtype=u4)) & 1 != 0
        if m is None and not isinstance(member, np.ndarray) and int(member) == EVERYONE:
            return
        here = np.ones((self.lanes // 32, 32), bool) if m is None else m.reshape(-1, 32)
        if named.ndim == 3:
            bad = (here[:, :, None] & (named != here[:, None, :])).any(2)
        else:
            bad = here & (named != here).any(1)[:, None]
        if bad.any():
            lane = np.flatnonzero(bad.reshape(-1))[0]
            raise self.error(place, lane, "a warp collective names lanes that are elsewhere")

    # -- loads and stores --

    def active(self, m):
        return np.arange(self.lanes) if m is None else np.flatnonzero(m)

    def put(self, reg, idx, value, m):
        """Write a register of the active lanes; ``value`` is unsigned and of its size."""
        if reg is None:
            return
        if m is None:
            self.R[reg] = value
        else:
            new = self.R[reg].copy()
            new[idx] = value
            self.R[reg] = new

    def at_shared(self, addr, idx, width, place, align=None):
        a = np.broadcast_to(np.asarray(addr), self.lanes)[idx].astype(i8)
        end = self.launch.shared_bytes
        aligned = a % (align or width) == 0
        self.check(aligned, idx, place, f"misaligned shared access of {width} bytes")
        inside = (a >= 0) & (a + width <= end)
        self.check(inside, idx, place, f"outside the {end} bytes of shared memory")
        return a + self.base[idx]

    def at_global(self, addr, idx, width, place, align=None):
        a = np.broadcast_to(np.asarray(addr), self.lanes)[idx].view(i8)
        starts, ends = self.launch.starts, self.launch.ends
        aligned = a % (align or width) == 0
        self.check(aligned, idx, place, f"misaligned global access of {width} bytes")
        r = np.searchsorted(starts, a, "right") - 1
        ok = (r >= 0) & (a + width <= ends[r])
        if not ok.all():
            bad = np.flatnonzero(~ok)[0]
            end = ends[max(r[bad], 0)]
            text = f"outside every tensor: {width} bytes at {int(a[bad]):#x}, "
            text += f"{int(a[bad] - end)} past the end of the one before"
            raise self.error(place, idx[bad], text)
        return a - self.launch.origin

    def count(self, space, at, idx, width, place):
        """Wavefronts of shared memory, or sectors of 32 bytes of global memory."""
        access = self.launch.accesses[place[0], space]
        warp = idx // 32
        access.requests += 1 + np.count_nonzero(warp[1:] != warp[:-1])
        if space.endswith("shared"):
            part = warp * 4  # 128 bytes at a time: all lanes, or a half or quarter of them
            if width > 4:
                part = part + idx % 32 // (8 if width >= 16 else 16)
            words = (at - self.base[idx])[:, None] // 4 + np.arange(max(1, width // 4))
            done, least = conflicts(words.reshape(-1), np.repeat(part, words.shape[1]))
        else:
            done = len(distinct(warp.astype(i8) << 44 | at >> 5))
            warp_of_value = distinct(warp.astype(i8) << 44 | at // width) >> 44
            least = int(np.ceil(np.bincount(warp_of_value) * width / 32).sum())
        access.done += done
        access.least += least

    def memory(self, space, addr, idx, width, place):
        """-> positions, views by bytes of an element, shadow (None without checks) and the
        positions in it."""
        if space == "shared":
            at = self.at_shared(addr, idx, width, place)
            return at, self.shared_views, self.shadow, at
        at = self.at_global(addr, idx, width, place)
        shadow = self.launch.shadow_at(self)
        return at, self.launch.views, shadow, None if shadow is None else self.launch.compact(at)

    def load(self, space, regs, kinds, addr, size, sign, m, place):
        """regs <- size bytes each, widened to ``kinds``."""
        idx = self.active(m)
        if not len(idx):
            return
        width = size * len(regs)
        at, views, shadow, at_shadow = self.memory(space, addr, idx, width, place)
        if shadow:
            shadow.read(idx, at_shadow, width, place)
        if options.count:
            self.count("ld." + space, at, idx, width, place)
        for i, (reg, kind) in enumerate(zip(regs, kinds, strict=True)):
            value = views[size][at // size + i]
            if size != np.dtype(kind).itemsize:
                if sign:
                    value = value.view(f"i{size}").astype(kind.replace("u", "i")).view(kind)
                else:
                    value = value.astype(kind)
            self.put(reg, idx, value, m)

    def store(self, space, values, addr, size, m, place):
        idx = self.active(m)
        if not len(idx):
            return
        width = size * len(values)
        at, views, shadow, at_shadow = self.memory(space, addr, idx, width, place)
        view = views[size]
        values = [np.broadcast_to(v, self.lanes)[idx] for v in values]
        element = at // size
        if shadow:
            same = np.ones(len(idx), bool)
            for i, value in enumerate(values):
                same &= view[element + i] == value
            shadow.write(idx, at_shadow, width, place, same)
        for i, value in enumerate(values):
            view[element + i] = value
        if shadow:  # PTX does not say which lane wins, of one warp or of several
            for i, value in enumerate(values):
                kept = view[element + i] == value
                if size == 4:  # NumPy keeps one operand's NaN, a GPU has only one
                    kept |= np.isnan(view[element + i].view(f4)) & np.isnan(value.view(f4))
                self.check(kept, idx, place, "race: lanes write different values to one address")
        if options.count:
            self.count("st." + space, at, idx, width, place)

    def atomic(self, op, reg, addr, values, kind, m, place):
        idx = self.active(m)
        if not len(idx):
            return
        size = np.dtype(kind).itemsize
        at = self.at_global(addr, idx, size, place) // size
        view = self.launch.views[size].view(kind)
        values = [np.broadcast_to(v, self.lanes)[idx] for v in values]
        old = np.zeros(len(idx), kind)
        for i, a in enumerate(at):
            old[i] = view[a]
            v = values[0][i]
            if op == "cas":
                view[a] = values[1][i] if old[i] == v else old[i]
            else:
                view[a] = ATOMICS[op](old[i], v)
        self.put(reg, idx, old.view(f"u{size}"), m)

    def copy_async(self, dst, src, size, valid, m, place):
        idx = self.active(m)
        if not len(idx):
            return
        at = self.at_shared(dst, idx, size, place)
        valid = np.asarray(size if valid is None else valid).astype(i8)
        valid = np.broadcast_to(valid, self.lanes)[idx]
        data = np.zeros((len(idx), size), u1)
        for n in np.unique(valid):
            if n:
                some = np.flatnonzero(valid == n)
                from_ = self.at_global(src, idx[some], int(n), place, align=size)
                data[some, :n] = self.launch.views[1][from_[:, None] + np.arange(n)]
                if options.check:
                    shadow = self.launch.shadow_at(self)
                    shadow.read(idx[some], self.launch.compact(from_), max(2, int(n)), place)
                if options.count:
                    self.count("cp.async.global", from_, idx[some], int(n), place)
        if options.count:
            self.count("cp.async.shared", at, idx, size, place)
        if self.shadow:
            self.shadow.write(idx, at, size, place, flying=True)
        self.copies.append((idx, at, data, self.commits[idx].copy(), place))

    def commit(self, m):
        self.commits = self.commits + 1 if m is None else self.commits + m

    def wait_group(self, pending, m):
        here = np.ones(self.lanes, bool) if m is None else m
        limit = self.commits - pending
        kept = []
        for idx, at, data, group, place in self.copies:
            land = here[idx] & (group < limit[idx])
            if land.any():
                to, lanes = at[land], idx[land]
                self.shared[to[:, None] + np.arange(data.shape[1])] = data[land]
                if self.shadow:
                    a = self.shadow.spread(to, data.shape[1])
                    self.shadow.flying[a] = False
                    self.shadow.write_epoch[a] = self.epoch[lanes][:, None]
                    self.shadow.write_warp_epoch[a] = self.warp_epoch[lanes][:, None]
            if not land.all():
                kept.append((idx[~land], at[~land], data[~land], group[~land], place))
        self.copies = kept

    def matrix_rows(self, addr, count, m, place, write=False):
        """Positions of the rows of ldmatrix, [count, warps, 8], and the warps that are here."""
        self.converged(m, EVERYONE, place)
        warps = np.arange(self.lanes // 32)
        if m is not None:
            warps = np.flatnonzero(m.reshape(-1, 32)[:, 0])
        lanes = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
        at = self.at_shared(addr, lanes, 16, place)
        if options.count:
            for i in range(count):  # one matrix at a time
                some = lanes % 32 // 8 == i
                space = "stmatrix.shared" if write else "ldmatrix.shared"
                self.count(space, at[some], lanes[some], 16, place)
        return warps, lanes, at, at.reshape(len(warps), count, 8)

    def load_matrix(self, regs, addr, transposed, m, place):
        warps, lanes, flat, at = self.matrix_rows(addr, len(regs), m, place)
        if self.shadow:
            self.shadow.read(lanes, flat, 16, place)
        idx = (warps[:, None] * 32 + np.arange(32)).reshape(-1)
        for i, reg in enumerate(regs):
            rows = self.shared_views[2][at[:, i, :, None] // 2 + np.arange(8)]  # [warps, 8, 8]
            if transposed:
                rows = np.ascontiguousarray(rows.transpose(0, 2, 1))
            self.put(reg, idx, rows.reshape(-1).view(u4), m)

    def store_matrix(self, values, addr, transposed, m, place):
        warps, lanes, flat, at = self.matrix_rows(addr, len(values), m, place, write=True)
        if self.shadow:
            self.shadow.write(lanes, flat, 16, place)
        idx = (warps[:, None] * 32 + np.arange(32)).reshape(-1)
        for i, value in enumerate(values):
            rows = np.ascontiguousarray(value[idx]).view(u2).reshape(-1, 8, 8)
            if transposed:
                rows = rows.transpose(0, 2, 1)
            self.shared_views[2][at[:, i, :, None] // 2 + np.arange(8)] = rows

    def shuffle(self, mode, regs, a, b, c, member, m, place):
        self.converged(m, member, place)
        lane = np.arange(self.lanes) % 32
        b, c = (np.asarray(x).astype(i8) for x in (b, c))
        segment, clamp = c >> 8 & 31, c & 31
        low, high = lane & segment, (lane & segment) | (clamp & ~segment)
        source = {
            "up": lane - b,
            "down": lane + b,
            "bfly": lane ^ b,
            "idx": low | (b & ~segment & 31),
        }
        j = source[mode]
        inside = j >= high if mode == "up" else j <= high
        j = where(inside, j, lane)
        value = np.broadcast_to(a, self.lanes)[np.arange(self.lanes) - lane + j]
        idx = self.active(m)
        self.put(regs[0], idx, value[idx], m)
        if len(regs) > 1:
            self.put(regs[1], idx, np.broadcast_to(inside, self.lanes)[idx], m)

    def vote(self, mode, p, member, m, place):
        self.converged(m, member, place)
        p = np.broadcast_to(p, self.lanes).reshape(-1, 32)
        if mode == "ballot":
            value = (p.astype(u4) << np.arange(32, dtype=u4)).sum(1).astype(u4)
        else:
            value = {"any": p.any(1), "all": p.all(1), "uni": p.all(1) | ~p.any(1)}[mode]
        return np.repeat(value, 32)

    def redux(self, op, a, member, m, place):
        self.converged(m, member, place)
        by_warp = np.broadcast_to(a, self.lanes).reshape(-1, 32)
        if a.dtype == f4:
            reduce = {"min": np.fmin, "max": np.fmax}[op].reduce
            return np.repeat(reduce(by_warp, axis=1), 32)
        return np.repeat(REDUCTIONS[op].reduce(by_warp, axis=1, dtype=a.dtype), 32)

    def active_mask(self, m):
        here = np.ones(self.lanes, bool) if m is None else m
        bits = here.reshape(-1, 32) << np.arange(32)
        return np.repeat(bits.sum(1).astype(u4), 32)

    def warp_sync(self, member, m, place):
        self.converged(m, member, place)
        self.warp_epoch = self.warp_epoch + 1 if m is None else self.warp_epoch + m

    def write(self, reg, value, m):
        if reg is None:
            return
        if m is not None:
            self.R[reg] = where(m, value, self.R[reg])
        elif value.shape:
            self.R[reg] = value
        else:
            self.R[reg] = np.full(self.lanes, value)

    def param(self, name, offset, kind):
        return np.frombuffer(self.launch.params[name], kind, 1, offset)[0]
