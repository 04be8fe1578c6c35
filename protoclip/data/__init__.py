"""Image-text pairs: built-in, from tables, from shards; and batches of them."""

from protoclip.data.emoji import noto_available
from protoclip.data.images import AUGMENTATIONS, Transform, build_transform
from protoclip.data.loader import Draws, EpochOrder, Faults, batches
from protoclip.data.shards import index_together
from protoclip.data.sources import open_dataset
from protoclip.data.types import Batch, DataError, Labels, PairDataset, Subset

__all__ = [
    "AUGMENTATIONS",
    "Batch",
    "DataError",
    "Draws",
    "EpochOrder",
    "Faults",
    "Labels",
    "PairDataset",
    "Subset",
    "Transform",
    "batches",
    "build_transform",
    "index_together",
    "noto_available",
    "open_dataset",
]
