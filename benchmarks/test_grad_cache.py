"""Cached gradients beside the whole batch in one graph, and sentence-transformers' cached loss.

A small transformer, in-batch negatives, forward and backward. Gradients equal those of one graph
before anything is timed.
"""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import protoclip
from benchmarks import peers
from benchmarks.harness import OURS, Case
from benchmarks.machine import DEVICE
from benchmarks.roofline import Work

SIZES = {"tiny": (16, 4), "quick": (1024, 64), "full": (4096, 64)}  # rows, rows of a chunk
WORDS, TOKENS, WIDTH, LAYERS, SCALE = 1000, 16, 128, 2, 20.0


class Encoder(nn.Module):
    """Token ids to a sentence embedding, as a module of sentence-transformers."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(WORDS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, features):
        embedding = self.layers(self.tokens(features["input_ids"])).mean(1)
        return features | {"sentence_embedding": embedding}


@cache
def _problem(rows):
    torch.manual_seed(0)
    columns = [torch.randint(WORDS, (rows, TOKENS), device=DEVICE) for _ in range(2)]
    return Encoder().to(DEVICE), columns


def _in_batch(x, y):
    return protoclip.contrastive(F.normalize(x, dim=1), F.normalize(y, dim=1), SCALE)


def _ours(model, columns, chunk):
    encode = lambda ids: model({"input_ids": ids})["sentence_embedding"]  # noqa: E731
    return _in_batch(*protoclip.grad_cache([encode, encode], columns, chunk))


def _one_graph(model, columns, chunk):
    return _in_batch(*(model({"input_ids": ids})["sentence_embedding"] for ids in columns))


def _sentence_transformers(model, columns, chunk):
    package = peers.optional("sentence_transformers")
    kind = peers.optional(
        "sentence_transformers.sentence_transformer.losses", "CachedMultipleNegativesRankingLoss"
    )
    loss = kind(package.SentenceTransformer(modules=[model], device=DEVICE), mini_batch_size=chunk)
    return loss([{"input_ids": ids} for ids in columns], None)


VARIANTS = {
    f"{OURS}-grad_cache": _ours,
    "one graph": _one_graph,
    "sentence-transformers": _sentence_transformers,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_grad_cache(bench, variant):
    rows, chunk = SIZES[bench.sizes]
    model, columns = _problem(rows)

    def step(run):
        model.zero_grad()
        run(model, columns, chunk).backward()
        return [p.grad for p in model.parameters()]

    got, want = step(VARIANTS[variant]), step(_one_graph)
    largest = max(grad.abs().max() for grad in want)
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() <= 1e-4 * largest
    layer = 12 * WIDTH**2 + 2 * TOKENS * WIDTH  # multiply-adds of a token
    flop = 6.0 * LAYERS * layer * TOKENS * 2 * rows + 8.0 * rows**2 * WIDTH
    case = Case("grad_cache", {"N": rows, "chunk": chunk, "D": WIDTH}, "fp32", Work(flop, 0.0))
    rival = None if peers.is_ours(variant) else lambda: step(_ours)
    bench.time(case, variant, lambda: step(VARIANTS[variant]), rival=rival)
