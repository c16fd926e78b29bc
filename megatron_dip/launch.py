"""Run a Megatron pretrain script with the hooks of this package, unchanged.

    torchrun ... -m megatron_dip.launch [--cpu [--pin]] SCRIPT ARGUMENTS...

The script runs as if it had been started itself.  What is wrong with the user's input ends the
process with one line on standard error and exit status 2, and so does the end of another rank;
any other exception keeps its traceback.
"""

import argparse
import multiprocessing
import os
import re
import runpy
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Never

from megatron_dip.errors import (
    ChannelError,
    DipError,
    ExecutionError,
    PlanningError,
    UnsupportedError,
    one_line,
)
from megatron_dip.standard_error import print_error

__all__ = ["main"]

_EXIT_USER_ERROR = 2
_QUIET_NOTE = (
    "megatron-dip: leaving out lists and notices that Megatron prints in every run "
    "(--dip-verbose before the script's name shows all)\n"
)
# Gloo's words, in which an error arrives from a collective that is Megatron's.
_LOST_CONNECTION = re.compile("connection (closed|reset) by peer", re.IGNORECASE)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        _exit_with(f"{message} (usage: {self.format_usage().removeprefix('usage: ').strip()})")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script that the command line names; returns when the script does."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except Exception as error:
        line = None if options.dip_debug else _explain(error)
        if line is None:
            raise
        _exit_with(line)


def _explain(error: Exception) -> str | None:
    """What to tell instead of a traceback; None where only a traceback tells enough.

    That is for errors in the user's input and for the end of another rank, in whatever they are
    wrapped: an action of the executor, or a collective of Megatron's.
    """
    cause: BaseException | None = error
    while cause is not None:
        if _tells_enough(cause):
            text = str(error if isinstance(error, DipError) else cause)
            # The second line of an executor's message shows the schedule around its action.
            return text.splitlines()[0] if isinstance(error, ExecutionError) else text
        cause = cause.__cause__
    if isinstance(error, RuntimeError) and _LOST_CONNECTION.search(str(error)):
        return (
            f"rank {os.environ.get('RANK', '0')} lost its connection to another rank, whose "
            f"process has ended: see its log for the cause"
        )
    return None


def _tells_enough(error: BaseException) -> bool:
    if isinstance(error, PlanningError):
        # On the owner, a mistake in the planner itself is the cause: show where it is.
        return error.__cause__ is None or isinstance(error.__cause__, DipError)
    return isinstance(error, ChannelError) or (
        isinstance(error, DipError) and isinstance(error, ValueError)
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m megatron_dip.launch",
        description="Run a Megatron pretrain script with dynamic interleaved pipelines.",
        usage="%(prog)s [--cpu [--pin]] [--dip-debug] [--dip-verbose] SCRIPT ARGUMENTS...",
        allow_abbrev=False,
    )
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, over gloo")
    parser.add_argument(
        "--pin", action="store_true", help="with --cpu: one core for every rank of this machine"
    )
    parser.add_argument(
        "--dip-debug", action="store_true", help="show the traceback of every error"
    )
    parser.add_argument(
        "--dip-verbose",
        action="store_true",
        help="show all that Megatron and its libraries print, lists and notices of every run too",
    )
    parser.add_argument("script", metavar="SCRIPT", help="the pretrain script")
    parser.add_argument(
        "arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER, help="the script's arguments"
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    script = Path(options.script)
    arguments = list(options.arguments)
    if not script.is_file():
        raise UnsupportedError(f"there is no script {options.script}: give the path of a file")

    from megatron_dip.integration.quiet import quiet_output

    quiet: AbstractContextManager[None] = nullcontext()
    if not options.dip_verbose:
        note = _QUIET_NOTE if os.environ.get("RANK", "0") == "0" else ""
        quiet = quiet_output(on_cpu=options.cpu, note=note)
    with quiet:
        _run_hooked(script, arguments, options)


def _run_hooked(script: Path, arguments: list[str], options: argparse.Namespace) -> None:
    from megatron_dip.integration import hooks, versions

    versions.check_megatron()
    if options.cpu:
        from megatron_dip.integration import cpu_mode

        cpu_mode.enable()
        if options.pin:
            arguments += ["--dip-planner-cores", *map(str, _pin_to_core())]
    hooks.enable()
    # As Python does for a script: its neighbours can be imported, its arguments follow its name.
    sys.path.insert(0, str(script.resolve().parent))
    sys.argv = [options.script, *arguments]
    runpy.run_path(options.script, run_name="__main__")


def _pin_to_core() -> list[int]:
    """Keep ranks of one machine from moving between cores, which costs them their caches.

    Returns:
        The cores that are left for planner processes; all where ranks take all.
    """
    cores = sorted(os.sched_getaffinity(0))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    os.sched_setaffinity(0, {cores[local_rank % len(cores)]})
    return cores[num_ranks:] or cores


def _exit_with(message: str) -> Never:
    print_error(one_line(message))
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        _end_at_once()
    sys.exit(_EXIT_USER_ERROR)


def _end_at_once() -> Never:
    """End without the interpreter's own tidying.

    With process groups whose peers are gone or still wait, that may hang, or abort with another
    exit status and a second message.
    """
    for child in multiprocessing.active_children():
        # Some let no SIGTERM through, see runtime.signals.
        child.kill()
    sys.stdout.flush()
    os._exit(_EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
