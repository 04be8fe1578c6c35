"""Stored features: rows [N, D] of an encoder, in files, of any number."""

from protoclip.features.layout import FeatureFolder, open_features, open_folder
from protoclip.features.parts import SUFFIXES
from protoclip.features.rows import FeatureRows
from protoclip.features.table import FeatureTable

__all__ = [
    "SUFFIXES", "FeatureFolder", "FeatureRows", "FeatureTable", "open_features", "open_folder",
]  # fmt: skip
