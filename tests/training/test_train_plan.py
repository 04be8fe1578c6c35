"""Which samples when, which learning rate, which parameters decay, which flags are refused."""

from __future__ import annotations

import math

import pytest
import torch
from ranks import config_of

from protoclip.episodes.prototypes import check_clusters
from protoclip.settings.config import OptimConfig
from protoclip.training.checks import loss_weights
from protoclip.training.schedule import draw, learning_rate, make_plan, parse_interval


class TestDraws:
    plan = make_plan(config_of("--batch-size", "32", "--epochs", "3"), 100)

    def test_an_epoch_is_every_sample_in_full_batches(self) -> None:
        assert (self.plan.steps_per_epoch, self.plan.total_steps) == (4, 10)
        for epoch in range(2):
            draws = draw(self.plan, 0, range(4 * epoch, 4 * epoch + 4))
            assert len(draws) == 128 and torch.equal(draws.unique(), torch.arange(100))
            assert all(len(batch.unique()) == 32 for batch in draws.split(32))

    def test_each_epoch_has_an_order_of_its_own(self) -> None:
        first, second = (draw(self.plan, 0, range(4 * i, 4 * i + 4)) for i in range(2))
        assert not torch.equal(first, second)

    def test_a_pass_ends_with_the_run_that_has_seen_as_many_samples(self) -> None:
        assert [step for step in range(1, 11) if self.plan.ends_pass(step)] == [4, 8, 10]
        shorter = make_plan(config_of("--batch-size", "32", "--max-steps", "6"), 100)
        assert [step for step in range(1, 7) if shorter.ends_pass(step)] == [4]

    def test_with_replacement_some_samples_come_twice(self) -> None:
        draws = draw(self.plan, 0, range(4), replacement=True)
        assert len(draws) == 128 and len(draws.unique()) < 100

    @pytest.mark.parametrize(
        ("flags", "samples", "words"),
        [
            (["--batch-size", "64"], 40, "--batch-size 10"),
            (["--batch-size", "8", "--episode-size", "4"], 40, "--episode-size"),
            (["--batch-size", "8", "--epochs", "0"], 40, "--epochs"),
        ],
    )
    def test_plans_that_cannot_be(self, flags: list[str], samples, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            make_plan(config_of(*flags), samples)


def test_the_learning_rate_warms_up_and_falls_to_nothing() -> None:
    config = OptimConfig(lr=2.0, warmup=0.1)
    rates = [learning_rate(config, 100, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == max(rates) == 2.0
    assert rates[55] == pytest.approx(1 + math.cos(math.pi * 45 / 90)) and rates[-1] < 1e-3
    locked = [learning_rate(config, 100, step, 40) for step in range(100)]
    assert locked[:10] == rates[:10] and locked[25] == pytest.approx(1.0) and not any(locked[40:])
    in_steps = OptimConfig(lr=2.0, warmup=4, lr_scheduler="const")
    assert [learning_rate(in_steps, 100, s) for s in (0, 3, 50)] == [0.5, 2.0, 2.0]


def test_intervals_of_steps_or_time() -> None:
    texts = ("", "5steps", "1 step", "90s", "2m", "1h")
    assert [parse_interval(text) for text in texts] == [
        (0, 0.0), (5, 0.0), (1, 0.0), (0, 90.0), (0, 120.0), (0, 3600.0),
    ]  # fmt: skip


def test_a_tenth_of_the_episode_is_the_default_number_of_clusters() -> None:
    assert check_clusters(config_of().episode, 1722) == 172
    assert check_clusters(config_of().episode, 5) == 1


@pytest.mark.parametrize(
    ("method", "has_teacher", "distils"),
    [("protoclip", True, True), ("protoclip", False, False), ("clip", True, False)],
)
def test_nothing_is_distilled_without_a_teacher(
    method: str, has_teacher: bool, distils: bool
) -> None:
    """Else DDP waits for gradients of heads that no loss uses."""
    config = config_of("--method", method, "--w-distill", "1")
    assert (loss_weights(config, has_teacher=has_teacher).w_distill > 0) == distils
