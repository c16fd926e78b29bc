"""What the executor asks of the stages: forward, backward in one or two parts, gradient reduction.

The executor decides when; a runner knows how.  :class:`ModuleRunner` runs plain ``nn.Module``
stages; the runner of Megatron's stages is in ``integration``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from megatron_dip.costs import ItemSize
from megatron_dip.partition import Stage
from megatron_dip.plan import Work
from megatron_dip.runtime.offload import OffloadedLayers
from megatron_dip.runtime.reductions import Reduction
from megatron_dip.workload import SubMicrobatch

__all__ = [
    "ForwardCall",
    "ModuleRunner",
    "SavedForward",
    "StageInput",
    "StageRunner",
]


class StageInput(NamedTuple):
    """What a stage reads: the output of ``sub_microbatch``'s module as a leaf of the graph."""

    sub_microbatch: SubMicrobatch
    sizes: tuple[ItemSize, ...]
    """Of its items."""
    tensor: torch.Tensor


class ForwardCall(NamedTuple):
    """One forward of one stage."""

    work: Work
    stage: Stage
    sub_microbatch: SubMicrobatch
    sizes: tuple[ItemSize, ...]
    """Of its items."""
    inputs: tuple[StageInput, ...]
    """From the previous stage, or, in a module's first stage, from its upstream modules."""
    recompute_layers: tuple[int, ...]
    offload: OffloadedLayers | None
    """Layers of which what they save may be moved; None without."""
    is_loss: bool
    """True in the last stage of a module that no other reads: the output is a scalar loss."""


@dataclass(kw_only=True, slots=True)
class SavedForward:
    """What a backward needs of its forward."""

    call: ForwardCall
    output: torch.Tensor
    output_grad: torch.Tensor | None = None
    """Kept from the input-gradient to the weight-gradient half of a split backward."""

    @property
    def input_tensors(self) -> list[torch.Tensor]:
        return [stage_input.tensor for stage_input in self.call.inputs]


class StageRunner(Protocol):
    """How stages compute; gradients of inputs are returned in the order of ``call.inputs``."""

    def prepare(self, work: Work, stage: Stage, sub_microbatch: SubMicrobatch) -> None:
        """The forward of ``work`` comes next: what it reads of the host may be moved by now."""

    def forward(self, call: ForwardCall) -> torch.Tensor: ...

    def backward(
        self, saved: SavedForward, output_grad: torch.Tensor | None
    ) -> list[torch.Tensor | None]: ...

    def input_grad(
        self, saved: SavedForward, output_grad: torch.Tensor | None
    ) -> list[torch.Tensor | None]: ...

    def weight_grad(self, saved: SavedForward) -> None: ...

    def release_output(self, saved: SavedForward) -> None:
        """Free the output's memory: it was sent, and a backward reads only its graph."""

    def reductions(self, stage: Stage) -> Sequence[Reduction]:
        """Those of a stage's gradients over its data-parallel replicas, to be started in order."""


StageFunction = Callable[[ForwardCall, Any], torch.Tensor]


class ModuleRunner:
    """Runs plain modules.

    Args:
        stages: Per stage number a module called as ``module(call, data)``; the last stage of a
            module that no other reads returns the scalar sum of its losses.
        data: Passed through to every call.
        loss_weight: Factor of the loss of one call, so that the losses of a microbatch's
            sub-microbatches sum to that of the whole; 1 where not given.
        data_parallel_group: Gradients are averaged over it in the order of REDUCE_GRAD actions.
    """

    def __init__(
        self,
        stages: Mapping[int, torch.nn.Module],
        data: Any = None,
        loss_weight: Callable[[ForwardCall], float] | None = None,
        data_parallel_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._stages = dict(stages)
        self._data = data
        self._loss_weight = loss_weight
        self._group = data_parallel_group
        self._reductions: list[_ModuleReduction] = []
        self.losses: dict[Work, torch.Tensor] = {}

    def prepare(self, work: Work, stage: Stage, sub_microbatch: SubMicrobatch) -> None:
        """The data are where the caller has put them."""

    def forward(self, call: ForwardCall) -> torch.Tensor:
        output: torch.Tensor = self._stages[call.stage.stage](call, self._data)
        if call.is_loss:
            if self._loss_weight is not None:
                output = output * self._loss_weight(call)
            self.losses[call.work] = output.detach()
        return output

    def backward(
        self, saved: SavedForward, output_grad: torch.Tensor | None
    ) -> list[torch.Tensor | None]:
        if saved.output.requires_grad:
            torch.autograd.backward(saved.output, output_grad)
        return [tensor.grad for tensor in saved.input_tensors]

    def input_grad(
        self, saved: SavedForward, output_grad: torch.Tensor | None
    ) -> list[torch.Tensor | None]:
        return _backward_inputs(saved, output_grad)

    def weight_grad(self, saved: SavedForward) -> None:
        _backward_weights(saved, self._stages[saved.call.stage.stage])

    def release_output(self, saved: SavedForward) -> None:
        """Plain autograd checks the output's shape in backward, so it stays."""

    def reductions(self, stage: Stage) -> Sequence[Reduction]:
        module = self._stages[stage.stage]
        if self._group is None or not any(p.requires_grad for p in module.parameters()):
            return ()
        reduction = _ModuleReduction(module, self._group)
        self._reductions.append(reduction)
        return (reduction,)

    def finish_reductions(self) -> None:
        """Wait for all reductions and put their results into the gradients."""
        for reduction in self._reductions:
            reduction.finish()
        self._reductions = []


class _ModuleReduction:
    """The mean of a module's gradients over a group."""

    def __init__(self, module: torch.nn.Module, group: dist.ProcessGroup) -> None:
        self._module, self._group = module, group
        self._work: dist.Work | None = None
        self._flat = torch.empty(0)

    def start(self) -> None:
        grads = _trainable_grads(self._module)
        self._flat = torch.cat([grad.reshape(-1) for grad in grads]) / self._group.size()
        self._work = dist.all_reduce(self._flat, group=self._group, async_op=True)

    def is_ended(self) -> bool:
        return self._work is not None and self._work.is_completed()

    def finish(self) -> None:
        assert self._work is not None, "the plan starts every reduction"
        self._work.wait()
        grads = _trainable_grads(self._module)
        pieces: Sequence[torch.Tensor] = self._flat.split([grad.numel() for grad in grads])
        for grad, piece in zip(grads, pieces, strict=True):
            grad.copy_(piece.view_as(grad))


def _backward_inputs(
    saved: SavedForward, output_grad: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """Gradients of a forward's inputs alone; its graph stays for :func:`_backward_weights`."""
    wanted = [tensor for tensor in saved.input_tensors if tensor.requires_grad]
    if wanted and saved.output.requires_grad:
        torch.autograd.backward(saved.output, output_grad, inputs=wanted, retain_graph=True)
    return [tensor.grad for tensor in saved.input_tensors]


def _backward_weights(saved: SavedForward, module: torch.nn.Module) -> None:
    """Gradients of a module's parameters alone, after :func:`_backward_inputs`.

    Autograd walks the graph a second time for them: the halves together cost more than one full
    backward.  They pay only where layers keep their weight gradients apart themselves.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if parameters and saved.output.requires_grad:
        torch.autograd.backward(saved.output, saved.output_grad, inputs=parameters)


def _trainable_grads(module: torch.nn.Module) -> list[torch.Tensor]:
    """Gradients of all trainable parameters; zeros where a batch did not reach one."""
    grads = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
    return grads
