"""What a run looks like: an HTML page about one or several runs, and two plain pictures."""

from protoclip.report.curves import plot_curves, read_series
from protoclip.report.page import write_report
from protoclip.report.prototypes import plot_prototypes
from protoclip.report.snapshot import Snapshot, load_snapshot, save_snapshot, take_snapshot

__all__ = [
    "Snapshot",
    "load_snapshot",
    "plot_curves",
    "plot_prototypes",
    "read_series",
    "save_snapshot",
    "take_snapshot",
    "write_report",
]
