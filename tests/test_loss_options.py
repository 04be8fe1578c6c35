"""The options of the losses: weights, label smoothing, ids, several positives and own negatives.

Each is held against a formula over boolean masks of positives and keys seen, [N, M], in fp64. The
options are composed of sums over sets, so mistakes in these sums are planted and must be noticed.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget, on_threads, usable
from torch.utils._python_dispatch import TorchDispatchMode

import protoclip
from protoclip.ops import sums

BACKENDS = [name for name in usable("contrastive") if name != "triton"]
FUSED = [name for name in BACKENDS if name != "reference"]
both = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def unit(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1).to(dtype)


def dtypes_of(backend):
    return DTYPES if backend in FUSED else [torch.float64, torch.float32]


def masks(n, m, *, positions=None, query_ids=None, key_ids=None, same_id="exclude", exclude=None):
    """Positives and keys seen, bool [N, M]; positions [N, P] of own keys, -100: none."""
    keys = torch.arange(m)
    positions = torch.arange(n)[:, None] if positions is None else positions.reshape(n, -1)
    positive = (positions[:, :, None] == keys).any(dim=1)
    seen = torch.ones(n, m, dtype=torch.bool)
    if key_ids is not None:
        columns = [ids.reshape(len(ids), -1) for ids in (query_ids, key_ids)]
        same = (columns[0][:, None] == columns[1]).any(dim=2)
        if same_id == "positive":
            positive = positive | same
        else:
            seen = positive | ~same
    if exclude is not None:
        seen = seen & (keys != exclude[:, None])
    return positive & seen, seen


def formula(logits, positive, seen, label_smoothing=0.0, own_logits=None):
    """Losses of the rows: cross-entropy with 1 - epsilon of the target on the mean of the
    positives and epsilon on the mean of all keys seen; 0 without a positive."""
    size, total = seen.sum(dim=1), logits.where(seen, 0).sum(dim=1)
    visible = logits.where(seen, -torch.inf)
    if own_logits is not None:
        size, total = size + own_logits.shape[1], total + own_logits.sum(dim=1)
        visible = torch.cat([visible, own_logits], dim=1)
    mean = logits.where(positive, 0).sum(dim=1) / positive.sum(dim=1).clamp_min(1)
    target = (1 - label_smoothing) * mean + label_smoothing * total / size.clamp_min(1)
    counted = positive.any(dim=1)
    return visible.where(counted[:, None], 0).logsumexp(dim=1).where(counted, target) - target


def gradients(loss, leaves, weights):
    total = (loss * weights.to(loss.dtype)).sum()
    return [loss.detach(), *torch.autograd.grad(total, leaves)]


def assert_as_formula(call, tensors, scale, weights, rows):
    """``call(*leaves, scale)`` is within the budget of ``rows(dots, scale)``, value and gradients.

    ``rows`` takes what the products of the tensors are in the dtype of a user, see ``products``."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    wide = torch.promote_types(leaves[0].dtype, torch.float32)
    s = torch.tensor(scale, dtype=wide, requires_grad=True)
    got = gradients(call(*leaves, s), [*leaves, s], weights)
    found = []
    for dtype in (torch.float64, leaves[0].dtype):
        wide = torch.promote_types(dtype, torch.float32)
        copies = [
            t.detach().to(dtype if t.dtype == leaves[0].dtype else wide).requires_grad_()
            for t in tensors
        ]
        s = torch.tensor(scale, dtype=wide, requires_grad=True)
        loss, logits = rows(s, *copies)
        total = (loss * weights.to(loss.dtype)).sum()
        grads = torch.autograd.grad(total, [*copies, s, *logits], retain_graph=True)
        used, by_logit = grads[: len(copies) + 1], grads[len(copies) + 1 :]
        terms = sum((g * t).abs().sum() for g, t in zip(by_logit, logits, strict=True))
        found.append(([loss.detach(), *used], terms / abs(scale)))
    (truth, terms), (base, _) = found
    for number, (a, t, b) in enumerate(zip(got, truth, base, strict=True)):
        size = max(1, t.abs().max()) if number == 0 else t.abs().max()
        last = number == len(truth) - 1
        assert_within_budget(
            a,
            t,
            b.to(a.dtype),
            f"result {number}",
            terms + 2**-29 * weights.sum() if last else size,
            scale,
        )


def product(s, x, y):
    """The logits as under autocast: products in the inputs' dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (s.to(x.dtype) * (x @ y.T)).to(wide)


# ---- info_nce ----

N = 60
IDS = torch.randint(20, (N,), generator=torch.Generator().manual_seed(1))
# Equal in one column, in the other, and in both.
TWO_IDS = torch.stack([IDS, torch.arange(N) // 4 + 10**12], dim=1)
INFO_NCE = {
    "plain": {},
    "exclude": {"ids": IDS},
    "two ids": {"ids": TWO_IDS},
    "positive": {"ids": IDS, "same_id": "positive"},
    "two positive": {"ids": TWO_IDS, "same_id": "positive"},
}


def info_nce_rows(options, label_smoothing):
    ids = options.get("ids")
    told = {"query_ids": ids, "key_ids": ids, "same_id": options.get("same_id", "exclude")}

    def rows(s, x, y):
        logits, by_text = product(s, x, y), product(s, y, x)
        sets = masks(N, N, **told)
        losses = [formula(t, *sets, label_smoothing) for t in (logits, by_text)]
        return sum(losses) / 2, (logits, by_text)

    return rows


def check_info_nce(kind, backend, dtype=torch.float32, scale=30.0, label_smoothing=0.2):
    x, y = (unit(N, 24, seed=seed, dtype=dtype) for seed in (0, 1))
    options = INFO_NCE[kind] | {"label_smoothing": label_smoothing}
    assert_as_formula(
        lambda x, y, s: protoclip.info_nce(x, y, s, **options, reduction="none", backend=backend),
        (x, y),
        scale,
        torch.rand(N),
        info_nce_rows(INFO_NCE[kind], label_smoothing),
    )


@both
@pytest.mark.parametrize("kind", INFO_NCE)
def test_info_nce_smoothed(kind, backend):
    for dtype, scale in itertools.product(dtypes_of(backend), (14.3, 100.0)):
        check_info_nce(kind, backend, dtype, scale)
    check_info_nce(kind, backend, label_smoothing=1.0)


@both
def test_info_nce_smoothed_is_torchs(backend):
    x, y = (unit(N, 24, seed=seed).requires_grad_() for seed in (0, 1))
    logits, own = 20.0 * x @ y.T, torch.arange(N)
    want = [F.cross_entropy(t, own, label_smoothing=0.1) for t in (logits, logits.T)]
    got = protoclip.info_nce(x, y, 20.0, label_smoothing=0.1, backend=backend)
    torch.testing.assert_close(got, sum(want) / 2)
    for a, b in zip(*(torch.autograd.grad(t, (x, y)) for t in (got, sum(want) / 2)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@both
@pytest.mark.parametrize("kind", ["plain", "two ids"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_info_nce_weighted(kind, label_smoothing, backend):
    x, y = unit(N, 24), unit(N, 24, seed=1)
    options = INFO_NCE[kind] | {"label_smoothing": label_smoothing, "backend": backend}
    rows = protoclip.info_nce(x, y, 20.0, **options, reduction="none")
    weights = torch.rand(N)
    weights[::3] = 0
    for w in (weights, 0 * weights, weights.bfloat16()):
        want = rows * w.float()
        got = {
            name: protoclip.info_nce(x, y, 20.0, **options, weights=w, reduction=name)
            for name in ("none", "sum", "mean")
        }
        torch.testing.assert_close(got["none"], want)
        torch.testing.assert_close(got["sum"], want.sum())
        torch.testing.assert_close(got["mean"], want.sum() / w.float().sum().clamp_min(1e-9))
    ones = protoclip.info_nce(x, y, 20.0, **options, weights=torch.ones(N))
    torch.testing.assert_close(ones, protoclip.info_nce(x, y, 20.0, **options))


# ---- prototype_cross_entropy ----

K = 11
LABELS = torch.randint(K, (N,), generator=torch.Generator().manual_seed(3))
LABELS[::7] = -100


def prototype_rows(targets, label_smoothing):
    used = LABELS != -100
    positive = (LABELS[:, None] == torch.arange(K)) & used[:, None]

    def rows(s, h, c):
        logits = product(s, h, c)
        if targets is None:
            return formula(logits, positive, torch.ones_like(positive), label_smoothing), (logits,)
        # Targets are constants, so the prototypes have a gradient by the log-sum-exp alone.
        m = targets.to(h.dtype)[LABELS.where(used, 0)]
        soft = (s.to(h.dtype) * (h * m).sum(dim=1)).to(logits.dtype)
        mean = product(s, h, c.detach()).mean(dim=1)
        target = (1 - label_smoothing) * soft + label_smoothing * mean
        return (logits.logsumexp(dim=1) - target).where(used, 0), (logits, soft, mean)

    return rows


def check_prototypes(backend, dtype, scale, targets, trained, label_smoothing=0.2):
    h, c = unit(N, 24, dtype=dtype), unit(K, 24, seed=1, dtype=dtype)
    targets = None if targets is None else targets.to(dtype)

    def call(h, c, s):
        options = {"targets": targets, "label_smoothing": label_smoothing, "backend": backend}
        if not trained:
            value = protoclip.prototype_cross_entropy(
                h, c.detach(), LABELS, s, **options, reduction="none"
            )
            return value + 0 * c.float().sum()
        return protoclip.prototype_cross_entropy(h, c, LABELS, s, **options, reduction="none")

    made = prototype_rows(targets, label_smoothing)

    def rows(s, h, c):
        loss, logits = made(s, h, c if trained else c.detach())
        return (loss, logits) if trained else (loss + 0 * c.float().sum(), logits)

    assert_as_formula(call, (h, c), scale, torch.rand(N), rows)


PROTOTYPES = [name for name in usable("prototype_cross_entropy") if name != "triton"]


@pytest.mark.parametrize("backend", PROTOTYPES)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_prototypes_smoothed(soft, trained, backend):
    targets = 0.5 * unit(K, 24, seed=2) if soft else None
    dtypes = DTYPES if backend != "reference" else [torch.float64, torch.float32]
    for dtype, scale in itertools.product(dtypes, (14.3, 100.0)):
        check_prototypes(backend, dtype, scale, targets, trained)


@pytest.mark.parametrize("backend", PROTOTYPES)
@pytest.mark.parametrize("trained", [False, True])
def test_prototypes_smoothed_are_torchs(trained, backend):
    h, c = unit(N, 24).requires_grad_(), unit(K, 24, seed=1).requires_grad_(trained)
    leaves = (h, c) if trained else (h,)
    want = F.cross_entropy(20.0 * h @ c.T, LABELS, label_smoothing=0.1)
    got = protoclip.prototype_cross_entropy(
        h, c, LABELS, 20.0, label_smoothing=0.1, backend=backend
    )
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(t, leaves) for t in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    # A class weighs what torch's weight= makes of it.
    by_class = torch.rand(K)
    weights = by_class[LABELS.clamp_min(0)]
    got = protoclip.prototype_cross_entropy(h, c, LABELS, 20.0, weights=weights, backend=backend)
    torch.testing.assert_close(got, F.cross_entropy(20.0 * h @ c.T, LABELS, by_class))


@pytest.mark.parametrize("backend", PROTOTYPES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_prototypes_weighted(label_smoothing, backend):
    h, c, weights = unit(N, 24), unit(K, 24, seed=1), torch.rand(N)
    options = {"label_smoothing": label_smoothing, "backend": backend}

    def loss(**more):
        return protoclip.prototype_cross_entropy(h, c, LABELS, 20.0, **options, **more)

    rows, used = loss(reduction="none"), LABELS != -100
    assert (rows[~used] == 0).all() and (rows[used] != 0).all()
    torch.testing.assert_close(loss(weights=weights, reduction="none"), rows * weights)
    torch.testing.assert_close(loss(weights=weights, reduction="sum"), (rows * weights).sum())
    torch.testing.assert_close(loss(weights=weights), (rows * weights).sum() / weights[used].sum())
    torch.testing.assert_close(loss(), loss(weights=torch.ones(N)))
    assert loss(weights=torch.zeros(N)) == 0


def test_smoothing_keeps_the_digits_of_fp32_features():
    h, c = unit(N, 24).requires_grad_(), unit(K, 24, seed=1).bfloat16()
    got, want = (
        protoclip.prototype_cross_entropy(h, prototypes, LABELS, 20.0, label_smoothing=0.1)
        for prototypes in (c, c.float())
    )
    assert torch.equal(got, want)


# ---- nt_xent ----


@both
@pytest.mark.parametrize("same_id", ["exclude", "positive"])
@pytest.mark.parametrize("ids", [IDS, TWO_IDS], ids=["one", "two"])
def test_nt_xent_with_ids(ids, same_id, backend):
    views, every = torch.arange(2 * N), torch.cat([ids, ids])
    sets = masks(
        2 * N,
        2 * N,
        positions=views.roll(N),
        query_ids=every,
        key_ids=every,
        same_id=same_id,
        exclude=views,
    )

    def rows(s, x, y):
        logits = product(s, torch.cat([x, y]), torch.cat([x, y]))
        return formula(logits, *sets), (logits,)

    def call(x, y, s):
        return protoclip.nt_xent(
            x, y, s, ids=ids, same_id=same_id, reduction="none", backend=backend
        )

    for dtype, scale in itertools.product(dtypes_of(backend), (14.3, 100.0)):
        x, y = (unit(N, 24, seed=seed, dtype=dtype) for seed in (0, 1))
        assert_as_formula(call, (x, y), scale, torch.rand(2 * N), rows)


def test_ids_of_nt_xent_are_checked():
    x = unit(4, 8)
    for ids, error in ((torch.ones(8).long(), ValueError), (torch.ones(4), TypeError)):
        with pytest.raises(error, match="nt_xent: expected ids"):
            protoclip.nt_xent(x, x, 3.0, ids=ids)
    with pytest.raises(ValueError, match="nt_xent: expected same_id in"):
        protoclip.nt_xent(x, x, 3.0, same_id="both")


# ---- contrastive ----

M, H = 90, 3


def relations():
    """What ``contrastive`` is told of N queries and M keys; the positions of own keys [N, P]."""
    draw = torch.Generator().manual_seed(2)
    keys = torch.randint(25, (M,), generator=draw)
    two = torch.stack([keys, torch.randint(30, (M,), generator=draw)], dim=1)
    own = torch.randint(M, (N,), generator=draw)
    own[::9] = -100
    several = torch.randint(M, (N, 4), generator=draw)
    several[torch.rand(N, 4, generator=draw) < 0.3] = -100
    several[::9] = -100  # no own key
    several[1::9, 2] = several[1::9, 0]  # twice the same
    several[2::9, 0] = -100  # the first is not in the first column
    bias = torch.randn(M, generator=draw)
    bias[::5] = -torch.inf
    other = torch.randint(-1, M, (N,), generator=draw)
    gone = other.where(torch.arange(N) % 4 > 0, several[:, 1].clamp_min(-1))  # a positive too
    query = torch.randint(27, (N,), generator=draw)
    every = {"query_ids": two[own.clamp_min(0)], "key_ids": two, "key_bias": bias}
    return {
        "plain": {},
        "bias": {"key_bias": bias},
        "own": {"positives": own, "exclude": other},
        "two ids": {"positives": own, "exclude": other} | every,
        "two positive": {"positives": own, "exclude": other, "same_id": "positive"} | every,
        "excluded positive": {
            "positives": own,
            "exclude": own.where(torch.arange(N) % 2 > 0, other),
            "query_ids": query,
            "key_ids": keys,
            "same_id": "positive",
        },
        "groups": {"query_ids": query, "key_ids": keys, "same_id": "positive", "exclude": other},
        "several": {"positives": several},
        "several, excluded": {"positives": several, "exclude": gone, "key_bias": bias},
        "several, ids": {"positives": several, "query_ids": query, "key_ids": keys},
        "several, two ids": {"positives": several, "exclude": gone} | every,
        "several positive": {"positives": several, "exclude": gone, "same_id": "positive"} | every,
    }


RELATIONS = relations()


def sets_of(options):
    """The masks of ``options``, and the keys' biases."""
    told = {name: value for name, value in options.items() if name != "key_bias"}
    positions = told.pop("positives", None)
    if told.get("same_id") == "positive" and positions is None:
        positions = torch.full((N, 1), -100)
    positive, seen = masks(N, M, positions=positions, **told)
    bias = options.get("key_bias", torch.zeros(M))
    present = bias != -torch.inf
    positive, seen = positive & present, seen & present
    if positions is not None and not (told.get("same_id") == "positive" and positions.max() < 0):
        left_out = (positions.reshape(N, -1) == -100).all(dim=1)
        positive = positive & ~left_out[:, None]
    return positive, seen, bias


def check_contrastive(kind, backend, dtype=torch.float32, scale=30.0, label_smoothing=0.2, own=0):
    """``own``: so many negatives of each query."""
    options = {name: value for name, value in RELATIONS[kind].items() if name != "key_bias"}
    positive, seen, bias = sets_of(RELATIONS[kind])
    finite = bias.isfinite()
    assert positive.any(dim=1).sum() > 0
    told = {"label_smoothing": label_smoothing, "reduction": "none", "backend": backend}
    wide = torch.promote_types(dtype, torch.float32)
    tensors = [unit(N, 24, dtype=dtype), unit(M, 24, seed=1, dtype=dtype), bias[finite].to(wide)]
    if own:
        tensors.append(unit(N, own, 24, seed=2, dtype=dtype))
    absent = torch.full((M,), -torch.inf, dtype=wide)

    def call(x, y, shift, *rest):
        *negatives, s = rest
        if "key_bias" in RELATIONS[kind]:
            options["key_bias"] = absent.masked_scatter(finite, shift)
        if negatives:
            options["negatives"] = negatives[0]
        losses = protoclip.contrastive(x, y, s, **options, **told)
        return losses + 0 * shift.sum()

    def rows(s, x, y, shift, *negatives):
        dots = product(s, x, y)
        full = torch.zeros(M, dtype=dots.dtype).masked_scatter(finite, shift.to(dots.dtype))
        logits = [dots + full] if "key_bias" in RELATIONS[kind] else [dots]
        for own_keys in negatives:
            by_own = s.to(x.dtype) * torch.einsum("nd,nhd->nh", x, own_keys)
            logits.append(by_own.to(dots.dtype))
        losses = formula(logits[0], positive, seen, label_smoothing, *logits[1:])
        return losses + 0 * shift.sum().to(losses.dtype), logits

    assert_as_formula(call, tensors, scale, torch.rand(N), rows)


@both
@pytest.mark.parametrize("kind", RELATIONS)
def test_contrastive_smoothed(kind, backend):
    for dtype, scale in itertools.product(dtypes_of(backend), (14.3, 100.0)):
        check_contrastive(kind, backend, dtype, scale)


@both
@pytest.mark.parametrize("kind", [name for name in RELATIONS if name.startswith("several")])
def test_several_positives(kind, backend):
    for dtype, scale in itertools.product(dtypes_of(backend), (14.3, 100.0)):
        check_contrastive(kind, backend, dtype, scale, label_smoothing=0.0)


@both
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", RELATIONS)
def test_negatives_of_each_query(kind, label_smoothing, backend):
    for dtype, scale in itertools.product(dtypes_of(backend), (14.3, 100.0)):
        check_contrastive(kind, backend, dtype, scale, label_smoothing, own=H)


@both
def test_two_positives_and_an_own_negative_by_hand(backend):
    """Logits 0, 1, 2, 3 of the keys and 4 of the own negative; keys 1 and 3 are positives."""
    keys, own = torch.arange(4.0)[:, None], torch.full((1, 1, 1), 4.0)
    positives = torch.tensor([[1, -100, 3]])

    def loss(**more):
        told = {"positives": positives, "backend": backend} | more
        return protoclip.contrastive(torch.ones(1, 1), keys, 1.0, **told).item()

    def level(*logits):
        return math.log(sum(map(math.exp, logits)))

    assert loss() == pytest.approx(level(0, 1, 2, 3) - 2, rel=1e-6)
    assert loss(negatives=own) == pytest.approx(level(0, 1, 2, 3, 4) - 2, rel=1e-6)
    smoothed = level(0, 1, 2, 3, 4) - 0.9 * 2 - 0.1 * 10 / 5
    assert loss(negatives=own, label_smoothing=0.1) == pytest.approx(smoothed, rel=1e-6)
    # Key 2 has the query's id; so has key 3, but it is a positive.
    ids = {"query_ids": torch.tensor([7]), "key_ids": torch.tensor([0, 1, 7, 7])}
    assert loss(**ids) == pytest.approx(level(0, 1, 3) - 2, rel=1e-6)
    # One positive of two is not seen.
    assert loss(exclude=torch.tensor([3])) == pytest.approx(level(0, 1, 2) - 1, rel=1e-6)


@both
def test_contrastive_smoothed_is_torchs(backend):
    x, y = unit(N, 24).requires_grad_(), unit(M, 24, seed=1).requires_grad_()
    own = torch.randint(M, (N,))
    own[::7] = -100
    want = F.cross_entropy(20.0 * x @ y.T, own, label_smoothing=0.1)
    told = {"label_smoothing": 0.1, "backend": backend}
    got = protoclip.contrastive(x, y, 20.0, positives=own, **told)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(t, (x, y)) for t in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    got = protoclip.contrastive(x, y, 20.0, **told)  # without positives another op computes it
    torch.testing.assert_close(
        got, F.cross_entropy(20.0 * x @ y.T, torch.arange(N), label_smoothing=0.1)
    )


@both
def test_several_positives_are_parts_of_any_loss_and_one_is_as_before(backend):
    x, y, told = unit(N, 24), unit(M, 24, seed=1), {"backend": backend}
    options = RELATIONS["several, two ids"] | told
    level, mean = protoclip.contrastive_parts(x, y, 20.0, **options)
    rows = protoclip.contrastive(x, y, 20.0, **options, reduction="none")
    counted = rows != 0
    assert counted.sum() == sets_of(RELATIONS["several, two ids"])[0].any(dim=1).sum() < N
    torch.testing.assert_close((level - mean)[counted], rows[counted], rtol=1e-5, atol=1e-5)
    # The mean is over the queries with a positive, weighted or not.
    weights = torch.rand(N)
    got = protoclip.contrastive(x, y, 20.0, **options, weights=weights)
    torch.testing.assert_close(got, (rows * weights).sum() / weights[counted].sum())
    own = torch.randint(M, (N,))
    want = protoclip.contrastive(x, y, 20.0, positives=own, **told)
    for columns in ([own], [own, own], [torch.full((N,), -100), own]):
        got = protoclip.contrastive(x, y, 20.0, positives=torch.stack(columns, dim=1), **told)
        torch.testing.assert_close(got, want)


@both
def test_options_where_there_is_nothing(backend):
    """No queries, no keys, no own negatives, all keys absent: no NaN, also of the gradient."""
    for n, m, h in ((0, 5, 2), (5, 0, 2), (5, 7, 0), (0, 0, 0), (5, 7, 2)):
        leaves = [t.requires_grad_() for t in (unit(n, 4), unit(m, 4), unit(n, h, 4))]
        bias = torch.full((m,), -torch.inf if h else 0.0, requires_grad=True)
        own = torch.full((n, 2), 1 if h == 0 else -100)
        ids = {"query_ids": torch.arange(n), "key_ids": torch.arange(m)}
        for positives, key_bias in ((own, bias), (own * 0 + 1 if m else own, bias)):
            told = {"positives": positives, "key_bias": key_bias, "label_smoothing": 0.1} | ids
            loss = protoclip.contrastive(
                *leaves[:2], 3.0, **told, negatives=leaves[2], backend=backend
            )
            grads = torch.autograd.grad(loss, [*leaves, bias], allow_unused=True)
            assert loss.isfinite() and (loss == 0) == (h > 0 or not n)
            assert all(g is None or g.isfinite().all() for g in grads)
    for call in (protoclip.info_nce, protoclip.nt_xent):
        empty = torch.empty(0, dtype=torch.int64)
        assert call(unit(0, 4), unit(0, 4), 3.0, ids=empty, backend=backend) == 0
    got = protoclip.info_nce(
        unit(0, 4), unit(0, 4), 3.0, label_smoothing=0.1, weights=torch.ones(0), backend=backend
    )
    assert got == 0


@both
def test_positions_out_of_range_among_several(backend):
    x, y = unit(3, 8), unit(6, 8, seed=1)
    for wrong in (6, -7):
        positives = torch.tensor([[0, 1], [2, wrong], [-100, -100]])
        with pytest.raises(ValueError, match=r"positives in \[0, 6\) or -100.*at query 1"):
            protoclip.contrastive(x, y, 3.0, positives=positives, backend=backend)


NEGATIVES = {
    "a matrix": (dict(negatives=unit(4, 8)), ValueError, r"negatives of shape \[N, H, D\], got"),
    "rows": (dict(negatives=unit(3, 2, 8)), ValueError, r"shape \[4, 2, 8\], got \[3, 2, 8\]"),
    "width": (dict(negatives=unit(4, 2, 7)), ValueError, r"shape \[4, 2, 8\], got \[4, 2, 7\]"),
    "integers": (dict(negatives=unit(4, 2, 8).long()), TypeError, r"negatives.float\(\)"),
    "a list": (dict(negatives=[1.0]), TypeError, "negatives as a Tensor, got list"),
    "no positions": (
        dict(positives=torch.empty(4, 0, dtype=torch.int64)),
        ValueError,
        r"positives of shape \[4\] or \[4, 1\], got \[4, 0\]",
    ),
    "positions of others": (
        dict(positives=torch.zeros(3, 2, dtype=torch.int64)),
        ValueError,
        r"positives of shape \[4\] or \[4, 2\], got \[3, 2\]",
    ),
}


@pytest.mark.parametrize("case", NEGATIVES)
def test_contrastive_refuses_in_words(case):
    options, error, words = NEGATIVES[case]
    with pytest.raises(error, match=f"contrastive: .*{words}"):
        protoclip.contrastive(unit(4, 8), unit(6, 8), 3.0, **options)


def test_derivatives_of_the_reference_in_transforms_and_of_second_order():
    """At a scale where logits are hundreds of nats apart."""
    n, labels = 6, torch.tensor([0, 0, 1, 2, 2, 3])
    x, y = (unit(n, 4, seed=seed, dtype=torch.float64) for seed in (0, 1))
    own = torch.stack([torch.arange(n), torch.arange(n).roll(1)], dim=1)
    negatives = unit(n, 2, 4, seed=2, dtype=torch.float64)
    smoothed = {"label_smoothing": 0.1, "weights": torch.rand(n)}
    every = {"positives": own, "key_ids": labels, "negatives": negatives}
    losses = {
        "info_nce": lambda x, s: protoclip.info_nce(x, y, s, ids=labels, **smoothed),
        "contrastive": lambda x, s: protoclip.contrastive(x, y, s, **every, **smoothed),
        "prototypes": lambda x, s: protoclip.prototype_cross_entropy(y, x, labels, s, **smoothed),
    }
    for name, loss in losses.items():
        gradient = torch.func.grad(loss)(x, 3.0)
        direction = unit(n, 4, seed=4, dtype=torch.float64)
        _, derivative = torch.func.jvp(lambda x, f=loss: f(x, 3.0), (x,), (direction,))
        torch.testing.assert_close(derivative, (gradient * direction).sum())
        assert torch.autograd.gradgradcheck(
            lambda x, f=loss: f(x, 3.0), (x.clone().requires_grad_(),)
        ), name
        assert torch.func.hessian(lambda x, f=loss: f(x, 3000.0))(x).isfinite().all(), name


# ---- what all share ----


class Ops(TorchDispatchMode):
    """Records the names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", FUSED)
def test_an_option_that_is_not_used_costs_nothing(backend):
    x, y, s = unit(N, 24), unit(N, 24, seed=1), torch.tensor(20.0)
    for loss, before in (
        (protoclip.info_nce, []),
        (protoclip.contrastive, ["aten.ones.default", "aten.expand.default"]),  # shares of a mean
    ):
        with Ops() as ops:
            loss(x, y, s, backend=backend)
        assert ops.names == [*before, "protoclip.contrastive.default"]
    with Ops() as ops:
        protoclip.prototype_cross_entropy(x, y, torch.arange(N), s, backend=backend)
    assert ops.names.count("protoclip.prototype_ce.default") == 1
    assert not any("double" in name or "_to_copy" in name for name in ops.names)


# Mistakes in the sums, each by what it patches.
MUTANTS = {
    "keys of both ids count twice": (
        "_codes_of",
        lambda query, key: (torch.full_like(query, -1), key.argsort().argsort()),
    ),
    "the own key is forgotten": (
        "of_same_id",
        lambda pairs, positions: torch.zeros_like(positions, dtype=torch.bool),
    ),
    "ids have no keys": ("KeySums._same", lambda self: 0 * self._rows[:1]),
    "what is excluded counts": (
        "KeySums.__init__",
        lambda self, keys, pairs: INIT(self, keys, replace(pairs, exclude=None)),
    ),
}
INIT = sums.KeySums.__init__


def planted(monkeypatch, mutant):
    name, wrong = MUTANTS[mutant]
    owner, _, attribute = name.rpartition(".")
    monkeypatch.setattr(getattr(sums, owner) if owner else sums, attribute, wrong)


@pytest.mark.parametrize(
    "kind, mutant",
    [
        ("two ids", "keys of both ids count twice"),
        ("two ids", "the own key is forgotten"),
        ("two ids", "ids have no keys"),
        ("two positive", "keys of both ids count twice"),
        ("two positive", "ids have no keys"),
    ],
)
def test_a_wrong_sum_in_info_nce_is_noticed(kind, mutant, monkeypatch):
    check_info_nce(kind, BACKENDS[0])
    planted(monkeypatch, mutant)
    with pytest.raises(AssertionError, match="over the budget"):
        check_info_nce(kind, BACKENDS[0])


@pytest.mark.parametrize(
    "kind, mutant",
    [
        ("two ids", "keys of both ids count twice"),
        ("two ids", "the own key is forgotten"),
        ("two ids", "what is excluded counts"),
        ("two positive", "ids have no keys"),
        ("two positive", "the own key is forgotten"),
        ("several, two ids", "the own key is forgotten"),
        ("excluded positive", "what is excluded counts"),
        ("several, two ids", "what is excluded counts"),
        ("several positive", "what is excluded counts"),
    ],
)
def test_a_wrong_sum_in_contrastive_is_noticed(kind, mutant, monkeypatch):
    check_contrastive(kind, BACKENDS[0])
    planted(monkeypatch, mutant)
    with pytest.raises(AssertionError, match="over the budget"):
        check_contrastive(kind, BACKENDS[0])


BAD = {
    "a tensor": (dict(label_smoothing=torch.tensor(0.1)), TypeError, "as a Python number"),
    "a word": (dict(label_smoothing="0.1"), TypeError, "as a Python number"),
    "too much": (dict(label_smoothing=1.1), ValueError, r"in \[0, 1\], got 1.1"),
    "not a number": (dict(label_smoothing=float("nan")), ValueError, r"in \[0, 1\], got nan"),
    "negative weights": (dict(weights=-torch.ones(4)), ValueError, "weights >= 0, got -1"),
    "other weights": (dict(weights=torch.ones(5)), ValueError, r"weights of shape \[4\]"),
    "their gradient": (dict(weights=torch.ones(4).requires_grad_()), ValueError, "detach"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused_in_words(case):
    options, error, words = BAD[case]
    for ids in (None, torch.arange(4)):
        with pytest.raises(error, match=f"info_nce: .*{words}"):
            protoclip.info_nce(unit(4, 8), unit(4, 8), 3.0, ids=ids, **options)
    with pytest.raises(error, match=f"contrastive: .*{words}"):
        protoclip.contrastive(unit(4, 8), unit(4, 8), 3.0, **options)
    with pytest.raises(error, match=f"prototype_cross_entropy: .*{words}"):
        protoclip.prototype_cross_entropy(unit(4, 8), unit(4, 8), torch.arange(4), 3.0, **options)


@pytest.mark.parametrize("backend", FUSED)
def test_same_bits_on_any_number_of_threads(backend):
    x, y = (unit(3000, 64, seed=seed).requires_grad_() for seed in (0, 1))
    ids = torch.randint(900, (3000, 2))

    def run():
        loss = protoclip.info_nce(x, y, 20.0, ids=ids, label_smoothing=0.1, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, (x, y))

    found = on_threads(run, (1, 2, 2))
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))
