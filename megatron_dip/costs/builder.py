"""Batch problems from the sizes of items: one builder, for analytic and for measured times."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pydantic import ValidationError

from megatron_dip.costs.analytic import LayerTimes
from megatron_dip.costs.boundary import shape_boundary
from megatron_dip.costs.layers import entered_share, last_operations
from megatron_dip.costs.memory import MemoryModel, StoredPart
from megatron_dip.costs.shapes import ModelShape, ModuleShape
from megatron_dip.costs.sizes import ItemSize, ItemSizes
from megatron_dip.costs.weights import ModuleWeights, StageFacts
from megatron_dip.errors import ProblemError
from megatron_dip.forms import explain_validation_error
from megatron_dip.workload import (
    HostLink,
    Item,
    LayerExtra,
    Module,
    Problem,
    StageFactor,
    TransferCost,
)

__all__ = ["ProblemBuilder", "measured_model"]


def measured_model(model: ModelShape, stages: Iterable[StageFacts]) -> ModelShape:
    """``model`` with the weights that its built stages hold, those of all ranks of a pipeline.

    Raises:
        ConfigError: The stages do not hold each layer of every module once.
    """
    held = tuple(stages)
    modules = []
    for module in model.modules:
        weights = ModuleWeights.of_stages(module.name, module.num_layers, held)
        modules.append(module.model_copy(update={"weights": weights}))
    return model.model_copy(update={"modules": tuple(modules)})


@dataclass(frozen=True, kw_only=True)
class ProblemBuilder:
    """Makes the problem of a batch from the sizes of its items.

    Frozen parts get no weight gradient; modules without anything trainable in them or upstream get
    no backward, and what sits before a first layer passes no gradient on where nothing upstream is
    trainable.
    """

    model: ModelShape
    times: LayerTimes
    memory: MemoryModel
    num_ranks: int
    memory_limit_bytes: int
    """Per rank, weights included."""
    transfer: TransferCost
    host_link: HostLink | None = None
    """What activations can be offloaded over."""
    stage_factors: Mapping[int, StageFactor] | None = None
    """Measured over stated times, see ``megatron_dip.simulator.measured``."""
    layer_overheads_us: Mapping[str, float] | None = None
    """Of calling a layer, per module, as measured; as ``times`` has it where not given."""

    def layer_overheads(self) -> dict[str, float]:
        """Of calling a layer, per module."""
        measured = self.layer_overheads_us or {}
        return {
            module.name: measured.get(module.name, self.times.overhead_us(module))
            for module in self.model.modules
        }

    def build(self, microbatches: Sequence[ItemSizes]) -> Problem:
        """The problem of one batch; modules without items in a microbatch are left out of it.

        Raises:
            ProblemError: A microbatch names a module that the model does not have, or a cost is
                beyond what a problem can hold.
        """
        try:
            return self._build(microbatches)
        except ValidationError as error:
            raise ProblemError(
                f"the costs of this model and batch make no problem: "
                f"{explain_validation_error(error)}"
            ) from None

    def _build(self, microbatches: Sequence[ItemSizes]) -> Problem:
        names = [module.name for module in self.model.modules]
        for number, microbatch in enumerate(microbatches):
            unknown = sorted(set(microbatch) - set(names))
            if unknown:
                raise ProblemError(
                    f"microbatches.{number}: unknown modules {unknown} (expected some of {names})"
                )
            self._check_needs(number, microbatch)
        # Many images have one size: what an item of that size costs is worked out once.
        known: dict[tuple[str, int, tuple[int, ...], int], Item] = {}

        def item(module: ModuleShape, number: int, size: ItemSize) -> Item:
            key = (module.name, size.tokens, size.spans, size.context_tokens)
            if key not in known:
                known[key] = self._item(module, number, size)
            needs = dict(size.needs) or None
            return known[key].model_copy(update={"item": number, "needs": needs})

        return Problem(
            num_ranks=self.num_ranks,
            memory_limit_bytes=(self.memory_limit_bytes,) * self.num_ranks,
            transfer=self.transfer,
            host_link=self.host_link,
            stage_factors=None if self.stage_factors is None else dict(self.stage_factors),
            modules=tuple(self._module(module) for module in self.model.modules),
            microbatches=tuple(
                {
                    module.name: tuple(
                        item(module, number, size)
                        for number, size in enumerate(microbatch[module.name])
                    )
                    for module in self.model.modules
                    if microbatch.get(module.name)
                }
                for microbatch in microbatches
            ),
        )

    def _check_needs(self, number: int, microbatch: ItemSizes) -> None:
        for module in self.model.modules:
            read = {name for size in microbatch.get(module.name, ()) for name in size.needs}
            if not read <= set(module.upstream):
                raise ProblemError(
                    f"microbatches.{number}: items of {module.name} read {sorted(read)}, but in "
                    f"this model its upstream is {list(module.upstream)} (add what is missing to "
                    f"the model, or take a workload that fits it)"
                )

    def _module(self, module: ModuleShape) -> Module:
        trained = module.trained_layers()
        is_whole = sum(map(len, trained)) == (module.num_layers if module.trains_any else 0)
        frozen_bytes = self.memory.layer_static_bytes(module, is_trained=False)
        return Module(
            name=module.name,
            num_layers=module.num_layers,
            upstream=module.upstream,
            trainable=module.trains_any,
            # Said only where it is not all or nothing.
            trained_layers=None if is_whole else tuple((r.start, r.stop) for r in trained),
            layer_overhead_us=self.layer_overheads()[module.name],
            layer_static_bytes=self.memory.layer_static_bytes(module),
            frozen_layer_static_bytes=None if is_whole else frozen_bytes,
            first_layer_extra=LayerExtra(
                static_bytes=self.memory.first_static_bytes(module),
                trainable=_if_other(module.trains_first_extra, module.trains_any),
            ),
            last_layer_extra=LayerExtra(
                static_bytes=self.memory.last_static_bytes(module),
                trainable=_if_other(module.trains_last_extra, module.trains_any),
            ),
        )

    @cached_property
    def _first_with_backward(self) -> dict[str, int]:
        return self.model.first_with_backward()

    def _item(self, module: ModuleShape, number: int, size: ItemSize) -> Item:
        end = self._first_with_backward.get(module.name)
        has_backward = end is not None
        layer, first, last = (
            times if has_backward else times._replace(input_grad_us=0.0)
            for times in (
                self.times.layer(module, size),
                self.times.first_extra(module, size),
                self.times.last_extra(module, size),
            )
        )
        if not module.trains_layers and not module.trains_adapters:
            layer = layer._replace(weight_grad_us=0.0)
        if not module.trains_first_extra:
            first = first._replace(weight_grad_us=0.0)
        if not module.trains_last_extra:
            last = last._replace(weight_grad_us=0.0)
        if not any(name in self._first_with_backward for name in module.upstream):
            first = first._replace(input_grad_us=0.0)
        if end == module.num_layers:
            # Nothing before it has a backward: gradients go no further than its first weights.
            share = entered_share(module, last_operations(module, size, self.memory.parallel, 2))
            layer = layer._replace(input_grad_us=0.0)
            last = last._replace(input_grad_us=share * last.input_grad_us)
        stored, first_stored, last_stored = (
            self._stored_bytes(module, size, part) if has_backward else 0
            for part in ("linear", "first_extra", "last_extra")
        )
        return Item(
            item=number,
            tokens=size.tokens,
            forward_us=layer.forward_us,
            input_grad_us=layer.input_grad_us,
            weight_grad_us=layer.weight_grad_us,
            activation_bytes=stored,
            first_extra_activation_bytes=first_stored,
            last_extra_activation_bytes=last_stored,
            boundary_bytes=shape_boundary(module, self.memory.parallel).num_bytes(
                size, bytes_per_value=self.memory.kernels.bytes_per_value
            ),
            first_extra_forward_us=first.forward_us,
            first_extra_input_grad_us=first.input_grad_us,
            first_extra_weight_grad_us=first.weight_grad_us,
            last_extra_forward_us=last.forward_us,
            last_extra_input_grad_us=last.input_grad_us,
            last_extra_weight_grad_us=last.weight_grad_us,
            needs=dict(size.needs) or None,
            token_pairs=size.token_pairs,
        )

    def _stored_bytes(self, module: ModuleShape, size: ItemSize, part: StoredPart) -> int:
        is_entered = self._first_with_backward[module.name] < module.num_layers
        return self.memory.stored_bytes(module, size, part, is_entered=is_entered)


def _if_other(value: bool, default: bool) -> bool | None:
    return None if value == default else value
