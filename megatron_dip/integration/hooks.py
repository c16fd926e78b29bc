"""Where this package hooks into Megatron: the parser and the choice of the schedule.

A run without our flags is as it would be without the hooks, but that a released wheel starts where
it could not run ``make``.  ``patches/`` holds the same two hooks as a diff.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from megatron_dip.integration.versions import check_megatron

__all__ = ["enable", "select_schedule"]

Schedule = Callable[..., Any]


def enable() -> None:
    """Install the hooks in this process; does nothing when they are installed already.

    To be called before ``megatron.training`` is imported where possible; modules that are loaded
    already are rebound.

    Raises:
        UnsupportedError: There is no Megatron, or none that this package works with.
    """
    check_megatron()
    _hook_schedule()
    _hook_parser()
    _hook_groups()


def select_schedule(schedule: Schedule) -> Schedule:
    """Ours when this run has ``--dip-schedule``, else ``schedule``, Megatron's own choice.

    Megatron's own is measured where ``--dip-trace-dir`` asks for it.
    """
    from megatron.training import global_vars

    # Read directly: get_args() fails where megatron.core is used without the training loop.
    args = global_vars._GLOBAL_ARGS
    if getattr(args, "dip_schedule", False):
        from megatron_dip.integration.forward_backward import forward_backward_dip

        return forward_backward_dip
    if getattr(args, "dip_trace_dir", None):
        from megatron_dip.integration.trace import measure_schedule

        return measure_schedule(schedule)
    return schedule


class _ScheduleGetter:
    """Stands for Megatron's ``get_forward_backward_func``, whose parameters differ by version."""

    def __init__(self, getter: Callable[..., Schedule]) -> None:
        functools.update_wrapper(self, getter)
        self._getter = getter

    def __call__(self, *args: Any, **kwargs: Any) -> Schedule:
        return select_schedule(self._getter(*args, **kwargs))


def _hook_schedule() -> None:
    from megatron.core.pipeline_parallel import schedules

    name = "get_forward_backward_func"
    original = getattr(schedules, name)
    if isinstance(original, _ScheduleGetter):
        return
    hooked = _ScheduleGetter(original)
    # Importers hold the function by value: the package's __init__, the training loop, others.
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is original:
            setattr(module, name, hooked)


def _hook_parser() -> None:
    from megatron.training import arguments

    from megatron_dip.integration.arguments import add_arguments

    add_megatron_arguments = arguments.add_megatron_arguments
    if getattr(add_megatron_arguments, "adds_dip_arguments", False):
        return

    @functools.wraps(add_megatron_arguments)
    def add_both(parser: Any) -> Any:
        return add_arguments(add_megatron_arguments(parser))

    add_both.adds_dip_arguments = True  # type: ignore[attr-defined]
    arguments.add_megatron_arguments = add_both


def _hook_groups() -> None:
    """Compare the inputs of all ranks before groups are made of them, which might wait forever."""
    from megatron.core import parallel_state

    initialize = parallel_state.initialize_model_parallel
    if getattr(initialize, "compares_inputs", False):
        return

    @functools.wraps(initialize)
    def compare_and_initialize(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import global_vars

        from megatron_dip.integration.arguments import validation_of

        run_args = global_vars._GLOBAL_ARGS
        validation = validation_of(run_args) if run_args is not None else None
        if validation is not None:
            validation.compare_ranks()
        return initialize(*args, **kwargs)

    compare_and_initialize.compares_inputs = True  # type: ignore[attr-defined]
    parallel_state.initialize_model_parallel = compare_and_initialize
