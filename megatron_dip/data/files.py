"""Files that other processes wait for, and files that an index depends on."""

import os
import tempfile
from pathlib import Path

__all__ = ["file_facts", "write_atomically"]


def file_facts(folder: Path, name: str) -> bytes:
    """Name, size and time of a file in ``folder``, for a digest; also of one that is missing."""
    try:
        status = os.stat(folder / name)
        return f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode()
    except OSError:
        return f"{name}\0missing\n".encode()


def write_atomically(path: Path, text: str) -> None:
    """Write ``path`` so that a reader sees all of ``text`` or no new file at all.

    Raises:
        OSError: The folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; other ranks may run as another user of the group.
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
