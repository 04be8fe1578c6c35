"""Cached gradients beside the whole batch in one graph, and sentence-transformers' cached loss.

A small transformer, in-batch negatives, forward and backward. Gradients equal those of one graph
before anything is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import protoclip
from benchmarks import peers
from benchmarks.harness import OURS, Bench, Case
from benchmarks.machine import DEVICE
from benchmarks.roofline import Work

SIZES = {"tiny": (16, 4), "quick": (256, 32), "full": (4096, 64)}  # rows, rows of a chunk
WORDS = 1000
TOKENS = 16
WIDTH = 128
LAYERS = 2
SCALE = 20.0


class Encoder(nn.Module):
    """Token ids to a sentence embedding, as a module of sentence-transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(WORDS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features | {"sentence_embedding": self.encode(features["input_ids"])}

    def encode(self, token_ids: Tensor) -> Tensor:
        return self.layers(self.tokens(token_ids)).mean(1)


@dataclass(frozen=True)
class Problem:
    """Pairs of token ids, and how many of them are encoded at a time."""

    model: Encoder
    queries: Tensor  # int64 [N, TOKENS]
    keys: Tensor  # int64 [N, TOKENS]
    chunk: int


@cache
def _problem(rows: int, chunk: int) -> Problem:
    torch.manual_seed(0)
    queries = torch.randint(WORDS, (rows, TOKENS), device=DEVICE)
    keys = torch.randint(WORDS, (rows, TOKENS), device=DEVICE)
    return Problem(Encoder().to(DEVICE), queries, keys, chunk)


def _in_batch(x: Tensor, y: Tensor) -> Tensor:
    return protoclip.contrastive(F.normalize(x, dim=1), F.normalize(y, dim=1), SCALE)


def _ours(problem: Problem) -> Tensor:
    encode = problem.model.encode
    x, y = protoclip.grad_cache([encode, encode], [problem.queries, problem.keys], problem.chunk)
    return _in_batch(x, y)


def _one_graph(problem: Problem) -> Tensor:
    encode = problem.model.encode
    return _in_batch(encode(problem.queries), encode(problem.keys))


def _sentence_transformers(problem: Problem) -> Tensor:
    package = peers.optional("sentence_transformers")
    cached_loss = peers.optional(
        "sentence_transformers.sentence_transformer.losses", "CachedMultipleNegativesRankingLoss"
    )
    model = package.SentenceTransformer(modules=[problem.model], device=DEVICE)
    loss = cached_loss(model, mini_batch_size=problem.chunk)
    return loss([{"input_ids": problem.queries}, {"input_ids": problem.keys}], None)


VARIANTS: dict[str, Callable[[Problem], Tensor]] = {
    f"{OURS}-grad_cache": _ours,
    "one graph": _one_graph,
    "sentence-transformers": _sentence_transformers,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_grad_cache(bench: Bench, variant: str) -> None:
    rows, chunk = SIZES[bench.sizes]
    problem = _problem(rows, chunk)

    def step(loss: Callable[[Problem], Tensor]) -> list[Tensor]:
        problem.model.zero_grad()
        loss(problem).backward()
        return [parameter.grad for parameter in problem.model.parameters()]

    gradients = step(VARIANTS[variant])
    expected = step(_one_graph)
    largest = max(gradient.abs().max() for gradient in expected)
    for gradient, of_one_graph in zip(gradients, expected, strict=True):
        assert (gradient - of_one_graph).abs().max() <= 1e-4 * largest
    layer = 12 * WIDTH**2 + 2 * TOKENS * WIDTH  # multiply-adds of a token
    # 2 FLOPs forward and 4 backward for each multiply-add of the 2 N texts, and the loss's four
    # products of [N, N, D], 2 FLOPs each (roofline.info_nce).
    encoders = 6.0 * LAYERS * layer * TOKENS * 2 * rows
    loss = 8.0 * rows**2 * WIDTH
    case = Case(
        "grad_cache", {"N": rows, "chunk": chunk, "D": WIDTH}, "fp32", Work(encoders + loss, 0.0)
    )
    rival = None if peers.is_ours(variant) else partial(step, _ours)
    bench.time(case, variant, partial(step, VARIANTS[variant]), rival=rival)
