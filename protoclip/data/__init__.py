"""Image-text pairs (built-in, from tables, from shards) and batches of them.

The names are imported when they are used, so that the command's --help needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from protoclip.common.files import DataError
    from protoclip.data.faults import Faults, readable
    from protoclip.data.images import Transform, build_transform
    from protoclip.data.loader import Draws, EpochOrder, batches
    from protoclip.data.opening import open_dataset
    from protoclip.data.shards import data_kind, index_together
    from protoclip.data.types import (
        BadSample,
        Batch,
        Facts,
        Labels,
        PairDataset,
        Pictures,
        Subset,
        each_picture_once,
        heldout_pictures,
    )

__all__ = [
    "BadSample", "Batch", "DataError", "Draws", "EpochOrder", "Facts", "Faults", "Labels",
    "PairDataset", "Pictures", "Subset", "Transform", "batches", "build_transform", "data_kind",
    "each_picture_once", "heldout_pictures", "index_together", "open_dataset", "readable",
]  # fmt: skip
# The modules of the names that are not in protoclip.data.types.
_MODULES = {
    "DataError": "protoclip.common.files",
    **dict.fromkeys(("Faults", "readable"), "protoclip.data.faults"),
    **dict.fromkeys(("Transform", "build_transform"), "protoclip.data.images"),
    **dict.fromkeys(("Draws", "EpochOrder", "batches"), "protoclip.data.loader"),
    "open_dataset": "protoclip.data.opening",
    **dict.fromkeys(("data_kind", "index_together"), "protoclip.data.shards"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES.get(name, "protoclip.data.types")), name)
