"""Fields of raw samples, checked alike for all families before anything is made of them.

A sample is an object out of a user's file.  What its form reads must be of the right kind, and what
the form does not read is treated by what it says:

- a key that is nearly one of the form's (``imge``, ``Image``, ``conversation``), that names other
  media (``video``, ``images``) or that changes what is learned (``system``, ``weight``) makes the
  sample a bad one, because the sample says more than would be trained;
- any other key (``source``, ``width``) is counted, and said once for the whole data set;
- an empty value (null, an empty text or list) says nothing.

Every fault is a ``DataError`` that names the sample, so that the sample can be skipped.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any

from megatron_dip.errors import DataError, shown
from megatron_dip.reading import RepeatedKeys

__all__ = [
    "check_object",
    "file_name",
    "optional_file_name",
    "say_unread",
    "text_of",
    "unread_keys",
]

# Keys as ``_plain`` writes them.  A number under a medium's is a count.
_MEDIA = """
    image img picture photo video movie frame audio sound speech voice wav media
    imagepath imagefile imagelist imagebase imagebytes imagedata videopath videofile videolist
    audiopath audiofile audiolist
"""
_LEARNING = (
    "weight sampleweight lossweight lossmask system systemprompt tool chosen rejected message"
)
_LEARNING_IN_TURNS = (
    "weight loss lossweight lossmask mask train trainable learn toolcall functioncall"
)
_MEDIA_KEYS = frozenset(_MEDIA.split())
_LEARNING_KEYS = {
    False: frozenset(_LEARNING.split()),
    True: frozenset(_LEARNING_IN_TURNS.split()),
}
"""By whether it is a key of a turn."""
_ADDRESSES = frozenset({"imageurl", "videourl", "audiourl"})
"""Of a medium, which are of interest only where the medium itself is not given."""
_SHORTEST_NEARLY = 4
_LONGEST_PART_BYTES, _LONGEST_NAME_BYTES = 255, 4095
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(//|[a-z]+/[a-z]+;)")
_NUM_SHOWN_KEYS = 12

logger = logging.getLogger(__name__)


def check_object(raw: Any, place: str) -> Mapping[str, Any]:
    """``raw`` as an object whose keys each come once; ``place`` names it in messages.

    Raises:
        DataError: It is none.
    """
    if not isinstance(raw, Mapping):
        raise DataError(f"{place}: expected an object, found {type(raw).__name__}")
    if isinstance(raw, RepeatedKeys):
        raise DataError(f"{place}: the key {shown(raw.repeated)} comes twice; remove one")
    return raw


def unread_keys(
    raw: Mapping[str, Any], read: Collection[str], place: str, *, in_turn: bool = False
) -> tuple[str, ...]:
    """The keys that the form does not read, where nothing is lost with them.

    Args:
        read: Those that it does read.
        in_turn: Whether this is a turn of a conversation, and no whole sample.

    Raises:
        DataError: A key is nearly one that is read, or says what would not be trained.
    """
    left = {key: raw[key] for key in raw if key not in read and not _is_empty(raw[key])}
    if not left:
        return ()
    for key, value in left.items():
        meant = _nearly(key, tuple(read))
        if meant is not None:
            raise DataError(
                f"{place}: the key {shown(key)} is not read (expected {meant!r}); correct it"
            )
        names = {_plain(key), _plain(key).removesuffix("s")}
        is_medium = names & _MEDIA_KEYS and not isinstance(value, (int, float))
        is_address = any(_is_empty(raw.get(name[:-3])) for name in names & _ADDRESSES)
        if is_medium or is_address or names & _LEARNING_KEYS[in_turn]:
            raise DataError(
                f"{place}: the key {shown(key)} is not read by this form of data (expected only "
                f"{', '.join(read)}), so that what it says would not be trained; remove it, or "
                f"skip bad samples"
            )
    return tuple(left)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _plain(key: str) -> str:
    return re.sub(r"[^a-z]", "", key.lower())


# Samples of a file have the same few keys.
@lru_cache(maxsize=1024)
def _nearly(key: str, read: tuple[str, ...]) -> str | None:
    """The key of the form that ``key`` nearly is."""
    return next((known for known in read if _is_nearly(_plain(key), _plain(known))), None)


def _is_nearly(key: str, known: str) -> bool:
    """Whether one letter too many, too few, another or in its neighbour's place lies between."""
    if len(known) < _SHORTEST_NEARLY or abs(len(key) - len(known)) > 1:
        return False
    start = 0
    while start < min(len(key), len(known)) and key[start] == known[start]:
        start += 1
    rest, other = key[start:], known[start:]
    return (
        rest[1:] == other[1:]
        or rest[1:] == other
        or rest == other[1:]
        or (rest[:2] == other[1::-1] and rest[2:] == other[2:])
    )


def text_of(raw: Mapping[str, Any], field: str, place: str) -> str:
    """The text in ``field``, which is not blank.

    Raises:
        DataError: It is missing, no text, blank, or holds what no text may hold.
    """
    value = raw.get(field)
    if value is None:
        keys = ", ".join(shown(key, 20) for key in list(raw)[:_NUM_SHOWN_KEYS])
        raise DataError(f"{place}: field {field!r} is missing (the keys are {keys or 'none'})")
    if not isinstance(value, str):
        raise DataError(f"{place}: field {field!r} is {shown(value)}; expected a text")
    if not value.strip():
        raise DataError(f"{place}: field {field!r} is blank; expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        around = value[max(error.start - 10, 0) : error.end + 10]
        raise DataError(
            f"{place}: field {field!r} holds half a surrogate pair at character {error.start}: "
            f"{shown(around)}; write the whole character"
        ) from error
    return value


def file_name(value: Any, field: str, place: str) -> str:
    """``value`` as the name of a file.  It may be absolute or lead out of the data's folder.

    Raises:
        DataError: No file can have this name.
    """
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: field {field!r} is {shown(value)}; expected the name of a file")
    if _URL.match(value):
        raise DataError(
            f"{place}: field {field!r} is {shown(value)}; expected the name of a file, no address "
            f"and no content"
        )
    try:
        encoded = os.fsencode(value)
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field {field!r} is {shown(value)}, which holds half a surrogate pair; "
            f"expected the name of a file"
        ) from error
    if b"\0" in encoded:
        raise DataError(
            f"{place}: field {field!r} is {shown(value)}, which holds a NUL; expected the name of "
            f"a file"
        )
    longest = max(map(len, encoded.split(b"/")))
    if longest > _LONGEST_PART_BYTES or len(encoded) > _LONGEST_NAME_BYTES:
        raise DataError(
            f"{place}: field {field!r} is {shown(value)}, too long for a file's name; expected a "
            f"name, not the content"
        )
    return value


def optional_file_name(raw: Mapping[str, Any], field: str, place: str) -> str | None:
    """As :func:`file_name`; None where the field is missing or null."""
    value = raw.get(field)
    return None if value is None else file_name(value, field, place)


def say_unread(source: str, unread: Iterable[tuple[str, ...]]) -> None:
    """Warn once of the keys that are not read, each with the number of samples that have it."""
    counts = Counter(key for keys in unread for key in keys).most_common()
    if not counts:
        return
    texts = [f"{shown(key)} ({count} times)" for key, count in counts[:_NUM_SHOWN_KEYS]]
    more = f" and {len(counts) - len(texts)} more" if len(counts) > len(texts) else ""
    logger.warning("%s: keys that are not read: %s%s", source, ", ".join(texts), more)
