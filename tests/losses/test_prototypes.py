"""From features to clusters, prototypes and targets; the features kept for the next episode."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip.data import Draws, batches, build_transform, open_dataset
from protoclip.episodes.feature_store import Features
from protoclip.episodes.prototypes import (
    EpisodeBuilder,
    Watch,
    collapse,
    extract,
    health,
    purity,
    target_entropy,
)
from protoclip.lloyd import kmeans
from protoclip.losses.objective import ProtoLoss, similarity_distillation
from protoclip.model import Encoded, build_model
from protoclip.ops.checks import LEFT_OUT
from protoclip.settings.config import EpisodeConfig, LossConfig, ModelConfig

N = 60  # samples of the episode
DATASET = 80
CPU = torch.device("cpu")


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(shape, dtype=torch.float64), dim=1)


@pytest.fixture
def features() -> Features:
    """Of 60 of the 80 samples."""
    torch.manual_seed(0)
    index = torch.randperm(DATASET)[:N].sort().values
    return Features(index, unit(N, 8), unit(N, 8))


def random_teacher() -> Tensor:
    return torch.randn(DATASET, 5)


def episode_of(
    features: Features,
    *,
    samples: Tensor | None = None,
    teacher: Tensor | None = None,
    recent: Features | None = None,
    previous: Any = None,
    classes: dict[str, Tensor] | None = None,
    **settings: Any,
) -> Any:
    """An episode that trains on ``samples``, or on those of the features."""
    config = EpisodeConfig(**({"num_clusters": 7} | settings))
    builder = EpisodeBuilder(config, teacher=teacher, classes=classes or {})
    random = torch.Generator().manual_seed(1)
    if samples is None:
        samples = features.index
    return builder.build(samples, features, random, recent, previous)


class TestEpisode:
    def test_images_supervise_texts_texts_images_and_a_teacher_both(
        self, features: Features
    ) -> None:
        episode = episode_of(features, teacher=random_teacher())
        assert [(item.source, item.student) for item in episode.sets] == [
            ("image", "text"), ("text", "image"), ("external", "image"), ("external", "text"),
        ]  # fmt: skip
        assert all(item.targets is None for item in episode.sets[2:])

    def test_back_translation_and_targets_are_the_authors_formulas(
        self, features: Features
    ) -> None:
        episode = episode_of(features, teacher=random_teacher())
        for item in episode.sets:
            rows = getattr(features, f"{item.student}_h")
            labels = episode.labels[item.source]
            for k, prototype in enumerate(item.prototypes):
                assert (prototype - rows[labels == k].mean(dim=0)).abs().max() < 1e-12
            if item.targets is not None:
                centroids = episode.centroids[item.source]
                shares = torch.softmax(centroids @ centroids.T / 0.01, dim=1)
                assert (item.targets - shares @ item.prototypes).abs().max() < 1e-12

    def test_labels_are_found_by_position_and_no_cluster_is_empty(self, features: Features) -> None:
        episode = episode_of(features)
        labels = episode.labels_of(torch.arange(DATASET))["image"]
        outside = ~torch.isin(torch.arange(DATASET), features.index)
        assert (labels[outside] == LEFT_OUT).all() and outside.any()
        counts = torch.bincount(labels[features.index])
        assert len(counts) == 7 and (counts > 0).all()

    def test_a_warm_start_changes_few_labels(self, features: Features) -> None:
        first = episode_of(features, kmeans_max_iter=50)
        second = episode_of(features, previous=first, kmeans_max_iter=50)
        assert second.metrics["image_churn"] < 0.05

    def test_a_teacher_of_another_width_starts_afresh(self, features: Features) -> None:
        first = episode_of(features, teacher=random_teacher())
        second = episode_of(features, teacher=random_teacher()[:, :3], previous=first)
        assert second.centroids["external"].shape[1] == 3

    def test_samples_without_stored_features_have_no_label(self, features: Features) -> None:
        samples = torch.arange(5, DATASET)
        seen = samples[::2]
        stored = Features(seen, unit(len(seen), 8), unit(len(seen), 8))
        episode = episode_of(stored, samples=samples)
        is_seen = torch.isin(torch.arange(DATASET), seen)
        for source, rows in (("image", stored.image_h), ("text", stored.text_h)):
            labels = episode.labels_of(torch.arange(DATASET))[source]
            nearest = torch.cdist(rows, episode.centroids[source]).argmin(dim=1)
            assert torch.equal(labels[seen], nearest)
            assert (labels[~is_seen] == LEFT_OUT).all()
            labelled = episode.metrics[f"{source}_labelled"]
            assert labelled == pytest.approx(len(seen) / len(samples))
            assert episode.metrics[f"{source}_clusters"] == 7 * len(seen) // len(samples)

    def test_a_teachers_features_are_known_for_all_samples(self, features: Features) -> None:
        """They get the nearest centroid; the prototypes are means of other samples' features."""
        teacher = random_teacher()
        samples = torch.arange(5, DATASET)
        seen = samples[::2]
        stored = Features(seen, unit(len(seen), 8), unit(len(seen), 8))
        episode = episode_of(stored, samples=samples, teacher=teacher, recent=features)
        centroids = episode.centroids["external"].double()
        nearest = torch.cdist(teacher.double(), centroids).argmin(dim=1)
        assert torch.equal(episode.labels["external"].long(), nearest[samples])
        of_recent = nearest[features.index]
        for k, prototype in enumerate(episode.sets[2].prototypes):
            mean = features.image_h[of_recent == k].mean(dim=0)
            assert (prototype - mean).abs().max() < 1e-12

    def test_too_few_stored_rows_leave_infonce_alone(self, features: Features) -> None:
        samples = torch.arange(DATASET)
        few = Features(samples[:3], unit(3, 8), unit(3, 8))
        assert episode_of(few, samples=samples) is None
        with_teacher = episode_of(few, samples=samples, teacher=random_teacher(), recent=features)
        assert set(with_teacher.labels) == {"external"}

    @pytest.mark.parametrize("keep_empty", [False, True])
    def test_an_empty_cluster_is_dropped_or_a_zero_vector(self, keep_empty: bool) -> None:
        """Two distinct rows cannot fill three clusters."""
        rows = unit(2, 8).repeat(10, 1)
        alike = Features(torch.arange(len(rows)), rows, rows.flip(1))
        episode = episode_of(alike, num_clusters=3, keep_empty=keep_empty)
        assert len(episode.sets) == 2
        for item in episode.sets:
            assert len(item.prototypes) == 2 + keep_empty
            for vectors in (item.prototypes, episode.centroids[item.source]):
                assert (vectors == 0).all(dim=1).sum() == keep_empty
            assert episode.labels[item.source].unique().numel() == 2
            assert episode.metrics[f"{item.source}_empty"] == 1

    def test_faiss_is_one_flag(self, features: Features) -> None:
        pytest.importorskip("faiss")
        ours = episode_of(features, kmeans_backend="auto").labels
        theirs = episode_of(features, kmeans_backend="faiss").labels
        for source, labels in theirs.items():
            assert not torch.equal(labels, ours[source])  # other random starts
            assert len(labels) == N and (labels >= 0).all()

    def test_features_that_are_not_finite_are_refused(self, features: Features) -> None:
        features.image_h[3, 2] = math.nan
        with pytest.raises(ValueError, match="image features .* first is row 3.*lower --lr"):
            episode_of(features)

    def test_purity_by_hand(self) -> None:
        labels = torch.tensor([0, 0, 0, 1, 1])
        classes = torch.tensor([4, 4, 2, 2, 2])
        assert purity(labels, classes) == pytest.approx(4 / 5)
        unknown = torch.tensor([-1, -1, 2, -1, 4])
        assert purity(labels, unknown) == pytest.approx(3 / 5)

    def test_an_episode_measures_the_purity_of_known_classes(self, features: Features) -> None:
        group = torch.arange(DATASET) % 2
        episode = episode_of(features, classes={"group": group})
        labels = episode.labels["image"].long()
        assert episode.metrics["image_purity_group"] == purity(labels, group[features.index])


class TestHealth:
    def test_inertia_by_hand(self) -> None:
        points = torch.tensor([[0.0, 0], [2, 0], [10, 0], [12, 4]])
        clusters = kmeans(points, 2, init=points[::2], num_iters=5)
        values = health(points, clusters)
        assert values["inertia"] == pytest.approx((1 + 1 + 5 + 5) / 4)
        mean = points.mean(dim=0)
        assert values["inertia_total"] == pytest.approx(float((points - mean).square().sum() / 4))
        assert values["largest_share"] == 0.5

    def test_entropy_of_the_targets_is_the_mean_over_samples(self) -> None:
        points = unit(40, 6).float()
        clusters = kmeans(points, 5, seed=0)
        targets = torch.softmax(clusters.centroids @ clusters.centroids.T / 0.3, dim=1)
        entropies = -(targets * targets.log()).sum(dim=1)
        mean = float((entropies * clusters.counts).sum() / 40)
        assert target_entropy(clusters, 0.3) == pytest.approx(mean, rel=1e-5)
        assert target_entropy(clusters, 1e-4) == pytest.approx(0, abs=1e-5)


class TestCollapse:
    HEALTHY = {
        "image_inertia": 0.25, "image_clusters": 100.0, "image_largest_share": 0.04,
        "image_proto_accuracy": 0.4, "text_largest_share": 0.9,
    }  # fmt: skip

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({}, ""),  # captions that repeat are alike
            ({"image_largest_share": 0.3}, "one image cluster holds 30 % of the samples"),
            ({"image_largest_share": 0.3, "image_clusters": 10.0}, ""),  # 5 / K is 50 %
            ({"image_inertia": 0.01}, ""),  # compact clusters that the model tells apart
            ({"image_inertia": 0.01, "image_proto_accuracy": 0.95}, "fell from 0.3 to 0.01"),
            ({"image_inertia": 0.01, "image_proto_accuracy": 0.01}, "prototype accuracy is 0.01"),
            ({"image_inertia": 0.01, "image_proto_accuracy": math.nan}, ""),  # not measured yet
        ],
    )
    def test_a_collapse_is_said_with_what_to_do(self, change: dict[str, float], words: str) -> None:
        message = collapse(self.HEALTHY | change, first_inertia=0.3)
        if not words:
            assert message == ""
        else:
            assert words in message and "use --episode-features extract" in message

    def test_the_watch_compares_with_the_first_episode(self) -> None:
        watch = Watch()
        assert watch.collapse(self.HEALTHY) == ""
        watch.count({"image": torch.tensor([90.0, 100.0])})
        watch.count({"image": torch.tensor([96.0, 100.0])})
        later = self.HEALTHY | {"image_inertia": 0.02} | watch.accuracy()
        assert later["image_proto_accuracy"] == pytest.approx(0.93)
        assert "fell from 0.25 to 0.02 and prototype accuracy is 0.93" in watch.collapse(later)
        assert restored(watch).collapse(later) == watch.collapse(later)

    def test_an_episode_of_few_known_samples_is_not_the_first(self) -> None:
        """Stored features: 12 % of the samples known, hardly more than clusters; then all."""
        watch = Watch()
        watch.collapse(self.HEALTHY | {"image_inertia": 0.001, "image_labelled": 0.12})
        watch.collapse(self.HEALTHY | {"image_inertia": 0.25, "image_labelled": 0.97})
        fallen = {"image_inertia": 0.02, "image_proto_accuracy": 0.95, "image_labelled": 1.0}
        for each_watch in (watch, restored(watch)):
            assert "fell from 0.25 to 0.02" in each_watch.collapse(self.HEALTHY | fallen)


def restored(watch: Watch) -> Watch:
    """From the state that a checkpoint holds."""
    other = Watch()
    other.load_state_dict(watch.state_dict())
    return other


def test_features_do_not_depend_on_the_training_mode() -> None:
    dataset = open_dataset("builtin:shapes:20")
    model = build_model(ModelConfig())
    transform = build_transform(model.image_size, model.mean, model.std, "none")

    def extracted() -> Features:
        draws = Draws(torch.arange(20), 0)
        stream = batches(dataset, draws, 8, transform, model.short_tokenizer)
        return extract(model, stream, device=CPU)

    model.train()
    in_training = extracted()
    model.eval()
    in_evaluation = extracted()
    assert torch.equal(in_training.image_h, in_evaluation.image_h) and not model.training
    torch.testing.assert_close(in_training.text_h.norm(dim=1), torch.ones(20))


@pytest.mark.smoke
def test_the_loss_is_the_weighted_sum_of_its_terms(features: Features) -> None:
    episode = episode_of(features, teacher=random_teacher())
    embeddings = Encoded(unit(N, 16), unit(N, 16))
    projections = Encoded(features.image_h, features.text_h)
    scale = torch.tensor(10.0, dtype=torch.float64)

    def losses(w_clip: float, w_proto: float, w_external: float, episode: Any = episode) -> Any:
        loss = ProtoLoss(LossConfig(w_clip, w_proto, w_external))
        return loss(embeddings, projections, features.index, scale, scale, episode)

    weighted = losses(1.0, 2.0, 0.5)
    terms = weighted.terms
    expected = terms["contrastive_loss"] + 2 * terms["proto_loss"] + 0.5 * terms["external_loss"]
    assert (weighted.total - expected).abs() < 1e-12
    assert 0 <= weighted.accuracy["proto_accuracy"] <= 1
    assert set(losses(1.0, 0.0, 0.0).terms) == {"contrastive_loss"}
    assert set(losses(1.0, 1.0, 1.0, episode=None).terms) == {"contrastive_loss"}


def test_distillation_is_the_divergence_of_the_off_diagonal_softmaxes() -> None:
    torch.manual_seed(0)
    students = Encoded(unit(5, 3), unit(5, 3))
    teacher = torch.randn(5, 7)
    got = similarity_distillation(students, teacher, torch.tensor(9.0), 0.2)
    teacher_rows = F.normalize(teacher, dim=1).double()
    expected = 0.0
    for rows in (students.image, students.text):
        for i in range(5):
            other_rows = [j for j in range(5) if j != i]
            p = torch.softmax(teacher_rows[other_rows] @ teacher_rows[i] / 0.2, dim=0)
            q = torch.softmax(9 * rows[other_rows] @ rows[i], dim=0)
            expected += float((p * (p / q).log()).sum()) / 10
    assert float(got) == pytest.approx(expected, rel=1e-5)
