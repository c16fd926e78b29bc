"""Megatron's small functions that torch compiles, under shapes that differ from batch to batch.

``jit_fuser`` is ``torch.compile``: activations, their gradients, bias and dropout.  Dynamo compiles
each for the first number of rows, once more for any number of rows when a second one comes, and
then again for what else differs: widths of several towers, a single row, frozen inputs, 16 and 32
bits.  After ``recompile_limit`` versions of a function it gives up without an error, and the
function runs uncompiled.  So the limit is raised from 8; how many there are does not grow with the
number of batches.
"""

import torch._dynamo

__all__ = ["allow_versions"]

_NUM_VERSIONS = 64


def allow_versions() -> None:
    """Let a function have as many versions as towers, types and frozen parts make."""
    config = torch._dynamo.config
    # The name of before torch 2.7.
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(getattr(config, name), _NUM_VERSIONS))
