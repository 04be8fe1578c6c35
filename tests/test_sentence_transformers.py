"""sentence-transformers' losses, fused: theirs, but that duplicates are no negatives."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_DISABLED", "true")

import pytest
import torch
from ranks import on_ranks

pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, models
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.training_args import SentenceTransformerTrainingArguments
from sentence_transformers.util import cos_sim, dot_score

import protoclip
from protoclip import distributed

ours = protoclip.sentence_transformers  # loaded at first use
NAMES = ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"]
WORDS = [f"w{i}" for i in range(60)]
GTE = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
CASES = {
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
def path(tmp_path_factory):
    """A random BERT of one layer, with a vocabulary of words."""
    from transformers import BertConfig, BertModel, BertTokenizer

    path = tmp_path_factory.mktemp("bert")
    (path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    )
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=65,
        num_hidden_layers=1,
        max_position_embeddings=16,
        hidden_dropout_prob=0,
        **size,
    )
    BertModel(config).save_pretrained(path)
    BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    return str(path)


def load(path):
    transformer = models.Transformer(path)
    return SentenceTransformer(modules=[transformer, models.Pooling(32)], device="cpu").eval()


def loss_of(loss, columns, rows=slice(None)):
    return loss([loss.model.preprocess(column[rows]) for column in columns], None)


def gradient(model):
    """Of all parameters in one vector; relative to its largest number, and free of None."""
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(grads) / torch.cat(grads).abs().max()


def masked(embeddings, scale=20.0, similarity_fct=cos_sim, directions=GTE[:1], partition_mode=""):
    """The loss by its formula: a matrix of similarities for each direction, duplicates at -inf."""
    anchor, document, _ = embeddings
    every, text, n = torch.cat(embeddings[1:]), [*COLUMNS[1], *COLUMNS[2]], len(anchor)
    same_text = torch.tensor([[one == other for other in text] for one in COLUMNS[1]])
    same_anchor = torch.tensor([[one == other for other in COLUMNS[0]] for one in COLUMNS[0]])
    own, no = torch.eye(n, dtype=torch.bool), torch.zeros(n, n, dtype=torch.bool)
    in_rows = same_text[:, :n] | same_anchor
    hidden = {
        "query_to_doc": (same_text | torch.cat([same_anchor, no], 1)) & ~torch.cat([own, no], 1),
        "query_to_query": in_rows,
        "doc_to_query": in_rows & ~own,
        "doc_to_doc": same_text | torch.cat([same_anchor, same_anchor], 1),
    }
    sides = (anchor, every), (anchor, anchor), (document, anchor), (document, every)
    logits = [
        scale * similarity_fct(*side).masked_fill(hidden[name], -torch.inf)
        for name, side in zip(GTE, sides, strict=True)
        if name in directions
    ]
    if partition_mode == "per_direction":
        total = sum(part.logsumexp(1) for part in logits) / len(logits)
    else:
        total = torch.cat(logits, 1).logsumexp(1)
    return (total - logits[0].diagonal()).mean()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_duplicates_are_no_negatives(path, case, cached):
    """Through the model, which sees each column padded to another width."""
    model, options = load(path), CASES[case] | ({"mini_batch_size": 4} if cached else {})
    loss = loss_of(getattr(ours, NAMES[cached])(model, **options), COLUMNS)
    loss.backward()
    got = gradient(model)
    model.zero_grad()
    want = masked(
        [model(model.preprocess(column))["sentence_embedding"] for column in COLUMNS], **CASES[case]
    )
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(got, gradient(model), rtol=0, atol=1e-4)
    theirs = loss_of(getattr(losses, NAMES[cached])(model, **options), COLUMNS)
    assert theirs.item() > 1.001 * loss.item()


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_unknown_texts_are_all_different(path, case, columns):
    """Embeddings alone, as wrappers such as those of images hand them over: their loss."""
    model = load(path)
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(7, 32, generator=generator, dtype=torch.float64) for _ in range(columns)]
    x = [column.requires_grad_() for column in x]
    got = ours.MultipleNegativesRankingLoss(model, **CASES[case]).compute_loss_from_embeddings(
        x, None
    )
    want = losses.MultipleNegativesRankingLoss(model, **CASES[case]).compute_loss_from_embeddings(
        x, None
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    for one, other in zip(torch.autograd.grad(got, x), torch.autograd.grad(want, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_rows_without_negatives(path):
    """One anchor: no other query is left to see, and no gradient is NaN."""
    loss = ours.MultipleNegativesRankingLoss(load(path), directions=GTE)
    value = loss_of(loss, [["w1"] * 3, ["w2", "w3", "w4"]])
    value.backward()
    assert value.item() == pytest.approx(0.6931472, abs=1e-5)  # ln 2: its positive, seen twice
    assert gradient(loss.model).isfinite().all()


def trained(path, kind, **options):
    """Losses and the last weights of a run of their trainer."""
    from datasets import Dataset

    model = load(path)
    generator = torch.Generator().manual_seed(3)
    draws = torch.randperm(60, generator=generator).tolist()
    data = {"anchor": draws[:30], "positive": draws[30:]}
    data = Dataset.from_dict({key: [WORDS[i] for i in rows] for key, rows in data.items()})
    arguments = SentenceTransformerTrainingArguments(
        output_dir=f"{path}/run", per_device_train_batch_size=10, num_train_epochs=2, seed=1,
        learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    loss = kind(model, **options)
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss)
    trainer.train()
    history = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return history, model.state_dict()


@pytest.mark.parametrize("cached", [False, True])
def test_their_trainer_gives_the_same_run_without_duplicates(path, cached):
    options = {"mini_batch_size": 4} if cached else {}
    got, weights = trained(path, getattr(ours, NAMES[cached]), **options)
    want, others = trained(path, getattr(losses, NAMES[cached]), **options)
    assert len(got) == 6 and got == pytest.approx(want, rel=1e-4)
    assert got[-1] < got[0]
    for key, weight in weights.items():
        torch.testing.assert_close(weight, others[key], rtol=1e-3, atol=1e-4)


def on_a_rank(path):
    """Losses of this rank's half of the rows, and the gradient of all ranks."""
    distributed.start(distributed.find_rank(), torch.device("cpu"), 60)
    half, found = [slice(3), slice(3, 6)][torch.distributed.get_rank()], {}
    for case in ("default", "gte"):
        kind = getattr(ours, NAMES[case == "gte"])
        loss = kind(load(path), gather_across_devices=True, **CASES[case])
        value = loss_of(loss, COLUMNS, half)
        value.backward()
        for p in loss.model.parameters():
            if p.grad is not None:
                torch.distributed.all_reduce(p.grad)
        found[case] = value.item(), gradient(loss.model).tolist()
    distributed.stop()
    return found


def test_ranks_share_negatives_and_know_duplicates_of_each_other(path):
    one, two = on_ranks(2, on_a_rank, path)
    for case in one:
        loss = ours.MultipleNegativesRankingLoss(load(path), **CASES[case])
        value = loss_of(loss, COLUMNS)
        value.backward()
        assert (one[case][0] + two[case][0]) / 2 == pytest.approx(value.item(), rel=1e-5)
        got, want = torch.tensor(one[case][1]), gradient(loss.model)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"hardness_mode": "all_negatives", "hardness_strength": 5.0},
        {"similarity_fct": lambda a, b: a @ b.T},
    ],
)
def test_what_is_not_fused_runs_theirs_with_one_warning(path, name, options):
    model = load(path)
    with pytest.warns(UserWarning, match="expected cos_sim or dot_score") as warned:
        got = loss_of(getattr(ours, name)(model, scale=2.0, **options), COLUMNS)
    assert len([w for w in warned if "cos_sim" in str(w.message)]) == 1
    assert torch.equal(got, loss_of(getattr(losses, name)(model, scale=2.0, **options), COLUMNS))


def test_a_text_is_its_tokens_wherever_the_padding_is():
    right = torch.tensor([[5, 6, 0], [7, 8, 9]])
    left = torch.tensor([[0, 5, 6], [7, 8, 9]])
    flat = torch.tensor([[5, 6, 7, 8, 9]])
    want = ours._text_ids({"input_ids": right, "attention_mask": (right > 0).long()})
    assert torch.equal(want, ours._text_ids({"input_ids": left, "attention_mask": left > 0}))
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert torch.equal(want, ours._text_ids({"input_ids": flat, "cu_seq_lens_q": bounds}))
    permuted = ours._text_ids({"input_ids": torch.tensor([[6, 5, 0], [8, 7, 9]])})
    assert len({*want.tolist(), *permuted.tolist()}) == 4
    assert ours._text_ids({"input_ids": right, "pixel_values": torch.ones(2, 3)}) is None
