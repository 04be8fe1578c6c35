"""sm_100: tcgen05, products into tensor memory."""

from __future__ import annotations

import numpy as np

from tests.ptx.arithmetic import accumulate, f4, i4, i8, u2, u4, value_of

# Kind of a product -> elements in 32 bytes, and types by the codes of its descriptor.
FORMATS = {"f16": (16, {0: "f16", 1: "bf16"}), "tf32": (8, {2: "tf32"})}


class TensorMemory:
    """A part of ``machine.Run``. Tensor memory is [CTAs, 128 lanes, 512 columns] of 4 bytes."""

    def start_tensor_memory(self):
        shape = self.ctas, 128, 512
        self.tensor = np.zeros(shape, u4)
        self.tensor_written = np.zeros(shape, bool)
        self.tensor_flying = np.zeros(shape, bool)
        self.tensor_used = np.zeros(self.ctas, i4)
        self.products = []  # under way: (lane, cells)

    def tensor_alloc(self, addr, columns, m, place):
        idx = self.active(m)
        if not len(idx):
            return
        cta = idx[0] // self.threads
        for cta in np.unique(idx // self.threads):
            if self.tensor_used[cta] + columns > 512:
                raise self.error(place, idx[0], "tensor memory is full: the hardware waits")
            one = np.zeros(self.lanes, bool)
            one[idx[idx // self.threads == cta][0]] = True
            self.store("shared", [u4.type(self.tensor_used[cta])], addr, 4, one, place)
            self.tensor_used[cta] += columns

    def tensor_dealloc(self, columns, m, place):
        for cta in np.unique(self.active(m) // self.threads):
            self.tensor_used[cta] -= columns

    def tensor_cells(self, addr, count, split, m, place):
        """CTA, row and column of ``count`` cells of each active lane."""
        self.converged(m, 0xFFFFFFFF, place)
        idx = self.active(m)
        a = np.broadcast_to(addr, self.lanes)[idx].astype(i8)
        lane, warp = idx % 32, idx % self.threads // 32
        row, column = a >> 16, a & 0xFFFF
        own = (row == warp % 4 * 32) | (row % 32 == 16) & (row // 32 == warp % 4)
        self.check(own, idx, place, "tensor memory of another warp")
        row = row + (lane if split is None else lane % 16)
        column = column + (0 if split is None else lane // 16 * split)
        cells = (idx // self.threads)[:, None], row[:, None], column[:, None] + np.arange(count)
        self.check(cells[2] < 512, idx, place, "outside tensor memory")
        landed = ~self.tensor_flying[cells]
        self.check(landed, idx, place, "reads or writes products that are under way")
        return idx, cells

    def tensor_load(self, regs, addr, split, m, place):
        idx, cells = self.tensor_cells(addr, len(regs), split, m, place)
        self.check(self.tensor_written[cells], idx, place, "reads uninitialised tensor memory")
        values = self.tensor[cells]
        for i, reg in enumerate(regs):
            self.put(reg, idx, np.ascontiguousarray(values[:, i]), m)

    def tensor_store(self, values, addr, split, m, place):
        idx, cells = self.tensor_cells(addr, len(values), split, m, place)
        by_lane = [np.broadcast_to(v, self.lanes)[idx] for v in values]
        self.tensor[cells] = np.stack(by_lane, 1)
        self.tensor_written[cells] = True

    def tensor_mma(self, kind, d, a, b, instruction, accumulates, a_in_tensor, m, place):
        depth, formats = FORMATS[kind]
        for lane in self.active(m):

            def pick(x, lane=lane):
                return np.broadcast_to(np.asarray(x), self.lanes)[lane]

            cta, i = lane // self.threads, int(pick(instruction))
            n, rows = (i >> 17 & 63) * 8, (i >> 24 & 31) * 16
            left_kind, right_kind = (formats[i >> s & 7] for s in (7, 10))
            if i >> 4 & 3 != 1 or i >> 13 & 3 or rows not in (64, 128):
                raise self.error(place, lane, f"tcgen05.mma that is not modelled: {i:#x}")
            spread = np.arange(rows)
            if rows == 64:
                spread = spread // 16 * 32 + spread % 16
            base, reads = self.base[lane : lane + 1], []
            if a_in_tensor:
                at = int(pick(a))
                cells = cta, spread[:, None] + (at >> 16), (at & 0xFFFF) + np.arange(8)
                if self.tensor_flying[cells].any() or not self.tensor_written[cells].all():
                    text = "a product reads tensor memory that is not there"
                    raise self.error(place, lane, text)
                raw = np.ascontiguousarray(self.tensor[cells])
                left = value_of(raw.view(u4 if kind == "tf32" else u2)[None], left_kind)
            else:
                raw, at = self.operand_rows(
                    np.array([pick(a)]), base, rows, depth, i >> 15 & 1, place, lane
                )
                left = value_of(raw, left_kind)
                reads.append(at)
            raw, at = self.operand_rows(
                np.array([pick(b)]), base, n, depth, i >> 16 & 1, place, lane
            )
            right = value_of(raw, right_kind)
            reads.append(at)
            if self.shadow:
                for at in reads:
                    grains = np.unique(at // self.kernel.shared_grain)
                    self.shadow.read_async(np.array([lane]), grains[None, :], place)
                    number = int(self.groups["tcgen05"][lane])
                    self.reads.append(("tcgen05", lane, number, grains))
            at = int(pick(d))
            cells = cta, spread[:, None] + (at >> 16), (at & 0xFFFF) + np.arange(n)
            acc = self.tensor[cells].view(f4)[None]
            if pick(accumulates):
                if not self.tensor_written[cells].all():
                    text = "a product adds to uninitialised tensor memory"
                    raise self.error(place, lane, text)
            else:
                acc = np.zeros_like(acc)
            self.tensor[cells] = accumulate(acc, left, right.transpose(0, 2, 1), depth)[0].view(u4)
            self.tensor_written[cells] = True
            self.tensor_flying[cells] = True
            self.products.append((lane, cells))

    def tensor_commit(self, addr, m, place):
        for lane in self.active(m):
            one = np.zeros(self.lanes, bool)
            one[lane] = True
            _, at = self.at_barrier(addr, one, place)
            self.commit_reads("tcgen05", one)
            group = int(self.groups["tcgen05"][lane])
            mine = [cells for other, cells in self.products if other == lane]
            self.products = [p for p in self.products if p[0] != lane]

            def arrive(state, lane=lane, group=group, mine=mine):
                kept = []
                for read in self.reads:
                    if read[0] == "tcgen05" and read[1] == lane and read[2] < group:
                        # Whoever waits for the barrier knows.
                        np.add.at(self.shadow.pending, read[3], np.int16(-1))
                    else:
                        kept.append(read)
                self.reads = kept
                for cells in mine:
                    self.tensor_flying[cells] = False
                state[1] -= 1

            self.bulk.append((int(at[0]), arrive))
