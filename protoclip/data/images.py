"""Pictures from bytes: RGB always, transparency on white, one clear error."""

from __future__ import annotations

import contextlib
import io
import re

import numpy as np
from PIL import Image, ImageOps

from protoclip.data.types import DataError


def decode(data: bytes, where: str) -> Image.Image:
    """Decode a picture to RGB.

    Args:
        data: the file's content, any format that Pillow reads.
        where: file, row or key for the error message.
    Raises:
        DataError: empty, truncated, not a picture, or larger than Pillow's safety limit.
    """
    if not data:
        raise DataError(f"{where}: the picture is empty (0 bytes); remove it or write it again")
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            with contextlib.suppress(Exception):  # damaged EXIF says nothing about the pixels
                ImageOps.exif_transpose(picture, in_place=True)
            return to_rgb(picture)
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{where}: {error}; resize the picture, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files
        reason = re.sub(r" <_io\..*>", "", str(error))  # an address says nothing to anybody
        raise DataError(
            f"{where}: the picture does not decode ({reason}); remove the pair or replace the file"
        ) from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB copy of a picture; where it is transparent, white shows; 16-bit greys are scaled."""
    # Pillow would clip them at 255. Its older versions open a PNG of 16 bits as "I".
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        greys = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray(((greys + 128) // 257).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        picture = white
    return picture.convert("RGB")
