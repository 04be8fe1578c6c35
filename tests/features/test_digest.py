"""The checksum of rows depends on their bytes and order, not on blocks, strides or device."""

import numpy as np
import pytest
import torch

from protoclip.common import digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_blocks_do_not_matter(dtype, monkeypatch):
    rows = torch.arange(35).reshape(7, 5).to(dtype)
    whole = digest.digest_of(rows)
    monkeypatch.setattr(digest, "BLOCK_BYTES", 2 * rows[:1].nbytes)
    assert digest.digest_of(rows) == whole
    assert digest.digest_of(rows.repeat(1, 2)[:, :5]) == whole  # strided
    changed = rows.clone()
    changed[3, 2] += 1
    assert digest.digest_of(changed) != whole
    assert digest.digest_of(rows.flip(0)) != whole


def test_arrays_and_tensors_agree():
    array = np.random.default_rng(0).normal(size=(11, 3)).astype(np.float16)
    assert digest.digest_of(array) == digest.digest_of(torch.from_numpy(array))
    one_by_one = digest.Digest()
    for row in array:
        one_by_one.update(row[None])
    assert one_by_one.hexdigest() == digest.digest_of(array)
    assert one_by_one.rows == 11


def test_no_rows():
    assert digest.digest_of(torch.empty(0, 4)) == digest.digest_of(np.empty((0, 9)))
