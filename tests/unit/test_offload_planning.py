"""The planner with a link to the host: limits kept, time saved, nothing lent in vain."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import cases, chain_case, make_graph, tightest_limits

from megatron_dip.cli.comparison import Row, print_rows
from megatron_dip.config import OffloadConfig, ScheduleConfig
from megatron_dip.costs import ItemSize, cluster_builder, load_cluster, load_model
from megatron_dip.errors import ConfigError
from megatron_dip.plan import Plan, QueueModel
from megatron_dip.plan.validation import check_memory, validate_plan
from megatron_dip.planner import make_plan
from megatron_dip.simulator import simulate
from megatron_dip.workload import HostLink, Problem

CONFIGS = Path(__file__).parents[2] / "configs"
QUEUES = [None, QueueModel(communicators=1)]


def limited(problem: Problem, limits: list[int], host: int, **fields: float) -> Problem:
    link = HostLink(
        memory_bytes=(host,) * problem.num_ranks,
        **({"latency_us": 0.0, "bytes_per_us": 10.0} | fields),
    )
    return problem.model_copy(update={"memory_limit_bytes": tuple(limits), "host_link": link})


def checked(plan: Plan) -> Plan:
    """``plan``, which keeps all limits and says what it takes."""
    validate_plan(plan)
    simulation = simulate(plan)
    check_memory(plan, simulation.peak_bytes, simulation.host_peak_bytes)
    assert plan.estimate == simulation.estimate(plan.estimate.lower_bound_us)
    return plan


@settings(max_examples=60, deadline=None)
@given(
    cases(), st.sampled_from([2.0, 20.0]), st.sampled_from([0, 30, 10**9]), st.sampled_from(QUEUES)
)
def test_any_plan_keeps_the_limits_of_device_and_host(case, bytes_per_us, host, queues):
    problem, partition = case
    graph = make_graph(problem, partition, None)
    problem = limited(problem, tightest_limits(graph), host, bytes_per_us=bytes_per_us)
    checked(make_plan(problem, partition, evaluations=12, queues=queues))


@pytest.mark.parametrize("queues", QUEUES)
def test_what_is_copied_beside_computing_takes_no_time(queues):
    problem, partition = chain_case(4, 12, 1.0)
    free = make_plan(problem, partition, evaluations=60)
    # 1F1B holds 4, 3, 2 and 1 works of 10 bytes.
    limits = [20, 20, 20, 10]
    recomputed = problem.model_copy(update={"memory_limit_bytes": tuple(limits)})
    recomputed = make_plan(recomputed, partition, evaluations=60, queues=queues)
    fast = limited(problem, limits, 10**9, bytes_per_us=20.0)
    offloaded = checked(make_plan(fast, partition, evaluations=60, queues=queues))
    assert offloaded.offload and not offloaded.recompute
    assert offloaded.estimate.makespan_us == free.estimate.makespan_us
    assert offloaded.estimate.makespan_us < recomputed.estimate.makespan_us


def test_nothing_goes_to_a_host_without_room_or_over_a_link_that_is_too_slow():
    problem, partition = chain_case(4, 12, 1.0)
    limits = [20] * 4
    for hopeless in (
        limited(problem, limits, 9),
        limited(problem, limits, 10**9, bytes_per_us=1e-3),
        limited(problem, limits, 10**9, latency_us=1e6),
    ):
        plan = checked(make_plan(hopeless, partition, evaluations=60))
        assert not plan.offload and plan.recompute
    kept = limited(problem, limits, 10**9)
    assert make_plan(kept, partition, evaluations=60).offload
    assert not make_plan(kept, partition, evaluations=60, memory_program=False).offload


def test_a_configuration_states_the_link_of_each_rank():
    stated = {"link_gb_per_s": 50.0, "ranks_per_link": 2, "host_memory_gib": 2.0}
    link = OffloadConfig.parse(stated, ConfigError).link(3)
    assert link == HostLink(latency_us=20.0, bytes_per_us=25000.0, memory_bytes=(2**31,) * 3)
    ScheduleConfig.parse({"offload": stated}, ConfigError)
    with pytest.raises(ConfigError, match=r"offload.* beside planner one_f_one_b"):
        ScheduleConfig.parse({"offload": stated, "planner": "one_f_one_b"}, ConfigError)


def test_the_problem_of_a_cluster_has_its_link():
    cluster = load_cluster(CONFIGS / "clusters" / "h100_16.yaml")
    model = load_model(CONFIGS / "models" / "vlm_s.yaml")
    batch = [{"language": [ItemSize(tokens=8, spans=(8,))]}]
    assert cluster_builder(model, cluster).build(batch).host_link is None
    offload = OffloadConfig(link_gb_per_s=50.0, host_memory_gib=1.0)
    linked = cluster.model_copy(update={"offload": offload})
    assert cluster_builder(model, linked).build(batch).host_link == offload.link(4)


def test_tables_state_what_the_host_holds(capsys):
    problem, partition = chain_case(4, 12, 1.0)
    plan = make_plan(limited(problem, [20] * 4, 10**8), partition, evaluations=20)
    row = Row.of_plan("lent", plan, simulate(plan))
    assert row.keeps_memory_limit
    print_rows([row])
    assert "host" in capsys.readouterr().out
    assert not row._replace(host_peak_bytes=(10**9,) * 4).keeps_memory_limit
