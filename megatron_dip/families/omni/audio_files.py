"""Audio files to samples: what is read of them, what is refused, and why.

WAV (whole numbers of any width, floating point, A-law, mu-law; also WAVEX and RF64) and FLAC, read
by libsndfile; several channels are averaged.  Of compressed formats beside FLAC a file that was cut
short cannot be told from a whole one, so they are refused.  Nothing is resampled: a file of another
rate is refused, because its pitch would silently be another.

A WAV file must hold all that its data chunk says.  Writers that cannot seek put the largest number
there; such a file is read to its end.  Chunks that do not hold samples may be broken.
"""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_dip.errors import DataError
from megatron_dip.families.data.files import SKIP_HINT, open_media, shown_path
from megatron_dip.families.data.image_files import explain
from megatron_dip.families.data.wholeness import is_unknown_size

__all__ = ["read_sound"]

_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC")
_MOST_VALUES = 3600 * 48_000
"""An hour of one channel."""
_LOUDEST = 8.0
"""Full scale is 1; recordings in floating point may go over it, but not this far."""


def read_sound(path: Path, rate: int) -> NDArray[np.float64]:
    """The samples of a file, full scale at 1, channels averaged.

    Raises:
        DataError: The file is missing, broken, cut short, or of another rate or format.
    """
    what = f"audio {shown_path(path)}"
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise DataError(f"{what}: reading takes soundfile ({error}); install it") from error
    try:
        with open_media(path, "audio") as opened:
            _check_whole(opened)
            opened.seek(0)
            with soundfile.SoundFile(opened) as file:
                _check_form(file, rate)
                samples = file.read(dtype="float64", always_2d=True)
                _check_samples(samples, file.frames)
    except soundfile.LibsndfileError as error:
        told = error.error_string.removeprefix("Error : ").rstrip(".")
        raise DataError(f"{what}: is no readable WAV or FLAC file ({told}); {SKIP_HINT}") from error
    except DataError as error:
        told = str(error)
        raise error if told.startswith(what) else DataError(f"{what}: {told}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{what}: cannot be read ({explain(error)}); {SKIP_HINT}") from error
    mono: NDArray[np.float64] = samples.mean(axis=1)
    return mono


def _check_form(file: Any, rate: int) -> None:
    if file.format not in _FORMATS:
        raise DataError(
            f"is a file of {file.format}, expected WAV or FLAC; convert it, or skip bad samples"
        )
    if file.samplerate != rate:
        raise DataError(
            f"has {file.samplerate} samples per second, expected {rate}; resample it, change "
            f"data.audio_rate, or skip bad samples"
        )
    if not 0 < file.frames * file.channels <= _MOST_VALUES:
        raise DataError(
            f"holds {file.frames} samples in {file.channels} channels, expected 1 to "
            f"{_MOST_VALUES} in all; {SKIP_HINT}"
        )


def _check_samples(samples: NDArray[np.float64], expected: int) -> None:
    if len(samples) != expected:
        raise DataError(f"holds {len(samples)} of {expected} samples; {SKIP_HINT}")
    loudest = np.abs(samples).max()
    if not loudest <= _LOUDEST:
        raise DataError(
            f"has samples up to {loudest:.4g}, expected numbers from -1 to 1; scale it, or "
            f"skip bad samples"
        )


def _check_whole(file: BinaryIO) -> None:
    """
    Raises:
        DataError: The file is WAV, and ends before its data chunk does.
    """
    head = file.read(12)
    if head[:4] not in (b"RIFF", b"RF64") or head[8:] != b"WAVE":
        return
    length = file.seek(0, os.SEEK_END)
    place, long_size = 12, 0
    while place + 8 <= length:
        file.seek(place)
        name, size = file.read(4), int.from_bytes(file.read(4), "little")
        place += 8
        if name == b"ds64":
            long_size = int.from_bytes(file.read(16)[8:], "little")
        if name == b"data":
            stated = long_size if head.startswith(b"RF64") else size
            if stated > length - place and not is_unknown_size(stated):
                raise DataError(
                    f"is cut short, it holds {length - place} of {stated} bytes of samples; "
                    f"{SKIP_HINT}"
                )
            return
        place += size + size % 2
