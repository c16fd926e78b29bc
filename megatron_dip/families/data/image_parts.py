"""Image files without what is only said about their pixels.

Decoders read all of a file, and some stop at an error in a comment, a color profile or a preview.
Pixels do not depend on these: an image that does not decode is tried again without them.
"""

import math
import struct
from collections.abc import Callable
from typing import Any

__all__ = ["without_metadata"]

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
# JFIF's and Adobe's say how colors are meant: marks, with the length of a whole one.
_JPEG_PIXELS = {0xE0: 16, 0xEE: 14}
_JPEG_METADATA = frozenset({*range(0xE0, 0xF0), 0xFE})
_JPEG_SCAN = 0xDA
_TIFF_METADATA = frozenset(
    {269, 270, 271, 272, 282, 283, 285, 296, 305, 306, 315, 316, 700, 33432, 33723}
    | {34377, 34665, 34675, 34853, 37724, 40965, 50341}
)


def without_metadata(content: bytes) -> tuple[bytes, bytes] | None:
    """The file without metadata, and the EXIF block that it had, empty where there was none.

    None where the format has no metadata that can be taken out, or it cannot be followed.
    """
    parts: Callable[[bytes], tuple[bytes, bytes]]
    if content.startswith(_PNG):
        parts = _png_parts
    elif content.startswith(b"\xff\xd8\xff"):
        parts = _jpeg_parts
    elif content.startswith((b"II*\0", b"MM\0*")):
        parts = _tiff_parts
    else:
        return None
    try:
        return parts(content)
    except struct.error:
        return None


def _png_parts(content: bytes) -> tuple[bytes, bytes]:
    place, kept, exif = len(_PNG), [_PNG], b""
    while place + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, place)
        end = place + length + 12
        if name in _PNG_PIXELS:
            kept.append(content[place:end])
        elif name == b"eXIf":
            exif = content[place + 8 : end - 4]
        place = end
    return b"".join(kept), exif


def _jpeg_parts(content: bytes) -> tuple[bytes, bytes]:
    place, kept, exif = 2, [content[:2]], b""
    while True:
        before, mark = struct.unpack_from(">BB", content, place)
        if before != 0xFF or mark == _JPEG_SCAN:
            return b"".join([*kept, content[place:]]), exif
        if mark == 0xFF:
            place += 1
            continue
        (length,) = struct.unpack_from(">H", content, place + 2)
        segment = content[place : place + 2 + length]
        is_read = length >= _JPEG_PIXELS.get(mark, math.inf)
        if mark == 0xE1 and segment[4:].startswith(b"Exif\0\0"):
            exif = exif or segment[4:]
        if is_read or mark not in _JPEG_METADATA:
            kept.append(segment)
        place += 2 + length


def _tiff_parts(content: bytes) -> tuple[bytes, bytes]:
    """With the first directory alone; its orientation is no metadata, but part of the format."""
    order = "<" if content.startswith(b"II") else ">"
    (start,) = struct.unpack_from(order + "I", content, 4)
    (count,) = struct.unpack_from(order + "H", content, start)
    entries: list[tuple[Any, ...]] = [
        struct.unpack_from(order + "HHI4s", content, start + 2 + 12 * number)
        for number in range(count)
    ]
    kept = [entry for entry in entries if entry[0] not in _TIFF_METADATA]
    directory = struct.pack(order + "H", len(kept))
    directory += b"".join(struct.pack(order + "HHI4s", *entry) for entry in kept) + bytes(4)
    return content[:start] + directory + content[start + len(directory) :], b""
