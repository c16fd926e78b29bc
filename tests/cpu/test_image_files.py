"""Image files: what is read, what is refused, and that metadata never decides."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from megatron_dip.errors import DataError
from megatron_dip.families.data.image_files import decode_image

# Pillow tells what it finds in broken metadata.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
WIDTH, HEIGHT = 24, 16


def photograph(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    random = np.random.default_rng(3)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels_of(content: bytes) -> np.ndarray:
    return np.asarray(decode_image("a.img", content))


def refusal(content: bytes) -> str:
    with pytest.raises(DataError) as error:
        decode_image("folder/a.img", content)
    told = str(error.value)
    assert told.startswith("image folder/a.img: ") and "skip bad samples" in told
    assert "\n" not in told and len(told) < 500
    return told


# ---- metadata -------------------------------------------------------------------------------


def png_chunk(name: bytes, data: bytes, wrong: int = 0) -> bytes:
    check = (zlib.crc32(name + data) + wrong) & 0xFFFFFFFF
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)


def png_with(*chunks: bytes, late: bool = False, **options: object) -> bytes:
    plain = saved(photograph(), "PNG", **options)
    place = len(plain) - 12 if late else 33
    return plain[:place] + b"".join(chunks) + plain[place:]


PNG_METADATA = {
    "exif garbage": png_chunk(b"eXIf", b"II*\0\xff\xff\xff\xffxx"),
    "exif no header": png_chunk(b"eXIf", b"garbage"),
    "exif empty": png_chunk(b"eXIf", b""),
    "exif check sum": png_chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0", wrong=1),
    "profile method": png_chunk(b"iCCP", b"name\0\x09garbage"),
    "profile no name": png_chunk(b"iCCP", b""),
    "profile check sum": png_chunk(b"iCCP", b"name\0\0" + zlib.compress(b"x"), wrong=5),
    "text check sum": png_chunk(b"tEXt", b"Comment\0x", wrong=1),
    "text method": png_chunk(b"zTXt", b"Comment\0\x07x"),
    "text bomb": png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000))),
    "text not unicode": png_chunk(b"iTXt", b"key\0\0\0\xff\0\xff\0\xff\xfe"),
    "text bomb of xmp": png_chunk(
        b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(3_000_000))
    ),
    "density short": png_chunk(b"pHYs", b"\0"),
    "density zero": png_chunk(b"pHYs", bytes(9)),
    "gamma short": png_chunk(b"gAMA", b"\0"),
    "white point short": png_chunk(b"cHRM", b"\0\1\2"),
    "rendering empty": png_chunk(b"sRGB", b""),
    "animation short": png_chunk(b"acTL", b"\0"),
    "animation frames": png_chunk(b"fcTL", bytes(26)),
    "animation order": png_chunk(b"fdAT", bytes(9)),
    "unknown check sum": png_chunk(b"abCd", b"x", wrong=1),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", PNG_METADATA)
def test_metadata_of_a_png_file_does_not_refuse_its_pixels(name: str, late: bool):
    content = png_with(PNG_METADATA[name], late=late)
    assert np.array_equal(pixels_of(content), np.asarray(photograph()))


def jpeg_segment(mark: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, mark, len(data) + 2) + data


JPEG_METADATA = {
    "exif garbage": jpeg_segment(0xE1, b"Exif\0\0garbage"),
    "exif empty": jpeg_segment(0xE1, b"Exif\0\0"),
    "exif cut": jpeg_segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\0\x12\x01"),
    "exif thumbnail": jpeg_segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\0\0\xff\xff\xff\x7f"),
    "profile short": jpeg_segment(0xE2, b"ICC_PROFILE\0"),
    "profile garbage": jpeg_segment(0xE2, b"ICC_PROFILE\0\1\1garbage"),
    "several images": jpeg_segment(0xE2, b"MPF\0garbage"),
    "several images, no number": jpeg_segment(0xE2, b"MPF\0II*\0\x08\0\0\0\0\0\0\0\0\0"),
    "several images, no list": jpeg_segment(
        0xE2, b"MPF\0II*\0\x08\0\0\0\1\0\x01\xb0\4\0\1\0\0\0\x02\0\0\0\0\0\0\0"
    ),
    "flash": jpeg_segment(0xE2, b"FPXR\0"),
    "photoshop": jpeg_segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed\0"),
    "packet": jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<\xff\xfe"),
    "second head": jpeg_segment(0xE0, b"JFIF"),
    "adobe short": jpeg_segment(0xEE, b"Adobe"),
    "comment": jpeg_segment(0xFE, b"\xff\0\xfe"),
}


@pytest.mark.parametrize("name", JPEG_METADATA)
def test_metadata_of_a_jpeg_file_does_not_refuse_its_pixels(name: str):
    plain = saved(photograph(), "JPEG")
    content = plain[:2] + JPEG_METADATA[name] + plain[2:]
    assert np.array_equal(pixels_of(content), pixels_of(plain))


@pytest.mark.parametrize("tag", [34665, 34853, 34675, 700, 40965, 282, 270, 33723])
@pytest.mark.parametrize("value", [0xFFFFFF00, 4, 0])
def test_metadata_of_a_tiff_file_does_not_refuse_its_pixels(tag: int, value: int):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[65000] = 7
    tags.tagtype[65000] = TiffImagePlugin.TiffTags.LONG
    content = saved(photograph(), "TIFF", tiffinfo=tags)
    entry = struct.pack("<HHI", 65000, 4, 1)
    assert content.count(entry) == 1
    place = content.index(entry)
    broken = struct.pack("<HHII", tag, 4 if tag != 34675 else 7, 1 if value else 900, value)
    content = content[:place] + broken + content[place + 12 :]
    assert np.array_equal(pixels_of(content), np.asarray(photograph()))


def test_metadata_of_a_webp_file_does_not_refuse_its_pixels():
    whole = saved(photograph(), "WEBP", lossless=True)
    broken = saved(photograph(), "WEBP", lossless=True, exif=b"garbage", xmp=b"\xff\xfe<")
    assert np.array_equal(pixels_of(broken), pixels_of(whole))


def orientation(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif.tobytes()


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_an_image_is_turned_although_other_metadata_is_broken(form: str):
    content = saved(photograph(), form, exif=orientation(6))
    broken = (
        content[:33] + PNG_METADATA["text check sum"] + content[33:]
        if form == "PNG"
        else content[:2] + JPEG_METADATA["profile short"] + content[2:]
    )
    assert pixels_of(broken).shape == (WIDTH, HEIGHT, 3)
    assert np.array_equal(pixels_of(broken), pixels_of(content))


@pytest.mark.parametrize("number", range(10))
def test_every_orientation_is_undone(number: int):
    upright = np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3)
    # What a camera stores for each, as arrays [row, column].
    stored = {
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1],
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: upright.swapaxes(0, 1)[:, ::-1],
    }.get(number, upright)
    image = Image.fromarray(np.ascontiguousarray(stored))
    for form in ("PNG", "TIFF"):
        content = saved(image, form, exif=orientation(number))
        assert np.array_equal(pixels_of(content), upright), form


# ---- ranges of values -----------------------------------------------------------------------

RAMP = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)


def tiff_of(values: np.ndarray, *, photometric: int = 1, bits: int = 0) -> bytes:
    """A grey TIFF file written by hand: one strip, any type of numbers."""
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    fields = [(256, values.shape[1]), (257, values.shape[0])]
    fields += [(258, bits or 8 * values.dtype.itemsize), (259, 1), (262, photometric)]
    fields += [(273, 200), (277, 1), (278, values.shape[0]), (279, len(data)), (339, kind)]
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(fields))
    head += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
    return head.ljust(200, b"\0") + data


def assert_ramp(content: bytes) -> None:
    seen = pixels_of(content).astype(int)
    assert np.abs(seen - 255 * RAMP[..., None]).max() <= 1.5


def test_grey_of_more_than_8_bits_is_scaled_by_what_its_format_calls_white():
    deep = (RAMP * 65535).astype(np.uint16)
    assert_ramp(saved(Image.fromarray(deep), "PNG"))
    assert_ramp(saved(Image.fromarray(deep), "TIFF"))
    assert_ramp(tiff_of(deep))
    assert_ramp(tiff_of(65535 - deep, photometric=0))
    assert_ramp(tiff_of((RAMP * 255).astype(np.uint8)))
    assert_ramp(tiff_of(255 - (RAMP * 255).astype(np.uint8), photometric=0))
    assert_ramp(f"P5 {WIDTH} {HEIGHT} 65535\n".encode() + deep.astype(">u2").tobytes())
    assert_ramp(f"P5 {WIDTH} {HEIGHT} 999\n".encode() + (RAMP * 999).astype(">u2").tobytes())


def test_grey_of_12_bits_is_scaled_by_its_own_white():
    values = (RAMP * 4095).astype(int)
    first, second = values[:, ::2], values[:, 1::2]
    packed = np.stack([first >> 4, ((first & 15) << 4) | (second >> 8), second & 255], axis=-1)
    content = tiff_of(packed.reshape(HEIGHT, -1).astype(np.uint8), bits=12)
    width = struct.pack("<HHI", 256, 4, 1)
    assert_ramp(
        content.replace(width + struct.pack("<I", WIDTH * 3 // 2), width + bytes([WIDTH, 0, 0, 0]))
    )


@pytest.mark.parametrize(
    "values",
    [
        RAMP.astype(np.float32),
        (RAMP * 255).astype(np.float32),
        np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32),
        (RAMP * 255).astype(np.int32),
        (RAMP * 255).astype(np.uint32),
        (RAMP * 2**31 - 2**30).astype(np.int32),
        (RAMP * 255 - 100).astype(np.int16),
    ],
    ids=["float 1", "float 255", "no number", "int 255", "unsigned", "int signed", "short signed"],
)
def test_numbers_without_a_white_are_refused(values: np.ndarray):
    assert "does not say which is white" in refusal(tiff_of(values))


def test_transparent_parts_are_white_in_every_mode():
    half = Image.fromarray((RAMP > 0.5).astype(np.uint8) * 255)
    plain = photograph()
    shown = np.where(np.asarray(half)[..., None] > 0, np.asarray(plain), 255)
    plain.putalpha(half)
    assert np.array_equal(pixels_of(saved(plain, "PNG")), shown)
    assert np.array_equal(pixels_of(saved(plain, "TIFF")), shown)
    grey = Image.merge("LA", [Image.new("L", half.size, 60), half])
    expected = np.where(np.asarray(half) > 0, 60, 255)
    assert np.array_equal(pixels_of(saved(grey, "PNG"))[..., 0], expected)
    palette = Image.new("P", half.size, 1)
    palette.putpalette([0, 0, 0, 60, 60, 60])
    palette.paste(0, None, Image.fromarray((RAMP <= 0.5).astype(np.uint8) * 255))
    for form in ("PNG", "GIF"):
        assert np.array_equal(pixels_of(saved(palette, form, transparency=0))[..., 1], expected)


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_a_transparent_color_is_white_in_every_mode(mode: str):
    black = {"1": 0, "L": 0, "RGB": (0, 0, 0)}[mode]
    image = Image.fromarray((RAMP > 0.5).astype(np.uint8) * 200).convert(mode)
    seen = pixels_of(saved(image, "PNG", transparency=black))
    grey = 255 if mode == "1" else 200
    assert np.array_equal(seen[..., 2], np.where(RAMP > 0.5, grey, 255))


def test_a_transparent_color_of_16_bits_is_white():
    grey = (RAMP * 60000).astype(np.uint16)
    grey[0] = 777
    plain = saved(Image.fromarray(grey), "PNG")
    content = plain[:33] + png_chunk(b"tRNS", struct.pack(">H", 777)) + plain[33:]
    assert (pixels_of(content)[0] == 255).all() and (pixels_of(content)[1] < 30).all()
    head = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    row = b"\0" + struct.pack(">6H", 40000, 50000, 60000, 1000, 2000, 3000)
    content = b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", head),
            png_chunk(b"tRNS", struct.pack(">3H", 1000, 2000, 3000)),
            png_chunk(b"IDAT", zlib.compress(row)),
            png_chunk(b"IEND", b""),
        ]
    )
    assert pixels_of(content).tolist() == [[[156, 195, 234], [255, 255, 255]]]


def test_colors_of_print_become_red_green_and_blue():
    ink = Image.new("CMYK", (WIDTH, HEIGHT), (0, 255, 255, 0))
    for form in ("JPEG", "TIFF"):
        red = pixels_of(saved(ink, form)).reshape(-1, 3).mean(axis=0)
        assert red[0] > 240 and red[1:].max() < 15, form


def test_of_several_pictures_the_first_is_read():
    first, second = photograph(), Image.new("RGB", (WIDTH, HEIGHT), "red")
    for form in ("PNG", "TIFF", "WEBP", "GIF", "MPO"):
        options = {"lossless": True} if form == "WEBP" else {}
        alone = saved(first, "JPEG" if form == "MPO" else form, **options)
        several = saved(first, form, save_all=True, append_images=[second] * 2, **options)
        assert np.array_equal(pixels_of(several), pixels_of(alone)), form


# ---- files that are not all there, and no files ---------------------------------------------

FORMS: dict[str, Callable[[], bytes]] = {
    "png": lambda: saved(photograph(), "PNG"),
    "jpeg": lambda: saved(photograph(), "JPEG"),
    "progressive jpeg": lambda: saved(photograph(), "JPEG", progressive=True),
    "gif": lambda: saved(photograph(), "GIF"),
    "animated gif": lambda: saved(photograph(), "GIF", save_all=True, append_images=[photograph()]),
    "webp": lambda: saved(photograph(), "WEBP"),
    "tiff": lambda: saved(photograph(), "TIFF", compression="tiff_lzw"),
    "bmp": lambda: saved(photograph(), "BMP"),
    "ppm": lambda: saved(photograph(), "PPM"),
    "jpeg 2000": lambda: saved(photograph(), "JPEG2000", quality_layers=[20], irreversible=True),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_cut_short_anywhere_is_refused(name: str):
    content = FORMS[name]()
    assert pixels_of(content).shape == (HEIGHT, WIDTH, 3)
    # The last bytes of a PNG file are the check sum of its end mark.
    last = len(content) - (5 if name == "png" else 1)
    for length in {1, 10, *np.linspace(len(content) // 3, last, 12).astype(int).tolist()}:
        refusal(content[:length])


def test_a_download_that_was_filled_up_with_zeros_is_refused():
    content = saved(photograph(100, 100), "JPEG")
    half = len(content) // 2
    assert "cut short" in refusal(content[:half] + bytes(len(content) - half))


def test_what_follows_the_end_of_an_image_is_left_alone():
    for name in ("png", "jpeg", "gif", "webp"):
        content = FORMS[name]()
        assert np.array_equal(pixels_of(content + b"trailing"), pixels_of(content)), name


def test_a_name_that_is_no_readable_file_is_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image\n")
    for name, words in {
        "pipe.png": "is a pipe, expected a file",
        "folder.png": "is a folder, expected a file",
        "zero.png": "is a device, expected a file",
        "loop.png": "symbolic links",
        "gone.png": "no such file",
        "empty.png": "is empty (0 bytes)",
        "text.png": "does not decode (not an image of a known format)",
        "text.png/a.png": "Not a directory",
        "nul\0.png": "no name of a file",
        "half\ud800.png": "no name of a file",
        "long" * 200: "File name too long",
        "data:image/png;base64," + "A" * 98_000: "File name too long",
    }.items():
        with pytest.raises(DataError) as error:
            decode_image(tmp_path / name)
        told = str(error.value)
        assert words in told and told.isprintable() and len(told) < 500, told


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.png").write_bytes(b"x")

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DataError, match=r"a\.png: cannot be read \(Permission denied\); .*skip"):
        decode_image(tmp_path / "a.png")


def test_an_image_larger_than_memory_is_refused_from_its_header():
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head)
    content += png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")
    assert "3600000000 pixels" in refusal(content)
