"""What was done to each grain of a memory, and by whom: where reads and writes race."""

from __future__ import annotations

import numpy as np

from tests.ptx.arithmetic import i4, i8, where

READ_OF_LANE = "race: reads what another lane of the warp wrote, no warp barrier between"
READ_OF_WARP = "race: reads what another warp wrote, no barrier between"
WRITE_AFTER_READ = "race: writes what another warp read, no barrier between"
WRITE_AFTER_WRITE = "race: writes what another warp wrote, no barrier between"
UNFENCED = "race: asynchronous read of what a lane wrote, no fence.proxy.async between"


class Shadow:
    """Who wrote and read each grain of a memory, and when; lanes count through the grid."""

    def __init__(self, grains, grain, run, shared):
        self.grain, self.run, self.shared = grain, run, shared
        self.writer = np.full(grains, -1, i4)
        self.write_epoch = np.zeros(grains, i4)
        self.write_warp_epoch = np.zeros(grains, i4)
        self.first_reader = np.full(grains, 1 << 30, i4)
        self.last_reader = np.full(grains, -1, i4)
        self.read_epoch = np.full(grains, -1, i4)
        self.flying = np.zeros(grains, bool)
        # -1: written by the asynchronous proxy.
        self.write_fence = np.zeros(grains if shared else 0, i4)
        self.pending = np.zeros(grains if shared else 0, np.int16)  # asynchronous reads under way

    def spread(self, at, width):
        return at[:, None] // self.grain + np.arange(max(1, width // self.grain))

    def read(self, lanes, at, width, place):
        run = self.run
        a = self.spread(at, width)
        lane = (lanes + run.first_lane)[:, None]
        writer = self.writer[a]
        warp, cta = lane // 32, lane // run.threads
        epoch = run.epoch[lanes][:, None]
        if self.shared:
            run.check(~self.flying[a], lanes, place, "reads bytes that cp.async has not delivered")
            run.check(writer >= 0, lanes, place, "reads uninitialised shared memory")
            inside = (writer == lane) | (writer // 32 != warp)
            inside |= self.write_warp_epoch[a] != run.warp_epoch[lanes][:, None]
            run.check(inside, lanes, place, READ_OF_LANE, writer)
        here = writer // run.threads == cta
        fine = (writer < 0) | (writer // 32 == warp) | (here & (self.write_epoch[a] != epoch))
        run.check(fine, lanes, place, READ_OF_WARP, writer)
        if self.shared:
            old = self.read_epoch[a] != epoch
            self.first_reader[a] = where(old, 1 << 30, self.first_reader[a])
            self.last_reader[a] = where(old, -1, self.last_reader[a])
            self.read_epoch[a] = epoch
        warps = np.broadcast_to(warp, a.shape).astype(i4)
        np.minimum.at(self.first_reader, a, warps)
        np.maximum.at(self.last_reader, a, warps)

    def write(self, lanes, at, width, place, same=False, flying=False):
        """``same``: where the bytes have that value already, which two lanes may both write."""
        run = self.run
        a = self.spread(at, width)
        lane = (lanes + run.first_lane)[:, None]
        warp, cta = lane // 32, lane // run.threads
        epoch = run.epoch[lanes][:, None]
        writer = self.writer[a]
        first, last = self.first_reader[a], self.last_reader[a]
        if self.shared:
            run.check(~self.flying[a], lanes, place, "writes bytes that cp.async has under way")
            run.check(
                self.pending[a] == 0,
                lanes,
                place,
                "race: writes what wgmma or a bulk store may still read",
            )
            self.write_fence[a] = run.fences[lanes][:, None]
            nobody = self.read_epoch[a] != epoch
            mine = (first == warp) & (last == warp)
            fine = (writer < 0) | (writer // 32 == warp) | (self.write_epoch[a] != epoch)
        else:
            nobody = last < 0
            per_cta = run.threads // 32
            mine = (first // per_cta == cta) & (last // per_cta == cta)
            fine = (writer < 0) | (writer // run.threads == cta)
        same = np.broadcast_to(np.asarray(same).reshape(-1, 1), a.shape)
        run.check(nobody | mine | same, lanes, place, WRITE_AFTER_READ, last * 32)
        run.check(fine | same, lanes, place, WRITE_AFTER_WRITE, writer)
        self.writer[a] = np.broadcast_to(lane, a.shape)
        self.write_epoch[a] = epoch
        self.write_warp_epoch[a] = run.warp_epoch[lanes][:, None]
        if flying:
            self.flying[a] = True
        return a

    def read_async(self, lanes, a, place):
        """Checks of a read through the asynchronous proxy, of grains a [lanes, n]."""
        run = self.run
        writer = self.writer[a]
        run.check(
            ~self.flying[a], lanes, place, "reads bytes that an asynchronous copy has not delivered"
        )
        run.check(writer >= 0, lanes, place, "reads uninitialised shared memory")
        lane = (lanes + run.first_lane)[:, None]
        fine = (writer // 32 == lane // 32) | (self.write_epoch[a] != run.epoch[lanes][:, None])
        run.check(fine, lanes, place, READ_OF_WARP, writer)
        fenced = self.write_fence[a] < 0
        fenced |= run.fences[writer - run.first_lane] > self.write_fence[a]
        fenced |= run.fence_epoch[lanes][:, None] > self.write_epoch[a]
        run.check(fenced, lanes, place, UNFENCED, writer)
        np.add.at(self.pending, a, np.int16(1))

    def done_async(self, first, last, lane, a):
        """Warps first to last have read the grains, now."""
        np.add.at(self.pending, a, np.int16(-1))
        epoch = self.run.epoch[lane]
        old = self.read_epoch[a] != epoch
        self.first_reader[a] = np.minimum(where(old, 1 << 30, self.first_reader[a]), first)
        self.last_reader[a] = np.maximum(where(old, -1, self.last_reader[a]), last)
        self.read_epoch[a] = epoch


def distinct(numbers):
    """In order; NumPy's ``unique`` hashes, which takes five times as long for a few hundred."""
    numbers = np.sort(numbers)
    return numbers[np.append(True, numbers[1:] != numbers[:-1])]


def conflicts(words, warps):
    """Wavefronts and the fewest possible, of 4-byte words that warps (or parts of one) access."""
    key = distinct(warps.astype(i8) << 40 | words.astype(i8))
    warp, bank = key >> 40, key & 31
    number = np.cumsum(np.append(0, warp[1:] != warp[:-1]))  # of the warp, in order
    counts = np.bincount(number * 32 + bank, minlength=(number[-1] + 1) * 32).reshape(-1, 32)
    return int(counts.max(1).sum()), int(np.ceil(counts.sum(1) / 32).sum())
