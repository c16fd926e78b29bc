"""Writing files that others read: whole or not at all, line by line, whatever happens meanwhile."""

import contextlib
import os
import tempfile
from pathlib import Path

__all__ = ["append_line", "write_atomically"]


def write_atomically(path: Path, content: str | bytes, *, is_kept: bool = True) -> None:
    """Write ``path`` so that a reader sees all of ``content`` or no new file at all.

    Args:
        is_kept: Wait until it is on the disk, so that it is there after a power failure too.

    Raises:
        OSError: The folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if is_kept:
                os.fsync(file.fileno())
        # mkstemp makes private files; other ranks may run as another user of the group.
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append_line(path: Path, line: str) -> None:
    """Append ``line`` whole or not at all; what a process that was killed left half is ended.

    Raises:
        OSError: The file cannot be written; it is as it was before.
    """
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        rest = memoryview(_line_break_before(path, size) + line.encode() + b"\n")
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):  # Not of a device.
                file.truncate(size)
            raise


def _line_break_before(path: Path, size: int) -> bytes:
    """What is to be written first so that a new line begins."""
    if not size:
        return b""
    with open(path, "rb") as file:
        file.seek(size - 1)
        return b"" if file.read(1) == b"\n" else b"\n"
