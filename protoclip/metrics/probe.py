"""What can be read off frozen features: linear probe and nearest neighbours."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip.metrics._common import check_labels, check_matrix, rows_per_block, unit

LAMBDAS = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
PROBE_ITERATIONS = 100


@dataclass(frozen=True)
class LinearProbe:
    """Multinomial logistic regression on standardised features."""

    mean: Tensor  # float32 [D]
    std: Tensor  # float32 [D]
    weight: Tensor  # float32 [C, D]
    bias: Tensor  # float32 [C]
    penalty: float  # the lambda it was fitted with

    def logits(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, C]."""
        check_matrix("LinearProbe: features", features, cols=self.mean.numel())
        x = (features.float() - self.mean) / self.std
        return torch.addmm(self.bias, x, self.weight.T)


def fit_linear_probe(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    penalties: tuple[float, ...] = LAMBDAS,
    heldout: float = 0.2,
    max_iter: int = PROBE_ITERATIONS,
    seed: int = 0,
) -> LinearProbe:
    """Minimises mean cross-entropy + lambda/2 |W|^2 (bias free) by L-BFGS, full batch.

    Lambda is the one with the lowest cross-entropy on a random part of the given (training)
    samples; the path runs from strong to weak, each fit starting from the last, and stops once two
    weaker ones in a row are worse. Then all samples are fitted with it. In scikit-learn's terms
    C = 1 / (lambda N). Deterministic on the CPU.

    Args:
        features: [N, D], any length; columns are standardised, constant ones become 0.
        labels: int64 [N] in 0 .. num_classes - 1.
        num_classes: C.
        penalties: the lambdas to choose from; a single one is used as it is.
        heldout: share of the samples that choose lambda.
        max_iter: L-BFGS iterations per fit.
        seed: draws the held-out part.
    Raises:
        ValueError: shapes disagree, labels out of range, non-finite features, fewer than 2 samples.
    """
    check_matrix("fit_linear_probe: features", features)
    n = features.shape[0]
    check_labels("fit_linear_probe: labels", labels, n)
    if n < 2 or not penalties:
        raise ValueError(
            f"fit_linear_probe: expected at least 2 samples and 1 penalty, got {n} and {penalties}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"fit_linear_probe: labels must lie in 0..{num_classes - 1}, "
            f"found {int(labels.min())}..{int(labels.max())}"
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError("fit_linear_probe: features hold NaN or infinity; check the model first")
    x = features.detach().float()
    mean, std = x.mean(0), x.std(0, correction=0)
    # Columns that are constant up to rounding would be noise blown up to unit variance.
    std = torch.where(std > 1e-6 * x.abs().amax(0), std, torch.inf)
    x, y = (x - mean) / std, labels.to(x.device)
    path = sorted(penalties, reverse=True)
    if len(path) > 1:
        path = path[: 1 + _choose(x, y, num_classes, path, heldout, max_iter, seed)]
    parameters = x.new_zeros(num_classes, x.shape[1] + 1)
    parameters = _fit(x, y, path[-1], parameters, max_iter)
    return LinearProbe(mean, std, parameters[:, :-1], parameters[:, -1], path[-1])


def _choose(
    x: Tensor, y: Tensor, num_classes: int, path: list[float], heldout: float, max_iter: int, seed
) -> int:
    """Position in the path of the lambda with the lowest held-out cross-entropy."""
    n = x.shape[0]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(x.device)
    cut = min(n - 1, max(1, round(heldout * n)))
    judge, train = order[:cut], order[cut:]
    x_train, y_train, x_judge, y_judge = x[train], y[train], x[judge], y[judge]
    parameters = x.new_zeros(num_classes, x.shape[1] + 1)
    best, best_loss = 0, float("inf")
    for i, penalty in enumerate(path):
        parameters = _fit(x_train, y_train, penalty, parameters, max_iter)
        logits = torch.addmm(parameters[:, -1], x_judge, parameters[:, :-1].T)
        loss = float(F.cross_entropy(logits, y_judge))
        if loss < best_loss:
            best, best_loss = i, loss
        elif i - best >= 2:
            break
    return best


def _fit(x: Tensor, y: Tensor, penalty: float, start: Tensor, max_iter: int) -> Tensor:
    """Parameters [C, D + 1] (weights, then bias) at the minimum, from ``start``."""
    parameters = start.clone()
    n = x.shape[0]
    blocks = torch.arange(n, device=x.device).split(rows_per_block(start.shape[0]))
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=max_iter,
        history_size=10,
        tolerance_grad=1e-5,
        tolerance_change=1e-8,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        # The gradient by hand: autograd costs more than the two matrix products on small data,
        # and by blocks of rows [N, C] is never held.
        weight, bias = parameters[:, :-1], parameters[:, -1]
        loss = 0.5 * penalty * weight.square().sum()
        gradient = torch.cat([penalty * weight, torch.zeros_like(bias)[:, None]], dim=1)
        for rows in blocks:
            inputs, own = x[rows], y[rows]
            log_p = torch.addmm(bias, inputs, weight.T).log_softmax(1)  # [b, C]
            each = torch.arange(len(rows), device=x.device)
            loss = loss - log_p[each, own].sum() / n
            error = log_p.exp_()
            error[each, own] -= 1
            gradient[:, :-1] += error.T @ inputs / n  # [C, D]
            gradient[:, -1] += error.sum(0) / n
        parameters.grad = gradient
        return loss

    optimizer.step(closure)
    return parameters


def knn_logits(
    train: Tensor,
    labels: Tensor,
    queries: Tensor,
    num_classes: int,
    *,
    k: int = 10,
    temperature: float | None = 0.07,
) -> Tensor:
    """Votes of the k nearest training samples by cosine, a block of queries at a time.

    Args:
        train: [N, D]; labels: int64 [N]; queries: [Q, D]; num_classes: C.
        k: neighbours, at most N are used.
        temperature: a vote weighs exp(cosine / temperature); None: all weigh the same.
    Returns:
        Shares of the votes, float [Q, C], rows sum to 1.
    """
    check_matrix("knn_logits: train", train)
    check_matrix("knn_logits: queries", queries, cols=train.shape[1])
    check_labels("knn_logits: labels", labels, train.shape[0])
    if train.shape[0] == 0 or k < 1:
        raise ValueError(
            f"knn_logits: expected k >= 1 and training samples, got k={k} and {train.shape[0]}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"knn_logits: labels must lie in 0..{num_classes - 1}, "
            f"found {int(labels.min())}..{int(labels.max())}"
        )
    z, labels, k = unit(train), labels.to(train.device), min(k, train.shape[0])
    votes = z.new_zeros(queries.shape[0], num_classes)
    step = rows_per_block(z.shape[0])
    for start in range(0, queries.shape[0], step):
        cosine, nearest = (unit(queries[start : start + step]) @ z.T).topk(k, dim=1)  # [b, k]
        if temperature is None:
            weight = torch.full_like(cosine, 1 / k)
        else:
            weight = torch.softmax(cosine / temperature, dim=1)
        votes[start : start + step].scatter_add_(1, labels[nearest], weight)
    return votes
