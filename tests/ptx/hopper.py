"""sm_90: mbarriers, tensor copies by descriptor, and wgmma, which read and write behind the lanes'
backs (PTX: through the asynchronous proxy)."""

from __future__ import annotations

import struct

import numpy as np

from tests.ptx.arithmetic import accumulate, f4, i4, i8, u1, u2, u4, value_of, where

TENSOR_MAP = struct.Struct("<QIIIIqII")


def tensor_map(descriptor, meta):
    """The parameters of a Triton tensor descriptor: a map in our own format, shape, strides."""
    rows, cols = descriptor.shape
    size = meta["elem_size"]
    box_rows, box_cols = meta["block_size"]
    base = descriptor.base.data_ptr()
    pitch = descriptor.strides[0] * size
    packed = TENSOR_MAP.pack(base, size, meta["swizzle"], rows, cols, pitch, box_rows, box_cols)
    shape = [struct.pack("<i", x) for x in descriptor.shape]
    strides = [struct.pack("<q", x) for x in descriptor.strides]
    return [packed.ljust(128, b"\0"), *shape, *strides]


class AsynchronousProxy:
    """A part of ``machine.Run``."""

    def start_asynchronous_proxy(self):
        n = self.lanes
        self.barriers = {}  # position of an mbarrier -> [count, pending, bytes to come, phase]
        self.bulk = []  # what is under way to an mbarrier: (position, function of its state)
        self.reads = []  # of wgmma and bulk stores under way: (kind, lane, group, grains)
        self.late = {}  # registers of products under way: values and group by lane
        self.groups = {kind: np.zeros(n, i4) for kind in ("wgmma", "bulk", "tcgen05")}
        self.fences = np.zeros(n, i4)  # fence.proxy.async that a lane has executed
        self.fence_epoch = np.full(n, -1, i4)

    def fence(self, m):
        self.fences = self.fences + (1 if m is None else m)
        self.fence_epoch = (
            self.epoch.copy() if m is None else where(m, self.epoch, self.fence_epoch)
        )

    def elect(self, regs, member, m, place):
        self.converged(m, member, place)
        self.write(regs[0], np.zeros(self.lanes, u4), m)
        self.write(regs[1], np.arange(self.lanes) % 32 == 0, m)

    def at_barrier(self, addr, m, place):
        idx = self.active(m)
        at = self.at_shared(addr, idx, 8, place)
        for a in np.unique(at):
            if a not in self.barriers:
                raise self.error(place, idx[0], "an mbarrier that was not initialised")
        if self.shadow:
            self.shadow.read(idx, at, 8, place)
        return idx, at

    def barrier_init(self, addr, count, m, place):
        idx = self.active(m)
        at = self.at_shared(addr, idx, 8, place)
        if self.shadow:
            self.shadow.write(idx, at, 8, place)
        for a in at:
            if count is None:
                if self.barriers.pop(a, None) is None:
                    raise self.error(place, idx[0], "mbarrier.inval of none")
                if any(b[0] == a for b in self.bulk):
                    raise self.error(place, idx[0], "mbarrier.inval with copies under way")
            else:
                n = int(np.broadcast_to(count, self.lanes)[idx[0]])
                self.barriers[a] = [n, n, 0, 0]

    def barrier_arrive(self, addr, expected, m, place):
        idx, at = self.at_barrier(addr, m, place)
        for lane, a in zip(idx, at, strict=True):
            state = self.barriers[a]
            state[2] += int(np.broadcast_to(expected, self.lanes)[lane])
            state[1] -= 1
            if state[1] < 0:
                raise self.error(place, lane, "more arrivals at an mbarrier than it expects")
            self.turn(state)

    @staticmethod
    def turn(state):
        if state[1] == 0 and state[2] == 0:
            state[1], state[3] = state[0], state[3] ^ 1

    def barrier_test(self, reg, addr, parity, m, place):
        """What is to arrive at a barrier arrives when that phase is asked for, not before."""
        idx, at = self.at_barrier(addr, m, place)
        parity = np.broadcast_to(parity, self.lanes)[idx] & 1
        for a, want in set(zip(at.tolist(), parity.tolist(), strict=True)):
            state = self.barriers[a]
            for event in [e for e in self.bulk if e[0] == a]:
                if state[3] != want:
                    break
                self.bulk.remove(event)
                event[1](state)
                self.turn(state)
        done = np.array([self.barriers[a][3] for a in at]) != parity
        self.tries = 0 if done.any() else getattr(self, "tries", 0) + 1
        if self.tries > 10000:
            raise self.error(place, idx[0], "deadlock: an mbarrier whose phase does not end")
        self.put(reg, idx, done, m)

    def landing(self, positions, data, grains):
        def land(state):
            self.shared[positions] = data
            if self.shadow:
                self.shadow.flying[grains] = False
                self.shadow.write_epoch[grains] = -1  # whoever waits for the barrier sees it
                self.shadow.write_warp_epoch[grains] = -1
            state[2] -= data.size

        return land

    def tensor_copy(self, load, shared, map_, inner, outer, barrier, m, place):
        """A 2d box between global and shared memory by a tensor map."""
        for lane in self.active(m):

            def pick(x, lane=lane):
                return int(np.broadcast_to(np.asarray(x), self.lanes)[lane])

            number = (pick(map_) & ~(1 << 62)) // 4096 - 1
            base, size, swizzle, rows, cols, stride, box_rows, box_cols = TENSOR_MAP.unpack_from(
                self.launch.params[self.kernel.params[number]]
            )
            idx = np.array([lane])
            start = pick(shared)
            width = box_cols * size
            if start % (1024 if swizzle == 3 else 128):
                raise self.error(place, lane, "misaligned shared address of a tensor copy")
            outside = start + box_rows * width > self.launch.shared_bytes
            wide = swizzle and width > 16 << swizzle
            if outside or wide or base % 16 or stride % 16:
                text = f"base {base:#x}, stride {stride}, box {box_rows}x{width} bytes"
                raise self.error(place, lane, f"tensor copy that the hardware refuses: {text}")
            local = start + np.arange(box_rows)[:, None] * width + np.arange(width)
            local = local ^ (local >> 7 & (1 << swizzle) - 1) << 4
            y = np.array([pick(outer)]).astype(u4).view(i4)[0] + np.arange(box_rows)
            x = np.array([pick(inner)]).astype(u4).view(i4)[0] * size + np.arange(width)
            inside = ((y >= 0) & (y < rows))[:, None] & ((x >= 0) & (x < cols * size))
            from_ = (base + y[:, None] * stride + x)[inside]
            if len(from_):
                r = np.searchsorted(self.launch.starts, from_, "right") - 1
                if (r < 0).any() or (from_ >= self.launch.ends[r]).any():
                    raise self.error(place, lane, "tensor copy outside every tensor")
            from_ = from_ - self.launch.origin
            position = (local + self.base[lane]).reshape(-1)
            grain = self.kernel.shared_grain
            grains = np.unique(position // grain)
            lanes = np.repeat(idx, len(from_[::2]))
            shadow = self.launch.shadow_at(self)
            if load:
                data = np.zeros(inside.shape, u1)
                data[inside] = self.launch.views[1][from_]
                if self.shadow:
                    if len(from_):
                        shadow.read(lanes, self.launch.compact(from_[::2]), 2, place)
                    writers = np.repeat(idx, len(grains))
                    self.shadow.write(writers, grains * grain, grain, place, flying=True)
                    self.shadow.write_fence[grains] = -1
                landing = self.landing(position, data.reshape(-1), grains)
                self.bulk.append((pick(barrier) + int(self.base[lane]), landing))
            else:
                if self.shadow:
                    self.shadow.read_async(idx, grains[None, :], place)
                    self.reads.append(("bulk", lane, int(self.groups["bulk"][lane]), grains))
                    if len(from_):
                        shadow.write(lanes, self.launch.compact(from_[::2]), 2, place)
                self.launch.views[1][from_] = self.shared[local + self.base[lane]][inside]

    def commit_reads(self, kind, m):
        self.groups[kind] = self.groups[kind] + (1 if m is None else m)

    def wait_reads(self, kind, pending, m, place):
        here = np.ones(self.lanes, bool) if m is None else m
        kept = []
        for read in self.reads:
            which, lane, group, grains = read
            if which == kind and here[lane] and group < self.groups[kind][lane] - pending:
                warp = (lane + self.first_lane) // 32
                last = warp + 3 if kind == "wgmma" else warp
                self.shadow.done_async(warp, last, lane, grains)
            else:
                kept.append(read)
        self.reads = kept
        if kind == "wgmma":
            for reg, (values, group) in list(self.late.items()):
                landed = here & (group >= 0) & (group < self.groups[kind] - pending)
                self.R[reg] = where(landed, values, self.R[reg])
                group[landed] = -1
                if (group < 0).all():
                    del self.late[reg]

    def operand_rows(self, d, base, rows, depth, transposed, place, lane):
        """An operand in shared memory by its descriptors d [groups]: the bits of
        [groups, rows, depth] values, 32 bytes of each row, and their positions."""
        size = 32 // depth
        d = d.astype(i8)
        start, lead, stride = ((d >> s & 0x3FFF) << 4 for s in (0, 16, 32))
        # wgmma's two bits are the upper ones: 1, 2, 3 of 128, 64, 32 bytes.
        mode = int(d[0] >> 61 & 7)
        swizzle = {2: 3, 4: 2, 6: 1}.get(mode)
        if swizzle is None or (d >> 49 & 7).any() or (d >> 61 & 7 != d[0] >> 61 & 7).any():
            raise self.error(place, lane, "a matrix descriptor that is not modelled")
        pitch = 16 << swizzle  # bytes of a row of the swizzled atom
        start, lead, stride = (x[:, None, None] for x in (start, lead, stride))
        r, k = np.arange(rows)[None, :, None], np.arange(depth)[None, None, :]
        if transposed:  # the rows' index is contiguous
            each = pitch // size
            at = start + r // each * lead + k // 8 * stride + k % 8 * pitch + r % each * size
        else:
            at = start + r // 8 * stride + r % 8 * pitch + k * size
        at = at ^ (at >> 7 & (1 << swizzle) - 1) << 4
        if (at + size > self.launch.shared_bytes).any():
            raise self.error(place, lane, "a product reads outside shared memory")
        at = at + base[:, None, None]
        return self.shared_views[size][at // size], at

    def of_group(self, descriptor, groups, place):
        d = np.broadcast_to(descriptor, self.lanes).reshape(-1, 128)[groups]
        if (d != d[:, :1]).any():
            raise self.error(
                place, groups[0] * 128, "a wgmma descriptor that differs between lanes"
            )
        return d[:, 0], self.base[groups * 128]

    def wgmma(self, n, kind, regs, a, b, scale_d, signs, trans, m, place):
        """A product of 64 rows and n columns of each warp group, 32 bytes deep."""
        self.converged(m, 0xFFFFFFFF, place)
        here = np.ones((self.lanes // 128, 128), bool) if m is None else m.reshape(-1, 128)
        if (here.any(1) != here.all(1)).any():
            raise self.error(place, 0, "wgmma without the whole warp group")
        groups = np.flatnonzero(here[:, 0])
        lanes = (groups[:, None] * 128 + np.arange(128)).reshape(-1)
        G = len(groups)
        depth = 8 if kind == "tf32" else 16
        first = groups[0] * 128
        reads = []
        if isinstance(a, list):
            raw = np.stack([x[lanes] for x in a]).view(u4 if kind == "tf32" else u2)
            raw = raw.reshape(2, 2, G, 4, 8, 4, depth // 8)  # [k half, row half, ...]
            left = value_of(raw.transpose(2, 3, 1, 4, 0, 5, 6).reshape(G, 64, depth), kind)
        else:
            d, base = self.of_group(a, groups, place)
            raw, at = self.operand_rows(d, base, 64, depth, trans[0], place, first)
            left = value_of(raw, kind)
            reads.append(at)
        d, base = self.of_group(b, groups, place)
        raw, at = self.operand_rows(d, base, n, depth, trans[1], place, first)
        right = value_of(raw, kind)
        reads.append(at)
        if self.shadow:
            for at in reads:
                for i, group in enumerate(groups):
                    grains = np.unique(at[i] // self.kernel.shared_grain)
                    self.shadow.read_async(np.array([group * 128]), grains[None, :], place)
                    number = int(self.groups["wgmma"][group * 128])
                    self.reads.append(("wgmma", group * 128, number, grains))
        left, right = left * signs[0], right * signs[1]
        number = self.groups["wgmma"][lanes]
        before = []
        for r in regs:  # what an earlier product has not delivered goes from one to the next
            nothing = np.zeros(self.lanes, u4), np.full(self.lanes, -1, i4)
            values, group = self.late.setdefault(r, nothing)
            before.append(where(group[lanes] >= 0, values[lanes], self.R[r][lanes]))
        acc = np.stack(before).view(f4).reshape(n // 8, 2, 2, G, 4, 8, 4)
        acc = acc.transpose(3, 4, 1, 5, 0, 6, 2).reshape(G, 64, n)
        keep = scale_d
        if not isinstance(scale_d, bool):
            keep = np.broadcast_to(scale_d, self.lanes)[lanes].reshape(G, 128)[:, :1, None]
        acc = where(keep, acc, f4.type(0))
        acc = accumulate(acc, left, right.transpose(0, 2, 1), depth)
        out = acc.reshape(G, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
        for reg, v in zip(regs, out.reshape(n // 2, -1), strict=True):
            self.late[reg][0][lanes] = np.ascontiguousarray(v).view(u4)
            self.late[reg][1][lanes] = number
            self.write(reg, u4.type(0x7FC0DEAD), m)  # NaN until wait_group
