"""ClipLoss and SigLipLoss against OpenCLIP's own, alone and over two ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from budget import Results, assert_same_bits, leaf, loss_and_gradients
from open_clip import loss as open_clip_loss
from ranks import in_group
from room import Made
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode

import protoclip


class Pairs(NamedTuple):
    image: Tensor  # [N, D]
    text: Tensor  # [N, D]


def features(n: int = 48, d: int = 20, dtype: torch.dtype = torch.float32, seed: int = 0) -> Pairs:
    torch.manual_seed(seed)
    image = F.normalize(torch.randn(n, d), dim=-1)
    text = F.normalize(image + 0.5 * torch.randn(n, d), dim=-1)
    return Pairs(image.to(dtype), text.to(dtype))


def computed(
    loss: Callable[..., Tensor],
    pairs: Pairs,
    *,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
) -> Results:
    """Of a loss with OpenCLIP's arguments."""
    leaves = {
        "image_features": leaf(pairs.image),
        "text_features": leaf(pairs.text),
        "logit_scale": leaf(logit_scale),
    }
    if logit_bias is not None:
        leaves["logit_bias"] = leaf(logit_bias)
    return loss_and_gradients(loss(**leaves), **leaves)


def assert_same(
    got: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float = 2e-5
) -> None:
    """Of tensors or arrays."""
    assert got.keys() == expected.keys()
    assert abs(got["loss"] - expected["loss"]) <= tolerance * max(1, abs(expected["loss"]))
    for name in got.keys() - {"loss"}:
        gradient = torch.as_tensor(got[name])
        other = torch.as_tensor(expected[name])
        assert gradient.shape == other.shape and gradient.dtype == other.dtype, name
        size = max(other.abs().max(), 1e-3)
        assert (gradient - other).abs().max() <= tolerance * size, name


@pytest.mark.smoke
@pytest.mark.parametrize("logit_bias", [None, torch.tensor(-10.0)])
@pytest.mark.parametrize("logit_scale", [torch.tensor(14.3), torch.tensor([100.0])])
def test_clip_loss_is_open_clips(logit_scale: Tensor, logit_bias: Tensor | None) -> None:
    ours = computed(
        protoclip.ClipLoss(), features(), logit_scale=logit_scale, logit_bias=logit_bias
    )
    theirs = computed(
        open_clip_loss.ClipLoss(), features(), logit_scale=logit_scale, logit_bias=logit_bias
    )
    assert_same(ours, theirs)


def test_clip_loss_takes_open_clips_keywords() -> None:
    loss = protoclip.ClipLoss()
    image, text = features()
    logit_scale = torch.tensor(14.3)
    terms = loss(
        image_features=image, text_features=text, logit_scale=logit_scale, output_dict=True
    )
    assert terms == {"contrastive_loss": loss(image, text, logit_scale)}


def smoothed(base: type[nn.Module]) -> type[nn.Module]:
    """A loss of somebody who built on OpenCLIP's class: label smoothing."""

    class Smoothed(base):
        def forward(
            self,
            image_features: Tensor,
            text_features: Tensor,
            logit_scale: Tensor,
            logit_bias: Tensor | None = None,
        ) -> Tensor:
            logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
            labels = self.get_ground_truth(image_features.device, logits[0].shape[0])
            return sum(F.cross_entropy(t, labels, label_smoothing=0.1) for t in logits) / 2

    return Smoothed


def with_a_margin(base: type[nn.Module]) -> type[nn.Module]:
    """A loss of somebody who changed OpenCLIP's logits, and not its forward."""

    class WithAMargin(base):
        def get_logits(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
            images, texts = super().get_logits(*arguments, **options)
            margin = 5 * torch.eye(len(images))
            return images - margin, texts - margin

    return WithAMargin


def with_the_next_text(base: type[nn.Module]) -> type[nn.Module]:
    """A loss of somebody who changed OpenCLIP's positives."""

    class WithTheNextText(base):
        def get_ground_truth(self, *arguments: Any, **options: Any) -> Tensor:
            return super().get_ground_truth(*arguments, **options).roll(1)

    return WithTheNextText


@pytest.mark.parametrize(
    "changed, logit_bias",
    [
        (smoothed, None),
        (smoothed, torch.tensor(-10.0)),
        (with_a_margin, None),
        (with_the_next_text, None),
    ],
)
def test_a_subclass_gets_the_loss_of_its_own_logits_and_positives(
    changed: Callable[[type[nn.Module]], type[nn.Module]], logit_bias: Tensor | None
) -> None:
    ours = changed(protoclip.ClipLoss)()
    theirs = changed(open_clip_loss.ClipLoss)()
    scalars = {"logit_scale": torch.tensor(14.3), "logit_bias": logit_bias}
    assert_same(computed(ours, features(), **scalars), computed(theirs, features(), **scalars))
    if changed is not smoothed:  # whose forward is its own
        with pytest.raises(ValueError, match="expected no ids with a get_logits"):
            ours(*features(), 14.3, ids=torch.arange(48))


def test_a_subclass_of_siglip_with_its_own_logits_is_refused() -> None:
    """Ours would not look at them."""
    with pytest.raises(ValueError, match="give the class its own forward"):
        with_the_next_text(protoclip.SigLipLoss)()(*features(), 14.3)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_ranks_that_are_not_there_are_refused(name: str) -> None:
    loss = getattr(protoclip, name)(rank=1, world_size=4)
    for _ in range(2):
        with pytest.raises(ValueError, match="init_process_group first, and pass both"):
            loss(*features(), 14.3)


@pytest.mark.parametrize("negative_only", [False, True])
def test_subclasses_of_siglip_find_logits_and_labels(negative_only: bool) -> None:
    ours = protoclip.SigLipLoss()
    theirs = open_clip_loss.SigLipLoss()
    scale = torch.tensor(14.3)
    image, text = features()
    for bias in (torch.tensor(-10.0), None):
        expected = theirs.get_logits(image, text, scale, bias)
        assert torch.equal(ours.get_logits(image, text, scale, bias), expected)
    expected = theirs.get_ground_truth("cpu", torch.float32, 5, negative_only)
    assert torch.equal(ours.get_ground_truth("cpu", torch.float32, 5, negative_only), expected)


def test_settings_are_open_clips_attributes() -> None:
    for name, settings in (
        ("ClipLoss", {"cache_labels": True, "use_horovod": False, "local_loss": True}),
        ("SigLipLoss", {"cache_labels": True, "dist_impl": "shift"}),
        ("SigLipLoss", {}),
    ):
        ours = getattr(protoclip, name)(**settings)
        theirs = getattr(open_clip_loss, name)(**settings)
        for attribute in {"cache_labels", "use_horovod", "dist_impl", *settings} & {*vars(theirs)}:
            assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert protoclip.SigLipLoss(chunk_size=64).chunk_size == 64  # OpenCLIP 4 has it


def test_flags_that_are_not_supported_are_named() -> None:
    with pytest.raises(ValueError, match="use_horovod=False"):
        protoclip.ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="dist_impl"):
        protoclip.SigLipLoss(dist_impl="ring")


@pytest.mark.parametrize("name", ["ClipLoss", "ProtoClipLoss", "SigLipLoss"])
def test_scale_and_bias_may_be_numbers_and_nothing_else(name: str) -> None:
    loss = getattr(protoclip, name)()
    image, text = features()
    expected = loss(image, text, torch.tensor(10.0), torch.tensor(-3.0))
    assert torch.equal(loss(image, text, 10.0, -3.0), expected)
    with pytest.raises(TypeError, match="expected logit_bias as a number"):
        loss(image, text, 10.0, "-3")
    with pytest.raises(TypeError, match="logit_scale as a number .* got bool"):
        loss(image, text, True, -3.0)
    with pytest.raises(ValueError, match="logit_scale is the multiplier, not its logarithm"):
        loss(image, text, torch.tensor([-5.0]), -3.0)
    with pytest.raises(TypeError, match=r"expected ids as .*got list; use torch.as_tensor\(ids\)"):
        loss(image, text, 10.0, -3.0, ids=list(range(48)))


def test_a_scale_that_is_traced_is_not_read() -> None:
    """A scale of FakeTensorMode has no value; one that is NaN gives a NaN loss."""
    image, text = features()
    with FakeTensorMode(allow_non_fake_inputs=True):
        scale = torch.tensor(-5.0)
        assert isinstance(scale, FakeTensor)
        assert protoclip.info_nce(image, text, scale, backend="reference").shape == ()
    assert protoclip.info_nce(image, text, torch.tensor(torch.nan)).isnan()


@pytest.mark.parametrize("num_images, num_texts", [(9, 48), (48, 9)])
def test_siglip_refuses_unpaired_features_as_open_clips_does(
    num_images: int, num_texts: int
) -> None:
    image, text = features()
    with pytest.raises(ValueError, match=r"SigLipLoss: expected one text per image.*\(9, 20\)"):
        protoclip.SigLipLoss()(
            image[:num_images], text[:num_texts], torch.tensor(10.0), torch.tensor(-10.0)
        )


@pytest.mark.smoke
@pytest.mark.parametrize("n", [1, 48, 300])
def test_siglip_loss_is_open_clips(n: int) -> None:
    image, text = features(n)
    scalars = {"logit_scale": torch.tensor(10.0), "logit_bias": torch.tensor(-10.0)}
    ours = protoclip.SigLipLoss()
    theirs = open_clip_loss.SigLipLoss()
    assert_same(computed(ours, features(n), **scalars), computed(theirs, features(n), **scalars))
    assert list(ours(image, text, **scalars, output_dict=True)) == ["contrastive_loss"]
    with torch.no_grad():
        assert torch.allclose(ours(image, text, **scalars), theirs(image, text, **scalars))


def test_the_gradient_of_siglip_in_fp16_does_not_pass_its_range() -> None:
    """The sum over a large batch has coordinates above 65,504, the mean has not."""
    n = 4096
    torch.manual_seed(0)
    rows = torch.cat([torch.full((n, 1), 0.95), 0.1 * torch.randn(n, 7)], dim=1)
    rows = F.normalize(rows, dim=1).half()

    def gradient(dtype: torch.dtype) -> Tensor:
        image = leaf(rows, dtype)
        protoclip.SigLipLoss()(image, leaf(rows, dtype), 20.0, -5.0).backward()
        return image.grad

    ours, expected = gradient(torch.float16), gradient(torch.float32)
    assert expected.abs().max() * n > 65_504 and ours.dtype == torch.float16
    torch.testing.assert_close(ours.float(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("same_id", ["positive", "exclude"])
def test_siglip_hands_ids_to_its_op(same_id: str) -> None:
    ids = torch.arange(48)[:, None] // torch.tensor([2, 12]) % torch.tensor([99, 2])
    arguments = (*features(), 10.0, -8.0)
    got = protoclip.SigLipLoss()(*arguments, ids=ids, same_id=same_id)
    assert_same_bits(got, protoclip.ops.sigmoid_loss(*arguments, ids=ids, same_id=same_id))


# ---- over two ranks ----


class Distilled(nn.Module):
    """The sum of a distillation loss, for a teacher of other features and width."""

    def __init__(self, loss: nn.Module, rank: int = 0) -> None:
        super().__init__()
        self.loss = loss
        image, text = features(60, 31, seed=8)
        self.teacher = Pairs(image[20 * rank :], text[20 * rank :])

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        n = len(image_features)
        image = self.teacher.image[:n]
        text = self.teacher.text[:n]
        scale = torch.tensor(30.0)
        terms = self.loss(image_features, text_features, logit_scale, image, text, scale)
        assert len(terms) == 2
        return terms[0] + 2 * terms[1]


class Captioned(nn.Module):
    """The sum of a CoCa loss, for logits of tokens that are made of the texts."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        logits = text_features[:, None, :7] * torch.arange(1, 6)[:, None]  # [N, 5, 7]
        labels = torch.arange(5 * len(logits)).reshape(-1, 5) % 7
        terms = self.loss(image_features, text_features, logits, labels, logit_scale)
        assert len(terms) == 2
        return sum(terms)


@pytest.mark.parametrize("logit_scale", [14.3, 100.0])
@pytest.mark.parametrize("name", ["CoCaLoss", "DistillClipLoss"])
def test_coca_and_distillation_are_open_clips(name: str, logit_scale: float) -> None:
    def loss_of(module: Any) -> nn.Module:
        if name == "CoCaLoss":
            return Captioned(module.CoCaLoss(2.0, 0.5, pad_id=3))
        return Distilled(module.DistillClipLoss())

    scale = torch.tensor(logit_scale)
    ours = computed(loss_of(protoclip.losses), features(), logit_scale=scale)
    theirs = computed(loss_of(open_clip_loss), features(), logit_scale=scale)
    assert_same(ours, theirs)


class Weighted(nn.Module):
    """A sigmoid loss with a weight of 1 for each image, which other code computes."""

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        weights = torch.ones(len(image_features))
        loss = protoclip.losses.SigLipLoss()
        return loss(image_features, text_features, logit_scale, weights=weights)


@pytest.mark.parametrize("name", ["SigLipLoss", "weighted SigLipLoss", "DistillClipLoss"])
def test_autocast_changes_no_bit(name: str) -> None:
    """OpenCLIP's trainer computes its loss under autocast."""
    loss: nn.Module = protoclip.losses.SigLipLoss()
    if name != "SigLipLoss":
        loss = Weighted() if "weighted" in name else Distilled(protoclip.losses.DistillClipLoss())
    scale = torch.tensor(100.0)
    expected = computed(loss, features(60), logit_scale=scale)
    with torch.autocast("cpu", torch.bfloat16):
        got = computed(loss, features(60), logit_scale=scale)
    assert_same(got, expected, tolerance=0)


def test_distillation_forms_no_matrix() -> None:
    x, y = (leaf(rows) for rows in features(600, 20))
    of_images, of_texts = features(600, 31, seed=8)
    teachers_scale = torch.tensor(40.0, requires_grad=True)

    def matrices(loss: nn.Module) -> int:
        with Made() as made:
            terms = loss(x, y, 30.0, of_images, of_texts, teachers_scale, output_dict=True)
            terms["distill_loss"].backward()
        return sum(len(shape) > 1 and min(shape[-2:]) >= 600 for shape in made.shapes)

    assert matrices(protoclip.losses.DistillClipLoss()) == 0
    assert teachers_scale.grad is None
    assert matrices(open_clip_loss.DistillClipLoss()) > 4


@dataclass(frozen=True)
class Case:
    """One of OpenCLIP's losses, by name, with its flags; ``smoothed``: a class built on it."""

    name: str
    flags: dict[str, Any]
    smoothed: bool = False

    def loss(self, module: Any, rank: int) -> nn.Module:
        base = getattr(module, self.name)
        if self.name == "DistillClipLoss":
            return Distilled(base(rank=rank, world_size=2, **self.flags), rank)
        if self.name == "CoCaLoss":
            return Captioned(base(2.0, 0.5, rank=rank, world_size=2, **self.flags))
        return (smoothed(base) if self.smoothed else base)(rank=rank, world_size=2, **self.flags)


CASES = {
    f"{name}, local {local}, with_grad {with_grad}": Case(
        name, {"local_loss": local, "gather_with_grad": with_grad}
    )
    for name in ("ClipLoss", "CoCaLoss", "DistillClipLoss")
    for local in (False, True)
    for with_grad in (False, True)
}
CASES |= {
    f"a class built on ClipLoss, local {local}": Case(
        "ClipLoss", {"local_loss": local}, smoothed=True
    )
    for local in (False, True)
}
CASES |= {
    f"SigLipLoss, {implementation}": Case("SigLipLoss", {"dist_impl": implementation})
    for implementation in ("bidir", "shift", "reduce", "gather")
}
LOCAL_WITH_GRADIENTS = "local True, with_grad True"
SCALARS = {
    "ClipLoss": {"logit_scale": torch.tensor(14.3)},
    "SigLipLoss": {"logit_scale": torch.tensor(14.3), "logit_bias": torch.tensor(-10.0)},
}
SCALARS_OF = {"CoCaLoss": SCALARS["ClipLoss"], "DistillClipLoss": SCALARS["ClipLoss"], **SCALARS}


def warnings_without_a_rank() -> dict[str, list[str]]:
    """Of three calls of each loss that was not told of the other ranks."""
    words = {}
    image, text = features()
    for name, scalars in SCALARS.items():
        loss = getattr(protoclip, name)()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                loss(image, text, **scalars)
        words[name] = [str(each.message) for each in caught]
    return words


Arrays = dict[str, np.ndarray]  # results that a process can send


class RankResults(NamedTuple):
    """Of one rank, by case; ``with_ids``: of ours, by the name of the loss."""

    ours: dict[str, Arrays]
    theirs: dict[str, Arrays]
    with_ids: dict[str, Arrays]
    warned: dict[str, list[str]]


def arrays(
    loss: Callable[..., Tensor], pairs: Pairs, logit_scale: Tensor, logit_bias: Tensor | None = None
) -> Arrays:
    results = computed(loss, pairs, logit_scale=logit_scale, logit_bias=logit_bias)
    return {name: value.numpy() for name, value in results.items()}


def results_with_ids(mine: slice = slice(None), **ranks: int) -> dict[str, Arrays]:
    """Of some of 40 pairs, whose ids are those of others too."""
    image, text = features(40, 12)
    ids = torch.arange(40) % 13
    losses = {
        "ClipLoss": protoclip.ClipLoss(gather_with_grad=True, **ranks),
        "SigLipLoss": protoclip.SigLipLoss(**ranks),
    }

    def with_ids(loss: nn.Module) -> Callable[..., Tensor]:
        return lambda **arguments: loss(**arguments, ids=ids[mine])

    return {
        name: arrays(with_ids(loss), Pairs(image[mine], text[mine]), **SCALARS[name])
        for name, loss in losses.items()
    }


def of_rank() -> RankResults:
    rank = dist.get_rank()
    mine = slice(20 * rank, 20 * rank + 20)
    image, text = features(40, 12)
    pairs = Pairs(image[mine], text[mine])

    def of_module(module: Any) -> dict[str, Arrays]:
        return {
            name: arrays(case.loss(module, rank), pairs, **SCALARS_OF[case.name])
            for name, case in CASES.items()
        }

    return RankResults(
        ours=of_module(protoclip.losses),
        theirs=of_module(open_clip_loss),
        with_ids=results_with_ids(mine, rank=rank, world_size=2),
        warned=warnings_without_a_rank(),
    )


@pytest.fixture(scope="module")
def two_ranks() -> list[RankResults]:
    return in_group(2, of_rank)


@pytest.mark.parametrize("name", SCALARS)
def test_a_loss_that_does_not_know_of_the_other_ranks_warns_once(
    two_ranks: list[RankResults], name: str
) -> None:
    """OpenCLIP's classes compute the local loss in silence."""
    for rank, results in enumerate(two_ranks):
        (words,) = results.warned[name]
        assert f"{name}: expected rank={rank} and world_size=2 of this process, got" in words
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image, text = features()
        getattr(protoclip, name)()(image, text, **SCALARS[name])


@pytest.mark.parametrize("name", SCALARS)
def test_ids_over_two_ranks_are_those_of_one_process(
    two_ranks: list[RankResults], name: str
) -> None:
    whole = results_with_ids()[name]
    first, second = (results.with_ids[name] for results in two_ranks)
    over_ranks = {"loss": (first["loss"] + second["loss"]) / 2}
    for gradient in ("dimage_features", "dtext_features"):
        over_ranks[gradient] = np.concatenate([first[gradient], second[gradient]]) / 2
    assert_same(over_ranks, {result: whole[result] for result in over_ranks})


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_open_clips_losses_and_gradients(
    two_ranks: list[RankResults], case: str
) -> None:
    ours = [results.ours[case] for results in two_ranks]
    theirs = [results.theirs[case] for results in two_ranks]
    if case.endswith(LOCAL_WITH_GRADIENTS):  # the scale's gradient is that of a strip
        ours = with_mean_of_scale_gradients(ours)
        theirs = with_mean_of_scale_gradients(theirs)
    for our_rank, their_rank in zip(ours, theirs, strict=True):
        assert_same(our_rank, their_rank)


def with_mean_of_scale_gradients(ranks: list[Arrays]) -> list[Arrays]:
    mean = sum(results["dlogit_scale"] for results in ranks) / len(ranks)
    return [results | {"dlogit_scale": mean} for results in ranks]
