"""What a schedule itself costs: the same steps under Megatron's 1F1B and under the executor.

    torchrun --standalone --nproc-per-node 2 -m megatron_dip.launch --cpu --pin \
        benchmarks/schedule_overhead.py

Two ranks, one tiny linear layer each, so that computing takes next to nothing and the rest is
schedule and transfers.  Both run the same 1F1B order through Megatron's own forward and backward
steps; rounds alternate.  Prints, as JSON, the median time of one forward or backward step.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import schedules

from megatron_dip.partition import uniform_partition
from megatron_dip.plan import Plan
from megatron_dip.planner import make_plan
from megatron_dip.runtime import (
    BoundaryRule,
    BoundaryRules,
    Channels,
    Executor,
    ForwardCall,
    SavedForward,
    create_channel_groups,
    pipeline_channels,
)
from megatron_dip.workload import Item, Module, Problem, TransferCost

NUM_MICROBATCHES = 64
ROWS, WIDTH = 8, 16
ROUNDS = 21
TIMEOUT_SECONDS = 60.0


class TinyStage(torch.nn.Module):
    """One linear layer with what Megatron's schedules look up."""

    def __init__(self, config: ModelParallelConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = torch.nn.Linear(WIDTH, WIDTH)
        self._input: torch.Tensor | None = None

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        (self._input,) = tensors or [None]

    def forward(self) -> torch.Tensor:
        rows = torch.ones(ROWS, 1, WIDTH) if self._input is None else self._input
        # Megatron frees what was sent, and refuses to where it is a view, as that of a product is.
        output: torch.Tensor = self.linear(rows).clone()
        return output


def forward_step(data: Iterator[Any], model: TinyStage) -> tuple[torch.Tensor, Callable[..., Any]]:
    return model(), lambda output: (output.sum(), {"loss": output.detach().sum()})


class StepRunner:
    """The executor's runner over Megatron's steps, as in training."""

    def __init__(self, model: TinyStage) -> None:
        self._model = model
        self._config = model.config

    def forward(self, call: ForwardCall) -> torch.Tensor:
        output, _ = schedules.forward_step(
            forward_step,
            iter(()),
            self._model,
            NUM_MICROBATCHES,
            [stage_input.tensor for stage_input in call.inputs] or [None],
            [],
            self._config,
            1,
            current_microbatch=call.work.microbatch,
            is_last_stage=call.is_loss,
        )
        tensor: torch.Tensor = output[0]
        return tensor

    def backward(
        self, saved: SavedForward, output_grad: torch.Tensor | None
    ) -> list[torch.Tensor | None]:
        grads: list[torch.Tensor | None] = schedules.backward_step(
            saved.input_tensors, saved.output, output_grad, self._config
        )
        return grads

    input_grad = backward

    def weight_grad(self, saved: SavedForward) -> None:
        raise RuntimeError("the benchmark's plan does not split backwards")

    def release_output(self, saved: SavedForward) -> None:
        if not saved.call.is_loss:
            schedules.deallocate_output_tensor(saved.output, True)

    def reduce_grad(self, stage: object) -> None:
        """One replica: nothing to reduce."""


def make_tiny_plan() -> Plan:
    """1F1B of one module with one layer per rank."""
    item = Item(
        item=0,
        tokens=ROWS,
        forward_us=1.0,
        input_grad_us=1.0,
        weight_grad_us=1.0,
        activation_bytes=1,
        boundary_bytes=1,
    )
    module = Module(
        name="language",
        num_layers=2,
        upstream=(),
        trainable=True,
        layer_overhead_us=0.0,
        layer_static_bytes=0,
    )
    problem = Problem(
        num_ranks=2,
        memory_limit_bytes=(10**9,) * 2,
        transfer=TransferCost(latency_us=0.0, bytes_per_us=1.0e9),
        modules=(module,),
        microbatches=({"language": (item,)},) * NUM_MICROBATCHES,
    )
    partition = uniform_partition({"language": 2}, {"language": 1}, 2)
    return make_plan(problem, partition, algorithm="one_f_one_b")


def make_executor(plan: Plan) -> Executor:
    rank = parallel_state.get_pipeline_model_parallel_rank()
    channels = pipeline_channels(plan.partition, {"language": ()})
    rule = {"language": BoundaryRule(width=WIDTH, dtype=torch.float32)}
    return Executor(
        rank=rank,
        channels=Channels(
            rank=rank,
            pipeline=[0, 1],
            groups=create_channel_groups(channels, [[0, 1]], TIMEOUT_SECONDS),
            device=torch.device("cpu"),
            timeout_seconds=TIMEOUT_SECONDS,
        ),
        boundaries=BoundaryRules(inner=rule, outer=rule),
    )


def time_us(run: Callable[[], object]) -> float:
    """Microseconds of ``run`` per forward or backward step of this rank."""
    dist.barrier()
    start = time.perf_counter()
    run()
    dist.barrier()
    return (time.perf_counter() - start) * 1e6 / (2 * NUM_MICROBATCHES)


def main() -> None:
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    config = ModelParallelConfig(
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        batch_p2p_comm=False,
        deallocate_pipeline_outputs=True,
    )
    config.hidden_size = WIDTH  # type: ignore[attr-defined]
    model = TinyStage(config)
    plan = make_tiny_plan()
    runner = StepRunner(model)
    executor = make_executor(plan)

    def run_megatron() -> None:
        schedules.forward_backward_pipelining_without_interleaving(
            forward_step_func=forward_step,
            data_iterator=iter(()),
            model=[model],
            num_microbatches=NUM_MICROBATCHES,
            seq_length=ROWS,
            micro_batch_size=1,
            forward_only=False,
        )

    samples: dict[str, list[float]] = {"megatron_us": [], "executor_us": []}
    for number in range(ROUNDS):
        megatron, ours = time_us(run_megatron), time_us(lambda: executor.run(plan, runner))
        if number:  # The first round warms up.
            samples["megatron_us"].append(megatron)
            samples["executor_us"].append(ours)
    if dist.get_rank() == 0:
        print(json.dumps({name: statistics.median(values) for name, values in samples.items()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
