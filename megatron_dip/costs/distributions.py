"""Distributions that a workload is drawn from: of whole numbers, of shares, of any numbers."""

from math import exp, log
from random import Random
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_dip.forms import Form
from megatron_dip.limits import MOST_TOKENS, Tokens

__all__ = ["Counts", "Range", "Shares", "Weight"]

Weight = Annotated[float, Field(ge=0, le=1e15)]


class _Weighted(Form):
    weights: tuple[Weight, ...] | None = None
    """One per value, in any unit; all alike where not given."""

    def _check_weights(self, num_values: int) -> None:
        if self.weights is None:
            return
        if len(self.weights) != num_values:
            raise ValueError(f"{len(self.weights)} weights for {num_values} values (one per value)")
        if not sum(self.weights) > 0:
            raise ValueError("weights sum to 0 (give one value a positive weight)")


class Counts(_Weighted):
    """A distribution over whole numbers."""

    values: Annotated[tuple[Tokens, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_weights(len(self.values))
        return self

    def draw(self, random: Random) -> int:
        """One value."""
        return random.choices(self.values, self.weights)[0]


class Shares(_Weighted):
    """A distribution over shares of a whole."""

    values: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_weights(len(self.values))
        return self

    def draw(self, random: Random) -> float:
        """One value."""
        return random.choices(self.values, self.weights)[0]


class Range(Form):
    """Any number of a range: all alike, or their logarithms."""

    least: Annotated[float, Field(gt=0, le=MOST_TOKENS)]
    most: Annotated[float, Field(gt=0, le=MOST_TOKENS)]
    scale: Literal["linear", "log"] = "linear"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"least {self.least:g} is above most {self.most:g}")
        return self

    def draw(self, random: Random) -> float:
        """One value."""
        if self.scale == "log":
            return exp(random.uniform(log(self.least), log(self.most)))
        return random.uniform(self.least, self.most)
