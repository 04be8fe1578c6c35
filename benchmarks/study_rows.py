"""What the study compares: every row is a set of flags of ``python -m protoclip.train``."""

from __future__ import annotations

from pathlib import Path

MODEL = Path(__file__).with_name("study_model.json")
EPOCHS, QUICK_EPOCHS = 12, 4
BASELINE = "CLIP"

# The same for all rows: model, data, augmentation, captions, optimiser, number of samples.
BASE = [
    *("--model", str(MODEL), "--batch-size", "128", "--augmentation", "clip"),
    *("--val-frequency", "0", "--report-to", "none", "--log-every-n-steps", "1"),
    *("--device", "cpu", "--precision", "fp32"),
]
INTERNAL = ["--w-proto-external", "0", "--external-teacher", "none"]
EXTERNAL = ["--w-proto", "0"]
DISTILL = ["--w-proto", "0", "--w-proto-external", "0", "--w-distill"]
CLIP = ["--method", "clip"]
EQUAL_TIME = "CLIP, time of ProtoCLIP"  # its epochs follow from the measured overhead

# Settings of ProtoCLIP, and of the control, that were tried on the selection concepts; "" is the
# starting point. The best mean score there becomes the row "ProtoCLIP" (or "CLIP + distillation").
PROTOCLIP_CANDIDATES = {
    "shipped default": [],
    "K 50": ["--k", "50"],
    "K 500": ["--k", "500"],
    "internal tau 0.1": ["--target-temperature", "0.1"],
    "external weight 2": ["--w-proto-external", "2"],
}
DISTILL_CANDIDATES = {
    "tau 0.1": [*DISTILL, "1", "--distill-temperature", "0.1"],
    "tau 0.05": [*DISTILL, "1", "--distill-temperature", "0.05"],
    "tau 0.1, weight 3": [*DISTILL, "3", "--distill-temperature", "0.1"],
}


# One change each to the chosen settings; one that they have already is left out.
ABLATIONS = {
    "external only": EXTERNAL,
    "internal only": INTERNAL,
    "internal only, no PBT": [*INTERNAL, "--no-PBT"],
    "internal targets hard": ["--target-temperature", "0"],
    "K = 50": ["--k", "50"],
    "K = 172": ["--k", "172"],
    "K = 500": ["--k", "500"],
    "no heads": ["--no-add-projection-head"],
    "fresh k-means": ["--kmeans-init", "random"],
}


def main_rows(chosen: list[str], distill: list[str]) -> dict[str, list[str]]:
    """Rows of the table, in order."""
    rows = {
        BASELINE: CLIP,
        "ProtoCLIP": chosen,
        "ProtoCLIP, features extracted": [*chosen, "--episode-features", "extract"],
        EQUAL_TIME: CLIP,
        "CLIP + distilled similarities": distill,
    }
    rows |= {name: [*chosen, *change] for name, change in ABLATIONS.items() if change != chosen}
    return rows


# The verdict rests on these: twice the seeds.
VERDICT_ROWS = (BASELINE, "ProtoCLIP", EQUAL_TIME)
QUICK_ROWS = (BASELINE, "ProtoCLIP", "CLIP + distilled similarities", "external only")
