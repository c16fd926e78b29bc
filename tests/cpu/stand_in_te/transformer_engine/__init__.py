"""Stands for Transformer Engine where there is no GPU: the names, signatures and gradients that
Megatron's wrappers rely on, in torch's own operations.

Signatures are those of release 2.20; a call that would not bind there does not bind here.  Left
out: casts to fp8 (their conditions on shapes are checked), user buffers, fused optimizers.
"""

from transformer_engine import common, pytorch

__version__ = "2.20.0"

__all__ = ["common", "pytorch"]
