"""Cached gradients equal those of the same chunks in one graph, on one process and under DDP."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from budget import assert_same_bits
from ranks import in_group
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import protoclip
from protoclip import distributed

ROWS = 10
WIDTH = 6
BOUND = {"rtol": 1e-10, "atol": 1e-12}  # of fp64


class Tower(nn.Module):
    """Dropout, and outputs of the form of the input, with its log scale as a parameter, 0-dim."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 16), nn.Dropout(0.5), nn.Linear(16, 4))
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, flag: bool | None = None, *, mask: Tensor | None = None) -> Any:
        features = self.body(x if mask is None else x * mask[:, None])
        if mask is not None:
            index = features.argmax(1)
            return {"x": features, "none": None, "scale": self.log_scale, "index": index}
        return features if flag is None else (features, None, self.log_scale)


def loss_of(x: Tensor, y: Tensor, log_scale: Tensor | float) -> Tensor:
    logit_scale = torch.as_tensor(log_scale).exp()
    return protoclip.info_nce(F.normalize(x), F.normalize(y), logit_scale, backend="reference")


class Pairs(NamedTuple):
    image: Tensor  # [rows, WIDTH]
    text: Tensor  # [rows, WIDTH]


def random_pairs(dtype: torch.dtype = torch.float64, rows: int = ROWS) -> Pairs:
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(rows, WIDTH, generator=generator)
    text = torch.randn(rows, WIDTH, generator=generator)
    return Pairs(image.to(dtype), text.to(dtype))


@pytest.fixture
def tower() -> Tower:
    torch.manual_seed(0)
    return Tower().double()


# A batch as the tower takes it in each form, and the features among the tower's outputs.
FORMS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda batch: batch, lambda outputs: outputs),
    "tuple": (lambda batch: (batch, True), lambda outputs: outputs[0]),
    "dict": (
        lambda batch: {"x": batch, "mask": torch.ones(len(batch), dtype=batch.dtype)},
        lambda outputs: outputs["x"],
    ),
}


@pytest.mark.smoke
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_chunks_in_one_graph(tower: Tower, form: str) -> None:
    """A shared encoder, dropout, chunks that do not divide the batch, a hook on a parameter."""
    image, text = random_pairs()
    as_input, features_of = FORMS[form]
    torch.manual_seed(1)
    expected_x = torch.cat([tower(chunk) for chunk in image.split(4)])
    expected_y = torch.cat([tower(chunk) for chunk in text.split(3)])
    expected_loss = loss_of(expected_x, expected_y, tower.log_scale)
    expected = torch.autograd.grad(expected_loss, list(tower.parameters()))
    tower.body[0].weight.register_hook(lambda grad: grad * 1.0)  # fails without a gradient
    torch.manual_seed(1)
    of_image, of_text = protoclip.grad_cache(
        [tower, tower], [as_input(image), as_input(text)], [4, 3]
    )
    x = features_of(of_image)
    y = features_of(of_text)
    assert torch.equal(x, expected_x) and torch.equal(y, expected_y)
    log_scale = tower.log_scale
    if form == "tuple":
        assert of_image[1] is None
        log_scale = of_text[2]
    elif form == "dict":
        assert of_image["none"] is None and torch.equal(of_image["index"], x.argmax(1))
        log_scale = of_text["scale"]
    random_state = torch.get_rng_state()
    loss_of(x, y, log_scale).backward()
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close([p.grad for p in tower.parameters()], list(expected), **BOUND)


def test_autocast_is_that_of_the_first_pass(tower: Tower) -> None:
    tower.float()
    image, text = random_pairs(torch.float32)
    weights = [p for name, p in tower.named_parameters() if name != "log_scale"]
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        x, y = protoclip.grad_cache([tower.forward, tower.forward], [image, text], 4)
        # Casts of the weights that the first pass made without gradients do not reach others.
        torch.autograd.grad(tower.body[0](image).sum(), weights[0])
    assert x.dtype == y.dtype == torch.bfloat16
    (8 * loss_of(x, y, 1.0)).backward()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected_x = torch.cat([tower(chunk) for chunk in image.split(4)])
        expected_y = torch.cat([tower(chunk) for chunk in text.split(4)])
    expected = torch.autograd.grad(8 * loss_of(expected_x, expected_y, 1.0), weights)
    got = [weight.grad for weight in weights]
    torch.testing.assert_close(got, list(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["module", "method", "function", "compiled method"])
def test_batch_norm_counts_each_chunk_once(form: str) -> None:
    image, text = random_pairs()
    tower = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    tower.double()
    plain = copy.deepcopy(tower)
    encoder = {
        "module": tower,
        "method": tower.forward,
        "function": lambda x: tower(x),
        "compiled method": torch.compile(tower.forward, backend="aot_eager"),
    }[form]
    for _ in range(2):
        x, y = protoclip.grad_cache([encoder, encoder], [image, text], 5)
        loss_of(x, y, 1.0).backward()
        expected_x = torch.cat([plain(chunk) for chunk in image.split(5)])
        expected_y = torch.cat([plain(chunk) for chunk in text.split(5)])
        loss_of(expected_x, expected_y, 1.0).backward()
    assert tower[1].num_batches_tracked == 2 * 4
    torch.testing.assert_close(list(tower.buffers()), list(plain.buffers()), **BOUND)
    gradients = [parameter.grad for parameter in tower.parameters()]
    expected = [parameter.grad for parameter in plain.parameters()]
    torch.testing.assert_close(gradients, expected, **BOUND)


def test_without_gradients_there_is_no_graph(tower: Tower) -> None:
    image = random_pairs().image
    with torch.no_grad():
        (x,) = protoclip.grad_cache([tower.eval()], [image], 4)
    assert not x.requires_grad
    torch.testing.assert_close(x, tower(image).detach())


BAD: dict[str, tuple[Callable[[Tower, Tensor], Any], str]] = {
    "no rows in a chunk": (lambda t, x: protoclip.grad_cache([t], [x], 0), ">= 1, in rows, got 0$"),
    "a floating size": (
        lambda t, x: protoclip.grad_cache([t], [x], 4.0),
        "chunk_size >= 1, .* got 4.0$",
    ),
    "no list": (lambda t, x: protoclip.grad_cache(t, x, 4), "a list of encoders"),
    "nothing": (lambda t, x: protoclip.grad_cache([], [], 4), "of 0 encoders, got 0 batches"),
    "few batches": (lambda t, x: protoclip.grad_cache([t, t], [x], 4), "got 1 batches"),
    "an encoder that drops a row": (
        lambda t, x: protoclip.grad_cache([lambda chunk: t(chunk)[1:]], [x], 4),
        r"rows of its chunk\[4\]",
    ),
    "an encoder that returns a sum": (
        lambda t, x: protoclip.grad_cache([lambda chunk: t(chunk).sum()], [x], 4),
        r"got \[\(\)\]",
    ),
    "an encoder that returns a set": (
        lambda t, x: protoclip.grad_cache([lambda chunk: {1: {t(chunk)}}], [x], 4),
        "got .'set'",
    ),
    "tensors of two lengths": (
        lambda t, x: protoclip.grad_cache([t], [(x, x[1:])], 4),
        r"lengths \[9, 10\]",
    ),
    "a batch of strings": (lambda t, x: protoclip.grad_cache([t], [["a", "b"]], 4), "split="),
    "a split into nothing": (
        lambda t, x: protoclip.grad_cache([t], [x], 4, split=lambda batch, size: []),
        "one chunk from split=",
    ),
    "a generator of nothing": (
        lambda t, x: protoclip.grad_cache([t], [x], 4, split=lambda batch, size: iter(())),
        "one chunk from split=",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence(tower: Tower, case: str) -> None:
    call, words = BAD[case]
    with pytest.raises(ValueError, match=f"grad_cache: expected .*{words}"):
        call(tower, random_pairs().image)


def take_a_step(tower: Tower, **options: bool) -> None:
    torch.optim.AdamW(tower.parameters(), **options).step()


@torch.no_grad()
def double_a_weight(tower: Tower) -> None:
    tower.body[0].weight.mul_(2)


CHANGES: dict[str, Callable[[Tower], Any]] = {
    "step": take_a_step,
    "foreach": lambda tower: take_a_step(tower, foreach=True),
    "fused": lambda tower: take_a_step(tower, fused=True),
    "by hand": double_a_weight,
    "loaded": lambda tower: tower.load_state_dict(Tower().state_dict()),
}


@pytest.mark.parametrize("form", ["module", "method", "function"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_parameter_changed_before_backward_is_refused(
    tower: Tower, change: str, form: str
) -> None:
    """The second pass would compute other features than those of the loss."""
    encoder = {"module": tower, "method": tower.forward, "function": lambda x: tower(x)}[form]
    x, y = protoclip.grad_cache([encoder, encoder], list(random_pairs()), 4)
    loss = loss_of(x, y, tower.log_scale)
    for parameter in tower.parameters():
        parameter.grad = torch.ones_like(parameter)
    CHANGES[change](tower)
    with pytest.raises(RuntimeError, match=r"grad_cache: expected backward\(\) .* got a parameter"):
        loss.backward()


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_changed_before_backward_is_refused(tower: Tower, form: str) -> None:
    image, text = random_pairs()
    as_input, features_of = FORMS[form]
    outputs = protoclip.grad_cache([tower, tower], [as_input(image), as_input(text)], 4)
    text.neg_()
    words = r"tensor in a batch of shape \[\d, 6\]"
    if form == "tensor":  # of which torch itself knows
        words = "modified by an inplace"
    with pytest.raises(RuntimeError, match=words):
        loss_of(*map(features_of, outputs), tower.log_scale).backward()


def test_what_no_gradient_depends_on_may_change(tower: Tower) -> None:
    """Parameters that are not of this loss, counters, a batch after backward; step after step."""
    another_tower = Tower().double()
    counter = torch.zeros(())
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.1)
    image, text = random_pairs()
    before = tower.body[0].weight.clone()

    def counting(x: Tensor) -> Tensor:
        counter.add_(1)
        return tower(x)

    for _ in range(3):
        optimizer.zero_grad()
        with torch.no_grad():
            tower.log_scale.clamp_(0, 4.6)  # between steps, as CLIP's
        x, y = protoclip.grad_cache([counting, tower], [image, text], 4)
        loss = loss_of(x, y, tower.log_scale)
        with torch.no_grad():
            for parameter in another_tower.parameters():
                parameter.mul_(2)
        loss.backward()
        optimizer.step()
        text.neg_()
    chunks_of_a_batch = 3
    passes = 2
    assert counter == 3 * passes * chunks_of_a_batch
    assert not torch.equal(before, tower.body[0].weight)


def test_chunks_may_come_from_a_generator(tower: Tower) -> None:
    tower.eval()

    def chunks(batch: Tensor, size: int) -> Any:
        yield from batch.split(size)

    def features_and_gradients(**options: Any) -> list[Tensor]:
        x, y = protoclip.grad_cache([tower, tower], list(random_pairs()), 4, **options)
        loss = loss_of(x, y, tower.log_scale)
        return [x, y, *torch.autograd.grad(loss, list(tower.parameters()))]

    assert_same_bits(features_and_gradients(split=chunks), features_and_gradients())


class TwoTowers(nn.Module):
    """As OpenCLIP's model: takes one side or both, and owns the logit scale."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = Tower()
        self.text = Tower()
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(
        self, image: Tensor | None = None, text: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        image_features = None if image is None else self.visual(image)
        text_features = None if text is None else self.text(text)
        return image_features, text_features, self.log_scale * 1.0


class CountingReplica(DistributedDataParallel):
    """A module in DDP that counts how often its gradients are reduced."""

    def __init__(self, module: nn.Module, **options: bool) -> None:
        super().__init__(module, **options)
        self.num_reductions = 0
        self.register_comm_hook(None, self._reduce)

    def _reduce(self, _: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.num_reductions += bucket.is_last()
        dist.all_reduce(bucket.buffer().div_(dist.get_world_size()))
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done


class RankResult(NamedTuple):
    """Gradients of the parameters, as lists, 0 where there is none, and reductions of each
    replica; ``expected``: those of one graph, averaged over the ranks."""

    gradients: list[Any]
    expected: list[Any]
    num_reductions: list[int]


def gradient_lists(gradients: list[Tensor | None]) -> list[Any]:
    return [0.0 if gradient is None else gradient.tolist() for gradient in gradients]


def model_of(case: str) -> TwoTowers:
    torch.manual_seed(0)
    model = TwoTowers().double()
    model.text.requires_grad_("frozen" not in case)
    for tower in (model.visual, model.text):  # DDP must be told of what nothing uses
        tower.log_scale.requires_grad_("unused" in case)
    model.log_scale.requires_grad_(case != "towers")
    return model


def gradients_of_one_graph(
    model: TwoTowers, image: Tensor, text: Tensor, chunk_size: int, steps: int
) -> list[Any]:
    for _ in range(steps):
        x = torch.cat([model(image=chunk)[0] for chunk in image.split(chunk_size)])
        y = torch.cat([model(text=chunk)[1] for chunk in text.split(chunk_size)])
        global_loss(x, y, model.log_scale).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    for gradient in gradients:
        if gradient is not None:
            dist.all_reduce(gradient.div_(2))
    model.zero_grad()
    return gradient_lists(gradients)


def backward_of_replicated_towers(
    model: TwoTowers, image: Tensor, text: Tensor, chunk_size: int
) -> list[CountingReplica]:
    replicas = [CountingReplica(model.visual), CountingReplica(model.text)]
    x, y = protoclip.grad_cache(replicas, [image, text], chunk_size)
    global_loss(x, y, model.log_scale).backward()
    return replicas


def backward_of_a_replicated_model(
    model: TwoTowers, image: Tensor, text: Tensor, chunk_size: int, steps: int, case: str
) -> list[CountingReplica]:
    replica = CountingReplica(model, find_unused_parameters="unused" in case)
    encoders = [lambda chunk: replica(image=chunk), lambda chunk: replica(text=chunk)]
    for step in range(steps):
        early_scale = model.log_scale * 1.0  # of a node before those of the features
        accumulates = step + 1 < steps
        with replica.no_sync() if accumulates else contextlib.nullcontext():
            of_image, of_text = protoclip.grad_cache(
                encoders, [image, text], chunk_size, ddp=[replica]
            )
            x, _, scale = of_image
            _, y, _ = of_text
            global_loss(x, y, early_scale if case == "used directly" else scale).backward()
    return [replica]


def on_two_ranks(case: str) -> RankResult:
    model = model_of(case)
    rank = dist.get_rank()
    pairs = random_pairs(rows=2 * ROWS)
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    image = pairs.image[mine]
    text = pairs.text[mine]
    chunk_size = 3 + 2 * rank  # four chunks, and two
    steps = 2 if case == "accumulate" else 1
    torch.manual_seed(1 + rank)
    expected = gradients_of_one_graph(model, image, text, chunk_size, steps)
    torch.manual_seed(1 + rank)
    if case == "towers":
        replicas = backward_of_replicated_towers(model, image, text, chunk_size)
    else:
        replicas = backward_of_a_replicated_model(model, image, text, chunk_size, steps, case)
    gradients = gradient_lists([parameter.grad for parameter in model.parameters()])
    return RankResult(gradients, expected, [replica.num_reductions for replica in replicas])


def global_loss(x: Tensor, y: Tensor, log_scale: Tensor) -> Tensor:
    return protoclip.info_nce(
        F.normalize(x),
        F.normalize(y),
        log_scale.exp(),
        backend="reference",
        group=distributed.all_ranks(),
    )


CASES = ["lambdas", "used directly", "unused", "towers", "accumulate", "frozen", "frozen, unused"]


def every_case() -> dict[str, RankResult]:
    return {case: on_two_ranks(case) for case in CASES}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, RankResult]]:
    return in_group(2, every_case)


@pytest.mark.parametrize("case", CASES)
def test_ranks_reduce_the_gradients_of_one_graph_once(
    two_ranks: list[dict[str, RankResult]], case: str
) -> None:
    """Ranks with four and with two chunks."""
    results = [of_rank[case] for of_rank in two_ranks]
    for result in results:
        assert set(result.num_reductions) == {1}
        for gradient, expected in zip(result.gradients, result.expected, strict=True):
            # A parameter that nothing uses is left alone, or has a gradient of zero.
            torch.testing.assert_close(
                torch.tensor(gradient, dtype=torch.float64),
                torch.tensor(expected, dtype=torch.float64),
                **BOUND,
            )
    assert results[0].gradients == results[1].gradients


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 4))


def losses_of_three_steps(model: nn.Module, next_loss: Callable[[], Tensor]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = next_loss()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_sharded() -> list[float]:
    """FSDP2: losses of three steps; a step before backward is refused."""
    model = small_model()
    for part in (model[0], model[2], model):
        fully_shard(part)
        part.set_force_sum_reduction_for_comms(True)  # gloo of torch 2.8 sums for an average

    def next_loss() -> Tensor:
        x, y = protoclip.grad_cache([model, model], list(random_pairs(torch.float32)), 4)
        return loss_of(x, y, 1.0)

    losses = losses_of_three_steps(model, next_loss)
    loss = next_loss()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="grad_cache: expected backward"):
        loss.backward()
    return losses


def test_sharded_parameters_train_and_may_not_change_before_backward() -> None:
    model = small_model()
    image, text = random_pairs(torch.float32)
    expected = losses_of_three_steps(model, lambda: loss_of(model(image), model(text), 1.0))
    for losses in in_group(2, train_sharded):
        assert losses == pytest.approx(expected, rel=1e-5)
