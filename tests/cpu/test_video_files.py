"""Video files: whole or refused, upright, and the right stream of them."""

import os
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_dip.errors import DataError
from megatron_dip.families.t2v.video_files import read_frames
from megatron_dip.families.t2v.videos import ClipLimits, read_clip

av = pytest.importorskip("av")
WIDTH, HEIGHT, NUM_FRAMES = 64, 48, 24
LIMITS = ClipLimits(max_frames=6, frame_stride=1, min_frame_tokens=4, max_frame_tokens=64)
# What the four quarters of every frame show: red, green, blue, grey.
QUARTERS = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [120, 120, 120]]], dtype=np.uint8)


def picture() -> np.ndarray:
    return QUARTERS.repeat(HEIGHT // 2, axis=0).repeat(WIDTH // 2, axis=1)


def moving(number: int) -> np.ndarray:
    random = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return np.roll(random, number, axis=1)


def write_video(
    path: Path,
    codec: str = "mpeg4",
    *,
    options: dict[str, str] | None = None,
    frame_of: Callable[[int], np.ndarray] = lambda _: picture(),
    num_frames: int = NUM_FRAMES,
    pixel_aspect: Fraction | None = None,
    form: str | None = None,
    pixel_format: str = "yuv420p",
    times: Callable[[int], int] = lambda number: number,
) -> Path:
    with av.open(str(path), "w", format=form, options=options or {}) as container:
        stream = container.add_stream(codec, rate=12)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixel_format
        stream.bit_rate = 2_000_000
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        for number in range(num_frames):
            pixels = frame_of(number)
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24" if pixels.shape[2] == 3 else "rgba")
            frame.pts, frame.time_base = times(number), Fraction(1, 12)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def quarters_of(image: Image.Image) -> np.ndarray:
    """What the middles of its quarters show."""
    rows = [image.height // 4, image.height * 3 // 4]
    columns = [image.width // 4, image.width * 3 // 4]
    return np.asarray(image)[np.ix_(rows, columns)]


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read_clip(path, LIMITS, 16)
    told = str(error.value)
    assert path.name in told and "skip bad samples" in told
    assert told.isprintable() and len(told) < 500
    return told


# ---- cut short ------------------------------------------------------------------------------

FORMS: dict[str, tuple[str, str, dict[str, str]]] = {
    "mp4, index first": ("a.mp4", "mpeg4", {"movflags": "faststart"}),
    "mp4, index last": ("a.mp4", "mpeg4", {}),
    "mp4, fragments": ("a.mp4", "mpeg4", {"movflags": "frag_every_frame+empty_moov"}),
    "mov": ("a.mov", "mjpeg", {"movflags": "faststart"}),
    "matroska": ("a.mkv", "mpeg4", {}),
    "webm": ("a.webm", "libvpx", {}),
    "avi": ("a.avi", "mpeg4", {}),
    "gif": ("a.gif", "gif", {}),
    "flv": ("a.flv", "flv1", {}),
}
PIXEL_FORMATS = {"gif": "rgb8", "mov": "yuvj420p"}


@pytest.mark.parametrize("name", FORMS)
def test_a_container_cut_short_is_refused_although_it_decodes(tmp_path: Path, name: str):
    file, codec, options = FORMS[name]
    path = write_video(
        tmp_path / file,
        codec,
        options=options,
        frame_of=moving,
        pixel_format=PIXEL_FORMATS.get(name, "yuv420p"),
    )
    frames, grid = read_clip(path, LIMITS, 16)
    assert grid == (6, 3, 4) and frames.shape == (6, 48, 64, 3)
    content = path.read_bytes()
    # An index at the end that is cut is the least that a cut takes.
    for share in (0.98, 0.8, 0.5, 0.1):
        path.write_bytes(content[: int(len(content) * share)])
        refusal(path)


def test_a_live_stream_is_read_to_its_end(tmp_path: Path):
    path = write_video(tmp_path / "a.mkv", options={"live": "1"}, form="matroska")
    assert read_clip(path, LIMITS, 16)[1] == (6, 3, 4)
    transport = write_video(tmp_path / "a.ts", form="mpegts")
    assert read_clip(transport, LIMITS, 16)[1] == (6, 3, 4)


def test_a_video_with_a_damaged_frame_is_refused(tmp_path: Path):
    path = write_video(tmp_path / "a.mp4", frame_of=moving)
    content = bytearray(path.read_bytes())
    place = content.index(b"mdat") + 4
    content[place + 3000 : place + 9000] = bytes(6000)
    path.write_bytes(content)
    refusal(path)


def test_a_frame_that_is_not_all_there_is_refused(tmp_path: Path):
    """Where the container says nothing of its length, and the decoder fills up what is missing."""
    path = write_video(tmp_path / "a.ts", form="mpegts", frame_of=moving, num_frames=3)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 9 // 10 // 188 * 188])
    assert "frame 2 is broken" in refusal(path)


def test_a_stated_duration_that_is_not_reached_is_refused(tmp_path: Path):
    """Cut between two frames, in a container that says nothing else of its length."""
    path = write_video(tmp_path / "a.flv", "flv1", frame_of=moving, num_frames=30)
    content = path.read_bytes()
    place = 13
    while place < len(content) // 2:
        place += 15 + int.from_bytes(content[place + 1 : place + 4], "big")
    path.write_bytes(content[:place])
    told = refusal(path)
    assert "holds 1." in told and "of 2.50 s that it states" in told


def test_files_without_a_video_are_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    # Opened as what it says, it is waited for: for packets from the network.
    (tmp_path / "session.mp4").write_text(
        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\n"
        "m=video 49170 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n"
    )
    (tmp_path / "list.m3u8").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/other.ts\n#EXT-X-ENDLIST\n"
    )
    write_video(tmp_path / "other.ts", form="mpegts")
    for name, words in {
        "pipe.mp4": "is a pipe",
        "folder.mp4": "is a folder",
        "empty.mp4": "is empty",
        "text.mp4": "does not decode",
        "list.m3u8": "does not decode",
        "session.mp4": "does not decode (Invalid data",
    }.items():
        assert words in refusal(tmp_path / name)
    with pytest.raises(DataError, match=r"gone\.mp4: no such file"):
        read_clip(tmp_path / "gone.mp4", LIMITS, 16)


def write_sound_with_cover(path: Path, *, with_video: bool) -> Path:
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        sound.layout = "mono"
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        video = container.add_stream("mpeg4", rate=12) if with_video else None
        if video is not None:
            video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        still = av.VideoFrame.from_ndarray(picture(), "rgb24")
        still.pts = 0
        container.mux(cover.encode(still))
        container.mux(cover.encode())
        for number in range(NUM_FRAMES if video is not None else 0):
            frame = av.VideoFrame.from_ndarray(picture()[:32, :32].copy(), "rgb24")
            frame.pts = number
            container.mux(video.encode(frame))
        if video is not None:
            container.mux(video.encode())
        samples = np.zeros((1, 1024), dtype=np.float32)
        for number in range(20):
            frame = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, 1024 * number
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return path


def test_the_cover_of_a_sound_file_is_no_video(tmp_path: Path):
    path = write_sound_with_cover(tmp_path / "song.mp4", with_video=False)
    assert "expected a video stream, found only a cover" in refusal(path)
    both = write_sound_with_cover(tmp_path / "both.mp4", with_video=True)
    assert read_frames(both, 4, 1).images[0].size == (32, 32)


# ---- how frames are shown -------------------------------------------------------------------


def with_matrix(path: Path, a: int, b: int, c: int, d: int, one: int = 1 << 16) -> Path:
    """State in the head of the track how the file is to be shown."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 4 + 20 + 16
    struct.pack_into(">9i", content, place, a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), lambda q: q),
        ((0, 1, -1, 0), lambda q: np.rot90(q, -1)),
        ((-1, 0, 0, -1), lambda q: np.rot90(q, 2)),
        ((0, -1, 1, 0), np.rot90),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda q: q.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda q: np.rot90(q, 2).swapaxes(0, 1)),
        ((0, 0, 0, 0), lambda q: q),
    ],
)
def test_a_video_is_turned_as_it_is_to_be_shown(tmp_path: Path, matrix: Any, shown: Any):
    path = with_matrix(write_video(tmp_path / "a.mp4"), *matrix)
    images, width, height = read_frames(path, 2, 1)
    expected = shown(QUARTERS)
    assert np.abs(quarters_of(images[1]).astype(int) - expected).max() < 25
    is_turned = matrix[0] == 0 and any(matrix)
    assert images[0].size == ((HEIGHT, WIDTH) if is_turned else (WIDTH, HEIGHT))
    assert read_clip(path, LIMITS, 16)[1] == ((6, 4, 3) if is_turned else (6, 3, 4))
    assert (width, height) == images[0].size


def test_a_video_shown_at_another_angle_is_refused(tmp_path: Path):
    path = with_matrix(write_video(tmp_path / "a.mp4"), 1, 1, -1, 1)
    assert "no multiple of 90 degrees" in refusal(path)


def test_pixels_that_are_not_square_count_at_their_shown_width(tmp_path: Path):
    path = write_video(tmp_path / "a.mkv", pixel_aspect=Fraction(2, 1))
    assert read_frames(path, 1, 1)[1:] == (2 * WIDTH, HEIGHT)
    frames, grid = read_clip(path, LIMITS, 16)
    assert grid == (6, 3, 8) and frames.shape == (6, 48, 128, 3)
    tall = write_video(tmp_path / "b.mp4", pixel_aspect=Fraction(2, 1))
    assert read_clip(with_matrix(tall, 0, 1, -1, 0), LIMITS, 16)[1] == (6, 8, 3)


def test_transparent_parts_of_a_video_are_white(tmp_path: Path):
    clear = np.dstack([picture(), np.zeros((HEIGHT, WIDTH), np.uint8)])
    path = write_video(
        tmp_path / "a.mov", "qtrle", frame_of=lambda _: clear, pixel_format="argb", num_frames=3
    )
    assert np.asarray(read_frames(path, 3, 1).images[2]).min() == 255


def test_frames_are_taken_by_their_number_whatever_their_times(tmp_path: Path):
    path = write_video(
        tmp_path / "a.mkv", "ffv1", frame_of=moving, times=lambda n: n * n, num_frames=8
    )
    plain = write_video(tmp_path / "b.mkv", "ffv1", frame_of=moving, num_frames=8)
    for ours, theirs in zip(
        read_frames(path, 3, 2).images, read_frames(plain, 3, 2).images, strict=True
    ):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


# ---- pictures among videos ------------------------------------------------------------------


def test_a_picture_is_known_by_its_content_and_turned(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture()).save(tmp_path / "a.jpg", exif=exif.tobytes())
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "named.mp4").write_bytes(content)
    for name in ("a.jpg", "named.mp4"):
        assert read_clip(tmp_path / name, LIMITS, 16)[1] == (1, 4, 3), name
    (tmp_path / "named.mp4").write_bytes(content[: len(content) // 2])
    assert "cut short" in refusal(tmp_path / "named.mp4")
    write_video(tmp_path / "b.mp4").rename(tmp_path / "video.png")
    assert read_clip(tmp_path / "video.png", LIMITS, 16)[1] == (6, 3, 4)


def test_animations_are_clips_or_refused(tmp_path: Path):
    stills = [Image.fromarray(moving(n)) for n in range(4)]
    for name in ("a.png", "a.webp"):
        stills[0].save(tmp_path / name, save_all=True, append_images=stills[1:])
        assert "convert it to a video" in refusal(tmp_path / name)
    stills[0].save(tmp_path / "a.gif", save_all=True, append_images=stills[1:], duration=80)
    assert read_clip(tmp_path / "a.gif", LIMITS, 16)[1] == (4, 3, 4)
