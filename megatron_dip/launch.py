"""Run a Megatron pretrain script with the hooks of this package, unchanged.

    torchrun ... -m megatron_dip.launch [--cpu [--pin]] SCRIPT ARGUMENTS...

The script runs as if it had been started itself.  What is wrong with the user's input ends the
process with one line on standard error and exit status 2; any other exception keeps its traceback.
"""

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Never

from megatron_dip.errors import DipError, UnsupportedError

__all__ = ["main"]

_EXIT_USER_ERROR = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        _exit_with(f"{message} (usage: {self.format_usage().removeprefix('usage: ').strip()})")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script that the command line names; returns when the script does."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except DipError as error:
        # Those that are no ValueError are failures of a run, not of its input.
        if options.dip_debug or not isinstance(error, ValueError):
            raise
        _exit_with(" ".join(str(error).split()))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m megatron_dip.launch",
        description="Run a Megatron pretrain script with dynamic interleaved pipelines.",
        usage="%(prog)s [--cpu [--pin]] [--dip-debug] SCRIPT ARGUMENTS...",
        allow_abbrev=False,
    )
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, over gloo")
    parser.add_argument(
        "--pin", action="store_true", help="with --cpu: one core for every rank of this machine"
    )
    parser.add_argument(
        "--dip-debug", action="store_true", help="show the traceback of every error"
    )
    parser.add_argument("script", metavar="SCRIPT", help="the pretrain script")
    parser.add_argument(
        "arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER, help="the script's arguments"
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    script = Path(options.script)
    if not script.is_file():
        raise UnsupportedError(f"there is no script {options.script}: give the path of a file")

    from megatron_dip.integration import hooks, versions

    versions.check_megatron()
    if options.cpu:
        from megatron_dip.integration import cpu_mode

        cpu_mode.enable()
        if options.pin:
            _pin_to_core()
    hooks.enable()
    # As Python does for a script: its neighbours can be imported, its arguments follow its name.
    sys.path.insert(0, str(script.resolve().parent))
    sys.argv = [options.script, *options.arguments]
    runpy.run_path(options.script, run_name="__main__")


def _pin_to_core() -> None:
    """Keep ranks of one machine from moving between cores, which costs them their caches."""
    cores = sorted(os.sched_getaffinity(0))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    os.sched_setaffinity(0, {cores[local_rank % len(cores)]})


def _exit_with(message: str) -> Never:
    print(f"megatron-dip: error: {message}", file=sys.stderr, flush=True)
    sys.exit(_EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
