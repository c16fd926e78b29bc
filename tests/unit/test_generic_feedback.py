"""Costs of a model that nobody described follow the machine that it runs on within some steps."""

from dataclasses import replace
from random import Random

from cost_cases import item, times
from test_generic_costs import generic

from megatron_dip.costs import ModelShape, Parallelism, ProblemBuilder, work_costs
from megatron_dip.costs.builder import measured_model
from megatron_dip.costs.devices import device_preset
from megatron_dip.costs.memory import MemoryModel
from megatron_dip.costs.weights import PartWeights, StageFacts
from megatron_dip.partition import partition_from_layers
from megatron_dip.plan import ActionType, PipelineGraph
from megatron_dip.planner import make_plan
from megatron_dip.simulator.measured import CostFeedback, measure_actions
from megatron_dip.workload import TransferCost

PARTITION = partition_from_layers({"vision": ((1, 1),), "language": ((3, 1), (1, 1))}, num_ranks=2)
FACTS = (
    StageFacts("vision", 0, (PartWeights(4000),) * 2, PartWeights(90), PartWeights(700)),
    StageFacts("language", 0, (PartWeights(9000),) * 6, PartWeights(2048), PartWeights(2048)),
)


def model():
    vision = generic(name="vision", num_layers=2, layers={"is_causal": False})
    language = generic(num_layers=6, vocab_size=256, upstream=("vision",))
    return measured_model(ModelShape(name="m", modules=(vision, language)), FACTS)


def builder(device):
    return ProblemBuilder(
        model=model(),
        times=times(device),
        memory=MemoryModel(parallel=Parallelism()),
        num_ranks=2,
        memory_limit_bytes=10**12,
        transfer=TransferCost(latency_us=1.0, bytes_per_us=1e6),
    )


class Machine:
    """Another one than costs state: slower by far, most of all at attention and in backwards, with
    other overheads; one rank is slower than the other."""

    def __init__(self):
        slow = replace(
            device_preset("H100"),
            peak_flops_per_us=3000.0,
            best_efficiency=1.0,
            half_rate_flops=0.0,
            layer_overhead_us=250.0,
        )
        self._builder = builder(slow)

    def run(self, plan, sizes):
        """Compute actions of ``plan`` and what they take."""
        true = PipelineGraph(self._builder.build(sizes), PARTITION, plan.sub_microbatches)
        costs = work_costs(true)
        found = []
        for work, number in true.numbers.items():
            slowness = (1.0, 1.4)[PARTITION[work.stage].rank]
            backward_us = 1.3 * costs.input_grad_us[number] + costs.weight_grad_us[number]
            for kind, us in (
                (ActionType.FORWARD, costs.forward_us[number]),
                (ActionType.BACKWARD, backward_us),
            ):
                found.append((work.action(kind), slowness * us))
        return found


def batch(random):
    def microbatch():
        images = [item(random.choice((64, 128, 256))) for _ in range(random.randint(1, 6))]
        text = item(*(random.randint(40, 400) for _ in range(random.randint(1, 4))))
        return {"vision": images, "language": [text]}

    return [microbatch() for _ in range(8)]


def test_predictions_of_a_model_that_nobody_described_become_true():
    machine, random = Machine(), Random(3)
    current = builder(replace(device_preset("H100"), layer_overhead_us=60.0))
    feedback = CostFeedback(PARTITION, current.layer_overheads())
    errors = []
    for _ in range(8):
        sizes = batch(random)
        plan = make_plan(current.build(sizes), PARTITION)
        measured = measure_actions(plan, machine.run(plan, sizes))
        errors.append(measured.error)
        if feedback.update(measured.sums):
            corrections = feedback.corrections
            current = replace(
                current,
                stage_factors=corrections.factors,
                layer_overheads_us=corrections.overheads_us,
            )
    assert errors[0] > 3.0
    assert max(errors[-3:]) < 0.1, [round(error, 3) for error in errors]
