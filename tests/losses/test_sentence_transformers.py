"""sentence-transformers' losses, fused: theirs, but that duplicates are no negatives."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_DISABLED", "true")

from typing import Any, NamedTuple

import pytest
import torch
from ranks import in_group
from torch import Tensor, nn

pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, models
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.training_args import SentenceTransformerTrainingArguments
from sentence_transformers.util import cos_sim, dot_score

import protoclip

ours = protoclip.sentence_transformers  # loaded at first use
PLAIN = "MultipleNegativesRankingLoss"
CACHED = "CachedMultipleNegativesRankingLoss"
NAMES = [PLAIN, CACHED]
WORDS = [f"w{i}" for i in range(60)]
GTE = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "symmetric": {
        "directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"
    },
    "gte": {"directions": GTE},
    "dot": {"similarity_fct": dot_score, "scale": 0.5},
}  # fmt: skip
# Rows 0 and 3 have one anchor, 1 and 2 one document; a negative of row 4 is row 1's document.
COLUMNS = [
    ["w1 w2", "w3", "w4 w5 w6", "w1 w2", "w7", "w8 w1"],
    ["w10", "w11 w12", "w11 w12", "w13", "w14", "w15"],
    ["w20", "w21", "w22 w23", "w24", "w11 w12", "w25"],
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random BERT of one layer, with a vocabulary of words."""
    from transformers import BertConfig, BertModel, BertTokenizer

    path = tmp_path_factory.mktemp("bert")
    (path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=65,
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_dropout_prob=0,
    )
    BertModel(config).save_pretrained(path)
    BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    return str(path)


def load(path: str) -> SentenceTransformer:
    transformer = models.Transformer(path)
    return SentenceTransformer(modules=[transformer, models.Pooling(32)], device="cpu").eval()


def loss_of(loss: Any, columns: list[list[str]], rows: slice = slice(None)) -> Tensor:
    return loss([loss.model.preprocess(column[rows]) for column in columns], None)


def gradient(model: nn.Module) -> Tensor:
    """Of all parameters in one vector; relative to its largest number, and free of None."""
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(gradients) / torch.cat(gradients).abs().max()


def options_of(name: str, **options: Any) -> dict[str, Any]:
    """Of a loss; a cached one computes four rows at a time."""
    return options | {"mini_batch_size": 4} if name == CACHED else options


def equal_texts(column: list[str], others: list[str]) -> Tensor:
    """bool [rows, others]"""
    return torch.tensor([[text == other for other in others] for text in column])


def loss_without_duplicates(
    embeddings: list[Tensor],
    scale: float = 20.0,
    similarity_fct: Any = cos_sim,
    directions: tuple[str, ...] = GTE[:1],
    partition_mode: str = "",
) -> Tensor:
    """By its formula: a matrix of similarities for each direction, duplicates at -inf."""
    anchor, document, negative = embeddings
    documents = torch.cat([document, negative])
    n = len(anchor)
    same_anchor = equal_texts(COLUMNS[0], COLUMNS[0])
    same_document = equal_texts(COLUMNS[1], COLUMNS[1])
    same_text = equal_texts(COLUMNS[1], COLUMNS[1] + COLUMNS[2])
    diagonal = torch.eye(n, dtype=torch.bool)
    nothing = torch.zeros(n, n, dtype=torch.bool)
    own_document = torch.cat([diagonal, nothing], dim=1)
    documents_of_same_anchor = torch.cat([same_anchor, nothing], dim=1)
    hidden = {
        "query_to_doc": (same_text | documents_of_same_anchor) & ~own_document,
        "query_to_query": same_document | same_anchor,
        "doc_to_query": (same_document | same_anchor) & ~diagonal,
        "doc_to_doc": same_text | torch.cat([same_anchor, same_anchor], dim=1),
    }
    similarities = {
        "query_to_doc": similarity_fct(anchor, documents),
        "query_to_query": similarity_fct(anchor, anchor),
        "doc_to_query": similarity_fct(document, anchor),
        "doc_to_doc": similarity_fct(document, documents),
    }
    logits = [
        scale * similarities[name].masked_fill(hidden[name], -torch.inf)
        for name in GTE
        if name in directions
    ]
    if partition_mode == "per_direction":
        level = sum(part.logsumexp(1) for part in logits) / len(logits)
    else:
        level = torch.cat(logits, 1).logsumexp(1)
    return (level - logits[0].diagonal()).mean()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_duplicates_are_no_negatives(path: str, case: str, name: str) -> None:
    """Through the model, which sees each column padded to another width."""
    model = load(path)
    options = options_of(name, **CASES[case])
    loss = loss_of(getattr(ours, name)(model, **options), COLUMNS)
    loss.backward()
    got = gradient(model)
    model.zero_grad()
    embeddings = [model(model.preprocess(column))["sentence_embedding"] for column in COLUMNS]
    expected = loss_without_duplicates(embeddings, **CASES[case])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(got, gradient(model), rtol=0, atol=1e-4)
    theirs = loss_of(getattr(losses, name)(model, **options), COLUMNS)
    assert theirs.item() > 1.001 * loss.item()


@pytest.mark.parametrize("name", NAMES)
def test_duplicates_are_no_negatives_at_any_dimension(path: str, name: str) -> None:
    """MatryoshkaLoss calls the loss once for each, with what the model left in the columns."""
    model = load(path)
    loss = getattr(ours, name)(model, **options_of(name))
    got = loss_of(losses.MatryoshkaLoss(model, loss, [32, 16]), COLUMNS)
    embeddings = [model(model.preprocess(column))["sentence_embedding"] for column in COLUMNS]
    shorter = [rows[:, :16] for rows in embeddings]
    expected = loss_without_duplicates(embeddings) + loss_without_duplicates(shorter)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("num_columns", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_embeddings_without_texts_have_their_loss(path: str, case: str, num_columns: int) -> None:
    """As wrappers such as those of images hand them over: all texts count as different."""
    model = load(path)
    draw = torch.Generator().manual_seed(0)
    columns = [
        torch.randn(7, 32, generator=draw, dtype=torch.float64).requires_grad_()
        for _ in range(num_columns)
    ]

    def loss(module: Any) -> Tensor:
        fused = getattr(module, PLAIN)(model, **CASES[case])
        return fused.compute_loss_from_embeddings(columns, None)

    got = loss(ours)
    expected = loss(losses)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(got, columns),
        torch.autograd.grad(expected, columns),
        rtol=1e-8,
        atol=1e-10,
    )


def test_rows_without_negatives_have_finite_gradients(path: str) -> None:
    """One anchor: no other query is left to see, and no gradient is NaN."""
    loss = ours.MultipleNegativesRankingLoss(load(path), directions=GTE)
    value = loss_of(loss, [["w1"] * 3, ["w2", "w3", "w4"]])
    value.backward()
    assert value.item() == pytest.approx(0.6931472, abs=1e-5)  # ln 2: its positive, seen twice
    assert gradient(loss.model).isfinite().all()


class Run(NamedTuple):
    losses: list[float]
    weights: dict[str, Tensor]


def trained(path: str, loss_class: type[nn.Module], **options: Any) -> Run:
    """A run of their trainer."""
    from datasets import Dataset

    model = load(path)
    words = [WORDS[i] for i in torch.randperm(60, generator=torch.Generator().manual_seed(3))]
    data = Dataset.from_dict({"anchor": words[:30], "positive": words[30:]})
    arguments = SentenceTransformerTrainingArguments(
        output_dir=f"{path}/run", per_device_train_batch_size=10, num_train_epochs=2, seed=1,
        learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    loss = loss_class(model, **options)
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss)
    trainer.train()
    history = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return Run(history, model.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_their_trainer_gives_the_same_run_without_duplicates(path: str, name: str) -> None:
    options = options_of(name)
    got = trained(path, getattr(ours, name), **options)
    expected = trained(path, getattr(losses, name), **options)
    assert len(got.losses) == 6 and got.losses == pytest.approx(expected.losses, rel=1e-4)
    assert got.losses[-1] < got.losses[0]
    torch.testing.assert_close(got.weights, expected.weights, rtol=1e-3, atol=1e-4)


class RankLoss(NamedTuple):
    loss: float  # of this rank's half of the rows
    gradient: list[float]  # of all ranks


NAME_OF_CASE = {"default": PLAIN, "gte": CACHED}


def on_a_rank(path: str) -> dict[str, RankLoss]:
    half = slice(3) if torch.distributed.get_rank() == 0 else slice(3, 6)
    results = {}
    for case, name in NAME_OF_CASE.items():
        loss = getattr(ours, name)(load(path), gather_across_devices=True, **CASES[case])
        value = loss_of(loss, COLUMNS, half)
        value.backward()
        for parameter in loss.model.parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
        results[case] = RankLoss(value.item(), gradient(loss.model).tolist())
    return results


@pytest.fixture(scope="module")
def two_ranks(path: str) -> list[dict[str, RankLoss]]:
    return in_group(2, on_a_rank, path)


@pytest.mark.parametrize("case", NAME_OF_CASE)
def test_ranks_share_negatives_and_know_duplicates_of_each_other(
    path: str, two_ranks: list[dict[str, RankLoss]], case: str
) -> None:
    first, second = (results[case] for results in two_ranks)
    loss = ours.MultipleNegativesRankingLoss(load(path), **CASES[case])
    value = loss_of(loss, COLUMNS)
    value.backward()
    assert (first.loss + second.loss) / 2 == pytest.approx(value.item(), rel=1e-5)
    expected = gradient(loss.model)
    torch.testing.assert_close(torch.tensor(first.gradient), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"hardness_mode": "all_negatives", "hardness_strength": 5.0},
        {"similarity_fct": lambda a, b: a @ b.T},
    ],
)
def test_what_is_not_fused_runs_theirs_with_one_warning(
    path: str, name: str, options: dict[str, Any]
) -> None:
    model = load(path)
    with pytest.warns(UserWarning, match="expected cos_sim or dot_score") as warnings:
        got = loss_of(getattr(ours, name)(model, scale=2.0, **options), COLUMNS)
    assert len([w for w in warnings if "cos_sim" in str(w.message)]) == 1
    theirs = loss_of(getattr(losses, name)(model, scale=2.0, **options), COLUMNS)
    assert torch.equal(got, theirs)


@pytest.mark.smoke
def test_a_text_is_its_tokens_in_order_wherever_the_padding_is() -> None:
    right = torch.tensor([[5, 6, 0], [7, 8, 9]])
    left = torch.tensor([[0, 5, 6], [7, 8, 9]])
    flat = torch.tensor([[5, 6, 7, 8, 9]])
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    padded_right = ours._text_ids({"input_ids": right, "attention_mask": (right > 0).long()})
    padded_left = ours._text_ids({"input_ids": left, "attention_mask": left > 0})
    without_padding = ours._text_ids({"input_ids": flat, "cu_seq_lens_q": bounds})
    assert torch.equal(padded_right, padded_left)
    assert torch.equal(padded_right, without_padding)
    permuted = ours._text_ids({"input_ids": torch.tensor([[6, 5, 0], [8, 7, 9]])})
    assert len({*padded_right.tolist(), *permuted.tolist()}) == 4
    assert ours._text_ids({"input_ids": right, "pixel_values": torch.ones(2, 3)}) is None


@pytest.mark.parametrize("case", CASES)
def test_duplicates_are_no_negatives_of_a_static_embedding(case: str) -> None:
    """Its features have all tokens in one row of numbers, and where each text begins."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, WORDS[0]))
    tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    static = models.StaticEmbedding(tokenizer, embedding_dim=32)
    model = SentenceTransformer(modules=[static], device="cpu")
    loss = loss_of(ours.MultipleNegativesRankingLoss(model, **CASES[case]), COLUMNS)
    embeddings = [model(model.preprocess(column))["sentence_embedding"] for column in COLUMNS]
    expected = loss_without_duplicates(embeddings, **CASES[case])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    texts = ours._text_ids(model.preprocess(["w1 w2", "", "w3", "w1 w2", ""]))
    assert texts is not None and texts[0] == texts[3] and texts[1] == texts[4]
    assert len(texts.unique()) == 3
