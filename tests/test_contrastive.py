"""contrastive and its forms: each backend of the CPU against sets written out row by row, the
formulas of well-known losses, and edges."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget, on_threads, usable

import protoclip

BACKENDS = [name for name in usable("contrastive") if name != "triton"]
FUSED = [name for name in BACKENDS if name != "reference"]
both = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Problem:
    """Queries and keys, and what is said about them."""

    queries: torch.Tensor
    keys: torch.Tensor
    scale: float = 14.3
    positives: torch.Tensor | None = None
    query_ids: torch.Tensor | None = None
    key_ids: torch.Tensor | None = None
    same_id: str = "exclude"
    exclude: torch.Tensor | None = None
    key_bias: torch.Tensor | None = None

    @property
    def options(self):
        names = "positives", "query_ids", "key_ids", "same_id", "exclude", "key_bias"
        return {name: getattr(self, name) for name in names}

    def sets(self):
        """[(positives, seen)] of each query, as the issue defines them."""
        found, m = [], len(self.keys)
        for i in range(len(self.queries)):
            own = {i} if self.positives is None else {int(self.positives[i])} - {-100}
            if self.key_ids is not None and self.same_id == "positive" and self.positives is None:
                own = set()
            same = set()
            if self.key_ids is not None:
                taken = self.query_ids is None
                mine = self.key_ids[sorted(own)] if taken else self.query_ids[i : i + 1]
                alike = (self.key_ids[:, None] == mine).flatten(1).any(dim=1)
                same = set(alike.nonzero().flatten().tolist())
            gone = {int(self.exclude[i])} if self.exclude is not None else set()
            if self.key_bias is not None:
                gone |= set((self.key_bias == -torch.inf).nonzero().flatten().tolist())
            everything = set(range(m))
            positive, seen = own, everything
            if self.key_ids is not None:
                if self.same_id == "exclude":
                    seen = (everything - same) | own
                else:
                    positive = own | same
            found.append((positive - gone, seen - gone))
        return found


def written_out(problem, dtype, weights):
    """Gap and mean positive [N] and the gradients of sum(weights[0] gap + weights[1] mean), in the
    dtype as under autocast. ``terms``: the absolute values that make up dscale and dbias."""
    wide = torch.promote_types(dtype, torch.float32)
    x, y = (t.detach().to(dtype).requires_grad_() for t in (problem.queries, problem.keys))
    s = torch.tensor(problem.scale, dtype=wide, device=x.device, requires_grad=True)
    bias = (
        torch.zeros(len(y), device=x.device)
        if problem.key_bias is None
        else problem.key_bias.detach()
    )
    bias = bias.to(wide).requires_grad_()
    dots = x @ y.T
    logits = (s.to(dtype) * dots).to(wide) + bias
    level, mean = [], []
    for row, (positive, seen) in zip(logits, problem.sets(), strict=True):
        level.append(row[sorted(seen)].logsumexp(0) if seen else row[:0].sum() - torch.inf)
        mean.append(row[sorted(positive)].mean() if positive else row[:0].sum())
    level, mean = torch.stack(level), torch.stack(mean)
    parts = zip((level - mean, mean), weights, strict=True)
    total = sum((part.where(w != 0, 0) * w.to(wide)).sum() for part, w in parts)
    dx, dy, ds, db, g = torch.autograd.grad(total, (x, y, s, bias, logits))
    found = {"level": level, "mean": mean, "dx": dx, "dy": dy, "dscale": ds, "dbias": db}
    found["terms"] = (g * dots).abs().sum() + 2**-29 * weights[0].abs().sum()
    return {name: value.detach() for name, value in found.items()}


def computed(problem, weights, backend, **options):
    """The same by ``contrastive_parts``."""
    leaves = [t.detach().requires_grad_() for t in (problem.queries, problem.keys)]
    kind = torch.promote_types(leaves[0].dtype, torch.float32)
    device = leaves[0].device
    leaves.append(torch.tensor(problem.scale, dtype=kind, device=device, requires_grad=True))
    given = problem.options
    if problem.key_bias is not None:
        given["key_bias"] = problem.key_bias.to(kind).requires_grad_()
        leaves.append(given["key_bias"])
    level, mean = protoclip.contrastive_parts(*leaves[:3], **given, backend=backend, **options)
    gap = (level - mean).where(weights[0] != 0, 0)
    grads = torch.autograd.grad((weights[0] * gap + weights[1] * mean).sum(), leaves)
    found = {"level": level.detach(), "mean": mean.detach()}
    return found | dict(zip(("dx", "dy", "dscale", "dbias"), grads, strict=False))


def check(problem, backend, weights=None, **options):
    dtype, n = problem.queries.dtype, len(problem.queries)
    if weights is None:
        counted = torch.tensor([float(len(p) > 0) for p, _ in problem.sets()])
        weights = (torch.rand(n) + 0.5) * counted, torch.zeros(n)
    weights = [w.to(problem.queries.device) for w in weights]
    got = computed(problem, weights, backend, **options)
    truth, base = (written_out(problem, wide, weights) for wide in (torch.float64, dtype))
    empty = truth["level"].isinf()
    assert torch.equal(got["level"].isinf(), empty)
    for found in (got, truth, base):
        found["level"] = found["level"].where(~empty, 0)
    for name, value in got.items():
        size = truth["terms" if name == "dscale" else name].abs().max().item() if n else 0.0
        if name == "dbias":
            size = max(size, float(weights[0].abs().max()))
        assert_within_budget(value, truth[name], base[name], name, size, problem.scale)


def features(n, m, d, dtype=torch.float32, seed=0):
    """Queries and keys that are alike for i = j, all in a cone as CLIP's are."""
    torch.manual_seed(seed)
    centre, shared = torch.randn(1, d), torch.randn(max(n, m), d)
    x, y = (F.normalize(2 * centre + shared + 0.3 * torch.randn_like(shared), dim=1) for _ in "xy")
    return x[:n].to(dtype), y[:m].to(dtype)


def problem(kind, n, m, d, dtype=torch.float32, scale=14.3, seed=0):
    """One of the ways in which queries and keys can belong together."""
    one = Problem(*features(n, m, d, dtype, seed), scale)
    own = torch.randint(m, (n,))
    own[::7] = -100
    groups = max(2, m // 3)
    keys, queries = torch.randint(groups, (m,)), torch.randint(groups + 2, (n,))
    bias = torch.randn(m)
    bias[::5] = -torch.inf
    itself = torch.randint(-1, m, (n,))
    two = torch.stack([keys, torch.randint(-9, 9, (m,)) * 10**12], dim=1)
    return {
        "own": lambda: replace(one, positives=own),
        "exclude": lambda: replace(one, positives=own, key_ids=keys, exclude=itself),
        "two ids": lambda: replace(one, key_ids=two, key_bias=bias),
        "positive": lambda: replace(one, positives=own, key_ids=keys, same_id="positive"),
        "groups": lambda: replace(
            one, query_ids=queries, key_ids=keys, same_id="positive", exclude=itself, key_bias=bias
        ),
        "one id": lambda: replace(one, key_ids=0 * keys, same_id="positive", positives=own),
        "alone": lambda: replace(one, key_ids=0 * keys),
        "bias": lambda: replace(one, key_bias=bias),
    }[kind]()


KINDS = ["own", "exclude", "two ids", "positive", "groups", "one id", "alone", "bias"]
# The smallest, less than a vector, two ragged tiles of 128 x 256, D odd and even.
SIZES = [(1, 1, 1), (2, 5, 3), (17, 33, 20), (130, 300, 17), (150, 150, 64)]


@both
def test_one_query_and_four_keys_by_hand(backend):
    """Logits 0, 1, 2, 3; key 1 is its own, key 2 the same thing, key 3 is never seen."""
    keys, ids = torch.arange(4.0)[:, None], torch.tensor([0, 1, 1, 3])
    given = {"positives": torch.tensor([1]), "exclude": torch.tensor([3]), "backend": backend}
    for same_id, want in (
        ("exclude", math.log(1 + math.e) - 1),  # of keys 0 and 1
        ("positive", math.log(1 + math.e + math.exp(2)) - 1.5),
    ):
        given |= {"key_ids": ids, "same_id": same_id}
        got = protoclip.contrastive(torch.ones(1, 1), keys, 1.0, **given)
        assert got.item() == pytest.approx(want, rel=1e-6)


@both
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_sets(kind, backend):
    dtypes = DTYPES if backend in FUSED else [torch.float64]
    for dtype, scale, (n, m, d) in itertools.product(dtypes, (14.3, 100.0), SIZES):
        if n * m > 10_000 and (dtype == torch.float16 or scale < 100):
            continue  # rows are written out one by one
        torch.manual_seed(n)
        check(problem(kind, n, m, d, dtype, scale), backend)
    one = problem(kind, 40, 50, 12)
    counted = torch.tensor([float(len(p) > 0) for p, _ in one.sets()])
    check(one, backend, (torch.randn(40) * counted, torch.randn(40)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_reference_are_those_of_its_differences(kind):
    one = problem(kind, 5, 9, 3, torch.float64)
    bias = torch.zeros(9) if one.key_bias is None else one.key_bias
    finite = bias.isfinite()

    def parts(x, y, scale, shift):
        absent = torch.full((9,), -torch.inf, dtype=torch.float64)
        options = one.options | {"key_bias": absent.masked_scatter(finite, shift)}
        level, mean = protoclip.contrastive_parts(x, y, scale, **options, backend="reference")
        return level[level.isfinite()], mean

    leaves = one.queries, one.keys, torch.tensor(one.scale).double(), bias[finite].double()
    assert torch.autograd.gradcheck(parts, [t.requires_grad_() for t in leaves])


@both
def test_reductions_weights_and_rows_left_out(backend):
    def computing(kind):
        one = problem(kind, 40, 60, 8)
        given, options = (one.queries, one.keys, one.scale), one.options | {"backend": backend}
        level, mean = protoclip.contrastive_parts(*given, **options)
        return one, level, mean, lambda **more: protoclip.contrastive(*given, **options, **more)

    one, level, mean, loss = computing("groups")
    counted = torch.tensor([len(p) > 0 for p, _ in one.sets()])
    assert 0 < counted.sum() < 40 and (mean[~counted] == 0).all()
    rows = loss(reduction="none")
    torch.testing.assert_close(rows, (level - mean).where(counted, 0), rtol=1e-5, atol=1e-5)
    weights = torch.rand(40)
    for w in (None, weights, 0 * weights):
        size = counted if w is None else w * counted
        want = rows * (1 if w is None else w)
        torch.testing.assert_close(loss(weights=w, reduction="none"), want)
        torch.testing.assert_close(loss(weights=w, reduction="sum"), want.sum())
        torch.testing.assert_close(loss(weights=w), want.sum() / size.sum().clamp_min(1e-9))
    # Left out by -100, though other keys share its id; its log-sum-exp is known all the same.
    _, level, _, loss = computing("positive")
    rows = loss(reduction="none")
    assert (rows[::7] == 0).all() and (rows[1::7] != 0).all() and level.isfinite().all()


@both
def test_a_query_alone_with_its_key_costs_exactly_nothing(backend):
    for dtype in (torch.float32, torch.bfloat16):
        one = problem("alone", 150, 300, 20, dtype, 100.0)
        leaves = [t.requires_grad_() for t in (one.queries, one.keys)]
        loss = protoclip.contrastive(
            *leaves, one.scale, key_ids=one.key_ids, reduction="none", backend=backend
        )
        grads = torch.autograd.grad(loss.sum(), leaves)
        assert (loss == 0).all() and all((g == 0).all() for g in grads)
        loss = protoclip.info_nce(*(t[:150] for t in leaves), 100.0, ids=one.key_ids[:150])
        assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, leaves))


def _both_directions(x, y, ids, same_id, weights, backend, dtype):
    """Losses of the pairs, and the gradients of x, y and the scale."""
    x, y = (t.to(dtype).requires_grad_() for t in (x, y))
    s = torch.tensor(30.0, dtype=dtype, requires_grad=True)
    options = {"same_id": same_id, "reduction": "none", "backend": backend}
    if backend != "formula":
        loss = protoclip.info_nce(x, y, s, ids=ids, **options)
    else:
        options |= {"positives": torch.arange(len(x)), "key_ids": ids, "backend": "reference"}
        loss = sum(protoclip.contrastive(*pair, s, **options) for pair in ((x, y), (y, x))) / 2
    return loss.detach(), *torch.autograd.grad(loss, (x, y, s), weights.to(dtype))


@both
@pytest.mark.parametrize("same_id", ["exclude", "positive"])
def test_info_nce_with_ids_is_half_the_sum_of_both_directions(backend, same_id):
    for shape in ((150,), (150, 2)):
        x, y = features(150, 150, 24)
        torch.manual_seed(1)
        ids, weights = torch.randint(60, shape), torch.rand(150)
        given = x, y, ids, same_id, weights
        got = _both_directions(*given, backend, torch.float32)
        truth = _both_directions(*given, "formula", torch.float64)
        base = _both_directions(*given, "formula", torch.float32)
        for values in zip(got, truth, base, strict=True):
            size = 30.0 * 150 if values[0].ndim == 0 else None
            assert_within_budget(*values, magnitude=size, scale=30.0)
    unique = protoclip.info_nce(x, y, 30.0, ids=torch.randperm(150), backend=backend)
    torch.testing.assert_close(unique, protoclip.info_nce(x, y, 30.0, backend="reference"))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_and_one_graph(backend, dtype):
    one = problem("groups", 128, 256, 6, dtype)  # whole tiles: the rest of a stash is not written
    leaves = [t.requires_grad_() for t in (one.queries, one.keys, one.key_bias)]
    scale = torch.tensor(one.scale, requires_grad=True)
    own, ids = torch.arange(128).int(), torch.randint(9, (1, 256)).int()
    relation = own, own.roll(1), ids[:, :128].contiguous(), ids, leaves[2], True
    for columns, stash in ((False, True), (True, False)):
        arguments = *leaves[:2], scale, *relation, columns, backend, stash
        torch.library.opcheck(torch.ops.protoclip.matched, arguments)

    def loss(x, y, bias, scale):
        options = one.options | {"key_bias": bias, "weights": torch.ones(128)}
        return 2 * protoclip.contrastive(x, y, scale, **options, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*leaves, scale), (*leaves, scale)) for f in (compiled, loss))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", FUSED)
def test_same_bits_with_and_without_a_stash_on_any_number_of_threads(backend):
    one = problem("groups", 300, 500, 17)
    weights = torch.rand(300), torch.rand(300)
    stashes = iter((True, None, False))
    found = on_threads(lambda: computed(one, weights, backend, stash=next(stashes)), (1, 2, 3))
    assert all(torch.equal(found[0][name], f[name]) for f in found for name in found[0])


@both
def test_no_rows_no_keys_and_all_keys_absent(backend):
    for n, m in ((0, 5), (5, 0), (0, 0)):
        x, y = (t.requires_grad_() for t in features(n, m, 4))
        itself = torch.full((n,), -100)
        ids = {"key_ids": torch.arange(m), "query_ids": torch.arange(n)}
        loss = protoclip.contrastive(x, y, 3.0, positives=itself, **ids, backend=backend)
        grads = torch.autograd.grad(loss, (x, y))
        assert loss == 0 and [g.shape for g in grads] == [x.shape, y.shape]
        assert protoclip.contrastive_parts(x, y, 3.0, positives=itself)[0].isinf().all()
    x, y = (t.requires_grad_() for t in features(5, 300, 4))
    gone = torch.full((300,), -torch.inf, requires_grad=True)
    level, mean = protoclip.contrastive_parts(x, y, 3.0, key_bias=gone, backend=backend)
    assert (level == -torch.inf).all() and (mean == 0).all()
    loss = protoclip.contrastive(x, y, 3.0, key_bias=gone, backend=backend)
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (x, y, gone)))


OUT_OF_RANGE = [
    {"positives": torch.tensor([0, 6, 1, 2])},
    {"positives": torch.tensor([0, -7, 1, 2])},
    {"positives": torch.arange(4), "exclude": torch.tensor([5, -1, 7, -1])},
]


@both
@pytest.mark.parametrize("given", OUT_OF_RANGE)
def test_positions_out_of_range(backend, given):
    """Refused where values may be read; compiled code may not, and gives NaN, as a GPU does."""
    x, y = features(4, 6, 8)
    for function in (protoclip.contrastive, protoclip.contrastive_parts):
        with pytest.raises(ValueError, match=r"positives in \[0, 6\) or -100.*at query [12]"):
            function(x, y, 3.0, **given, backend=backend)
    if backend == "reference":
        return

    def loss(q, reduction):
        return protoclip.contrastive(q, y, 3.0, **given, backend=backend, reduction=reduction)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert compiled(x, "mean").isnan()
    q = x.clone().requires_grad_()
    rows = compiled(q, "none")
    assert rows.isnan().sum() == 1
    (grad,) = torch.autograd.grad(rows.sum(), q)
    assert (grad.isnan().any(dim=1) == rows.isnan()).all()


X, Y = features(4, 6, 8)
IDS = torch.arange(6)
BAD = {
    "rank": (dict(queries=X[0]), ValueError, r"queries of shape \[N, D\]"),
    "columns": (dict(keys=Y[:, :3]), ValueError, "share D"),
    "integers": (dict(keys=Y.long()), TypeError, "cast it"),
    "scale": (dict(logit_scale=X), ValueError, r"shape \[\] or \[1\]"),
    "positives' dtype": (dict(positives=torch.arange(4).int()), TypeError, r"positives.long\(\)"),
    "positives' shape": (dict(positives=IDS), ValueError, r"positives of shape \[4\], got \[6\]"),
    "a list": (dict(exclude=[1, 2]), TypeError, "exclude as a Tensor"),
    "floating ids": (dict(key_ids=IDS.float()), TypeError, r"key_ids as int64.*key_ids.long\(\)"),
    "three ids": (dict(key_ids=IDS[:, None].expand(6, 3)), ValueError, r"\[6\] or .*\[6, 2\]"),
    "other ids": (dict(key_ids=IDS, query_ids=torch.ones(4, 2).long()), ValueError, "query_ids of"),
    "device": (dict(key_ids=IDS.to("meta")), ValueError, "key_ids on cpu"),
    "query ids alone": (dict(query_ids=IDS[:4]), ValueError, "key_ids with query_ids"),
    "no own ids": (dict(key_ids=IDS, same_id="positive"), ValueError, "query_ids, got none"),
    "same_id": (dict(key_ids=IDS, same_id="both"), ValueError, "same_id in"),
    "exclude alone": (dict(exclude=IDS[:4]), ValueError, "expected positives.*got none with exc"),
    "few keys": (dict(keys=Y[:3]), ValueError, "got none with 4 queries and 3 keys"),
    "bias dtype": (dict(key_bias=torch.zeros(6).half()), TypeError, r"key_bias.float\(\)"),
    "bias shape": (dict(key_bias=torch.zeros(4)), ValueError, r"key_bias of shape \[6\]"),
    "same_id alone": (dict(same_id="both"), ValueError, "same_id in"),
    "sparse": (dict(queries=X.to_sparse()), TypeError, r"queries as a dense .*to_dense\(\)"),
    "negative weights": (dict(weights=-torch.ones(4)), ValueError, "weights >= 0, got -1"),
    "a negative weight": (
        dict(weights=torch.tensor([1, 0, -0.5, 2]), positives=IDS[:4], backend="reference"),
        ValueError,
        "weights >= 0, got -0.5",
    ),
    "weights": (dict(weights=torch.ones(6)), ValueError, r"weights of shape \[4\]"),
    "whole weights": (dict(weights=torch.ones(4).long()), TypeError, r"weights.float\(\)"),
    "weights' gradient": (dict(weights=torch.ones(4, requires_grad=True)), ValueError, "detach"),
    "reduction": (dict(reduction="avg"), ValueError, "reduction in"),
    "backend": (dict(positives=IDS[:4], backend="cuda"), ValueError, "'cuda' cannot run: contr"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_words(case):
    given, error, words = BAD[case]
    arguments = dict(queries=X, keys=Y, logit_scale=3.0) | given
    with pytest.raises(error, match=rf"contrastive: .*{words}"):
        protoclip.contrastive(**arguments)


def test_labels_of_sup_con_are_checked():
    for labels, error in ((torch.ones(4), TypeError), (torch.ones(4, 2).long(), ValueError)):
        with pytest.raises(error, match="sup_con: expected labels"):
            protoclip.sup_con(X, labels, 3.0)


def check_strides(backend):
    """Arguments of any stride are as their contiguous copies."""
    x, y = features(40, 60, 8)
    for bias in (torch.randn(60, 2)[:, 1], torch.tensor(0.5).expand(60)):
        given = {
            "key_bias": bias,
            "key_ids": torch.randint(9, (60, 2))[:, 1],
            "query_ids": torch.randint(9, (2, 40)).T[:, :1],
            "positives": torch.randint(60, (40, 3))[:, 2],
            "exclude": torch.tensor(7).expand(40),
            "weights": torch.rand(40, 2)[:, 1],
        }
        got = protoclip.contrastive(x, y, 3.0, **given, backend=backend)
        given = {name: value.clone().contiguous() for name, value in given.items()}
        want = protoclip.contrastive(x, y, 3.0, **given, backend="reference")
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@both
def test_arguments_of_any_stride(backend):
    check_strides(backend)


def test_ids_of_info_nce_are_checked():
    for ids, error in ((torch.ones(3).long(), ValueError), (torch.ones(4), TypeError)):
        with pytest.raises(error, match="info_nce: expected ids"):
            protoclip.info_nce(X, X, 3.0, ids=ids)
