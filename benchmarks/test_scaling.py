"""How cost grows: time with the flop count, memory with N D. The report fits the exponents.

InfoNCE in N, prototype cross-entropy and k-means assignment in K, each beside the form that stores
its logits as far as that one's memory allows.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import protoclip
from benchmarks import peers, roofline, test_info_nce
from benchmarks.harness import Case
from benchmarks.machine import DEVICE
from benchmarks.test_kmeans import mixture

ROWS = {"tiny": [32, 64], "quick": [1024, 2048, 4096, 8192], "full": [1024 << i for i in range(7)]}
if DEVICE == "cuda":
    ROWS["full"] = [1024 << i for i in range(8)]
LOGITS = 2**27 if DEVICE == "cpu" else 2**30  # what a form that stores them may store
PROTOTYPES = {
    "tiny": [8, 32],
    "quick": [1000, 4000, 16_000, 64_000],
    "full": [1000, 4000, 16_000, 64_000, 256_000, 1_000_000],
}
CENTROIDS = {
    "tiny": [8, 32],
    "quick": [256, 1024, 4096, 16_384],
    "full": [256, 1024, 4096, 16_384, 65_536],
}


def pytest_generate_tests(metafunc):
    tables = {"rows": ROWS, "prototypes": PROTOTYPES, "centroids": CENTROIDS}
    for name, table in tables.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, table[metafunc.config.getoption("--sizes")])


@pytest.mark.parametrize("variant", [*peers.ours("info_nce"), "open_clip", "torch.compile"])
def test_info_nce_in_n(bench, rows, variant):
    n, d = rows, 16 if bench.sizes == "tiny" else 128 if DEVICE == "cpu" else 512
    if not peers.is_ours(variant) and n * n > LOGITS:
        pytest.skip(f"{variant} stores {n} x {n} logits several times")
    if variant == "torch.compile" and bench.sizes != "full":
        pytest.skip("compiling takes longer than the quick sweep")
    loss = test_info_nce._loss(variant)
    test_info_nce._assert_parity(loss, min(n, 2048), d, torch.bfloat16)
    inputs = test_info_nce._inputs(n, d, torch.bfloat16)
    run, prepare = test_info_nce.step(loss, "both")
    rival = None
    if not peers.is_ours(variant):
        rival = lambda: test_info_nce.step(protoclip.info_nce, "both")[0](inputs)  # noqa: E731
    work = roofline.info_nce(n, d, "bf16")
    case = Case("info_nce", {"N": n, "D": d}, "bf16", work, "both", sweep="N")
    bench.time(case, variant, run, prepare=lambda: prepare(inputs), rival=rival)


def _stored_logits(h, c, labels, scale):
    return F.cross_entropy(scale * h @ c.T, labels)


@pytest.mark.parametrize(
    "variant", [*peers.ours("prototype_cross_entropy"), "matmul+cross_entropy"]
)
def test_prototypes_in_k(bench, prototypes, variant):
    n, k, d = 16 if bench.sizes == "tiny" else 256 if DEVICE == "cpu" else 4096, prototypes, 128
    torch.manual_seed(0)
    h = F.normalize(torch.randn(n, d, device=DEVICE), dim=1).requires_grad_()
    c = F.normalize(torch.randn(k, d, device=DEVICE), dim=1)
    labels = torch.randint(k, (n,), device=DEVICE)
    scale = torch.tensor(14.3, device=DEVICE)
    if not peers.is_ours(variant) and n * k > 2 * LOGITS:
        pytest.skip(f"{variant} stores {n} x {k} logits several times")
    loss = _stored_logits
    if peers.is_ours(variant):
        backend = peers.backend("prototype_cross_entropy", variant)
        loss = partial(protoclip.prototype_cross_entropy, backend=backend)

    def run(loss=loss):
        return torch.autograd.grad(loss(h, c, labels, scale), h)[0]

    truth = run(_stored_logits) if n * k <= 2 * LOGITS else run()
    assert (run() - truth).abs().max() <= 1e-3 * truth.abs().max()
    work = roofline.prototype_cross_entropy(n, k, d, "fp32")
    shape = {"N": n, "K": k, "D": d}
    case = Case("prototype_cross_entropy", shape, "fp32", work, "both", sweep="K")
    rival = None if peers.is_ours(variant) else partial(run, protoclip.prototype_cross_entropy)
    bench.time(case, variant, run, rival=rival)


@pytest.mark.parametrize("variant", [*peers.ours("kmeans_assign"), "faiss.knn", "cdist+argmin"])
def test_assign_in_k(bench, centroids, variant):
    from benchmarks.test_kmeans import ASSIGN

    n, k, d = 64 if bench.sizes == "tiny" else 8192 if DEVICE == "cpu" else 65_536, centroids, 128
    if variant == "cdist+argmin" and n * k > 4 * LOGITS:
        pytest.skip(f"{variant} stores {n} x {k} distances")
    x, c = mixture(n, min(k, n), d), torch.randn(k, d, device=DEVICE)
    rival = lambda: protoclip.kmeans_assign(x, c)  # noqa: E731
    run = ASSIGN.get(variant)
    if peers.is_ours(variant):
        run = partial(protoclip.kmeans_assign, backend=peers.backend("kmeans_assign", variant))
        rival = None
    found = run(x, c)
    labels = found[0] if isinstance(found, tuple) else found
    sample = torch.arange(0, n, max(n // 512, 1), device=DEVICE)
    _, nearest = protoclip.kmeans_assign(x[sample], c, backend="reference")
    chosen = (x[sample] - c[labels[sample]]).square().sum(dim=1)
    assert (chosen / nearest - 1).max() < 1e-4, "not the nearest centroids"
    work = roofline.kmeans_assign(n, k, d, "fp32")
    case = Case("kmeans_assign", {"N": n, "K": k, "D": d}, "fp32", work, sweep="K")
    bench.time(case, variant, lambda: run(x, c), rival=rival)
