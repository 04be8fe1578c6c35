"""The encoders of ``protoclip encode``: a CLIP model, a sentence encoder, or a function's."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from protoclip.common.files import state_of
from protoclip.episodes.teacher import SentenceEncoder, minilm
from protoclip.features.layout import IMAGES, SIDES, TEXTS
from protoclip.heads import WEIGHTS_FILE, load_heads
from protoclip.model import autocast_for, choose_device, choose_precision, put_channels_last
from protoclip.settings.commands import MINILM

# OpenCLIP's own example.
MODEL = "ViT-B-32"
WEIGHTS = "laion2b_s34b_b79k"
CPU_BATCH = 32  # pictures encoded at once; as fast as more, and a signal is soon answered
GPU_BATCH = 256


@dataclass(frozen=True)
class Encoder:
    """Of pictures, or of texts."""

    name: str  # equal names give equal rows
    encode: Callable[[Any], Tensor]  # [B, 3, H, W], or B texts -> float32 [B, D] on the CPU
    transform: Callable[[Image.Image], Tensor] | None = None  # of a picture in RGB -> [3, H, W]

    def no_rows(self) -> Tensor:
        """Of no pictures or texts, [0, D]."""
        if self.transform is None:
            return self.encode(["a"])[:0]
        return self.encode(self.transform(Image.new("RGB", (64, 64)))[None])[:0]


Encoders = Mapping[str, Encoder]  # of the sides to encode: IMAGES, TEXTS or both


def open_encoders(args: argparse.Namespace, only: str = "") -> Encoders:
    """The encoders that the flags name. Without flags: both sides of OpenCLIP's ViT-B-32.

    A model of OpenCLIP or a run encodes both sides; ``--image-model`` and ``--text-model`` replace
    one, and alone encode only that one.
    """
    own = {}
    if args.image_model:
        own[IMAGES] = _own_image_encoder
    if args.text_model:
        own[TEXTS] = _own_text_encoder
    has_clip = bool(args.run or args.model or args.pretrained or not own)
    wanted = [side for side in SIDES if only in ("", SIDES[side]) and (has_clip or side in own)]
    if not wanted:
        side = "text" if only == "texts" else "image"
        raise ValueError(f"--only {only}: expected --{side}-model or --model, got neither; add one")
    encoders = {side: own[side](args) for side in wanted if side in own}
    if len(encoders) < len(wanted):
        encoders = clip_encoders(args) | encoders
    return {side: encoders[side] for side in wanted}


def with_heads(encoders: Encoders, folder: str, device: torch.device) -> Encoders:
    """The encoders followed by the heads of a folder of protoclip export; unit rows."""
    heads = load_heads(folder).to(device)
    name = f"{folder} {state_of(os.path.join(folder, WEIGHTS_FILE))}"

    def followed_by(head: Callable[..., Tensor], encoder: Encoder) -> Encoder:
        def encode(inputs: Any) -> Tensor:
            with torch.no_grad():
                return head(encoder.encode(inputs).to(device), normalize=True).cpu()

        return replace(encoder, name=f"{encoder.name} {name}", encode=encode)

    head_of = {IMAGES: heads.encode_image, TEXTS: heads.encode_text}
    return {side: followed_by(head_of[side], encoder) for side, encoder in encoders.items()}


def clip_encoders(args: argparse.Namespace) -> dict[str, Encoder]:
    """Both sides of the model of --run, or of --model and --pretrained; unit rows."""
    from protoclip.evaluate.load import load_model
    from protoclip.evaluate.tasks import eval_transform

    name = args.run or args.model or MODEL
    pretrained = args.pretrained
    if args.run and (args.model or pretrained):
        raise ValueError(
            "expected one source of features, got --run and --model or --pretrained; leave out "
            "--model, --pretrained"
        )
    if name == MODEL and not pretrained:
        pretrained = WEIGHTS
    try:
        loaded = load_model(name, pretrained)
    except ValueError as error:
        if args.run or args.model or args.pretrained:
            raise
        raise ValueError(
            f"the weights {WEIGHTS} of {MODEL} cannot be downloaded here; without a download, "
            "use --run logs/NAME, a run of protoclip train, or --model NAME --pretrained FILE, or "
            "encode with any model (protoclip encode --image-model), or bring rows (features.npy)"
        ) from error
    device = choose_device(args.device)
    autocast = autocast_for(choose_precision(args.precision, device), device)
    model = loaded.model.to(device).eval()
    transform = eval_transform(model)
    tokenizer = model.short_tokenizer
    if transform is None or tokenizer is None:
        raise ValueError(
            f"{loaded.pretrained}: expected a model of pictures and captions, got {loaded.name} on "
            "stored features; name the encoders with --image-model and --text-model"
        )
    put_channels_last(model, device)
    made_by = [loaded.name, loaded.pretrained, args.precision]
    made_by += [str(state_of(file)) for file in made_by[:2] if os.path.isfile(file)]

    def rows_of(encode: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        with torch.no_grad(), autocast():
            rows = encode(batch.to(device, non_blocking=True)).float()
        return F.normalize(rows, dim=1).cpu()

    def encode_images(pictures: Tensor) -> Tensor:
        return rows_of(model.clip.encode_image, pictures)

    def encode_texts(texts: Sequence[str]) -> Tensor:
        return rows_of(model.encode_text, tokenizer(list(texts)))

    name = " ".join(made_by)
    return {IMAGES: Encoder(name, encode_images, transform), TEXTS: Encoder(name, encode_texts)}


def _own_image_encoder(args: argparse.Namespace) -> Encoder:
    """The module and the transform that the function of --image-model returns."""
    made = call_by_name(args.image_model, "--image-model")
    if not (isinstance(made, tuple) and len(made) == 2 and all(map(callable, made))):
        raise ValueError(
            f"--image-model {args.image_model}: expected it to return (module, transform), got "
            f"{type(made).__name__}"
        )
    module, transform = made
    device = choose_device(args.device)
    autocast = autocast_for(choose_precision(args.precision, device), device)
    if isinstance(module, torch.nn.Module):
        module = module.to(device).eval()

    def encode(pictures: Tensor) -> Tensor:
        with torch.no_grad(), autocast():
            rows = module(pictures.to(device, non_blocking=True))
        return _checked(rows, len(pictures), f"--image-model {args.image_model}")

    return Encoder(f"{args.image_model} {args.precision}", encode, transform)


def _own_text_encoder(args: argparse.Namespace) -> Encoder:
    """--text-model: the built-in sentence encoder, a function's callable, or Hugging Face's."""
    name = args.text_model
    device = choose_device(args.device)
    if args.paper and (name == MINILM or ":" in name):
        raise ValueError(
            "--paper: expected --text-model with a text model of Hugging Face, such as "
            f"roberta-large, got {name}"
        )
    if ":" in name and name != MINILM:
        made = call_by_name(name, "--text-model")
        if not callable(made):
            raise ValueError(
                f"--text-model {name}: expected it to return a callable, texts -> [N, D], got "
                f"{type(made).__name__}"
            )

        def encode(texts: Sequence[str]) -> Tensor:
            with torch.no_grad():
                rows = made(list(texts))
            return _checked(rows, len(texts), f"--text-model {name}")

        return Encoder(name, encode)
    sentences = minilm(device) if name == MINILM else SentenceEncoder(name, device, args.paper)
    return Encoder(f"{name}{' paper' * args.paper}", sentences.encode)


def call_by_name(name: str, flag: str) -> Any:
    """What the function MODULE:FUNCTION returns; modules in the working folder are found too."""
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise ValueError(f"{flag}: expected MODULE:FUNCTION, got {name!r}")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{flag} {name}: cannot be imported ({error}); check the name") from error
    finally:
        sys.path.remove(os.getcwd())
    return function()


def _checked(rows: Any, count: int, flag: str) -> Tensor:
    """The rows of somebody's encoder as float32 [count, D] on the CPU."""
    rows = torch.as_tensor(rows)
    if rows.ndim != 2 or len(rows) != count:
        raise ValueError(
            f"{flag}: expected rows [{count}, D] of {count} inputs, got {list(rows.shape)}; let it "
            "return one row for each"
        )
    return rows.float().cpu()


def batch_size_of(args: argparse.Namespace) -> int:
    if args.batch_size:
        return args.batch_size
    return CPU_BATCH if choose_device(args.device).type == "cpu" else GPU_BATCH
