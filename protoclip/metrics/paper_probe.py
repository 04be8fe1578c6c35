"""The linear probe of ProtoCLIP's authors, kept as it is so that their numbers can be met."""

import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip.metrics._common import check_labels, check_matrix
from protoclip.metrics.classify import Accuracy, classify


def paper_linear_probe(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    num_classes: int,
    *,
    epochs: int = 100,
    batch_size: int = 1024,
    lr: float = 0.1,
    seed: int = 0,
) -> tuple[Accuracy, int]:
    """SGD on the features as they are; the *best test epoch* counts.

    Momentum 0.9, weight decay 1e-6, cosine to 0 by epoch, batches in the given order (the authors'
    loader does not shuffle, so data sorted by class arrives class by class). Choosing the epoch on
    the test set flatters: use ``fit_linear_probe`` for numbers of your own.

    Args:
        features, test_features: [N, D] and [M, D], not normalised.
        labels, test_labels: int64 [N] and [M] in 0 .. num_classes - 1.
        num_classes: C.
        seed: of the initial weights, N(0, 0.01).
    Returns:
        Scores of the best epoch, and its number from 1.
    Source:
        megvii-research/protoclip, evaluations/linear_eval.py, logistic_regression_pytorch.
    """
    check_matrix("paper_linear_probe: features", features)
    check_labels("paper_linear_probe: labels", labels, features.shape[0])
    if features.shape[0] == 0 or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"paper_linear_probe: expected samples with labels in 0..{num_classes - 1}, "
            f"got {features.shape[0]} samples"
        )
    x, y = features.detach().float(), labels.to(features.device)
    random = torch.Generator().manual_seed(seed)
    weight = (0.01 * torch.randn(num_classes, x.shape[1], generator=random)).to(x.device)
    bias = torch.zeros(num_classes, device=x.device)
    optimizer = torch.optim.SGD(
        [weight.requires_grad_(), bias.requires_grad_()], lr=lr, momentum=0.9, weight_decay=1e-6
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=0)
    best: tuple[Accuracy, int] | None = None
    for epoch in range(epochs):
        for rows in torch.arange(len(x), device=x.device).split(batch_size):
            loss = F.cross_entropy(F.linear(x[rows], weight, bias), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            got = classify(
                test_features.float(), test_labels, num_classes, lambda z: F.linear(z, weight, bias)
            )
        if best is None or got.acc1 > best[0].acc1:
            best = got, epoch + 1
    assert best is not None
    return best
