"""A step's prototype labels come from features stored before it, whatever its own features are."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from ranks import TINY, config_of, metrics, on_ranks

from protoclip import checkpoint, distributed, train
from protoclip.config import ProtoConfig
from protoclip.data import open_dataset
from protoclip.data.loader import EpochOrder
from protoclip.feature_store import NEVER
from protoclip.losses import ProtoClipLoss, prototypes
from protoclip.model import Encoded, build_model
from protoclip.ops.checks import LEFT_OUT
from protoclip.prototypes import balanced_labels
from protoclip.run_folder import NullRunFolder
from protoclip.schedule import make_plan
from protoclip.train import Setup, Trainer

SAMPLES, BATCH, STEPS = 48, 12, 11
NOISY = 9  # in the third pass over the data: every sample has a stored row


class LabelsOfSteps:
    """Stands in for ``prototype_losses`` and keeps the labels that every step was given."""

    def __init__(self):
        self.calls = []
        self.original = prototypes.prototype_losses

    def __call__(self, features, banks, scale, **options):
        self.calls += [bank.labels.numpy().copy() for bank in banks]
        return self.original(features, banks, scale, **options)


def labels_of_run(folder, flags, noisy):
    """The labels that this rank's steps were given; step NOISY sees noise for features."""
    distributed.start(distributed.find_rank(), torch.device("cpu"), 60)
    model_file = folder / f"model-{distributed.rank()}.json"
    model_file.write_text(json.dumps(TINY))
    config = config_of(
        "--model", str(model_file), "--batch-size", str(BATCH // distributed.world_size()),
        "--max-steps", str(STEPS), "--infonce-warmup-epoch", "1", "--k", "4", *flags,
    )  # fmt: skip
    dataset = open_dataset(f"builtin:shapes:{SAMPLES}")
    torch.manual_seed(0)
    model = build_model(config.model)
    teacher = torch.randn(len(dataset), 5)
    plan, order = make_plan(config, len(dataset)), EpochOrder(dataset)
    setup = Setup(config, plan, dataset, order, torch.device("cpu"), "fp32", teacher)
    (folder / "checkpoints").mkdir(exist_ok=True)
    trainer = Trainer(setup, model, NullRunFolder(folder))
    project, labels_by_step = model.project, {}
    recorder = prototypes.prototype_losses = LabelsOfSteps()

    def noise_at_the_step(encoded):
        recorder.calls = labels_by_step.setdefault(trainer.step, [])
        projected = project(encoded)
        if noisy and trainer.step == NOISY and model.training:
            projected = Encoded(noise_like(projected.image), noise_like(projected.text))
        return projected

    model.project = noise_at_the_step
    trainer.run()
    prototypes.prototype_losses = recorder.original
    distributed.stop()
    return labels_by_step


def noise_like(h):
    """Unit rows without information, with a gradient of zero."""
    return F.normalize(torch.randn(h.shape), dim=1) + 0 * h


MODES = [
    "--episode-features reuse",
    "--episode-features reuse --episode-size 24",
    "--episode-features reuse --episode-size 24 --episode-replacement",
    "--episode-features reuse --accum-freq 2 --batch-size 6",
    "--episode-features extract",
]


@pytest.mark.parametrize(
    ("ranks", "mode"), [(1, mode) for mode in MODES] + [(2, MODES[0]), (2, MODES[1]), (4, MODES[1])]
)
def test_labels_do_not_depend_on_the_features_of_their_step(tmp_path, ranks, mode):
    """All sources: images, texts and a teacher. Up to the noisy step the runs are the same."""
    calm_ranks, noisy_ranks = (
        on_ranks(ranks, labels_of_run, tmp_path, mode.split(), noisy) for noisy in (False, True)
    )
    for calm, noisy in zip(calm_ranks, noisy_ranks, strict=True):
        assert calm.keys() == noisy.keys() and len(calm[NOISY]) == 4  # sources x students
        for step in range(NOISY + 1):
            for want, labels in zip(calm[step], noisy[step], strict=True):
                assert (labels == want).all(), step
        assert all((labels != LEFT_OUT).any() for labels in noisy[NOISY])


def test_a_bad_sample_has_no_label_and_its_replacement_keeps_its_newest_row(
    tmp_path, nano, no_page
):
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
    training = checkpoint.load_newest(tmp_path / "run")[1]["protoclip"]["training"]
    episode, written = training["episode"], training["features"]["written"]
    seventh = torch.arange(40) == 7
    for labels in episode["labels"].values():
        assert torch.equal(labels == LEFT_OUT, seventh[episode["positions"]])
    assert (written[seventh] == NEVER).all() and (written[~seventh] == 2).all()
    labelled = [
        line["image_labelled"] for line in metrics(tmp_path / "run") if "image_labelled" in line
    ]
    assert labelled == pytest.approx([39 / 40, 39 / 40])


def pairs(samples, seed=0, d=12):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(6, d, generator=generator)
    rows = centers[samples % 6] + 0.6 * torch.randn(len(samples), d, generator=generator)
    texts = rows + 0.6 * torch.randn(len(samples), d, generator=generator)
    return F.normalize(rows, dim=1), F.normalize(texts, dim=1)


def labels_of_loop(noisy, keys):
    """The labels of six steps over 40 samples of a loop of one's own."""
    loss = ProtoClipLoss(proto=ProtoConfig(queue=20, k=4, capacity=40))
    recorder = prototypes.prototype_losses = LabelsOfSteps()
    try:
        for step in range(6):
            samples = torch.arange(20 * (step % 2), 20 * (step % 2) + 20)
            image, text = pairs(samples, seed=7 if noisy and step == 5 else step)
            if noisy and step == 5:
                image, text = image.flip(0), -text
            loss(image.requires_grad_(), text, torch.tensor(14.0), index=keys[samples]).backward()
    finally:
        prototypes.prototype_losses = recorder.original
    return recorder.calls


@pytest.mark.parametrize("keys", [torch.arange(40), -(2**60) + 17 * torch.arange(40)])
def test_index_gives_the_labels_of_stored_rows_in_any_loop(keys):
    """Positions or hashes: the labels of a step's features do not depend on them."""
    calm, noisy = labels_of_loop(False, keys), labels_of_loop(True, keys)
    assert len(calm) == len(noisy) == 10  # five steps, images and texts
    assert all((a == b).all() for a, b in zip(calm, noisy, strict=True))
    # In step 1 the samples are new; from step 2 on each was seen two steps ago.
    assert (calm[0] == LEFT_OUT).all() and all((labels != LEFT_OUT).all() for labels in calm[2:])


def loop_over_ranks():
    """This rank's labels, losses and last gradient of a loop in which each step's second half is
    new, so that only the first rank of two knows its samples."""
    distributed.start(distributed.find_rank(), torch.device("cpu"), 60)
    number, ranks = distributed.rank(), distributed.world_size()
    loss = ProtoClipLoss(
        local_loss=True, gather_with_grad=True, rank=number, world_size=ranks,
        proto=ProtoConfig(queue=20, k=4, capacity=60),
    )  # fmt: skip
    recorder = prototypes.prototype_losses = LabelsOfSteps()
    values, own = [], distributed.own_slice(20)
    for step in range(4):
        samples = torch.cat([torch.arange(10), torch.arange(10 * step + 10, 10 * step + 20)])
        image, text = (rows[own].clone().requires_grad_() for rows in pairs(samples, seed=step))
        value = loss(image, text, torch.tensor(14.0), index=samples[own])
        value.backward()
        values.append(float(value))
    prototypes.prototype_losses = recorder.original
    distributed.stop()
    return recorder.calls, values, (image.grad / ranks).numpy(), (text.grad / ranks).numpy()


def test_index_over_ranks_is_that_of_one_process():
    """Ranks that know different numbers of their samples: the mean is over all labelled ones."""
    (alone,) = on_ranks(1, loop_over_ranks)
    first, second = on_ranks(2, loop_over_ranks)
    for whole, *parts in zip(alone[0], first[0], second[0], strict=True):
        assert (whole == np.concatenate(parts)).all()
        assert (parts[0] >= 0).all() and (parts[1] == LEFT_OUT).all()
    assert len(alone[0]) == 6
    for whole, *parts in zip(alone[1], first[1], second[1], strict=True):
        assert sum(parts) / 2 == pytest.approx(whole, rel=1e-5)
    for whole, *parts in zip(alone[2:], first[2:], second[2:], strict=True):
        assert np.abs(np.concatenate(parts) - whole).max() < 1e-5 * np.abs(whole).max()


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        (torch.arange(19), ValueError, r"expected index of shape \[20\], got \[19\]"),
        (torch.arange(20).float(), TypeError, "expected index as int64"),
        (list(range(20)), TypeError, "expected index as a Tensor, got list"),
    ],
    ids=("length", "dtype", "type"),
)
def test_a_wrong_index_is_refused(index, error, words):
    with pytest.raises(error, match=words):
        ProtoClipLoss()(*pairs(torch.arange(20)), torch.tensor(14.0), index=index)


def test_a_sample_that_left_the_capacity_has_no_label():
    loss = ProtoClipLoss(proto=ProtoConfig(queue=20, k=4, capacity=20))
    for step in range(3):
        samples = torch.arange(20 * step, 20 * step + 20)
        loss(*pairs(samples), torch.tensor(14.0), index=samples)
        image, text = pairs(samples)
        loss(image.requires_grad_(), text, torch.tensor(14.0), index=samples)
    labels = loss.online.labels_of({}, torch.tensor([3, 45, 59]))
    assert labels["image"][0] == LEFT_OUT and (labels["text"][1:] >= 0).all()


def test_a_balanced_assignment_uses_all_prototypes_where_the_nearest_would_use_one():
    """Features that have collapsed: the nearest prototype is the same for all."""
    torch.manual_seed(0)
    centroids = F.normalize(torch.randn(8, 6), dim=1)
    rows = F.normalize(centroids[:1] + 0.05 * torch.randn(400, 6), dim=1)
    nearest = torch.cdist(rows, centroids).argmin(dim=1)
    assert len(nearest.unique()) == 1
    labels = balanced_labels(rows[:200], rows[200:], centroids, None)
    counts = torch.bincount(labels, minlength=8)
    assert (counts > 0).all() and counts.max() < 4 * counts.min()
