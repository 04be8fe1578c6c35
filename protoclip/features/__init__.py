"""Stored features: rows [N, D] of an encoder, in files, of any number."""

from protoclip.features.identity import Identity, as_positions
from protoclip.features.layout import (
    FeatureFolder,
    holds_features,
    is_feature_folder,
    open_features,
    open_folder,
)
from protoclip.features.parts import SUFFIXES
from protoclip.features.rows import FeatureRows
from protoclip.features.table import FeatureTable

__all__ = [
    "SUFFIXES", "FeatureFolder", "FeatureRows", "FeatureTable", "Identity", "as_positions",
    "holds_features", "is_feature_folder", "open_features", "open_folder",
]  # fmt: skip
