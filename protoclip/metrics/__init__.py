"""What a CLIP is judged by: pure functions on tensors, needing torch and nothing else.

Definitions follow CLIP_benchmark (retrieval, zero-shot, probes), scikit-learn (ARI, AMI, NMI) and
Wang & Isola 2020 (alignment, uniformity). Nothing here holds an N x M matrix: work goes by chunks.
"""

from protoclip.metrics.bootstrap import Interval, Sampled, bootstrap_intervals, bootstrap_mean
from protoclip.metrics.classify import (
    Accuracy,
    accuracy,
    class_vectors,
    classify,
    mean_average_precision,
    zero_shot_logits,
)
from protoclip.metrics.geometry import alignment, modality_gap, uniformity
from protoclip.metrics.grouping import (
    adjusted_mutual_information,
    adjusted_rand_index,
    contingency,
    group_scores,
    normalized_mutual_information,
)
from protoclip.metrics.paper_probe import paper_linear_probe
from protoclip.metrics.probe import PROBE_ITERATIONS, LinearProbe, fit_linear_probe, knn_logits
from protoclip.metrics.prototypes import churn, prototype_health, purity
from protoclip.metrics.retrieval import Retrieval, retrieval

__all__ = [
    "PROBE_ITERATIONS",
    "Accuracy",
    "Interval",
    "LinearProbe",
    "Retrieval",
    "Sampled",
    "accuracy",
    "adjusted_mutual_information",
    "adjusted_rand_index",
    "alignment",
    "bootstrap_intervals",
    "bootstrap_mean",
    "churn",
    "class_vectors",
    "classify",
    "contingency",
    "fit_linear_probe",
    "group_scores",
    "knn_logits",
    "mean_average_precision",
    "modality_gap",
    "normalized_mutual_information",
    "paper_linear_probe",
    "prototype_health",
    "purity",
    "retrieval",
    "uniformity",
    "zero_shot_logits",
]
