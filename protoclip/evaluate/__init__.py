"""Evaluate a model on pairs; ``python -m protoclip.evaluate RUN`` does so for a finished run."""

from protoclip.evaluate.results import (
    Results,
    SetResults,
    clip_benchmark_records,
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
    "clip_benchmark_records",
    "evaluate_features",
    "evaluate_model",
    "format_table",
    "peak_memory_bytes",
    "read_results",
    "write_results",
]
