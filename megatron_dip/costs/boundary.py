"""What crosses the boundaries of stages: one rule for shapes of messages and bytes of items.

Ranks never exchange shapes: sender and receiver apply the rule to the sizes of the same items.  A
message holds rows of its items, one for each token, divided among the ranks of a tensor-parallel
group (the joined rows are padded to fit), and behind them rows that every rank holds whole.

Rows are divided where sequence parallelism divides them already, and where a module hands on rows
that every rank holds whole: each rank then sends its part, and the receiving ranks gather them.
Sent whole, they would cross once for every rank.
"""

from collections.abc import Sequence
from math import prod
from typing import Literal, NamedTuple

from megatron_dip.costs.layers import Parallelism
from megatron_dip.costs.shapes import ModuleShape
from megatron_dip.costs.sizes import ItemSize
from megatron_dip.errors import DataError

__all__ = ["Boundary", "shape_boundary"]


class Boundary(NamedTuple):
    """The boundary between stages of a module, or from its last stage to the modules that read it.

    Plain numbers; the type of values is that of the run.
    """

    form: Literal["batched", "packed", "flat"]
    """``[S, B, width]``, ``[rows, 1, width]`` or ``[rows, width]``."""
    width: int
    extra_rows: int = 0
    """Rows that go along for every item, whole on every rank."""
    carries_context: bool = False
    """Whether the rows that cross-attention reads go along, whole on every rank."""
    num_shards: int = 1
    """Ranks among which the rows of tokens are divided."""
    row_multiple: int = 1
    """Of which each rank's rows of tokens are a multiple: 8-bit kernels want that."""
    is_gathered: bool = False
    """Whether the rows are divided for the way alone: whole on every rank before and after."""

    def num_rows(self, sizes: Sequence[ItemSize], *, outer: bool) -> int:
        """Rows of tokens of a message before they are divided; of one item where ``batched``.

        Args:
            sizes: Of its items.
            outer: As of :meth:`shape`.
        """
        rows = [size.num_output_rows if outer else size.tokens for size in sizes]
        return rows[0] if self.form == "batched" else sum(rows)

    def shape(self, sizes: Sequence[ItemSize], *, outer: bool) -> tuple[int, ...]:
        """Of one message on one rank.

        Args:
            sizes: Of its items.
            outer: Whether it goes to the modules that read this one, and not to its next stage.

        Raises:
            DataError: Items of different sizes in a batched message.
        """
        rows = [size.num_output_rows if outer else size.tokens for size in sizes]
        whole = [
            self.extra_rows + (size.context_tokens if self.carries_context else 0) for size in sizes
        ]
        if self.form == "batched":
            if len({*zip(rows, whole, strict=True)}) != 1:
                raise DataError(
                    f"items of {rows} rows cannot be joined into one message of the form "
                    f"[rows, items, {self.width}] (expected items of one size: give all samples of "
                    f"a microbatch the same length)"
                )
            return (self._own_rows(rows[0]) + whole[0], len(sizes), self.width)
        joined = self._own_rows(sum(rows)) + sum(whole)
        return (joined, self.width) if self.form == "flat" else (joined, 1, self.width)

    def _own_rows(self, num_rows: int) -> int:
        """A rank's part of ``num_rows``, filled up."""
        step = self.num_shards * self.row_multiple
        return -(-num_rows // step) * self.row_multiple

    def num_bytes(self, size: ItemSize, *, bytes_per_value: int, outer: bool = False) -> int:
        """What one item takes in a message on one rank."""
        return bytes_per_value * prod(self.shape([size], outer=outer))


def shape_boundary(
    module: ModuleShape, parallel: Parallelism, *, outer: bool = False, row_multiple: int = 1
) -> Boundary:
    """The boundary of a module that is known by its shape, with packed rows.

    Stages of a ``dit`` module hand on its text and its modulation as well.  Modules that read
    others get all of their rows on every rank, in parts, and none that only fill up.
    """
    if outer:
        return Boundary(
            "packed",
            module.output_size,
            num_shards=parallel.tensor,
            is_gathered=parallel.tensor > 1,
        )
    is_dit = module.kind == "dit"
    return Boundary(
        "packed",
        module.hidden_size,
        extra_rows=module.conditioning_rows if is_dit else 0,
        carries_context=is_dit,
        num_shards=parallel.of(module).sequence_shards,
        row_multiple=row_multiple,
    )
