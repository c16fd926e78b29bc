"""Samples of video-text pairs, out of a JSON list of ``{"id", "video", "caption"}``."""

from dataclasses import dataclass
from typing import Any

from megatron_dip.families.data.fields import file_name, text_of, unread_keys
from megatron_dip.families.data.samples import sample_fields

__all__ = ["ClipSample", "parse_clip_sample"]

_KEYS = ("id", "video", "caption")


@dataclass(frozen=True, kw_only=True)
class ClipSample:
    """One raw sample, checked."""

    name: str
    """How messages call it."""
    video: str
    caption: str
    unread: tuple[str, ...]
    """Keys that say nothing that would be trained."""


def parse_clip_sample(raw: Any, number: int) -> ClipSample:
    """The checked form of one raw sample.

    Raises:
        DataError: A field is missing or of the wrong kind, or a key says what would not be read.
    """
    name, fields = sample_fields(raw, number)
    return ClipSample(
        name=name,
        unread=unread_keys(fields, _KEYS, name),
        video=file_name(fields.get("video"), "video", name),
        caption=text_of(fields, "caption", name),
    )
