"""Where OpenCLIP's trainer stops for reasons that have nothing to do with the loss."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

Ddp = nn.parallel.DistributedDataParallel


class DdpAnywhere(Ddp):
    """DistributedDataParallel that takes OpenCLIP's ``device_ids=[device]`` for a CPU too."""

    def __init__(self, module: nn.Module, device_ids: Any = None, **kwargs: Any) -> None:
        if device_ids and all(torch.device(device).type == "cpu" for device in device_ids):
            device_ids = None
        super().__init__(module, device_ids=device_ids, **kwargs)


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """For the time of the block: shards are read with webdataset 1.x, ranks may be CPUs.

    webdataset 1.x ends each shard with an empty sample, on which OpenCLIP 3.3's reader dies with
    ``KeyError: 'fname'`` (open_clip #935); this asks webdataset not to.
    """
    data: Any = importlib.import_module("open_clip_train.data")
    expander = getattr(data, "tar_file_expander", None)
    parallel: Any = nn.parallel
    parallel.DistributedDataParallel = DdpAnywhere
    if expander is not None and "eof_value" in inspect.signature(expander).parameters:
        data.tar_file_expander = functools.partial(expander, eof_value=None)
    try:
        yield
    finally:
        parallel.DistributedDataParallel = Ddp
        if expander is not None:
            data.tar_file_expander = expander
