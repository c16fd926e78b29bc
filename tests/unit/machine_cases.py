"""A small model that nobody described, and a machine that is not as its costs state."""

from dataclasses import replace
from random import Random

from cost_cases import item, times
from test_generic_costs import generic

from megatron_dip.costs import ItemSizes, ModelShape, Parallelism, ProblemBuilder, work_costs
from megatron_dip.costs.builder import measured_model
from megatron_dip.costs.devices import Device, device_preset
from megatron_dip.costs.memory import MemoryModel
from megatron_dip.costs.weights import PartWeights, StageFacts
from megatron_dip.partition import partition_from_layers
from megatron_dip.plan import Action, ActionType, PipelineGraph, Plan
from megatron_dip.workload import TransferCost

PARTITION = partition_from_layers({"vision": ((1, 1),), "language": ((3, 1), (1, 1))}, num_ranks=2)
FACTS = (
    StageFacts("vision", 0, (PartWeights(4000),) * 2, PartWeights(90), PartWeights(700)),
    StageFacts("language", 0, (PartWeights(9000),) * 6, PartWeights(2048), PartWeights(2048)),
)


def model() -> ModelShape:
    vision = generic(name="vision", num_layers=2, layers={"is_causal": False})
    language = generic(num_layers=6, vocab_size=256, upstream=("vision",))
    return measured_model(ModelShape(name="m", modules=(vision, language)), FACTS)


def builder(device: Device) -> ProblemBuilder:
    return ProblemBuilder(
        model=model(),
        times=times(device),
        memory=MemoryModel(parallel=Parallelism()),
        num_ranks=2,
        memory_limit_bytes=10**12,
        transfer=TransferCost(latency_us=1.0, bytes_per_us=1e6),
    )


class Machine:
    """Another one than costs state: slower by far, with other overheads.

    Args:
        slowness: Of every rank.
        gradient: By how much more a gradient of inputs takes than its operations say.
    """

    def __init__(self, slowness: tuple[float, float] = (1.0, 1.4), gradient: float = 1.3) -> None:
        self._slowness, self._gradient = slowness, gradient
        slow = replace(
            device_preset("H100"),
            peak_flops_per_us=3000.0,
            best_efficiency=1.0,
            half_rate_flops=0.0,
            layer_overhead_us=250.0,
        )
        self.problems = builder(slow)

    def run(self, plan: Plan, sizes: list[ItemSizes]) -> list[tuple[Action, float]]:
        """Compute actions of ``plan`` and what they take."""
        true = PipelineGraph(self.problems.build(sizes), PARTITION, plan.sub_microbatches)
        costs = work_costs(true)
        found = []
        for work, number in true.numbers.items():
            slowness = self._slowness[PARTITION[work.stage].rank]
            backward_us = (
                self._gradient * costs.input_grad_us[number] + costs.weight_grad_us[number]
            )
            for kind, us in (
                (ActionType.FORWARD, costs.forward_us[number]),
                (ActionType.BACKWARD, backward_us),
            ):
                found.append((work.action(kind), slowness * us))
        return found


def batch(random: Random) -> list[ItemSizes]:
    def microbatch() -> ItemSizes:
        images = [item(random.choice((64, 128, 256))) for _ in range(random.randint(1, 6))]
        text = item(*(random.randint(40, 400) for _ in range(random.randint(1, 4))))
        return {"vision": images, "language": [text]}

    return [microbatch() for _ in range(8)]
