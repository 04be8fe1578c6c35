"""Pictures: from bytes to upright RGB, and from RGB to tensors with torchvision's transforms."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from protoclip.data.files import whole_file
from protoclip.data.types import DataError
from protoclip.paths import cache_dir

logger = logging.getLogger(__name__)
_warn = functools.lru_cache(logger.warning)  # once for each file
_warning_filters = threading.Lock()  # they belong to the process, not to a thread


def _renew_lock() -> None:
    global _warning_filters
    _warning_filters = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)  # another thread may have held it


def decode(data: bytes, where: str) -> Image.Image:
    """A file's content as RGB, from any format that Pillow reads; errors begin with ``where``.

    Raises:
        DataError: empty, truncated, not a picture, or larger than Pillow's safety limit.
    """
    try:
        with _opened(data) as picture:
            limit = Image.MAX_IMAGE_PIXELS
            if limit and picture.width * picture.height > limit:
                size = f"{picture.width:,} x {picture.height:,} pixels"
                _warn("%s", f"{where}: {size} take long to read; a smaller copy would do")
            picture.load()
            with contextlib.suppress(Exception):  # damaged EXIF does not matter
                ImageOps.exif_transpose(picture, in_place=True)
            return to_rgb(picture)
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: {error}; resize it or raise Image.MAX_IMAGE_PIXELS") from error
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files
        reason = re.sub(r" <_io\..*>", "", str(error))  # drop the memory address
        raise DataError(
            f"{where}: the picture does not decode ({reason}); replace the file or leave it out"
        ) from error


def _opened(data: bytes) -> Image.Image:
    """The picture, not decoded yet. Pillow's warning about a large one does not name the file."""
    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data))


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB copy of a picture on a white background; 16-bit greys are scaled."""
    # Pillow would clip them at 255. Older versions open a 16-bit PNG as "I".
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        greys = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray(((greys + 128) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        picture = white
    return picture.convert("RGB")


def draw_svgs(files: Sequence[Path], side: int) -> np.ndarray:
    """SVG files centred on white squares: uint8 [N, side, side, 3], kept in the cache folder.

    A file that cannot be drawn is black. Text is left out because it depends on installed fonts.

    Raises:
        DataError: resvg-py is not installed.
    """
    state = repr((side, [(str(file), file.stat().st_size) for file in files]))
    path = cache_dir() / f"svg-{hashlib.sha256(state.encode()).hexdigest()[:16]}.npy"
    with contextlib.suppress(OSError, ValueError):  # missing or torn: draw it
        return np.load(path, mmap_mode="r")
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise DataError("SVG pictures need resvg-py; pip install 'protoclip[study]'") from error

    def draw(file: Path) -> np.ndarray:
        try:
            data = svg_to_bytes(svg_path=str(file), width=side, dpi=96.0, skip_system_fonts=True)
        except ValueError:
            return np.zeros((side, side, 3), dtype=np.uint8)
        return np.asarray(ImageOps.pad(decode(data, str(file)), (side, side), color="white"))

    with ThreadPoolExecutor() as pool:
        drawn = tqdm(pool.map(draw, files), "drawing", len(files), leave=False, disable=None)
        pictures = np.stack(list(drawn))
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the run
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            np.save(file, pictures)
    return pictures


@dataclass(frozen=True)
class Transform:
    """Picture -> float32 [3, H, W], normalised; see :func:`build_transform`."""

    pixels: Callable[[Image.Image], Tensor]  # the random part: -> uint8 [3, H, W]
    normalise: Callable[[Tensor], Tensor]  # a picture or a batch -> mean 0, deviation 1

    def __call__(self, picture: Image.Image) -> Tensor:
        return self.normalise(self.pixels(picture))


def build_transform(
    image_size: int, mean: Sequence[float], std: Sequence[float], augmentation: str = "none"
) -> Transform:
    """Transform to squares of ``image_size`` pixels; mean and std of each channel are in 0 ... 1.

    The augmentation is "paper" (ProtoCLIP's: crop of 50 to 100 % of the area, flip, and colour
    jitter, grey and blur with probability 0.2 each) | "clip" (CLIP's: crop of 90 to 100 %) | "none"
    (resize and centre crop, for evaluation).
    """
    from torchvision import transforms as t

    cubic = t.InterpolationMode.BICUBIC
    if augmentation == "none":
        steps = [t.Resize(image_size, interpolation=cubic), t.CenterCrop(image_size)]
    elif augmentation == "clip":
        steps = [t.RandomResizedCrop(image_size, scale=(0.9, 1.0), interpolation=cubic)]
    else:
        kernel = image_size // 10 | 1  # SimCLR: a tenth of the side, odd
        steps = [
            t.RandomResizedCrop(image_size, scale=(0.5, 1.0), interpolation=cubic),
            t.RandomHorizontalFlip(),
            t.RandomApply([t.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.2),
            t.RandomGrayscale(p=0.2),
            t.RandomApply([t.GaussianBlur(kernel, sigma=(0.1, 2.0))], p=0.2),
        ]
    floats = [t.ConvertImageDtype(torch.float32), t.Normalize(mean, std, inplace=True)]
    return Transform(t.Compose([*steps, t.PILToTensor()]), t.Compose(floats))
