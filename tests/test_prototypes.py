"""From features to clusters, prototypes and targets; the features kept for the next episode."""

import math

import pytest
import torch
import torch.nn.functional as F

from protoclip.config import EpisodeConfig, LossConfig, ModelConfig
from protoclip.data import Draws, batches, build_transform, open_dataset
from protoclip.losses import ProtoLoss, similarity_distillation
from protoclip.model import Encoded, build_model
from protoclip.prototypes import IGNORE, EpisodeBuilder, Features, FeatureStore, extract, purity

N, DATASET, CPU = 60, 80, torch.device("cpu")


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=1)


@pytest.fixture
def features():
    """Of 60 of the 80 samples."""
    torch.manual_seed(0)
    return Features(torch.randperm(DATASET)[:N], unit(N, 8), unit(N, 8))


def episode_of(features, teacher=None, previous=None, coming=None, classes=None, **settings):
    config = EpisodeConfig(**{"num_clusters": 7, **settings})
    builder = EpisodeBuilder(config, DATASET, teacher=teacher, classes=classes or {})
    return builder.build(features, torch.Generator().manual_seed(1), previous, coming)


class TestEpisode:
    def test_back_translation_and_targets_are_the_authors_formulas(self, features):
        episode = episode_of(features, torch.randn(DATASET, 5))
        assert [(s.source, s.student) for s in episode.sets] == [
            ("image", "text"), ("text", "image"), ("external", "image"), ("external", "text"),
        ]  # fmt: skip
        for item in episode.sets:
            own = getattr(features, f"{item.student}_h")
            labels = item.clustering.labels[features.index]
            for k, prototype in enumerate(item.prototypes):
                assert (prototype - own[labels == k].mean(dim=0)).abs().max() < 1e-12
            if item.targets is not None:
                centroids = item.clustering.centroids
                teacher = torch.softmax(centroids @ centroids.T / 0.01, dim=1)
                assert (item.targets - teacher @ item.prototypes).abs().max() < 1e-12
        assert all(item.targets is None for item in episode.sets[2:])

    def test_labels_are_found_by_position_and_no_cluster_is_empty(self, features):
        item = episode_of(features).clusterings["image"]
        outside = torch.ones(DATASET, dtype=torch.bool)
        outside[features.index] = False
        assert (item.labels[outside] == IGNORE).all()
        counts = torch.bincount(item.labels[features.index], minlength=len(item.counts))
        assert torch.equal(counts, item.counts) and (counts > 0).all()

    def test_a_warm_start_changes_few_labels(self, features):
        first = episode_of(features, kmeans_max_iter=50)
        second = episode_of(features, previous=first, kmeans_max_iter=50)
        assert second.metrics["image_churn"] < 0.05

    def test_new_samples_get_the_nearest_prototype(self, features):
        """Of the teacher's clusters at once, of the model's own as they come."""
        teacher, everything = torch.randn(DATASET, 5), torch.arange(DATASET)
        episode = episode_of(features, teacher, coming=everything)
        new = ~torch.isin(everything, features.index)
        external = episode.clusterings["external"]
        nearest = torch.cdist(teacher.double(), external.centroids.double()).argmin(dim=1)
        assert torch.equal(external.labels[new], nearest[new])
        known = external.labels[features.index]
        assert torch.equal(external.counts, torch.bincount(known, minlength=7))
        for item in episode.sets[:2]:
            h = {"image": unit(DATASET, 8), "text": unit(DATASET, 8)}
            labels = item.bank(h, everything).labels
            want = torch.cdist(h[item.source], item.clustering.centroids).argmin(dim=1)
            assert (item.clustering.labels[new] == IGNORE).all()
            assert torch.equal(labels[new], want[new])
            assert torch.equal(labels[~new], item.clustering.labels[~new])
            assert torch.equal(item.bank(h, None).labels, want)  # a queue knows no positions

    def test_faiss_is_one_flag(self, features):
        pytest.importorskip("faiss")
        ours, theirs = (episode_of(features, kmeans_backend=b).sets for b in ("auto", "faiss"))
        for a, b in ((x.clustering, y.clustering) for x, y in zip(ours, theirs, strict=True)):
            assert not torch.equal(a.labels, b.labels)  # other random starts
            assert b.counts.sum() == N and (b.labels[features.index] >= 0).all()

    def test_features_that_are_not_finite_are_refused(self, features):
        features.image_h[3, 2] = math.nan
        with pytest.raises(ValueError, match="image features .* first is row 3.*lower --lr"):
            episode_of(features)

    def test_purity_by_hand(self, features):
        labels, classes = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([4, 4, 2, 2, 2])
        assert purity(labels, classes) == pytest.approx(4 / 5)
        group = torch.arange(DATASET) % 2
        episode = episode_of(features, classes={"group": group})
        image = episode.clusterings["image"]
        known = image.labels[features.index]
        assert episode.metrics["image_purity_group"] == purity(known, group[features.index])


class TestStore:
    def test_the_newest_row_of_a_sample_counts(self):
        store = FeatureStore(2, 3, CPU)
        old, new = unit(3, 4).float(), unit(3, 4).float()
        store.put(0, torch.tensor([5, 2, 7]), Encoded(old, -old))
        store.put(1, torch.tensor([7, 1, 5]), Encoded(new, -new))
        got = store.features()
        assert got.index.tolist() == [1, 2, 5, 7]
        assert torch.equal(got.image_h, torch.stack([new[1], old[1], new[2], new[0]]))
        assert torch.equal(got.text_h, -got.image_h)


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
