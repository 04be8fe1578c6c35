"""Problems for the prototype ops, and the error budget of a backend on them."""

import torch
import torch.nn.functional as F
from budget import assert_draws_within_budget

import protoclip

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HARD, SOFT = (0.0,), (0.01, 0.1, 1.0)  # temperatures of the targets


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


def run(h, c, labels, targets, scale, weights, dtype, backend):
    """Losses and the gradients of sum(weights * losses)."""
    h, c = (t.to(dtype).detach().requires_grad_() for t in (h, c))
    s = torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    m = None if targets is None else targets.to(dtype)
    loss = protoclip.prototype_cross_entropy(
        h, c, labels, s, targets=m, reduction="none", backend=backend
    )
    (loss * weights.to(loss.dtype)).sum().backward()
    return {"loss": loss.detach(), "dh": h.grad, "dc": c.grad, "dscale": s.grad}


def check(n, k, d, dtype, temperatures, scale, draws=1, backend="cpu"):
    """The budget over all draws at once: the maxima of a few rows alone are a matter of luck."""
    got, base, truth = [], [], []
    for draw in range(draws):
        h, c, labels, m = problem(n, k, d, dtype, temperatures[draw % len(temperatures)])
        args = h, c, labels, m, scale, torch.rand(n) + 0.5
        got.append(run(*args, dtype, backend))
        base.append(run(*args, dtype, "reference"))
        truth.append(run(*args, torch.float64, "reference"))
    assert_draws_within_budget(got, truth, base, {})
