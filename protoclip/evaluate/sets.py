"""The sets a model is judged on: which pictures, captions and classes, and their features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from protoclip import metrics
from protoclip.data import (
    Labels,
    PairDataset,
    batches,
    build_transform,
    noto_available,
    open_dataset,
)
from protoclip.distributed import gather_slices, own_slice, world_size
from protoclip.model import ProtoModel

EMOJI_TEMPLATES = ("{}", "an emoji of {}", "a picture of {}", "{} symbol")
TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "an image of {}")
ABBREVIATIONS = {"alphanum": "letters and numbers", "av-symbol": "audio and video symbol"}
Autocast = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class EvalSet:
    """Features of one evaluation set; rows need not be normalised."""

    image: Tensor  # [N, D]
    text: Tensor  # [M, D]
    caption_image: Tensor | None = None  # int64 [M], image row of each caption; None: M = N
    labels: Mapping[str, Labels] = field(default_factory=dict)
    class_vectors: Mapping[str, Tensor] = field(default_factory=dict)  # label -> [C, D]
    probes: bool = True  # False where the probes' training images are in the set
    title: str = ""


@dataclass(frozen=True)
class ProbeTrain:
    """What the linear probe and the nearest neighbours learn from."""

    image: Tensor  # [N, D]
    labels: Mapping[str, Labels]


def class_prompts(
    label: str, names: Sequence[str], templates: Sequence[str] = EMOJI_TEMPLATES
) -> list[list[str]]:
    """Readable prompts per class: group "smileys-emotion" -> "an emoji of smileys and emotion".

    Groups name two things ("food-drink"); other labels go from wide to narrow ("animal-bird").
    """
    joint = " and " if label == "group" else " "
    words = [ABBREVIATIONS.get(name, name.replace("-", joint)) for name in names]
    return [[template.format(word) for template in templates] for word in words]


@dataclass(frozen=True)
class Encoder:
    """How evaluation turns pictures and captions into features: eval mode, no augmentation.

    With several ranks each encodes a slice, and all get all rows: every rank must call alike.
    """

    model: ProtoModel
    device: torch.device
    batch_size: int = 256
    workers: int = 0
    autocast: Autocast = nullcontext
    progress: Callable[[int], None] | None = None  # told rows after each batch

    @torch.no_grad()
    def images(self, dataset: PairDataset) -> Tensor:
        """u of every picture, float32 [N, D] on the device."""
        m = self.model
        transform = build_transform(m.image_size, m.mean, m.std, "none")
        stream = batches(
            dataset,
            self._own(len(dataset)),
            self.batch_size,
            transform,
            m.tokenizer,
            seed=0,
            workers=self.workers,
            captions="first",
        )
        return self._rows(m.clip.encode_image, (batch.image for batch in stream), len(dataset))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """u of every text, float32 [M, D] on the device; equal texts are encoded once."""
        position = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        step = self.batch_size
        own = [list(position)[i] for i in self._own(len(position)).tolist()]
        tokens = (self.model.tokenizer(own[i : i + step]) for i in range(0, len(own), step))
        rows = self._rows(self.model.clip.encode_text, tokens, len(position))
        return rows[torch.tensor([position[text] for text in texts], device=rows.device)]

    @staticmethod
    def _own(total: int) -> Tensor:
        """What this rank encodes: its slice, or all where there are fewer rows than ranks."""
        every = torch.arange(total)
        return every[own_slice(total)] if total >= world_size() else every

    def _rows(
        self, encode: Callable[[Tensor], Tensor], parts: Iterable[Tensor], total: int
    ) -> Tensor:
        """All [total, D] rows, of which each rank encodes its own."""
        was_training = self.model.training
        self.model.eval()
        rows = []
        try:
            for part in parts:
                with self.autocast():
                    rows.append(encode(part.to(self.device, non_blocking=True)).float())
                if self.progress is not None:
                    self.progress(len(part))
        finally:
            self.model.train(was_training)
        own = torch.cat(rows)
        return gather_slices(own, total) if total >= world_size() else own


def encode_set(
    encoder: Encoder,
    dataset: PairDataset,
    templates: Sequence[str] = TEMPLATES,
    captions: str = "first",
) -> EvalSet:
    """Features of a data set's pictures, captions ("first" or "all") and class prompts."""
    if captions not in ("first", "all"):
        raise ValueError(f"captions: expected 'first' or 'all', got {captions!r}")
    texts: list[str] = []
    owner: list[int] = []
    for i in range(len(dataset)):
        own = dataset.captions(i) if captions == "all" else dataset.captions(i)[:1]
        texts += own
        owner += [i] * len(own)
    vectors = {}
    for label, known in dataset.labels.items():
        prompts = class_prompts(label, known.names, templates)
        rows = encoder.texts([prompt for own in prompts for prompt in own])
        vectors[label] = metrics.class_vectors(rows.unflatten(0, (len(prompts), -1)))
    return EvalSet(
        encoder.images(dataset),
        encoder.texts(texts),
        torch.tensor(owner, device=encoder.device),
        {
            name: Labels(known.ids.to(encoder.device), known.names)
            for name, known in dataset.labels.items()
        },
        vectors,
        title=dataset.name,
    )


def take(one: EvalSet, rows: Sequence[int], **changes: Any) -> EvalSet:
    """The set restricted to some of its images, with their captions; ``changes`` by field."""
    images = torch.as_tensor(rows, dtype=torch.int64, device=one.image.device)
    owner = one.caption_image
    if owner is None:
        owner = torch.arange(len(one.text), device=one.image.device)
    place = torch.full((len(one.image),), -1, device=one.image.device)
    place[images] = torch.arange(len(images), device=one.image.device)
    kept = torch.nonzero(place[owner] >= 0)[:, 0]
    labels = {name: Labels(known.ids[images], known.names) for name, known in one.labels.items()}
    return dataclasses.replace(
        one,
        image=one.image[images],
        text=one.text[kept],
        caption_image=place[owner[kept]],
        labels=labels,
        **changes,
    )


def encode_sets(
    encoder: Encoder,
    data: str,
    *,
    split: str = "auto",
    seed: int = 0,
    captions: str = "first",
    open_kwargs: Mapping[str, Any] | None = None,
) -> tuple[dict[str, EvalSet], ProbeTrain | None]:
    """Evaluation sets of ``data`` and what the probes learn from; see ``evaluate_model``."""

    def opened(split: str) -> PairDataset:
        return open_dataset(data, split, seed=seed, **(open_kwargs or {}))

    if data == "builtin:emoji":
        return _emoji_sets(encoder, opened, captions)
    if split == "auto":
        split = "heldout" if data.startswith("builtin:") else "all"
    chosen = opened(split)
    one = encode_set(encoder, chosen, TEMPLATES, captions)
    train = None
    if split == "heldout" and chosen.labels:
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
