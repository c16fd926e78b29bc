"""A small real video-text data set, made without a network.

A camera moves over the photographs that ship inside scikit-image: it pans or zooms, and the frames
are written as a video.  Lengths, sizes and aspect ratios vary; some are still pictures.  Captions
say what is to be seen and how the camera moves.  The same arguments give the same clips.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_dip.errors import DataError
from megatron_dip.families.data.image_files import decode_image
from megatron_dip.families.data.tokenizer import train_tokenizer
from megatron_dip.families.sample_data.photos import PHOTOS, photo_folder
from megatron_dip.files import write_atomically

__all__ = ["SampleClipOptions", "make_sample_clips"]

_MOVES = {
    "the camera moves to the right": (0.0, 0.5, 1.0, 0.5, 0.5, 0.5),
    "the camera moves to the left": (1.0, 0.5, 0.0, 0.5, 0.5, 0.5),
    "the camera moves down": (0.5, 0.0, 0.5, 1.0, 0.5, 0.5),
    "the camera moves up": (0.5, 1.0, 0.5, 0.0, 0.5, 0.5),
    "the camera comes closer": (0.5, 0.5, 0.5, 0.5, 0.9, 0.4),
    "the camera draws back": (0.5, 0.5, 0.5, 0.5, 0.4, 0.9),
}
"""Place (0 to 1 of what is free) across and down, at the start and at the end; size (of the largest
that fits) at the start and at the end."""
_FRAMES_PER_SECOND = 8
_SHARE_OF_PICTURES = 0.15


@dataclass(frozen=True, kw_only=True)
class SampleClipOptions:
    """How much is made."""

    num_clips: int = 120
    frame_counts: tuple[int, ...] = (4, 6, 8, 12, 16)
    sides: tuple[int, ...] = (48, 64, 96, 128)
    """Pixels of a frame, across and down, even."""
    vocab_size: int = 600
    seed: int = 1234


def make_sample_clips(
    folder: str | Path, options: SampleClipOptions, advance: Callable[[], None] = lambda: None
) -> int:
    """Write ``samples.json``, ``videos/``, ``tokenizer.json`` and ``README.md`` into ``folder``.

    Args:
        advance: Called after each clip, for a progress bar.

    Returns:
        Bytes of all videos.

    Raises:
        DataError: scikit-image or PyAV is not installed.
    """
    folder = Path(folder)
    videos = folder / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    generator = random.Random(options.seed)
    photos = [decode_image(photo_folder() / photo.file) for photo in PHOTOS]
    samples: list[dict[str, Any]] = []
    for number in range(options.num_clips):
        which = number % len(PHOTOS)
        size = (generator.choice(options.sides), generator.choice(options.sides))
        move = generator.choice(sorted(_MOVES))
        still = generator.random() < _SHARE_OF_PICTURES
        frames = _frames(photos[which], size, move, generator.choice(options.frame_counts))
        name = f"{Path(PHOTOS[which].file).stem}-{number:04d}.{'png' if still else 'mp4'}"
        if still:
            frames[0].save(videos / name)
        else:
            _write_video(frames, videos / name)
        manner = "a still picture" if still else move
        samples.append(
            {
                "id": Path(name).stem,
                "video": name,
                "caption": f"{PHOTOS[which].subject}, {manner}",
            }
        )
        advance()
    train_tokenizer(
        [sample["caption"] for sample in samples], options.vocab_size, folder / "tokenizer.json"
    )
    origins = "\n".join(f"- `{photo.file}`: {photo.origin}." for photo in PHOTOS)
    write_atomically(
        folder / "README.md",
        f"# Sample clips\n\nMade by `scripts/make_sample_clips.py` (seed {options.seed}): a camera "
        "that moves over photographs that ship inside scikit-image (`skimage/data`); their "
        f"origins, as scikit-image documents them:\n\n{origins}\n",
    )
    write_atomically(folder / "samples.json", json.dumps(samples, indent=1, ensure_ascii=False))
    return sum((videos / sample["video"]).stat().st_size for sample in samples)


def _frames(
    photo: Image.Image, size: tuple[int, int], move: str, num_frames: int
) -> list[Image.Image]:
    """What the camera sees, frame by frame."""
    from_x, from_y, to_x, to_y, from_size, to_size = _MOVES[move]
    largest = min(photo.width / size[0], photo.height / size[1])
    frames = []
    for number in range(num_frames):
        done = number / max(num_frames - 1, 1)
        scale = largest * (from_size + done * (to_size - from_size))
        width, height = scale * size[0], scale * size[1]
        left = (photo.width - width) * (from_x + done * (to_x - from_x))
        top = (photo.height - height) * (from_y + done * (to_y - from_y))
        box = (left, top, left + width, top + height)
        frames.append(photo.resize(size, Image.Resampling.BICUBIC, box=box))
    return frames


def _write_video(frames: Sequence[Image.Image], path: Path) -> None:
    try:
        import av
    except ImportError as error:
        raise DataError(
            "PyAV is not installed, and it writes the videos; install megatron-dip[video]"
        ) from error
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(_FRAMES_PER_SECOND))
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 800_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
