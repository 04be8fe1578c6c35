"""Cached gradients equal those of the same chunks in one graph, on one process and under DDP."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import protoclip
from protoclip import distributed
from protoclip.losses import global_info_nce

ROWS, WIDTH = 10, 6
BOUND = {"rtol": 1e-10, "atol": 1e-12}  # of fp64


class Tower(nn.Module):
    """Dropout, and outputs of the form of the input, with its log scale as a parameter, 0-dim."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 16), nn.Dropout(0.5), nn.Linear(16, 4))
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x, flag=None, *, mask=None):
        x = self.body(x if mask is None else x * mask[:, None])
        if mask is not None:
            return {"x": x, "none": None, "scale": self.log_scale, "index": x.argmax(1)}
        return x if flag is None else (x, None, self.log_scale)


def loss_of(x, y, scale):
    scale = torch.as_tensor(scale).exp()
    return protoclip.info_nce(F.normalize(x), F.normalize(y), scale, backend="reference")


def data(dtype=torch.float64, rows=ROWS):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(rows, WIDTH, generator=generator).to(dtype) for _ in range(2)]


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return Tower().double()


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_gradients_are_those_of_the_chunks_in_one_graph(tower, form):
    """A shared encoder, dropout, chunks that do not divide the batch, a hook on a parameter."""
    a, b = data()
    torch.manual_seed(1)
    want_x, want_y = (torch.cat([tower(c) for c in chunks]) for chunks in (a.split(4), b.split(3)))
    want = torch.autograd.grad(loss_of(want_x, want_y, tower.log_scale), list(tower.parameters()))
    tower.body[0].weight.register_hook(lambda grad: grad * 1.0)  # fails without a gradient
    mask = torch.ones(ROWS, dtype=torch.float64)
    wrap = {
        "tensor": lambda x: x,
        "tuple": lambda x: (x, True),
        "dict": lambda x: {"x": x, "mask": mask},
    }
    torch.manual_seed(1)
    one, two = protoclip.grad_cache([tower, tower], [wrap[form](a), wrap[form](b)], [4, 3])
    x, y, scale = one, two, tower.log_scale
    if form == "dict":
        x, y, scale = one["x"], two["x"], two["scale"]
        assert one["none"] is None and torch.equal(one["index"], x.argmax(1))
    elif form == "tuple":
        (x, none, _), (y, _, scale) = one, two
        assert none is None
    assert torch.equal(x, want_x) and torch.equal(y, want_y)
    state = torch.get_rng_state()
    loss_of(x, y, scale).backward()
    assert torch.equal(torch.get_rng_state(), state)
    for p, other in zip(tower.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, other, **BOUND)


def test_autocast_is_that_of_the_first_pass(tower):
    tower.float()
    a, b = data(torch.float32)
    weights = [p for name, p in tower.named_parameters() if name != "log_scale"]
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        x, y = protoclip.grad_cache([tower.forward] * 2, [a, b], 4)
        # Casts of the weights that the first pass made without gradients do not reach others.
        torch.autograd.grad(tower.body[0](a).sum(), weights[0])
    assert x.dtype == y.dtype == torch.bfloat16
    (8 * loss_of(x, y, 1.0)).backward()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        x, y = (torch.cat([tower(c) for c in batch.split(4)]) for batch in (a, b))
    want = torch.autograd.grad(8 * loss_of(x, y, 1.0), weights)
    for weight, other in zip(weights, want, strict=True):
        torch.testing.assert_close(weight.grad, other, rtol=1e-5, atol=1e-5)


def test_without_gradients_there_is_no_graph(tower):
    a, _ = data()
    with torch.no_grad():
        (x,) = protoclip.grad_cache([tower.eval()], [a], 4)
    assert not x.requires_grad
    torch.testing.assert_close(x, tower(a).detach())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t, x: protoclip.grad_cache([t], [x], 0), "chunk_size >= 1"),
        (lambda t, x: protoclip.grad_cache([t], [x], 4.0), r"sizes \[4.0\]"),
        (lambda t, x: protoclip.grad_cache(t, x, 4), "a list of encoders"),
        (lambda t, x: protoclip.grad_cache([t, t], [x], 4), "got 1 batches"),
        (
            lambda t, x: protoclip.grad_cache([lambda c: t(c)[1:]], [x], 4),
            r"rows of its chunk\[4\]",
        ),
        (lambda t, x: protoclip.grad_cache([lambda c: t(c).sum()], [x], 4), r"got \[\(\)\]"),
        (lambda t, x: protoclip.grad_cache([lambda c: {1: {t(c)}}], [x], 4), "got .'set'"),
        (lambda t, x: protoclip.grad_cache([t], [(x, x[1:])], 4), r"lengths \[9, 10\]"),
        (lambda t, x: protoclip.grad_cache([t], [["a", "b"]], 4), "split="),
        (
            lambda t, x: protoclip.grad_cache([t], [x], 4, split=lambda batch, n: []),
            "one chunk from split=",
        ),
    ],
)
def test_bad_input_is_a_sentence(tower, call, words):
    with pytest.raises(ValueError, match=f"grad_cache: expected .*{words}"):
        call(tower, data()[0])


def _step(**options):
    def change(tower):
        torch.optim.AdamW(tower.parameters(), **options).step()

    return change


@torch.no_grad()
def _scaled(tower):
    tower.body[0].weight.mul_(2)


CHANGES = {
    "step": _step(),
    "foreach": _step(foreach=True),
    "fused": _step(fused=True),
    "by hand": _scaled,
    "loaded": lambda tower: tower.load_state_dict(Tower().state_dict()),
}


@pytest.mark.parametrize("form", ["module", "method", "function"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_before_backward_is_refused(tower, change, form):
    """The second pass would compute other features than those of the loss."""
    encoder = {"module": tower, "method": tower.forward, "function": lambda x: tower(x)}[form]
    batches = data()
    x, y = protoclip.grad_cache([encoder, encoder], batches, 4)
    loss = loss_of(x, y, tower.log_scale)
    for p in tower.parameters():
        p.grad = torch.ones_like(p)
    CHANGES[change](tower)
    with pytest.raises(RuntimeError, match=r"grad_cache: expected backward\(\) .* got a parameter"):
        loss.backward()


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_a_batch_changed_before_backward_is_refused(tower, form):
    a, b = data()
    wrap = {"tensor": lambda x: x, "tuple": lambda x: (x, True), "dict": lambda x: {"x": x}}[form]
    outputs = protoclip.grad_cache([tower, tower], [wrap(a), wrap(b)], 4)
    x, y = (one[0] if form == "tuple" else one for one in outputs)
    b.neg_()
    # Of a plain tensor torch itself knows.
    words = (
        "modified by an inplace" if form == "tensor" else r"tensor in a batch of shape \[\d, 6\]"
    )
    with pytest.raises(RuntimeError, match=words):
        loss_of(x, y, tower.log_scale).backward()


def test_what_no_gradient_depends_on_may_change(tower):
    """Parameters that are not of this loss, counters, a batch after backward; step after step."""
    other, counter = Tower().double(), torch.zeros(())
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.1)
    a, b = data()
    before = tower.body[0].weight.clone()

    def counting(x):
        counter.add_(1)
        return tower(x)

    for _ in range(3):
        optimizer.zero_grad()
        with torch.no_grad():
            tower.log_scale.clamp_(0, 4.6)  # between steps, as CLIP's
        x, y = protoclip.grad_cache([counting, tower], [a, b], 4)
        loss = loss_of(x, y, tower.log_scale)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(2)
        loss.backward()
        optimizer.step()
        b.neg_()
    assert counter == 3 * 2 * 3 and not torch.equal(before, tower.body[0].weight)


def test_chunks_may_come_from_a_generator(tower):
    a, b = data()
    tower.eval()

    def chunks(batch, size):
        yield from batch.split(size)

    want = protoclip.grad_cache([tower, tower], [a, b], 4)
    found = protoclip.grad_cache([tower, tower], [a, b], 4, split=chunks)
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
    grads = [
        torch.autograd.grad(loss_of(*pair, tower.log_scale), list(tower.parameters()))
        for pair in (found, want)
    ]
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
    with pytest.raises(ValueError, match="one chunk from split="):
        protoclip.grad_cache([tower], [a], 4, split=lambda batch, size: iter(()))


class TwoTowers(nn.Module):
    """As OpenCLIP's model: takes one side or both, and owns the logit scale."""

    def __init__(self):
        super().__init__()
        self.visual, self.text = Tower(), Tower()
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, image=None, text=None):
        one = None if image is None else self.visual(image)
        two = None if text is None else self.text(text)
        return one, two, self.log_scale * 1.0


def reductions(module, **options):
    """A module in DDP that counts how often its gradients are reduced."""
    replica = DistributedDataParallel(module, **options)
    count = [0]

    def hook(_, bucket):
        count[0] += bucket.is_last()
        dist.all_reduce(bucket.buffer().div_(dist.get_world_size()))
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    replica.register_comm_hook(None, hook)
    return replica, count


def on_two_ranks(case):
    """Gradients and numbers of reductions of grad_cache; the gradients of one graph, averaged."""
    torch.manual_seed(0)
    model = TwoTowers().double()
    model.text.requires_grad_("frozen" not in case)
    for tower in (model.visual, model.text):  # DDP must be told of what nothing uses
        tower.log_scale.requires_grad_("unused" in case)
    model.log_scale.requires_grad_(case != "towers")
    own = dist.get_rank()
    image, text = (batch[own * ROWS : (own + 1) * ROWS] for batch in data(rows=2 * ROWS))
    size = 3 + 2 * own  # four chunks, and two
    steps = 2 if case == "accumulate" else 1
    torch.manual_seed(1 + own)
    for _ in range(steps):
        x = torch.cat([model(image=c)[0] for c in image.split(size)])
        y = torch.cat([model(text=c)[1] for c in text.split(size)])
        global_loss(x, y, model.log_scale).backward()
    want = [p.grad for p in model.parameters()]
    for grad in want:
        if grad is not None:
            dist.all_reduce(grad.div_(2))
    model.zero_grad()
    torch.manual_seed(1 + own)
    if case == "towers":
        replicas = [reductions(tower) for tower in (model.visual, model.text)]
        x, y = protoclip.grad_cache([r for r, _ in replicas], [image, text], size)
        global_loss(x, y, model.log_scale).backward()
    else:
        replicas = [reductions(model, find_unused_parameters="unused" in case)]
        replica = replicas[0][0]
        encoders = [lambda i: replica(image=i), lambda t: replica(text=t)]
        for step in range(steps):
            early = model.log_scale * 1.0  # of a node before those of the features
            waits = step + 1 < steps
            with replica.no_sync() if waits else contextlib.nullcontext():
                (x, _, scale), (_, y, _) = protoclip.grad_cache(
                    encoders, [image, text], size, ddp=[replica]
                )
                global_loss(x, y, early if case == "used directly" else scale).backward()
    got = [p.grad for p in model.parameters()]
    got, want = ([0.0 if g is None else g.tolist() for g in grads] for grads in (got, want))
    return got, want, [count for _, (count,) in replicas]


def global_loss(x, y, log_scale):
    x, y = F.normalize(x), F.normalize(y)
    return global_info_nce(x, y, log_scale.exp(), backend="reference")


CASES = ["lambdas", "used directly", "unused", "towers", "accumulate", "frozen", "frozen, unused"]


def every_case():
    distributed.start(distributed.find_rank(), torch.device("cpu"), 60)
    found = {case: on_two_ranks(case) for case in CASES}
    distributed.stop()
    return found


@pytest.fixture(scope="module")
def found():
    return on_ranks(2, every_case)


@pytest.mark.parametrize("case", CASES)
def test_ranks_reduce_once(found, case):
    """Ranks with four and with two chunks: the gradients of one graph, after one reduction."""
    for got, want, counts in (of_rank[case] for of_rank in found):
        assert set(counts) == {1}
        for one, other in zip(got, want, strict=True):
            # A parameter that nothing uses is left alone, or has a gradient of zero.
            one, other = (torch.tensor(x, dtype=torch.float64) for x in (one, other))
            torch.testing.assert_close(one, other, **BOUND)
    assert found[0][case][0] == found[1][case][0]


def sharded():
    """FSDP2: losses of three steps, and the words for a step before backward."""
    distributed.start(distributed.find_rank(), torch.device("cpu"), 60)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 4))
    for part in (model[0], model[2], model):
        fully_shard(part)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for early in (False, False, False, True):
        optimizer.zero_grad()
        x, y = protoclip.grad_cache([model, model], data(torch.float32), 4)
        loss = loss_of(x, y, 1.0)
        if early:
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            with pytest.raises(RuntimeError, match="grad_cache: expected backward"):
                loss.backward()
        else:
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    distributed.stop()
    return found


def test_sharded_parameters_train_and_may_not_change_before_backward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer, alone = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(*(model(batch) for batch in data(torch.float32)), 1.0)
        loss.backward()
        optimizer.step()
        alone.append(loss.item())
    for losses in on_ranks(2, sharded):
        assert losses == pytest.approx(alone, rel=1e-5)
