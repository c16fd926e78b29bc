"""What both of Transformer Engine's frameworks share."""

from transformer_engine.common import recipe

__all__ = ["recipe"]
