"""Recipes for 8-bit computing: which one is on, and what it wants of shapes."""

from enum import Enum


class Format(Enum):
    """Kinds of 8-bit numbers."""

    E4M3 = "e4m3"
    HYBRID = "hybrid"


class _Recipe:
    row_multiple = 8
    """Of the rows of a linear layer's input, forward and for the gradient of its weight."""

    def __init__(self, **settings):
        self.settings = settings


class DelayedScaling(_Recipe):
    """Scales from the largest values of earlier steps."""


class Float8CurrentScaling(_Recipe):
    """One scale per tensor."""


class Float8BlockScaling(_Recipe):
    """One scale per block."""

    row_multiple = 16


class MXFP8BlockScaling(_Recipe):
    """One scale per 32 values."""

    row_multiple = 32


class NVFP4BlockScaling(_Recipe):
    """Four bits."""

    row_multiple = 16
