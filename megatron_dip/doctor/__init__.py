"""What a machine brings for training under plans: facts, and what they mean for a run.

Facts are gathered first (``machine`` reads the system, ``probes`` imports packages in processes of
their own, so that one that hangs or crashes ends only its probe).  The rules in ``*_rows`` then
judge facts and nothing else: one row each, with what was found and what to do.  A row is a problem
only where a run would stop or hang; what makes it slow is a warning.
"""

from megatron_dip.doctor.examine import examine, gather
from megatron_dip.doctor.rows import Row, State, worst_state

__all__ = ["Row", "State", "examine", "gather", "worst_state"]
