"""Sounds as log-mel frames, as Whisper reads them (arXiv 2212.04356).

Frames of 25 ms every 10 ms, a Hann window, power in triangular bands that are evenly spaced on the
mel scale (Slaney's), the logarithm to base 10, at most 8 below the loudest, scaled to about 1.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["FRAMES_PER_ROW", "TOKENS_PER_ROW", "log_mel", "num_audio_tokens", "silent_mel"]

TOKENS_PER_ROW = 4
"""Tokens of the encoder that become one row of features."""
FRAMES_PER_ROW = 2 * TOKENS_PER_ROW
"""Frames that do: the second convolution has stride 2."""
_FRAMES_PER_SECOND = 100
_WINDOW_S = 0.025
_FLOOR = 1e-10
_DYNAMIC_RANGE = 8.0


def num_audio_tokens(num_samples: int, rate: int) -> int:
    """Tokens of the encoder: half as many as frames, which are filled up to whole rows."""
    frames = -(-num_samples * _FRAMES_PER_SECOND // rate)
    return -(-frames // FRAMES_PER_ROW) * FRAMES_PER_ROW // 2


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


def silent_mel(num_tokens: int, num_mels: int) -> NDArray[np.float32]:
    """What :func:`log_mel` makes of silence: ``[2 * num_tokens, num_mels]``."""
    silence = (np.log10(_FLOOR) + 4.0) / 4.0
    return np.full((2 * num_tokens, num_mels), silence, dtype=np.float32)


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
