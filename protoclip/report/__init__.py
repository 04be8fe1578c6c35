"""What a run looks like: an HTML page about one or several runs, and a picture of its curves."""

from protoclip.report.figures import plot_curves
from protoclip.report.page import write_report
from protoclip.report.snapshot import (
    Samples,
    Snapshot,
    contact_sheet,
    load_snapshot,
    save_snapshot,
    take_snapshot,
)

__all__ = [
    "Samples",
    "Snapshot",
    "contact_sheet",
    "load_snapshot",
    "plot_curves",
    "save_snapshot",
    "take_snapshot",
    "write_report",
]
