"""Runs Megatron's stages for the executor, through Megatron's own forward and backward steps.

``schedules.forward_step`` and ``schedules.backward_step`` bring autocast, loss scaling, the
scalers of auxiliary losses and the script's ``forward_step`` with them, so that the loss means
what it means under Megatron's own schedule.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_viewless_tensor

from megatron_dip.integration.divided_rows import all_rows, own_rows
from megatron_dip.integration.losses import LossReports, weighted_forward_step
from megatron_dip.integration.parameter_gathers import finish_gathers
from megatron_dip.integration.pipeline import DipPipeline
from megatron_dip.integration.reductions import GradientChecks, bucket_reductions
from megatron_dip.integration.weight_gradients import StoredWeightGradients
from megatron_dip.models.batches import needed
from megatron_dip.models.offload import offloaded_layers
from megatron_dip.models.recompute import recomputed_layers
from megatron_dip.models.staged import Part, Received
from megatron_dip.partition import Stage
from megatron_dip.plan import Work
from megatron_dip.planner import PlannedBatch
from megatron_dip.runtime import (
    ForwardCall,
    Reduction,
    SavedForward,
    StageInput,
)
from megatron_dip.runtime.measure import StoredBytes
from megatron_dip.workload import SubMicrobatch

__all__ = ["ContextRank", "MegatronRunner"]


class ContextRank(NamedTuple):
    """A context-parallel rank."""

    rank: int
    num_ranks: int


class MegatronRunner:
    """The stages of one rank for one iteration.

    Args:
        pipeline: How the model of this run is cut.
        chunks: Wrapped chunks by stage number.
        forward_step: The script's own.
        batches: What the script's iterator yields, per microbatch; Nones on ranks without data.
        planned: What is run.
        config: The configuration that Megatron's training loop reads and writes.
        context: This rank among those that divide the rows of a sample among them.
        reduces_early: Whether a stage's gradients are reduced while others still compute.
        first_microbatch: False where cached fp8 weights stay valid (validation after its first).
        collect_non_loss_data: As in Megatron's schedules.
        counts_stored_bytes: Whether to count what autograd keeps, see ``stored``; a microsecond
            or two for every tensor.
    """

    def __init__(
        self,
        pipeline: DipPipeline,
        chunks: Mapping[int, torch.nn.Module],
        forward_step: Callable[..., Any],
        batches: Sequence[Any],
        planned: PlannedBatch,
        *,
        config: TransformerConfig,
        context: ContextRank,
        reduces_early: bool,
        first_microbatch: bool = True,
        collect_non_loss_data: bool = False,
        counts_stored_bytes: bool = False,
    ) -> None:
        self._staged = pipeline.staged
        self._partition = pipeline.partition
        self._device = pipeline.device
        self._feed = pipeline.feed
        # An iteration that failed may have left some.
        self._feed.begin()
        self._chunks = dict(chunks)
        self._config = config
        self._forward_step = forward_step
        self._batches = tuple(batches)
        self._planned = planned
        self._context = context
        self._tensor_group = mpu.get_tensor_model_parallel_group()
        self._reduces_early = reduces_early
        self._collect_non_loss_data = collect_non_loss_data
        splits = pipeline.config.schedule.split_backward
        self._stored_weights = {
            stage: StoredWeightGradients(chunk.modules() if splits else ())
            for stage, chunk in self._chunks.items()
        }
        self._put_off: dict[Work, tuple[int, ...]] = {}
        """Weight gradients that each backward has stored, per layer of its stage."""
        self._fresh_chunks = set(self._chunks) if first_microbatch else set()
        self.reports = LossReports()
        self.gradient_checks = GradientChecks()
        """Of gradients that were reduced early; to be finished before gradients are used."""
        self.stored: StoredBytes | None = None
        if counts_stored_bytes:
            parameters = [p for chunk in self._chunks.values() for p in chunk.parameters()]
            self.stored = StoredBytes(parameters)
        self.num_tokens = torch.zeros([], dtype=torch.int, device=pipeline.device)

    def prepare(self, work: Work, stage: Stage, sub_microbatch: SubMicrobatch) -> None:
        if self._batches[work.microbatch] is not None:
            part = Part.of(self._partition, stage)
            self._feed.start(work, partial(self._moved, work, part, sub_microbatch))

    def forward(self, call: ForwardCall) -> torch.Tensor:
        with self.stored.counting() if self.stored else nullcontext():
            return self._forward(call)

    def _forward(self, call: ForwardCall) -> torch.Tensor:
        number, stage = call.work.microbatch, call.stage.stage
        part = Part.of(self._partition, call.stage)
        chunk = self._chunks[stage]
        finish_gathers(chunk)
        store: list[Any] = []
        sizes = self._planned.sizes_of(call.sub_microbatch)
        if call.offload is not None:
            call.offload.stored = self.stored
        with (
            self._staged.calling(part, sizes),
            recomputed_layers(chunk, call.recompute_layers),
            offloaded_layers(chunk, call.offload),
        ):
            output, num_tokens = schedules.forward_step(
                self._forward_step_of(call),
                self._data(call, part),
                chunk,
                len(self._batches),
                self._inputs(call, part),
                store,
                self._config,
                self._context.num_ranks,
                collect_non_loss_data=self._collect_non_loss_data,
                is_first_microbatch=stage in self._fresh_chunks,
                current_microbatch=number,
                is_last_stage=call.is_loss,
            )
        self._fresh_chunks.discard(stage)
        for report in store:
            self.reports.add(number, report)
        self.num_tokens += num_tokens
        (tensor,) = output
        if call.is_loss:
            return tensor
        if part.last:
            rule = self._staged.boundary(part.module, outer=True)
            tensor = own_rows(tensor, rule, self._tensor_group)
        # A view would keep its base alive when its own memory is freed.
        viewless: torch.Tensor = make_viewless_tensor(
            tensor, requires_grad=tensor.requires_grad, keep_graph=True
        )
        return viewless

    def backward(
        self, saved: SavedForward, output_grad: torch.Tensor | None
    ) -> list[torch.Tensor | None]:
        grads = self.input_grad(saved, output_grad)
        self.weight_grad(saved)
        return grads

    def input_grad(
        self, saved: SavedForward, output_grad: torch.Tensor | None
    ) -> list[torch.Tensor | None]:
        """A whole backward, but for the weight gradients that layers put off.

        Not two walks of the graph: layers that add to their gradients themselves would do it twice.
        """
        stored = self._stored_weights[saved.call.stage.stage]
        before = stored.counts()
        inputs = [tensor if tensor.requires_grad else None for tensor in saved.input_tensors]
        grads: list[torch.Tensor | None] = schedules.backward_step(
            inputs, saved.output, output_grad, self._config
        )
        added = zip(stored.counts(), before, strict=True)
        self._put_off[saved.call.work] = tuple(now - earlier for now, earlier in added)
        return grads

    def weight_grad(self, saved: SavedForward) -> None:
        """What the layers have put off; nothing where they put nothing off."""
        put_off = self._put_off.pop(saved.call.work)
        self._stored_weights[saved.call.stage.stage].make(put_off)

    def release_output(self, saved: SavedForward) -> None:
        if not saved.call.is_loss:
            schedules.deallocate_output_tensor(
                saved.output, self._config.deallocate_pipeline_outputs
            )

    def reductions(self, stage: Stage) -> Sequence[Reduction]:
        if not self._reduces_early:
            return ()
        chunk = self._chunks[stage.stage]
        # With 8-bit parameters, gradients are in the buffer into which parameters are gathered.
        finish_gathers(chunk)
        return bucket_reductions(chunk, self.gradient_checks)

    def _data(self, call: ForwardCall, part: Part) -> Iterator[Any] | None:
        """What the script's forward step reads: one item, or no iterator on ranks without data."""
        work = call.work
        if self._batches[work.microbatch] is None:
            return None
        move = partial(self._moved, work, part, call.sub_microbatch)
        return iter([self._feed.take(work, move)])

    def _moved(
        self, work: Work, part: Part, sub_microbatch: SubMicrobatch
    ) -> tuple[Any, list[torch.Tensor]]:
        batch = self._batches[work.microbatch]
        data = self._staged.part_of(batch, part, sub_microbatch.items)
        return self._staged.to_device(data, self._device)

    def _inputs(self, call: ForwardCall, part: Part) -> list[torch.Tensor | None]:
        received = [self._received(other, call, part) for other in call.inputs]
        return self._staged.inputs(part, received)

    def _received(self, stage_input: StageInput, call: ForwardCall, part: Part) -> Received:
        """A message, of another module only the items that this call reads."""
        sub = stage_input.sub_microbatch
        message = Received(sub.module, sub.items, stage_input.sizes, stage_input.tensor)
        if sub.module == part.module:
            return message
        rule = self._staged.boundary(sub.module, outer=True)
        whole = all_rows(stage_input.tensor, rule, stage_input.sizes, self._tensor_group)
        message = message._replace(tensor=whole)
        return needed(message, call.sizes, dim=1 if rule.form == "batched" else 0)

    def _forward_step_of(self, call: ForwardCall) -> Callable[..., Any]:
        sub = call.sub_microbatch
        assert self._planned.sizes is not None
        whole = self._planned.sizes[sub.microbatch][sub.module]
        if not call.is_loss or len(sub.items) == len(whole):
            return self._forward_step
        return weighted_forward_step(
            self._forward_step,
            part_tokens=sum(whole[item].loss_tokens for item in sub.items),
            whole_tokens=sum(size.loss_tokens for size in whole),
            rank_tokens=sum(size.loss_tokens_on(self._context.rank) for size in whole),
            per_token=self._config.calculate_per_token_loss,
        )
