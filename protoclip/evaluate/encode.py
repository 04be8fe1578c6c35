"""From the name of some data to the features of its evaluation sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from protoclip.data import Labels, PairDataset, noto_available, open_dataset
from protoclip.data.types import heldout_mask
from protoclip.evaluate.folders import LABEL
from protoclip.evaluate.layouts import Layout, open_layout
from protoclip.evaluate.sets import (
    EMOJI_TEMPLATES,
    TEMPLATES,
    Encoder,
    EvalSet,
    ProbeTrain,
    class_features,
    class_prompts,
    encode_set,
    take,
)
from protoclip.evaluate.tasks import PROBES, TASKS

HELDOUT_PERCENT = 20  # of a data set without a train split: what its probes are judged on


def encode_sets(
    encoder: Encoder,
    data: str | Layout,
    *,
    split: str = "auto",
    seed: int = 0,
    captions: str = "first",
    tasks: Collection[str] = TASKS,
    open_kwargs: Mapping[str, Any] | None = None,
) -> tuple[dict[str, EvalSet], ProbeTrain | None]:
    """Evaluation sets of ``data`` and what the probes learn from; see ``evaluate_model``."""
    probing = bool(PROBES & set(tasks))
    if isinstance(data, str) and not data.startswith("builtin:"):
        data = open_layout(data, split=split, **(open_kwargs or {}))
    if isinstance(data, Layout):
        return _layout_sets(encoder, data, seed, captions, tasks)

    def opened(split: str) -> PairDataset:
        return open_dataset(data, split, seed=seed, **(open_kwargs or {}))

    if data == "builtin:emoji":
        return _emoji_sets(encoder, opened, captions)
    split = "heldout" if split == "auto" else split
    chosen = opened(split)
    one = encode_set(encoder, chosen, TEMPLATES, captions)
    train = None
    if split == "heldout" and chosen.labels and probing:
        rest = opened("train")
        train = ProbeTrain(encoder.images(rest), rest.labels)
    key, title = ("HO", "Held-out pairs") if split == "heldout" else ("ALL", chosen.name)
    return {key: dataclasses.replace(one, title=title)}, train


def _emoji_sets(
    encoder: Encoder, opened: Callable[[str], PairDataset], captions: str
) -> tuple[dict[str, EvalSet], ProbeTrain]:
    """Every picture and caption is encoded once; the other sets are rows of the whole one."""
    everything = opened("all")
    outside = set(opened("heldout").keys)
    whole = encode_set(encoder, everything, EMOJI_TEMPLATES, captions)
    rows = {key: i for i, key in enumerate(everything.keys)}
    heldout = [i for key, i in rows.items() if key in outside]
    inside = [i for key, i in rows.items() if key not in outside]
    sets = {
        "HO": take(whole, heldout, title="Held-out concepts"),
        "TW": dataclasses.replace(whole, probes=False, title="All concepts"),
    }
    if noto_available():
        noto = opened("noto")  # concepts by the same keys, with the same captions and labels
        drawn = take(whole, [rows[key] for key in noto.keys], title="All concepts in Noto style")
        drawn = dataclasses.replace(drawn, image=encoder.images(noto))
        heldout = [i for i, key in enumerate(noto.keys) if key in outside]
        sets["NHO"] = take(drawn, heldout, title="Held-out concepts in Noto style")
        sets["NOTO"] = drawn
    train = take(whole, inside)
    return sets, ProbeTrain(train.image, train.labels)


def _layout_sets(
    encoder: Encoder, layout: Layout, seed: int, captions: str, tasks: Collection[str]
) -> tuple[dict[str, EvalSet], ProbeTrain | None]:
    """The one set of a layout; probes learn from its train split, else from 80 % of it."""
    templates: Sequence[str] = layout.templates or TEMPLATES
    prompts = "zeroshot" in tasks and "zeroshot" not in layout.problems
    one = encode_set(
        encoder, layout.test, templates, captions, captioned=layout.captioned, prompts=prompts
    )
    one = dataclasses.replace(one, title=layout.test.name)
    if layout.targets is not None:
        vectors = {}
        if prompts:
            words = class_prompts(LABEL, layout.class_names, templates)
            vectors = {LABEL: class_features(encoder, words)}
        one = dataclasses.replace(
            one, targets=layout.targets.to(encoder.device), class_vectors=vectors
        )
    train = None
    if one.labels and PROBES & set(tasks):
        if layout.train is not None:
            train = ProbeTrain(encoder.images(layout.train), layout.train.labels)
        else:
            one, train = _split_for_probes(one, seed)
    return {"ALL": one}, train


def _split_for_probes(one: EvalSet, seed: int) -> tuple[EvalSet, ProbeTrain]:
    """A fifth of each class judges the probes, the rest teaches them."""
    first = next(iter(one.labels.values())).ids
    mask = heldout_mask(len(first), first.cpu().numpy(), seed, HELDOUT_PERCENT)
    judged, rest = (torch.from_numpy(np.flatnonzero(m)).to(one.image.device) for m in (mask, ~mask))
    labels = {name: Labels(known.ids[rest], known.names) for name, known in one.labels.items()}
    return dataclasses.replace(one, probe_rows=judged), ProbeTrain(one.image[rest], labels)
