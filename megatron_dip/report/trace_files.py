"""The files of a trace folder as a run writes them; reading them is in ``steps`` and ``traces``.

What cannot be written is left out, and said once: a full disk is no reason to end training.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_dip.costs.profile import Profile
from megatron_dip.errors import DataError
from megatron_dip.files import append_line, write_atomically
from megatron_dip.plan import Plan
from megatron_dip.plan.plan import plan_path, plan_text
from megatron_dip.reading import decode_text, parse_json
from megatron_dip.report.steps import StepRecord, record_path

__all__ = ["TraceFiles", "machine_path"]

logger = logging.getLogger(__name__)


def machine_path(folder: str | Path) -> Path:
    """The file in a trace folder that says what was measured on which machine."""
    return Path(folder) / "machine.json"


class TraceFiles:
    """What one rank writes.

    Args:
        folder: Made where it does not exist, also when it vanishes.
        run: Identity of this start of the run, the same on all ranks; later ones sort later.
        rank: Global rank.
        replica: Data-parallel replica.
        num_kept: Most timelines that are kept, the newest ones; all if None.
    """

    def __init__(
        self, folder: Path, run: str, *, rank: int, replica: int, num_kept: int | None = None
    ) -> None:
        self._folder = folder
        self._run = run
        self._path = folder / f"rank{rank:05d}.jsonl"
        self._replica = replica
        self._num_kept = num_kept
        self._has_failed = False

    def write_timeline(self, line: dict[str, Any], plan: Plan | None = None) -> None:
        """Append the timeline of an iteration, and write its plan where this rank has that task.

        Args:
            line: As ``traces`` reads it, without what tells runs and replicas apart.
        """
        line = line | {"run": self._run, "replica": self._replica}
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
            if plan is not None:
                text = plan_text(plan)
                path = plan_path(self._folder, self._replica, line["iteration"])
                write_atomically(path, text, is_kept=False)
                digest = hashlib.sha256(text.encode()).hexdigest()
                line["plan"] = {"file": path.name, "sha256": digest}
            append_line(self._path, json.dumps(line))
            if self._num_kept is not None:
                self._drop_old(self._num_kept)

    def write_machine(self, profile: Profile) -> None:
        """Write what the run's times are measured on; see :mod:`megatron_dip.costs.profile`."""
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
            text = profile.model_dump_json(indent=1) + "\n"
            write_atomically(machine_path(self._folder), text, is_kept=False)

    def write_record(self, record: StepRecord) -> None:
        """Append the record of a step."""
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
            record = record.model_copy(update={"run": self._run})
            append_line(record_path(self._folder, self._replica), record.model_dump_json())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                logger.warning(
                    "nothing can be recorded in %s (%s): training goes on, what cannot be written "
                    "is left out; this is said once",
                    self._folder,
                    error.strerror,
                )

    def _drop_old(self, num_kept: int) -> None:
        """Remove all but the newest timelines of this rank, with their plans."""
        lines = self._path.read_bytes().splitlines(keepends=True)
        if len(lines) <= num_kept:
            return
        kept = lines[-num_kept:]
        write_atomically(self._path, b"".join(kept), is_kept=False)
        plans = set(map(_plan_name, kept)) - {None}
        for path in self._folder.glob(f"plan-replica{self._replica}-*.json") if plans else ():
            if path.name not in plans:
                path.unlink(missing_ok=True)


def _plan_name(line: bytes) -> str | None:
    """The plan that a line names; None where it names none or is damaged."""
    try:
        return str(parse_json(decode_text(line, "", DataError), "", DataError)["plan"]["file"])
    except (ValueError, LookupError, TypeError):
        return None
