"""Problems for the prototype ops, and the error budget of a backend on them."""

import torch
import torch.nn.functional as F
from budget import assert_within_budget

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


def check(n, k, d, dtype, temperatures, scale, draws=1):
    """The budget over all draws at once: the maxima of a few rows alone are a matter of luck."""
    results: dict = {"got": [], "truth": [], "base": []}
    logits = rows = 0.0
    for draw in range(draws):
        h, c, labels, m = problem(n, k, d, dtype, temperatures[draw % len(temperatures)])
        weights = torch.rand(n) / max(n, 1)
        for name, wide, backend in (
            ("got", dtype, "cpu"), ("base", dtype, "reference"),
            ("truth", torch.float64, "reference"),
        ):  # fmt: skip
            results[name].append(run(h, c, labels, m, scale, weights, wide, backend))
        if n:
            logits = max(logits, scale * (h.double() @ c.double().T).abs().max().item())
        rows = max(rows, weights.sum().item())
    # What is rounded where the result cancels: the logits of a loss; for dscale, one number, the
    # terms w (E[h.c] - h.m), whose probabilities are as exact as the logits.
    sizes = {"loss": logits, "dscale": 2 * rows * logits * max(1.0, logits) / scale}
    for name in ("loss", "dh", "dc", "dscale"):
        got, base, truth = (
            torch.stack([r[name] for r in results[x]]) for x in ("got", "base", "truth")
        )
        largest = truth.abs().max().item() if truth.numel() else 0.0
        size = max(largest, sizes.get(name, 0.0))
        assert_within_budget(got, truth, base, f"{name} of {n, k, d, scale}", size)
