"""Ranges of the numbers that forms hold: far beyond what exists, and small enough to reckon with.

Every sum over a batch stays below 2^63 for whole numbers (``workload`` checks the bytes of a whole
batch) and far below 1e308 for times, and no field makes a program take memory without end.  What
lies outside is refused by the name of the field.  ``docs/plan_format.md`` states them.
"""

from typing import Annotated

from pydantic import Field

from megatron_dip.errors import ConfigError, shown

__all__ = [
    "MOST_BUDGET_MS",
    "MOST_BYTES_IN_ALL",
    "MOST_EVALUATIONS",
    "MOST_FACTOR",
    "MOST_ITEMS",
    "MOST_MICROBATCHES",
    "MOST_PLANNERS",
    "MOST_TOKENS",
    "MOST_WORKERS",
    "MOST_WORKS",
    "Bytes",
    "Count",
    "Factor",
    "InnerWidth",
    "Layer",
    "Layers",
    "MemoryLimit",
    "Pairs",
    "Patch",
    "Positive",
    "PositiveNumber",
    "Rank",
    "Ranks",
    "Rate",
    "Size",
    "Time",
    "Tokens",
    "Vocabulary",
    "Weights",
    "Width",
    "check_range",
]

MOST_BYTES_IN_ALL = 2**62
"""Of a batch on all ranks together: weights, activations and boundaries of all layers."""
MOST_MICROBATCHES = 2**16
MOST_ITEMS = 10**7
"""Of a batch drawn from statistics: items and the spans in them."""
MOST_EVALUATIONS = 10**7
MOST_BUDGET_MS = 1e9
MOST_FACTOR = 1e12
"""Of measured over stated time, and of the inverse: by the rates of a large machine a tiny model's
work takes next to nothing."""
MOST_PLANNERS = 64
"""Processes of a pipeline."""
MOST_WORKERS = 1024
"""Threads of a search."""
MOST_TOKENS = 2**27
MOST_WORKS = 10**7
"""Sub-microbatches times stages that they pass, of a plan."""

_INT32 = 2**31 - 1
_MOST_LAYERS = 10_000
_MOST_RANKS = 4096

Time = Annotated[float, Field(ge=0, le=1e18)]
"""Microseconds of one item or layer."""
Rate = Annotated[float, Field(ge=1e-3, le=1e30)]
"""Bytes or operations per microsecond."""
Factor = Annotated[float, Field(ge=1 / MOST_FACTOR, le=MOST_FACTOR)]
PositiveNumber = Annotated[float, Field(gt=0, le=1e15)]
Bytes = Annotated[int, Field(ge=0, le=2**50)]
"""Of one item or layer; the most are a pebibyte."""
Weights = Annotated[int, Field(ge=0, le=2**45)]
"""Parameters of a layer, or of what sits at the ends of a module."""
MemoryLimit = Annotated[int, Field(ge=0, le=2**60)]
Count = Annotated[int, Field(ge=0, le=_INT32)]
Positive = Annotated[int, Field(gt=0, le=_INT32)]
Size = Annotated[int, Field(gt=0, le=2**16)]
"""Of what there are few of: heads, patches along a side, experts, ranks that share a layer."""
Width = Annotated[int, Field(gt=0, le=2**20)]
"""Of what passes from layer to layer."""
InnerWidth = Annotated[int, Field(gt=0, le=2**24)]
"""Of what stays inside a layer."""
Patch = Annotated[int, Field(gt=0, le=4096)]
"""Along a side: pixels of a patch, patches of a table."""
Vocabulary = Annotated[int, Field(gt=0, le=2**27)]
Pairs = Annotated[int, Field(ge=0, le=2**56)]
"""Of tokens of one item that attend to each other."""
Tokens = Annotated[int, Field(gt=0, le=MOST_TOKENS)]
"""Of one sequence, image or clip."""
Layers = Annotated[int, Field(gt=0, le=_MOST_LAYERS)]
Layer = Annotated[int, Field(ge=0, le=_MOST_LAYERS)]
"""A layer's number, or how many there are where there may be none."""
Ranks = Annotated[int, Field(ge=1, le=_MOST_RANKS)]
Rank = Annotated[int, Field(ge=0, lt=_MOST_RANKS)]


def check_range(name: str, value: float, least: float, most: float) -> None:
    """
    Raises:
        ConfigError: ``value``, which ``name`` names, lies outside of ``least`` to ``most``.
    """
    if not least <= value <= most:
        raise ConfigError(f"{name} {shown(value)}: expected {least:,} to {most:,}")
