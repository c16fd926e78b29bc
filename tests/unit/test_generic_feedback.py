"""Costs of a model that nobody described follow the machine that it runs on within some steps."""

from dataclasses import replace
from random import Random

from machine_cases import PARTITION, Machine, batch, builder

from megatron_dip.costs.devices import device_preset
from megatron_dip.planner import make_plan
from megatron_dip.simulator.measured import CostFeedback, measure_actions


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
