"""Audio files: every form of WAV, what is refused, and what is cut short."""

import io
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megatron_dip.errors import DataError
from megatron_dip.families.omni.audio_files import read_sound

RATE = 8000
TONE = np.round(np.sin(np.arange(800) / 9) * 16000) / 2**15
SHORTS = (TONE * 2**15).astype("<i2").tobytes()


def wav(
    data: bytes = SHORTS,
    *,
    kind: int = 1,
    bits: int = 16,
    channels: int = 1,
    rate: int = RATE,
    size: int | None = None,
    riff: int | None = None,
    before: bytes = b"",
    after: bytes = b"",
    more: bytes = b"",
) -> bytes:
    """A WAV file by hand; ``size`` and ``riff`` are what it says of its length."""
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * frame, frame, bits) + more
    body = b"WAVE" + before + b"fmt " + struct.pack("<I", len(form)) + form
    body += b"data" + struct.pack("<I", len(data) if size is None else size) + data + after
    return b"RIFF" + struct.pack("<I", len(body) if riff is None else riff) + body


def read(tmp_path: Path, content: bytes) -> np.ndarray:
    path = tmp_path / "sound.wav"
    path.write_bytes(content)
    return read_sound(path, RATE)


def written(form: str, kind: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, TONE, RATE, format=form, subtype=kind)
    return buffer.getvalue()


EXTENSIBLE = struct.pack("<HHI", 22, 16, 4) + bytes.fromhex("0100000000001000800000aa00389b71")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (wav(), 0),
        (wav(np.stack([TONE, TONE]).T.astype("<f4").tobytes(), kind=3, bits=32, channels=2), 1e-6),
        (wav(TONE.astype("<f8").tobytes(), kind=3, bits=64), 0),
        (wav((TONE * 2**31).astype("<i4").tobytes(), bits=32), 0),
        (wav(np.repeat(TONE, 40).astype("<f4").tobytes(), kind=3, bits=32, channels=40), 1e-6),
        (wav(kind=0xFFFE, more=EXTENSIBLE), 0),
        (written("WAV", "PCM_24"), 1e-6),
        (written("WAV", "PCM_U8"), 0.01),
        (written("WAV", "ALAW"), 0.03),
        (written("WAV", "ULAW"), 0.03),
        (written("RF64", "PCM_16"), 1e-4),
        (written("FLAC", "PCM_16"), 1e-4),
        # From writers that cannot seek.
        (wav(size=0xFFFFFFFF, riff=0xFFFFFFFF), 0),
        (wav(size=0x7FFFF000, riff=0x7FFFF024), 0),
        # Broken, but not where samples are.
        (wav(after=b"LIST" + struct.pack("<I", 90_000) + b"INFO"), 0),
        (wav(before=b"LIST" + struct.pack("<I", 4) + b"INFO"), 0),
        (wav(SHORTS + b"\1"), 0),
        (wav() + b"trailing", 0),
    ],
)
def test_every_form_of_wav_and_flac_gives_the_same_sound(tmp_path: Path, content, error: float):
    samples = read(tmp_path, content)
    assert samples.shape == TONE.shape and np.abs(samples - TONE).max() <= error


def test_what_the_standard_library_writes_is_read_as_it_is(tmp_path: Path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(np.arange(800, dtype="<i2").tobytes())
    assert np.array_equal(read_sound(tmp_path / "a.wav", RATE), np.arange(800) / 2**15)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (wav(rate=44100), "44100 samples per second, expected 8000"),
        (wav(rate=0), "sound.wav: is no readable WAV or FLAC file"),
        (wav(channels=0), "Channel count is zero"),
        (wav(b""), "holds 0 samples"),
        (wav(size=0, riff=0), "holds 0 samples"),
        (b"", "is empty"),
        (b"no sound", "is no readable WAV or FLAC file"),
        (wav(bits=0), "is no readable WAV or FLAC file"),
        (wav(kind=0x55), "is no readable WAV or FLAC file"),
        (wav(before=b"LIST" + struct.pack("<I", 90_000) + b"INFO"), "is no readable"),
        (wav(size=90_000), "cut short, it holds 1600 of 90000 bytes"),
        (wav(size=90_000, riff=90_036), "cut short, it holds 1600 of 90000 bytes"),
        (wav()[:-1], "cut short, it holds 1599 of 1600 bytes"),
        (wav()[:50], "cut short"),
        (wav()[:30], "is no readable WAV or FLAC file"),
        (written("RF64", "PCM_16")[:-2], "cut short"),
        (written("FLAC", "PCM_16")[:-20], "flac"),
        (written("FLAC", "PCM_16")[:200], "flac"),
        (written("OGG", "VORBIS"), "is a file of OGG, expected WAV or FLAC"),
        (wav(np.full(9, np.nan, "<f4").tobytes(), kind=3, bits=32), "up to nan"),
        (wav(np.full(9, np.inf, "<f4").tobytes(), kind=3, bits=32), "up to inf"),
        (wav((TONE * 32768).astype("<f4").tobytes(), kind=3, bits=32), "numbers from -1 to 1"),
    ],
)
def test_audio_that_cannot_be_used_is_named(tmp_path: Path, content: bytes, words: str):
    with pytest.raises(DataError) as error:
        read(tmp_path, content)
    told = str(error.value)
    assert told.startswith(f"audio {tmp_path}/sound.wav: ") and words in told, told
    assert "skip bad samples" in told and told.isprintable() and len(told) < 500


def test_an_hour_of_sound_is_refused_from_its_header(tmp_path: Path):
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", RATE, 8, format="FLAC", subtype="PCM_16") as file:
        file.write(np.zeros((RATE * 10, 8)))
    content = bytearray(buffer.getvalue())
    # The number of samples in the head: 36 bits.
    content[21] |= 15
    with pytest.raises(DataError, match="samples in 8 channels, expected 1 to"):
        read(tmp_path, bytes(content))
