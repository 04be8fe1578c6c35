"""Training on several ranks: losses and gradients of one rank, whatever computes the features."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import (
    TINY,
    bare_run,
    exit_codes,
    in_group,
    logs_of,
    metrics,
    on_ranks,
    output_of,
    start_command,
    tiny_run,
)
from steps import trainer_of
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import protoclip
from protoclip import distributed, train
from protoclip.data import Batch
from protoclip.episodes.prototypes import Episode, PrototypeSet
from protoclip.losses.objective import Losses, ProtoLoss
from protoclip.losses.prototypes import prototype_term
from protoclip.model import Encoded, ProtoModel, build_model
from protoclip.settings.config import LossConfig, ModelConfig

STEPS = 5
BATCH = 24
FEATURES = ["extract", "reuse"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    np.save(path / "teacher.npy", np.random.default_rng(0).normal(size=(52, 5)).astype("f4"))
    return path


def metrics_of_run(
    folder: Path, flags: list[str], *, ranks: int = 1, passes: int = 1
) -> list[dict[str, Any]]:
    """The lines of a run's steps; ``passes``: in which the batch of each step is computed."""
    name = f"{ranks}-{passes}{''.join(flags)}"
    argv = tiny_run(
        folder, name, "--batch-size", str(BATCH // ranks // passes), "--accum-freq", str(passes),
        "--lr", "1e-3", "--w-proto", "1",
        "--external-teacher", "teacher.npy", "--external-teacher-dim", "0",
        "--episode-size", str(2 * BATCH), "--max-steps", str(STEPS),
    )  # fmt: skip
    codes = exit_codes(start_command(folder, argv + flags, ranks, bare=True))
    assert codes == [0] * ranks, logs_of(folder)
    return [line for line in metrics(folder / "logs" / name) if "loss" in line]


@pytest.fixture(scope="module")
def on_one_rank(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: metrics_of_run(folder, ["--episode-features", name]) for name in FEATURES}


LOSSES = ("loss", "contrastive_loss", "proto_loss", "external_loss")


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(("ranks", "passes"), [(1, 3), (2, 3), (3, 1)])
def test_any_number_of_ranks_and_passes_gives_the_losses_of_one(
    folder: Path,
    on_one_rank: dict[str, list[dict[str, Any]]],
    ranks: int,
    passes: int,
    features: str,
) -> None:
    lines = metrics_of_run(folder, ["--episode-features", features], ranks=ranks, passes=passes)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, expected in zip(lines, on_one_rank[features], strict=True):
        for name in (*LOSSES, "image_inertia"):
            assert (name in line) == (name in expected)
            if name in expected:
                # Of unit rows the inertia is a small difference: 1e-6 is their rounding.
                noise = 1e-6 if name == "image_inertia" else 0.0
                bound = pytest.approx(expected[name], rel=3e-4, abs=noise)
                assert line[name] == bound, (name, line["step"])
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=3e-3)
    names = {name for line in lines for name in line}
    assert {"external_loss", "proto_loss", "image_inertia"} <= names


CLIP = ["--method", "clip"]
SIGLIP = ["--siglip", "--dedup", "caption"]


@pytest.mark.parametrize(
    ("ranks", "passes", "flags"), [(3, 1, CLIP), (3, 1, CLIP + SIGLIP), (2, 3, SIGLIP)]
)
def test_clip_and_siglip_on_ranks_have_the_losses_of_one(
    folder: Path, ranks: int, passes: int, flags: list[str]
) -> None:
    lines = metrics_of_run(folder, flags, ranks=ranks, passes=passes)
    expected = metrics_of_run(folder, flags)
    for name in ("loss", "logit_bias") if "--siglip" in flags else ("loss",):
        values = [line[name] for line in lines]
        assert len(values) == STEPS
        assert values == pytest.approx([line[name] for line in expected], rel=3e-4)
    assert ("proto_loss" in lines[-1]) == ("clip" not in flags)


class ExactLoss:
    """InfoNCE and prototypes behind the heads, in fp64 where the features are."""

    config = LossConfig()
    trains_heads = ProtoLoss.trains_heads

    def __init__(self, model: ProtoModel) -> None:
        self.model = model

    def __call__(
        self,
        encoded: Encoded,
        projected: Encoded | None,
        index: Tensor,
        logit_scale: Tensor,
        proto_logit_scale: Tensor,
        episode: Episode | None,
        **_: Any,
    ) -> Losses:
        image = F.normalize(encoded.image, dim=1)
        text = F.normalize(encoded.text, dim=1)
        total = protoclip.info_nce(image, text, logit_scale, group=dist.group.WORLD)
        if episode is not None:
            features = {
                "image": F.normalize(self.model.image_head(image), dim=1),
                "text": F.normalize(self.model.text_head(text), dim=1),
            }
            term = prototype_term(
                features,
                episode.labels_of(index),
                episode.sets,
                proto_logit_scale,
                group=dist.group.WORLD,
            )
            total = total + term.loss
        return Losses(total, {}, {})


class Step(NamedTuple):
    """Without or with prototypes, in one pass or in two."""

    prototypes: bool
    passes: int


def random_episode() -> Episode:
    labels = torch.randint(6, (BATCH,))
    labels[:9:2] = -100  # ranks have unequal numbers of samples with a label
    sets = []
    for source, student in (("text", "image"), ("image", "text")):
        prototypes, targets = torch.randn(2, 6, 8, dtype=torch.float64)
        sets.append(PrototypeSet(source, student, prototypes, targets))
    labels_by_source = dict.fromkeys(("text", "image"), labels.int())
    return Episode(torch.arange(BATCH), labels_by_source, {}, tuple(sets))


def gradients_of_steps(model_file: Path) -> dict[Step, dict[str, np.ndarray]]:
    """In fp64, by the parameter's name."""
    torch.manual_seed(0)
    config = ModelConfig(str(model_file), projection_dim=8, projection_hidden_dim=24)
    model = build_model(config).double()
    pixels = torch.randn(BATCH, 3, 16, 16, dtype=torch.float64)
    tokens = torch.randint(1, 49000, (BATCH, 12))
    episode = random_episode()
    trainer = trainer_of(model, None, "--grad-clip-norm", "0", "--lr", "0")
    trainer.loss = ExactLoss(model)
    mine = torch.arange(BATCH)[distributed.own_slice(BATCH)]
    gradients = {}
    for step in (Step(False, 1), Step(False, 2), Step(True, 1), Step(True, 2)):
        parts = [Batch(rows, pixels[rows], tokens[rows]) for rows in mine.chunk(step.passes)]
        trainer.episode = episode if step.prototypes else None
        trainer.take_step(0, parts)
        by_name = {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        embedding = by_name.pop("clip.token_embedding.weight")
        by_name["embedding"] = embedding[tokens.unique()]
        gradients[step] = {name: gradient.numpy().copy() for name, gradient in by_name.items()}
    return gradients


def test_ranks_and_passes_give_the_exact_gradients(tmp_path: Path) -> None:
    """Of parameters that a phase does not train there are none."""
    path = tmp_path / "nano.json"
    path.write_text(json.dumps(TINY))
    (on_one_rank,) = in_group(1, gradients_of_steps, path)
    for by_step in (on_one_rank, *in_group(2, gradients_of_steps, path)):
        for step, gradients in by_step.items():
            expected = on_one_rank[Step(step.prototypes, passes=1)]
            assert set(gradients) == set(expected)
            assert ("proto_log_scale" in expected) == step.prototypes
            bound = 1e-12 * max(np.abs(gradient).max() for gradient in expected.values())
            for name, gradient in gradients.items():
                assert np.abs(gradient - expected[name]).max() <= bound, name


def threads_that_end_with_ddp() -> int:
    """After the process has left its group."""
    distributed.start(distributed.find_rank(), torch.device("cpu"), 60)
    module = DistributedDataParallel(torch.nn.Linear(8, 8))
    module(torch.zeros(4, 8)).sum().backward()
    distributed.stop()
    threads = len(os.listdir("/proc/self/task"))
    del module
    gc.collect()
    return threads - len(os.listdir("/proc/self/task"))


def test_ddp_that_outlives_its_group_waits_for_no_thread() -> None:
    """It would wait with Python's lock, which a thread of gloo may need to free its last work."""
    assert on_ranks(2, threads_that_end_with_ddp) == [0, 0]


def say_what_is_left_of_ddp() -> None:
    """When the run leaves its process group."""
    original = distributed.stop

    def stop() -> None:
        modules = [thing for thing in gc.get_objects() if type(thing) is DistributedDataParallel]
        print("DDP modules:", len(modules), file=sys.stderr, flush=True)
        original()

    distributed.stop = stop


def test_ddp_is_dropped_before_the_run_leaves_its_group(tmp_path: Path) -> None:
    """As the last owner of the group, DDP would end it, and wait for gloo's threads with Python's
    lock, which they may be waiting for."""
    argv = bare_run(tmp_path, "--max-steps", "6")
    processes = start_command(tmp_path, argv, fault=say_what_is_left_of_ddp, bare=True)
    assert exit_codes(processes) == [0, 0], logs_of(tmp_path)
    assert "DDP modules: 0" in output_of(tmp_path)[1], logs_of(tmp_path)


def peak_rate_of_a_resumed_run(folder: Path) -> float:
    """On a rank with a disk of its own; without the training."""
    rank = distributed.find_rank().rank
    (folder / f"disk{rank}").mkdir(exist_ok=True)
    os.chdir(folder / f"disk{rank}")
    seen: list[float] = []
    train._train = lambda config, *_: seen.append(config.optim.lr)
    train.main(["--resume", "run", "--max-steps", "9"])
    return seen[0]


def test_ranks_without_a_shared_folder_have_the_settings_of_the_resumed_run(tmp_path: Path) -> None:
    run = tmp_path / "disk0" / "run"
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"lr": 0.125}')
    assert on_ranks(2, peak_rate_of_a_resumed_run, tmp_path) == [0.125, 0.125]
