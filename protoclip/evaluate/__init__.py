"""Evaluate a model: ``python -m protoclip.evaluate MODEL --data ... --tasks ...``."""

from protoclip.evaluate.datasets import Layout, open_layout
from protoclip.evaluate.results import (
    Outcome,
    Results,
    SetResults,
    format_table,
    read_results,
    write_results,
)
from protoclip.evaluate.tasks import (
    Encoder,
    EvalSet,
    encode_sets,
    evaluate_features,
    floors,
    peak_memory_bytes,
)

__all__ = [
    "Encoder",
    "EvalSet",
    "Layout",
    "Outcome",
    "Results",
    "SetResults",
    "encode_sets",
    "evaluate_features",
    "floors",
    "format_table",
    "open_layout",
    "peak_memory_bytes",
    "read_results",
    "write_results",
]
