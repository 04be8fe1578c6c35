"""Towers and heads in a step: compiled, in TF32 on a GPU, and their buffers copied together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import bare_run, in_group, losses
from steps import episode_on, steps_on, trainer_of
from torch import Tensor, nn

from protoclip import distributed
from protoclip.data import Batch
from protoclip.losses.objective import ProtoLoss, Term, TermInputs
from protoclip.model import ShortTokenizer, build_model
from protoclip.settings.config import LossConfig, ModelConfig
from protoclip.train import main
from protoclip.training.towers import Towers, tf32_products
from protoclip.training.update import Statistics


@pytest.mark.parametrize("model", ["nano", "protoclip-icons"])
def test_towers_and_heads_are_one_graph_each(model: str, nano: Path) -> None:
    name = str(nano) if model == "nano" else model
    model_of_run = build_model(ModelConfig(model=name, torchcompile=True))
    pixels = torch.randn(4, 3, model_of_run.image_size, model_of_run.image_size)
    tokens = model_of_run.short_tokenizer(["a red circle", "a blue star"] * 2)
    expected = model_of_run.encode(pixels, tokens)
    parts = [
        (model_of_run.clip.encode_image, pixels, expected.image),
        (model_of_run.encode_text, tokens, expected.text),
    ]
    for encode, inputs, features in parts:
        compiled = torch.compile(encode, dynamic=False, fullgraph=True, backend="aot_eager")
        got = compiled(inputs)
        torch.testing.assert_close(got, features, rtol=1e-4, atol=1e-5)
        got.square().sum().backward()
    project = torch.compile(model_of_run.project, fullgraph=True, backend="aot_eager")
    got, projected = project(expected), model_of_run.project(expected)
    torch.testing.assert_close(got.image, projected.image)
    torch.testing.assert_close(got.text, projected.text)


@pytest.mark.parametrize("case", ["clip", "prototypes", "siglip", "dedup"])
def test_the_losses_are_one_graph(case: str, nano: Path) -> None:
    model = build_model(ModelConfig(model=str(nano), siglip=case == "siglip"))
    encoded = model.encode(
        torch.randn(6, 3, model.image_size, model.image_size),
        model.short_tokenizer(["a red circle"] * 6),
    )
    episode = episode_on("cpu", model.projection_dim) if case == "prototypes" else None
    loss = ProtoLoss(LossConfig(w_proto=1.0))

    def total() -> Tensor:
        return loss(
            encoded,
            model.project(encoded) if episode else None,
            torch.arange(6),
            model.logit_scale,
            model.proto_logit_scale,
            episode,
            ids=torch.zeros(6, dtype=torch.int64) if case == "dedup" else None,
            logit_bias=model.logit_bias,
        ).total

    weights = [p for p in model.parameters() if p.requires_grad]
    expected = total()
    gradients = torch.autograd.grad(expected, weights, retain_graph=True, allow_unused=True)
    got = torch.compile(total, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(got, expected)
    got_gradients = torch.autograd.grad(got, weights, retain_graph=True, allow_unused=True)
    torch.testing.assert_close(got_gradients, gradients, rtol=1e-4, atol=1e-6)


def test_a_compiled_run_compiles_little_and_trains_the_same(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions of three lengths and two kinds of episodes. The heads with inductor, as users have
    them; it takes ten seconds for a tower, which is only captured and differentiated here."""
    original = torch.compile
    graphs: list[Any] = []

    def counting(function: Any, **options: Any) -> Any:
        def backend(graph: Any, inputs: Any) -> Any:
            from torch._dynamo.backends.debugging import aot_eager
            from torch._inductor.compile_fx import compile_fx

            graphs.append(graph)
            return (compile_fx if function.__name__ == "project" else aot_eager)(graph, inputs)

        return original(function, backend=backend, **options)

    flags = bare_run(workdir, "--max-steps", "8")
    assert main([*flags, "--name", "eager"]) == 0
    monkeypatch.setattr(torch, "compile", counting)
    assert main([*flags, "--name", "compiled", "--torchcompile"]) == 0
    eager = losses(workdir / "logs" / "eager")
    compiled = losses(workdir / "logs" / "compiled")
    assert len(eager) == 8 and len(graphs) == 3  # a tower each, and the heads
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(eager), rtol=2e-3, atol=2e-3)


def test_captions_have_few_lengths_where_the_tower_is_compiled() -> None:
    lengths = {}
    for compiled in (False, True):
        config = ModelConfig("protoclip-tiny", force_context_length=77, torchcompile=compiled)
        model = build_model(config)
        assert isinstance(model.short_tokenizer, ShortTokenizer)
        texts = [" ".join(["star"] * words) for words in range(1, 80)]
        lengths[compiled] = {model.short_tokenizer([text]).shape[1] for text in texts}
    assert len(lengths[True]) <= 3 < len(lengths[False])
    assert max(lengths[True]) == max(lengths[False])


class Spy(torch.autograd.Function):
    """Notes the TF32 settings in the forward and backward pass of a place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: str, seen: dict[str, set[Any]]) -> Tensor:
        ctx.place = place
        ctx.seen = seen
        Spy.note(ctx, "forward")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        Spy.note(ctx, "backward")
        return grad, None, None

    @staticmethod
    def note(ctx: Any, when: str) -> None:
        settings = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
        ctx.seen.setdefault(f"{ctx.place}, {when}", set()).add(settings)


@pytest.mark.parametrize("case", ["prototypes", "siglip", "accumulation"])
def test_only_towers_multiply_in_tf32(
    case: str, nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU ignores the settings, which are the same for all devices."""
    seen: dict[str, set[Any]] = {}

    def spied(function: Any, place: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            return Spy.apply(result, place, seen)

        return call

    trainer, take = steps_on("cpu", nano, case)
    model = trainer.run.model
    clip = model.clip
    blocks = {
        "image tower": clip.visual.transformer.resblocks[0],
        "text tower": clip.transformer.resblocks[0],
        "head": model.text_head[0],
    }
    for place, block in blocks.items():
        monkeypatch.setattr(block, "forward", spied(block.forward, place))
    trainer.towers = Towers(model, compiled=False, tf32=True)
    trainer.terms = trainer.terms.__class__({"own": Term(OwnTerm(seen))})
    inside = {(True, True)}
    exact = {(False, False)}
    with tf32_products(False):
        take()
        assert torch.backends.cuda.matmul.allow_tf32 is False
    for place, settings in seen.items():
        assert settings == (inside if "tower" in place else exact), place
    expected = {"image tower, backward", "text tower, backward", "loss, forward", "loss, backward"}
    if case == "prototypes":
        expected |= {"head, forward", "head, backward"}
    assert expected <= seen.keys()


class OwnTerm(nn.Module):
    """Stands among the losses."""

    def __init__(self, seen: dict[str, set[Any]]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, inputs: TermInputs) -> Tensor:
        rows = inputs.image_features + inputs.text_features
        return Spy.apply(rows, "loss", self.seen).square().mean()


def test_the_settings_of_before_come_back(nano: Path) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with pytest.raises(RuntimeError, match="stop"), tf32_products(True):
        raise RuntimeError("stop")
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    trainer, _ = steps_on("cpu", nano, "clip")
    assert not trainer.towers.tf32  # a CPU's products stay as they are


def buffers() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    floats = [torch.randn(shape, generator=generator) for shape in ((3,), (), (2, 4))]
    return [*floats, torch.tensor(7), torch.randn(4, 6, generator=generator).t()]


class Buffers(nn.Module):
    """Stands for a user's losses."""

    def __init__(self, buffers: list[Tensor]) -> None:
        super().__init__()
        for number, buffer in enumerate(buffers):
            self.register_buffer(f"b{number}", buffer)


def test_buffers_are_put_back_whole_or_not_at_all() -> None:
    state = buffers()
    expected = buffers()
    module = Buffers(state)
    statistics = Statistics(nn.Module(), module)
    before = statistics.copy()
    for buffer in state:
        buffer.fill_(float("nan") if buffer.is_floating_point() else -1)
    statistics.restore_unless(torch.tensor(False), before, statistics.copy())
    torch.testing.assert_close(state, expected, rtol=0, atol=0)
    for buffer in state:
        buffer.add_(1)
    after = statistics.copy()
    for buffer in state:
        buffer.add_(1)
    statistics.restore_unless(torch.tensor(True), before, after)
    torch.testing.assert_close(state, [buffer + 1 for buffer in expected], rtol=0, atol=0)
    statistics.restore(before)
    torch.testing.assert_close(state, expected, rtol=0, atol=0)
    none = Statistics(nn.Module(), nn.Module())
    none.restore_unless(torch.tensor(True), none.copy(), none.copy())


def test_the_kernels_of_a_step_do_not_grow_with_the_number_of_buffers() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(
            self, op: Any, types: Any, arguments: Any = (), options: Any = None
        ) -> Any:
            self.calls += not any(word in str(op) for word in ("view", "split", "flatten"))
            return op(*arguments, **(options or {}))

    counts = []
    for number in (3, 160):
        state = [torch.randn(8) for _ in range(number)]
        statistics = Statistics(nn.Module(), Buffers(state))
        with Count() as count:
            statistics.restore_unless(torch.tensor(True), statistics.copy(), statistics.copy())
        counts.append(count.calls)
    assert counts[0] == counts[1] <= 5


def statistics_of_ranks(nano: str) -> list[Any]:
    """Buffers after a step whose batches differ by rank, with batch norm by rank in the heads."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(model=nano, use_bn_sync=False))
    trainer = trainer_of(model, episode_on("cpu", model.projection_dim), "--w-proto", "1")
    torch.manual_seed(distributed.rank())
    pixels = torch.randn(6, 3, model.image_size, model.image_size)
    batch = Batch(torch.arange(6), pixels, model.short_tokenizer(["a red circle"] * 6))
    for number in range(2):
        trainer.take_step(number, [batch])
    heads = (model.image_head, model.text_head)
    return [buffer.tolist() for head in heads for buffer in head.buffers()]


def test_every_rank_has_the_statistics_of_the_first(nano: Path) -> None:
    first, second = in_group(2, statistics_of_ranks, str(nano))
    assert len(first) == 6 and any(first[0])
    assert first == second
