"""Times of one module's layers, attention and extras, at every size of a grid."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_dip.costs import ItemSize
from megatron_dip.costs.grid import size_grid
from megatron_dip.costs.profile import MeasuredModule, MeasuredPoint
from megatron_dip.costs.shapes import ModuleShape
from megatron_dip.errors import ConfigError
from megatron_dip.families.base import ModelFamily, StageFactory
from megatron_dip.families.forms import FamilyConfig
from megatron_dip.families.packed.attention import span_params
from megatron_dip.families.packed.stage import StageModule
from megatron_dip.models.recompute import recomputed_layers
from megatron_dip.runtime.measure import CallTimes, measure_call

__all__ = ["MeasureOptions", "measure_module", "num_measurements"]

_NUM_LAYERS = 2
"""Of the stage that a layer's time is taken from: their mean leaves out little of a call."""
_NUM_CURVES = 5
_NUM_ROUNDS = 3
"""Of all sizes: what disturbs the machine for some seconds then spoils no size altogether."""


class MeasureOptions(NamedTuple):
    """How much is measured."""

    num_points: int
    repetitions: int
    seconds_per_point: float


def num_measurements(config: FamilyConfig, family: ModelFamily[Any], num_points: int) -> int:
    """Sizes that are measured, over all curves of all modules."""
    return sum(
        _NUM_ROUNDS * _NUM_CURVES * len(_grid(family, config, module.name, num_points))
        for module in config.model_shape().modules
    )


def measure_module(
    shape: ModuleShape,
    config: FamilyConfig,
    family: ModelFamily[Any],
    factory: StageFactory,
    options: MeasureOptions,
    on_point: Callable[[str], None],
) -> MeasuredModule:
    """All curves of a module; ``on_point`` is called with a description after each point.

    Raises:
        ConfigError: A size does not fit into the device's memory.
    """
    sizes = _grid(family, config, shape.name, options.num_points)
    bench = _Bench(shape, config, family, factory, options)

    def curve(part: str, measure: Callable[[int], CallTimes]) -> list[CallTimes]:
        found: dict[int, CallTimes] = {}
        for _ in range(_NUM_ROUNDS):
            for size in sizes:
                try:
                    times = measure(size)
                except torch.OutOfMemoryError as error:
                    raise ConfigError(
                        f"{shape.name}, {part}, {size} tokens: out of memory (use more "
                        f"--tensor-parallel ranks, or a configuration with smaller items)"
                    ) from error
                found[size] = found[size].least(times) if size in found else times
                on_point(f"{shape.name}, {part}, {size}")
        return [found[size] for size in sizes]

    def points(times: list[CallTimes]) -> tuple[MeasuredPoint, ...]:
        return tuple(_point(*pair) for pair in zip(sizes, times, strict=True))

    cores = curve("attention", bench.attention)
    linear = tuple(
        _layer_point(size, layers, again, core, bench.num_layers)
        for size, layers, again, core in zip(
            sizes,
            curve("layers", bench.layers),
            curve("layers again", bench.recomputed_layers),
            cores,
            strict=True,
        )
    )
    return MeasuredModule(
        kind=shape.kind,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.query_groups,
        overhead_us=_overhead_us(linear),
        linear=linear,
        attention=points(cores),
        first_extra=points(curve("before layers", bench.first_extra)),
        last_extra=points(curve("after layers", bench.last_extra)),
    )


def _grid(
    family: ModelFamily[Any], config: FamilyConfig, module: str, num_points: int
) -> tuple[int, ...]:
    tokens = family.item_tokens(config, module)
    return size_grid(tokens.start, tokens.stop - 1, num_points, tokens.step)


class _Bench:
    """Stages of one module and what they read."""

    def __init__(
        self,
        shape: ModuleShape,
        config: FamilyConfig,
        family: ModelFamily[Any],
        factory: StageFactory,
        options: MeasureOptions,
    ) -> None:
        self._shape, self._config, self._family = shape, config, family
        self._factory, self._options = factory, options
        self._device = torch.device("cuda", torch.cuda.current_device())
        model = config.model_shape()
        end = model.first_with_backward().get(shape.name, shape.num_layers + 1)
        self._has_backward = end < shape.num_layers
        self._upstream_tokens = family.measured_upstream_tokens(config, shape.name)
        # One upstream module at most is read where there is something to read.
        self._upstream = shape.upstream[0] if self._upstream_tokens else None
        self._upstream_has_backward = any(
            name in model.modules_with_backward() for name in shape.upstream
        )
        # Layers from the middle: neither first nor last, and trained ones where there are any.
        trained = max(shape.trained_layers(), key=len, default=range(shape.num_layers))
        first = min(trained.start + 1, trained.stop - 1)
        count = min(_NUM_LAYERS, trained.stop - first)
        self._layers, self.num_layers = range(first, first + count), count

        self._middle = self._build(first, count)
        self._first = self._build(0, 0, first=True)
        self._last = self._build(shape.num_layers, 0, last=True)
        self._core = _core_attention(self._middle)

    def _build(
        self, first_layer: int, num_layers: int, *, first: bool = False, last: bool = False
    ) -> StageModule:
        stage = self._factory.build(
            self._shape.name, first_layer=first_layer, num_layers=num_layers, first=first, last=last
        )
        return stage.to(self._device, self._factory.loss_config.params_dtype).train()

    def layers(self, size: int) -> CallTimes:
        """All layers of the stage on one item of one span."""
        return self._stage(self._middle, size)

    def recomputed_layers(self, size: int) -> CallTimes:
        """The same, each layer computed again in its backward."""
        return self._stage(self._middle, size, self._layers if self._has_backward else ())

    def first_extra(self, size: int) -> CallTimes:
        """What sits before the first layer."""
        return self._stage(self._first, size)

    def last_extra(self, size: int) -> CallTimes:
        """What sits after the last layer."""
        return self._stage(self._last, size)

    def _stage(
        self, stage: StageModule, size: int, recompute_layers: Sequence[int] = ()
    ) -> CallTimes:
        data = self._family.measured_data(self._config, self._shape.name, size).to(self._device)
        inputs = []
        if not stage.pre_process:
            item = ItemSize(tokens=size, spans=(size,), context_tokens=self._upstream_tokens)
            inner = self._factory.boundary(self._shape.name, outer=False)
            inputs = [self._random(inner.shape([item], outer=False), self._has_backward)]
        elif self._upstream is not None:
            item = ItemSize(tokens=self._upstream_tokens, spans=(self._upstream_tokens,))
            outer = self._factory.boundary(self._upstream, outer=True)
            inputs = [self._random(outer.shape([item], outer=True), self._upstream_has_backward)]

        def call() -> Tensor:
            # A leaf as it stands may be changed in place by the stage's first layer.
            read = inputs[0].view_as(inputs[0]) if inputs else None
            hidden, upstream = (None, read) if stage.pre_process else (read, None)
            with recomputed_layers(stage, recompute_layers):
                output: Tensor = stage(hidden, data, upstream)
            return output

        return self._measure(call, inputs, list(stage.parameters()))

    def _random(self, shape: tuple[int, ...], needs_grad: bool) -> Tensor:
        dtype = self._factory.loss_config.params_dtype
        return torch.randn(shape, dtype=dtype, device=self._device).requires_grad_(needs_grad)

    def attention(self, size: int) -> CallTimes:
        """The core of attention on one span."""
        config = self._middle.config
        shards = config.tensor_model_parallel_size
        shape = (size, config.num_attention_heads // shards, config.kv_channels)
        grouped = (size, max(1, config.num_query_groups // shards), config.kv_channels)
        inputs = [
            torch.randn(part, dtype=config.params_dtype, device=self._device).requires_grad_(
                self._has_backward
            )
            for part in (shape, grouped, grouped)
        ]
        params = span_params([size], num_rows=size, device=self._device)

        def call() -> Tensor:
            output: Tensor = self._core(
                *inputs,
                None,
                attn_mask_type=self._core.attn_mask_type,
                packed_seq_params=params,
            )
            return output

        return self._measure(call, inputs, [])

    def _measure(
        self, call: Callable[[], Tensor], inputs: list[Tensor], parameters: list[Any]
    ) -> CallTimes:
        return measure_call(
            call,
            inputs=[tensor for tensor in inputs if tensor.requires_grad],
            parameters=parameters,
            device=self._device,
            repetitions=self._options.repetitions,
            seconds=self._options.seconds_per_point,
        )


def _core_attention(stage: StageModule) -> Any:
    for name, module in stage.named_modules():
        if name.endswith("self_attention.core_attention"):
            assert isinstance(module, MegatronModule | torch.nn.Module)
            return module
    raise AssertionError(f"{type(stage).__name__} has no self_attention.core_attention")


def _point(size: int, times: CallTimes) -> MeasuredPoint:
    return MeasuredPoint(
        size=size,
        forward_us=times.forward_us,
        input_grad_us=times.input_grad_us,
        weight_grad_us=times.weight_grad_us,
        activation_bytes=times.stored_bytes,
    )


def _layer_point(
    size: int, layers: CallTimes, again: CallTimes, core: CallTimes, num_layers: int
) -> MeasuredPoint:
    """One layer, less the core of its attention."""
    longer = (again.backward_us - layers.backward_us) / num_layers
    return MeasuredPoint(
        size=size,
        forward_us=max(0.0, layers.forward_us / num_layers - core.forward_us),
        input_grad_us=max(0.0, layers.input_grad_us / num_layers - core.input_grad_us),
        weight_grad_us=layers.weight_grad_us / num_layers,
        recompute_us=max(0.0, longer - core.forward_us),
        activation_bytes=layers.stored_bytes // num_layers,
    )


def _overhead_us(linear: tuple[MeasuredPoint, ...]) -> float:
    """What is left at size 0 of the line through the two smallest sizes, in either phase."""
    first, second = linear[0], linear[1] if len(linear) > 1 else linear[0]
    return max(0.0, min(_intercepts(first, second)))


def _intercepts(first: MeasuredPoint, second: MeasuredPoint) -> Iterator[float]:
    for name in ("forward_us", "input_grad_us"):
        low, high = getattr(first, name), getattr(second, name)
        run = max(1, second.size - first.size)
        yield min(low, low - first.size * max(0.0, high - low) / run)
