"""Evaluate a model: ``python -m protoclip.evaluate MODEL --data ... --tasks ...``."""

from protoclip.evaluate.datasets import Layout, class_prompts, open_layout
from protoclip.evaluate.results import (
    Results,
    SetResults,
    format_table,
    read_results,
    records,
    write_results,
)
from protoclip.evaluate.tasks import (
    Encoder,
    EvalSet,
    evaluate_features,
    evaluate_model,
    peak_memory_bytes,
)

__all__ = [
    "Encoder",
    "EvalSet",
    "Layout",
    "Results",
    "SetResults",
    "class_prompts",
    "evaluate_features",
    "evaluate_model",
    "format_table",
    "open_layout",
    "peak_memory_bytes",
    "read_results",
    "records",
    "write_results",
]
