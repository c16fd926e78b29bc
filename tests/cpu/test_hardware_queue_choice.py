"""Which hardware queues plans of a run are made for."""

import pytest
import torch.distributed as dist

from megatron_dip.errors import ConfigError
from megatron_dip.integration.hardware_queues import choose_queues
from megatron_dip.partition import partition_from_layers
from megatron_dip.plan import Plan, QueueModel
from megatron_dip.planner import make_plan
from megatron_dip.workload import parse_problem

PARTITION = partition_from_layers({"language": [[1, 1]]}, 2)
UPSTREAM: dict[str, tuple[str, ...]] = {"language": ()}
ONE = QueueModel(communicators=2)


def run_on(monkeypatch: pytest.MonkeyPatch, backend: str, connections: str | None) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if connections is not None:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)


@pytest.mark.parametrize(
    ("backend", "connections", "expected"),
    [
        ("nccl", "1", ONE),
        # CUDA's own default, and a number that is none: streams share 8 queues.
        ("nccl", None, ONE),
        ("nccl", "many", ONE),
        ("nccl", "31", ONE),
        ("nccl", "32", None),
        ("gloo", "1", None),
    ],
)
def test_streams_that_share_queues_count_as_one_queue(
    monkeypatch: pytest.MonkeyPatch, backend: str, connections: str | None, expected: object
) -> None:
    run_on(monkeypatch, backend, connections)
    assert choose_queues("auto", PARTITION, UPSTREAM) == expected
    assert choose_queues("one", PARTITION, UPSTREAM) == ONE
    assert choose_queues("many", PARTITION, UPSTREAM) is None


def plan_of(queues: QueueModel | None) -> Plan:
    module = {"name": "language", "num_layers": 2, "upstream": [], "trainable": True}
    costs = dict.fromkeys(("forward_us", "input_grad_us", "weight_grad_us"), 1.0)
    item = {"item": 0, "tokens": 1, "activation_bytes": 1, "boundary_bytes": 1, **costs}
    problem = parse_problem(
        {
            "num_ranks": 2,
            "memory_limit_bytes": [1000, 1000],
            "transfer": {"latency_us": 0.0, "bytes_per_us": 1.0},
            "modules": [{**module, "layer_overhead_us": 0.0, "layer_static_bytes": 0}],
            "microbatches": [{"language": [item]}],
        }
    )
    return make_plan(problem, PARTITION, queues=queues)


def test_one_plan_for_all_batches_brings_its_queues_and_must_be_for_one_where_ranks_have_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_on(monkeypatch, "nccl", "1")
    fixed = plan_of(QueueModel(communicators=3))
    assert choose_queues("auto", PARTITION, UPSTREAM, fixed) == fixed.queues
    with pytest.raises(ConfigError, match="--hardware-queues one"):
        choose_queues("auto", PARTITION, UPSTREAM, plan_of(None))
    # Its receives hold up nothing where every stream has a queue.
    assert choose_queues("many", PARTITION, UPSTREAM, fixed) == fixed.queues
    assert choose_queues("many", PARTITION, UPSTREAM, plan_of(None)) is None
