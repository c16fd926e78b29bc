"""Runs Megatron's stages for the executor, through Megatron's own forward and backward steps.

``schedules.forward_step`` and ``schedules.backward_step`` bring autocast, loss scaling, the
scalers of auxiliary losses and the script's ``forward_step`` with them, so that the loss means
what it means under Megatron's own schedule.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_viewless_tensor

from megatron_dip.families.packed.batches import Microbatch, StageData
from megatron_dip.integration.chunks import StageBatch, UpstreamRows
from megatron_dip.integration.losses import LossReports, weighted_forward_step
from megatron_dip.partition import Stage
from megatron_dip.planner import PlannedBatch
from megatron_dip.runtime import ForwardCall, SavedForward, backward_inputs, backward_weights
from megatron_dip.runtime.measure import StoredBytes
from megatron_dip.workload import SubMicrobatch

__all__ = ["MegatronRunner"]


class MegatronRunner:
    """The stages of one rank for one iteration.

    Args:
        chunks: Wrapped chunks by stage number.
        config: The configuration shared by the chunks.
        forward_step: The script's own.
        microbatches: The data of this iteration.
        planned: What is run of it, with the sizes of its items.
        context_parallel_size: Ranks over which Megatron averages a two-part loss.
        reduces_early: Whether a stage's gradients are reduced while others still compute.
        first_microbatch: False where cached fp8 weights stay valid (validation after its first).
        collect_non_loss_data: As in Megatron's schedules.
        counts_stored_bytes: Whether to count what autograd keeps, see ``stored``; a microsecond
            or two for every tensor.
    """

    def __init__(
        self,
        *,
        chunks: Mapping[int, torch.nn.Module],
        config: TransformerConfig,
        forward_step: Callable[..., Any],
        microbatches: Sequence[Microbatch],
        planned: PlannedBatch,
        context_parallel_size: int,
        reduces_early: bool,
        first_microbatch: bool = True,
        collect_non_loss_data: bool = False,
        counts_stored_bytes: bool = False,
    ) -> None:
        self._chunks = dict(chunks)
        self._config = config
        self._forward_step = forward_step
        self._microbatches = tuple(microbatches)
        self._planned = planned
        self._context_parallel_size = context_parallel_size
        self._reduces_early = reduces_early
        self._collect_non_loss_data = collect_non_loss_data
        self._device = next(next(iter(self._chunks.values())).parameters()).device
        self._fresh_chunks = set(self._chunks) if first_microbatch else set()
        self._data: dict[SubMicrobatch, StageData] = {}
        self.reports = LossReports()
        self.stored: StoredBytes | None = None
        if counts_stored_bytes:
            parameters = [p for chunk in self._chunks.values() for p in chunk.parameters()]
            self.stored = StoredBytes(parameters)
        self.num_tokens = torch.zeros([], dtype=torch.int, device=self._device)

    def forward(self, call: ForwardCall) -> torch.Tensor:
        with self.stored.counting() if self.stored else nullcontext():
            return self._forward(call)

    def _forward(self, call: ForwardCall) -> torch.Tensor:
        batch = self._stage_batch(call)
        store: list[Any] = []
        number = call.work.microbatch
        stage = call.stage.stage
        output, num_tokens = schedules.forward_step(
            self._forward_step_of(call),
            iter([batch]),
            self._chunks[stage],
            len(self._microbatches),
            [stage_input.tensor for stage_input in call.inputs],
            store,
            self._config,
            self._context_parallel_size,
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
        # A view would keep its base alive when its own memory is freed.
        viewless: torch.Tensor = make_viewless_tensor(
            tensor, requires_grad=tensor.requires_grad, keep_graph=True
        )
        return viewless

    def backward(
        self, saved: SavedForward, output_grad: torch.Tensor | None
    ) -> list[torch.Tensor | None]:
        inputs = [tensor if tensor.requires_grad else None for tensor in saved.input_tensors]
        grads: list[torch.Tensor | None] = schedules.backward_step(
            inputs, saved.output, output_grad, self._config
        )
        return grads

    def input_grad(
        self, saved: SavedForward, output_grad: torch.Tensor | None
    ) -> list[torch.Tensor | None]:
        scale = self._config.grad_scale_func
        if output_grad is None and scale is not None:
            saved.output = scale(saved.output)
        return backward_inputs(saved, output_grad)

    def weight_grad(self, saved: SavedForward) -> None:
        backward_weights(saved, self._chunks[saved.call.stage.stage])

    def release_output(self, saved: SavedForward) -> None:
        if not saved.call.is_loss:
            schedules.deallocate_output_tensor(
                saved.output, self._config.deallocate_pipeline_outputs
            )

    def reduce_grad(self, stage: Stage) -> None:
        if self._reduces_early:
            self._chunks[stage.stage].start_grad_sync()  # type: ignore[operator]

    def _forward_step_of(self, call: ForwardCall) -> Callable[..., Any]:
        if not call.is_loss:
            return self._forward_step
        sub = call.sub_microbatch
        return weighted_forward_step(
            self._forward_step,
            part_tokens=sum(size.loss_tokens for size in call.sizes),
            whole_tokens=self._planned.num_loss_tokens(sub.module, sub.microbatch),
            per_token=self._config.calculate_per_token_loss,
        )

    def _stage_batch(self, call: ForwardCall) -> StageBatch:
        sub = call.sub_microbatch
        microbatch = self._microbatches[sub.microbatch]
        data = self._data.get(sub)
        if data is None:
            made: StageData = microbatch.sub_batch(sub.module, sub.items)
            data = self._data[sub] = made.to(self._device)
        upstream = tuple(
            UpstreamRows(
                module=other.sub_microbatch.module,
                items=other.sub_microbatch.items,
                num_rows=tuple(size.num_output_rows for size in other.sizes),
            )
            for other in call.inputs
            if other.sub_microbatch.module != sub.module
        )
        return StageBatch(data=data, upstream=upstream, recompute_layers=call.recompute_layers)
