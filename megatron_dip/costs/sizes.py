"""Sizes of items: all that planning, shapes of messages and weights of losses know of a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["BatchSizes", "ItemSize", "ItemSizes"]


@dataclass(frozen=True, kw_only=True)
class ItemSize:
    """All that cost, shapes and loss of one item depend on: plain numbers."""

    tokens: int
    spans: tuple[int, ...]
    """Tokens that attend to each other; their sum is ``tokens`` where nothing is padded."""
    context_tokens: int = 0
    """Tokens that cross-attention reads; every span reads all of them."""
    needs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Upstream items that this one reads, per module; a module not named: all of the microbatch."""
    output_tokens: int | None = None
    """Rows that are handed to the modules that read this one; as many as tokens if None."""
    loss_tokens: int = 0
    """Tokens whose loss counts: the weight of the item in the loss of its microbatch."""
    context_loss_tokens: tuple[int, ...] = ()
    """Of them those on each context-parallel rank; empty where the item is on one rank, or is never
    apart from the others of its microbatch."""

    @property
    def num_output_rows(self) -> int:
        """Rows that are handed to the modules that read this one."""
        return self.tokens if self.output_tokens is None else self.output_tokens

    def loss_tokens_on(self, context_rank: int) -> int:
        """Tokens on a context-parallel rank whose loss counts."""
        if not self.context_loss_tokens:
            return self.loss_tokens
        return self.context_loss_tokens[context_rank]

    @property
    def token_pairs(self) -> int:
        """Pairs of a token and one that it may attend to, of its own span or of the context."""
        own = sum(span * span for span in self.spans)
        return own + self.tokens * self.context_tokens


ItemSizes = Mapping[str, Sequence[ItemSize]]
"""Per module, the items of one microbatch; items are numbered from 0."""

BatchSizes = tuple[ItemSizes, ...]
"""The items of every microbatch of one replica."""
