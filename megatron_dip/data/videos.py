"""Videos and pictures as frames of a size that the model takes.

A clip keeps its length and its resolution as far as limits allow: at most so many frames, taken at
a fixed stride from the start, scaled to the grid of patches that fits aspect ratio and size best
(see ``images``).  Where buckets are given, a clip takes the one that is nearest in these.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_dip.data.image_files import decode_image
from megatron_dip.data.images import ImageLimits, choose_grid
from megatron_dip.errors import DataError

__all__ = ["Bucket", "ClipLimits", "read_clip"]

_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
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

    def choose(self, num_frames: int, width: int, height: int, pixels_per_patch: int) -> Bucket:
        """Frames, rows and columns for a video of ``num_frames`` frames of a size in pixels."""
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
        # A grid of pairs of cells: what one language token is to an image, a patch is to a frame.
        limits = ImageLimits(pixels_per_patch // 2, self.min_frame_tokens, self.max_frame_tokens)
        rows, columns = choose_grid(width, height, limits)
        return min(num_frames, self.max_frames), rows // 2, columns // 2


def read_clip(
    path: Path, limits: ClipLimits, pixels_per_patch: int
) -> tuple[NDArray[np.uint8], Bucket]:
    """The frames of a video or a picture at the size that the limits choose.

    Returns:
        ``[F, H, W, 3]``, and its frames, rows and columns of patches.

    Raises:
        DataError: The file is missing or broken, also in the middle; the message names it.
    """
    if path.suffix.lower() in _PICTURES:
        images = [decode_image(path)]
    else:
        with _explained(path):
            images = list(_decode(path, limits))
    if not images:
        raise DataError(f"video {path}: holds no frame; replace the file, or skip bad samples")
    try:
        bucket = limits.choose(len(images), *images[0].size, pixels_per_patch)
    except DataError as error:
        raise DataError(f"video {path}: {error}") from error
    size = (bucket[2] * pixels_per_patch, bucket[1] * pixels_per_patch)
    frames = [
        np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in images[: bucket[0]]
    ]
    return np.stack(frames), bucket


def _decode(path: Path, limits: ClipLimits) -> Iterator[Image.Image]:
    av = _decoder(path)
    with av.open(str(path)) as container:
        if not container.streams.video:
            return
        wanted = limits.most_frames
        for number, frame in enumerate(container.decode(video=0)):
            if number % limits.frame_stride == 0:
                yield frame.to_image()
                wanted -= 1
                if wanted == 0:
                    return


def _decoder(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError(
            f"video {path}: decoding takes PyAV; install megatron-dip[video]"
        ) from error
    return av


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"video {path}: no such file; check the name and video_folder") from error
    except Exception as error:  # Decoders of broken files raise whatever they trip over.
        detail = str(error) or type(error).__name__
        raise DataError(
            f"video {path}: does not decode ({detail}); replace the file, or skip bad samples"
        ) from error
