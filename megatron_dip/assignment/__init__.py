"""Which sample goes to which replica and microbatch: replicas and microbatches evened out.

Plain numbers in, plain numbers out: neither torch nor Megatron.  ``docs/assignment.md``.
"""

from megatron_dip.assignment.assign import (
    Assignment,
    Limits,
    Moved,
    Spread,
    assign,
    measure_spread,
)
from megatron_dip.assignment.groups import (
    Groups,
    Member,
    batch_groups,
    item_kept_bytes,
    problem_groups,
)
from megatron_dip.assignment.rewrite import assigned_problems

__all__ = [
    "Assignment",
    "Groups",
    "Limits",
    "Member",
    "Moved",
    "Spread",
    "assign",
    "assigned_problems",
    "batch_groups",
    "item_kept_bytes",
    "measure_spread",
    "problem_groups",
]
