"""What a report needs of a trained model, kept in the run folder as ``report.safetensors``."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from protoclip.data import Labels
from protoclip.data.files import whole_file
from protoclip.evaluate import EvalSet, Results
from protoclip.evaluate.sets import take
from protoclip.model import Encoded

NAME = "report.safetensors"
FORMAT = 1
EXAMPLES = 20_000  # evaluation images kept at most, for the confusions and examples


@dataclass(frozen=True)
class Snapshot:
    """Features of training samples, of one evaluation set, and the hits behind the table."""

    index: Tensor  # int64 [N], positions in the training data
    image: Tensor  # [N, Dh], unit rows
    text: Tensor  # [N, Dh], unit rows
    plane: Tensor  # [2, N, P], principal components of image and text features
    clusters: Mapping[str, Tensor]  # source -> int64 [N], negative: none
    labels: Mapping[str, Labels] = field(default_factory=dict)  # of the N samples
    judged: EvalSet | None = None
    judged_key: str = ""  # its name in results.json
    hits: Mapping[str, Tensor] = field(default_factory=dict)  # "SET/metric" -> uint8, trained
    hits_before: Mapping[str, Tensor] = field(default_factory=dict)  # untrained
    facts: Mapping[str, Any] = field(default_factory=dict)  # environment, memory, ...


def take_snapshot(
    index: Tensor,
    encoded: Encoded,
    projected: Encoded,
    clusters: Mapping[str, Tensor],
    labels: Mapping[str, Labels],
    *,
    judged: tuple[str, EvalSet] | None = None,
    after: Results | None = None,
    before: Results | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Snapshot:
    """Pick what a report shows.

    Args:
        index: int64 [N], positions of training samples in the data.
        encoded: their u, [N, D] each, for the map.
        projected: their h, [N, Dh] unit rows each, where the prototypes live.
        clusters: source -> labels int64 [dataset] by position in the data, negative: none.
        labels: known classes by position in the data.
        judged: name and features of the evaluation set that examples come from.
        after, before: results of the trained and the untrained model, for their hits.
        facts: about the run: anything JSON can hold.
    """
    index = index.cpu()
    key, one = judged or ("", None)
    if one is not None and len(one.image) > EXAMPLES:
        one = take(one, range(EXAMPLES))
    return Snapshot(
        index,
        projected.image.float().cpu(),
        projected.text.float().cpu(),
        principal(encoded.image.cpu(), encoded.text.cpu()),
        {name: ids.cpu()[index] for name, ids in clusters.items()},
        {name: Labels(known.ids.cpu()[index], known.names) for name, known in labels.items()},
        one,
        key,
        _hits(after),
        _hits(before),
        {**environment(), **(facts or {})},
    )


def _hits(results: Results | None) -> dict[str, Tensor]:
    if results is None:
        return {}
    return {
        f"{key}/{name}": hits.to(torch.uint8).cpu()
        for key, one in results.sets.items()
        for name, hits in one.hits.items()
    }


def principal(image: Tensor, text: Tensor, dim: int = 24) -> Tensor:
    """Common principal components of unit features, each modality centred: [2, N, <= dim].

    Centring takes the modality gap out, which would otherwise be all that a map shows.
    """
    parts = [F.normalize(x.float(), dim=1) for x in (image, text)]
    both = torch.stack([part - part.mean(0) for part in parts])  # [2, N, D]
    flat = both.flatten(0, 1)
    _, vectors = torch.linalg.eigh((flat.T @ flat).double())  # ascending
    return both @ vectors.flip(1)[:, :dim].float()


def environment() -> dict[str, Any]:
    """Machine and versions, for those who want the same numbers."""
    import protoclip

    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "protoclip": getattr(protoclip, "__version__", ""),
        "commit": _commit(Path(protoclip.__file__).parents[1]),
        "cpu": f"{cpu}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }


def _commit(root: Path) -> str:
    """Commit of a checkout, read from its files; "" where there is none."""
    try:
        git = root / ".git"
        if git.is_file():
            git = Path(git.read_text().split(":", 1)[1].strip())
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head[:12]
        common = git / "commondir"
        base = (git / common.read_text().strip()) if common.is_file() else git
        return (base / head[5:]).read_text().strip()[:12]
    except (OSError, IndexError):
        return ""


def save_snapshot(folder: str | os.PathLike[str], snapshot: Snapshot) -> Path:
    """Write ``report.safetensors`` into a run folder, whole or not at all."""
    tensors: dict[str, Tensor] = {
        "index": snapshot.index,
        "image": snapshot.image.half(),
        "text": snapshot.text.half(),
        "plane": snapshot.plane.half(),
    }
    names: dict[str, list[str]] = {}
    tensors |= {f"cluster/{name}": ids.int() for name, ids in snapshot.clusters.items()}
    for name, known in snapshot.labels.items():
        tensors[f"label/{name}"] = known.ids.int()
        names[f"label/{name}"] = list(known.names)
    one = snapshot.judged
    if one is not None:
        tensors |= {"judged/image": one.image.half(), "judged/text": one.text.half()}
        if one.caption_image is not None:
            tensors["judged/owner"] = one.caption_image
        for name, known in one.labels.items():
            tensors[f"judged/label/{name}"] = known.ids
            names[f"judged/label/{name}"] = list(known.names)
        for name, vectors in one.class_vectors.items():
            tensors[f"judged/class/{name}"] = vectors.half()
    tensors |= {f"hit/{name}": hits for name, hits in snapshot.hits.items()}
    tensors |= {f"hit0/{name}": hits for name, hits in snapshot.hits_before.items()}
    content = {
        "format": FORMAT,
        "names": names,
        "facts": dict(snapshot.facts),
        "judged": {"key": snapshot.judged_key, "captioned": one.captioned if one else False},
    }
    path = Path(folder) / NAME
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        save_file(stored, temporary, {"protoclip": json.dumps(content)})
        os.chmod(temporary, 0o644)  # safetensors makes files that only their owner can read
    return path


def load_snapshot(folder: str | os.PathLike[str]) -> Snapshot | None:
    """The snapshot of a run folder; None where there is none that this version reads."""
    path = Path(folder) / NAME
    try:
        with safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {})["protoclip"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    if content.get("format") != FORMAT:
        return None

    def group(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }

    def known(prefix: str) -> dict[str, Labels]:
        return {
            name: Labels(ids.long(), tuple(content["names"][prefix + name]))
            for name, ids in group(prefix).items()
        }

    judged = None
    if "judged/image" in tensors:
        judged = EvalSet(
            tensors["judged/image"].float(),
            tensors["judged/text"].float(),
            tensors.get("judged/owner"),
            known("judged/label/"),
            {name: rows.float() for name, rows in group("judged/class/").items()},
            captioned=content["judged"]["captioned"],
        )
    return Snapshot(
        tensors["index"],
        tensors["image"].float(),
        tensors["text"].float(),
        tensors["plane"].float(),
        {name: ids.long() for name, ids in group("cluster/").items()},
        known("label/"),
        judged,
        content["judged"]["key"],
        group("hit/"),
        group("hit0/"),
        content["facts"],
    )
