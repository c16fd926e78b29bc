"""Files of samples, and files that an index depends on."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_dip.errors import DataError

__all__ = ["SKIP_HINT", "file_facts", "open_media", "shown_path"]

SKIP_HINT = "replace the file, or skip bad samples"
_MOST_SHOWN = 200
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def shown_path(path: str | Path) -> str:
    """``path`` in a message: on one line, printable, and not longer than a line may be."""
    text = str(path)
    if len(text) > _MOST_SHOWN:
        text = f"{text[: _MOST_SHOWN // 2]}...{text[-_MOST_SHOWN // 4 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextmanager
def open_media(path: Path, kind: str) -> Iterator[BinaryIO]:
    """Open the file of an image, a video or an audio clip; ``kind`` is which of them.

    Only files with content are opened: reading a pipe or a device may wait for ever.

    Raises:
        DataError: There is no such file, it is empty, or it cannot be read; the message names it.
    """
    what = f"{kind} {shown_path(path)}"
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            found = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
            raise DataError(f"{what}: is {found}, expected a file; {SKIP_HINT}")
        if not status.st_size:
            raise DataError(f"{what}: is empty (0 bytes); {SKIP_HINT}")
        # It may have become a pipe since: then this does not wait for a writer.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except FileNotFoundError as error:
        raise DataError(
            f"{what}: no such file; check the name and the folder that data names for it"
        ) from error
    except OSError as error:
        raise DataError(f"{what}: cannot be read ({error.strerror}); {SKIP_HINT}") from error
    except DataError:
        raise
    except ValueError as error:
        # Half a surrogate pair, a NUL: no system has such names.
        raise DataError(f"{what}: no name of a file; {SKIP_HINT}") from error
    with file:
        yield file


def file_facts(folder: Path, name: str) -> bytes:
    """Name, size and time of a file in ``folder``, for a digest; also of one that is missing."""
    encoded = name.encode("utf-8", "backslashreplace")
    try:
        status = os.stat(folder / name)
        return encoded + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode()
    except (OSError, ValueError):
        return encoded + b"\0missing\n"
