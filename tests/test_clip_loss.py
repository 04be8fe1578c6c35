"""ClipLoss and SigLipLoss against OpenCLIP's own, alone and over two ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from budget import assert_within_budget
from open_clip import loss as open_clip_loss
from ranks import on_ranks

import protoclip


def features(n=48, d=20, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    x = F.normalize(torch.randn(n, d), dim=-1)
    return x.to(dtype), F.normalize(x + 0.5 * torch.randn(n, d), dim=-1).to(dtype)


def gradients(loss, x, y, *scalars):
    inputs = [t.detach().clone().requires_grad_() for t in (x, y, *scalars)]
    value = loss(*inputs)
    value.backward()
    return value.detach(), [t.grad for t in inputs]


def assert_same(got, want, tolerance=2e-5):
    assert abs(got[0] - want[0]) <= tolerance * max(1, abs(want[0]))
    for a, b in zip(got[1], want[1], strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * max(b.abs().max(), 1e-3)


@pytest.mark.parametrize("scale", [torch.tensor(14.3), torch.tensor([100.0])])
def test_clip_loss_equals_open_clips(scale):
    ours, theirs = protoclip.ClipLoss(), open_clip_loss.ClipLoss()
    for rest in ((scale,), (scale, torch.tensor(-10.0))):
        assert_same(gradients(ours, *features(), *rest), gradients(theirs, *features(), *rest))
    x, y = features()
    out = ours(image_features=x, text_features=y, logit_scale=scale, output_dict=True)
    assert out == {"contrastive_loss": ours(x, y, scale)}


def _written_out(base):
    """A loss of somebody who built on OpenCLIP's class: label smoothing."""

    class Smoothed(base):
        def forward(self, x, y, scale, bias=None):
            logits = self.get_logits(x, y, scale, bias)
            labels = self.get_ground_truth(x.device, logits[0].shape[0])
            return sum(F.cross_entropy(t, labels, label_smoothing=0.1) for t in logits) / 2

    return Smoothed


def test_subclasses_find_logits_and_labels():
    ours, theirs = (_written_out(c)() for c in (protoclip.ClipLoss, open_clip_loss.ClipLoss))
    for rest in ((torch.tensor(14.3),), (torch.tensor(14.3), torch.tensor(-10.0))):
        assert_same(gradients(ours, *features(), *rest), gradients(theirs, *features(), *rest))


def test_refusals_name_the_flag():
    with pytest.raises(ValueError, match="use_horovod=False"):
        protoclip.ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="dist_impl"):
        protoclip.SigLipLoss(dist_impl="ring")
    x, y = features()
    for few, many in ((x[:9], y), (x, y[:9])):  # OpenCLIP's raises too
        with pytest.raises(ValueError, match=r"SigLipLoss: expected one text per image.*\(9, 20\)"):
            protoclip.SigLipLoss()(few, many, torch.tensor(10.0), torch.tensor(-10.0))


@pytest.mark.parametrize("n", [1, 48, 300])
def test_siglip_loss_equals_open_clips(n):
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    ours, theirs = protoclip.SigLipLoss(), open_clip_loss.SigLipLoss()
    x, y = features(n)
    assert_same(gradients(ours, x, y, scale, bias), gradients(theirs, x, y, scale, bias))
    assert list(ours(x, y, scale, bias, output_dict=True)) == ["contrastive_loss"]
    with torch.no_grad():
        assert torch.allclose(ours(x, y, scale, bias), theirs(x, y, scale, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale, bias", [(1.0, 0.0), (10.0, -10.0), (100.0, -20.0)])
def test_sigmoid_loss_is_within_budget(scale, bias, dtype):
    if (reason := protoclip.backends("siglip")["cpu"]) is not None:
        pytest.skip(reason)
    for n, d in ((1, 1), (2, 17), (252, 123), (300, 64)):
        results = []
        for wide, backend in ((dtype, "cpu"), (torch.float64, "reference"), (dtype, "reference")):
            x, y = (t.to(wide).requires_grad_() for t in features(n, d, dtype))
            kind = torch.promote_types(wide, torch.float32)
            s, b = (torch.tensor(v, dtype=kind, requires_grad=True) for v in (scale, bias))
            loss = protoclip.ops.sigmoid_loss(x, y, s, b, backend=backend)
            (-3 * loss).backward()
            results.append([loss.detach(), x.grad, y.grad, s.grad, b.grad])
        # A scalar's error is that of its terms: each has the rounding of a logit, and a softplus
        # is some four roundings.
        size = max(3 * n * (scale + abs(bias) + 1), 4 * results[1][0].abs().item())
        for got, truth, base in zip(*results, strict=True):
            assert_within_budget(got, truth, base, magnitude=size if got.ndim == 0 else None)


def test_siglip_op_is_sound():
    x, y = (t.requires_grad_() for t in features(9, 6))
    scale, bias = (torch.tensor([v], requires_grad=True) for v in (10.0, -10.0))
    if protoclip.backends("siglip")["cpu"] is None:
        args = (x, y, scale, bias, 0, True, "cpu", None, None, True)
        torch.library.opcheck(torch.ops.protoclip.sigmoid_loss, args)
    for loss in (protoclip.SigLipLoss(), protoclip.ClipLoss()):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, y, scale, bias), loss(x, y, scale, bias))
    x = x.detach().clone()
    x[3, 2] = torch.nan
    assert protoclip.SigLipLoss()(x, y, scale, bias).isnan()


@pytest.mark.parametrize("same_id", ["positive", "exclude"])
def test_siglip_with_ids(same_id):
    """Every logit is a positive, a negative or left out."""
    x, y = features()
    ids = torch.arange(48)[:, None] // torch.tensor([2, 12]) % torch.tensor([99, 2])
    scale, bias = torch.tensor(10.0), torch.tensor(-8.0)
    same, own = (ids[:, None] == ids).any(dim=2), torch.eye(48, dtype=torch.bool)

    def written_out(x, y, scale, bias):
        logits = scale * x @ y.T + bias
        positive = same if same_id == "positive" else own
        losses = F.softplus(torch.where(positive, -logits, logits))
        return losses.where(own | ~same if same_id == "exclude" else ~own | own, 0).sum() / 48

    ours = protoclip.SigLipLoss()
    got = gradients(lambda *a: ours(*a, ids=ids, same_id=same_id), x, y, scale, bias)
    assert_same(got, gradients(written_out, x, y, scale, bias))


def with_ids(own=slice(None), **ranks):
    """Value and gradients of ClipLoss and SigLipLoss of some of 40 pairs."""
    (x, y), ids = features(40, 12), torch.arange(40) % 13
    for loss, *bias in (
        (protoclip.ClipLoss(gather_with_grad=True, **ranks),),
        (protoclip.SigLipLoss(**ranks), torch.tensor(-10.0)),
    ):
        scalars = torch.tensor(14.3), *bias
        yield gradients(lambda *a, f=loss: f(*a, ids=ids[own]), x[own], y[own], *scalars)


def of_rank():
    """Of each case: value and gradients of ours and of OpenCLIP's, as arrays; last, with ids."""
    dist.init_process_group("gloo")
    x, y = features(40, 12)
    rank = dist.get_rank()
    own = slice(20 * rank, 20 * rank + 20)
    scale, bias = torch.tensor(14.3), torch.tensor(-10.0)
    out = []
    for local in (False, True):
        for with_grad in (False, True):
            flags = dict(local_loss=local, gather_with_grad=with_grad, rank=rank, world_size=2)
            pair = protoclip.ClipLoss(**flags), open_clip_loss.ClipLoss(**flags)
            out.append([gradients(loss, x[own], y[own], scale) for loss in pair])
    for local in (False, True):
        flags = dict(local_loss=local, rank=rank, world_size=2)
        pair = (_written_out(c)(**flags) for c in (protoclip.ClipLoss, open_clip_loss.ClipLoss))
        out.append([gradients(loss, x[own], y[own], scale) for loss in pair])
    for impl in ("bidir", "shift", "reduce", "gather"):
        flags = dict(rank=rank, world_size=2, dist_impl=impl)
        pair = protoclip.SigLipLoss(**flags), open_clip_loss.SigLipLoss(**flags)
        out.append([gradients(loss, x[own], y[own], scale, bias) for loss in pair])
    out.append(list(with_ids(own, rank=rank, world_size=2)))
    dist.destroy_process_group()
    return [[(value.numpy(), [g.numpy() for g in grads]) for value, grads in pair] for pair in out]


@pytest.fixture(scope="module")
def two_ranks():
    return [
        [[(value, list(map(torch.from_numpy, grads))) for value, grads in pair] for pair in rank]
        for rank in on_ranks(2, of_rank)
    ]


def test_ids_over_two_ranks_are_those_of_one_process(two_ranks):
    whole = list(with_ids())
    assert abs(whole[0][0] - protoclip.ClipLoss()(*features(40, 12), torch.tensor(14.3))) > 0.01
    for (value, grads), *of_ranks in zip(whole, *(rank[-1] for rank in two_ranks), strict=True):
        rows = [torch.cat(parts) / 2 for parts in zip(*(g[:2] for _, g in of_ranks), strict=True)]
        assert_same((sum(v for v, _ in of_ranks) / 2, rows), (value, grads[:2]))


def test_two_ranks_give_open_clips_values_and_gradients(two_ranks):
    ranks = [rank[:-1] for rank in two_ranks]
    for case, pairs in enumerate(zip(*ranks, strict=True)):
        if case == 3:  # local_loss and gather_with_grad: the scale's gradient is that of a strip
            for which in (0, 1):
                scales = [pair[which][1].pop() for pair in pairs]
                pairs[0][which][1].append((scales[0] + scales[1]) / 2)
                pairs[1][which][1].append((scales[0] + scales[1]) / 2)
        for ours, theirs in pairs:
            assert_same(ours, theirs)
