"""Stands in for ``protoclip train`` in the tests of protoclip compare: the same flags and files,
without training. FAKE_TRAIN, JSON, says which runs fail, stop, are judged on other pictures, or
take another time: "time 1.2". FAKE_DATA is the digest of the data."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

words = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
config = json.loads(Path(words["--preset"]).read_text())
folder = Path(words["--logs"]) / words["--name"]
run = f"{folder.parent.name}/{folder.name}"
orders = json.loads(os.environ.get("FAKE_TRAIN", "{}")).get(run, "")
with open("calls.txt", "a") as file:
    steps = config["optim"]["max_steps"]
    policy = os.environ.get("OMP_WAIT_POLICY")
    print(run, config["method"], steps, words["--resume"], policy, file=file)
if orders == "refuse":
    print("protoclip train: error: --model: no such model", file=sys.stderr)
    sys.exit(2)
folder.mkdir(parents=True, exist_ok=True)
config["run"] |= {"seed": int(words["--seed"])}
(folder / "config.json").write_text(json.dumps(config))
if orders == "fail":
    print("step 3\nprotoclip train: error: training: loss was not finite", file=sys.stderr)
    sys.exit(2)
if orders == "stop":
    print("stopped by SIGTERM after step 3; continue with --resume logs/run", file=sys.stderr)
    sys.exit(143)
if orders == "stop compare":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(Path("stopped").touch()))
    os.kill(os.getppid(), signal.SIGTERM)
    while True:
        time.sleep(0.02)
if orders == "kill":
    os.kill(os.getppid(), 9)
    sys.exit(1)
proto = config["method"] == "protoclip"
noise = random.Random(run).gauss(0, 0.002)
recalls = {
    "text_retrieval_recall@1": 0.3 + 0.1 * proto + noise,
    "image_retrieval_recall@1": 0.3 + 10 * noise,
    "alignment": 1.0,
}
judged = {
    "title": "Held-out pairs", "samples": 20, "captions": 20, "metrics": recalls,
    "fingerprint": "other" if orders == "other pictures" else "same",
}  # fmt: skip
factor = float(orders.removeprefix("time ")) if orders.startswith("time ") else 1.0
work = {"training": factor * steps * (1.5 if proto else 1.0), "teacher": 10.0 * proto}
results = {
    "data": "pairs", "model": "m", "pretrained": "p", "trained": {"HO": judged},
    "floors": {}, "steps": steps, "work_seconds": work,
    "training_data": os.environ.get("FAKE_DATA", ""),
    "shared_machine": os.environ["PROTOCLIP_SHARED_MACHINE"] == "1",
}  # fmt: skip
(folder / "results.json").write_text(json.dumps(results))
(folder / "report.html").write_text('<meta name="generator" content="protoclip report">')
