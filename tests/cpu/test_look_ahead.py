"""The look-ahead: what comes next is known, and nothing else about the data changes."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from megatron.core.rerun_state_machine import RerunDataIterator

from megatron_dip.costs import ItemSize, ItemSizes
from megatron_dip.errors import DataError
from megatron_dip.integration import ahead as batches_ahead
from megatron_dip.runtime.look_ahead import LookAhead, SizedBatch


class Loader:
    """Ten microbatches, with a state as external loaders have one."""

    def __init__(self, consumed: int = 0, fails_at: int = -1) -> None:
        self._next = consumed
        self._fails_at = fails_at

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> dict[str, Any]:
        if self._next == 10:
            raise StopIteration
        if self._next == self._fails_at:
            raise DataError("an image does not decode")
        self._next += 1
        return {"tokens": [self._next] * self._next}

    def save_state(self) -> dict[str, int]:
        return {"consumed": self._next}


def items(batch: dict[str, Any]) -> ItemSizes:
    num_tokens = len(batch["tokens"])
    return {"language": [ItemSize(tokens=num_tokens, spans=(num_tokens,))]}


def tokens(microbatches: Iterator[SizedBatch]) -> list[list[int]]:
    return [one.batch["tokens"] for one in microbatches]


def test_what_is_handed_out_is_the_same_however_much_is_held() -> None:
    ahead = LookAhead(Loader(), items)
    found = []
    for number, microbatch in enumerate(ahead):
        found.append(microbatch.batch)
        ahead.hold(number % 5)
    assert found == list(Loader()) and len(found) == 10


def test_coming_batches_are_those_that_come() -> None:
    ahead = LookAhead(Loader(), items)
    ahead.hold(7)
    coming = ahead.coming(3)
    assert ahead.num_held == 7 and len(coming) == 2, "the third batch is not held as a whole"
    for batch in coming:
        for sizes in batch:
            microbatch = next(ahead)
            assert microbatch.sizes is sizes
            # Megatron's rerun iterator hands out copies: they are known to be the same batch.
            assert copy.copy(microbatch).sizes is sizes
            assert sizes == items(microbatch.batch)
    assert ahead.num_held == 1


def test_the_state_is_that_of_what_was_handed_out() -> None:
    ahead = LookAhead(Loader(), items)
    assert ahead.save_state() == {"consumed": 0}
    for _ in range(3):
        next(ahead)
    ahead.hold(6)
    state = ahead.save_state()
    assert state == {"consumed": 3}
    resumed = tokens(LookAhead(Loader(**state), items))
    assert resumed == tokens(ahead) and len(resumed) == 7


def test_a_source_without_a_state_has_none() -> None:
    assert not hasattr(LookAhead(iter([]), items), "save_state")
    assert hasattr(LookAhead(Loader(), items), "save_state")


def test_an_error_is_raised_where_training_comes_to_it() -> None:
    ahead = LookAhead(Loader(fails_at=4), items)
    ahead.hold(8)
    assert ahead.num_held == 4 and len(ahead.coming(2)) == 2
    for _ in range(4):
        next(ahead)
    for _ in range(2):
        with pytest.raises(DataError, match="does not decode"):
            next(ahead)


def test_so_is_one_in_the_sizes_of_a_batch() -> None:
    def checked(batch: dict[str, Any]) -> ItemSizes:
        if len(batch["tokens"]) == 5:
            raise DataError("a sequence has 5 tokens")
        return items(batch)

    ahead = LookAhead(Loader(), checked)
    ahead.hold(8)
    assert ahead.num_held == 4
    for _ in range(4):
        next(ahead)
    with pytest.raises(DataError, match="has 5 tokens"):
        next(ahead)


def test_the_end_of_the_data_stays_the_end() -> None:
    ahead = LookAhead(Loader(consumed=9), items)
    ahead.hold(4)
    assert len(tokens(ahead)) == 1
    assert next(ahead, None) is None and ahead.coming(1) == []


def test_a_batch_that_is_skipped_is_read_and_dropped_whatever_it_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches_ahead, "get_num_microbatches", lambda: 3)
    iterator = RerunDataIterator(LookAhead(Loader(), items))
    batches_ahead.skip_batch(iterator)
    # Ranks without data have no iterator.
    batches_ahead.skip_batch(None)
    assert next(iterator).batch["tokens"] == [4] * 4
