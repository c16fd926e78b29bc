"""The hooks as a patch to a tree of Megatron: seen, applied and taken out again, without fuzz.

A tree is a folder that holds ``megatron/``.  All of a patch is placed in memory before a byte is
written, so that a tree that it does not fit stays as it is.  Context must fit to the byte and stand
in one place; line numbers may differ, since one patch is for all supported versions.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from megatron_dip.errors import UnsupportedError

__all__ = ["PatchState", "TreePatch", "patch_file"]

_HUNK = re.compile(rb"@@ -\d+(?:,\d+)? \+\d+(?:,\d+)? @@")
_BY_HAND = (
    "start scripts with python -m megatron_dip.launch instead, which changes no file, or put the "
    "lines in by hand: patches/README.md says what they do"
)


class PatchState(Enum):
    """What a tree has of a patch."""

    ABSENT = "fits and is not applied"
    APPLIED = "is applied"


@dataclass(frozen=True)
class _Hunk:
    before: bytes
    after: bytes


def patch_file() -> Path:
    """The patch of this package.

    Raises:
        UnsupportedError: It is not there: this is no checkout.
    """
    path = Path(__file__).resolve().parents[1] / "patches" / "megatron_dip.patch"
    if not path.is_file():
        raise UnsupportedError(
            f"there is no {path}: the patch is part of the repository of megatron-dip, not of an "
            f"installed package (run the command from a checkout, pip install --editable)"
        )
    return path


class TreePatch:
    """One patch and one tree.

    Args:
        patch: A unified diff with paths below ``a/`` and ``b/``.
        tree: The folder that holds ``megatron/``.

    Raises:
        UnsupportedError: The tree is none, or the patch does not fit it; says where and why.
    """

    def __init__(self, patch: Path, tree: Path) -> None:
        if not (tree / "megatron" / "core").is_dir():
            raise UnsupportedError(
                f"{tree} holds no megatron/core (expected the folder that holds megatron/)"
            )
        self._tree = tree
        self._hunks = _read(patch)
        self._texts = {path: self._read(path) for path in self._hunks}
        states = {path: self._state_of(path) for path in self._hunks}
        if len(set(states.values())) > 1:
            parts = ", ".join(f"{path} {state.value}" for path, state in states.items())
            raise UnsupportedError(
                f"{tree} has a part of the patch: {parts} (restore these files from where the tree "
                f"came from, then apply it again)"
            )
        self.state = next(iter(states.values()))

    @property
    def files(self) -> list[str]:
        """What the patch changes, from the tree's folder on."""
        return list(self._hunks)

    def apply(self) -> None:
        """Put the patch in; does nothing where it is applied."""
        if self.state is PatchState.ABSENT:
            self._write(lambda hunk: (hunk.before, hunk.after))
            self.state = PatchState.APPLIED

    def revert(self) -> None:
        """Take the patch out, to the byte; does nothing where it is not applied."""
        if self.state is PatchState.APPLIED:
            self._write(lambda hunk: (hunk.after, hunk.before))
            self.state = PatchState.ABSENT

    def _read(self, path: str) -> bytes:
        file = self._tree / path
        if not file.is_file():
            raise UnsupportedError(f"the patch does not fit {self._tree}: there is no {path}")
        if not file.resolve().is_relative_to(self._tree.resolve()):
            raise UnsupportedError(
                f"{file} is a link to {file.resolve()}, outside of {self._tree}: copy the tree, or "
                f"name the folder that holds its files"
            )
        return file.read_bytes()

    def _state_of(self, path: str) -> PatchState:
        text, states = self._texts[path], set()
        for hunk in self._hunks[path]:
            # What is added stands between lines of before, so that of the two only one is there.
            counts = text.count(hunk.before), text.count(hunk.after)
            if counts not in ((1, 0), (0, 1)):
                first = hunk.before.decode(errors="replace").splitlines()[0].strip()
                how = "do not stand there" if not any(counts) else "stand there more than once"
                raise UnsupportedError(
                    f"the patch does not fit {self._tree / path}: the lines from {first!r} on "
                    f"{how} (nothing was changed; {_BY_HAND})"
                )
            states.add(PatchState.ABSENT if counts[0] else PatchState.APPLIED)
        if len(states) > 1:
            raise UnsupportedError(
                f"{self._tree / path} has a part of the patch (restore it from where the tree "
                f"came from, then apply the patch again)"
            )
        return states.pop()

    def _write(self, change: Callable[[_Hunk], tuple[bytes, bytes]]) -> None:
        texts = {}
        for path, text in self._texts.items():
            for hunk in self._hunks[path]:
                old, new = change(hunk)
                text = text.replace(old, new, 1)
            texts[path] = text
        written: list[str] = []
        try:
            for path, text in texts.items():
                _replace(self._tree / path, text)
                written.append(path)
        except OSError as error:
            for path in written:
                _replace(self._tree / path, self._texts[path])
            raise UnsupportedError(
                f"{self._tree} cannot be changed, and was not: {error}"
            ) from error
        self._texts = texts


def _replace(path: Path, text: bytes) -> None:
    """At once, and never through a link: installers share files between environments by links."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
        shutil.copymode(path, name)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise


def _read(patch: Path) -> dict[str, list[_Hunk]]:
    """Per file its hunks."""
    found: dict[str, list[_Hunk]] = {}
    before: list[bytes] = []
    after: list[bytes] = []
    path = ""

    def end() -> None:
        if before or after:
            found[path].append(_Hunk(b"".join(before), b"".join(after)))
            before.clear()
            after.clear()

    for line in patch.read_bytes().splitlines(keepends=True):
        if line.startswith((b"--- ", b"+++ ")):
            end()
            path = line[4:].strip().decode().split("/", 1)[1]
            found.setdefault(path, [])
        elif _HUNK.match(line):
            end()
        else:
            if line[:1] != b"+":
                before.append(line[1:])
            if line[:1] != b"-":
                after.append(line[1:])
    end()
    return found
