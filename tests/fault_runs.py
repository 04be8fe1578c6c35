"""Kill a real training run again and again, and compare what it becomes with a run left alone.

``python tests/fault_runs.py --kills 20`` (``make faults``) prints counts; the tests run it short.
Each attempt is a fork of one process that has imported everything but run nothing, so that a kill
costs a second, not the ten of a fresh interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a pool of threads does not survive a fork

import protoclip.train as command
from protoclip.data import open_dataset
from protoclip.data.__main__ import export_shards
from protoclip.step import Stepper

NANO = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1,
    },
}  # fmt: skip
SAMPLES, BATCH, STEPS_PER_EPOCH = 150, 16, 10  # the last batch of an epoch is filled
FLAGS = [
    "--batch-size", str(BATCH), "--episode-size", "64", "--k", "8",
    "--infonce-warmup-epoch", "1", "--projection-hidden-dim", "32", "--report-to", "none",
    "--val-frequency", "0", "--lr", "0.003",
]  # fmt: skip


def prepare(folder: Path) -> list[str]:
    """Shards and a small model in ``folder``; the flags that use them."""
    model = folder / "nano.json"
    model.write_text(json.dumps(NANO))
    shards = folder / "shards"
    if not shards.exists():
        export_shards(open_dataset(f"builtin:shapes:{SAMPLES}"), shards, per_shard=40)
    flags = ["--train-data", str(shards), "--model", str(model), "--logs", str(folder / "logs")]
    return [*flags, *FLAGS]


def start(flags: list[str], folder: Path, name: str, ranks: int = 1) -> list[int]:
    """Fork the ranks of a run; their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            if ranks > 1:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }  # fmt: skip
            _train(flags, folder, name, rank)
        children.append(child)
    return children


def _train(flags: list[str], folder: Path, name: str, rank: int) -> None:
    """What a forked child does; which samples a step saw goes to NAME.seen.RANK. No return."""
    code = 70
    try:
        out = os.open(folder / f"{name}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        seen = open(folder / f"{name}.seen.{rank}", "a", buffering=1)  # noqa: SIM115
        step = Stepper.step

        def recorded(self, number, batches, *rest, **options):
            index = [i for batch in batches for i in batch.index.tolist()]
            print(json.dumps([number, index]), file=seen)
            return step(self, number, batches, *rest, **options)

        Stepper.step = recorded  # type: ignore[method-assign]
        command.draw_plots = lambda *_: None  # 3 s each, and no part of a run's state
        code = command.main([*flags, "--name", name, "--resume", "auto"])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(children: list[int]) -> int:
    """Exit code of the first rank once all have ended, negative for a signal."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes[0]


def losses(logs: Path, name: str) -> dict[int, float]:
    """Step -> loss, from metrics.jsonl."""
    lines = (logs / name / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len({r["step"] for r in records}) == len(records), "a step is logged twice"
    return {r["step"]: r["loss"] for r in records}


def faulty_samples(folder: Path, name: str, total: int, ranks: int) -> int:
    """Samples lost or seen twice in an epoch, by what each step really trained on."""
    steps: dict[int, list[int]] = {step: [] for step in range(total)}
    for rank in range(ranks):
        seen = dict(map(json.loads, (folder / f"{name}.seen.{rank}").read_text().splitlines()))
        assert sorted(seen) == list(range(total))
        for step, index in seen.items():
            steps[step] += index
    wrong = 0
    for first in range(0, total, STEPS_PER_EPOCH):
        drawn = [i for step in range(first, first + STEPS_PER_EPOCH) for i in steps[step]][:SAMPLES]
        wrong += len(drawn) - len(set(drawn))
    return wrong


def kill_often(
    flags: list[str], folder: Path, name: str, kills: int, seed: int = 0, ranks: int = 1
) -> dict:
    """Train ``name`` to its end through ``kills`` kills; every other one inside a write."""
    dice = random.Random(seed)
    run = folder / "logs" / name
    done, in_write = 0, 0
    while True:
        children = start([*flags, "--save-every", "1steps"], folder, name, ranks)
        if done < kills:
            inside = done % 2 == 1
            if _await_moment(children[0], run, dice, inside):
                for child in children:
                    os.kill(child, signal.SIGKILL)
                in_write += inside and any((run / "checkpoints").glob("*.tmp"))
                done += 1
        code = wait(children)
        if code == 0:
            return {"kills": done, "inside a write": in_write}
        if code != -signal.SIGKILL:
            raise RuntimeError((folder / f"{name}.out").read_text()[-2000:])


def fill_the_disk(flags: list[str], folder: Path, name: str) -> str:
    """Let the disk of a run, a small tmpfs, fill up within checkpoints; then give it room."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        return "not tried, mounting is not permitted"
    try:
        flags = [*flags, "--logs", str(disk), "--save-every", "5steps"]
        codes = [wait(start(flags, folder, name))]  # two checkpoints fit, no third beside them
        left = sorted(path.name for path in (disk / name / "checkpoints").iterdir())
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        codes.append(wait(start(flags, folder, name)))
        whole, filled = losses(folder / "logs", "whole"), losses(disk, name)
        good = codes == [2, 0] and "epoch_latest.pt" in left and whole == filled
        return "survived" if good else f"NOT survived {codes} {left}"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _await_moment(child: int, run: Path, dice: random.Random, inside: bool) -> bool:
    """Wait for one more step and a random moment, or for a checkpoint that is being written."""
    size = _size(run)
    patience = time.monotonic() + 300
    while _size(run) <= size:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        assert time.monotonic() < patience, "the run hangs"
        time.sleep(0.0005)
    if not inside:
        time.sleep(dice.random() * 0.1)
        return True
    pause = dice.random() * 0.02
    while time.monotonic() < patience:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        if any((run / "checkpoints").glob("*.tmp")):
            time.sleep(pause)
            return True
    return False


def _size(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").stat().st_size
    except FileNotFoundError:
        return 0


def compare(kills: int, epochs: int, seed: int, ranks: int, full_disk: bool) -> dict:
    """A run killed again and again beside one that is left alone; counts by name."""
    total = epochs * STEPS_PER_EPOCH
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # its fsync costs nothing
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        folder = Path(scratch)
        flags = [*prepare(folder), "--max-steps", str(total), "--batch-size", str(BATCH // ranks)]
        code = wait(start(flags, folder, "whole", ranks))
        assert code == 0, (folder / "whole.out").read_text()
        counts = {"ranks": ranks, **kill_often(flags, folder, "killed", kills, seed, ranks)}
        whole, killed = (losses(folder / "logs", name) for name in ("whole", "killed"))
        counts["steps whose loss differs"] = sum(whole[s] != killed.get(s) for s in whole)
        counts["samples lost or seen twice"] = faulty_samples(folder, "killed", total, ranks)
        if full_disk:
            counts["full disk"] = fill_the_disk(flags, folder, "filled")
    return counts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=4, help="of ten steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="numbers of processes")
    parser.add_argument("--full-disk", action="store_true", help="too; needs to mount a tmpfs")
    a = parser.parse_args(argv)
    bad = False
    for ranks in a.ranks:
        counts = compare(a.kills, a.epochs, a.seed, ranks, a.full_disk and ranks == 1)
        print(", ".join(f"{name}: {value}" for name, value in counts.items()), flush=True)
        differs = counts["steps whose loss differs"] or counts["samples lost or seen twice"]
        bad |= bool(differs) or "NOT" in counts.get("full disk", "")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
