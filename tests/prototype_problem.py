"""Problems for the prototype ops, and the error budget of a backend on them."""

import torch
import torch.nn.functional as F
from budget import assert_within_budget

import protoclip

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURES = (0.0, 0.01, 0.1, 1.0)  # of the targets; 0: hard


def unit(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape), dim=-1).to(dtype)


def problem(n, k, d, dtype, temperature):
    """Features, prototypes, labels (one ignored) and targets; the last are exact to fp64 in the
    rows that are looked up, the others are not computed."""
    h, c, labels = unit(n, d, dtype=dtype), unit(k, d, dtype=dtype), torch.randint(0, k, (n,))
    if temperature <= 0:
        targets = None
    else:
        source = 0.9 * unit(k, d).double()
        targets = torch.zeros_like(c)
        used = labels.unique()
        t = torch.softmax(source[used] @ source.T / temperature, dim=1)
        targets[used] = (t @ c.double()).to(dtype)
    if n > 2:
        labels[n // 2] = -100
    return h, c, labels, targets


def run(h, c, labels, targets, scale, weights, backend):
    """Losses and the gradients of sum(weights * losses)."""
    h, c = (t.detach().requires_grad_() for t in (h, c))
    s = torch.tensor(scale, requires_grad=True, device=h.device)
    loss = protoclip.prototype_cross_entropy(
        h, c, labels, s, targets=targets, reduction="none", backend=backend
    )
    (loss * weights).sum().backward()
    return {"loss": loss.detach(), "dh": h.grad, "dc": c.grad, "dscale": s.grad}


def plain(h, c, labels, targets, scale, weights, dtype):
    """The plain formula, run in ``dtype`` as under autocast: the products and the gradient of the
    logits in that dtype, cross-entropy in at least fp32. fp64 gives the truth. ``terms``: the sum
    of the absolute values that make up dscale."""
    wide = torch.promote_types(dtype, torch.float32)
    h, c = (t.detach().to(dtype).requires_grad_() for t in (h, c))
    s = torch.tensor(scale, dtype=wide, requires_grad=True, device=h.device)
    dots, used = h @ c.T, labels != -100
    logits = (s.to(dtype) * dots).to(wide)
    if targets is None:
        positive = logits.gather(1, labels.where(used, 0)[:, None])[:, 0]
    else:
        dot = (h * targets.to(dtype)[labels.where(used, 0)]).sum(dim=1)
        positive = (s.to(dtype) * dot).to(wide)
    loss = (logits.logsumexp(dim=1) - positive).where(used, 0)
    total = (loss * weights.to(wide)).sum()
    dh, dc, dscale, g = torch.autograd.grad(total, (h, c, s, logits))
    found = {"loss": loss.detach(), "dh": dh, "dc": dc, "dscale": dscale}
    terms = (g * dots).abs().sum() + (0 if targets is None else (dot * weights).abs().sum())
    return found | {"terms": terms.item() + 2**-29 * weights.sum().item()}


def check(n, k, d, dtype, temperature, scale, backend="cpu"):
    check_case(*problem(n, k, d, dtype, temperature), scale, torch.rand(n) + 0.5, backend)


def check_case(h, c, labels, targets, scale, weights, backend="cpu", size=0.0):
    """``size``: of what the gradients sum, where they cancel."""
    args = h, c, labels, targets, scale, weights
    got = run(*args, backend)
    assert [x.dtype for x in got.values()] == [torch.float32, h.dtype, h.dtype, torch.float32]
    truth, base = plain(*args, torch.float64), plain(*args, h.dtype)
    for name in got:
        magnitude = truth["terms"]
        if name != "dscale":
            least = 1 if name == "loss" else size
            magnitude = max([least, *truth[name].abs().flatten().tolist()])
        assert_within_budget(got[name], truth[name], base[name], name, magnitude, scale)
