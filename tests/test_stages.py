"""Model, checkpoint, teacher, episode: what each stage hands to the next."""

import math
import pickle
import sys

import open_clip
import pytest
import torch
import torch.nn.functional as F

from protoclip import checkpoint
from protoclip.config import EpisodeConfig, LossConfig, ModelConfig
from protoclip.data import batches, build_transform, open_dataset
from protoclip.losses import ProtoLoss
from protoclip.model import Encoded, build_model, register_configs
from protoclip.prototypes import IGNORE, EpisodeBuilder, Features, extract

N, DATASET = 60, 80


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=1)


@pytest.fixture
def features():
    torch.manual_seed(0)
    index = torch.randperm(DATASET)[:N]
    return Features(index, unit(N, 8), unit(N, 8))


def episode_of(features, teacher=None, previous=None, **settings):
    config = EpisodeConfig(**{"num_clusters": 7, **settings})
    builder = EpisodeBuilder(config, [f"key{i}" for i in range(DATASET)], teacher=teacher)
    return builder.build(features, torch.Generator().manual_seed(1), previous)


class TestEpisode:
    def test_faiss_is_one_flag(self, features, monkeypatch):
        """The paper's own clustering runs, keeps the contract, and says how to get it."""
        pytest.importorskip("faiss")
        ours, theirs = (episode_of(features, kmeans_backend=name) for name in ("auto", "faiss"))
        for a, b in zip(ours.internal, theirs.internal, strict=True):
            a, b = a.clustering, b.clustering
            assert not torch.equal(a.labels, b.labels)  # other random starts
            assert b.counts.sum() == N and (b.labels[features.index] >= 0).all()
        monkeypatch.setitem(sys.modules, "faiss", None)
        with pytest.raises(ValueError, match="pip install faiss-cpu"):
            episode_of(features, kmeans_backend="faiss")

    def test_back_translation_and_targets_are_the_authors_formulas(self, features):
        episode = episode_of(features, torch.randn(DATASET, 5))
        assert [(s.source, s.student) for s in episode.internal] == [
            ("image", "text"),
            ("text", "image"),
        ]
        for item in episode.sets:
            own = getattr(features, f"{item.student}_h")
            labels = item.clustering.labels[features.index]
            for k in range(len(item.prototypes)):
                mean = own[labels == k].mean(dim=0)
                assert (item.prototypes[k] - mean).abs().max() < 1e-12
            if item.targets is not None:
                centroids = item.clustering.centroids
                teacher = torch.softmax(centroids @ centroids.T / 0.01, dim=1)
                assert (item.targets - teacher @ item.prototypes).abs().max() < 1e-12
        assert all(item.targets is None for item in episode.external)

    def test_labels_are_found_by_position_and_no_cluster_is_empty(self, features):
        item = episode_of(features).internal[0].clustering
        outside = torch.ones(DATASET, dtype=torch.bool)
        outside[features.index] = False
        assert (item.labels[outside] == IGNORE).all()
        counts = torch.bincount(item.labels[features.index], minlength=len(item.counts))
        assert torch.equal(counts, item.counts) and (counts > 0).all()

    def test_without_back_translation_the_raw_centroids_serve(self, features):
        episode = episode_of(features, pbt=False)
        for item in episode.internal:
            assert item.prototypes is item.clustering.centroids

    def test_a_warm_start_changes_few_labels(self, features):
        first = episode_of(features, kmeans_max_iter=50)
        second = episode_of(features, previous=first, kmeans_max_iter=50)
        assert second.metrics["image_churn"] < 0.05

    def test_bad_features_are_refused_by_key(self, features):
        features.image_h[3, 2] = math.nan
        with pytest.raises(ValueError, match=f"'key{int(features.index[3])}'"):
            episode_of(features)

    def test_too_many_clusters(self, features):
        with pytest.raises(ValueError, match="--k 6"):
            episode_of(features, num_clusters=N + 1)


def test_the_loss_is_the_weighted_sum_of_its_terms(features):
    episode = episode_of(features, torch.randn(DATASET, 5))
    u = Encoded(unit(N, 16), unit(N, 16))
    h = Encoded(features.image_h, features.text_h)
    scale = torch.tensor(10.0, dtype=torch.float64)

    def losses(*weights, episode=episode):
        return ProtoLoss(LossConfig(*weights))(u, h, features.index, scale, scale, episode)

    whole = losses(1.0, 2.0, 0.5)
    terms = whole.terms
    want = terms["contrastive_loss"] + 2 * terms["proto_loss"] + 0.5 * terms["external_loss"]
    assert (whole.total - want).abs() < 1e-12
    assert set(losses(1.0, 0.0, 0.0).terms) == {"contrastive_loss"}
    assert set(losses(1.0, 1.0, 1.0, episode=None).terms) == {"contrastive_loss"}
    assert 0 <= whole.accuracy["proto_accuracy"] <= 1
    with pytest.raises(ValueError, match="infonce-warmup-epoch 0"):
        losses(0.0, 1.0, 1.0, episode=None)


class TestModel:
    def test_heads_start_equal_and_stay_outside_openclips_state(self):
        model = build_model(ModelConfig())
        for a, b in zip(model.image_head.parameters(), model.text_head.parameters(), strict=True):
            assert torch.equal(a, b) and a is not b
        fresh = open_clip.create_model(register_configs("protoclip-tiny"))
        fresh.load_state_dict(model.clip.state_dict(), strict=True)

    def test_a_round_trip_through_a_checkpoint(self, tmp_path):
        model, other = build_model(ModelConfig()), build_model(ModelConfig())
        payload = {"state_dict": model.clip.state_dict(), "protoclip": model.extra_state()}
        checkpoint.save(tmp_path / "x.pt", payload)
        other.load_state(checkpoint.load(tmp_path / "x.pt"))
        assert all(
            torch.equal(a, b)
            for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
        )
        clip = open_clip.create_model("protoclip-tiny", pretrained=str(tmp_path / "x.pt"))
        assert torch.equal(clip.logit_scale, model.clip.logit_scale)

    def test_scales_are_clamped(self):
        model = build_model(ModelConfig())
        with torch.no_grad():
            model.logit_scale_proto.fill_(9.0)
            model.clip.logit_scale.fill_(-1.0)
        model.clamp_scales()
        assert model.proto_scale.item() == pytest.approx(100) and model.logit_scale == 1

    def test_a_misspelt_name_gets_a_hint(self):
        with pytest.raises(ValueError, match="ViT-B-32"):
            build_model(ModelConfig(model="ViT-B32"))


class TestCheckpoint:
    def test_a_torn_file_and_a_missing_one(self, tmp_path):
        checkpoint.save(tmp_path / "x.pt", {"a": torch.ones(1000)})
        torn = tmp_path / "torn.pt"
        torn.write_bytes((tmp_path / "x.pt").read_bytes()[:700])
        with pytest.raises(ValueError, match="cannot be read"):
            checkpoint.load(torn)
        with pytest.raises(ValueError, match="found none"):
            checkpoint.load(tmp_path / "y.pt")

    def test_a_failed_write_leaves_the_old_file(self, tmp_path):
        checkpoint.save(tmp_path / "x.pt", {"a": 1})
        with pytest.raises((AttributeError, pickle.PicklingError)):
            checkpoint.save(tmp_path / "x.pt", {"a": lambda: 0})
        assert checkpoint.load(tmp_path / "x.pt") == {"a": 1}
        assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_features_do_not_depend_on_the_training_mode():
    dataset = open_dataset("builtin:shapes:20")
    model = build_model(ModelConfig()).train()
    transform = build_transform(model.image_size, model.mean, model.std, "none")
    stream = dataset, torch.arange(20), 8, transform, model.short_tokenizer
    cpu = torch.device("cpu")
    first = extract(model, batches(*stream, seed=0), device=cpu)
    again = extract(model.eval(), batches(*stream, seed=0), device=cpu)
    assert torch.equal(first.image_h, again.image_h) and not model.training
    torch.testing.assert_close(first.text_h.norm(dim=1), torch.ones(20))
