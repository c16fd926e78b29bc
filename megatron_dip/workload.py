"""The batch problem: what one batch is, as numbers.

A *problem* is everything that the planner needs to know: the modules and their graph, the items
of every microbatch with their costs, and the limits of the machine.  It holds no tensors.
Times are microseconds per layer and item; bytes are per layer and item.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from megatron_dip.errors import ProblemError, shown
from megatron_dip.forms import Form, digest_of
from megatron_dip.limits import (
    MOST_BYTES_IN_ALL,
    Bytes,
    Count,
    Factor,
    Layer,
    Layers,
    MemoryLimit,
    Pairs,
    Ranks,
    Rate,
    Time,
)
from megatron_dip.reading import read_json

__all__ = [
    "HostLink",
    "Item",
    "LayerExtra",
    "Module",
    "Problem",
    "StageFactor",
    "SubMicrobatch",
    "TransferCost",
    "load_problem",
    "parse_problem",
    "topological_order",
]


def _is_none(value: object) -> bool:
    # Fields that were added later do not appear where they say nothing: digests stay as they were.
    return value is None


class Item(Form):
    """The smallest unit of a module's work in a microbatch: an image, a clip, a sequence."""

    item: Count
    """Number of the item, unique within its module and microbatch."""
    tokens: Count
    forward_us: Time
    input_grad_us: Time
    weight_grad_us: Time
    """Zero where the layers are frozen."""
    activation_bytes: Bytes
    """Kept per layer from forward to backward, without recompute."""
    boundary_bytes: Bytes
    """Input or output of any layer: what a transfer moves and what a recomputed layer keeps."""
    recompute_us: Time | None = None
    """Forward again during backward; ``forward_us`` where it is not given."""
    first_extra_forward_us: Time = 0.0
    first_extra_input_grad_us: Time = 0.0
    first_extra_weight_grad_us: Time = 0.0
    last_extra_forward_us: Time = 0.0
    last_extra_input_grad_us: Time = 0.0
    last_extra_weight_grad_us: Time = 0.0
    first_extra_activation_bytes: Bytes = 0
    """Kept by what sits before the first layer, whether layers are recomputed or not."""
    last_extra_activation_bytes: Bytes = 0
    needs: dict[str, tuple[Count, ...]] | None = None
    """Upstream items that this one reads, per module; a module not named: all of the microbatch."""
    token_pairs: Pairs | None = Field(default=None, exclude_if=_is_none)
    """Pairs of a token and one that it may attend to: what times are fitted to, beside tokens."""

    @property
    def effective_recompute_us(self) -> float:
        return self.forward_us if self.recompute_us is None else self.recompute_us


_LATER_ITEM_FIELDS = ("first_extra_activation_bytes", "last_extra_activation_bytes")

LayerRange = tuple[Layer, Layer]


class LayerExtra(Form):
    """What sits before the first or after the last layer of a module, beside its items."""

    forward_us: Time = 0.0
    static_bytes: Bytes = 0
    trainable: bool | None = Field(default=None, exclude_if=_is_none)
    """Whether anything in it is trained; as in the whole module where not given."""


class Module(Form):
    """One modality model."""

    name: Annotated[str, Field(min_length=1)]
    num_layers: Layers
    upstream: tuple[str, ...]
    """Modules whose output this one reads."""
    trainable: bool
    """Whether anything in it is trained."""
    trained_layers: tuple[LayerRange, ...] | None = Field(default=None, exclude_if=_is_none)
    """Pairs of a first layer and the one after a last: those that are trained.  Where not given,
    all of a trainable module and none of another."""
    layer_overhead_us: Time
    """Per layer and call, whatever its size (kernel launches)."""
    layer_static_bytes: Bytes
    """Weights, gradients and optimizer state of one layer."""
    frozen_layer_static_bytes: Bytes | None = Field(default=None, exclude_if=_is_none)
    """The same of a layer that is not trained; ``layer_static_bytes`` where not given."""
    first_layer_extra: LayerExtra = LayerExtra()
    last_layer_extra: LayerExtra = LayerExtra()

    @model_validator(mode="after")
    def _check(self) -> Self:
        ends = [0, *(end for layers in self.trained_layers or () for end in layers)]
        if ends != sorted(ends) or ends[-1] > self.num_layers:
            given = [list(layers) for layers in self.trained_layers or ()]
            raise ValueError(
                f"trained_layers {given}: expected ascending pairs of a first layer and the one "
                f"after a last, up to {self.num_layers}"
            )
        trains_any = bool(
            self.num_trained(range(self.num_layers))
            or self.trains_first_extra
            or self.trains_last_extra
        )
        if trains_any != self.trainable:
            raise ValueError(
                f"trainable is {str(self.trainable).lower()} but trained_layers and the extras say "
                f"that {'something' if trains_any else 'nothing'} is trained (expected the same)"
            )
        return self

    @property
    def trained_ranges(self) -> tuple[range, ...]:
        """The layers that are trained, ascending."""
        if self.trained_layers is None:
            return (range(self.num_layers),) if self.trainable else ()
        return tuple(range(*layers) for layers in self.trained_layers)

    @property
    def trains_first_extra(self) -> bool:
        trainable = self.first_layer_extra.trainable
        return self.trainable if trainable is None else trainable

    @property
    def trains_last_extra(self) -> bool:
        trainable = self.last_layer_extra.trainable
        return self.trainable if trainable is None else trainable

    def num_trained(self, layers: range) -> int:
        """How many of consecutive ``layers`` are trained."""
        return sum(len(_common(layers, trained)) for trained in self.trained_ranges)

    def first_with_backward(self, has_upstream: bool) -> int | None:
        """Where backwards of the module end.

        Args:
            has_upstream: Whether a gradient goes on to a module that this one reads.

        Returns:
            -1 with what sits before the first layer, the number of a layer, ``num_layers`` with
            what sits after the last, or None where the module has no backward at all.
        """
        if has_upstream or self.trains_first_extra:
            return -1
        trained = next((layers.start for layers in self.trained_ranges if layers), None)
        if trained is None and self.trains_last_extra:
            return self.num_layers
        return trained


def _common(layers: range, others: range) -> range:
    """What two ranges of consecutive numbers have in common."""
    return range(max(layers.start, others.start), min(layers.stop, others.stop))


class TransferCost(Form):
    """Time of a transfer between two ranks: latency plus bytes over bandwidth."""

    latency_us: Time
    bytes_per_us: Rate

    def time_us(self, num_bytes: int) -> float:
        return self.latency_us + num_bytes / self.bytes_per_us


class HostLink(Form):
    """Between the memory of a rank's device and that of its host: one copy at a time in each
    direction, neither delaying the other."""

    latency_us: Time
    bytes_per_us: Rate
    """What is left for activations; what else uses the link is taken off beforehand."""
    memory_bytes: tuple[MemoryLimit, ...]
    """Per rank: of the host, for activations that are away."""


class SubMicrobatch(NamedTuple):
    """A group of items of one module in one microbatch: what one compute action works on."""

    module: str
    microbatch: int
    sub: int
    items: tuple[int, ...]


class StageFactor(NamedTuple):
    """Measured over stated time of one stage."""

    forward: Factor = 1.0
    backward: Factor = 1.0
    """Of input and weight gradients, and of recomputation."""


class Problem(Form):
    """One batch, to be planned."""

    format: Literal["megatron-dip/problem"] = "megatron-dip/problem"
    version: Literal[1] = 1
    num_ranks: Ranks
    memory_limit_bytes: tuple[MemoryLimit, ...]
    """Per rank, weights included."""
    transfer: TransferCost
    modules: tuple[Module, ...]
    microbatches: tuple[dict[str, tuple[Item, ...]], ...]
    stage_factors: dict[Count, StageFactor] | None = None
    """By what the forwards and the backwards of a stage take longer than its items say, as measured
    on the rank that it is on; 1 where a stage is not named."""
    host_link: HostLink | None = Field(default=None, exclude_if=_is_none)
    """What activations can be offloaded over; nothing is offloaded where it is not given."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        limits = {"memory_limit_bytes": self.memory_limit_bytes}
        if self.host_link is not None:
            limits["host_link.memory_bytes"] = self.host_link.memory_bytes
        for name, given in limits.items():
            if len(given) != self.num_ranks:
                raise ValueError(
                    f"{name} has {len(given)} entries for {self.num_ranks} ranks (expected one "
                    f"per rank)"
                )
        if not self.modules or not self.microbatches:
            raise ValueError("modules and microbatches must not be empty")
        topological_order(self.modules)
        for number, microbatch in enumerate(self.microbatches):
            self._check_microbatch(number, microbatch)
        self._check_bytes()
        return self

    def _check_bytes(self) -> None:
        """What the planner adds up must stay within 64 bits."""
        for module in self.modules:
            extras = module.first_layer_extra.static_bytes + module.last_layer_extra.static_bytes
            most_static = max(module.layer_static_bytes, module.frozen_layer_static_bytes or 0)
            per_layer, once = most_static, extras
            for microbatch in self.microbatches:
                for item in microbatch.get(module.name, ()):
                    per_layer += item.activation_bytes + item.boundary_bytes
                    once += item.first_extra_activation_bytes + item.last_extra_activation_bytes
            total = per_layer * module.num_layers + once
            if total * len(self.modules) > MOST_BYTES_IN_ALL:
                raise ValueError(
                    f"module {module.name}: its weights and all items of the batch take "
                    f"{total:.2e} bytes in {module.num_layers} layers (expected at most "
                    f"{MOST_BYTES_IN_ALL / len(self.modules):.2e}: check activation_bytes, "
                    f"boundary_bytes and static bytes)"
                )

    def _check_microbatch(self, number: int, microbatch: Mapping[str, tuple[Item, ...]]) -> None:
        known = {module.name: module for module in self.modules}
        for name, items in microbatch.items():
            where = f"microbatches.{number}.{name}"
            if name not in known:
                raise ValueError(f"{where}: unknown module (expected one of {sorted(known)})")
            numbers = [item.item for item in items]
            if len(set(numbers)) != len(numbers):
                raise ValueError(f"{where}: item numbers repeat: {numbers}")
            for item in items:
                for upstream, needed in (item.needs or {}).items():
                    if upstream not in known[name].upstream:
                        raise ValueError(
                            f"{where}.{item.item}.needs: {shown(upstream)} is not upstream"
                        )
                    present = {other.item for other in microbatch.get(upstream, ())}
                    missing = sorted(set(needed) - present)
                    if missing:
                        raise ValueError(
                            f"{where}.{item.item}.needs.{upstream}: no such items {missing} "
                            f"(the microbatch has {sorted(present)})"
                        )

    @property
    def num_microbatches(self) -> int:
        return len(self.microbatches)

    @cached_property
    def _modules_by_name(self) -> dict[str, Module]:
        return {module.name: module for module in self.modules}

    @cached_property
    def _items_by_key(self) -> dict[tuple[int, str, int], Item]:
        return {
            (number, name, item.item): item
            for number, microbatch in enumerate(self.microbatches)
            for name, items in microbatch.items()
            for item in items
        }

    @cached_property
    def module_order(self) -> tuple[str, ...]:
        """Module names, every module after all that it reads."""
        return topological_order(self.modules)

    @cached_property
    def first_with_backward(self) -> Mapping[str, int]:
        """Where backwards of a module end, see :meth:`Module.first_with_backward`; modules without
        a backward are not in it."""
        found: dict[str, int] = {}
        for name in self.module_order:
            module = self.module(name)
            first = module.first_with_backward(not found.keys().isdisjoint(module.upstream))
            if first is not None:
                found[name] = first
        return found

    @property
    def modules_with_backward(self) -> frozenset[str]:
        """Modules with something trainable in them or upstream of them."""
        return frozenset(self.first_with_backward)

    def module(self, name: str) -> Module:
        return self._modules_by_name[name]

    def items(self, module: str, microbatch: int) -> tuple[Item, ...]:
        return self.microbatches[microbatch].get(module, ())

    def item(self, module: str, microbatch: int, number: int) -> Item:
        return self._items_by_key[microbatch, module, number]

    def needed_items(
        self, module: str, microbatch: int, item: Item, upstream: str
    ) -> frozenset[int]:
        """Numbers of the items of ``upstream`` that ``item`` of ``module`` reads."""
        if item.needs is not None and upstream in item.needs:
            return frozenset(item.needs[upstream])
        return frozenset(other.item for other in self.items(upstream, microbatch))

    def keeps_memory_limit(self, peak_bytes: Sequence[int]) -> bool:
        """Whether every rank's peak, weights included, is within its limit."""
        return all(
            peak <= limit for peak, limit in zip(peak_bytes, self.memory_limit_bytes, strict=True)
        )

    def digest(self) -> str:
        """As of every form; fields that were added later do not count where they say nothing, so
        that digests in older files stay true."""
        data = self.model_dump(mode="json")
        if self.stage_factors is None:
            del data["stage_factors"]
        for microbatch in data["microbatches"]:
            for items in microbatch.values():
                for item in items:
                    for name in _LATER_ITEM_FIELDS:
                        if not item[name]:
                            del item[name]
        return digest_of(data)


def topological_order(modules: tuple[Module, ...]) -> tuple[str, ...]:
    """Names of ``modules`` such that every module follows all of its ``upstream``.

    Ties keep the order given, so that the result is deterministic.

    Raises:
        ValueError: Names repeat, an upstream module is unknown, or the graph has a cycle.
    """
    names = [module.name for module in modules]
    if len(set(names)) != len(names):
        raise ValueError(f"modules: names repeat: {names}")
    for module in modules:
        unknown = [name for name in module.upstream if name not in names]
        if unknown:
            raise ValueError(f"modules.{module.name}.upstream: unknown modules {unknown}")
    done: list[str] = []
    waiting = list(modules)
    while waiting:
        ready = next((m for m in waiting if all(name in done for name in m.upstream)), None)
        if ready is None:
            raise ValueError(f"modules: upstream has a cycle through {[m.name for m in waiting]}")
        done.append(ready.name)
        waiting.remove(ready)
    return tuple(done)


def parse_problem(data: Mapping[str, Any], source: str = "") -> Problem:
    """A problem from parsed JSON.

    Raises:
        ProblemError: A field is missing, unknown, negative or contradicts another.
    """
    return Problem.parse(data, ProblemError, source)


def load_problem(path: str | Path) -> Problem:
    """The problem in a JSON file; see :func:`parse_problem`."""
    return parse_problem(read_json(path, ProblemError), str(path))
