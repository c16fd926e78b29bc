"""One plan on every rank that shares it: the owner's plan is broadcast, and all ranks compare.

The ranks are those of one pipeline, or of several replicas whose layers meet (experts divided among
them); each replica then runs the plan restricted to what its own batch has.

At the end of a step the owner offers the plan of the next one, if there is one: the broadcast runs
while gradients are reduced and the optimizer steps.  At the start of a step all ranks gather the
digests of the plans that they could run: with data, those for their own batch; without, all that
they were offered.  What follows depends on these alone, so that no rank decides by itself what to
run: the owner's first one if all could run it; else the owner sends one, and they gather once more.
A rank whose data, configuration or plan differs makes all ranks raise the same error before the
first action of the step.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import Any

import torch
import torch.distributed as dist

from megatron_dip.costs import BatchSizes
from megatron_dip.errors import ChannelError, PlanDigestError, PlanningError
from megatron_dip.partition import Partition
from megatron_dip.planner import Build, PlannedBatch, plan_digest, unpack_plan
from megatron_dip.runtime.channels import transfer_failure_reason

__all__ = ["PlanAgreement", "connected_groups"]

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 32
_LENGTH_BYTES = 8
_FIRST_CAPACITY_BYTES = 1 << 15
# One for the next training step and one for the next evaluation are in use at most.
_OFFERS_KEPT = 4
_MOST_RUNNABLE = _OFFERS_KEPT + 1
"""The offers, and the plan that was run last."""


@dataclass(kw_only=True, eq=False)
class _Received:
    """A plan as it arrived, and what it is for this rank."""

    packed: bytes
    own: BatchSizes | None = None
    """The batch of this rank that it was last compared with; None where that has no data."""
    planned: PlannedBatch | None = None
    difference: str = ""
    """Why it cannot be run for that batch."""

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(plan_digest(self.packed))

    def is_for(
        self, own: BatchSizes | None, build: Build, partition: Partition, replica: int
    ) -> bool:
        """Whether it can be run for this batch; unpacks it."""
        if self.own is not own or (self.planned is None and not self.difference):
            self.own = own
            self.planned, self.difference = _unpack(
                self.packed, build, partition, replica=replica, own=own
            )
        return self.planned is not None


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
        self._replica = replica
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
        """What all replicas say of their batches; a call of leaders, which others may leave out.

        Returns:
            On the owner, for every batch that all replicas have, the share of each; else nothing.

        Raises:
            ChannelError: A rank has died, or does not answer within the group's time limit.
        """
        if not self.is_leader:
            return []
        if not self.is_owner:
            with _Explained():
                dist.send_object_list([list(batches)], group=self._group, group_dst=0)
            return []
        told = [list(batches)]
        for leader in self._leaders[1:]:
            received: list[Any] = [None]
            with _Explained():
                dist.recv_object_list(received, group=self._group, group_src=leader)
            told.append(received[0])
        return list(zip(*told, strict=False))

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

    def prepare(self, own: BatchSizes | None, build: Build) -> PlannedBatch | None:
        """Unpack what was offered for a batch, if it has arrived; sends nothing.

        Args:
            own: As for :meth:`agree`; without data the plan that was offered last is unpacked.
            build: As for :meth:`agree`.

        Returns:
            The plan that :meth:`agree` will find, unless another rank has none.
        """
        if self._offer is not None and self._offer[0].is_completed():
            self._collect()
        newest_first = self._offered if own is not None else reversed(self._offered)
        usable = (one for one in newest_first if self._is_for(one, own, build))
        found = next(usable, None)
        return None if found is None else found.planned

    def agree(
        self, own: BatchSizes | None, build: Build, make: Callable[[], bytes]
    ) -> PlannedBatch:
        """The owner's plan for its next batch, the same on all ranks.

        The very same batch again, as when a step is run a second time, has the very same plan.

        Args:
            own: The batch as this rank sees it; None where it has no data, and takes the owner's.
            build: Makes the problem of a batch.
            make: Called by the owner alone, where no plan was offered: a packed plan.

        Raises:
            PlanDigestError: Some rank has another batch, partition or plan; all ranks raise.
            PlanningError: The owner has no plan for this batch; all ranks raise.
            ChannelError: A rank has died, or does not answer within the group's time limit.
        """
        self._collect()
        runnable = self._runnable(own, build)
        rows = self._gather(runnable)
        if rows[0] and all(rows[0][0] in row for row in rows):
            received = next(one for one in runnable if one.digest == rows[0][0])
        else:
            if self.is_owner and runnable:
                logger.warning("a plan that was offered does not suit all ranks: it is sent again")
            received = self._broadcast((lambda: runnable[0].packed) if runnable else make)
            self._is_for(received, own, build)
            self._compare(self._gather([received] if received.planned else []), received)
        assert received.planned is not None
        self._last = received
        self._offered = [one for one in self._offered if one.digest != received.digest]
        return received.planned

    @property
    def _owner(self) -> int:
        return int(dist.get_global_rank(self._group, 0))

    def _is_for(self, received: _Received, own: BatchSizes | None, build: Build) -> bool:
        return received.is_for(own, build, self._partition, self._replica)

    def _runnable(self, own: BatchSizes | None, build: Build) -> list[_Received]:
        """The plans that are known here and could be run, the one to be preferred first."""
        last = [self._last] if self._last is not None else []
        if own is not None and last and last[0].own is own:
            return last
        return [one for one in (*self._offered, *last) if self._is_for(one, own, build)]

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
            self._offered = [*self._offered, _Received(packed=packed)][-_OFFERS_KEPT:]

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
        return _Received(packed=packed)

    def _gather(self, runnable: Sequence[_Received]) -> list[list[bytes]]:
        """Per rank the digests of the plans that it could run."""
        own = b"".join(one.digest for one in runnable)
        row = own.ljust(_MOST_RUNNABLE * _DIGEST_BYTES, b"\0")
        gathered = torch.empty(self._group.size() * len(row), dtype=torch.uint8)
        with _Explained():
            dist.all_gather_into_tensor(gathered, _bytes_tensor(row), group=self._group)
        return [_digests(part.numpy().tobytes()) for part in gathered.split(len(row))]

    def _compare(self, rows: Sequence[Sequence[bytes]], received: _Received) -> None:
        """Raise the same error on every rank unless all could run the owner's plan."""
        expected = next(iter(rows[0]), None)
        differing = [rank for rank, row in enumerate(rows) if expected not in row]
        if not differing:
            return
        # All ranks know of it now, so that all take part in this second, slow exchange.
        differences: list[str] = [""] * self._group.size()
        with _Explained():
            dist.all_gather_object(differences, received.difference, group=self._group)
        reason = differences[differing[0]] or "its bytes differ from the owner's"
        ranks = [dist.get_global_rank(self._group, rank) for rank in differing]
        raise PlanDigestError(
            f"global ranks {ranks} do not have the owner's plan for this batch; nothing was run "
            f"(rank {ranks[0]}: {reason})"
        )


def connected_groups(parts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The ranks that belong together because some of ``parts`` hold them in common, each once."""
    # Every rank points to another one of its group, and the last of a chain to itself: the groups
    # of a large world are found in one pass.
    towards: dict[int, int] = {}

    def last_of(rank: int) -> int:
        while towards.setdefault(rank, rank) != rank:
            towards[rank] = rank = towards[towards[rank]]
        return rank

    for part in parts:
        for rank in part:
            towards[last_of(rank)] = last_of(part[0])
    groups: dict[int, list[int]] = {}
    for rank in sorted(towards):
        groups.setdefault(last_of(rank), []).append(rank)
    return sorted(groups.values())


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
    packed: bytes, build: Build, partition: Partition, **options: Any
) -> tuple[PlannedBatch | None, str]:
    """The plan for this rank's batch, or why it cannot be had."""
    try:
        return unpack_plan(packed, build, partition, **options), ""
    except PlanDigestError as error:
        return None, str(error)
    # Damaged bytes fail in any of the steps from bytes to actions.
    except Exception as error:
        return None, f"the plan arrived damaged ({type(error).__name__}: {error})"


def _digests(row: bytes) -> list[bytes]:
    """Those in a row, which is filled up with zeros."""
    return [bytes(part) for part in batched(row, _DIGEST_BYTES) if any(part)]


def _bytes_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
