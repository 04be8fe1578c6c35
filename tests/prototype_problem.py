"""Problems for the prototype ops, and the error budget of a backend on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from budget import (
    PlainResults,
    Results,
    assert_results_within_budget,
    leaf,
    loss_and_gradients,
)
from torch import Tensor

import protoclip

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURES = (0.0, 0.01, 0.1, 1.0)  # of the targets; 0: hard


@dataclass(frozen=True)
class Problem:
    """What ``prototype_cross_entropy`` is called with, and the weights of the losses in the sum
    whose gradients are compared."""

    features: Tensor  # [N, D]
    prototypes: Tensor  # [K, D]
    labels: Tensor  # int64 [N], -100: ignored
    targets: Tensor | None = None  # [K, D]; None: hard labels
    logit_scale: float = 14.3
    weights: Tensor | None = None  # [N]; None: 1

    @property
    def row_weights(self) -> Tensor:
        if self.weights is not None:
            return self.weights
        return torch.ones(len(self.features), device=self.features.device)


def unit(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(shape), dim=-1).to(dtype)


def random_problem(
    n: int,
    k: int,
    d: int,
    *,
    dtype: torch.dtype,
    temperature: float,
    logit_scale: float = 14.3,
) -> Problem:
    """One label is ignored; targets are exact to fp64 in the rows that are looked up, the others
    are not computed."""
    features = unit(n, d, dtype=dtype)
    prototypes = unit(k, d, dtype=dtype)
    labels = torch.randint(0, k, (n,))
    targets = None
    if temperature > 0:
        source = 0.9 * unit(k, d).double()
        used = labels.unique()
        shares = torch.softmax(source[used] @ source.T / temperature, dim=1)
        targets = torch.zeros_like(prototypes)
        targets[used] = (shares @ prototypes.double()).to(dtype)
    if n > 2:
        labels[n // 2] = -100
    return Problem(features, prototypes, labels, targets, logit_scale)


def computed(problem: Problem, backend: str) -> Results:
    """Losses and the gradients of their weighted sum."""
    features = leaf(problem.features)
    prototypes = leaf(problem.prototypes)
    logit_scale = leaf(problem.logit_scale, device=features.device)
    loss = protoclip.prototype_cross_entropy(
        features,
        prototypes,
        problem.labels,
        logit_scale,
        targets=problem.targets,
        reduction="none",
        backend=backend,
    )
    return loss_and_gradients(
        loss,
        problem.row_weights,
        features=features,
        prototypes=prototypes,
        logit_scale=logit_scale,
    )


def plain(problem: Problem, dtype: torch.dtype) -> PlainResults:
    """The plain formula, run in ``dtype`` as under autocast: the products and the gradient of the
    logits in that dtype, cross-entropy in at least fp32. fp64 gives the truth."""
    at_least_fp32 = torch.promote_types(dtype, torch.float32)
    features = leaf(problem.features, dtype)
    prototypes = leaf(problem.prototypes, dtype)
    logit_scale = leaf(problem.logit_scale, at_least_fp32, features.device)
    weights = problem.row_weights.to(at_least_fp32)
    used = problem.labels != -100
    labels = problem.labels.where(used, 0)
    dots = features @ prototypes.T
    logits = (logit_scale.to(dtype) * dots).to(at_least_fp32)
    if problem.targets is None:
        target_terms = 0.0
        positive = logits.gather(1, labels[:, None])[:, 0]
    else:
        dot = (features * problem.targets.to(dtype)[labels]).sum(dim=1)
        target_terms = (dot * problem.row_weights).abs().sum().item()
        positive = (logit_scale.to(dtype) * dot).to(at_least_fp32)
    loss = (logits.logsumexp(dim=1) - positive).where(used, 0)
    results = loss_and_gradients(
        loss,
        weights,
        features=features,
        prototypes=prototypes,
        logit_scale=logit_scale,
        logits=logits,
    )
    logit_terms = (results.pop("dlogits") * dots).abs().sum().item()
    terms = logit_terms + target_terms + 2**-29 * weights.sum().item()
    return PlainResults(results, terms)


def assert_problem_within_budget(problem: Problem, backend: str = "cpu", size: float = 0.0) -> None:
    """``size``: of what the gradients sum, where they cancel."""
    got = computed(problem, backend)
    truth = plain(problem, torch.float64)
    magnitudes = {}
    for name, least in (("loss", 1.0), ("dfeatures", size), ("dprototypes", size)):
        values = truth.values[name]
        magnitudes[name] = max(least, values.abs().max().item()) if values.numel() else least
    assert_results_within_budget(
        got,
        truth=truth,
        base=plain(problem, problem.features.dtype),
        logit_scale=problem.logit_scale,
        magnitudes=magnitudes,
    )


def assert_random_problem_within_budget(
    n: int,
    k: int,
    d: int,
    *,
    dtype: torch.dtype,
    temperature: float,
    logit_scale: float,
    backend: str = "cpu",
) -> None:
    problem = random_problem(n, k, d, dtype=dtype, temperature=temperature, logit_scale=logit_scale)
    weights = torch.rand(n) + 0.5
    assert_problem_within_budget(replace(problem, weights=weights), backend)
