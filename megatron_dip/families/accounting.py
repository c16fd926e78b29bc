"""Megatron's reports of operations and memory, of the whole model and of what is in the batches.

Its own formulas see the arguments of the command line: the module with the loss alone, at full
sequences, with all of it trained.  Where a model is built from a configuration, its training loop
gets these numbers instead, under either schedule: ``--log-throughput`` and the operations that a
checkpoint counts, and the estimate of memory after the first iteration.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args, training

from megatron_dip.costs import ItemSizes, ProblemBuilder
from megatron_dip.costs.flops import batch_flops
from megatron_dip.costs.work import static_bytes
from megatron_dip.families.forms import FamilyConfig
from megatron_dip.families.packed.batches import Microbatch
from megatron_dip.integration.stages import place_of
from megatron_dip.integration.versions import needed
from megatron_dip.planner.baselines.flat_chain import FlatChain, StaticCut
from megatron_dip.planner.baselines.static import StaticSimulator

__all__ = [
    "BatchAccounting",
    "RankMemory",
    "note_microbatch",
    "planned_memory",
    "stock_memory",
    "use_accounting",
]

_OPERATIONS, _MEMORY = "num_floating_point_operations", "report_theoretical_memory"
_MEGABYTE = 2**20


class RankMemory(NamedTuple):
    """What a rank is predicted to hold."""

    static_bytes: int
    """Weights, gradients and optimizer state."""
    activation_bytes: int
    """At most, in the step asked about."""


MemoryOf = Callable[[Sequence[ItemSizes]], RankMemory]


class BatchAccounting:
    """Stands for Megatron's ``num_floating_point_operations``.

    The training loop asks once after every step, and its log again for the step that it shows.
    The log divides by the mean time of the steps since it was last written, so it is given the
    mean of their operations: they differ from step to step.
    """

    def __init__(self, config: FamilyConfig, memory_of: MemoryOf) -> None:
        self._model = config.model_shape()
        self._memory_of = memory_of
        self._last: list[ItemSizes] = []
        self._noted: dict[int, Microbatch] = {}
        """By identity: a step that is run again reads the same microbatches."""
        self._since_log: list[float] = []
        self._num_steps = 0
        self._counted: int | None = None
        """The iteration whose step was counted last."""

    def note(self, microbatch: Microbatch) -> None:
        """Count a microbatch of the step under way."""
        self._noted[id(microbatch)] = microbatch

    def __call__(self, *_: Any, **__: Any) -> float:
        """Operations of a global batch; a collective call of replicas after every step.

        Under plans a rank between the first and the last one may not run all microbatches, and
        counts those that it runs.
        """
        iteration = get_args().curr_iteration
        if iteration == self._counted:
            return self._mean_since_log()
        self._counted = iteration
        self._last = sizes = [microbatch.item_sizes for microbatch in self._noted.values()]
        self._noted = {}
        device = torch.device("cuda", torch.cuda.current_device())
        total = torch.tensor([batch_flops(self._model, sizes)], dtype=torch.float64).to(device)
        dist.all_reduce(total, group=mpu.get_data_parallel_group())
        if not total:
            # A step that was skipped (``--iterations-to-skip``).
            return self._mean_since_log()
        self._since_log.append(float(total))
        self._num_steps += 1
        return self._since_log[-1]

    def report_memory(self, *_: Any, **__: Any) -> None:
        """Stands for Megatron's ``report_theoretical_memory``: of this rank, in the last step."""
        memory = self._memory_of(self._last)
        static, activations = (part / _MEGABYTE for part in memory)
        print(
            f"Predicted memory of this rank: weight and optimizer={static:.2f} MB, "
            f"activation={activations:.2f} MB, total={static + activations:.2f} MB",
            flush=True,
        )

    def _mean_since_log(self) -> float:
        mean = sum(self._since_log) / max(1, len(self._since_log))
        # Its log of the very first step leaves Megatron's timer as it is.
        if self._num_steps > 1:
            self._since_log = []
        return mean


def use_accounting(accounting: BatchAccounting) -> None:
    """Have this run's training loop report by ``accounting``."""
    for name, report in ((_OPERATIONS, accounting), (_MEMORY, accounting.report_memory)):
        needed(training, name)
        setattr(training, name, report)


def note_microbatch(microbatch: Microbatch) -> None:
    """Tell the run's accounting, if it has one, what the step under way trains on."""
    accounting = getattr(training, _OPERATIONS, None)
    if isinstance(accounting, BatchAccounting):
        accounting.note(microbatch)


def planned_memory(model: torch.nn.Module) -> MemoryOf:
    """Of the plan that ran last; ``model`` is one of the stages of this rank."""

    def memory_of(_: Sequence[ItemSizes]) -> RankMemory:
        pipeline = place_of(model).pipeline
        plan, rank = pipeline.executor.last_plan, pipeline.rank
        assert plan is not None and plan.estimate is not None, "a plan has run, with its estimate"
        static = static_bytes(plan.problem, plan.partition, rank)
        return RankMemory(static, plan.estimate.peak_bytes[rank] - static)

    return memory_of


def stock_memory(builder: ProblemBuilder, config: TransformerConfig) -> MemoryOf:
    """Of Megatron's own schedule, with all encoders on the first rank."""
    rank = mpu.get_pipeline_model_parallel_rank()
    num_ranks = mpu.get_pipeline_model_parallel_world_size()
    own = replace(builder, num_ranks=num_ranks)

    def memory_of(sizes: Sequence[ItemSizes]) -> RankMemory:
        *encoders, _ = own.model.modules
        layers = [get_num_layers_to_build(config, pp_rank=number) for number in range(num_ranks)]
        layers[0] += sum(module.num_layers for module in encoders)
        cut = StaticCut(num_ranks=num_ranks, num_layers=tuple(layers))
        run = StaticSimulator(FlatChain(own.build(sizes))).run(cut)
        static = int(run.costs.total.static_bytes[rank])
        return RankMemory(static, run.peak_bytes[rank] - static)

    return memory_of
