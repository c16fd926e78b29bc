"""What becomes of every flag of Megatron's parser that a run with ``--dip-config`` states."""

from megatron_dip.families.flags.check import check_flags
from megatron_dip.families.flags.groups import FlagGroup, Verdict
from megatron_dip.families.flags.table import GROUPS, group_of

__all__ = [
    "GROUPS",
    "FlagGroup",
    "Verdict",
    "check_flags",
    "group_of",
]
