"""Image files to RGB images: what is read of them, what is refused, and why.

- The image is what the first frame or page of the file shows, turned as its orientation says.
- Transparent parts are put on white.  CMYK and the like become RGB without color profiles.
- Grey values of 16 bits (12 in some TIFF files) are scaled, because their format says what is
  white.  32-bit and floating-point values are refused: no format says whether 1, 255 or the
  largest value is white, and a guess trains on black or on noise.
- An error in metadata (EXIF, profiles, comments, previews) does not refuse the pixels.  Without a
  readable EXIF block the image is not turned.
- A file that was cut short is refused, also where its decoder fills up what is missing.
"""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from megatron_dip.errors import DataError
from megatron_dip.families.data.files import SKIP_HINT, open_media, shown_path
from megatron_dip.families.data.image_parts import without_metadata
from megatron_dip.families.data.wholeness import missing_part

__all__ = ["decode_image", "explain", "on_white"]

_MOST_BYTES = 2**30
_MOST_DETAIL = 200
_ORIENTATION_TAG = 0x0112
_BITS_TAG, _PHOTOMETRIC_TAG = 258, 262
_WHITE_IS_ZERO = 0
_WHITE = (255, 255, 255, 255)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def explain(error: Exception) -> str:
    """What a decoder says, on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    # Without numbers and the file's name, which the message has already.
    told = getattr(error, "strerror", None) or str(error)
    return " ".join(told.split())[:_MOST_DETAIL] or type(error).__name__


def decode_image(path: str | Path, content: bytes | None = None) -> Image.Image:
    """The image as RGB; see the head of this module.

    Args:
        content: Of the file, where it is no file of its own; ``path`` is then only its name.

    Raises:
        DataError: The file is missing, broken or cut short; the message names it.
    """
    path = Path(path)
    what = f"image {shown_path(path)}"
    try:
        if content is None:
            content = _read(path)
        if (missing := missing_part(BytesIO(content))) is not None:
            raise DataError(f"{what}: is cut short, {missing} is missing; {SKIP_HINT}")
        return _decode(content)
    except DataError as error:
        told = str(error)
        raise error if told.startswith(what) else DataError(f"{what}: {told}") from error
    except Exception as error:  # Decoders of broken files raise whatever they trip over.
        raise DataError(f"{what}: does not decode ({explain(error)}); {SKIP_HINT}") from error


def _read(path: Path) -> bytes:
    with open_media(path, "image") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise DataError(f"has more than {_MOST_BYTES} bytes, too many for an image; {SKIP_HINT}")
    return content


def _decode(content: bytes) -> Image.Image:
    try:
        with Image.open(BytesIO(content)) as image:
            rgb = _to_rgb(image)
            # Pillow turns TIFF files itself when it loads them.
            return rgb if image.format == "TIFF" else _turn_upright(rgb, image)
    except (DataError, Image.DecompressionBombError):
        raise
    except Exception:  # Decoders of broken files raise whatever they trip over.
        parts = without_metadata(content)
        if parts is None:
            raise
    pixels, exif = parts
    with Image.open(BytesIO(pixels)) as image:
        rgb = _to_rgb(image)
        if exif:
            image.info["exif"] = exif
        return rgb if image.format == "TIFF" else _turn_upright(rgb, image)


def _turn_upright(rgb: Image.Image, source: Image.Image) -> Image.Image:
    turn = _UPRIGHT.get(_orientation(source))
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        given = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # Of a broken EXIF block nothing can be said, but the pixels are good.
        return 1
    return given if isinstance(given, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith("I;16"):
        return _from_deep_grey(image)
    if image.mode == "I" and image.format == "PPM":
        # Pillow has scaled these to 16 bits.
        return _grey_to_rgb(np.asarray(image) >> 8)
    if image.mode in ("I", "F"):
        kind = "whole" if image.mode == "I" else "floating-point"
        low, high = image.getextrema()
        raise DataError(
            f"has {kind} numbers of 16 or 32 bits, from {low} to {high}, and does not say which is "
            f"white; convert it to 8 bits, or skip bad samples"
        )
    transparency = image.info.get("transparency")
    if isinstance(transparency, tuple) and max(transparency) > 255:
        # Pillow keeps the upper 8 of 16 bits of a color, but not of the transparent one.
        image.info["transparency"] = tuple(value >> 8 for value in transparency)
    if transparency is not None or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        return on_white(image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA"))
    return image.convert("RGB")


def on_white(layer: Image.Image) -> Image.Image:
    """An RGBA image as RGB, with white behind it."""
    return Image.alpha_composite(Image.new("RGBA", layer.size, _WHITE), layer).convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint16)
    tags: Any = getattr(image, "tag_v2", {})
    bits = int(tags.get(_BITS_TAG, (16,))[0])
    grey = values >> (bits - 8)
    if tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    return _grey_to_rgb(grey if transparent is None else np.where(values == transparent, 255, grey))


def _grey_to_rgb(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")
