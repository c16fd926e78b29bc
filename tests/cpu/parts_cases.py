"""What is trained in the cases of ``test_parts.py``."""

from dataclasses import dataclass
from typing import Any

__all__ = ["CASES", "NUM_ITERATIONS", "RATE", "PartsCase"]

NUM_ITERATIONS = 3
RATE = 0.03
"""Learning rate where factors are 1."""


@dataclass(frozen=True, kw_only=True)
class PartsCase:
    """One way to train the tiny vision-language model, with an uneven cut of it."""

    name: str
    vision: dict[str, Any]
    language: dict[str, Any]
    """Fields of the modules' forms."""
    layers: dict[str, list[list[int]]]
    """Per module, segment and rank."""
    is_distributed: bool = False
    """With a distributed optimizer, and reductions beside the backward."""
    tolerance: float = 1e-5
    """Of losses and norms, relative; Adam divides by small numbers."""
    resumes: bool = False
    """Whether the last step is done a second time, from a checkpoint."""


CASES = (
    PartsCase(
        name="projector-alone",
        vision={"trainable": ["projector"], "learning_rate_factor": 10.0},
        language={"trainable": False},
        layers={"vision": [[3, 2], [1, 2]], "language": [[2, 3], [2, 1]]},
    ),
    PartsCase(
        name="projector-and-language",
        vision={"trainable": {"tower": False, "projector": True}},
        language={"learning_rate_factor": {"layers": 0.5, "embedding": 0.25}},
        layers={"vision": [[3, 5]], "language": [[3, 2], [2, 1]]},
        resumes=True,
    ),
    PartsCase(
        name="frozen-language",
        vision={},
        language={"trainable": False},
        layers={"vision": [[5, 3]], "language": [[3, 2], [2, 1]]},
    ),
    PartsCase(
        name="last-layers",
        vision={"trainable": {"projector": True, "layers": {"last": 2}}},
        language={"trainable": {"layers": {"first": 1, "last": 2}, "norm": True}},
        layers={"vision": [[3, 2], [1, 2]], "language": [[2, 3], [2, 1]]},
    ),
    PartsCase(
        name="nothing-on-the-first-rank",
        vision={"trainable": False},
        language={"trainable": {"layers": {"last": 2}, "head": True}},
        layers={"vision": [[3, 2], [1, 2]], "language": [[3, 5]]},
        is_distributed=True,
        tolerance=1e-4,
    ),
)
