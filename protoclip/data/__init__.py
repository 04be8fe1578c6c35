"""Image-text pairs: built-in, from tables, from shards; and batches of them."""

from protoclip.data.hashing import mix_seed
from protoclip.data.loader import batches
from protoclip.data.noto import noto_available
from protoclip.data.sources import open_dataset
from protoclip.data.transforms import AUGMENTATIONS, Transform, build_transform
from protoclip.data.types import Batch, DataError, Labels, PairDataset, Subset

__all__ = [
    "AUGMENTATIONS",
    "Batch",
    "DataError",
    "Labels",
    "PairDataset",
    "Subset",
    "Transform",
    "batches",
    "build_transform",
    "mix_seed",
    "noto_available",
    "open_dataset",
]
