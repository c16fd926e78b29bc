"""The partitioner: what it chooses on batches whose best cut is known."""

import itertools
from random import Random

import pytest
from planning_cases import MODULE_GRAPHS, chain_case, encoder_case, make_item, make_problem
from typer.testing import CliRunner

from megatron_dip.cli.main import app
from megatron_dip.errors import ConfigError, InfeasibleError, PartitionError
from megatron_dip.partition import load_partition, partition_from_layers
from megatron_dip.partitioner.changes import changed
from megatron_dip.partitioner.choose import choose_partition
from megatron_dip.partitioner.cuts import (
    Cut,
    balanced_counts,
    layers_of,
    path_of,
    spread_layers,
    there_and_back,
)
from megatron_dip.partitioner.even_cuts import split_sizes
from megatron_dip.partitioner.judge import Judge
from megatron_dip.planner import make_plan
from megatron_dip.planner.evaluator import Budget
from megatron_dip.workload import Problem


def headed_chain(num_layers: int, num_microbatches: int, head_us: float, **fields) -> Problem:
    """One module on two ranks; the head takes as long as ``head_us`` of its layers of 3 us."""
    item = make_item(0, last_extra_forward_us=head_us)
    return make_problem(
        MODULE_GRAPHS["one module"],
        {"language": num_layers},
        [{"language": [item]} for _ in range(num_microbatches)],
        num_ranks=2,
        **fields,
    )


def images(num_microbatches: int, num_images: int, num_ranks: int = 2) -> Problem:
    """Four layers per module; one microbatch in two has images."""
    image = [make_item(number, 1.0) for number in range(num_images)]
    both = {"vision": image, "language": [make_item(0, num_images)]}
    text = {"language": [make_item(0, num_images)]}
    return make_problem(
        MODULE_GRAPHS["encoder"],
        {"vision": 4, "language": 4},
        [both if number % 2 else text for number in range(num_microbatches)],
        num_ranks=num_ranks,
    )


def makespan_us(problem: Problem, layers, evaluations: int = 48) -> float:
    plan = make_plan(problem, partition_from_layers(layers, 2), evaluations=evaluations)
    assert plan.estimate is not None
    return plan.estimate.makespan_us


@pytest.mark.parametrize(("head_us", "counts"), [(0.0, (3, 3)), (6.0, (4, 2))])
def test_the_rank_with_the_head_gets_fewer_layers(head_us, counts):
    problem = headed_chain(6, 1, head_us)
    for is_joint in (False, True):
        assert balanced_counts([problem], is_joint=is_joint) == {"language": counts}


def test_layers_are_spread_evenly_over_segments():
    assert spread_layers((4, 2), 1) == ((4, 2),)
    assert spread_layers((3, 2), 2) == ((2, 1), (1, 1))


def test_modules_balanced_together_fill_up_what_others_leave():
    """Three layers of 30 us and four of 3 us on two ranks."""
    problem = make_problem(
        MODULE_GRAPHS["encoder"],
        {"vision": 4, "language": 3},
        [{"vision": [make_item(0, 1.0)], "language": [make_item(0, 10.0)]}],
        num_ranks=2,
    )
    alone = balanced_counts([problem], is_joint=False)
    assert alone == {"vision": (2, 2), "language": (2, 1)}
    assert balanced_counts([problem], is_joint=True) == {"vision": (0, 4), "language": (2, 1)}


def test_a_path_may_visit_ranks_in_any_order():
    path = ((2, 1), (0, 1), (0, 2), (1, 1), (2, 3))
    layers = layers_of(path, 3)
    assert layers == ((0, 0, 1), (1, 0, 0), (2, 1, 3))
    assert path_of(layers) == path


def test_segments_there_and_back_turn_on_the_rank_where_they_are():
    layers = there_and_back(((1, 2, 3), (4, 5, 0), (6, 7, 8)))
    assert path_of(layers) == ((0, 1), (1, 2), (2, 3), (1, 5), (0, 4), (0, 6), (1, 7), (2, 8))


def test_changes_keep_all_layers_and_lead_everywhere():
    cut = Cut(layers={"language": ((2, 1),)}, sub_microbatch_tokens={"language": None})
    sizes, random = {"language": [None, 8]}, Random(1)
    seen = set()
    for _ in range(3000):
        cut = changed(cut, sizes, random)
        cut.partition().check_layers({"language": 3}, 2)
        seen.add((path_of(cut.layers["language"]), cut.sub_microbatch_tokens["language"]))
    # Three layers on two ranks in stages of 3, 2 and 1, 1 and 2, or 1 each: 2 + 4 + 4 + 8 paths.
    assert len(seen) == 2 * 18


@pytest.mark.parametrize("head_us", [0.0, 3.0, 8.0])
def test_no_cut_of_a_tiny_model_is_better_than_the_chosen_one(head_us):
    problem = headed_chain(4, 3, head_us)
    chosen = choose_partition([problem], max_changes=100)
    cuts = [
        (segment[:2],) if not any(segment[2:]) else (segment[:2], segment[2:])
        for segment in itertools.product(range(5), repeat=4)
        if sum(segment) == 4
    ]
    best_us = min(makespan_us(problem, {"language": cut}) for cut in cuts)
    plan = make_plan(problem, chosen.partition, evaluations=48)
    assert plan.estimate is not None
    assert plan.estimate.makespan_us <= best_us * (1 + 1e-12)


def test_images_are_split_where_few_microbatches_must_fill_many_ranks():
    samples = [images(4, 8, num_ranks=4), images(2, 8, num_ranks=4)]
    chosen = choose_partition(samples, minutes=0.1)
    assert chosen.partition.sub_microbatch_tokens["vision"] < 8
    split_us = whole_us = 0.0
    for sample in samples:
        split = make_plan(sample, chosen.partition, evaluations=48)
        whole = make_plan(sample, chosen.partition, max_tokens={"vision": None}, evaluations=48)
        assert split.estimate is not None
        assert whole.estimate is not None
        split_us += split.estimate.makespan_us
        whole_us += whole.estimate.makespan_us
    assert split_us < whole_us


def test_modules_are_cut_into_segments_where_fill_and_drain_are_long():
    sample = headed_chain(8, 2, head_us=0.0)
    chosen = choose_partition([sample], max_changes=60)
    assert chosen.partition.chains["language"][-1].segment > 0
    plan = make_plan(sample, chosen.partition, evaluations=48)
    assert plan.estimate is not None
    assert plan.estimate.makespan_us < makespan_us(sample, {"language": [[4, 4]]})


def test_a_rank_with_little_memory_gets_fewer_layers():
    fields = {"layer_static_bytes": 1000, "head_us": 0.0}
    wide = choose_partition(
        [headed_chain(4, 2, memory_limit_bytes=[9000, 9000], **fields)], max_changes=60
    )
    assert sum(stage.num_layers for stage in wide.partition.stages_on(0)) == 2
    tight = choose_partition(
        [headed_chain(4, 2, memory_limit_bytes=[1500, 9000], **fields)], max_changes=60
    )
    assert sum(stage.num_layers for stage in tight.partition.stages_on(0)) == 1


def test_a_limit_that_no_cut_keeps_is_reported():
    sample = headed_chain(4, 2, 0.0, layer_static_bytes=1000, memory_limit_bytes=[900, 900])
    with pytest.raises(InfeasibleError, match="rank 0"):
        choose_partition([sample], max_changes=20)


def test_the_same_samples_give_the_same_partition():
    samples = [images(4, 4)]
    first, second = (choose_partition(samples, minutes=0.03) for _ in range(2))
    assert first.partition.digest() == second.partition.digest()


def test_another_seed_tries_other_changes():
    samples = [images(4, 4)]
    start = partition_from_layers({"vision": [[2, 2]], "language": [[2, 2]]}, 2)
    judged = {
        choose_partition(samples, start=start, max_changes=40, seed=seed).num_judged
        for seed in range(4)
    }
    assert len(judged) > 1


def test_a_given_cut_is_the_one_that_is_changed():
    sample = headed_chain(6, 3, head_us=6.0)
    layers = {"language": ((1, 0), (0, 1), (1, 3))}
    start = partition_from_layers(layers, 2)
    kept = choose_partition([sample], start=start, max_changes=0)
    assert kept.partition.digest() == start.digest()
    assert kept.num_judged == 2
    better = choose_partition([sample], start=start, max_changes=100)
    assert better.utilisation > kept.utilisation


def test_a_given_cut_keeps_its_path_and_its_sizes():
    layers = {"vision": ((2, 0), (1, 1)), "language": ((0, 4),)}
    partition = partition_from_layers(layers, 2).model_copy(
        update={"sub_microbatch_tokens": {"vision": 8}}
    )
    cut = Cut.of(partition)
    assert cut.layers == layers
    assert cut.sub_microbatch_tokens == {"vision": 8, "language": None}
    assert cut.partition().digest() == partition.digest()


def test_a_given_cut_must_be_of_the_same_model():
    start = partition_from_layers({"language": [[3, 2]]}, 2)
    with pytest.raises(PartitionError, match="stages hold 5 layers"):
        choose_partition([headed_chain(6, 2, head_us=0.0)], start=start)


def test_sizes_that_split_nothing_further_are_left_out():
    """Three items of up to 6 tokens: whole, two and one, each alone."""
    items = [make_item(number, 1.0, tokens=tokens) for number, tokens in enumerate((6, 6, 4))]
    text = [make_item(0, 1.0)]
    batches = [{"vision": items, "language": text}, {"language": text}]
    layers = {"vision": 4, "language": 4}
    sample = make_problem(MODULE_GRAPHS["encoder"], layers, batches, num_ranks=2)
    assert split_sizes([sample]) == {"vision": [None, 11, 8]}


def test_a_cut_is_judged_with_the_schedules_that_the_budget_allows():
    """Twice the actions, about half the schedules: both take as long."""
    small, large = images(200, 1), images(400, 1)
    start = Cut.of(partition_from_layers({"vision": [[2, 2]], "language": [[2, 2]]}, 2))

    def effort(problem: Problem, budget: Budget) -> float:
        judge = Judge([problem], budget=budget, split_backward=False, minutes=1.0, progress=None)
        return judge.effort(start, 1.0)

    of_time = [effort(problem, Budget(None, 100.0)) for problem in (small, large)]
    assert of_time[1] == pytest.approx(of_time[0], rel=0.05)
    assert of_time[0] == pytest.approx(0.1 / 60, rel=0.05)
    of_schedules = [effort(problem, Budget(20, None)) for problem in (small, large)]
    assert of_schedules[1] > 1.3 * of_schedules[0]


def test_samples_must_be_alike_and_numbers_positive():
    with pytest.raises(ConfigError, match="no sample problems"):
        choose_partition([])
    with pytest.raises(ConfigError, match="0 evaluations"):
        choose_partition([images(2, 1)], evaluations=0)
    for minutes in (0.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="minutes"):
            choose_partition([images(2, 1)], minutes=minutes)
    with pytest.raises(PartitionError, match="sample 1 has other modules"):
        choose_partition([images(2, 1), chain_case(2, 2)[0]])


def test_progress_is_told_for_every_cut():
    told: list[tuple[str, int, float]] = []
    chosen = choose_partition(
        [images(2, 2)], max_changes=40, progress=lambda *step: told.append(step)
    )
    assert [done for _, done, _ in told] == list(range(1, chosen.num_judged + 1))
    assert {step for step, _, _ in told} == {"segments", "changes", "finals"}
    shares = [share for _, _, share in told]
    assert shares == sorted(shares)
    assert all(0 <= share <= 1 for share in shares)


def test_little_effort_judges_few_cuts_and_the_same_on_every_machine():
    samples = [images(4, 4), images(6, 4)]
    counts = [choose_partition(samples, minutes=minutes).num_judged for minutes in (0.1, 0.03)]
    assert counts[1] < counts[0] < 1000
    assert choose_partition(samples, minutes=0.03).num_judged == counts[1]


def test_small_groups_pass_quickly_where_memory_is_short():
    """Whole microbatches would hold too much for two of them at once."""
    image = [make_item(number, 1.0, activation_bytes=100) for number in range(8)]
    text = [make_item(0, 2.0, activation_bytes=10)]
    sample = make_problem(
        MODULE_GRAPHS["encoder"],
        {"vision": 4, "language": 4},
        [{"vision": image, "language": text} for _ in range(6)],
        num_ranks=4,
        memory_limit_bytes=[1000] * 4,
    )
    chosen = choose_partition([sample], minutes=0.03)
    assert chosen.partition.sub_microbatch_tokens["vision"] < 8


def test_the_command_writes_a_partition_that_plans_take(tmp_path):
    sample, output, plan = tmp_path / "a.json", tmp_path / "p.json", tmp_path / "plan.json"
    sample.write_text(encoder_case()[0].model_dump_json())
    arguments = ["partition", "--problem", str(sample), "--problem", str(sample)]
    result = CliRunner().invoke(app, [*arguments, "--changes", "20", "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert "useful work on the samples" in result.output
    load_partition(output).check_covers(encoder_case()[0])
    again = [*arguments, "--start", str(output), "--changes", "0", "-o", str(tmp_path / "q.json")]
    assert CliRunner().invoke(app, again).exit_code == 0
    assert (tmp_path / "q.json").read_text() == output.read_text()
    arguments = ["plan", "--problem", str(sample), "--partition", str(output), "-o", str(plan)]
    assert CliRunner().invoke(app, arguments).exit_code == 0


def test_the_command_names_a_sample_that_is_none(tmp_path):
    sample = tmp_path / "a.json"
    sample.write_text('{"format": "megatron-dip/problem"}')
    arguments = ["partition", "--problem", str(sample), "-o", str(tmp_path / "p.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "num_ranks" in result.output


def test_every_rank_gets_a_stage_or_the_partitioner_says_that_it_cannot():
    """A cut that leaves a rank idle may be the fastest, but no run can use it."""
    item = make_item(0, 1.0)
    modules, batches = MODULE_GRAPHS["one module"], [{"language": [item]}]
    slow_transfers = {"latency_us": 1e6, "num_ranks": 3}
    enough = make_problem(modules, {"language": 3}, batches, **slow_transfers)
    chosen = choose_partition([enough], max_changes=40).partition
    assert {stage.rank for stage in chosen.stages} == {0, 1, 2}
    for problem in (
        make_problem(modules, {"language": 1}, batches, **slow_transfers | {"num_ranks": 5}),
        make_problem(modules, {"language": 1}, batches, **slow_transfers | {"num_ranks": 4}),
    ):
        with pytest.raises(PartitionError, match="have no stage of any module"):
            choose_partition([problem], max_changes=10)
