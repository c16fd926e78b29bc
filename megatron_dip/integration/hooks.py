"""Where this package hooks into Megatron: the parser, the schedule, and where models are built.

A run without our flags is as it would be without the hooks, but that a released wheel starts where
it could not run ``make``.  ``patches/`` holds the first two as a diff; the third follows from them.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_dip.integration.options import DipOptions
from megatron_dip.integration.run_arguments import ask_for, asked_options, run_arguments
from megatron_dip.integration.versions import (
    build_helpers_where_they_can_be_built,
    check_megatron,
    has_model_builders,
    needed,
    rebind,
)

__all__ = ["enable", "hook_models", "select_schedule"]

Schedule = Callable[..., Any]


def enable(options: DipOptions | None = None) -> None:
    """Install the hooks in this process; does nothing when they are installed already.

    To be called before ``megatron.training`` is imported where possible; modules that are loaded
    already are rebound.

    Args:
        options: What is asked for where no command line of Megatron-LM says it: by a training loop
            of one's own, or megatron-bridge's, whose modules must be imported before.

    Raises:
        UnsupportedError: There is no Megatron, or none that this package works with.
    """
    check_megatron()
    if options is not None:
        ask_for(options)
        build_helpers_where_they_can_be_built()
    _hook_schedule()
    _hook_parser()
    _hook_groups()
    hook_models()


def select_schedule(schedule: Schedule) -> Schedule:
    """Ours when this run has ``--dip-schedule``, else ``schedule``, Megatron's own choice.

    Megatron's own is measured where ``--dip-trace-dir`` asks for it.
    """
    args = run_arguments()
    if asked_options() is not None or getattr(args, "dip_schedule", False):
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
    original = needed(schedules, name)
    if isinstance(original, _ScheduleGetter):
        return
    rebind(name, original, _ScheduleGetter(original))


def _hook_parser() -> None:
    from megatron.training import arguments

    from megatron_dip.integration.arguments import add_arguments

    add_megatron_arguments = needed(arguments, "add_megatron_arguments")
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

    initialize = needed(parallel_state, "initialize_model_parallel")
    if getattr(initialize, "compares_inputs", False):
        return

    @functools.wraps(initialize)
    def compare_and_initialize(*args: Any, **kwargs: Any) -> Any:
        from megatron_dip.integration.arguments import validation_of

        run_args = run_arguments()
        validation = validation_of(run_args) if run_args is not None else None
        if validation is not None:
            validation.compare_ranks()
        return initialize(*args, **kwargs)

    compare_and_initialize.compares_inputs = True  # type: ignore[attr-defined]
    parallel_state.initialize_model_parallel = compare_and_initialize


def _hook_skipping() -> None:
    """Megatron's step over a batch reads dictionaries of tokens, and broadcasts them."""
    from megatron.training import training

    skip = needed(training, "dummy_train_step")
    if getattr(skip, "skips_any_batch", False):
        return

    @functools.wraps(skip)
    def skip_any(data_iterator: Any) -> None:
        if not getattr(run_arguments(), "dip_schedule", False):
            skip(data_iterator)
            return
        from megatron_dip.integration.ahead import skip_batch

        skip_batch(data_iterator)

    skip_any.skips_any_batch = True  # type: ignore[attr-defined]
    training.dummy_train_step = skip_any


def hook_models() -> None:
    """The doors by which a script's builder of models is called: see ``stages``; and what a loop of
    Megatron's does with the data of such models beside its schedule."""
    from megatron.training import training

    from megatron_dip.integration.weight_gradients import hook_data_parallel

    hook_data_parallel()
    _hook_skipping()
    _hook_door(training, "get_model", _build_by_provider)
    if has_model_builders():
        from megatron.training.models import dist_utils

        _hook_door(dist_utils, "build_virtual_pipeline_stages", _build_by_model_config)
    bridge = sys.modules.get("megatron.bridge.models.model_provider")
    if bridge is not None:
        _hook_door(bridge, "_create_model", _build_by_bridge)


def _hook_door(module: Any, name: str, build: Callable[..., Any]) -> None:
    original = needed(module, name)
    if getattr(original, "builds_stages", False):
        return

    @functools.wraps(original)
    def door(builder: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron_dip.integration.arguments import options_of

        asked_for = asked_options() or options_of(run_arguments())
        if asked_for is None:
            return original(builder, *args, **kwargs)
        return build(original, asked_for, builder, *args, **kwargs)

    door.builds_stages = True  # type: ignore[attr-defined]
    rebind(name, original, door)


def _build_by_provider(
    get_model: Callable[..., Any],
    options: DipOptions,
    provider: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    from megatron_dip.integration.stages import build_stages

    def provide(*, pre_process: bool, post_process: bool, **more: Any) -> Any:
        def call(first: bool, last: bool) -> Any:
            with _any_checkpoint_format():
                return provider(pre_process=first, post_process=last, **more)

        return build_stages(call, options)

    return get_model(provide, *args, **kwargs)


@contextmanager
def _any_checkpoint_format() -> Iterator[None]:
    """While in it, arguments say ``--ckpt-format torch``.

    Megatron's ``pretrain_vlm.py`` asserts it while it builds, because stages of its own cannot be
    told apart in other formats; those of plans can, and need ``torch_dist``.
    """
    args = run_arguments()
    checkpoint_format = getattr(args, "ckpt_format", None)
    if checkpoint_format is None:
        yield
        return
    args.ckpt_format = "torch"
    try:
        yield
    finally:
        args.ckpt_format = checkpoint_format


def _build_by_model_config(
    _: Callable[..., Any],
    options: DipOptions,
    build_model: Callable[..., Any],
    pg_collection: Any,
    vp_size: int | None = None,
    model_type: Any = None,
) -> Any:
    from megatron.core.enums import ModelType

    from megatron_dip.integration.stages import build_stages

    def call(first: bool, last: bool) -> Any:
        model = build_model(pg_collection, pre_process=first, post_process=last)
        model.model_type = model_type or ModelType.encoder_or_decoder
        return model

    chunks = build_stages(call, options)
    if asked_options() is not None:
        # As of megatron-bridge's providers below.
        for chunk in chunks:
            chunk.config = build_model.__self__._model_config.transformer  # type: ignore[attr-defined]
    return chunks


def _build_by_bridge(
    _: Callable[..., Any], options: DipOptions, provider: Any, model_type: Any, pg_collection: Any
) -> Any:
    """megatron-bridge's loop over the chunks of a rank, before it wraps them."""
    from megatron.core.tensor_parallel import (
        set_defaults_if_not_set_tensor_model_parallel_attributes,
    )

    from megatron_dip.integration.stages import build_stages

    def call(first: bool, last: bool) -> Any:
        model = provider.provide(pre_process=first, post_process=last)
        model.model_type = model_type
        return model

    chunks = build_stages(call, options)
    for chunk in chunks:
        # There the loop puts its functions (scaling and finishing gradients), not into the chunk's.
        chunk.config = provider
        for parameter in chunk.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    return chunks
