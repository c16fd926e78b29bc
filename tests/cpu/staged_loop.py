"""Any staged model in one process, without plans: every stage in turn, forward and then backward.

``run_whole`` runs a model as its constructor makes it and ``run_stages`` its stages with the same
weights; both return losses and gradients by global name.  Messages are checked against the model's
boundaries, and weights against the rule that every parameter is in exactly one stage.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_dip.models.batches import needed
from megatron_dip.models.offload import offloaded_layers
from megatron_dip.models.recompute import recomputed_layers
from megatron_dip.models.staged import Part, Received, RunFacts, StagedModel
from megatron_dip.runtime.offload import OffloadedLayers, Offloader

# ``forward_step`` of a script: from an iterator and a model to its output and its loss function.
type ForwardStep = Callable[[Iterator[Any], torch.nn.Module], tuple[Any, Callable[[Any], Any]]]

_IS_FIRST_RANK = "megatron.core.models.common.language_module.language_module.is_pp_first_stage"

RUN = RunFacts(num_pipeline_ranks=2, num_tensor_ranks=1, num_context_ranks=1)


class Setting(NamedTuple):
    """A class of model with what its constructor gets, and how a script calls it."""

    model_class: type[torch.nn.Module]
    staged_class: type[StagedModel]
    arguments: Mapping[str, Any]
    """Makes the whole model; new ones for every model, if a function makes them."""
    step: ForwardStep
    prepare: Callable[[torch.nn.Module], None] = lambda model: None
    """What a script does with a model that it has made, such as freezing."""


@dataclass
class Outcome:
    """Of a microbatch."""

    loss: float = 0.0
    num_tokens: int = 0
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    trained: dict[str, bool] = field(default_factory=dict)


def run_whole(setting: Setting, batch: Any) -> Outcome:
    """The model in one piece."""
    model = _with_weights(setting.model_class(**setting.arguments))
    setting.prepare(model)
    outcome = Outcome()
    output, loss_function = setting.step(iter([batch]), model)
    loss, num_tokens = loss_function(output)[:2]
    loss.backward()
    outcome.loss, outcome.num_tokens = loss.item(), int(num_tokens)
    _collect(outcome, model)
    return outcome


def run_stages(
    setting: Setting,
    batch: Any,
    cuts: Mapping[str, Sequence[int]],
    groups: Mapping[str, Sequence[Sequence[int]]] | None = None,
    run: RunFacts = RUN,
    without_data: Callable[[Part], Any] | None = None,
    recompute: Collection[int] = (),
    offload: Collection[int] = (),
) -> Outcome:
    """The model in stages.

    Args:
        setting: Of the model.
        batch: One raw microbatch.
        cuts: Per module, the number of layers of each of its stages.
        groups: Per module, the items of each of its sub-microbatches; all in one if not named.
        run: Facts of the launch that is stood in for.
        without_data: What the script finds in a stage's batch in place of the part, where its
            rank has no data; None says that it has.
        recompute: Numbers of layers, in every module, that keep only their input.
        offload: The same of layers that are on the host from their forward to their backward.
    """
    staged = setting.staged_class(_bound(setting), run)
    sizes = staged.items(batch)
    stages = {name: _build(setting, staged, name, layers) for name, layers in cuts.items()}
    assert [shape.name for shape in staged.modules()] == list(cuts)
    outcome = Outcome()
    pass_ = _Pass(setting, staged, stages, sizes, batch, without_data, recompute, offload)
    for shape in staged.modules():
        every = [range(len(sizes.get(shape.name, ())))]
        for items in (groups or {}).get(shape.name, every):
            if len(items):
                pass_.forward(shape, tuple(items), outcome)
    pass_.backward()
    assert (pass_.offloader.moved_bytes > 0) == bool(offload)
    seen: dict[str, int] = defaultdict(int)
    for module in stages.values():
        for _, model in module:
            _collect(outcome, model, seen)
    return outcome


def assert_same(
    ours: Outcome, whole: Outcome, *, tolerance: float = 0.0, loss_tolerance: float = 0.0
) -> None:
    """Equal losses and gradients, bit for bit unless a tolerance says otherwise.

    Args:
        tolerance: Of gradients, relative to the largest of a weight: sums over the rows of a
            message are in another order where its layout in memory is another one.
        loss_tolerance: Of the loss, which is a sum over parts where a microbatch is split.
    """
    assert ours.num_tokens == whole.num_tokens
    torch.testing.assert_close(ours.loss, whole.loss, rtol=loss_tolerance, atol=0.0)
    assert ours.trained == whole.trained
    for name, gradient in whole.gradients.items():
        found = ours.gradients[name]
        if gradient is None or found is None:
            assert gradient is found, f"{name}: {gradient} in one piece and {found} in stages"
            continue
        assert gradient.abs().max() > 0, f"{name}: a gradient of zeros shows nothing"
        torch.testing.assert_close(
            found,
            gradient,
            rtol=tolerance,
            atol=tolerance * float(gradient.abs().max()),
            msg=lambda text, name=name: f"{name}: {text}",
        )


class _Pass:
    """One microbatch on its way through all stages."""

    def __init__(
        self,
        setting: Setting,
        staged: StagedModel,
        stages: Mapping[str, list[tuple[Part, torch.nn.Module]]],
        sizes: Mapping[str, Any],
        batch: Any,
        without_data: Callable[[Part], Any] | None,
        recompute: Collection[int],
        offload: Collection[int],
    ) -> None:
        self.setting, self.staged, self.stages = setting, staged, stages
        self.sizes, self.batch, self.without_data = sizes, batch, without_data
        self.recompute, self.offload = recompute, offload
        self.offloader = Offloader(torch.device("cpu"), block_bytes=4096)
        self.offloader.most_bytes = 2**30
        self.sent: dict[str, list[Received]] = defaultdict(list)
        self.steps: list[tuple[Tensor, list[tuple[Tensor, Tensor]], OffloadedLayers]] = []
        """Outputs with the messages they were made of: (as sent, as received)."""

    def forward(self, shape: Any, items: tuple[int, ...], outcome: Outcome) -> None:
        staged, sizes = self.staged, tuple(self.sizes[shape.name][item] for item in items)
        links: list[tuple[Tensor, Tensor]] = []
        received = [
            self._receive(message, links, sizes)
            for name in shape.upstream
            for message in self.sent[name]
        ]
        received = [message for message in received if message.items]
        for part, model in self.stages[shape.name]:
            model.set_input_tensor(staged.inputs(part, received))
            data = None if self.without_data is None else self.without_data(part)
            if data is None:
                data = staged.part_of(self.batch, part, items)
                assert data is not self.batch
            layers = [layer for layer in part.layers if layer in self.recompute]
            moved = tuple(layer for layer in part.layers if layer in self.offload)
            offload = OffloadedLayers(self.offloader, moved)
            with (
                staged.calling(part, sizes),
                recomputed_layers(model, layers),
                offloaded_layers(model, offload),
            ):
                output, loss_function = self.setting.step(iter([data]), model)
            offload.copy_out(tensor for link in links for tensor in link)
            offload.release()
            if shape.name == list(self.stages)[-1] and part.last:
                loss, num_tokens = loss_function(output)[:2]
                assert int(num_tokens) == sum(size.loss_tokens for size in sizes)
                outcome.loss += loss.item()
                outcome.num_tokens += int(num_tokens)
                self.steps.append((loss, links, offload))
                return
            self._check(shape.name, part, output, sizes)
            # What a stage gave is freed once it was sent; what it got is another stage's.
            assert all(output is not arrived for _, arrived in links), f"{part} gives what it got"
            self.steps.append((output, links, offload))
            links = []
            message = Received(shape.name, items, sizes, output)
            if part.last:
                self.sent[shape.name].append(message)
            else:
                received = [self._arrive(message, links)]

    def _receive(self, message: Received, links: list[Any], sizes: Sequence[Any]) -> Received:
        dim = 1 if self.staged.boundary(message.module, outer=True).form == "batched" else 0
        if not needed(message, sizes, dim).items:
            return message._replace(items=())
        return needed(self._arrive(message, links), sizes, dim)

    def _arrive(self, message: Received, links: list[tuple[Tensor, Tensor]]) -> Received:
        arrived = message.tensor.detach().requires_grad_(message.tensor.requires_grad)
        links.append((message.tensor, arrived))
        return message._replace(tensor=arrived)

    def _check(self, module: str, part: Part, output: Tensor, sizes: Sequence[Any]) -> None:
        shape = self.staged.boundary(module, outer=part.last).shape(sizes, outer=part.last)
        assert tuple(output.shape) == shape, f"{part}: {tuple(output.shape)}, but {shape} is stated"

    def backward(self) -> None:
        gradients: dict[int, Tensor] = {}
        for output, links, offload in reversed(self.steps):
            offload.take_again()
            offload.copy_back()
            gradient = gradients.pop(id(output), None)
            if output.dim() and gradient is None:
                continue
            if output.requires_grad:
                torch.autograd.backward(output, gradient)
            for sent, arrived in links:
                if arrived.grad is not None:
                    known = gradients.get(id(sent))
                    gradients[id(sent)] = arrived.grad if known is None else known + arrived.grad


def _bound(setting: Setting) -> dict[str, Any]:
    bound = inspect.signature(setting.model_class.__init__).bind(None, **setting.arguments)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != "self"}


def _build(
    setting: Setting, staged: StagedModel, module: str, layers: Sequence[int]
) -> list[tuple[Part, torch.nn.Module]]:
    built, start = [], 0
    for index, count in enumerate(layers):
        part = Part(module, start, count, first=index == 0, last=index == len(layers) - 1)
        start += count
        # A tied head asks for its rank, which is another one than that of the embedding.
        with staged.constructing(part), patch(_IS_FIRST_RANK, lambda group, part=part: part.first):
            arguments = {**_bound(setting), **staged.stage_arguments(part)}
            model = setting.model_class(**arguments)
        staged.finish(model, part)
        _with_weights(model)
        setting.prepare(model)
        built.append((part, model))
    return built


def global_names(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters by names in which layers have their global numbers, from 0."""
    renamed = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "layer_number", None), int) and name.split(".")[-1].isdigit():
            renamed[f"{name}."] = f"{name.rsplit('.', 1)[0]}.{module.layer_number - 1}."
    for name, parameter in model.named_parameters():
        prefix = next((prefix for prefix in renamed if name.startswith(prefix)), None)
        yield (renamed[prefix] + name[len(prefix) :] if prefix else name), parameter


def _with_weights(model: torch.nn.Module) -> torch.nn.Module:
    # Norms are made in torch's default type; rounding of 64 bits hides nothing.
    set_weights(model.double())
    return model


def set_weights(model: torch.nn.Module) -> None:
    """Give every parameter values that its name says, so that all models have the same."""
    for name, parameter in global_names(model):
        generator = torch.Generator().manual_seed(sum(map(ord, _tied(model, name))))
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
        parameter.data.copy_(values + (1.0 if "norm" in name and name.endswith("weight") else 0.0))


def _tied(model: torch.nn.Module, name: str) -> str:
    """A head that shares its weight with the embedding has the embedding's values."""
    if getattr(model, "share_embeddings_and_output_weights", False):
        return name.replace("output_layer.weight", "embedding.word_embeddings.weight")
    return name


def _collect(outcome: Outcome, model: torch.nn.Module, seen: dict[str, int] | None = None) -> None:
    for name, parameter in global_names(model):
        key = _tied(model, name)
        if seen is not None:
            seen[key] += 1
            # A tied weight, and an embedding that predicted tokens read, is in two stages.
            assert seen[key] == 1 or "embedding" in key, f"{name} is in several stages"
        known = outcome.gradients.get(key)
        gradient = parameter.grad
        if known is not None and gradient is not None:
            gradient = known + gradient
        outcome.gradients[key] = known if gradient is None else gradient
        outcome.trained[key] = outcome.trained.get(key, False) or parameter.requires_grad
