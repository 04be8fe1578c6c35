"""Pictures: from bytes to upright RGB, and from RGB to tensors with torchvision's transforms."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from protoclip.common.files import DataError, kind_of, printable, remove_leftovers, whole_file
from protoclip.common.host import lock_free_after_fork, usable_cores, warn_once
from protoclip.common.signals import become_worker
from protoclip.common.waits import Wait

# torchvision's defaults.
CROP_ATTEMPTS = 10
WIDEST_CROP = 4 / 3  # the largest width over height
LONGEST = 1000  # a side over the other: resized to a model's size more would take gigabytes
CELL = 8  # pixels of a side of HOG's cells
ORIENTATIONS = 9  # of HOG's directions, without sign
DRAWN_AT_ONCE = 128  # pictures that a process draws between two updates of the progress bar

HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
NEEDS_HEIF = "HEIC: pip install pillow-heif"
# On disks of other systems macOS keeps attributes of x.jpg in ._x.jpg, which begins so.
APPLE_DOUBLE = b"\0\5\x16\7"
BY_MACOS = "._NAME by macOS"

logger = logging.getLogger(__name__)
_warning_filters = lock_free_after_fork()  # they belong to the process, not to a thread


def decode(data: bytes, where: str) -> Image.Image:
    """A file's content as RGB, from any format that Pillow reads; errors begin with ``where``.

    Raises:
        DataError: empty, truncated, not a picture, or larger than Pillow's safety limit; an
            UnavailableError where memory is short.
    """
    try:
        with _opened(data) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height > limit:
                size = f"{image.width:,} x {image.height:,} pixels"
                message = f"{where}: {size} are slow to read; use a smaller copy"
                warn_once(logger, message)
            if max(image.size) > LONGEST * min(image.size):
                raise ValueError(f"a side is more than {LONGEST:,} times the other")
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF does not matter
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: {error}; resize it or raise Image.MAX_IMAGE_PIXELS") from error
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files
        reason = re.sub(r" <_io\..*>", "", str(error))  # drop the memory address
        reason = reason or type(error).__name__
        if is_heic(data) and not can_open_heic():
            reason = NEEDS_HEIF
        raise kind_of(error)(
            f"{where}: the picture does not decode ({reason}); replace the file or leave it out"
        ) from error


def _opened(data: bytes | str) -> Image.Image:
    """The picture of a file's bytes or path, not decoded yet. Pillow's warning about a large one
    does not name the file."""
    can_open_heic()
    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        Image.preinit()  # the usual formats first
        Image.init()
        formats = [name for name in Image.OPEN if name != "EPS"]  # Ghostscript would run its code
        return Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=formats)


@functools.cache
def can_open_heic() -> bool:
    """Whether pillow-heif is installed; Pillow opens HEIC from then on."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def is_heic(beginning: bytes) -> bool:
    """Whether a file that begins so is what telephones write as .heic."""
    return beginning[4:8] == b"ftyp" and beginning[8:12] in HEIC_BRANDS


def no_picture(path: str) -> str:
    """Why Pillow opens no picture at a path, in words to count by; "" if it does.

    The ending of the name decides where Pillow knows it, else the content of the file, and of
    ``._NAME`` whether macOS wrote it.
    """
    can_open_heic()
    if os.path.basename(path).startswith("._"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(4) == APPLE_DOUBLE:
                return BY_MACOS
    ending = os.path.splitext(path)[1].lower()
    words = printable(ending) or "without an ending"
    image_format = Image.registered_extensions().get(ending)
    if image_format is None:
        try:
            with open(path, "rb") as file:
                beginning = file.read(12)
            if is_heic(beginning) and not can_open_heic():
                return NEEDS_HEIF
            with _opened(path) as image:
                image_format = image.format
        except Image.DecompressionBombError:
            return ""  # it is one, and reading it says what is wrong
        except OSError as error:  # Pillow's own has no number
            return words if error.errno is None else f"{words} ({error.strerror})"
        except Exception:  # of Pillow's plugins, about bytes that are no picture
            return words
    # Pillow also lists documents, videos and tables, which it cannot open by itself.
    return "" if Image.MIME.get(image_format or "", "").startswith("image/") else words


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB copy of a picture on a white background; 16-bit greys are scaled."""
    # Pillow would clip them at 255. Older versions open a 16-bit PNG as "I".
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        greys = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((greys + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):  # such as a TIFF of 32 bits, whose white may be any number
        greys = np.asarray(image)
        low, high = greys.min(), greys.max()
        if not (low >= 0 and high <= 255) or (image.mode == "F" and 0 < high <= 1):
            raise ValueError(
                f"expected greys of 0 to 255, got 32-bit ones of {low:g} to {high:g}; convert it "
                "to 8 bits"
            )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")


def draw_svgs(svgs: Sequence[str], path: Path, side: int) -> np.ndarray:
    """Draw SVG texts centred on white squares into the file ``path``, of which the caller holds the
    lock, on all cores.

    Lettering is left out because it depends on installed fonts.

    Returns:
        uint8 [N, side, side, 3], memory-mapped and read-only; what cannot be drawn is black.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    starts = range(0, len(svgs), DRAWN_AT_ONCE)
    with (
        whole_file(path) as temporary,
        Wait("drawing", len(svgs), "icons") as wait,
    ):
        shape = (len(svgs), side, side, 3)
        pictures = np.lib.format.open_memmap(temporary, "w+", dtype=np.uint8, shape=shape)
        _drawing.update(svgs=svgs, pictures=pictures)
        with _drawing_pool(len(starts)) as pool:
            for start, _ in zip(starts, pool.map(_draw_part, starts), strict=True):
                wait.update(min(DRAWN_AT_ONCE, len(svgs) - start))
        _drawing.clear()
        pictures.flush()
    return np.load(path, mmap_mode="r")


def _drawing_pool(parts: int) -> Executor:
    """Processes, as resvg holds Python's lock; forked ones share the pictures."""
    cores = min(usable_cores(), parts)
    if cores > 1 and sys.platform == "linux":
        return ProcessPoolExecutor(cores, multiprocessing.get_context("fork"), become_worker)
    return ThreadPoolExecutor(1)


_drawing: dict[str, Any] = {}  # the SVG texts and the pictures of the running ``draw_svgs``


def _draw_part(start: int) -> None:
    from resvg_py import svg_to_bytes

    svgs = _drawing["svgs"]
    pictures = _drawing["pictures"]
    side = pictures.shape[1]
    for i in range(start, min(start + DRAWN_AT_ONCE, len(svgs))):
        try:
            data = svg_to_bytes(
                svg_string=svgs[i], width=side, height=side, dpi=96.0, skip_system_fonts=True
            )
        except ValueError:  # not a drawing
            continue
        pictures[i] = ImageOps.pad(decode(data, f"SVG {i}"), (side, side), color="white")


def hog(image: Image.Image) -> np.ndarray:
    """Histograms of oriented gradients, float32 [(S/8 - 1)² * 36] for a square of side S.

    The grey picture's gradients vote for two of nine directions without sign; a block of 2 x 2
    cells is normalised, clipped at 0.2 and normalised again. Source: Dalal and Triggs 2005.
    """
    grey = np.asarray(image.convert("L"), dtype=np.float32) / 255
    down, right = np.gradient(grey)  # central differences
    strength = np.hypot(down, right)
    place = np.arctan2(down, right) % np.pi * (ORIENTATIONS / np.pi) - 0.5
    low = np.floor(place).astype(np.int64)
    high_share = place - low
    rows, columns = (side // CELL for side in grey.shape)
    area = slice(rows * CELL), slice(columns * CELL)
    at = np.arange(rows * CELL)[:, None] // CELL * columns + np.arange(columns * CELL) // CELL
    size = rows * columns * ORIENTATIONS
    histogram = np.zeros(size)
    for bins, votes in ((low, strength * (1 - high_share)), (low + 1, strength * high_share)):
        slots = at * ORIENTATIONS + bins[area] % ORIENTATIONS
        histogram += np.bincount(slots.ravel(), votes[area].ravel(), size)
    cells = histogram.reshape(rows, columns, ORIENTATIONS)
    corners = [cells[:-1, :-1], cells[:-1, 1:], cells[1:, :-1], cells[1:, 1:]]
    blocks = np.concatenate(corners, axis=-1).reshape(-1, 4 * ORIENTATIONS)
    for limit in (0.2, np.inf):
        blocks = blocks / np.sqrt((blocks**2).sum(1, keepdims=True) + 1e-10)
        blocks = np.minimum(blocks, limit)
    return blocks.ravel().astype(np.float32)


@dataclass(frozen=True)
class Transform:
    """Picture -> float32 [3, H, W], normalised; see :func:`build_transform`."""

    crop: Callable[[Image.Image], Image.Image]  # the random part: a square RGB picture
    mean: Tensor  # [3] of each channel, in 0 ... 1
    std: Tensor  # [3]

    def __call__(self, image: Image.Image) -> Tensor:
        return self.batch([self.pixels(image)])[0]

    def pixels(self, image: Image.Image) -> np.ndarray:
        """The random part alone: uint8 [H, W, 3]."""
        return np.array(self.crop(image))

    def batch(self, pixels: Sequence[np.ndarray]) -> Tensor:
        """B results of ``pixels`` -> float32 [B, 3, H, W], channels-last in memory as they are.

        The values are those of torchvision's ConvertImageDtype and Normalize.
        """
        stacked = torch.from_numpy(np.stack(pixels))
        rows = stacked.flatten(1).float()
        # Long rows instead of three channels, which would be the innermost loop.
        repeats = rows.shape[1] // len(self.mean)
        rows.div_(255).sub_(self.mean.repeat(repeats)).div_(self.std.repeat(repeats))
        return rows.view(stacked.shape).movedim(-1, 1)


@dataclass(frozen=True)
class RandomCrop:
    """torchvision's RandomResizedCrop with bicubic resampling, at a third of its time.

    That one makes four tensors for each attempt at a crop; this one draws all attempts at once.
    """

    side: int  # of the result, in pixels
    smallest: float  # share of the picture's area; the largest is 1

    def __call__(self, image: Image.Image) -> Image.Image:
        crop = image.crop(self.box(*image.size))
        return crop.resize((self.side, self.side), Image.Resampling.BICUBIC)

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of a random crop, in pixels."""
        attempts = torch.rand(CROP_ATTEMPTS + 1, 2).tolist()
        left_draw, top_draw = attempts.pop()
        for area_draw, aspect_draw in attempts:
            area = width * height * (self.smallest + (1 - self.smallest) * area_draw)
            aspect = WIDEST_CROP ** (2 * aspect_draw - 1)  # uniform in its logarithm
            crop_width = round(math.sqrt(area * aspect))
            crop_height = round(math.sqrt(area / aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left = int(left_draw * (width - crop_width + 1))
                top = int(top_draw * (height - crop_height + 1))
                return left, top, left + crop_width, top + crop_height
        # A long picture: as much of its middle as the aspect allows.
        crop_width = min(width, round(height * WIDEST_CROP))
        crop_height = min(height, round(width * WIDEST_CROP))
        left = (width - crop_width) // 2
        top = (height - crop_height) // 2
        return left, top, left + crop_width, top + crop_height


def build_transform(
    image_size: int, mean: Sequence[float], std: Sequence[float], augmentation: str = "none"
) -> Transform:
    """Transform to squares of ``image_size`` pixels; mean and std of each channel are in 0 ... 1.

    The augmentation is "paper" (ProtoCLIP's: crop of 50 to 100 % of the area, flip, and colour
    jitter, grey and blur with probability 0.2 each) | "clip" (CLIP's: crop of 90 to 100 %) | "none"
    (resize and centre crop, for evaluation).
    """
    from torchvision import transforms as t

    if augmentation == "none":
        cubic = t.InterpolationMode.BICUBIC
        steps = [t.Resize(image_size, interpolation=cubic), t.CenterCrop(image_size)]
    elif augmentation == "clip":
        steps = [RandomCrop(image_size, smallest=0.9)]
    else:
        kernel = image_size // 10 | 1  # SimCLR: a tenth of the side, odd
        steps = [
            RandomCrop(image_size, smallest=0.5),
            t.RandomHorizontalFlip(),
            t.RandomApply([t.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.2),
            t.RandomGrayscale(p=0.2),
            t.RandomApply([t.GaussianBlur(kernel, sigma=(0.1, 2.0))], p=0.2),
        ]
    return Transform(t.Compose(steps), torch.tensor(mean), torch.tensor(std))
