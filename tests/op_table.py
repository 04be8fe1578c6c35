"""The table of ops: how each public function is called, and the plain formula of what it computes.

A row of ``OPS`` says how inputs are made, which options there are and what is refused;
``test_ops.py`` asks the same questions of each row. A formula runs in the dtype of its inputs, as
under autocast: products in that dtype, sums in at least fp32; in fp64 it is the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from budget import PlainResults, Results, assert_results_within_budget, leaf
from torch import Tensor

import protoclip
from protoclip.ops import sigmoid_loss as sigmoid_loss_op

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
FUSED_DTYPES = (FP32, BF16, FP16)
WIDE = {"logit_scale", "logit_bias", "key_bias"}  # arguments that are fp32 beside half features
LEFT_OUT = -100
LEFT_OF_1 = 2**-29  # times eps of fp32, what fp64 itself leaves of a probability of 1


# ---- a call, and the error budget of a backend on it ----


class Plain(NamedTuple):
    """What a formula gives."""

    results: Sequence[Tensor]
    logits: Sequence[Tensor] = ()  # all that the results are made of, in at least fp32


def as_they_are(results: Any, **leaves: Tensor) -> Sequence[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


@dataclass(frozen=True)
class Call:
    """A call of a public function, and its formula."""

    function: Callable[..., Any]
    leaves: dict[str, Tensor]  # floating-point tensors, with a gradient where the op has one
    constants: dict[str, Any]
    formula: Callable[..., Plain]  # takes the leaves, by name
    scale: float = 0.0  # of the logits
    least: float = 1.0  # the size of what a result is the difference of
    has_gradient: bool = True
    observe: Callable[..., Sequence[Tensor]] = as_they_are  # results -> what the formula gives

    @property
    def dtype(self) -> torch.dtype:
        """Of the features."""
        return next(value.dtype for name, value in self.leaves.items() if name not in WIDE)

    def run(self, backend: str, leaves: Mapping[str, Tensor] | None = None, **more: Any) -> Any:
        """The function's results; ``more`` are further arguments."""
        arguments = {**self.leaves, **(leaves or {}), **self.constants, **more}
        return self.function(**arguments, backend=backend)

    def results(self, backend: str, device: str = "cpu", **more: Any) -> Results:
        """Results, and the gradients of their weighted sum, on the CPU."""
        leaves = {name: leaf(value.to(device)) for name, value in self.leaves.items()}
        if not self.has_gradient:
            leaves = {name: value.detach() for name, value in leaves.items()}
        results = self.with_tensors(lambda x: x.to(device)).run(backend, leaves, **more)
        observed = self.observe(results, **leaves)
        return {name: value.cpu() for name, value in self._with_gradients(observed, leaves).items()}

    def plain(self, dtype: torch.dtype) -> PlainResults:
        """Those of the formula."""
        wide = torch.promote_types(dtype, FP32)
        leaves = {
            name: leaf(value.cpu(), wide if name in WIDE else dtype)
            for name, value in self.leaves.items()
        }
        results, logits = self.formula(**leaves)
        of_logits = {f"logits {number}": values for number, values in enumerate(logits)}
        values = self._with_gradients(results, leaves | of_logits)
        terms = [(values[f"d{name}"] * logits).abs().sum() for name, logits in of_logits.items()]
        weights = sum(abs(upstream_of(result)).sum().item() for result in results)
        size = sum(term.item() for term in terms) / (abs(self.scale) or 1)
        return PlainResults(values, size + LEFT_OF_1 * weights)

    def _with_gradients(
        self, results: Sequence[Tensor], leaves: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        values = {f"result {number}": result.detach() for number, result in enumerate(results)}
        if not self.has_gradient:
            return values
        gradients = torch.autograd.grad(
            list(results),
            list(leaves.values()),
            [upstream_of(result) for result in results],
            allow_unused=True,
            materialize_grads=True,
        )
        return values | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Call:
        """All arguments that are tensors, changed."""
        return replace(
            self,
            leaves={name: change(value) for name, value in self.leaves.items()},
            constants={name: changed(value, change) for name, value in self.constants.items()},
        )


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with its tensors changed."""
    if isinstance(value, protoclip.Bank):
        return protoclip.Bank(*(changed(tensor, change) for tensor in vars(value).values()))
    if isinstance(value, list):
        return [changed(each, change) for each in value]
    return change(value) if isinstance(value, Tensor) else value


def upstream_of(result: Tensor) -> Tensor:
    """Weights of a result's numbers in the sum that is differentiated, the same in each dtype."""
    draw = torch.Generator().manual_seed(7)
    return (0.1 + torch.rand(result.shape, generator=draw, dtype=FP32)).to(result)


def assert_as_formula(
    call: Call, backend: str, device: str = "cpu", size: float = 0, **more: Any
) -> Results:
    """A backend's results and gradients are within the error budget. ``size``: of what a gradient
    sums, where that cancels."""
    got = call.results(backend, device, **more)
    assert_results_as_formula(call, got, size)
    return got


def assert_results_as_formula(call: Call, got: Results, size: float = 0) -> None:
    dtype = call.dtype
    truth = call.plain(FP64)
    if dtype == FP64:
        expected = {name: truth.values[name] for name in got}
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11, check_dtype=False)
        return
    base = call.plain(dtype)
    magnitudes = {}
    for name, value in truth.values.items():
        largest = value.abs().max().item() if value.numel() else 0.0
        if name.startswith("result"):
            magnitudes[name] = max(largest, call.least)
        elif name == "dkey_bias":
            magnitudes[name] = max(largest, 1.1)  # the largest weight
        elif name not in ("dlogit_scale", "dlogit_bias"):
            magnitudes[name] = max(largest, size, LEFT_OF_1 * abs(call.scale))
        if name == "dlogit_bias":
            magnitudes[name] = LEFT_OF_1 + sum(
                value.abs().sum().item()
                for name, value in truth.values.items()
                if name.startswith("dlogits ")
            )
    assert_results_within_budget(
        got, truth=truth, base=base, logit_scale=call.scale, magnitudes=magnitudes
    )


def weighted(call: Call, weight: float) -> Call:
    """The results times a weight, so that gradients are of another size."""

    def formula(**leaves: Tensor) -> Plain:
        results, logits = call.formula(**leaves)
        return Plain([weight * result for result in results], logits)

    def observe(results: Any, **leaves: Tensor) -> Sequence[Tensor]:
        return [weight * result for result in call.observe(results, **leaves)]

    return replace(call, formula=formula, observe=observe, least=abs(weight))


# ---- which keys a query is compared with ----


class Masks(NamedTuple):
    positive: Tensor  # bool [N, M]
    seen: Tensor  # bool [N, M]
    left_out: Tensor  # bool [N]: queries without a position, which have no loss

    @property
    def counted(self) -> Tensor:
        """bool [N]: the queries that have a loss."""
        return self.positive.any(dim=1) & ~self.left_out


@dataclass(frozen=True)
class Relation:
    """What is said of queries and keys, as ``contrastive`` takes it."""

    positives: Tensor | None = None  # positions of own keys, [N] or [N, P]; -100: none
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    same_id: str = "exclude"
    exclude: Tensor | None = None
    key_bias: Tensor | None = None

    def masks(self, n: int, m: int) -> Masks:
        """The sets of ``contrastive``'s documentation."""
        if self.positives is not None:
            positions = columns_of(self.positives)
        elif self.key_ids is not None and self.same_id == "positive":  # by id alone
            positions = torch.full((n, 1), LEFT_OUT)
        else:
            positions = torch.arange(n)[:, None]
        keys = torch.arange(m)
        positive = (positions[:, :, None] == keys).any(dim=1)
        seen = torch.ones(n, m, dtype=torch.bool)
        if self.key_ids is not None:
            key_columns = columns_of(self.key_ids)
            if self.query_ids is not None:
                same = (columns_of(self.query_ids)[:, None] == key_columns).any(dim=2)
            else:  # the ids of the own keys
                first = positions[:, 0]
                own_columns = key_columns[first.clamp_min(0)]
                same = (own_columns[:, None] == key_columns).any(dim=2) & (first >= 0)[:, None]
            if self.same_id == "positive":
                positive = positive | same
            else:
                seen = positive | ~same
        if self.exclude is not None:
            seen = seen & (keys != self.exclude[:, None])
        if self.key_bias is not None:
            seen = seen & (self.key_bias != -torch.inf)
        left_out = torch.zeros(n, dtype=torch.bool)
        if self.positives is not None:
            left_out = (positions == LEFT_OUT).all(dim=1)
        return Masks(positive & seen, seen, left_out)


def columns_of(x: Tensor) -> Tensor:
    """[N] or [N, R] -> [N, R]"""
    return x if x.ndim == 2 else x[:, None]


def scaled_products(logit_scale: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The logits as under autocast."""
    return (logit_scale.to(x.dtype) * (x @ y.T)).to(torch.promote_types(x.dtype, FP32))


def levels(logits: Tensor, seen: Tensor) -> Tensor:
    """Log-sum-exp over what a row sees, 0 where that is nothing."""
    any_seen = seen.any(dim=1)
    if not logits.shape[1]:
        return logits.sum(dim=1)
    visible = logits.where(seen | ~any_seen[:, None], -torch.inf)
    return visible.logsumexp(dim=1).where(any_seen, 0)


def means(logits: Tensor, used: Tensor) -> Tensor:
    """The mean of the logits that are used, 0 where there are none."""
    return logits.where(used, 0).sum(dim=1) / used.sum(dim=1).clamp_min(1)


def cross_entropies(
    logits: Tensor, masks: Masks, label_smoothing: float = 0, level: Tensor | None = None
) -> Tensor:
    """Losses of the rows: cross-entropy with 1 - epsilon of the target on the mean of the
    positives and epsilon on the mean of all that is seen; 0 without a positive."""
    target = (1 - label_smoothing) * means(logits, masks.positive)
    target = target + label_smoothing * means(logits, masks.seen)
    level = levels(logits, masks.seen) if level is None else level
    return (level - target).where(masks.counted, 0)


def wide(value: float, dtype: torch.dtype) -> Tensor:
    """A scalar argument, fp32 beside half features."""
    return torch.tensor(value, dtype=torch.promote_types(dtype, FP32))


def reduced(
    losses: Tensor, counted: Tensor, weights: Tensor | None, reduction: str
) -> list[Tensor]:
    factors = counted.to(losses.dtype)
    if weights is not None:
        losses = losses * weights.to(losses.dtype)
        factors = factors * weights.to(losses.dtype)
    if reduction == "none":
        return [losses]
    total = losses.sum()
    divisor = factors.sum() if reduction == "mean" and factors.sum() > 0 else 1
    return [total / divisor]


# ---- the calls, for given tensors ----


def info_nce(
    image: Tensor, text: Tensor, logit_scale: float, reduction: str = "none", **options: Any
) -> Call:
    ids = options.get("ids")
    relation = Relation(query_ids=ids, key_ids=ids, same_id=options.get("same_id", "exclude"))
    masks = relation.masks(len(image), len(image))
    label_smoothing = options.get("label_smoothing", 0)

    def formula(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Plain:
        by_image = scaled_products(logit_scale, image_features, text_features)
        by_text = scaled_products(logit_scale, text_features, image_features)
        of_images = cross_entropies(by_image, masks, label_smoothing)
        of_texts = cross_entropies(by_text, masks, label_smoothing)
        losses = (of_images + of_texts) / 2
        return Plain(
            reduced(losses, masks.counted, options.get("weights"), reduction), [by_image, by_text]
        )

    leaves = {
        "image_features": image,
        "text_features": text,
        "logit_scale": wide(logit_scale, image.dtype),
    }
    constants = {"reduction": reduction, **options}
    return Call(protoclip.info_nce, leaves, constants, formula, logit_scale)


def contrastive(
    queries: Tensor,
    keys: Tensor,
    logit_scale: float,
    relation: Relation | None = None,
    *,
    negatives: Tensor | None = None,
    reduction: str = "none",
    **options: Any,
) -> Call:
    relation = relation or Relation()
    masks = relation.masks(len(queries), len(keys))
    label_smoothing = options.get("label_smoothing", 0)

    def formula(
        queries: Tensor,
        keys: Tensor,
        logit_scale: Tensor,
        key_bias: Tensor | None = None,
        negatives: Tensor | None = None,
    ) -> Plain:
        logits = scaled_products(logit_scale, queries, keys)
        if key_bias is not None:
            logits = logits + key_bias.where(key_bias != -torch.inf, 0)
        all_logits = [logits]
        all_masks = masks
        visible = logits
        if negatives is not None:
            dots = torch.einsum("nd,nhd->nh", queries, negatives)
            own = (logit_scale.to(queries.dtype) * dots).to(logits.dtype)
            all_logits.append(own)
            visible = torch.cat([logits, own], dim=1)
            nothing = torch.zeros_like(own, dtype=torch.bool)
            all_masks = masks._replace(
                positive=torch.cat([masks.positive, nothing], dim=1),
                seen=torch.cat([masks.seen, ~nothing], dim=1),
            )
        losses = cross_entropies(visible, all_masks, label_smoothing)
        return Plain(reduced(losses, masks.counted, options.get("weights"), reduction), all_logits)

    leaves, constants = arguments_of(queries, keys, logit_scale, relation)
    if negatives is not None:
        leaves["negatives"] = negatives
    constants |= {"reduction": reduction, **options}
    return Call(protoclip.contrastive, leaves, constants, formula, logit_scale)


def arguments_of(
    queries: Tensor, keys: Tensor, logit_scale: float, relation: Relation
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Leaves and constants of ``contrastive`` and ``contrastive_parts``."""
    scale = wide(logit_scale, queries.dtype)
    leaves = {"queries": queries, "keys": keys, "logit_scale": scale}
    constants = dict(vars(relation))
    if (key_bias := constants.pop("key_bias")) is not None:
        leaves["key_bias"] = key_bias.to(scale.dtype)
    return leaves, constants


def contrastive_parts(
    queries: Tensor, keys: Tensor, logit_scale: float, relation: Relation
) -> Call:
    masks = relation.masks(len(queries), len(keys))

    def formula(
        queries: Tensor, keys: Tensor, logit_scale: Tensor, key_bias: Tensor | None = None
    ) -> Plain:
        logits = scaled_products(logit_scale, queries, keys)
        if key_bias is not None:
            logits = logits + key_bias.where(key_bias != -torch.inf, 0)
        return Plain([levels(logits, masks.seen), means(logits, masks.positive)], [logits])

    def observe(results: tuple[Tensor, Tensor], **leaves: Tensor) -> Sequence[Tensor]:
        """A query that sees nothing has a level of -inf, and any other a finite one."""
        level, mean = results
        any_seen = masks.seen.any(dim=1).to(level.device)
        assert torch.equal(level.isinf(), ~any_seen)
        return [level.where(any_seen, 0), mean]

    leaves, constants = arguments_of(queries, keys, logit_scale, relation)
    return Call(
        protoclip.contrastive_parts, leaves, constants, formula, logit_scale, observe=observe
    )


def self_contrastive(
    function: Callable[..., Tensor],
    views: dict[str, Tensor],
    flat: Callable[..., Tensor],
    masks: Masks,
    logit_scale: float,
    *,
    row_weights: Tensor | None,
    constants: dict[str, Any],
) -> Call:
    """``nt_xent`` and ``sup_con``: rows against each other; ``flat`` makes [N, D] of the views."""
    label_smoothing = constants.get("label_smoothing", 0)
    reduction = constants["reduction"]

    def formula(logit_scale: Tensor, **views: Tensor) -> Plain:
        rows = flat(**views)
        logits = scaled_products(logit_scale, rows, rows)
        losses = cross_entropies(logits, masks, label_smoothing)
        return Plain(reduced(losses, masks.counted, row_weights, reduction), [logits])

    def observe(losses: Tensor, **leaves: Tensor) -> Sequence[Tensor]:
        return [losses.flatten() if reduction == "none" else losses]

    dtype = next(iter(views.values())).dtype
    leaves = views | {"logit_scale": wide(logit_scale, dtype)}
    return Call(function, leaves, constants, formula, logit_scale, observe=observe)


def prototype_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    logit_scale: float,
    *,
    targets: Tensor | None = None,
    trained: bool = True,
    reduction: str = "none",
    **options: Any,
) -> Call:
    constant_prototypes = prototypes
    label_smoothing = options.get("label_smoothing", 0)

    def formula(
        features: Tensor, logit_scale: Tensor, prototypes: Tensor = constant_prototypes
    ) -> Plain:
        losses, logits = prototype_losses_of(
            features, prototypes.to(features.dtype), labels, logit_scale, targets, label_smoothing
        )
        used = labels != LEFT_OUT
        return Plain(reduced(losses, used, options.get("weights"), reduction), logits)

    leaves = {"features": features, "logit_scale": wide(logit_scale, features.dtype)}
    constants = {"labels": labels, "reduction": reduction, **options}
    constants |= some(targets=targets)
    (leaves if trained else constants)["prototypes"] = prototypes
    return Call(protoclip.prototype_cross_entropy, leaves, constants, formula, logit_scale)


def prototype_losses_of(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    logit_scale: Tensor,
    targets: Tensor | None,
    label_smoothing: float = 0,
) -> tuple[Tensor, list[Tensor]]:
    """Losses of the samples, and all logits."""
    used = labels != LEFT_OUT
    label = labels.where(used, 0)
    logits = scaled_products(logit_scale, features, prototypes)
    if not len(prototypes):
        return logits.sum(dim=1), [logits]
    level = logits.logsumexp(dim=1)
    if targets is None:
        target = logits.gather(1, label[:, None])[:, 0]
        target = (1 - label_smoothing) * target + label_smoothing * logits.mean(dim=1)
        return (level - target).where(used, 0), [logits]
    # Targets are constants, so the prototypes have a gradient by the log-sum-exp alone.
    soft = logit_scale.to(features.dtype) * (features * targets.to(features.dtype)[label]).sum(1)
    soft = soft.to(logits.dtype)
    mean = scaled_products(logit_scale, features, prototypes.detach()).mean(dim=1)
    target = (1 - label_smoothing) * soft + label_smoothing * mean
    return (level - target).where(used, 0), [logits, soft, mean]


# ---- rows ----

Refusal = tuple[dict[str, Any], type[Exception], str]  # arguments, error, words


class Size(NamedTuple):
    n: int  # queries, samples, points
    m: int  # keys, prototypes, centroids, segments
    d: int  # features


class Draw:
    """Random inputs that follow from a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=FP32)

    def unit(self, *shape: int) -> Tensor:
        return F.normalize(self.normal(*shape), dim=-1)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=FP32)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def pairs(self, size: Size, features: str) -> tuple[Tensor, Tensor]:
        """Unit rows [N, D] and [M, D]; "cone": all near one direction, as CLIP's are, and row i of
        one like row i of the other; "random": without any structure."""
        if features == "random":
            return self.unit(size.n, size.d), self.unit(size.m, size.d)
        shared = 2 * self.normal(1, size.d) + self.normal(max(size.n, size.m), size.d)
        x = F.normalize(shared + 0.3 * self.normal(*shared.shape), dim=1)
        y = F.normalize(shared + 0.3 * self.normal(*shared.shape), dim=1)
        return x[: size.n], y[: size.m]

    def weights(self, n: int, weighted: bool) -> Tensor | None:
        """[N], every third 0."""
        return self.uniform(n) * (torch.arange(n) % 3 > 0) if weighted else None

    def ids(self, n: int, columns: int) -> Tensor | None:
        """[N] or [N, 2]: equal in one column, in the other, and in both."""
        if not columns:
            return None
        first = self.integers(0, n // 3, n)
        return first if columns == 1 else torch.stack([first, torch.arange(n) // 4 + 10**12], dim=1)


def some(**options: Any) -> dict[str, Any]:
    """Options that have a value."""
    return {name: value for name, value in options.items() if value is not None}


def make_info_nce(
    size: Size,
    dtype: torch.dtype,
    *,
    features: str = "cone",
    logit_scale: float = 14.3,
    id_columns: int = 0,
    weighted: bool = False,
    **options: Any,
) -> Call:
    draw = Draw(size.n)
    x, y = draw.pairs(Size(size.n, size.n, size.d), features)
    more = some(ids=draw.ids(size.n, id_columns), weights=draw.weights(size.n, weighted))
    return info_nce(x.to(dtype), y.to(dtype), logit_scale, **more, **options)


def several_positions(draw: Draw, n: int, m: int) -> Tensor:
    """[N, 4]"""
    positions = draw.integers(0, m, n, 4)
    positions[draw.uniform(n, 4) < 0.3] = LEFT_OUT
    positions[::9] = LEFT_OUT  # no own key
    positions[1::9, 2] = positions[1::9, 0]  # twice the same
    positions[2::9, 0] = LEFT_OUT  # the first is not in the first column
    return positions


RELATIONS = (
    *("none", "bias", "own", "own, ids", "own, same ids", "two ids", "two positive"),
    *("excluded positive", "groups", "one id", "alone"),
)
SEVERAL = ("several", "several, excluded", "several, ids", "several, two ids", "several positive")


def relation_of(kind: str, draw: Draw, n: int, m: int) -> Relation:
    """One of the ways in which queries and keys can belong together."""
    rows = torch.arange(n)
    key_ids = draw.integers(0, m // 3, m)
    two_ids = torch.stack([key_ids, draw.integers(-9, 9, m) * 10**12], dim=1)
    query_ids = draw.integers(0, m // 3 + 2, n)
    own = draw.integers(0, m, n)
    own[::9] = LEFT_OUT
    several = several_positions(draw, n, m)
    key_bias = draw.normal(m)
    key_bias[::5] = -torch.inf
    other = draw.integers(-1, m, n)
    some_positive = other.where(rows % 4 > 0, several[:, 1].clamp_min(-1))
    alike = torch.zeros_like(key_ids)
    ids = Relation(query_ids=query_ids, key_ids=key_ids)
    two = Relation(query_ids=two_ids[own.clamp_min(0)], key_ids=two_ids, key_bias=key_bias)
    two_of_one = replace(two, positives=own, exclude=other)
    two_of_several = replace(two, positives=several, exclude=some_positive)
    half = own.where(rows % 2 > 0, other)
    return {
        "none": Relation(),
        "bias": Relation(key_bias=key_bias),
        "own": Relation(positives=own, exclude=other),
        "own, ids": Relation(positives=own, key_ids=key_ids, exclude=other),
        "own, same ids": Relation(positives=own, key_ids=key_ids, same_id="positive"),
        "two ids": two_of_one,
        "two positive": replace(two_of_one, same_id="positive"),
        "excluded positive": replace(ids, positives=own, exclude=half, same_id="positive"),
        "groups": replace(ids, same_id="positive", exclude=other, key_bias=key_bias),
        "one id": Relation(positives=own, key_ids=alike, same_id="positive"),
        "alone": Relation(key_ids=alike),
        "several": Relation(positives=several),
        "several, excluded": Relation(positives=several, exclude=some_positive, key_bias=key_bias),
        "several, ids": replace(ids, positives=several),
        "several, two ids": two_of_several,
        "several positive": replace(two_of_several, same_id="positive"),
    }[kind]


def make_contrastive(
    size: Size,
    dtype: torch.dtype,
    *,
    features: str = "cone",
    logit_scale: float = 14.3,
    relation: str = "none",
    num_negatives: int = 0,
    weighted: bool = False,
    **options: Any,
) -> Call:
    draw = Draw(size.n)
    x, y = draw.pairs(size, features)
    if num_negatives:
        options["negatives"] = draw.unit(size.n, num_negatives, size.d).to(dtype)
    more = some(weights=draw.weights(size.n, weighted))
    kind = relation_of(relation, draw, size.n, size.m)
    return contrastive(x.to(dtype), y.to(dtype), logit_scale, kind, **more, **options)


def make_contrastive_parts(
    size: Size,
    dtype: torch.dtype,
    *,
    features: str = "cone",
    logit_scale: float = 14.3,
    relation: str = "none",
) -> Call:
    draw = Draw(size.n)
    x, y = draw.pairs(size, features)
    kind = relation_of(relation, draw, size.n, size.m)
    return contrastive_parts(x.to(dtype), y.to(dtype), logit_scale, kind)


def make_prototype_cross_entropy(
    size: Size,
    dtype: torch.dtype,
    *,
    logit_scale: float = 14.3,
    temperature: float = 0,
    weighted: bool = False,
    **options: Any,
) -> Call:
    """``temperature`` of the targets; 0: hard labels."""
    draw = Draw(size.n)
    prototypes = draw.unit(size.m, size.d).to(dtype)
    labels = draw.integers(0, size.m, size.n)
    if size.n > 2:
        labels[size.n // 2] = LEFT_OUT
    if temperature:
        source = 0.9 * draw.unit(size.m, size.d).double()
        shares = torch.softmax(source @ source.T / temperature, dim=1)
        options["targets"] = (shares @ prototypes.double()).to(dtype)
    more = some(weights=draw.weights(size.n, weighted))
    features = draw.unit(size.n, size.d).to(dtype)
    return prototype_cross_entropy(features, prototypes, labels, logit_scale, **more, **options)


def make_nt_xent(
    size: Size,
    dtype: torch.dtype,
    *,
    features: str = "cone",
    logit_scale: float = 14.3,
    id_columns: int = 0,
    weighted: bool = False,
    **options: Any,
) -> Call:
    n = size.n
    draw = Draw(n)
    x, y = draw.pairs(Size(n, n, size.d), features)
    more = some(ids=draw.ids(n, id_columns), weights=draw.weights(n, weighted))
    of_views = {name: torch.cat([values, values]) for name, values in more.items()}
    rows = torch.arange(2 * n)
    ids = of_views.get("ids")
    relation = Relation(rows.roll(n), ids, ids, options.get("same_id", "exclude"), exclude=rows)
    masks = relation.masks(2 * n, 2 * n)
    if options.get("decoupled"):
        negatives = masks.seen & ~masks.positive
        has_negatives = negatives.any(dim=1)
        masks = Masks(masks.positive, negatives, ~has_negatives)
    return self_contrastive(
        protoclip.nt_xent,
        {"views_a": x.to(dtype), "views_b": y.to(dtype)},
        lambda views_a, views_b: torch.cat([views_a, views_b]),
        masks,
        logit_scale,
        row_weights=of_views.get("weights"),
        constants={"reduction": "none", **more, **options},
    )


def make_sup_con(
    size: Size,
    dtype: torch.dtype,
    *,
    logit_scale: float = 14.3,
    views: int | None = None,
    weighted: bool = False,
    **options: Any,
) -> Call:
    draw = Draw(size.n)
    shape = (size.n, size.d) if views is None else (size.n, views, size.d)
    labels = draw.integers(0, size.n // 6, size.n)
    labels[::7] = LEFT_OUT
    weights = draw.weights(size.n, weighted)
    repeats = views or 1
    rows = torch.arange(size.n * repeats)
    row_labels = labels.repeat_interleave(repeats)
    row_labels = row_labels.where(row_labels != LEFT_OUT, -1000 - rows)
    relation = Relation(query_ids=row_labels, key_ids=row_labels, same_id="positive", exclude=rows)
    return self_contrastive(
        protoclip.sup_con,
        {"features": draw.unit(*shape).to(dtype)},
        lambda features: features.reshape(-1, features.shape[-1]),
        relation.masks(len(rows), len(rows)),
        logit_scale,
        row_weights=None if weights is None else weights.repeat_interleave(repeats),
        constants={"labels": labels, "reduction": "none", **some(weights=weights), **options},
    )


def sigmoid_loss(
    image: Tensor, text: Tensor, logit_scale: float, logit_bias: float, **options: Any
) -> Call:
    options.setdefault("reduction", "sum")
    n, m = len(image), len(text)
    ids = options.get("ids")
    offset = options.get("offset", 0)
    same_id = options.get("same_id", "positive")
    label_smoothing = options.get("label_smoothing", 0)
    own = torch.arange(m) == torch.arange(n)[:, None] + offset
    same = own
    if ids is not None:
        columns = columns_of(ids)
        same = (columns[offset : offset + n, None] == columns).any(dim=2)
    positive = own | same if same_id == "positive" else own
    seen = own | ~same if same_id == "exclude" else torch.ones_like(own)
    target = (1 - label_smoothing) * positive.double() + label_smoothing / 2

    def formula(
        image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor
    ) -> Plain:
        logits = scaled_products(logit_scale, image_features, text_features)
        biased = logits + logit_bias.to(image_features.dtype).to(logits.dtype)
        terms = F.binary_cross_entropy_with_logits(
            biased, target.to(biased.dtype), reduction="none"
        )
        losses = terms.where(seen, 0).sum(dim=1)
        counted = torch.ones(n, dtype=torch.bool)
        reduction = options["reduction"]
        return Plain(reduced(losses, counted, options.get("weights"), reduction), [logits])

    leaves = {
        "image_features": image,
        "text_features": text,
        "logit_scale": wide(logit_scale, image.dtype),
        "logit_bias": wide(logit_bias, image.dtype),
    }
    return Call(sigmoid_loss_op, leaves, options, formula, logit_scale)


def make_sigmoid_loss(
    size: Size,
    dtype: torch.dtype,
    *,
    features: str = "cone",
    logit_scale: float = 14.3,
    logit_bias: float = -8.0,
    id_columns: int = 0,
    from_the_end: bool = False,
    weighted: bool = False,
    **options: Any,
) -> Call:
    draw = Draw(size.n)
    x, y = draw.pairs(size, features)
    more = some(
        ids=draw.ids(size.m, id_columns),
        weights=draw.weights(size.n, weighted),
        offset=size.m - size.n if from_the_end else None,
    )
    return sigmoid_loss(x.to(dtype), y.to(dtype), logit_scale, logit_bias, **more, **options)


def make_prototype_losses(
    size: Size, dtype: torch.dtype, *, logit_scale: float = 14.3, reduction: str = "none"
) -> Call:
    draw = Draw(size.n)
    banks = []
    for k in (size.m, 7):
        prototypes = draw.unit(k, size.d).to(dtype)
        labels = draw.integers(0, k, size.n)
        labels[::5] = LEFT_OUT
        targets = 0.9 * prototypes.flip(0) if k == 7 else None
        banks.append(protoclip.Bank(prototypes, labels, targets))

    def formula(features: Tensor, logit_scale: Tensor) -> Plain:
        by_bank = []
        all_logits = []
        for bank in banks:
            prototypes = bank.prototypes.to(features.dtype)
            losses, logits = prototype_losses_of(
                features, prototypes, bank.labels, logit_scale, bank.targets
            )
            by_bank += reduced(losses, bank.labels != LEFT_OUT, None, reduction)
            all_logits += logits
        return Plain([torch.stack(by_bank)], all_logits)

    def observe(results: protoclip.PrototypeLosses, **leaves: Tensor) -> Sequence[Tensor]:
        """``nearest`` is compared by what it reaches."""
        scale = torch.sign(leaves["logit_scale"].detach()).double()
        for bank, nearest in zip(banks, results.nearest, strict=True):
            points = leaves["features"].detach().double()
            logits = scale * points @ bank.prototypes.to(points.device).double().T
            reached = logits.gather(1, nearest[:, None])[:, 0]
            assert (logits.amax(dim=1) - reached <= 1e-6).all()
        return [results.loss]

    features = draw.unit(size.n, size.d).to(dtype)
    leaves = {"features": features, "logit_scale": wide(logit_scale, dtype)}
    constants = {"banks": banks, "reduction": reduction}
    return Call(
        protoclip.prototype_losses, leaves, constants, formula, logit_scale, observe=observe
    )


def make_soft_targets(size: Size, dtype: torch.dtype, *, temperature: float = 0.1) -> Call:
    draw = Draw(size.n)
    source = 0.9 * draw.unit(size.m, size.n).to(dtype)  # N: features of the source

    def formula(source_centroids: Tensor, prototypes: Tensor) -> Plain:
        if temperature <= 0:
            return Plain([prototypes.to(torch.promote_types(prototypes.dtype, FP32))])
        shares = torch.softmax(source_centroids @ source_centroids.T / temperature, dim=1)
        targets = shares.to(prototypes.dtype) @ prototypes
        return Plain([targets.to(torch.promote_types(targets.dtype, FP32))])

    return Call(
        protoclip.soft_targets,
        {"source_centroids": source, "prototypes": draw.unit(size.m, size.d).to(dtype)},
        {"temperature": temperature},
        formula,
        scale=1 / temperature if temperature > 0 else 0,
        least=0,
        has_gradient=False,
    )


def make_kmeans_assign(size: Size, dtype: torch.dtype, *, features: str = "random") -> Call:
    """The distance that is returned, and the one to the centroid that a label names."""
    draw = Draw(size.n)
    middle = 30.0 if features == "far from zero" else 0.0

    def formula(points: Tensor, centroids: Tensor) -> Plain:
        points = points.to(torch.promote_types(points.dtype, FP32))
        distances = (points[:, None] - centroids.to(points)).square().sum(dim=2).float()
        nearest = distances.amin(dim=1) if len(centroids) else distances.sum(dim=1)
        return Plain([nearest, nearest])

    def observe(
        results: tuple[Tensor, Tensor], points: Tensor, centroids: Tensor
    ) -> Sequence[Tensor]:
        labels, distances = results
        apart = points.double() - centroids.double()[labels]
        return [distances, apart.square().sum(dim=1).float()]

    leaves = {
        "points": (middle + draw.normal(size.n, size.d)).to(dtype),
        "centroids": (middle + draw.normal(size.m, size.d)).to(dtype),
    }
    return Call(
        protoclip.kmeans_assign, leaves, {}, formula, least=0, has_gradient=False, observe=observe
    )


def make_segment_mean(size: Size, dtype: torch.dtype, *, features: str = "random") -> Call:
    draw = Draw(size.n)
    values = draw.normal(size.n, size.d) + (30.0 if features == "far from zero" else 0.0)
    labels = draw.integers(-1 if size.m > 1 else 0, size.m, size.n)
    labels[: size.n // 2] = size.m - 1  # in pieces, where there are many

    def formula(values: Tensor) -> Plain:
        rows = values.to(torch.promote_types(values.dtype, FP32))[labels >= 0]
        used = labels[labels >= 0]
        sums = rows.new_zeros(size.m, rows.shape[1]).index_add(0, used, rows)
        counts = torch.bincount(used, minlength=size.m)
        return Plain([sums / counts.clamp_min(1)[:, None], counts.to(sums)])

    return Call(
        protoclip.segment_mean,
        {"values": values.to(dtype)},
        {"labels": labels, "num_segments": size.m},
        formula,
        least=0,
        has_gradient=False,
        observe=lambda results, values: [results.means, results.counts.to(results.means)],
    )


@dataclass(frozen=True)
class Op:
    """A public function, for ``test_ops.py``."""

    name: str
    make: Callable[..., Call]  # (size, dtype, **options)
    options: dict[str, Sequence[Any]]  # each option's values
    # Those for Triton's interpreter, which is slow: small sizes, what the kernels do themselves.
    few: dict[str, Sequence[Any]]
    empty: Sequence[Size]  # sizes without rows, columns or features
    matrices: Sequence[str]  # arguments [rows, D]
    all_options: dict[str, Any] = field(default_factory=dict)  # many at once
    large: Size = Size(777, 1153, 48)  # several tasks for each thread
    refused: Sequence[Refusal] = ()
    # With ``group``, the values of options that are others then; (): there is no such argument.
    over_ranks: Sequence[dict[str, Sequence[Any]]] = ()

    def plain(self, size: Size, dtype: torch.dtype = FP32) -> Call:
        """A call without options."""
        return self.make(size, dtype)

    def full(self, size: Size, dtype: torch.dtype = FP32) -> Call:
        """A call with ``all_options``."""
        return self.make(size, dtype, **self.all_options)

    def rows_over_ranks(self) -> list[dict[str, Any]]:
        """Those whose tensors ranks share."""
        return [row for others in self.over_ranks for row in pairwise({**self.options, **others})]


def pairwise(options: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows such that every two values of two options are in one of them."""
    names = list(options)
    missing = [
        {first: a, second: b}
        for first, second in combinations(names, 2)
        for a in options[first]
        for b in options[second]
    ]
    if len(names) == 1:
        missing = [{names[0]: value} for value in options[names[0]]]
    rows = []
    while missing:
        row = dict(missing[0])
        for name in names:
            if name not in row:
                row[name] = max(
                    options[name],
                    key=lambda value: sum(
                        pair.get(name) == value and pair.items() <= {**row, name: value}.items()
                        for pair in missing
                    ),
                )
        rows.append(row)
        missing = [pair for pair in missing if not pair.items() <= row.items()]
    return rows


SCALES = (14.3, 100.0)
REDUCTIONS = ("none", "mean", "sum")
WITH_LOSS = {"label_smoothing": (0, 0.2), "weighted": (False, True), "reduction": REDUCTIONS}
SAME_ID = {"id_columns": (0, 1, 2), "same_id": ("exclude", "positive")}
FEATURES = ("cone", "random")
# One pair; less than a vector; D of models; two ragged tiles in both directions; several.
SQUARE = [Size(1, 1, 1), Size(2, 2, 17), Size(63, 63, 512), Size(150, 150, 20), Size(252, 252, 123)]
# The smallest; less than a vector; ragged tiles of 128 x 256, D odd and even.
OBLONG = [Size(1, 1, 1), Size(2, 5, 3), Size(17, 33, 20), Size(130, 300, 17), Size(150, 150, 64)]
# Tiles of the interpreter are 32 x 64: one pair, less than a tile, ragged tiles.
FEW_SQUARE = [Size(1, 1, 17), Size(63, 63, 64), Size(100, 100, 20)]
FEW_OBLONG = [Size(1, 1, 1), Size(17, 33, 20), Size(70, 150, 17)]
SHARED = {"size": [Size(96, 96, 20)]}  # by 1, 2 and 3 ranks
SHARED_KEYS = (
    {**SHARED, "relation": ("none", "bias")},  # query i's own key is key i
    {"size": [Size(96, 192, 20)], "relation": RELATIONS[2:-1] + SEVERAL},
)
# SigLIP with these passes the texts from rank to rank; with other values it gathers them.
IN_A_RING = {"label_smoothing": (0,), "weighted": (False,), "reduction": ("mean", "sum")}
NO_PAIRS = [Size(0, 0, 8), Size(3, 3, 0), Size(0, 0, 0)]
X = Draw(0).unit(4, 8)
INDEX = torch.arange(4)


def of_labels(name: str = "labels") -> list[Refusal]:
    return [
        ({name: INDEX.float()}, TypeError, rf"int64.*got .*{name}.long\(\)"),
        ({name: INDEX[:2]}, ValueError, rf"{name} of shape \[4\]"),
    ]


OF_CONTRASTIVE: list[Refusal] = [
    (dict(positives=INDEX.float()), TypeError, r"positives.long\(\)"),
    (dict(positives=torch.arange(6)), ValueError, r"positives of shape \[4\], got \[6\]"),
    (
        dict(positives=INDEX[:, None][:, :0]),
        ValueError,
        r"positives of shape \[4\] or \[4, 1\], got \[4, 0\]",
    ),
    (
        dict(positives=torch.zeros(3, 2).long()),
        ValueError,
        r"positives of shape \[4\] or \[4, 2\], got \[3, 2\]",
    ),
    (dict(positives=torch.tensor([0, 6, 1, 2])), ValueError, r"in \[0, 6\) or -100.*query 1"),
    (dict(positives=torch.tensor([0, 5, -7, 2])), ValueError, r"in \[0, 6\) or -100.*query 2"),
    (dict(positives=torch.tensor([[0, 1], [2, 6], [0, 0], [1, 1]])), ValueError, "query 1"),
    (dict(positives=INDEX, exclude=torch.tensor([5, -1, 6, -1])), ValueError, "below 6.*query 2"),
    (dict(exclude=[1, 2]), TypeError, "exclude as a Tensor"),
    (dict(key_ids=torch.arange(6.0)), TypeError, r"key_ids as int64.*key_ids.long\(\)"),
    (dict(key_ids=torch.ones(6, 3).long()), ValueError, r"key_ids of shape \[6\] or .*\[6, 2\]"),
    (dict(key_ids=torch.arange(6), query_ids=torch.ones(4, 2).long()), ValueError, "query_ids of"),
    (dict(key_ids=torch.arange(6, device="meta")), ValueError, "key_ids on cpu"),
    (dict(query_ids=INDEX), ValueError, "key_ids with query_ids"),
    (dict(key_ids=torch.arange(6), same_id="positive"), ValueError, "query_ids, got none"),
    (dict(same_id="both"), ValueError, "same_id in"),
    (dict(exclude=INDEX), ValueError, "expected positives.*got none with exc"),
    (dict(keys=X[:3]), ValueError, "got none with 4 queries and 3 keys"),
    (dict(key_bias=torch.zeros(6).half()), TypeError, r"key_bias.float\(\)"),
    (dict(key_bias=torch.zeros(4)), ValueError, r"key_bias of shape \[6\]"),
]
OF_NEGATIVES: list[Refusal] = [
    (dict(negatives=X), ValueError, r"negatives of shape \[N, H, D\], got"),
    (dict(negatives=torch.ones(3, 2, 8)), ValueError, r"\[4, 2, 8\], got \[3, 2, 8\]"),
    (dict(negatives=torch.ones(4, 2, 7)), ValueError, r"shape \[4, 2, 8\], got"),
    (dict(negatives=torch.ones(4, 2, 8).long()), TypeError, r"negatives.float\(\)"),
    (dict(negatives=[1.0]), TypeError, "negatives as a Tensor, got list"),
]
CONVERT = r"use torch.as_tensor\(ids\), in int64 or another integer"
OF_IDS: list[Refusal] = [
    (dict(ids=[0, 1, 2, 3]), TypeError, f"expected ids as .*got list; {CONVERT}"),
    (dict(ids=np.arange(4)), TypeError, f"expected ids as .*got ndarray; {CONVERT}"),
    (dict(ids=True), TypeError, f"expected ids as .*got bool; {CONVERT}"),
    (dict(ids=INDEX > 0), TypeError, r"another integer dtype, got torch.bool; use ids.long\(\)"),
    (dict(ids=INDEX.float()), TypeError, "expected ids"),
    (dict(ids=INDEX[:3]), ValueError, "expected ids"),
    (dict(same_id="both"), ValueError, "expected same_id in"),
]
OF_PROTOTYPES: list[Refusal] = [
    *of_labels(),
    (dict(prototypes=X[:0]), ValueError, "K >= 1 prototypes"),
    (dict(targets=X[:2]), ValueError, "targets of the prototypes' shape"),
    (dict(targets=torch.ones(6, 8, requires_grad=True)), ValueError, "detach it"),
    (dict(labels=torch.tensor([0, 6, 1, 2])), ValueError, "or -100, got 6 at row 1 for K = 6"),
    (dict(labels=torch.tensor([0, -1, 1, 2]), targets=torch.ones(6, 8)), ValueError, "got -1 at"),
]
# What each argument of this name is refused for.
OF_ARGUMENT: dict[str, list[tuple[Any, type[Exception], str]]] = {
    "logit_scale": [
        (X, ValueError, r"shape \[\] or \[1\]"),
        ("10", TypeError, "as a number or a Tensor"),
        (None, TypeError, "as a number or a Tensor"),
        (torch.tensor(True), TypeError, "float tensor"),
        (-2.0, ValueError, "the multiplier, not its logarithm; got -2"),
        (torch.tensor(-2.0), ValueError, "the multiplier, not its logarithm; got -2"),
        (leaf(torch.tensor([-5.0])), ValueError, "the multiplier, not its logarithm; got -5"),
        (torch.nan, ValueError, "as a number, got nan"),
        (True, TypeError, "as a number or a Tensor of shape .* got bool"),
        (np.bool_(True), TypeError, "as a number or a Tensor of shape .* got bool"),
    ],
    "weights": [
        (torch.ones(5), ValueError, r"weights of shape \[4\]"),
        (torch.ones(4).long(), TypeError, r"weights.float\(\)"),
        (torch.tensor([1, 0, -0.5, 2]), ValueError, "weights >= 0, got -0.5"),
        (torch.ones(4, requires_grad=True), ValueError, "detach"),
    ],
    "label_smoothing": [
        (torch.tensor(0.1), TypeError, "as a Python number"),
        ("0.1", TypeError, "as a Python number"),
        (1.1, ValueError, r"in \[0, 1\], got 1.1"),
        (-0.1, ValueError, r"in \[0, 1\], got -0.1"),
        (torch.nan, ValueError, r"in \[0, 1\], got nan"),
    ],
    "reduction": [("avg", ValueError, "reduction in")],
}
OPS = [
    Op(
        "info_nce",
        make_info_nce,
        {
            "size": SQUARE,
            "features": FEATURES,
            "logit_scale": SCALES,
            **SAME_ID,
            **WITH_LOSS,
            "label_smoothing": (0, 0.2, 1),
        },
        {"size": FEW_SQUARE, "features": FEATURES, **SAME_ID, "reduction": REDUCTIONS},
        empty=NO_PAIRS,
        matrices=("image_features", "text_features"),
        all_options={"id_columns": 2, "label_smoothing": 0.2, "weighted": True},
        refused=OF_IDS + [(dict(text_features=X[:3]), ValueError, "one text per image")],
        over_ranks=[{**SHARED, "label_smoothing": (0,), "stash": (None, True)}],
    ),
    Op(
        "contrastive",
        make_contrastive,
        {
            "size": OBLONG,
            "features": FEATURES,
            "logit_scale": SCALES,
            "relation": RELATIONS + SEVERAL,
            "num_negatives": (0, 3),
            **WITH_LOSS,
        },
        {"size": FEW_OBLONG, "relation": RELATIONS, "logit_scale": SCALES},
        empty=[Size(0, 5, 4), Size(0, 0, 4), Size(3, 7, 0)],
        matrices=("queries", "keys"),
        all_options={
            "relation": "several, two ids",
            "num_negatives": 3,
            "label_smoothing": 0.2,
            "weighted": True,
        },
        large=Size(1153, 4229, 48),  # more blocks of rows, and of columns, each with an odd end
        refused=OF_CONTRASTIVE + OF_NEGATIVES,
        over_ranks=SHARED_KEYS,
    ),
    Op(
        "contrastive_parts",
        make_contrastive_parts,
        {"size": OBLONG, "features": FEATURES, "logit_scale": SCALES, "relation": RELATIONS},
        {"size": FEW_OBLONG[1:2], "relation": RELATIONS[::2]},
        empty=[Size(0, 5, 4), Size(0, 0, 4), Size(3, 7, 0)],
        matrices=("queries", "keys"),
        all_options={"relation": "groups"},
        refused=OF_CONTRASTIVE,
        over_ranks=SHARED_KEYS,
    ),
    Op(
        "nt_xent",
        make_nt_xent,
        {
            "size": SQUARE,
            "features": FEATURES,
            "logit_scale": SCALES,
            **SAME_ID,
            "decoupled": (False, True),
            **WITH_LOSS,
        },
        {"size": FEW_SQUARE[:1] + [Size(30, 30, 17)], **SAME_ID, "decoupled": (False, True)},
        empty=NO_PAIRS[:1],
        matrices=("views_a", "views_b"),
        all_options={"id_columns": 2, "decoupled": True, "label_smoothing": 0.2, "weighted": True},
        refused=OF_IDS,
        over_ranks=[SHARED],
    ),
    Op(
        "sup_con",
        make_sup_con,
        {"size": SQUARE, "views": (None, 1, 3), "logit_scale": SCALES, **WITH_LOSS},
        {"size": [Size(1, 1, 17), Size(40, 40, 17)], "views": (None, 3)},
        empty=NO_PAIRS[:1],
        matrices=("features",),
        all_options={"views": 3, "label_smoothing": 0.2, "weighted": True},
        large=Size(777, 777, 48),
        refused=of_labels(),
        over_ranks=[SHARED],
    ),
    Op(
        "sigmoid_loss",
        make_sigmoid_loss,
        {
            # The last: several strips of rows, where torch computes them.
            "size": [*OBLONG, Size(252, 252, 123), Size(300, 4000, 8)],
            "features": FEATURES,
            "logit_scale": SCALES,
            "logit_bias": (-20.0, -8.0, 1.0),
            "from_the_end": (False, True),
            **SAME_ID,
            **WITH_LOSS,
        },
        {"size": FEW_OBLONG, "logit_bias": (-8.0, 1.0), "from_the_end": (False, True), **SAME_ID},
        empty=[Size(0, 5, 4), Size(0, 0, 4), Size(3, 7, 0)],
        matrices=("image_features", "text_features"),
        all_options={"id_columns": 2, "label_smoothing": 0.2, "weighted": True},
        refused=[
            *OF_IDS[:5],
            (dict(offset=3), ValueError, "row i . offset, got 4 images"),
            (dict(offset=-1), ValueError, "row i . offset, got 4 images"),
            (dict(logit_bias=torch.ones(2)), ValueError, "logit_bias of shape"),
            (dict(ids=torch.arange(3)), ValueError, "expected ids"),
        ],
        over_ranks=[
            {**SHARED, **more, "from_the_end": (False,), "logit_bias": (-8.0, 1.0)}
            for more in ({}, IN_A_RING)
        ],
    ),
    Op(
        "prototype_cross_entropy",
        make_prototype_cross_entropy,
        {
            # One, two, past one tile of 256, past two; D: odd ones too, for pairs of bf16.
            "size": [
                Size(1, 2, 512),
                Size(2, 257, 128),
                Size(5, 700, 256),
                Size(37, 1, 1),
                Size(37, 257, 123),
                Size(67, 700, 512),
                Size(131, 257, 8),
            ],
            "temperature": (0, 0.01, 0.1, 1.0),
            "trained": (False, True),
            "logit_scale": SCALES,
            **WITH_LOSS,
        },
        {
            # One of each; no features; primes; rows; keys in slices; wider than one tile.
            "size": [
                Size(1, 1, 1),
                Size(520, 2, 0),
                Size(37, 257, 23),
                Size(131, 67, 8),
                Size(5, 700, 16),
                Size(19, 97, 300),
            ],
            "temperature": (0, 0.1),
            "logit_scale": SCALES,
            "reduction": REDUCTIONS,
        },
        empty=[Size(0, 3, 8), Size(0, 0, 8), Size(4, 3, 0), Size(4, 300, 0)],
        matrices=("features", "prototypes"),
        all_options={"temperature": 0.1, "label_smoothing": 0.2, "weighted": True},
        refused=OF_PROTOTYPES,
    ),
    Op(
        "prototype_losses",
        make_prototype_losses,
        {
            "size": [Size(1, 2, 64), Size(150, 700, 24)],
            "logit_scale": SCALES,
            "reduction": REDUCTIONS,
        },
        {"size": [Size(50, 300, 16)], "reduction": REDUCTIONS},
        empty=[Size(0, 3, 8)],
        matrices=("features",),
        refused=[(dict(banks=[]), ValueError, "at least one bank")],
    ),
    Op(
        "soft_targets",
        make_soft_targets,
        {
            "size": [Size(1, 1, 1), Size(8, 2, 64), Size(64, 257, 13), Size(24, 700, 128)],
            "temperature": (0, 0.01, 0.1, 1.0),
        },
        {
            "size": [Size(1, 1, 1), Size(5, 67, 13), Size(16, 300, 8), Size(300, 40, 24)],
            "temperature": (0.01, 1.0),
        },
        empty=[Size(3, 0, 8), Size(3, 4, 0)],
        matrices=("source_centroids", "prototypes"),
        large=Size(24, 1500, 40),
        refused=[
            (dict(temperature=torch.tensor(0.1)), TypeError, "as a Python number"),
            (dict(prototypes=X[:2]), ValueError, "one prototype per"),
        ],
    ),
    Op(
        "kmeans_assign",
        make_kmeans_assign,
        {
            "size": [Size(70, 600, 3), Size(300, 49, 128), Size(130, 130, 97), Size(65, 130, 768)],
            "features": ("random", "far from zero"),
        },
        {"size": [Size(70, 130, 3), Size(65, 49, 128)], "features": ("random", "far from zero")},
        empty=[Size(0, 5, 4), Size(0, 0, 4)],
        matrices=("points", "centroids"),
        large=Size(3000, 500, 64),
        refused=[(dict(centroids=X[:0]), ValueError, "K >= 1 centroids")],
    ),
    Op(
        "segment_mean",
        make_segment_mean,
        {
            # One segment; more than rows; a huge one among small ones; a whole piece.
            "size": [Size(2500, 1, 16), Size(50, 400, 7), Size(3000, 20, 130), Size(256, 1, 1)],
            "features": ("random", "far from zero"),
        },
        {"size": [Size(513, 2, 1), Size(50, 400, 7), Size(300, 20, 130)], "features": ("random",)},
        empty=[Size(0, 5, 4), Size(3, 2, 0)],
        matrices=("values",),
        large=Size(12_000, 50, 301),
        refused=[
            (dict(num_segments=-1), ValueError, "num_segments"),
            (dict(num_segments=2, labels=INDEX), ValueError, "below num_segments=2, got [23]"),
            *of_labels(),
        ],
    ),
]
BY_NAME = {op.name: op for op in OPS}
