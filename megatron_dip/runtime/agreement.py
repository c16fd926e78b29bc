"""One plan on every rank that shares it: the owner's plan is broadcast, and all ranks compare.

The ranks are those of one pipeline, or of several replicas whose layers meet (experts divided among
them); each replica then runs the plan restricted to what its own batch has.

At the end of a step the owner offers the plan of the next one, if there is one: the broadcast runs
while gradients are reduced and the optimizer steps.  At the start of a step all ranks gather the
digests of what they have for their batch, and what follows depends on these alone, so that no rank
decides by itself what to run.  A rank whose data, configuration or plan differs makes all ranks
raise the same error before the first action of the step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_dip.errors import ChannelError, PlanDigestError, PlanningError
from megatron_dip.partition import Partition
from megatron_dip.plan import Plan, plan_digest, unpack_plan
from megatron_dip.planner import restrict_plan
from megatron_dip.runtime.channels import transfer_failure_reason
from megatron_dip.workload import Problem

__all__ = ["PlanAgreement", "connected_groups"]

_DIGEST_BYTES = 32
_LENGTH_BYTES = 8
_FIRST_CAPACITY_BYTES = 1 << 15
# One for the next training step and one for the next evaluation are in use at most.
_OFFERS_KEPT = 4


@dataclass(kw_only=True, eq=False)
class _Received:
    """A plan as it arrived, and what it is for this rank."""

    packed: bytes
    replica: int | None
    """The one that this rank belongs to where the plan is for several."""
    problem: Problem | None = None
    plan: Plan | None = None
    difference: str = ""
    """Why it is none for the batch of this rank."""

    def is_for(self, problem: Problem, partition: Partition) -> bool:
        """Whether it is a plan for this batch; unpacks it."""
        if self.plan is None or self.problem is not problem:
            self.plan, self.difference = _unpack(self.packed, problem, partition, self.replica)
            self.problem = problem
        return self.plan is not None

    def digest(self) -> bytes:
        return bytes.fromhex(plan_digest(self.packed))


class PlanAgreement:
    """How the ranks of one pipeline, or of several, come to one plan for every batch.

    All calls are collective: every rank makes them in the same order.

    Args:
        partition: The cut as this rank is configured.
        group: A CPU group of all ranks that run a plan together; the first one is the plan owner.
        leaders: Ranks in ``group`` that tell the batch of a replica, one for each.
        replica: The one that this rank belongs to.
    """

    def __init__(
        self,
        partition: Partition,
        group: dist.ProcessGroup,
        leaders: Sequence[int] = (0,),
        replica: int = 0,
    ) -> None:
        self._partition = partition
        self._group = group
        self._leaders = tuple(leaders)
        self._replica = replica if len(leaders) > 1 else None
        self._capacity_bytes = _FIRST_CAPACITY_BYTES
        self._offer: tuple[dist.Work, torch.Tensor] | None = None
        self._offered: list[_Received] = []
        self._last: _Received | None = None

    @property
    def is_owner(self) -> bool:
        return bool(dist.get_rank(self._group) == 0)

    @property
    def is_leader(self) -> bool:
        """Whether this rank tells the batches of its replica."""
        return dist.get_rank(self._group) in self._leaders

    def gather[T](self, batches: Sequence[T]) -> list[tuple[T, ...]]:
        """What all replicas say of their batches; only what leaders give is read.

        Returns:
            On the owner, for every batch that all replicas have, the share of each; else nothing.

        Raises:
            ChannelError: A rank has died, or does not answer within the group's time limit.
        """
        if len(self._leaders) == 1:
            return [(batch,) for batch in batches] if self.is_owner else []
        own = list(batches) if self.is_leader else None
        gathered: list[Any] | None = [None] * self._group.size() if self.is_owner else None
        with _Explained():
            dist.gather_object(own, gathered, dst=self._owner, group=self._group)
        if gathered is None:
            return []
        return list(zip(*(gathered[leader] for leader in self._leaders), strict=False))

    def offer(self, packed: bytes) -> None:
        """Start the broadcast of the owner's plan for a later batch; at the end of every step.

        Args:
            packed: On the owner the plan, empty if there is none yet; not read elsewhere.

        Raises:
            ChannelError: A rank has died, or does not answer within the group's time limit.
        """
        self._collect()
        message = torch.zeros(_LENGTH_BYTES + self._capacity_bytes, dtype=torch.uint8)
        if self.is_owner:
            message[:_LENGTH_BYTES].view(torch.int64)[0] = len(packed)
            # A plan that is too long arrives when it is needed, and makes room for its successors.
            if 0 < len(packed) <= self._capacity_bytes:
                message[_LENGTH_BYTES : _LENGTH_BYTES + len(packed)] = _bytes_tensor(packed)
        with _Explained():
            work = dist.broadcast(message, self._owner, group=self._group, async_op=True)
        assert work is not None
        self._offer = (work, message)

    def prepare(self, problem: Problem) -> Plan | None:
        """Unpack what was offered for ``problem``, if it has arrived; sends nothing.

        Returns:
            The plan that :meth:`agree` will find, unless another rank has none.
        """
        if self._offer is not None and self._offer[0].is_completed():
            self._collect()
        return next(
            (one.plan for one in self._offered if one.is_for(problem, self._partition)), None
        )

    def agree(self, problem: Problem, make: Callable[[], bytes]) -> Plan:
        """The owner's plan for ``problem``, the same on all ranks.

        The very same problem again, as when a step is run a second time, has the very same plan.

        Args:
            problem: The batch as this rank sees it.
            make: Called by the owner alone, where no plan was offered: a packed plan.

        Raises:
            PlanDigestError: Some rank has another batch, partition or plan; all ranks raise.
            PlanningError: The owner has no plan for this batch; all ranks raise.
            ChannelError: A rank has died, or does not answer within the group's time limit.
        """
        self._collect()
        received = self._find(problem)
        digests = self._gather(received)
        if not any(digests[0]):
            received = self._broadcast(make)
            received.is_for(problem, self._partition)
            digests = self._gather(received)
        self._compare(digests, received)
        assert received is not None and received.plan is not None
        self._last = received
        self._offered = [other for other in self._offered if other is not received]
        return received.plan

    @property
    def _owner(self) -> int:
        return int(dist.get_global_rank(self._group, 0))

    def _find(self, problem: Problem) -> _Received | None:
        """The plan for ``problem`` among those that are known here."""
        if self._last is not None and self._last.problem is problem:
            return self._last
        known = [*self._offered, *([self._last] if self._last else [])]
        return next((one for one in known if one.is_for(problem, self._partition)), None)

    def _collect(self) -> None:
        """Take in what was offered."""
        if self._offer is None:
            return
        work, message = self._offer
        self._offer = None
        with _Explained():
            work.wait()
        length = int(message[:_LENGTH_BYTES].view(torch.int64)[0])
        if length > self._capacity_bytes:
            self._capacity_bytes = 2 * length
        elif length:
            packed = message[_LENGTH_BYTES : _LENGTH_BYTES + length].numpy().tobytes()
            self._offered = [*self._offered, _Received(packed=packed, replica=self._replica)][
                -_OFFERS_KEPT:
            ]

    def _broadcast(self, make: Callable[[], bytes]) -> _Received:
        """The owner's plan, which nobody has yet."""
        message, failure = b"", ""
        mistake: Exception | None = None
        if self.is_owner:
            try:
                message = make()
            # Whatever it is, the other ranks are waiting and must hear of it.
            except Exception as error:
                mistake = error
                failure = f"{type(error).__name__}: {error}"
                message = failure.encode()
        header = torch.tensor([len(message), int(bool(failure))], dtype=torch.int64)
        with _Explained():
            dist.broadcast(header, self._owner, group=self._group)
            payload = torch.empty(int(header[0]), dtype=torch.uint8)
            if self.is_owner:
                payload.copy_(_bytes_tensor(message))
            dist.broadcast(payload, self._owner, group=self._group)
        packed = payload.numpy().tobytes()
        if int(header[1]):
            reason = packed.decode()
            raise PlanningError(f"the plan owner could not plan this batch: {reason}") from mistake
        return _Received(packed=packed, replica=self._replica)

    def _gather(self, received: _Received | None) -> list[bytes]:
        """Per rank the digest of its plan; zeros where it has none for its batch."""
        is_usable = received is not None and received.plan is not None
        own = received.digest() if is_usable and received else bytes(_DIGEST_BYTES)
        gathered = torch.empty(self._group.size() * _DIGEST_BYTES, dtype=torch.uint8)
        with _Explained():
            dist.all_gather_into_tensor(gathered, _bytes_tensor(own), group=self._group)
        return [row.numpy().tobytes() for row in gathered.split(_DIGEST_BYTES)]

    def _compare(self, digests: list[bytes], received: _Received | None) -> None:
        """Raise the same error on every rank unless all have the owner's plan."""
        differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if not differing:
            return
        # All ranks know of it now, so that all take part in this second, slow exchange.
        if received is None:
            known = [one.difference for one in self._offered if one.difference]
            own = known[-1] if known else "it was offered none for its batch"
        else:
            own = received.difference
        differences: list[str] = [""] * self._group.size()
        with _Explained():
            dist.all_gather_object(differences, own, group=self._group)
        reason = differences[differing[0]] or "its bytes differ from the owner's"
        ranks = [dist.get_global_rank(self._group, rank) for rank in differing]
        raise PlanDigestError(
            f"global ranks {ranks} do not have the owner's plan for this batch; nothing was run "
            f"(rank {ranks[0]}: {reason})"
        )


def connected_groups(parts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The ranks that belong together because some of ``parts`` hold them in common, each once."""
    groups: list[set[int]] = []
    for part in parts:
        joined = set(part)
        apart = []
        for group in groups:
            if joined.isdisjoint(group):
                apart.append(group)
            else:
                joined |= group
        groups = [*apart, joined]
    return sorted(sorted(group) for group in groups)


class _Explained:
    """Turns what torch raises in a collective into an error that says what it means."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise ChannelError(
                f"agreeing on a plan failed on global rank {dist.get_rank()}: "
                f"{transfer_failure_reason(error)}"
            ) from error


def _unpack(
    packed: bytes, problem: Problem, partition: Partition, replica: int | None
) -> tuple[Plan | None, str]:
    """The plan for this rank's batch, or why it cannot be had."""
    try:
        if replica is None:
            return unpack_plan(packed, problem, partition), ""
        return restrict_plan(unpack_plan(packed, problem, partition, replica), problem), ""
    except PlanDigestError as error:
        return None, str(error)
    # Damaged bytes fail in any of the steps from bytes to actions.
    except Exception as error:
        return None, f"the plan arrived damaged ({type(error).__name__}: {error})"


def _bytes_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
