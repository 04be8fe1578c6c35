"""From features to clusters, prototypes and targets; the features kept for the next episode."""

import math

import pytest
import torch
import torch.nn.functional as F

from protoclip.config import EpisodeConfig, LossConfig, ModelConfig
from protoclip.data import Draws, batches, build_transform, open_dataset
from protoclip.feature_store import Features
from protoclip.kmeans import kmeans
from protoclip.losses import ProtoLoss, similarity_distillation
from protoclip.model import Encoded, build_model
from protoclip.ops.checks import LEFT_OUT
from protoclip.prototypes import (
    EpisodeBuilder,
    Watch,
    collapse,
    extract,
    health,
    purity,
    target_entropy,
)

N, DATASET, CPU = 60, 80, torch.device("cpu")


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=1)


@pytest.fixture
def features():
    """Of 60 of the 80 samples."""
    torch.manual_seed(0)
    index = torch.randperm(DATASET)[:N].sort().values
    return Features(index, unit(N, 8), unit(N, 8))


def episode_of(
    features, teacher=None, coming=None, recent=None, *, previous=None, classes=None, **settings
):
    """An episode that trains on the features' own samples, or on ``coming``."""
    config = EpisodeConfig(**{"num_clusters": 7, **settings})
    builder = EpisodeBuilder(config, teacher=teacher, classes=classes or {})
    random = torch.Generator().manual_seed(1)
    coming = features.index if coming is None else coming
    return builder.build(coming, features, random, recent, previous)


class TestEpisode:
    def test_back_translation_and_targets_are_the_authors_formulas(self, features):
        episode = episode_of(features, torch.randn(DATASET, 5))
        assert [(s.source, s.student) for s in episode.sets] == [
            ("image", "text"), ("text", "image"), ("external", "image"), ("external", "text"),
        ]  # fmt: skip
        for item in episode.sets:
            rows = getattr(features, f"{item.student}_h")
            labels = episode.labels[item.source]
            for k, prototype in enumerate(item.prototypes):
                assert (prototype - rows[labels == k].mean(dim=0)).abs().max() < 1e-12
            if item.targets is not None:
                centroids = episode.centroids[item.source]
                teacher = torch.softmax(centroids @ centroids.T / 0.01, dim=1)
                assert (item.targets - teacher @ item.prototypes).abs().max() < 1e-12
        assert all(item.targets is None for item in episode.sets[2:])

    def test_labels_are_found_by_position_and_no_cluster_is_empty(self, features):
        episode = episode_of(features)
        labels = episode.labels_of(torch.arange(DATASET))["image"]
        outside = ~torch.isin(torch.arange(DATASET), features.index)
        assert (labels[outside] == LEFT_OUT).all() and outside.any()
        counts = torch.bincount(labels[features.index])
        assert len(counts) == 7 and (counts > 0).all()

    def test_a_warm_start_changes_few_labels(self, features):
        first = episode_of(features, kmeans_max_iter=50)
        second = episode_of(features, previous=first, kmeans_max_iter=50)
        assert second.metrics["image_churn"] < 0.05

    def test_coming_samples_without_stored_features_have_no_label(self, features):
        """A teacher's features are known for all samples: they get the nearest centroid."""
        teacher, coming = torch.randn(DATASET, 5), torch.arange(5, DATASET)
        seen = coming[::2]
        stored = Features(seen, unit(len(seen), 8), unit(len(seen), 8))
        episode = episode_of(stored, teacher, coming, recent=features)
        for source, rows in (("image", stored.image_h), ("text", stored.text_h)):
            labels = episode.labels_of(torch.arange(DATASET))[source]
            nearest = torch.cdist(rows, episode.centroids[source]).argmin(dim=1)
            assert torch.equal(labels[seen], nearest)
            unseen = torch.ones(DATASET, dtype=torch.bool)
            unseen[seen] = False
            assert (labels[unseen] == LEFT_OUT).all()
            assert episode.metrics[f"{source}_labelled"] == pytest.approx(len(seen) / len(coming))
            assert episode.metrics[f"{source}_clusters"] == 7 * len(seen) // len(coming)
        centroids = episode.centroids["external"].double()
        nearest = torch.cdist(teacher.double(), centroids).argmin(dim=1)
        assert torch.equal(episode.labels["external"].long(), nearest[coming])
        of_recent = nearest[features.index]
        prototypes = episode.sets[2].prototypes
        for k in range(len(prototypes)):  # translated by the features of other samples
            mean = features.image_h[of_recent == k].mean(dim=0)
            assert (prototypes[k] - mean).abs().max() < 1e-12

    def test_too_few_stored_rows_leave_infonce_alone(self, features):
        coming = torch.arange(DATASET)
        few = Features(coming[:3], unit(3, 8), unit(3, 8))
        assert episode_of(few, None, coming) is None
        with_teacher = episode_of(few, torch.randn(DATASET, 5), coming, recent=features)
        assert set(with_teacher.labels) == {"external"}

    def test_faiss_is_one_flag(self, features):
        pytest.importorskip("faiss")
        ours, theirs = (episode_of(features, kmeans_backend=b).labels for b in ("auto", "faiss"))
        for source, labels in theirs.items():
            assert not torch.equal(labels, ours[source])  # other random starts
            assert len(labels) == N and (labels >= 0).all()

    def test_features_that_are_not_finite_are_refused(self, features):
        features.image_h[3, 2] = math.nan
        with pytest.raises(ValueError, match="image features .* first is row 3.*lower --lr"):
            episode_of(features)

    def test_purity_by_hand(self, features):
        labels, classes = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([4, 4, 2, 2, 2])
        assert purity(labels, classes) == pytest.approx(4 / 5)
        group = torch.arange(DATASET) % 2
        episode = episode_of(features, classes={"group": group})
        image = episode.labels["image"].long()
        assert episode.metrics["image_purity_group"] == purity(image, group[features.index])


class TestHealth:
    def test_inertia_by_hand(self):
        points = torch.tensor([[0.0, 0], [2, 0], [10, 0], [12, 4]])
        clusters = kmeans(points, 2, init=points[::2], num_iters=5)
        values = health(points, clusters)
        assert values["inertia"] == pytest.approx((1 + 1 + 5 + 5) / 4)
        mean = points.mean(dim=0)
        assert values["inertia_total"] == pytest.approx(float((points - mean).square().sum() / 4))
        assert values["largest_share"] == 0.5

    def test_entropy_of_the_targets(self):
        points = unit(40, 6).float()
        clusters = kmeans(points, 5, seed=0)
        targets = torch.softmax(clusters.centroids @ clusters.centroids.T / 0.3, dim=1)
        entropies = -(targets * targets.log()).sum(dim=1)
        want = float((entropies * clusters.counts).sum() / 40)
        assert target_entropy(clusters, 0.3) == pytest.approx(want, rel=1e-5)
        assert target_entropy(clusters, 1e-4) == pytest.approx(0, abs=1e-5)


class TestCollapse:
    HEALTHY = {
        "image_inertia": 0.25, "image_clusters": 100.0, "image_largest_share": 0.04,
        "image_proto_accuracy": 0.4, "text_largest_share": 0.9,
    }  # fmt: skip

    @pytest.mark.parametrize(
        ("change", "sign"),
        [
            ({}, ""),  # captions that repeat are alike
            ({"image_largest_share": 0.3}, "one image cluster holds 30% of the samples"),
            ({"image_largest_share": 0.3, "image_clusters": 10.0}, ""),  # 5 / K is 50 %
            ({"image_inertia": 0.01}, ""),  # compact clusters that the model tells apart
            ({"image_inertia": 0.01, "image_proto_accuracy": 0.95}, "fell from 0.3 to 0.01"),
            ({"image_inertia": 0.01, "image_proto_accuracy": 0.01}, "prototype accuracy is 0.01"),
            ({"image_inertia": 0.01, "image_proto_accuracy": math.nan}, ""),  # not measured yet
        ],
    )
    def test_a_collapse_is_said_with_what_to_do(self, change, sign):
        said = collapse({**self.HEALTHY, **change}, first_inertia=0.3)
        assert sign in said and bool(said) == bool(sign)
        assert not said or "use --episode-features extract" in said

    def test_the_watch_compares_with_the_first_episode(self):
        watch = Watch()
        assert watch.collapse(self.HEALTHY) == ""
        watch.count({"image": torch.tensor([90.0, 100.0])})
        watch.count({"image": torch.tensor([96.0, 100.0])})
        later = {**self.HEALTHY, "image_inertia": 0.02, **watch.accuracy()}
        assert later["image_proto_accuracy"] == pytest.approx(0.93)
        assert "fell from 0.25 to 0.02 and prototype accuracy is 0.93" in watch.collapse(later)
        again = Watch()
        again.load_state_dict(watch.state_dict(), CPU)
        assert again.collapse(later) == watch.collapse(later)

    def test_an_episode_of_few_known_samples_is_not_the_first(self):
        """Stored features: 12 % of the samples known, hardly more than clusters; then all."""
        watch = Watch()
        watch.collapse({**self.HEALTHY, "image_inertia": 0.001, "image_labelled": 0.12})
        watch.collapse({**self.HEALTHY, "image_inertia": 0.25, "image_labelled": 0.97})
        again = Watch()
        again.load_state_dict(watch.state_dict(), CPU)
        fallen = {"image_inertia": 0.02, "image_proto_accuracy": 0.95, "image_labelled": 1.0}
        for one in (watch, again):
            assert "fell from 0.25 to 0.02" in one.collapse({**self.HEALTHY, **fallen})


def test_features_do_not_depend_on_the_training_mode():
    dataset = open_dataset("builtin:shapes:20")
    model = build_model(ModelConfig()).train()
    transform = build_transform(model.image_size, model.mean, model.std, "none")
    stream = dataset, Draws(torch.arange(20), 0), 8, transform, model.short_tokenizer
    first = extract(model, batches(*stream), device=CPU)
    again = extract(model.eval(), batches(*stream), device=CPU)
    assert torch.equal(first.image_h, again.image_h) and not model.training
    torch.testing.assert_close(first.text_h.norm(dim=1), torch.ones(20))


def test_the_loss_is_the_weighted_sum_of_its_terms(features):
    episode = episode_of(features, torch.randn(DATASET, 5))
    u, h = Encoded(unit(N, 16), unit(N, 16)), Encoded(features.image_h, features.text_h)
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
