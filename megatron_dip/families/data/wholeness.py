"""Whether a file is all there, by what its format says about its own length.

Decoders are made to show as much as they can of what they get: a file that was cut short in a
download often decodes, with fewer frames or with grey at the bottom.  Most formats state how long
they are, or end with a mark:

=============  ==================================================================
PNG            chunks up to ``IEND``
JPEG           the mark ``FFD9`` after the pixels; also JPEG 2000
GIF            blocks up to the trailer ``3B``
RIFF           the size of the whole: WebP, AVI, WAV (also RF64)
MP4, MOV, ...  the sizes of the boxes: also M4A, AVIF
Matroska       the size of the segment: also WebM
=============  ==================================================================

Not known of a stream written without seeking (a segment or a RIFF of unknown length), and of
formats without either, such as MPEG-TS.  What follows the end is nobody's and is left alone.
"""

import os
from typing import BinaryIO

__all__ = ["is_unknown_size", "missing_part"]

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG_2000 = (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")
_EBML_SEGMENT = 0x18538067
_BOXES = frozenset(
    b"ftyp moov mdat free skip wide pnot styp moof mfra sidx ssix emsg prft meta uuid pdin".split()
)


def is_unknown_size(size: int) -> bool:
    """Whether this is what writers that cannot seek put where the size of a RIFF belongs."""
    # The largest number of 31 or 32 bits, less the head of the file or rounded to pages.
    return not size or 0x7FFFF000 <= size <= 0x7FFFFFFF or 0xFFFFF000 <= size <= 0xFFFFFFFF


def missing_part(file: BinaryIO) -> str | None:
    """What is missing at the end of ``file``; None where nothing is, or nothing is known.

    The file is read from its start and left anywhere.
    """
    file.seek(0)
    head = file.read(16)
    if head.startswith(_PNG):
        return None if _png_ends(file) else "its end mark (IEND)"
    if head.startswith(b"\xff\xd8\xff"):
        return None if _jpeg_ends(file) else "its end mark (FFD9)"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return None if _gif_ends(file) else "its end mark (trailer)"
    if head.startswith(_JPEG_2000):
        # Not within coded pixels either.
        return None if b"\xff\xd9" in file.read() else "its end mark (FFD9)"
    expected = _stated_size(file, head)
    found = file.seek(0, os.SEEK_END)
    if expected is None or expected <= found:
        return None
    return f"{expected - found} of {expected} bytes"


def _stated_size(file: BinaryIO, head: bytes) -> int | None:
    if head.startswith((b"RIFF", b"RF64")):
        size = int.from_bytes(head[4:8], "little")
        # An odd size may be filled up, and need not be.
        return None if is_unknown_size(size) else size + 8
    if head.startswith(b"\x1aE\xdf\xa3"):
        return _segment_end(file)
    return _last_box_end(file) if head[4:8] in _BOXES else None


def _png_ends(file: BinaryIO) -> bool:
    file.seek(len(_PNG))
    while len(head := file.read(8)) == 8:
        if head[4:] == b"IEND":
            return True
        file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return False


def _jpeg_ends(file: BinaryIO) -> bool:
    """Whether the mark of the end follows the first scan; inside of scans it does not occur."""
    file.seek(2)
    while len(mark := file.read(2)) == 2:
        if mark[0] != 0xFF:
            return True  # Not marks one after the other: for the decoder to say.
        if mark[1] == 0xFF:
            file.seek(-1, os.SEEK_CUR)
            continue
        if mark[1] == 0xDA:
            return b"\xff\xd9" in file.read()
        file.seek(max(int.from_bytes(file.read(2), "big") - 2, 0), os.SEEK_CUR)
    return False


def _gif_ends(file: BinaryIO) -> bool:
    file.seek(10)
    _skip_gif_colors(file, file.read(3))
    while kind := file.read(1):
        if kind == b";":
            return True
        if kind == b"!":
            file.read(1)
        elif kind == b",":
            _skip_gif_colors(file, file.read(9)[8:])
            file.read(1)
        elif kind == b"\0":
            continue
        else:
            return True  # No block of a GIF: for the decoder to say.
        while (size := file.read(1)) and size != b"\0":
            file.seek(size[0], os.SEEK_CUR)
    return False


def _skip_gif_colors(file: BinaryIO, flags: bytes) -> None:
    if flags and flags[0] & 0x80:
        file.seek(3 * 2 ** ((flags[0] & 7) + 1), os.SEEK_CUR)


def _last_box_end(file: BinaryIO) -> int | None:
    """Where the last box on the top level should end; the others lie before it."""
    place, length = 0, file.seek(0, os.SEEK_END)
    while place < length:
        file.seek(place)
        head = file.read(16)
        if head[4:8] not in _BOXES:
            break
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if size < 8:
            return None  # 0: up to the end, wherever that is.
        place += size
    return place


def _segment_end(file: BinaryIO) -> int | None:
    place = 0
    for _ in range(2):
        file.seek(place)
        head = file.read(12)
        name, name_bytes = _ebml_number(head, keeps_mark=True)
        size, size_bytes = _ebml_number(head[name_bytes:], keeps_mark=False)
        if not size_bytes or size == 2 ** (7 * size_bytes) - 1:
            return None
        place += name_bytes + size_bytes + size
        if name == _EBML_SEGMENT:
            return place
    return None


def _ebml_number(data: bytes, *, keeps_mark: bool) -> tuple[int, int]:
    """A number of variable length and its bytes; 0 and 0 where there is none."""
    if not data or not data[0]:
        return 0, 0
    num_bytes = 9 - data[0].bit_length()
    value = int.from_bytes(data[:num_bytes], "big")
    return value if keeps_mark else value & (2 ** (7 * num_bytes) - 1), num_bytes
