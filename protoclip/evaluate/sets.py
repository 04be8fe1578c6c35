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
from protoclip.data import DataError, Labels, PairDataset, batches, build_transform
from protoclip.distributed import is_main
from protoclip.evaluate.cache import FeatureCache, dataset_hash, digest
from protoclip.evaluate.folders import LABEL
from protoclip.evaluate.ranks import all_ranks, sharded
from protoclip.model import Encoded, ProtoModel

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
    captioned: bool = True  # False: ``text`` is empty, there is no retrieval
    probe_rows: Tensor | None = None  # int64, the images that probes are judged on; None: all
    targets: Tensor | None = None  # bool [N, C], several classes per image; vectors under "class"


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
    if label == LABEL:  # names that somebody chose, not identifiers
        words = list(names)
    return [[template.format(word) for template in templates] for word in words]


@dataclass(frozen=True)
class Encoder:
    """How evaluation turns pictures and captions into features: eval mode, no augmentation."""

    model: ProtoModel
    device: torch.device
    batch_size: int = 256
    workers: int = 0
    autocast: Autocast = nullcontext
    progress: Callable[[int], None] | None = None  # told rows after each batch
    expect: Callable[[int], None] | None = None  # told how many rows will follow
    cache: FeatureCache | None = None  # None: everything is encoded
    sharded: bool = False  # True on every rank: each encodes a slice, all get all rows

    @torch.no_grad()
    def images(self, dataset: PairDataset) -> Tensor:
        """u of every picture, float32 [N, D] on the device."""
        m = self.model

        def encode(rows: range) -> Tensor:
            stream = batches(
                dataset,
                torch.arange(rows.start, rows.stop),
                self.batch_size,
                eval_transform(m),
                m.short_tokenizer,
                seed=0,
                workers=self.workers,
                captions="first",
            )
            return self._rows(m.clip.encode_image, (batch.image for batch in stream))

        content = dataset_hash(dataset) if self.cache is not None else ""
        return self._kept("image", content, len(dataset), encode)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """u of every text, float32 [M, D] on the device; equal texts are encoded once."""
        position = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        unique, step = list(position), self.batch_size

        def encode(rows: range) -> Tensor:
            parts = (unique[i : min(i + step, rows.stop)] for i in rows[::step])
            tokens = (self.model.short_tokenizer(part) for part in parts)
            return self._rows(self.model.encode_text, tokens)

        content = digest(unique) if self.cache is not None else ""
        encoded = self._kept("text", content, len(unique), encode)
        return encoded[torch.tensor([position[text] for text in texts], device=encoded.device)]

    @torch.no_grad()
    def project(self, encoded: Encoded) -> Encoded:
        """h of encoded rows, unit rows [N, Dh] each, in eval mode."""
        was_training = self.model.training
        self.model.eval()
        try:
            return self.model.project(encoded)
        finally:
            self.model.train(was_training)

    def _kept(
        self, kind: str, content: str, count: int, encode: Callable[[range], Tensor]
    ) -> Tensor:
        """Rows from the cache if every rank has them; else encoded, by all ranks together."""
        if self.expect is not None:
            self.expect(count)
        path = None if self.cache is None else self.cache.path(kind, content)
        found = None if self.cache is None or path is None else self.cache.load(path)
        if found is not None and len(found) != count:
            raise DataError(
                f"{path}: expected {count} rows of {kind} features, one per {kind} of the data, "
                f"got {len(found)}; delete the file, or use --no-cache"
            )
        if self.cache is not None and self._everywhere(found is not None):
            if self.progress is not None:
                self.progress(count)
            assert found is not None
            return found.to(self.device)
        rows = sharded(encode, count, self.progress) if self.sharded else encode(range(count))
        if self.cache is not None and path is not None and is_main():
            self.cache.store(path, rows)
        return rows

    def _everywhere(self, here: bool) -> bool:
        return bool(all_ranks(here, self.device)) if self.sharded else here

    def _rows(self, encode: Callable[[Tensor], Tensor], parts: Iterable[Tensor]) -> Tensor:
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
        return torch.cat(rows)


def eval_transform(model: ProtoModel) -> Callable[[Any], Tensor]:
    """The model's own transform without augmentation: resize, centre crop, normalise."""
    own = getattr(getattr(model.clip, "visual", None), "preprocess_cfg", None) or {}
    if own.get("resize_mode", "shortest") == "shortest" and (
        own.get("interpolation", "bicubic") in ("bicubic", "random")
    ):
        return build_transform(model.image_size, model.mean, model.std, "none")
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(**own), is_train=False)


def encode_set(
    encoder: Encoder,
    dataset: PairDataset,
    templates: Sequence[str] = TEMPLATES,
    captions: str = "first",
    *,
    captioned: bool = True,
    prompts: bool = True,
) -> EvalSet:
    """Features of a data set's pictures, captions ("first" or "all") and class prompts.

    Without ``captioned`` the captions stay out, without ``prompts`` the class prompts.
    """
    if captions not in ("first", "all"):
        raise ValueError(f"captions: expected 'first' or 'all', got {captions!r}")
    image = encoder.images(dataset)
    texts: list[str] = []
    owner: list[int] = []
    for i in range(len(dataset) if captioned else 0):
        own = dataset.captions(i) if captions == "all" else dataset.captions(i)[:1]
        texts += own
        owner += [i] * len(own)
    vectors = {
        label: class_features(encoder, class_prompts(label, known.names, templates))
        for label, known in dataset.labels.items()
        if prompts
    }
    return EvalSet(
        image,
        encoder.texts(texts) if texts else image.new_zeros(0, image.shape[1]),
        torch.tensor(owner, dtype=torch.int64, device=encoder.device),
        {
            name: Labels(known.ids.to(encoder.device), known.names)
            for name, known in dataset.labels.items()
        },
        vectors,
        title=dataset.name,
        captioned=captioned,
    )


def class_features(encoder: Encoder, prompts: Sequence[Sequence[str]]) -> Tensor:
    """Class vectors, unit rows [C, D], of the prompts of each class."""
    rows = encoder.texts([prompt for own in prompts for prompt in own])
    return metrics.class_vectors(rows.unflatten(0, (len(prompts), -1)))


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
