"""Audio files as log-mel frames, as Whisper reads them (arXiv 2212.04356).

Frames of 25 ms every 10 ms, a Hann window, power in triangular bands that are evenly spaced on the
mel scale (Slaney's), the logarithm to base 10, at most 8 below the loudest, scaled to about 1.
Files are WAV with 16-bit samples; several channels are averaged.  Nothing is resampled: a file of
another rate is refused, because its pitch would silently be another.
"""

import wave
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_dip.errors import DataError

__all__ = ["FRAMES_PER_ROW", "log_mel", "num_audio_tokens", "read_wav", "read_wav_length"]

FRAMES_PER_ROW = 8
"""Frames that become one row of features: stride 2, then groups of four."""
_FRAMES_PER_SECOND = 100
_WINDOW_S = 0.025
_SAMPLE_BYTES = 2
_FLOOR = 1e-10
_DYNAMIC_RANGE = 8.0


def num_audio_tokens(num_samples: int, rate: int) -> int:
    """Tokens of the encoder: half as many as frames, which are filled up to whole rows."""
    frames = -(-num_samples * _FRAMES_PER_SECOND // rate)
    return -(-frames // FRAMES_PER_ROW) * FRAMES_PER_ROW // 2


def read_wav_length(path: Path, rate: int) -> int:
    """Samples of a file, from its header and its size.

    Raises:
        DataError: The file is missing, broken, cut short, or of another rate or format.
    """
    return len(read_wav(path, rate))


def read_wav(path: Path, rate: int) -> NDArray[np.float64]:
    """The samples of a file between -1 and 1, channels averaged.

    Raises:
        DataError: The file is missing, broken, cut short, or of another rate or format.
    """
    try:
        with wave.open(str(path), "rb") as file:
            given, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            expected = file.getnframes()
            data = file.readframes(expected)
    except FileNotFoundError as error:
        raise DataError(f"audio {path}: no such file; check the name and media_folder") from error
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(
            f"audio {path}: is no WAV file ({error}); replace it, or skip bad samples"
        ) from error
    if given != rate:
        raise DataError(
            f"audio {path}: has {given} samples per second, expected {rate}; resample it, change "
            f"data.audio_rate, or skip bad samples"
        )
    if width != _SAMPLE_BYTES:
        raise DataError(
            f"audio {path}: has {8 * width}-bit samples, expected 16; convert it, or skip bad "
            f"samples"
        )
    if not expected or len(data) != expected * width * channels:
        raise DataError(
            f"audio {path}: holds {len(data) // (width * channels)} of {expected} samples; replace "
            f"it, or skip bad samples"
        )
    samples = np.frombuffer(data, dtype="<i2").reshape(-1, channels).astype(np.float64)
    return samples.mean(axis=1) / 2**15


def log_mel(samples: NDArray[np.float64], rate: int, num_mels: int) -> NDArray[np.float32]:
    """``[frames, num_mels]``; frames are filled up to whole rows of features with silence."""
    hop, size = rate // _FRAMES_PER_SECOND, round(_WINDOW_S * rate)
    num_frames = 2 * num_audio_tokens(len(samples), rate)
    padded = np.pad(samples, (size // 2, max(0, num_frames * hop + size - len(samples))))
    starts = hop * np.arange(num_frames)
    frames = padded[starts[:, None] + np.arange(size)] * np.hanning(size + 1)[:-1]
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    bands = np.log10(np.maximum(power @ _mel_bands(rate, size, num_mels).T, _FLOOR))
    bands = np.maximum(bands, bands.max() - _DYNAMIC_RANGE)
    return ((bands + 4.0) / 4.0).astype(np.float32)


@cache
def _mel_bands(rate: int, size: int, num_mels: int) -> NDArray[np.float64]:
    """Weights of frequencies in bands ``[num_mels, size / 2 + 1]``, each band of equal area."""
    edges = _to_hertz(np.linspace(0.0, _to_mel(rate / 2), num_mels + 2))
    frequencies = np.fft.rfftfreq(size, 1 / rate)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (frequencies - low) / (centre - low)
    falling = (high - frequencies) / (high - centre)
    return np.maximum(0.0, np.minimum(rising, falling)) * 2.0 / (high - low)


def _to_mel(hertz: float) -> float:
    """Slaney's scale: linear below 1000 Hz, logarithmic above."""
    return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * np.log(hertz / 1000) / np.log(6.4)


def _to_hertz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(np.log(6.4) / 27 * (mels - 15)))
