"""ProtoClipLoss: its prototypes, its value, and when its state moves."""

from __future__ import annotations

import copy
import itertools
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from budget import leaf
from ranks import on_ranks
from torch import Tensor, nn

import protoclip
from protoclip import openclip
from protoclip.losses import ProtoClipLoss
from protoclip.settings.config import ProtoConfig

SCALE = 14.3


class Pairs(NamedTuple):
    image: Tensor  # [N, D]
    text: Tensor  # [N, D]


def pairs(n: int = 40, d: int = 12, seed: int = 0) -> Pairs:
    """Unit rows with groups in them, the texts near the images."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(6, d, generator=generator)
    image = centers[torch.arange(n) % 6] + 0.6 * torch.randn(n, d, generator=generator)
    text = image + 0.6 * torch.randn(n, d, generator=generator)
    return Pairs(F.normalize(image, dim=1), F.normalize(text, dim=1))


class Call(NamedTuple):
    """What a call of a loss gave; gradients of the sum of its terms."""

    terms: dict[str, Tensor]
    gradients: dict[str, Tensor]  # by argument


def call(loss: nn.Module, image: Tensor, text: Tensor, **options: Any) -> Call:
    leaves = {
        "image_features": leaf(image),
        "text_features": leaf(text),
        "logit_scale": leaf(SCALE),
    }
    terms = loss(**leaves, **options, output_dict=True)
    sum(terms.values()).backward()
    return Call(
        {name: value.detach() for name, value in terms.items()},
        {name: tensor.grad for name, tensor in leaves.items()},
    )


def without(gradients: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: gradient - others[name] for name, gradient in gradients.items()}


def loss_with_prototypes(**options: Any) -> ProtoClipLoss:
    """From one batch of 40 that fills the queue."""
    settings = {"queue": 40, "k": 5, "every": 100} | options
    loss = ProtoClipLoss(proto=ProtoConfig(**settings))
    image, text = pairs(40)
    call(loss, image, text)
    assert loss.online.sets is not None
    return loss


def dense_loss(
    loss: ProtoClipLoss, image_features: Tensor, text_features: Tensor, logit_scale: Tensor
) -> Tensor:
    """docs/algorithm.md §2.3 with the [N, K] targets written out, in fp64."""
    features = {"image": image_features, "text": text_features}
    labels_by_source = loss.online.labels_of({n: x.float() for n, x in features.items()}, None)
    total = 0.0
    for prototype_set in loss.online.sets:
        labels = labels_by_source[prototype_set.source]
        centroids = loss.online.centroids[prototype_set.source].double()
        if loss.proto.target_temperature > 0:
            similarities = centroids @ centroids.T / loss.proto.target_temperature
            targets = similarities.softmax(dim=1)[labels]
        else:
            targets = F.one_hot(labels, len(centroids)).double()
        students = features[prototype_set.student]
        scale = loss.proto.logit_scale or logit_scale
        logits = scale * students @ prototype_set.prototypes.double().T
        total = total + F.cross_entropy(logits, targets) / 2
    return loss.proto.weight * total


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_temperature": 0.0},
        {"target_temperature": 0.3, "pbt": False},
        {"weight": 0.25, "logit_scale": 20.0},
    ],
    ids=str,
)
def test_loss_and_gradients_are_the_dense_ones(options: dict[str, Any]) -> None:
    loss = loss_with_prototypes(**options)
    image, text = pairs(23, seed=1)
    got = call(loss, image, text)
    assert set(got.terms) == {"contrastive_loss", "proto_loss"}
    leaves = {
        "image_features": leaf(image, torch.float64),
        "text_features": leaf(text, torch.float64),
        "logit_scale": leaf(torch.tensor(SCALE), torch.float64),
    }
    expected = dense_loss(loss, **leaves)
    assert torch.allclose(got.terms["proto_loss"].double(), expected, rtol=1e-5)
    in_fp32 = {name: tensor.float() for name, tensor in leaves.items()}
    contrastive_loss = protoclip.ClipLoss()(**in_fp32)
    (expected + contrastive_loss).backward()
    for name, gradient in got.gradients.items():
        truth = leaves[name].grad
        assert (gradient - truth).abs().max() < 1e-4 * truth.abs().max(), name


def test_without_output_dict_the_loss_is_one_number() -> None:
    loss = loss_with_prototypes()
    image, text = pairs(23, seed=1)
    total = loss(image, text, torch.tensor(SCALE))
    assert total.shape == () and total.dtype == torch.float32


@pytest.mark.smoke
def test_it_is_clip_loss_until_the_stated_step() -> None:
    loss = ProtoClipLoss(proto=ProtoConfig(queue=64, k=4))
    assert loss.steps_to_prototypes(20) == 4
    for step in range(6):
        image, text = pairs(20, seed=step)
        terms = call(loss, image, text).terms
        assert ("proto_loss" in terms) == (step >= 4)
        clip_loss = protoclip.ClipLoss()(image, text, torch.tensor(SCALE))
        assert torch.equal(terms["contrastive_loss"], clip_loss)
    assert loss.metrics["clusterings"] == 1 and loss.metrics["steps"] == 6
    assert 0 <= loss.metrics["image_proto_accuracy"] <= 1


def test_a_warmup_puts_prototypes_off() -> None:
    loss = ProtoClipLoss(proto=ProtoConfig(queue=64, k=4, warmup=7))
    assert loss.steps_to_prototypes(20) == 7


def test_prototypes_are_the_students_means_over_the_sources_clusters_of_the_newest_rows() -> None:
    loss = ProtoClipLoss(proto=ProtoConfig(queue=50, k=3, every=1))
    seen = {"image": torch.empty(0, 12), "text": torch.empty(0, 12)}
    batches = [pairs(20, seed=0), pairs(20, seed=1), pairs(20, seed=2), pairs(20, seed=3)]
    for image, text in [*batches, pairs(80, seed=9)]:
        call(loss, image, text)
        seen = {
            "image": torch.cat([seen["image"], image]),
            "text": torch.cat([seen["text"], text]),
        }
        newest = {name: rows[-50:] for name, rows in seen.items()}
        for prototype_set in loss.online.sets or []:
            source = prototype_set.source
            student = prototype_set.student
            assert source != student
            centroids = loss.online.centroids[source]
            labels = torch.cdist(newest[source], centroids).argmin(dim=1)
            means, _ = protoclip.segment_mean(newest[student], labels, len(centroids))
            assert torch.allclose(prototype_set.prototypes, means, atol=1e-6)
    assert loss.metrics["clusterings"] == 3 and len(loss.online.sets) == 2


def test_evaluation_and_no_grad_leave_the_state_alone() -> None:
    loss = loss_with_prototypes()
    image, text = pairs(seed=3)
    with torch.no_grad():
        assert "proto_loss" in loss(image, text, torch.tensor(SCALE), output_dict=True)
    assert loss.metrics["steps"] == 1
    loss.eval()
    call(loss, image, text)
    assert loss.metrics["steps"] == 1


def test_accumulated_calls_are_one_step() -> None:
    """OpenCLIP's --accum-freq 3: three calls with all rows, the gradient through a third each."""
    proto = ProtoConfig(queue=60, k=5, every=1)
    at_once = ProtoClipLoss(proto=proto)
    in_three = ProtoClipLoss(proto=proto, accum_freq=3)
    for step in range(3):
        image, text = pairs(60, seed=step)
        expected = call(at_once, image, text)
        sums = {
            "image_features": torch.zeros_like(image),
            "text_features": torch.zeros_like(text),
        }
        for first in (0, 20, 40):
            in_this_part = torch.zeros(60, 1)
            in_this_part[first : first + 20] = 1
            leaves = {"image_features": leaf(image), "text_features": leaf(text)}
            mixed = {
                name: rows * in_this_part + rows.detach() * (1 - in_this_part)
                for name, rows in leaves.items()
            }
            terms = in_three(**mixed, logit_scale=torch.tensor(SCALE), output_dict=True)
            torch.testing.assert_close(terms, expected.terms, rtol=0, atol=0)
            sum(terms.values()).backward()
            for name, rows in leaves.items():
                sums[name] += rows.grad
        for name, gradient in sums.items():
            assert torch.allclose(gradient, expected.gradients[name], atol=1e-6), name
        assert in_three.metrics == at_once.metrics
    assert at_once.metrics["clusterings"] == 3


def test_prototypes_live_behind_heads_that_the_model_owns() -> None:
    loss = ProtoClipLoss(proto=ProtoConfig(queue=40, k=5))
    image, text = pairs()
    heads = torch.nn.Linear(12, 4, bias=False)
    for _ in range(2):
        terms = loss(
            image,
            text,
            torch.tensor(SCALE),
            output_dict=True,
            image_projection=F.normalize(heads(image), dim=1),
            text_projection=F.normalize(heads(text), dim=1),
        )
    terms["proto_loss"].backward()
    assert heads.weight.grad.abs().sum() > 0
    assert loss.online.sets[0].prototypes.shape[1] == 4
    assert not list(loss.parameters()) and list(loss.state_dict()) == ["_extra_state"]


# ---- in a checkpoint ----


def indexed_call(loss: ProtoClipLoss, step: int, rows: int, indexed: bool) -> dict[str, Tensor]:
    """The terms of a step, with gradients on so that it counts."""
    image, text = pairs(rows, seed=step)
    index = torch.arange(rows) + rows * (step % 2) if indexed else None
    terms = loss(leaf(image), leaf(text), torch.tensor(SCALE), output_dict=True, index=index)
    return {name: value.detach() for name, value in terms.items()}


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("saved_after", [0, 2, 5])
def test_a_loaded_loss_goes_on_bit_for_bit(tmp_path: Path, indexed: bool, saved_after: int) -> None:
    """Before the queue is full, and between two clusterings."""
    proto = ProtoConfig(queue=60, k=4, every=3, capacity=80)
    alone = ProtoClipLoss(proto=proto)
    for step in range(saved_after):
        indexed_call(alone, step, 20, indexed)
    torch.save({"loss": alone.state_dict()}, tmp_path / "checkpoint.pt")
    resumed = ProtoClipLoss(proto=proto)
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["loss"])
    assert resumed.metrics == alone.metrics
    for step in range(saved_after, saved_after + 5):
        expected = indexed_call(alone, step, 20, indexed)
        torch.testing.assert_close(
            indexed_call(resumed, step, 20, indexed), expected, rtol=0, atol=0
        )
        assert ("proto_loss" in expected) == (step >= 3)
        assert resumed.metrics == alone.metrics
    assert alone.metrics["clusterings"] >= 1


def test_a_state_may_come_in_any_order() -> None:
    """Safetensors returns names sorted as text, where step 10 comes before step 9."""
    loss, resumed = (ProtoClipLoss(proto=ProtoConfig(queue=60, k=4)) for _ in range(2))
    for step in range(12):
        indexed_call(loss, step, 20, indexed=False)
    resumed.online.load_state_dict(dict(sorted(loss.online.state_dict().items())))
    for step in range(12, 20):
        expected = indexed_call(loss, step, 20, indexed=False)
        assert indexed_call(resumed, step, 20, indexed=False) == expected


def test_a_state_without_a_queue_still_loads() -> None:
    """Of ClipLoss, or of ProtoClipLoss as it was before."""
    loss = loss_with_prototypes()
    loss.load_state_dict(protoclip.ClipLoss().state_dict())
    assert loss.online.sets is not None
    with pytest.raises(RuntimeError, match="Unexpected key"):
        protoclip.ClipLoss().load_state_dict(loss.state_dict())


# ---- over four ranks ----


class Flags(NamedTuple):
    """Of ClipLoss."""

    local_loss: bool
    gather_with_grad: bool


ALL_FLAGS = [Flags(False, False), Flags(False, True), Flags(True, False), Flags(True, True)]


class FourSteps(NamedTuple):
    """Terms of the last step, gradients of its prototype term, and prototypes."""

    terms: dict[str, Tensor]
    gradients: dict[str, Tensor]
    sets: Any


def loss_of_four_steps(**options: Any) -> ProtoClipLoss:
    return ProtoClipLoss(**options, proto=ProtoConfig(queue=40, k=5, every=2))


def four_steps(
    mine: slice = slice(None), loss: ProtoClipLoss | None = None, **options: Any
) -> FourSteps:
    loss = loss or loss_of_four_steps(**options)
    clip_loss = protoclip.ClipLoss(**options)
    for step in range(4):
        image, text = pairs(40, seed=step)
        last = call(loss, image[mine], text[mine])
    of_clip_loss = call(clip_loss, image[mine], text[mine])
    gradients = without(last.gradients, of_clip_loss.gradients)
    return FourSteps(last.terms, gradients, loss.online.sets)


def of_rank(folder: str) -> None:
    rank = int(os.environ["RANK"])
    options = {flags: {**flags._asdict(), "rank": rank, "world_size": 4} for flags in ALL_FLAGS}
    early = loss_of_four_steps(**options[ALL_FLAGS[0]])  # older than the group of the ranks
    dist.init_process_group("gloo")
    losses = {ALL_FLAGS[0]: early}
    mine = slice(10 * rank, 10 * rank + 10)
    results = {flags: four_steps(mine, losses.get(flags), **options[flags]) for flags in ALL_FLAGS}
    copied = copy.deepcopy(early)  # although a process group cannot be
    assert torch.equal(copied.online.centroids["image"], early.online.centroids["image"])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Flags, FourSteps]]:
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(4, of_rank, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(4)]


@pytest.fixture(scope="module")
def one_rank() -> FourSteps:
    return four_steps()


@pytest.mark.parametrize("flags", ALL_FLAGS, ids=str)
def test_four_ranks_have_the_prototypes_of_one(
    four_ranks: list[dict[Flags, FourSteps]], one_rank: FourSteps, flags: Flags
) -> None:
    first = four_ranks[0][flags].sets
    for rank in four_ranks:
        for own, of_first, expected in zip(rank[flags].sets, first, one_rank.sets, strict=True):
            assert torch.equal(own.prototypes, of_first.prototypes)
            assert torch.equal(own.targets, of_first.targets)
            assert torch.allclose(own.prototypes, expected.prototypes, atol=1e-5)
            assert torch.allclose(own.targets, expected.targets, atol=1e-5)


@pytest.mark.parametrize("flags", ALL_FLAGS, ids=str)
def test_four_ranks_have_the_prototype_loss_and_gradients_of_one(
    four_ranks: list[dict[Flags, FourSteps]], one_rank: FourSteps, flags: Flags
) -> None:
    ranks = [rank[flags] for rank in four_ranks]
    mean_loss = torch.stack([rank.terms["proto_loss"] for rank in ranks]).mean()
    assert torch.allclose(mean_loss, one_rank.terms["proto_loss"], rtol=1e-5)
    # As OpenCLIP's InfoNCE: 1 / W without gather_with_grad, and about half with local_loss.
    share = 1 if flags.gather_with_grad else 1 / 2 if flags.local_loss else 1 / 4
    for name in ("image_features", "text_features"):
        rows = torch.cat([rank.gradients[name] for rank in ranks]) / 4  # DDP's mean
        assert torch.allclose(rows, share * one_rank.gradients[name], atol=1e-5)
    mean = torch.stack([rank.gradients["logit_scale"] for rank in ranks]).mean()
    assert torch.allclose(mean, one_rank.gradients["logit_scale"], atol=1e-5)


# ---- odd batches ----


@pytest.mark.parametrize("sizes", [[16, 16, 16, 1], [1], [3, 16]], ids=str)
def test_a_short_batch_does_not_put_clusterings_off(sizes: list[int]) -> None:
    loss = ProtoClipLoss(proto=ProtoConfig(k=4, queue=64))
    clustered = []
    for size in [*sizes, *[16] * 12]:
        before = loss.online._clusterings
        call(loss, *pairs(size, seed=size))
        if loss.online._clusterings > before:
            clustered.append(loss.online.steps)
    assert len(clustered) >= 3
    assert {later - earlier for earlier, later in itertools.pairwise(clustered)} == {4}


def test_a_batch_that_is_not_finite_has_no_part_in_the_next_clustering() -> None:
    """Its step is skipped by whoever looks at gradients; its rows stay in the queue."""
    loss = ProtoClipLoss(proto=ProtoConfig(queue=80, k=5, every=1))
    for step in range(4):
        image, text = pairs(20, seed=step)
        call(loss, image * math.nan if step == 2 else image, text)
    for index in (None, torch.arange(20)):
        terms = call(loss, *pairs(20, seed=4), index=index).terms
        assert all(value.isfinite() for value in terms.values()), index
    assert "proto_loss" in call(loss, *pairs(20, seed=5)).terms
    diverged = ProtoClipLoss(proto=ProtoConfig(queue=80, k=5))
    with pytest.raises(ValueError, match="cannot cluster the image features"):
        for step in range(4):
            image, text = pairs(20, seed=step)
            call(diverged, image * math.nan, text)


def test_keys_that_come_after_steps_without_them_are_told_of() -> None:
    loss = loss_with_prototypes()
    with pytest.warns(UserWarning, match="index= came after steps without it"):
        terms = call(loss, *pairs(40), index=torch.arange(40)).terms
    assert set(terms) == {"contrastive_loss"}


def test_autocast_and_the_default_device_change_nothing() -> None:
    plain = call(loss_with_prototypes(), *pairs(40, seed=1)).terms
    with torch.autocast("cpu", torch.bfloat16):
        assert call(loss_with_prototypes(), *pairs(40, seed=1)).terms == plain
    images, texts = pairs(40), pairs(40, seed=1)
    loss = ProtoClipLoss(proto=ProtoConfig(queue=40, k=5, every=100))
    with torch.device("meta"):
        loss(*images, 14.3)
        terms = loss(*texts, 14.3, output_dict=True)
    assert terms == plain


def test_with_index_the_queue_holds_at_most_the_capacity(caplog: pytest.LogCaptureFixture) -> None:
    """Each of 512 samples is stored once, and prototypes come after one pass over them."""
    proto = ProtoConfig(capacity=512, k=16, every=4)
    assert proto.queue == ProtoConfig().queue and proto.effective_queue == 512
    assert ProtoConfig(capacity=512).num_clusters == 51
    assert ProtoConfig(queue=64, capacity=512).effective_queue == 64
    assert replace(proto, capacity=0).effective_queue == ProtoConfig().queue
    loss = ProtoClipLoss(proto=proto)
    for step in range(17):
        image, text = pairs(64, seed=step % 8)
        index = torch.arange(64) + 64 * (step % 8)
        terms = loss(image, text, torch.tensor(SCALE), output_dict=True, index=index)
        assert ("proto_loss" in terms) == (step >= 8)
    assert sorted(torch.cat([step.keys for step in loss.online._recent]).tolist()) == [*range(512)]
    starts = [record.getMessage() for record in caplog.records if "start after" in record.msg]
    assert starts == ["protoclip: prototypes start after 8 steps of 64 pairs"]


@pytest.mark.parametrize(("epochs", "is_short"), [(1, True), (4, False)])
def test_a_run_that_ends_before_its_prototypes_is_warned_about(
    epochs: int, is_short: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Two optimiser steps an epoch, and prototypes after four."""
    arguments = SimpleNamespace(
        model="nano", siglip=False, distill=False, local_loss=False, gather_with_grad=False,
        rank=0, world_size=1, horovod=False, loss_dist_impl=None, accum_freq=2, batch_size=8,
        epochs=epochs,
    )  # fmt: skip

    def get_data(arguments: Any) -> dict[str, Any]:
        return {"train": SimpleNamespace(dataloader=SimpleNamespace(num_batches=5))}

    trainer = SimpleNamespace(create_loss=None, get_data=get_data)
    with openclip.patched(trainer, ProtoConfig(queue=64, k=4)):
        assert trainer.get_data(arguments)["train"].dataloader.num_batches == 5
        trainer.create_loss(arguments)
    assert trainer.get_data is get_data
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    expected = "the run has 2 steps, and prototypes start after 4, so it trains plain CLIP"
    assert [expected in text for text in warned] == [True] * is_short
