"""What runs in the emulator: small calls of the public API that lead to each path of each kernel.

``ci``: the architectures on which CI runs a case; these execute each source line of each kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import protoclip
from tests.ptx import cuda_driver

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}


@dataclass(frozen=True)
class Case:
    name: str
    leaves: dict[str, Tensor]
    run: Callable[..., Any]  # of a backend and the leaves: a loss, or results by name
    scale: float = 0.0  # of the logits
    num_sms: int = 132  # of the GPU; few of them: launch rows of large batches
    has_gradients: bool = True
    # csrc/*.cu instead of kernels/: of an architecture and the leaves.
    on_cuda: Callable[..., dict[str, Tensor]] | None = None
    small_chunks: bool = False  # of G, of weights and of partial sums: several of each
    extremes: bool = False  # InfoNCE looks for extremes of the references beforehand
    # Truncated sums of tensor cores alone exceed the budget where these are fewer than 16 products
    # at a time: it has to hold with correctly rounded ones.
    truncated: tuple[int, ...] = ()
    ci: tuple[int, ...] = ()


ALL: list[Case] = []
BOTH = (80, 90)


def add(op: str, about: str, dtype: torch.dtype, **fields: Any) -> None:
    name = " ".join(part for part in (op, about, NAMES[dtype]) if part)
    ALL.append(Case(name=name, **fields))


def unit(
    n: int, d: int, seed: int, dtype: torch.dtype = FP32, near: Tensor | None = None
) -> Tensor:
    """Random unit rows."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    if near is not None:
        x = x * 0.7 + near.float() * d**0.5 * 0.5
    return F.normalize(x, dim=1).to(dtype)


def weights(n: int) -> Tensor:
    w = torch.rand(n, generator=torch.Generator().manual_seed(9)) + 0.1
    w[::7] = 0
    return w


def pairs(
    n: int, m: int, d: int, dtype: torch.dtype, scale: float = 14.3, strided: bool = False
) -> dict[str, Tensor]:
    """Features whose rows i are near each other, and the scale; strided: columns of x apart, rows
    of y unaligned."""
    y = unit(m, d, 2, dtype)
    x = unit(n, d, 1, dtype, near=y[torch.arange(n) % m])
    if strided:
        x = x.T.contiguous().T
        y = F.pad(y, (1, 2))[:, 1:-2]
    return {"x": x, "y": y, "s": torch.tensor(scale)}


FIELDS = ("num_sms", "small_chunks", "extremes", "truncated", "ci")


def fields_of(options: dict[str, Any]) -> dict[str, Any]:
    """Takes what describes the case out of the options of a loss."""
    return {name: options.pop(name) for name in FIELDS if name in options}


def info_nce(
    about: str,
    n: int,
    d: int,
    dtype: torch.dtype,
    scale: float = 14.3,
    strided: bool = False,
    longest: float = 1.0,
    **options: Any,
) -> None:
    """``longest``: the norm of the last row of x; the first one's is 0.1."""
    fields = fields_of(options)

    def run(backend: str, x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return protoclip.info_nce(x, y, s, backend=backend, **options)

    leaves = pairs(n, n, d, dtype, scale, strided)
    if longest != 1.0:
        leaves["x"] = (leaves["x"].float() * torch.linspace(0.1, longest, n)[:, None]).to(dtype)
        scale *= longest
    add(f"info_nce {n}x{d}", about, dtype, leaves=leaves, run=run, scale=scale, **fields)


def contrastive(
    about: str,
    n: int,
    m: int,
    d: int,
    dtype: torch.dtype,
    leaves: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    fields = fields_of(options)

    def run(backend: str, x: Tensor, y: Tensor, s: Tensor, **more: Tensor) -> Tensor:
        return protoclip.contrastive(x, y, s, backend=backend, **options, **more)

    leaves = pairs(n, m, d, dtype) | (leaves or {})
    add(f"contrastive {n}x{m}x{d}", about, dtype, leaves=leaves, run=run, scale=14.3, **fields)


def sigmoid_loss(
    about: str,
    n: int,
    m: int,
    d: int,
    dtype: torch.dtype,
    strided: bool = False,
    **options: Any,
) -> None:
    fields = fields_of(options)

    def run(backend: str, x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
        return protoclip.sigmoid_loss(
            x, y, s, b, backend=backend, **{"reduction": "sum", **options}
        )

    leaves = pairs(n, m, d, dtype, 10.0, strided) | {"b": torch.tensor(-8.0)}
    add(f"sigmoid_loss {n}x{m}x{d}", about, dtype, leaves=leaves, run=run, scale=10.0, **fields)


def prototypes(
    about: str,
    n: int,
    k: int,
    d: int,
    dtype: torch.dtype,
    trained: bool = False,
    soft: bool = False,
    **options: Any,
) -> None:
    """``trained``: the prototypes take a gradient too."""
    fields = fields_of(options)
    keys = unit(k, d, 4, dtype)
    labels = torch.randint(0, k, (n,), generator=torch.Generator().manual_seed(6))
    x = unit(n, d, 5, dtype, near=keys[labels])
    labels[::13] = -100
    targets = None
    if soft:
        targets = F.normalize(keys.float() + 0.3 * unit(k, d, 8), dim=1).to(dtype)

    def run(backend: str, x: Tensor, s: Tensor, keys: Tensor = keys) -> Tensor:
        return protoclip.prototype_cross_entropy(
            x,
            keys.to(x.dtype),
            labels,
            s,
            targets=None if targets is None else targets.to(x.dtype),
            backend=backend,
            **options,
        )

    leaves = {"x": x, "s": torch.tensor(20.0)}
    if trained:
        leaves["keys"] = keys
    if trained:
        about = f"trained {about}".strip()
    if soft:
        about = f"soft {about}".strip()
    fields |= {"leaves": leaves, "run": run, "scale": 20.0}
    add(f"prototypes {n}x{k}x{d}", about, dtype, **fields)


def two_banks(backend: str, x: Tensor, s: Tensor) -> Tensor:
    hard = protoclip.Bank(unit(300, 128, 4, BF16).to(x.dtype), torch.arange(150) * 2)
    soft = protoclip.Bank(
        unit(177, 128, 7, BF16).to(x.dtype), torch.arange(150), unit(177, 128, 8, BF16).to(x.dtype)
    )
    return protoclip.prototype_losses(x, [hard, soft], s, backend=backend).loss


def soft_targets(k: int, source_d: int, d: int, dtype: torch.dtype, **fields: Any) -> None:
    def run(backend: str, source: Tensor, c: Tensor) -> dict[str, Tensor]:
        return {"m": protoclip.soft_targets(source, c, 0.05, backend=backend)}

    leaves = {"source": unit(k, source_d, 1, dtype), "c": unit(k, d, 2, dtype)}
    fields |= {"leaves": leaves, "run": run, "has_gradients": False}
    add(f"soft_targets {k}x{source_d}x{d}", "", dtype, **fields)


def clusters(
    n: int,
    k: int,
    d: int,
    dtype: torch.dtype,
    *,
    clustered: bool = True,
    strided: bool = False,
    equal: int = 2,
    scale: float = 1.0,
    bad: bool = False,
) -> dict[str, Tensor]:
    """Points and centroids, ``equal`` of which are always the same; bad: some are not finite."""
    generator = torch.Generator().manual_seed(n + d)
    c = torch.randn(k, d, generator=generator)
    if clustered:
        nearest = torch.randint(0, k, (n,), generator=generator)
        p = c[nearest] + 0.5 * torch.randn(n, d, generator=generator)
    else:
        p = torch.randn(n, d, generator=generator)
    for copy in range(1, equal):
        part = k // equal
        c[copy * part : (copy + 1) * part] = c[:part].clone()
    if equal > 2:
        p[: n // 2] = c[torch.arange(n // 2) % k] + 0.01 * p[: n // 2]
    p = (p * scale).to(dtype)
    c = (c * scale).to(dtype)
    if bad:
        p[3, 1] = p[7, 0] = float("nan")
    if strided:
        p = p.T.contiguous().T
        c = F.pad(c, (1, 0))[:, 1:]
    return {"p": p, "c": c}


def kmeans_assign(about: str, n: int, k: int, d: int, dtype: torch.dtype, **options: Any) -> None:
    fields = fields_of(options)

    def on_triton(backend: str, p: Tensor, c: Tensor) -> dict[str, Tensor]:
        labels, distances = protoclip.kmeans_assign(p, c, backend=backend)
        return {"labels": labels, "distances": distances}

    def on_cuda(capability: int, p: Tensor, c: Tensor) -> dict[str, Tensor]:
        labels, distances, _ = cuda_driver.kmeans_assign(p, c, capability)
        return {"labels": labels, "distances": distances}

    fields |= {"leaves": clusters(n, k, d, dtype, **options), "run": on_triton}
    fields["has_gradients"] = False
    add(f"kmeans_assign {n}x{k}x{d}", about, dtype, **fields)
    name = f"kmeans_assign (CUDA) {n}x{k}x{d}"
    add(name, about, dtype, on_cuda=on_cuda, **fields)


def segment_mean(
    about: str,
    n: int,
    k: int,
    d: int,
    dtype: torch.dtype,
    long: bool = False,
    strided: bool = False,
    **fields: Any,
) -> None:
    """``long``: half of the rows are in one segment."""
    generator = torch.Generator().manual_seed(n)
    v = torch.randn(n, d, generator=generator).to(dtype)
    labels = torch.randint(-1, k, (n,), generator=generator)
    if long:
        labels[: n // 2] = min(5, k - 1)
    if strided:
        v = v.T.contiguous().T

    def on_triton(backend: str, v: Tensor) -> dict[str, Tensor]:
        means, counts = protoclip.segment_mean(v, labels, k, backend=backend)
        return {"means": means, "counts": counts}

    def on_cuda(capability: int, v: Tensor) -> dict[str, Tensor]:
        means, counts = cuda_driver.segment_mean(v, labels, k, capability)
        return {"means": means, "counts": counts}

    fields |= {"leaves": {"v": v}, "run": on_triton, "has_gradients": False}
    add(f"segment_mean {n}x{k}x{d}", about, dtype, **fields)
    add(f"segment_mean (CUDA) {n}x{k}x{d}", about, dtype, on_cuda=on_cuda, **fields)


def of_dtypes(case: Callable[..., None], about: str, *sizes: int, ci: Any = None, **options: Any):
    """The same case of every dtype; ``ci``: by dtype."""
    for dtype in (BF16, FP16, FP32):
        options["ci"] = (ci or {}).get(dtype, ())
        case(about, *sizes, dtype, **options)


ids300 = torch.arange(300) % 60
two_ids = torch.stack([torch.arange(300) % 90, torch.arange(300) // 3], 1)
HARD = {BF16: BOTH, FP32: BOTH}

of_dtypes(info_nce, "", 150, 64, ci=HARD)
of_dtypes(info_nce, "any D", 70, 40, ci={BF16: (80,)})
of_dtypes(info_nce, "ids", 150, 64, ids=ids300[:150])
of_dtypes(
    info_nce, "weights, smoothing, sum", 130, 128,
    weights=weights(130), label_smoothing=0.1, reduction="sum",
)  # fmt: skip
info_nce("", 300, 128, BF16)
info_nce("wide", 97, 200, BF16)
info_nce("wide, strides", 77, 200, FP16, strided=True)
info_nce("strides", 77, 64, FP32, strided=True)
info_nce("none", 129, 64, BF16, reduction="none")
info_nce("scale 0", 70, 64, BF16, scale=0.0)  # no product stands for a logit of -HIDDEN
info_nce("scale 100", 150, 64, BF16, scale=100.0)
# Products of fp32 in three of tf32 are truncated; scale 100 shows that most.
info_nce("scale 100", 150, 64, FP32, scale=100.0, ci=BOTH)
info_nce("scale 100", 70, 512, FP32, scale=100.0)
info_nce("scale 100", 66, 1024, FP32, scale=100.0)
# References that no one exponential bridges: two, slice by slice.
info_nce("far apart", 150, 64, BF16, longest=12.0, ci=BOTH)
info_nce("far apart", 150, 64, FP32, longest=12.0)
info_nce("ids, far apart", 200, 64, BF16, longest=12.0, ids=torch.arange(200) // 3)
info_nce("large rows", 300, 512, BF16, num_sms=1, truncated=(80, 86, 89, 120), ci=(90,))
info_nce("ids positive", 150, 128, BF16, ids=ids300[:150], same_id="positive")
info_nce(
    "two ids, smoothing", 200, 64, BF16,
    ids=two_ids[:200], label_smoothing=0.2, weights=weights(200),
)  # fmt: skip
info_nce("two ids, large rows", 300, 64, FP16, ids=two_ids, num_sms=1)
info_nce("stash", 150, 64, BF16, stash=True)
info_nce("stash ids", 150, 64, BF16, stash=True, ids=ids300[:150])
info_nce("one", 1, 64, BF16)
info_nce("ids", 420, 64, BF16, ids=torch.arange(420) % 70, ci=BOTH)
info_nce("ids", 420, 128, BF16, ids=torch.arange(420) // 3, num_sms=1, ci=BOTH)
info_nce(
    "two ids", 420, 64, FP16, ids=torch.stack([torch.arange(420) % 90, torch.arange(420) // 3], 1)
)
info_nce("", 420, 40, BF16)
info_nce("", 420, 64, FP32)
info_nce("ids", 300, 64, FP32, ids=torch.arange(300) % 70)
info_nce("same pairs far apart", 420, 64, BF16, scale=100.0, weights=weights(420))

generator = torch.Generator().manual_seed(5)
own = torch.randint(0, 200, (150,), generator=generator)
own[::11] = -100
several = torch.stack([own, ((own + 7) % 200).where(own >= 0, -100)], 1)
several[::3, 1] = -100
excluded = ((own + 1) % 200).where(own >= 0, -1)

of_dtypes(contrastive, "positives", 150, 200, 64, positives=own)
contrastive("", 150, 150, 128, BF16)
contrastive("", 100, 150, 64, FP16)
contrastive("more keys", 100, 257, 40, BF16)
contrastive("several positives", 150, 200, 64, BF16, positives=several, ci=BOTH)
contrastive(
    "ids, exclude", 150, 200, 64, BF16,
    positives=own, key_ids=ids300[:200], exclude=excluded, ci=BOTH,
)  # fmt: skip
contrastive(
    "ids positive", 150, 200, 64, FP16,
    positives=own, key_ids=ids300[:200], same_id="positive", weights=weights(150),
)  # fmt: skip
contrastive("large rows", 300, 300, 64, BF16, num_sms=1)
contrastive("large rows, ids", 300, 300, 64, BF16, key_ids=ids300, num_sms=1)
far = torch.randperm(420, generator=generator)
contrastive("shuffled positives", 420, 420, 64, BF16, positives=far)
contrastive("shuffled positives, large rows", 420, 420, 64, BF16, positives=far, num_sms=1, ci=BOTH)
contrastive("shuffled positives", 300, 420, 40, BF16, positives=far[:300])
contrastive(
    "shuffled positives, ids, exclude", 300, 420, 64, FP16,
    positives=far[:300], key_ids=torch.arange(420) // 2, exclude=(far[:300] + 3) % 420,
)  # fmt: skip
contrastive(
    "shuffled positives, ids", 300, 420, 64, FP32,
    positives=far[:300], key_ids=torch.arange(420) // 2,
)  # fmt: skip
bias = torch.randn(200, generator=generator)
bias[::9] = -float("inf")
bias[own[own >= 0]] = 0.1
contrastive("bias", 150, 200, 64, BF16, {"key_bias": bias}, positives=own, ci=BOTH)
bias_of_300 = torch.randn(300, generator=generator)
contrastive("bias, all seen", 150, 300, 64, BF16, {"key_bias": bias_of_300}, ci=BOTH)
contrastive("bias, large rows", 300, 300, 64, BF16, {"key_bias": bias_of_300}, num_sms=1, ci=BOTH)
bias_of_200 = torch.randn(200, generator=generator)
contrastive("bias, any D", 150, 200, 40, BF16, {"key_bias": bias_of_200}, positives=own)
negatives = torch.stack([unit(130, 64, 20 + i, BF16) for i in range(3)], 1)
contrastive("negatives", 130, 130, 64, BF16, {"negatives": negatives}, label_smoothing=0.1)
negatives_of_70 = {"negatives": negatives[:70].half()}
contrastive("negatives", 70, 70, 64, FP16, negatives_of_70, positives=far[:70] % 70)


def nt_xent(backend: str, x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return protoclip.nt_xent(x, y, s, backend=backend)


def nt_xent_of_ids(backend: str, x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    ids = torch.arange(75) // 2
    return protoclip.nt_xent(x, y, s, ids=ids, decoupled=True, backend=backend)


def sup_con(backend: str, x: Tensor, s: Tensor) -> Tensor:
    return protoclip.sup_con(x, torch.arange(140) % 9, s, backend=backend)


for dtype in (BF16, FP32):
    add("nt_xent 75x64", "", dtype, leaves=pairs(75, 75, 64, dtype), run=nt_xent, scale=14.3)
    leaves = {"x": unit(140, 64, 3, dtype), "s": torch.tensor(10.0)}
    add("sup_con 140x64", "", dtype, leaves=leaves, run=sup_con, scale=10.0)
leaves = pairs(75, 75, 128, BF16)
fields: dict[str, Any] = {"run": nt_xent_of_ids, "scale": 14.3, "ci": BOTH}
add("nt_xent 75x128", "ids, decoupled", BF16, leaves=leaves, **fields)

of_dtypes(sigmoid_loss, "", 150, 150, 64, ci=HARD)
of_dtypes(sigmoid_loss, "ids", 150, 200, 64, ids=ids300[:200], offset=23)
sigmoid_loss("any D", 97, 97, 40, BF16, ci=BOTH)
sigmoid_loss("ids", 420, 420, 64, BF16, ids=torch.arange(420) % 99, ci=BOTH)
sigmoid_loss("far offset", 130, 420, 64, BF16, offset=250, ci=BOTH)
sigmoid_loss("two ids, sum", 300, 300, 64, FP16, ids=two_ids)
sigmoid_loss(
    "two ids, exclude, smoothing, weights", 130, 130, 128, BF16,
    ids=two_ids[:130], same_id="exclude", label_smoothing=0.1, weights=weights(130),
)  # fmt: skip
sigmoid_loss("mean", 200, 300, 64, FP16, reduction="mean", offset=90)
sigmoid_loss("none", 100, 130, 128, BF16, reduction="none", offset=30)
sigmoid_loss("strides", 70, 70, 64, BF16, strided=True)


def sigmoid_loss_alone(backend: str, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"loss": protoclip.sigmoid_loss(x, y, 10.0, -8.0, backend=backend)}


leaves = {"x": unit(150, 64, 1, BF16), "y": unit(200, 64, 2, BF16)}
add(
    "sigmoid_loss 150x200x64", "no gradient", BF16,
    leaves=leaves, run=sigmoid_loss_alone, has_gradients=False, scale=10.0,
)  # fmt: skip

of_dtypes(prototypes, "", 150, 300, 128, ci={BF16: BOTH})
of_dtypes(prototypes, "", 77, 300, 40, soft=True, ci={FP32: BOTH})
prototypes("", 300, 1000, 64, BF16)
prototypes("", 130, 77, 64, BF16, trained=True, ci=BOTH)
prototypes(
    "smoothing, weights", 130, 500, 128, BF16,
    soft=True, trained=True, label_smoothing=0.1, weights=weights(130),
)  # fmt: skip
prototypes("", 97, 300, 200, BF16)
prototypes("", 97, 300, 256, FP16, soft=True, truncated=(80, 86, 89, 120))
prototypes("", 97, 300, 300, BF16, soft=True, truncated=(80, 86, 89, 120))
prototypes("", 97, 300, 300, BF16, trained=True)
prototypes("", 97, 200, 130, FP32, trained=True)
prototypes("one slice", 150, 300, 128, BF16, num_sms=1, reduction="none")


def prototypes_of_features(backend: str, x: Tensor) -> Tensor:
    keys = unit(300, 64, 4, BF16).to(x.dtype)
    return protoclip.prototype_cross_entropy(x, keys, torch.arange(97), 20.0, backend=backend)


def prototypes_of_scale(backend: str, s: Tensor) -> Tensor:
    dtype = FP64 if s.dtype == FP64 else BF16
    x = unit(97, 64, 5, BF16).to(dtype)
    keys = unit(300, 64, 4, BF16).to(dtype)
    return protoclip.prototype_cross_entropy(
        x, keys, torch.arange(97), s, reduction="sum", backend=backend
    )


def prototypes_alone(backend: str, x: Tensor) -> dict[str, Tensor]:
    return {"loss": prototypes_of_features(backend, x)}


x = unit(97, 64, 5, BF16)
fields = {"scale": 20.0, "run": prototypes_of_features}
add("prototypes 97x300x64", "features only", BF16, leaves={"x": x}, **fields)
fields |= {"run": prototypes_alone, "has_gradients": False}
add("prototypes 97x300x64", "no gradient", BF16, leaves={"x": x}, **fields)
add(
    "prototypes 97x300x64", "scale only, sum", BF16,
    leaves={"s": torch.tensor(20.0)}, run=prototypes_of_scale, scale=20.0,
)  # fmt: skip
leaves = {"x": unit(150, 128, 5, BF16), "s": torch.tensor(20.0)}
add(
    "prototype_losses 150x(300, 177)x128", "", BF16,
    leaves=leaves, run=two_banks, scale=20.0,
)  # fmt: skip

soft_targets(300, 96, 64, FP32)
soft_targets(177, 128, 40, BF16, ci=BOTH)

of_dtypes(kmeans_assign, "", 150, 300, 128, ci={FP32: BOTH, BF16: BOTH})
of_dtypes(kmeans_assign, "", 77, 77, 40)
of_dtypes(kmeans_assign, "no structure", 130, 1000, 64, clustered=False)
kmeans_assign("", 130, 300, 200, BF16)
kmeans_assign("wide", 70, 140, 300, FP32)
kmeans_assign("wide", 70, 140, 300, BF16)
kmeans_assign("strides", 90, 130, 64, FP32, strided=True)
kmeans_assign("strides", 90, 130, 64, BF16, strided=True)
kmeans_assign("no structure", 200, 500, 128, FP32, clustered=False)
kmeans_assign("ties of 4", 140, 200, 64, BF16, equal=4, ci=BOTH)
kmeans_assign("ties of 4", 140, 200, 128, FP32, equal=4)
kmeans_assign("ties of 4, strides", 100, 100, 40, FP16, equal=4, strided=True, ci=BOTH)
kmeans_assign("more ties than CTAs", 1100, 12, 8, BF16, equal=4)
kmeans_assign("huge", 100, 150, 64, FP32, scale=1e17, equal=3)
kmeans_assign("tiny", 100, 150, 64, FP32, scale=1e-17, equal=3)
kmeans_assign("not finite", 100, 150, 64, FP32, bad=True)
kmeans_assign("not finite", 100, 150, 64, BF16, bad=True)
kmeans_assign("one centroid", 33, 1, 64, BF16)
kmeans_assign("many rows", 300, 2100, 32, BF16, clustered=False)
kmeans_assign("deep", 65, 130, 513, FP32, clustered=False)
kmeans_assign("deep", 65, 130, 513, FP16, clustered=False)

of_dtypes(segment_mean, "", 300, 77, 40, ci={BF16: BOTH})
of_dtypes(segment_mean, "long runs", 700, 33, 200, long=True, ci={FP32: BOTH})
segment_mean("strides", 300, 200, 130, FP32, strided=True)
segment_mean("strides", 300, 200, 130, BF16, strided=True)
segment_mean("one column", 1000, 3, 1, FP16, long=True)
segment_mean("one", 400, 1, 257, BF16)
segment_mean("long run", 1100, 1, 8, BF16)

small: dict[str, Any] = {"small_chunks": True}
info_nce("small chunks", 300, 64, BF16, ci=BOTH, **small)
info_nce("small chunks, ids", 300, 40, FP16, ids=ids300, **small)
info_nce("small chunks", 200, 64, FP32, **small)
contrastive("small chunks", 200, 300, 64, BF16, positives=far[:200] % 300, **small)
sigmoid_loss("small chunks", 200, 300, 64, BF16, offset=50, **small)
prototypes("small chunks", 150, 500, 64, BF16, trained=True, **small)
prototypes(
    "small chunks", 130, 400, 300, BF16,
    soft=True, trained=True, truncated=(80, 86, 89, 120), **small,
)  # fmt: skip

info_nce("extremes", 300, 64, BF16, extremes=True, ci=BOTH)
info_nce("extremes, any D", 200, 40, FP16, extremes=True)
info_nce("extremes, scale 100", 300, 128, BF16, scale=100.0, extremes=True)
info_nce("extremes", 200, 64, FP32, extremes=True)
info_nce(
    "extremes, large rows", 300, 512, BF16,
    num_sms=1, extremes=True, truncated=(80, 86, 89, 120),
)  # fmt: skip
