"""A run folder as training leaves it, made in a second: for the tests of the report."""

import json
from pathlib import Path

import torch

from protoclip.data import Subset, open_dataset
from protoclip.evaluate.results import Outcome, write_results
from protoclip.evaluate.tasks import EvalSet, evaluate_features
from protoclip.model import Encoded
from protoclip.report.snapshot import Samples, save_snapshot, take_snapshot
from protoclip.settings.config import DataConfig, TrainConfig, to_dict


def make_run(path: Path, method="protoclip", noise=1.0):
    """A folder for the report: features around the groups of builtin:shapes, not trained ones."""
    data = "builtin:shapes:300"
    judged = 60
    path.mkdir(parents=True)
    config = TrainConfig(method=method, data=DataConfig(train_data=data))
    (path / "config.json").write_text(json.dumps(to_dict(config)))
    train = open_dataset(data, "train")
    heldout = open_dataset(data, "heldout")
    ids = train.labels["group"].ids
    names = train.labels["group"].names
    g = torch.Generator().manual_seed(len(path.name))
    centre = torch.randn(len(names), 16, generator=g)

    def around(ids, spread):
        return centre[ids] + spread * torch.randn(len(ids), 16, generator=g)

    image = around(ids, noise)
    text = around(ids, noise) + 1
    groups = heldout.labels["group"].ids[:judged]
    image_h = around(groups, 1.0)
    labels = {
        name: type(values)(values.ids[:judged], values.names)
        for name, values in heldout.labels.items()
    }
    text_h = image_h + noise * torch.randn(len(groups), 16, generator=g)
    rows = torch.arange(len(groups))
    shown = EvalSet(image_h, text_h, rows, labels, {"group": centre}, title="Held-out pairs")
    after = evaluate_features({"HO": shown}, tasks=("zeroshot", "retrieval", "geometry"))
    worse = EvalSet(image_h.roll(1, 0), shown.text, shown.owner, labels, {"group": centre})
    before = evaluate_features({"HO": worse}, tasks=("zeroshot", "retrieval", "geometry"))
    lines = [
        {"step": s, "contrastive_loss": 5 - s / 50, "proto_loss": 4.0, "lr": 1e-5 * s,
         "logit_scale": 14.3 + s / 10, "image_churn": 0.5, "image_clusters": 20.0}
        for s in range(1, 90)
    ]  # fmt: skip
    lines.append({"step": 45, "val_HO_text_retrieval_recall@5": 0.3, "val_HO_group/acc1": 0.2})
    lines.append({"step": 90, "val_HO_text_retrieval_recall@5": 0.4, "val_HO_group/acc1": 0.3})
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    clusters = {}
    if method == "protoclip":
        clusters = {"image": ids * 3 + torch.arange(len(ids)) % 3, "external": ids}
    encoded = Encoded(image, text)
    normalize = torch.nn.functional.normalize
    unit = Encoded(normalize(image, dim=1), normalize(text, dim=1))
    snapshot = take_snapshot(
        Samples(train, encoded, unit, clusters), (Subset(heldout, range(len(groups))), shown),
        facts={"memory_bytes": {"forward": 2**30}},
    )  # fmt: skip
    save_snapshot(path, snapshot)
    seconds = {"forward": 10.0, "data": 2.0}
    outcome = Outcome(data, "m", "p", after, before, seconds, peak_memory_bytes=2**30)
    write_results(path / "results.json", outcome)
    return path
