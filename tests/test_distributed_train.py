"""Training on several ranks: losses and gradients of one rank, whatever computes the features."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import TINY, ended, metrics, on_ranks, said, start_command, tiny_run

from protoclip import distributed
from protoclip.config import LossConfig, ModelConfig, OptimConfig
from protoclip.data import Batch
from protoclip.losses import Losses, global_info_nce, prototype_term
from protoclip.model import build_model
from protoclip.prototypes import Episode, PrototypeSet
from protoclip.step import Stepper

STEPS, BATCH = 5, 24
FEATURES = ("extract", "reuse")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    np.save(path / "teacher.npy", np.random.default_rng(0).normal(size=(52, 5)).astype("f4"))
    return path


def metrics_of(folder, ranks, passes, *flags):
    """The lines of a run's steps."""
    name = f"{ranks}-{passes}{''.join(flags)}"
    argv = tiny_run(
        folder, name, "--batch-size", str(BATCH // ranks // passes), "--accum-freq", str(passes),
        "--lr", "1e-3", "--external-teacher", "teacher.npy", "--external-teacher-dim", "0",
        "--episode-size", str(2 * BATCH), "--max-steps", str(STEPS), *flags,
    )  # fmt: skip
    codes = ended(start_command(folder, argv, ranks, bare=True))
    assert codes == [0] * ranks, said(folder)
    return [line for line in metrics(folder / "logs" / name) if "loss" in line]


@pytest.fixture(scope="module")
def alone(folder):
    return {name: metrics_of(folder, 1, 1, "--episode-features", name) for name in FEATURES}


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(("ranks", "passes"), [(1, 3), (2, 3), (3, 1)])
def test_any_number_of_ranks_and_passes_gives_the_losses_of_one(
    folder, alone, ranks, passes, features
):
    lines = metrics_of(folder, ranks, passes, "--episode-features", features)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, want in zip(lines, alone[features], strict=True):
        for name in ("loss", "contrastive_loss", "proto_loss", "external_loss", "image_inertia"):
            assert (name in line) == (name in want)
            if name in want:
                # Of unit rows the inertia is a small difference: 1e-6 is their rounding.
                bound = {"rel": 3e-4, "abs": 1e-6 if name == "image_inertia" else 0.0}
                assert line[name] == pytest.approx(want[name], **bound), (name, line["step"])
        assert line["grad_norm"] == pytest.approx(want["grad_norm"], rel=3e-3)
    names = {name for line in lines for name in line}
    assert {"external_loss", "proto_loss", "image_inertia"} <= names


SIGLIP = "--siglip", "--dedup", "caption"


@pytest.mark.parametrize(
    ("ranks", "passes", "flags"),
    [(3, 1, ["--method", "clip"]), (3, 1, ["--method", "clip", *SIGLIP]), (2, 3, SIGLIP)],
)
def test_clip_and_siglip_on_ranks(folder, ranks, passes, flags):
    lines, alone = (metrics_of(folder, *split, *flags) for split in ((ranks, passes), (1, 1)))
    names = ("loss", "logit_bias") if "--siglip" in flags else ("loss",)
    for name in names:
        got, want = ([line[name] for line in own] for own in (lines, alone))
        assert len(got) == STEPS and got == pytest.approx(want, rel=3e-4)
    assert ("proto_loss" in lines[-1]) == ("clip" not in flags)


class ExactLoss:
    """InfoNCE and prototypes behind the heads, in fp64 where the features are."""

    config = LossConfig()

    def __init__(self, model):
        self.model = model

    def __call__(self, encoded, projected, index, logit_scale, proto_scale, episode, **_):
        unit = [F.normalize(u, dim=1) for u in (encoded.image, encoded.text)]
        total = global_info_nce(*unit, logit_scale)
        if episode is not None:
            image, text = self.model.image_head(unit[0]), self.model.text_head(unit[1])
            features = {"image": F.normalize(image, dim=1), "text": F.normalize(text, dim=1)}
            ranks = {"over_ranks": distributed.is_distributed()}
            labels = episode.labels_of(index)
            term = prototype_term(features, labels, episode.sets, proto_scale, **ranks)
            total = total + term.loss
        return Losses(total, {}, {})


def gradients(path):
    """fp64 gradients by name of a step, without and with prototypes, in one pass and in two."""
    distributed.start(distributed.find_rank(), torch.device("cpu"), 60)
    torch.manual_seed(0)
    model = build_model(ModelConfig(str(path), projection_dim=8, projection_hidden_dim=24)).double()
    pixels = torch.randn(BATCH, 3, 16, 16, dtype=torch.float64)
    tokens = torch.randint(1, 49000, (BATCH, 12))
    labels, sets = torch.randint(6, (BATCH,)), []
    labels[:9:2] = -100  # ranks have unequal numbers of samples with a label
    for source, student in (("text", "image"), ("image", "text")):
        prototypes, targets = torch.randn(2, 6, 8, dtype=torch.float64)
        sets.append(PrototypeSet(source, student, prototypes, targets))
    stepper = Stepper(model, ExactLoss(model), OptimConfig(grad_clip_norm=0))
    by_source = dict.fromkeys(("text", "image"), labels.int())
    trained = Episode(torch.arange(BATCH), by_source, {}, tuple(sets))
    own, found = torch.arange(BATCH)[distributed.own_slice(BATCH)], {}
    for episode in (None, trained):
        for passes in (1, 2):
            parts = [Batch(i, pixels[i], tokens[i]) for i in own.chunk(passes)]
            stepper.step(0, parts, episode, project=False, lr=0.0)
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            embedding = grads.pop("clip.token_embedding.weight")[tokens.unique()]
            grads = {name: grad.numpy().copy() for name, grad in grads.items()}
            found[episode is not None, passes] = grads | {"embedding": embedding.numpy()}
    distributed.stop()
    return found


def test_ranks_and_passes_give_the_exact_gradients(tmp_path):
    """Of parameters that a phase does not train there are none."""
    path = tmp_path / "nano.json"
    path.write_text(json.dumps(TINY))
    ((alone,), both) = (on_ranks(ranks, gradients, path) for ranks in (1, 2))
    for found in (alone, *both):
        for (prototypes, _), grads in found.items():
            want = alone[prototypes, 1]
            assert set(grads) == set(want) and ("logit_scale_proto" in want) == prototypes
            bound = 1e-12 * max(np.abs(grad).max() for grad in want.values())
            assert all(np.abs(grads[name] - want[name]).max() <= bound for name in want)
