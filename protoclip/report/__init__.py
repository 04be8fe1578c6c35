"""What a run looks like: an HTML page about one or several runs, and a picture of its curves."""

from protoclip.report.figures import plot_curves
from protoclip.report.page import recorded_baseline, write_report
from protoclip.report.snapshot import Samples, load_snapshot, save_snapshot, take_snapshot

__all__ = [
    "Samples",
    "load_snapshot",
    "plot_curves",
    "recorded_baseline",
    "save_snapshot",
    "take_snapshot",
    "write_report",
]
