"""All groups of flags, and the one that a destination is in."""

from collections.abc import Mapping
from types import MappingProxyType

from megatron_dip.families.flags.groups import FlagGroup
from megatron_dip.families.flags.honoured import HONOURED
from megatron_dip.families.flags.refused_models import REFUSED_MODELS
from megatron_dip.families.flags.refused_runs import REFUSED_RUNS

__all__ = ["GROUPS", "group_of"]

GROUPS: tuple[FlagGroup, ...] = (*HONOURED, *REFUSED_MODELS, *REFUSED_RUNS)

_BY_DESTINATION: Mapping[str, FlagGroup] = MappingProxyType(
    {destination: group for group in GROUPS for destination in group.destinations}
)


def group_of(destination: str) -> FlagGroup | None:
    """The group of a destination of Megatron's parser; None where no verdict was made."""
    return _BY_DESTINATION.get(destination)
