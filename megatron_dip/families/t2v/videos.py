"""Videos and pictures as frames of a size that the model takes.

A clip keeps its length and its resolution as far as limits allow: at most so many frames, taken at
a fixed stride from the start, scaled to the grid of patches that fits aspect ratio and size best
(see ``images``).  Where buckets are given, a clip takes the one that is nearest in these.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_dip.errors import DataError
from megatron_dip.families.data.files import open_media, shown_path
from megatron_dip.families.data.image_files import decode_image
from megatron_dip.families.data.images import ImageLimits, choose_grid
from megatron_dip.families.t2v.video_files import read_frames

__all__ = ["Bucket", "ClipLimits", "read_clip"]

_PNG = b"\x89PNG\r\n\x1a\n"
_PICTURES = (_PNG, b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")
_WEBP_ANIMATION = 2
_HEAD_BYTES = 2**16
Bucket = tuple[int, int, int]
"""Frames, and rows and columns of patches."""


@dataclass(frozen=True, kw_only=True)
class ClipLimits:
    """What a clip may become."""

    max_frames: int
    frame_stride: int
    """Every so many-th frame of a video is taken."""
    min_frame_tokens: int
    """Least patches of a frame."""
    max_frame_tokens: int
    buckets: tuple[Bucket, ...] = ()
    """The only sizes that clips may have; any within the limits where none are given."""

    @property
    def most_frames(self) -> int:
        return max((bucket[0] for bucket in self.buckets), default=self.max_frames)

    @property
    def most_tokens(self) -> int:
        """Patches of the largest clip."""
        native = self.max_frames * self.max_frame_tokens
        return max((math.prod(bucket) for bucket in self.buckets), default=native)

    def choose(self, num_frames: int, width: float, height: float, pixels_per_patch: int) -> Bucket:
        """Frames, rows and columns for a video of ``num_frames`` frames of a size in pixels, as
        it is shown."""
        if self.buckets:
            fitting = [bucket for bucket in self.buckets if bucket[0] <= num_frames]
            if not fitting:
                fewest = min(bucket[0] for bucket in self.buckets)
                raise DataError(
                    f"has {num_frames} frames at stride {self.frame_stride}, but the shortest "
                    f"bucket has {fewest}; add a bucket or take the clip out"
                )
            area = width * height / pixels_per_patch**2

            def distance(bucket: Bucket) -> tuple[float, ...]:
                aspect = abs(math.log(bucket[2] / bucket[1] / (width / height)))
                return -bucket[0], aspect + 0.5 * abs(math.log(bucket[1] * bucket[2] / area))

            return min(fitting, key=distance)
        limits = ImageLimits(pixels_per_patch, self.min_frame_tokens, self.max_frame_tokens, 1)
        grid = choose_grid(width, height, limits)
        return min(num_frames, self.max_frames), grid.rows, grid.columns


def read_clip(
    path: Path, limits: ClipLimits, pixels_per_patch: int
) -> tuple[NDArray[np.uint8], Bucket]:
    """The frames of a video or a picture at the size that the limits choose.

    Returns:
        ``[F, H, W, 3]``, and its frames, rows and columns of patches.

    Raises:
        DataError: The file is missing or broken, also in the middle; the message names it.
    """
    if _is_picture(path):
        images = [decode_image(path)]
        width, height = map(float, images[0].size)
    else:
        images, width, height = read_frames(path, limits.most_frames, limits.frame_stride)
    try:
        bucket = limits.choose(len(images), width, height, pixels_per_patch)
    except DataError as error:
        raise DataError(f"video {shown_path(path)}: {error}") from error
    size = (bucket[2] * pixels_per_patch, bucket[1] * pixels_per_patch)
    frames = [
        np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in images[: bucket[0]]
    ]
    return np.stack(frames), bucket


def _is_picture(path: Path) -> bool:
    """Whether the content is that of a picture, whatever the file is called.

    Raises:
        DataError: It cannot be read, or is an animation of a format that is not read as a video.
    """
    with open_media(path, "video") as file:
        head = file.read(_HEAD_BYTES)
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    is_moving = (
        head[12:16] == b"VP8X" and head[20] & _WEBP_ANIMATION
        if is_webp
        else (head.startswith(_PNG) and b"acTL" in head)
    )
    if is_moving:
        raise DataError(
            f"video {shown_path(path)}: is an animated PNG or WebP file, expected a video or a "
            f"picture; convert it to a video, or skip bad samples"
        )
    # Pictures one after the other.
    is_stream = path.suffix.lower() in (".mjpeg", ".mjpg")
    return is_webp or (head.startswith(_PICTURES) and not is_stream) or head[4:12] == b"ftypavif"
