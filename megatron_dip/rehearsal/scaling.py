"""The plan that is rehearsed: computing times and transfer sizes of a plan, scaled."""

from dataclasses import replace

from megatron_dip.errors import ConfigError
from megatron_dip.plan import Plan
from megatron_dip.workload import Item, Problem

__all__ = ["VALUE_BYTES", "scale_plan"]

VALUE_BYTES = 4
"""Bytes of one value of a rehearsed transfer."""

_LARGEST_SCALE = 1e9
_TIMES = tuple(name for name in Item.model_fields if name.endswith("_us"))


def scale_plan(plan: Plan, time_scale: float, transfer_scale: float) -> Plan:
    """``plan`` with computing ``time_scale`` times as long and ``transfer_scale`` times the bytes.

    Latency and bandwidth of transfers stay: the links are what they are.  An item's ``tokens``
    become the values that a transfer of it moves, of ``VALUE_BYTES`` each and at least one, so that
    ``boundary_bytes`` says exactly what is sent.

    Raises:
        ConfigError: A scale is not above zero.
    """
    for option, scale in (("--time-scale", time_scale), ("--transfer-scale", transfer_scale)):
        if not 0 < scale <= _LARGEST_SCALE:
            raise ConfigError(
                f"{option} {scale:g}: expected a number above 0, up to {_LARGEST_SCALE:g}"
            )
    problem = plan.problem
    scaled = problem.model_copy(
        update={
            "modules": tuple(
                module.model_copy(
                    update={"layer_overhead_us": module.layer_overhead_us * time_scale}
                    | {
                        name: extra.model_copy(update={"forward_us": extra.forward_us * time_scale})
                        for name in ("first_layer_extra", "last_layer_extra")
                        for extra in [getattr(module, name)]
                    }
                )
                for module in problem.modules
            ),
            "microbatches": tuple(
                {
                    name: tuple(_scale_item(item, time_scale, transfer_scale) for item in items)
                    for name, items in microbatch.items()
                }
                for microbatch in problem.microbatches
            ),
        }
    )
    # Checked anew, which also forgets what the copy has cached of its original.
    checked = Problem.parse(scaled.model_dump(), ConfigError, "the scaled plan")
    return replace(plan, problem=checked, estimate=None)


def _scale_item(item: Item, time_scale: float, transfer_scale: float) -> Item:
    values = max(1, round(item.boundary_bytes * transfer_scale / VALUE_BYTES))
    times = {name: getattr(item, name) for name in _TIMES}
    return item.model_copy(
        update={name: time * time_scale for name, time in times.items() if time is not None}
        | {"tokens": values, "boundary_bytes": values * VALUE_BYTES}
    )
