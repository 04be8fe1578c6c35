"""What must work at size: a large k-means, a million samples in shards, 50,000 pictures evaluated.

``make bench-full`` has the sizes of the names; elsewhere the same work runs small, as a proof. The
prototype loss at K = 10^6 is a row of test_prototype_cross_entropy.py.
"""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import protoclip
from benchmarks import roofline
from benchmarks.harness import Bench, Case, peak_mib
from benchmarks.machine import DEVICE

KMEANS = {"full": (1_000_000, 100_000, 64)}  # N, K, D; small: (4000, 400, 16)
SAMPLES = {"full": (1000, 1000)}  # shards, samples in each; small: (4, 50)
PICTURES = {"full": 50_000}  # small: 200
MOST_MIB = 4096  # of the evaluation; [N, N] similarities alone would take 10 GB


def test_kmeans_of_a_million_points(bench: Bench) -> None:
    n, k, d = KMEANS.get(bench.sizes, (4000, 400, 16))
    torch.manual_seed(0)
    x = F.normalize(torch.randn(n, d, device=DEVICE), dim=1)
    start = x[torch.randperm(n)[:k]]
    clusters = protoclip.kmeans(x, k, num_iters=1, tol=0, warn=False, init=start)
    assert clusters.history[1] < clusters.history[0] and int(clusters.counts.sum()) == n
    work = roofline.kmeans(n, k, d, iterations=1)
    case = Case("kmeans", {"N": n, "K": k, "D": d}, "fp32", work, "1 iteration and the labels")
    bench.time(
        case,
        "protoclip-auto",
        lambda: protoclip.kmeans(x, k, num_iters=1, tol=0, warn=False, init=start),
    )


def test_index_of_a_million_samples_on_two_ranks(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards are hard links of one; their index is new to the cache each time."""
    from PIL import Image
    from webdataset import TarWriter

    shards, samples = SAMPLES.get(bench.sizes, (4, 50))
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "JPEG")
    first = tmp_path / "00000.tar"
    with TarWriter(str(first)) as tar:
        for i in range(samples):
            tar.write({"__key__": f"{i:06d}", "jpg": picture.getvalue(), "txt": f"picture {i}"})
    for number in range(1, shards):
        os.link(first, tmp_path / f"{number:05d}.tar")
    spec = f"{tmp_path}/{{00000..{shards - 1:05d}}}.tar"
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", "29533", "-m", "benchmarks.test_scale", spec]
    run = subprocess.run(launch, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    count, seconds = run.stdout.split()
    assert int(count) == shards * samples
    bench.session.say(
        f"index of {int(count):,} samples in {shards:,} shards, 2 ranks | {seconds} s"
    )
    bench.benchmark(lambda: None)


def index(spec: str) -> None:
    """What each of the ranks does."""
    from protoclip import distributed
    from protoclip.data import index_together, open_dataset

    distributed.start(distributed.find_rank(), torch.device("cpu"), 600.0)
    began = time.perf_counter()
    index_together(spec)
    dataset = open_dataset(spec)
    torch.distributed.barrier()
    if distributed.is_main():
        print(len(dataset), f"{time.perf_counter() - began:.1f}")
    distributed.stop()


def test_evaluation_of_50_000_pictures(bench: Bench) -> None:
    from protoclip.data import open_dataset
    from protoclip.evaluate.datasets import Layout
    from protoclip.evaluate.tasks import Encoder, encode_sets, evaluate_features
    from protoclip.model import build_model
    from protoclip.settings.commands import TASKS
    from protoclip.settings.config import ModelConfig

    count = PICTURES.get(bench.sizes, 200)
    layout = Layout(open_dataset(f"builtin:shapes:{count}"), captions=1)
    model = build_model(ModelConfig(add_projection_head=False)).to(DEVICE)
    tasks = TASKS if bench.sizes == "full" else ("zeroshot", "retrieval", "geometry")
    by_set = {}

    def evaluate() -> None:
        encoder = Encoder(model, torch.device(DEVICE))
        sets, train = encode_sets(encoder, layout, tasks)
        by_set.update(evaluate_features(sets, train, tasks=tasks))

    began = time.perf_counter()
    memory = peak_mib(evaluate)
    seconds = time.perf_counter() - began
    (results,) = by_set.values()
    assert results.samples == count and "text_retrieval_recall@5" in results.metrics
    assert not memory > MOST_MIB, memory
    bench.session.say(f"evaluation of {count:,} pictures | {seconds:.0f} s | +{memory:.0f} MiB")
    bench.benchmark(lambda: None)


if __name__ == "__main__":
    index(sys.argv[1])
