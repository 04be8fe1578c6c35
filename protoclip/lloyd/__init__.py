"""Lloyd's k-means with the ops ``kmeans_assign`` and ``segment_mean``, or with faiss; points are in
memory or on disk, where each iteration reads them once.

With ``group`` every rank holds a slice of the points: assignment is local, sums and counts are
all-reduced, and all ranks get the same centroids. On a GPU no iteration over points in memory waits
for the device: the host reads whether the centroids still move while the device runs the next
assignment.
"""

from protoclip.lloyd.clustering import kmeans
from protoclip.lloyd.clusters import Clusters
from protoclip.lloyd.points import as_points, stored_rows
from protoclip.lloyd.starts import INITS

__all__ = ["INITS", "Clusters", "as_points", "kmeans", "stored_rows"]
