"""Toy modules in float64 for the executor's tests: what is computed, without any schedule.

A layer mixes the values of one row.  A module's first stage adds to each of its items the means of
the upstream items that it reads, weighted by their numbers, so that every gradient path counts and
none can stand in for another.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from megatron_dip.costs import BatchSizes, ItemSize
from megatron_dip.partition import Partition, Stage
from megatron_dip.plan import Work
from megatron_dip.runtime import ForwardCall, StageInput
from megatron_dip.workload import (
    HostLink,
    Item,
    LayerExtra,
    Module,
    Problem,
    SubMicrobatch,
    TransferCost,
)

__all__ = ["WIDTH", "Case", "ToyStage", "build_stages", "plain_loop"]

WIDTH = 5

Cut = dict[str, list[list[int]]]
ItemKey = tuple[str, int, int]
"""Module, microbatch, item."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A module graph, a batch and a cut."""

    name: str
    upstream: dict[str, tuple[str, ...]]
    batch: list[dict[str, list[int]]]
    """Tokens of every item, per microbatch and module."""
    cut: Cut
    frozen: tuple[str, ...] = ()
    parts: dict[str, tuple[tuple[tuple[int, int], ...], bool]] = field(default_factory=dict)
    """Modules with a projector after their last layer: which layers are trained, as pairs of a
    first one and the one after a last, and whether the projector is."""
    max_tokens: dict[str, int | None] = field(default_factory=dict)
    needs: dict[ItemKey, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    split_backward: bool = False
    recompute: bool = False
    """Of every layer that has a backward; with ``offload`` of every other one."""
    offload: bool = False
    """Of all layers that have a backward and are not recomputed."""
    algorithm: Literal["dual_queue", "one_f_one_b"] = "dual_queue"

    def problem(self, num_ranks: int) -> Problem:
        return Problem(
            num_ranks=num_ranks,
            memory_limit_bytes=(10**12,) * num_ranks,
            transfer=TransferCost(latency_us=1.0, bytes_per_us=1000.0),
            host_link=HostLink(
                latency_us=1.0, bytes_per_us=1000.0, memory_bytes=(2**30,) * num_ranks
            )
            if self.offload
            else None,
            modules=tuple(
                Module(
                    name=name,
                    num_layers=sum(sum(segment) for segment in self.cut[name]),
                    upstream=upstream,
                    trainable=self._trains(name),
                    layer_overhead_us=1.0,
                    layer_static_bytes=1,
                    **self._part_fields(name),
                )
                for name, upstream in self.upstream.items()
            ),
            microbatches=tuple(
                {
                    name: tuple(self._item(number, name, item, tokens) for item, tokens in items)
                    for name, items in ((n, list(enumerate(t))) for n, t in microbatch.items())
                    if items
                }
                for number, microbatch in enumerate(self.batch)
            ),
        )

    def sizes(self) -> BatchSizes:
        """Of the items of the batch."""
        return tuple(
            {
                name: [
                    ItemSize(
                        tokens=tokens,
                        spans=(tokens,),
                        needs=self.needs.get((name, number, item), {}),
                        loss_tokens=tokens,
                    )
                    for item, tokens in enumerate(items)
                ]
                for name, items in microbatch.items()
            }
            for number, microbatch in enumerate(self.batch)
        )

    def _trains(self, module: str) -> bool:
        layers, projector = self.parts.get(module, ((), module not in self.frozen))
        return bool(layers) or projector

    def _part_fields(self, module: str) -> dict[str, Any]:
        if module not in self.parts:
            return {}
        layers, projector = self.parts[module]
        return {
            "trained_layers": layers,
            "first_layer_extra": LayerExtra(trainable=False),
            "last_layer_extra": LayerExtra(trainable=projector),
        }

    def trains_layer(self, module: str, layer: int) -> bool:
        """Whether a layer is trained."""
        if module not in self.parts:
            return module not in self.frozen
        return any(start <= layer < stop for start, stop in self.parts[module][0])

    def _item(self, microbatch: int, module: str, item: int, tokens: int) -> Item:
        return Item(
            item=item,
            tokens=tokens,
            forward_us=float(tokens),
            input_grad_us=float(tokens),
            weight_grad_us=float(tokens),
            activation_bytes=tokens,
            boundary_bytes=tokens,
            needs=self.needs.get((module, microbatch, item)),
        )

    def rows(self) -> dict[ItemKey, torch.Tensor]:
        """The input rows of every item, [tokens, WIDTH]."""
        generator = torch.Generator().manual_seed(7)
        return {
            (name, number, item): torch.randn(
                (tokens, WIDTH), generator=generator, dtype=torch.float64
            )
            for number, microbatch in enumerate(self.batch)
            for name, items in microbatch.items()
            for item, tokens in enumerate(items)
        }


class ToyStage(torch.nn.Module):
    """Some layers of one module; where the output is the loss, the sum of all squares."""

    def __init__(self, case: Case, stage: Stage) -> None:
        super().__init__()
        self._case = case
        is_last = stage.layers.stop == sum(map(sum, case.cut[stage.module]))
        # As the partition has it: only the last rank may hold a last stage.
        self._has_projector = (
            stage.module in case.parts
            and is_last
            and stage.rank == len(case.cut[stage.module][0]) - 1
        )
        self.layers = torch.nn.ModuleDict(
            {str(layer): _make_layer(stage.module, layer) for layer in stage.layers}
        )
        for layer in stage.layers:
            self.layers[str(layer)].requires_grad_(case.trains_layer(stage.module, layer))
        if self._has_projector:
            self.projector = _make_layer(stage.module, layer=99)
            self.projector.requires_grad_(case.parts[stage.module][1])

    def forward(self, call: ForwardCall, rows_of: dict[ItemKey, torch.Tensor]) -> torch.Tensor:
        sub = call.sub_microbatch
        if call.inputs and call.inputs[0].sub_microbatch.module == sub.module:
            rows = call.inputs[0].tensor.squeeze(1)
        else:
            rows = self._enter(call, rows_of)
        for number, layer in self.layers.items():
            if int(number) in call.recompute_layers:
                rows = checkpoint(layer, rows, use_reentrant=False)
            elif call.offload is not None and int(number) in call.offload.layers:
                with call.offload.keeping():
                    rows = layer(rows)
            else:
                rows = layer(rows)
        if self._has_projector:
            rows = self.projector(rows)
        return (rows**2).sum() if call.is_loss else rows.unsqueeze(1)

    def _enter(self, call: ForwardCall, rows_of: dict[ItemKey, torch.Tensor]) -> torch.Tensor:
        sub = call.sub_microbatch
        upstream: dict[ItemKey, torch.Tensor] = {}
        for source in call.inputs:
            module, microbatch, _, items = source.sub_microbatch
            counts = [len(rows_of[module, microbatch, item]) for item in items]
            parts = source.tensor.squeeze(1).split(counts)
            for item, part in zip(items, parts, strict=True):
                upstream[module, microbatch, item] = part
        entered = []
        for number in sub.items:
            key = (sub.module, sub.microbatch, number)
            rows = rows_of[key]
            needs = self._case.needs.get(key, {})
            for (module, _, other), features in sorted(upstream.items()):
                if module not in needs or other in needs[module]:
                    rows = rows + (1 + other) * features.mean(dim=0)
            entered.append(rows)
        return torch.cat(entered)


def _make_layer(module: str, layer: int) -> torch.nn.Module:
    torch.manual_seed(1000 * len(module) + layer)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH, dtype=torch.float64), torch.nn.Tanh())


def build_stages(case: Case, stages: tuple[Stage, ...]) -> dict[int, ToyStage]:
    """Stages with the same weights wherever they are built."""
    return {stage.stage: ToyStage(case, stage) for stage in stages}


def plain_loop(
    case: Case, problem: Problem, partition: Partition
) -> tuple[float, dict[tuple[int, str], torch.Tensor | None]]:
    """Loss and gradients by stage and parameter: whole microbatches, one after another."""
    stages = build_stages(case, partition.stages)
    rows_of = case.rows()
    total = 0.0
    for number in range(problem.num_microbatches):
        outputs: dict[str, StageInput] = {}
        for name in problem.module_order:
            items = tuple(item.item for item in problem.items(name, number))
            if items:
                sub = SubMicrobatch(name, number, 0, items)
                outputs[name] = _run_module(problem, partition, stages, sub, outputs, rows_of)
        loss = outputs[problem.module_order[-1]].tensor
        if loss.requires_grad:
            loss.backward()
        total += float(loss.detach())
    grads = {
        (number, name): parameter.grad
        for number, stage in stages.items()
        for name, parameter in stage.named_parameters()
    }
    return total, grads


def _run_module(
    problem: Problem,
    partition: Partition,
    stages: dict[int, ToyStage],
    sub: SubMicrobatch,
    outputs: dict[str, StageInput],
    rows_of: dict[ItemKey, torch.Tensor],
) -> StageInput:
    upstream = problem.module(sub.module).upstream
    inputs = tuple(outputs[name] for name in upstream if name in outputs)
    chain = partition.chains[sub.module]
    for stage in chain:
        is_last = sub.module == problem.module_order[-1] and stage == chain[-1]
        call = ForwardCall(
            work=Work(stage.stage, sub.microbatch, sub.sub),
            stage=stage,
            sub_microbatch=sub,
            sizes=(),
            inputs=inputs,
            recompute_layers=(),
            offload=None,
            is_loss=is_last,
        )
        inputs = (StageInput(sub, (), stages[stage.stage](call, rows_of)),)
    return inputs[0]
