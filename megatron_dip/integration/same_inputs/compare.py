"""Named inputs of all ranks compared over a store of torch, and the difference named.

Nothing here is a collective call: ranks whose inputs differ might not take part in the same ones.
Every rank puts a digest of its inputs into the store, the first rank compares them and puts its
verdict there.  Only where digests differ are the inputs themselves sent.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from torch.distributed import DistNetworkError

from megatron_dip.errors import ChannelError, ConfigError, one_line

__all__ = ["Input", "compare_inputs"]

_SAME = b"same"
_NUM_SHOWN = 6
_SHOWN_CHARACTERS = 120


class Input(NamedTuple):
    """What is compared, and how a message shows it."""

    value: str
    shown: str


def compare_inputs(
    store: Any,
    inputs: Mapping[str, Input],
    *,
    rank: int,
    num_ranks: int,
    timeout_seconds: float,
) -> None:
    """Return if ``inputs`` are equal on all ranks; every rank must call it with the same ``store``.

    Args:
        store: A ``torch.distributed.Store``, with keys for this comparison alone.
        inputs: By name.
        rank: This rank's number.
        num_ranks: How many call it.
        timeout_seconds: Limit of every wait for another rank.

    Raises:
        ConfigError: Names what differs, with the ranks and their values; the same on all ranks.
        ChannelError: Another rank did not report in time.
    """
    exchange = _Exchange(store, timeout_seconds)
    digest = _digest(inputs)
    exchange.put(f"digest/{rank}", digest.encode())
    if rank == 0:
        digests = [exchange.take(f"digest/{other}", other).decode() for other in range(num_ranks)]
        is_same = len(set(digests)) == 1
        exchange.put("verdict", _SAME if is_same else b"differ")
    else:
        is_same = exchange.take("verdict", 0) == _SAME
    message = ""
    if not is_same:
        exchange.put(f"inputs/{digest}", json.dumps(inputs).encode())
        if rank == 0:
            exchange.put("message", _difference(exchange, digests).encode())
        message = exchange.take("message", 0).decode()
    exchange.put(f"read/{rank}", b"")
    if rank == 0:
        # The store may live in this process, which may end soon: the others read before.
        for other in range(num_ranks):
            exchange.take(f"read/{other}", other)
    if not is_same:
        raise ConfigError(message)


class _Exchange:
    """Values of a store, with a limit to every wait."""

    def __init__(self, store: Any, timeout_seconds: float) -> None:
        self._store = store
        self._timeout = timedelta(seconds=timeout_seconds)

    def put(self, key: str, value: bytes) -> None:
        self._store.set(key, value)

    def take(self, key: str, rank: int) -> bytes:
        """The value that ``rank`` puts there."""
        try:
            self._store.wait([key], self._timeout)
            value: bytes = self._store.get(key)
        except DistNetworkError as error:
            raise ChannelError(
                "the rank that keeps the store of torch.distributed has ended while inputs were "
                "compared: see its log for the cause"
            ) from error
        except RuntimeError as error:
            raise ChannelError(
                f"rank {rank} has not reported its inputs within {self._timeout.total_seconds():g} "
                f"seconds: see its log for the cause, or raise --dip-timeout-seconds"
            ) from error
        return value


def _digest(inputs: Mapping[str, Input]) -> str:
    values = {name: given.value for name, given in inputs.items()}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _difference(exchange: _Exchange, digests: Sequence[str]) -> str:
    ranks = {
        digest: [r for r, other in enumerate(digests) if other == digest] for digest in digests
    }
    seen: dict[str, dict[str, Input]] = {}
    for digest, members in ranks.items():
        data = json.loads(exchange.take(f"inputs/{digest}", members[0]))
        seen[digest] = {name: Input(*given) for name, given in data.items()}
    parts = []
    for name in dict.fromkeys(name for inputs in seen.values() for name in inputs):
        given = {digest: inputs.get(name) for digest, inputs in seen.items()}
        if len({None if one is None else one.value for one in given.values()}) > 1:
            parts.append(_part(name, given, ranks))
    more = f", and {len(parts) - _NUM_SHOWN} more" if len(parts) > _NUM_SHOWN else ""
    return (
        f"the ranks were given different inputs: {'; '.join(parts[:_NUM_SHOWN])}{more} "
        f"(give all ranks the same)"
    )


def _part(name: str, given: Mapping[str, Input | None], ranks: Mapping[str, Sequence[int]]) -> str:
    """One input that differs: its values, each with the ranks that have it."""
    by_value: dict[str | None, tuple[str, list[int]]] = {}
    for digest, one in given.items():
        shown = "absent" if one is None else one_line(one.shown, _SHOWN_CHARACTERS)
        by_value.setdefault(None if one is None else one.value, (shown, []))[1].extend(
            ranks[digest]
        )
    values = [f"{shown} on {_numbers(sorted(members))}" for shown, members in by_value.values()]
    return f"{name} is {' and '.join(values)}"


def _numbers(ranks: Sequence[int]) -> str:
    """ "rank 1", "ranks 0 to 6" or "ranks 0, 2 and 3 more"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"ranks {', '.join(map(str, ranks[:4]))}{more}"
