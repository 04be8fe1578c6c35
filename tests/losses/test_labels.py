"""A step's prototype labels come from features stored before it, whatever its own features are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from ranks import TINY, in_group, metrics
from steps import trainer_of
from torch import Tensor

from protoclip import distributed, train
from protoclip.data import open_dataset
from protoclip.episodes.feature_store import NEVER
from protoclip.losses import ProtoClipLoss, prototypes
from protoclip.losses.online import balanced_labels
from protoclip.model import Encoded, build_model
from protoclip.ops.checks import LEFT_OUT
from protoclip.runs import checkpoint
from protoclip.settings.config import ModelConfig, ProtoConfig
from protoclip.training.loop import Trainer

SAMPLES = 48
BATCH = 12
STEPS = 11
NOISY_STEP = 9  # in the third pass over the data: every sample has a stored row
CALLER = prototypes  # the module that calls prototype_losses


class LabelsOfSteps:
    """Stands in for ``prototype_losses`` and keeps the labels that every step was given."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.calls: list[np.ndarray] = []

    def __call__(self, features: Tensor, banks: Any, scale: Tensor, **options: Any) -> Any:
        self.calls += [bank.labels.numpy().copy() for bank in banks]
        return self.original(features, banks, scale, **options)


@contextmanager
def recorded_labels() -> Iterator[LabelsOfSteps]:
    original = CALLER.prototype_losses
    CALLER.prototype_losses = recorder = LabelsOfSteps(original)
    try:
        yield recorder
    finally:
        CALLER.prototype_losses = original


def noise_like(rows: Tensor) -> Tensor:
    """Unit rows without information, with a gradient of zero."""
    return F.normalize(torch.randn(rows.shape), dim=1) + 0 * rows


def tiny_trainer(folder: Path, flags: list[str]) -> Trainer:
    """With prototypes of its own and of a teacher of random features."""
    model_file = folder / f"model-{distributed.rank()}.json"
    model_file.write_text(json.dumps(TINY))
    torch.manual_seed(0)
    model = build_model(ModelConfig(model=str(model_file)))
    words = [
        "--method", "protoclip", "--batch-size", str(BATCH // distributed.world_size()),
        "--max-steps", str(STEPS), "--infonce-warmup-epoch", "1", "--k", "4",
        "--w-proto", "1", *flags,
    ]  # fmt: skip
    (folder / "checkpoints").mkdir(exist_ok=True)
    return trainer_of(
        model,
        None,
        *words,
        dataset=open_dataset(f"builtin:shapes:{SAMPLES}"),
        folder=folder,
        teacher=torch.randn(SAMPLES, 5),
    )


def labels_of_run(folder: Path, flags: list[str], noisy: bool) -> dict[int, list[np.ndarray]]:
    """The labels that this rank's steps were given; if ``noisy``, NOISY_STEP sees noise for
    features."""
    trainer = tiny_trainer(folder, flags)
    model = trainer.run.model
    project = trainer.towers.project
    labels_by_step: dict[int, list[np.ndarray]] = {}

    with recorded_labels() as recorder:

        def project_or_noise(encoded: Encoded) -> Encoded:
            recorder.calls = labels_by_step.setdefault(trainer.step, [])
            projected = project(encoded)
            if noisy and trainer.step == NOISY_STEP and model.training:
                return Encoded(noise_like(projected.image), noise_like(projected.text))
            return projected

        trainer.towers.project = project_or_noise
        trainer.train()
    return labels_by_step


def calm_and_noisy(folder: Path, flags: list[str]) -> list[dict[int, list[np.ndarray]]]:
    return [labels_of_run(folder, flags, noisy) for noisy in (False, True)]


MODES = {
    "reuse": "--episode-features reuse",
    "half the data": "--episode-features reuse --episode-size 24",
    "replacement": "--episode-features reuse --episode-size 24 --episode-replacement",
    "accumulation": "--episode-features reuse --accum-freq 2 --batch-size 6",
    "extract": "--episode-features extract",
}


@pytest.mark.parametrize(
    ("ranks", "mode"),
    [(1, mode) for mode in MODES] + [(2, "reuse"), (3, "half the data")],
)
def test_labels_do_not_depend_on_the_features_of_their_step(
    tmp_path: Path, ranks: int, mode: str
) -> None:
    """All sources: images, texts and a teacher. Up to the noisy step the runs are the same."""
    for calm, noisy in in_group(ranks, calm_and_noisy, tmp_path, MODES[mode].split()):
        assert calm.keys() == noisy.keys() and len(calm[NOISY_STEP]) == 4  # sources x students
        for step in range(NOISY_STEP + 1):
            for expected, labels in zip(calm[step], noisy[step], strict=True):
                assert (labels == expected).all(), step
        assert all((labels != LEFT_OUT).any() for labels in noisy[NOISY_STEP])


def test_a_bad_sample_has_no_label_and_its_replacement_keeps_its_newest_row(
    tmp_path: Path, nano: Path, no_evaluation: None
) -> None:
    """Picture 7 does not decode; in every pass another draw takes its place."""
    rows = ["filepath\ttitle"]
    for i in range(40):
        Image.new("RGB", (24, 24), (6 * i, 90, 200)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png\tsquare number {i}")
    (tmp_path / "7.png").write_bytes(b"no picture")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    assert train.main([
        "--train-data", str(tmp_path / "pairs.csv"), "--model", str(nano), "--batch-size", "8",
        "--epochs", "3", "--k", "3", "--infonce-warmup-epoch", "1", "--episode-features", "reuse",
        "--logs", str(tmp_path), "--name", "run", "--report-to", "none", "--val-frequency", "0",
    ]) == 0  # fmt: skip
    _, payload = checkpoint.load_newest(tmp_path / "run")
    training = payload["protoclip"]["training"]
    episode = training["episode"]
    is_bad = torch.arange(40) == 7
    for labels in episode["labels"].values():
        assert torch.equal(labels == LEFT_OUT, is_bad[episode["positions"]])
    written = training["features"]["written"]
    assert (written[is_bad] == NEVER).all() and (written[~is_bad] == 2).all()
    labelled = [
        line["image_labelled"] for line in metrics(tmp_path / "run") if "image_labelled" in line
    ]
    assert labelled == pytest.approx([39 / 40, 39 / 40])


# ---- a loop of one's own, with index= ----


class Pairs(NamedTuple):
    image: Tensor  # [N, D]
    text: Tensor  # [N, D]


def pairs(samples: Tensor, seed: int = 0, d: int = 12) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(6, d, generator=generator)
    image = centers[samples % 6] + 0.6 * torch.randn(len(samples), d, generator=generator)
    text = image + 0.6 * torch.randn(len(samples), d, generator=generator)
    return Pairs(F.normalize(image, dim=1), F.normalize(text, dim=1))


SCALE = torch.tensor(14.0)


def labels_of_loop(keys: Tensor, noisy: bool) -> list[np.ndarray]:
    """The labels of six steps over 40 samples; if ``noisy``, the last sees other features."""
    loss = ProtoClipLoss(proto=ProtoConfig(queue=20, k=4, capacity=40))
    with recorded_labels() as recorder:
        for step in range(6):
            first = 20 * (step % 2)
            samples = torch.arange(first, first + 20)
            image, text = pairs(samples, seed=step)
            if noisy and step == 5:
                noise = pairs(samples, seed=7)
                image = noise.image.flip(0)
                text = -noise.text
            loss(image.requires_grad_(), text, SCALE, index=keys[samples]).backward()
    return recorder.calls


@pytest.mark.parametrize("keys", [torch.arange(40), -(2**60) + 17 * torch.arange(40)])
def test_index_gives_the_labels_of_stored_rows_in_any_loop(keys: Tensor) -> None:
    """Positions or hashes: the labels of a step's features do not depend on them."""
    calm = labels_of_loop(keys, noisy=False)
    noisy = labels_of_loop(keys, noisy=True)
    assert len(calm) == len(noisy) == 10  # five steps, images and texts
    for expected, labels in zip(calm, noisy, strict=True):
        assert (labels == expected).all()
    # In step 1 the samples are new; from step 2 on each was seen two steps ago.
    assert (calm[0] == LEFT_OUT).all()
    assert all((labels != LEFT_OUT).all() for labels in calm[2:])


class Loop(NamedTuple):
    """Of one rank."""

    labels: list[np.ndarray]
    losses: list[float]
    image_gradient: np.ndarray  # of the last step, as DDP averages it
    text_gradient: np.ndarray


def loop_over_ranks() -> Loop:
    """Each step's second half is new, so that only the first rank of two knows its samples."""
    ranks = distributed.world_size()
    mine = distributed.own_slice(20)
    loss = ProtoClipLoss(
        local_loss=True,
        gather_with_grad=True,
        rank=distributed.rank(),
        world_size=ranks,
        proto=ProtoConfig(queue=20, k=4, capacity=60),
    )
    values = []
    with recorded_labels() as recorder:
        for step in range(4):
            samples = torch.cat([torch.arange(10), torch.arange(10 * step + 10, 10 * step + 20)])
            batch = pairs(samples, seed=step)
            image = batch.image[mine].clone().requires_grad_()
            text = batch.text[mine].clone().requires_grad_()
            value = loss(image, text, SCALE, index=samples[mine])
            value.backward()
            values.append(float(value))
    return Loop(recorder.calls, values, (image.grad / ranks).numpy(), (text.grad / ranks).numpy())


def test_index_over_ranks_is_that_of_one_process() -> None:
    """Ranks that know different numbers of their samples: the mean is over all labelled ones."""
    (whole,) = in_group(1, loop_over_ranks)
    first, second = in_group(2, loop_over_ranks)
    assert len(whole.labels) == 6
    for expected, of_first, of_second in zip(
        whole.labels, first.labels, second.labels, strict=True
    ):
        assert (expected == np.concatenate([of_first, of_second])).all()
        assert (of_first >= 0).all() and (of_second == LEFT_OUT).all()
    means = [sum(values) / 2 for values in zip(first.losses, second.losses, strict=True)]
    assert means == pytest.approx(whole.losses, rel=1e-5)
    for name in ("image_gradient", "text_gradient"):
        expected = getattr(whole, name)
        gradient = np.concatenate([getattr(first, name), getattr(second, name)])
        assert np.abs(gradient - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        (torch.arange(19), ValueError, r"expected index of shape \[20\], got \[19\]"),
        (torch.arange(20).float(), TypeError, "expected index as int64"),
        (list(range(20)), TypeError, "expected index as a Tensor, got list"),
    ],
    ids=("length", "dtype", "type"),
)
def test_a_wrong_index_is_refused(index: Any, error: type[Exception], words: str) -> None:
    image, text = pairs(torch.arange(20))
    with pytest.raises(error, match=words):
        ProtoClipLoss()(image, text, SCALE, index=index)


@pytest.mark.smoke
def test_a_sample_that_left_the_capacity_has_no_label() -> None:
    loss = ProtoClipLoss(proto=ProtoConfig(queue=20, k=4, capacity=20))
    for step in range(3):
        samples = torch.arange(20 * step, 20 * step + 20)
        image, text = pairs(samples)
        loss(image, text, SCALE, index=samples)
        loss(image.requires_grad_(), text, SCALE, index=samples)
    labels = loss.online.labels_of({}, torch.tensor([3, 45, 59]))
    assert labels["image"][0] == LEFT_OUT and (labels["text"][1:] >= 0).all()


def test_a_balanced_assignment_uses_all_prototypes_where_the_nearest_would_use_one() -> None:
    """Features that have collapsed: the nearest prototype is the same for all."""
    torch.manual_seed(0)
    centroids = F.normalize(torch.randn(8, 6), dim=1)
    rows = F.normalize(centroids[:1] + 0.05 * torch.randn(400, 6), dim=1)
    nearest = torch.cdist(rows, centroids).argmin(dim=1)
    assert len(nearest.unique()) == 1
    labels = balanced_labels(rows[:200], rows[200:], centroids, None)
    counts = torch.bincount(labels, minlength=8)
    assert (counts > 0).all() and counts.max() < 4 * counts.min()
