"""What a schedule itself costs: the same steps under Megatron's 1F1B and under the executor.

    torchrun --standalone --nproc-per-node 2 -m megatron_dip.launch --cpu --pin \
        benchmarks/schedule_overhead.py

Two ranks, one tiny linear layer each, so that computing takes next to nothing and the rest is
schedule and transfers.  Both run the same 1F1B order through Megatron's own forward and backward
steps; rounds alternate.  Prints, as JSON, medians in microseconds for one forward or backward step,
and the median over rounds of the executor's time over Megatron's:

- the time that passed, which on a busy machine is mostly waiting for the other rank to be woken;
- the processor time of the threads that run the schedule, mean of both ranks;
- what a rank does once for every new plan, while gradients of the step before are reduced: reading
  it from its bytes and looking up what the actions need, shared out over the steps of the plan.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import schedules

from megatron_dip.costs import BatchSizes, Boundary, ItemSize
from megatron_dip.partition import uniform_partition
from megatron_dip.plan import Plan, pipeline_channels
from megatron_dip.planner import PlannedBatch, make_plan, pack_plan, unpack_plan
from megatron_dip.runtime import (
    Channels,
    Executor,
    ForwardCall,
    SavedForward,
    create_channel_groups,
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

    def reductions(self, stage: object) -> tuple[()]:
        """One replica has nothing to reduce."""
        return ()


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
    return Executor(
        rank=rank,
        channels=Channels(
            rank=rank,
            pipeline=[0, 1],
            groups=create_channel_groups(channels, [[0, 1]], TIMEOUT_SECONDS),
            device=torch.device("cpu"),
            timeout_seconds=TIMEOUT_SECONDS,
        ),
        boundary=lambda module, *, outer: Boundary("packed", WIDTH),
        dtype=torch.float32,
    )


class Times(NamedTuple):
    """Microseconds per forward or backward step."""

    passed_us: float
    cpu_us: float
    """Of the thread that runs the schedule, mean of both ranks."""


def measure(run: Callable[[], object]) -> Times:
    dist.barrier()
    start, start_cpu = time.perf_counter(), time.thread_time()
    run()
    cpu = torch.tensor(time.thread_time() - start_cpu, dtype=torch.float64)
    dist.barrier()
    passed = time.perf_counter() - start
    dist.all_reduce(cpu)
    per_step = 1e6 / (2 * NUM_MICROBATCHES)
    return Times(passed * per_step, float(cpu) / 2 * per_step)


def summary(megatron: list[Times], executor: list[Times], plans: list[Times]) -> dict[str, Any]:
    ratios = [
        [ours / theirs for ours, theirs in zip(a, b, strict=True)]
        for a, b in zip(executor, megatron, strict=True)
    ]
    return {
        "date": date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "rounds": len(ratios),
        "megatron_us": median(one.passed_us for one in megatron),
        "executor_us": median(one.passed_us for one in executor),
        "ratio": median(passed for passed, _ in ratios),
        "megatron_cpu_us": median(one.cpu_us for one in megatron),
        "executor_cpu_us": median(one.cpu_us for one in executor),
        "cpu_ratio": median(cpu for _, cpu in ratios),
        "new_plan_cpu_us": median(one.cpu_us for one in plans),
    }


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

    sizes: BatchSizes = ({"language": [ItemSize(tokens=ROWS, spans=(ROWS,))]},) * NUM_MICROBATCHES
    batch, packed = PlannedBatch(plan, sizes), pack_plan(plan, [sizes])

    def prepare_plan() -> None:
        executor.prepare(unpack_plan(packed, lambda _: plan.problem, plan.partition, own=sizes))

    def run_executor() -> None:
        executor.run(batch, runner)

    rounds = []
    for _ in range(ROUNDS):
        new_plan = measure(prepare_plan)
        executor.prepare(batch)
        rounds.append((measure(run_megatron), measure(run_executor), new_plan))
    # The first round warms up.
    result = summary(*map(list, zip(*rounds[1:], strict=True)))
    if dist.get_rank() == 0:
        print(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
