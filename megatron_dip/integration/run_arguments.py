"""What a run says of itself: Megatron-LM's arguments, or what a script has asked for by a call.

A loop without a command line of Megatron-LM (megatron-bridge's) has no arguments.  What this
package reads of them, where to write records and which iteration is under way, is then stated by
``hooks.enable`` and counted here.
"""

from argparse import Namespace
from typing import Any

from megatron_dip.integration.options import DipOptions

__all__ = ["ask_for", "asked_options", "note_iteration", "run_arguments"]

# What ``enable`` was given, and the arguments that stand for a command line's; one, or none.
_asked: list[tuple[DipOptions, Namespace]] = []


def ask_for(options: DipOptions) -> None:
    """Let this process run plans as ``options`` say, whatever arguments there are."""
    stated = Namespace(
        dip_trace_dir=None if options.trace_dir is None else str(options.trace_dir),
        dip_trace_interval=options.trace_interval,
        dip_trace_keep=None,
        log_interval=options.log_interval,
        tensorboard_log_interval=options.log_interval,
        num_steps=0,
        curr_iteration=0,
        train_iters=0,
    )
    _asked[:] = [(options, stated)]


def asked_options() -> DipOptions | None:
    """What :func:`ask_for` was given."""
    return _asked[0][0] if _asked else None


def run_arguments() -> Any:
    """Megatron's arguments; without them those of :func:`ask_for`, or None."""
    from megatron.training import global_vars

    # Read directly: Megatron's get_args() fails where there are none.
    if global_vars._GLOBAL_ARGS is not None:
        return global_vars._GLOBAL_ARGS
    return _asked[0][1] if _asked else None


def note_iteration() -> None:
    """Say which training step begins, in runs whose arguments do not."""
    from megatron.core import rerun_state_machine

    for _, stated in _asked:
        # Counts from 1, also after a resumption, where the loop lets it check results.
        machine = rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE
        counted = -1 if machine is None else machine.current_iteration
        stated.num_steps += 1
        stated.curr_iteration = (counted if counted > 0 else stated.num_steps) - 1
