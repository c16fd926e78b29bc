"""Measured times of layers, and what they say of sizes between the measured ones.

A profile file (JSON, versioned) holds, per module, curves of points.  A curve's points give the
time of a whole call, launches included, of one part of the module:

- ``linear``: one layer without the cores of attention, over tokens (cross-attention included);
- ``attention``: the core of self-attention, over the length of one span;
- ``first_extra``, ``last_extra``: what sits before the first and after the last layer, over
  tokens.

An item's time is the ``linear`` curve at its tokens plus the ``attention`` curve at each of its
spans, less ``overhead_us``, which a problem adds once per call.  Between two points times are
interpolated linearly; a point below an earlier one (noise) is raised to it, so that more work
never takes less time.  Outside the measured range nothing is guessed: that is an error.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_dip.costs.analytic import PhaseTimes
from megatron_dip.costs.layers import Parallelism
from megatron_dip.costs.memory import StoredPart
from megatron_dip.costs.shapes import ModelShape, ModuleShape
from megatron_dip.costs.sizes import ItemSize
from megatron_dip.errors import ConfigError, shown
from megatron_dip.forms import Form
from megatron_dip.limits import Bytes, InnerWidth, Positive, Size, Time, Width
from megatron_dip.reading import read_json

__all__ = ["MeasuredModule", "MeasuredPoint", "Profile", "ProfiledTimes", "load_profile"]


class MeasuredPoint(Form):
    """One size, measured."""

    size: Positive
    """Tokens, or the length of one span."""
    forward_us: Time
    input_grad_us: Time
    weight_grad_us: Time
    recompute_us: Time | None = None
    """Of ``linear``: forward again during backward; ``forward_us`` where not given."""
    activation_bytes: Bytes | None = None
    """Of ``linear`` (attention included) and extras: kept from forward to backward; computed from
    the shape where not given."""


Curve = Annotated[tuple[MeasuredPoint, ...], Field(min_length=1)]


class MeasuredModule(Form):
    """The curves of one kind of layer, and the shape that they were measured at."""

    kind: Literal["vit", "causal", "dit"]
    hidden_size: Width
    ffn_hidden_size: InnerWidth
    num_attention_heads: Size
    num_query_groups: Size
    overhead_us: Time
    """Part of every forward and input gradient of ``linear`` that does not depend on size."""
    linear: Curve
    attention: Curve
    first_extra: Curve | None = None
    """Nothing measured: takes no time."""
    last_extra: Curve | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("linear", "attention", "first_extra", "last_extra"):
            sizes = [point.size for point in getattr(self, name) or ()]
            if any(after <= before for before, after in pairwise(sizes)):
                raise ValueError(f"{name}: sizes {sizes} do not grow (sort them, each once)")
        return self


class Profile(Form):
    """Measured times on one device under one division of layers."""

    format: Literal["megatron-dip/profile"] = "megatron-dip/profile"
    version: Literal[1] = 1
    device: Annotated[str, Field(min_length=1)]
    precision: Literal["fp32", "bf16"] | None = None
    """Of weights and activations; not checked where not given."""
    parallel: Parallelism = Parallelism()
    modules: dict[str, MeasuredModule]


def load_profile(path: str | Path) -> Profile:
    """The profile in a JSON file.

    Raises:
        ConfigError: The file cannot be read, or a field is missing, unknown or out of range.
    """
    return Profile.parse(read_json(path, ConfigError), ConfigError, str(path))


class _Curve:
    """Monotone piecewise linear interpolation of everything that was measured."""

    def __init__(self, where: str, points: tuple[MeasuredPoint, ...]) -> None:
        self._where = where
        self._sizes = [point.size for point in points]
        self._values = {
            name: list(accumulate((getattr(point, name) for point in points), max))
            for name in MeasuredPoint.model_fields
            if all(getattr(point, name) is not None for point in points)
        }

    def has(self, name: str) -> bool:
        """Whether every point has a value of this name."""
        return name in self._values

    def times(self, size: int) -> PhaseTimes:
        """Times at ``size``; nothing takes no time."""
        return PhaseTimes(*(self.at(name, size) for name in PhaseTimes._fields))

    def at(self, name: str, size: int) -> float:
        """One value at ``size``."""
        if size == 0:
            return 0.0
        low, high = self._sizes[0], self._sizes[-1]
        if not low <= size <= high:
            raise ConfigError(
                f"{self._where}: size {size} lies outside the measured range {low} to {high} "
                "(measure more sizes)"
            )
        values = self._values[name]
        right = bisect_left(self._sizes, size)
        if self._sizes[right] == size:
            return float(values[right])
        before, after = self._sizes[right - 1], self._sizes[right]
        share = (size - before) / (after - before)
        return float(values[right - 1] + share * (values[right] - values[right - 1]))


@dataclass(frozen=True)
class ProfiledTimes:
    """Times of layers read off a profile; see ``for_model``."""

    profile: Profile
    _curves: Mapping[tuple[str, str], _Curve]

    @classmethod
    def for_model(cls, profile: Profile, model: ModelShape, parallel: Parallelism) -> Self:
        """The profile, checked to be one of ``model`` under ``parallel``.

        Raises:
            ConfigError: A module is missing or was measured at another shape or division.
        """
        for name in Parallelism.model_fields:
            given, expected = getattr(profile.parallel, name), getattr(parallel, name)
            if given != expected:
                raise ConfigError(
                    f"profile: parallel.{name} is {given}, but the cluster has {expected} "
                    "(measure again under this division)"
                )
        curves = {}
        for module in model.modules:
            if module.name not in profile.modules:
                raise ConfigError(
                    f"profile: modules.{module.name} is missing "
                    f"(it holds {sorted(profile.modules)})"
                )
            measured = profile.modules[module.name]
            _check_shape(measured, module)
            for part in ("linear", "attention", "first_extra", "last_extra"):
                points = getattr(measured, part)
                if points is not None:
                    where = f"profile: modules.{module.name}.{part}"
                    curves[module.name, part] = _Curve(where, points)
        return cls(profile, curves)

    def overhead_us(self, module: ModuleShape) -> float:
        """Cost of calling one layer, whatever its size."""
        return self.profile.modules[module.name].overhead_us

    def layer(self, module: ModuleShape, size: ItemSize) -> PhaseTimes:
        """One item in one layer.

        Raises:
            ConfigError: Its tokens or a span lie outside the measured range.
        """
        overhead = self.overhead_us(module)
        linear = self._curves[module.name, "linear"].times(size.tokens)
        spans = [self._curves[module.name, "attention"].times(span) for span in size.spans]
        return PhaseTimes(
            max(0.0, linear.forward_us - overhead) + sum(span.forward_us for span in spans),
            max(0.0, linear.input_grad_us - overhead) + sum(span.input_grad_us for span in spans),
            linear.weight_grad_us,
        )

    def recompute_us(self, module: ModuleShape, size: ItemSize) -> float | None:
        """One item in one layer, forward again; None where that was not measured."""
        linear, attention = (self._curves[module.name, part] for part in ("linear", "attention"))
        if not linear.has("recompute_us"):
            return None
        again = max(0.0, linear.at("recompute_us", size.tokens) - self.overhead_us(module))
        return again + sum(attention.at("forward_us", span) for span in size.spans)

    def activation_bytes(self, module: ModuleShape, size: ItemSize, part: StoredPart) -> int | None:
        """Kept by one item in one layer (``linear``) or in an extra; None if not measured."""
        curve = self._curves.get((module.name, part))
        if curve is None or not curve.has("activation_bytes"):
            return None
        return round(curve.at("activation_bytes", size.tokens))

    def first_extra(self, module: ModuleShape, size: ItemSize) -> PhaseTimes:
        """One item in what sits before the first layer."""
        return self._extra(module, "first_extra", size)

    def last_extra(self, module: ModuleShape, size: ItemSize) -> PhaseTimes:
        """One item in what sits after the last layer."""
        return self._extra(module, "last_extra", size)

    def _extra(self, module: ModuleShape, part: str, size: ItemSize) -> PhaseTimes:
        curve = self._curves.get((module.name, part))
        return PhaseTimes(0.0, 0.0, 0.0) if curve is None else curve.times(size.tokens)


def _check_shape(measured: MeasuredModule, module: ModuleShape) -> None:
    for field, expected in (
        ("kind", module.kind),
        ("hidden_size", module.hidden_size),
        ("ffn_hidden_size", module.ffn_hidden_size),
        ("num_attention_heads", module.num_attention_heads),
        ("num_query_groups", module.query_groups),
    ):
        given = getattr(measured, field)
        if given != expected:
            raise ConfigError(
                f"profile: modules.{module.name}.{field} is {shown(given)}, but the model has "
                f"{shown(expected)} (measure this model)"
            )
