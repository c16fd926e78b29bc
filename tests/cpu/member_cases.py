"""What must hold of the members of every data set."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

from megatron_dip.costs import ItemSizes
from megatron_dip.families.base import SampleSet

__all__ = ["check_members"]


def check_members(dataset: SampleSet, numbers: Sequence[int]) -> None:
    """Assert that sequences are those of their members, that the members of two sequences make one
    of both, and that sizes are known before anything is read."""
    whole = dataset.collate_fn([dataset[i] for i in numbers])
    members = [dataset.members(i) for i in numbers]
    again = dataset.collate_fn([dataset[one] for one in members])
    assert again.metadata() == whole.metadata()
    every = list(chain.from_iterable(members))
    if dataset.room is not None:
        again = dataset.collate_fn([dataset[tuple(every)]])
    expected = _joined([dataset.member_sizes(member) for member in every])
    for read in (whole, again):
        assert _joined([read.metadata()]) == expected


def _joined(sizes: Sequence[ItemSizes]) -> dict[str, Any]:
    """Per module, tokens, rows handed on where items stay apart, and spans of all items."""
    found: dict[str, Any] = {}
    last = list(sizes[0])[-1]
    for module in sizes[0]:
        items = [item for one in sizes for item in one[module]]
        spans = Counter(span for item in items for span in item.spans)
        rows = [] if module == last else sorted(item.num_output_rows for item in items)
        found[module] = (sum(item.tokens for item in items), spans, rows)
    return found
