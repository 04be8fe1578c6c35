"""A balanced subset of features: clusters of clusters, and a sample with equal shares of them."""

from typing import TYPE_CHECKING

from protoclip.common.lazy import lazily

if TYPE_CHECKING:
    from protoclip.curate.hierarchy import Hierarchy, Level, hierarchical_kmeans
    from protoclip.curate.sampling import balanced_sample

__all__ = ["Hierarchy", "Level", "balanced_sample", "hierarchical_kmeans"]
__getattr__ = lazily(
    __name__,
    {
        **dict.fromkeys(
            ("Hierarchy", "Level", "hierarchical_kmeans"), "protoclip.curate.hierarchy"
        ),
        "balanced_sample": "protoclip.curate.sampling",
    },
)
