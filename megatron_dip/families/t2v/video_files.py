"""Video files to frames: what is read of them, what is refused, and why.

- The video is the first stream that is one: not the cover of a sound file, nor previews.
- Frames are taken by their number, whatever their times are (also where the rate varies).
- They are turned and mirrored as the file states for showing, by quarters.  Pixels that are not
  square are counted at their shown width.  Transparent parts are put on white.
- Every file is read to its end, although only the frames that are used are decoded: one that was
  cut short is refused, by what its container says of its length, by packets or frames that are
  marked as broken, by the number of frames or the duration that it states.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from megatron_dip.errors import DataError
from megatron_dip.families.data.files import SKIP_HINT, open_media, shown_path
from megatron_dip.families.data.image_files import explain, on_white
from megatron_dip.families.data.wholeness import missing_part

__all__ = ["VideoFrames", "read_frames"]

_MOST_PIXELS = 2**30
"""Of all frames that are kept of a video."""
_DISPLAY_MATRIX = "DISPLAYMATRIX"
_UPRIGHT = {
    (1, 0, 0, 1): None,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""By the signs of where the matrix takes (1, 0) and (0, 1); rows count downwards."""
_QUARTER_TURNS = frozenset(
    {
        Image.Transpose.ROTATE_90,
        Image.Transpose.ROTATE_270,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.TRANSVERSE,
    }
)
# Encoders round; what is missing of a stated duration must be more than that.
_MISSING_S, _MISSING_SHARE = 0.5, 0.05


class VideoFrames(NamedTuple):
    """Frames of a video."""

    images: list[Image.Image]
    """RGB, upright."""
    width: float
    """Of the first one, as it is shown."""
    height: float


def read_frames(path: Path, most_frames: int, stride: int) -> VideoFrames:
    """The frames 0, ``stride``, 2 * ``stride``, ... of a video, at most ``most_frames`` of them.

    Raises:
        DataError: The file is missing, broken or cut short, or holds no video; the message names
            it.
    """
    what = f"video {shown_path(path)}"
    try:
        import av
    except ImportError as error:
        raise DataError(f"{what}: decoding takes PyAV; install megatron-dip[video]") from error
    try:
        with open_media(path, "video") as file:
            if (missing := missing_part(file)) is not None:
                raise DataError(f"is cut short, {missing} is missing; {SKIP_HINT}")
            return _read(av, file, most_frames, stride)
    except DataError as error:
        told = str(error)
        raise error if told.startswith(what) else DataError(f"{what}: {told}") from error
    except Exception as error:  # Decoders of broken files raise whatever they trip over.
        raise DataError(f"{what}: does not decode ({explain(error)}); {SKIP_HINT}") from error


def _read(av: Any, file: BinaryIO, most_frames: int, stride: int) -> VideoFrames:
    file.seek(0)
    # A play list must not open what it names, nor a session description a port of the network.
    with av.open(file, options={"protocol_whitelist": "none"}) as container:
        stream = _choose_stream(av, container)
        images: list[Image.Image] = []
        shown = (0.0, 0.0)
        for number, frame in enumerate(_decode(container, stream, most_frames * stride)):
            if frame.is_corrupt:
                raise DataError(f"frame {number} is broken or not all there; {SKIP_HINT}")
            if number % stride:
                continue
            turn = _turn(frame)
            image = _to_image(frame)
            images.append(image if turn is None else image.transpose(turn))
            if len(images) * image.width * image.height > _MOST_PIXELS:
                raise DataError(
                    f"has frames of {image.width}x{image.height} pixels, too large for "
                    f"{most_frames} of them; scale it, take fewer frames, or skip bad samples"
                )
            if len(images) == 1:
                shown = _shown_size(images[0], turn, stream.sample_aspect_ratio)
    if not images:
        raise DataError(f"holds no frame; {SKIP_HINT}")
    return VideoFrames(images, *shown)


def _choose_stream(av: Any, container: Any) -> Any:
    kinds = av.stream.Disposition
    stills = kinds.attached_pic | kinds.timed_thumbnails
    for stream in container.streams.video:
        if not stream.disposition & stills:
            return stream
    found = "only a cover or previews" if container.streams.video else "none"
    raise DataError(f"expected a video stream, found {found}; {SKIP_HINT}")


def _decode(container: Any, stream: Any, num_wanted: int) -> Iterator[Any]:
    """The first ``num_wanted`` frames of ``stream``; the file is read to its end.

    Raises:
        DataError: The file ends before what it states.
    """
    num_packets, reached_s = 0, 0.0
    for packet in container.demux():
        if packet.is_corrupt:
            raise DataError(f"is broken or cut short in packet {num_packets}; {SKIP_HINT}")
        if packet.size and (packet.pts is not None or packet.dts is not None):
            place = packet.dts if packet.pts is None else packet.pts
            end = place + (packet.duration or 0)
            reached_s = max(reached_s, float(end * packet.time_base))
        if packet.stream.index != stream.index:
            continue
        num_packets += bool(packet.size)
        if num_wanted > 0:
            for frame in packet.decode():
                if num_wanted > 0:
                    yield frame
                num_wanted -= 1
    if num_packets < stream.frames:
        raise DataError(f"holds {num_packets} of {stream.frames} frames; {SKIP_HINT}")
    duration_s = (container.duration or 0) / 1e6
    missing_s = duration_s - (reached_s - (container.start_time or 0) / 1e6)
    if missing_s > max(_MISSING_S, _MISSING_SHARE * duration_s):
        raise DataError(
            f"holds {duration_s - missing_s:.2f} of {duration_s:.2f} s that it states; {SKIP_HINT}"
        )


def _to_image(frame: Any) -> Image.Image:
    """As RGB, as it is stored."""
    if any(component.is_alpha for component in frame.format.components):
        return on_white(Image.fromarray(frame.to_ndarray(format="rgba")))
    image: Image.Image = frame.to_image()
    return image


def _turn(frame: Any) -> Image.Transpose | None:
    """What makes the frame upright."""
    for kind, data in frame.side_data.items():
        if kind.name != _DISPLAY_MATRIX:
            continue
        a, b, _, c, d = struct.unpack_from("=5i", bytes(data))
        signs = tuple((value > 0) - (value < 0) for value in (a, b, c, d))
        if signs in _UPRIGHT:
            return _UPRIGHT[signs]
        # A matrix of zeros: writers that have nothing to say.
        if any(signs):
            raise DataError(
                f"is shown at an angle that is no multiple of 90 degrees; turn its frames, or "
                f"{SKIP_HINT}"
            )
    return None


def _shown_size(
    image: Image.Image, turn: Image.Transpose | None, pixel_aspect: Any
) -> tuple[float, float]:
    pixel_width = float(pixel_aspect or 1)
    if turn in _QUARTER_TURNS:
        return image.width, image.height * pixel_width
    return image.width * pixel_width, image.height
