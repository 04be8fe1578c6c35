"""ProtoClipLoss: its prototypes, its value, and when its state moves."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks

import protoclip
from protoclip.config import ProtoConfig
from protoclip.losses import ProtoClipLoss

SCALE = 14.3


def pairs(n=40, d=12, seed=0):
    """Unit rows with groups in them, the texts near the images."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(6, d, generator=generator)
    image = centers[torch.arange(n) % 6] + 0.6 * torch.randn(n, d, generator=generator)
    text = image + 0.6 * torch.randn(n, d, generator=generator)
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def call(loss, image, text, scale=SCALE):
    """Terms, and gradients to image, text and scale."""
    inputs = [t.detach().clone().requires_grad_() for t in (image, text, torch.tensor(scale))]
    terms = loss(*inputs, output_dict=True)
    sum(terms.values()).backward()
    return {key: value.detach() for key, value in terms.items()}, [t.grad for t in inputs]


def filled(n=40, seed=0, **options):
    """A loss with prototypes, from one batch that fills the queue."""
    loss = ProtoClipLoss(proto=ProtoConfig(**{"queue": n, "k": 5, "every": 100, **options}))
    call(loss, *pairs(n, seed=seed))
    assert loss.online.sets is not None
    return loss


def dense(loss, image, text, scale):
    """docs/algorithm.md §2.3 with the [N, K] targets written out, in fp64."""
    features, total = {"image": image, "text": text}, 0.0
    labels_by_source = loss.online.labels_of({n: x.float() for n, x in features.items()}, None)
    for item in loss.online.sets:
        student, labels = features[item.student], labels_by_source[item.source]
        centroids, prototypes = (
            loss.online.centroids[item.source].double(),
            item.prototypes.double(),
        )
        if loss.proto.target_temperature > 0:
            logits = centroids @ centroids.T / loss.proto.target_temperature
            targets = logits.softmax(dim=1)[labels]
        else:
            targets = F.one_hot(labels, len(centroids)).double()
        s = loss.proto.logit_scale or scale
        total = total + F.cross_entropy(s * student @ prototypes.T, targets) / 2
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
def test_value_and_gradient_are_the_dense_ones(options):
    loss = filled(**options)
    image, text = pairs(23, seed=1)
    terms, grads = call(loss, image, text)
    wide = [t.double().requires_grad_() for t in (image, text, torch.tensor(SCALE))]
    want = dense(loss, *wide)
    assert torch.allclose(terms["proto_loss"].double(), want, rtol=1e-5)
    (want + protoclip.ClipLoss()(*(t.float() for t in wide))).backward()
    for got, truth in zip(grads, wide, strict=True):
        assert (got - truth.grad).abs().max() < 1e-4 * truth.grad.abs().max()
    assert set(terms) == {"contrastive_loss", "proto_loss"}
    total = loss(image, text, torch.tensor(SCALE))
    assert total.shape == () and total.dtype == torch.float32


def test_it_is_clip_loss_until_the_stated_step():
    loss = ProtoClipLoss(proto=ProtoConfig(queue=64, k=4))
    assert loss.steps_to_prototypes(20) == 4
    for step in range(6):
        image, text = pairs(20, seed=step)
        terms, _ = call(loss, image, text)
        assert ("proto_loss" in terms) == (step >= 4)
        plain = protoclip.ClipLoss()(image, text, torch.tensor(SCALE))
        assert torch.equal(terms["contrastive_loss"], plain)
    assert loss.metrics["clusterings"] == 1 and loss.metrics["steps"] == 6
    assert 0 <= loss.metrics["image_proto_accuracy"] <= 1
    late = ProtoClipLoss(proto=ProtoConfig(queue=64, k=4, warmup=7))
    assert late.steps_to_prototypes(20) == 7


def test_prototypes_are_the_students_means_over_the_sources_clusters_of_the_newest_rows():
    loss = ProtoClipLoss(proto=ProtoConfig(queue=50, k=3, every=1))
    batches = [*(pairs(20, seed=step) for step in range(4)), pairs(80, seed=9)]
    for count, batch in enumerate(batches, 1):
        call(loss, *batch)
        newest = [torch.cat(side)[-50:] for side in zip(*batches[:count], strict=True)]
        features = dict(zip(("image", "text"), newest, strict=True))
        for item in loss.online.sets or []:
            centroids = loss.online.centroids[item.source]
            labels = torch.cdist(features[item.source], centroids).argmin(dim=1)
            means, _ = protoclip.segment_mean(features[item.student], labels, len(centroids))
            assert item.source != item.student
            assert torch.allclose(item.prototypes, means, atol=1e-6)
    assert loss.metrics["clusterings"] == 3 and len(loss.online.sets) == 2


def test_evaluation_and_no_grad_leave_the_state_alone():
    loss = filled()
    before = loss.metrics
    image, text = pairs(seed=3)
    with torch.no_grad():
        assert "proto_loss" in loss(image, text, torch.tensor(SCALE), output_dict=True)
    loss.eval()
    call(loss, image, text)
    assert loss.metrics["steps"] == before["steps"] == 1


def test_accumulated_calls_are_one_step():
    """OpenCLIP's --accum-freq 3: three calls with all rows, the gradient through a third each."""
    proto = ProtoConfig(queue=60, k=5, every=1)
    whole, parts = ProtoClipLoss(proto=proto), ProtoClipLoss(proto=proto, accum_freq=3)
    for step in range(3):
        image, text = pairs(60, seed=step)
        terms, want = call(whole, image, text)
        got = []
        for j in range(3):
            own = torch.zeros(60, 1)
            own[20 * j : 20 * j + 20] = 1
            leaves = [t.detach().clone().requires_grad_() for t in (image, text)]
            mixed = [t * own + t.detach() * (1 - own) for t in leaves]
            again = parts(*mixed, torch.tensor(SCALE), output_dict=True)
            torch.testing.assert_close(again, terms, rtol=0, atol=0)
            sum(again.values()).backward()
            got.append([t.grad for t in leaves])
        for side in range(2):
            assert torch.allclose(sum(g[side] for g in got), want[side], atol=1e-6)
        assert parts.metrics == whole.metrics
    assert whole.metrics["clusterings"] == 3


def test_prototypes_live_behind_heads_that_the_model_owns():
    loss = ProtoClipLoss(proto=ProtoConfig(queue=40, k=5))
    image, text = pairs()
    heads = torch.nn.Linear(12, 4, bias=False)
    for _ in range(2):
        projected = [F.normalize(heads(x), dim=1) for x in (image, text)]
        terms = loss(
            image, text, torch.tensor(SCALE), output_dict=True,
            image_projection=projected[0], text_projection=projected[1],
        )  # fmt: skip
    terms["proto_loss"].backward()
    assert heads.weight.grad.abs().sum() > 0
    assert loss.online.sets[0].prototypes.shape[1] == 4
    assert not list(loss.parameters()) and not loss.state_dict()


def of_rank(folder):
    """Terms, gradients of the prototype term, and prototypes, by the flags of ClipLoss."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    own = slice(20 * rank, 20 * rank + 20)
    out = {}
    for local in (False, True):
        for with_grad in (False, True):
            loss = ProtoClipLoss(
                local, with_grad, rank=rank, world_size=2, proto=ProtoConfig(queue=40, k=5, every=2)
            )
            for step in range(4):
                image, text = pairs(40, seed=step)
                terms, grads = call(loss, image[own], text[own])
                plain = protoclip.ClipLoss(local, with_grad, rank=rank, world_size=2)
                _, of_contrastive = call(plain, image[own], text[own])
            grads = [a - b for a, b in zip(grads, of_contrastive, strict=True)]
            out[local, with_grad] = terms, grads, loss.online.sets
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_the_prototypes_and_gradients_of_one(tmp_path):
    on_ranks(2, of_rank, str(tmp_path))
    one = ProtoClipLoss(proto=ProtoConfig(queue=40, k=5, every=2))
    for step in range(4):
        image, text = pairs(40, seed=step)
        terms, grads = call(one, image, text)
        _, of_contrastive = call(protoclip.ClipLoss(), image, text)
    want = [a - b for a, b in zip(grads, of_contrastive, strict=True)]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for flags in ranks[0]:
        (terms0, grads0, sets0), (terms1, grads1, sets1) = (rank[flags] for rank in ranks)
        for mine, other, single in zip(sets0, sets1, one.online.sets, strict=True):
            for name in ("prototypes", "targets"):
                a, b, c = (getattr(item, name) for item in (mine, other, single))
                assert torch.equal(a, b) and torch.allclose(a, c, atol=1e-5)
        mean = (terms0["proto_loss"] + terms1["proto_loss"]) / 2
        assert torch.allclose(mean, terms["proto_loss"], rtol=1e-5)
        share = 1 if flags[1] else 1 / 2  # as OpenCLIP's InfoNCE: 1 / W without gather_with_grad
        for side in range(2):
            rows = torch.cat([grads0[side], grads1[side]]) / 2  # DDP's mean
            assert torch.allclose(rows, share * want[side], atol=1e-5)
        assert torch.allclose((grads0[2] + grads1[2]) / 2, want[2], atol=1e-5)
