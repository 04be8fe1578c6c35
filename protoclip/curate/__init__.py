"""A balanced subset of features: clusters of clusters, and a sample with equal shares of them."""

from protoclip.curate.hierarchy import Hierarchy, Level, hierarchical_kmeans
from protoclip.curate.sampling import balanced_sample

__all__ = ["Hierarchy", "Level", "balanced_sample", "hierarchical_kmeans"]
