"""Training on several ranks: the losses of one rank, whatever computes the prototypes' features."""

import json

import numpy as np
import pytest
from ranks import ended, said, start_command, tiny_run

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
    codes = ended(start_command(folder, argv, ranks, plots=False))
    assert codes == [0] * ranks, said(folder)
    lines = (folder / "logs" / name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


@pytest.fixture(scope="module")
def alone(folder):
    return {name: metrics_of(folder, 1, 1, "--episode-features", name) for name in FEATURES}


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(("ranks", "passes"), [(1, 3), (2, 1), (2, 3), (3, 1), (4, 1)])
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
