"""Machine code of compiled functions on disk: Numba's cache, every file under a digest.

Numba takes what lies in its files as it is: one that is cut short raises wherever the function is
called, and a flipped byte may well be executed.  Here a file is used only where its digest says
that it is whole and what it was made for; everything else is compiled anew, in memory, and written
again where that is possible.  The data is written before the index that names it, each under
another name first, so that processes may write at the same time.
"""

import contextlib
import functools
import hashlib
import itertools
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

__all__ = ["CodeCache"]

_FORMAT = "megatron-dip/code 1"
_DIGEST_BYTES = 32

logger = logging.getLogger(__name__)


class _UnusableFileError(Exception):
    """A file of the cache that is not what was written to it."""


class _CheckedFiles(IndexDataCacheFile):
    """The index of a function's signatures, and a file of code for each."""

    def __init__(self, cache_path: str, filename_base: str, source_stamp: object) -> None:
        # Under names of their own: Numba would not understand these files, nor they its files.
        super().__init__(cache_path, f"{filename_base}.checked", source_stamp)
        self._version = f"{_FORMAT} {numba.__version__} {llvmlite.__version__}"

    def load(self, key: object) -> Any:
        """The code under ``key``; None where there is none.

        Raises:
            _UnusableFileError: A file is damaged.
            OSError: A file cannot be read.
        """
        name = self._load_index().get(key)
        if name is None:
            return None
        path = Path(self._data_path(name))
        with contextlib.suppress(FileNotFoundError):
            return pickle.loads(_checked(path, self._purpose(key)))
        return None

    def save(self, key: object, data: object) -> None:
        """Keep ``data`` under ``key``.

        Raises:
            OSError: A file cannot be written.
        """
        try:
            overloads = dict(self._load_index())
        except (_UnusableFileError, OSError):
            overloads = {}
        taken = set(overloads.values())
        name = overloads.get(key) or next(
            name for name in map(self._data_name, range(1, len(taken) + 2)) if name not in taken
        )
        self._write(self._data_path(name), self._purpose(key), self._dump(data))
        overloads[key] = name
        self._save_index(overloads)

    def _purpose(self, key: object) -> str:
        """What code belongs to: two processes may give their code the same name."""
        return f"{self._version} {self._index_name} {self._source_stamp!r} {key!r}"

    def _load_index(self) -> dict[object, str]:
        try:
            content = _checked(Path(self._index_path), _FORMAT)
        except FileNotFoundError:
            return {}
        version, rest = content.split(b"\n", 1)
        if version.decode() != self._version:
            return {}
        stamp, overloads = pickle.loads(rest)
        return overloads if stamp == self._source_stamp else {}

    def _save_index(self, overloads: dict[object, str]) -> None:
        content = self._dump((self._source_stamp, overloads))
        self._write(self._index_path, _FORMAT, self._version.encode() + b"\n" + content)

    def _write(self, path: str, purpose: str, content: bytes) -> None:
        with self._open_for_write(path) as file:
            file.write(_digest(purpose, content) + content)


def _digest(purpose: str, content: bytes) -> bytes:
    return hashlib.sha256(purpose.encode() + b"\0" + content).digest()


def _checked(path: Path, purpose: str) -> bytes:
    """What a file holds after its digest."""
    whole = path.read_bytes()
    digest, content = whole[:_DIGEST_BYTES], whole[_DIGEST_BYTES:]
    if digest != _digest(purpose, content):
        raise _UnusableFileError(f"{path.name} is damaged")
    return content


class CodeCache(FunctionCache):
    """Stands for Numba's cache of a function; never the reason why a call fails.

    Raises:
        RuntimeError: No folder for the code can be written to.
    """

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__(function)
        self._cache_file = _CheckedFiles(
            self._cache_path, self._impl.filename_base, self._impl.locator.get_source_stamp()
        )

    def load_overload(self, sig: object, target_context: Any) -> Any:
        """The code for a signature; None where it is to be compiled."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # Whatever reading code raises, it can be compiled.
            self._warn("cannot be used", "it is compiled anew", error)
            return None

    def save_overload(self, sig: object, data: Any) -> None:
        """Keep the code for a signature where possible."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            self._warn("cannot be kept", "every process compiles for itself", error)

    def _warn(self, what: str, consequence: str, error: Exception) -> None:
        """Once in a process for every folder: what befalls one file often befalls many."""
        if next(_calls(self._cache_path, what)) == 0:
            logger.warning(
                "compiled code in %s %s (%s): %s (should this come again, make room or remove the "
                "files *.nbi and *.nbc there)",
                self._cache_path,
                what,
                _reason(error),
                consequence,
            )


@functools.cache
def _calls(*_: str) -> Iterator[int]:
    """0, 1, 2, ... for every different arguments."""
    return itertools.count()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        name = f"{Path(str(error.filename)).name}: " if error.filename else ""
        return name + error.strerror
    return str(error) or type(error).__name__
