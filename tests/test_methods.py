"""Every switch of the method: what it changes, on tiny runs and on numbers."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from protoclip import checkpoint
from protoclip.config import (
    EpisodeConfig,
    build_parser,
    parse,
)
from protoclip.data import build_transform, open_dataset
from protoclip.losses import similarity_distillation
from protoclip.model import Encoded, build_model
from protoclip.prototypes import (
    IGNORE,
    EpisodeBuilder,
    Features,
    FeatureStore,
    purity,
    target_entropy,
)
from protoclip.training.loop import Trainer
from protoclip.training.phases import Phases
from protoclip.training.plan import make_plan
from protoclip.training.run_folder import RunFolder

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
DATASET = open_dataset("builtin:shapes:84")
TEACHER = torch.randn(84, 8)


def config_of(*flags):
    return parse(build_parser("train", ""), list(flags))


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=1)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "speck.json"
    path.write_text(json.dumps(MODEL))
    return str(path)


@pytest.fixture
def run(tmp_path, model_file):
    """Trains two episodes of three steps; returns the lines of metrics.jsonl."""

    def run(*flags, teacher=None):
        head = ["--model", model_file, "--batch-size", "32", "--report-to", "none"]
        config = config_of(*head, "--max-steps", "6", "--infonce-warmup-epoch", "1", *flags)
        device, folder = torch.device("cpu"), RunFolder(tmp_path / "run", config)
        torch.manual_seed(0)
        model = build_model(config.model)
        trainer = Trainer(
            config,
            make_plan(config, len(DATASET)),
            model,
            DATASET,
            build_transform(model.image_size, model.mean, model.std, "none"),
            teacher,
            folder,
            Phases(device),
            device=device,
            precision="fp32",
        )
        trainer.run()
        folder.close()
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return run


def scalars(lines):
    return {name: value for line in lines for name, value in line.items()}


SWITCHES = {
    "reuse": (["--episode-features", "reuse"], "image_inertia"),
    "reuse of half an epoch": (
        ["--episode-features", "reuse", "--episode-size", "32"],
        "image_inertia",
    ),
    "all hard": (["--target-temperature", "0"], "image_inertia"),
    "no PBT": (["--no-PBT"], "image_inertia"),
    "no heads": (["--no-add-projection-head"], "image_inertia"),
    "paper": (["--paper"], "image_inertia"),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_trains_and_shows(run, name):
    flags, shown = SWITCHES[name]
    lines = run(*flags)
    assert shown in scalars(lines) and "proto_loss" in lines[-1]


def test_the_control_does_without_prototypes(run):
    flags = ["--w-proto", "0", "--w-proto-external", "0", "--w-distill", "1"]
    control = scalars(run(*flags, teacher=TEACHER))
    assert control["distill_loss"] > 0
    assert not any("proto_loss" in name or "inertia" in name for name in control)


@pytest.mark.parametrize("flags", [["--lock-image"], ["--lit-start", "1"]], ids=" ".join)
def test_a_locked_image_tower_does_not_move(run, tmp_path, flags):
    """Locked from the start, or from the end of the first of two episodes."""
    run(*flags, "--save-frequency", "1")
    folder = tmp_path / "run" / "checkpoints"
    first, last = (checkpoint.load(folder / f"epoch_{n}.pt")["state_dict"] for n in (1, 2))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert moved and not any(name.startswith("visual.") for name in moved)


class TestDiagnostics:
    def test_an_episode_says_how_it_went(self, run):
        lines = run("--grad-clip-norm", "0.01", teacher=TEACHER)
        told = scalars(lines)
        for source in ("image", "text", "external"):
            sizes = [told[f"{source}_size_{name}"] for name in ("min", "median", "max")]
            assert sizes == sorted(sizes) and told[f"{source}_empty"] == 0
            assert 0 < told[f"{source}_purity_group"] <= 1
            assert told[f"{source}_imbalance"] >= 1 and told[f"{source}_inertia"] > 0
        assert told["image_target_entropy"] > 0 == told["external_target_entropy"]
        for name in ("logit_scale", "logit_scale_proto"):
            assert math.exp(told[f"{name}_raw"]) == pytest.approx(told[name], rel=1e-5)
        assert {"seconds_features", "seconds_clusters", "seconds_backward"} <= set(told)
        last = lines[-1]
        parts = [last[f"grad_norm_{part}"] for part in ("image", "text", "heads", "scales")]
        assert math.hypot(*parts) == pytest.approx(last["grad_norm"], rel=1e-3)


class TestStore:
    def test_the_newest_row_of_a_sample_counts(self):
        store = FeatureStore(2, 3, torch.device("cpu"))
        old, new = unit(3, 4).float(), unit(3, 4).float()
        store.put(0, torch.tensor([5, 2, 7]), Encoded(old, -old))
        store.put(1, torch.tensor([7, 1, 5]), Encoded(new, -new))
        got = store.features()
        assert got.index.tolist() == [1, 2, 5, 7]
        assert torch.equal(got.image_h, torch.stack([new[1], old[1], new[2], new[0]]))
        assert torch.equal(got.text_h, -got.image_h)

    def test_its_state_goes_on_elsewhere(self):
        store, other = (FeatureStore(2, 2, torch.device("cpu")) for _ in range(2))
        with pytest.raises(ValueError, match="got no row"):
            store.features()
        store.put(0, torch.tensor([1, 0]), Encoded(unit(2, 3).float(), unit(2, 3).float()))
        other.load_state_dict(store.state_dict())
        assert torch.equal(store.features().text_h, other.features().text_h)
        with pytest.raises(ValueError, match=r"expected 5 rows, got \[4\]"):
            FeatureStore(5, 1, torch.device("cpu")).load_state_dict(store.state_dict())


class TestNewSamples:
    """Episodes of 8 known samples of 12, then trained on with all 12."""

    def test_they_get_the_nearest_prototype(self):
        torch.manual_seed(0)
        index, teacher = torch.randperm(12)[:8], torch.randn(12, 5)
        features = Features(index, unit(8, 4), unit(8, 4))
        builder = EpisodeBuilder(EpisodeConfig(num_clusters=3), ["k"] * 12, teacher=teacher)
        episode = builder.build(features, torch.Generator(), coming=torch.arange(12))
        fresh = torch.tensor([i for i in range(12) if i not in index.tolist()])
        external = episode.clusterings["external"]
        nearest = torch.cdist(teacher.double(), external.centroids.double()).argmin(dim=1)
        assert torch.equal(external.labels[fresh], nearest[fresh])
        assert torch.equal(external.counts, torch.bincount(external.labels[index], minlength=3))
        for item in episode.internal:
            assert (item.clustering.labels[fresh] == IGNORE).all()
            h = {"image": unit(12, 4), "text": unit(12, 4)}
            labels = item.bank(h, torch.arange(12)).labels
            want = torch.cdist(h[item.source], item.clustering.centroids).argmin(dim=1)
            assert torch.equal(labels[fresh], want[fresh])
            assert torch.equal(labels[index], item.clustering.labels[index])
            assert torch.equal(item.bank(h, None).labels, want)  # a queue knows no positions


def test_purity_and_entropy_by_hand():
    labels, classes = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([4, 4, 2, 2, 2])
    assert purity(labels, classes) == pytest.approx(4 / 5)
    torch.manual_seed(0)
    builder = EpisodeBuilder(
        EpisodeConfig(num_clusters=4), ["k"] * 9, classes={"group": torch.arange(9) % 2}
    )
    episode = builder.build(Features(torch.arange(9), unit(9, 4), unit(9, 4)), torch.Generator())
    image = episode.clusterings["image"]
    p = torch.softmax(image.centroids @ image.centroids.T / 0.01, dim=1)
    want = (torch.special.entr(p).sum(dim=1) * image.counts).sum() / 9
    assert target_entropy(image, 0.01) == pytest.approx(float(want), abs=1e-6)
    assert episode.metrics["image_purity_group"] == purity(image.labels, torch.arange(9) % 2)


def test_distillation_is_the_divergence_of_the_off_diagonal_softmaxes():
    torch.manual_seed(0)
    h, teacher = Encoded(unit(5, 3), unit(5, 3)), torch.randn(5, 7)
    got = similarity_distillation(h, teacher, torch.tensor(9.0), 0.2)
    t, want = F.normalize(teacher, dim=1).double(), 0.0
    for student in (h.image, h.text):
        for i in range(5):
            others = [j for j in range(5) if j != i]
            p = torch.softmax(t[others] @ t[i] / 0.2, dim=0)
            q = torch.softmax(9 * student[others] @ student[i], dim=0)
            want += float((p * (p / q).log()).sum()) / 10
    assert float(got) == pytest.approx(want, rel=1e-5)
