"""Metrics of a CLIP that scikit-learn does not have: pure functions on features.

Definitions follow CLIP_benchmark (retrieval, zero-shot, probes) and Wang & Isola 2020 (alignment,
uniformity). Rows are processed in blocks, so that no [N, M] matrix is ever held.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoclip.lloyd import kmeans

BLOCK_ELEMENTS = 1 << 24  # one block of scores: 64 MiB in float32
DRAWS_AT_ONCE = 1 << 22  # bootstrap draws in memory: 32 MiB
LAMBDAS = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 1e-3, 3e-4, 1e-4)
PROBE_ITERATIONS = 100
NEIGHBOURS = 10  # that vote in k-NN
MEAN_PER_CLASS = "mean_per_class_recall"
Score = Callable[[Tensor], Tensor]  # features [b, D] -> logits [b, C], rows independent


def unit(x: Tensor) -> Tensor:
    """Rows of ``x`` at length 1, in at least float32; a zero row stays zero."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)


def rows_per_block(columns: int) -> int:
    """How many rows with this many columns of scores fit in one block."""
    return max(1, BLOCK_ELEMENTS // max(columns, 1))


class Places(NamedTuple):
    """Where the right answers of each query stand: fp64 [Q] each."""

    ahead: Tensor  # wrong answers that score higher than every right one; infinity: none is right
    tied: Tensor  # wrong answers that score the same as the best right one
    right: Tensor  # right answers that score the same as the best one, itself included

    @property
    def rank(self) -> Tensor:
        """Expected rank of the first right answer, from 1, if ties come in random order."""
        return self.ahead + 1 + self.tied / (self.right + 1)

    def within(self, k: int) -> Tensor:
        """Probability that a right answer is among the first k, if ties come in random order.

        0 or 1 without ties. A model that maps everything to one point scores at chance.
        """
        missed = torch.ones_like(self.ahead)
        for place in range(k):
            drawn = place - self.ahead  # tied answers that came before this place
            wrong_left = (self.tied - drawn).clamp_min(0)
            left = (self.tied + self.right - drawn).clamp_min(1)
            missed *= torch.where(drawn >= 0, wrong_left / left, 1)
        return 1 - missed


def retrieval(
    image: Tensor,
    text: Tensor,
    caption_image: Tensor | None = None,
    caption_ids: Tensor | None = None,
) -> tuple[Places, Places]:
    """Places of the right answers by cosine, of each image [N] and of each caption [M].

    Args:
        image: [N, D].
        text: [M, D].
        caption_image: the image row of each caption, int64 [M]; None: caption i is of image i.
        caption_ids: the same number, from 0, for captions of the same text, int64 [M]. Then each
            of them is a right answer to every image that has one of them, and each of these images
            to every one of them; None: all texts differ.
    """
    images = torch.arange(len(image), device=image.device)
    owner = images if caption_image is None else caption_image.to(image.device)
    ids = torch.arange(len(text), device=image.device)
    if caption_ids is not None:
        ids = caption_ids.to(image.device)
    z_image = unit(image)
    z_text = unit(text)

    def captions_of(rows: slice) -> Tensor:
        return right_answers(owner, ids, images[rows], ids)

    def images_of(rows: slice) -> Tensor:
        return right_answers(ids, owner, ids[rows], images)

    return (
        _places(z_image, len(text), lambda rows: rows @ z_text.T, captions_of),
        _places(z_text, len(image), lambda rows: rows @ z_image.T, images_of),
    )


def right_answers(question: Tensor, answer: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Whether a row's number and a column's are together in (question, answer): bool [b, P].

    All are numbers from 0: ``question`` and ``answer`` int64 [L], ``rows`` int64 [b], ``columns``
    int64 [P].
    """
    asked, place = rows.unique(return_inverse=True)
    among = torch.isin(question, asked)
    sizes = [int(numbers.max()) + 1 for numbers in (answer, columns) if len(numbers)]
    is_right = torch.zeros(len(asked), max(sizes, default=0), dtype=torch.bool, device=rows.device)
    is_right[torch.searchsorted(asked, question[among]), answer[among]] = True
    return is_right[place][:, columns]


def recalls(places: tuple[Places, Places], ks: Sequence[int] = (1, 5, 10)) -> dict[str, Tensor]:
    """``retrieval``'s places -> 0 to 1 per query, by CLIP_benchmark's name of their mean."""
    return {
        f"{answers}_retrieval_recall@{k}": places_of_queries.within(k)
        for answers, places_of_queries in zip(("text", "image"), places, strict=True)
        for k in ks
    }


def _places(
    queries: Tensor, num_answers: int, score: Score, right_of: Callable[[slice], Tensor]
) -> Places:
    """Places of the right answers of queries [Q, D]; of some rows ``score`` gives the scores of all
    P answers, and ``right_of`` which are right, bool [b, P]."""
    ahead, tied, right = queries.new_zeros(3, len(queries), dtype=torch.float64)
    ahead.fill_(torch.inf)
    step = rows_per_block(num_answers)
    for start in range(0, len(queries) if num_answers else 0, step):
        rows = slice(start, start + step)
        scores = score(queries[rows])  # [b, P]
        is_right = right_of(rows)
        best = scores.masked_fill(~is_right, -torch.inf).amax(1, keepdim=True)
        equal = scores == best
        ahead[rows] = torch.where(best[:, 0].isfinite(), (scores > best).sum(1), torch.inf)
        right[rows] = (equal & is_right).sum(1).double()
        tied[rows] = equal.sum(1) - right[rows]
    return Places(ahead, tied, right)


def class_vectors(prompts: Tensor) -> Tensor:
    """The renormalised mean of the unit features of each class's prompts: [C, P, D] -> [C, D]."""
    return unit(unit(prompts.flatten(0, 1)).reshape(prompts.shape).mean(1))


def zero_shot_logits(image: Tensor, vectors: Tensor) -> Tensor:
    """Cosines between images [N, D] and class vectors [C, D] -> [N, C]."""
    return unit(image) @ unit(vectors).T


def classify(features: Tensor, labels: Tensor, num_classes: int, score: Score) -> dict[str, Tensor]:
    """One value per sample for the classifier ``score``, by CLIP_benchmark's name of their mean.

    Features [N, D], labels int64 [N] in 0 .. C - 1. A tie counts the expected hits, as in
    ``Places``; fewer than five classes have no top-5.
    """
    labels = labels.to(features.device)
    classes = torch.arange(num_classes, device=features.device)
    places = _places(features, num_classes, score, lambda rows: labels[rows, None] == classes)
    in_first = places.within(1)
    in_five = places.within(5)
    size = labels.bincount()
    weight = len(labels) / ((size > 0).sum() * size[labels])  # classes count equally
    return {
        "acc1": in_first,
        "acc5": in_five if num_classes >= 5 else in_five[:0],
        MEAN_PER_CLASS: in_first * weight,
    }


def fit_linear_probe(
    features: Tensor, labels: Tensor, num_classes: int, penalties: tuple[float, ...] = LAMBDAS
) -> tuple[Score, float]:
    """Multinomial logistic regression on standardised features, by full-batch L-BFGS.

    Minimises mean cross-entropy + lambda/2 |W|^2 (bias free; scikit-learn's C = 1 / (lambda N)).
    Lambda has the lowest cross-entropy on a random fifth of the given (training) samples; the path
    runs from strong to weak, each fit starting from the last, and stops once two weaker ones in a
    row are worse. Then all samples, [N, D] with N > 1 and int64 [N], are fitted with it.

    Returns:
        features [N, D] -> logits [N, C], and the lambda.
    """
    if not bool(torch.isfinite(features).all()):
        raise ValueError("fit_linear_probe: features hold NaN or infinity; check the model first")
    x = features.float()
    mean = x.mean(0)
    std = x.std(0, correction=0)
    # Columns that are constant up to rounding would be noise blown up to unit variance.
    std = torch.where(std > 1e-6 * x.abs().amax(0), std, torch.inf)
    x = (x - mean) / std
    y = labels.to(x.device)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    judge, train = order.tensor_split([max(1, round(0.2 * len(x)))])
    layer = zero = nn.Linear(x.shape[1], num_classes, device=x.device)
    for tensor in zero.parameters():
        nn.init.zeros_(tensor)
    path = sorted(penalties, reverse=True)
    losses: list[float] = []
    for penalty in path:
        layer = _fit(x[train], y[train], penalty, layer)
        losses.append(float(F.cross_entropy(layer(x[judge]), y[judge])))
        best = losses.index(min(losses))
        if len(losses) - best > 2:
            break
    fitted = _fit(x, y, path[best], zero)
    return lambda rows: fitted((rows.float() - mean) / std), path[best]


def _fit(x: Tensor, y: Tensor, penalty: float, start: nn.Linear) -> nn.Linear:
    """The layer at the minimum, from ``start``; by blocks of rows, so [N, C] is never held."""
    layer = copy.deepcopy(start).requires_grad_()
    optimizer = torch.optim.LBFGS(
        layer.parameters(),
        max_iter=PROBE_ITERATIONS,
        history_size=10,
        tolerance_grad=1e-5,
        tolerance_change=1e-8,
        line_search_fn="strong_wolfe",
    )
    step = rows_per_block(layer.out_features)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * penalty * layer.weight.square().sum()
        loss.backward()
        for rows, targets in zip(x.split(step), y.split(step), strict=True):
            part = F.cross_entropy(layer(rows), targets, reduction="sum") / len(x)
            part.backward()
            loss = loss.detach() + part.detach()
        return loss

    optimizer.step(closure)
    return layer.requires_grad_(False)


def paper_linear_probe(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    num_classes: int,
    *,
    epochs: int = 100,
    batch_size: int = 1024,
    seed: int = 0,
) -> tuple[dict[str, Tensor], int]:
    """The linear probe of ProtoCLIP's authors: SGD, scored at its *best test epoch*.

    Momentum 0.9, weight decay 1e-6, cosine to 0 by epoch, batches in the given order (the authors'
    loader does not shuffle, so data sorted by class arrives class by class). Choosing the epoch on
    the test set inflates the numbers: use ``fit_linear_probe`` for your own.

    Returns:
        ``classify`` of the best epoch, and its number from 1.
    Source:
        megvii-research/protoclip, evaluations/linear_eval.py, logistic_regression_pytorch.
    """
    x = train[0].float()
    y = train[1].to(x.device)
    layer = nn.Linear(x.shape[1], num_classes)
    random = torch.Generator().manual_seed(seed)
    layer.weight.data = 0.01 * torch.randn(layer.weight.shape, generator=random)
    nn.init.zeros_(layer.bias)
    layer.to(x.device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-6)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=0)
    scores: list[dict[str, Tensor]] = []
    for _ in range(epochs):
        for rows, targets in zip(x.split(batch_size), y.split(batch_size), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(layer(rows), targets).backward()
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            scores.append(classify(test[0].float(), test[1], num_classes, layer))
    best = max(range(epochs), key=lambda epoch: float(scores[epoch]["acc1"].sum()))
    return scores[best], best + 1


def fit_knn(
    train: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    k: int = NEIGHBOURS,
    temperature: float = 0.07,
) -> Score:
    """scikit-learn's k-NN by cosine, with votes of weight exp(cosine / temperature): queries
    [Q, D], Q > 0 -> shares of the votes, float64 [Q, C]."""
    from sklearn.neighbors import NearestNeighbors

    count = min(k, len(train))
    neighbours = NearestNeighbors(n_neighbors=count, metric="cosine", algorithm="brute")
    neighbours.fit(unit(train).cpu().numpy())

    def votes(queries: Tensor) -> Tensor:
        distance, nearest = map(
            torch.from_numpy, neighbours.kneighbors(unit(queries).cpu().numpy())
        )
        shares = torch.softmax(-distance.double() / temperature, dim=1)
        out = shares.new_zeros(len(queries), num_classes)
        return out.scatter_add_(1, labels.cpu()[nearest], shares).to(queries.device)

    return votes


def group_scores(
    features: Tensor, labels: Tensor, *, seeds: tuple[int, ...] = (0, 1, 2)
) -> dict[str, float]:
    """scikit-learn's ARI, AMI and NMI of k-means clusters of unit features against known labels.

    There are as many clusters as labels. Scores are means over one k-means per seed, because a
    single one varies by a few hundredths. Its start and its way with empty clusters are those of
    the recorded runs.
    """
    from sklearn import metrics

    points = unit(features)
    truth = labels.cpu().numpy()
    k = len(labels.unique())
    groupings = [
        kmeans(
            points,
            k,
            num_iters=20,
            tol=0,
            seed=seed,
            init="plain k-means++",
            empty_clusters="split",
            warn=False,
        )
        .labels.cpu()
        .numpy()
        for seed in seeds
    ]
    scores = {
        "ari": metrics.adjusted_rand_score,
        "ami": metrics.adjusted_mutual_info_score,
        "nmi": metrics.normalized_mutual_info_score,
    }
    return {
        name: float(np.mean([score(truth, groups) for groups in groupings]))
        for name, score in scores.items()
    }


def modality_gap(image: Tensor, text: Tensor) -> float:
    """Distance between the mean unit image [N, D] and the mean unit text [M, D]; 0 .. 2."""
    return float((unit(image).double().mean(0) - unit(text).double().mean(0)).norm())


def alignment(image: Tensor, text: Tensor) -> float:
    """Mean squared distance of the unit vectors of matching rows, [N, D] each; 0 .. 4."""
    return float((unit(image) - unit(text)).double().square().sum(1).mean())


def uniformity(features: Tensor) -> float:
    """log of the mean of exp(-2 |x - y|^2) over pairs of different rows [N, D], in nats; 0 when all
    rows are one point. Fewer than two rows: NaN. Source: Wang & Isola 2020, equation 3."""
    n = len(features)
    if n < 2:
        return math.nan
    z = unit(features)
    step = rows_per_block(n)
    total = torch.zeros((), dtype=torch.float64, device=z.device)
    for start in range(0, n, step):
        squared = (2 - 2 * z[start : start + step] @ z.T).clamp_min_(0)  # [b, N]
        squared[:, start : start + step].fill_diagonal_(torch.inf)  # a row is not its own pair
        total += torch.exp(-2 * squared).sum(dtype=torch.float64)
    return float(torch.log(total / (n * (n - 1))))


def bootstrap_intervals(
    samples: Mapping[str, Tensor], *, resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap 95 % interval of each mean, low and high; none without samples.

    ``samples`` hold one value per sample [N]; those of equal length share their resamples.
    """
    out: dict[str, tuple[float, float]] = {}
    for n in {len(values) for values in samples.values()} - {0}:
        names = [name for name, values in samples.items() if len(values) == n]
        values = torch.stack([samples[name] for name in names], dim=1).cpu().double()  # [N, S]
        generator = torch.Generator().manual_seed(seed)
        means = []
        for part in torch.arange(resamples).split(max(1, DRAWS_AT_ONCE // n)):
            rows = torch.randint(n, (len(part), n), generator=generator)
            times = values.new_zeros(rows.shape).scatter_add_(1, rows, values.new_ones(rows.shape))
            means.append(times @ values / n)  # [R, S]
        low, high = torch.cat(means).quantile(values.new_tensor([0.025, 0.975]), dim=0).tolist()
        out |= {name: (low[i], high[i]) for i, name in enumerate(names)}
    return out
