"""Pictures of a run: the curves of its metrics, and what its prototypes hold."""

from protoclip.report.curves import plot_curves, read_series
from protoclip.report.prototypes import plot_prototypes

__all__ = ["plot_curves", "plot_prototypes", "read_series"]
