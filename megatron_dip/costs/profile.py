"""Measured times of layers, fitted to what the actions of a run took.

A profile file (JSON, versioned) holds, per module, what one item adds to a call of a layer: so much
per token and so much per pair of a token and one that it may attend to, forward and backward apart;
what calling a layer takes by itself; and what sits before the first and after the last layer, per
token.  ``megatron_dip.report.fit`` makes it from recorded steps.

Of a backward, the gradients of inputs and of weights take equally long per token, and cores of
attention have a gradient of inputs alone: a run does both together, and cannot tell them apart.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field

from megatron_dip.costs.analytic import PhaseTimes
from megatron_dip.costs.layers import Parallelism
from megatron_dip.costs.shapes import ModelShape, ModuleShape
from megatron_dip.costs.sizes import ItemSize
from megatron_dip.errors import ConfigError, shown
from megatron_dip.forms import Form
from megatron_dip.limits import InnerWidth, Size, Time, Width
from megatron_dip.reading import read_json

__all__ = [
    "EndRates",
    "FittedTimes",
    "MeasuredModule",
    "Profile",
    "ProfiledTimes",
    "Rates",
    "load_profile",
    "profile_without_times",
]


class Rates(Form):
    """Microseconds of one layer."""

    token_us: Time = 0.0
    pair_us: Time = 0.0
    """Per pair of a token and one that it may attend to."""


class EndRates(Form):
    """Microseconds per token of what sits before the first or after the last layer."""

    forward_us: Time = 0.0
    backward_us: Time = 0.0
    """Of the gradient of inputs, and again of that of weights."""


class FittedTimes(Form):
    """What work of one module takes."""

    overhead_us: Time = 0.0
    """Of calling a layer, whatever its size, forward and for the gradient of inputs."""
    forward: Rates = Rates()
    backward: Rates = Rates()
    """Of the gradient of inputs; that of weights takes ``token_us`` again."""
    first_extra: EndRates = EndRates()
    last_extra: EndRates = EndRates()


class MeasuredModule(Form):
    """The times of one module, and the shape that they were measured at."""

    hidden_size: Width
    ffn_hidden_size: InnerWidth
    num_attention_heads: Size
    times: FittedTimes = FittedTimes()


class Profile(Form):
    """Measured times on one device under one division of layers.

    Every run with ``--dip-trace-dir`` writes its own, without times, beside what it records.
    """

    format: Literal["megatron-dip/profile"] = "megatron-dip/profile"
    version: Literal[2] = 2
    device: Annotated[str, Field(min_length=1)]
    precision: Literal["fp32", "bf16"] | None = None
    """Of weights and activations; not checked where not given."""
    parallel: Parallelism = Parallelism()
    modules: dict[str, MeasuredModule]


def profile_without_times(
    model: ModelShape, parallel: Parallelism, *, device: str, is_fp32: bool
) -> Profile:
    """What a profile of ``model`` says beside its times."""
    return Profile(
        device=device,
        precision="fp32" if is_fp32 else "bf16",
        parallel=parallel,
        modules={
            module.name: MeasuredModule(
                hidden_size=module.hidden_size,
                ffn_hidden_size=module.ffn_hidden_size,
                num_attention_heads=module.num_attention_heads,
            )
            for module in model.modules
        },
    )


def load_profile(path: str | Path) -> Profile:
    """The profile in a JSON file.

    Raises:
        ConfigError: The file cannot be read, or a field is missing, unknown or out of range.
    """
    return Profile.parse(read_json(path, ConfigError), ConfigError, str(path))


@dataclass(frozen=True)
class ProfiledTimes:
    """Times of layers read off a profile; see ``for_model``."""

    profile: Profile

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
                    f"profile: parallel.{name} is {given}, but the run has {expected} (measure "
                    f"again under this division)"
                )
        for module in model.modules:
            if module.name not in profile.modules:
                raise ConfigError(
                    f"profile: modules.{module.name} is missing "
                    f"(it holds {sorted(profile.modules)})"
                )
            _check_shape(profile.modules[module.name], module)
        return cls(profile)

    def _times(self, module: ModuleShape) -> FittedTimes:
        return self.profile.modules[module.name].times

    def overhead_us(self, module: ModuleShape) -> float:
        """Cost of calling one layer, whatever its size."""
        return self._times(module).overhead_us

    def layer(self, module: ModuleShape, size: ItemSize) -> PhaseTimes:
        """One item in one layer."""
        times, tokens, pairs = self._times(module), size.tokens, size.token_pairs
        forward, backward = times.forward, times.backward
        return PhaseTimes(
            tokens * forward.token_us + pairs * forward.pair_us,
            tokens * backward.token_us + pairs * backward.pair_us,
            tokens * backward.token_us,
        )

    def first_extra(self, module: ModuleShape, size: ItemSize) -> PhaseTimes:
        """One item in what sits before the first layer."""
        return _end_times(self._times(module).first_extra, size)

    def last_extra(self, module: ModuleShape, size: ItemSize) -> PhaseTimes:
        """One item in what sits after the last layer."""
        return _end_times(self._times(module).last_extra, size)


def _end_times(rates: EndRates, size: ItemSize) -> PhaseTimes:
    backward_us = size.tokens * rates.backward_us
    return PhaseTimes(size.tokens * rates.forward_us, backward_us, backward_us)


def _check_shape(measured: MeasuredModule, module: ModuleShape) -> None:
    for field in ("hidden_size", "ffn_hidden_size", "num_attention_heads"):
        given, expected = getattr(measured, field), getattr(module, field)
        if given != expected:
            raise ConfigError(
                f"profile: modules.{module.name}.{field} is {shown(given)}, but the model has "
                f"{shown(expected)} (measure this model)"
            )
