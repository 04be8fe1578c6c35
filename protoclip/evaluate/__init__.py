"""Evaluate a model: ``python -m protoclip.evaluate MODEL --data ... --tasks ...``."""

from protoclip.evaluate.records import records, write_records
from protoclip.evaluate.results import (
    Results,
    SetResults,
    format_table,
    read_results,
    write_results,
)
from protoclip.evaluate.scores import evaluate_features, evaluate_model, peak_memory_bytes
from protoclip.evaluate.sets import Encoder, EvalSet, ProbeTrain, class_prompts

__all__ = [
    "Encoder",
    "EvalSet",
    "ProbeTrain",
    "Results",
    "SetResults",
    "class_prompts",
    "evaluate_features",
    "evaluate_model",
    "format_table",
    "peak_memory_bytes",
    "read_results",
    "records",
    "write_records",
    "write_results",
]
